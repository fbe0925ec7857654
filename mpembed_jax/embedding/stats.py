"""Counts of what an embedding did since init, read from the device to the host, with warnings that name what to change."""

import warnings
import weakref
from typing import NamedTuple

import jax
import numpy as np

from mpembed_jax.embedding import arguments
from mpembed_jax.embedding.counters import COUNTERS
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.spec import EmbeddingSpec

_BYPASS_LIMIT = (
    0.2  # share of unique ids trained outside the cache above which a larger one would pay
)
_MIN_UNIQUE = 1000  # too few to judge the cache by
_MIN_STEPS = 100  # too few to judge the exchange by


class _Look(NamedTuple):
    """Where a table was when its stats were last asked for."""

    steps: int
    address: int
    rows: weakref.ref


# What this process saw and said, by (spec, key): a run's identity as far as its state tells.
_LOOKS: dict[tuple, _Look] = {}
_WARNED: set[tuple] = set()


class CacheStats(NamedTuple):
    """Counts since init, as host integers; see cache.plan.Counts for what each means."""

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
    wide_exchanges: int
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
    """Returns the counts since init, and warns (once per run) where a setting should change.

    Args:
      state: concrete, not traced; waits for the device.

    Returns:
      CacheStats.

    Raises:
      TypeError: under a trace; log `plan.counts` there. Also if state is something else.
      ValueError: if the state was donated, or made for another spec, ids were out of range under out_of_range="raise", or
        updates were refused.
    """
    arguments.check_state("stats(state)", state)
    if isinstance(state.counters, jax.core.Tracer):
        raise TypeError(
            "stats reads the host and cannot be traced; inside jit log plan.counts, which are device scalars"
        )
    state.check_spec()
    words = np.asarray(state.counters).astype(np.uint64)
    totals = [int(low) + (int(high) << 32) for low, high in words]
    result = CacheStats(
        steps=int(np.asarray(state.step).astype(np.uint32)),
        **dict(zip(COUNTERS, totals, strict=True)),
    )
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
        _warn_once(
            state,
            "dropped",
            f"{result.dropped} unique ids exceeded max_unique_ids={spec.max_unique_ids} and were not trained; "
            f"raise max_unique_ids in the EmbeddingSpec (None never drops)",
        )
    if (
        state.cache is not None
        and result.unique >= _MIN_UNIQUE
        and result.bypasses > _BYPASS_LIMIT * result.unique
    ):
        per_step = result.unique // max(1, result.steps)
        _warn_once(
            state,
            "bypasses",
            f"{result.bypasses / result.unique:.0%} of the unique ids found no place in the cache and were trained in "
            f"{spec.storage.name}; a batch has about {per_step} unique ids, the cache {state.cache.geometry.lines} lines: "
            f"raise CacheSpec(fraction=..) or num_rows",
        )
    if result.steps >= _MIN_STEPS and 2 * result.wide_exchanges > result.steps:
        _warn_once(
            state,
            "wide",
            f"in {result.wide_exchanges} of {result.steps} steps a device had more ids for one shard than the exchange has "
            f"room for, and all sent arrays of full width: raise Placement(capacity=..); sharding.plan measures it",
        )
    _check_buffer(state, result.steps)
    return result


def _warn_once(state: EmbeddingState, kind: str, message: str) -> None:
    name = _name(state)
    if (name, kind) not in _WARNED:
        _WARNED.add((name, kind))
        warnings.warn(message, stacklevel=3)


def _name(state: EmbeddingState) -> tuple[EmbeddingSpec, bytes]:
    return state.spec, np.asarray(state.key).tobytes()


def _check_buffer(state: EmbeddingState, steps: int) -> None:
    """Warns if training moved the table to another buffer: the mark of a step that does not donate its state."""
    rows = state.table.rows
    if not rows.is_fully_addressable or len(rows.sharding.device_set) > 1:
        return
    address, before = rows.unsafe_buffer_pointer(), _LOOKS.get(_name(state))
    _LOOKS[_name(state)] = _Look(steps, address, weakref.ref(rows))
    if before is None or before.steps >= steps or before.address == address:
        return
    former = before.rows()
    if former is not None and not former.is_deleted():
        return  # two runs of one seed side by side, each with a table of its own
    _warn_once(
        state,
        "moved",
        f"the table of {state.table.nbytes / 1e6:.1f} MB moved to another buffer between steps {before.steps} and {steps}: "
        f"unless it was restored or rebuilt, the training step copies it; jit the step with donate_argnames (or "
        f"donate_argnums) for the embedding state",
    )
