"""Vocabularies of raw ids after launch: other pools, more tables, known counts, ids to forget.

All rows that stay keep their bits, their optimizer state and their cache lines. A pool is split and
joined by linear hashing (Litwin, 1980): `vocabulary.pool` says how an id finds its new set by what
its row holds. States are moved on one device, between steps; one over a mesh goes there and back.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import restacking, row_ids, sharding
from mpembed_jax.arrays import huge_pages, indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.embedding import admission, arguments
from mpembed_jax.embedding.counters import count_updates
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, TableSpec
from mpembed_jax.table import init_table
from mpembed_jax.vocabulary import pool
from mpembed_jax.vocabulary.spec import VocabularySpec

_BLOCK = 65536  # rows moved, or ids counted, at once


def _on_one_device(move: Callable) -> Callable:
    """Lets a function of a state on one device take one over a mesh, and give it back there."""

    @functools.wraps(move)
    def over_mesh(state: EmbeddingState, *args: Any, **options: Any) -> EmbeddingState:
        call = f"{move.__name__}(state, ..)"
        if not isinstance(state, EmbeddingState):
            return move(state, *args, **options)  # which says what it takes
        return sharding.on_one_device(call, state, lambda state: move(state, *args, **options))

    return over_mesh


@_on_one_device
def grow(state: EmbeddingState, num_rows: int) -> EmbeddingState:
    """Gives the pool more rows. Every owner keeps its row.

    The sets of the pool are split. Ids are spread evenly if the pool is doubled; between one
    doubling and the next, the sets that are not split yet have more ids for each row. The
    probability that an unknown id takes a stranger's row grows with the pool: see
    `vocabulary.pool`.

    A cached row keeps its line, unless the cache has no room left in any set that its row could
    have. Such a line is written back to the table (rounded, as by flush). The cache's counts of
    rows without a line start anew.

    Args:
      state: concrete and between steps; not consumed.
      num_rows: of the pool, more than it has. It is rounded down to whole sets.

    Returns:
      The new state. `state.spec` says its sizes: restore a checkpoint of it with that spec.

    Raises:
      TypeError: if state has another type, or is traced.
      ValueError: if the pool would not grow; if the state has no vocabulary, waits for its update,
        was donated, or was made for another spec.
    """
    vocabulary, rules = _held("grow(state, num_rows)", state)
    geometry = vocabulary.geometry
    num_rows = _size(num_rows)
    sets = num_rows // geometry.ways
    sets -= sets % geometry.groups
    if sets <= geometry.sets:
        least = (geometry.sets + geometry.groups) * geometry.ways
        raise ValueError(
            f"grow: the pool has {geometry.lines} rows, and {num_rows} would not be more in whole "
            f"sets; ask for {least} or more, or see shrink"
        )
    return _moved(state, _resized(state, rules, vocabulary, num_rows, geometry.ways))


@_on_one_device
def shrink(state: EmbeddingState, num_rows: int) -> EmbeddingState:
    """Takes rows from the pool. The least used owners of each set lose their rows.

    A pool that has grown first loses the sets that it got. A pool of as many sets as it was made
    with loses ways of its sets. The use of those who lose their rows goes to the sketch. For cached
    rows, see `grow`.

    Args:
      state: concrete and between steps; not consumed.
      num_rows: of the pool, fewer than it has. It is rounded down to whole sets.

    Returns:
      The new state. `state.spec` says its sizes: restore a checkpoint of it with that spec.

    Raises:
      TypeError: if state has another type, or is traced.
      ValueError: if the pool would not shrink, or would have no row in some set; if the state has
        no vocabulary, waits for its update, was donated, or was made for another spec.
    """
    vocabulary, rules = _held("shrink(state, num_rows)", state)
    geometry = vocabulary.geometry
    num_rows = _size(num_rows)
    first, ways = vocabulary.first_sets, geometry.ways
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
    return _moved(state, _resized(state, rules, vocabulary, num_rows, ways))


@_on_one_device
def add_tables(
    state: EmbeddingState,
    tables: TableSpec | Sequence[TableSpec],
    features: Mapping[str, str] | None = None,
) -> EmbeddingState:
    """Adds tables of raw ids to a stack. Their ids compete for the rows of its pool.

    Args:
      state: concrete and between steps; not consumed.
      tables: TableSpecs without vocabulary_size, whose names are new.
      features: {feature: table name} of the new stack; None if each table is its own feature.

    Returns:
      The new state. `state.spec` has the tables.

    Raises:
      TypeError: if state or tables have another type, or if state is traced.
      ValueError: if a name is taken, or a table has a size; if the old spec has features and
        `features` is missing; if the state has no vocabulary, waits for its update, was donated, or
        was made for another spec.
    """
    _held("add_tables(state, tables)", state)
    more = (tables,) if isinstance(tables, TableSpec) else tuple(tables)
    if not more or not all(isinstance(table, TableSpec) for table in more):
        raise TypeError(f"add_tables: tables must be TableSpecs, got {tables!r}")
    old = state.spec
    if old.features is not None and features is None:
        raise ValueError(
            f"add_tables: this stack has features {dict(old.feature_tables)}; pass features= with "
            "those of the new tables, too"
        )
    return _moved(state, dataclasses.replace(old, tables=(*old.tables, *more), features=features))


@_on_one_device
def from_counts(state: EmbeddingState, ids: Any, counts: Any) -> EmbeddingState:
    """Counts ids as if they had occurred before, and gives rows to those that earn them.

    The ids are taken in order of descending count, so that the most used have rows. The rules are
    those of training: an id may take the row of one that is used less. Nobody's row changes
    otherwise. Requests are not counted; admissions, recyclings and refusals are.

    Args:
      state: concrete and between steps; not consumed. It may be new or trained.
      ids: nest of pairs uint32 [.., 2] (see spec.raw_ids). Counts of equal ids are added.
      counts: integers of at least 0, in the nest of ids and their shapes [..].

    Returns:
      The new state.

    Raises:
      TypeError: if state has another type or is traced, or if ids are not pairs.
      ValueError: if counts are no such integers, or have another shape; if the state has no
        vocabulary, waits for its update, was donated, or was made for another spec.
    """
    _held("from_counts(state, ids, counts)", state)
    leaves, treedef = admission.checked(ids)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for leaf, number in zip(leaves, treedef.flatten_up_to(counts), strict=True):
        array = np.asarray(number)
        if array.dtype.kind not in "iu" or array.shape != leaf.shape[:-1] or (array < 0).any():
            raise ValueError(
                "from_counts: counts must be integers of at least 0, one for each id "
                f"{list(leaf.shape[:-1])}, got {array.dtype} {list(array.shape)}"
                + (" with negative ones" if array.dtype.kind == "i" and (array < 0).any() else "")
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
    """Deletes ids: nothing of them is kept in rows of their own.

    Their rows get initial values and fresh optimizer state, leave the cache, and have no owner.
    Their counters become zero, in the vocabulary and in the cache; ids that share a counter are
    then admitted later. All other rows stay as they are. What an id taught a row that it shared
    with others stays in that row. An id that occurs again is a new one.

    Donate the state; otherwise, the call copies the table. Call it between steps: a state whose
    prefetch waits for its update stays as it is, and the call is counted as a refused update. If
    this is known while tracing, it raises an error.

    Args:
      state: consumed if donated.
      ids: nest of pairs uint32 [.., 2] (see spec.raw_ids). Unknown ids and padding change no row.

    Returns:
      The state.

    Raises:
      TypeError: if state has another type, or ids are not pairs.
      ValueError: if a prefetch is known to wait for its update; if the state has no vocabulary, was
        donated, or was made for another spec.
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
    state = dataclasses.replace(
        state,
        cache=cache,
        vocabulary=dataclasses.replace(
            vocabulary,
            owners=owners.reshape(vocabulary.owners.shape),
            sketch=sketch.reshape(vocabulary.sketch.shape),
        ),
        counters=count_updates(state.counters, jnp.int32(0), is_pending),
    )
    return admission.start_again(state, rows, jnp.sum(is_row, dtype=jnp.int32))


