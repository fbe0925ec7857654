"""The parts of a Pallas-Triton kernel: loads and stores, packed rows, and the launch.

A kernel gets whole arrays by reference and loads their elements at index vectors. The arrays need
no padding: blocks are powers of two, as Triton requires, and masks cover the rest. The arithmetic
is that of `numerics`. Only the layout differs:

* A row is read by element. Every element loads the word that holds it. The words of neighbouring
  elements are in the same line of the GPU's cache.
* A row is written by word, in one pass for each place. The place of an element is its index within
  its word. The pass for place p encodes element `word * per_word + p` of every word and puts its
  code into the word. So words are made without a reshape.

Triton's arithmetic differs from XLA's in three ways. min and max ignore NaN, so `write_packed`
looks for NaN separately. Division is approximate, so float8 formats divide by PTX div.rn, and
integer formats correct their quotients by exact remainders. There is no optimization_barrier.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mpembed_jax.arrays import carries, indexing
from mpembed_jax.numerics import formats, random_bits
from mpembed_jax.numerics.formats import RowFormat

_ELEMENTS = 1024  # elements of a block: 8 for each thread of 4 warps
_WARPS = 4
_CHANGED = 1024  # elements that a program of `change_if` changes in one iteration of its loop
_MOST_CHANGING_PROGRAMS = 1024
_SUMMED = 4096  # elements that a program of `running_sums` adds: 32 for each thread
_FEW_BLOCKS = 16  # up to this many blocks, running sums need no second kernel


def block_rows(embedding_dim: int) -> int:
    """Returns the number of rows of `embedding_dim` elements that one program handles at once."""
    return max(1, _ELEMENTS // indexing.ceil_power(embedding_dim))


class RowWords(NamedTuple):
    """The layout of a format's rows of `dim` elements in words; static."""

    format: RowFormat
    dim: int
    is_interpreted: bool

    @property
    def per_word(self) -> int:
        """Number of elements per word, a power of two."""
        return self.format.word_bits(self.dim) // self.format.code_bits

    @property
    def code_words(self) -> int:
        """Number of words that hold codes."""
        return -(-self.dim // self.per_word)

    @property
    def padded_words(self) -> int:
        """Number of words that hold codes, rounded up to a power of two."""
        return indexing.ceil_power(self.code_words)

    def half_places(self) -> list[tuple[int, int]]:
        """Returns where each 16-bit half of a row's scale and bias is: (word, first bit)."""
        halves = self.format.word_bits(self.dim) // 16
        total = self.format.row_words(self.dim) * halves
        places = (
            divmod(i, halves) for i in range(total - self.format.metadata_halves(self.dim), total)
        )
        return [(word, 16 * place) for word, place in places]

    def divide(self, x: jax.Array, divisor: jax.Array) -> jax.Array:
        """Returns x / divisor (float32, shape of x), correctly rounded."""
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
    """Loads ref[index] where the mask is true, and `other` elsewhere.

    `index` has one int32 array for each axis of ref. If there is one array, it may hold anything
    where the mask is false, because it is set to 0 there. Two arrays are passed on as they are,
    because Triton looks for neighbouring addresses in them.
    """
    if len(index) == 1:
        index = (jnp.where(mask, index[0], 0),)
    return plgpu.load(ref.at[index], mask=mask, other=jnp.asarray(other, ref.dtype))


def store(ref: Any, index: tuple, values: jax.Array, mask: jax.Array) -> None:
    """Stores values to ref[index] where the mask is true. Elsewhere, the index may be anything.

    Where the mask is false, the index becomes one past the end of the array. A GPU skips such an
    element. The interpreter stores an old value at its index: past the end, this is dropped, while
    inside the array it could undo another store.
    """
    first, *others = index
    plgpu.store(ref.at[(jnp.where(mask, first, ref.shape[0]), *others)], values, mask=mask)


def load_row(
    ref: Any, index: jax.Array, mask: jax.Array, columns: jax.Array, dim: int
) -> jax.Array:
    """Loads the elements ref[index, columns] of rows int32 [R] and columns int32 [P].

    The result is [R, P] in the dtype of ref. It is zero where `mask` (bool [R]) is false and for
    columns >= `dim`.
    """
    wide = mask[:, None] & (columns < dim)[None, :]
    rows = jnp.broadcast_to(jnp.where(mask, index, 0)[:, None], wide.shape)
    return load(ref, (rows, jnp.broadcast_to(columns[None, :], wide.shape)), wide)


def store_row(
    ref: Any, index: jax.Array, mask: jax.Array, columns: jax.Array, dim: int, values: jax.Array
) -> None:
    """Stores values [R, P] to ref[index, columns] of rows int32 [R] and columns int32 [P].

    The values have the dtype of ref. Nothing is stored where `mask` (bool [R]) is false or for
    columns >= `dim`.
    """
    wide = mask[:, None] & (columns < dim)[None, :]
    rows = jnp.broadcast_to(index[:, None], wide.shape)
    store(ref, (rows, jnp.broadcast_to(columns[None, :], wide.shape)), values, wide)


def columns_of(dim: int) -> jax.Array:
    """Returns the column numbers (int32 [P]) of a row; P is `dim` rounded up to a power of two."""
    return jnp.arange(indexing.ceil_power(dim), dtype=jnp.int32)


def place_columns(row_words: RowWords) -> list[jax.Array]:
    """Returns for each place in a word the columns (int32 [W]) that have this place.

    W is the number of code words, rounded up to a power of two.
    """
    words = jnp.arange(row_words.padded_words, dtype=jnp.int32)
    # Words past the codes hold no column of the row. They get the column `dim`, which callers mask.
    return [
        jnp.where(words < row_words.code_words, words * row_words.per_word + p, row_words.dim)
        for p in range(row_words.per_word)
    ]


def read_packed(ref: Any, ids: jax.Array, mask: jax.Array, row_words: RowWords) -> jax.Array:
    """Dequantizes the rows `ids` (int32 [R]) of a table to float32 [R, P].

    P is the dim, rounded up to a power of two. The result is zero where `mask` (bool [R]) is false
    and in the columns past the dim.
    """
    columns = columns_of(row_words.dim)
    bits = row_words.format.code_bits
    word = jnp.where(columns < row_words.dim, columns // row_words.per_word, row_words.code_words)
    words = load_row(ref, ids, mask, word, row_words.code_words).astype(jnp.uint32)
    if row_words.per_word > 1:
        shift = (columns % row_words.per_word * bits).astype(jnp.uint32)
        words = (words >> shift[None, :]) & jnp.uint32((1 << bits) - 1)
    scale = bias = jnp.zeros((ids.shape[0], 1), jnp.float32)
    if row_words.format.scale_dtype is not None:
        halves = [
            (
                load(ref, (ids, jnp.full(ids.shape, word, jnp.int32)), mask).astype(jnp.uint32)
                >> shift
            )
            & jnp.uint32(0xFFFF)
            for word, shift in row_words.half_places()
        ]
        scale, bias = (x[:, None] for x in formats.parameters_from(halves, row_words.format))
    values = formats.dequantize(words, scale, bias, row_words.format)
    return jnp.where(mask[:, None] & (columns < row_words.dim)[None, :], values, jnp.float32(0))


def write_packed(
    ref: Any,
    ids: jax.Array,
    mask: jax.Array,
    places: list[jax.Array],
    row_words: RowWords,
    seeds: random_bits.RowSeeds,
) -> None:
    """Quantizes rows and stores them to the rows `ids` of a table.

    Args:
      ref: the table's words, uint16 or uint32 [V, words of a row].
      ids: int32 [R].
      mask: bool [R]; rows where it is false are not stored.
      places: the elements of the rows, float32 [R, W] for each place; see place_columns.
      row_words: the layout of the table's rows.
      seeds: the sequences of random bits of the rows, [R].
    """
    fmt = row_words.format
    columns = place_columns(row_words)
    halves: list[jax.Array] = []
    scale = bias = jnp.zeros((ids.shape[0], 1), jnp.float32)
    if fmt.scale_dtype is not None:
        scale, bias = _parameters(places, columns, row_words)
        halves = formats.parameter_halves(scale, bias, fmt)
    words = jnp.zeros(places[0].shape, jnp.uint32)
    for place, (x, column) in enumerate(zip(places, columns, strict=True)):
        bits = None
        if fmt.rounding == "stochastic" and fmt.name != "float32":
            bits = bits_of(seeds, column)
        codes = formats.quantize(x, scale, bias, fmt, bits, row_words.divide)
        codes = jnp.where((column < row_words.dim)[None, :], codes, jnp.uint32(0))
        words = words | (codes << (place * fmt.code_bits) if place else codes)
    position = jnp.arange(words.shape[1], dtype=jnp.int32)
    tail: dict[int, jax.Array] = {}
    for (word, shift), half in zip(row_words.half_places(), halves, strict=True):
        shifted = half << shift if shift else half
        if word < row_words.code_words:
            words = words | jnp.where((position == word)[None, :], shifted, jnp.uint32(0))
        else:
            tail[word] = tail[word] | shifted if word in tail else shifted
    store_row(ref, ids, mask, position, row_words.code_words, words.astype(ref.dtype))
    for word, value in tail.items():
        index = (ids, jnp.full(ids.shape, word, jnp.int32))
        store(ref, index, jnp.sum(value, axis=1, dtype=jnp.uint32).astype(ref.dtype), mask)


def bits_of(seeds: random_bits.RowSeeds, columns: jax.Array) -> jax.Array:
    """Returns the random bits (uint32 [R, P]) of rows [R] at columns (int32 [P])."""
    wide = random_bits.RowSeeds(seeds.start[:, None], seeds.increment[:, None])
    return random_bits.bits_of(wide, columns[None, :])


def load_seeds(refs: Sequence[Any], index: jax.Array, mask: jax.Array) -> random_bits.RowSeeds:
    """Loads the sequences of random bits at index (int32 [R]), where the mask is true.

    `refs` are references to the two fields of RowSeeds.
    """
    return random_bits.RowSeeds(*(load(ref, (index,), mask) for ref in refs))


def _parameters(
    places: list[jax.Array], columns: list[jax.Array], row_words: RowWords
) -> tuple[jax.Array, jax.Array]:
    """Returns the stored scale and bias (float32 [R, 1] each) of rows. Elements are given by place.

    If a row has a NaN, its minimum and its maximum count as NaN.
    """

    def across(
        values: list[jax.Array], outside: float, combine: Callable, reduce: Callable
    ) -> jax.Array:
        total = None
        for x, column in zip(values, columns, strict=True):
            x = jnp.where((column < row_words.dim)[None, :], x, jnp.float32(outside))
            total = x if total is None else combine(total, x)
        return reduce(total, axis=1)[:, None]

    is_nan = across([(x != x).astype(jnp.float32) for x in places], 0.0, jnp.maximum, jnp.max) > 0
    marked = jnp.float32(jnp.nan)
    if row_words.format.symmetric is False:
        low = jnp.where(is_nan, marked, across(places, jnp.inf, jnp.minimum, jnp.min))
        high = jnp.where(is_nan, marked, across(places, -jnp.inf, jnp.maximum, jnp.max))
        return formats.parameters_of(low, high, row_words.format)
    absmax = across([jnp.abs(x) for x in places], 0.0, jnp.maximum, jnp.max)
    return formats.parameters_of(None, jnp.where(is_nan, marked, absmax), row_words.format)


def barrier(is_interpreted: bool) -> None:
    """Waits for all threads of a program.

    All loads and stores before the barrier are done before any after it begin, whichever threads of
    the program run them.
    """
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
    num_warps: int = _WARPS,
) -> tuple[jax.Array, ...]:
    """Runs `body(*operand_refs, *output_refs)` once per program; each reference is a whole array.

    Inside `jax.shard_map`, the results vary over the mesh axes over which any operand varies.

    Args:
      body: the kernel.
      num_programs: length of the one-dimensional grid.
      operands: arrays of any shapes and dtypes. Those that no output aliases may be in host memory:
        a GPU reads their elements across the bus. Interpreted, they are copied to the device first.
      outputs: shapes and dtypes of the results.
      name: the kernel's name in profiles.
      is_interpreted: whether the body is traced into plain jax operations, for any device.
      aliases: {operand: output}, by number: pairs that share memory. The operand is updated in
        place if the caller donates it.
      num_warps: warps of 32 threads that run one program.

    Returns:
      The results.
    """
    assert not any(indexing.is_on_host(operands[k]) for k in aliases or {})
    if is_interpreted:  # jax does not gather from host memory at indices on the device
        operands = [
            jax.device_put(array, jax.memory.Space.Device) if indexing.is_on_host(array) else array
            for array in operands
        ]
    operands, axes = carries.with_common_type(operands)
    varying = jax.sharding.ManualAxisType(varying=axes)
    call = pl.pallas_call(
        body,
        grid=(num_programs,),
        out_shape=tuple(
            jax.ShapeDtypeStruct(of.shape, of.dtype, manual_axis_type=varying) for of in outputs
        ),
        input_output_aliases=aliases or {},
        interpret=is_interpreted,
        compiler_params=None
        if is_interpreted
        else plgpu.CompilerParams(num_warps=num_warps, num_stages=2),
        name=name,
    )
    return call(*operands)


def change_if(
    is_changed: jax.Array,
    arrays: Sequence[jax.Array],
    changes: Sequence[Callable[[jax.Array], jax.Array]],
    *,
    name: str,
    is_interpreted: bool,
) -> tuple[jax.Array, ...]:
    """Changes all elements of some arrays in place, or none.

    The kernel has at most 1,024 programs. If nothing is changed, they end at once.

    Args:
      is_changed: bool scalar, whether the arrays are changed.
      arrays: one-dimensional arrays.
      changes: for each array, an elementwise function that keeps its dtype.
      name: see launch.
      is_interpreted: see launch.

    Returns:
      The arrays.
    """
    largest = max(array.size for array in arrays)
    num_programs = min(_MOST_CHANGING_PROGRAMS, pl.cdiv(largest, _CHANGED))

    def body(flag: Any, *refs: Any) -> None:
        program = pl.program_id(0)

        def change_all() -> None:
            for ref, change in zip(refs[len(arrays) :], changes, strict=True):
                (size,) = ref.shape

                def turn(
                    number: jax.Array,
                    nothing: int,
                    ref: Any = ref,
                    change: Callable = change,
                    size: int = size,
                ) -> int:
                    block = number * num_programs + program
                    index = block * _CHANGED + jnp.arange(_CHANGED, dtype=jnp.int32)
                    # An int32 index past 2**31 - 1 wraps to a negative number.
                    is_inside = (index >= 0) & (index < size)
                    store(ref, (index,), change(load(ref, (index,), is_inside)), is_inside)
                    return nothing

                turns = jnp.int32(pl.cdiv(size, _CHANGED * num_programs))
                lax.fori_loop(jnp.int32(0), turns, turn, 0)

        pl.when(flag[0] != 0)(change_all)

    return launch(
        body,
        num_programs,
        [is_changed.astype(jnp.int32)[None], *arrays],
        [shape_of(array) for array in arrays],
        name=name,
        is_interpreted=is_interpreted,
        aliases={k + 1: k for k in range(len(arrays))},
    )


def starts(*keys: jax.Array) -> jax.Array:
    """Returns which entries begin a run of equal keys (bool [n]); see `indexing.starts`.

    The entry before each one is read by a gather: XLA's GPU back end fuses a gather with its uses,
    but not a concatenation.
    """
    position = jnp.arange(keys[0].shape[0], dtype=jnp.int32)
    before = jnp.maximum(position - 1, 0)
    edges = [key != indexing.take(key, before) for key in keys]
    return (position == 0) | functools.reduce(jnp.logical_or, edges)


def running_sums(arrays: Sequence[jax.Array], *, is_interpreted: bool) -> tuple[jax.Array, ...]:
    """Returns the sums of each array's elements up to and including each one.

    XLA's cumulative sum is a tree of up to six launches. Here, one kernel sums blocks, and a second
    one adds the sums of all blocks before its own. Up to 16 blocks, there is only one kernel, in
    which each program itself sums the elements before its block.

    Args:
      arrays: int32 or bool [n], n > 0, all of one length.
      is_interpreted: see launch.

    Returns:
      int32 [n] for each array.
    """
    return running_sums_and_totals(arrays, (), is_interpreted=is_interpreted)[0]


def running_sums_and_totals(
    arrays: Sequence[jax.Array], counted: Sequence[jax.Array], *, is_interpreted: bool
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns the running sums of `arrays`, and the sums of all of `arrays` and `counted`.

    Both use the same sums of blocks, so all totals together cost one more launch.

    Args:
      arrays: int32 or bool [n], n > 0.
      counted: int32 or bool [n], as long as `arrays`.
      is_interpreted: see launch.

    Returns:
      int32 [n] for each of `arrays`, and the totals (int32 [k]), first of `arrays`, then of
      `counted`.
    """
    every = [array.astype(jnp.int32) for array in (*arrays, *counted)]
    arrays = every[: len(arrays)]
    (size,) = arrays[0].shape
    block = min(_SUMMED, indexing.ceil_power(size))
    num_blocks = pl.cdiv(size, block)

    def own(ref: Any) -> jax.Array:
        index = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        return load(ref, (index,), index < size)

    def sum_blocks(*refs: Any) -> None:
        here = jnp.full(1, pl.program_id(0), jnp.int32)
        for k, ref in enumerate(refs[:-1]):
            total = jnp.sum(own(ref), dtype=jnp.int32)
            store(refs[-1], (k * num_blocks + here,), jnp.broadcast_to(total, (1,)), here >= 0)

    sums: tuple[jax.Array, ...] = ()
    if num_blocks > _FEW_BLOCKS:
        sums = launch(
            sum_blocks,
            num_blocks,
            every,
            [jax.ShapeDtypeStruct((len(every) * num_blocks,), jnp.int32)],
            name="mpembed_block_sums",
            is_interpreted=is_interpreted,
        )

    def add(*refs: Any) -> None:
        program = pl.program_id(0)
        index = program * block + jnp.arange(block, dtype=jnp.int32)
        inputs, before = refs[: len(arrays)], refs[len(arrays) : -len(arrays)]
        for k, out in enumerate(refs[-len(arrays) :]):
            source, width = (before[0], _CHANGED) if before else (inputs[k], block)
            end = program if before else program * block
            first = k * num_blocks if before else 0

            def further(
                turn: jax.Array, total: jax.Array, source: Any = source, width: int = width,
                end: jax.Array = end, first: int = first,
            ) -> jax.Array:  # fmt: skip
                place = turn * width + jnp.arange(width, dtype=jnp.int32)
                return total + load(source, (first + place,), place < end)

            zeros = jnp.zeros(width, jnp.int32)
            turns = lax.div(end + jnp.int32(width - 1), jnp.int32(width))
            base = lax.fori_loop(jnp.int32(0), turns, further, zeros)
            base = jnp.sum(base, dtype=jnp.int32)
            store(out, (index,), base + jnp.cumsum(own(inputs[k]), dtype=jnp.int32), index < size)

    running = launch(
        add,
        num_blocks,
        [*arrays, *sums],
        [jax.ShapeDtypeStruct((size,), jnp.int32)] * len(arrays),
        name="mpembed_running_sums",
        is_interpreted=is_interpreted,
    )
    parts = sums[0].reshape(len(every), num_blocks) if sums else jnp.stack(every)
    return running, jnp.sum(parts, axis=1, dtype=jnp.int32)


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array, for an output that aliases it."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
