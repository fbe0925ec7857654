"""The manifest of a checkpoint folder, the checksums of its files, and the steps of a directory.

A checkpoint is one folder `step_<n>`, written by orbax, with an additional `manifest.json`. The
manifest names every file with its size and CRC-32, and holds all values that are not arrays. It is
written last, before orbax renames the folder to its final name. A folder with that name was
therefore complete once. `check` finds later damage.

A checksum shows damage, not intent: anybody can compute one. So nothing that a manifest says is
trusted. `schema` checks its types and names, `array_files` the files of its arrays.
"""

import json
import operator
import os
import re
import zlib
from pathlib import Path
from typing import Any

from mpembed_jax.checkpoint import array_files, files, schema
from mpembed_jax.checkpoint.errors import CheckpointError, DamagedError, UnreadableError
from mpembed_jax.embedding import arguments

NAME = "manifest.json"
VERSION = 1
_STEP = re.compile(r"step_(0|[1-9]\d*)", re.ASCII)
# The file in which orbax records when a save began and ended. Orbax changes it after the manifest
# is written, and this library does not read it.
_TIMES = "_CHECKPOINT_METADATA"
OF_PROCESSES = "array_metadatas"  # a folder of orbax, with a file of each process


def folder_of(directory: Path, step: int) -> Path:
    """Returns the folder of one step."""
    return directory / f"step_{step}"


def path_of(call: str, directory: Any) -> Path:
    """Returns the absolute path of a directory.

    Raises:
      TypeError: if it is no path; the message has `call`, which says the order of arguments.
    """
    return arguments.path_of(call, "directory", directory).absolute()


def number_of(call: str, step: Any) -> int:
    """Returns the number of a step.

    Raises:
      TypeError: if it is no whole number; the message has `call`.
    """
    try:
        return operator.index(step)
    except TypeError:
        raise TypeError(f"{call}: step must be a whole number, got {type(step).__name__}") from None


def steps(directory: Any) -> list[int]:
    """Returns the steps that were saved completely, in ascending order.

    The list is empty if the directory does not exist.

    Args:
      directory: as in save.

    Returns:
      Steps. Their files are not read, so a step may have been damaged since; restore checks this.

    Raises:
      OSError: if the system cannot read the directory.
      TypeError: if directory is no path.
    """
    directory = path_of("steps(directory)", directory)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = (_STEP.fullmatch(name) for name in names)
    return sorted(
        int(m.group(1)) for m in found if m and files.exists(Path(directory, m.group(0), NAME))
    )


def latest_step(directory: Any) -> int | None:
    """Returns the highest step of `steps(directory)`, or None if there is none."""
    found = steps(directory)
    return found[-1] if found else None