# --- arguments


def _vocabulary(call: str, state: EmbeddingState) -> tuple[Any, VocabularySpec]:
    """Returns a state's vocabulary and its spec."""
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
    """Is _vocabulary, for a state that must be concrete."""
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
    """Returns the spec of a state with another pool."""
    new = dataclasses.replace(rules, num_rows=num_rows, ways=ways, first_sets=vocabulary.first_sets)
    return dataclasses.replace(state.spec, vocabulary=new)


# --- moving


def _moved(state: EmbeddingState, spec: EmbeddingSpec) -> EmbeddingState:
    """Returns a state of `spec`, whose pool and tables hold those of the old one.

    Owners that find no room in their new sets are left out, the least used first.
    """
    old, rules = state.vocabulary, spec.vocabulary
    assert old is not None and rules is not None
    fresh = jax.tree.map(jnp.copy, old.fresh_row_state)
    new = pool.init(rules, fresh)
    sizes, geometry = new.sizes, new.geometry
    owners = np.asarray(old.owners)
    home, way = np.nonzero(owners >> pool.USE_BITS != pool.NO_OWNER)
    owner = owners[home, way]
    tags = owner >> pool.USE_BITS
    sets = np.asarray(
        _split(jnp.asarray(home % old.first_sets, jnp.int32), jnp.asarray(tags), sizes=sizes)
    )
    use = np.asarray(pool.use_of(jnp.asarray(owner)))
    order = np.lexsort((tags, -use, sets))
    rank = np.arange(sets.size) - np.searchsorted(sets[order], sets[order])
    stays = np.zeros(sets.size, bool)
    stays[order] = rank < geometry.ways
    sketch = _sketch(np.asarray(old.sketch), old.sizes, sizes)
    if not stays.all():
        sketch = _remembered(
            jnp.asarray(sketch), jnp.asarray(sets[~stays]), tags[~stays], use[~stays], sizes=sizes
        )
    old_rows = (way * old.geometry.sets + home)[stays]
    sets, owner = sets[stays].astype(np.int64), owner[stays]
    num_shared = len(state.spec.tables) * rules.shared_rows
    shared = np.arange(num_shared)

    cache = None
    if spec.cache is not None:
        cache = residency.init(
            spec.cache.geometry(spec.num_rows), spec.cache.policy, spec.embedding_dim
        )
    lines = _Lines(state.cache, cache)
    sizes_of = [c and (c.geometry, c.policy) for c in (state.cache, cache)]
    is_same = (old.geometry, sizes_of[0]) == (geometry, sizes_of[1])
    if is_same:
        ways = way[stays]
    else:
        lines.place(old.geometry.lines + shared, (geometry.lines + shared)[:, None])
        ways = _ways(sets, old_rows, geometry, lines)
    words = np.full((geometry.sets, geometry.ways), pool.EMPTY, np.uint32)
    words[sets, ways] = owner
    to = np.concatenate([ways * geometry.sets + sets, geometry.lines + shared]).astype(np.int32)
    source = np.concatenate([old_rows, old.geometry.lines + shared]).astype(np.int32)

    table = _init_table(state.key, spec=spec)
    rows, states = table.rows, []
    treedef: Any
    leaves, treedef = jax.tree.flatten(state.row_state)
    for leaf, first in zip(leaves, jax.tree.leaves(fresh), strict=True):
        shape = (spec.num_rows, *leaf.shape[1:])
        states.append(jnp.broadcast_to(first[0], shape) if leaf.ndim else jnp.copy(leaf))
    for begin in range(0, to.size, _BLOCK):
        size = min(_BLOCK, indexing.ceil_power(to.size))
        index = np.full((2, size), NO_ID, np.int32)
        index[0, : to[begin : begin + size].size] = to[begin : begin + size]
        index[1, : to[begin : begin + size].size] = source[begin : begin + size]
        rows = _copy(rows, state.table.rows, index)
        states = [
            _copy(array, leaf, index) if leaf.ndim else array
            for array, leaf in zip(states, leaves, strict=True)
        ]
    table = dataclasses.replace(table, rows=rows)
    if is_same:
        cache = jax.tree.map(jnp.copy, state.cache)
    elif state.cache is not None:
        cache, homeless = lines.moved(dict(zip(source.tolist(), to.tolist(), strict=True)))
        table = restacking.write_back(table, state.cache.rows, homeless, state.key, state.step)
    same = {name: getattr(state, name) for name in ("key", "step", "clock", "counters", "pending")}
    result = dataclasses.replace(
        state,
        spec=spec,
        table=table,
        cache=cache,
        row_state=treedef.unflatten(states),
        fingerprint=jnp.asarray(spec.fingerprint),
        vocabulary=dataclasses.replace(
            new,
            owners=jnp.asarray(words),
            sketch=jnp.asarray(sketch),
            counters=jnp.copy(old.counters),
        ),
        **jax.tree.map(jnp.copy, same),
    )
    return huge_pages.place(result)


