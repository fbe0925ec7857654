"""On a GPU: are the kernels right, how far is a step from its bytes floor, who is faster, and what does a cache save?

    python -m experiments.bench_gpu                     # under 8 minutes on an H200, writes results/bench_gpu.json
    python -m experiments.bench_gpu --interpret         # the same parts, tiny and on any device: shows that they run

Parts run in order of importance, each in a process of its own with a time limit, and the file is written after each row: a
part that raises, hangs or kills its process (an illegal address does, for all that follows) costs no other its results. They
are: copy bandwidth; every kernel against plain XLA; tables in host memory against tables on the device; gather and
dequantize alone; the embedding's step (26 Kaggle vocabularies, Zipf 1.05, INT8 + 5 % cache, row-wise Adagrad), whole and by
verb, XLA against kernels; torch's sparse EmbeddingBag where torch is installed; an FP32 table in pinned host memory against
INT8 + cache on the device; bags and their gradients; other batch sizes and formats; more than 100 M rows. What --budget
leaves no time for is named. Floors are bytes that must move over the copy bandwidth measured first (roofline.py). The swap
is timed within prefetch, whose planning is the same XLA either way. Needs jax, optax and numpy alone.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments import roofline, workload

TX = mpembed.optim.rowwise_adagrad(0.05)
SKEW = 1.05
ROOT = pathlib.Path(__file__).resolve().parents[1]
MARK = "ROW "  # what a part's process prints before each row


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to be measured."""

    dim: int
    batch: int
    storage: str = "int8"
    fraction: float | None = 0.05  # None: no cache
    rows: int | None = None  # None: Kaggle's 33.76 M
    memory_kind: str | None = None

    def spec(self) -> mpembed.EmbeddingSpec:
        """The stack."""
        sizes = workload.sizes_for(self.rows)
        tables = [mpembed.TableSpec(f"table{k}", size) for k, size in enumerate(sizes)]
        cache = None if self.fraction is None else mpembed.CacheSpec(self.fraction)
        extra = {} if self.memory_kind is None else {"memory_kind": self.memory_kind}
        return mpembed.EmbeddingSpec(tables, self.dim, self.storage, cache, **extra)


class Bench(NamedTuple):
    """What a part is given."""

    is_tiny: bool
    bandwidth: float  # bytes a second, of the copy; 0 until measured

    @property
    def kernels(self) -> str:
        """The implementation with kernels."""
        return "pallas_interpret" if self.is_tiny else "pallas_triton"


@functools.cache
def ids_of(rows: int | None, batch: int, count: int) -> tuple[np.ndarray, ...]:
    """Returns batches of global ids [B, T], all different: of repeated ones the cache would soon hold every row."""
    sizes = workload.sizes_for(rows)

    def draw(seed: int) -> np.ndarray:
        return workload.to_global(workload.batches(seed, 1, batch, sizes, SKEW)[0], sizes)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return tuple(pool.map(draw, range(count)))


# --- timing


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Median over five rounds of the time per call, calls queued one after another."""
    rounds = []
    jax.block_until_ready(function())
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            out = function()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - begin) / repeats)
    return statistics.median(rounds)


def train_step(implementation: str) -> Callable:
    """The jitted step of the embedding, its state donated: prefetch, lookup, pool, row gradients, apply_gradients."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: jax.Array, upstream: jax.Array) -> Any:
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        pool = functools.partial(mpembed.pool, inverse=plan.inverse, implementation=implementation)
        vectors, pull_back = jax.vjp(pool, rows)
        # The sum of the vectors stands for a model that reads them.
        state = mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=TX)
        return state, (plan.counts, jnp.sum(vectors))

    return step


