"""One embedding row at a time, bit by bit.

The row formats of DESIGN.md 6 in NumPy and exact fractions. A `Codec` encodes a row to its packed
words and back. `round_float` rounds to a floating format. They are slow and obvious, and
independent of the package and of jax.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import numpy as np

F32 = np.float32


class Float(NamedTuple):
    """A floating format."""

    mantissa: int  # bits
    least: int  # the exponent of the smallest normal number
    largest: float  # the largest finite value


FLOATS = {
    "bfloat16": Float(7, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "float16": Float(10, -14, 65504.0),
    "float8_e4m3fn": Float(3, -6, 448.0),
    "float8_e5m2": Float(2, -14, 57344.0),
}
CODE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
CODE_BITS |= {"int8": 8, "int4": 4, "int2": 2}
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, None) or name) for name in [*FLOATS, "float32"]}


def uniform(bits):
    """u in [0, 1) from the top 24 bits of a random word."""
    return (np.asarray(bits, np.uint32) >> np.uint32(8)) * 2.0**-24


def towards(x, dtype, sign):
    """The neighbour of the real number x in dtype that is not on the wrong side.

    Sign +1 is up, -1 is down. The neighbour is finite.
    """
    dtype = np.dtype(dtype)
    raw = np.dtype(f"u{dtype.itemsize}")
    limit = float(ml_dtypes.finfo(dtype).max) if dtype != F32 else float(np.finfo(F32).max)
    y = np.array(np.clip(float(x), -limit, limit), dtype)
    while (Fraction(float(y)) - Fraction(x)) * sign < 0 and float(y) != sign * limit:
        if float(y) == 0:  # the smallest subnormal of that sign
            pattern = 1 if sign > 0 else 1 | 1 << (8 * dtype.itemsize - 1)
        else:
            pattern = int(y.view(raw)) + (1 if (float(y) > 0) == (sign > 0) else -1)
        y = np.array(pattern, raw).view(dtype)
    return y


def round_float(x, name, bits=None):
    """Real numbers rounded into a floating format, as f32.

    To nearest even without bits, stochastically with them. The gap between neighbours halves with
    the exponent down to the smallest normal's. In float64 all of it is exact.
    """
    mantissa, least, limit = FLOATS[name]
    size = np.abs(np.asarray(x, np.float64))
    gap = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(size, 2.0**least))), least) - mantissa)
    steps = np.rint(size / gap) if bits is None else np.floor(size / gap + uniform(bits))
    return np.copysign(np.minimum(steps * gap, limit), x).astype(F32)


@dataclass(frozen=True)
class Codec:
    """One row <-> its 16-bit halves, lowest first: codes, then scale, then bias."""

    name: str
    symmetric: bool = True
    scale: str = "bfloat16"

    @property
    def bits(self):
        return CODE_BITS[self.name]

    @property
    def is_int(self):
        return self.name.startswith("int")

    @property
    def metadata_bytes(self):
        if not (self.is_int or self.name.startswith("float8")):
            return 0
        return DTYPES[self.scale].itemsize * (1 if self.symmetric or not self.is_int else 2)

    def word_dtype(self, dim):
        return np.dtype(
            np.uint32 if (dim * self.bits + 8 * self.metadata_bytes) % 32 == 0 else np.uint16
        )

    def row_words(self, dim):
        halves = -(-dim * self.bits // 16) + self.metadata_bytes // 2
        return halves * 2 // self.word_dtype(dim).itemsize

    def grid(self, row):
        """(scale, bias) of a row as the format stores them.

        The smallest scale whose top code reaches the row's extreme.
        """
        row = np.asarray(row, F32)
        bias, top = F32(0), np.max(np.abs(row))
        if self.is_int and not self.symmetric:
            bias = F32(float(towards(float(np.min(row)), DTYPES[self.scale], -1)))
            top = np.max(row) - bias
        steps = 2 ** (self.bits - self.symmetric) - 1 if self.is_int else FLOATS[self.name].largest
        return self.scale_up(Fraction(float(top)) / Fraction(steps)), bias

    def scale_up(self, wanted):
        scale = F32(float(towards(wanted, DTYPES[self.scale], +1)))
        if self.scale == "float32":  # 16 significant bits
            scale = ((scale.view(np.uint32) + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)).view(F32)
        return scale if scale >= 2.0**-126 else F32(0)

    def codes(self, row, bits, scale, bias):
        """The stored codes of a row, as non-negative integers, given its stored scale and bias."""
        row = np.asarray(row, F32)
        if self.name == "float32":
            return row.view(np.uint32)
        if not self.is_int:
            if self.metadata_bytes:
                row = row.astype(np.float64) / scale if scale else np.zeros_like(row)
            value = round_float(row, self.name, bits).astype(DTYPES[self.name])
            return value.view(f"u{self.bits // 8}").astype(np.uint32)
        u = 0.5 if bits is None else uniform(bits)
        low, high, zero = 0, 2**self.bits - 1, 0
        if self.symmetric:
            high = 2 ** (self.bits - 1) - 1
            low, zero = -high, 2 ** (self.bits - 1)
        code = (
            np.floor((row - bias).astype(np.float64) / scale + u) if scale else np.zeros_like(row)
        )
        return (np.clip(code, low, high) + zero).astype(np.uint32)

    def pack(self, codes, scale, bias):
        """codes u32 [D] -> words."""
        stream = sum(int(c) << i * self.bits for i, c in enumerate(codes))
        size = -(-len(codes) * self.bits // 16) * 16
        for value in (
            [scale, bias][: 2 if self.is_int and not self.symmetric else 1]
            if self.metadata_bytes
            else []
        ):
            stored = np.array(value, DTYPES[self.scale])
            stream |= int(stored.view(f"u{stored.itemsize}")) << size
            size += 8 * stored.itemsize
        return np.frombuffer(
            stream.to_bytes(size // 8, "little"), self.word_dtype(len(codes)).newbyteorder("<")
        )

    def unpack(self, words, dim):
        """words -> (codes u32 [D], scale, bias)."""
        stream = int.from_bytes(np.ascontiguousarray(words).tobytes(), "little")
        codes = np.array(
            [stream >> i * self.bits & (1 << self.bits) - 1 for i in range(dim)], np.uint32
        )
        at = -(-dim * self.bits // 16) * 16
        values = [F32(1), F32(0)]
        dtype = DTYPES[self.scale]
        for k in range(self.metadata_bytes // dtype.itemsize):
            raw = np.array(stream >> at & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
            values[k] = F32(raw.view(dtype))
            at += 8 * dtype.itemsize
        return codes, *values

    def encode(self, row, bits=None):
        scale, bias = self.grid(row) if self.metadata_bytes else (F32(1), F32(0))
        return self.pack(self.codes(row, bits, scale, bias), scale, bias)

    def decode(self, words, dim):
        codes, scale, bias = self.unpack(words, dim)
        if self.is_int:
            value = codes.astype(F32) - F32(2 ** (self.bits - 1) if self.symmetric else 0)
        else:
            dtype = DTYPES[self.name]
            value = codes.astype(f"u{dtype.itemsize}").view(dtype).astype(F32)
        return value * scale + bias

    def store(self, row, bits=None):
        """A row after one trip through the table, rounded to nearest without bits."""
        return self.decode(self.encode(row, bits), len(row))
