"""On a GPU: are the kernels right, how far is a step from its bytes floor, who is faster, and what does a cache save?

    python -m experiments.bench_gpu                     # under 8 minutes on an H200, writes results/bench_gpu.json
    python -m experiments.bench_gpu --interpret         # the same parts, tiny and on any device: shows that they run

Parts run in order of importance and the file is written after each: copy bandwidth; every kernel against plain XLA; the
embedding's step (26 Kaggle vocabularies, Zipf 1.05, INT8 + 5 % cache, row-wise Adagrad), whole and by verb, XLA against
kernels; other formats and batch sizes; torch's sparse EmbeddingBag where torch is installed; an FP32 table in pinned host
memory against INT8 + cache on the device; more than 100 M rows. A part that would begin after --budget seconds is named as
left out; one that fails leaves its error in the file. Floors are bytes that must move over the copy bandwidth measured
first (roofline.py). Needs jax, optax and numpy alone.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import pathlib
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments import roofline, workload

TX = mpembed.optim.rowwise_adagrad(0.05)
SKEW = 1.05


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


class Bench:
    """What all parts share: the device, the budget, the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Takes the command line's options."""
        self.options, self.is_tiny = options, options.interpret
        self.kernels = "pallas_interpret" if options.interpret else "pallas_triton"
        self.begin, self.bandwidth = time.perf_counter(), 0.0
        device = jax.devices()[0]
        self.results: dict[str, Any] = {
            "device": {"kind": device.device_kind, "platform": device.platform, "is_smoke_test": self.is_tiny},
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "optax", "numpy")},
            "parts": {},
            "left_out": [],
        }

    def run(self, name: str, part: Callable[["Bench"], Iterator[dict]]) -> None:
        """Runs one part within the budget and writes what it yields, as it comes."""
        rows = self.results["parts"].setdefault(name, [])
        if time.perf_counter() - self.begin > self.options.budget:
            self.results["left_out"].append(name)
            self.write()
            return
        try:
            for row in part(self):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
                self.write()
                if time.perf_counter() - self.begin > self.options.budget:
                    self.results["left_out"].append(f"rest of {name}")
                    break
        except Exception as error:  # the other parts still have something to say, and the file says that this one failed
            rows.append({"error": f"{type(error).__name__}: {str(error)[:2000]}", "where": traceback.format_exc()[-2000:]})
            print(name, rows[-1]["error"], flush=True)
        self.write()

    def write(self) -> None:
        """Writes the results so far."""
        self.results["seconds"] = round(time.perf_counter() - self.begin, 1)
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def batches(self, case: Case, count: int) -> list[jax.Array]:
        """Different batches of global ids [B, T], on the device."""
        sizes = workload.sizes_for(case.rows)
        drawn = workload.batches(0, count, case.batch, sizes, SKEW)
        return [jnp.asarray(workload.to_global(ids, sizes)) for ids in drawn]


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
    warm, repeats = (2, 1) if bench.is_tiny else (24, 8)
    batches = bench.batches(case, 2 if bench.is_tiny else 8)
    upstream = jnp.full((*batches[0].shape, case.dim), 1e-3, jnp.float32)
    state = mpembed.init(jax.random.key(0), case.spec(), TX, implementation=implementation)
    step, ids = train_step(implementation), itertools.cycle(batches)
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
    """Bytes read and written per second by copying 2 GB; every floor divides by it."""
    size = 1 << (20 if bench.is_tiny else 29)
    copy = jax.jit(lambda x: x + jnp.float32(1))
    source = jnp.zeros(size, jnp.float32)
    seconds = seconds_of(lambda: copy(source), 1 if bench.is_tiny else 10)
    bench.bandwidth = 2 * source.nbytes / seconds
    yield {"bytes": 2 * source.nbytes, "milliseconds": seconds * 1e3, "gigabytes_per_second": bench.bandwidth / 1e9}


