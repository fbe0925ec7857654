"""One batch's cache decisions: hits, newcomers, victims and bypasses, exactly, without sorting and without touching a row.

The misses of every set meet its ways in rounds (`rounds`). The exact rules are stated at `make_plan`; they follow FBGEMM's
LRU / LFU caches where those are documented, and are ours where not (order inside a set, admission, halving, conservative
sketch update). `ops.plan` is what a step calls: these rules in XLA, or the same compiled by numba.
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
) -> tuple[CacheState, Decisions]:
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
      The cache with newcomers entered (their rows not yet filled, `dirty` still the victims'), and the decisions.
    """
    geometry, width = cache.geometry, ids.shape[0]
    is_lfu = policy.counts_use(cache.policy)
    cache = policy.age(cache, policy.is_time_to_halve(cache, step, num_positions))
    estimates = jnp.zeros(width, jnp.int32)
    positions = jnp.zeros(width, jnp.int32)

    # Hits, and the queue of misses.
    @jax.named_scope("find")
    def find(window: chunks.Window, carry: tuple) -> tuple:
        line, estimates, order, num_hits, queue, num_misses = carry
        chunk_ids = window.take(ids)
        found = residency.locate(cache, chunk_ids)
        line = window.fill(line, found)
        if is_lfu:
            used = indexing.take(cache.priority.reshape(-1), found)
            estimates = window.fill(estimates, policy.estimate(used, window.take(counts)))
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

    if is_lfu:

        @jax.named_scope("estimate")
        def estimate(window: chunks.Window, estimates: jax.Array) -> jax.Array:
            position = window.take(queue)
            cells = residency.sketch_cells(cache, indexing.take(ids, position))
            seen = jnp.min(indexing.take(cache.sketch.reshape(-1), cells), axis=0).astype(jnp.int32)
            raised = policy.estimate(seen, indexing.take(counts, position))
            return indexing.put(estimates, jnp.where(window.is_live, position, width), raised)

        estimates = chunks.each(0, num_misses, width, chunk, estimate, estimates)

    @jax.named_scope("pin")
    def pin_hits(window: chunks.Window, priority: jax.Array) -> jax.Array:
        # No estimate is negative, which XLA cannot know: it reads the priorities before it replaces them, without a copy.
        is_pinned = window.is_live & (window.take(estimates) >= 0)
        here = jnp.where(is_pinned, window.take(line), geometry.lines)
        return indexing.put(priority, here, policy.pinned(cache.policy, step))

    priority = chunks.each(0, num_ids, width, chunk, pin_hits, cache.priority.reshape(-1))
    carry = Entering(
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
    entered = enter(carry, geometry, cache.policy, ids, estimates, step, chunk)
    priority, sketch = entered.priority, cache.sketch
    if (
        is_lfu
    ):  # the lines of this batch take their estimates, the sketch keeps those of ids without a line

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