_split = jax.jit(pool.split, static_argnames="sizes")


@partial(jax.jit, static_argnames="spec")
def _init_table(key: jax.Array, *, spec: EmbeddingSpec) -> Any:
    return init_table(key, spec.row_tables, spec.storage, spec.embedding_dim)


@partial(jax.jit, donate_argnums=0)
def _copy(array: jax.Array, source: jax.Array, index: jax.Array) -> jax.Array:
    """Returns `array` with the rows index[0] of it set to the rows index[1] of source."""
    return indexing.put(array, index[0], indexing.take(source, index[1]))


@partial(jax.jit, static_argnames="sizes")
def _remembered(
    sketch: jax.Array, sets: jax.Array, tags: jax.Array, use: jax.Array, *, sizes: pool.Sizes
) -> jax.Array:
    cells = pool.cells(sizes, sets, pool.mixed(sets, tags, sizes))
    every = jnp.ones(sets.shape, bool)
    return pool.raised(sketch.reshape(-1), every, cells, use, sizes).reshape(sketch.shape)


def _sketch(sketch: np.ndarray, old: pool.Sizes, new: pool.Sizes) -> np.ndarray:
    """Returns a sketch of new sizes, in which no id has a lower count than in the old one.

    A counter of the new sketch is the largest of those in the old one that its ids may have.
    """
    per, bits = old.counters_per_byte, old.counter_bits
    shifts = np.arange(per, dtype=np.uint8) * np.uint8(bits)
    counts = (sketch[..., None] >> shifts & np.uint8(old.max_count)).reshape(*sketch.shape[:2], -1)
    before, after = old.width * per, new.width * per
    # A hash h has the counter h * width div 2^32: these are the least and the largest h of each.
    number = np.arange(after + 1, dtype=np.uint64)
    ends = (number * np.uint64(2**32) + np.uint64(after - 1)) // np.uint64(after)
    first = (ends[:-1] * np.uint64(before) >> np.uint64(32)).astype(np.int64)
    last = ((ends[1:] - np.uint64(1)) * np.uint64(before) >> np.uint64(32)).astype(np.int64)
    moved = counts[..., first]
    for ahead in range(1, int((last - first).max()) + 1):
        moved = np.maximum(moved, counts[..., np.minimum(first + ahead, last)])
    fields = moved.reshape(*sketch.shape[:2], new.width, per) << shifts
    return np.bitwise_or.reduce(fields, axis=-1).astype(np.uint8)


