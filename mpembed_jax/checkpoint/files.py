"""Files of a checkpoint folder, which may come from an untrusted source.

Only regular files inside the folder are opened. Opening never waits, not even for a FIFO.
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
      OSError: if the system cannot tell, for example for lack of permission.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names(folder: Path) -> list[str]:
    """Returns the names of the regular files in a folder, and of links to regular files.

    Raises:
      OSError: if the system cannot read the folder, or if a link in it leads nowhere.
    """
    return [n for n in os.listdir(folder) if stat.S_ISREG(os.stat(folder / n).st_mode)]


def open_inside(folder: Path, name: str) -> Any:
    """Opens a regular file inside a folder for reading.

    Args:
      folder: the folder of a checkpoint.
      name: the path of the file, relative to the folder: "file" or "array_folder/file".

    Returns:
      An unbuffered binary file.

    Raises:
      DamagedError: if the file is missing, is not a regular file, or lies outside the folder
        because it or its folder is a link.
      OSError: if the system cannot open the file now.
    """
    path = folder / name
    try:
        # A name has at most two parts, so only the file and an array's folder can be links.
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
    """Opens a file without waiting. Otherwise, opening a FIFO would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def size_of(file: Any) -> int:
    """Returns the number of bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def contents(folder: Path, name: str) -> bytes:
    """Returns the bytes of a regular file inside a folder.

    Raises:
      DamagedError: as open_inside.
      OSError: if the system cannot open or read the file now.
    """
    with open_inside(folder, name) as file:
        return take(file, size_of(file))


def take(file: Any, size: int) -> bytes:
    """Returns the next `size` bytes of an open file, or fewer if the file ends before.

    Several reads may be needed: one read may return fewer bytes than asked for, even in the middle
    of a file.
    """
    pieces = []
    while size > 0 and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def checksum(file: Any) -> tuple[int, int]:
    """Reads an open file to its end, and returns the number of bytes read and their CRC-32."""
    size = value = 0
    while piece := file.read(_PIECE):
        size, value = size + len(piece), zlib.crc32(piece, value)
    return size, value


def each(work: Callable[[str], Any], names: list[str]) -> list[Any]:
    """Returns work(name) for each name, in order. Up to eight threads run `work`."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, names))


def reason(error: OSError) -> str:
    """Returns why a system call failed, without the path."""
    return error.strerror or str(error)
