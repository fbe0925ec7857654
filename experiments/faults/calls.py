"""Failures of every system call of save, incremental save, pruning, replacement and restore.

Increments hold states of raw ids, whose pool has grown and whose rows change their owners.

    python -m experiments.faults.run --only calls

`calls.c` stands between this process and libc (LD_PRELOAD, so Linux with a C compiler): it counts
the calls on files below the checkpoints' directory, also those of tensorstore and orbax, and makes
the one of a given index fail with an error number, do half of its work, or kill the process.
Afterwards every earlier good step must restore bit for bit, the new step must be complete or
absent, the message must name the cause, and the next save must work.
"""

import collections
import ctypes
import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.faults.training import bits_of, marked_step
from mpembed_jax import checkpoint, vocabularies

ERRORS = ("ENOSPC", "EMFILE", "EIO", "EACCES", "EROFS", "EDQUOT")
KINDS = (*ERRORS, "short", "SIGKILL")
_FAIL, _SHORT, _KILL = range(3)
# What a message says if orbax dropped the cause of a call that failed only once.
_CAUSE_LOST = "the system shows it now, but did not when orbax looked"


# --- what is done


def _numbers(step: int) -> dict[str, Any]:
    return {"x": np.arange(60) * step, "position": step}


_TX = optax.sgd(0.125)
_SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("t")],
    4,
    "int8",
    None,
    vocabulary=mpembed.VocabularySpec(64, admit_after=1, ways=4),
)


_train_step = jax.jit(functools.partial(marked_step, tx=_TX))
# Where a process finds the states that another one has trained.
_STATES = "MPEMBED_FAULTS_STATES"


def _trained() -> dict[int, tuple[Any, Any]]:
    """Returns the state of raw ids in each checkpoint, and the tracker if it is an increment.

    The pool grows. Ids are admitted until it is full, and some are forgotten. Then new ids take the
    rows of others, twice.
    """

    def pairs(first: int, num: int = 12) -> Any:
        return state.spec.raw_ids({"t": first + np.arange(96) % num})

    state = mpembed.init(jax.random.key(0), _SPEC, _TX)
    found: dict[int, tuple[Any, Any]] = {1: (state, None)}
    state = vocabularies.grow(state, 72)
    state, _ = _train_step(state, checkpoint.track(state), pairs(0, 96))
    state = jax.jit(vocabularies.forget)(state, {"t": pairs(0)["t"][:3]})
    found[2] = state, None
    for step in (3, 4):
        before, tracker = mpembed.stats(state).vocabulary, checkpoint.track(state)
        for _ in range(2):
            state, tracker = _train_step(state, tracker, pairs(100 * step))
        after = mpembed.stats(state).vocabulary
        assert before is not None and after is not None and after.recyclings > before.recyclings
        found[step] = state, tracker
    return found


@functools.cache
def _states() -> dict[int, tuple[Any, Any]]:
    path = Path(os.environ[_STATES])
    if not path.exists():
        path.write_bytes(pickle.dumps(jax.device_get(_trained())))
    return jax.tree.map(jnp.asarray, pickle.loads(path.read_bytes()))


