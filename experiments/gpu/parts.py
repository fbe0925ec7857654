"""The parts of bench_gpu: what each measures, and how long its process may take."""

import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments import provenance
from experiments.gpu import checks
from experiments.gpu.steps import (
    TX,
    WARM_CALLS,
    Bench,
    Case,
    compiled_steps,
    failure,
    ids_of,
    measured,
    seconds_of,
    train_step,
)
from experiments.speed.step import copy_bandwidth


def memory_rate(bench: Bench) -> Iterator[dict]:
    """Measures the bytes read and written per second by copying 2 GB.

    Every floor is divided by this rate. The part also says what runs here.
    """
    size = 1 << (20 if bench.is_tiny else 29)
    rate = copy_bandwidth(size, 1 if bench.is_tiny else 10)
    yield {
        "device": provenance.device(),
        "versions": provenance.versions(("jax", "jaxlib", "optax", "numpy")),
        "bytes": 8 * size,
        "milliseconds": 8e3 * size / rate,
        "bytes_per_second": rate,
    }


def gather_alone(bench: Bench) -> Iterator[dict]:
    """Gathers and dequantizes distinct ids of large batches from the packed table.

    P7: at most 1.3 times the floor.
    """
    dims, size, batch = ((8,), 100, 64) if bench.is_tiny else ((64, 128, 16), 200_000, 65536)
    rows = 40_000 if bench.is_tiny else None
    rng = np.random.default_rng(0)
    drawn = [
        rng.permutation(np.unique(ids))[:size] for ids in ids_of(rows, batch, 8)
    ]  # together more than a GPU's L2
    for implementation, dim in itertools.product(("xla", bench.kernels), dims):
        row = {"implementation": implementation, "dim": dim, "rows": size}
        try:
            spec = Case(dim, batch, fraction=None, rows=rows).spec()
            state = mpembed.init(jax.random.key(0), spec, TX, implementation=implementation)
            read, ids = jax.jit(mpembed.read), itertools.cycle([jnp.asarray(ids) for ids in drawn])
            seconds = seconds_of(
                lambda read=read, state=state, ids=ids: read(state, next(ids)),
                1 if bench.is_tiny else 16,
            )
            floor = size * (4 + spec.storage.row_bytes(dim) + 4 * dim) / bench.bandwidth
            row |= {
                "milliseconds": seconds * 1e3,
                "floor_milliseconds": floor * 1e3,
                "times_floor": seconds / floor,
            }
        except Exception as error:
            row |= failure(error)
        yield row


def bags_alone(bench: Bench) -> Iterator[dict]:
    """Times sums of bags of a batch's 26 rows, and their gradients.

    The floor moves each distinct row and each bag once.
    """
    dims, batch, repeats = ((8,), 16, 1) if bench.is_tiny else ((64, 128, 16), 65536, 16)
    ids = ids_of(40_000 if bench.is_tiny else None, batch, 1)[0]
    unique, inverse = np.unique(ids, return_inverse=True)
    index = jnp.asarray(inverse.reshape(ids.shape), jnp.int32)
    for implementation, dim in itertools.product(("xla", bench.kernels), dims):
        row = {"implementation": implementation, "dim": dim, "batch": batch, "rows": len(unique)}
        pool = functools.partial(mpembed.pool, combiner="sum", implementation=implementation)

        @jax.jit
        def gradients(
            rows: jax.Array, index: jax.Array, grads: jax.Array, pool: Callable = pool
        ) -> jax.Array:
            return jax.vjp(lambda rows: pool(rows, index), rows)[1](grads)[0]

        try:
            rows, grads = (
                jnp.ones((len(unique) + 1, dim)),
                jnp.ones((batch, dim)),
            )  # the last row is padding
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
            row |= failure(error)
        yield row


