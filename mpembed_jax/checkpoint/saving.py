"""Saving: orbax writes a copy of the tree in the background. The manifest is written last.

Donation cannot change the copy. Orbax (AsyncCheckpointer, one folder per array) moves the
bytes, also from many processes, and renames the finished folder. This module decides what is
written. It also deletes old checkpoints, but not before the new one is complete.
"""

import contextlib
import itertools
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mpembed_jax.checkpoint import (
    agreement,
    digests,
    files,
    host_memory,
    increments,
    leaves,
    manifest,
)
from mpembed_jax.checkpoint.claim import Claim
from mpembed_jax.checkpoint.errors import CheckpointError, DamagedError, cause_of

_LOG = logging.getLogger("mpembed_jax.checkpoint")
_TEMPORARY = ".orbax-checkpoint-tmp"  # suffix that orbax gives to unfinished folders

# Keys: texts of the errors that orbax raises if it cannot see one of its folders, or a file in it.
# Values: the path of that folder inside the checkpoint's folder. These errors do not say why.
_UNSEEN = {
    "Path is not a directory": "",
    "Checkpoint directory does not exist": "",
    "No ArrayMetadata found": manifest.OF_PROCESSES,
}
_DAMAGED = ".damaged"  # suffix of a damaged checkpoint that is being replaced

_PENDING: dict[str, "Saving"] = {}  # {real path of a directory: the unfinished save there}
_LOCK = threading.RLock()  # saves of several threads start one after another


def save_args(value: Any, chunk_bytes: int = 128 << 20) -> ocp.SaveArgs:
    """Returns how orbax divides an array: into files of at most `chunk_bytes`, or not at all.

    The files of an array are compressed and checksummed in parallel. Orbax makes equal pieces, of a
    single row if necessary. A stack with a prime number of rows (such as Criteo-Kaggle's
    33,762,577) would become one file for each row, so it is written in one piece.
    """
    shape = np.shape(value)
    is_divisible = True
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
      directory: the folder of all checkpoints.
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
        claim: Claim | None,
    ):
        self.directory, self.step, self.nbytes = directory, step, nbytes
        self._keep = keep
        self._error: CheckpointError | None = None
        self._thread = threading.Thread(
            target=self._finish, args=(checkpointer, claim), name=f"save of step {step}"
        )
        self._thread.start()

    def _finish(self, checkpointer: ocp.AsyncCheckpointer, claim: Claim | None) -> None:
        """Waits for orbax, deletes what is no longer needed, and releases the directory's claim."""
        try:
            checkpointer.wait_until_finished()
            if claim is not None and not files.exists(
                manifest.folder_of(self.directory, self.step) / manifest.NAME
            ):
                raise CheckpointError("the checkpoint is not there after its save")
        except BaseException as error:
            self._error = _failure(self.directory, self.step, error, claim)
            self._error.__cause__ = error
        else:
            if claim is not None:
                self._clean()
        finally:
            _close(checkpointer)
            if claim is not None:
                claim.release()

    def _clean(self) -> None:
        try:
            shutil.rmtree(_aside(self.directory, self.step), ignore_errors=True)
            if self._keep is not None:
                _prune(self.directory, self._keep, self.step)
        except (OSError, CheckpointError) as error:
            _LOG.warning(
                "step %d is saved, but older ones could not be deleted: %s", self.step, error
            )

    def wait(self) -> None:
        """Waits until the checkpoint is complete on disk.

        Raises:
          CheckpointError: if it could not be written. Earlier checkpoints are unchanged.
        """
        self._thread.join()
        for key, pending in list(_PENDING.items()):
            if pending is self:
                del _PENDING[key]
        if self._error is not None:
            raise self._error


def finish_pending(directory: Path) -> None:
    """Waits for this process's unfinished save in `directory`. Its error is logged."""
    if (pending := _PENDING.get(os.path.realpath(directory))) is not None:
        try:
            pending.wait()
        except CheckpointError as error:
            _LOG.error("%s", error)


def _finish_all() -> None:
    for pending in list(_PENDING.values()):
        finish_pending(pending.directory)