def _embedding(step: int) -> tuple[dict[str, Any], Any]:
    """Returns the tree of a checkpoint, and the tracker if it is an increment."""
    state, tracker = _states()[step]
    return {"emb": state, "position": step}, tracker


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is done to a directory of checkpoints while a call fails."""

    prepare: Callable[[Path], None]  # makes the directory
    good: tuple[int, ...]  # its good steps
    run: Callable[[Path], Any]
    step: int | None  # the step that is saved; None: nothing is
    tree: Callable[[int], dict[str, Any]]  # what a step holds
    may_delete: bool = False  # whether earlier steps may be gone once the new one is complete


def _prepare(folder: Path) -> None:
    for step in (1, 2):
        checkpoint.save(folder, step, _numbers(step))


def _prepare_damaged(folder: Path) -> None:
    _prepare(folder)
    pieces = [p for p in (folder / "step_2").rglob("0") if p.is_file()]
    pieces[0].write_bytes(b"damaged")


def _prepare_chain(folder: Path) -> None:
    for step in (1, 2, 3):
        _save_embedding(folder, step)


def _save_embedding(folder: Path, step: int) -> None:
    tree, tracker = _embedding(step)
    checkpoint.save(folder, step, tree, tracker=tracker)


OPERATIONS = {
    "save": Operation(_prepare, (1, 2), lambda d: checkpoint.save(d, 3, _numbers(3)), 3, _numbers),
    "save in the background": Operation(
        _prepare,
        (1, 2),
        lambda d: checkpoint.save(d, 3, _numbers(3), wait=False).wait(),
        3,
        _numbers,
    ),
    "incremental save": Operation(
        _prepare_chain,
        (1, 2, 3),
        lambda d: _save_embedding(d, 4),
        4,
        lambda n: _embedding(n)[0],
    ),
    "pruning": Operation(
        _prepare,
        (1, 2),
        lambda d: checkpoint.save(d, 3, _numbers(3), keep=1),
        3,
        _numbers,
        may_delete=True,
    ),
    "replacement of a damaged step": Operation(
        _prepare_damaged, (1,), lambda d: checkpoint.save(d, 2, _numbers(2)), 2, _numbers
    ),
    "restore": Operation(
        _prepare, (1, 2), lambda d: checkpoint.restore(d, _numbers(0)), None, _numbers
    ),
    "restore of an increment": Operation(
        _prepare_chain,
        (1, 2, 3),
        lambda d: checkpoint.restore(d, _embedding(3)[0]),
        None,
        lambda n: _embedding(n)[0],
    ),
}


def _check(directory: Path, operation: Operation, outcome: Any, kind: str) -> bool:
    """Checks what a fault left behind, and that the next save works.

    Returns whether the message names the cause, and not that orbax dropped it.

    Args:
      directory: of the checkpoints.
      operation: what was done.
      outcome: what it returned, the exception that it raised, or "killed".
      kind: of the fault.

    Raises:
      AssertionError: saying what is wrong.
    """
    trees = {step: operation.tree(step) for step in (*operation.good, operation.step) if step}
    found, new = checkpoint.steps(directory), operation.step
    failed = isinstance(outcome, BaseException) or outcome == "killed"
    is_named = True
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, checkpoint.CheckpointError), repr(outcome)
        if kind in ERRORS:
            cause = os.strerror(getattr(errno, kind))
            is_named = cause.lower() in str(outcome).lower()
            assert is_named or _CAUSE_LOST in str(outcome), f"no {cause!r} in {outcome}"

    def is_right(step: int) -> bool:
        try:
            restored = checkpoint.restore(directory, trees[step], step=step)
        except checkpoint.CheckpointError:
            return False
        assert bits_of(restored) == bits_of(trees[step]), f"step {step} has other bits"
        return True

    is_complete = new is not None and new in found and is_right(new)
    if new is None and not failed:
        newest = operation.good[-1]
        assert bits_of(outcome) == bits_of(trees[newest]), "other bits than those saved"
    assert failed or new is None or is_complete, f"step {new} is not there after its save"
    if new in found and not is_complete:
        assert new not in operation.good and new == 2, f"step {new} is neither complete nor absent"
    for step in operation.good:
        is_deleted = operation.may_delete and is_complete and step not in found
        assert is_deleted or is_right(step), f"step {step} is lost"
    later = 9 if new is None or is_complete else new
    checkpoint.save(directory, later, operation.tree(3))
    restored = checkpoint.restore(directory, operation.tree(3), step=later)
    assert bits_of(restored) == bits_of(operation.tree(3)), "the next save has other bits"
    left = [p.name for p in directory.iterdir() if not p.name.removeprefix("step_").isdigit()]
    assert left in ([], [".writer"]), f"left behind: {left}"
    return is_named


# --- the fault


def build(folder: Path) -> Path | None:
    """Compiles calls.c; returns the library, or None where there is no C compiler."""
    library = folder / "calls.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    source = Path(__file__).with_suffix(".c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def _library() -> Any:
    library = ctypes.CDLL(None)
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.faults_disarm.restype = ctypes.c_long
    library.faults_call.restype = ctypes.c_char_p
    return library


def _mode(kind: str) -> tuple[int, int]:
    if kind == "SIGKILL":
        return _KILL, 0
    return (_SHORT, 0) if kind == "short" else (_FAIL, getattr(errno, kind))


def _run(operation: Operation, directory: Path, kind: str, index: int) -> tuple[Any, int, str]:
    """Runs an operation with a fault.

    Returns its outcome, the number of calls, and which call met it.
    """
    library = _library()
    library.faults_arm(str(directory).encode(), index, *_mode(kind))
    try:
        outcome = operation.run(directory)
    except Exception as error:
        outcome = error
    num_calls = library.faults_disarm()
    return outcome, num_calls, library.faults_call().decode() if library.faults_happened() else ""


def _in_a_child(operation: Operation, directory: Path, index: int) -> str:
    """Runs an operation in a fork that is killed at a call.

    Returns whether it was, as "killed" or "".
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            outcome, _, _ = _run(operation, directory, "SIGKILL", index)
            status = 0 if not isinstance(outcome, BaseException) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    assert os.WEXITSTATUS(status) == 0, f"the operation failed by itself: {status}"
    return ""


