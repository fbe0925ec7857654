"""The benchmark on a GPU: kernels against plain XLA, a step against its bytes floor, peers, caches.

    # Under 8 minutes on an H200. It writes results/bench_gpu.json:
    python -m experiments.gpu.bench_gpu
    # The same parts, tiny and on any device, to show that they run:
    python -m experiments.gpu.bench_gpu --interpret

Parts run in order of importance, each in a process of its own with a time limit, and the file is
written after each row: a part that raises, hangs or kills its process (an illegal address does, for
all that follows) costs no other its results. They are: copy bandwidth; every kernel against plain
XLA, passed or not; the kernels of a step by time, from a profile; the embedding's step (26 Kaggle
vocabularies, Zipf 1.05, INT8 + 5 % cache, row-wise Adagrad), whole and by verb, with kernels and
with plain XLA; torch's sparse EmbeddingBag and torch's sort where torch is installed; sorts, sums
and scatters alone; tables in host memory against tables on the device; an FP32 table in pinned host
memory against INT8 + cache on the device; gather and dequantize alone; bags and their gradients;
other batch sizes and formats; more than 100 M rows. What --budget leaves no time for is named.
The optimized HLO of the steps is kept in a folder beside the file. Floors are bytes that must move
over the copy bandwidth measured first (roofline.py). The swap is timed within prefetch. At the end,
the file says of each target whether it was reached. Needs jax, optax and numpy alone.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.gpu.parts import PARTS
from experiments.gpu.steps import Bench, failure

MARK = "ROW "  # what a part's process prints before each row


def rows_of(name: str, bench: Bench) -> Iterator[dict]:
    """Runs one part in this process: its rows, and as the last one the error if it raised."""
    warnings.filterwarnings(
        "ignore", message="The Pallas Triton backend", category=DeprecationWarning
    )
    try:
        yield from PARTS[name].run(bench)
    except Exception as error:
        yield failure(error)


def rows_of_process(name: str, bench: Bench, seconds: float) -> Iterator[dict]:
    """Runs one part in its own process, which ends after so many seconds.

    Returns its rows. If the part failed, the last row says how.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.gpu.bench_gpu",
        "--part",
        name,
        "--bandwidth",
        str(bench.bandwidth),
    ]
    command += ["--interpret"] if bench.is_tiny else []
    command += [] if bench.programs is None else ["--programs", str(bench.programs)]
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    if name == "torch sparse":  # jax would take three quarters of the memory first
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with (
        tempfile.TemporaryFile("w+") as errors,
        running.started(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        timer, has_error = threading.Timer(seconds, process.kill), False
        timer.start()
        for line in process.stdout:
            if line.startswith(MARK):
                row = json.loads(line[len(MARK) :])
                has_error |= "error" in row
                yield row
        is_late = not timer.is_alive()
        timer.cancel()
        if process.wait() and not has_error:
            errors.seek(0)
            why = (
                f"ended after {seconds:.1f} seconds"
                if is_late
                else f"its process ended with {process.returncode}"
            )
            yield {"error": why, "where": errors.read()[-2000:]}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run."""

    interpret: bool = setting(False, "Tiny sizes and interpreted kernels, on any device.")
    budget: float = setting(450.0, "Time after which everything ends.", "SECONDS", at_least=0)
    parts: tuple[str, ...] = setting(tuple(PARTS), "Parts to run.", choices=tuple(PARTS))
    out: Path = setting(Path("experiments/results/bench_gpu.json"), "File for the results.")
    part: str | None = setting(None, choices=tuple(PARTS), is_hidden=True)
    bandwidth: float = setting(0.0, unit="BYTES", is_hidden=True)
    programs: Path | None = setting(None, is_hidden=True)


def targets_of(parts: dict[str, list[dict]]) -> list[dict]:
    """Returns whether each target was reached, from the rows of the parts.

    A step counts with its fastest implementation, with and without pooled gradients.

    Returns:
      [{target, value, bound, passed}]; value and passed are None if it was not measured.
    """
    steps = [
        row
        for name in ("step", "step, pooled gradients")
        for row in parts.get(name, [])
        if "milliseconds" in row
    ]

    def least(field: str, dim: int, batch: int) -> float | None:
        found = [row[field] for row in steps if (row["dim"], row["batch"]) == (dim, batch)]
        return min(found, default=None)

    def ratio(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one / other

    torch = {r["dim"]: r["milliseconds"] for r in parts.get("torch sparse", []) if "dim" in r}
    spilled = {
        (row["storage"], row["memory_kind"], row["fraction"]): row["milliseconds"]
        for row in parts.get("host memory", [])
        if "milliseconds" in row
    }
    plain = spilled.get(("float32", "pinned_host", None))
    cached = next((ms for key, ms in spilled.items() if key[:2] == ("int8", None)), None)
    asked = []
    for dim in (64, 128):
        name = f"D = {dim}, B = 65,536"
        asked += [
            (f"P7: a step over its floor, {name}", least("times_floor", dim, 65536), "<=", 2.0),
            (
                f"P8: a step over torch's sparse one, {name}",
                ratio(least("milliseconds", dim, 65536), torch.get(dim)),
                "<=",
                0.5,
            ),
        ]
    asked += [
        ("a step in ms, D = 64, B = 2,048", least("milliseconds", 64, 2048), "<=", 0.2),
        ("an FP32 table in host memory over INT8 + cache", ratio(plain, cached), ">=", 1.16),
    ]
    return [
        {
            "target": name,
            "value": value,
            "bound": f"{sign} {bound}",
            "passed": None if value is None else (value <= bound) == (sign == "<="),
        }
        for name, value, sign, bound in asked
    ]


def check(settings: Settings) -> None:
    """Refuses an unwritable file, and a machine without a GPU.

    Raises:
      Refused: in one sentence.
    """
    if settings.part is not None:
        if not settings.interpret and jax.default_backend() != "gpu":
            raise command_line.Refused(_no_gpu(jax.devices()[0].device_kind))
        return
    command_line.check_out(settings.out)
    if settings.interpret:
        return
    # In a process of its own: jax would keep most of the device's memory from the parts.
    words = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='\\n')"
    asked = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    backend, kind = (asked.stdout.splitlines() or ["none", "none"])[-2:]
    if backend != "gpu":
        raise command_line.Refused(_no_gpu(kind))


def _no_gpu(kind: str) -> str:
    return f"a GPU is needed, and this is {kind}; --interpret runs all parts, tiny, on any device"


def run(settings: Settings) -> dict:
    """Runs the parts and returns what was written.

    Raises:
      Failed: if the bandwidth, to which all floors relate, could not be measured.
    """
    programs = settings.programs or settings.out.with_suffix(".hlo")
    bench = Bench(settings.interpret, settings.bandwidth, programs)
    if settings.part is not None:
        rows = list(_print_rows(rows_of(settings.part, bench)))
        return {"parts": {settings.part: rows}}

    # Nothing here touches a device: jax would keep most of its memory from the parts.
    begin, parts, left_out = time.perf_counter(), {}, []
    results: dict[str, Any] = {
        "commit": provenance.commit(),
        "is_smoke_test": settings.interpret,
        "parts": parts,
        "left_out": left_out,
    }
    for name in dict.fromkeys(["copy bandwidth", *settings.parts]):  # floors need the bandwidth
        rows, remaining = (
            parts.setdefault(name, []),
            settings.budget - (time.perf_counter() - begin),
        )
        if remaining < 15:  # less than a process needs to begin
            left_out.append(name)
        else:
            limit = min(PARTS[name].limit, remaining)
            with contextlib.closing(rows_of_process(name, bench, limit)) as found:
                for row in found:
                    rows.append(row)
                    print(name, json.dumps(row), flush=True)
                    _write(settings.out, results, begin)
        if name == "copy bandwidth" and name not in left_out:
            if "error" in rows[-1]:
                raise command_line.Failed(
                    "the copy bandwidth could not be measured: "
                    f"{rows[-1]['error']}\n{rows[-1]['where']}"
                )
            bench = bench._replace(bandwidth=rows[-1]["bytes_per_second"])
    _write(settings.out, results, begin)
    for target in results["targets"]:
        print("target", json.dumps(target), flush=True)
    return results


def _print_rows(rows: Iterator[dict]) -> Iterator[dict]:
    for row in rows:
        print(MARK + json.dumps(row), flush=True)
        yield row


def _write(out: Path, results: dict, begin: float) -> None:
    results["targets"] = targets_of(results["parts"])
    results["seconds"] = round(time.perf_counter() - begin, 1)
    provenance.write(out, results)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