# Python shuts down its pools of threads before it waits for other threads, and a running save needs
# the pools. So threading._register_atexit finishes saves earlier. This function is private, so a
# version of Python may lack it. There, a save that nobody waited for is lost when the program ends.
if (_register := getattr(threading, "_register_atexit", None)) is not None:
    _register(_finish_all)


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
    processes, call `save` in all of them.

    Args:
      directory: the folder of all checkpoints of a run. It is made if it is missing. It is local,
        or shared by all processes.
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
      TypeError: if a leaf cannot be saved; the message names it. Also if directory, step or tracker
        has another type.
      ValueError: if a tracker does not fit its state, if rows were changed outside of steps after
        `track`, or if the directory does not hold the checkpoint from which the tracker started.
        Also if an embedding state was made for another spec, or averaged, or if an array was
        donated.
      CheckpointError: if this save failed, if another process is saving in this directory, or if a
        good checkpoint of this step exists. A damaged one is replaced as soon as the new one is
        complete. If an earlier save with wait=False failed, its error is logged (logger
        `mpembed_jax.checkpoint`), and this save goes on.
    """
    call = "save(directory, step, tree)"
    folder = manifest.path_of(call, directory)
    step = manifest.number_of(call, step)
    trackers = tracker.values() if isinstance(tracker, Mapping) else (tracker,)
    for each in trackers:
        if tracker is not None and not isinstance(each, increments.RowTracker):
            raise TypeError(
                f"{call}: tracker must be a RowTracker (from track), or a mapping from names of "
                f"embedding states to RowTrackers, got {type(each).__name__}"
            )
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    for name, leaf in leaves.named(tree).items():
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"{call}: leaf {name!r} was donated to an earlier call, which has reused its "
                "memory; save what that call returned: state, .. = step(state, ..)"
            )
    for member in leaves.embeddings(tree).values():
        member.state.check_spec()
    tree = leaves.without_clocks(tree)
    named = leaves.named(tree)
    arrays, values = leaves.split(named)
    with _LOCK:
        finish_pending(folder)
        claim = _claim(folder, step)
        try:
            saving = _start(
                folder, step, tree, named, arrays, values, tracker=tracker, keep=keep, claim=claim
            )
        except BaseException as error:
            if claim is not None:
                claim.release()
            if isinstance(error, OSError):
                raise _error(folder, step, error) from error
            raise
        _PENDING[os.path.realpath(folder)] = saving
    if wait:
        saving.wait()
    return saving


def _start(
    folder: Path,
    step: int,
    tree: Any,
    named: dict[str, Any],
    arrays: dict[str, Any],
    values: dict[str, Any],
    *,
    tracker: Any,
    keep: int | None,
    claim: Claim | None,
) -> Saving:
    """Copies the values of the tree and starts to write them, in a directory that was claimed."""
    token, is_damaged = agreement.from_first(lambda: _make_room(folder, step))
    body: dict[str, Any] = {"step": step, "time": time.time(), "values": values, "base": None}
    members = leaves.embeddings(tree)
    body["embeddings"] = {name: digests.record(member) for name, member in members.items()}
    # Each save has folders of its own for its arrays. A writer that a failed save left behind then
    # cannot write into a later save of the same step.
    keys = (f"{number}.{token}" for number in itertools.count())
    body["arrays"] = {
        name: leaves.describe(next(keys), named[name], array) for name, array in arrays.items()
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
            index_name = patch.index_name
            while index_name in named:
                index_name += "_"
            arrays[name] = patch.values
            arrays[index_name] = patch.where
            body["arrays"][name]["patch"] = index_name
            if index_name not in body["arrays"]:
                body["arrays"][index_name] = leaves.describe(next(keys), patch.where, patch.where)
    written = {
        body["arrays"][name]["key"]: _snapshot(array)
        for name, array in arrays.items()
        if array.size
    } or {next(keys): np.zeros(1, np.uint8)}  # orbax does not write an empty tree
    nbytes = sum(a.size * a.dtype.itemsize for a in written.values())
    pieces = {key: save_args(value) for key, value in written.items()}
    checkpointer = None
    try:
        if is_damaged and claim is not None:
            _set_aside(folder, step)
        checkpointer = ocp.AsyncCheckpointer(
            _Handler(body, list(written)),
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        checkpointer.save(manifest.folder_of(folder, step), args=_Save(written, save_args=pieces))
        return Saving(folder, step, nbytes, checkpointer, keep, claim)
    except BaseException as error:
        _close(checkpointer)
        failure = _failure(folder, step, error, claim)
        if isinstance(error, Exception):
            raise failure from error
        raise


def _close(checkpointer: ocp.AsyncCheckpointer | None) -> None:
    """Frees the resources of a checkpointer.

    Its close() may raise the error of the save again. This is only logged.
    """
    try:
        if checkpointer is not None:
            checkpointer.close()
    except Exception as error:
        _LOG.debug("closing the checkpointer: %s", error)


def _snapshot(array: Any) -> Any:
    """Returns a copy of the array that donation or writing in place cannot change."""
    if isinstance(array, np.ndarray):
        return np.array(array)
    # Orbax makes no copy of an array in host memory, not even on accelerators. The next step would
    # overwrite what orbax still writes. So it is copied here.
    if host_memory.is_kept(array):
        return host_memory.to_numpy(array)
    if jax.process_count() > 1 and array.is_fully_addressable:
        # The array belongs to this process alone, and the first process writes it.
        return np.array(array)
    # On accelerators, orbax copies to the host before it returns. On a CPU, it would only refer to
    # the buffer.
    return jnp.copy(array) if next(iter(array.sharding.device_set)).platform == "cpu" else array


def _claim(directory: Path, step: int) -> Claim | None:
    """Makes the directory and claims it for this save.

    With several processes, the first one does it for all, and the others return None.

    Raises:
      CheckpointError: in all processes, if another writer holds the claim, or if the directory
        cannot be written.
    """
    taken: list[Claim] = []

    def take() -> None:
        try:
            if not files.exists(directory):
                os.makedirs(directory, exist_ok=True)
            taken.append(Claim(directory))
        except (OSError, CheckpointError) as error:
            raise _error(directory, step, error) from error

    agreement.from_first(take)
    return taken[0] if taken else None


def _make_room(directory: Path, step: int) -> tuple[str, bool]:
    """Deletes what killed saves left behind, and refuses to replace a checkpoint that may be good.

    Returns:
      A new token for the names of this save's folders, and whether a damaged checkpoint of this
      step is to be replaced.
    """
    final = manifest.folder_of(directory, step)
    is_damaged = False
    try:
        for left in directory.glob(f"step_*{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in directory.glob(f"step_*{_DAMAGED}"):
            if files.exists(left.with_name(left.name.removesuffix(_DAMAGED)) / manifest.NAME):
                shutil.rmtree(left, ignore_errors=True)  # its replacement is complete
        if files.exists(final):
            if not files.exists(final / manifest.NAME):
                raise CheckpointError(
                    f"{final} exists but was not written by mpembed_jax; move it away"
                )
            is_damaged = _is_damaged(directory, step)
    except OSError as error:
        raise _error(directory, step, error) from error
    return secrets.token_hex(4), is_damaged


def _is_damaged(directory: Path, step: int) -> bool:
    """Returns True if a step's checkpoint, or one on which it builds, is damaged.

    Raises:
      CheckpointError: if it is good, or if it may be.
    """
    final = manifest.folder_of(directory, step)
    try:
        manifest.chain(directory, step)
    except DamagedError as error:
        _LOG.warning("replacing a damaged checkpoint: %s", error)
        return True
    except CheckpointError as error:
        raise CheckpointError(
            f"{final} is there and may be a good checkpoint; save under another step, or delete it "
            f"first ({error})"
        ) from error
    raise CheckpointError(
        f"{final} is already a good checkpoint; save under another step, or delete it first"
    )


def _aside(directory: Path, step: int) -> Path:
    """Returns where a damaged checkpoint lies while its replacement is written."""
    return manifest.folder_of(directory, step).with_name(f"step_{step}{_DAMAGED}")


def _set_aside(directory: Path, step: int) -> None:
    """Moves a damaged checkpoint out of the way of its replacement."""
    aside = _aside(directory, step)
    shutil.rmtree(aside, ignore_errors=True)
    manifest.folder_of(directory, step).rename(aside)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint.

    The folder is renamed first. If the process is killed in between, the checkpoint counts as
    unfinished and is not among the steps.
    """
    unfinished = folder.with_name(folder.name + _TEMPORARY)
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def _failure(
    directory: Path, step: int, error: BaseException, claim: Claim | None
) -> CheckpointError:
    """Undoes a failed save, as far as the system lets it, and returns the error to raise.

    It frees the space of the unfinished folder, and puts a damaged checkpoint back in its place.
    """
    final = manifest.folder_of(directory, step)
    unfinished = final.with_name(f"step_{step}{_TEMPORARY}")
    failure = _error(directory, step, error, _why_unseen(unfinished, error))
    if claim is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            if files.exists(_aside(directory, step)) and not files.exists(final):
                _aside(directory, step).rename(final)
    return failure


