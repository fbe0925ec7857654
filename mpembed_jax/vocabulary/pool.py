"""The rows of raw ids: which id has which row of the pool, and which shared row the others have.

A pool of rows is a set-associative cache whose lines are the rows. A pair (see `hashes`) names an
id. Its place chooses the set; the high 24 bits of its tag tell it from the other ids of the set. A
row has one word: the tag of its owner, and the owner's use in 8 bits. Two ids with the same set and
tag are treated as one id. For two given ids, the probability of this is 2^-24 / S; for two ids of
one table it is 2^-24 (1/S + 2^-P), where P is `place_bits`: the bits that choose a set and differ
in a table. They are 22 bits of the place, and the low 8 bits of the tag, which pools of earlier
versions did not use. An id that owns no row is taken for the owner of a row with a probability of
at most W / 2^24: with 32 ways, one in 524,288.

A pool that has grown has more sets than its `first_sets`. The place chooses among the first sets.
The tag then chooses among the sets that this first set was split into, as in linear hashing
(Litwin, 1980). So the set and the tag of a row are enough to find the new set of its owner. If a
pool has k times its first sets, S in these formulas is the number of its first sets, and the last
probability is k times as large.

A way of a set has the row `way * S + set`. If a mesh divides rows by MOD, each set therefore lies
on one shard. The shared rows have the numbers after those of the pool.

The use is stored as a float of 8 bits, 4 of exponent and 4 of mantissa. The 8 bits are its code. A
code of at most 31 equals its value. A use is rounded stochastically. A counter of the sketch has 2,
4 or 8 bits. It does not overflow: it stays at its largest value.
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
from mpembed_jax.vocabulary.spec import OLD_PLACE_BITS, VocabularySpec

TAG_BITS = 24
USE_BITS = 8
NO_OWNER = 2**TAG_BITS - 1  # the tag of a row without an owner, and of padding
EMPTY = NO_OWNER << USE_BITS
PINNED = 2**USE_BITS - 1  # the use of a row of this batch, while newcomers look for rows
MANTISSA = 4  # bits of the mantissa of a use
MAX_USE = 30 << 14  # the value of PINNED - 1; no estimate is larger
SPLIT_SEED, NOISE_SEED = 0x6A09E667, 0xBB67AE85
ARRAYS = ("owners", "sketch")  # the arrays that a mesh divides
COUNTERS = ("requests", "shared_requests", "admissions", "recyclings", "refusals")


class Part(NamedTuple):
    """The part of a pool that one shard holds: the sets whose number is `shard` modulo `shards`.

    On a shard, sets and rows have local numbers, like the sets and rows of a cache there.
    """

    shards: int = 1
    shard: jax.Array | int = 0

    def numbers_of(self, local: jax.Array) -> jax.Array:
        """Returns the numbers (int32) that local sets, or local rows, have in the whole pool."""
        return local * self.shards + self.shard


WHOLE = Part()


class Sizes(NamedTuple):
    """The sizes of a pool and its sketch; static."""

    geometry: Geometry
    first_sets: int  # S when the pool was made
    counter_bits: int
    width: int  # bytes of one group in one of the two rows of the sketch
    place_bits: int

    @property
    def counters_per_byte(self) -> int:
        """Counters in a byte of the sketch."""
        return 8 // self.counter_bits

    @property
    def max_count(self) -> int:
        """The largest count of a counter."""
        return 2**self.counter_bits - 1

    @property
    def half_mask(self) -> int:
        """The mask that keeps the halves of a byte's counters, after a shift right by one bit."""
        return sum(
            (self.max_count >> 1) << (k * self.counter_bits) for k in range(self.counters_per_byte)
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["owners", "sketch", "counters", "fresh_row_state"],
    meta_fields=["groups", "first_sets", "counter_bits", "place_bits"],
)
@dataclasses.dataclass(frozen=True)
class VocabularyState:
    """The vocabulary of one stack. A row has 4 bytes: its owner's tag and estimated use."""

    # u32 [S, W]: tag << 8 | use; EMPTY without an owner. Uses are halved whenever the sketch is.
    owners: jax.Array
    sketch: jax.Array  # u8 [2, G, width]: counts the occurrences of ids without a row
    counters: jax.Array  # u32 [len(COUNTERS), 2]: low and high words of 64-bit counts
    # The optimizer state of a row before its first update, [1, ..]. A row with a new owner gets it.
    fresh_row_state: Any
    groups: int  # G
    first_sets: int
    counter_bits: int
    place_bits: int = OLD_PLACE_BITS  # so that pickles of earlier versions have it

    @property
    def geometry(self) -> Geometry:
        """The sizes of the pool, taken from its arrays."""
        sets, ways = self.owners.shape
        return Geometry(sets, ways, self.groups)

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pool and its sketch."""
        width = self.sketch.shape[-1]
        return Sizes(self.geometry, self.first_sets, self.counter_bits, width, self.place_bits)

    @property
    def tags(self) -> jax.Array:
        """The tag of each row's owner (uint32 [S, W]); NO_OWNER if it has none."""
        return self.owners >> USE_BITS

    @property
    def use(self) -> jax.Array:
        """The estimated use of each row's owner (int32 [S, W])."""
        return use_of(self.owners)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


