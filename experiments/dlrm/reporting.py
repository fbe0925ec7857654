"""What a training leaves behind: a table, a picture, and a file that says what ran where.

Works on lists of `training.Outcome`, several contenders times several seeds, the first contender
being the FP32 baseline. AUC differences are paired: a contender against the baseline of the same
seed. It runs nothing itself.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments import command_line, provenance, running
from experiments.dlrm.curves import Point
from experiments.dlrm.outcomes import Outcome

KAGGLE_ROWS = 45_840_617


def by_contender(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """Groups outcomes by contender name, baseline first, each list in order of seeds."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.contender.name, []).append(outcome)
    return groups


def auc_differences(outcomes: list[Outcome]) -> dict[str, list[float]]:
    """Returns for each contender AUC minus the baseline's AUC, seed by seed."""
    groups = by_contender(outcomes)
    baseline = {o.seed: o.auc for o in next(iter(groups.values()))}
    return {name: [o.auc - baseline[o.seed] for o in group] for name, group in groups.items()}


def make_console() -> Console:
    """Returns a console as wide as the terminal.

    If the output is not a terminal, the console is wide enough for every table.
    """
    return Console(width=None if sys.stdout.isatty() else 130)


class Bars:
    """Feeds `training.train`'s on_chunk to one bar per contender.

    The rate is over a contender's own turns.
    """

    def __init__(
        self,
        progress: Progress | None,
        names: list[str],
        num_rows: int,
        done: dict[str, int] | None = None,
    ):
        self.progress, self.num_rows, self.start = progress, num_rows, time.perf_counter()
        self.done = dict.fromkeys(names, 0) | (done or {})
        self.rows = dict.fromkeys(names, 0)
        self.seconds = dict.fromkeys(names, 0.0)
        self.last: dict[str, tuple[float, float]] = {}  # loss, hit rate
        self.measured = ""
        nothing = {"rate": 0.0, "loss": float("nan"), "hits": 0.0}
        self.tasks = {}
        if progress is not None:
            self.tasks = {
                n: progress.add_task(n, total=num_rows, completed=self.done[n], **nothing)
                for n in names
            }

    def __call__(self, name: str, num_rows: int, seconds: float, point: Point) -> None:
        """Advances a contender's bar."""
        loss, hit_rate = point.loss, point.hit_rate
        if name in self.last:  # the first turn compiles and does not count
            self.rows[name] += num_rows
            self.seconds[name] += seconds
        self.last[name] = loss, hit_rate
        self.done[name] += num_rows
        rate = self.rows[name] / self.seconds[name] if self.rows[name] else num_rows / seconds
        if self.progress is not None:
            self.progress.update(
                self.tasks[name], advance=num_rows, rate=rate, loss=loss, hits=hit_rate
            )

    def measuring(self, name: str) -> None:
        """Notes which contender is being evaluated."""
        self.measured = name

    def line(self) -> str:
        """Says how far all contenders are."""
        seconds = time.perf_counter() - self.start
        if self.measured:
            return f"{seconds:5.0f} s  evaluating {self.measured}"
        if not self.last:
            return f"{seconds:5.0f} s  making tables and compiling"
        share = sum(self.done.values()) / (len(self.done) * self.num_rows)
        parts = [
            f"{name} loss {loss:.4f}" + (f" hits {hits:.1%}" if hits else "")
            for name, (loss, hits) in self.last.items()
        ]
        return f"{seconds:5.0f} s  {share:4.0%} trained  {', '.join(parts)}"


