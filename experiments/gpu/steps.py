"""The timing of a step in bench_gpu.

It has the cases, the ids, the whole step, and each verb beside the floors of its own counts.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments.gpu import roofline
from experiments.speed import workload
from experiments.speed.step import embedding_step

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
    is_pooled: bool = False  # ends in apply_pooled_gradients

    @property
    def name(self) -> str:
        """A name for files: what is set, in the order of the fields."""
        return "_".join(str(value) for value in dataclasses.astuple(self))

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
    programs: Path | None = None  # folder for the optimized HLO of compiled steps

    @property
    def kernels(self) -> str:
        """The implementation with kernels."""
        return "pallas_interpret" if self.is_tiny else "pallas_triton"


@functools.cache
def ids_of(rows: int | None, batch: int, count: int) -> tuple[np.ndarray, ...]:
    """Returns batches of global ids [B, T], all different.

    If batches repeated, the cache would soon hold every row.
    """
    sizes = workload.sizes_for(rows)

    def draw(seed: int) -> np.ndarray:
        return workload.to_global(workload.batches(seed, 1, batch, sizes, SKEW)[0], sizes)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return tuple(pool.map(draw, range(count)))


# Calls before a measurement. On a GPU, XLA records a graph of launches in the second call, and
# updates it in the third.
WARM_CALLS = 3


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Median over five rounds of the time per call, calls queued one after another."""
    rounds = []
    for _ in range(WARM_CALLS):
        jax.block_until_ready(function())
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            out = function()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - begin) / repeats)
    return statistics.median(rounds)


