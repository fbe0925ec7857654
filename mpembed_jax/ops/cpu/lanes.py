"""Eight lanes of 32 bits at a time, for loops over the elements of a row.

LLVM does not vectorize numba's loops over a row, because it cannot rule out that two arrays
overlap. Here, such loops are written with LLVM's vector instructions.

A row is given by its address (int64). It has any number of elements `dim` (int64): whole blocks of
eight, and a rest of fewer. A buffer is a temporary row with room for whole blocks. Its lanes beyond
dim hold zeros.

Products and sums are rounded one by one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from mpembed_jax.ops.cpu.call_frame import compiled, result_address

LANES = 8
_BYTE, _HALF, _WORD, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_WORD, LANES), ir.VectorType(_FLOAT, LANES)


class Lanes:
    """Eight values of float32 or uint32 in code that is being generated.

    An operator adds its instructions to the code. Its other operand is Lanes of the same type or a
    Python number.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self.builder, self.value = builder, value

    @property
    def is_float(self) -> bool:
        """Whether the lanes are float32."""
        return self.value.type == _FLOATS

    def _other(self, other: Any) -> ir.Value:
        if isinstance(other, Lanes):
            return other.value
        return constant(self.builder, other, is_float=self.is_float).value

    def _with(self, value: ir.Value) -> "Lanes":
        return Lanes(self.builder, value)

    def __add__(self, other: Any) -> "Lanes":
        add = self.builder.fadd if self.is_float else self.builder.add
        return self._with(add(self.value, self._other(other)))

    def __sub__(self, other: Any) -> "Lanes":
        subtract = self.builder.fsub if self.is_float else self.builder.sub
        return self._with(subtract(self.value, self._other(other)))

    def __mul__(self, other: Any) -> "Lanes":
        multiply = self.builder.fmul if self.is_float else self.builder.mul
        return self._with(multiply(self.value, self._other(other)))

    def __truediv__(self, other: Any) -> "Lanes":
        return self._with(self.builder.fdiv(self.value, self._other(other)))

    def __and__(self, other: Any) -> "Lanes":
        return self._with(self.builder.and_(self.value, self._other(other)))

    def __or__(self, other: Any) -> "Lanes":
        return self._with(self.builder.or_(self.value, self._other(other)))

    def __xor__(self, other: Any) -> "Lanes":
        return self._with(self.builder.xor(self.value, self._other(other)))

    def __lshift__(self, other: Any) -> "Lanes":
        return self._with(self.builder.shl(self.value, self._other(other)))

    def __rshift__(self, other: Any) -> "Lanes":
        return self._with(self.builder.lshr(self.value, self._other(other)))

    def compare(self, sign: str, other: Any) -> ir.Value:
        """Compares lane by lane; returns <8 x i1>. Where a float is NaN, only "!=" is true."""
        if not self.is_float:
            return self.builder.icmp_unsigned(sign, self.value, self._other(other))
        compare = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        return compare(sign, self.value, self._other(other))

    def where(self, condition: ir.Value, other: Any) -> "Lanes":
        """Returns these lanes where the condition holds, else the other's."""
        return self._with(self.builder.select(condition, self.value, self._other(other)))

    def bits(self) -> "Lanes":
        """Returns the bit patterns of floats."""
        return self._with(self.builder.bitcast(self.value, _WORDS))

    def as_float(self) -> "Lanes":
        """Returns the floats of bit patterns."""
        return self._with(self.builder.bitcast(self.value, _FLOATS))

    def to_float(self) -> "Lanes":
        """Converts signed integers."""
        return self._with(self.builder.sitofp(self.value, _FLOATS))

    def to_integer(self) -> "Lanes":
        """Converts floats that are integers in the range of int32."""
        return self._with(self.builder.fptosi(self.value, _WORDS))

    def floor(self) -> "Lanes":
        """Rounds down."""
        return self._with(_call(self.builder, "llvm.floor.v8f32", self.value))

    def minimum(self, other: Any) -> "Lanes":
        """Returns the smaller value of each lane; NaN if either is NaN."""
        return self._with(_call(self.builder, "llvm.minimum.v8f32", self.value, self._other(other)))

    def maximum(self, other: Any) -> "Lanes":
        """Returns the larger value of each lane; NaN if either is NaN."""
        return self._with(_call(self.builder, "llvm.maximum.v8f32", self.value, self._other(other)))

    def halved(self, join: Callable[["Lanes", "Lanes"], "Lanes"]) -> ir.Value:
        """Joins the upper half with the lower half until one lane is left, and returns it."""
        lanes = self
        undefined = ir.Constant(self.value.type, ir.Undefined)
        for width in (4, 2, 1):
            order = [width + i if i < width else i for i in range(LANES)]
            mask = ir.Constant(_WORDS, order)
            upper = self.builder.shuffle_vector(lanes.value, undefined, mask)
            lanes = join(lanes, self._with(upper))
        return self.builder.extract_element(lanes.value, _WORD(0))


