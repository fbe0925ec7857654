"""Hashes of raw ids: integers, bytes and strings of any column, as pairs of 32-bit words.

The value of an integer is the integer modulo 2^64. The value of bytes is their XXH64 with seed 0,
and that of a string is XXH64 of its UTF-8 bytes. XXH64 of the table's name is added to the value.
The finalizer of splitmix64, a bijection, mixes the sum. So two integers of one table never have the
same 64 bits. The results are the same on any machine, in any process and version, and the same on
the host as under jit.

A pair is [tag, place]. The tag is the high word. The place is the low word, whose last TABLE_BITS
bits are replaced by the number of the table. Padding is [PADDING, PADDING]. No id has the tag
PADDING.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import row_ids

PADDING = 0xFFFFFFFF
TABLE_BITS = 10
MAX_TABLES = 1 << TABLE_BITS
NUMBER = np.uint32(MAX_TABLES - 1)  # the bits of a place that are the number of the table
_BLOCK = 1 << 14  # values hashed at once; their intermediate results stay in a core's cache
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64
_SHIFTS = (30, 27, 31)
_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(p)
    for p in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)


def salt(table: str) -> int:
    """Returns the 64-bit number that is added to the values of a table: XXH64 of its name."""
    name = np.frombuffer(table.encode(), np.uint8)
    return int(_xxh64(name[None])[0])


# --- on the host


def of_column(values: Any, table: str, number: int) -> np.ndarray:
    """Returns the pairs of a host column's raw ids.

    None, nulls of Arrow and masked entries of NumPy's masked arrays are padding.

    Args:
      values: integers, or bytes and strings: a NumPy array [..], also of dtype object; a list [..];
        or a column [n] of Arrow or polars.
      table: the name of the table.
      number: the table's number in the stack, below MAX_TABLES.

    Returns:
      uint32 [.., 2].

    Raises:
      TypeError: if the values are neither integers nor bytes nor strings, if integers are
        mixed with bytes or strings, or if the values are a list of masked arrays.
    """
    if hasattr(values, "to_arrow"):
        values = values.to_arrow()
    if type(values).__module__.split(".")[0] == "pyarrow":
        words, is_real = _of_arrow(values)
        shape: tuple[int, ...] = words.shape
    else:
        mask = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
        array = as_array(values)
        shape = array.shape
        words, is_real = _of_array(array.reshape(-1))
        if mask is not None:
            is_real = ~mask.reshape(-1) if is_real is None else is_real & ~mask.reshape(-1)
    result = np.empty((words.size, 2), np.uint32)
    shift = np.uint64(salt(table))
    for first in range(0, words.size, _BLOCK):
        part = slice(first, first + _BLOCK)
        mixed = words[part] + shift
        for down, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
            mixed ^= mixed >> np.uint64(down)
            mixed *= np.uint64(multiplier)
        tag = (mixed >> np.uint64(32)).astype(np.uint32)
        place = mixed.astype(np.uint32)
        place &= np.uint32(~(MAX_TABLES - 1) & 0xFFFFFFFF)
        place |= np.uint32(number)
        result[part, 0] = np.minimum(tag, np.uint32(PADDING - 1))
        result[part, 1] = place
    if is_real is not None:
        result[~is_real] = PADDING
    return result.reshape(*shape, 2)


def as_array(values: Any) -> np.ndarray:
    """Returns raw ids as an array that keeps their values and types.

    NumPy alone would change some lists. Integers among strings would become strings. Bytes would
    lose zeros at their end. If some integers are below 2**63 and some are not, all would become
    floats.

    Raises:
      TypeError: if the raw ids are a list of masked arrays.
      ValueError: if they are lists of different lengths.
    """
    row_ids.check_list(values)
    if isinstance(values, np.ndarray):
        return np.asarray(values)  # without its mask
    first = values
    while isinstance(first, list | tuple) and first:
        first = first[0]
    # An array of strings would have the width of the longest for each of them.
    is_text = first is None or isinstance(first, str | bytes)
    try:
        array = np.asarray(values, object if is_text else None)
        if array.dtype.kind in "SUf":
            array = np.asarray(values, object)
        is_ragged = array.dtype == object and array.size and isinstance(array.flat[0], list | tuple)
    except ValueError:
        is_ragged = True
    if is_ragged:
        raise ValueError("raw ids are lists of different lengths; pad the shorter ones with None")
    return array


def _of_array(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns 64-bit words of a flat array, and which entries are ids (None: all)."""
    kind = flat.dtype.kind
    if kind == "T":  # NumPy's strings of any length
        flat = flat.astype(object)
        kind = "O"
    if kind in "iu":
        wide = flat.astype(np.int64 if kind == "i" else np.uint64)
        return wide.view(np.uint64), None
    if kind == "S":
        return _of_fixed(flat), None
    if kind == "U":
        return _of_unicode(flat), None
    if kind == "O":
        return _of_objects(flat.tolist())
    if not flat.size:
        return np.zeros(0, np.uint64), None
    raise TypeError(
        f"raw ids must be integers, bytes or strings, got an array of {flat.dtype}; cast it first"
    )


