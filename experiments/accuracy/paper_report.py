"""Tables and pictures of the paper's grid, from the lines of its results file; it runs nothing.

Every comparison is paired: a case minus FP32 on the same data, of the same dim and seed, as a mean
with the 95 % interval of the mean over seeds (`intervals`). Bytes per row count every array of the
embedding state but the optimizer's.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.accuracy import intervals
from experiments.accuracy.grid import FP32, SHORT, STORAGES, Case
from experiments.accuracy.intervals import Interval

LIMIT = 0.0005  # AUC lost, for the bytes a method needs
COLOURS = {
    "INT8": "#0077bb", "INT4": "#228833", "INT2": "#cc3311", "FP32 hashed": "#555555",
    "FP32 pruned": "#999933", "FP32 narrow": "#aa4499",
}  # fmt: skip
RAW_COLOUR = "#ee7733"
BYTES_TICKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)  # of a row
HIT_COLOURS = ("#cc3311", "#0077bb", "#228833", "#aa4499", "#555555", "#999933")


class Group(NamedTuple):
    """All runs of one data set, model and dim."""

    data: dict[str, Any]
    dim: int
    cases: dict[Case, dict[int, dict[str, Any]]]  # {case: {seed: record}}

    @property
    def title(self) -> str:
        """What tables and pictures call it."""
        order = ", in time order" if self.data.get("order") == "time" else ""
        return f"{self.data['name']}{order}, D = {self.dim}"

    def values(self, case: Case, field: str) -> dict[int, float]:
        """{seed: field of the outcome}."""
        return {seed: record["outcome"][field] for seed, record in self.cases[case].items()}

    def difference(self, case: Case, field: str) -> Interval:
        """The paired difference of a field to FP32."""
        return intervals.paired(self.values(case, field), self.values(FP32, field))

    def mean(self, case: Case, field: str) -> float:
        """Mean over seeds."""
        return float(np.mean(list(self.values(case, field).values())))


def group(found: Iterable[dict[str, Any]]) -> list[Group]:
    """Sorts records into groups by everything but case and seed.

    Groups without an FP32 run are left out.
    """
    groups: dict[str, Group] = {}
    for record in found:
        recipe = record["recipe"]
        which = json.dumps([record["data"], recipe], sort_keys=True)
        dim = recipe.get("embedding_dim", 16)
        cases = groups.setdefault(which, Group(record["data"], dim, {})).cases
        cases.setdefault(Case(**record["case"]), {})[record["seed"]] = record
    return sorted(
        (g for g in groups.values() if FP32 in g.cases),
        key=lambda g: (g.data["name"], g.data.get("order", ""), g.data["train"], g.dim),
    )


def _is_paired(group: Group, case: Case) -> bool:
    return bool(group.cases[case].keys() & group.cases[FP32].keys())


def table(group: Group) -> str:
    """Returns the Markdown table of a group: FP32 first, then by method and bytes."""
    head = (
        "| rows | AUC | AUC difference | log loss difference | bytes per row | smaller than FP32 "
        "| with row state | hits | "
        "evictions a step | seeds |\n|---|---|---|---|---|---|---|---|---|---|"
    )

    def place(case: Case) -> tuple:
        return (
            case != FP32,
            case.method != "trained",
            case.method,
            STORAGES.index(case.storage),
            -case.share,
            -case.cache,
        )

    lines = [head]
    for case in sorted(group.cases, key=place):
        if not _is_paired(group, case):
            continue
        cells = [case.name, f"{group.mean(case, 'auc'):.4f}"]
        cells += (
            ["", ""]
            if case == FP32
            else [str(group.difference(case, field)) for field in ("auc", "log_loss")]
        )
        cells += [f"{group.mean(case, 'bytes_per_row'):.1f}", f"{group.mean(case, 'ratio'):.2f}x"]
        cells += [f"{group.mean(case, 'ratio_with_row_state'):.2f}x"]
        cached = case.cache > 0
        cells += [f"{group.mean(case, 'hit_rate'):.3f}" if cached else ""]
        cells += [
            f"{group.mean(case, 'evictions_per_step'):.0f}" if cached else "",
            str(len(group.cases[case])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def needed(group: Group) -> str:
    """Returns the Markdown table of the bytes each method needs to lose at most LIMIT of AUC."""
    families: dict[str, list[tuple[float, float]]] = {}
    for case in group.cases:
        if case.family and case != FP32 and _is_paired(group, case):
            point = (group.mean(case, "bytes_per_row"), group.difference(case, "auc").mean)
            families.setdefault(case.family, []).append(point)
    full = group.mean(FP32, "bytes_per_row")
    lines = [
        f"| method | bytes per row to lose at most {LIMIT} AUC | smaller than FP32 |",
        "|---|---|---|",
    ]
    for name, points in sorted(
        families.items(), key=lambda item: intervals.bytes_needed(item[1], LIMIT).bytes_per_row
    ):
        found = intervals.bytes_needed(points, LIMIT)
        if found.relation == ">":
            lines.append(
                f"| {name} | more than {found.bytes_per_row:.1f} | less than "
                f"{full / found.bytes_per_row:.1f}x |"
            )
        else:
            most = "at most " if found.relation == "<=" else ""
            least = "at least " if found.relation == "<=" else ""
            lines.append(
                f"| {name} | {most}{found.bytes_per_row:.1f} | "
                f"{least}{full / found.bytes_per_row:.1f}x |"
            )
    return "\n".join(lines)


def text(groups: list[Group]) -> str:
    """Returns the Markdown of all tables."""
    parts = [
        "Made by `python -m experiments.accuracy.paper_table --report` from paper_table.jsonl. ± "
        "is the half 95 %"
    ]
    parts[0] += (
        " interval (t) of the mean over paired seeds; evictions and hits (share of requests) are "
        "of training."
    )
    for g in groups:
        sizes = (
            f"{g.data['train']:,} training and {g.data['test']:,} test rows, {g.data['ids']:,} ids"
        )
        commits = sorted(
            {r["environment"]["commit"][:10] for runs in g.cases.values() for r in runs.values()}
        )
        parts.append(
            f"## {g.title}\n\n{sizes}; commit {', '.join(commits)}\n\n{table(g)}\n\n{needed(g)}"
        )
    return "\n\n".join(parts) + "\n"


def write(found: list[dict[str, Any]], out: Path) -> None:
    """Writes paper_table.md, and paper_table_accuracy.png, _hits.png and _losses.png, into `out`.

    The pictures show the group with the most runs; the tables have all groups.
    """
    groups = group(found)
    (out / "paper_table.md").write_text(text(groups))
    largest = max(groups, key=lambda g: sum(map(len, g.cases.values())))
    for name, panel in (("accuracy", draw_accuracy), ("hits", _hits), ("losses", _losses)):
        figure = Figure(figsize=(8.5, 5), layout="constrained")
        axis = figure.subplots()
        ends = panel(axis, largest)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        label_ends(figure, axis, ends)
        figure.savefig(out / f"paper_table_{name}.png", dpi=110)


class End(NamedTuple):
    """The last point of a line, where its name stands."""

    x: float
    y: float
    name: str
    colour: str


def label_ends(figure: Figure, axis: Any, ends: list[End]) -> None:
    """Writes each line's name beside its end, names that would meet one above the other."""
    figure.canvas.draw()
    places = (
        axis.transData.transform([(end.x, end.y) for end in ends]) if ends else np.zeros((0, 2))
    )
    points = places * 72 / figure.dpi
    free = -math.inf
    for at in np.argsort(points[:, 1]):
        height = max(points[at, 1], free + 12)
        free = height
        axis.annotate(
            ends[at].name, (ends[at].x, ends[at].y), (8, height - points[at, 1]),
            textcoords="offset points", va="center", fontsize=9, color=ends[at].colour,
            annotation_clip=False,
        )  # fmt: skip


