"""Restoring: finds the newest undamaged checkpoint, reads it, and places it like the target.

Orbax reads the arrays, directly onto the target's shardings if the arrays on disk have the target's
shape and dtype. Increments are applied to the full checkpoint on which they build. Embedding states
of another format or cache go through `convert`.
"""

import functools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpembed_jax.arrays import huge_pages, indexing
from mpembed_jax.checkpoint import (
    agreement,
    array_files,
    convert,
    digests,
    files,
    increments,
    leaves,
    manifest,
    placements,
    saving,
    schema,
)
from mpembed_jax.checkpoint.errors import (
    CheckpointError,
    DamagedError,
    UnreadableError,
    cause_of,
)
from mpembed_jax.row_ids import NO_ID

_LOG = logging.getLogger("mpembed_jax.checkpoint")
# Arrays of an embedding state whose values are also in the state's entry in the manifest.
_IN_ENTRY = {"fingerprint": "fingerprint", "key": "key", "step": "step", "pending": "is_pending"}


def restore(directory: Any, target: Any, *, step: int | None = None, partial: bool = False) -> Any:
    """Restores a tree that `save` wrote.

    Every file is checked before anything is used. A checkpoint with a missing, shortened or changed
    file is refused. Without `step`, the next older checkpoint is then used, and the log (logger
    `mpembed_jax.checkpoint`) says what was wrong with each refused one.

    Args:
      directory: as in save.
      target: a tree like the saved one, of arrays or jax.ShapeDtypeStructs; not consumed. It gives
        the structure and the shardings. A leaf without a sharding, or an uncommitted array, goes
        to the mesh of its embedding state, or else to the default device. An EmbeddingState
        may have another storage, row state dtype, cache or placement than the saved one. Its rows
        are then encoded again or moved, and the log says so.
      step: the checkpoint's step. None: the newest good one.
      partial: whether the checkpoint may hold leaves that the target lacks.

    Returns:
      A tree of the target's structure with the saved values. Arrays for an accelerator's host
      memory are first read into ordinary host memory. While restoring, the host therefore holds
      them twice, and the device holds one block of them.

    Raises:
      FileNotFoundError: if the directory has no checkpoint (of this step).
      CheckpointError: if the requested checkpoint is damaged, or if every one is; the message names
        the array and the file. Without `step`, also if a newer checkpoint than the newest good one
        cannot be read now, or was written by a newer version: it may be good.
      TypeError: if directory is not a path, or step is not a whole number.
      ValueError: if the target has other leaves, shapes or dtypes than the checkpoint.
    """
    call = "restore(directory, target)"
    folder = manifest.path_of(call, directory)
    step = None if step is None else manifest.number_of(call, step)
    saving.finish_pending(folder)
    chain = agreement.from_first(lambda: choose(folder, step))
    target = leaves.without_clocks(target)
    named = leaves.named(target)
    members = leaves.embeddings(target)
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
    places = {name: leaves.Destination.of(leaf) for name, leaf in named.items()}
    for member in members.values():
        places |= placements.places(member)
    direct = {name: place for name, place in places.items() if name not in others}
    for prefix in converted:
        convert.check(prefix, held["embeddings"][prefix], held["arrays"], members[prefix].state)
    arrays = read_arrays(folder, chain, direct | dict.fromkeys(inner, leaves.Destination("host")))
    _check_unchanged(folder, chain)
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
        check_tags(folder, held["step"], prefix, entry, ours)
        if prefix in converted:
            for inner_name, array in convert.convert(prefix, entry, ours, member.state).items():
                name = member.names[inner_name]
                values[name] = leaves.finish(named[name], {}, places[name].put(array))
    leaves_ = [values[name] for name in named]
    tree = jax.tree.unflatten(jax.tree.structure(target), leaves_)
    return huge_pages.place(leaves.with_clocks(tree))


# --- choice of the checkpoint


def choose(directory: Path, step: int | None) -> list[dict[str, Any]]:
    """Returns the manifests to restore from, newest first."""
    try:
        if step is None:
            return _newest(directory)
        if not files.exists(manifest.folder_of(directory, step)):
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {directory}; there are "
                f"{manifest.steps(directory) or 'none'}"
            )
        return manifest.chain(directory, step)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{directory} cannot be read now: {error}") from error


def _newest(directory: Path) -> list[dict[str, Any]]:
    """Returns the chain of the newest good checkpoint.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      CheckpointError: if all are damaged. Also if a newer one cannot be read now, or was written by
        a newer version. It may be good, and a run that went on from an older one would lose the
        steps between the two.
    """
    while True:
        found = manifest.steps(directory)
        if not found:
            raise FileNotFoundError(
                f"no checkpoint in {directory}"
                + ("" if files.exists(directory) else ", which does not exist")
                + "; save one first"
            )
        refused = []
        for candidate in reversed(found):
            try:
                chain = manifest.chain(directory, candidate)
            except DamagedError as error:
                refused.append(str(error))
            except CheckpointError as error:
                raise type(error)(
                    f"{error}; to go on from an older checkpoint, restore it with step="
                ) from error
            else:
                break
        else:
            chain = []
        if refused and manifest.steps(directory) != found:
            continue  # A writer saved or deleted checkpoints meanwhile.
        for reason in refused:
            _LOG.warning("refused checkpoint: %s", reason)
        if not chain:
            raise DamagedError(f"no good checkpoint in {directory}: " + "; ".join(refused))
        if refused:
            _LOG.warning("using step %d, the newest good checkpoint of %s", candidate, directory)
        return chain