def train_step(*, is_pooled: bool) -> Callable:
    """Returns the jitted step of the embedding, whose state is donated.

    It runs prefetch, lookup and pool, then row gradients and apply_gradients; or embed and
    apply_pooled_gradients.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: jax.Array, upstream: jax.Array) -> Any:
        state, plan, _, vectors = embedding_step(state, ids, upstream, tx=TX, is_pooled=is_pooled)
        # A sum of the vectors would be fused with their gather, and they would never be written.
        return state, (plan.counts, vectors)

    return step


def compiled_steps(bench: Bench, runs: list[tuple[Case, str]]) -> dict[tuple[Case, str], Any]:
    """Compiles the steps of cases side by side, from shapes, and keeps their optimized HLO.

    Args:
      bench: says where the HLO is kept.
      runs: cases and implementations; tables in device memory.

    Returns:
      For each of them the compiled step and the seconds it took, or the error.
    """

    def lowered(case: Case, implementation: str) -> Any:
        init = functools.partial(mpembed.init, spec=case.spec(), tx=TX)
        init = functools.partial(init, implementation=implementation)
        state = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32))
        shape = (case.batch, len(workload.sizes_for(case.rows)))
        upstream = jax.ShapeDtypeStruct((*shape, case.dim), jnp.float32)
        step = train_step(is_pooled=case.is_pooled)
        return step.lower(state, jax.ShapeDtypeStruct(shape, jnp.int32), upstream)

    def finish(case: Case, implementation: str, program: Any) -> tuple[Any, float]:
        begin = time.perf_counter()
        compiled = program.compile()
        seconds = time.perf_counter() - begin
        if bench.programs is not None:
            bench.programs.mkdir(parents=True, exist_ok=True)
            path = bench.programs / f"{implementation}_{case.name}.hlo.gz"
            path.write_bytes(gzip.compress(compiled.as_text().encode()))
        return compiled, seconds

    found: dict[tuple[Case, str], Any] = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {}
        for run in runs:
            try:  # tracing holds Python's lock, XLA's compilation does not
                futures[run] = pool.submit(finish, *run, lowered(*run))
            except Exception as error:
                found[run] = error
        for run, future in futures.items():
            found[run] = future.exception() or future.result()
    return found


def measure_step(
    bench: Bench, case: Case, implementation: str, *, by_verb: bool, compiled: Any = None
) -> dict:
    """Times a warm step, whole and, if asked, by verb, beside the floors of its own counts.

    `compiled` is what compiled_steps returned for it; None: the step is compiled here.

    The device's peak is that of the process so far: a part's largest case comes to stand in the
    rows after it, too.
    """
    warm, repeats = (
        (2, 1) if bench.is_tiny else (max(32, 32 * 65536 // case.batch), 8)
    )  # as many ids, whatever the batch
    # One for compiling, some before the rounds, five rounds; the verbs one by one.
    count = 1 + warm + WARM_CALLS + 5 * repeats + (1 + 2 * repeats if by_verb else 0)
    batches = [jnp.asarray(ids) for ids in ids_of(case.rows, case.batch, count)]
    upstream = jnp.full((*batches[0].shape, case.dim), 1e-3, jnp.float32)
    state = mpembed.init(jax.random.key(0), case.spec(), TX, implementation=implementation)
    step, compile_seconds = compiled or (train_step(is_pooled=case.is_pooled), None)
    ids = iter(batches)
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
    floors = work.by_verb(is_pooled=case.is_pooled)
    floor = sum(floors.values()) / bench.bandwidth
    stats = jax.devices()[0].memory_stats() or {}
    row = dataclasses.asdict(case) | {
        "implementation": implementation,
        "milliseconds": seconds * 1e3,
        "floor_milliseconds": floor * 1e3,
        "times_floor": seconds / floor,
        "compile_seconds": compile_seconds,  # side by side with others
        "first_step_seconds": first,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(held[0])),
        "bytes_in_use": stats.get("bytes_in_use"),
        "peak_bytes_of_process": stats.get("peak_bytes_in_use"),
        "counts": counts,
    }
    if by_verb:
        row["verbs"] = measure_verbs(
            bench, held, ids, upstream, implementation, floors, repeats, is_pooled=case.is_pooled
        )
    return row


def measured(
    bench: Bench, case: Case, implementation: str, *, by_verb: bool, compiled: Any = None
) -> dict:
    """Returns measure_step's row, or a row that says how it failed.

    The other cases of the part then go on.
    """
    try:
        if isinstance(compiled, BaseException):
            raise compiled
        return measure_step(bench, case, implementation, by_verb=by_verb, compiled=compiled)
    except Exception as error:
        return dataclasses.asdict(case) | {"implementation": implementation} | failure(error)


def failure(error: Exception) -> dict:
    """Returns the row of a measurement that raised."""
    return {
        "error": f"{type(error).__name__}: {str(error)[:2000]}",
        "where": traceback.format_exc()[-2000:],
    }


def measure_verbs(
    bench: Bench,
    held: list,
    ids: Iterator,
    upstream: jax.Array,
    implementation: str,
    floors: dict[str, int],
    repeats: int,
    *,
    is_pooled: bool,
) -> dict:
    """Times each verb alone, jitted by itself.

    The sum of the verbs exceeds the whole step, which fuses across them.
    """
    prefetch = jax.jit(mpembed.prefetch, donate_argnums=0)
    lookup = jax.jit(mpembed.lookup)
    apply = jax.jit(functools.partial(mpembed.apply_gradients, tx=TX), donate_argnums=0)
    embed = jax.jit(functools.partial(mpembed.embed, tx=TX), donate_argnums=0)
    apply_pooled = jax.jit(
        functools.partial(mpembed.apply_pooled_gradients, tx=TX), donate_argnums=0
    )
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
        if is_pooled:
            held[0], bag_plan, _ = timed("embed", embed, held[0], next(ids))
            held[0] = timed("apply_pooled_gradients", apply_pooled, held[0], bag_plan, upstream)
            continue
        held[0], plan = timed("prefetch", prefetch, held[0], next(ids))
        rows = timed("lookup", lookup, held[0], plan)
        timed("pool", pool_alone, rows, plan.inverse)
        row_grads = timed("row gradients", row_gradients, rows, plan.inverse, upstream)
        held[0] = timed("apply_gradients", apply, held[0], plan, rows, row_grads)
    result = {}
    for name, seconds in times.items():
        best = statistics.median(seconds[1:])  # the first call compiled
        floor = floors[name] / bench.bandwidth
        result[name] = {
            "milliseconds": best * 1e3,
            "floor_milliseconds": floor * 1e3,
            "times_floor": best / floor,
        }
    return result