@contextlib.contextmanager
def bars(
    console: Console,
    names: list[str],
    num_rows: int,
    done: dict[str, int] | None = None,
    period_s: float = running.PERIOD_S,
) -> Iterator[Bars]:
    """Shows bars with rows/s, loss and hit rate.

    Where there is no terminal, a line every `period_s` seconds.

    `done` has the rows that each contender was trained on before.
    """
    if console.is_terminal:
        shown = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn(
                "{task.fields[rate]:,.0f} rows/s  loss {task.fields[loss]:.4f}  "
                "hits {task.fields[hits]:.1%}"
            ),
            console=console,
        )  # fmt: skip
        with shown:
            yield Bars(shown, names, num_rows, done)
        return
    found = Bars(None, names, num_rows, done)
    with running.progress(found.line, period_s):
        yield found
    if found.last:
        found.measured = ""
        print(found.line(), flush=True)


def make_table(outcomes: list[Outcome], title: str, note: str = "") -> Table:
    """Returns a rich table, one line per contender, with means over seeds.

    With several seeds, it also has AUC differences per seed. `note` ends its caption.
    """
    several = len({o.seed for o in outcomes}) > 1
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    heads = ("AUC", "dAUC", "logloss", "NE", "MB", "ratio", "+opt", "hits", "bypass", "ms")
    for name in (*heads, "dAUC per seed") if several else heads:
        table.add_column(name, justify="right", no_wrap=True)
    differences = auc_differences(outcomes)
    for number, (name, group) in enumerate(by_contender(outcomes).items()):
        first = group[0]

        def mean(field: str, group: list[Outcome] = group) -> float:
            return float(np.mean([getattr(o, field) for o in group]))

        cells = [
            f"{mean('auc'):.4f}",
            f"{np.mean(differences[name]):+.4f}" if number else "",
            f"{mean('log_loss'):.4f}",
            f"{mean('normalized_entropy'):.4f}",
            f"{first.embedding_bytes / 1e6:.2f}",
            f"{first.ratio:.2f}",
            f"{first.ratio_with_row_state:.2f}",
            f"{mean('hit_rate'):.1%}" if first.contender.cache_fraction > 0 else "",
            f"{mean('bypass_share'):.0%}" if first.contender.cache_fraction > 0 else "",
            f"{mean('step_ms'):.1f}",
        ]
        if several:
            cells.append(" ".join(f"{d:+.4f}" for d in differences[name]) if number else "")
        table.add_row(name, *cells)
    table.caption = (
        "dAUC: to the FP32 run of the same seed. NE: normalized entropy. MB: embedding state "
        "without the optimizer's; ratio: float32 rows over that; +opt: the same with the "
        "optimizer's row state on both sides. hits: share of all ids that were in the cache. "
        "bypass: share of a batch's distinct ids that found no cache line and were trained in the "
        "table; most are rare ids, and dAUC shows what it cost. ms: per step."
    ) + note
    return table


def print_advice(console: Console, outcomes: list[Outcome], settings: type) -> None:
    """Prints what the library advised, once per contender, with the flags of the settings."""
    for name, group in by_contender(outcomes).items():
        for text in group[0].advice:
            text = text.replace("VocabularySpec(num_rows=..)", "pool_rows")
            console.print(
                f"{name}: {command_line.with_flags(text, settings)}", style="dim", soft_wrap=True
            )


COLOURS = ("#222222", "#ee7733", "#0077bb", "#009988", "#cc3311", "#ee3377")
ROUND = (1, 2, 5, 10)  # digits of ticks
PANELS = (  # field of a point, title, unit, factor
    ("loss", "Loss of a training row", "nats", 1),
    ("auc", "AUC of rows before training on them", "AUC", 1),
    ("hit_rate", "Ids found in the cache", "% of ids", 100),
    ("rows_touched", "Distinct embedding rows in a batch", "rows", 1),
)


