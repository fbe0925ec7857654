"""The picture and the table of the repository's README.

They show step time against vocabulary, AUC loss against bytes per row, and what 33.8 M rows of 64
cost.

    python -m experiments.speed.first_screen
    python -m experiments.speed.first_screen --report

Measures the embedding's step (embed and apply_pooled_gradients, B = 2,048 x 26 ids, D = 64) for
growing tables, ours and a dense flax nnx.Embed with optax.adagrad as far as it is bearable; reads
experiments/results/paper_table.jsonl for accuracy and memory.report for bytes. The line of raw ids
comes from raw_ids/paper_table.jsonl and bench_raw_ids.json beside it. Writes
experiments/results/first_screen.json and .png, and the table between README's markers.
"""

import dataclasses
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.accuracy import paper_report, records
from experiments.accuracy.grid import Case
from experiments.command_line import setting
from experiments.speed import bench_step, workload
from experiments.speed.step import check_memory, copy_bandwidth


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure and where to write."""

    dim: int = setting(64, "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096)
    rows: tuple[int, ...] = setting(
        (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 33_762_577),
        "Rows of our tables.",
        "ROWS",
        at_least=100_000,
        at_most=1_000_000_000,
    )
    dense_rows: tuple[int, ...] = setting(
        (100_000, 300_000, 1_000_000, 3_000_000),
        "Rows of the dense tables, two sizes at least; more rows are extrapolated.",
        "ROWS",
        at_least=100_000,
        at_most=1_000_000_000,
    )
    out: Path = setting(
        Path("experiments/results"), "Folder of the results, with paper_table.jsonl in it."
    )
    report: bool = setting(False, "Measure nothing; draw and write what is in first_screen.json.")


README = command_line.ROOT / "README.md"
BEGIN = "<!-- first screen table: python -m experiments.speed.first_screen -->"
END = "<!-- end of table -->"
RESULTS = "first_screen.json"
# The line of raw ids.
POOL = Case("int4", 0.01, admit_after=2, pool=0.27, sketch_bytes=1, window=300)


def check(settings: Settings) -> None:
    """Refuses a single dense size, a README without the place of the table, an unwritable folder.

    Raises:
      Refused: in one sentence.
    """
    if len(settings.dense_rows) < 2:
        command_line.refuse("--dense-rows", settings.dense_rows[0], "two sizes at least")
    if not README.is_file() or BEGIN not in README.read_text():
        raise command_line.Refused(f"{README} has no line {BEGIN}, after which the table goes")
    with command_line.reading("--out", settings.out, ValueError):
        records.load(settings.out / "paper_table.jsonl")
        records.load(settings.out / "raw_ids" / "paper_table.jsonl")
    command_line.check_out(settings.out, is_file=False)
    if settings.report:
        if not (settings.out / RESULTS).is_file():
            path = settings.out / RESULTS
            raise command_line.Refused(f"no results in {path}; run without --report first")
        return
    check_memory(max(settings.rows), settings.dim)
    dense = max(settings.dense_rows)
    what = "a dense table, its gradient and its accumulators"
    command_line.check_memory("--dense-rows", dense, 3 * 4 * dense * settings.dim, what)


FORMATS = (("INT8 + 5 %", "int8", 0.05), ("INT4 + 1 %", "int4", 0.01))


def dense_step_ms(num_rows: int, dim: int) -> float:
    """Times the step that flax users write, donated.

    It takes the gradient of the whole table and runs optax.adagrad on the whole table.
    """
    sizes = workload.sizes_for(num_rows)
    ids = [
        jnp.asarray(workload.to_global(b, sizes)) for b in workload.batches(1, 8, 2048, sizes, 1.05)
    ]
    model = nnx.Embed(sum(sizes), dim, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adagrad(0.05), wrt=nnx.Param)
    upstream = jnp.asarray(
        np.random.default_rng(2).normal(size=(2048, len(sizes), dim)).astype(np.float32)
    )

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, ids: jax.Array, upstream: jax.Array) -> None:
        grads = nnx.grad(lambda model: jnp.sum(model(ids) * upstream))(model)
        optimizer.update(model, grads)

    times = []
    for batch in ids:
        start = time.perf_counter()
        step(model, optimizer, batch, upstream)
        jax.block_until_ready(nnx.state(model))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def measure(settings: Settings) -> dict[str, Any]:
    """Returns step times by number of rows."""
    bandwidth, curves = copy_bandwidth(), {}
    for name, storage, fraction in FORMATS:
        curves[name] = []
        for rows in settings.rows:
            case = bench_step.Case(
                dim=settings.dim, storage=storage, fraction=fraction, rows=rows, pair=True
            )
            with running.working(f"{name}: {rows:,} rows"):
                result = bench_step.measure(case, 30, 40, bandwidth)
            curves[name].append((result["num_rows"], result["ms"]))
            print(f"{name}: {rows:,} rows, {result['ms']:.2f} ms", flush=True)
    curves["dense flax FP32"] = []
    for rows in settings.dense_rows:
        with running.working(f"dense flax: {rows:,} rows"):
            milliseconds = dense_step_ms(rows, settings.dim)
        curves["dense flax FP32"].append((sum(workload.sizes_for(rows)), milliseconds))
        print(f"dense flax: {rows:,} rows, {curves['dense flax FP32'][-1][1]:.1f} ms", flush=True)
    return curves


class Quality(NamedTuple):
    """What is known of accuracy and raw ids, or None.

    Attributes:
      numbered: runs in which each id has a row.
      raw: runs in which ids earn rows, those of POOL among them.
      raw_times: steps on raw ids, to the step on numbered ids: one for each size of the pool.
    """

    numbered: paper_report.Group | None
    raw: paper_report.Group | None
    raw_times: list[float]

    @classmethod
    def load(cls, settings: Settings) -> "Quality":
        """Returns what the folder of results has."""

        def reddit(path: Path) -> paper_report.Group | None:
            groups = paper_report.group(records.load(path).values())
            return next((g for g in groups if (g.data["name"], g.dim) == ("reddit", 16)), None)

        times = settings.out / "bench_raw_ids.json"
        found = json.loads(times.read_text())["results"] if times.is_file() else []
        ratios = [r["ratio"] for r in found if r["is_raw"] and r["dim"] == settings.dim]
        raw = reddit(settings.out / "raw_ids" / "paper_table.jsonl")
        return cls(
            reddit(settings.out / "paper_table.jsonl"),
            raw if raw is not None and POOL in raw.cases else None,
            ratios,
        )


def _gigabytes(spec: mpembed.EmbeddingSpec) -> str:
    """Returns the two cells of a stack: its gigabytes without and with the optimizer's state."""
    report = mpembed.memory.report(spec, mpembed.optim.rowwise_adagrad(0.05))
    without = report.total - report.components["row state"]
    return f"{without / 1e9:.2f} | {report.total / 1e9:.2f}"