def round_ticks(axis: Any, which: str, ticks: Iterable[float], low: float, high: float) -> None:
    """Sets those of the ticks that lie within the limits, and no others."""
    shown = [tick for tick in ticks if low <= tick <= high]
    getattr(axis, f"set_{which}ticks")(shown, [f"{tick:g}" for tick in shown])
    getattr(axis, f"{which}axis").set_minor_locator(NullLocator())


def _point(group: Group, case: Case) -> tuple[float, float, float]:
    """Returns bytes per row, thousandths of AUC lost, and half their interval."""
    lost = group.difference(case, "auc")
    half = 0.0 if math.isnan(lost.half) else lost.half
    return group.mean(case, "bytes_per_row"), -1e3 * lost.mean, 1e3 * half


def _draw_points(
    axis: Any, points: list[tuple[float, float, float]], style: str, colour: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Draws a line of points with intervals; returns their places, by bytes."""
    x, y, half = zip(*sorted(points), strict=True)
    axis.errorbar(
        x, y, half, fmt=style, color=colour, markersize=4, linewidth=1.5, capsize=2, elinewidth=0.8
    )
    return x, y


def draw_accuracy(axis: Any, group: Group) -> list[End]:
    """AUC lost against bytes per row: a line per method that has several sizes."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for case in group.cases:
        if case.family in COLOURS and case != FP32 and _is_paired(group, case):
            lines.setdefault(case.family, []).append(_point(group, case))
    ends, xs, ys = [], [0.0], [0.0]
    for name, points in sorted(lines.items()):
        style = "-o" if name.startswith("INT") else ":s"
        x, y = _draw_points(axis, points, style, COLOURS[name])
        ends.append(End(x[-1], y[-1], name, COLOURS[name]))
        xs, ys = [*xs, *x], [*ys, *y]
    full = group.mean(FP32, "bytes_per_row")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1, linscale=0.7)
    axis.set_xlim(0.9 * min(xs[1:], default=full / 2), 1.35 * max(xs[1:], default=full))
    round_ticks(axis, "x", BYTES_TICKS, *axis.get_xlim())
    round_ticks(axis, "y", (-5, -2, -1, 0, 1, 2, 5, 10, 20, 50), min(ys) - 1, max(ys) + 10)
    axis.set_xlabel(f"bytes per row of the embedding (FP32: {full:.0f}), all metadata counted")
    axis.set_ylabel("AUC lost against FP32, thousandths (95 % intervals)")
    axis.set_title(f"How few bytes a row can have, and what that costs ({group.title})")
    return ends


