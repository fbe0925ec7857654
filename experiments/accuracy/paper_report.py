"""Tables and pictures of the paper's grid, from the lines of its results file; it runs nothing.

Every comparison is paired: a case minus FP32 on the same data, of the same dim and seed, as a mean
with the 95 % interval of the mean over seeds (`intervals`). Bytes per row count every array of the
embedding state but the optimizer's.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.accuracy import intervals
from experiments.accuracy.grid import FP32, STORAGES, Case
from experiments.accuracy.intervals import Interval

LIMIT = 0.0005  # AUC lost, for the bytes a method needs
MARKS = {
    "LRU": "P", "nearest": "v", "way": "s", "small": "D", "symmetric": "X", "post": "*",
    "quantization": "<",
    "hashed": "^", "narrow": ">", "pruned": "h",
}  # fmt: skip
COLOURS = {"INT8": "#4477aa", "INT4": "#228833", "INT2": "#ee6677", "FP32": "#888888"}


def _look(name: str) -> dict[str, Any]:
    """Colour by format, the methods of the paper in full, everything else paler."""
    is_ours = name in ("INT8", "INT4", "INT2")
    colour = COLOURS.get(name.split()[0].rstrip(","), "#aa3377")
    mark = next((mark for word, mark in MARKS.items() if word in name), "o")
    look = {"color": colour, "marker": mark, "capsize": 2, "label": name}
    if is_ours:
        return look | {"linewidth": 2.0, "markersize": 6, "zorder": 3}
    return look | {"linewidth": 0.8, "markersize": 4, "alpha": 0.75, "linestyle": ":"}


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
    """Writes paper_table.md and paper_table_{accuracy,hits,losses}.png into `out`."""
    groups = group(found)
    (out / "paper_table.md").write_text(text(groups))
    _draw(
        groups,
        out / "paper_table_accuracy.png",
        [_accuracy("auc", "AUC lost", -1), _accuracy("log_loss", "log loss gained", 1)],
    )
    _draw(groups, out / "paper_table_hits.png", [_hits])
    _draw(groups, out / "paper_table_losses.png", [_losses])


def _draw(groups: list[Group], path: Path, panels: list[Callable[[Any, Group], None]]) -> None:
    """Draws one row per group and one column per kind of panel."""
    figure = Figure(figsize=(7.6 * len(panels), 4.2 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(panels), squeeze=False)
    for row, g in zip(axes, groups, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            panel(axis, g)
            axis.set_title(g.title)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(
                    fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
                )
    figure.savefig(path, dpi=90)


def _accuracy(field: str, label: str, sign: int) -> Callable[[Any, Group], None]:
    """Returns the panel of a field's loss against bytes per row.

    A method is a line, a variant is a single mark.
    """

    def panel(axis: Any, group: Group) -> None:
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for case in group.cases:
            if case != FP32 and _is_paired(group, case):
                lost = group.difference(case, field)
                half = 0.0 if math.isnan(lost.half) else lost.half
                point = (group.mean(case, "bytes_per_row"), sign * lost.mean, half)
                lines.setdefault(case.family or case.name, []).append(point)
        for name, points in sorted(lines.items()):
            x, y, half = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, half, **_look(name))
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axhline(LIMIT, color="grey", linewidth=0.6, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set(
            xlabel="bytes per row, optimizer state left out",
            ylabel=f"{label} against FP32, 95 % intervals",
        )

    return panel


def _hits(axis: Any, group: Group) -> None:
    """Draws the hit rate against the size of the cache, by policy and ways.

    The hit rate does not depend on the format.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for case in group.cases:
        if case.cache and case.rounding == "stochastic":
            name = f"{case.policy.upper()}, {case.ways} way{'s' * (case.ways > 1)}"
            lines.setdefault(name, {}).setdefault(100 * case.cache, []).extend(
                group.values(case, "hit_rate").values()
            )
    for name, points in sorted(lines.items()):
        x = sorted(points)
        y = [np.mean(points[at]) for at in x]
        axis.plot(x, y, marker="o", label=name)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="cache, % of all rows", ylabel="share of requests found in the cache")


def _losses(axis: Any, group: Group) -> None:
    """Training loss of the first seed."""
    seed = min(group.cases[FP32])
    for number, (case, runs) in enumerate(group.cases.items()):
        if seed in runs and case.family and case.method in ("trained", "quantization-aware"):
            steps, losses = np.array(runs[seed]["outcome"]["losses"]).T
            colour = colormaps["tab20"](number * 2 % 20 + number // 10 % 2)
            axis.plot(steps[1:], losses[1:], label=case.name, linewidth=1, color=colour)
    axis.set(xlabel="step", ylabel=f"training loss, seed {seed}")