def measure_step(bench: Bench, case: Case, implementation: str, *, by_verb: bool) -> dict:
    """Times a warm step, whole and, if asked, by verb, beside the floors of its own counts."""
    warm, repeats = (2, 1) if bench.is_tiny else (32, 8)
    # One for compiling, one before the rounds, five rounds; the verbs one by one.
    count = 1 + warm + 1 + 5 * repeats + (1 + 2 * repeats if by_verb else 0)
    batches = [jnp.asarray(ids) for ids in ids_of(case.rows, case.batch, count)]
    upstream = jnp.full((*batches[0].shape, case.dim), 1e-3, jnp.float32)
    state = mpembed.init(jax.random.key(0), case.spec(), TX, implementation=implementation)
    step, ids = train_step(implementation), iter(batches)
    begin = time.perf_counter()
    state, _ = step(state, next(ids), upstream)
    jax.block_until_ready(state)
    first = time.perf_counter() - begin
    for _ in range(warm):
        state, (counts, _) = step(state, next(ids), upstream)
    held = [state]

    def once() -> Any:
        held[0], out = step(held[0], next(ids), upstream)
        return out

    seconds = seconds_of(once, repeats)
    counts = {k: int(v) for k, v in dataclasses.asdict(jax.device_get(counts)).items()}
    work = roofline.Work.of(case.spec(), upstream.shape[0] * upstream.shape[1], counts)
    floor = work.step / bench.bandwidth
    stats = jax.devices()[0].memory_stats() or {}
    row = dataclasses.asdict(case) | {
        "implementation": implementation,
        "milliseconds": seconds * 1e3,
        "floor_milliseconds": floor * 1e3,
        "times_floor": seconds / floor,
        "first_step_seconds": first,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(held[0])),
        "bytes_in_use": stats.get("bytes_in_use"),
        "peak_bytes_of_process": stats.get("peak_bytes_in_use"),
        "counts": counts,
    }
    if by_verb:
        row["verbs"] = measure_verbs(bench, held, ids, upstream, implementation, work, repeats)
    return row


def measured(bench: Bench, case: Case, implementation: str, *, by_verb: bool) -> dict:
    """Returns measure_step's row, or one that says how it failed: the other cases of a part go on."""
    try:
        return measure_step(bench, case, implementation, by_verb=by_verb)
    except Exception as error:
        return dataclasses.asdict(case) | {"implementation": implementation} | _failure(error)


def _failure(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {str(error)[:2000]}", "where": traceback.format_exc()[-2000:]}


def measure_verbs(
    bench: Bench, held: list, ids: Iterator, upstream: jax.Array, implementation: str, work: "roofline.Work", repeats: int
) -> dict:
    """Times each verb alone, jitted by itself; their sum exceeds the whole step, which fuses across them."""
    prefetch = jax.jit(mpembed.prefetch, donate_argnums=0)
    lookup = jax.jit(mpembed.lookup)
    apply = jax.jit(functools.partial(mpembed.apply_gradients, tx=TX), donate_argnums=0)
    pool = functools.partial(mpembed.pool, implementation=implementation)

    @jax.jit
    def row_gradients(rows: jax.Array, inverse: jax.Array, upstream: jax.Array) -> jax.Array:
        return jax.vjp(lambda rows: pool(rows, inverse), rows)[1](upstream)[0]

    pool_alone = jax.jit(pool)
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable, *args: Any) -> Any:
        jax.block_until_ready(args)
        begin = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        times.setdefault(name, []).append(time.perf_counter() - begin)
        return out

    for _ in range(1 + 2 * repeats):
        held[0], plan = timed("prefetch", prefetch, held[0], next(ids))
        rows = timed("lookup", lookup, held[0], plan)
        timed("pool", pool_alone, rows, plan.inverse)
        row_grads = timed("row gradients", row_gradients, rows, plan.inverse, upstream)
        held[0] = timed("apply_gradients", apply, held[0], plan, rows, row_grads)
    floors = work.by_verb()
    result = {}
    for name, seconds in times.items():
        best = statistics.median(seconds[1:])  # the first call compiled
        floor = floors[name] / bench.bandwidth
        result[name] = {"milliseconds": best * 1e3, "floor_milliseconds": floor * 1e3, "times_floor": best / floor}
    return result


# --- parts, most important first


def copy_bandwidth(bench: Bench) -> Iterator[dict]:
    """Bytes read and written per second by copying 2 GB; every floor divides by it. Also says what runs here."""
    size = 1 << (20 if bench.is_tiny else 29)
    copy = jax.jit(lambda x: x + jnp.float32(1))
    source = jnp.zeros(size, jnp.float32)
    seconds = seconds_of(lambda: copy(source), 1 if bench.is_tiny else 10)
    device = jax.devices()[0]
    yield {
        "device": f"{device.platform}: {device.device_kind}",
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "optax", "numpy")},
        "bytes": 2 * source.nbytes,
        "milliseconds": seconds * 1e3,
        "bytes_per_second": 2 * source.nbytes / seconds,
    }


def differences(one: Any, other: Any) -> dict[str, int]:
    """Returns for each leaf of two trees how many of its elements differ in a bit, NaN equal to NaN; only those that do."""
    found = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        is_unequal = (a != b) & ~((a != a) & (b != b))
        if is_unequal.any():
            found[jax.tree_util.keystr(path)] = int(is_unequal.sum())
    return found


