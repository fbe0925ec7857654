"""The rows of raw ids: which id has which row of the pool, and which shared row the others have.

A pool of rows is a set-associative cache whose lines are the rows. A pair (see `hashes`) names an
id. Its place chooses the set; its tag tells it from the other ids of the set. A row holds the tag
of its owner. Two given ids have the same tag and set with probability 2^-32 / S. They would then be
one id. An id that owns no row takes that of another by mistake with a probability of at most
W / 2^32.

Row `way * S + set` is that of a way of a set. All ids that are congruent modulo G therefore keep
their sets on one shard if a mesh divides rows by MOD. The shared rows follow the pool.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.numerics import random_bits
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes
from mpembed_jax.vocabulary.spec import VocabularySpec

MAX_USE = 2**16 - 2
PINNED = 2**16 - 1  # the use of a row of this batch, while newcomers look for rows
MAX_COUNT = 255  # of a counter of the sketch
ARRAYS = ("tags", "use", "sketch")  # what a mesh divides
COUNTERS = ("requests", "shared_requests", "admissions", "recyclings", "refusals")


class Part(NamedTuple):
    """The part of a pool that one shard holds: the sets that are `shard` modulo `shards`.

    Inside a shard, sets and rows have local numbers, as those of a cache have.
    """

    shards: int = 1
    shard: jax.Array | int = 0

    def numbers_of(self, sets: jax.Array) -> jax.Array:
        """Returns the numbers (int32) that local sets have in the whole pool."""
        return sets * self.shards + self.shard


WHOLE = Part()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tags", "use", "sketch", "counters", "fresh_row_state"],
    meta_fields=["groups"],
)
@dataclasses.dataclass(frozen=True)
class VocabularyState:
    """The vocabulary of one stack. A row has 6 bytes: its owner's tag and estimated use."""

    tags: jax.Array  # u32 [S, W]: the owner of each row; PADDING if it has none
    use: jax.Array  # u16 [S, W]: the owner's estimated use, halved with the sketch
    sketch: jax.Array  # u8 [2, G, width]: counts the ids without a row
    counters: jax.Array  # u32 [len(COUNTERS), 2]: low and high words of 64-bit counts
    # The optimizer state of one row without updates, [1, ..]: that of a row with a new owner.
    fresh_row_state: Any
    groups: int  # G

    @property
    def geometry(self) -> Geometry:
        """The sizes of the pool, taken from its arrays."""
        sets, ways = self.tags.shape
        return Geometry(sets, ways, self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def init(spec: VocabularySpec, fresh_row_state: Any, shards: int = 1) -> VocabularyState:
    """Makes a vocabulary without ids, or the part of one of several shards.

    Args:
      spec: its sizes.
      fresh_row_state: as row_state.init_rows makes it for one row.
      shards: divides the number of groups.
    """
    sets, ways, groups = spec.geometry
    geometry = Geometry(sets // shards, ways, groups // shards)
    shape = (geometry.sets, geometry.ways)
    return VocabularyState(
        tags=jnp.full(shape, hashes.PADDING, jnp.uint32),
        use=jnp.zeros(shape, jnp.uint16),
        sketch=jnp.zeros((2, geometry.groups, spec.sketch_width), jnp.uint8),
        counters=jnp.zeros((len(COUNTERS), 2), jnp.uint32),
        fresh_row_state=fresh_row_state,
        groups=geometry.groups,
    )


def sets_of(places: jax.Array, geometry: Geometry, shards: int = 1) -> jax.Array:
    """Returns the sets (int32) of ids on their shard, from the places of their pairs (uint32)."""
    return residency.set_of(random_bits.fmix32(places) // jnp.uint32(shards), geometry)


def shard_of(places: jax.Array, shards: int) -> jax.Array:
    """Returns the shards (int32) that hold the sets of ids, from their places (uint32)."""
    return (random_bits.fmix32(places) % jnp.uint32(shards)).astype(jnp.int32)


def row_of(sets: jax.Array, ways: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the rows (int32) of ways of sets."""
    return ways * geometry.sets + sets


def shared_rows(pairs: jax.Array, geometry: Geometry, per_table: int) -> jax.Array:
    """Returns the shared rows (int32 [..]) of ids, from their pairs (uint32 [.., 2])."""
    tags, places = pairs[..., 0], pairs[..., 1]
    table = (places & jnp.uint32(hashes.MAX_TABLES - 1)).astype(jnp.int32)
    own = random_bits.scale_to(random_bits.fmix32(tags), per_table)
    return geometry.lines + table * per_table + own


def ways_of(vocabulary: VocabularyState, sets: jax.Array, tags: jax.Array) -> jax.Array:
    """Returns the ways (int32 [n]) that ids have in their sets; W for an id without a row."""
    ways = vocabulary.tags.shape[1]
    is_own = indexing.take(vocabulary.tags, sets) == tags[:, None]
    place = lax.broadcasted_iota(jnp.int32, is_own.shape, 1) + 1
    way = jnp.sum(jnp.where(is_own, place, 0), axis=1, dtype=jnp.int32)
    return jnp.where((way > 0) & (tags != jnp.uint32(hashes.PADDING)), way - 1, ways)


def locate(vocabulary: VocabularyState, pairs: jax.Array, per_table: int) -> jax.Array:
    """Returns the row of each id: its own, or the one it shares.

    Args:
      vocabulary: not changed.
      pairs: uint32 [n, 2].
      per_table: shared rows per table.

    Returns:
      int32 [n]; NO_ID for padding.
    """
    geometry = vocabulary.geometry
    sets = sets_of(pairs[:, 1], geometry)
    way = ways_of(vocabulary, sets, pairs[:, 0])
    return rows_or_shared(pairs, sets, way, geometry, per_table)


def rows_or_shared(
    pairs: jax.Array, sets: jax.Array, ways: jax.Array, geometry: Geometry, per_table: int
) -> jax.Array:
    """Returns the rows (int32 [n]) of ids in ways of sets; W means a shared row."""
    shared = shared_rows(pairs, geometry, per_table)
    rows = jnp.where(ways < geometry.ways, row_of(sets, ways, geometry), shared)
    return jnp.where(pairs[:, 0] == jnp.uint32(hashes.PADDING), NO_ID, rows)


def cells(
    vocabulary: VocabularyState, sets: jax.Array, tags: jax.Array, part: Part = WHOLE
) -> jax.Array:
    """Returns the cells (int32 [2, n]) of the flattened sketch that count ids (sets and tags)."""
    depth, groups, width = vocabulary.sketch.shape
    numbers = part.numbers_of(sets).astype(jnp.uint32)
    mixed = random_bits.fmix32(tags ^ random_bits.fmix32(numbers))
    seeds = jnp.asarray(residency.SKETCH_SEEDS, jnp.uint32)[:, None]
    column = random_bits.scale_to(random_bits.fmix32(mixed[None] ^ seeds), width)
    row = jnp.arange(depth, dtype=jnp.int32)[:, None] * groups + (sets % groups)[None]
    return row * width + column