def _call(builder: ir.IRBuilder, name: str, *operands: ir.Value) -> ir.Value:
    kind = ir.FunctionType(operands[0].type, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def constant(builder: ir.IRBuilder, number: Any, *, is_float: bool) -> Lanes:
    """Returns lanes that all hold one number, or that hold the numbers of a list."""
    numbers = number if isinstance(number, list) else [number] * LANES
    return Lanes(builder, ir.Constant(_FLOATS if is_float else _WORDS, numbers))


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> Lanes:
    """Returns lanes that all hold a scalar."""
    kind = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _WORD(0))
    undefined = ir.Constant(kind, ir.Undefined)
    return Lanes(
        builder, builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * LANES))
    )


class Block:
    """Eight elements of a row, from `first` (i64) on.

    The last block of a row may have only `rest` (i64) elements. In all other blocks, rest is None.
    """

    def __init__(self, builder: ir.IRBuilder, first: ir.Value, rest: ir.Value | None):
        self.builder, self.first, self.rest = builder, first, rest

    def live(self) -> ir.Value:
        """Returns <8 x i1>: which elements exist. The block must have a rest."""
        numbers = constant(self.builder, list(range(LANES)), is_float=False)
        rest = splat(self.builder, self.builder.trunc(self.rest, _WORD))
        return numbers.compare("<", rest)

    def _place(self, address: ir.Value, bits: int) -> tuple[ir.Value, ir.Value | None]:
        """Returns the address of the block in a row at `address`, and its number of bytes.

        An element has `bits` bits. Without a rest, the number of bytes is None.
        """
        builder = self.builder
        offset = builder.lshr(builder.mul(self.first, _LONG(bits)), _LONG(3))
        num_bytes = None
        if self.rest is not None:
            rest_bits = builder.mul(self.rest, _LONG(bits))
            num_bytes = builder.lshr(builder.add(rest_bits, _LONG(7)), _LONG(3))
        return builder.add(address, offset), num_bytes

    def load(self, address: ir.Value, kind: ir.Type, bits: int = 32) -> ir.Value:
        """Loads 8 elements of `bits` bits as a value of type `kind`; zeros beyond the rest."""
        builder = self.builder
        place, num_bytes = self._place(address, bits)
        if num_bytes is None:
            return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)
        held = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, None), held)
        _copy_bytes(builder, place, builder.ptrtoint(held, _LONG), num_bytes)
        return builder.load(held)

    def store(self, address: ir.Value, value: ir.Value, bits: int = 32) -> None:
        """Stores 8 elements of `bits` bits.

        If the block has a rest, only the bytes of the rest are stored, rounded up to an even
        number.
        """
        builder = self.builder
        place, num_bytes = self._place(address, bits)
        if num_bytes is None:
            builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=1)
            return
        held = cgutils.alloca_once(builder, value.type)
        builder.store(value, held)
        whole = builder.and_(builder.add(num_bytes, _LONG(1)), _LONG(-2))
        _copy_bytes(builder, builder.ptrtoint(held, _LONG), place, whole)

    def floats(self, address: ir.Value) -> Lanes:
        """Loads float32."""
        return Lanes(self.builder, self.load(address, _FLOATS))

    def buffered(self, address: ir.Value) -> Lanes:
        """Loads float32 from a buffer."""
        return Lanes(self.builder, Block(self.builder, self.first, None).load(address, _FLOATS))

    def buffer(self, address: ir.Value, lanes: Lanes) -> None:
        """Stores float32 to a buffer, with zeros beyond the rest."""
        if self.rest is not None:
            lanes = lanes.where(self.live(), 0.0)
        Block(self.builder, self.first, None).store(address, lanes.value)


