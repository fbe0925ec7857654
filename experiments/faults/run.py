"""The test that nothing gets lost.

It has kills, damaged files, full and vanished disks, ids from hell, NaN gradients and a long soak.
Every part works by itself and returns counts; a part that finds anything wrong raises. The training
is that of README's step: an INT8 table with an LFU cache, row-wise Adagrad, Adam on dense
parameters, checkpoints in the background, full and incremental in turns. Kills are SIGKILL in a
process of its own, at random moments of training and of saving; the bits at the end are compared
with those of a run nobody interrupted. In `killed_worker` one of two processes that train together
is killed. In `calls` every system call fails once, in `sequences` a directory is compared with
copies in memory, in `mutations` files are a stranger's. Writes experiments/results/faults.json.
"""

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.faults import (
    calls,
    files,
    invariants,
    killed_worker,
    killing,
    mutations,
    sequences,
)
from experiments.faults.training import work
from mpembed_jax import checkpoint

PARTS = (
    "kills", "killed worker", "calls", "sequences", "damaged files", "mutations", "disks",
    "ids from hell", "gradients", "soak",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of each."""

    kills: int = setting(
        24, "SIGKILLs, half of them aimed at saves.", "KILLS", at_least=1, at_most=1_000_000
    )
    steps: int = setting(400, "Steps of the killed run.", "STEPS", at_least=2, at_most=1_000_000)
    worker_kills: int = setting(
        4, "SIGKILLs of one of two workers.", "KILLS", at_least=1, at_most=1_000_000
    )
    stride: int = setting(
        1,
        "Every how many-th system call fails; 1 takes an hour.",
        "CALLS",
        at_least=1,
        at_most=1_000_000,
    )
    operations: tuple[str, ...] = setting(
        (),
        "Operations in which calls fail; the results of the others stay.",
        choices=tuple(calls.OPERATIONS),
        shown="all of them",
    )
    sequences: int = setting(
        300, "Random sequences of 25 actions.", "SEQUENCES", at_least=1, at_most=1_000_000
    )
    mutations: int = setting(
        10_000, "Mutated files of each kind.", "FILES", at_least=1, at_most=100_000_000
    )
    examples: int = setting(
        4000, "Batches of ids from hell.", "BATCHES", at_least=1, at_most=1_000_000
    )
    gradients: int = setting(
        300, "Steps with NaN and infinite gradients.", "STEPS", at_least=1, at_most=1_000_000
    )
    soak: int = setting(20_000, "Steps of the soak.", "STEPS", at_least=1, at_most=100_000_000)
    check_every: int = setting(
        1000,
        "Steps between checks of the invariants in the soak.",
        "STEPS",
        at_least=1,
        at_most=1_000_000,
    )
    only: tuple[str, ...] = setting((), "Parts to run.", choices=PARTS, shown="all of them")
    out: Path = setting(Path("experiments/results/faults.json"), "File for the results.")
    # Train in this folder, resuming from what is there.
    worker: Path | None = setting(None, is_hidden=True)
    # Save into this folder until its device is full.
    fill: Path | None = setting(None, is_hidden=True)


def check(settings: Settings) -> None:
    """Refuses an unwritable file, and one that holds something else where parts are added.

    Raises:
      Refused: in one sentence.
    """
    if settings.worker is not None or settings.fill is not None:
        return
    if settings.only and settings.out.exists():
        with command_line.reading("--out", settings.out, ValueError, KeyError, TypeError):
            json.loads(settings.out.read_text())["parts"]
    command_line.check_out(settings.out)


def kill_and_resume(kills: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Kills a worker repeatedly at random moments, lets the last one finish, and compares the bits.

    Raises:
      AssertionError: if they differ, or a worker fails by itself.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        wanted = _run(Path(folder) / "uninterrupted", steps)
        directory = Path(folder) / "killed"
        unfinished, resumed_at = 0, []
        for done in range(kills):
            # Aimed so that the run advances a little between kills and is not over before the last
            # one.
            latest = checkpoint.latest_step(directory) or 0
            until = min(
                steps - 1,
                latest + rng.randint(1, max(2, 2 * (steps - latest) // (kills - done + 1))),
            )
            resumed_at.append(
                _run_and_kill(directory, steps, "save" if done % 2 else "step", until, rng)
            )
            unfinished += killing.has_unfinished(directory)
        assert _run(directory, steps) == wanted, (
            f"after {kills} kills the state differs from the uninterrupted run's"
        )
        return {
            "kills": kills, "aimed at saves": kills // 2,
            "unfinished folders left behind": unfinished,
            "resumed at steps": resumed_at, "steps": steps, "bits equal": True,
        }  # fmt: skip


def _start(
    directory: Path, steps: int, stdin: int
) -> contextlib.AbstractContextManager[subprocess.Popen]:
    command = [
        sys.executable,
        "-m",
        "experiments.faults.run",
        "--worker",
        str(directory),
        "--steps",
        str(steps),
    ]
    pipe, environment = subprocess.PIPE, killing.environment(directory)
    return running.started(
        command,
        cwd=provenance.ROOT,
        env=environment,
        stdin=stdin,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def _run(directory: Path, steps: int) -> str:
    """Runs a worker to its end; returns its hash."""
    with _start(directory, steps, subprocess.DEVNULL) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    word, bits = killing.SAID.findall(out)[-1]
    assert word == "bits"
    return bits


def _run_and_kill(directory: Path, steps: int, aim: str, until: int, rng: random.Random) -> int:
    """Starts a worker and kills it at or after step `until`.

    The kill comes just after a step, just after a save began, or at the end of the run. Returns the
    step it resumed at.
    """
    with _start(directory, steps, subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        resume, is_there = killing.listen(process.stdout, aim, until)
        if is_there:
            time.sleep(rng.uniform(0, 0.08 if aim == "save" else 0.02))
            process.kill()
        errors = process.stderr.read()
    assert is_there and process.returncode == -signal.SIGKILL, errors[-3000:]
    return resume


def run(settings: Settings) -> None:
    """Runs every part and writes the report."""
    if settings.worker is not None:
        print(f"bits {work(settings.worker, settings.steps)}")
        return
    if settings.fill is not None:
        print(json.dumps(files.fill(settings.fill)))
        return
    parts = {
        "kills": lambda: kill_and_resume(settings.kills, settings.steps),
        "killed worker": lambda: killed_worker.kill_and_resume(settings.worker_kills),
        "calls": lambda: calls.report(settings.stride, settings.operations),
        "sequences": lambda: sequences.in_a_process(settings.sequences),
        "damaged files": files.damage,
        "mutations": lambda: {
            kind: mutations.many(kind, settings.mutations) for kind in mutations.KINDS
        },
        "disks": files.disks,
        "ids from hell": lambda: invariants.ids_from_hell(settings.examples),
        "gradients": lambda: invariants.bad_gradients(settings.gradients),
        "soak": lambda: invariants.soak(settings.soak, settings.check_every),
    }
    environment = provenance.environment()
    report: dict[str, Any] = {**environment, "parts": {}}
    if settings.only and settings.out.exists():  # parts that run again replace their own
        report["parts"] = json.loads(settings.out.read_text())["parts"]
    for name in settings.only or parts:
        start = time.perf_counter()
        with running.working(name):
            found = parts[name]()
        if name == "calls" and settings.operations:
            before = report["parts"].get(name, {}).get("operations", {})
            found["operations"] = before | found["operations"]
        report["parts"][name] = {
            **found,
            "seconds": round(time.perf_counter() - start, 1),
            "commit": environment["commit"],
            "command": environment["command"],
        }
        print(f"{name}: {json.dumps(report['parts'][name])}", flush=True)
        # After each part: they take hours together, and --only runs those that are missing.
        provenance.write(settings.out, report)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
