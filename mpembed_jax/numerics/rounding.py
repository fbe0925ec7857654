"""Stochastic and nearest rounding of float32 to integer grids, narrow floats and stored scales.

All functions use only elementwise integer and float32 arithmetic. They can therefore be traced
inside `jax.jit` and inside a kernel body. The functions are independent of rows and tables. They
take random bits as an argument.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax.numerics.random_bits import uniform


def apart(product: jax.Array, number: jax.Array) -> jax.Array:
    """Returns `product` in a form that no compiler contracts with a later addition.

    Contraction joins a multiplication and an addition into one operation, which does not round the
    product. Whether a compiler contracts depends on how it fuses the program, so two programs might
    give different bits. An optimization barrier does not help, because XLA drops barriers on a CPU.
    This function instead combines the bits of the product with a zero. No compiler can know that
    the value is zero.

    Args:
      product: float32 [..].
      number: int32 or uint32 scalar: any number that the compiler does not know.

    Returns:
      The same float32 [..].
    """
    number = number.astype(jnp.uint32)
    is_never = (number * number) & jnp.uint32(7) == jnp.uint32(5)  # no square is 5 modulo 8
    bits = lax.bitcast_convert_type(product, jnp.uint32) ^ is_never.astype(jnp.uint32)
    return lax.bitcast_convert_type(bits, jnp.float32)


def round_to_integer(x: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Rounds float32 to an integral float32.

    With `bits`, the result is floor(x + u), where u = uniform(bits). Without bits, the result is
    the nearest integer (ties round up). The code does not compute x + u, because float32 rounds
    this sum. The rounded sum could turn an integral x into another integer. The code splits off the
    fraction of x and compares it with 1 - u.
    """
    whole = jnp.floor(x)
    fraction = x - whole
    threshold = jnp.float32(0.5) if bits is None else jnp.float32(1) - uniform(bits)
    return whole + (fraction >= threshold).astype(jnp.float32)


def round_to_grid(x: jax.Array, step: jax.Array, bits: jax.Array | None) -> jax.Array:
    """Rounds x / step to an integral float32, exactly: a grid value `k * step` always gives k.

    Compilers turn the division of an array by a broadcast value into a multiplication by the
    reciprocal, and the product may be off by one ulp. The product therefore serves only to guess
    the integer part k. The fraction comes from the remainder `x - k * step`. The product `k * step`
    is exact, because |k| < 2^8 and step has at most 16 significant bits. The remainder is therefore
    exact, too.

    Args:
      x: float32 [..].
      step: float32, broadcast against x, positive.
      bits: uint32 [..] or None, see round_to_integer.
    """
    reciprocal = jnp.float32(1) / step
    whole = jnp.floor(x * reciprocal)
    remainder = x - whole * step
    shift = (remainder >= step).astype(jnp.float32) - (remainder < 0).astype(jnp.float32)
    whole, remainder = whole + shift, remainder - shift * step
    threshold = jnp.float32(0.5) if bits is None else jnp.float32(1) - uniform(bits)
    return whole + (remainder >= threshold * step).astype(jnp.float32)


class FloatFormat(NamedTuple):
    """A narrow IEEE-like float format with subnormals.

    It has a sign bit, an exponent with the offset `bias`, and a fraction of `mantissa` bits.
    """

    mantissa: int
    bias: int
    max_code: int  # code of the largest finite value
    nan_code: int
    sign_bit: int

    @property
    def max_value(self) -> float:
        """The largest finite value."""
        exponent, fraction = divmod(self.max_code, 1 << self.mantissa)
        return (1 + fraction / (1 << self.mantissa)) * 2.0 ** (exponent - self.bias)


FLOAT_FORMATS = {
    "bfloat16": FloatFormat(7, 127, 0x7F7F, 0x7FC0, 15),
    "float16": FloatFormat(10, 15, 0x7BFF, 0x7E00, 15),
    "float8_e4m3fn": FloatFormat(3, 7, 0x7E, 0x7F, 7),
    "float8_e5m2": FloatFormat(2, 15, 0x7B, 0x7F, 7),
}
_INF = 0x7F800000
_LARGEST = {
    "float32": 3.4e38,
    "bfloat16": 3.3895313892515355e38,
    "float16": 65504.0,
}  # largest scale of each dtype