def steps(cases: tuple[Case, ...], *, by_verb: bool = False) -> Callable:
    """Makes a part of step measurements: all cases with kernels, then the first with plain XLA.

    XLA's steps take longest to compile. XLA ends both kinds of step in the same way, so it runs
    only one of them, and not by verb.
    """

    def part(bench: Bench) -> Iterator[dict]:
        chosen = cases[:1] if bench.is_tiny else cases
        if bench.is_tiny:
            chosen = tuple(dataclasses.replace(c, batch=8, rows=40_000, dim=8) for c in chosen)
        runs = [(case, bench.kernels) for case in chosen]
        runs += [(case, "xla") for case in chosen[:1] if not case.is_pooled]
        compiled = compiled_steps(bench, runs)
        for case, by in runs:
            is_detailed = by_verb and by != "xla"
            yield measured(bench, case, by, by_verb=is_detailed, compiled=compiled[case, by])

    return part


def profile(bench: Bench) -> Iterator[dict]:
    """Profiles warm steps with kernels: what ran on the device, by its time in all of them.

    Under a profiler, XLA records no graphs of launches. So the whole takes longer than elsewhere.
    """
    case = Case(8, 8, rows=40_000) if bench.is_tiny else Case(64, 65536, is_pooled=True)
    num_steps = 1 if bench.is_tiny else 8
    batches = ids_of(case.rows, case.batch, WARM_CALLS + num_steps)
    upstream = jnp.full((*batches[0].shape, case.dim), 1e-3, jnp.float32)
    state = mpembed.init(jax.random.key(0), case.spec(), TX, implementation=bench.kernels)
    step = train_step(is_pooled=case.is_pooled)
    for ids in batches[:WARM_CALLS]:
        state, _ = step(state, jnp.asarray(ids), upstream)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for ids in batches[WARM_CALLS:]:
                state, _ = step(state, jnp.asarray(ids), upstream)
            jax.block_until_ready(state)
        (path,) = Path(folder).rglob("*.xplane.pb")
        times = times_of(path, "CPU" if bench.is_tiny else "GPU")
    for name, (count, seconds) in sorted(times.items(), key=lambda of: -of[1][1])[:100]:
        yield {
            "name": name,
            "times": count / num_steps,
            "microseconds": seconds * 1e6 / num_steps,
        }


