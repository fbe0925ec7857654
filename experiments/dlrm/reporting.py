"""What a training leaves behind: a table, a picture, and a file that says what ran where.

Works on lists of `training.Outcome`, several contenders times several seeds, the first contender
being the FP32 baseline. AUC differences are paired: a contender against the baseline of the same
seed. It runs nothing itself.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments import command_line, provenance
from experiments.dlrm.training import Outcome

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

    def __init__(self, progress: Progress | None, names: list[str], num_rows: int):
        self.progress, self.num_rows, self.start = progress, num_rows, time.perf_counter()
        self.done, self.rows = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        self.seconds = dict.fromkeys(names, 0.0)
        self.last: dict[str, tuple[float, float]] = {}  # loss, hit rate
        self.measured = ""
        nothing = {"rate": 0.0, "loss": float("nan"), "hits": 0.0}
        self.tasks = {}
        if progress is not None:
            self.tasks = {n: progress.add_task(n, total=num_rows, **nothing) for n in names}

    def __call__(
        self, name: str, num_rows: int, loss: float, hit_rate: float, seconds: float
    ) -> None:
        """Advances a contender's bar."""
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
def bars(console: Console, names: list[str], num_rows: int) -> Iterator[Bars]:
    """Shows bars with rows/s, loss and hit rate, or a line every ten seconds without a terminal."""
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
            yield Bars(shown, names, num_rows)
        return
    found = Bars(None, names, num_rows)
    with command_line.progress(found.line):
        yield found
    if found.last:
        found.measured = ""
        print(found.line(), flush=True)


def make_table(outcomes: list[Outcome], title: str) -> Table:
    """Returns a rich table, one line per contender, with means over seeds.

    With several seeds, it also has AUC differences per seed.
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
    )
    return table


def print_advice(console: Console, outcomes: list[Outcome], settings: type) -> None:
    """Prints what the library advised, once per contender, with the flags of the settings."""
    for name, group in by_contender(outcomes).items():
        for text in group[0].advice:
            console.print(
                f"{name}: {command_line.with_flags(text, settings)}", style="dim", soft_wrap=True
            )


def save_picture(outcomes: list[Outcome], path: Path) -> None:
    """Draws loss curves of the first seed, and AUC lost against bytes per row.

    The second panel has one mark per seed.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    differences = auc_differences(outcomes)
    for number, (name, group) in enumerate(by_contender(outcomes).items()):
        look = {"color": colormaps["tab20"](number * 2 % 20 + number // 10), "label": name}
        steps, losses = np.array(group[0].losses).T
        width = max(1, len(losses) // 40)
        left.plot(
            steps[width - 1 :],
            np.convolve(losses, np.ones(width) / width, "valid"),
            linewidth=1.2,
            **look,
        )
        lost = [-d for d in differences[name]]
        mark = "osD^vPX*<>"[number % 10]
        right.scatter(
            [group[0].bytes_per_row] * len(lost), lost, s=26, marker=mark, alpha=0.8, **look
        )
    left.set(xlabel="step", ylabel="training loss", title="Training loss of the first seed")
    right.set(
        xlabel="bytes per row, optimizer state left out",
        ylabel="AUC lost against FP32",
        title="AUC against memory",
    )
    right.axhline(0, color="grey", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set_yscale("symlog", linthresh=1e-3)
    most = [
        sign * max(sign * -d for group in differences.values() for d in group) for sign in (-1, 1)
    ]
    right.set_ylim(min(-5e-4, 1.3 * most[0]), max(1e-3, 1.3 * most[1]))
    left.set_ylim(
        top=1.02
        * max(
            group[0].losses[len(group[0].losses) // 16][1]
            for group in by_contender(outcomes).values()
        )
    )
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def projection(outcome: Outcome, batch_size: int) -> float:
    """Returns the seconds of a pass over Criteo-Kaggle's 45.8 M rows at this time per step."""
    return KAGGLE_ROWS / batch_size * outcome.step_ms / 1e3


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
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record
