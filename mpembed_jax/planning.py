"""One batch's cache decisions: hits, newcomers, victims and bypasses, exactly, without sorting and without touching a row.

The misses of every set meet its ways in rounds: in each round a set's best waiting miss meets its cheapest way. The
exact rules are stated at `make_plan`; they follow FBGEMM's LRU / LFU caches where those are documented, and are ours where
not (order inside a set, admission, halving, conservative sketch update).
"""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

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
    newcomer's. All others bypass. LFU estimates: a resident's use is counted at its line, everybody else's in the sketch.
    Every 30 C / N steps both are halved; then `estimate = min(65535, use + occurrences)`, where a miss's use is the minimum
    over its cells. In the end the lines of the batch take their estimates, and the cells of bypassed and of displaced ids
    are raised to theirs.

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
        period = max(1, 30 * geometry.lines // num_positions)
        # As an unsigned number the step passes 2^31.
        cache = _age(cache, (step != 0) & (step.astype(jnp.uint32) % jnp.uint32(period) == 0))
    estimates = jnp.zeros(width, jnp.int32)
    positions = jnp.zeros(width, jnp.int32)

    # Hits, and the queue of misses.
    @jax.named_scope("find")
    def find(window: chunks.Window, carry: tuple) -> tuple:
        line, estimates, order, num_hits, queue, num_misses = carry
        chunk_ids = window.take(ids)
        found = caching.locate(cache, chunk_ids)
        line = window.fill(line, found)
        if is_lfu:
            used = access.take(cache.priority.reshape(-1), found)
            estimates = window.fill(estimates, jnp.minimum(used + window.take(counts), caching.MAX_ESTIMATE))
        is_hit = window.is_live & (found < geometry.lines)
        order, num_hits = chunks.append(order, num_hits, window.position, is_hit)
        queue, num_misses = chunks.append(queue, num_misses, window.position, window.is_live & ~is_hit)
        return line, estimates, order, num_hits, queue, num_misses

    line = jnp.full(width, geometry.lines, jnp.int32)
    zero = jnp.int32(0)
    line, estimates, order, num_hits, queue, num_misses = chunks.each(
        0, num_ids, width, chunk, find, (line, estimates, positions, zero, positions, zero)
    )

    if is_lfu:

        @jax.named_scope("estimate")
        def estimate(window: chunks.Window, estimates: jax.Array) -> jax.Array:
            position = window.take(queue)
            cells = caching.sketch_cells(cache, access.take(ids, position))
            seen = jnp.min(access.take(cache.sketch.reshape(-1), cells), axis=0).astype(jnp.int32)
            raised = jnp.minimum(seen + access.take(counts, position), caching.MAX_ESTIMATE)
            return access.put(estimates, jnp.where(window.is_live, position, width), raised)

        estimates = chunks.each(0, num_misses, width, chunk, estimate, estimates)

    @jax.named_scope("pin")
    def pin_hits(window: chunks.Window, priority: jax.Array) -> jax.Array:
        here = jnp.where(window.is_live, window.take(line), geometry.lines)
        return access.put(priority, here, caching.PINNED if is_lfu else step)

    priority = chunks.each(0, num_ids, width, chunk, pin_hits, cache.priority.reshape(-1))
    carry = _Entering(
        tags=cache.tags.reshape(-1),
        priority=priority,
        line=line,
        victim_ids=jnp.full(width, NO_ID, jnp.int32),
        victim_uses=jnp.zeros(width if is_lfu else 0, jnp.int32),
        order=order,
        num_cached=num_hits,
        last=num_ids,
        queue=queue,
        num_waiting=num_misses,
    )
    entered = _enter(carry, geometry, is_lfu, ids, estimates, step, chunk)
    priority, sketch = entered.priority, cache.sketch
    if is_lfu:  # the lines of this batch take their estimates, the sketch keeps those of ids without a line

        @jax.named_scope("unpin")
        def unpin(window: chunks.Window, priority: jax.Array) -> jax.Array:
            here = jnp.where(window.is_live, window.take(entered.line), geometry.lines)
            return access.put(priority, here, window.take(estimates))

        @jax.named_scope("remember")
        def remember(window: chunks.Window, sketch: jax.Array) -> jax.Array:
            position = window.take(entered.order)
            is_bypassed = window.position >= entered.num_cached
            left = jnp.where(is_bypassed, access.take(ids, position), access.take(entered.victim_ids, position))
            uses = jnp.where(is_bypassed, access.take(estimates, position), access.take(entered.victim_uses, position))
            is_left = window.is_live & (left != NO_ID)
            cells = jnp.where(is_left, caching.sketch_cells(cache, left), sketch.size)
            raised = jnp.broadcast_to(uses.astype(jnp.uint16), cells.shape)
            return access.maximum(sketch, cells.reshape(-1), raised.reshape(-1))

        priority = chunks.each(0, num_ids, width, chunk, unpin, priority)
        sketch = chunks.each(num_hits, num_ids, width, chunk, remember, sketch.reshape(-1)).reshape(sketch.shape)
    shape = cache.tags.shape
    cache = dataclasses.replace(cache, tags=entered.tags.reshape(shape), priority=priority.reshape(shape), sketch=sketch)
    return cache, Placement(entered.order, entered.line, entered.victim_ids, num_hits, entered.num_cached)


class _Entering(NamedTuple):
    """What the rounds of `_enter` work on."""

    tags: jax.Array  # i32 [C]
    priority: jax.Array  # i32 [C]  lines of this batch are pinned
    line: jax.Array  # i32 [U]
    victim_ids: jax.Array  # i32 [U]
    victim_uses: jax.Array  # i32 [U]  the victims' priorities; none for LRU
    order: jax.Array  # i32 [U]  hits and newcomers from the front, bypassed from the back
    num_cached: jax.Array
    last: jax.Array  # first of the bypassed in `order`
    queue: jax.Array  # i32 [U]  positions of the misses that wait
    num_waiting: jax.Array


def _enter(
    carry: _Entering,
    geometry: Geometry,
    is_lfu: bool,
    ids: jax.Array,
    estimates: jax.Array,
    step: jax.Array,
    chunk: int | None,
) -> _Entering:
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

    def meet(sets: jax.Array, estimate: jax.Array, tags: jax.Array, priority: jax.Array) -> tuple[jax.Array, ...]:
        """Returns each miss's cheapest line, the id in it, its priority, and whether the miss may enter there."""
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
        return sets * ways + chosen, victim, rank - 1, may

    @jax.named_scope("round")
    def one_round(carry: _Entering) -> _Entering:
        queue, num_waiting = carry.queue, carry.num_waiting

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

        def settle(window: chunks.Window, both: tuple[_Entering, jax.Array]) -> tuple[_Entering, jax.Array]:
            carry, is_full = both
            position, miss, sets, bucket, estimate = waiting(window, queue)
            wins = (access.take(winner, bucket) == miss) & (miss != NO_ID)
            place, victim, uses, may = meet(sets, estimate, carry.tags, carry.priority)
            enters = wins & may
            target, here = jnp.where(enters, place, lines), jnp.where(enters, position, width)
            order, num_cached = chunks.append(carry.order, carry.num_cached, position, enters)
            carry = carry._replace(
                tags=access.put(carry.tags, target, miss),
                priority=access.put(carry.priority, target, caching.PINNED if is_lfu else step),
                line=access.put(carry.line, here, place),
                victim_ids=access.put(carry.victim_ids, here, victim),
                victim_uses=access.put(carry.victim_uses, here, uses) if is_lfu else carry.victim_uses,
                order=order,
                num_cached=num_cached,
            )
            return carry, access.put(is_full, jnp.where(wins & ~may, bucket, num_buckets), True)

        carry, is_full = chunks.each(0, num_waiting, width, chunk, settle, (carry, jnp.zeros(num_buckets, bool)))

        # A set whose best miss could not enter is closed for all others; the rest of the losers wait for the next round.
        def requeue(window: chunks.Window, carry: tuple) -> tuple:
            order, last, queue, num_left = carry
            position, miss, sets, bucket, _ = waiting(window, queue)
            best_id = access.take(winner, bucket)
            is_closed = access.take(is_full, bucket) & (caching.set_of(best_id, geometry) == sets)
            order, last = chunks.append(order, last, position, window.is_live & is_closed, backwards=True)
            queue, num_left = chunks.append(queue, num_left, position, window.is_live & ~is_closed & (best_id != miss))
            return order, last, queue, num_left

        left = (carry.order, carry.last, queue, jnp.int32(0))
        order, last, queue, num_waiting = chunks.each(0, num_waiting, width, chunk, requeue, left)
        return carry._replace(order=order, last=last, queue=queue, num_waiting=num_waiting)

    return lax.while_loop(lambda carry: carry.num_waiting > 0, one_round, varying.settle(one_round, carry))
