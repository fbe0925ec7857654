"""How fast are look-ups and bags from a serving file, beside FBGEMM's operators and torch?

Ours reads INT8 and INT4 rows of a mapped file through the public calls `lookup` (for bags of one
id) and `bag`. The peers are FBGEMM's CPU operators for INT8 and INT4 rows, as torch calls them
(torch.ops.quantized.embedding_bag_*_rowwise_offsets), and torch's FP32 embedding_bag. All read the
same rows with the same ids, and the sums are compared. They alternate in one process. A ratio is
the median over rounds of ours to the peer's. Peers need `pip install "mpembed_jax[peers]"`. A file
that was written is dropped from the system's cache, and read from the disk once, as by a server
that starts: the system may then map it by pages of 2 MiB. With one thread, times of look-ups and
bags are those of the process: what other programs on the machine take does not count.

    python -m experiments.speed.serving

Then: the time to load a file, the memory of one and of four processes that read all of it, and the
best 100 rows of one query, of all rows and by a sign sketch. The rows are those of `init`, so the
sketch's recall is not measured here.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from mpembed_jax import serving

STORAGES = {
    "int8": mpembed.RowFormat("int8", symmetric=False),
    "int4": mpembed.RowFormat("int4", symmetric=False, scale_dtype="float16"),
}
FRESH = 64  # batches of ids that the calls cycle through
ROUND_S = 0.004  # seconds of one peer's turn


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    rows: int = setting(8_000_000, "Rows of the table.", "ROWS", at_least=1000, at_most=10**9)
    dims: tuple[int, ...] = setting(
        (64, 128), "Numbers in a row.", "NUMBERS", at_least=1, at_most=4096
    )
    batches: tuple[int, ...] = setting(
        (1, 64, 2048), "Bags in a call.", "BAGS", at_least=1, at_most=10**6
    )
    lengths: tuple[int, ...] = setting(
        (1, 20, 80), "Ids in a bag.", "IDS", at_least=1, at_most=10**4
    )
    rounds: int = setting(9, "Turns of each peer.", "ROUNDS", at_least=3, at_most=10**4)
    threads: int = setting(
        os.cpu_count() or 1,
        "Threads of each.",
        "THREADS",
        at_least=1,
        at_most=1024,
        shown="all cores",
    )
    out: Path = setting(Path("experiments/results/serving.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file, and a table that does not fit the memory.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    needed = (1 + 4) * settings.rows * max(settings.dims)
    what = f"an INT8 table of {max(settings.dims)} numbers a row and its FP32 copy"
    command_line.check_memory("--rows", settings.rows, needed, what)


def peers_of(folder: Path, settings: Settings) -> dict[str, Callable[[np.ndarray, int], Any]]:
    """Returns {peer: function of (ids int64 [B, L], turn) that prepares and returns a call}."""
    calls: dict[str, Callable] = {}
    for name in STORAGES:
        table = serving.load(folder / name, threads=settings.threads)
        table.rows["table"][:, 0].max()  # every page is mapped, as in a server after a while

        def ours(ids: np.ndarray, table: Any = table) -> Callable[[], Any]:
            if ids.shape[1] == 1:
                flat = ids[:, 0].copy()
                return lambda: table.lookup(flat)
            return lambda: table.bag(ids)

        calls[f"ours-{name}"] = ours
    try:
        import torch
    except ImportError:
        print("torch is not installed: the peers are left out")
        return calls
    torch.set_num_threads(settings.threads)
    for name in STORAGES:
        table = serving.load(folder / name)
        (path,) = serving.write_npy(table, folder / f"{name}-fbgemm", "fbgemm")
        weights = torch.from_numpy(np.load(path))
        kind = "byte" if name == "int8" else "4bit"
        operator = getattr(torch.ops.quantized, f"embedding_bag_{kind}_rowwise_offsets")

        def fbgemm(ids: np.ndarray, operator: Any = operator, weights: Any = weights) -> Callable:
            flat = torch.from_numpy(ids.reshape(-1))
            ends = torch.arange(0, ids.size + 1, ids.shape[1])
            return lambda: operator(weights, flat, ends, include_last_offset=True)

        calls[f"fbgemm-{name}"] = fbgemm
    (path,) = serving.write_npy(serving.load(folder / "int8"), folder / "float32")
    dense = torch.from_numpy(np.load(path))

    def plain(ids: np.ndarray) -> Callable:
        here = torch.from_numpy(ids)
        return lambda: torch.nn.functional.embedding_bag(here, dense, mode="sum")

    calls["torch-fp32"] = plain
    return calls


def times(
    calls: dict[str, Callable], ids: list[np.ndarray], settings: Settings
) -> dict[str, list[float]]:
    """Returns {peer: microseconds of a call in each round}; the peers alternate."""
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    prepared = {name: [make(batch) for batch in ids] for name, make in calls.items()}
    first = {name: np.asarray(own[0]()) for name, own in prepared.items()}
    for name, values in first.items():
        like = first["ours-int4" if name.endswith("int4") else "ours-int8"]
        np.testing.assert_allclose(values, like, rtol=1e-4, atol=1e-6, err_msg=name)
    counts = {}
    for name, own in prepared.items():
        begin = clock()
        for call in own[:8]:
            call()
        counts[name] = max(8, int(8 * ROUND_S / max(1e-6, clock() - begin)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    for _ in range(settings.rounds):
        for name, own in prepared.items():
            turn += 8
            begin = clock()
            for i in range(counts[name]):
                own[(turn + i) % len(own)]()
            found[name].append((clock() - begin) / counts[name] * 1e6)
    return found


READER = """
import sys
import numpy as np
from mpembed_jax import serving
table = serving.load(sys.argv[1])
table.lookup(np.arange(1))  # numba and the compiled functions are not counted
begin = {}
for line in open("/proc/self/smaps_rollup"):
    begin[line.split(":")[0]] = line.split()[1]
