"""Restoring: finds the newest undamaged checkpoint, reads it, and places it like the target.

Orbax reads the arrays, directly onto the target's shardings if the arrays on disk have the target's
shape and dtype. Increments are applied to the full checkpoint on which they build. Embedding states
of another format or cache go through `convert`.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mpembed_jax.arrays import huge_pages, indexing
from mpembed_jax.checkpoint import (
    convert,
    digests,
    increments,
    leaves,
    manifest,
    placements,
    saving,
)
from mpembed_jax.checkpoint.manifest import CheckpointError

_LOG = logging.getLogger("mpembed_jax.checkpoint")


def restore(directory: Any, target: Any, *, step: int | None = None, partial: bool = False) -> Any:
    """Restores a tree that `save` wrote.

    Every file is checked before anything is used. A checkpoint with a missing, shortened or changed
    file is refused. Without `step`, the next older checkpoint is then used, and the log (logger
    `mpembed_jax.checkpoint`) says what was wrong with each refused one.

    Args:
      directory: as in save.
      target: a tree like the saved one, of arrays or jax.ShapeDtypeStructs; not consumed. It gives
        the structure and the shardings. A leaf without a sharding, or an array without a device of
        its own, goes to the mesh of its embedding state or to the default device. An EmbeddingState
        may have another storage, row state dtype, cache or placement than the saved one. Its rows
        are then encoded again or moved, and the log says so.
      step: of the checkpoint; None for the newest good one.
      partial: whether the checkpoint may hold leaves that the target lacks.

    Returns:
      A tree of the target's structure with the saved values. Arrays for an accelerator's host
      memory are first read into ordinary host memory. While restoring, the host therefore holds
      them twice, and the device holds one block of them.

    Raises:
      FileNotFoundError: if the directory has no checkpoint (of this step).
      CheckpointError: if the requested checkpoint is damaged, or if every one is; the message names
        the array and the file.
      ValueError: if the target has other leaves, shapes or dtypes than the checkpoint.
    """
    folder = Path(directory).absolute()
    saving.finish_pending(folder, quietly=True)
    chain = _agree(folder, step)
    named, members = leaves.named(target), leaves.embeddings(target)
    held = chain[0]
    converted = _compare(held, named, members, partial)
    values = {}
    for name, leaf in named.items():
        if name in held["values"]:
            values[name] = leaves.plain_value(name, held["values"][name], leaf)
    inner = {name for prefix in converted for name in held["embeddings"][prefix]["names"].values()}
    others = values.keys() | {
        name for prefix in converted for name in members[prefix].names.values()
    }
    places = {name: leaves.Place.of(leaf) for name, leaf in named.items()}
    for member in members.values():
        places |= placements.places(member)
    direct = {name: place for name, place in places.items() if name not in others}
    arrays = read_arrays(folder, chain, direct | dict.fromkeys(inner, leaves.Place("host")))
    for name, place in direct.items():
        array = arrays.pop(name)
        if isinstance(array, np.ndarray):
            array = place.put(array)
        values[name] = leaves.finish(named[name], held["arrays"][name], array)
    for prefix, member in members.items():
        entry = held["embeddings"][prefix]
        ours = {
            i: (arrays if prefix in converted else values)[name]
            for i, name in entry["names"].items()
        }
        _check_rows(folder, held["step"], prefix, entry, ours)
        if prefix in converted:
            for inner_name, array in convert.convert(prefix, entry, ours, member.state).items():
                name = member.names[inner_name]
                values[name] = leaves.finish(named[name], {}, places[name].put(array))
    leaves_ = [values[name] for name in named]
    return huge_pages.place(jax.tree.unflatten(jax.tree.structure(target), leaves_))


# --- choice of the checkpoint


def _agree(directory: Path, step: int | None) -> list[dict[str, Any]]:
    """Returns the manifests to restore from, newest first.

    With several processes, the first one reads the files and decides.
    """
    if jax.process_count() == 1:
        return _choose(directory, step)
    message = b""
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            message = json.dumps(_choose(directory, step)).encode()
        except (CheckpointError, FileNotFoundError) as error:
            failure = error
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    if failure is not None:
        raise failure
    if size == 0:
        raise CheckpointError(
            f"no checkpoint could be restored from {directory}; the first process says why"
        )
    padded = np.frombuffer(message.ljust(size, b" "), np.uint8)
    return json.loads(
        np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
    )


def _choose(directory: Path, step: int | None) -> list[dict[str, Any]]:
    found = manifest.steps(directory)
    if step is not None:
        if not manifest.folder_of(directory, step).exists():
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {directory}; there are {found or 'none'}"
            )
        return _chain(directory, step)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in {directory}"
            + ("" if directory.exists() else ", which does not exist")
            + "; save one first"
        )
    refused = []
    for candidate in reversed(found):
        try:
            chain = _chain(directory, candidate)
        except CheckpointError as error:
            refused.append(str(error))
            _LOG.warning("refused checkpoint: %s", error)
        else:
            if refused:
                _LOG.warning(
                    "using step %d, the newest good checkpoint of %s", candidate, directory
                )
            return chain
    raise CheckpointError(f"no good checkpoint in {directory}: " + "; ".join(refused))


def _chain(directory: Path, step: int) -> list[dict[str, Any]]:
    """Returns the checked manifests of a step and of those on which it builds, newest first."""
    body = manifest.read(directory, step)
    manifest.check(directory, step, body)
    chain = [body]
    while (base := chain[-1]["base"]) is not None:
        try:
            body = manifest.read(directory, base["step"])
            if manifest.identity(body) != base["identity"]:
                raise CheckpointError(
                    f"step {base['step']} is no longer the checkpoint that it builds on"
                )
            manifest.check(directory, base["step"], body)
        except CheckpointError as error:
            raise CheckpointError(
                f"step {step} builds on step {base['step']}, which is refused: {error}"
            ) from error
        chain.append(body)
    return chain


def _compare(
    held: dict[str, Any], named: dict[str, Any], members: dict[str, leaves.Member], partial: bool
) -> set[str]:
    """Checks the target against the manifest and returns the embedding states to convert."""
    where = f"step {held['step']}"
    if unknown := [name for name in members if name not in held["embeddings"]]:
        raise ValueError(
            f"{where} holds no embedding state {unknown[0]!r}; it holds {list(held['embeddings'])}"
        )
    converted = set()
    skip: set[str] = set()
    for prefix, member in members.items():
        entry = held["embeddings"][prefix]
        skip |= set(member.names.values()) | set(entry["names"].values())
        if convert.is_needed(prefix, entry, member.state):
            converted.add(prefix)
    saved = held["arrays"].keys() | held["values"].keys()
    saved -= {record["patch"] for record in held["arrays"].values() if "patch" in record}
    if missing := [name for name in named if name not in saved and name not in skip]:
        raise ValueError(
            f"{where} lacks leaves of the target: {missing}; it holds {sorted(saved - skip)}"
        )
    if not partial and (extra := sorted(saved - named.keys() - skip)):
        raise ValueError(
            f"{where} holds leaves that the target lacks: {extra}; partial=True leaves them out"
        )
    checked = (
        n
        for n in named
        if n in held["arrays"] and not any(n in members[p].names.values() for p in converted)
    )
    if wrong := [
        text for n in checked if (text := leaves.mismatch(n, named[n], held["arrays"][n]))
    ]:
        raise ValueError(f"{where} does not fit the target: " + "; ".join(wrong))
    return converted


# --- reading


def read_arrays(
    directory: Path, chain: list[dict[str, Any]], places: dict[str, leaves.Place]
) -> dict[str, Any]:
    """Reads the arrays of the newest manifest of a chain and applies the patches.

    Args:
      directory: of the checkpoints.
      chain: manifests, newest first.
      places: {name: place}. Only shardings are used here; everything else is read to the host.

    Returns:
      {name: array}. Arrays whose place is a sharding are jax arrays.
    """
    result: dict[str, Any] = {}
    waiting = dict(places)
    patches: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in places}
    for body in chain:
        full = {n: p for n, p in waiting.items() if "patch" not in body["arrays"][n]}
        wanted = dict(full)
        index_names = {n: body["arrays"][n]["patch"] for n in waiting if n not in full}
        wanted |= dict.fromkeys([*index_names, *index_names.values()], leaves.Place("host"))
        found = _read(directory, body, wanted, {n: index_names.get(n) for n in wanted})
        for name, index_name in index_names.items():
            patches[name].append((found[index_name], found[name]))
        for name in full:
            result[name] = found[name]
            del waiting[name]
    return {name: _patched(array, patches[name]) for name, array in result.items()}


def _read(
    directory: Path,
    body: dict[str, Any],
    places: dict[str, leaves.Place],
    index_of: dict[str, str | None],
) -> dict[str, Any]:
    """Reads arrays of one folder. Arrays without entries are not on disk."""
    result: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    keys = {}
    for name, place in places.items():
        record = body["arrays"][name]
        shape = list(record["shape"])
        if (index_name := index_of[name]) is not None:
            shape[0] = body["arrays"][index_name]["shape"][0]
        if 0 in shape:
            result[name] = np.zeros(shape, record["dtype"])
        elif place.kind == "sharding":
            arguments[record["key"]] = ocp.ArrayRestoreArgs(sharding=place.sharding, strict=True)
            keys[record["key"]] = name
        else:
            arguments[record["key"]] = ocp.RestoreArgs(restore_type=np.ndarray)
            keys[record["key"]] = name
    if arguments:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        request = ocp.args.PyTreeRestore(
            item=dict.fromkeys(arguments, 0), restore_args=arguments, partial_restore=True
        )
        found = handler.restore(
            epath.Path(manifest.folder_of(directory, body["step"])), args=request
        )
        handler.close()
        result |= {keys[key]: array for key, array in found.items()}
    return result


def _patched(array: Any, patches: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    """Returns the array overwritten with the patches, which are given newest first."""
    patches = [(index, values) for index, values in patches if index.size]
    if not patches:
        return array
    if isinstance(array, np.ndarray):
        array = array if array.flags.writeable else array.copy()
        for index, values in reversed(patches):
            array[index] = values
        return array
    put = jax.jit(indexing.put, donate_argnums=0, out_shardings=array.sharding)
    for index, values in reversed(patches):
        extra = increments.padded(index.size) - index.size
        index = np.pad(index, (0, extra), constant_values=np.iinfo(np.int32).max)
        array = put(array, index, np.pad(values, [(0, extra), *[(0, 0)] * (values.ndim - 1)]))
    return array


def _check_rows(
    directory: Path, step: int, prefix: str, entry: dict[str, Any], arrays: dict[str, Any]
) -> None:
    """Checks the rows against the digest of the saved state's rows.

    This finds rows lost between the disk, the increments and this process.
    """
    kept = {i: a for i, a in arrays.items() if i.split(".")[0] in ("table", "row_state", "cache")}
    rows = {
        i: a
        for i, a in kept.items()
        if i.startswith(("table.rows", "cache.rows")) or (i[:3] == "row" and a.ndim)
    }
    if digests.digest(rows).tolist() != entry["digest"]:
        raise CheckpointError(
            f"step {step} of {directory}: the rows of embedding state {prefix or 'in the tree'!r} "
            "differ from the saved ones, although no file is damaged; restore an older step and "
            "report this"
        )
