"""Saving: a snapshot that donation cannot touch, written by orbax in the background, completed by its manifest.

orbax (AsyncCheckpointer, one folder per array) moves the bytes, also from many processes, and renames the finished folder;
this file decides what is written, and what happens to earlier checkpoints (nothing, until the new one is complete).
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
_TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's suffix of folders that were never completed
_CHUNK = 128 << 20  # bytes of an array per file: pieces are compressed and checksummed side by side

_PENDING: dict[Path, "Saving"] = {}


def _is_divisible(value: Any) -> bool:
    """Whether an array divides into pieces of about _CHUNK bytes: orbax makes equal ones, of single rows if need be.

    A stack of a prime number of rows (Criteo-Kaggle's 33,762,577) would become as many files; it is written in one piece.
    """
    shape = np.shape(value)
    if not shape or not shape[0]:
        return True
    row_bytes = value.dtype.itemsize * math.prod(shape[1:])
    least = -(-shape[0] * row_bytes // _CHUNK)  # pieces needed
    return any(shape[0] % count == 0 for count in range(least, 4 * least + 1))


class _Handler(ocp.PyTreeCheckpointHandler):
    """orbax's handler, which at the end, in the folder that is still temporary, writes our manifest."""

    def __init__(self, body: dict[str, Any], keys: list[str]) -> None:
        super().__init__(use_ocdbt=False)
        self._body, self._keys = body, keys

    def finalize(self, directory: Any) -> None:
        # orbax's own step here merges OCDBT files, of which there are none.
        manifest.write(Path(directory), self._body, self._keys)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)  # orbax asks for both
class _Save(ocp.args.PyTreeSave):
    pass


class Saving:
    """A save on its way.

    Attributes:
      directory: of the checkpoints.
      step: its step.
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
        """Returns when the checkpoint is complete on disk.

        Raises:
          CheckpointError: if it could not be written; earlier checkpoints are as they were.
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
    """Waits for this process's unfinished save in `directory`; its error is raised, or logged where `quietly`."""
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
    """Saves a tree: embedding states, parameters, optimizer states, position in the data, anything of arrays and numbers.

    The values are copied before this returns, so the next step may take the tree donated. A checkpoint is complete or
    absent: its folder gets its name last. In several processes, call it in all of them.

    Args:
      directory: of all checkpoints of a run, made if missing; local, or shared by all processes.
      step: number of this checkpoint, at least 0.
      tree: any pytree of jax and numpy arrays, random keys, bool, int, float, str and bytes.
      tracker: a RowTracker, or {name of the embedding state in the tree: RowTracker}: an incremental checkpoint, which
        holds only the rows touched since the checkpoint at which the tracker was started (see track). Where that would be
        larger than a full one, a full one is saved.
      wait: False returns while the files are being written; call `wait()` on the result. The next save, and restore, wait
        by themselves.
      keep: once this one is complete, delete all but this many of the newest checkpoints up to this step, and those they
        build on; later steps (damaged, or rolled back) are left alone.

    Returns:
      A Saving; its `wait()` returns when the checkpoint is complete.

    Raises:
      TypeError: if a leaf cannot be saved; the message names it.
      ValueError: if a tracker does not fit the state it is given for, or its checkpoint is not here.
      CheckpointError: if this save, or an earlier one that was not waited for, failed; or if a good checkpoint of this
        step exists already (a damaged one is replaced).
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
            replaced = {}  # most rows were touched: a full checkpoint is smaller, and builds on nothing
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
    pieces = {
        key: ocp.SaveArgs(chunk_byte_size=_CHUNK if _is_divisible(value) else None)
        for key, value in written.items()
    }
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
    """Returns an array that later donation or writing in place cannot change."""
    if isinstance(array, np.ndarray):
        return np.array(array)
    if host_memory.is_kept(
        array
    ):  # orbax writes one as it lies, while the next step reuses it, on accelerators too
        return host_memory.to_numpy(array)
    if jax.process_count() > 1 and array.is_fully_addressable:
        return np.array(array)  # of this process alone: the first process writes it
    # On accelerators orbax copies to the host before it returns; on a CPU it would only look at the buffer.
    return jnp.copy(array) if next(iter(array.sharding.device_set)).platform == "cpu" else array


def _make_room(directory: Path, step: int) -> None:
    """Makes the directory, clears what killed saves left, and refuses or removes an earlier checkpoint of this step."""
    final = manifest.folder_of(directory, step)
    try:
        os.makedirs(directory, exist_ok=True)
        is_there = final.exists()
        if is_there and not (final / manifest.NAME).exists():
            raise CheckpointError(
                f"{final} exists and is none of this library's checkpoints; move it away"
            )
        if is_there and not _is_damaged(directory, step):
            raise CheckpointError(
                f"{final} is a good checkpoint already; save under another step, or delete it first"
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
    """Deletes a checkpoint; killed in between, it is among the unfinished ones and not among the steps."""
    unfinished = folder.with_name(folder.name + _TEMPORARY)
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def _failure(directory: Path, step: int, error: Exception) -> CheckpointError:
    """Returns the error to raise, after giving back the space of the unfinished folder."""
    if jax.process_index() == 0:
        shutil.rmtree(
            manifest.folder_of(directory, step).with_name(f"step_{step}{_TEMPORARY}"),
            ignore_errors=True,
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    reason = reason.split(" [tensorstore_spec=")[0]
    return CheckpointError(
        f"step {step} could not be saved in {directory}: {reason}; checkpoints saved before are unchanged"
    )


def _prune(directory: Path, keep: int, newest: int) -> None:
    """Deletes all but the newest `keep` checkpoints up to step `newest`, just completed, and those that they build on.

    Later steps stay: they may be damaged, or of a run that was rolled back, and must not push out what is good.
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
            continue  # a damaged later one cannot say what it builds on
        if base is not None:
            needed.add(base["step"])
    for step in found:
        if step not in needed:
            _remove(manifest.folder_of(directory, step))
