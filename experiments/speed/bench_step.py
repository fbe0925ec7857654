"""The cost of a training step of the embedding, as a whole and by phase.

The grid varies dims, batches, formats, policies, ways, skews and V.

    python -m experiments.speed.bench_step                    # the full grid, 9 minutes on 2 cores
    python -m experiments.speed.bench_step --quick            # D = 16 and 64 at B = 2,048

A step is prefetch, lookup, pool, row gradients and apply_gradients with row-wise Adagrad, on
Kaggle's vocabularies (see workload.py). With `pair`, it is embed and apply_pooled_gradients
instead. Phases are timed as separate calls, so their sum exceeds the whole, jitted step. The bytes
floor counts what must move once (table rows and lines touched, the batch's vectors and gradients)
at the copy bandwidth measured first. Writes experiments/results/bench_step.json and bench_step.png.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.speed import workload
from experiments.speed.step import copy_bandwidth, embedding_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    quick: bool = setting(False, "Only D = 16 and 64 with batches of 2,048.")
    steps: int = setting(30, "Timed steps per case.", "STEPS", at_least=3, at_most=10_000)
    warm: int = setting(
        40, "Steps before them, which fill the cache.", "STEPS", at_least=1, at_most=10_000
    )
    only: tuple[str, ...] = setting(
        (),
        "Only cases that have all of these, batch=512 or cold=True say; they replace theirs in the "
        "file.",
        "NAME=VALUE",
        shown="all cases",
    )
    out: Path = setting(
        Path("experiments/results/bench_step.json"), "File for the results; the picture beside it."
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured configuration."""

    dim: int = 16
    batch: int = 2048
    storage: str = "int8"
    fraction: float | None = 0.05
    """None: no cache."""
    lines: int | None = None
    """Cache lines instead of a fraction."""
    policy: str = "lfu"
    ways: int = 32
    skew: float = 1.05
    rows: int | None = None
    """None: Kaggle's 33.76 M."""
    bag: int = 1
    fold: bool = False
    """Draw ids for Kaggle's sizes and take them modulo the tables' sizes: the same for every V."""
    cold: bool = False
    """Time the first steps, from an empty cache."""
    pair: bool = False
    """embed and apply_pooled_gradients instead of the five verbs."""


def make_step(tx: Any, combiner: str | None, is_pair: bool) -> Any:
    """Returns the jitted step (state, ids, upstream gradient) -> (state, vectors, counts)."""

    def step(state, ids, upstream):
        state, plan, _, vectors = embedding_step(
            state, ids, upstream, tx=tx, is_pooled=is_pair, combiner=combiner
        )
        return state, vectors, plan.counts

    return jax.jit(step, donate_argnums=0)