class _Lines:
    """The lines of an old cache, on their way into a new one."""

    def __init__(self, old: CacheState | None, new: CacheState | None):
        self.old, self.new = old, new
        self.line_of: dict[int, int] = {}  # old row -> old line
        self.use = np.zeros(0, np.int64)
        self.target: dict[int, int] = {}  # old row -> new line
        if old is None:
            return
        tags = np.asarray(old.tags).reshape(-1)
        held = np.flatnonzero(tags != NO_ID)
        self.line_of = dict(zip(tags[held].tolist(), held.tolist(), strict=True))
        self.use = np.asarray(old.priority).reshape(-1).astype(np.int64)
        if new is not None and new.policy == old.policy:
            self.room = np.full(new.geometry.sets, new.geometry.ways)

    def place(self, rows: np.ndarray, choices: np.ndarray, free: Any = None) -> np.ndarray:
        """Gives the lines of rows places in the new cache, in the order of use.

        Args:
          rows: int [n], old rows.
          choices: int [n, k]: the new rows that each of them may have.
          free: None, or a function of the index of a row that returns bool [k], which choices are
            still free; and one that takes a choice.

        Returns:
          int [n]: which choice a row has taken; -1 if it has no line, or no place for it.
        """
        taken = np.full(rows.size, -1)
        if self.new is None or not hasattr(self, "room"):
            return taken
        lines = np.asarray([self.line_of.get(row, -1) for row in rows.tolist()], np.int64)
        cached = np.flatnonzero(lines >= 0)
        cached = cached[np.argsort(-self.use[lines[cached]], kind="stable")]
        geometry = self.new.geometry
        for begin in range(0, cached.size, _BLOCK):
            part = cached[begin : begin + _BLOCK]
            sets = np.asarray(_cache_sets(jnp.asarray(choices[part], jnp.int32), geometry=geometry))
            for n, own in zip(part.tolist(), sets, strict=True):
                room = self.room[own]
                if free is not None:
                    room = np.where(free.of(n), room, 0)
                best = int(np.argmax(room))
                if room[best] <= 0:
                    continue
                taken[n] = best
                if free is not None:
                    free.take(n, best)
                way = geometry.ways - self.room[own[best]]
                self.room[own[best]] -= 1
                self.target[int(rows[n])] = int(own[best] * geometry.ways + way)
        return taken

    def moved(self, new_rows: dict[int, int]) -> tuple[CacheState | None, Any]:
        """Returns the new cache, and the new rows of dirty lines without a place (int32 [C]).

        Args:
          new_rows: {old row: new row} of the rows that stay.
        """
        old, new = self.old, self.new
        assert old is not None
        dirty = np.asarray(old.dirty).reshape(-1)
        homeless = np.full(dirty.size, NO_ID, np.int32)
        line = np.full(dirty.size, 0 if new is None else new.geometry.lines, np.int32)
        tags = np.full(dirty.size, NO_ID, np.int32)
        for row, at in self.line_of.items():
            if row not in new_rows:
                continue
            tags[at] = new_rows[row]
            if row in self.target:
                line[at] = self.target[row]
            elif dirty[at]:
                homeless[at] = new_rows[row]
        if new is None:
            return None, homeless
        held = line < new.geometry.lines
        shape = new.tags.shape

        def placed(values: np.ndarray, empty: Any) -> jax.Array:
            result = np.full(math.prod(shape), empty, values.dtype)
            result[line[held]] = values[held]
            return jnp.asarray(result.reshape(shape))

        cache = dataclasses.replace(
            new,
            tags=placed(tags, NO_ID),
            priority=placed(np.asarray(old.priority).reshape(-1), 0),
            dirty=placed(dirty, False),
            rows=restacking.put(new.rows, line, old.rows),
        )
        return cache, homeless


