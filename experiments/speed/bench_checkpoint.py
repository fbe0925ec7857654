"""The cost of a checkpoint of a whole table.

It measures save, restore, bytes on disk, steps during a save, and an increment. The state is
Criteo-Kaggle's 26 vocabularies (33.76 M rows) in INT8 with a 5 % LFU cache and row-wise Adagrad,
trained some steps on Zipf ids (workload.py), so that codes and accumulators are not those of a
fresh table. Steps during an asynchronous save are timed against the same run's steps without one.
Every checkpoint is restored and compared bit for bit; the page cache is warm. Files go to a
temporary directory under `--directory` and are deleted. Writes
experiments/results/bench_checkpoint.json.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.speed import workload
from experiments.speed.step import check_memory, embedding_step
from mpembed_jax import checkpoint


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    rows: int | None = setting(
        None,
        "Rows of all tables.",
        "ROWS",
        at_least=100_000,
        at_most=1_000_000_000,
        shown="all 33.76 M",
    )
    dim: int = setting(16, "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096)
    storage: str = setting(
        "int8",
        "Format of the rows.",
        choices=(
            "float32",
            "bfloat16",
            "float16",
            "float8_e4m3fn",
            "float8_e5m2",
            "int8",
            "int4",
            "int2",
        ),
    )
    batch: int = setting(2048, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 20)
    warm: int = setting(
        200, "Steps before the first checkpoint.", "STEPS", at_least=1, at_most=1_000_000
    )
    steps: int = setting(
        1000, "Steps before the increment.", "STEPS", at_least=2, at_most=1_000_000
    )
    directory: Path | None = setting(
        None, "Folder in which the temporary one is made.", shown="the system's"
    )
    out: Path = setting(Path("experiments/results/bench_checkpoint.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses folders that cannot be written.

    Raises:
      Refused: in one sentence.
    """
    if settings.directory is not None:
        with command_line.reading("--directory", settings.directory):
            if not settings.directory.is_dir():
                command_line.refuse("--directory", settings.directory, "a folder that is there")
        command_line.check_out(settings.directory, is_file=False, flag="--directory")
    command_line.check_out(settings.out)
    check_memory(settings.rows, settings.dim, settings.storage)


def bytes_on_disk(folder: Path) -> int:
    """Returns the bytes of all files of a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def is_equal(first: Any, second: Any) -> bool:
    """Returns whether two states have the same bits, array by array."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(bool(jnp.array_equal(a, b, equal_nan=a.dtype.kind == "f")) for a, b in pairs)


def run(settings: Settings) -> None:
    """Measures and writes the results."""
    with running.working("measuring"):
        result = measure(settings)
    for name, value in result.items():
        print(
            f"{name:<24} {value if not isinstance(value, float) else format(value, '.4g')}",
            flush=True,
        )
    provenance.write(settings.out, provenance.environment() | result)


def measure(settings: Settings) -> dict[str, Any]:
    """Trains, saves and restores; returns bytes and times."""
    workload.keep_freed_memory()
    sizes = workload.sizes_for(settings.rows)
    tables = [mpembed.TableSpec(f"C{i + 1}", v) for i, v in enumerate(sizes)]
    positions = settings.batch * len(sizes)
    spec = mpembed.EmbeddingSpec(
        tables, settings.dim, settings.storage, max_unique_ids=int(0.4 * positions)
    )
    tx = mpembed.optim.rowwise_adagrad(0.05)
    emb = mpembed.init(jax.random.key(0), spec, tx)
    state_bytes = sum(a.nbytes for a in jax.tree.leaves(emb))
    upstream = (
        np.random.default_rng(2)
        .normal(size=(settings.batch, len(sizes), settings.dim))
        .astype(np.float32)
    )
    upstream = jnp.asarray(upstream)

    def step(emb, ids, upstream, tracker):
        emb, plan, _, _ = embedding_step(emb, ids, upstream, tx=tx)
        return emb, None if tracker is None else checkpoint.mark(tracker, plan)

    train = jax.jit(step, donate_argnums=(0, 3))
    drawn = [
        workload.to_global(b, sizes) for b in workload.batches(1, 64, settings.batch, sizes, 1.05)
    ]
    batches = iter(range(10**9))

    def steps(emb, num, tracker=None, until=None):
        """Trains `num` steps, or until `until()`; returns state, tracker and seconds of each."""
        times: list[float] = []
        while len(times) < num and not (until is not None and until()):
            index = next(batches)
            # 64 drawn batches, shifted each time round, stand for a stream
            ids = jnp.asarray((drawn[index % 64] + index // 64 * 7919) % spec.num_rows)
            start = time.perf_counter()
            emb, tracker = jax.block_until_ready(train(emb, ids, upstream, tracker))
            times.append(time.perf_counter() - start)
        return emb, tracker, times

    emb, _, _ = steps(emb, settings.warm)
    result: dict[str, Any] = {
        "rows": spec.num_rows, "dim": settings.dim, "storage": settings.storage,
        "state_bytes": state_bytes,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
        directory = Path(folder)

        def timed(function, *args, **options):
            start = time.perf_counter()
            value = jax.block_until_ready(function(*args, **options))
            return value, time.perf_counter() - start

        # Twice: the first call compiles the digest.
        _, result["first_save_s"] = timed(lambda: checkpoint.save(directory, 0, emb) and None)
        _, result["save_s"] = timed(lambda: checkpoint.save(directory, 1, emb, keep=1) and None)
        result["disk_bytes"] = bytes_on_disk(directory / "step_1")
        result["disk_over_state"] = result["disk_bytes"] / state_bytes
        target = jax.eval_shape(lambda: emb)
        restored, result["restore_s"] = timed(checkpoint.restore, directory, target)
        assert is_equal(restored, emb)
        del restored

        # Steps without a save, during one, and without again.
        emb, _, before = steps(emb, 100)
        start = time.perf_counter()
        saving = checkpoint.save(directory, 2, emb, wait=False, keep=1)
        result["async_call_s"] = time.perf_counter() - start
        emb, _, during = steps(emb, 10_000, until=lambda: checkpoint.latest_step(directory) == 2)
        saving.wait()
        result["async_save_s"] = time.perf_counter() - start
        emb, _, after = steps(emb, 100)
        result["step_ms"] = 1e3 * statistics.median(before + after)
        result["step_ms_during_save"] = 1e3 * statistics.median(during)
        result["steps_during_save"] = len(during)
        result["slowest_step_ms"] = {
            "without": 1e3 * max(before + after),
            "during": 1e3 * max(during),
        }

        # An increment, and what tracking costs a step.
        checkpoint.save(directory, 3, emb, keep=1)
        tracker, result["track_s"] = timed(checkpoint.track, emb)
        emb, tracker, _ = steps(emb, 1, tracker)  # compiles
        emb, tracker, tracked = steps(emb, settings.steps - 1, tracker)
        result["step_ms_tracked"] = 1e3 * statistics.median(tracked)
        saving, result["increment_save_s"] = timed(
            checkpoint.save, directory, 4, emb, tracker=tracker
        )
        result["increment_steps"] = settings.steps
        result["increment_rows"] = int(np.bitwise_count(np.array(tracker.bits)).sum())
        result["increment_disk_bytes"] = bytes_on_disk(directory / "step_4")
        result["increment_over_full"] = result["increment_disk_bytes"] / result["disk_bytes"]
        restored, result["increment_restore_s"] = timed(checkpoint.restore, directory, target)
        assert is_equal(restored, emb)
    result["resident_peak_bytes"] = workload.peak_bytes()
    return result


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