def kernels_against_xla(bench: Bench) -> Iterator[dict]:
    """Twelve training steps with bags, evictions, bypasses and padding: states equal bit for bit, in every format.

    SGD with dyadic gradients, so that sums are exact in any order; lookup, read, swap, update, bags and sums take part.
    """
    dims = (7,) if bench.is_tiny else (16, 1, 100, 128, 7, 64)
    names = ("int8",) if bench.is_tiny else (
        "int8", "int4", "int2", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32")  # fmt: skip
    tx = mpembed.optim.sgd(0.25)
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, 3001)
    batches = rng.choice(3000, p=weights / weights.sum(), size=(12, 60, 6)).astype(np.int32)
    batches = np.where(rng.random(batches.shape) < 0.1, mpembed.NO_ID, batches)
    for dim, name in itertools.product(dims, names):
        spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 3000)], dim, name, mpembed.CacheSpec(num_rows=128, ways=8))
        grads = (rng.integers(-16, 17, (12, 60, dim)) / 64).astype(np.float32)
        states = []
        for implementation in ("xla", bench.kernels):

            @functools.partial(jax.jit, donate_argnums=0)
            def train(state: Any, batches: jax.Array, grads: jax.Array, implementation: str = implementation) -> Any:
                def step(state: Any, batch: tuple) -> tuple:
                    state, plan = mpembed.prefetch(state, batch[0])
                    rows = mpembed.lookup(state, plan)
                    pool = functools.partial(
                        mpembed.pool, inverse=plan.inverse, combiner="sum", implementation=implementation
                    )
                    bags, pull_back = jax.vjp(pool, rows)
                    state = mpembed.apply_gradients(state, plan, rows, pull_back(batch[1])[0], tx=tx)
                    return state, (rows, bags, plan.counts.write_backs, plan.counts.bypasses)

                state, seen = jax.lax.scan(step, state, (batches, grads))
                return state, seen, mpembed.read(state, jnp.arange(-1, 3001, dtype=jnp.int32))

            state = mpembed.init(jax.random.key(1), spec, tx, implementation=implementation)
            states.append(jax.device_get(jax.tree.leaves(train(state, batches, grads))))
        unequal = sum(not np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(*states, strict=True))
        yield {"format": name, "dim": dim, "arrays": len(states[0]), "unequal_arrays": unequal}


def steps(cases: tuple[Case, ...], *, by_verb: bool = False) -> Callable:
    """Makes a part of step measurements, XLA against kernels."""

    def part(bench: Bench) -> Iterator[dict]:
        for case in cases[:1] if bench.is_tiny else cases:
            if bench.is_tiny:
                case = dataclasses.replace(case, batch=8, rows=40_000, dim=8)
            for implementation in ("xla", bench.kernels):
                yield measure_step(bench, case, implementation, by_verb=by_verb)

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
        batches = [torch.from_numpy(np.array(ids)).to(device) for ids in bench.batches(case, 2 if bench.is_tiny else 8)]
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
        yield measure_step(bench, Case(**size, **options), "xla", by_verb=False)  # type: ignore[arg-type]


PARTS: dict[str, Callable] = {
    "copy bandwidth": copy_bandwidth,
    "kernels against xla": kernels_against_xla,
    "step": steps(tuple(Case(dim, 65536) for dim in (64, 128, 16)), by_verb=True),
    "torch sparse": torch_sparse,
    "host memory": spilled,
    "step, batch 16384": steps(tuple(Case(dim, 16384) for dim in (64, 128, 16))),
    "step, int4": steps((Case(64, 65536, "int4", 0.01), Case(128, 65536, "int4", 0.01), Case(16, 65536, "int4", 0.01))),
    "step, float32 without cache": steps(tuple(Case(dim, 65536, "float32", None) for dim in (64, 128, 16))),
    "step, 120 M rows": steps((Case(64, 65536, rows=120_000_000), Case(128, 65536, rows=120_000_000))),
}


def main(arguments: list[str] | None = None) -> dict:
    """Runs the parts and returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, interpreted kernels, any device")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further part begins")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/results/bench_gpu.json"))
    options = parser.parse_args(arguments)
    if not options.interpret and jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, this is {jax.devices()[0].device_kind}; --interpret runs the parts tiny on any device")
    warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
    bench = Bench(options)
    for name in dict.fromkeys(["copy bandwidth", *options.parts]):  # floors need the bandwidth
        bench.run(name, PARTS[name])
    bench.write()
    return bench.results


if __name__ == "__main__":
    main()
