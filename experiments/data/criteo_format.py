"""The line format of `train.txt` of Criteo's Display Advertising Challenge.

It is parsed in blocks, with exact line numbers. A line has 40 tab-separated columns: a label 0 or
1, thirteen integers, twenty-six categories of 8 hex digits; any but the label may be empty, which
means missing. Lines end with LF or CRLF. Everything is array arithmetic on the bytes of a block, so
a bad value is found by its line without a second, slower parser. It knows nothing of ids, splits or
batches.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

NUM_DENSE = 13
NUM_CATEGORIES = 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_CATEGORIES
COLUMNS = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
BLOCK_BYTES = 1 << 24
MAX_DIGITS = 18  # an int64 holds them
_TAB, _LF, _CR, _MINUS = 9, 10, 13, 45


class BadLine(NamedTuple):
    """A line that does not follow the format."""

    number: int  # counted from 1
    reason: str


class Rows(NamedTuple):
    """The good lines of a block, in order."""

    label: np.ndarray  # u8 [n]
    dense: (
        np.ndarray
    )  # f32 [n, 13]  log(x + 1) of the integers as DLRM reads them; missing and negative are 0
    categories: np.ndarray  # u32 [n, 26]  the hex number; missing is 0, and so is 00000000
    num_lines: int
    bad: list[BadLine]


def open_file(path: Path) -> BinaryIO:
    """Opens a plain or gzipped file for reading bytes.

    Its first two bytes decide which it is, not its name.
    """
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def read_blocks(file: BinaryIO, num_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yields the file in blocks of whole lines of about `num_bytes`.

    The last line may lack its line feed.

    Raises:
      ValueError: if a line is longer than a block.
      EOFError, gzip.BadGzipFile: from a gzip file that is cut short or damaged.
    """
    rest = b""
    while data := file.read(num_bytes):
        end = data.rfind(b"\n") + 1
        if end:
            yield rest + data[:end]
            rest = data[end:]
        else:
            rest += data
            if len(rest) > num_bytes:
                raise ValueError(
                    f"a line is longer than {num_bytes:,} bytes: this is not Criteo's text format"
                )
    if rest:
        yield rest + b"\n"


def parse(block: bytes, first_line: int = 1) -> Rows:
    """Parses a block of whole lines.

    Args:
      block: bytes that end with a line feed.
      first_line: number of its first line in the file.

    Returns:
      The good lines, and for each bad one its number and the first thing wrong with it.
    """
    padded = b"\0" * 8 + block + b"\0" * 8
    data = np.frombuffer(padded, np.uint8)[8:]
    text = np.ndarray(
        (len(block) + 9,), "<u8", padded, strides=(1,)
    )  # the eight bytes before each byte of the block
    ends = np.flatnonzero(data == _LF)
    starts = np.concatenate([[0], ends[:-1] + 1])
    stops = ends - ((ends > starts) & (data[ends - 1] == _CR))
    tabs = np.flatnonzero(data == _TAB)
    num_tabs = np.diff(np.searchsorted(tabs, np.append(starts, len(block))))
    is_whole = num_tabs == NUM_COLUMNS - 1
    bad = {
        int(i): "the line is empty"
        if starts[i] == stops[i]
        else f"{num_tabs[i] + 1} columns instead of {NUM_COLUMNS} (label, 13 integers, "
        "26 categories, tab separated)"
        for i in np.flatnonzero(~is_whole)
    }
    inner = tabs[np.repeat(is_whole, num_tabs)].reshape(-1, NUM_COLUMNS - 1)
    left = np.concatenate([starts[is_whole, None], inner + 1], axis=1)
    length = np.concatenate([inner, stops[is_whole, None]], axis=1) - left

    digit = data[left[:, 0]] - np.uint8(48)
    wrong = np.zeros(left.shape, bool)
    wrong[:, 0] = (length[:, 0] != 1) | (digit > 1)
    integers, categories = slice(1, 1 + NUM_DENSE), slice(1 + NUM_DENSE, NUM_COLUMNS)
    values, wrong[:, integers] = _integers(text, block, left[:, integers], length[:, integers])
    hexes, wrong[:, categories] = _hexes(text, left[:, categories], length[:, categories])

    is_good = ~wrong.any(axis=1)
    line_of = np.flatnonzero(is_whole)
    for row in np.flatnonzero(~is_good):
        column = int(np.argmax(wrong[row]))
        at = left[row, column]
        text = block[at : at + min(int(length[row, column]), 40)].decode(
            "utf-8", "backslashreplace"
        )
        expected = (
            "0 or 1" if column == 0 else "an integer" if column <= NUM_DENSE else "8 hex digits"
        )
        bad[int(line_of[row])] = f"{COLUMNS[column]} is {text!r}; expected {expected}" + (
            " or nothing" if column else ""
        )
    return Rows(
        label=digit[is_good],
        dense=np.log1p(np.maximum(values[is_good], 0).astype(np.float32)),
        categories=hexes[is_good],
        num_lines=len(ends),
        bad=[BadLine(first_line + i, bad[i]) for i in sorted(bad)],
    )


