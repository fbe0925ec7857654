"""Residency: which id each line of the set-associative FP32 cache holds.

CacheState holds the rows, too, but this module never computes with a row. The policies are LRU and
LFU. With LFU, a newcomer takes an empty line, or the line of an id with a lower estimated use. A
count-min sketch, sized by the cache, estimates the use of ids without a line.

The structure follows FBGEMM's table-batched embedding cache (32-way sets, LRU and LFU). The order
inside a set, admission, halving and the conservative sketch update are this library's own rules.
`ops.xla.plan` states them.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import indexing
from mpembed_jax.cache.policy import counts_use
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.numerics import random_bits
from mpembed_jax.row_ids import NO_ID

# The sketch has two rows of two counters per line. When measured, this was as exact as four rows of
# one counter per line, at half the memory accesses.
SKETCH_SEEDS = (0x9E3779B9, 0x85EBCA6B)
ARRAYS = ("tags", "priority", "dirty", "rows", "sketch")  # the fields of CacheState that are arrays


@partial(
    jax.tree_util.register_dataclass,
    data_fields=ARRAYS,
    meta_fields=["policy", "groups"],
)
@dataclasses.dataclass(frozen=True)
class CacheState:
    """The cache of one stack. Each id is in at most one line, and only in a line of its own set."""

    tags: jax.Array  # i32 [S, W]: the id in each line; NO_ID if empty
    # i32 [S, W]. LRU: the step of last use. LFU: the estimated use, halved with the sketch.
    priority: jax.Array
    dirty: jax.Array  # bool [S, W]: whether the line is newer than the table
    rows: jax.Array  # f32 [C, D]: the row in each line
    sketch: Any  # u16 [2, G, 2 C // G]; None for LRU
    policy: str  # "lfu" or "lru"
    groups: int  # G; on a mesh, the groups of one shard

    @property
    def geometry(self) -> Geometry:
        """The sizes of the cache, taken from its arrays."""
        sets, ways = self.tags.shape
        return Geometry(sets, ways, self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def init(geometry: Geometry, policy: str, embedding_dim: int) -> CacheState:
    """Makes an empty cache.

    Args:
      geometry: its sizes.
      policy: "lfu" or "lru".
      embedding_dim: D, the float32 numbers in a line.
    """
    shape = (geometry.sets, geometry.ways)
    sketch = None
    if counts_use(policy):
        sketch = jnp.zeros(
            (len(SKETCH_SEEDS), geometry.groups, 2 * geometry.lines // geometry.groups), jnp.uint16
        )
    return CacheState(
        tags=jnp.full(shape, NO_ID, jnp.int32),
        priority=jnp.zeros(shape, jnp.int32),
        dirty=jnp.zeros(shape, bool),
        rows=jnp.zeros((geometry.lines, embedding_dim), jnp.float32),
        sketch=sketch,
        policy=policy,
        groups=geometry.groups,
    )


def set_of(ids: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the set (int32, shape of ids) of each id.

    The set is (id mod G) + G * h, where h is fmix32(id div G) scaled to [0, S / G).
    """
    ids = ids.astype(jnp.uint32)
    groups = jnp.uint32(geometry.groups)
    mixed = random_bits.scale_to(
        random_bits.fmix32(ids // groups), geometry.sets // geometry.groups
    )
    return (ids % groups).astype(jnp.int32) + geometry.groups * mixed


def locate(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the line (int32, shape of ids) that holds each id, or C if no line holds it.

    NO_ID gives C, because it is the tag of empty lines and not an id.
    """
    sets = set_of(ids, cache.geometry)
    is_here = indexing.take(cache.tags, sets) == ids[..., None]
    place = lax.broadcasted_iota(jnp.int32, is_here.shape, ids.ndim) + 1
    way = jnp.sum(
        jnp.where(is_here, place, 0),
        axis=-1,
        dtype=jnp.int32,
    )
    is_there = (way > 0) & (ids != NO_ID)
    return jnp.where(is_there, sets * cache.geometry.ways + way - 1, cache.geometry.lines)


def sketch_cells(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the cells (int32 [2, n]) of the flattened sketch that count each id (int32 [n])."""
    rows = jnp.arange(len(SKETCH_SEEDS), dtype=jnp.int32)[:, None]
    seeds = jnp.asarray(SKETCH_SEEDS, jnp.uint32)[:, None]
    return cells_in_row(cache.sketch.shape, ids[None], rows, seeds)


def cells_in_row(
    shape: tuple[int, int, int], ids: jax.Array, row: jax.Array | int, seed: jax.Array
) -> jax.Array:
    """Returns the cells (int32) of ids (int32) in one row of the flattened sketch.

    Args:
      shape: the shape of the sketch.
      ids: int32 [..].
      row: the row of the sketch, broadcast against ids.
      seed: uint32, the seed of that row.
    """
    _, groups, width = shape
    ids = ids.astype(jnp.uint32)
    quotient, group = ids // jnp.uint32(groups), ids % jnp.uint32(groups)
    column = random_bits.scale_to(random_bits.fmix32(quotient ^ seed), width)
    return (row * groups + group.astype(jnp.int32)) * width + column


def commit(cache: CacheState, line: jax.Array) -> CacheState:
    """Marks the given lines (int32 [n]; C for no line) as newer than the table."""
    dirty = indexing.put(cache.dirty.reshape(-1), line, True)
    return dataclasses.replace(cache, dirty=dirty.reshape(cache.dirty.shape))


def refilled(cache: CacheState, rows: jax.Array | None, dirty: jax.Array | None) -> CacheState:
    """Returns the cache with its lines (float32 [C, D]) and dirty bits (bool [C]) replaced."""
    assert rows is not None and dirty is not None
    return dataclasses.replace(cache, rows=rows, dirty=dirty.reshape(cache.dirty.shape))