def _of_objects(items: list) -> tuple[np.ndarray, np.ndarray | None]:
    kinds = set(map(type, items))
    is_real = None
    if type(None) in kinds:
        kinds.discard(type(None))
        is_real = np.fromiter((item is not None for item in items), bool, len(items))
    if all(issubclass(kind, str | bytes) for kind in kinds):
        if is_real is not None:
            items = [b"" if item is None else item for item in items]
        elif kinds == {str} and (text := "".join(items)).isascii():
            return _of_ragged(
                text.encode(), np.fromiter(map(len, items), np.int64, len(items))
            ), None
        items = [item.encode() if isinstance(item, str) else item for item in items]
        lengths = np.fromiter(map(len, items), np.int64, len(items))
        return _of_ragged(b"".join(items), lengths), is_real
    is_integer = all(
        issubclass(kind, int | np.integer) and not issubclass(kind, bool) for kind in kinds
    )
    if not is_integer:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(
            "raw ids must be all integers, or all bytes and strings, and None for padding; got "
            f"objects of the types {names}"
        )
    words = [0 if item is None else int(item) for item in items]
    outside = [word for word in words if not -(2**63) <= word < 2**64]
    if outside:
        raise TypeError(f"raw ids must fit 64 bits, got {outside[0]}; pass it as a string")
    return np.fromiter((word & (2**64 - 1) for word in words), np.uint64, len(words)), is_real


def _of_fixed(flat: np.ndarray) -> np.ndarray:
    """Returns XXH64 of NumPy's bytes of a fixed width, without the zeros at their end."""
    width = flat.dtype.itemsize
    matrix = np.ascontiguousarray(flat).view(np.uint8).reshape(flat.size, width)
    return _of_matrix(matrix, np.char.str_len(flat))


def _of_unicode(flat: np.ndarray) -> np.ndarray:
    width = flat.dtype.itemsize // 4
    codes = np.ascontiguousarray(flat.astype(flat.dtype.newbyteorder("="), copy=False)).view(
        np.uint32
    )
    codes = codes.reshape(flat.size, width)
    matrix = codes.astype(np.uint8)
    words = _of_matrix(matrix, np.char.str_len(flat))
    if codes.size and codes.max() >= 128:
        is_wide = (codes >= 128).any(axis=1)
        words[is_wide] = _of_objects(flat[is_wide].tolist())[0]
    return words


