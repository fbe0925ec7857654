"""The counts of a state since init, on the host, with warnings that say what to change."""

import warnings
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.embedding import arguments
from mpembed_jax.embedding.counters import COUNTERS
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.vocabulary import pool

# `stats` advises a larger cache if more than this share of the unique ids bypasses it.
_BYPASS_LIMIT = 0.2
_MIN_UNIQUE = 1000  # unique ids needed to judge the cache, and requests and rows to judge the pool
_MIN_STEPS = 100  # steps needed to judge the exchange


class _Look(NamedTuple):
    """The step of a state and the buffer of its table at the last call of `stats`."""

    steps: int
    address: int  # of the buffer
    rows: weakref.ref  # to the jax array of packed rows


# The last look at each run of this process, and the warnings already given. A run is identified by
# (spec, key): nothing else in a state stays the same in a run and differs between runs.
_LOOKS: dict[tuple, _Look] = {}
_WARNED: set[tuple] = set()


class VocabularyStats(NamedTuple):
    """Counts of raw ids since init, as Python integers."""

    requests: int  # positions that are not padding
    shared_requests: int  # positions whose id had no row of its own
    admissions: int  # times that an id got a row
    recyclings: int  # admissions whose row was taken from an id that was used less
    refusals: int  # times that an id had earned a row and found none
    num_owned: int  # rows with an owner now
    num_rows: int  # rows of the pool

    @property
    def occupancy(self) -> float:
        """The share of the pool's rows that have an owner."""
        return self.num_owned / self.num_rows

    @property
    def is_thrashing(self) -> bool:
        """Whether more than one request in a hundred took another id's row or found no row.

        The share of requests stays the same in a long run. The share of admissions that are
        recyclings does not: in a full pool, every admission is one.
        """
        return 100 * (self.recyclings + self.refusals) > self.requests


class CacheStats(NamedTuple):
    """Counts since init, as Python integers.

    `steps` counts prefetches. `nonfinite_rows` counts the rows that were skipped because their
    gradients were not finite. `refused_updates` counts the apply_gradients calls that changed
    nothing, because they had no prefetch of their own or an old plan. It also counts the calls of
    write_rows and vocabularies.forget that changed nothing, because a prefetch waited for its
    apply_gradients. `cache.plan.Counts` explains the others.
    """

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
    vocabulary: VocabularyStats | None = None  # None if ids are row numbers

    @property
    def hit_rate(self) -> float:
        """The share of requests whose row was cached before the step; 0 without requests."""
        return self.hit_requests / self.requests if self.requests else 0.0

    @property
    def unique_hit_rate(self) -> float:
        """The share of unique ids whose row was cached before the step; 0 without requests."""
        return self.hits / self.unique if self.unique else 0.0