def _check_unchanged(directory: Path, chain: list[dict[str, Any]]) -> None:
    """Checks that no checkpoint of a chain was replaced while its arrays were read.

    Raises:
      CheckpointError: if one was.
    """
    for body in chain:
        if manifest.identity(manifest.read(directory, body["step"])) != manifest.identity(body):
            raise CheckpointError(
                f"step {body['step']} of {directory} was replaced while it was being restored; "
                "restore again"
            )


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
        elif entry["names"] != member.names:
            raise ValueError(
                f"{where} names the arrays of embedding state {prefix!r} {entry['names']}, the "
                f"target {member.names}"
            )
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
    directory: Path, chain: list[dict[str, Any]], places: dict[str, leaves.Destination]
) -> dict[str, Any]:
    """Reads the arrays of the newest manifest of a chain and applies the patches.

    Args:
      directory: the folder of the checkpoints.
      chain: manifests, newest first.
      places: {name: place}. Arrays with a sharding are read onto it, all others to the host.

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
        wanted |= dict.fromkeys([*index_names, *index_names.values()], leaves.Destination("host"))
        found = _read(directory, body, wanted)
        for name, index_name in index_names.items():
            index = found[index_name]
            _check_index(body, name, index)
            patches[name].append((index, found[name]))
        for name in full:
            result[name] = found[name]
            del waiting[name]
    return {name: _patched(array, patches[name]) for name, array in result.items()}


def _read(
    directory: Path,
    body: dict[str, Any],
    places: dict[str, leaves.Destination],
) -> dict[str, Any]:
    """Reads arrays of one folder. Empty arrays are not on disk."""
    folder = manifest.folder_of(directory, body["step"])
    result: dict[str, Any] = {}
    stores = {}
    for name in places:
        record = body["arrays"][name]
        shape = schema.shape_on_disk(body, record)
        if 0 in shape:
            result[name] = np.zeros(shape, record["dtype"])
        else:
            stores[name] = array_files.open_store(folder / record["key"])
    name = ""
    try:
        waiting: dict[str, tuple[Any, dict[Any, Any]]] = {}
        for name, opening in stores.items():
            store = opening.result()
            place = places[name]
            parts: Any = [(slice(None),) * store.rank]
            if place.kind == "sharding":
                parts = place.sharding.addressable_devices_indices_map(store.shape).values()
            waiting[name] = store, {_slices(part): store[part].read() for part in parts}
        for name, (store, reads) in waiting.items():
            place = places[name]
            if place.kind != "sharding":
                (read,) = reads.values()
                result[name] = read.result()
                continue
            values = {part: read.result() for part, read in reads.items()}
            result[name] = jax.make_array_from_callback(
                store.shape, place.sharding, functools.partial(_part, values)
            )
    except (ValueError, OSError, RuntimeError) as error:
        raise UnreadableError(
            f"step {body['step']}: array {name!r} could not be read from {folder}: "
            f"{cause_of(error)}"
        ) from error
    return result


def _part(values: dict[Any, np.ndarray], part: tuple[slice, ...]) -> np.ndarray:
    return values[_slices(part)]


def _slices(part: tuple[slice, ...]) -> tuple:
    """Returns slices as tuples, because Python 3.11 cannot hash slices."""
    return tuple((s.start, s.stop, s.step) for s in part)


def _check_index(body: dict[str, Any], name: str, index: np.ndarray) -> None:
    size = body["arrays"][name]["shape"][0]
    if index.size and (index.min() < 0 or index.max() >= size):
        raise DamagedError(
            f"step {body['step']}: the increment of array {name!r} names a row outside [0, {size})"
        )


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

    The digest finds rows that were lost when files were read or increments applied. Before that,
    the small arrays whose values are also in the entry are compared with it.
    """
    for inner, field in _IN_ENTRY.items():
        if np.asarray(arrays[inner]).tolist() != entry[field]:
            raise DamagedError(
                f"step {step} of {directory}: {inner} of embedding state "
                f"{prefix or 'in the tree'!r} is not what the manifest says"
            )
    kept = {i: a for i, a in arrays.items() if i.split(".")[0] in ("table", "row_state", "cache")}
    rows = {
        i: a
        for i, a in kept.items()
        if i.startswith(("table.rows", "cache.rows")) or (i[:3] == "row" and a.ndim)
    }
    if digests.digest(rows).tolist() != entry["digest"]:
        raise CheckpointError(
            f"step {step} of {directory}: the rows of embedding state {prefix or 'in the tree'!r} "
            "differ from the saved ones, although no file is damaged. An increment lacks rows that "
            "no plan named: the arrays of the state were changed by hand, or by write_rows or "
            "vocabularies.forget before an earlier version saved. Restore an older step, and save "
            "a full checkpoint after such a change. If there was none, report this error"
        )


def check_tags(
    directory: Path, step: int, prefix: str, entry: dict[str, Any], arrays: dict[str, Any]
) -> None:
    """Checks that each tag is a row of its shard, because a step writes to the row of a tag.

    Raises:
      DamagedError: if a tag is not.
    """
    if (tags := arrays.get("cache.tags")) is None:
        return
    num_rows = arrays["table.rows"].shape[0] // entry["shards"]
    if not bool(((tags == NO_ID) | ((tags >= 0) & (tags < num_rows))).all()):
        raise DamagedError(
            f"step {step} of {directory}: the cache of embedding state {prefix or 'in the tree'!r} "
            f"names a row outside [0, {num_rows})"
        )