class Small(NamedTuple):
    """Twelve training steps of a small stack, with bags, evictions, bypasses and padding."""

    storage: str
    dim: int
    implementation: str
    tx: Any
    memory_kind: str | None = None

    def train(self) -> Any:
        """Compiles, trains on dyadic gradients, whose sums are exact in any order, and returns all that came out."""
        rng = np.random.default_rng(0)
        weights = 1.0 / np.arange(1, 3001)
        batches = rng.choice(3000, p=weights / weights.sum(), size=(12, 60, 6)).astype(np.int32)
        batches = np.where(rng.random(batches.shape) < 0.1, mpembed.NO_ID, batches)
        grads = (rng.integers(-16, 17, (12, 60, self.dim)) / 64).astype(np.float32)
        cache = mpembed.CacheSpec(num_rows=128, ways=8)
        spec = mpembed.EmbeddingSpec(
            [mpembed.TableSpec("t", 3000)], self.dim, self.storage, cache, memory_kind=self.memory_kind
        )
        state = mpembed.init(jax.random.key(1), spec, self.tx, implementation=self.implementation)
        state, seen = self.run(state, batches, grads)
        read = jax.jit(mpembed.read)(state, jnp.arange(-1, 3001, dtype=jnp.int32))
        seen = jax.device_get({"state": state, "read": read, "steps": seen})
        return seen | {"flushed": jax.device_get(jax.jit(mpembed.flush, donate_argnums=0)(state).table)}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def run(self, state: Any, batches: jax.Array, grads: jax.Array) -> Any:
        """All steps; the state is donated."""

        def step(state: Any, batch: tuple) -> tuple:
            state, plan = mpembed.prefetch(state, batch[0])
            rows = mpembed.lookup(state, plan)
            pool = functools.partial(mpembed.pool, inverse=plan.inverse, combiner="sum", implementation=self.implementation)
            bags, pull_back = jax.vjp(pool, rows)
            state = mpembed.apply_gradients(state, plan, rows, pull_back(batch[1])[0], tx=self.tx)
            return state, {"rows": rows, "bags": bags, "counts": plan.counts}

        return jax.lax.scan(step, state, (batches, grads))