def stats(state: EmbeddingState) -> CacheStats:
    """Returns the counts since init, and warns (UserWarning) if something should change.

    It warns if many ids bypass the cache, if ids were dropped, if the pool of raw ids is too small,
    if the exchange of a mesh has too little room, or if training copies the table. Each warning is
    given once for a spec and key. The call waits for the device.

    Args:
      state: concrete, not traced.

    Returns:
      The counts.

    Raises:
      TypeError: if the state is traced (log `plan.counts` instead), or has another type.
      ValueError: if the state was donated, made for another spec, or averaged; if ids were out of
        range under out_of_range="raise"; or if updates were refused.
    """
    arguments.check_state("stats(state)", state)
    if isinstance(state.counters, jax.core.Tracer):
        raise TypeError(
            "stats returns host values and cannot be traced; inside jit, log plan.counts, which "
            "are device scalars"
        )
    state.check_spec()
    words, step = jax.device_get((state.counters, state.step))
    totals = [int(low) + (int(high) << 32) for low, high in words.astype(np.uint64)]
    totals[-1] = int(words[-1, 0])  # its high word counts changes outside of steps
    result = CacheStats(
        steps=int(step.astype(np.uint32)),
        **dict(zip(COUNTERS, totals, strict=True)),
        vocabulary=_of_vocabulary(state),
    )
    spec = state.spec
    if result.refused_updates:
        raise ValueError(
            f"{result.refused_updates} calls changed nothing: apply_gradients without a prefetch "
            "of its own or with an old plan, or write_rows or forget between a prefetch and its "
            "apply_gradients; call prefetch once before each apply_gradients, pass its plan, and "
            "write or forget rows between steps"
        )
    if result.out_of_range and spec.out_of_range == "raise":
        raise ValueError(
            f"{result.out_of_range} ids were outside their tables (read as zeros, not trained); "
            "find them by calling spec.global_ids on host arrays, or accept them with "
            'out_of_range="drop" or "clip"'
        )
    if result.dropped:
        _warn_once(
            state,
            "dropped",
            f"{result.dropped} unique ids exceeded max_unique_ids={spec.max_unique_ids} and were "
            "not trained; raise max_unique_ids in the EmbeddingSpec (None never drops an id)",
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
            f"{result.bypasses / result.unique:.0%} of the unique ids found no place in the cache "
            f"and were trained in {spec.storage.name}; a batch has about {per_step} unique ids, "
            f"the cache {state.cache.geometry.lines} lines: raise CacheSpec(fraction=..) or "
            "num_rows",
        )
    raw = result.vocabulary
    if (
        raw is not None
        and min(raw.requests, raw.admissions + raw.refusals) >= _MIN_UNIQUE
        and raw.is_thrashing
    ):
        _warn_once(
            state,
            "pool",
            f"in {raw.requests} requests, ids took the rows of others {raw.recyclings} times, and "
            f"found no row {raw.refusals} times: the pool of {raw.num_rows} rows is "
            "too small for the ids that earn one; raise VocabularySpec(num_rows=..) or admit_after "
            "(vocabularies.grow enlarges the pool of a state)",
        )
    if result.steps >= _MIN_STEPS and 2 * result.wide_exchanges > result.steps:
        _warn_once(
            state,
            "wide",
            f"in {result.wide_exchanges} of {result.steps} steps, a device had more ids for one "
            "shard than the exchange has room for, so all devices sent full-width arrays: raise "
            "Placement(capacity=..); sharding.plan measures the capacity that batches need",
        )
    _check_buffer(state, result.steps)
    return result


def _of_vocabulary(state: EmbeddingState) -> VocabularyStats | None:
    """Returns the counts of a state's vocabulary, or None if it has none."""
    vocabulary = state.vocabulary
    if vocabulary is None:
        return None
    num_owned = jnp.sum(vocabulary.tags != jnp.uint32(pool.NO_OWNER), dtype=jnp.int32)
    words, owned = jax.device_get((vocabulary.counters, num_owned))
    totals = [int(low) + (int(high) << 32) for low, high in words.astype(np.uint64)]
    return VocabularyStats(
        **dict(zip(pool.COUNTERS, totals, strict=True)),
        num_owned=int(owned),
        num_rows=vocabulary.geometry.lines,
    )


def _warn_once(state: EmbeddingState, kind: str, message: str) -> None:
    name = _name(state)
    if (name, kind) not in _WARNED:
        _WARNED.add((name, kind))
        warnings.warn(message, stacklevel=3)


def _name(state: EmbeddingState) -> tuple[EmbeddingSpec, bytes]:
    return state.spec, jax.device_get(state.key).tobytes()


def _check_buffer(state: EmbeddingState, steps: int) -> None:
    """Warns if training moved the table to another buffer.

    A training step does so if its state is not donated: it then copies the table. A table on
    several devices is not checked.
    """
    rows = state.table.rows
    if not rows.is_fully_addressable or len(rows.sharding.device_set) > 1:
        return
    address = rows.block_until_ready().unsafe_buffer_pointer()
    before = _LOOKS.get(_name(state))
    _LOOKS[_name(state)] = _Look(steps, address, weakref.ref(rows))
    if before is None or before.steps >= steps or before.address == address:
        return
    former = before.rows()
    if former is not None and not former.is_deleted():
        # The former table still exists, so the table did not move: two runs with the same spec and
        # key train side by side.
        return
    _warn_once(
        state,
        "moved",
        f"the table of {state.table.nbytes / 1e6:.1f} MB moved to another buffer between steps "
        f"{before.steps} and {steps}; unless it was restored or rebuilt, the training step copies "
        "it: jit the step with donate_argnames (or donate_argnums) for the embedding state",
    )