def draw_pools(axis: Any, group: Group, like: Case) -> End:
    """Adds a line to `draw_accuracy`: pools of raw ids that are like a case but for their rows.

    Raises:
      ValueError: there is none.
    """
    pools = [case for case in group.cases if dataclasses.replace(case, pool=like.pool) == like]
    points = [_point(group, case) for case in pools if _is_paired(group, case)]
    if not points:
        raise ValueError(f"there are no runs like {like.name}")
    x, y = _draw_points(axis, points, "-D", RAW_COLOUR)
    stored = SHORT.get(like.storage, like.storage.upper())
    name = f"{stored} + {100 * like.cache:.3g} %, raw ids"
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.9 * x[0]), max(high, 1.1 * x[-1]))
    round_ticks(axis, "x", BYTES_TICKS, *axis.get_xlim())
    return End(x[0], y[0], name, RAW_COLOUR)


def _hits(axis: Any, group: Group) -> list[End]:
    """Hit rate against the size of the cache, by policy and ways.

    It does not depend on the format.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for case in group.cases:
        if case.cache and case.rounding == "stochastic":
            name = f"{case.policy.upper()}, {case.ways} way{'s' * (case.ways > 1)}"
            rates = group.values(case, "hit_rate").values()
            lines.setdefault(name, {}).setdefault(100 * case.cache, []).extend(rates)
    ends, xs = [], [1.0]
    for (name, points), colour in zip(sorted(lines.items()), HIT_COLOURS, strict=False):
        x = sorted(points)
        y = [100 * float(np.mean(points[at])) for at in x]
        axis.plot(x, y, "o-", color=colour)
        ends.append(End(x[-1], y[-1], name, colour))
        xs += x
    axis.set_xscale("log")
    axis.set_xlim(0.8 * min(xs), 1.6 * max(xs))
    axis.set_ylim(0, 100)
    round_ticks(axis, "x", (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100), *axis.get_xlim())
    axis.set_xlabel("rows in the cache, % of all rows")
    axis.set_ylabel("ids found in the cache, %")
    axis.set_title(f"What a small cache catches ({group.title})")
    return ends


def _losses(axis: Any, group: Group) -> list[End]:
    """Training loss of the first seed minus FP32's, of our formats with and without a cache."""
    seed = min(group.cases[FP32])
    plain = np.array(group.cases[FP32][seed]["outcome"]["losses"])
    ends, values = [], [0.0]
    for case, runs in group.cases.items():
        # The largest cache of a format that was run, and none.
        caches = [c.cache for c in group.cases if c.family == case.family and c.method == "trained"]
        is_shown = case.family in ("INT8", "INT4", "INT2") and case.cache in (0, max(caches))
        if seed not in runs or case.method != "trained" or not is_shown:
            continue
        steps, losses = np.array(runs[seed]["outcome"]["losses"]).T
        if len(losses) != len(plain):
            continue
        style, colour = ("-" if case.cache else ":"), COLOURS[case.family]
        lost = 1e3 * (losses - plain[:, 1])
        axis.plot(steps, lost, style, color=colour, linewidth=1.5)
        ends.append(End(steps[-1], lost[-1], case.name, colour))
        values += lost.tolist()
    axis.plot((0, plain[-1, 0]), (0, 0), color="black", linewidth=0.8)
    axis.set_xlim(0, 1.25 * plain[-1, 0])
    axis.set_yscale("symlog", linthresh=1, linscale=0.7)
    round_ticks(
        axis, "y", (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100), min(values), max(values) + 5
    )
    axis.set_xlabel("training step")
    axis.set_ylabel("training loss minus FP32's, thousandths of a nat")
    axis.set_title(f"Training with a cache follows FP32 ({group.title}, seed {seed})")
    return ends