def _copy_bytes(builder: ir.IRBuilder, source: ir.Value, target: ir.Value, num: ir.Value) -> None:
    with cgutils.for_range(builder, num) as loop:
        here = builder.inttoptr(builder.add(source, loop.index), _BYTE.as_pointer())
        there = builder.inttoptr(builder.add(target, loop.index), _BYTE.as_pointer())
        builder.store(builder.load(here), there)


def each_block(builder: ir.IRBuilder, dim: ir.Value, body: Callable[[Block], None]) -> None:
    """Writes a loop over the blocks of a row of dim (i64) elements."""
    with cgutils.for_range(builder, builder.lshr(dim, _LONG(3))) as loop:
        body(Block(builder, builder.shl(loop.index, _LONG(3)), None))
    rest = builder.and_(dim, _LONG(LANES - 1))
    with builder.if_then(builder.icmp_unsigned("!=", rest, _LONG(0))):
        body(Block(builder, builder.sub(dim, rest), rest))


_ROW = types.int64  # an address


def _row_function(write: Callable, returns: types.Type, *kinds: types.Type) -> tuple:
    """Returns the signature and the code generator of an intrinsic, for numba.

    The generator calls write(builder, *operands). If that is None, the intrinsic returns nothing.
    """

    def codegen(target: Any, builder: Any, signature: Any, operands: Any) -> Any:
        answer = write(builder, *operands)
        return target.get_dummy_value() if answer is None else answer

    return returns(*kinds), codegen


@intrinsic
def clear(context, buffer, dim):
    """buffer = 0."""

    def write(builder, buffer, dim):
        zeros = constant(builder, 0.0, is_float=True)
        each_block(builder, dim, lambda block: block.buffer(buffer, zeros))

    return _row_function(write, types.void, _ROW, types.int64)


@intrinsic
def erase(context, row, dim):
    """row = 0. Nothing beyond dim is written, because the row is not a buffer with padding."""

    def write(builder, row, dim):
        zeros = constant(builder, 0.0, is_float=True)
        each_block(builder, dim, lambda block: block.store(row, zeros.value))

    return _row_function(write, types.void, _ROW, types.int64)


@intrinsic
def copy(context, row, source, dim):
    """row = source."""

    def write(builder, row, source, dim):
        each_block(builder, dim, lambda b: b.store(row, b.floats(source).value))

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


@intrinsic
def copy_bytes(context, row, source, num_bytes):
    """row = source, for `num_bytes` bytes."""

    def write(builder, row, source, num_bytes):
        _copy_bytes(builder, source, row, num_bytes)

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


@intrinsic
def stream(context, row, source, dim):
    """row = source, written to memory without the processor's caches.

    dim is a multiple of 8, and the row is aligned to 32 bytes.
    """

    def write(builder, row, source, dim):
        def body(block):
            place, _ = block._place(row, 32)
            pointer = builder.inttoptr(place, _FLOATS.as_pointer())
            store = builder.store(block.floats(source).value, pointer, align=32)
            store.set_metadata("nontemporal", builder.module.add_metadata([_WORD(1)]))

        each_block(builder, dim, body)

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


@intrinsic
def load(context, buffer, source, dim):
    """buffer = source."""

    def write(builder, buffer, source, dim):
        each_block(builder, dim, lambda b: b.buffer(buffer, b.floats(source)))

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


@intrinsic
def begin_sum(context, buffer, source, dim):
    """buffer = 0 + source, which turns -0 into 0, as a sum does."""

    def write(builder, buffer, source, dim):
        zeros = constant(builder, 0.0, is_float=True)
        each_block(builder, dim, lambda b: b.buffer(buffer, b.floats(source) + zeros))

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