def _of_matrix(matrix: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns XXH64 (uint64 [n]) of the first `lengths` bytes of each row of uint8 [n, width]."""
    words = np.empty(len(matrix), np.uint64)
    for first in range(0, len(matrix), _BLOCK):
        part = slice(first, first + _BLOCK)
        of_length = lengths[part]
        for length in np.unique(of_length):
            rows = of_length == length
            words[part][rows] = _xxh64(matrix[part][rows, :length])
    return words


def _of_ragged(data: Any, lengths: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """Returns XXH64 (uint64 [n]) of strings that lie one after another.

    Args:
      data: their bytes.
      lengths: int64 [n].
      offsets: int64 [n], where each begins; None: one after another.
    """
    held = np.frombuffer(data, np.uint8)
    if offsets is None:
        offsets = np.cumsum(lengths) - lengths
    words = np.empty(len(lengths), np.uint64)
    for first in range(0, len(lengths), _BLOCK):
        part = slice(first, first + _BLOCK)
        of_length, start = lengths[part], offsets[part]
        for length in np.unique(of_length):
            rows = np.flatnonzero(of_length == length)
            if length == 0:
                words[part][rows] = _xxh64(np.zeros((len(rows), 0), np.uint8))
                continue
            windows = np.lib.stride_tricks.sliding_window_view(held, int(length))
            words[part][rows] = _xxh64(windows[start[rows]])
    return words


def _of_arrow(column: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    if str(column.type).startswith("dictionary"):
        column = column.dictionary_decode()
    kind = str(column.type)
    if kind == "null":
        return np.zeros(len(column), np.uint64), np.zeros(len(column), bool)
    is_real = None
    if column.null_count:
        is_real = ~column.is_null().to_numpy(zero_copy_only=False)
    if kind.rstrip("0123456789") in ("int", "uint"):
        filled = column.fill_null(0) if column.null_count else column
        return _of_array(filled.to_numpy(zero_copy_only=False))[0], is_real
    if not any(kind.startswith(p) for p in ("string", "large_string", "binary", "large_binary")):
        raise TypeError(
            f"raw ids must be integers, bytes or strings, got a column of {kind}; cast it first "
            "(for a column of lists, pass its flattened values)"
        )
    column = column.cast("large_binary")
    _, offsets, data = column.buffers()
    if not len(column):
        return np.zeros(0, np.uint64), is_real
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(ends)
    if is_real is not None:
        lengths = np.where(is_real, lengths, 0)
    return _of_ragged(b"" if data is None else data, lengths, ends[:-1]), is_real


def _rotated(words: np.ndarray, left: int) -> np.ndarray:
    return (words << np.uint64(left)) | (words >> np.uint64(64 - left))


def _round(words: np.ndarray, lane: np.ndarray) -> np.ndarray:
    return _rotated(words + lane * _P2, 31) * _P1


def _xxh64(rows: np.ndarray) -> np.ndarray:
    """Returns XXH64 with seed 0 (uint64 [n]) of the rows of uint8 [n, length]."""
    num, length = rows.shape

    def lane(first: int, kind: str, size: int) -> np.ndarray:
        lanes = np.ascontiguousarray(rows[:, first : first + size]).view(kind)[:, 0]
        return lanes.astype(np.uint64)

    zeros = np.zeros(num, np.uint64)
    done = 0
    words = zeros + _P5
    if length >= 32:
        states = [zeros + _P1 + _P2, zeros + _P2, zeros, zeros - _P1]
        while done + 32 <= length:
            for index in range(4):
                states[index] = _round(states[index], lane(done + 8 * index, "<u8", 8))
            done += 32
        turns = (1, 7, 12, 18)
        words = sum((_rotated(s, t) for s, t in zip(states, turns, strict=True)), zeros)
        for state in states:
            words = (words ^ _round(zeros, state)) * _P1 + _P4
    words = words + np.uint64(length)
    while done + 8 <= length:
        words = _rotated(words ^ _round(zeros, lane(done, "<u8", 8)), 27) * _P1 + _P4
        done += 8
    if done + 4 <= length:
        words = _rotated(words ^ lane(done, "<u4", 4) * _P1, 23) * _P2 + _P3
        done += 4
    while done < length:
        words = _rotated(words ^ lane(done, "u1", 1) * _P5, 11) * _P1
        done += 1
    words = (words ^ words >> np.uint64(33)) * _P2
    words = (words ^ words >> np.uint64(29)) * _P3
    return words ^ words >> np.uint64(32)


# --- under jit


def of_traced(ids: jax.Array, table: str, number: int) -> jax.Array:
    """Returns the pairs of integer ids on a device, the same as `of_column` returns.

    Args:
      ids: integers [..] of any dtype.
      table: the name of the table.
      number: the table's number in the stack, below MAX_TABLES.

    Returns:
      uint32 [.., 2].

    Raises:
      TypeError: if ids are not integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"raw ids on a device must be integers, got {ids.dtype} {list(ids.shape)}")
    if ids.dtype.itemsize == 8:
        words = ((ids >> 32).astype(jnp.uint32), ids.astype(jnp.uint32))
    elif jnp.issubdtype(ids.dtype, jnp.signedinteger):
        wide = ids.astype(jnp.int32)
        words = ((wide >> 31).astype(jnp.uint32), wide.astype(jnp.uint32))
    else:
        words = (jnp.zeros(ids.shape, jnp.uint32), ids.astype(jnp.uint32))
    return of_words(*words, table, number)


def of_words(high: jax.Array, low: jax.Array, table: str, number: int) -> jax.Array:
    """Returns the pairs of 64-bit integers that are given as two words; see `of_traced`.

    Args:
      high: uint32 [..].
      low: uint32 [..].
      table: the name of the table.
      number: the table's number in the stack, below MAX_TABLES.

    Returns:
      uint32 [.., 2].
    """
    shift = salt(table)
    moved = low + jnp.uint32(shift & 0xFFFFFFFF)
    carry = (moved < low).astype(jnp.uint32)
    high, low = high + jnp.uint32(shift >> 32) + carry, moved
    for down, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        high, low = high ^ (high >> down), low ^ ((low >> down) | (high << (32 - down)))
        if multiplier != 1:
            high, low = _product(high, low, multiplier)
    tag = jnp.minimum(high, jnp.uint32(PADDING - 1))
    place = (low & jnp.uint32(~(MAX_TABLES - 1) & 0xFFFFFFFF)) | jnp.uint32(number)
    return jnp.stack([tag, place], axis=-1)