def _as_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _as_float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def encode_float(x: jax.Array, fmt: FloatFormat, bits: jax.Array | None) -> jax.Array:
    """Rounds float32 to the codes of a narrow float format.

    With bits, rounding is stochastic: it picks one of the two values of the format next to x,
    subnormals included. The probability of a value falls linearly with its distance from x, so
    the mean is x. Without bits, rounding is to nearest, ties to even. A magnitude above the largest
    finite value, also an infinite one, becomes the largest finite value. NaN stays NaN.

    Args:
      x: float32 [..].
      fmt: the target format.
      bits: uint32 [..] or None.

    Returns:
      uint32 [..], the format's bit patterns.
    """
    raw = _as_bits(x)
    magnitude = raw & jnp.uint32(0x7FFFFFFF)
    drop = 23 - fmt.mantissa
    if bits is None:
        noise = jnp.uint32((1 << (drop - 1)) - 1) + ((magnitude >> drop) & jnp.uint32(1))
    else:
        noise = bits >> (32 - drop)
    code = ((magnitude + noise) >> drop) - jnp.uint32((127 - fmt.bias) << fmt.mantissa)
    # bfloat16 has the exponents of float32, so its subnormals round like its normals.
    if fmt.bias < 127:
        units = _as_float(magnitude) * jnp.float32(2.0 ** (fmt.bias - 1 + fmt.mantissa))
        if bits is None:
            whole = jnp.floor(units)
            odd = whole - 2 * jnp.floor(whole * jnp.float32(0.5))
            fraction = units - whole
            subnormal = whole + ((fraction > 0.5) | ((fraction == 0.5) & (odd == 1))).astype(
                jnp.float32
            )
        else:
            subnormal = round_to_integer(units, bits)
        is_subnormal = magnitude < jnp.uint32((128 - fmt.bias) << 23)
        subnormal = jnp.where(is_subnormal, subnormal, jnp.float32(0))
        code = jnp.where(is_subnormal, subnormal.astype(jnp.int32).astype(jnp.uint32), code)
    code = jnp.minimum(code, jnp.uint32(fmt.max_code))
    code = jnp.where(magnitude > jnp.uint32(_INF), jnp.uint32(fmt.nan_code), code)
    return code | ((raw >> 31) << fmt.sign_bit)


def decode_float(code: jax.Array, fmt: FloatFormat) -> jax.Array:
    """Returns the exact float32 values of a narrow float format's bit patterns (uint32 [..])."""
    sign = (code >> fmt.sign_bit) << 31
    magnitude = code & jnp.uint32((1 << fmt.sign_bit) - 1)
    if fmt.bias == 127:
        return _as_float(code << 16)
    normal = _as_float((magnitude << (23 - fmt.mantissa)) + jnp.uint32((127 - fmt.bias) << 23))
    subnormal = magnitude.astype(jnp.int32).astype(jnp.float32) * jnp.float32(
        2.0 ** (1 - fmt.bias - fmt.mantissa)
    )
    value = jnp.where(magnitude < jnp.uint32(1 << fmt.mantissa), subnormal, normal)
    value = jnp.where(magnitude > jnp.uint32(fmt.max_code), np.float32(np.nan), value)
    return _as_float(_as_bits(value) | sign)


