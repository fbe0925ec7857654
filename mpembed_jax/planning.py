"""One batch's cache decisions: hits, newcomers, victims and bypasses, exactly, without sorting and without touching a row.

The misses of every set meet its ways in rounds: in each round a set's best waiting miss meets its cheapest way. The
exact rules are stated at `make_plan`; they follow FBGEMM's LRU / LFU caches where those are documented, and are ours where
not (order inside a set, admission, halving, conservative sketch update).
"""

import dataclasses
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax import access, chunks, numerics, varying
from mpembed_jax import cache as caching
from mpembed_jax.cache import CacheState, Geometry
from mpembed_jax.table import NO_ID


def _age(cache: CacheState, halve: jax.Array) -> CacheState:
    """Halves every estimate, in the sketch and at the lines, where `halve` holds: a loop of one turn or none, in place."""

    def halve_both(_: jax.Array, both: tuple) -> tuple:
        return both[0] >> 1, both[1] >> 1

    sketch, priority = lax.fori_loop(0, halve.astype(jnp.int32), halve_both, (cache.sketch, cache.priority))
    return dataclasses.replace(cache, sketch=sketch, priority=priority)


class Placement(NamedTuple):
    """What `make_plan` decides about the unique ids of a batch."""

    order: jax.Array  # i32 [U]  positions of the given unique ids: hits, newcomers, bypassed
    line: jax.Array  # i32 [U]  by given position
    victim_ids: jax.Array  # i32 [U]  by given position
    num_hits: jax.Array
    num_cached: jax.Array


