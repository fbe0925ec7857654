"""Counts of what an embedding did since init, read from the device to the host, with warnings that name what to change."""

import warnings
from typing import NamedTuple

import jax
import numpy as np

from mpembed_jax.state import COUNTERS, EmbeddingState

_BYPASS_LIMIT = 0.2  # share of unique ids trained outside the cache above which a larger one would pay
_MIN_UNIQUE = 1000  # too few to judge the cache by
_SEEN_BUFFERS: dict[tuple, tuple[int, int]] = {}  # (spec, key) -> (step, address of the table) at the last look


class CacheStats(NamedTuple):
    """Counts since init, as host integers; see cache.Counts for what each means."""

    steps: int
    requests: int
    unique: int
    hits: int
    hit_requests: int
    misses: int
    bypasses: int
    evictions: int
    write_backs: int
    out_of_range: int
    dropped: int
    nonfinite_rows: int
    refused_updates: int

    @property
    def hit_rate(self) -> float:
        """Share of requests whose row was in the cache before its step, 0 without requests."""
        return self.hit_requests / self.requests if self.requests else 0.0

    @property
    def unique_hit_rate(self) -> float:
        """Share of unique ids whose row was in the cache before its step, 0 without requests."""
        return self.hits / self.unique if self.unique else 0.0


def stats(state: EmbeddingState) -> CacheStats:
    """Returns the counts since init, and warns (once per process and place) where a setting should change.

    Args:
      state: concrete, not traced; waits for the device.

    Returns:
      CacheStats.

    Raises:
      TypeError: under a trace; log `plan.counts` there.
      ValueError: if ids were out of range under out_of_range="raise", or updates were refused.
    """
    if isinstance(state.counters, jax.core.Tracer):
        raise TypeError("stats reads the host and cannot be traced; inside jit log plan.counts, which are device scalars")
    words = np.asarray(state.counters).astype(np.uint64)
    totals = [int(low) + (int(high) << 32) for low, high in words]
    result = CacheStats(steps=int(state.step), **dict(zip(COUNTERS, totals, strict=True)))
    spec = state.spec
    if result.refused_updates:
        raise ValueError(
            f"{result.refused_updates} apply_gradients calls had no prefetch of their own or an old plan and changed "
            f"nothing; call prefetch once before each apply_gradients and pass its plan"
        )
    if result.out_of_range and spec.out_of_range == "raise":
        raise ValueError(
            f"{result.out_of_range} ids were outside their tables (read as zeros, not trained); find them by calling "
            f'spec.global_ids on host arrays, or accept them with out_of_range="drop" or "clip"'
        )
    if result.dropped:
        warnings.warn(
            f"{result.dropped} unique ids exceeded max_unique_ids={spec.max_unique_ids} and were not trained; "
            f"raise max_unique_ids in the EmbeddingSpec (None never drops)",
            stacklevel=2,
        )
    if state.cache is not None and result.unique >= _MIN_UNIQUE and result.bypasses > _BYPASS_LIMIT * result.unique:
        per_step = result.unique // max(1, result.steps)
        warnings.warn(
            f"{result.bypasses / result.unique:.0%} of the unique ids found no place in the cache and were trained in "
            f"{spec.storage.name}; a batch has about {per_step} unique ids, the cache {state.cache.geometry.lines} lines: "
            f"raise CacheSpec(fraction=..) or num_rows",
            stacklevel=2,
        )
    _warn_if_moved(state, result.steps)
    return result


def _warn_if_moved(state: EmbeddingState, steps: int) -> None:
    """Warns if training moved the table to another buffer: the mark of a step that does not donate its state."""
    rows = state.table.rows
    if not rows.is_fully_addressable or len(rows.sharding.device_set) > 1:
        return
    address = rows.unsafe_buffer_pointer()
    # The same look for every state of one init: equal key and spec.
    name = (state.spec, np.asarray(state.key).tobytes())
    before = _SEEN_BUFFERS.get(name)
    _SEEN_BUFFERS[name] = (steps, address)
    if before is not None and before[0] < steps and before[1] != address:
        warnings.warn(
            f"the table of {state.table.nbytes / 1e6:.1f} MB moved to another buffer between steps {before[0]} and {steps}: "
            f"the training step copies it; jit the step with donate_argnames (or donate_argnums) for the embedding state",
            stacklevel=3,
        )
