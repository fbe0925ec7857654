"""The plan on a GPU: the unique ids are grouped by cache set, and one kernel plans every set.

One program of one warp plans one set. It finds the hits of the set. Then the misses of the set try
to take a way of it, one after another. So there are no rounds over all ids, and no loop outside the
kernels. The plan follows the rules of `xla.plan.make_plan`. For each newcomer, a program looks at
all ids of its set again. If a batch has too many ids per set for this, the reference's rounds plan
it instead: see `has_short_sets` and `ops.plan`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mpembed_jax.arrays import indexing
from mpembed_jax.cache import policy, residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.ops.gpu import kernel
from mpembed_jax.ops.records import Moves, Unique
from mpembed_jax.row_ids import NO_ID

LANES = 8  # unique ids of a set that are looked at together
_MOST_IDS_PER_SET = 64  # unique ids per set, on average, up to which the kernel plans a batch
_HIT = -1  # stored instead of an estimate for hits, which need no line


class _Sets(NamedTuple):
    """The unique ids of a batch, grouped by cache set."""

    by_set: jax.Array  # i32 [U]: indices of the unique ids, set by set; padding comes last
    sets: jax.Array  # i32 [U]: the set of each id, in this order; S for padding
    # i32 [min(S, U) + 1]: where each set that has ids begins; num_ids after the last of them
    begin: jax.Array
    num_sets: jax.Array  # i32 []: the number of sets that have ids


class _Decisions(NamedTuple):
    """The decisions of the kernel about the unique ids, in the order of _Sets.

    The values at padding are arbitrary.
    """

    line: jax.Array  # i32 [U]: C for bypassed ids
    victim_ids: jax.Array  # i32 [U]: NO_ID for no victim
    estimates: jax.Array  # i32 [U]: of misses; _HIT for hits
    victim_uses: Any = None  # i32 [U]: the use of each victim; None for LRU


def has_short_sets(geometry: Geometry, width: int) -> bool:
    """Returns whether the kernel plans a batch of `width` unique ids, instead of the rounds.

    It does if there are at most 64 unique ids per set of the cache, on average.
    """
    return width <= _MOST_IDS_PER_SET * geometry.sets


@jax.named_scope("plan")
def plan(
    cache: CacheState, unique: Unique, step: jax.Array, halve: jax.Array, *, is_interpreted: bool
) -> tuple[CacheState, Moves, jax.Array, jax.Array, jax.Array]:
    """Plans a batch and orders its unique ids by the plan; see `ops.plan`.

    Args:
      cache: the state before the step.
      unique: the distinct ids of the batch.
      step: int32 scalar, the number of this prefetch.
      halve: bool scalar, whether this step halves all LFU estimates.
      is_interpreted: see kernel.launch.

    Returns:
      See `ops.plan`.
    """
    num_lines = cache.geometry.lines
    cache = _age(cache, halve, is_interpreted)
    sets = _grouped(unique, cache.geometry, is_interpreted)
    ids, counts = (indexing.take(array, sets.by_set) for array in (unique.ids, unique.counts))
    cache, made = _decide(cache, sets, ids, counts, step, is_interpreted)
    position = jnp.arange(ids.shape[0], dtype=jnp.int32)
    is_row = position < unique.num_ids
    line = jnp.where(is_row, made.line, num_lines)
    victim_ids = jnp.where(is_row, made.victim_ids, NO_ID)
    is_hit, is_cached = is_row & (made.estimates == _HIT), line < num_lines
    if policy.counts_use(cache.policy):
        cache = _remember(cache, made, ids, is_row & ~is_hit, is_cached)

    # The plan lists hits, newcomers, bypassed ids and padding, in this order.
    (hits, cached), totals = kernel.running_sums_and_totals(
        [is_hit, is_cached],
        [jnp.where(is_hit, counts, 0), victim_ids != NO_ID],
        is_interpreted=is_interpreted,
    )
    num_hits, num_cached, hit_requests, num_evictions = totals
    place = jnp.where(is_cached, num_hits + cached - hits - 1, num_cached + position - cached)
    place = jnp.where(is_hit, hits - 1, place)
    order = indexing.put(position, place, position)
    moved = indexing.put(position, sets.by_set, place)
    rows = indexing.take(sets.by_set, order)
    moves = Moves(
        ids=indexing.take(unique.ids, rows),
        line=indexing.take(line, order),
        victim_ids=indexing.take(victim_ids, order),
        num_hits=num_hits,
        num_cached=num_cached,
        num_ids=unique.num_ids,
        segments=unique.segments and unique.segments.of_rows(rows),
    )
    return cache, moves, indexing.take(moved, unique.inverse), hit_requests, num_evictions


def _grouped(unique: Unique, geometry: Geometry, is_interpreted: bool) -> _Sets:
    """Groups the unique ids of a batch by cache set, with one sort."""
    width = unique.ids.shape[0]
    position = jnp.arange(width, dtype=jnp.int32)
    sets = residency.set_of(unique.ids, geometry)
    sets = jnp.where(position < unique.num_ids, sets, geometry.sets)
    sets, by_set = lax.sort_key_val(sets, position)
    is_first = kernel.starts(sets) & (sets < geometry.sets)
    (rank,) = kernel.running_sums([is_first], is_interpreted=is_interpreted)
    most = min(geometry.sets, width)
    begin = jnp.broadcast_to(unique.num_ids, (most + 1,))
    begin = indexing.put(begin, jnp.where(is_first, rank - 1, most + 1), position)
    return _Sets(by_set, sets, begin, rank[-1])


def _decide(
    cache: CacheState,
    sets: _Sets,
    ids: jax.Array,
    counts: jax.Array,
    step: jax.Array,
    is_interpreted: bool,
) -> tuple[CacheState, _Decisions]:
    """Runs the kernel: updates tags and priorities, and decides about each unique id.

    Args:
      cache: the state before the step; its estimates are already halved, if this step halves.
      sets: the groups.
      ids: int32 [U], the unique ids in the order of the groups.
      counts: int32 [U], their occurrences.
      step: int32 scalar.
      is_interpreted: see kernel.launch.
    """
    by = cache.policy
    ways = cache.geometry.ways
    num_lines = cache.geometry.lines
    has_estimates = policy.counts_use(by)
    (width,) = ids.shape

    def body(*refs: Any) -> None:
        numbers, begin_ref, sets_ref, ids_ref, counts_ref, *sketch_ref = refs[: 5 + has_estimates]
        tags_ref, priority_ref, line_ref, victim_ref, estimates_ref, *uses_ref = refs[
            7 + has_estimates :
        ]
        number = pl.program_id(0)
        step = numbers[1]
        lane = jnp.arange(LANES, dtype=jnp.int32)
        way = jnp.arange(indexing.ceil_power(ways), dtype=jnp.int32)
        is_way = way < ways

        def plan_set() -> None:
            begin, end = begin_ref[number], begin_ref[number + 1]
            first_line = sets_ref[begin] * ways
            tags = kernel.load(tags_ref, (first_line + way,), is_way, NO_ID)
            priority = kernel.load(priority_ref, (first_line + way,), is_way)

            def seen(here: jax.Array, is_miss: jax.Array) -> jax.Array:
                """Returns what the sketch holds of each miss: its use (int32 [8])."""
                use = jnp.full(LANES, policy.MAX_ESTIMATE, jnp.int32)
                for row, seed in enumerate(residency.SKETCH_SEEDS):
                    cell = residency.cells_in_row(cache.sketch.shape, here, row, jnp.uint32(seed))
                    use = jnp.minimum(
                        use, kernel.load(sketch_ref[0], (cell,), is_miss).astype(jnp.int32)
                    )
                return use

            def find(carry: tuple) -> tuple:
                """Finds the hits among the next 8 ids. Until they get a way, all others bypass."""
                start, uses = carry
                position = start + lane
                is_live = position < end
                here = kernel.load(ids_ref, (position,), is_live, NO_ID)
                is_match = is_live[:, None] & (here[:, None] == tags[None, :])
                found = jnp.max(jnp.where(is_match, way[None, :], -1), axis=1)
                is_hit = found >= 0
                estimate = jnp.zeros(LANES, jnp.int32)
                if has_estimates:
                    used = jnp.max(jnp.where(is_match, priority[None, :], 0), axis=1)
                    used = jnp.where(is_hit, used, seen(here, is_live & ~is_hit))
                    counts = kernel.load(counts_ref, (position,), is_live)
                    estimate = policy.estimate(by, used, counts)
                line = jnp.where(is_hit, first_line + found, num_lines)
                kernel.store(line_ref, (position,), line, is_live)
                kernel.store(victim_ref, (position,), jnp.full(LANES, NO_ID, jnp.int32), is_live)
                waiting = jnp.where(is_hit, _HIT, estimate)
                kernel.store(estimates_ref, (position,), waiting, is_live)
                use = jnp.max(jnp.where(is_match, estimate[:, None], -1), axis=0)
                return start + LANES, jnp.maximum(uses, use)

            # For each way whose id is in the batch, the estimate of that id; -1 for other ways.
            uses = jnp.full(way.shape, -1, jnp.int32)
            _, uses = lax.while_loop(lambda carry: carry[0] < end, find, (begin, uses))
            priority = jnp.where(uses >= 0, policy.pinned(by, step), priority)
            # A thread reads misses that other threads stored, so all wait.
            kernel.barrier(is_interpreted)

            def next_after(estimate: jax.Array, miss: jax.Array) -> tuple:
                return best_after(ids_ref, estimates_ref, (begin, end), estimate, miss, 0)

            def meet(carry: tuple) -> tuple:
                """Gives the current miss the cheapest way, if it may enter. Finds the next miss."""
                position, estimate, miss, tags, priority, uses = carry
                rank = policy.ranks(by, tags, priority, step).astype(jnp.int32)
                rank = jnp.where(is_way, rank, np.int32(2**31 - 1))
                cheapest = jnp.min(rank)
                chosen = jnp.min(jnp.where(rank == cheapest, way, ways))
                may = policy.may_enter(by, cheapest, estimate)

                def decide(ref: Any, value: jax.Array) -> None:
                    here, enters = (jnp.broadcast_to(x, (1,)) for x in (position, may))
                    kernel.store(ref, (here,), jnp.broadcast_to(value, (1,)), enters)

                decide(line_ref, first_line + chosen)
                decide(victim_ref, jnp.max(jnp.where(way == chosen, tags, 0)))
                if has_estimates:
                    decide(uses_ref[0], policy.use_of(cheapest))
                is_taken = (way == chosen) & may
                # Evicts: the tag of the victim's line becomes that of the miss.
                tags = jnp.where(is_taken, miss, tags)
                priority = jnp.where(is_taken, policy.pinned(by, step), priority)
                uses = jnp.where(is_taken, estimate, uses)
                # If this miss may not enter, no later miss of the set may.
                position, next_estimate, next_miss = next_after(estimate, miss)
                position = jnp.where(may, position, -1)
                return position, next_estimate, next_miss, tags, priority, uses

            first = next_after(jnp.int32(policy.MAX_ESTIMATE + 1), jnp.int32(-1))
            *_, tags, priority, uses = lax.while_loop(
                lambda carry: carry[0] >= 0, meet, (*first, tags, priority, uses)
            )
            if has_estimates:
                priority = jnp.where(uses >= 0, uses, priority)
            kernel.store(tags_ref, (first_line + way,), tags, is_way)
            kernel.store(priority_ref, (first_line + way,), priority, is_way)

        pl.when(number < numbers[0])(plan_set)

    held = [cache.tags.reshape(-1), cache.priority.reshape(-1)]
    operands = [
        jnp.stack([sets.num_sets, step]),
        sets.begin,
        sets.sets,
        ids,
        counts,
        *([cache.sketch.reshape(-1)] if has_estimates else []),
        *held,
    ]
    per_id = jax.ShapeDtypeStruct((width,), jnp.int32)
    tags, priority, *decided = kernel.launch(
        body,
        sets.begin.shape[0] - 1,
        operands,
        [*map(kernel.shape_of, held), *[per_id] * (3 + has_estimates)],
        name="mpembed_plan",
        is_interpreted=is_interpreted,
        aliases={len(operands) - 2: 0, len(operands) - 1: 1},
        num_warps=1,
    )
    shape = cache.tags.shape
    cache = dataclasses.replace(cache, tags=tags.reshape(shape), priority=priority.reshape(shape))
    return cache, _Decisions(*decided)


def best_after(
    ids_ref: Any,
    estimates_ref: Any,
    bounds: tuple[jax.Array, jax.Array],
    estimate: jax.Array,
    miss: jax.Array,
    least: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the next miss of a set, in a kernel.

    Misses come in the order of descending estimate, then ascending id. The next miss is the first
    one after a given estimate and id.

    Args:
      ids_ref: reference to int32 [U], the ids.
      estimates_ref: reference to int32 [U], their estimates.
      bounds: the first index of the set's ids, and the index after the last.
      estimate: int32 scalar.
      miss: int32 scalar.
      least: ids with a smaller estimate do not wait; at least 0.

    Returns:
      Its index, estimate and id (int32 scalars). The index is -1 if there is none.
    """
    lane = jnp.arange(LANES, dtype=jnp.int32)
    begin, end = bounds

    def look(carry: tuple) -> tuple:
        start, best_position, best, best_id = carry
        position = start + lane
        is_live = position < end
        here = kernel.load(ids_ref, (position,), is_live, NO_ID)
        own = kernel.load(estimates_ref, (position,), is_live, _HIT)
        waits = (own >= least) & ((own < estimate) | ((own == estimate) & (here > miss)))
        highest = jnp.max(jnp.where(waits, own, -1))
        lowest_id = jnp.min(jnp.where(waits & (own == highest), here, NO_ID))
        where = jnp.max(jnp.where(waits & (here == lowest_id), position, -1))
        is_better = (highest > best) | ((highest == best) & (lowest_id < best_id))
        return (
            start + LANES,
            jnp.where(is_better, where, best_position),
            jnp.where(is_better, highest, best),
            jnp.where(is_better, lowest_id, best_id),
        )

    start = (begin, jnp.int32(-1), jnp.int32(-1), jnp.int32(NO_ID))
    return lax.while_loop(lambda carry: carry[0] < end, look, start)[1:]


