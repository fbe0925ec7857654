"""Decoding and encoding a packed row on a CPU, eight elements at a time.

The rules and the bits are those of `numerics.formats` and `rounding`. A row of words is read as its
bytes, little-endian: codes from element 0 on, padded to a multiple of 16 bits, then scale and bias.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from mpembed_jax.numerics import rounding
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.numerics.rounding import FloatFormat
from mpembed_jax.ops.cpu import call_frame, lanes
from mpembed_jax.ops.cpu.call_frame import compiled
from mpembed_jax.ops.cpu.hashes import fmix32
from mpembed_jax.ops.cpu.lanes import Block, Lanes, bits_of, constant, float_of

F32, U32 = np.float32, np.uint32
_FLOAT16 = rounding.FLOAT_FORMATS["float16"]
_INF = U32(rounding._INF)
_WORD, _LONG = ir.IntType(32), ir.IntType(64)


class Codec(NamedTuple):
    """Decoding and encoding in a row format, as numba functions that take addresses of rows."""

    # decode(packed, buffer, dim): a packed row to a buffer of float32.
    decode: Callable
    # encode(buffer, packed, dim, id, seed0, seed1): a buffer to a packed row, rounded with the
    # random bits of the id.
    encode: Callable


def name_of(fmt: RowFormat) -> str:
    """Returns a name of a resolved format; the names of its foreign functions contain it."""
    kind = {None: "", True: "_symmetric", False: "_asymmetric"}[fmt.symmetric]
    return f"{fmt.name}{kind}_{fmt.scale_dtype}_{fmt.rounding}"


def row_bytes(fmt: RowFormat) -> Callable:
    """Returns a numba function of dim: the bytes of a packed row of a resolved format."""
    code_bits, num_halves = np.int64(fmt.code_bits), np.int64(_num_halves(fmt))

    @compiled
    def bytes_of(dim):
        return 2 * ((dim * code_bits + 15) // 16 + num_halves)

    return bytes_of


def _num_halves(fmt: RowFormat) -> int:
    return fmt.metadata_halves(1)  # the same for every dim, because the format is resolved


@compiled
def _half_at(address, index):
    return U32(numba.carray(call_frame._pointer(address), 4, np.uint16)[index])


@compiled
def _put_half(address, index, half):
    numba.carray(call_frame._pointer(address), 4, np.uint16)[index] = np.uint16(half)


# --- one float at a time: scales and biases, see numerics.rounding


@compiled
def _float16_of(code):
    sign, magnitude = (code >> U32(15)) << U32(31), code & U32(0x7FFF)
    normal = float_of(U32((magnitude << U32(13)) + U32(112 << 23)))
    value = normal if magnitude >= U32(1 << 10) else F32(np.int32(magnitude)) * F32(2.0**-24)
    value = F32(np.nan) if magnitude > U32(0x7BFF) else value
    return float_of(bits_of(value) | sign)


@compiled
def _float16_code(x):
    """Returns the code of the nearest float16, ties to even: see rounding.encode_float."""
    raw = bits_of(x)
    magnitude = raw & U32(0x7FFFFFFF)
    noise = U32(0xFFF) + ((magnitude >> U32(13)) & U32(1))
    code = U32(U32(U32(magnitude + noise) >> U32(13)) - U32(112 << 10))
    if magnitude < U32(113 << 23):
        units = float_of(magnitude) * F32(2.0**24)
        whole = np.floor(units)
        odd = whole - F32(2) * np.floor(whole * F32(0.5))
        fraction = units - whole
        up = fraction > F32(0.5) or (fraction == F32(0.5) and odd == F32(1))
        code = U32(np.int32(whole + (F32(1) if up else F32(0))))
    code = min(code, U32(0x7BFF))
    code = U32(0x7E00) if magnitude > _INF else code
    return code | ((raw >> U32(31)) << U32(15))


def _rounding_of(dtype: str) -> tuple[Callable, Callable]:
    """Returns rounding.round_up and round_down for stored scales and biases of a dtype."""
    is_wide, is_bfloat = dtype == "float32", dtype == "bfloat16"

    @compiled
    def round_up(x):
        raw = bits_of(x)
        if is_wide:
            rounded = float_of(U32(raw + U32(0xFF)) & U32(0xFFFFFF00))
        elif is_bfloat:
            rounded = float_of(min(U32(raw + U32(0xFFFF)) & U32(0xFFFF0000), U32(0x7F7F0000)))
        elif x < F32(2.0**-14):
            rounded = np.ceil(x * F32(2.0**24)) * F32(2.0**-24)
        else:
            rounded = min(float_of(U32(raw + U32(0x1FFF)) & U32(0xFFFFE000)), F32(65504))
        rounded = F32(0) if raw < U32(0x00800000) else rounded
        return F32(np.nan) if raw >= _INF else rounded

    @compiled
    def round_down(x):
        raw = bits_of(x)
        is_negative = raw >> U32(31) == U32(1)
        if is_wide or x != x:
            return x
        if is_bfloat:
            away = U32(0xFFFF) if is_negative else U32(0)
            rounded = float_of(U32(raw + away) & U32(0xFFFF0000))
            return max(rounded, F32(-3.3895313892515355e38))
        if abs(x) < F32(2.0**-14):
            return np.floor(x * F32(2.0**24)) * F32(2.0**-24)
        away = U32(0x1FFF) if is_negative else U32(0)
        rounded = float_of(U32(raw + away) & U32(0xFFFFE000))
        return max(min(rounded, F32(65504)), F32(-65504))

    return round_up, round_down


def _grid_step(dtype: str, levels: float) -> Callable:
    """Returns rounding.grid_step for a dtype and levels."""
    round_up, _ = _rounding_of(dtype)
    top = F32(levels)
    is_half = dtype == "float16"
    inverse = F32(1) / top
    ulp = U32({"float32": 0x100, "bfloat16": 0x10000, "float16": 0x2000}[dtype])
    limit = F32(rounding._LARGEST[dtype])
    quantum, normal = F32(2.0**-24), F32(2.0**-14)

    @compiled
    def grid_step(width):
        scale = round_up(width * inverse)
        below, above = float_of(U32(bits_of(scale) - ulp)), float_of(U32(bits_of(scale) + ulp))
        if is_half and not scale > normal:
            below = scale - quantum
        if is_half and not scale >= normal:
            above = scale + quantum
        is_normal = bits_of(scale) > U32(U32(0x00800000) + ulp)
        if is_normal and below * top >= width:
            scale = below
        if is_normal and scale * top < width and scale < limit:
            scale = above
        return scale

    return grid_step


@compiled
def _saturated(width, extreme):
    """See formats._saturated."""
    if bits_of(extreme) & _INF == _INF:
        return extreme
    return min(max(width, F32(0)), F32(3.3e38))


def _parameters(fmt: RowFormat) -> tuple[Callable, Callable, Callable]:
    """Returns read(address) -> (scale, bias), write(address, scale, bias), find(buffer, dim)."""
    dtype = fmt.scale_dtype or "float32"
    is_wide, is_bfloat = dtype == "float32", dtype == "bfloat16"
    has_scale, has_bias = fmt.scale_dtype is not None, fmt.symmetric is False
    width = np.int64(2 if is_wide else 1)
    if fmt.is_integer:
        levels = 2.0**fmt.code_bits - 1 if has_bias else 2.0 ** (fmt.code_bits - 1) - 1
    else:
        levels = rounding.FLOAT_FORMATS[fmt.name].max_value if has_scale else 1.0
    grid_step = _grid_step(dtype, levels)
    _, round_down = _rounding_of(dtype)
    is_magnitude = not has_bias

    @compiled
    def one(address, index):
        if is_wide:
            return float_of(_half_at(address, index) | (_half_at(address, index + 1) << U32(16)))
        if is_bfloat:
            return float_of(U32(_half_at(address, index) << U32(16)))
        return _float16_of(_half_at(address, index))

    @compiled
    def put(address, index, value):
        raw = bits_of(value)
        if is_wide:
            _put_half(address, index, raw & U32(0xFFFF))
            _put_half(address, index + 1, raw >> U32(16))
        elif is_bfloat:
            _put_half(address, index, raw >> U32(16))
        else:
            _put_half(address, index, _float16_code(value))

    @compiled
    def read(address):
        scale = one(address, 0) if has_scale else F32(0)
        return scale, one(address, width) if has_bias else F32(0)

    @compiled
    def write(address, scale, bias):
        if has_scale:
            put(address, 0, scale)
        if has_bias:
            put(address, width, bias)

    @compiled
    def find(buffer, dim):
        if not has_scale:
            return F32(0), F32(0)
        if is_magnitude:
            high = lanes.largest_magnitude(buffer, dim)
            return grid_step(_saturated(high, high)), F32(0)
        low, high = lanes.smallest(buffer, dim), lanes.largest(buffer, dim)
        bias = round_down(low)
        return grid_step(_saturated(high - bias, high)), bias

    return read, write, find


# --- eight codes at a time


def _load_codes(block: Block, packed: ir.Value, bits: int) -> Lanes:
    """Loads 8 codes of `bits` bits each as uint32."""
    builder = block.builder
    words = ir.VectorType(_WORD, lanes.LANES)
    if bits >= 8:
        codes = block.load(packed, ir.VectorType(ir.IntType(bits), lanes.LANES), bits)
        return Lanes(builder, codes if bits == 32 else builder.zext(codes, words))
    word = block.load(packed, ir.IntType(8 * bits), bits)
    word = lanes.splat(builder, word if bits == 4 else builder.zext(word, _WORD))
    shifts = constant(builder, [bits * i for i in range(lanes.LANES)], is_float=False)
    return (word >> shifts) & (2**bits - 1)


def _store_codes(block: Block, packed: ir.Value, codes: Lanes, bits: int) -> None:
    """Stores 8 codes of `bits` bits each; the padding of the last code word is zero."""
    builder = block.builder
    if block.rest is not None:
        codes = codes.where(block.live(), 0)
    if bits >= 8:
        kind = ir.VectorType(ir.IntType(bits), lanes.LANES)
        value = codes.value if bits == 32 else builder.trunc(codes.value, kind)
        block.store(packed, value, bits)
        return
    shifts = constant(builder, [bits * i for i in range(lanes.LANES)], is_float=False)
    word = (codes << shifts).halved(lambda a, b: a | b)
    block.store(packed, word if bits == 4 else builder.trunc(word, ir.IntType(8 * bits)), bits)


def _decoded_float(codes: Lanes, fmt: FloatFormat) -> Lanes:
    """See rounding.decode_float."""
    if fmt.bias == 127:
        return (codes << 16).as_float()
    sign, magnitude = (codes >> fmt.sign_bit) << 31, codes & ((1 << fmt.sign_bit) - 1)
    normal = ((magnitude << (23 - fmt.mantissa)) + ((127 - fmt.bias) << 23)).as_float()
    subnormal = magnitude.to_float() * 2.0 ** (1 - fmt.bias - fmt.mantissa)
    value = subnormal.where(magnitude.compare("<", 1 << fmt.mantissa), normal)
    nan = constant(codes.builder, 0x7FC00000, is_float=False)
    value = nan.where(magnitude.compare(">", fmt.max_code), value.bits())
    return (value | sign).as_float()


def _encoded_float(x: Lanes, fmt: FloatFormat, bits: Lanes | None) -> Lanes:
    """See rounding.encode_float."""
    raw = x.bits()
    drop = 23 - fmt.mantissa
    magnitude = raw & 0x7FFFFFFF
    if bits is None:
        noise = ((magnitude >> drop) & 1) + ((1 << (drop - 1)) - 1)
    else:
        noise = bits >> (32 - drop)
    code = ((magnitude + noise) >> drop) - ((127 - fmt.bias) << fmt.mantissa)
    if fmt.bias < 127:
        units = magnitude.as_float() * 2.0 ** (fmt.bias - 1 + fmt.mantissa)
        whole = units.floor()
        fraction = units - whole
        if bits is None:
            odd = whole - (whole * 0.5).floor() * 2.0
            builder = x.builder
            is_tie = builder.and_(fraction.compare("==", 0.5), odd.compare("==", 1.0))
            is_up = builder.or_(fraction.compare(">", 0.5), is_tie)
        else:
            is_up = fraction.compare(">=", _one_less(bits))
        is_subnormal = magnitude.compare("<", (128 - fmt.bias) << 23)
        rounded = _raised(whole, is_up).where(is_subnormal, 0.0)
        code = rounded.to_integer().where(is_subnormal, code)
    code = code.where(code.compare("<", fmt.max_code), fmt.max_code)
    nan = constant(x.builder, fmt.nan_code, is_float=False)
    code = nan.where(magnitude.compare(">", rounding._INF), code)
    return code | ((raw >> 31) << fmt.sign_bit)


def _one_less(bits: Lanes) -> Lanes:
    """Returns 1 - uniform(bits)."""
    one = constant(bits.builder, 1.0, is_float=True)
    return one - (bits >> 8).to_float() * 2.0**-24


def _raised(whole: Lanes, is_up: ir.Value) -> Lanes:
    return (whole + 1.0).where(is_up, whole)


def _on_grid(x: Lanes, step: Lanes, reciprocal: Lanes, bits: Lanes | None) -> Lanes:
    """See rounding.round_to_grid."""
    builder = x.builder
    zero, one = constant(builder, 0.0, is_float=True), constant(builder, 1.0, is_float=True)
    whole = (x * reciprocal).floor()
    remainder = x - whole * step
    shift = one.where(remainder.compare(">=", step), zero) - one.where(
        remainder.compare("<", 0.0), zero
    )
    whole, remainder = whole + shift, remainder - shift * step
    threshold = step * 0.5 if bits is None else _one_less(bits) * step
    return _raised(whole, remainder.compare(">=", threshold))


def _mixed(x: Lanes) -> Lanes:
    """See random_bits.fmix32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@compiled