def round_up(x: jax.Array, dtype: str) -> jax.Array:
    """Rounds non-negative float32 up to a stored scale of `dtype`; returns float32.

    A stored scale is a bfloat16, a float16, or a float32 with 16 significant bits. Values below the
    smallest normal float32 become 0. Infinities and NaN become NaN.
    """
    raw = _as_bits(x)
    match dtype:
        # With 16 significant bits, code * scale is exact. A compiler may therefore contract this
        # product with an addition without changing the result.
        case "float32":
            rounded = _as_float((raw + jnp.uint32(0xFF)) & jnp.uint32(0xFFFFFF00))
        case "bfloat16":
            rounded = _as_float(
                jnp.minimum(
                    (raw + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.uint32(0x7F7F0000)
                )
            )
        case "float16":
            normal = _as_float((raw + jnp.uint32(0x1FFF)) & jnp.uint32(0xFFFFE000))
            subnormal = jnp.ceil(x * jnp.float32(2.0**24)) * jnp.float32(2.0**-24)
            rounded = jnp.minimum(
                jnp.where(x < jnp.float32(2.0**-14), subnormal, normal), jnp.float32(65504.0)
            )
    rounded = jnp.where(raw < jnp.uint32(0x00800000), jnp.float32(0), rounded)
    return jnp.where(raw >= jnp.uint32(_INF), np.float32(np.nan), rounded)


def grid_step(width: jax.Array, levels: float, dtype: str) -> jax.Array:
    """Returns the smallest scale stored by `dtype` with scale * levels >= width.

    The quotient width / levels gives only a first guess, because compilers may turn a division by
    a constant into a multiplication, and GPUs divide approximately. Comparisons with exact products
    then correct the guess.

    Args:
      width: float32 [..], not negative.
      levels: an integer of at most 8 bits, or the largest value of a float8 format.
      dtype: "float32" (16 significant bits), "bfloat16" or "float16".
    """
    top = jnp.float32(levels)
    scale = round_up(width / top, dtype)
    ulp = {"float32": 0x100, "bfloat16": 0x10000, "float16": 0x2000}[dtype]
    # The maximum keeps the bits of a scale of zero from wrapping around to a NaN.
    below, above = (
        _as_float(jnp.maximum(_as_bits(scale), jnp.uint32(ulp)) - jnp.uint32(ulp)),
        _as_float(_as_bits(scale) + jnp.uint32(ulp)),
    )
    if dtype == "float16":
        quantum = jnp.float32(2.0**-24)
        below = jnp.where(scale > jnp.float32(2.0**-14), below, scale - quantum)
        above = jnp.where(scale >= jnp.float32(2.0**-14), above, scale + quantum)
    is_normal = _as_bits(scale) > jnp.uint32(0x00800000 + ulp)
    scale = jnp.where(is_normal & (below * top >= width), below, scale)
    return jnp.where(
        is_normal & (scale * top < width) & (scale < jnp.float32(_LARGEST[dtype])), above, scale
    )


def round_down(x: jax.Array, dtype: str) -> jax.Array:
    """Rounds float32 of any sign down (towards minus infinity) to a row's bias stored as `dtype`.

    The result is float32; for "float32", it is x. In a narrower dtype, values below the lowest
    finite value become this lowest value.
    """
    raw = _as_bits(x)
    is_negative = (raw >> 31) == 1
    match dtype:
        case "float32":
            return x
        case "bfloat16":
            away = jnp.where(is_negative, jnp.uint32(0xFFFF), jnp.uint32(0))
            rounded = _as_float((raw + away) & jnp.uint32(0xFFFF0000))
            lowest = jnp.float32(-3.3895313892515355e38)
        case "float16":
            away = jnp.where(is_negative, jnp.uint32(0x1FFF), jnp.uint32(0))
            normal = _as_float((raw + away) & jnp.uint32(0xFFFFE000))
            subnormal = jnp.floor(x * jnp.float32(2.0**24)) * jnp.float32(2.0**-24)
            rounded = jnp.minimum(
                jnp.where(jnp.abs(x) < jnp.float32(2.0**-14), subnormal, normal),
                jnp.float32(65504.0),
            )
            lowest = jnp.float32(-65504.0)
    return jnp.where(jnp.isnan(x), x, jnp.maximum(rounded, lowest))


def stochastic_round(x: jax.Array, dtype: str, bits: jax.Array | None) -> jax.Array:
    """Rounds float32 to the values of `dtype`: stochastically with bits, to nearest without.

    Stochastic rounding is unbiased: the mean of the result is x, if x is in the range of `dtype`.

    Args:
      x: float32 [..].
      dtype: a key of FLOAT_FORMATS, or "float32" (the identity).
      bits: uint32 [..] or None.

    Returns:
      float32 [..] with values that `dtype` represents exactly.
    """
    if dtype == "float32":
        return x
    fmt = FLOAT_FORMATS[dtype]
    return decode_float(encode_float(x, fmt, bits), fmt)