def write(folder: Path, body: dict[str, Any], keys: list[str]) -> None:
    """Checksums every file of `folder` and writes its manifest durably, as the last file.

    Raises:
      CheckpointError: if files of the arrays `keys` are missing. This happens if the folder was
        moved away during the save, because the writers then create a new one.
    """
    names_of = {record["key"]: name for name, record in body["arrays"].items()}
    for key in keys:
        what = f"array {names_of.get(key, key)!r}"
        try:
            layout = json.loads((folder / key / array_files.LAYOUT).read_bytes())
            pieces = array_files.count(layout["shape"], layout["chunks"])
            found = len(os.listdir(folder / key)) - 1
        except OSError as error:
            raise CheckpointError(f"{what} is not in {folder}: {files.reason(error)}") from error
        if found != pieces:
            raise CheckpointError(f"{what} has {found} of {pieces} files in {folder}")
    # A save of this step that failed before may have left writers behind. Their arrays have other
    # keys.
    parts = ["", *keys]
    if files.exists(folder / OF_PROCESSES):
        parts.append(OF_PROCESSES)
    names = sorted(
        os.path.join(part, name)
        for part in parts
        for name in files.names(folder / part)
        if name not in (_TIMES, NAME)
    )

    def checksum(name: str) -> tuple[int, int]:
        with files.open_inside(folder, name) as file:
            return files.checksum(file)

    sums = files.each(checksum, names)
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
      DamagedError: if there is none, or if it is damaged or no manifest.
      UnreadableError: if the system cannot read it now.
      CheckpointError: if a newer version of this library wrote it.
    """
    folder = folder_of(directory, step)
    path = folder / NAME
    where = f"step {step}: {path}"
    try:
        text = files.contents(folder, NAME)
    except DamagedError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise DamagedError(
                f"{where} is missing, so this checkpoint was never completed"
            ) from None
        raise DamagedError(f"step {step}: {error}") from None
    except OSError as error:
        raise UnreadableError(f"{where} cannot be read now: {files.reason(error)}") from error
    try:
        outer = json.loads(text)
        _check_version(where, outer)
        if zlib.crc32(outer["body"].encode()) != outer["crc32"]:
            raise DamagedError(f"{where} is damaged (its checksum differs)")
        body = json.loads(outer["body"])
        _check_version(where, body)
        schema.check(body, step, VERSION)
    except schema.SchemaError as error:
        raise DamagedError(f"{where} is not a manifest: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    return body


def _check_version(where: str, document: Any) -> None:
    version: Any = document.get("version") if isinstance(document, dict) else None
    if schema.is_count(version) and version > VERSION:
        raise CheckpointError(
            f"{where} is of version {version}, this library reads {VERSION}; use the version of "
            "mpembed_jax that wrote it, or a newer one"
        )


def check(directory: Path, step: int, body: dict[str, Any], *, contents: bool = True) -> None:
    """Checks every file that the manifest names, and that they are the files of its arrays.

    Args:
      directory: of the checkpoints.
      step: of the checkpoint.
      body: its manifest.
      contents: whether to read the files. If not, only their presence and sizes are checked.

    Raises:
      DamagedError: if a file is missing or differs in size or content; the message names the array
        and the file.
      UnreadableError: if the system cannot read a file now.
    """
    folder = folder_of(directory, step)
    arrays = {record["key"]: name for name, record in body["arrays"].items()}
    of_array: dict[str, list[str]] = {key: [] for key in arrays}
    for name in body["files"]:
        owner, _, inner = name.partition("/")
        if inner and owner in arrays:
            of_array[owner].append(inner)

    def check_file(name: str) -> None:
        size, expected = body["files"][name]
        with files.open_inside(folder, name) as file:
            found = files.size_of(file)
            value = expected
            if found == size and contents:
                found, value = files.checksum(file)
        if found != size:
            raise DamagedError(f"{folder / name} has {found} bytes instead of {size}")
        if value != expected:
            raise DamagedError(f"{folder / name} has changed bytes (its checksum differs)")

    def check_array(key: str) -> None:
        record = body["arrays"][arrays[key]]
        shape = schema.shape_on_disk(body, record)
        array_files.check(folder, key, of_array[key], shape, record["dtype"])

    def fault(name: str, check: Any) -> CheckpointError | None:
        owner = name.split("/")[0]
        what = f"array {arrays[owner]!r}" if owner in arrays else "checkpoint metadata"
        try:
            check(name)
        except DamagedError as error:
            return DamagedError(f"step {step}: {what}: {error}")
        except OSError as error:
            return UnreadableError(
                f"step {step}: {what}: {folder / name} cannot be read now: {files.reason(error)}"
            )
        return None

    _raise_first(files.each(lambda name: fault(name, check_file), list(body["files"])))
    if contents:
        _raise_first(files.each(lambda key: fault(key, check_array), list(arrays)))


def _raise_first(faults: list[CheckpointError | None]) -> None:
    """Raises the first fault, damage before what could not be read, and counts the others."""
    found = sorted((f for f in faults if f), key=lambda f: not isinstance(f, DamagedError))
    if found:
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise type(found[0])(f"{found[0]}{more}")


def chain(directory: Path, step: int, *, contents: bool = True) -> list[dict[str, Any]]:
    """Returns the checked manifests of a step and of those on which it builds, newest first.

    A checkpoint is good if this function returns.

    Args:
      directory: of the checkpoints.
      step: the newest of the chain.
      contents: as in check.

    Raises:
      DamagedError: if one of them is damaged or missing.
      UnreadableError: if the system cannot read one of them now.
      CheckpointError: if a newer version of this library wrote one of them.
    """
    body = read(directory, step)
    check(directory, step, body, contents=contents)
    bodies = [body]
    while (base := bodies[-1]["base"]) is not None:
        number = base["step"]
        try:
            if any(number == other["step"] for other in bodies):
                raise DamagedError(f"step {number} builds on itself")
            body = read(directory, number)
            if identity(body) != base["identity"]:
                raise DamagedError(f"step {number} is no longer the checkpoint that it builds on")
            check(directory, number, body, contents=contents)
            schema.check_base(bodies[-1], body)
        except (CheckpointError, schema.SchemaError) as error:
            kind = type(error) if isinstance(error, CheckpointError) else DamagedError
            raise kind(f"step {step} builds on step {number}, which is refused: {error}") from error
        bodies.append(body)
    return bodies
