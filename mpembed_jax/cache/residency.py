"""Set-associative bookkeeping of the FP32 cache: which id sits in which line, who enters, who must leave.

Integers only; no row is ever touched here. Policies are LRU and LFU with admission, the latter estimated by a count-min
sketch sized by the cache. The structure follows FBGEMM's table-batched embedding cache (32-way sets, LRU / LFU); the exact
rules (order inside a set, admission, halving, conservative sketch update) are ours; `ops.xla.plan` states them.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import indexing
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.numerics import random_bits
from mpembed_jax.row_ids import NO_ID

# Two rows of two counters per line: as exact when measured as four rows of one, at half the memory accesses.
SKETCH_SEEDS = (0x9E3779B9, 0x85EBCA6B)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tags", "priority", "dirty", "rows", "sketch"],
    meta_fields=["policy", "groups"],
)
@dataclasses.dataclass(frozen=True)
class CacheState:
    """The cache of one stack. Each id is in at most one line, and only in a line of its own set."""

    tags: jax.Array  # i32 [S, W]  id held, NO_ID if empty
    priority: (
        jax.Array
    )  # i32 [S, W]  lru: step of last use; lfu: estimated use, halved with the sketch
    dirty: jax.Array  # bool [S, W]  newer than the table
    rows: Any  # f32 [C, D]
    sketch: Any  # u16 [2, G, 2 C // G]  None for lru
    policy: str
    groups: int  # of one shard

    @property
    def geometry(self) -> Geometry:
        """Sizes, read off the arrays."""
        sets, ways = self.tags.shape
        return Geometry(sets, ways, self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def init(geometry: Geometry, policy: str, embedding_dim: int) -> CacheState:
    """Makes an empty cache."""
    shape = (geometry.sets, geometry.ways)
    sketch = None
    if policy == "lfu":
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
    """Returns the set (int32 [..]) of each id: (id mod G) + G * (fmix32(id div G) scaled to S / G)."""
    ids = ids.astype(jnp.uint32)
    groups = jnp.uint32(geometry.groups)
    mixed = random_bits.scale_to(
        random_bits.fmix32(ids // groups), geometry.sets // geometry.groups
    )
    return (ids % groups).astype(jnp.int32) + geometry.groups * mixed


def locate(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the line (int32, shape of ids) that holds each id, C where none does; NO_ID is nowhere."""
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
    """Returns the flat sketch cells (int32 [2, n]) that count each id."""
    depth, groups, width = cache.sketch.shape
    ids = ids.astype(jnp.uint32)
    quotient, group = ids // jnp.uint32(groups), ids % jnp.uint32(groups)
    seeds = jnp.asarray(SKETCH_SEEDS, jnp.uint32)[:, None]
    column = random_bits.scale_to(random_bits.fmix32(quotient[None] ^ seeds), width)
    depth_index = jnp.arange(depth, dtype=jnp.int32)[:, None]
    return (depth_index * groups + group.astype(jnp.int32)[None]) * width + column


def commit(cache: CacheState, line: jax.Array) -> CacheState:
    """Marks the given lines (int32 [n], C = none) as newer than the table."""
    dirty = indexing.put(cache.dirty.reshape(-1), line, True)
    return dataclasses.replace(cache, dirty=dirty.reshape(cache.dirty.shape))


def refilled(cache: CacheState, rows: jax.Array | None, dirty: jax.Array | None) -> CacheState:
    """Returns the cache with other lines (float32 [C, D]) and dirty bits (bool [C])."""
    assert rows is not None and dirty is not None
    return dataclasses.replace(cache, rows=rows, dirty=dirty.reshape(cache.dirty.shape))
