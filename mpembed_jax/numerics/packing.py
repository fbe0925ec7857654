"""Packing of a row's codes, scale and bias into machine words, and unpacking.

A row is `[codes | scale | bias]` in uint16 or uint32 words, little-endian, with element 0 in the
lowest bits. One memory access reads the whole row. The layout resembles FBGEMM's row-wise quantized
tables; the packing into words is this library's own.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.numerics.formats import (
    RowFormat,
    as_format,
    dequantize,
    parameter_halves,
    parameters_from,
    quantize,
    row_parameters,
)


def _packed(codes: jax.Array, code_bits: int, per_word: int) -> jax.Array:
    """Packs every `per_word` adjacent uint32 codes [.., n] into one word, lowest bits first."""
    # XLA:CPU needs two forms. When codes are summed over a last axis of 4, it does not vectorize
    # the computation of the codes. When 8 slices are combined by OR, it computes the codes again
    # for each slice. Each form is three times as fast as the other where it is used.
    if per_word <= 4:
        return reduce(
            jnp.bitwise_or, [codes[..., i::per_word] << (i * code_bits) for i in range(per_word)]
        )
    shape = (*codes.shape[:-1], codes.shape[-1] // per_word, per_word)  # no -1: it fails for 0 rows
    shifts = _last(per_word, codes.ndim) * jnp.uint32(code_bits)
    return jnp.sum(codes.reshape(shape) << shifts, axis=-1, dtype=jnp.uint32)


def _last(size: int, axis: int) -> jax.Array:
    """Returns 0, 1, .. along a last axis, uint32 [1, .., size]."""
    return lax.broadcasted_iota(jnp.uint32, (*[1] * axis, size), axis)


def encode(
    rows: jax.Array, format: RowFormat | str, random_bits: jax.Array | None = None
) -> jax.Array:
    """Packs float32 rows into a format's machine words.

    Args:
      rows: float32 [.., D].
      format: a RowFormat or its name.
      random_bits: uint32 [.., D] for stochastic rounding; None rounds to nearest.

    Returns:
      uint16 or uint32 [.., row_words]: `[codes | scale | bias]`, little-endian, with element 0 in
      the lowest bits.

    Raises:
      TypeError: if rows are not float32, or format is not a format.
      ValueError: if random_bits are not uint32 of the shape of rows, if rows have no columns, or if
        the name of the format is unknown.
    """
    if getattr(rows, "dtype", None) != jnp.float32:
        found = getattr(rows, "dtype", type(rows).__name__)
        raise TypeError(
            f"encode(rows, format, random_bits): rows must be float32 [.., D], got {found}; cast "
            "them before encode"
        )
    if rows.ndim < 1 or rows.shape[-1] < 1:
        raise ValueError(f"rows must be float32 [.., D] with D >= 1, got shape {rows.shape}")
    if random_bits is not None and (
        random_bits.dtype != jnp.uint32 or random_bits.shape != rows.shape
    ):
        raise ValueError(
            f"random_bits must be uint32 {rows.shape} like rows, got {random_bits.dtype} "
            f"{random_bits.shape}"
        )
    fmt = as_format(format).resolve(rows.shape[-1])
    scale, bias = row_parameters(rows, fmt)
    return pack(quantize(rows, scale, bias, fmt, random_bits), scale, bias, fmt)


def pack(codes: jax.Array, scale: jax.Array, bias: jax.Array, fmt: RowFormat) -> jax.Array:
    """Packs codes (uint32 [.., D]), scale and bias (float32 [.., 1]) in a resolved format.

    The result is the words of `encode`: uint16 or uint32 [.., row_words].
    """
    dim = codes.shape[-1]
    halves = []
    if fmt.scale_dtype is not None:
        halves = parameter_halves(scale, bias, fmt)
    word_bits, num_words = fmt.word_bits(dim), fmt.row_words(dim)
    per_word = word_bits // fmt.code_bits
    code_words = -(-dim // per_word)
    lead = [(0, 0)] * (codes.ndim - 1)
    if code_words * per_word != dim:
        codes = jnp.pad(codes, [*lead, (0, code_words * per_word - dim)])
    codes = _packed(codes, fmt.code_bits, per_word)
    words = (
        jnp.pad(codes, [*lead, (0, num_words - code_words)]) if num_words > code_words else codes
    )
    position = _last(num_words, words.ndim - 1)
    first_half = num_words * word_bits // 16 - len(halves)
    for index, half in enumerate(halves, first_half):
        word, place = divmod(index, word_bits // 16)
        words = words | jnp.where(position == word, half << (16 * place), jnp.uint32(0))
    return words.astype(fmt.word_dtype(dim))


def decode(packed: jax.Array, format: RowFormat | str, embedding_dim: int) -> jax.Array:
    """Unpacks machine words into float32 rows.

    Args:
      packed: uint16 or uint32 [.., row_words], as returned by `encode`.
      format: a RowFormat or its name.
      embedding_dim: D.

    Returns:
      float32 [.., D].

    Raises:
      TypeError: if packed is not an array, or format is not a format.
      ValueError: if the words' dtype or number does not match the format and dim, or if the name of
        the format is unknown.
    """
    if not hasattr(packed, "dtype"):
        raise TypeError(
            "decode(packed, format, embedding_dim): packed must be an array of words, got "
            f"{type(packed).__name__}"
        )
    fmt = as_format(format).resolve(embedding_dim)
    dtype = fmt.word_dtype(embedding_dim)
    num_words = fmt.row_words(embedding_dim)
    if packed.dtype != dtype or packed.ndim < 1 or packed.shape[-1] != num_words:
        raise ValueError(
            f"packed {fmt.name} rows of dim {embedding_dim} are {dtype} [.., {num_words}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    words = packed.astype(jnp.uint32)
    word_bits = fmt.word_bits(embedding_dim)
    per_word = word_bits // fmt.code_bits
    codes = words[..., : -(-embedding_dim // per_word)]
    if per_word > 1:
        shifts = _last(per_word, codes.ndim) * jnp.uint32(fmt.code_bits)
        codes = (codes[..., None] >> shifts) & jnp.uint32(2**fmt.code_bits - 1)
        shape = (*packed.shape[:-1], codes.shape[-2] * per_word)  # no -1: it fails for 0 rows
        codes = codes.reshape(shape)[..., :embedding_dim]
    scale = bias = jnp.zeros((*packed.shape[:-1], 1), jnp.float32)
    if fmt.scale_dtype is not None:
        num_halves = fmt.metadata_halves(embedding_dim)
        halves = []
        for index in range(num_words * word_bits // 16 - num_halves, num_words * word_bits // 16):
            word, place = divmod(index, word_bits // 16)
            halves.append((words[..., word : word + 1] >> (16 * place)) & jnp.uint32(0xFFFF))
        scale, bias = parameters_from(halves, fmt)
    return dequantize(codes, scale, bias, fmt)
