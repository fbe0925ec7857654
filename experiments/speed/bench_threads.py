"""How does the step from ids to vectors scale over threads on a CPU?

Measured: the step (embed and apply_pooled_gradients of INT8 + 5 %, on Kaggle's tables) in processes
that may use 1, 2, 4, .. cores of this machine, in alternated rounds. Predicted: more threads. The
step deals positions to partitions of ids, id mod 64 (16 partitions up to 4 threads, 64 from there
on), and threads take partitions one after another. So the divided part of the step takes as long as
the busiest thread; what the times of 1 and 2 threads leave is serial. Threads that wait for the
same memory are not in this prediction. From the repository root:

    python -m experiments.speed.bench_threads
"""

import dataclasses
import functools
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments import command_line, provenance
from experiments.command_line import setting
from experiments.speed import step, workload

NUM_BATCHES = 60  # that the steps cycle through
GROUPS = 64  # of ids; a partition has one of them or more
PREDICTED = (1, 2, 4, 8, 16, 32, 64)  # threads
ROW_TX = mpembed.optim.rowwise_adagrad(0.05)


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
    """Refuses an unwritable file, and tables that do not fit the memory.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    for dim in settings.dims:
        step.check_memory(settings.rows, dim)


def ids_of(settings: Settings) -> list[np.ndarray]:
    """Returns the batches, int32 [B, T] of global ids."""
    sizes = workload.sizes_for(settings.rows)
    local = workload.batches(0, NUM_BATCHES, settings.batch, sizes, 1.05)
    return [workload.to_global(batch, sizes) for batch in local]


def asked(pipe: Connection) -> bool:
    """Waits for a request; False if there will be none."""
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def work(settings: Settings, dim: int, cores: list[int], pipe: Connection) -> None:
    """Trains on some cores; answers each request of the pipe with milliseconds per step."""
    os.sched_setaffinity(0, cores)  # before jax makes its threads
    sizes = workload.sizes_for(settings.rows)
    tables = [mpembed.TableSpec(f"t{k}", size) for k, size in enumerate(sizes)]
    spec = mpembed.EmbeddingSpec(tables, dim, "int8", mpembed.CacheSpec(fraction=0.05))
    state = mpembed.init(jax.random.key(0), spec, ROW_TX)
    batches = [jnp.asarray(ids) for ids in ids_of(settings)]
    shape = (settings.batch, len(sizes), dim)
    upstream = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    run = jax.jit(
        functools.partial(step.embedding_step, tx=ROW_TX, is_pooled=True), donate_argnums=0
    )
    done, count = None, NUM_BATCHES  # the first request warms up
    position = 0
    while asked(pipe):
        start = time.perf_counter()
        for _ in range(count):
            done = None  # the vectors of the last step are freed before this one makes its own
            state, _, _, done = run(state, batches[position % NUM_BATCHES], upstream)
            position += 1
            jax.block_until_ready((state, done))
        pipe.send(1000 * (time.perf_counter() - start) / count)
        count = settings.steps


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
    """Returns milliseconds per step of each round, by number of threads."""
    cores = sorted(os.sched_getaffinity(0))
    numbers = [n for n in PREDICTED if n <= len(cores)]
    context = multiprocessing.get_context("spawn")
    workers: dict[int, tuple[Any, Connection]] = {}
    times: dict[int, list[float]] = {number: [] for number in numbers}
    try:
        for number in numbers:
            pipe, theirs = context.Pipe()
            process = context.Process(target=work, args=(settings, dim, cores[:number], theirs))
            process.start()
            theirs.close()
            workers[number] = process, pipe
        for turn in range(settings.rounds + 1):
            for number in numbers[:: 1 if turn % 2 else -1]:
                pipe = workers[number][1]
                pipe.send(True)
                took = pipe.recv()
                if turn:
                    times[number].append(took)
    finally:
        for process, pipe in workers.values():
            pipe.close()  # the worker sees the end of its requests
            process.join()
    return times


def run(settings: Settings) -> int:
    """Measures, predicts, prints and writes; returns the exit status."""
    shares = {n: busiest_share(ids_of(settings), n) for n in PREDICTED}
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
    held = {
        "settings": {**dataclasses.asdict(settings), "out": str(settings.out)},
        **provenance.environment(),
        "results": results,
    }
    provenance.write(settings.out, held)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
