"""Admission of raw ids on a GPU: two sorts group the positions, one kernel decides about all sets.

The positions are sorted by tag, then by set, so all positions of an id are neighbours, and so are
all ids of a set. One program of one warp decides about one set, as in `plan`: it finds the ids that
have rows, and then the newcomers meet the other rows, one after another. There is no loop outside
the kernels. The reference is `xla.admit`.

If a batch has more than 64 positions per set of the pool (`plan.has_short_sets`), the reference
runs after the halving. For each newcomer, a program looks at all ids of its set, so its time grows
with the square of their number. The reference sorts all ids, in any number of sets. It has no
rounds and, after the halving, no loop, so the host never waits there either.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mpembed_jax.arrays import indexing
from mpembed_jax.ops import xla
from mpembed_jax.ops.gpu import kernel, plan
from mpembed_jax.ops.records import Admission, Admitted
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import pool
from mpembed_jax.vocabulary.pool import VocabularyState

_LANES = plan.LANES
_NO_COST = np.int32(2**31 - 1)  # the cost of a row that no newcomer may take


class _Ids(NamedTuple):
    """The distinct ids of a batch, in the order of sets and tags."""

    position_sets: jax.Array  # i32 [N]: the set of each position; S for padding
    times: jax.Array  # i32 [N]: occurrences of each position; 0 for padding
    group: jax.Array  # i32 [N]: the index of each position's id
    sets: jax.Array  # i32 [N]: the set of each id; S for padding
    tags: jax.Array  # u32 [N]
    counts: jax.Array  # i32 [N]: occurrences
    num_ids: jax.Array  # i32 []
    # i32 [min(S, N) + 1]: where each set that has ids begins; num_ids after the last of them
    begin: jax.Array
    num_sets: jax.Array  # i32 []: the number of sets that have ids


class _Decisions(NamedTuple):
    """The decisions of the kernel about the ids, in the order of _Ids; arbitrary at padding."""

    way: jax.Array  # i32 [N]: W for ids without a row
    estimates: jax.Array  # i32 [N]: e if the id had no row before the step; -1 - e if it had one
    displaced: jax.Array  # i32 [N]: the bits of the owner whose row a newcomer takes; else EMPTY


@jax.named_scope("admit")
def admit(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    occurrences: jax.Array | None,
    part: pool.Part,
    *,
    is_interpreted: bool,
) -> tuple[VocabularyState, Admitted]:
    """Gives rows of their own to the ids of a batch that earned them; see `xla.admit.admit`."""
    num = pairs.shape[0]
    sizes = vocabulary.sizes
    sets_, ways, _ = sizes.geometry
    vocabulary = _halved(vocabulary, must_halve, is_interpreted)
    if not plan.has_short_sets(sizes.geometry, num):
        return xla.admit.admit_halved(vocabulary, pairs, step, rules, occurrences, part)
    ids = _grouped(pairs, occurrences, sizes, part, is_interpreted)
    sketch = vocabulary.sketch.reshape(-1)
    mixed = pool.mixed(ids.sets, ids.tags, sizes, part)
    seen = pool.counts_of(sketch, pool.cells(sizes, ids.sets, mixed), sizes)
    made = _decide(vocabulary, ids, seen, rules, is_interpreted)

    position = jnp.arange(num, dtype=jnp.int32)
    is_id = position < ids.num_ids
    is_hit = is_id & (made.estimates < 0)
    estimates = jnp.where(made.estimates < 0, -1 - made.estimates, made.estimates)
    way = jnp.where(is_id, made.way, ways)
    is_owner = way < ways
    enters = is_owner & ~is_hit
    is_newcomer = is_id & ~is_hit & (estimates >= rules.admit_after)
    displaced = made.displaced.astype(jnp.uint32)
    is_recycled = enters & (displaced >> pool.USE_BITS != jnp.uint32(pool.NO_OWNER))
    line = jnp.where(is_owner, ids.sets * ways + way, sets_ * ways)
    owned = pool.owners_of(ids.tags, estimates, pool.noise_of(mixed, step))
    # Recycles: the tag of the row's owner becomes that of the newcomer.
    owners = indexing.put(vocabulary.owners.reshape(-1), line, owned)
    # An id leaves for the sketch if it stays without a row, or if another id takes its row.
    left = jnp.where(is_recycled, displaced >> pool.USE_BITS, ids.tags)
    cells = pool.cells(sizes, ids.sets, pool.mixed(ids.sets, left, sizes, part))
    uses = jnp.where(is_recycled, pool.use_of(displaced), estimates)
    sketch = pool.raised(sketch, is_recycled | (is_id & ~is_owner), cells, uses, sizes)
    vocabulary = dataclasses.replace(
        vocabulary,
        owners=owners.reshape(sets_, ways),
        sketch=sketch.reshape(vocabulary.sketch.shape),
    )

    own_way = indexing.take(way, ids.group)
    is_started = enters if rules.starts_all else is_recycled
    (rank,) = kernel.running_sums([is_started], is_interpreted=is_interpreted)
    to = jnp.where(is_started, rank - 1, num)
    own_rows = pool.row_of(ids.sets, way, sizes.geometry)
    started = indexing.put(jnp.full(num, NO_ID, jnp.int32), to, own_rows)
    tables = None
    if rules.starts_all:
        own_tables = pool.tables_of(pairs, ids.group)
        tables = indexing.put(jnp.zeros(num, jnp.int32), to, own_tables)

    def total(counted: jax.Array) -> jax.Array:
        return jnp.sum(counted, dtype=jnp.int32)

    return vocabulary, Admitted(
        rows=pool.rows_or_shared(
            pairs, ids.position_sets, own_way, sizes.geometry, rules.shared_rows
        ),
        started=started,
        tables=tables,
        num_started=rank[-1],
        num_recycled=total(is_recycled),
        num_requests=total(ids.times),
        num_shared=total(jnp.where(own_way == ways, ids.times, 0)),
        num_admitted=total(enters),
        num_refused=total(is_newcomer & ~enters),
    )


def _halved(
    vocabulary: VocabularyState, must_halve: jax.Array, is_interpreted: bool
) -> VocabularyState:
    """Returns the vocabulary with half its uses and counts, if `must_halve` (bool []) is true."""
    sizes = vocabulary.sizes
    owners, sketch = kernel.change_if(
        must_halve,
        [vocabulary.owners.reshape(-1), vocabulary.sketch.reshape(-1)],
        [pool.halved, lambda sketch: pool.halved_counts(sketch, sizes)],
        name="mpembed_halve_uses",
        is_interpreted=is_interpreted,
    )
    return dataclasses.replace(
        vocabulary,
        owners=owners.reshape(vocabulary.owners.shape),
        sketch=sketch.reshape(vocabulary.sketch.shape),
    )


def _grouped(
    pairs: jax.Array,
    occurrences: jax.Array | None,
    sizes: pool.Sizes,
    part: pool.Part,
    is_interpreted: bool,
) -> _Ids:
    """Groups the positions of a batch by id, and the ids by set."""
    num = pairs.shape[0]
    num_sets = sizes.geometry.sets
    position = jnp.arange(num, dtype=jnp.int32)
    tags = pool.tags_of(pairs)
    is_real = tags != jnp.uint32(pool.NO_OWNER)
    sets = jnp.where(is_real, pool.sets_of(pairs, sizes, part.shards), num_sets)
    # XLA's GPU back end uses a radix sort for one key and one value. Two such stable sorts are one
    # sort by two keys.
    _, by_tag = lax.sort_key_val(tags, position)
    by_set, order = lax.sort_key_val(indexing.take(sets, by_tag), by_tag)
    is_first = kernel.starts(by_set, indexing.take(tags, order))
    (rank,) = kernel.running_sums([is_first], is_interpreted=is_interpreted)
    rank = rank - 1
    first = jnp.full(num + 1, num, jnp.int32)
    first = indexing.put(first, jnp.where(is_first, rank, num + 1), position)
    times = jnp.where(is_real, 1 if occurrences is None else occurrences, 0)
    if occurrences is None:
        counts = first[1:] - first[:-1]
    else:
        (before,) = kernel.running_sums(
            [indexing.take(times, order)], is_interpreted=is_interpreted
        )
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), before])
        bounds = indexing.take(before, first)
        counts = bounds[1:] - bounds[:-1]
    is_group = position <= rank[-1]
    id_sets = jnp.where(is_group, indexing.take(by_set, first[:-1]), num_sets)
    is_id = id_sets < num_sets
    num_ids = jnp.sum(is_id, dtype=jnp.int32)
    begins = kernel.starts(id_sets) & is_id
    (set_rank,) = kernel.running_sums([begins], is_interpreted=is_interpreted)
    most = min(num_sets, num)
    begin = jnp.broadcast_to(num_ids, (most + 1,))
    return _Ids(
        position_sets=sets,
        times=times,
        group=indexing.put(jnp.zeros(num, jnp.int32), order, rank),
        sets=id_sets,
        tags=indexing.take(tags, indexing.take(order, first[:-1])),
        counts=counts,
        num_ids=num_ids,
        begin=indexing.put(begin, jnp.where(begins, set_rank - 1, most + 1), position),
        num_sets=set_rank[-1],
    )


def _decide(
    vocabulary: VocabularyState,
    ids: _Ids,
    seen: jax.Array,
    rules: Admission,
    is_interpreted: bool,
) -> _Decisions:
    """Runs the kernel, which decides about each id and changes nothing.

    Args:
      vocabulary: the state before the step, halved if this step halves.
      ids: the groups.
      seen: int32 [N], what the sketch counts of each id.
      rules: the rules of admission.
      is_interpreted: see kernel.launch.
    """
    ways = vocabulary.geometry.ways
    (width,) = seen.shape

    def body(*refs: Any) -> None:
        num_sets, begin_ref, sets_ref, tags_ref, counts_ref, seen_ref, owners_ref = refs[:7]
        way_ref, estimates_ref, displaced_ref = refs[7:]
        number = pl.program_id(0)
        lane = jnp.arange(_LANES, dtype=jnp.int32)
        way = jnp.arange(indexing.ceil_power(ways), dtype=jnp.int32)
        is_way = way < ways

        def decide_set() -> None:
            bounds = begin_ref[number], begin_ref[number + 1]
            place = sets_ref[bounds[0]] * ways + way
            owners = kernel.load(owners_ref, (place,), is_way, pool.EMPTY)
            tags = (owners >> pool.USE_BITS).astype(jnp.int32)
            uses = pool.use_of(owners)
            cost = jnp.where(tags == pool.NO_OWNER, 0, uses + 1)

            def find(carry: tuple) -> tuple:
                """Finds the ids that have rows among the next 8. The others have none for now."""
                start, is_held = carry
                position = start + lane
                is_live = position < bounds[1]
                here = kernel.load(tags_ref, (position,), is_live, NO_ID)
                is_match = is_live[:, None] & (here[:, None] == tags[None, :])
                found = jnp.max(jnp.where(is_match, way[None, :], -1), axis=1)
                is_hit = found >= 0
                used = jnp.max(jnp.where(is_match, uses[None, :], 0), axis=1)
                used = jnp.where(is_hit, used, kernel.load(seen_ref, (position,), is_live))
                counts = kernel.load(counts_ref, (position,), is_live)
                estimate = jnp.minimum(used + counts, pool.MAX_USE)
                kernel.store(way_ref, (position,), jnp.where(is_hit, found, ways), is_live)
                signed = jnp.where(is_hit, -1 - estimate, estimate)
                kernel.store(estimates_ref, (position,), signed, is_live)
                empty = jnp.full(_LANES, np.uint32(pool.EMPTY).astype(np.int32), jnp.int32)
                kernel.store(displaced_ref, (position,), empty, is_live)
                held = jnp.max(is_match.astype(jnp.int32), axis=0)
                return start + _LANES, jnp.maximum(is_held, held)

            is_held = jnp.zeros(way.shape, jnp.int32)
            _, is_held = lax.while_loop(
                lambda carry: carry[0] < bounds[1], find, (bounds[0], is_held)
            )
            cost = jnp.where(is_way & (is_held == 0), cost, _NO_COST)
            # The threads that read the estimates are not those that stored them.
            kernel.barrier(is_interpreted)

            def best_after(estimate: jax.Array, tag: jax.Array) -> tuple:
                return plan.best_after(
                    tags_ref, estimates_ref, bounds, estimate, tag, rules.admit_after
                )

            def meet(carry: tuple) -> tuple:
                """Gives the current newcomer the cheapest row, if it may. Finds the next one."""
                position, estimate, tag, cost = carry
                cheapest = jnp.min(cost)
                chosen = jnp.min(jnp.where(cost == cheapest, way, ways))
                may = cheapest <= (estimate if rules.recycle else 0)
                here, enters = (jnp.broadcast_to(x, (1,)) for x in (position, may))
                kernel.store(way_ref, (here,), jnp.broadcast_to(chosen, (1,)), enters)
                owner = jnp.where(way == chosen, owners.astype(jnp.int32), 0)
                owner = jnp.sum(owner, dtype=jnp.int32)
                kernel.store(displaced_ref, (here,), jnp.broadcast_to(owner, (1,)), enters)
                cost = jnp.where(way == chosen, _NO_COST, cost)
                # If this newcomer may not enter, no later newcomer of the set may.
                position, *rest = best_after(estimate, tag)
                return jnp.where(may, position, -1), *rest, cost

            first = best_after(jnp.int32(pool.MAX_USE + 1), jnp.int32(-1))
            lax.while_loop(lambda carry: carry[0] >= 0, meet, (*first, cost))

        pl.when(number < num_sets[0])(decide_set)

    per_id = jax.ShapeDtypeStruct((width,), jnp.int32)
    decided = kernel.launch(
        body,
        ids.begin.shape[0] - 1,
        [
            ids.num_sets[None],
            ids.begin,
            ids.sets,
            ids.tags.astype(jnp.int32),
            ids.counts,
            seen,
            vocabulary.owners.reshape(-1),
        ],
        [per_id] * 3,
        name="mpembed_admit",
        is_interpreted=is_interpreted,
        num_warps=1,
    )
    return _Decisions(*decided)