def raw_line(settings: Settings, quality: Quality) -> str:
    """Returns the table's line of raw ids in a pool of rows."""
    names = [mpembed.TableSpec(f"C{i}") for i in range(len(workload.KAGGLE_SIZES))]
    vocabulary = mpembed.VocabularySpec(
        round(POOL.pool * sum(workload.KAGGLE_SIZES)), admit_after=POOL.admit_after,
        shared_rows=POOL.shared_rows, sketch_bytes=POOL.sketch_bytes,
    )  # fmt: skip
    spec = mpembed.EmbeddingSpec(
        names, settings.dim, POOL.storage, mpembed.CacheSpec(POOL.cache), vocabulary=vocabulary
    )
    difference = "" if quality.raw is None else str(quality.raw.difference(POOL, "auc"))
    time = ""
    if quality.raw_times:
        least, most = min(quality.raw_times), max(quality.raw_times)
        time = f"{least:.2f} to {most:.2f} times numbered ids"
    return (
        f"| **INT4 + 1 %, raw ids**, rows for {100 * POOL.pool:.0f} % of them, row-wise Adagrad "
        f"| {_gigabytes(spec)} | {time} | {difference} |"
    )


def table(settings: Settings, curves: dict[str, Any], quality: Quality) -> str:
    """Returns README's table in Markdown."""
    tables = [mpembed.TableSpec(f"C{i}", v) for i, v in enumerate(workload.KAGGLE_SIZES)]
    plain = 4 * sum(workload.KAGGLE_SIZES) * settings.dim
    dense = curves["dense flax FP32"]
    slope = (dense[-1][1] - dense[0][1]) / (dense[-1][0] - dense[0][0])
    projected = dense[-1][1] + slope * (sum(workload.KAGGLE_SIZES) - dense[-1][0])
    rows = [
        f"| dense flax FP32, optax.adagrad | {plain / 1e9:.2f} | {2 * plain / 1e9:.2f} | "
        f"{projected:,.0f} "
        f"(extrapolated from {dense[-1][0] / 1e6:.0f} M rows: {dense[-1][1]:.0f}) | 0 |"
    ]
    for name, storage, fraction in FORMATS:
        spec = mpembed.EmbeddingSpec(tables, settings.dim, storage, mpembed.CacheSpec(fraction))
        runs = quality.numbered
        difference = "" if runs is None else str(runs.difference(Case(storage, fraction), "auc"))
        rows.append(
            f"| **{name}**, row-wise Adagrad | {_gigabytes(spec)} | {curves[name][-1][1]:.1f} "
            f"| {difference} |"
        )
    rows.append(raw_line(settings, quality))
    head = [
        "| 33.8 M rows x 64 | GB | GB with optimizer state | ms per step (2,048 x 26 ids) | AUC "
        "against FP32 (D = 16) |",
        "|---|---|---|---|---|",
    ]
    note = """
Bytes and times are for D = 64: forward, backward and update of the embedding on 2 CPU cores, by the
functions that a module with `fused=True` calls (`python -m experiments.speed.first_screen`). The
AUC column is from other runs of the same formats: the Reddit task at D = 16, paired seeds with 95 %
intervals (`python -m experiments.accuracy.paper_table --data reddit`).

Raw ids need no numbering. An id earns a row at its second occurrence, and the least used rows are
recycled. The host hashes the ids. You choose the number of rows: about as many as there are ids
that come again. The line above has `window=300` and `sketch_bytes=1`, for ids that hardly change.
If tables differ much in size, you also give the initial values of each (`TableSpec.initial_bound`).
The time of raw ids was measured with INT8 + 5 %: with rows to spare, and with a full pool
(`python -m experiments.speed.bench_raw_ids`). Their AUC is from the same command as the others,
with `--grid raw`. The files `experiments/results/*.json` name the device and the commit."""
    return "\n".join([*head, *rows, note])