def fail_each(name: str, kind: str, stride: int = 1) -> dict[str, Any]:
    """Makes each call of an operation, or each `stride`-th, meet a kind of fault, one in a run.

    Runs in a process with calls.c loaded.

    Returns:
      Counts: calls of the operation, faults, how many of them the operation survived, after how
      many the message does not name the cause, and faults by function of libc.

    Raises:
      AssertionError: naming the fault after which something is lost.
    """
    operation = OPERATIONS[name]
    counts = {"calls": 0, "faults": 0, "survived": 0, "unnamed": 0}
    functions: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        before, directory = Path(folder) / "before", Path(folder) / "run"
        operation.prepare(before)
        shutil.copytree(before, directory)
        if kind != "SIGKILL":
            _, counts["calls"], _ = _run(operation, directory, kind, -1)
        # With a stride, every kind begins at another call.
        for index in itertools.count(KINDS.index(kind) * stride // len(KINDS), stride):
            shutil.rmtree(directory)
            shutil.copytree(before, directory)
            if kind == "SIGKILL":
                outcome, call = _ask_forker(name, directory, index), "a call"
                is_over = not outcome
            else:
                outcome, _, call = _run(operation, directory, kind, index)
                is_over = not call
            if is_over:
                break
            functions[call] += 1
            try:
                counts["unnamed"] += not _check(directory, operation, outcome, kind)
            except (AssertionError, checkpoint.CheckpointError, OSError, ValueError) as error:
                raise AssertionError(
                    f"{name}, {kind} at call {index} ({call}): {error!r} after {outcome!r}"
                ) from error
            counts["faults"] += 1
            counts["survived"] += not isinstance(outcome, BaseException | str)
    return counts | {"functions": dict(functions)}


# --- processes: one with calls.c loaded, and one that forks what is killed


def _ask_forker(name: str, directory: Path, index: int) -> str:
    """Lets the forker run an operation.

    It has imported everything, but jax has no threads in it yet.
    """
    print(json.dumps([name, str(directory), index]), file=_forker_in(), flush=True)
    return json.loads(_FORKER[0].stdout.readline())


_FORKER: list[subprocess.Popen] = []


def _forker_in() -> Any:
    if not _FORKER:
        command = [sys.executable, "-m", "experiments.faults.calls", "forker"]
        pipe = subprocess.PIPE
        _FORKER.append(
            subprocess.Popen(command, cwd=provenance.ROOT, stdin=pipe, stdout=pipe, text=True)
        )
    return _FORKER[0].stdin


def _fork_on_demand() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, directory, index = json.loads(line)
        answer = _in_a_child(OPERATIONS[name], Path(directory), index)
        print(json.dumps(answer), file=answers, flush=True)


def everything(
    stride: int = 1,
    kinds: tuple[str, ...] = KINDS,
    names: tuple[str, ...] = tuple(OPERATIONS),
) -> dict[str, Any] | None:
    """Runs the operations of these names with every kind of fault in a process of its own.

    Returns counts by operation.

    Returns None where calls.c cannot be compiled.

    Raises:
      AssertionError: naming the fault after which something is lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        if library is None:
            return None
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "JAX_PLATFORMS": "cpu",
            _STATES: f"{folder}/states.pickle",
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        words = [str(stride), ",".join(kinds), ",".join(names)]
        command = [sys.executable, "-m", "experiments.faults.calls", *words]
        done = subprocess.run(
            command, cwd=provenance.ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


def report(stride: int = 1, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the counts of `everything` for the report; without names, of all operations.

    Raises:
      Failed: where calls.c cannot be compiled.
    """
    if (found := everything(stride, names=names or tuple(OPERATIONS))) is None:
        raise command_line.Failed("calls can be made to fail on Linux with a C compiler")
    about = {"stride": stride, "commit": provenance.commit()}
    return {"operations": {name: counts | about for name, counts in found.items()}}


def _main() -> None:
    for name in ("absl", "mpembed_jax.checkpoint"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.argv[1:] == ["forker"]:
        _fork_on_demand()
        return
    several = [lambda text: text.split(",")] * 2
    stride, kinds, names = running.words_from("faults.run", int, *several)
    report: dict[str, Any] = {}
    for name in names:
        report[name] = {"calls": 0, "faults": {}, "survived": 0, "unnamed": 0, "functions": {}}
        for kind in kinds:
            start = time.perf_counter()
            found = fail_each(name, kind, stride)
            report[name]["calls"] = max(report[name]["calls"], found["calls"])
            report[name]["faults"][kind] = found["faults"]
            if kind in ERRORS:
                for function, count in found["functions"].items():
                    report[name]["functions"].setdefault(function, {})[kind] = count
            for what in ("survived", "unnamed"):
                report[name][what] += found[what]
            print(
                f"{name}, {kind}: {found}, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print(json.dumps(report))


if __name__ == "__main__":
    _main()
