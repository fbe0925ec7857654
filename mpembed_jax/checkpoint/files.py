"""Files of a checkpoint folder, opened and read as files of a stranger.

Nothing outside of the folder is opened, nothing blocks, and no more is read than a file holds.
"""

import os
import stat
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mpembed_jax.checkpoint.errors import DamagedError

_PIECE = 1 << 22  # bytes read at once


def exists(path: Path) -> bool:
    """Returns whether a file or folder exists.

    Raises:
      OSError: if that cannot be known, for example for lack of permission.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names(folder: Path) -> list[str]:
    """Returns the names of the regular files in a folder.

    Raises:
      OSError: if the system cannot read the folder.
    """
    return [n for n in os.listdir(folder) if stat.S_ISREG(os.stat(folder / n).st_mode)]


def open_inside(folder: Path, name: str) -> Any:
    """Opens a regular file inside of a folder for reading, unbuffered.

    Raises:
      DamagedError: if it is missing, is not a regular file, or is a link out of the folder.
      OSError: if the system cannot open it now.
    """
    path = folder / name
    try:
        # lstat of the file and of the folder of an array: names have at most two parts.
        if any(stat.S_ISLNK(os.lstat(part).st_mode) for part in {path, path.parent} - {folder}):
            inside = os.path.join(os.path.realpath(folder), "")
            if not os.path.realpath(path).startswith(inside):
                raise DamagedError(f"{path} is a link out of the checkpoint")
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedError(f"{path} cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedError(f"{path} is not a file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file. A FIFO would wait for a writer otherwise."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def size_of(file: Any) -> int:
    """Returns the number of bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def contents(folder: Path, name: str) -> bytes:
    """Returns the bytes of a file.

    Raises:
      DamagedError: as open_inside.
      OSError: if the system cannot read it now.
    """
    with open_inside(folder, name) as file:
        return take(file, size_of(file))


def take(file: Any, size: int) -> bytes:
    """Returns the next `size` bytes of an open file, fewer only at its end.

    One read may return fewer bytes than asked for, also in the middle of a file.
    """
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def checksum(file: Any) -> tuple[int, int]:
    """Returns the size and CRC-32 of an open file."""
    size = value = 0
    while piece := file.read(_PIECE):
        size, value = size + len(piece), zlib.crc32(piece, value)
    return size, value


def each(work: Callable[[str], Any], names: list[str]) -> list[Any]:
    """Returns work(name) of all names, several at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, names))


def reason(error: OSError) -> str:
    """Returns why a system call failed, without the path."""
    return error.strerror or str(error)
