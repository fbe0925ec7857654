"""The manifest of a checkpoint folder, the checksums of its files, and the steps of a directory.

A checkpoint is one folder `step_<n>`, written by orbax, with an additional `manifest.json`. The
manifest names every file with its size and CRC-32, and holds all values that are not arrays. It is
written last, before orbax renames the folder to its final name. A folder with that name was
therefore complete once. `check` finds later damage.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
VERSION = 1
_STEP = re.compile(r"step_(\d+)")
# The file in which orbax records when a save began and ended. Orbax changes it after the manifest
# is written, and this library does not read it.
_TIMES = "_CHECKPOINT_METADATA"
_PIECE = 1 << 22  # bytes read at once


class CheckpointError(RuntimeError):
    """Raised if a checkpoint could not be written, or is incomplete or damaged.

    The message names the step and the problem.
    """


def folder_of(directory: Path, step: int) -> Path:
    """Returns the folder of one step."""
    return directory / f"step_{step}"


def steps(directory: Any) -> list[int]:
    """Returns the steps that were saved completely, in ascending order.

    The list is empty if the directory does not exist.

    Args:
      directory: as in save.

    Returns:
      Steps. Their files are not read, so a step may have been damaged since; restore checks this.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = (_STEP.fullmatch(name) for name in names)
    return sorted(
        int(m.group(1)) for m in found if m and (Path(directory) / m.group(0) / NAME).is_file()
    )


def latest_step(directory: Any) -> int | None:
    """Returns the highest step of `steps(directory)`, or None if there is none."""
    found = steps(directory)
    return found[-1] if found else None


def _checksum(path: Path) -> tuple[int, int]:
    """Returns the size and CRC-32 of a file."""
    size = value = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            size, value = size + len(piece), zlib.crc32(piece, value)
    return size, value


def _each_file(work: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, names))


def write(folder: Path, body: dict[str, Any], keys: list[str]) -> None:
    """Checksums every file of `folder` and writes its manifest durably, as the last file.

    Raises:
      CheckpointError: if files of the arrays `keys` are missing. This happens if the folder was
        moved away during the save, because the writers then create a new one.
    """
    for key in keys:
        try:
            layout = json.loads((folder / key / ".zarray").read_bytes())
            pieces = math.prod(
                -(-size // chunk)
                for size, chunk in zip(layout["shape"], layout["chunks"], strict=True)
            )
            found = len(list((folder / key).iterdir())) - 1
        except OSError as error:
            raise CheckpointError(f"array {key!r} is not in {folder}: {error.strerror}") from error
        if found != pieces:
            raise CheckpointError(f"array {key!r} has {found} of {pieces} files in {folder}")
    names = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != _TIMES
    )
    sums = _each_file(lambda name: _checksum(folder / name), names)
    body = {**body, "version": VERSION, "files": dict(zip(names, sums, strict=True))}
    text = json.dumps(body, sort_keys=True)
    with open(folder / NAME, "w") as file:
        json.dump({"crc32": zlib.crc32(text.encode()), "body": text}, file)
        file.flush()
        os.fsync(file.fileno())


def identity(body: dict[str, Any]) -> int:
    """Returns a number that tells apart different checkpoints of the same step."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read(directory: Path, step: int) -> dict[str, Any]:
    """Returns a step's manifest.

    Raises:
      CheckpointError: if there is none, or if it is damaged.
    """
    path = folder_of(directory, step) / NAME
    try:
        outer = json.loads(path.read_bytes())
        text = outer["body"]
        if zlib.crc32(text.encode()) != outer["crc32"]:
            raise CheckpointError(f"step {step}: {path} is damaged (its checksum differs)")
        body = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(
            f"step {step}: {path} is missing, so this checkpoint was never completed"
        ) from None
    except OSError as error:
        raise CheckpointError(f"step {step}: {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"step {step}: {path} is damaged ({type(error).__name__}: {error})"
        ) from error
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"step {step}: {path} is of version {body.get('version')}, this library reads {VERSION}"
        )
    return body


def check(directory: Path, step: int, body: dict[str, Any]) -> None:
    """Reads and checks every file that the manifest names.

    Raises:
      CheckpointError: if a file is missing or differs in size or content; the message names the
        array and the file.
    """
    folder = folder_of(directory, step)
    arrays = {record["key"]: name for name, record in body["arrays"].items()}

    def fault(name: str) -> str | None:
        size, expected = body["files"][name]
        owner = name.split("/")[0]
        what = f"array {arrays[owner]!r}" if owner in arrays else "checkpoint metadata"
        try:
            found, value = _checksum(folder / name)
        except OSError as error:
            return f"{what}: {folder / name} cannot be read: {error.strerror}"
        if found != size:
            return f"{what}: {folder / name} has {found} bytes instead of {size}"
        return (
            None
            if value == expected
            else f"{what}: {folder / name} has changed bytes (its checksum differs)"
        )

    faults = [f for f in _each_file(fault, list(body["files"])) if f]
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise CheckpointError(f"step {step}: {faults[0]}{more}")