def measure(case: Case, steps: int, warm: int, bandwidth: float) -> dict[str, Any]:
    """Times one case; returns medians in milliseconds, spread, counts and the bytes floor."""
    sizes = workload.sizes_for(case.rows)
    tables = [mpembed.TableSpec(f"C{i + 1}", v) for i, v in enumerate(sizes)]
    cache = (
        None
        if case.fraction is None
        else mpembed.CacheSpec(case.fraction, case.lines, case.ways, case.policy)
    )
    positions = case.batch * len(sizes) * case.bag
    budget = min(
        positions, max(12_000, int(0.4 * positions))
    )  # a small batch repeats few of its ids
    spec = mpembed.EmbeddingSpec(tables, case.dim, case.storage, cache, max_unique_ids=budget)
    tx = mpembed.optim.rowwise_adagrad(0.05)
    state = mpembed.init(jax.random.key(0), spec, tx)
    combiner = None if case.bag == 1 else "sum"
    drawn = workload.KAGGLE_SIZES if case.fold else sizes
    local = workload.batches(1, warm + 2 * steps, case.batch, drawn, case.skew, case.bag)
    if case.fold:
        local = [b % np.asarray(sizes) for b in local]
    ids = [workload.to_global(b, sizes) for b in local]
    upstream = (
        np.random.default_rng(2).normal(size=(case.batch, len(sizes), case.dim)).astype(np.float32)
    )
    upstream = jnp.asarray(upstream)
    abstract = (jax.ShapeDtypeStruct(ids[0].shape, jnp.int32), upstream)
    start = time.perf_counter()
    compiled = make_step(tx, combiner, case.pair).lower(state, *abstract).compile()
    compile_s = time.perf_counter() - start
    times, first = [], 1 if case.cold else warm
    before = mpembed.stats(state)
    for i in range(first + steps):
        batch = jnp.asarray(ids[i])
        if i == first:
            before = mpembed.stats(state)
        start = time.perf_counter()
        state, vectors, _ = compiled(state, batch, upstream)
        jax.block_until_ready((state, vectors))
        times.append(time.perf_counter() - start)
    timed, after = times[first:], mpembed.stats(state)
    unique = (after.unique - before.unique) / steps
    hits = (after.hits - before.hits) / steps
    moved = (
        spec.storage.row_bytes(case.dim) * (unique - hits) * 2
        + 4 * case.dim * hits * 2
        + 8 * unique
    )
    moved += (
        2 * 4 * case.dim * case.batch * len(sizes) * 2
    )  # vectors written and read, gradients written and read
    result = dataclasses.asdict(case) | {
        "num_rows": spec.num_rows, "unique": unique, "unique_hit_rate": hits / unique,
        "dropped": after.dropped,
        "ms": 1e3 * statistics.median(timed), "ms_p10": 1e3 * float(np.percentile(timed, 10)),
        "ms_p90": 1e3 * float(np.percentile(timed, 90)), "floor_ms": 1e3 * moved / bandwidth,
        "compile_s": compile_s,
        "state_bytes": sum(a.nbytes for a in jax.tree.leaves(state)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip
    if not case.cold:
        by_phase = pair_phases if case.pair else phases
        result["phases_ms"] = by_phase(state, tx, combiner, ids[warm + steps :], upstream)
    return result


class Stopwatch:
    """Times calls by name."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Any, *args: Any) -> Any:
        """Returns what the function returns, when it is there."""
        start = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        self._times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def medians(self) -> dict[str, float]:
        """Returns milliseconds; the first two calls compile and warm up."""
        return {name: 1e3 * statistics.median(values[2:]) for name, values in self._times.items()}


def phases(
    state: Any, tx: Any, combiner: str | None, ids: list[np.ndarray], upstream: jax.Array
) -> dict[str, float]:
    """Times the verbs as separate jitted calls; medians in milliseconds."""
    prefetch, lookup = jax.jit(mpembed.prefetch, donate_argnums=0), jax.jit(mpembed.lookup)
    pool = partial(mpembed.pool, combiner=combiner, implementation=state.implementation)
    pull_back = jax.jit(lambda rows, inverse, g: jax.vjp(lambda r: pool(r, inverse), rows)[1](g)[0])
    pool_alone = jax.jit(pool)
    apply = jax.jit(partial(mpembed.apply_gradients, tx=tx), donate_argnums=0)
    timed = Stopwatch()
    for batch in ids:
        state, plan = timed("prefetch", prefetch, state, jnp.asarray(batch))
        rows = timed("lookup", lookup, state, plan)
        timed("pool", pool_alone, rows, plan.inverse)
        row_grads = timed("row gradients", pull_back, rows, plan.inverse, upstream)
        state = timed("apply_gradients", apply, state, plan, rows, row_grads)
    return timed.medians()


def pair_phases(
    state: Any, tx: Any, combiner: str | None, ids: list[np.ndarray], upstream: jax.Array
) -> dict[str, float]:
    """Times embed and apply_pooled_gradients as two jitted calls; medians in milliseconds."""
    embed = jax.jit(partial(mpembed.embed, combiner=combiner, tx=tx), donate_argnums=0)
    apply = jax.jit(partial(mpembed.apply_pooled_gradients, tx=tx), donate_argnums=0)
    timed = Stopwatch()
    for batch in ids:
        state, plan, _ = timed("embed", embed, state, jnp.asarray(batch))
        state = timed("apply_pooled_gradients", apply, state, plan, upstream)
    return timed.medians()


def cases(quick: bool) -> list[Case]:
    """Returns the grid.

    Every axis is varied around D = 16, B = 2,048, INT8 + 5 % LFU, 32 ways, skew 1.05.
    """
    base = Case()
    dims = (16, 64) if quick else (16, 64, 128)
    grid = [dataclasses.replace(base, dim=d, pair=p) for p in (False, True) for d in dims]
    formats = (("float32", None), ("int8", 0.05), ("int4", 0.01), ("bfloat16", None))
    grid += [
        dataclasses.replace(base, dim=d, storage=s, fraction=f)
        for d in (16, 64)
        for s, f in formats
    ]
    # Cost follows the batch: the same ids in small and large tables, without a cache, with the same
    # lines, with 5 %.
    for options, pair in itertools.product(
        ({"fraction": None}, {"lines": 50_000}, {}), (False, True)
    ):
        same = dataclasses.replace(base, fold=True, pair=pair, **options)
        grid += [dataclasses.replace(same, rows=r) for r in (1_000_000, None)]
    if not quick:
        grid += [
            dataclasses.replace(base, dim=d, batch=b)
            for d, b in itertools.product((16, 64, 128), (512, 16_384))
        ]
        grid += [
            dataclasses.replace(base, policy=p, ways=w)
            for p, w in itertools.product(("lfu", "lru"), (8, 32))
        ]
        grid += [dataclasses.replace(base, skew=s) for s in workload.SKEWS]
        grid += [dataclasses.replace(base, dim=d, bag=10, batch=512) for d in (16, 64)]
        grid += [dataclasses.replace(base, dim=d, cold=True) for d in (16, 64)]
    return list(dict.fromkeys(grid))


def chosen(settings: Settings) -> list[Case]:
    """Returns the cases of the grid that --only leaves."""

    def has_all(case: Case) -> bool:
        values = {f"{name}={value}" for name, value in dataclasses.asdict(case).items()}
        return values.issuperset(settings.only)

    return [case for case in cases(settings.quick) if has_all(case)]


def check(settings: Settings) -> None:
    """Refuses a choice that leaves no case, an unwritable file, and one that holds something else.

    Raises:
      Refused: in one sentence.
    """
    if not chosen(settings):
        names = ", ".join(field.name for field in dataclasses.fields(Case))
        wanted = f"what some case of the grid has; its names are {names}"
        command_line.refuse("--only", " ".join(settings.only), wanted)
    command_line.check_out(settings.out)
    measured_before(settings)


def measured_before(settings: Settings) -> dict[Case, dict[str, Any]]:
    """Returns the results of the file, which are kept until their case is measured again.

    Raises:
      Refused: if the file holds something else.
    """
    if not settings.out.exists():
        return {}
    names = [field.name for field in dataclasses.fields(Case)]
    with command_line.reading("--out", settings.out, ValueError, KeyError, TypeError):
        held = json.loads(settings.out.read_text())["results"]
        kept = [(Case(**{name: r[name] for name in names if name in r}), r) for r in held]
    return {case: dataclasses.asdict(case) | result for case, result in kept}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the step time by dim and format beside its bytes floor."""
    usual = dataclasses.asdict(Case())
    free = ("dim", "storage", "fraction")
    shown = [r for r in results if all(r[k] == v for k, v in usual.items() if k not in free)]
    shown.sort(key=lambda r: (r["dim"], r["ms"]))
    names = [
        f"D = {r['dim']}, {r['storage'].upper()}"
        + (f" + {100 * r['fraction']:g} %" if r["fraction"] else "")
        for r in shown
    ]
    figure = Figure(figsize=(8.5, 0.36 * len(shown) + 1.4), layout="constrained")
    axis = figure.subplots()
    place = range(len(shown))
    axis.barh(place, [r["ms"] for r in shown], color="#99bbdd")
    axis.barh(place, [r["floor_ms"] for r in shown], color="#0077bb", height=0.35)
    for at, r in zip(place, shown, strict=True):
        text = f"{r['ms']:.1f} ms; its bytes alone take {r['floor_ms']:.1f} ms"
        axis.annotate(
            text, (r["ms"], at), (6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(place, names)
    axis.set_xlim(0, 1.7 * max((r["ms"] for r in shown), default=1))
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlabel("ms per step (dark: its bytes at the speed of a copy)")
    axis.set_title(f"What a step of {usual['batch']:,} x 26 ids takes on 2 CPU cores")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def run(settings: Settings) -> None:
    """Measures the grid and writes the results."""
    workload.keep_freed_memory()
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    facts = provenance.environment() | {
        "bandwidth": bandwidth,
        "settings": {"steps": settings.steps, "warm": settings.warm},
    }
    measured = measured_before(settings)
    grid = cases(settings.quick)
    todo = chosen(settings)
    for number, case in enumerate(todo, 1):
        with running.working(f"case {number} of {len(todo)}"):
            result = measure(case, settings.steps, settings.warm, bandwidth)
        result["commit"] = facts["commit"]
        measured[case] = result
        parts = " ".join(f"{k} {v:.2f}" for k, v in result.get("phases_ms", {}).items())
        print(
            f"D={case.dim:<3} B={case.batch:<5} {case.storage:<8} "
            f"cache={case.lines or case.fraction} "
            f"{case.policy} W={case.ways} "
            f"z={case.skew} V={result['num_rows'] / 1e6:5.1f}M "
            f"bag={case.bag}{' cold' if case.cold else ''}{' pair' if case.pair else ''}: "
            f"{result['ms']:.2f} ms [{result['ms_p10']:.2f}, {result['ms_p90']:.2f}], "
            f"{result['ms'] / result['floor_ms']:.1f} x floor | {parts}",
            flush=True,
        )
        order = dict.fromkeys((*grid, *measured))
        results = [measured[case] for case in order if case in measured]
        provenance.write(settings.out, facts | {"results": results})  # a cut run leaves them
    if not settings.only:
        results = [measured[case] for case in todo]
        provenance.write(settings.out, facts | {"results": results})
    draw(results, settings.out.with_suffix(".png"))


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
