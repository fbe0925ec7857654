"""One shard of a stack: the rows of each table that it holds, and their global ids.

All arrays of a shard are indexed by local rows. Only random bits depend on the global id
(invariant 3: position independence). `RowKey` draws them.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mpembed_jax.numerics import random_bits
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import offsets

if TYPE_CHECKING:
    from mpembed_jax.mesh.layout import Layout


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a layout, with the conversions between its local rows and global ids."""

    layout: "Layout"
    index: jax.Array  # i32 []
    first_rows: jax.Array  # i32 [T + 1]: the first local row of each table

    @property
    def num_rows(self) -> int:
        """Number of rows of the shard's arrays, padding included."""
        return self.layout.num_rows

    def table_of(self, rows: jax.Array) -> jax.Array:
        """Returns the table (int32 [..]) of each local row (int32 [..]); T for padding."""
        first_rows = self.first_rows[1:].reshape(*[1] * rows.ndim, -1)
        return jnp.sum((rows[..., None] >= first_rows).astype(jnp.int32), axis=-1)

    def rows_of(self, ids: jax.Array) -> jax.Array:
        """Returns the local row (int32 [..]) of each global id, NO_ID for ids of other shards.

        The ids are int32 [..], or pairs [.., 2].
        """
        shard, row = self.layout.home_of(ids)
        return jnp.where(shard == self.index, row, NO_ID)

    def ids_of(self, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the low and high words (uint32 [..] each) of the global ids of local rows [..].

        A global id has 64 bits. If the second result is None, all high words are zero.
        """
        rows = rows.astype(jnp.uint32)
        if self.layout.table_shards is not None:
            table = jnp.minimum(
                self.table_of(rows.astype(jnp.int32)), len(self.layout.spec.tables) - 1
            )
            starts = jnp.asarray(offsets(self.layout.spec.tables)[:-1], jnp.uint32)
            return rows - self.first_rows[table].astype(jnp.uint32) + starts[table], None
        shards, index = jnp.uint32(self.layout.shards), self.index.astype(jnp.uint32)
        low = rows * shards + index
        if self.layout.spec.num_rows <= 2**32:
            return low, None
        # The high word of rows * shards comes from 16-bit halves. No product of a half overflows,
        # because there are fewer than 2^16 shards.
        upper = (rows >> 16) * shards + (((rows & jnp.uint32(0xFFFF)) * shards) >> 16)
        return low, (upper >> 16) + (low < index).astype(jnp.uint32)

    def key(self, words: jax.Array) -> "RowKey":
        """Returns the key with which local rows draw the bits of their global ids.

        `words` is uint32 [2].
        """
        return RowKey(words, self)


@dataclasses.dataclass(frozen=True)
class RowKey:
    """A key bound to a shard. `random_bits.row_seeds` takes it in the place of a key."""

    words: jax.Array  # u32 [2]
    shard: Shard

    def row_seeds(self, stream: int, step: jax.Array, rows: jax.Array) -> random_bits.RowSeeds:
        """Returns the sequences of random bits of local rows (int32 [..]).

        They are those of the rows' 64-bit global ids. For the other arguments, see
        random_bits.row_bits.
        """
        seed = random_bits.draw_seed(self.words, stream, step)
        low, high = self.shard.ids_of(rows)
        if high is None:
            return random_bits.seeds_at(seed, low)
        # fmix32 maps 0 to 0, so ids below 2^32 draw the same bits as in a smaller stack.
        mixed = random_bits.fmix32(high), random_bits.fmix32(high * jnp.uint32(0x9E3779B9))
        return random_bits.seeds_at((seed[0] ^ mixed[0], seed[1] + mixed[1]), low)