def _remember(
    cache: CacheState, made: _Decisions, ids: jax.Array, is_miss: jax.Array, is_cached: jax.Array
) -> CacheState:
    """Raises the sketch cells of each bypassed or displaced id to the id's estimated use."""
    left = jnp.where(is_cached, made.victim_ids, ids)
    uses = jnp.where(is_cached, made.victim_uses, made.estimates)
    cells = residency.sketch_cells(cache, left)
    cells = jnp.where(is_miss & (left != NO_ID), cells, cache.sketch.size)
    raised = jnp.broadcast_to(uses.astype(jnp.uint16), cells.shape)
    sketch = indexing.maximum(cache.sketch.reshape(-1), cells.reshape(-1), raised.reshape(-1))
    return dataclasses.replace(cache, sketch=sketch.reshape(cache.sketch.shape))


def _age(cache: CacheState, halve: jax.Array, is_interpreted: bool) -> CacheState:
    """Halves every estimate, in the sketch and at the lines, if `halve` (bool scalar) is true."""
    if not policy.counts_use(cache.policy):
        return cache

    sketch, priority = kernel.change_if(
        halve,
        [cache.sketch.reshape(-1), cache.priority.reshape(-1)],
        [policy.halved, policy.halved],
        name="mpembed_halve",
        is_interpreted=is_interpreted,
    )
    return dataclasses.replace(
        cache,
        sketch=sketch.reshape(cache.sketch.shape),
        priority=priority.reshape(cache.priority.shape),
    )