def bits_of_row(x, seed0, seed1):
    """Returns the start and the increment of the random bits of row x; see random_bits.seeds_at."""
    return fmix32(U32(x) ^ seed0), fmix32(U32(U32(x) + seed1)) | U32(1)


@intrinsic
def draw_uniform(context, buffer, bound, dim, start, increment):
    """buffer = (2 uniform - 1) * bound, with a row's random bits; see table.initial_rows."""

    def write(builder, buffer, bound, dim, start, increment):
        bounds = lanes.splat(builder, bound)
        starts, increments = lanes.splat(builder, start), lanes.splat(builder, increment)

        def body(block):
            unit = (_bits_of(block, starts, increments) >> 8).to_float() * 2.0**-24
            block.buffer(buffer, (unit * 2.0 - 1.0) * bounds)

        lanes.each_block(builder, dim, body)

    kinds = (types.int64, types.float32, types.int64, types.uint32, types.uint32)
    return lanes._row_function(write, types.void, *kinds)


def _bits_of(block: Block, starts: Lanes, increments: Lanes) -> Lanes:
    """Returns the random bits of a block's columns; see random_bits.bits_of."""
    builder = block.builder
    numbers = constant(builder, list(range(lanes.LANES)), is_float=False)
    first = lanes.splat(builder, builder.trunc(block.first, _WORD))
    return _mixed(starts + (numbers + first) * increments)