size = table.tables[0].num_rows
for first in range(0, size, 1 << 16):
    table.lookup(np.arange(first, min(first + (1 << 16), size)))
found = {}
for line in open("/proc/self/smaps_rollup"):
    found[line.split(":")[0]] = line.split()[1]
print(*(int(found[f]) - int(begin[f]) for f in ("Rss", "Pss")), flush=True)
sys.stdin.read()
"""


def drop_from_memory(path: Path) -> None:
    """Drops a file, which is whole on the disk, from the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def memory_of(path: Path, num_processes: int) -> list[list[int]]:
    """Returns [resident, proportional] KiB that each of several processes adds by reading.

    The proportional size divides pages that processes share among them. All processes have read
    the whole file before the last one measures.
    """
    command = [sys.executable, "-c", READER, str(path)]
    found, pipe = [], subprocess.PIPE
    with contextlib.ExitStack() as stack:
        for _ in range(num_processes):
            reader = running.started(command, stdin=pipe, stdout=pipe, text=True)
            process = stack.enter_context(reader)
            assert process.stdout is not None
            found.append([int(word) for word in process.stdout.readline().split()])
    return found


def searches(path: Path, settings: Settings) -> dict[str, float]:
    """Returns milliseconds of top_k for one query, and the bytes per row of a sketch."""
    table = serving.load(path, threads=settings.threads)
    made = serving.sketch(table)
    query = np.random.default_rng(0).standard_normal(len(made.planes[0])).astype(np.float32)
    found: dict[str, list[float]] = {"exact": [], "sketch": []}
    for _ in range(settings.rounds):
        for name, own in found.items():
            begin = time.perf_counter()
            table.top_k(query, 100, sketch=made if name == "sketch" else None)
            own.append((time.perf_counter() - begin) * 1e3)
    middle = {f"{name}_ms": statistics.median(own) for name, own in found.items()}
    return middle | {"sketch_bytes_per_row": made.nbytes / settings.rows}


def run(settings: Settings) -> dict[str, Any]:
    """Measures, prints and saves; returns what the JSON file holds."""
    record: dict[str, Any] = {**provenance.environment(), "cases": [], "files": []}
    record["versions"] |= provenance.versions(("torch", "fbgemm-gpu-cpu", "numba"))
    record["settings"] = provenance.settings_of(settings)
    rng = np.random.default_rng(0)
    tx = mpembed.optim.rowwise_adagrad(0.05)
    for dim in settings.dims:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            table = mpembed.TableSpec("table", settings.rows)
            spec = mpembed.EmbeddingSpec(table, dim, STORAGES["int8"], None)
            state = mpembed.init(jax.random.key(0), spec, tx)
            for storage, fmt in STORAGES.items():
                begin = time.perf_counter()
                serving.save(folder / storage, state, storage=fmt)
                saved = time.perf_counter() - begin
                drop_from_memory(folder / storage)
                begin = time.perf_counter()
                serving.load(folder / storage)
                loaded = time.perf_counter() - begin
                file = {"dim": dim, "storage": storage, "save_s": saved, "load_s": loaded}
                file["bytes"] = (folder / storage).stat().st_size
                file["memory_of_1"] = memory_of(folder / storage, 1)
                file["memory_of_4"] = memory_of(folder / storage, 4)
                file["top_100"] = searches(folder / storage, settings)
                record["files"].append(file)
                print(json.dumps(file), flush=True)
            del state
            calls = peers_of(folder, settings)
            for num_bags in settings.batches:
                for length in settings.lengths:
                    shape = (num_bags, length)
                    ids = [rng.integers(0, settings.rows, shape) for _ in range(FRESH)]
                    case = {"dim": dim, "bags": num_bags, "length": length}
                    case["us"] = times(calls, ids, settings)
                    record["cases"].append(case | {"ratios": ratios(case["us"])})
                    print(line_of(record["cases"][-1]), flush=True)
    provenance.write(settings.out, record)
    return record


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """Returns {"ours / peer": median over rounds} for peers of the same format, and for FP32."""
    result = {}
    for name, own in found.items():
        if not name.startswith("ours"):
            continue
        for peer in (name.replace("ours", "fbgemm"), "torch-fp32"):
            if peer in found:
                each = [a / b for a, b in zip(own, found[peer], strict=True)]
                result[f"{name} / {peer}"] = statistics.median(each)
    return result


def line_of(case: dict[str, Any]) -> str:
    """Returns one case as text."""
    middle = {name: statistics.median(own) for name, own in case["us"].items()}
    text = "  ".join(f"{name} {us:.1f}" for name, us in middle.items())
    ours = "  ".join(f"{name} {ratio:.2f}" for name, ratio in case["ratios"].items())
    return f"D {case['dim']} B {case['bags']} L {case['length']}  us: {text}  ratios: {ours}"


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and runs."""
    return command_line.main(run, Settings, __doc__ or "", arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