def init(spec: VocabularySpec, fresh_row_state: Any, shards: int = 1) -> VocabularyState:
    """Makes a vocabulary without ids, or one shard's part of it.

    Args:
      spec: the sizes of the whole vocabulary.
      fresh_row_state: as row_state.init_rows makes it for one row.
      shards: number of shards; the number of groups must be a multiple of it.
    """
    sets, ways, groups = spec.geometry
    geometry = Geometry(sets // shards, ways, groups // shards)
    return VocabularyState(
        owners=jnp.full((geometry.sets, geometry.ways), EMPTY, jnp.uint32),
        sketch=jnp.zeros((2, geometry.groups, spec.sketch_width), jnp.uint8),
        counters=jnp.zeros((len(COUNTERS), 2), jnp.uint32),
        fresh_row_state=fresh_row_state,
        groups=geometry.groups,
        first_sets=(spec.first_sets or sets) // shards,
        counter_bits=spec.counter_bits,
        place_bits=spec.place_bits,
    )


# --- where an id belongs


def tags_of(pairs: jax.Array) -> jax.Array:
    """Returns the tags (uint32 [..], below 2^24) of pairs (uint32 [.., 2]); padding: NO_OWNER."""
    tags = jnp.minimum(pairs[..., 0] >> (32 - TAG_BITS), jnp.uint32(NO_OWNER - 1))
    return jnp.where(pairs[..., 0] == jnp.uint32(hashes.PADDING), jnp.uint32(NO_OWNER), tags)


def sets_of(pairs: jax.Array, sizes: Sizes, shards: int = 1) -> jax.Array:
    """Returns the sets (int32 [..]) of ids on their shard, from their pairs (uint32 [.., 2])."""
    place = _mixed_places(pairs, sizes.place_bits) // jnp.uint32(shards)
    first = residency.set_of(place, sizes.geometry._replace(sets=sizes.first_sets))
    return split(first, tags_of(pairs), sizes)


def shard_of(pairs: jax.Array, place_bits: int, shards: int) -> jax.Array:
    """Returns the shards (int32 [..]) that hold the sets of ids (pairs uint32 [.., 2])."""
    return (_mixed_places(pairs, place_bits) % jnp.uint32(shards)).astype(jnp.int32)


def _mixed_places(pairs: jax.Array, place_bits: int) -> jax.Array:
    return random_bits.fmix32(pairs[..., 1] ^ pairs[..., 0] & jnp.uint32(tag_mask(place_bits)))


def tag_mask(place_bits: int) -> int:
    """Returns the mask of the bits of a tag that help to choose the set."""
    return (1 << place_bits - OLD_PLACE_BITS) - 1


def split(first: jax.Array, tags: jax.Array, sizes: Sizes) -> jax.Array:
    """Returns the set (int32) of each id, from its first set (int32) and its tag.

    A first set was split into n sets, numbered from 0. Let h be the hash of an id's tag. Let 2^k be
    the smallest power of two that is at least n. The id is in set h modulo 2^k if that is below n,
    else in set h modulo 2^(k - 1).
    """
    whole, more = divmod(sizes.geometry.sets, sizes.first_sets)
    if (whole, more) == (1, 0):
        return first
    mixed = random_bits.fmix32(tags ^ jnp.uint32(SPLIT_SEED))

    def number(n: int) -> jax.Array:
        mask = indexing.ceil_power(n) - 1
        own = (mixed & jnp.uint32(mask)).astype(jnp.int32)
        return jnp.where(own < n, own, own & (mask >> 1))

    own = jnp.where(first < more, number(whole + 1), number(whole))
    return first + sizes.first_sets * own


def row_of(sets: jax.Array, ways: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the row (int32) of each way of a set."""
    return ways * geometry.sets + sets


def tables_of(pairs: jax.Array, group: jax.Array) -> jax.Array:
    """Returns the tables (int32 [n]) of ids, from their positions' pairs.

    Args:
      pairs: uint32 [n, 2].
      group: int32 [n], the number of each position's id. If two tables' ids are treated as one id,
        its table is the first of them.
    """
    table = _table_of(pairs[:, 1])
    return indexing.minimum(jnp.full(table.shape, hashes.MAX_TABLES, jnp.int32), group, table)


def _table_of(places: jax.Array) -> jax.Array:
    return (places & jnp.uint32(hashes.NUMBER)).astype(jnp.int32)


def shared_rows(pairs: jax.Array, geometry: Geometry, per_table: int) -> jax.Array:
    """Returns the shared rows (int32 [..]) of ids, from their pairs (uint32 [.., 2])."""
    tags, places = pairs[..., 0], pairs[..., 1]
    table = _table_of(places)
    own = random_bits.scale_to(random_bits.fmix32(tags), per_table)
    return geometry.lines + table * per_table + own


def ways_of(vocabulary: VocabularyState, sets: jax.Array, tags: jax.Array) -> jax.Array:
    """Returns the ways (int32 [n]) that ids have in their sets; W for an id without a row."""
    ways = vocabulary.geometry.ways
    is_own = indexing.take(vocabulary.owners, sets) >> USE_BITS == tags[:, None]
    place = lax.broadcasted_iota(jnp.int32, is_own.shape, 1) + 1
    way = jnp.sum(jnp.where(is_own, place, 0), axis=1, dtype=jnp.int32)
    return jnp.where((way > 0) & (tags != jnp.uint32(NO_OWNER)), way - 1, ways)


def locate(vocabulary: VocabularyState, pairs: jax.Array, per_table: int) -> jax.Array:
    """Returns the row of each id: its own, or the one it shares.

    Args:
      vocabulary: not changed.
      pairs: uint32 [n, 2].
      per_table: shared rows per table.

    Returns:
      int32 [n]; NO_ID for padding.
    """
    sizes = vocabulary.sizes
    sets = sets_of(pairs, sizes)
    way = ways_of(vocabulary, sets, tags_of(pairs))
    return rows_or_shared(pairs, sets, way, sizes.geometry, per_table)


def rows_or_shared(
    pairs: jax.Array, sets: jax.Array, ways: jax.Array, geometry: Geometry, per_table: int
) -> jax.Array:
    """Returns the row (int32 [n]) of each id, from its set and way. Way W means a shared row."""
    shared = shared_rows(pairs, geometry, per_table)
    rows = jnp.where(ways < geometry.ways, row_of(sets, ways, geometry), shared)
    return jnp.where(pairs[:, 0] == jnp.uint32(hashes.PADDING), NO_ID, rows)


# --- use


def use_of(owners: jax.Array) -> jax.Array:
    """Returns the uses (int32) in owners (uint32). The code PINNED has the largest value."""
    code = (owners & jnp.uint32(PINNED)).astype(jnp.int32)
    exponent = jnp.maximum((code >> MANTISSA) - 1, 0)
    is_small = code < 2 << MANTISSA
    return jnp.where(is_small, code, ((1 << MANTISSA) + (code & (1 << MANTISSA) - 1)) << exponent)


def owners_of(tags: jax.Array, estimates: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns owners (uint32), made of tags and of estimates as their uses.

    Args:
      tags: uint32 [n].
      estimates: int32 [n] in [0, MAX_USE]. They are rounded up or down by noise.
      noise: uint32 [n] random bits.
    """
    num_bits = 32 - lax.clz(estimates)
    shift = jnp.maximum(num_bits - (MANTISSA + 1), 0)
    whole = estimates >> shift
    rest = estimates - (whole << shift)
    drawn = (noise & ((jnp.uint32(1) << shift.astype(jnp.uint32)) - 1)).astype(jnp.int32)
    code = (shift << MANTISSA) + whole + (drawn < rest).astype(jnp.int32)
    return (tags << USE_BITS) | code.astype(jnp.uint32)


def halved(owners: jax.Array) -> jax.Array:
    """Returns owners (uint32) with half their uses."""
    code = owners & jnp.uint32(PINNED)
    half = jnp.where(code < 2 << MANTISSA, code >> 1, code - (1 << MANTISSA))
    return (owners - code) | half


def halved_counts(sketch: jax.Array, sizes: Sizes) -> jax.Array:
    """Returns a sketch (uint8), whose bytes hold one or more counters, with half their counts."""
    return (sketch >> 1) & jnp.uint8(sizes.half_mask)


def mixed(sets: jax.Array, tags: jax.Array, sizes: Sizes, part: Part = WHOLE) -> jax.Array:
    """Returns the hash (uint32 [n]) of ids' sets and tags. A split does not change it."""
    first = part.numbers_of(sets % sizes.first_sets).astype(jnp.uint32)
    return random_bits.fmix32(tags ^ random_bits.fmix32(first))


def noise_of(mixed: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the random bits (uint32 [n]) that round the uses of ids in a step (uint32 [])."""
    return random_bits.fmix32(mixed ^ random_bits.fmix32(step ^ jnp.uint32(NOISE_SEED)))


# --- the sketch


class Cells(NamedTuple):
    """The counters of ids, one in each row of the sketch."""

    byte: jax.Array  # i32 [2, n]: index into the flattened sketch
    shift: jax.Array  # u32 [2, n]: the first bit of the counter in its byte


def cells(sizes: Sizes, sets: jax.Array, mixed: jax.Array) -> Cells:
    """Returns the counters of ids, from their sets (int32 [n]) and hashes (uint32 [n])."""
    groups, width, per = sizes.geometry.groups, sizes.width, sizes.counters_per_byte
    seeds = jnp.asarray(residency.SKETCH_SEEDS, jnp.uint32)[:, None]
    column = random_bits.scale_to(random_bits.fmix32(mixed[None] ^ seeds), width * per)
    depth = jnp.arange(len(residency.SKETCH_SEEDS), dtype=jnp.int32)[:, None]
    row = depth * groups + (sets % groups)[None]
    shift = (column % per).astype(jnp.uint32) * jnp.uint32(sizes.counter_bits)
    return Cells(row * width + column // per, shift)


def counts_of(sketch: jax.Array, cells: Cells, sizes: Sizes) -> jax.Array:
    """Returns the count (int32 [n]) of each id: the smaller of its two counters.

    Args:
      sketch: uint8, flattened.
      cells: the counters of the ids.
      sizes: the sizes of the pool and the sketch.
    """
    bytes_ = indexing.take(sketch, cells.byte).astype(jnp.uint32)
    counts = (bytes_ >> cells.shift) & jnp.uint32(sizes.max_count)
    return jnp.min(counts.astype(jnp.int32), axis=0)


def raised(
    sketch: jax.Array, is_raised: jax.Array, cells: Cells, counts: jax.Array, sizes: Sizes
) -> jax.Array:
    """Raises the counters of ids to at least the ids' counts, and returns the sketch.

    Args:
      sketch: uint8, flattened.
      is_raised: bool [n]: the ids whose counters are raised.
      cells: the counters of the ids.
      counts: int32 [n]. A count above `max_count` is taken as `max_count`.
      sizes: the sizes of the pool and the sketch.
    """
    counts = jnp.minimum(counts, sizes.max_count).astype(jnp.uint32)
    for k in range(sizes.counters_per_byte):
        # Each iteration writes one counter of a byte. All writers of a byte keep its other
        # counters, so the largest of their bytes has the largest count.
        shift = k * sizes.counter_bits
        is_here = is_raised & (cells.shift == shift)
        byte = jnp.where(is_here, cells.byte, sketch.size)
        others = indexing.take(sketch, byte) & jnp.uint8(255 - (sizes.max_count << shift))
        values = others | jnp.broadcast_to(counts << shift, byte.shape).astype(jnp.uint8)
        sketch = indexing.maximum(sketch, byte.reshape(-1), values.reshape(-1))
    return sketch


def cleared(sketch: jax.Array, is_cleared: jax.Array, cells: Cells, sizes: Sizes) -> jax.Array:
    """Sets the counters of ids to zero, and returns the sketch (uint8, flattened); see `raised`."""
    for k in range(sizes.counters_per_byte):
        shift = k * sizes.counter_bits
        is_here = is_cleared & (cells.shift == shift)
        byte = jnp.where(is_here, cells.byte, sketch.size).reshape(-1)
        others = indexing.take(sketch, byte) & jnp.uint8(255 - (sizes.max_count << shift))
        sketch = indexing.minimum(sketch, byte, others)
    return sketch
