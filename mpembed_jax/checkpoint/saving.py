"""Saving: a snapshot of the tree, written by orbax in the background and completed by a manifest.

Donation cannot change the snapshot. Orbax (AsyncCheckpointer, one folder per array) moves the
bytes, also from many processes, and renames the finished folder. This module decides what is
written. It also deletes old checkpoints, but not before the new one is complete.
"""

import logging
import math
import operator
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mpembed_jax.checkpoint import digests, host_memory, increments, leaves, manifest
from mpembed_jax.checkpoint.manifest import CheckpointError

_LOG = logging.getLogger("mpembed_jax.checkpoint")
_TEMPORARY = ".orbax-checkpoint-tmp"  # suffix that orbax gives to unfinished folders

_PENDING: dict[Path, "Saving"] = {}


def save_args(value: Any, chunk_bytes: int = 128 << 20) -> ocp.SaveArgs:
    """Returns how orbax divides an array: into files of at most `chunk_bytes`, or into none.

    The files of an array are compressed and checksummed in parallel. Orbax makes equal pieces, of a
    single row if necessary. A stack with a prime number of rows (such as Criteo-Kaggle's
    33,762,577) would become as many files, so it is written in one piece.
    """
    shape, is_divisible = np.shape(value), True
    if shape and shape[0]:
        row_bytes = value.dtype.itemsize * math.prod(shape[1:])
        least = -(-shape[0] * row_bytes // chunk_bytes)  # number of pieces needed
        is_divisible = any(shape[0] % count == 0 for count in range(least, 4 * least + 1))
    return ocp.SaveArgs(chunk_byte_size=chunk_bytes if is_divisible else None)


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler, which also writes the manifest while the folder is still temporary."""

    def __init__(self, body: dict[str, Any], keys: list[str]) -> None:
        super().__init__(use_ocdbt=False)
        self._body, self._keys = body, keys

    def finalize(self, directory: Any) -> None:
        # Orbax's own step would merge OCDBT files here, but there are none.
        manifest.write(Path(directory), self._body, self._keys)


# Orbax requires both flags.
@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Save(ocp.args.PyTreeSave):
    pass


class Saving:
    """A save in progress.

    Attributes:
      directory: of the checkpoints.
      step: number of the checkpoint.
      nbytes: bytes of the arrays that are written, before compression.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        nbytes: int,
        checkpointer: ocp.AsyncCheckpointer,
        keep: int | None,
    ):
        self.directory, self.step, self.nbytes = directory, step, nbytes
        self._checkpointer: ocp.AsyncCheckpointer | None = checkpointer
        self._keep = keep
        self._error: CheckpointError | None = None

    def wait(self) -> None:
        """Waits until the checkpoint is complete on disk.

        Raises:
          CheckpointError: if it could not be written. Earlier checkpoints are unchanged.
        """
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            try:
                checkpointer.wait_until_finished()
            except Exception as error:
                self._error = _failure(self.directory, self.step, error)
                self._error.__cause__ = error
            else:
                if self._keep is not None and jax.process_index() == 0:
                    try:
                        _prune(self.directory, self._keep, self.step)
                    except (OSError, CheckpointError) as error:
                        _LOG.warning(
                            "step %d is saved, but older ones could not be deleted: %s",
                            self.step,
                            error,
                        )
            finally:
                checkpointer.close()
                if _PENDING.get(self.directory) is self:
                    del _PENDING[self.directory]
        if self._error is not None:
            raise self._error


def finish_pending(directory: Path, *, quietly: bool = False) -> None:
    """Waits for this process's unfinished save in `directory`.

    Its error is raised, or logged if `quietly`.
    """
    if (pending := _PENDING.get(directory)) is not None:
        try:
            pending.wait()
        except CheckpointError as error:
            if not quietly:
                raise
            _LOG.warning("%s", error)