def draw(settings: Settings, curves: dict[str, Any], quality: Quality, path: Path) -> None:
    """Draws the picture of README's first screen."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    ends = []
    for (name, points), colour in zip(
        curves.items(), ("#0077bb", "#228833", "#222222"), strict=True
    ):
        left.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4)
        ends.append(paper_report.End(*points[-1], name, colour))
    sizes, times = zip(*(point for points in curves.values() for point in points), strict=True)
    left.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="ms per step")
    left.set_xlim(0.8 * min(sizes), 6 * max(sizes))
    left.set_ylim(0.7 * min(times), 1.4 * max(times))
    paper_report.round_ticks(left, "x", (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8), *left.get_xlim())
    left.xaxis.set_major_formatter(EngFormatter(sep=" "))
    paper_report.round_ticks(
        left, "y", (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), *left.get_ylim()
    )
    left.set_title(f"A step's time does not grow with the table (D = {settings.dim})", fontsize=11)
    panels = [(left, ends)]
    if quality.numbered is None:
        right.set_visible(False)
    else:
        shown = paper_report.draw_accuracy(right, quality.numbered)
        if quality.raw is not None:
            shown.append(paper_report.draw_pools(right, quality.raw, POOL))
        panels.append((right, shown))
        right.title.set_fontsize(11)
    for axis, ends in panels:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        paper_report.label_ends(figure, axis, ends)
    figure.savefig(path, dpi=110)


def run(settings: Settings) -> None:
    """Measures, draws and writes."""
    quality = Quality.load(settings)
    if settings.report:
        curves = json.loads((settings.out / RESULTS).read_text())["curves"]
    else:
        workload.keep_freed_memory()
        curves = measure(settings)
        found = {"environment": provenance.environment(), "curves": curves}
        provenance.write(settings.out / RESULTS, found)
    draw(settings, curves, quality, settings.out / "first_screen.png")
    markdown = table(settings, curves, quality)
    new = f"{BEGIN}\n{markdown}\n{END}"
    place = f"{re.escape(BEGIN)}.*?{re.escape(END)}"
    README.write_text(re.sub(place, lambda _: new, README.read_text(), flags=re.DOTALL))
    print(markdown)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