def _decoding(fmt: RowFormat) -> Callable:
    bits = fmt.code_bits
    offset = 2 ** (fmt.code_bits - 1) if fmt.symmetric else 0

    @intrinsic
    def decode_codes(context, packed, scale, bias, buffer, dim):
        def write(builder, packed, scale, bias, buffer, dim):
            scales, biases = lanes.splat(builder, scale), lanes.splat(builder, bias)

            def body(block):
                codes = _load_codes(block, packed, bits)
                if fmt.name == "float32":
                    values = codes.as_float()
                elif not fmt.is_integer:
                    values = _decoded_float(codes, rounding.FLOAT_FORMATS[fmt.name])
                    values = values if fmt.scale_dtype is None else values * scales
                else:
                    values = (codes - offset).to_float() * scales
                    values = values if fmt.symmetric else values + biases
                block.buffer(buffer, values)

            lanes.each_block(builder, dim, body)

        kinds = (types.int64, types.float32, types.float32, types.int64, types.int64)
        return lanes._row_function(write, types.void, *kinds)

    return decode_codes


def _encoding(fmt: RowFormat) -> Callable:
    is_random = fmt.rounding == "stochastic" and fmt.name != "float32"
    bits = fmt.code_bits

    @intrinsic
    def encode_codes(context, buffer, scale, bias, packed, dim, start, increment):
        def write(builder, buffer, scale, bias, packed, dim, start, increment):
            scales, biases = lanes.splat(builder, scale), lanes.splat(builder, bias)
            starts, increments = lanes.splat(builder, start), lanes.splat(builder, increment)
            is_scaled = scales.compare(">", 0.0)
            divisor = scales.where(is_scaled, 1.0)
            reciprocal = constant(builder, 1.0, is_float=True) / divisor

            def codes_of(x, noise):
                if fmt.name == "float32":
                    return x.bits()
                if fmt.scale_dtype is None:
                    return _encoded_float(x, rounding.FLOAT_FORMATS[fmt.name], noise)
                if not fmt.is_integer:
                    y = (x / divisor).where(is_scaled, 0.0)
                    return _encoded_float(y, rounding.FLOAT_FORMATS[fmt.name], noise)
                y = (x - biases).where(is_scaled, 0.0)
                y = _on_grid(y, divisor, reciprocal, noise)
                high = 2.0 ** (bits - 1) - 1 if fmt.symmetric else 2.0**bits - 1
                low = -high if fmt.symmetric else 0.0
                y = y.where(y.compare(">", low), low)
                y = y.where(y.compare("<", high), high)
                codes = y.to_integer()
                return codes + 2 ** (bits - 1) if fmt.symmetric else codes

            def body(block):
                noise = _bits_of(block, starts, increments) if is_random else None
                _store_codes(block, packed, codes_of(block.buffered(buffer), noise), bits)

            lanes.each_block(builder, dim, body)

        kinds = (types.int64, types.float32, types.float32, types.int64, types.int64)
        return lanes._row_function(write, types.void, *kinds, types.uint32, types.uint32)

    return encode_codes


@functools.cache
def of(fmt: RowFormat) -> Codec:
    """Returns the codec of a resolved format."""
    read, write, find = _parameters(fmt)
    decode_codes, encode_codes = _decoding(fmt), _encoding(fmt)
    code_bits = np.int64(fmt.code_bits)

    @compiled
    def decode(packed, buffer, dim):
        scale, bias = read(packed + 2 * ((dim * code_bits + 15) // 16))
        decode_codes(packed, scale, bias, buffer, dim)

    @compiled
    def encode(buffer, packed, dim, x, seed0, seed1):
        scale, bias = find(buffer, dim)
        start, increment = bits_of_row(x, seed0, seed1)
        encode_codes(buffer, scale, bias, packed, dim, start, increment)
        write(packed + 2 * ((dim * code_bits + 15) // 16), scale, bias)

    return Codec(decode, encode)
