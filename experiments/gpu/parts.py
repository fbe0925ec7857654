"""The parts of bench_gpu: what each measures, and how long its process may take."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments import provenance
from experiments.gpu import checks
from experiments.gpu.steps import TX, Bench, Case, failure, ids_of, measured, seconds_of
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
    """Makes a part of step measurements, XLA against kernels.

    XLA ends both kinds of step in the same way, so it runs only one of them.
    """

    def part(bench: Bench) -> Iterator[dict]:
        # Plain XLA first: a kernel that touches memory it should not leaves the process nothing to
        # measure with.
        for implementation, case in itertools.product(
            ("xla", bench.kernels), cases[:1] if bench.is_tiny else cases
        ):
            if case.is_pooled and implementation == "xla":
                continue
            if bench.is_tiny:
                case = dataclasses.replace(case, batch=8, rows=40_000, dim=8)
            yield measured(bench, case, implementation, by_verb=by_verb)

    return part


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


PARTS: dict[str, Part] = {
    "copy bandwidth": Part(memory_rate, 60),
    "kernels against xla": Part(checks.kernels_against_xla, 100),
    "host tables against device": Part(checks.host_against_device, 50),
    "gather alone": Part(gather_alone, 40),
    "step": Part(steps(tuple(Case(dim, 65536) for dim in (64, 128, 16)), by_verb=True), 150),
    "step, pooled gradients": Part(
        steps(tuple(Case(dim, 65536, is_pooled=True) for dim in (64, 128, 16)), by_verb=True), 90
    ),
    "torch sparse": Part(torch_sparse, 45),
    "host memory": Part(spilled, 80),
    "bags alone": Part(bags_alone, 40),
    "step, batch 16384": Part(steps(tuple(Case(dim, 16384) for dim in (64, 128, 16))), 60),
    "step, int4": Part(steps(tuple(Case(dim, 65536, "int4", 0.01) for dim in (64, 128, 16))), 60),
    "step, float32 without cache": Part(
        steps(tuple(Case(dim, 65536, "float32", None) for dim in (64, 128, 16))), 60
    ),
    "step, 120 M rows": Part(
        steps(tuple(Case(dim, 65536, rows=120_000_000) for dim in (64, 128, 16))), 60
    ),
}
