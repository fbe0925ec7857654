"""The reference of `plan` in plain jax.numpy: the cache decisions of one batch.

`make_plan` states the rules for hits, newcomers, victims and bypasses, and follows them exactly. It
sorts nothing and reads no row. The misses of a set meet its ways in `rounds`.

The rules follow FBGEMM's LRU and LFU caches where those are documented. The order inside a set,
admission, halving and the conservative sketch update are this library's own. A step calls
`ops.plan`, which runs this module, or the same rules compiled by numba or in a GPU kernel.
"""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.cache import policy, residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.ops.xla.rounds import Entering, enter
from mpembed_jax.row_ids import NO_ID


class Decisions(NamedTuple):
    """The decisions of `make_plan` about the unique ids of a batch."""

    # i32 [U]: indices of the given ids, ordered: hits, newcomers, bypassed. Entries from num_ids on
    # have no meaning.
    order: jax.Array
    line: jax.Array  # i32 [U], in the order of the given ids; C for bypassed ids and padding
    victim_ids: jax.Array  # i32 [U], in the order of the given ids; NO_ID for no victim
    num_hits: jax.Array  # i32 []
    num_cached: jax.Array  # i32 []: hits and newcomers


@jax.named_scope("plan")
def make_plan(
    cache: CacheState,
    ids: jax.Array,
    counts: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    num_positions: Fraction,
    chunk: int | None,
) -> tuple[CacheState, Decisions]:
    """Decides about the unique ids of one batch, and updates tags, priorities and the sketch.

    The rules are:
    * Hits keep their lines and are pinned.
    * The misses of a set are taken in order. LRU: by ascending id. LFU: by descending estimate,
      then ascending id.
    * They meet the unpinned ways of the set in order. Empty ways come first. LRU: then the oldest.
      LFU: then the least used. Among equals, the lowest way comes first.
    * A miss enters if its way is empty. LRU: it also enters if the line was not used in this step.
      LFU: it also enters if the estimate of the line's id is below the miss's own.
    * All other misses bypass the cache.

    LFU estimates the use of each id. The use of an id in the cache is counted at its line. The use
    of every other id is counted in the sketch, as the minimum of the id's cells. Every 30 C / N
    steps, all counts are halved first. The estimate of an id of the batch is
    `min(65535, use + occurrences)`. In the end, the lines of the batch take the estimates of their
    ids. The sketch cells of each bypassed or displaced id are raised to the id's estimate.

    Args:
      cache: the state before the step; its `rows` are passed through.
      ids: int32 [U], distinct; the first num_ids are real.
      counts: int32 [U], occurrences in the batch.
      num_ids: int32 scalar.
      step: int32 scalar, the number of this prefetch.
      num_positions: N, the number of ids in the batch, padding included. For one shard of a stack
        it is the shard's share of N, because C is then the number of the shard's lines.
      chunk: see chunks.each.

    Returns:
      The cache and the decisions. In the cache, newcomers have their lines, but their rows are not
      yet filled, and `dirty` still describes the victims.
    """
    geometry = cache.geometry
    width = ids.shape[0]
    has_estimates = policy.counts_use(cache.policy)
    cache = policy.age(cache, policy.is_time_to_halve(cache, step, num_positions))
    estimates = jnp.zeros(width, jnp.int32)
    positions = jnp.zeros(width, jnp.int32)

    @jax.named_scope("find")
    def find(window: chunks.Window, carry: tuple) -> tuple:
        line, estimates, order, num_hits, queue, num_misses = carry
        chunk_ids = window.take(ids)
        found = residency.locate(cache, chunk_ids)
        line = window.fill(line, found)
        if has_estimates:
            used = indexing.take(cache.priority.reshape(-1), found)
            estimates = window.fill(
                estimates, policy.estimate(cache.policy, used, window.take(counts))
            )
        is_hit = window.is_live & (found < geometry.lines)
        order, num_hits = chunks.append(order, num_hits, window.position, is_hit)
        queue, num_misses = chunks.append(
            queue, num_misses, window.position, window.is_live & ~is_hit
        )
        return line, estimates, order, num_hits, queue, num_misses

    line = jnp.full(width, geometry.lines, jnp.int32)
    zero = jnp.int32(0)
    line, estimates, order, num_hits, queue, num_misses = chunks.each(
        0, num_ids, width, chunk, find, (line, estimates, positions, zero, positions, zero)
    )

    if has_estimates:

        @jax.named_scope("estimate")
        def estimate(window: chunks.Window, estimates: jax.Array) -> jax.Array:
            position = window.take(queue)
            cells = residency.sketch_cells(cache, indexing.take(ids, position))
            seen = jnp.min(indexing.take(cache.sketch.reshape(-1), cells), axis=0).astype(jnp.int32)
            raised = policy.estimate(cache.policy, seen, indexing.take(counts, position))
            return indexing.put(estimates, jnp.where(window.is_live, position, width), raised)

        estimates = chunks.each(0, num_misses, width, chunk, estimate, estimates)

    @jax.named_scope("pin")
    def pin_hits(window: chunks.Window, priority: jax.Array) -> jax.Array:
        # No estimate is negative, but XLA cannot know this. The estimates of hits were computed
        # from the priorities. Because of the comparison, XLA reads the priorities before it
        # replaces them, so that it makes no copy of them.
        is_pinned = window.is_live & (window.take(estimates) >= 0)
        here = jnp.where(is_pinned, window.take(line), geometry.lines)
        return indexing.put(priority, here, policy.pinned(cache.policy, step))

    priority = chunks.each(0, num_ids, width, chunk, pin_hits, cache.priority.reshape(-1))
    carry = Entering(
        tags=cache.tags.reshape(-1),
        priority=priority,
        line=line,
        victim_ids=jnp.full(width, NO_ID, jnp.int32),
        victim_uses=jnp.zeros(width if has_estimates else 0, jnp.int32),
        order=order,
        num_cached=num_hits,
        last=num_ids,
        queue=queue,
        num_waiting=num_misses,
    )
    entered = enter(carry, geometry, cache.policy, ids, estimates, step, chunk)
    priority = entered.priority
    sketch = cache.sketch
    # The lines of this batch take the estimates of their ids. The sketch keeps the estimates of ids
    # that have no line.
    if has_estimates:

        @jax.named_scope("unpin")
        def unpin(window: chunks.Window, priority: jax.Array) -> jax.Array:
            here = jnp.where(window.is_live, window.take(entered.line), geometry.lines)
            return indexing.put(priority, here, window.take(estimates))

        @jax.named_scope("remember")
        def remember(window: chunks.Window, sketch: jax.Array) -> jax.Array:
            position = window.take(entered.order)
            is_bypassed = window.position >= entered.num_cached
            left = jnp.where(
                is_bypassed,
                indexing.take(ids, position),
                indexing.take(entered.victim_ids, position),
            )
            uses = jnp.where(
                is_bypassed,
                indexing.take(estimates, position),
                indexing.take(entered.victim_uses, position),
            )
            is_left = window.is_live & (left != NO_ID)
            cells = jnp.where(is_left, residency.sketch_cells(cache, left), sketch.size)
            raised = jnp.broadcast_to(uses.astype(jnp.uint16), cells.shape)
            return indexing.maximum(sketch, cells.reshape(-1), raised.reshape(-1))

        priority = chunks.each(0, num_ids, width, chunk, unpin, priority)
        sketch = chunks.each(num_hits, num_ids, width, chunk, remember, sketch.reshape(-1)).reshape(
            sketch.shape
        )
    shape = cache.tags.shape
    cache = dataclasses.replace(
        cache, tags=entered.tags.reshape(shape), priority=priority.reshape(shape), sketch=sketch
    )
    return cache, Decisions(
        entered.order, entered.line, entered.victim_ids, num_hits, entered.num_cached
    )
