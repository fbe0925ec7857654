"""Rows inside a Pallas-Triton kernel body: reading packed rows, packing them, and launching.

A kernel sees whole arrays by reference and loads them at index vectors, so it needs no padding: blocks are powers of two, as
Triton wants them, and masks do the rest. The arithmetic is that of `numerics`; only the layout differs. A row
is read by element (every element loads the word that holds it, and its neighbours hit the same cache line) and written by
word: element `word * per_word + place` is handled in the pass of `place`, so words are made without a reshape.

Known differences of Triton's arithmetic, and what is done: min and max ignore NaN (rows with one are marked), division is
approximate (float8 uses PTX div.rn; integer grids are exact by remainders), optimization_barrier does not exist.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mpembed_jax.numerics import formats, random_bits
from mpembed_jax.numerics.formats import RowFormat

_ELEMENTS = 1024  # elements of a block: 4 warps with 8 elements a thread
_WARPS = 4


def ceil_power(n: int) -> int:
    """Returns the smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def block_rows(embedding_dim: int) -> int:
    """Returns how many rows of a dim one program takes."""
    return max(1, _ELEMENTS // ceil_power(embedding_dim))


class Layout(NamedTuple):
    """How rows of a format lie in words; all static."""

    format: RowFormat
    dim: int
    is_interpreted: bool

    @property
    def per_word(self) -> int:
        """Elements per word, a power of two."""
        return self.format.word_bits(self.dim) // self.format.code_bits

    @property
    def code_words(self) -> int:
        """Words that hold codes."""
        return -(-self.dim // self.per_word)

    @property
    def padded_words(self) -> int:
        """Those, padded to a power of two."""
        return ceil_power(self.code_words)

    def half_places(self) -> list[tuple[int, int]]:
        """Returns (word, shift) of each 16-bit half of the row's scale and bias."""
        halves = self.format.word_bits(self.dim) // 16
        total = self.format.row_words(self.dim) * halves
        places = (
            divmod(i, halves) for i in range(total - self.format.metadata_halves(self.dim), total)
        )
        return [(word, 16 * place) for word, place in places]

    def divide(self, x: jax.Array, divisor: jax.Array) -> jax.Array:
        """Returns x / divisor, correctly rounded."""
        if self.is_interpreted:
            return formats.divide(x, divisor)
        divisor = jnp.broadcast_to(divisor, x.shape)
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        [quotient] = plgpu.elementwise_inline_asm(
            "div.rn.f32 $0, $1, $2;",
            args=[x, divisor],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[shape],
        )
        return quotient


def load(ref: Any, index: tuple, mask: jax.Array, other: float = 0) -> jax.Array:
    """Loads ref[index] where the mask holds, `other` elsewhere.

    Masked indices may be anything if there is one; of two they are left as they are, since Triton looks for neighbours.
    """
    if len(index) == 1:
        index = (jnp.where(mask, index[0], 0),)
    return plgpu.load(ref.at[index], mask=mask, other=jnp.asarray(other, ref.dtype))


def store(ref: Any, index: tuple, values: jax.Array, mask: jax.Array) -> None:
    """Stores values to ref[index] where the mask holds; masked indices may be anything.

    They are moved past the end: a GPU does not look at them, and the interpreter, which writes old values back there, drops
    them instead of racing with a store to the same place.
    """
    first, *others = index
    plgpu.store(ref.at[(jnp.where(mask, first, ref.shape[0]), *others)], values, mask=mask)


def load_row(
    ref: Any, index: jax.Array, mask: jax.Array, columns: jax.Array, dim: int
) -> jax.Array:
    """Loads float32 elements ref[index [R], columns [P]] -> [R, P]; zeros where masked or past `dim`."""
    wide = mask[:, None] & (columns < dim)[None, :]
    rows = jnp.broadcast_to(jnp.where(mask, index, 0)[:, None], wide.shape)
    return load(ref, (rows, jnp.broadcast_to(columns[None, :], wide.shape)), wide)


def store_row(
    ref: Any, index: jax.Array, mask: jax.Array, columns: jax.Array, dim: int, values: jax.Array
) -> None:
    """Stores float32 values [R, P] to ref[index [R], columns [P]] but where masked or past `dim`."""
    wide = mask[:, None] & (columns < dim)[None, :]
    rows = jnp.broadcast_to(index[:, None], wide.shape)
    store(ref, (rows, jnp.broadcast_to(columns[None, :], wide.shape)), values, wide)


def columns_of(dim: int) -> jax.Array:
    """Returns the column numbers (int32) of a row by element, padded to a power of two."""
    return jnp.arange(ceil_power(dim), dtype=jnp.int32)


def place_columns(layout: Layout) -> list[jax.Array]:
    """Returns the column numbers (int32, padded to a power of two) of each place in the words of a row."""
    words = jnp.arange(layout.padded_words, dtype=jnp.int32)
    # Words past the codes would name columns of no row for every place but the last.
    return [
        jnp.where(words < layout.code_words, words * layout.per_word + p, layout.dim)
        for p in range(layout.per_word)
    ]


def read_packed(ref: Any, ids: jax.Array, mask: jax.Array, layout: Layout) -> jax.Array:
    """Dequantizes the table's rows of ids [R] -> float32 [R, P], P the padded dim; zeros where masked."""
    columns = columns_of(layout.dim)
    bits = layout.format.code_bits
    words = load_row(ref, ids, mask, jnp.where(columns < layout.dim, columns // layout.per_word, layout.code_words),
                     layout.code_words).astype(jnp.uint32)  # fmt: skip
    if layout.per_word > 1:
        shift = (columns % layout.per_word * bits).astype(jnp.uint32)
        words = (words >> shift[None, :]) & jnp.uint32((1 << bits) - 1)
    scale = bias = jnp.zeros((ids.shape[0], 1), jnp.float32)
    if layout.format.scale_dtype is not None:
        halves = [
            (
                load(ref, (ids, jnp.full(ids.shape, word, jnp.int32)), mask).astype(jnp.uint32)
                >> shift
            )
            & jnp.uint32(0xFFFF)
            for word, shift in layout.half_places()
        ]
        scale, bias = (x[:, None] for x in formats.parameters_from(halves, layout.format))
    values = formats.dequantize(words, scale, bias, layout.format)
    return jnp.where(mask[:, None] & (columns < layout.dim)[None, :], values, jnp.float32(0))


def write_packed(
    ref: Any,
    ids: jax.Array,
    mask: jax.Array,
    places: list[jax.Array],
    layout: Layout,
    seed: tuple[jax.Array, jax.Array],
) -> None:
    """Quantizes rows, given by place (see place_columns) as float32 [R, W], and stores them to the table's rows ids [R].

    Args:
      ref: the table's words [V, row_words].
      ids: int32 [R].
      mask: bool [R].
      places: the rows' elements.
      layout: of the table.
      seed: the two words of `numerics.draw_seed`.
    """
    fmt, columns = layout.format, place_columns(layout)
    halves: list[jax.Array] = []
    scale = bias = jnp.zeros((ids.shape[0], 1), jnp.float32)
    if fmt.scale_dtype is not None:
        scale, bias = _parameters(places, columns, layout)
        halves = formats.parameter_halves(scale, bias, fmt)
    words = jnp.zeros(places[0].shape, jnp.uint32)
    for place, (x, column) in enumerate(zip(places, columns, strict=True)):
        bits = None
        if fmt.rounding == "stochastic" and fmt.name != "float32":
            bits = random_bits.bits_at(seed, ids[:, None], column[None, :])  # type: ignore[arg-type]
        codes = formats.quantize(x, scale, bias, fmt, bits, layout.divide)
        codes = jnp.where((column < layout.dim)[None, :], codes, jnp.uint32(0))
        words = words | (codes << (place * fmt.code_bits) if place else codes)
    position = jnp.arange(words.shape[1], dtype=jnp.int32)
    tail: dict[int, jax.Array] = {}
    for (word, shift), half in zip(layout.half_places(), halves, strict=True):
        shifted = half << shift if shift else half
        if word < layout.code_words:
            words = words | jnp.where((position == word)[None, :], shifted, jnp.uint32(0))
        else:
            tail[word] = tail[word] | shifted if word in tail else shifted
    store_row(ref, ids, mask, position, layout.code_words, words.astype(ref.dtype))
    for word, value in tail.items():
        index = (ids, jnp.full(ids.shape, word, jnp.int32))
        store(ref, index, jnp.sum(value, axis=1, dtype=jnp.uint32).astype(ref.dtype), mask)


def _parameters(
    places: list[jax.Array], columns: list[jax.Array], layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """Returns the stored scale and bias [R, 1]; a NaN anywhere in a row makes both its bounds NaN."""

    def across(
        values: list[jax.Array], outside: float, combine: Callable, reduce: Callable
    ) -> jax.Array:
        total = None
        for x, column in zip(values, columns, strict=True):
            x = jnp.where((column < layout.dim)[None, :], x, jnp.float32(outside))
            total = x if total is None else combine(total, x)
        return reduce(total, axis=1)[:, None]

    is_nan = across([(x != x).astype(jnp.float32) for x in places], 0.0, jnp.maximum, jnp.max) > 0
    marked = jnp.float32(jnp.nan)
    if layout.format.symmetric is False:
        low = jnp.where(is_nan, marked, across(places, jnp.inf, jnp.minimum, jnp.min))
        high = jnp.where(is_nan, marked, across(places, -jnp.inf, jnp.maximum, jnp.max))
        return formats.parameters_of(low, high, layout.format)
    absmax = across([jnp.abs(x) for x in places], 0.0, jnp.maximum, jnp.max)
    return formats.parameters_of(None, jnp.where(is_nan, marked, absmax), layout.format)


def barrier(is_interpreted: bool) -> None:
    """Waits for all threads of a program: loads before it are done when stores after it begin, whatever thread does them."""
    if not is_interpreted:
        plgpu.debug_barrier()


def launch(
    body: Callable,
    num_programs: int,
    operands: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    is_interpreted: bool,
    aliases: dict[int, int] | None = None,
) -> tuple[jax.Array, ...]:
    """Runs `body(*operand_refs, *output_refs)` once per program, every array whole.

    Args:
      body: the kernel.
      num_programs: length of the one-dimensional grid.
      operands: arrays.
      outputs: shapes of the results.
      name: of the kernel, seen in profiles.
      is_interpreted: True traces the body into plain jax operations, on any device.
      aliases: {operand: output} that share memory, updated in place where the caller donates.

    Returns:
      The results.
    """
    call = pl.pallas_call(
        body,
        grid=(num_programs,),
        out_shape=tuple(outputs),
        input_output_aliases=aliases or {},
        interpret=is_interpreted,
        compiler_params=None
        if is_interpreted
        else plgpu.CompilerParams(num_warps=_WARPS, num_stages=2),
        name=name,
    )
    return call(*operands)


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape struct of an array, for an output that aliases it."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
