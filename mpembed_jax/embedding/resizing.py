"""Moves a state to a spec with another pool or more tables.

An owner that stays keeps the values of its row, its optimizer state and its use. It keeps its cache
line if there is a place for the line.

The sets of a pool are split and joined by linear hashing; see `vocabulary.pool`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import huge_pages, indexing
from mpembed_jax.cache import residency
from mpembed_jax.embedding.counters import count_change
from mpembed_jax.embedding.lines import Lines, write_back
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.table import init_table
from mpembed_jax.vocabulary import pool

_BLOCK = 65536  # rows moved at once


def moved(state: EmbeddingState, spec: EmbeddingSpec) -> EmbeddingState:
    """Returns a state of `spec` that holds the owners and the rows of `state`.

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
    rank = indexing.ranks(sets[order])
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
    lines = Lines(state.cache, cache)
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
    rows = table.rows
    states = []
    treedef: Any
    leaves, treedef = jax.tree.flatten(state.row_state)
    for leaf, first in zip(leaves, jax.tree.leaves(fresh), strict=True):
        shape = (spec.num_rows, *leaf.shape[1:])
        kind = spec.memory_kind if indexing.is_on_host(leaf) else None
        states.append(_filled(shape, first[0], kind) if leaf.ndim else jnp.copy(leaf))
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
        cache, homeless = lines.moved(source, to)
        table = write_back(table, state.cache.rows, homeless, state.key, state.step)
    same = {name: getattr(state, name) for name in ("key", "step", "clock", "pending")}
    result = dataclasses.replace(
        state,
        spec=spec,
        table=table,
        cache=cache,
        row_state=treedef.unflatten(states),
        fingerprint=jnp.asarray(spec.fingerprint),
        counters=count_change(state.counters),
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


_init_table = jax.jit(init_table, static_argnames="spec")
_filled = jax.jit(indexing.filled, static_argnums=(0, 2))


@partial(jax.jit, donate_argnums=0)
def _copy(array: jax.Array, source: jax.Array, index: jax.Array) -> jax.Array:
    """Copies rows index[1] of `source` to rows index[0] of `array`, which is consumed."""
    return indexing.put(array, index[0], indexing.take(source, index[1]))


@partial(jax.jit, static_argnames="sizes")
def _remembered(
    sketch: jax.Array, sets: jax.Array, tags: jax.Array, use: jax.Array, *, sizes: pool.Sizes
) -> jax.Array:
    cells = pool.cells(sizes, sets, pool.mixed(sets, tags, sizes))
    every = jnp.ones(sets.shape, bool)
    return pool.raised(sketch.reshape(-1), every, cells, use, sizes).reshape(sketch.shape)


def _sketch(sketch: np.ndarray, old: pool.Sizes, new: pool.Sizes) -> np.ndarray:
    """Returns a sketch of new sizes. No id has a lower count in it than in the old sketch.

    Ids that share a new counter may have had different counters in the old sketch. The new counter
    gets the largest count of these.
    """
    per, bits = old.counters_per_byte, old.counter_bits
    shifts = np.arange(per, dtype=np.uint8) * np.uint8(bits)
    counts = (sketch[..., None] >> shifts & np.uint8(old.max_count)).reshape(*sketch.shape[:2], -1)
    before, after = old.width * per, new.width * per
    # In a row of n counters, a hash h has the counter h * n div 2^32. Counter i of the new sketch
    # has the hashes from ends[i] to ends[i + 1] - 1.
    number = np.arange(after + 1, dtype=np.uint64)
    ends = (number * np.uint64(2**32) + np.uint64(after - 1)) // np.uint64(after)
    first = (ends[:-1] * np.uint64(before) >> np.uint64(32)).astype(np.int64)
    last = ((ends[1:] - np.uint64(1)) * np.uint64(before) >> np.uint64(32)).astype(np.int64)
    moved = counts[..., first]
    for ahead in range(1, int((last - first).max()) + 1):
        moved = np.maximum(moved, counts[..., np.minimum(first + ahead, last)])
    fields = moved.reshape(*sketch.shape[:2], new.width, per) << shifts
    return np.bitwise_or.reduce(fields, axis=-1).astype(np.uint8)


class _Ways:
    """The ways that are free in the owners' sets."""

    def __init__(self, sets: np.ndarray, geometry: Any):
        self.sets = sets
        self.free = np.ones((geometry.sets, geometry.ways), bool)

    def of(self, n: int) -> np.ndarray:
        """Returns which ways are free for the n-th owner, bool [W]."""
        return self.free[self.sets[n]]

    def take(self, n: int, way: int) -> None:
        """Gives a way to the n-th owner."""
        self.free[self.sets[n], way] = False


def _ways(sets: np.ndarray, old_rows: np.ndarray, geometry: Any, lines: Lines) -> np.ndarray:
    """Returns the way (int [n]) of each owner in its set.

    The way decides the number of the row, and the number decides the row's set in the cache. Owners
    of cached rows choose first: each takes a way whose set in the cache has room for the line. All
    other owners take the ways that are left, in the order of their old rows.
    """
    cached = np.flatnonzero(lines.have(old_rows))
    free = _Ways(sets[cached], geometry)
    choices = np.arange(geometry.ways)[None] * geometry.sets + sets[cached, None]
    taken = np.full(sets.size, -1)
    taken[cached] = lines.place(old_rows[cached], choices, free)
    rest = np.flatnonzero(taken < 0)
    rest = rest[np.lexsort((old_rows[rest], sets[rest]))]
    rank = indexing.ranks(sets[rest])
    by_way = np.argsort(~free.free, axis=1, kind="stable")
    taken[rest] = by_way[sets[rest], rank]
    return taken
