"""The benchmark on a GPU: kernels against plain XLA, a step against its bytes floor, peers, caches.

    # Under 8 minutes on an H200. It writes results/bench_gpu.json:
    python -m experiments.gpu.bench_gpu
    # The same parts, tiny and on any device, to show that they run:
    python -m experiments.gpu.bench_gpu --interpret

Parts run in order of importance, each in a process of its own with a time limit, and the file is
written after each row: a part that raises, hangs or kills its process (an illegal address does, for
all that follows) costs no other its results. They are: copy bandwidth; every kernel against plain
XLA; tables in host memory against tables on the device; gather and dequantize alone; the
embedding's step (26 Kaggle vocabularies, Zipf 1.05, INT8 + 5 % cache, row-wise Adagrad), whole and
by verb, XLA against kernels; torch's sparse EmbeddingBag where torch is installed; an FP32 table in
pinned host memory against INT8 + cache on the device; bags and their gradients; other batch sizes
and formats; more than 100 M rows. What --budget leaves no time for is named. Floors are bytes that
must move over the copy bandwidth measured first (roofline.py). The swap is timed within prefetch,
whose planning is the same XLA either way. Needs jax, optax and numpy alone.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from experiments import provenance
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
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    if name == "torch sparse":  # jax would take three quarters of the memory first
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
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


def main(arguments: list[str] | None = None) -> dict:
    """Runs the parts and returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--interpret", action="store_true", help="tiny sizes, interpreted kernels, any device"
    )
    parser.add_argument(
        "--budget", type=float, default=450.0, help="seconds after which everything ends"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("experiments/results/bench_gpu.json")
    )
    parser.add_argument(
        "--part", choices=PARTS, help=argparse.SUPPRESS
    )  # what a part's process is told
    parser.add_argument("--bandwidth", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    bench = Bench(options.interpret, options.bandwidth)
    if options.part is not None:
        if not options.interpret and jax.default_backend() != "gpu":
            raise SystemExit(
                f"needs a GPU, this is {jax.devices()[0].device_kind}; --interpret runs all tiny "
                "on any device"
            )
        rows = list(_print_rows(rows_of(options.part, bench)))
        return {"parts": {options.part: rows}}

    # Nothing here touches a device: jax would keep most of its memory from the parts.
    begin, parts, left_out = time.perf_counter(), {}, []
    results: dict[str, Any] = {
        "commit": provenance.commit(),
        "is_smoke_test": options.interpret,
        "parts": parts,
        "left_out": left_out,
    }
    for name in dict.fromkeys(["copy bandwidth", *options.parts]):  # floors need the bandwidth
        rows, remaining = parts.setdefault(name, []), options.budget - (time.perf_counter() - begin)
        if remaining < 15:  # less than a process needs to begin
            left_out.append(name)
        else:
            for row in rows_of_process(name, bench, min(PARTS[name].limit, remaining)):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
                _write(options.out, results, begin)
        if name == "copy bandwidth" and name not in left_out:
            if "error" in rows[-1]:
                parser.error(
                    "the copy bandwidth could not be measured: "
                    f"{rows[-1]['error']}\n{rows[-1]['where']}"
                )
            bench = bench._replace(bandwidth=rows[-1]["bytes_per_second"])
    _write(options.out, results, begin)
    return results


def _print_rows(rows: Iterator[dict]) -> Iterator[dict]:
    for row in rows:
        print(MARK + json.dumps(row), flush=True)
        yield row


def _write(out: pathlib.Path, results: dict, begin: float) -> None:
    results["seconds"] = round(time.perf_counter() - begin, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