def _why_unseen(unfinished: Path, error: BaseException) -> str:
    """Returns why orbax did not see a file of an unfinished checkpoint.

    The reason is "" if the error is about something else. The system is asked for the reason
    again. If the file is visible by now, the text says so.
    """
    unseen = [unfinished / name for text, name in _UNSEEN.items() if text in str(error)]
    try:
        for folder in unseen:
            for path in (folder, *(folder / name for name in os.listdir(folder))):
                os.stat(path)
    except OSError as reason:
        return f" ({reason.filename}: {files.reason(reason)})"
    return " (the system shows it now, but did not when orbax looked; save again)" if unseen else ""


def _error(directory: Path, step: int, error: BaseException, why: str = "") -> CheckpointError:
    return CheckpointError(
        f"step {step} could not be saved in {directory}: {cause_of(error).rstrip('.')}{why}; "
        "checkpoints saved earlier are unchanged"
    )


def _prune(directory: Path, keep: int, newest: int) -> None:
    """Deletes old checkpoints after the one of step `newest` is complete.

    The newest `keep` checkpoints up to this step stay, and those on which they build. Later steps
    stay too. They may be damaged or belong to a run that was rolled back, and must not displace
    good ones.
    """
    found = []
    bases = {}
    for step in manifest.steps(directory):
        try:
            bases[step] = manifest.read(directory, step)["base"]
        except DamagedError:
            # Its base is unknown, and nothing can be restored from it.
            if step > newest:
                continue
        found.append(step)
    earlier = [step for step in found if step <= newest and step in bases]
    needed = {step for step in found if step > newest} | set(earlier[-keep:])
    waiting = sorted(needed)
    while waiting:
        base = bases[waiting.pop()]
        if base is not None and base["step"] in bases and base["step"] not in needed:
            needed.add(base["step"])
            waiting.append(base["step"])
    for step in found:
        if step not in needed:
            _remove(manifest.folder_of(directory, step))
