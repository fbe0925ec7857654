"""The reference for reading packed rows on the host, in NumPy.

Codes of at most 8 bits are decoded a byte at a time, by a table of 256 entries. The idea is that of
DeepGEMM. The values are those of `numerics.packing.decode`, bit for bit: the product of code and
scale is exact, so only the addition of the bias rounds.
"""

import functools

import ml_dtypes
import numpy as np

from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.row_ids import NO_ID

BLOCK = 65536  # positions whose rows are decoded at once


@functools.cache
def byte_table(fmt: RowFormat) -> np.ndarray:
    """Returns the values of the codes in each byte, float32 [256, codes per byte], without scale.

    The code in the lowest bits comes first. The format is resolved, and its codes have at most 8
    bits.
    """
    byte = np.arange(256, dtype=np.uint8)
    if not fmt.is_integer:
        return byte.view(getattr(ml_dtypes, fmt.name)).astype(np.float32)[:, None]
    bits = fmt.code_bits
    codes = (byte[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    offset = np.float32(2 ** (bits - 1) if fmt.symmetric else 0)
    return codes.astype(np.float32) - offset


def decode(packed: np.ndarray, fmt: RowFormat, dim: int) -> np.ndarray:
    """Returns the values of packed rows, float32 [n, D].

    Args:
      packed: uint16 or uint32 [n, words].
      fmt: the format, resolved (see RowFormat.resolve).
      dim: D.
    """
    num_rows = len(packed)
    row = np.ascontiguousarray(packed).view(np.uint8).reshape(num_rows, fmt.row_bytes(dim))
    codes = row[:, : -(-dim * fmt.code_bits // 8)]
    match fmt.code_bits:
        case 32:
            return np.ascontiguousarray(codes).view(np.float32)
        case 16:
            halves = np.ascontiguousarray(codes).view(np.uint16)
            if fmt.name == "float16":
                return halves.view(np.float16).astype(np.float32)
            return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = byte_table(fmt)[codes]
    values = values.reshape(num_rows, codes.shape[1] * values.shape[2])[:, :dim]
    scale, bias = parameters(row, fmt, dim)
    values = values * scale
    if fmt.symmetric is False:
        values += bias
    return values


def parameters(row: np.ndarray, fmt: RowFormat, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scale and the bias of rows, float32 [n, 1] each; the bias is 0 if there is none.

    Args:
      row: uint8 [n, bytes], the bytes of packed rows.
      fmt: resolved. It has a scale.
      dim: D.
    """
    width = 4 if fmt.scale_dtype == "float32" else 2
    start = fmt.row_bytes(dim) - 2 * fmt.metadata_halves(dim)
    scale = _parameter(row[:, start : start + width], fmt)
    if fmt.symmetric is not False:
        return scale, np.zeros_like(scale)
    return scale, _parameter(row[:, start + width : start + 2 * width], fmt)


def _parameter(stored: np.ndarray, fmt: RowFormat) -> np.ndarray:
    """Returns a scale or bias as float32 [n, 1], from its bytes (uint8 [n, 2 or 4])."""
    stored = np.ascontiguousarray(stored)
    match fmt.scale_dtype:
        case "float32":
            return stored.view(np.float32)
        case "float16":
            return stored.view(np.float16).astype(np.float32)
        case _:
            return (stored.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def take(packed: np.ndarray, fmt: RowFormat, dim: int, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the rows of ids, and how many ids are outside the table.

    Args:
      packed: uint16 or uint32 [V, words].
      fmt: resolved.
      dim: D.
      ids: integers [N]. NO_ID is padding, which reads as zeros and is not counted.

    Returns:
      float32 [N, D] and a count. Ids outside the table read as zeros.
    """
    is_row = (ids >= 0) & (ids < len(packed))
    rows = np.zeros((len(ids), dim), np.float32)
    for first in range(0, len(ids), BLOCK):
        here = slice(first, first + BLOCK)
        rows[here][is_row[here]] = decode(packed[ids[here][is_row[here]]], fmt, dim)
    return rows, int(np.count_nonzero(~is_row & (ids != NO_ID)))


def bag(
    packed: np.ndarray,
    fmt: RowFormat,
    dim: int,
    ids: np.ndarray,
    offsets: np.ndarray,
    weights: np.ndarray | None,
    combiner: str,
) -> tuple[np.ndarray, int]:
    """Returns one vector for each bag of ids, and how many ids are outside the table.

    The vector is the sum of `factor * row`, added in float32 in the order of the bag's positions. A
    factor is the weight. For "mean" and "sqrtn", it is divided by the bag's divisor (see
    pooling.pool). Padding and ids outside the table count neither in the sum nor in the divisor. If
    the divisor is 0, the vector is zero.

    Args:
      packed: uint16 or uint32 [V, words].
      fmt: resolved.
      dim: D.
      ids: integers [N]. NO_ID is padding.
      offsets: int64 [B + 1], ascending: bag b has the positions offsets[b] to offsets[b + 1] - 1.
      weights: float32 [N]; None: all are 1.
      combiner: "sum", "mean" or "sqrtn".

    Returns:
      float32 [B, D] and a count.
    """
    is_row = (ids >= 0) & (ids < len(packed))
    num_bags = len(offsets) - 1
    out = np.zeros((num_bags, dim), np.float32)
    length = np.diff(offsets)
    total = np.zeros(num_bags, np.float32)
    given = np.ones(len(ids), np.float32) if weights is None else weights
    given = np.where(is_row, given, np.float32(0))
    longest = range(int(length.max(initial=0)))
    if combiner != "sum":
        for turn in longest:
            (bags,) = np.nonzero(length > turn)
            weight = given[offsets[bags] + turn]
            total[bags] += weight if combiner == "mean" else weight * weight
        total = total if combiner == "mean" else np.sqrt(total)
    divisor = np.where(total != 0, total, np.float32(1))
    for turn in longest:
        (bags,) = np.nonzero(length > turn)
        bags = bags[is_row[offsets[bags] + turn]]
        place = offsets[bags] + turn
        factor = given[place]
        if combiner != "sum":
            factor = np.where(total[bags] != 0, factor / divisor[bags], np.float32(0))
        out[bags] += factor[:, None] * decode(packed[ids[place]], fmt, dim)
    return out, int(np.count_nonzero(~is_row & (ids != NO_ID)))
