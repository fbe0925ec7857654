"""Set-associative bookkeeping of the FP32 cache: which id sits in which line, who enters, who must leave.

Integers only; no row is ever touched here. Policies are LRU and LFU with admission, the latter estimated by a count-min
sketch sized by the cache. The structure follows FBGEMM's table-batched embedding cache (32-way sets, LRU / LFU); the exact
rules (order inside a set, admission, halving, conservative sketch update) are ours and are stated at `make_plan`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import access, numerics
from mpembed_jax.table import NO_ID

MAX_WAYS = 64
MAX_AGE = 2**25 - 1  # LRU ages saturate here, so that (age, way) fits 32 bits
MAX_ESTIMATE = 2**16 - 1
PINNED = 2**24  # an LFU priority no estimate reaches: the line belongs to this batch
# Two rows of two counters per line: as exact, measured, as four rows of one (NUMERICS.md's), at half the memory accesses.
SKETCH_SEEDS = (0x9E3779B9, 0x85EBCA6B)


class Geometry(NamedTuple):
    """Decided sizes of a cache; `groups` is G: ids congruent modulo G share their sets, so MOD sharding keeps sets whole."""

    sets: int
    ways: int
    groups: int

    @property
    def lines(self) -> int:
        """Number of lines C."""
        return self.sets * self.ways

    def election_buckets(self, width: int) -> int:
        """Returns how many buckets sets share in the elections of a batch of `width` unique ids: no more than it can use."""
        return min(self.sets, 1 << max(4, (2 * width - 1).bit_length()))


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """How large the FP32 cache is and who may stay in it.

    Attributes:
      fraction: lines as a fraction of the stack's rows, in (0, 1]; ignored where num_rows is given.
      num_rows: lines asked for, instead of a fraction.
      ways: lines per set, 1 to 64.
      policy: "lfu" (a newcomer must be used more than the line it takes) or "lru".

    Raises:
      ValueError: on a value outside these ranges.
    """

    fraction: float = 0.05
    num_rows: int | None = None
    ways: int = 32
    policy: str = "lfu"

    def __post_init__(self) -> None:
        if self.num_rows is None and not 0 < self.fraction <= 1:
            raise ValueError(f"cache fraction must be in (0, 1], got {self.fraction}; use cache=None for no cache")
        for name, value in (("num_rows", self.num_rows), ("ways", self.ways)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
                raise ValueError(f"cache {name} must be an integer, got {value!r}")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"cache num_rows must be at least 1, got {self.num_rows}; use cache=None for no cache")
        if not 1 <= self.ways <= MAX_WAYS:
            raise ValueError(f"cache ways must be in [1, {MAX_WAYS}], got {self.ways}")
        if self.policy not in ("lru", "lfu"):
            raise ValueError(f'cache policy must be "lru" or "lfu", got {self.policy!r}')

    def geometry(self, num_table_rows: int) -> Geometry:
        """Returns the geometry for a stack of `num_table_rows` rows; lines are rounded down to whole sets."""
        # The factor keeps 0.57 * 100 from being 56.99999: a fraction means the decimal number that was written.
        lines = max(1, self.num_rows or int(self.fraction * num_table_rows * (1 + 1e-12)))
        ways = min(self.ways, lines)
        sets = lines // ways
        groups = 64
        while groups > 1 and sets // groups < 8:
            groups //= 2
        return Geometry(sets - sets % groups, ways, groups)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tags", "priority", "dirty", "rows", "sketch"],
    meta_fields=["policy", "groups"],
)
@dataclasses.dataclass(frozen=True)
class CacheState:
    """The cache of one stack. Each id is in at most one line, and only in a line of its own set."""

    tags: jax.Array  # i32 [S, W]  id held, NO_ID if empty
    priority: jax.Array  # i32 [S, W]  lru: step of last use; lfu: estimated use, halved with the sketch
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["unique_ids", "inverse", "line", "is_hit", "victim_ids", "counts", "step", "route"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class CachePlan:
    """One step's decisions; it lives until the next prefetch.

    Unique ids stand in the order hits, newcomers, bypassed rows, padding; the last entry is always padding with a zero
    row. `ids == unique_ids[inverse]`, except that padding, out-of-range and over-budget positions hold U - 1.

    On a mesh, unique_ids and inverse are those of this device's ids, in order of first occurrence; line, is_hit and
    victim_ids are about the rows of this device's shard that any device asks for, `route.rows`; counts are of all devices.
    """

    unique_ids: jax.Array  # i32 [U]
    inverse: Any  # nest of i32 [..], like the ids
    line: jax.Array  # i32 [U]  where the row is during this step; C = bypass or padding
    is_hit: jax.Array  # bool [U]
    victim_ids: jax.Array  # i32 [U]  id displaced from `line`, NO_ID if none
    counts: "Counts"
    step: jax.Array  # i32 []  which prefetch made it
    route: Any = None  # exchange.Route on a mesh

    @property
    def placed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows that `line` is about (int32, local on a shard), how many of them sit in lines, how many are real."""
        if self.route is None:
            return self.unique_ids, self.counts.num_cached, self.counts.unique
        return self.route.rows, self.route.num_cached[0], self.route.num_rows[0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "requests",
        "unique",
        "hits",
        "hit_requests",
        "misses",
        "bypasses",
        "evictions",
        "write_backs",
        "out_of_range",
        "dropped",
        "wide_exchanges",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Counts:
    """One step's counts, i32 scalars on the device, so that logging works inside jit and scan."""

    requests: jax.Array  # id positions that name a row of the table
    unique: jax.Array  # distinct ids among them, after the budget
    hits: jax.Array  # unique ids found in the cache
    hit_requests: jax.Array  # positions whose id was found in the cache
    misses: jax.Array  # unique - hits
    bypasses: jax.Array  # misses that found no way, trained in the table
    evictions: jax.Array  # residents displaced
    write_backs: jax.Array  # of these, dirty ones, quantized and written
    out_of_range: jax.Array  # positions outside the table
    dropped: jax.Array  # unique ids over the budget; on a mesh, one that several devices drop counts for each
    wide_exchanges: jax.Array  # 1 if ids exceeded the exchange's room and travelled in full-width arrays; 0 on one device

    @property
    def num_cached(self) -> jax.Array:
        """Unique ids that sit in a line during this step; they come first in the plan."""
        return self.unique - self.bypasses


def init(geometry: Geometry, policy: str, embedding_dim: int) -> CacheState:
    """Makes an empty cache."""
    shape = (geometry.sets, geometry.ways)
    sketch = None
    if policy == "lfu":
        sketch = jnp.zeros((len(SKETCH_SEEDS), geometry.groups, 2 * geometry.lines // geometry.groups), jnp.uint16)
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
    mixed = numerics.scale_to(numerics.fmix32(ids // groups), geometry.sets // geometry.groups)
    return (ids % groups).astype(jnp.int32) + geometry.groups * mixed


def locate(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the line (int32, shape of ids) that holds each id, C where none does; NO_ID is nowhere."""
    sets = set_of(ids, cache.geometry)
    place = jnp.arange(1, cache.geometry.ways + 1, dtype=jnp.int32)
    way = jnp.sum(jnp.where(access.take(cache.tags, sets) == ids[..., None], place, 0), axis=-1, dtype=jnp.int32)
    is_there = (way > 0) & (ids != NO_ID)
    return jnp.where(is_there, sets * cache.geometry.ways + way - 1, cache.geometry.lines)


def sketch_cells(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the flat sketch cells (int32 [2, n]) that count each id."""
    depth, groups, width = cache.sketch.shape
    ids = ids.astype(jnp.uint32)
    quotient, group = ids // jnp.uint32(groups), ids % jnp.uint32(groups)
    seeds = jnp.asarray(SKETCH_SEEDS, jnp.uint32)[:, None]
    column = numerics.scale_to(numerics.fmix32(quotient ^ seeds), width)
    depth_index = jnp.arange(depth, dtype=jnp.int32)[:, None]
    return (depth_index * groups + group.astype(jnp.int32)) * width + column


def commit(cache: CacheState, line: jax.Array) -> CacheState:
    """Marks the given lines (int32 [n], C = none) as newer than the table."""
    dirty = access.put(cache.dirty.reshape(-1), line, True)
    return dataclasses.replace(cache, dirty=dirty.reshape(cache.dirty.shape))