@intrinsic
def add(context, buffer, source, dim):
    """buffer += source."""

    def write(builder, buffer, source, dim):
        each_block(builder, dim, lambda b: b.buffer(buffer, b.buffered(buffer) + b.floats(source)))

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


@intrinsic
def add_product(context, buffer, factor, source, dim):
    """buffer += factor * source, product and sum rounded one by one."""

    def write(builder, buffer, factor, source, dim):
        factors = splat(builder, factor)

        def body(block):
            block.buffer(buffer, block.buffered(buffer) + factors * block.floats(source))

        each_block(builder, dim, body)

    return _row_function(write, types.void, _ROW, types.float32, _ROW, types.int64)


@intrinsic
def accumulate(context, row, factor, source, dim):
    """row += factor * source, product and sum rounded one by one."""

    def write(builder, row, factor, source, dim):
        factors = splat(builder, factor)

        def body(block):
            block.store(row, (block.floats(row) + factors * block.floats(source)).value)

        each_block(builder, dim, body)

    return _row_function(write, types.void, _ROW, types.float32, _ROW, types.int64)


@intrinsic
def move(context, buffer, old, rate, grads, inverse, dim):
    """buffer = rate * (grads * inverse) + old; grads is a buffer, too.

    Returns an int64 that is not 0 if an element differs from the old one. NaN differs from every
    number. -0 does not differ from 0.
    """

    def write(builder, buffer, old, rate, grads, inverse, dim):
        rates, inverses = splat(builder, rate), splat(builder, inverse)
        zeros, ones = (constant(builder, n, is_float=False) for n in (0, 1))
        found = cgutils.alloca_once_value(builder, zeros.value)

        def body(block):
            before = block.floats(old)
            after = before + rates * (block.buffered(grads) * inverses)
            block.buffer(buffer, after)
            is_other = ones.where(after.compare("!=", before), zeros)
            if block.rest is not None:
                is_other = is_other.where(block.live(), zeros)
            builder.store((Lanes(builder, builder.load(found)) | is_other).value, found)

        each_block(builder, dim, body)
        any_other = Lanes(builder, builder.load(found)).halved(lambda a, b: a | b)
        return builder.zext(any_other, _LONG)

    kinds = (_ROW, _ROW, types.float32, _ROW, types.float32, types.int64)
    return _row_function(write, types.int64, *kinds)


@intrinsic
def largest_exponent(context, buffer, dim):
    """The largest exponent field of a buffer (int64); 255 if an element is not finite."""

    def write(builder, buffer, dim):
        found = cgutils.alloca_once_value(builder, ir.Constant(_WORDS, [0] * LANES))

        def join(a, b):
            return a.where(a.compare(">", b), b)

        def body(block):
            exponent = (block.buffered(buffer).bits() >> 23) & 255
            builder.store(join(Lanes(builder, builder.load(found)), exponent).value, found)

        each_block(builder, dim, body)
        return builder.zext(Lanes(builder, builder.load(found)).halved(join), _LONG)

    return _row_function(write, types.int64, _ROW, types.int64)


@intrinsic
def square(context, buffer, grads, dim):
    """buffer = grads ** 2, each rounded; both are buffers."""

    def write(builder, buffer, grads, dim):
        each_block(
            builder, dim, lambda block: block.buffer(buffer, _squares(block.buffered(grads)))
        )

    return _row_function(write, types.void, _ROW, _ROW, types.int64)


def _squares(values: Lanes) -> Lanes:
    return ((values * values).bits() & 0x7FFFFFFF).as_float()


def sum_of_squares(num_blocks: int) -> Callable:
    """Returns a numba function that sums the squares (float32) of a buffer of `num_blocks` blocks.

    The blocks of the upper half are added to those of the lower half, until one block is left. All
    stay in registers.
    """

    def typed(context, buffer):
        def write(builder, buffer):
            blocks = [
                _squares(Block(builder, _LONG(k * LANES), None).buffered(buffer))
                for k in range(num_blocks)
            ]
            while len(blocks) > 1:
                half = 1 << (len(blocks) - 1).bit_length() - 1
                for upper in range(half, len(blocks)):
                    blocks[upper - half] += blocks[upper]
                blocks = blocks[:half]
            return blocks[0].halved(lambda a, b: a + b)

        return _row_function(write, types.float32, _ROW)

    return intrinsic(typed)