@jax.named_scope("plan")
def make_plan(
    cache: CacheState,
    ids: jax.Array,
    counts: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    num_positions: Fraction,
    chunk: int | None,
) -> tuple[CacheState, Placement]:
    """Decides hits, newcomers, victims and bypasses of one batch and updates tags, priorities and the sketch.

    Rules. Hits keep their lines and are pinned. The misses of a set, in order (LRU: ascending id; LFU: descending
    estimate, then ascending id), meet its unpinned ways in order (empty first; LRU: oldest; LFU: least used; ties: lowest
    way); a miss enters if the way is empty, or LRU: if it was not used this step, LFU: if its estimate is below the
    newcomer's. All others bypass. LFU estimates: every 10 C / N steps all estimates are halved; then
    `estimate = min(65535, min over the sketch's rows + occurrences)`, and the id's cells are raised to it.

    Args:
      cache: state before the step; its `rows` are passed through.
      ids: int32 [U], distinct, the first num_ids of them real.
      counts: int32 [U], occurrences in the batch.
      num_ids: int32 scalar.
      step: int32 scalar, number of this prefetch.
      num_positions: N, ids in the batch, padding included; for one shard of a stack its share of N, as C is of its lines.
      chunk: see chunks.each.

    Returns:
      The cache with newcomers entered (their rows not yet filled, `dirty` still the victims'), and the placement.
    """
    geometry, width = cache.geometry, ids.shape[0]
    is_lfu = cache.policy == "lfu"
    if is_lfu and num_positions:
        period = max(1, 10 * geometry.lines // num_positions)
        # As an unsigned number the step passes 2^31.
        cache = _age(cache, (step != 0) & (step.astype(jnp.uint32) % jnp.uint32(period) == 0))
    tags, priority = cache.tags, cache.priority
    estimates = jnp.zeros(width, jnp.int32)
    positions = jnp.zeros(width, jnp.int32)

    # Hits, and the queue of misses. The sketch is only read here: estimates come from before the step.
    @jax.named_scope("find")
    def find(window: chunks.Window, carry: tuple) -> tuple:
        line, estimates, order, num_hits, queue, num_misses = carry
        chunk_ids = jnp.where(window.is_live, window.take(ids), NO_ID)
        found = caching.locate(cache, chunk_ids)
        is_hit = found < geometry.lines
        line = window.put(line, found)
        if is_lfu:
            seen = jnp.min(access.take(cache.sketch.reshape(-1), caching.sketch_cells(cache, chunk_ids)), axis=0).astype(
                jnp.int32
            )
            estimates = window.put(estimates, jnp.minimum(seen + window.take(counts), caching.MAX_ESTIMATE))
        order, num_hits = chunks.append(order, num_hits, window.position, is_hit)
        queue, num_misses = chunks.append(queue, num_misses, window.position, window.is_live & ~is_hit)
        return line, estimates, order, num_hits, queue, num_misses

    line = jnp.full(width, geometry.lines, jnp.int32)
    zero = jnp.int32(0)
    line, estimates, order, num_hits, queue, num_misses = chunks.each(
        0, num_ids, width, chunk, find, (line, estimates, positions, zero, positions, zero)
    )

    @jax.named_scope("pin")
    def pin_hits(window: chunks.Window, carry: tuple) -> tuple:
        priority, sketch = carry
        here = jnp.where(window.is_live, window.take(line), geometry.lines)
        priority = access.put(priority, here, caching.PINNED if is_lfu else step)
        if is_lfu:
            cells = caching.sketch_cells(cache, window.take(ids))
            cells = jnp.where(window.is_live, cells, sketch.size)
            raised = jnp.broadcast_to(window.take(estimates).astype(jnp.uint16), cells.shape)
            sketch = access.maximum(sketch, cells.reshape(-1), raised.reshape(-1))
        return priority, sketch

    sketch: Any = None if cache.sketch is None else cache.sketch.reshape(-1)
    priority, sketch = chunks.each(0, num_ids, width, chunk, pin_hits, (priority.reshape(-1), sketch))

    carry = (
        tags.reshape(-1),
        priority,
        line,
        jnp.full(width, NO_ID, jnp.int32),
        order,
        num_hits,
        num_ids,
        queue,
        num_misses,
    )
    tags, priority, line, victim_ids, order, num_cached = _enter(carry, geometry, is_lfu, ids, estimates, step, chunk)

    if is_lfu:  # unpin: the lines of this batch take their estimates

        @jax.named_scope("unpin")
        def unpin(window: chunks.Window, priority: jax.Array) -> jax.Array:
            here = jnp.where(window.is_live, window.take(line), geometry.lines)
            return access.put(priority, here, window.take(estimates))

        priority = chunks.each(0, num_ids, width, chunk, unpin, priority)
    cache = dataclasses.replace(
        cache,
        tags=tags.reshape(cache.tags.shape),
        priority=priority.reshape(cache.tags.shape),
        sketch=None if cache.sketch is None else sketch.reshape(cache.sketch.shape),
    )
    return cache, Placement(order, line, victim_ids, num_hits, num_cached)


def _enter(
    carry: tuple,
    geometry: Geometry,
    is_lfu: bool,
    ids: jax.Array,
    estimates: jax.Array,
    step: jax.Array,
    chunk: int | None,
) -> tuple:
    """Lets misses enter, in rounds: every set's best waiting miss meets its cheapest way.

    Sets share election buckets where there are more sets than a batch could use; that only delays a set's turn.
    """
    width, ways, lines = ids.shape[0], geometry.ways, geometry.lines
    num_buckets = min(geometry.sets, 1 << max(4, (2 * width - 1).bit_length()))
    is_direct = num_buckets == geometry.sets

    def bucket_of(sets: jax.Array) -> jax.Array:
        if is_direct:
            return sets
        return numerics.scale_to(numerics.fmix32(sets.astype(jnp.uint32)), num_buckets)

    def waiting(window: chunks.Window, queue: jax.Array) -> tuple[jax.Array, ...]:
        position = window.take(queue)
        miss = jnp.where(window.is_live, access.take(ids, position), NO_ID)
        sets = caching.set_of(miss, geometry)
        return position, miss, sets, bucket_of(sets), access.take(estimates, position)

    def meet(sets: jax.Array, wins: jax.Array, estimate: jax.Array, tags: jax.Array, priority: jax.Array) -> tuple:
        """Returns each winner's cheapest line, the id in it, and whether the winner may enter."""
        way = jnp.arange(ways, dtype=jnp.uint32)
        row_tags, row_priority = access.take(tags.reshape(-1, ways), sets), access.take(priority.reshape(-1, ways), sets)
        if is_lfu:
            rank = row_priority.astype(jnp.uint32) + jnp.uint32(1)
        else:
            rank = (caching.MAX_AGE + 1 - jnp.minimum(step - row_priority, caching.MAX_AGE)).astype(jnp.uint32)
        cost = jnp.where(row_tags == NO_ID, jnp.uint32(0), rank) * jnp.uint32(caching.MAX_WAYS) + way
        cheapest = jnp.min(cost, axis=-1)
        rank = (cheapest // jnp.uint32(caching.MAX_WAYS)).astype(jnp.int32)
        may = rank <= estimate if is_lfu else rank <= caching.MAX_AGE
        chosen = (cheapest % jnp.uint32(caching.MAX_WAYS)).astype(jnp.int32)
        # The victim comes from the same gather: a second read of the tags would not be ordered before their update.
        is_chosen = way == chosen.astype(jnp.uint32)[:, None]
        victim = jnp.sum(jnp.where(is_chosen, row_tags, 0), axis=-1, dtype=jnp.int32)
        return sets * ways + chosen, victim, wins & may

    @jax.named_scope("round")
    def one_round(carry: tuple) -> tuple:
        tags, priority, line, victims, order, num_cached, last, queue, num_waiting = carry

        best = jnp.full(num_buckets if is_lfu else 0, -1, jnp.int32)
        if is_lfu:

            def raise_best(window: chunks.Window, best: jax.Array) -> jax.Array:
                _, miss, _, bucket, estimate = waiting(window, queue)
                return access.maximum(best, jnp.where(miss != NO_ID, bucket, num_buckets), estimate)

            best = chunks.each(0, num_waiting, width, chunk, raise_best, best)

        def elect(window: chunks.Window, winner: jax.Array) -> jax.Array:
            _, miss, _, bucket, estimate = waiting(window, queue)
            stands = (estimate == access.take(best, bucket)) if is_lfu else True
            return access.minimum(winner, jnp.where(stands, bucket, num_buckets), miss)

        winner = chunks.each(0, num_waiting, width, chunk, elect, jnp.full(num_buckets, NO_ID, jnp.int32))

        def settle(window: chunks.Window, carry: tuple) -> tuple:
            tags, priority, line, victims, order, num_cached, is_full = carry
            position, miss, sets, bucket, estimate = waiting(window, queue)
            wins = (access.take(winner, bucket) == miss) & (miss != NO_ID)
            place, victim, enters = meet(sets, wins, estimate, tags, priority)
            target, here = jnp.where(enters, place, lines), jnp.where(enters, position, width)
            tags = access.put(tags, target, miss)
            priority = access.put(priority, target, caching.PINNED if is_lfu else step)
            line = access.put(line, here, place)
            victims = access.put(victims, here, victim)
            order, num_cached = chunks.append(order, num_cached, position, enters)
            is_full = access.put(is_full, jnp.where(wins & ~enters, bucket, num_buckets), True)
            return tags, priority, line, victims, order, num_cached, is_full

        is_full = jnp.zeros(num_buckets, bool)
        tags, priority, line, victims, order, num_cached, is_full = chunks.each(
            0, num_waiting, width, chunk, settle, (tags, priority, line, victims, order, num_cached, is_full)
        )

        # A set whose best miss could not enter is closed for all others; the rest of the losers wait for the next round.
        def requeue(window: chunks.Window, carry: tuple) -> tuple:
            order, last, queue, num_left = carry
            position, miss, sets, bucket, _ = waiting(window, queue)
            best_id = access.take(winner, bucket)
            is_closed = access.take(is_full, bucket) & (caching.set_of(best_id, geometry) == sets)
            order, last = chunks.append(order, last, position, window.is_live & is_closed, backwards=True)
            queue, num_left = chunks.append(queue, num_left, position, window.is_live & ~is_closed & (best_id != miss))
            return order, last, queue, num_left

        order, last, queue, num_waiting = chunks.each(
            0, num_waiting, width, chunk, requeue, (order, last, queue, jnp.int32(0))
        )
        return tags, priority, line, victims, order, num_cached, last, queue, num_waiting

    return lax.while_loop(lambda carry: carry[-1] > 0, one_round, varying.settle(one_round, carry))[:6]
