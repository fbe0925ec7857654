"""Counter-based random bits for stochastic rounding and initial values.

The bits are a hash of (key, stream, step, global row id, column), built from Murmur3's 32-bit
finalizer. A draw therefore does not depend on batch order, cache line, shard or launch shape.
Everything is elementwise integer and float32 arithmetic, so the same functions can be traced inside
`jax.jit` and inside a kernel body.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The streams. Each purpose has its own, so the draws of two purposes are independent. Leaf i of the
# optimizer state uses stream ROW_STATE + i.
INITIAL_VALUE, INITIAL_ROUNDING, WRITE_BACK, BYPASS, FLUSH, ROW_STATE = 0, 1, 2, 3, 4, 5

_GOLDEN = 0x9E3779B9


def fmix32(x: Any) -> Any:
    """Mixes uint32 [..] by Murmur3's 32-bit finalizer, which is a bijection.

    The mixed values of a NumPy array are a NumPy array.
    """
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def scale_to(mixed: jax.Array, size: int) -> jax.Array:
    """Maps mixed uint32 to [0, size) as (mixed * size) div 2^32.

    The result is as uniform as a remainder, but needs no division and no 64-bit arithmetic.

    Args:
      mixed: uint32 [..], mixed by `fmix32`, because the result depends on the high bits most.
      size: 1 to 2^31.

    Returns:
      int32 [..].
    """
    high, low = mixed >> 16, mixed & jnp.uint32(0xFFFF)
    size_high, size_low = jnp.uint32(size >> 16), jnp.uint32(size & 0xFFFF)
    middle = high * size_low + ((low * size_low) >> 16)
    if size < 1 << 16:
        return (middle >> 16).astype(jnp.int32)
    other = low * size_high
    carry = ((middle & jnp.uint32(0xFFFF)) + (other & jnp.uint32(0xFFFF))) >> 16
    return (high * size_high + (middle >> 16) + (other >> 16) + carry).astype(jnp.int32)


def draw_seed(key: jax.Array, stream: int, step: jax.Array) -> jax.Array:
    """Folds (key, stream, step) into the two words that `seeds_at` takes.

    Args:
      key: uint32 [2].
      stream: one of the stream constants of this module.
      step: integer scalar.

    Returns:
      uint32 [2].
    """
    mixed = fmix32(
        jnp.asarray(step).astype(jnp.uint32)
        ^ fmix32(key[0] ^ jnp.uint32(stream * _GOLDEN & 0xFFFFFFFF))
    )
    return jnp.stack([fmix32(mixed ^ key[1]), fmix32(mixed + fmix32(key[1] ^ jnp.uint32(_GOLDEN)))])


class RowSeeds(NamedTuple):
    """The Weyl sequence of each row, from which `bits_of` draws the bits of its columns."""

    start: jax.Array  # u32 [..]
    increment: jax.Array  # u32 [..]; odd


def seeds_at(seed: jax.Array | tuple, row_ids: jax.Array) -> RowSeeds:
    """Returns the sequences of rows.

    Args:
      seed: two uint32 words, from `draw_seed`; an array [2], or a tuple of two that are broadcast.
      row_ids: integers [..], which are cast to uint32.
    """
    ids = row_ids.astype(jnp.uint32)
    return RowSeeds(fmix32(ids ^ seed[0]), fmix32(ids + seed[1]) | jnp.uint32(1))


def bits_of(seeds: RowSeeds, columns: jax.Array) -> jax.Array:
    """Returns 32 random bits for each row and column.

    Each row has its own Weyl sequence, whose odd increment depends on the row. Each point of the
    sequence is mixed again, so that the sequence of one row is not a shifted copy of another row's.

    Args:
      seeds: the sequences of the rows. They are broadcast against columns.
      columns: integers. They are cast to uint32 and broadcast against the sequences.

    Returns:
      uint32 of the common shape.
    """
    return fmix32(seeds.start + columns.astype(jnp.uint32) * seeds.increment)


class RowKey(Protocol):
    """A key bound to the rows of one shard: local rows draw the bits of their global ids."""

    def row_seeds(self, stream: int, step: jax.Array, rows: jax.Array) -> RowSeeds:
        """Returns the sequences of local rows [..]; see the function `row_seeds`."""


Key = jax.Array | RowKey  # u32 [2], or bound to a shard


def row_bits(
    key: Key, stream: int, step: jax.Array, row_ids: jax.Array, num_columns: int
) -> jax.Array:
    """Returns the random bits of whole rows.

    Args:
      key: uint32 [2], or a RowKey.
      stream: one of the stream constants of this module.
      step: integer scalar.
      row_ids: integer [..]: global row ids; local rows if the key is a RowKey.
      num_columns: the numbers in a row, for example the embedding dim.

    Returns:
      uint32 [.., num_columns].
    """
    columns = columns_of(row_ids, num_columns)
    return bits_of(row_seeds(key, stream, step, row_ids[..., None]), columns)


def row_seeds(key: Key, stream: int, step: jax.Array, row_ids: jax.Array) -> RowSeeds:
    """Returns the sequences from which rows (integers [..]) draw their bits; see `row_bits`."""
    if isinstance(key, jax.Array | np.ndarray):
        return seeds_at(draw_seed(key, stream, step), row_ids)
    return key.row_seeds(stream, step, row_ids)


def columns_of(row_ids: jax.Array, num_columns: int) -> jax.Array:
    """Returns the column numbers of whole rows, uint32 [1, .., num_columns] for row_ids [..]."""
    return lax.broadcasted_iota(jnp.uint32, (*[1] * row_ids.ndim, num_columns), row_ids.ndim)


def uniform(bits: jax.Array) -> jax.Array:
    """Maps uint32 bits to float32 multiples of 2^-24 in [0, 1)."""
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)


def key_words(key: jax.Array) -> jax.Array:
    """Returns the uint32 [2] words of a jax key: jax.random.key(..), or raw words.

    A key of four words (the rbg implementation) gives two words: its halves combined by xor.

    Raises:
      TypeError: if `key` is neither a typed key of shape [] nor uint32 [2].
    """
    if (
        isinstance(key, jax.Array | np.ndarray)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim == 0
    ):
        words = jax.random.key_data(key)
        return words if words.shape == (2,) else words[:2] ^ words[2:4]
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.shape == (2,):
        return jnp.asarray(key)
    raise TypeError(
        "key must be jax.random.key(..) or uint32 [2], got "
        f"{getattr(key, 'dtype', type(key).__name__)} {list(getattr(key, 'shape', ()))}"
    )
