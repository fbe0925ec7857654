"""Checks and opens the files of one array, as orbax writes them: zarr 2, compressed by zstd.

tensorstore allocates as much memory as a file asks for, and aborts the process if there is not
enough. So the files are first compared with the manifest: the shape of the array, its pieces, and
the size of a piece when it is decompressed.
"""

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from mpembed_jax.checkpoint import files
from mpembed_jax.checkpoint.errors import DamagedError

LAYOUT = ".zarray"
_MAX_LAYOUT_BYTES = 1 << 16
_FIXED = {"zarr_format": 2, "order": "C", "filters": None, "fill_value": None}
_PIECE_NAME = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*", re.ASCII)
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 1 << 17  # bytes of a decompressed block, at most


class ZarrArray(NamedTuple):
    """The description of an array in its file `.zarray`."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]  # the shape of one piece
    piece_bytes: int  # bytes of one piece before compression
    is_compressed: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of pieces along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


@functools.lru_cache
def zarr_dtype(name: str) -> str | None:
    """Returns the name of a dtype in `.zarray`, or None if arrays of it cannot be written."""
    try:
        spec = {"driver": "zarr", "kvstore": "memory://", "schema": {"dtype": name, "rank": 0}}
        store = tensorstore.open(spec, create=True).result()
    except ValueError:
        return None
    return store.spec().to_json()["metadata"]["dtype"]


def count(shape: list[int], chunks: list[int]) -> int:
    """Returns the number of pieces of an array."""
    return math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))


def check(folder: Path, key: str, names: list[str], shape: list[int], dtype: str) -> None:
    """Checks the files of one array before memory is allocated.

    Args:
      folder: the folder of the checkpoint.
      key: the array's folder in it.
      names: the array's files that the manifest names. Their checksums are right.
      shape: the shape of the array on disk.
      dtype: the name of its dtype.

    Raises:
      DamagedError: if these are not the files of such an array.
      OSError: if the system cannot read one now.
    """
    if 0 in shape:
        if names:
            raise DamagedError(f"{folder / key} should not be there: the array is empty")
        return
    if LAYOUT not in names:
        raise DamagedError(f"{folder / key / LAYOUT} is missing in the manifest")
    layout = _layout(folder / key, files.contents(folder, f"{key}/{LAYOUT}"), shape, dtype)
    pieces = [name for name in names if name != LAYOUT]
    if len(pieces) != math.prod(layout.grid):
        raise DamagedError(
            f"{folder / key} has {len(pieces)} of {math.prod(layout.grid)} files in the manifest"
        )
    for name in pieces:
        place = [int(i) for i in name.split(".")] if _PIECE_NAME.fullmatch(name) else []
        grid = layout.grid or (1,)
        if len(place) != len(grid) or any(i >= n for i, n in zip(place, grid, strict=True)):
            raise DamagedError(f"{folder / key / name} is no piece of the array")
        with files.open_inside(folder, f"{key}/{name}") as file:
            _check_piece(file, folder / key / name, layout)


def _layout(path: Path, text: bytes, shape: list[int], dtype: str) -> ZarrArray:
    """Returns the layout that `.zarray` gives.

    Raises:
      DamagedError: if it is not the layout of an array of this shape and dtype.
    """
    where = path / LAYOUT
    if len(text) > _MAX_LAYOUT_BYTES:
        raise DamagedError(f"{where} has {len(text)} bytes, too many")
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise DamagedError(f"{where} is not a JSON object")
    wanted = {**_FIXED, "shape": shape, "dtype": zarr_dtype(dtype)}
    chunks = held.get("chunks")
    compressor = held.get("compressor")
    for name, value in wanted.items():
        if held.get(name) != value or isinstance(held.get(name), bool):
            raise DamagedError(f"{where} says {name} {held.get(name)!r}, not {value!r}")
    if held.get("dimension_separator", ".") != ".":
        raise DamagedError(f"{where} says dimension_separator {held['dimension_separator']!r}")
    if (
        not isinstance(chunks, list)
        or len(chunks) != len(shape)
        or any(type(c) is not int or not 1 <= c <= n for c, n in zip(chunks, shape, strict=True))
    ):
        raise DamagedError(f"{where} says chunks {chunks!r}, which are no pieces of {shape}")
    is_compressed = isinstance(compressor, dict) and compressor.get("id") == "zstd"
    if compressor is not None and not is_compressed:
        raise DamagedError(f"{where} says compressor {compressor!r}; this library writes zstd")
    item = np.dtype(dtype).itemsize
    return ZarrArray(tuple(shape), tuple(chunks), math.prod(chunks) * item, is_compressed)


def _check_piece(file: Any, path: Path, layout: ZarrArray) -> None:
    """Checks the decompressed size of a piece.

    A compressed block of zstd does not state its decompressed size. The check counts the maximum,
    `_ZSTD_BLOCK` bytes. A block may have fewer: zstd at level 1 ends a block early where the data
    changes, but not before a quarter of the maximum. The sum may therefore be four times the real
    size. The check accepts a sum of eight times the real size. A crafted file thus takes at most
    eight times the memory of its array.
    """
    size = files.size_of(file)
    if not layout.is_compressed:
        if size != layout.piece_bytes:
            raise DamagedError(f"{path} has {size} bytes, the array needs {layout.piece_bytes}")
        return
    head = files.take(file, 18)
    if head[:4] != _ZSTD_MAGIC or len(head) < 6:
        raise DamagedError(f"{path} is not compressed by zstd")
    descriptor = head[4]
    is_single = descriptor >> 5 & 1
    at = 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
    width = (is_single, 2, 4, 8)[descriptor >> 6]
    says = int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)
    if width and says != layout.piece_bytes:
        raise DamagedError(f"{path} becomes {says} bytes, the array needs {layout.piece_bytes}")
    at = at + width
    bound = 0
    is_last = 0
    limit = 8 * layout.piece_bytes + _ZSTD_BLOCK
    while not is_last:
        file.seek(at)
        block = int.from_bytes(files.take(file, 3), "little")
        is_last, kind, length = block & 1, block >> 1 & 3, block >> 3
        bound += length if kind < 2 else _ZSTD_BLOCK
        at += 3 + (1 if kind == 1 else length)
        if at > size or kind == 3 or length > _ZSTD_BLOCK or bound > limit:
            raise DamagedError(f"{path} is not what zstd makes of {layout.piece_bytes} bytes")
    if at + 4 * (descriptor >> 2 & 1) != size:
        raise DamagedError(f"{path} has bytes after the array")


def open_store(folder: Path) -> Any:
    """Returns a future of the tensorstore that reads the array in a folder."""
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}{os.sep}"}}
    return tensorstore.open(spec, open=True, read=True)