def _product(high: jax.Array, low: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Returns the two words of a 64-bit product with a constant, modulo 2^64."""
    by_high, by_low = jnp.uint32(by >> 32), jnp.uint32(by & 0xFFFFFFFF)
    half = jnp.uint32(0xFFFF)
    a1, a0, b1, b0 = low >> 16, low & half, by_low >> 16, by_low & half
    middle = a1 * b0 + (a0 * b0 >> 16)  # below 2^32
    other = (middle & half) + a0 * b1  # below 2^32
    carried = a1 * b1 + (middle >> 16) + (other >> 16)
    return high * by_low + low * by_high + carried, low * by_low


# --- pairs, or ids that become pairs


def pairs_of(feature: str, ids: Any, table: str, number: int) -> Any:
    """Returns ids as pairs, by `pairs_on_device` for a jax array, else by `pairs_on_host`."""
    made = pairs_on_device if isinstance(ids, jax.Array) else pairs_on_host
    return made(feature, ids, table, number)


def pairs_on_host(feature: str, ids: Any, table: str, number: int) -> np.ndarray:
    """Returns ids as pairs (uint32 [.., 2]): tag and place. Pairs stay as they are.

    A masked pair is padding.

    Args:
      feature: the name that error messages use.
      ids: pairs uint32 [.., 2], or raw ids of any other dtype.
      table: the name of the ids' table.
      number: the number of that table in the pool.

    Raises:
      TypeError: if ids are neither integers nor bytes nor strings, or are uint32 with a last axis
        other than 2.
      ValueError: if pairs are of another table.
    """
    if getattr(ids, "dtype", None) != np.uint32:
        return of_column(ids, table, number)
    _check_shape(feature, ids.shape)
    pairs = unmasked(ids)
    _check_table(feature, _is_foreign(pairs, number), table)
    return pairs


def _is_foreign(pairs: Any, number: int) -> Any:
    """Returns which pairs (uint32 [.., 2]) are of another table than that of this number."""
    return (pairs[..., 1] & NUMBER != np.uint32(number)) & (pairs[..., 0] != np.uint32(PADDING))


def _check_table(feature: str, is_foreign: np.ndarray, table: str) -> None:
    if is_foreign.any():
        place = tuple(int(i) for i in np.argwhere(is_foreign)[0])
        raise ValueError(
            f"feature {feature!r}: the pair at {list(place)} is not of table {table!r} "
            f"({int(is_foreign.sum())} such pairs). uint32 [.., 2] are taken as the pairs that "
            "raw_ids() returns; cast raw ids to int64"
        )


def unmasked(pairs: Any) -> np.ndarray:
    """Returns pairs (uint32 [.., 2]) on the host as a plain array. Masked ones become padding."""
    plain = np.asarray(pairs)
    if isinstance(pairs, np.ma.MaskedArray):
        is_masked = np.ma.getmaskarray(pairs).any(axis=-1, keepdims=True)
        plain = np.where(is_masked, np.uint32(PADDING), plain)
    return plain


def pairs_on_device(feature: str, ids: jax.Array, table: str, number: int) -> jax.Array:
    """Returns ids as pairs (uint32 [.., 2]).

    uint32 ids are pairs already. Integers of another dtype are hashed. Pairs of another table
    become padding if they are traced, or lie on devices of other processes.

    Raises:
      TypeError: if ids are not integers, or are uint32 with a last axis other than 2.
      ValueError: if pairs are concrete and of another table.
    """
    if ids.dtype != jnp.uint32:
        return of_traced(ids, table, number)
    _check_shape(feature, ids.shape)
    is_foreign = _is_foreign(ids, number)
    if isinstance(ids, jax.core.Tracer) or not ids.is_fully_addressable:
        return jnp.where(is_foreign[..., None], np.uint32(PADDING), ids)
    _check_table(feature, np.asarray(is_foreign), table)
    return ids


def _check_shape(feature: str, shape: tuple[int, ...]) -> None:
    if shape[-1:] != (2,):
        raise TypeError(
            f"feature {feature!r}: uint32 ids must be the pairs [.., 2] that raw_ids() returns, "
            f"got {list(shape)}; cast raw ids to int64"
        )