def compared(pairs: list[tuple[Small, Small]]) -> Iterator[dict]:
    """Trains both of each pair and says where they differ. Threads, since most of the time is XLA compiling."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = [[pool.submit(small.train) for small in pair] for pair in pairs]
        for (_, small), (one, other) in zip(pairs, runs, strict=True):
            row = {"format": small.storage, "dim": small.dim, "implementation": small.implementation}
            row["memory_kind"] = small.memory_kind
            try:
                row["unequal_elements"] = differences(one.result(), other.result())
            except Exception as error:  # other formats may still do
                row |= _failure(error)
            yield row


def kernels_against_xla(bench: Bench) -> Iterator[dict]:
    """Lookup, read, swap, update (SGD), bags and sums of duplicates take part: the same bits in every format."""
    cases = [("int8", 16), ("int8", 64), ("int4", 128), ("float32", 100), ("int2", 7), ("bfloat16", 1)]
    cases += [("float16", 16), ("float8_e4m3fn", 7), ("float8_e5m2", 64), ("int8", 7), ("int4", 16), ("int8", 128)]
    tx = mpembed.optim.sgd(0.25)
    chosen = [("int8", 7)] if bench.is_tiny else cases
    yield from compared([(Small(*case, "xla", tx), Small(*case, bench.kernels, tx)) for case in chosen])


def host_against_device(bench: Bench) -> Iterator[dict]:
    """Tables in pinned host memory, by plain XLA and with the kernels that remain: the bits of tables on the device."""
    momentum, sgd = optax.sgd(0.25, momentum=0.5), mpembed.optim.sgd(0.25)
    cases = [("int8", 16, "xla", sgd), ("float32", 64, "xla", momentum), ("int4", 7, bench.kernels, sgd)]
    chosen = cases[:1] if bench.is_tiny else cases
    yield from compared([(Small(*case), Small(*case, "pinned_host")) for case in chosen])


def gather_alone(bench: Bench) -> Iterator[dict]:
    """Gather and dequantize distinct ids of large batches, all from the packed table (P7: at most 1.3 times the floor)."""
    dims, size, batch = ((8,), 100, 64) if bench.is_tiny else ((64, 128, 16), 200_000, 65536)
    rows = 40_000 if bench.is_tiny else None
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(np.unique(ids))[:size] for ids in ids_of(rows, batch, 8)]  # together more than a GPU's L2
    for implementation, dim in itertools.product(("xla", bench.kernels), dims):
        row = {"implementation": implementation, "dim": dim, "rows": size}
        try:
            spec = Case(dim, batch, fraction=None, rows=rows).spec()
            state = mpembed.init(jax.random.key(0), spec, TX, implementation=implementation)
            read, ids = jax.jit(mpembed.read), itertools.cycle([jnp.asarray(ids) for ids in drawn])
            seconds = seconds_of(lambda read=read, state=state, ids=ids: read(state, next(ids)), 1 if bench.is_tiny else 16)
            floor = size * (4 + spec.storage.row_bytes(dim) + 4 * dim) / bench.bandwidth
            row |= {"milliseconds": seconds * 1e3, "floor_milliseconds": floor * 1e3, "times_floor": seconds / floor}
        except Exception as error:
            row |= _failure(error)
        yield row


def bags_alone(bench: Bench) -> Iterator[dict]:
    """Bags of a batch's 26 rows, summed, and their gradients; the floor moves each distinct row and each bag once."""
    dims, batch, repeats = ((8,), 16, 1) if bench.is_tiny else ((64, 128, 16), 65536, 16)
    ids = ids_of(40_000 if bench.is_tiny else None, batch, 1)[0]
    unique, inverse = np.unique(ids, return_inverse=True)
    index = jnp.asarray(inverse.reshape(ids.shape), jnp.int32)
    for implementation, dim in itertools.product(("xla", bench.kernels), dims):
        row = {"implementation": implementation, "dim": dim, "batch": batch, "rows": len(unique)}
        pool = functools.partial(mpembed.pool, combiner="sum", implementation=implementation)

        @jax.jit
        def gradients(rows: jax.Array, index: jax.Array, grads: jax.Array, pool: Callable = pool) -> jax.Array:
            return jax.vjp(lambda rows: pool(rows, index), rows)[1](grads)[0]

        try:
            rows, grads = jnp.ones((len(unique) + 1, dim)), jnp.ones((batch, dim))  # the last row is padding
            floor = (4 * dim * (len(unique) + batch) + 4 * index.size) / bench.bandwidth
            for name, call in (
                ("bags", functools.partial(jax.jit(pool), rows, index)),
                ("gradients", functools.partial(gradients, rows, index, grads)),
            ):
                seconds = seconds_of(call, repeats)
                row[name] = {
                    "milliseconds": seconds * 1e3,
                    "floor_milliseconds": floor * 1e3,
                    "times_floor": seconds / floor,
                }
        except Exception as error:
            row |= _failure(error)
        yield row


def steps(cases: tuple[Case, ...], *, by_verb: bool = False) -> Callable:
    """Makes a part of step measurements, XLA against kernels."""

    def part(bench: Bench) -> Iterator[dict]:
        # Plain XLA first: a kernel that touches memory it should not leaves the process nothing to measure with.
        for implementation, case in itertools.product(("xla", bench.kernels), cases[:1] if bench.is_tiny else cases):
            if bench.is_tiny:
                case = dataclasses.replace(case, batch=8, rows=40_000, dim=8)
            yield measured(bench, case, implementation, by_verb=by_verb)

    return part


def torch_sparse(bench: Bench) -> Iterator[dict]:
    """One step of torch.nn.EmbeddingBag(sparse=True) with SGD over the same ids, FP32, on the same device (P8)."""
    try:
        import torch
    except ImportError:
        yield {"skipped": "torch is not installed"}
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dim in (16,) if bench.is_tiny else (64, 16, 128):
        case = Case(dim, 8, rows=40_000) if bench.is_tiny else Case(dim, 65536)
        batches = [torch.from_numpy(ids).to(device) for ids in ids_of(case.rows, case.batch, 2 if bench.is_tiny else 16)]
        table = torch.nn.EmbeddingBag(case.spec().num_rows, dim, mode="sum", sparse=True, device=device)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.05)
        upstream = torch.full((batches[0].numel(), dim), 1e-3, device=device)
        ids = itertools.cycle(batches)

        def once(table=table, optimizer=optimizer, ids=ids, upstream=upstream) -> None:
            optimizer.zero_grad(set_to_none=True)
            table(next(ids).reshape(-1, 1)).backward(upstream)
            optimizer.step()

        def synchronize() -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        rounds = []
        for _ in range(6):
            synchronize()
            begin = time.perf_counter()
            for _ in range(1 if bench.is_tiny else 8):
                once()
            synchronize()
            rounds.append((time.perf_counter() - begin) / (1 if bench.is_tiny else 8))
        row = {"dim": dim, "batch": case.batch, "device": device, "torch": torch.__version__}
        yield row | {"milliseconds": statistics.median(rounds[1:]) * 1e3}
        del table, optimizer
        if device == "cuda":
            torch.cuda.empty_cache()