def save_picture(outcomes: list[Outcome], batch_size: int, path: Path) -> None:
    """Draws the curves of the first seed, and each run's AUC on the test rows beside its memory."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.25))
    axes = [figure.add_subplot(grid[k // 2, k % 2]) for k in range(4)]
    groups = by_contender(outcomes)
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(groups)}
    for axis, (field, title, unit, factor) in zip(axes, PANELS, strict=True):
        for number, (name, group) in enumerate(groups.items()):
            if field == "hit_rate" and not group[0].contender.cache_fraction:
                continue
            curve = group[0].curve
            rows = np.array([point.step for point in curve]) * batch_size
            values = factor * np.array([getattr(point, field) for point in curve])
            # Runs that agree lie on one another: the later ones are dashed, so that all are seen.
            style = ("-", (0, (5, 3)), (0, (2, 3)))[number % 3]
            axis.plot(rows, values, color=colours[name], linestyle=style, linewidth=1.6, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
    for axis in axes[2:]:
        axis.set_xlabel("training rows")
    first = [group[0].curve for group in groups.values()]
    if max(map(len, first)) > 4:  # the fall of the first steps would hide all that follows
        late = [p.loss for c in first if len(c) > 1 for p in c[max(1, len(c) // 16) :]]
        axes[0].set_ylim(top=1.02 * max(late))
    axes[3].set_ylim(0, 1.1 * max(p.rows_touched for g in groups.values() for p in g[0].curve))
    if not axes[2].lines:
        axes[2].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    _draw_memory(figure.add_subplot(grid[:, 2]), groups, auc_differences(outcomes), colours)
    figure.savefig(path, dpi=130)


def _draw_memory(
    axis: Any,
    groups: dict[str, list[Outcome]],
    differences: dict[str, list[float]],
    colours: dict[str, str],
) -> None:
    """Draws a row per run.

    Its name and memory at the left, a dot per seed, and the mean in figures.
    """
    labels = []
    for place, (name, group) in enumerate(groups.items()):
        values = [o.auc for o in group]
        axis.plot(values, [place] * len(values), "o", color=colours[name], markersize=8)
        text = f"{np.mean(values):.4f}"
        if place:
            text += f"  ({np.mean(differences[name]):+.4f})"
        axis.annotate(
            text, (float(np.mean(values)), place), (0, 13), textcoords="offset points", ha="center",
            color=colours[name],
        )  # fmt: skip
        words = name.replace(" as ", "\nas ")
        labels.append(f"{words}\n{group[0].embedding_bytes / 1e6:.1f} MB")
    axis.set_yticks(range(len(groups)), labels)
    for label, colour in zip(axis.get_yticklabels(), colours.values(), strict=True):
        label.set_color(colour)
    axis.set_ylim(len(groups) - 0.5, -0.6)
    found = [o.auc for group in groups.values() for o in group]
    middle, half = (max(found) + min(found)) / 2, max(max(found) - min(found), 0.002)
    axis.set_xlim(middle - half, middle + half)
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.12g}")
    axis.set_xlabel("test AUC, a dot per seed (in brackets: minus FP32)")
    axis.set_title("What was reached, and in how much memory", fontsize=10)
    axis.grid(axis="x", alpha=0.25)


def projection(outcome: Outcome, batch_size: int) -> float:
    """Returns the seconds of a pass over Criteo-Kaggle's 45.8 M rows at this time per step."""
    return KAGGLE_ROWS / batch_size * outcome.step_ms / 1e3


def without_curve(outcome: Outcome) -> dict[str, Any]:
    """Returns an outcome as JSON has it; its curve has a file of its own."""
    return {k: v for k, v in dataclasses.asdict(outcome).items() if k != "curve"}


def save_json(path: Path, settings: Any, outcomes: list[Outcome], **extra: Any) -> dict[str, Any]:
    """Writes and returns environment, settings, paired AUC differences, outcomes, and `extra`."""
    record = {
        **provenance.environment(),
        "settings": {
            k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()
        },
        **extra,
        "auc_differences": {
            name: {"mean": float(np.mean(d)), "per_seed": d}
            for name, d in auc_differences(outcomes).items()
        },
        "outcomes": [without_curve(outcome) for outcome in outcomes],
    }
    provenance.write(path, record)
    return record
