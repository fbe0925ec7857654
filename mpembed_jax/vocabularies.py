"""Changes of a vocabulary: another size of its pool, more tables, counted ids, forgotten ids.

Owners that stay keep the values and the optimizer state of their rows. Only a cached row whose
dirty line finds no place in the new cache is rounded; see `grow`. The sets of a pool are split and
joined by linear hashing (Litwin, 1980). The set and the tag of a row tell the new set of its owner;
see `vocabulary.pool`. The functions work on one device, between steps. A state over a mesh is
brought to one device first, and then back.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import row_ids, sharding
from mpembed_jax.arrays import indexing
from mpembed_jax.cache import residency
from mpembed_jax.embedding import admission, arguments, resizing
from mpembed_jax.embedding.counters import count_change, count_updates
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, TableSpec
from mpembed_jax.vocabulary import pool
from mpembed_jax.vocabulary.spec import VocabularySpec

_BLOCK = 65536  # ids counted at once


def _on_one_device(move: Callable) -> Callable:
    """Makes a function for states on one device accept and return states over a mesh."""

    @functools.wraps(move)
    def over_mesh(state: EmbeddingState, *args: Any, **options: Any) -> EmbeddingState:
        call = f"{move.__name__}(state, ..)"
        return sharding.on_one_device(call, state, lambda state: move(state, *args, **options))

    return over_mesh


@_on_one_device
def grow(state: EmbeddingState, num_rows: int) -> EmbeddingState:
    """Gives the pool more rows. Every owner keeps a row with what it has learned.

    The sets of the pool are split. Ids are spread evenly if the pool is doubled. Between two
    doublings, the sets that are not split yet have more ids for each row. The probability that an
    id without a row is taken for the owner of one grows with the pool: see `vocabulary.pool`.

    A row may get another number, and the number decides the row's set in the cache. A cached row
    therefore gets a number whose set in the cache has room for its line. If there is none, the row
    leaves the cache. If its line is dirty, the line is then written back to the table, rounded as
    by flush. The cache's sketch, which counts the uses of rows without a line, starts from zero.

    Args:
      state: concrete and between steps; not consumed.
      num_rows: rows of the pool, more than it has, without shared rows. They are rounded down to
        whole sets, with the same number of sets in each group.

    Returns:
      The new state. Its `spec` has the new sizes: restore its checkpoints with that spec.

    Raises:
      TypeError: if state has another type, or is traced.
      ValueError: if num_rows is not an integer, or the pool would not grow; if the state has no
        vocabulary, waits for its update, was donated, made for another spec, or averaged; if it was
        made inside jax.pmap, or several processes hold parts of it.
    """
    vocabulary, rules = _held("grow(state, num_rows)", state)
    geometry = vocabulary.geometry
    num_rows = _size(num_rows)
    sets = num_rows // geometry.ways
    sets -= sets % geometry.groups
    if sets <= geometry.sets:
        least = (geometry.sets + geometry.groups) * geometry.ways
        raise ValueError(
            f"grow: the pool has {geometry.lines} rows; num_rows={num_rows}, rounded down to whole "
            f"sets, is not more; ask for {least} or more, or see shrink"
        )
    return resizing.moved(state, _resized(state, rules, vocabulary, num_rows, geometry.ways))


@_on_one_device
def shrink(state: EmbeddingState, num_rows: int) -> EmbeddingState:
    """Takes rows from the pool. If a set has more owners than rows, the least used lose their rows.

    A pool that has grown first loses the sets that it gained. Once it has only its first sets, each
    set loses ways. The uses of the owners that lose their rows go to the sketch. For cached rows,
    see `grow`.

    Args:
      state: concrete and between steps; not consumed.
      num_rows: rows of the pool, fewer than it has, without shared rows. They are rounded down to
        whole sets, with the same number of sets in each group. If these would be fewer than the
        first sets, the pool gets its first sets, each with the most ways that `num_rows` has room
        for.

    Returns:
      The new state. Its `spec` has the new sizes: restore its checkpoints with that spec.

    Raises:
      TypeError: if state has another type, or is traced.
      ValueError: if num_rows is not an integer, if the pool would not shrink, or if some first set
        would have no row. Also for a state that `grow` refuses.
    """
    vocabulary, rules = _held("shrink(state, num_rows)", state)
    geometry = vocabulary.geometry
    num_rows = _size(num_rows)
    first = vocabulary.first_sets
    ways = geometry.ways
    if num_rows >= geometry.lines or num_rows < first:
        raise ValueError(
            f"shrink: the pool has {geometry.lines} rows and keeps at least {first}, one in each "
            f"of the sets it was made with; got {num_rows}"
            + ("; see grow" if num_rows > geometry.lines else "")
        )
    sets = num_rows // ways
    if sets - sets % geometry.groups < first:
        ways = num_rows // first
        num_rows = first * ways
    return resizing.moved(state, _resized(state, rules, vocabulary, num_rows, ways))


@_on_one_device
def add_tables(
    state: EmbeddingState,
    tables: TableSpec | Sequence[TableSpec],
    features: Mapping[str, str] | None = None,
) -> EmbeddingState:
    """Adds tables of raw ids to a stack. Their ids compete for the rows of its pool.

    For cached rows, see `grow`.

    Args:
      state: concrete and between steps; not consumed.
      tables: TableSpecs without vocabulary_size, whose names are new.
      features: {feature: table name} of the new stack; None if each table is its own feature.

    Returns:
      The new state. Its `spec` has all tables.

    Raises:
      TypeError: if state or tables have another type, or if state is traced.
      ValueError: if a name is taken, or a table has a size; if the old spec has features and
        `features` is missing. Also for a state that `grow` refuses.
    """
    _held("add_tables(state, tables)", state)
    more = (tables,) if isinstance(tables, TableSpec) else tuple(tables)
    if not more or not all(isinstance(table, TableSpec) for table in more):
        raise TypeError(f"add_tables: tables must be TableSpecs, got {tables!r}")
    old = state.spec
    if old.ngrams is not None:
        raise ValueError(
            "add_tables: the tables of this stack are those of its hash of n-grams; make another "
            "nn.NGramMemory"
        )
    if old.features is not None and features is None:
        raise ValueError(
            f"add_tables: this stack has features {dict(old.feature_tables)}; pass features= for "
            "all tables, old and new"
        )
    tables = (*old.tables, *more)
    return resizing.moved(state, dataclasses.replace(old, tables=tables, features=features))


@_on_one_device
def from_counts(state: EmbeddingState, ids: Any, counts: Any) -> EmbeddingState:
    """Counts ids as if they had occurred before, and gives rows to those that earn them.

    The ids are taken in order of descending count, so that the most used get rows. As in training,
    an id may take the row of an id that is used less. All other owners keep their rows. Of all
    this, `stats` counts the admissions.

    Args:
      state: concrete and between steps; not consumed. It may be new or trained.
      ids: nest of concrete pairs uint32 [.., 2] (see spec.raw_ids). Counts of equal ids are added.
      counts: nest like `ids`, of integer arrays [..]: the count of each id, at least 0.

    Returns:
      The new state.

    Raises:
      TypeError: if state has another type or is traced, if ids are not pairs, or if counts have a
        mask.
      ValueError: if counts are not integers of at least 0, or have another nesting or shape. Also
        for a state that `grow` refuses.
    """
    _held("from_counts(state, ids, counts)", state)
    leaves, treedef = admission.checked(ids)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for leaf, number in zip(leaves, treedef.flatten_up_to(counts), strict=True):
        row_ids.check_no_mask("from_counts: counts", number)
        array = np.asarray(number)
        if array.dtype.kind not in "iu" or array.shape != leaf.shape[:-1] or (array < 0).any():
            raise ValueError(
                "from_counts: counts must be integers of at least 0, one for each id "
                f"{list(leaf.shape[:-1])}, got {array.dtype} {list(array.shape)}"
                + (", some below 0" if array.dtype.kind == "i" and (array < 0).any() else "")
            )
        pairs = np.asarray(leaf).reshape(-1, 2)
        found.append((pairs, np.minimum(array.reshape(-1), pool.MAX_USE).astype(np.int64)))
    if not found:
        return state
    words = np.concatenate([pairs for pairs, _ in found])
    ids_of, index = np.unique(
        (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1], return_inverse=True
    )
    total = np.zeros(ids_of.size, np.int64)
    np.add.at(total, index.reshape(-1), np.concatenate([numbers for _, numbers in found]))
    order = np.argsort(-total, kind="stable")
    order = order[total[order] > 0]
    for begin in range(0, order.size, _BLOCK):
        part = order[begin : begin + _BLOCK]
        room = indexing.ceil_power(part.size)
        block = np.full((room, 2), 0xFFFFFFFF, np.uint32)
        block[: part.size, 0] = ids_of[part] >> np.uint64(32)
        block[: part.size, 1] = ids_of[part] & np.uint64(0xFFFFFFFF)
        times = np.zeros(room, np.int32)
        times[: part.size] = np.minimum(total[part], pool.MAX_USE)
        state = (_count if begin == 0 else _count_further)(state, block, times)
    return state


_count = jax.jit(admission.count)
_count_further = jax.jit(admission.count, donate_argnums=0)


@_on_one_device
def forget(state: EmbeddingState, ids: Any) -> EmbeddingState:
    """Deletes ids, and all that was learned in rows of their own.

    Their rows get initial values and fresh optimizer state, leave the cache, and have no owner.
    Their counters become zero, in the vocabulary and in the cache. Other ids that share a counter
    with them may therefore need more occurrences to get a row. All other rows stay as they are. A
    shared row keeps what it learned from an id that is deleted. If a deleted id occurs again, it is
    new.

    Donate the state; otherwise, the call copies the table. Call it between steps. If a prefetch
    waits for its update, no row changes: the call raises an error if `state.pending` is concrete,
    and counts as a refused update if it is traced.

    Args:
      state: consumed if donated.
      ids: nest of pairs uint32 [.., 2] (see spec.raw_ids). Padding changes no row. Nor does an
        unknown id, unless it is taken for the owner of a row: with a probability of at most W /
        2^24, see vocabulary.pool.

    Returns:
      The state.

    Raises:
      TypeError: if state has another type, if ids are not pairs, or if a state over a mesh is
        traced.
      ValueError: if a prefetch is known to wait for its update. Also for a state that `grow`
        refuses.
    """
    vocabulary, _ = _vocabulary("forget(state, ids)", state)
    leaves, _ = admission.checked(ids)
    pairs = row_ids.joined(leaves, (2,), jnp.uint32)
    if not pairs.shape[0]:
        return state
    sizes = vocabulary.sizes
    geometry = sizes.geometry
    is_pending = jnp.asarray(state.pending)
    tags, sets = pool.tags_of(pairs), pool.sets_of(pairs, sizes)
    is_id = (tags != jnp.uint32(pool.NO_OWNER)) & ~is_pending
    way = pool.ways_of(vocabulary, sets, tags)
    is_own = is_id & (way < geometry.ways)
    rows = jnp.sort(jnp.where(is_own, pool.row_of(sets, way, geometry), NO_ID))
    is_again = jnp.concatenate([jnp.zeros(1, bool), rows[1:] == rows[:-1]])
    rows = jnp.sort(jnp.where(is_again, NO_ID, rows))
    is_row = rows != NO_ID
    place = (rows % geometry.sets) * geometry.ways + rows // geometry.sets
    owners = indexing.put(
        vocabulary.owners.reshape(-1), jnp.where(is_row, place, geometry.lines), pool.EMPTY
    )
    cells = pool.cells(sizes, sets, pool.mixed(sets, tags, sizes))
    sketch = pool.cleared(vocabulary.sketch.reshape(-1), is_id, cells, sizes)
    cache = state.cache
    if cache is not None and cache.sketch is not None:
        counts = cache.sketch.reshape(-1)
        of_rows = residency.sketch_cells(cache, jnp.where(is_row, rows, 0))
        of_rows = jnp.where(is_row, of_rows, counts.size).reshape(-1)
        counts = indexing.minimum(counts, of_rows, jnp.zeros(of_rows.shape, counts.dtype))
        cache = dataclasses.replace(cache, sketch=counts.reshape(cache.sketch.shape))
    counters = count_updates(state.counters, jnp.int32(0), is_pending)
    state = dataclasses.replace(
        state,
        cache=cache,
        vocabulary=dataclasses.replace(
            vocabulary,
            owners=owners.reshape(vocabulary.owners.shape),
            sketch=sketch.reshape(vocabulary.sketch.shape),
        ),
        counters=count_change(counters, jnp.any(is_row)),
    )
    return admission.start_again(state, rows, jnp.sum(is_row, dtype=jnp.int32))


# --- arguments


def _vocabulary(call: str, state: EmbeddingState) -> tuple[Any, VocabularySpec]:
    """Checks a state, and returns its vocabulary and the spec of the vocabulary."""
    arguments.check_state(call, state)
    state.check_spec()
    if state.vocabulary is None or state.spec.vocabulary is None:
        raise ValueError(
            f"{call}: this state has no vocabulary, so its ids are row numbers; see restack for "
            "tables that grow, and write_rows for rows that are reset"
        )
    if not isinstance(state.pending, jax.core.Tracer) and bool(state.pending):
        raise ValueError(
            f"{call} was called between prefetch and apply_gradients; call it between steps"
        )
    return state.vocabulary, state.spec.vocabulary


def _held(call: str, state: EmbeddingState) -> tuple[Any, VocabularySpec]:
    """Does what `_vocabulary` does, for a state that must be concrete."""
    arguments.check_state(call, state)
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        raise TypeError(f"{call} moves arrays on the host and cannot be traced")
    return _vocabulary(call, state)


def _size(num_rows: Any) -> int:
    if isinstance(num_rows, bool) or not isinstance(num_rows, int | np.integer):
        raise ValueError(f"num_rows must be an integer, got {num_rows!r}")
    return int(num_rows)


def _resized(
    state: EmbeddingState, rules: VocabularySpec, vocabulary: Any, num_rows: int, ways: int
) -> EmbeddingSpec:
    """Returns the spec of `state` with a pool of another size."""
    new = dataclasses.replace(rules, num_rows=num_rows, ways=ways, first_sets=vocabulary.first_sets)
    return dataclasses.replace(state.spec, vocabulary=new)