_cache_sets = jax.jit(residency.set_of, static_argnames="geometry")


class _Ways:
    """The free ways of the sets of owners."""

    def __init__(self, sets: np.ndarray, geometry: Any):
        self.sets = sets
        self.free = np.ones((geometry.sets, geometry.ways), bool)

    def of(self, n: int) -> np.ndarray:
        """Returns which ways are free for an owner, bool [W]."""
        return self.free[self.sets[n]]

    def take(self, n: int, way: int) -> None:
        """Gives a way to an owner."""
        self.free[self.sets[n], way] = False


def _ways(sets: np.ndarray, old_rows: np.ndarray, geometry: Any, lines: _Lines) -> np.ndarray:
    """Returns the way (int [n]) of each owner in its set.

    Cached rows choose first: a way whose row has a place in the cache. The others take the ways
    that are left, in the order of their old rows.
    """
    free = _Ways(sets, geometry)
    choices = np.arange(geometry.ways)[None] * geometry.sets + sets[:, None]
    taken = lines.place(old_rows, choices, free)
    rest = np.flatnonzero(taken < 0)
    rest = rest[np.lexsort((old_rows[rest], sets[rest]))]
    rank = np.arange(rest.size) - np.searchsorted(sets[rest], sets[rest])
    by_way = np.argsort(~free.free, axis=1, kind="stable")
    taken[rest] = by_way[sets[rest], rank]
    return taken
