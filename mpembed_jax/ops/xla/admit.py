"""The reference of `admit` in plain jax.numpy: which raw ids of a batch get rows of their own.

It sorts and gathers arrays of the length of the batch. Its one loop halves all estimates, once or
not at all.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import carries, indexing
from mpembed_jax.ops.records import Admission, Admitted
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import pool
from mpembed_jax.vocabulary.pool import VocabularyState


@jax.named_scope("admit")
def admit(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    occurrences: jax.Array | None = None,
    part: pool.Part = pool.WHOLE,
) -> tuple[VocabularyState, Admitted]:
    """Gives rows of their own to the ids of a batch that earned them.

    The rules are:
    * If must_halve, all estimates are halved first. This is so every `window` * R / N steps, with R
      rows in the pool and N positions in a batch.
    * An id that has a row keeps it. Its use is counted at the row, and no newcomer may take the row
      in this step.
    * The use of every other id is counted in the sketch. An id whose estimate, its occurrences in
      this batch included, is `admit_after` or more is a newcomer.
    * The newcomers of a set, in order of descending estimate, then ascending tag, meet its other
      rows in order: empty ones, then the least used; among equals, the lowest way.
    * A newcomer gets the row if it is empty, or if rows are recycled and its owner's use is below
      the newcomer's estimate. All other newcomers are refused, and share a row in this step.
    * The use of an id with a row becomes its estimate, rounded stochastically.
    * The sketch cells of each id that loses its row or has none are raised to its estimate.

    Args:
      vocabulary: the state before the step; its counters are passed through.
      pairs: uint32 [N, 2].
      step: uint32 scalar. The rounding draws its bits from it.
      must_halve: bool scalar: whether all uses and counters are halved first.
      rules: the rules of admission.
      occurrences: int32 [N]: how many occurrences each position stands for; None: one. The sum over
        the positions of an id is below 2^31.
      part: the part of the pool that the vocabulary holds. All pairs have their sets in it.

    Returns:
      The vocabulary and what was decided. `rows` are local row numbers of the part.
    """
    sizes = vocabulary.sizes

    def halve(both: tuple) -> tuple:
        return pool.halved(both[0]), pool.halved_counts(both[1], sizes)

    owners, sketch = carries.at_most_once(
        halve, must_halve.astype(jnp.int32), (vocabulary.owners, vocabulary.sketch)
    )
    vocabulary = dataclasses.replace(vocabulary, owners=owners, sketch=sketch)
    return admit_halved(vocabulary, pairs, step, rules, occurrences, part)


def admit_halved(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    rules: Admission,
    occurrences: jax.Array | None,
    part: pool.Part,
) -> tuple[VocabularyState, Admitted]:
    """Does what `admit` does after the halving. It has no loop."""
    num = pairs.shape[0]
    sizes = vocabulary.sizes
    geometry = sizes.geometry
    sets_, ways = geometry.sets, geometry.ways
    position = jnp.arange(num, dtype=jnp.int32)
    tags = pool.tags_of(pairs)
    is_real = tags != jnp.uint32(pool.NO_OWNER)
    position_sets = jnp.where(is_real, pool.sets_of(pairs, sizes, part.shards), sets_)

    # Groups of positions with the same id. They are numbered in the order of sets and tags.
    by_set, by_tag, at = lax.sort((position_sets, tags, position), num_keys=2)
    is_first = indexing.starts(by_set, by_tag)
    group = jnp.cumsum(is_first.astype(jnp.int32)) - 1
    first = jnp.where(is_first, group, num)
    id_sets = indexing.put(jnp.full(num, sets_, jnp.int32), first, by_set)
    id_tags = indexing.put(jnp.full(num, pool.NO_OWNER, jnp.uint32), first, by_tag)
    times = jnp.where(is_real, 1 if occurrences is None else occurrences, 0)
    counts = indexing.add(jnp.zeros(num, jnp.int32), group, indexing.take(times, at))
    is_id = id_sets < sets_
    group_of = indexing.put(jnp.zeros(num, jnp.int32), at, group)

    way = pool.ways_of(vocabulary, id_sets, id_tags)
    is_hit = is_id & (way < ways)
    size = sets_ * ways
    line = jnp.where(is_hit, id_sets * ways + way, size)
    owners = vocabulary.owners.reshape(-1)
    sketch = vocabulary.sketch.reshape(-1)
    mixed = pool.mixed(id_sets, id_tags, sizes, part)
    cells = pool.cells(sizes, id_sets, mixed)
    seen = pool.counts_of(sketch, cells, sizes)
    remembered = jnp.where(is_hit, pool.use_of(indexing.take(owners, line)), seen)
    estimates = jnp.minimum(remembered + counts, pool.MAX_USE)
    pinned = (id_tags << pool.USE_BITS) | jnp.uint32(pool.PINNED)
    owners = indexing.put(
        owners, jnp.where(estimates >= 0, line, size), pinned
    )  # the comparison orders the read before the write, as in plan.pin_hits

    # The newcomers of each set, by rank.
    is_new = is_id & ~is_hit & (estimates >= rules.admit_after)
    new_sets, _, _, new = lax.sort(
        (jnp.where(is_new, id_sets, sets_), -estimates, id_tags, position), num_keys=3
    )
    is_live = new_sets < sets_
    rank = position - lax.cummax(jnp.where(indexing.starts(new_sets), position, 0))
    here = indexing.take(owners.reshape(sets_, ways), new_sets)
    is_empty = here >> pool.USE_BITS == jnp.uint32(pool.NO_OWNER)
    cost = jnp.where(is_empty, 0, pool.use_of(here) + 1) * ways
    cost = jnp.sort(cost + jnp.arange(ways, dtype=jnp.int32), axis=1)
    chosen = jnp.take_along_axis(cost, jnp.minimum(rank, ways - 1)[:, None], axis=1)[:, 0]
    new_way, paid = chosen % ways, chosen // ways
    new_estimates = indexing.take(estimates, new)
    may = paid <= (new_estimates if rules.recycle else 0)
    enters = is_live & (rank < ways) & may
    victim = jnp.take_along_axis(here, new_way[:, None], axis=1)[:, 0] >> pool.USE_BITS
    is_recycled = enters & (paid > 0)
    target = jnp.where(enters, new_sets * ways + new_way, size)

    # Newcomers take their rows. The rows of the batch's ids take the estimates of these ids.
    entered = jnp.where(enters, new, num)
    way = indexing.put(way, entered, new_way)
    line = indexing.put(line, entered, target)
    owned = pool.owners_of(id_tags, estimates, pool.noise_of(mixed, step))
    # Recycles: the tag of the row's owner becomes that of the newcomer.
    owners = indexing.put(owners, line, owned)
    is_left = is_id & (line == size)
    sketch = pool.raised(sketch, is_left, cells, estimates, sizes)
    of_victims = pool.cells(sizes, new_sets, pool.mixed(new_sets, victim, sizes, part))
    sketch = pool.raised(sketch, is_recycled, of_victims, paid - 1, sizes)
    vocabulary = dataclasses.replace(
        vocabulary,
        owners=owners.reshape(sets_, ways),
        sketch=sketch.reshape(vocabulary.sketch.shape),
    )

    own_way = indexing.take(way, group_of)
    result = pool.rows_or_shared(pairs, position_sets, own_way, geometry, rules.shared_rows)
    is_started = enters if rules.starts_all else is_recycled
    order = jnp.cumsum(is_started.astype(jnp.int32))
    to = jnp.where(is_started, order - 1, num)
    new_rows = pool.row_of(new_sets, new_way, geometry)
    started = indexing.put(jnp.full(num, NO_ID, jnp.int32), to, new_rows)
    tables = None
    if rules.starts_all:
        own_tables = indexing.take(pool.tables_of(pairs, group_of), new)
        tables = indexing.put(jnp.zeros(num, jnp.int32), to, own_tables)

    def total(counted: jax.Array) -> jax.Array:
        return jnp.sum(counted, dtype=jnp.int32)

    return vocabulary, Admitted(
        rows=result,
        started=started,
        tables=tables,
        num_started=order[-1],
        num_recycled=total(is_recycled),
        num_requests=total(times),
        num_shared=total(jnp.where(own_way == ways, times, 0)),
        num_admitted=total(enters),
        num_refused=total(is_live & ~enters),
    )
