"""The rounds in which the misses of a batch enter the cache.

In each round, the best waiting miss of every set is compared with the cheapest way of the set.
`plan.make_plan` states the rules.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import carries, chunks, indexing
from mpembed_jax.cache import policy, residency
from mpembed_jax.cache.spec import MAX_WAYS, Geometry
from mpembed_jax.numerics import random_bits
from mpembed_jax.row_ids import NO_ID


class Entering(NamedTuple):
    """The loop carry of `enter`."""

    tags: jax.Array  # i32 [C]
    priority: jax.Array  # i32 [C]; lines of this batch are pinned
    line: jax.Array  # i32 [U]
    victim_ids: jax.Array  # i32 [U]
    victim_uses: jax.Array  # i32 [U]: the victims' priorities; empty for LRU
    order: jax.Array  # i32 [U]: hits and newcomers from the front, bypassed ids from the back
    num_cached: jax.Array  # i32 []: hits and newcomers
    last: jax.Array  # i32 []: where the bypassed ids begin in `order`
    queue: jax.Array  # i32 [U]: positions of the waiting misses
    num_waiting: jax.Array  # i32 []


def enter(
    carry: Entering,
    geometry: Geometry,
    by: str,
    ids: jax.Array,
    estimates: jax.Array,
    step: jax.Array,
    chunk: int | None,
) -> Entering:
    """Lets misses enter the cache in rounds, until no miss waits.

    In each round, the best waiting miss of every set meets the set's cheapest way. If there are
    more sets than a batch could use, sets share buckets, and each bucket elects one miss per round.
    Sharing only delays a set's turn.

    Args:
      carry: the carry before the first round.
      geometry: the sizes of the cache.
      by: the policy, "lfu" or "lru".
      ids: int32 [U], the unique ids.
      estimates: int32 [U], their estimated use; zeros for LRU.
      step: int32 scalar, the number of this prefetch.
      chunk: see chunks.each.

    Returns:
      The carry after the last round.
    """
    has_estimates = policy.counts_use(by)
    width = ids.shape[0]
    ways = geometry.ways
    lines = geometry.lines
    num_buckets = geometry.election_buckets(width)
    is_direct = num_buckets == geometry.sets

    def bucket_of(sets: jax.Array) -> jax.Array:
        if is_direct:
            return sets
        return random_bits.scale_to(random_bits.fmix32(sets.astype(jnp.uint32)), num_buckets)

    def waiting(window: chunks.Window, queue: jax.Array) -> tuple[jax.Array, ...]:
        position = window.take(queue)
        miss = jnp.where(window.is_live, indexing.take(ids, position), NO_ID)
        sets = residency.set_of(miss, geometry)
        return position, miss, sets, bucket_of(sets), indexing.take(estimates, position)

    def meet(
        sets: jax.Array, estimate: jax.Array, tags: jax.Array, priority: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Finds the cheapest line of each miss's set.

        Returns:
          The line, the id in it, the use of that id, and whether the miss may enter.
        """
        way = jnp.arange(ways, dtype=jnp.uint32)[None, :]
        row_tags = indexing.take(tags.reshape(-1, ways), sets)
        row_priority = indexing.take(priority.reshape(-1, ways), sets)
        cost = policy.ranks(by, row_tags, row_priority, step) * jnp.uint32(MAX_WAYS) + way
        cheapest = jnp.min(cost, axis=-1)
        rank = (cheapest // jnp.uint32(MAX_WAYS)).astype(jnp.int32)
        may = policy.may_enter(by, rank, estimate)
        chosen = (cheapest % jnp.uint32(MAX_WAYS)).astype(jnp.int32)
        # The victim is taken from the tags gathered above. XLA would not order a second read before
        # the update of the tags.
        is_chosen = way == chosen.astype(jnp.uint32)[:, None]
        victim = jnp.sum(jnp.where(is_chosen, row_tags, 0), axis=-1, dtype=jnp.int32)
        return sets * ways + chosen, victim, policy.use_of(rank), may

    @jax.named_scope("round")
    def one_round(carry: Entering) -> Entering:
        queue, num_waiting = carry.queue, carry.num_waiting

        best = jnp.full(num_buckets if has_estimates else 0, -1, jnp.int32)
        if has_estimates:

            def raise_best(window: chunks.Window, best: jax.Array) -> jax.Array:
                _, miss, _, bucket, estimate = waiting(window, queue)
                return indexing.maximum(
                    best, jnp.where(miss != NO_ID, bucket, num_buckets), estimate
                )

            best = chunks.each(0, num_waiting, width, chunk, raise_best, best)

        def elect(window: chunks.Window, winner: jax.Array) -> jax.Array:
            _, miss, _, bucket, estimate = waiting(window, queue)
            stands = (estimate == indexing.take(best, bucket)) if has_estimates else True
            return indexing.minimum(winner, jnp.where(stands, bucket, num_buckets), miss)

        winner = chunks.each(
            0, num_waiting, width, chunk, elect, jnp.full(num_buckets, NO_ID, jnp.int32)
        )

        def settle(
            window: chunks.Window, both: tuple[Entering, jax.Array]
        ) -> tuple[Entering, jax.Array]:
            carry, is_full = both
            position, miss, sets, bucket, estimate = waiting(window, queue)
            wins = (indexing.take(winner, bucket) == miss) & (miss != NO_ID)
            place, victim, uses, may = meet(sets, estimate, carry.tags, carry.priority)
            enters = wins & may
            target = jnp.where(enters, place, lines)
            here = jnp.where(enters, position, width)
            order, num_cached = chunks.append(carry.order, carry.num_cached, position, enters)
            # Evicts: the tag of the victim's line becomes that of the miss.
            carry = carry._replace(
                tags=indexing.put(carry.tags, target, miss),
                priority=indexing.put(carry.priority, target, policy.pinned(by, step)),
                line=indexing.put(carry.line, here, place),
                victim_ids=indexing.put(carry.victim_ids, here, victim),
                victim_uses=indexing.put(carry.victim_uses, here, uses)
                if has_estimates
                else carry.victim_uses,
                order=order,
                num_cached=num_cached,
            )
            return carry, indexing.put(is_full, jnp.where(wins & ~may, bucket, num_buckets), True)

        carry, is_full = chunks.each(
            0, num_waiting, width, chunk, settle, (carry, jnp.zeros(num_buckets, bool))
        )

        # If the best miss of a set could not enter, the set is closed to all its misses. In other
        # sets, the misses that were not elected wait for the next round.
        def requeue(window: chunks.Window, carry: tuple) -> tuple:
            order, last, queue, num_left = carry
            position, miss, sets, bucket, _ = waiting(window, queue)
            best_id = indexing.take(winner, bucket)
            is_closed = indexing.take(is_full, bucket) & (
                residency.set_of(best_id, geometry) == sets
            )
            order, last = chunks.append(
                order, last, position, window.is_live & is_closed, backwards=True
            )
            queue, num_left = chunks.append(
                queue, num_left, position, window.is_live & ~is_closed & (best_id != miss)
            )
            return order, last, queue, num_left

        left = (carry.order, carry.last, queue, jnp.int32(0))
        order, last, queue, num_waiting = chunks.each(0, num_waiting, width, chunk, requeue, left)
        return carry._replace(order=order, last=last, queue=queue, num_waiting=num_waiting)

    return lax.while_loop(
        lambda carry: carry.num_waiting > 0, one_round, carries.with_final_types(one_round, carry)
    )