def times_of(path: Path, device: str) -> dict[str, tuple[int, float]]:
    """Returns how often each event of a profile occurred on a device, and its seconds in all."""
    times: dict[str, tuple[int, float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if device not in plane.name:
            continue
        for line in plane.lines:
            if device == "GPU" and "Stream" not in line.name:
                continue  # other lines repeat the kernels by module and by name scope
            for event in line.events:
                count, seconds = times.get(event.name, (0, 0.0))
                times[event.name] = (count + 1, seconds + event.duration_ns * 1e-9)
    return times


def primitives(bench: Bench) -> Iterator[dict]:
    """Times the parts of a plan that XLA does: a sort of pairs, a running sum, a scatter, a gather.

    They have as many elements as the positions of large and of small batches.
    """
    distinct: Any = {"unique_indices": True, "mode": "drop"}
    for size in (100,) if bench.is_tiny else (65536 * 26, 2048 * 26):
        keys = jax.random.bits(jax.random.key(0), (size,), jnp.uint32)
        place = jax.random.permutation(jax.random.key(1), jnp.arange(size, dtype=jnp.int32))
        for name, function in (
            ("sort of pairs", lambda keys, place: jax.lax.sort_key_val(keys, place)),
            ("running sum", lambda keys, place: jnp.cumsum(place)),
            ("scatter", lambda keys, place: jnp.zeros_like(place).at[place].set(place, **distinct)),
            ("gather", lambda keys, place: keys.at[place].get(mode="fill")),
        ):
            call = functools.partial(jax.jit(function), keys, place)
            seconds = seconds_of(call, 1 if bench.is_tiny else 32)
            yield {"name": name, "elements": size, "microseconds": seconds * 1e6}


def torch_sparse(bench: Bench) -> Iterator[dict]:
    """Times one step of torch.nn.EmbeddingBag(sparse=True) with SGD over the same ids (P8).

    It runs in FP32 on the same device.
    """
    try:
        import torch
    except ImportError:
        yield {"skipped": "torch is not installed"}
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dim in (16,) if bench.is_tiny else (64, 16, 128):
        case = Case(dim, 8, rows=40_000) if bench.is_tiny else Case(dim, 65536)
        batches = [
            torch.from_numpy(ids).to(device)
            for ids in ids_of(case.rows, case.batch, 2 if bench.is_tiny else 16)
        ]
        table = torch.nn.EmbeddingBag(
            case.spec().num_rows, dim, mode="sum", sparse=True, device=device
        )
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

        def seconds_a_call(call: Callable) -> float:
            rounds = []
            for _ in range(6):
                synchronize()
                begin = time.perf_counter()
                for _ in range(1 if bench.is_tiny else 8):
                    call()
                synchronize()
                rounds.append((time.perf_counter() - begin) / (1 if bench.is_tiny else 8))
            return statistics.median(rounds[1:])

        row = {"dim": dim, "batch": case.batch, "device": device, "torch": torch.__version__}
        flat = batches[0].reshape(-1).to(torch.int32)
        yield row | {
            "milliseconds": seconds_a_call(once) * 1e3,
            # A yardstick for XLA's sort of pairs: it also returns where each id was.
            "sort_milliseconds": seconds_a_call(lambda flat=flat: torch.sort(flat)) * 1e3,
        }
        del table, optimizer
        if device == "cuda":
            torch.cuda.empty_cache()


def spilled(bench: Bench) -> Iterator[dict]:
    """Times an FP32 table in pinned host memory against INT8 + cache (the paper's 16 %).

    The FP32 table runs without and with a cache.
    """
    size = {"dim": 16, "batch": 8, "rows": 40_000} if bench.is_tiny else {"dim": 64, "batch": 16384}
    for options in (
        {"storage": "int8"},
        {"storage": "float32", "memory_kind": "pinned_host", "fraction": None},
        {"storage": "float32", "memory_kind": "pinned_host"},
        {"storage": "int8", "memory_kind": "pinned_host"},
    ):
        yield measured(bench, Case(**size, **options), "xla", by_verb=False)


class Part(NamedTuple):
    """A part of the benchmark."""

    run: Callable[[Bench], Iterator[dict]]
    limit: float  # seconds after which its process is ended


def _sizes(**options: Any) -> tuple[Case, ...]:
    """The cases of the targets: large and small batches of both dims."""
    return tuple(Case(dim, batch, **options) for batch in (65536, 2048) for dim in (64, 128))


PARTS: dict[str, Part] = {
    "copy bandwidth": Part(memory_rate, 60),
    "kernels against xla": Part(checks.kernels_against_xla, 100),
    "profile": Part(profile, 60),
    "step, pooled gradients": Part(steps(_sizes(is_pooled=True), by_verb=True), 100),
    "step": Part(steps(_sizes(), by_verb=True), 120),
    "torch sparse": Part(torch_sparse, 45),
    "primitives": Part(primitives, 30),
    "host tables against device": Part(checks.host_against_device, 50),
    "host memory": Part(spilled, 80),
    "gather alone": Part(gather_alone, 40),
    "bags alone": Part(bags_alone, 40),
    "step, D 16": Part(steps((Case(16, 65536),)), 40),
    "step, batch 16384": Part(steps(tuple(Case(dim, 16384) for dim in (64, 128, 16))), 60),
    "step, int4": Part(steps(tuple(Case(dim, 65536, "int4", 0.01) for dim in (64, 128, 16))), 60),
    "step, float32 without cache": Part(
        steps(tuple(Case(dim, 65536, "float32", None) for dim in (64, 128, 16))), 60
    ),
    "step, 120 M rows": Part(
        steps(tuple(Case(dim, 65536, rows=120_000_000) for dim in (64, 128, 16))), 60
    ),
}
