"""The manifest of a checkpoint folder, the checksums of its files, and the steps of a directory.

A checkpoint is one folder `step_<n>`. Orbax writes the folder, and this module adds a file
`manifest.json`. The manifest names every file with its size and CRC-32. It also holds all values
that are not arrays. The manifest is the last file that is written. Orbax then renames the folder to
its final name. A folder with its final name was therefore complete once. `check` finds later
damage.

Checksums find accidental damage. They do not find forgery, because an attacker can compute them.
Readers therefore do not trust the contents of a manifest. `schema` checks its types and names.
`array_files` checks the files of its arrays.
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
VERSION = 2  # the newest that this library reads
_STEP = re.compile(r"step_(0|[1-9]\d*)", re.ASCII)
# The file in which orbax records when a save began and ended. Orbax changes this file after the
# manifest is written, so the manifest leaves it out. This library does not read it.
_TIMES = "_CHECKPOINT_METADATA"
OF_PROCESSES = "array_metadatas"  # a folder in which orbax writes one file per process


def folder_of(directory: Path, step: int) -> Path:
    """Returns the folder of one step."""
    return directory / f"step_{step}"


def path_of(call: str, directory: Any) -> Path:
    """Returns the absolute path of a directory.

    Raises:
      TypeError: if `directory` is not a path. The message begins with `call`, which shows the order
        of the arguments.
    """
    return arguments.path_of(call, "directory", directory).absolute()


def number_of(call: str, step: Any) -> int:
    """Returns the number of a step.

    Raises:
      TypeError: if `step` is not a whole number. The message begins with `call`.
    """
    try:
        return operator.index(step)
    except TypeError:
        raise TypeError(f"{call}: step must be a whole number, got {type(step).__name__}") from None


def steps(directory: Any) -> list[int]:
    """Returns the steps that were saved completely, in ascending order.

    The list is empty if the directory does not exist.

    Args:
      directory: see `save`.

    Returns:
      The steps. This function does not read their files, so a step may be damaged. `restore` checks
      the files.

    Raises:
      OSError: if the system cannot read the directory.
      TypeError: if directory is not a path.
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
    """Computes the checksums of the files in `folder`, then writes the manifest durably.

    The manifest is the last file of a save.

    Raises:
      CheckpointError: if files of the arrays `keys` are missing. This happens if the folder is
        moved away during the save, because the writers then create a new, incomplete folder.
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
    # An earlier save of this step may have failed, and its writers may still be running. Their
    # arrays have other keys, so the manifest does not name their files.
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
    body = {**body, "version": _version_of(body), "files": dict(zip(names, sums, strict=True))}
    text = json.dumps(body, sort_keys=True)
    with open(folder / NAME, "w") as file:
        json.dump({"crc32": zlib.crc32(text.encode()), "body": text}, file)
        file.flush()
        os.fsync(file.fileno())


def _version_of(body: dict[str, Any]) -> int:
    """Returns the lowest version that supports a manifest: 2 with pools that name place_bits."""
    pools = [entry.get("vocabulary") or {} for entry in body["embeddings"].values()]
    return 2 if any("place_bits" in pool for pool in pools) else 1


def identity(body: dict[str, Any]) -> int:
    """Returns a number that distinguishes this checkpoint from others of the same step."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read(directory: Path, step: int) -> dict[str, Any]:
    """Returns a step's manifest.

    Raises:
      DamagedError: if the manifest is missing or damaged, or if the file is not a manifest.
      UnreadableError: if the system cannot read the manifest now.
      CheckpointError: if a newer version of this library wrote the manifest.
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
    """Checks every file that the manifest names, and that each array has the right files.

    Args:
      directory: the folder of all checkpoints.
      step: the step of the checkpoint.
      body: the manifest of the checkpoint.
      contents: whether to read the files. If not, only their presence and sizes are checked.

    Raises:
      DamagedError: if a file is missing, has another size or other bytes, or does not fit its
        array. The message names the array and the file.
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
    """Raises the first fault, if there is one. Its message counts the other faults.

    Damaged files come before files that could not be read.
    """
    found = sorted((f for f in faults if f), key=lambda f: not isinstance(f, DamagedError))
    if found:
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise type(found[0])(f"{found[0]}{more}")


def chain(directory: Path, step: int, *, contents: bool = True) -> list[dict[str, Any]]:
    """Returns the manifests of a step and of all steps on which it builds, newest first.

    All these checkpoints are checked. A checkpoint is good if this function returns.

    Args:
      directory: the folder of all checkpoints.
      step: the newest step of the chain.
      contents: see `check`.

    Raises:
      DamagedError: if one of the checkpoints is damaged or missing.
      UnreadableError: if the system cannot read one of the checkpoints now.
      CheckpointError: if a newer version of this library wrote one of the checkpoints.
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
                raise DamagedError(
                    f"step {number} is no longer the checkpoint that step {bodies[-1]['step']} "
                    "builds on"
                )
            check(directory, number, body, contents=contents)
            schema.check_base(bodies[-1], body)
        except (CheckpointError, schema.SchemaError) as error:
            kind = type(error) if isinstance(error, CheckpointError) else DamagedError
            raise kind(f"step {step} builds on step {number}, which is refused: {error}") from error
        bodies.append(body)
    return bodies