@intrinsic
def add_block(context, buffer, block, other):
    """Adds one block of a buffer to another, by their numbers: buffer[block] += buffer[other]."""

    def write(builder, buffer, block, other):
        here, there = (Block(builder, builder.shl(b, _LONG(3)), None) for b in (block, other))
        here.buffer(buffer, here.buffered(buffer) + there.buffered(buffer))

    return _row_function(write, types.void, _ROW, types.int64, types.int64)


@intrinsic
def fold(context, buffer):
    """Sums the first block of a buffer: adds its halves until one element is left."""

    def write(builder, buffer):
        first = Block(builder, _LONG(0), None).buffered(buffer)
        return first.halved(lambda a, b: a + b)

    return _row_function(write, types.float32, _ROW)


def _extreme(write_join: Callable, start: float, is_magnitude: bool) -> Callable:
    def typed(context, buffer, dim):
        def write(builder, buffer, dim):
            first = constant(builder, start, is_float=True)
            found = cgutils.alloca_once_value(builder, first.value)

            def body(block):
                values = block.buffered(buffer)
                if is_magnitude:
                    values = (values.bits() & 0x7FFFFFFF).as_float()
                if block.rest is not None:
                    values = values.where(block.live(), start)
                builder.store(write_join(Lanes(builder, builder.load(found)), values).value, found)

            each_block(builder, dim, body)
            return Lanes(builder, builder.load(found)).halved(write_join)

        return _row_function(write, types.float32, _ROW, types.int64)

    return typed


# Functions of a buffer. The result is NaN if one of its elements is NaN.
smallest = intrinsic(_extreme(Lanes.minimum, float("inf"), False))
largest = intrinsic(_extreme(Lanes.maximum, float("-inf"), False))
largest_magnitude = intrinsic(_extreme(Lanes.maximum, 0.0, True))


@intrinsic
def ask_for(context, row, num_bytes):
    """Prefetches the cache lines of `num_bytes` bytes from an address on, without waiting."""

    def write(builder, row, num_bytes):
        byte = _BYTE.as_pointer()
        kinds = [byte, _WORD, _WORD, _WORD]
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), kinds)
        )
        skipped = builder.and_(row, _LONG(63))
        row, num_bytes = builder.sub(row, skipped), builder.add(num_bytes, skipped)
        num_lines = builder.lshr(builder.add(num_bytes, _LONG(63)), _LONG(6))
        with cgutils.for_range(builder, num_lines) as loop:
            place = builder.add(row, builder.shl(loop.index, _LONG(6)))
            # The constants select reading, all levels of the cache, and data.
            builder.call(fetch, [builder.inttoptr(place, byte), _WORD(0), _WORD(3), _WORD(1)])

    return _row_function(write, types.void, _ROW, types.int64)


@intrinsic
def bits_of(context, x):
    """The bit pattern of a float32."""

    def write(builder, x):
        return builder.bitcast(x, _WORD)

    return _row_function(write, types.uint32, types.float32)


@intrinsic
def float_of(context, x):
    """The float32 of a bit pattern."""

    def write(builder, x):
        return builder.bitcast(x, _FLOAT)

    return _row_function(write, types.float32, types.uint32)


# --- the buffers of a call


def buffers(num: int, dim: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of a call's result that has room for `num` buffers of rows.

    The result is int32, because jax_debug_nans looks for NaN in the floats of calls outside jit.
    Some elements of a buffer are never written. As floats, they could be NaN.
    """
    return jax.ShapeDtypeStruct((num * (-(-dim // LANES) * LANES),), jnp.int32)


@compiled
def buffer_of(frame, index, number, dim):
    """Returns the address of a buffer in the index-th result of a call; see `buffers`."""
    width = (dim + LANES - 1) // LANES * LANES
    return result_address(frame, index) + 4 * width * number