def _each(byte: int) -> np.uint64:
    return np.uint64(byte * 0x0101010101010101)


def _integers(
    text: np.ndarray, block: bytes, left: np.ndarray, length: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads decimal integers at left [n, 13].

    Returns i64 [n, 13] (0 where empty), and whether each is malformed. The eight bytes that end a
    number are one u64, whose digits are checked and summed in parallel; `text` [i] holds the eight
    bytes before position i. Longer numbers, which are few, go one by one.
    """
    is_negative = (length > 1) & (text[left + 1] >> np.uint64(56) == _MINUS)
    num_digits = length - is_negative
    kept = ~np.uint64(0) << (np.uint64(8) * (8 - np.minimum(num_digits, 8)).astype(np.uint64))
    kept[num_digits == 0] = 0
    digits = (text[left + length] & kept) | (_each(48) & ~kept)
    high = _each(0xF0)
    wrong = ((digits & high) != _each(48)) | (((digits + _each(6)) & high) != _each(48))
    x = ((digits & _each(15)) * np.uint64(10 * 2**8 + 1)) >> np.uint64(8)
    x = ((x & np.uint64(0x00FF00FF00FF00FF)) * np.uint64(100 * 2**16 + 1)) >> np.uint64(16)
    x = ((x & np.uint64(0x0000FFFF0000FFFF)) * np.uint64(10000 * 2**32 + 1)) >> np.uint64(32)
    value = x.astype(np.int64)
    for i, j in zip(*np.nonzero(num_digits > 8), strict=True):
        start = left[i, j] + is_negative[i, j]
        number = block[start : start + num_digits[i, j]]
        wrong[i, j] = not number.isdigit() or len(number) > MAX_DIGITS
        value[i, j] = 0 if wrong[i, j] else int(number)
    return np.where(is_negative, -value, value), wrong


def _hexes(text: np.ndarray, left: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads 8 hex digits at left [n, 26].

    Returns u32 [n, 26] (0 where empty), and whether each is malformed. All eight bytes are one u64,
    decoded in parallel: nibble = low 4 bits + 9 for letters, and a byte is a hex digit if spelling
    the nibble in lower case gives it back. `text` [i] holds the eight bytes before position i.
    """
    digits = text[left + 8]
    is_letter = (digits >> np.uint64(6)) & _each(1)
    nibble = (digits & _each(15)) + np.uint64(9) * is_letter
    spelled = (
        nibble + _each(48) + np.uint64(39) * (((nibble + _each(6)) >> np.uint64(4)) & _each(1))
    )
    wrong = (spelled != (digits | is_letter << np.uint64(5))) | ((nibble & _each(0xF0)) != 0)
    x = nibble.byteswap()
    x = (x | x >> np.uint64(4)) & np.uint64(0x00FF00FF00FF00FF)
    x = (x | x >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    x = (x | x >> np.uint64(16)) & np.uint64(0xFFFFFFFF)
    is_missing = length == 0
    return np.where(is_missing, 0, x).astype(np.uint32), ~is_missing & (wrong | (length != 8))
