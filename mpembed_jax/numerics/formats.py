"""Row formats: the scale, bias and codes that represent one float32 embedding row.

An integer row is `codes * scale`, or `codes * scale + bias` in formats with a bias. A float8 row is
`codes * scale`. The scale and the bias are one number each per row. Rows of wider floats have
neither. `packing` stores the row as `[codes | scale | bias]` in uint16 or uint32 words, so that one
memory access reads all of it. The layout resembles FBGEMM's row-wise quantized tables. The
symmetric formats with a bfloat16 scale, the packing into words and the rounding rules are this
library's own. The elementwise functions `quantize` and `dequantize` can also be traced inside a
kernel body.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax.numerics import rounding

_INT_BITS = {"int8": 8, "int4": 4, "int2": 2}
_CODE_BITS = {
    **_INT_BITS,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "bfloat16": 16,
    "float16": 16,
    "float32": 32,
}
_SCALE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """The storage format of one row.

    Attributes:
      name: "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4" or
        "int2".
      symmetric: for integer formats only. True: a row has a scale, and its grid is symmetric about
        zero; a code is stored with 2^(bits - 1) added. False: a row has a scale and a bias, and its
        codes count from the bias, the rounded minimum of the row. None: True if embedding_dim < 32
        and the format is not int2, else False. A bias would take a large part of a narrow row.
      scale_dtype: "bfloat16" (default), "float16" or "float32"; for integer and float8 formats
        only.
      rounding: "stochastic" or "nearest": how values become codes whenever a row is written to the
        table, initial values included. float32 rows are not rounded.

    Raises:
      ValueError: if the name is unknown, if an option has an unknown value, or if the format does
        not have the option.
    """

    name: str = "int8"
    symmetric: bool | None = None
    scale_dtype: str | None = None
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        if self.name not in _CODE_BITS:
            raise ValueError(
                f"unknown row format {self.name!r}; choose one of {', '.join(_CODE_BITS)}"
            )
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f'rounding must be "stochastic" or "nearest", got {self.rounding!r}')
        if self.symmetric is not None and self.name not in _INT_BITS:
            raise ValueError(
                f"symmetric= applies to int8, int4 and int2 only, not to {self.name}; leave it out"
            )
        if self.scale_dtype is not None and self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype must be one of {', '.join(_SCALE_DTYPES)}, got {self.scale_dtype!r}"
            )
        if self.scale_dtype is not None and not (self.is_integer or self.name.startswith("float8")):
            raise ValueError(f"{self.name} rows have no scale; leave scale_dtype out")

    @property
    def is_integer(self) -> bool:
        """Whether the codes are integers on a grid with one step per row."""
        return self.name in _INT_BITS

    @property
    def code_bits(self) -> int:
        """Bits per element."""
        return _CODE_BITS[self.name]

    def resolve(self, embedding_dim: int) -> "RowFormat":
        """Returns the resolved format: each None is replaced by the default for this embedding dim.

        An option that the format does not have stays None.
        """
        if self.is_integer:
            symmetric = (
                (embedding_dim < 32 and self.name != "int2")
                if self.symmetric is None
                else self.symmetric
            )
            return dataclasses.replace(
                self, symmetric=symmetric, scale_dtype=self.scale_dtype or "bfloat16"
            )
        if self.name.startswith("float8"):
            return dataclasses.replace(self, scale_dtype=self.scale_dtype or "bfloat16")
        return self

    def metadata_halves(self, embedding_dim: int) -> int:
        """Returns the number of 16-bit halves that the scale and bias of a row take."""
        fmt = self.resolve(embedding_dim)
        if fmt.scale_dtype is None:
            return 0
        return (2 if fmt.scale_dtype == "float32" else 1) * (2 if fmt.symmetric is False else 1)

    def word_bits(self, embedding_dim: int) -> int:
        """Returns 32 if the size of the unpadded row is a multiple of 4 bytes, else 16."""
        bits = embedding_dim * self.code_bits + 16 * self.metadata_halves(embedding_dim)
        return 32 if bits % 32 == 0 else 16

    def word_dtype(self, embedding_dim: int) -> np.dtype:
        """Returns the dtype of a packed row's words."""
        return np.dtype(np.uint32 if self.word_bits(embedding_dim) == 32 else np.uint16)

    def row_words(self, embedding_dim: int) -> int:
        """Returns the number of words in a packed row."""
        return self.row_bytes(embedding_dim) * 8 // self.word_bits(embedding_dim)

    def row_bytes(self, embedding_dim: int) -> int:
        """Returns the number of bytes in a packed row, including metadata and padding."""
        return 2 * (-(-embedding_dim * self.code_bits // 16) + self.metadata_halves(embedding_dim))


def as_format(fmt: "RowFormat | str") -> RowFormat:
    """Returns the RowFormat for a RowFormat or a format's name.

    Raises:
      TypeError: if `fmt` is neither.
      ValueError: if the name is unknown.
    """
    if isinstance(fmt, RowFormat):
        return fmt
    if isinstance(fmt, str):
        return RowFormat(fmt)
    raise TypeError(
        f'a row format is a RowFormat or a name such as "int8", got {type(fmt).__name__}'
    )


def row_parameters(x: jax.Array, fmt: RowFormat) -> tuple[jax.Array, jax.Array]:
    """Returns the stored scale and bias (float32 [.., 1] each) of float32 rows [.., D].

    `fmt` is a resolved format. A scale or bias that it does not have is zero. The bias is rounded
    down first. The scale is then computed from the rounded bias and rounded up. In the opposite
    order, a quarter of the rows would not fit their grid.
    """
    if fmt.scale_dtype is None:
        zero = jnp.zeros((*x.shape[:-1], 1), jnp.float32)
        return zero, zero
    low = jnp.min(x, axis=-1, keepdims=True) if fmt.symmetric is False else None
    return parameters_of(
        low, jnp.max(x if low is not None else jnp.abs(x), axis=-1, keepdims=True), fmt
    )


def parameters_of(
    low: jax.Array | None, high: jax.Array, fmt: RowFormat
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and bias of rows whose elements lie in [low, high].

    All are float32 [.., 1]. If low is None, the elements have magnitudes of at most high, and the
    bias is zero. The format is resolved and has a scale.
    """
    dtype = fmt.scale_dtype or "float32"
    if low is not None:
        bias = rounding.round_down(low, dtype)
        return rounding.grid_step(_saturated(high - bias, high), 2**fmt.code_bits - 1, dtype), bias
    top = (
        2.0 ** (fmt.code_bits - 1) - 1
        if fmt.is_integer
        else rounding.FLOAT_FORMATS[fmt.name].max_value
    )
    return rounding.grid_step(_saturated(high, high), top, dtype), jnp.zeros_like(high)


def _saturated(width: jax.Array, extreme: jax.Array) -> jax.Array:
    """Returns the width of a row's range, clamped to [0, 3.3e38].

    If the row's extreme is infinite or NaN, the result is that extreme, and the scale becomes NaN.
    """
    return jnp.where(jnp.isfinite(extreme), jnp.clip(width, 0, 3.3e38), extreme)


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """Returns x / divisor (float32, shape of x), correctly rounded.

    Without the barrier, XLA multiplies by the reciprocal, which moves grid points off the grid.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(divisor, x.shape))


def quantize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    fmt: RowFormat,
    bits: jax.Array | None,
    divide: Callable[[jax.Array, jax.Array], jax.Array] = divide,
) -> jax.Array:
    """Returns the codes (uint32, shape of x) of float32 `x` in a resolved format.

    The codes of float32 are its bit patterns. In all other formats, values are rounded, and clamped
    to the finite range of the codes. In a format without a scale, NaN stays NaN. In a format with a
    scale, a row with NaN has the scale NaN, so all of it decodes to NaN.

    Args:
      x: float32 [.., D].
      scale: float32, broadcast against x.
      bias: float32, broadcast against x.
      fmt: a resolved format.
      bits: uint32, shape of x, for stochastic rounding; None rounds to nearest.
      divide: a correctly rounded division. A kernel passes its own if its compiler's division is
        approximate.
    """
    if fmt.name == "float32":
        return lax.bitcast_convert_type(x, jnp.uint32)
    if fmt.scale_dtype is None:
        return rounding.encode_float(x, rounding.FLOAT_FORMATS[fmt.name], bits)
    # If the scale is 0, all elements of the row are zero, or equal to the bias if there is one.
    divisor = jnp.where(scale > 0, scale, jnp.float32(1))
    if not fmt.is_integer:
        y = jnp.where(scale > 0, divide(x, divisor), jnp.float32(0))
        return rounding.encode_float(y, rounding.FLOAT_FORMATS[fmt.name], bits)
    y = rounding.round_to_grid(jnp.where(scale > 0, x - bias, jnp.float32(0)), divisor, bits)
    if fmt.symmetric:
        top = 2 ** (fmt.code_bits - 1) - 1
        return (jnp.clip(y, -top, top).astype(jnp.int32) + (top + 1)).astype(jnp.uint32)
    return jnp.clip(y, 0, 2**fmt.code_bits - 1).astype(jnp.int32).astype(jnp.uint32)


def dequantize(codes: jax.Array, scale: jax.Array, bias: jax.Array, fmt: RowFormat) -> jax.Array:
    """Returns the float32 values of uint32 codes in a resolved format.

    Scale and bias are float32 and are broadcast against the codes. The product codes * scale is
    exact. A compiler that contracts it with the addition therefore does not change the result.
    """
    if fmt.name == "float32":
        return lax.bitcast_convert_type(codes, jnp.float32)
    if not fmt.is_integer:
        values = rounding.decode_float(codes, rounding.FLOAT_FORMATS[fmt.name])
        return values if fmt.scale_dtype is None else values * scale
    signed = codes.astype(jnp.int32)
    if fmt.symmetric:
        return (signed - 2 ** (fmt.code_bits - 1)).astype(jnp.float32) * scale
    return signed.astype(jnp.float32) * scale + bias


def parameter_halves(scale: jax.Array, bias: jax.Array, fmt: RowFormat) -> list[jax.Array]:
    """Returns the 16-bit halves of scale and bias (float32) that are stored after the codes.

    Each half is a uint32 array of the shape of the scale. A float32 number has two halves, and the
    low one comes first. A number of 16 bits has one half. The halves of the scale come before those
    of the bias. If the format has no bias, only the halves of the scale are returned. The format is
    resolved and has a scale.
    """
    dtype = fmt.scale_dtype or "float32"
    return _halves(scale, dtype) + (_halves(bias, dtype) if fmt.symmetric is False else [])


def parameters_from(halves: list[jax.Array], fmt: RowFormat) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and bias (float32) that `parameter_halves` stored.

    If the format has no bias, the bias is zero.
    """
    dtype = fmt.scale_dtype or "float32"
    width = 2 if dtype == "float32" else 1
    scale = _from_halves(halves[:width], dtype)
    return scale, _from_halves(halves[width:], dtype) if fmt.symmetric is False else jnp.zeros_like(
        scale
    )


def _halves(value: jax.Array, dtype: str) -> list[jax.Array]:
    raw = lax.bitcast_convert_type(value, jnp.uint32)
    match dtype:
        case "float32":
            return [raw & jnp.uint32(0xFFFF), raw >> 16]
        case "bfloat16":
            return [raw >> 16]
        case _:
            return [rounding.encode_float(value, rounding.FLOAT_FORMATS["float16"], None)]


def _from_halves(halves: list[jax.Array], dtype: str) -> jax.Array:
    match dtype:
        case "float32":
            return lax.bitcast_convert_type(halves[0] | (halves[1] << 16), jnp.float32)
        case "bfloat16":
            return lax.bitcast_convert_type(halves[0] << 16, jnp.float32)
        case _:
            return rounding.decode_float(halves[0], rounding.FLOAT_FORMATS["float16"])
