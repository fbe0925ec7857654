"""The reference of `admit` in plain jax.numpy: which raw ids of a batch get rows of their own.

A loop-free program of sorts and gathers, all of the length of the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import carries, indexing
from mpembed_jax.ops.records import Admission, Admitted
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes, pool
from mpembed_jax.vocabulary.pool import VocabularyState


@jax.named_scope("admit")
def admit(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    counts: jax.Array | None = None,
    part: pool.Part = pool.WHOLE,
) -> tuple[VocabularyState, Admitted]:
    """Gives the ids of a batch rows of their own, where they earned them.

    The rules are:
    * Every 30 pools of positions, all estimates are halved first.
    * An id that has a row keeps it. Its use is counted at the row, and no newcomer may take the row
      in this step.
    * The use of every other id is counted in the sketch. An id whose estimate, its occurrences in
      this batch included, is `admit_after` or more is a newcomer.
    * The newcomers of a set, in order of descending estimate, then ascending tag, meet its other
      rows in order: empty ones, then the least used; among equals, the lowest way.
    * A newcomer gets the row if it is empty, or if rows are recycled and its owner's use is below
      the newcomer's estimate. All other newcomers are refused, and share a row in this step.
    * The sketch cells of each id that leaves or stays without a row are raised to its estimate.

    Args:
      vocabulary: the state before the step; its counters are passed through.
      pairs: uint32 [N, 2].
      must_halve: bool scalar.
      rules: the rules of admission.
      counts: int32 [N]: occurrences that a pair stands for. None: one each.
      part: the part of the pool that the vocabulary holds. Pairs are those of its sets.

    Returns:
      The vocabulary and what was decided. Rows are the local ones of the part.
    """
    num = pairs.shape[0]
    geometry = vocabulary.geometry
    sets_, ways = geometry.sets, geometry.ways

    def halve(both: tuple) -> tuple:
        return both[0] >> 1, both[1] >> 1

    use, sketch = carries.at_most_once(
        halve, must_halve.astype(jnp.int32), (vocabulary.use, vocabulary.sketch)
    )
    vocabulary = dataclasses.replace(vocabulary, use=use, sketch=sketch)
    position = jnp.arange(num, dtype=jnp.int32)
    is_real = pairs[:, 0] != jnp.uint32(hashes.PADDING)
    occurrences = jnp.where(is_real, 1 if counts is None else counts, 0)
    position_sets = jnp.where(is_real, pool.sets_of(pairs[:, 1], geometry, part.shards), sets_)

    # Groups of positions with the same id. They are numbered in the order of sets and tags.
    by_set, by_tag, at = lax.sort((position_sets, pairs[:, 0], position), num_keys=2)
    before = jnp.maximum(position - 1, 0)
    is_first = (by_set != by_set[before]) | (by_tag != by_tag[before]) | (position == 0)
    group = jnp.cumsum(is_first.astype(jnp.int32)) - 1
    first = jnp.where(is_first, group, num)
    id_sets = indexing.put(jnp.full(num, sets_, jnp.int32), first, by_set)
    id_tags = indexing.put(jnp.full(num, hashes.PADDING, jnp.uint32), first, by_tag)
    id_counts = indexing.add(jnp.zeros(num, jnp.int32), group, indexing.take(occurrences, at))
    is_id = id_sets < sets_
    group_of = indexing.put(jnp.zeros(num, jnp.int32), at, group)

    way = pool.ways_of(vocabulary, id_sets, id_tags)
    is_hit = is_id & (way < ways)
    size = sets_ * ways
    line = jnp.where(is_hit, id_sets * ways + way, size)
    use = vocabulary.use.reshape(-1)
    cells = pool.cells(vocabulary, id_sets, id_tags, part)
    seen = jnp.min(indexing.take(vocabulary.sketch.reshape(-1), cells), axis=0)
    remembered = jnp.where(
        is_hit, indexing.take(use, line).astype(jnp.int32), seen.astype(jnp.int32)
    )
    estimates = jnp.minimum(remembered + id_counts, pool.MAX_USE)
    use = indexing.put(
        use, jnp.where(estimates >= 0, line, size), jnp.uint16(pool.PINNED)
    )  # the comparison orders the read before the write, as in plan.pin_hits

    # The newcomers of each set, by rank.
    is_new = is_id & ~is_hit & (estimates >= rules.admit_after)
    new_sets, _, _, new = lax.sort(
        (jnp.where(is_new, id_sets, sets_), -estimates, id_tags, position), num_keys=3
    )
    is_live = new_sets < sets_
    is_start = (new_sets != new_sets[before]) | (position == 0)
    rank = position - lax.cummax(jnp.where(is_start, position, 0))
    here_tags = indexing.take(vocabulary.tags, new_sets)
    here_use = indexing.take(use.reshape(sets_, ways), new_sets)
    is_empty = here_tags == jnp.uint32(hashes.PADDING)
    cost = jnp.where(is_empty, 0, here_use.astype(jnp.int32) + 1) * ways
    cost = jnp.sort(cost + jnp.arange(ways, dtype=jnp.int32), axis=1)
    chosen = jnp.take_along_axis(cost, jnp.minimum(rank, ways - 1)[:, None], axis=1)[:, 0]
    new_way, paid = chosen % ways, chosen // ways
    new_estimates = indexing.take(estimates, new)
    may = paid <= (new_estimates if rules.recycle else 0)
    enters = is_live & (rank < ways) & may
    victim = jnp.take_along_axis(here_tags, new_way[:, None], axis=1)[:, 0]
    is_recycled = enters & (paid > 0)
    target = jnp.where(enters, new_sets * ways + new_way, size)

    # Newcomers take their rows. The rows of the batch take its estimates.
    tags = indexing.put(vocabulary.tags.reshape(-1), target, indexing.take(id_tags, new))
    entered = jnp.where(enters, new, num)
    way = indexing.put(way, entered, new_way)
    line = indexing.put(line, entered, target)
    use = indexing.put(use, line, estimates.astype(jnp.uint16))
    is_left = is_id & (line == size)
    sketch = vocabulary.sketch.reshape(-1)

    def raised(sketch: jax.Array, is_raised: jax.Array, cells: jax.Array, to: jax.Array):
        cells = jnp.where(is_raised, cells, sketch.size)
        values = jnp.broadcast_to(jnp.minimum(to, pool.MAX_COUNT).astype(jnp.uint8), cells.shape)
        return indexing.maximum(sketch, cells.reshape(-1), values.reshape(-1))

    sketch = raised(sketch, is_left, cells, estimates)
    sketch = raised(sketch, is_recycled, pool.cells(vocabulary, new_sets, victim, part), paid - 1)
    vocabulary = dataclasses.replace(
        vocabulary,
        tags=tags.reshape(sets_, ways),
        use=use.reshape(sets_, ways),
        sketch=sketch.reshape(vocabulary.sketch.shape),
    )

    own_way = indexing.take(way, group_of)
    result = pool.rows_or_shared(pairs, position_sets, own_way, geometry, rules.shared_rows)
    order = jnp.cumsum(is_recycled.astype(jnp.int32))
    recycled = indexing.put(
        jnp.full(num, NO_ID, jnp.int32),
        jnp.where(is_recycled, order - 1, num),
        pool.row_of(new_sets, new_way, geometry),
    )

    def total(counted: jax.Array) -> jax.Array:
        return jnp.sum(counted, dtype=jnp.int32)

    return vocabulary, Admitted(
        rows=result,
        recycled=recycled,
        num_recycled=total(is_recycled),
        num_requests=total(occurrences),
        num_shared=total(jnp.where(own_way == ways, occurrences, 0)),
        num_admitted=total(enters),
        num_refused=total(is_live & ~enters),
    )