def save(
    directory: Any,
    step: int,
    tree: Any,
    *,
    tracker: Any = None,
    wait: bool = True,
    keep: int | None = None,
) -> Saving:
    """Saves a tree of embedding states, parameters, optimizer states and other arrays and numbers.

    The values are copied before this function returns, so the tree may be donated to the next step.
    A checkpoint is either complete or absent, because its folder gets its name last. With several
    processes, call it in all of them.

    Args:
      directory: for all checkpoints of a run; made if missing. It is local, or shared by all
        processes.
      step: number of this checkpoint, at least 0.
      tree: any pytree of jax and numpy arrays, random keys, bool, int, float, str and bytes; for
        example also the position in the data.
      tracker: for an incremental checkpoint, a RowTracker, or {name of the embedding state in the
        tree: RowTracker}. The checkpoint then holds only the rows touched since the checkpoint at
        which the tracker was started (see track). If that would be larger than a full checkpoint, a
        full one is saved.
      wait: if False, return while the files are being written; call `wait()` on the result. The
        next save or restore waits by itself.
      keep: once this checkpoint is complete, keep only this many of the newest checkpoints up to
        this step, and those on which they build; delete the others. Later steps (damaged, or rolled
        back) are not deleted.

    Returns:
      A Saving; its `wait()` returns when the checkpoint is complete.

    Raises:
      TypeError: if a leaf cannot be saved; the message names it.
      ValueError: if a tracker does not fit its state, or if the directory does not hold the
        checkpoint from which it started.
      CheckpointError: if this save failed, or an earlier one that was not waited for. Also if a
        good checkpoint of this step exists already (a damaged one is replaced).
    """
    folder, step = Path(directory).absolute(), operator.index(step)
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    finish_pending(folder)
    named = leaves.named(tree)
    _make_room(folder, step)
    arrays, values = leaves.split(named)
    body: dict[str, Any] = {"step": step, "time": time.time(), "values": values, "base": None}
    members = leaves.embeddings(tree)
    body["embeddings"] = {name: digests.record(member) for name, member in members.items()}
    body["arrays"] = {
        name: leaves.describe(name, named[name], array) for name, array in arrays.items()
    }
    if tracker is not None:
        base, replaced = increments.collect(folder, step, members, tracker)
        if sum(p.values.nbytes for p in replaced.values()) >= sum(
            arrays[n].nbytes for n in replaced
        ):
            # Most rows were touched. A full checkpoint is smaller and does not build on another.
            replaced = {}
        body["base"] = base if replaced else None
        for name, patch in replaced.items():
            arrays[name] = patch.values
            arrays[patch.index_name] = patch.where
            body["arrays"][name]["patch"] = patch.index_name
            body["arrays"][patch.index_name] = leaves.describe(
                patch.index_name, patch.where, patch.where
            )
    written = {
        body["arrays"][name]["key"]: _snapshot(array)
        for name, array in arrays.items()
        if array.size
    }
    nbytes = sum(a.size * a.dtype.itemsize for a in written.values())
    checkpointer = ocp.AsyncCheckpointer(
        _Handler(body, list(written)),
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )
    pieces = {key: save_args(value) for key, value in written.items()}
    try:
        checkpointer.save(manifest.folder_of(folder, step), args=_Save(written, save_args=pieces))
    except Exception as error:
        checkpointer.close()
        raise _failure(folder, step, error) from error
    saving = _PENDING[folder] = Saving(folder, step, nbytes, checkpointer, keep)
    if wait:
        saving.wait()
    return saving


def _snapshot(array: Any) -> Any:
    """Returns a copy of the array that donation or writing in place cannot change."""
    if isinstance(array, np.ndarray):
        return np.array(array)
    # Orbax writes an array in host memory without a copy, also on accelerators, while the next step
    # reuses its memory.
    if host_memory.is_kept(array):
        return host_memory.to_numpy(array)
    if jax.process_count() > 1 and array.is_fully_addressable:
        # The array belongs to this process alone, and the first process writes it.
        return np.array(array)
    # On accelerators, orbax copies to the host before it returns. On a CPU, it would only refer to
    # the buffer.
    return jnp.copy(array) if next(iter(array.sharding.device_set)).platform == "cpu" else array


def _make_room(directory: Path, step: int) -> None:
    """Prepares the directory for a save of this step.

    It makes the directory, deletes what killed saves left behind, and refuses or removes an earlier
    checkpoint of this step.
    """
    final = manifest.folder_of(directory, step)
    try:
        os.makedirs(directory, exist_ok=True)
        is_there = final.exists()
        if is_there and not (final / manifest.NAME).exists():
            raise CheckpointError(
                f"{final} exists but was not written by mpembed_jax; move it away"
            )
        if is_there and not _is_damaged(directory, step):
            raise CheckpointError(
                f"{final} is already a good checkpoint; save under another step, or delete it first"
            )
        if jax.process_index() == 0:
            if is_there:
                _remove(final)
            for left in directory.glob(f"step_*{_TEMPORARY}*"):
                shutil.rmtree(left)
    except OSError as error:
        raise _failure(directory, step, error) from error


def _is_damaged(directory: Path, step: int) -> bool:
    try:
        manifest.check(directory, step, manifest.read(directory, step))
    except CheckpointError as error:
        _LOG.warning("replacing a damaged checkpoint: %s", error)
        return True
    return False


def _remove(folder: Path) -> None:
    """Deletes a checkpoint.

    The folder is renamed first. If the process is killed in between, the checkpoint counts as
    unfinished and is not among the steps.
    """
    unfinished = folder.with_name(folder.name + _TEMPORARY)
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def _failure(directory: Path, step: int, error: Exception) -> CheckpointError:
    """Deletes the unfinished folder, to free its space, and returns the error to raise."""
    if jax.process_index() == 0:
        shutil.rmtree(
            manifest.folder_of(directory, step).with_name(f"step_{step}{_TEMPORARY}"),
            ignore_errors=True,
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    reason = reason.split(" [tensorstore_spec=")[0]
    return CheckpointError(
        f"step {step} could not be saved in {directory}: {reason}; checkpoints saved before are "
        "unchanged"
    )


def _prune(directory: Path, keep: int, newest: int) -> None:
    """Deletes old checkpoints after the one of step `newest` is complete.

    The newest `keep` checkpoints up to this step stay, and those on which they build. Later steps
    stay too. They may be damaged or belong to a run that was rolled back, and must not displace
    good ones.
    """
    found = manifest.steps(directory)
    earlier = [step for step in found if step <= newest]
    needed = {step for step in found if step > newest} | set(earlier[-keep:])
    for step in reversed(found):
        if step not in needed:
            continue
        try:
            base = manifest.read(directory, step)["base"]
        except CheckpointError:
            if step <= newest:
                raise
            # A damaged later checkpoint cannot say on which one it builds.
            continue
        if base is not None:
            needed.add(base["step"])
    for step in found:
        if step not in needed:
            _remove(manifest.folder_of(directory, step))
