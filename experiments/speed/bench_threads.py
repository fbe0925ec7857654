"""How does the step from ids to vectors scale over threads on a CPU?

Measured: the step (embed and apply_pooled_gradients of INT8 + 5 %, on Kaggle's tables) in processes
that may use 1, 2, 4, .. cores of this machine, in alternated rounds. They are workers of
bench_peers. Predicted: more threads. The step deals positions to partitions of ids, id mod 64 (16
partitions up to 4 threads, 64 from there on), and threads take partitions one after another. So the
divided part of the step takes as long as the busiest thread; what the times of 1 and 2 threads
leave is serial. Threads that wait for the same memory are not in this prediction. It runs on Linux,
where a process can be given cores. From the repository root:

    python -m experiments.speed.bench_threads
"""

import contextlib
import dataclasses
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.speed import bench_peers, step, workload
from experiments.speed.peers import Case

NUM_BATCHES = 60  # that the steps cycle through; as many come before them
GROUPS = 64  # of ids; a partition has one of them or more
PREDICTED = (1, 2, 4, 8, 16, 32, 64)  # threads


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    dims: tuple[int, ...] = setting(
        (16, 64), "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096
    )
    batch: int = setting(2048, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 20)
    rows: int | None = setting(
        None,
        "Rows of all tables together.",
        "ROWS",
        at_least=100_000,
        at_most=1_000_000_000,
        shown="Kaggle's 33.76 M",
    )
    rounds: int = setting(
        9, "Rounds in which the processes alternate.", "ROUNDS", at_least=2, at_most=10_000
    )
    steps: int = setting(
        60, "Steps of one process in a round.", "STEPS", at_least=1, at_most=10_000
    )
    out: Path = setting(Path("experiments/results/bench_threads.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file, tables that do not fit the memory, and systems but Linux.

    Raises:
      Refused: in one sentence.
      Failed: if processes cannot be given cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise command_line.Failed("processes can be given cores on Linux only")
    command_line.check_out(settings.out)
    for dim in settings.dims:
        step.check_memory(settings.rows, dim)


def case_of(settings: Settings, dim: int, threads: int) -> Case:
    """Returns what the worker of so many threads does."""
    return Case(
        worker="ours-int8-w32",
        task="embedding",
        dim=dim,
        batch=settings.batch,
        skew=1.05,
        rows=settings.rows,
        distinct=NUM_BATCHES,
        warm=NUM_BATCHES,
        threads=threads,
    )


def busiest_share(batches: list[np.ndarray], threads: int) -> float:
    """Returns the mean share of a batch's positions that the busiest of some threads gets.

    Each thread takes the next partition when it has finished one.
    """
    parts = 16 if threads <= 4 else GROUPS
    shares = []
    for ids in batches:
        loads = np.bincount(ids.reshape(-1) % GROUPS * parts // GROUPS, minlength=parts)
        busy = np.zeros(threads)
        for load in loads:
            busy[np.argmin(busy)] += load
        shares.append(busy.max() / ids.size)
    return float(np.mean(shares))


def measured(settings: Settings, dim: int) -> dict[int, list[float]]:
    """Returns milliseconds per step of each round, by number of threads.

    Raises:
      Failed: if a worker cannot run.
    """
    numbers = [n for n in PREDICTED if n <= len(os.sched_getaffinity(0))]
    with running.working(f"D={dim}"), contextlib.ExitStack() as stack:
        workers = {
            n: bench_peers.Worker(case_of(settings, dim, n), sys.executable, stack) for n in numbers
        }
        for worker in workers.values():
            if "missing" in worker.facts:
                raise command_line.Failed(worker.facts["missing"])
        for turn in range(settings.rounds):
            for number in numbers[:: 1 if turn % 2 else -1]:
                workers[number].round(settings.steps, "warm")
    return {n: [1000 * s for s in worker.times["warm"]] for n, worker in workers.items()}


def run(settings: Settings) -> int:
    """Measures, predicts, prints and writes; returns the exit status."""
    sizes = workload.sizes_for(settings.rows)
    local = workload.batches(1, NUM_BATCHES, settings.batch, sizes, 1.05)
    batches = [workload.to_global(batch, sizes) for batch in local]
    shares = {n: busiest_share(batches, n) for n in PREDICTED}
    results = []
    for dim in settings.dims:
        times = measured(settings, dim)
        found = {n: statistics.median(held) for n, held in times.items()}
        for number, ms in found.items():
            print(f"D = {dim}, threads {number}: {ms:.2f} ms")
        result = {"dim": dim, "ms": found, "rounds": times, "busiest_share": shares}
        if 2 in found:
            divided = (found[1] - found[2]) / (1 - shares[2])
            serial = found[1] - divided
            predicted = {n: serial + divided * share for n, share in shares.items()}
            result |= {"serial_ms": serial, "predicted_ms": predicted}
            print(f"  serial {serial:.2f} ms; predicted: ", end="")
            print(", ".join(f"threads {n}: {ms:.2f} ms" for n, ms in predicted.items()))
        results.append(result)
    provenance.write_results(settings, results)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