def spilled(bench: Bench) -> Iterator[dict]:
    """The paper's 16 %: an FP32 table in pinned host memory, without and with a cache, against INT8 + cache."""
    size = {"dim": 16, "batch": 8, "rows": 40_000} if bench.is_tiny else {"dim": 64, "batch": 16384}
    for options in (
        {"storage": "int8"},
        {"storage": "float32", "memory_kind": "pinned_host", "fraction": None},
        {"storage": "float32", "memory_kind": "pinned_host"},
        {"storage": "int8", "memory_kind": "pinned_host"},
    ):
        yield measured(bench, Case(**size, **options), "xla", by_verb=False)  # type: ignore[arg-type]


class Part(NamedTuple):
    """A part of the benchmark."""

    run: Callable[[Bench], Iterator[dict]]
    limit: float  # seconds after which its process is ended


PARTS: dict[str, Part] = {
    "copy bandwidth": Part(copy_bandwidth, 60),
    "kernels against xla": Part(kernels_against_xla, 100),
    "host tables against device": Part(host_against_device, 50),
    "gather alone": Part(gather_alone, 40),
    "step": Part(steps(tuple(Case(dim, 65536) for dim in (64, 128, 16)), by_verb=True), 150),
    "torch sparse": Part(torch_sparse, 45),
    "host memory": Part(spilled, 80),
    "bags alone": Part(bags_alone, 40),
    "step, batch 16384": Part(steps(tuple(Case(dim, 16384) for dim in (64, 128, 16))), 60),
    "step, int4": Part(steps(tuple(Case(dim, 65536, "int4", 0.01) for dim in (64, 128, 16))), 60),
    "step, float32 without cache": Part(steps(tuple(Case(dim, 65536, "float32", None) for dim in (64, 128, 16))), 60),
    "step, 120 M rows": Part(steps((Case(64, 65536, rows=120_000_000), Case(128, 65536, rows=120_000_000))), 60),
}


def rows_of(name: str, bench: Bench) -> Iterator[dict]:
    """Runs one part in this process: its rows, and as the last one the error if it raised."""
    warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
    try:
        yield from PARTS[name].run(bench)
    except Exception as error:
        yield _failure(error)


def rows_of_process(name: str, bench: Bench, seconds: float) -> Iterator[dict]:
    """Runs one part in a process of its own, ended after so many seconds: its rows, and as the last one how it failed."""
    command = [sys.executable, "-m", "experiments.bench_gpu", "--part", name, "--bandwidth", str(bench.bandwidth)]
    command += ["--interpret"] if bench.is_tiny else []
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if name == "torch sparse":  # jax would take three quarters of the memory first
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        timer, has_error = threading.Timer(seconds, process.kill), False
        timer.start()
        for line in process.stdout:  # type: ignore[union-attr]
            if line.startswith(MARK):
                row = json.loads(line[len(MARK) :])
                has_error |= "error" in row
                yield row
        is_late = not timer.is_alive()
        timer.cancel()
        if process.wait() and not has_error:
            errors.seek(0)
            why = f"ended after {seconds:.1f} seconds" if is_late else f"its process ended with {process.returncode}"
            yield {"error": why, "where": errors.read()[-2000:]}


def commit() -> str | None:
    """Returns the commit this runs from, None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(arguments: list[str] | None = None) -> dict:
    """Runs the parts and returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, interpreted kernels, any device")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which everything ends")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/results/bench_gpu.json"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a part's process is told
    parser.add_argument("--bandwidth", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    bench = Bench(options.interpret, options.bandwidth)
    if options.part is not None:
        if not options.interpret and jax.default_backend() != "gpu":
            raise SystemExit(f"needs a GPU, this is {jax.devices()[0].device_kind}; --interpret runs all tiny on any device")
        rows = list(_print_rows(rows_of(options.part, bench)))
        return {"parts": {options.part: rows}}

    # Nothing here touches a device: jax would keep most of its memory from the parts.
    begin, parts, left_out = time.perf_counter(), {}, []
    results: dict[str, Any] = {"commit": commit(), "is_smoke_test": options.interpret, "parts": parts, "left_out": left_out}
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
                parser.error(f"the copy bandwidth could not be measured: {rows[-1]['error']}\n{rows[-1]['where']}")
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
