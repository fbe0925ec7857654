"""Table and picture of the runs with n-gram memories; it runs nothing.

Every comparison is paired: a contender minus FP32 on the same text, recipe and seed, as a mean with
the 95 % interval of the mean over seeds. Bytes count every array of the embedding state, the
optimizer's included.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from experiments.accuracy import intervals

RECORDS, STEP_TIME = "ngram_memory.jsonl", "ngram_step_time.json"
TIMED = ("batch", "length", "width", "features")  # settings of a step's time
PLAIN, SMALL = "FP32", "FP32 in INT4 + 5 %'s bytes"
COLOURS = {"none": "#999999", "FP32": "#555555", "INT8": "#0077bb", "INT4": "#228833"}
# Of a label beside its point, in points: those of the left half end there.
PLACES = ((7, 4), (-7, -4), (-7, -12), (7, -12), (-7, 4), (7, 16), (-7, 16), (7, -24), (-7, -24))


class Group(NamedTuple):
    """All runs of one text and recipe."""

    text: dict[str, Any]
    recipe: dict[str, Any]
    runs: dict[str, dict[int, dict[str, Any]]]  # {contender: {seed: record}}

    def values(self, name: str, field: str) -> dict[int, float]:
        """{seed: field of the outcome}."""
        return {seed: record["outcome"][field] for seed, record in self.runs[name].items()}

    def mean(self, name: str, field: str) -> float:
        """Mean over seeds."""
        return float(np.mean(list(self.values(name, field).values())))

    def loss(self, name: str) -> float:
        """Mean loss over the seeds that all contenders have; over all its own if there is none."""
        losses = self.values(name, "loss")
        shared = set.intersection(*(set(runs) for runs in self.runs.values()))
        return float(np.mean([losses[seed] for seed in sorted(shared or losses)]))

    def difference(self, name: str, baseline: str = PLAIN) -> intervals.Interval | None:
        """The paired difference of the loss, None without a seed in common."""
        if not self.runs.get(name, {}).keys() & self.runs.get(baseline, {}).keys():
            return None
        return intervals.paired(self.values(name, "loss"), self.values(baseline, "loss"))


def group(found: Iterable[dict[str, Any]]) -> list[Group]:
    """Sorts records into groups by everything but contender and seed, the largest first."""
    groups: dict[str, Group] = {}
    for record in found:
        which = json.dumps([record["text"], record["recipe"]], sort_keys=True)
        runs = groups.setdefault(which, Group(record["text"], record["recipe"], {})).runs
        runs.setdefault(record["contender"]["name"], {})[record["seed"]] = record
    return sorted(groups.values(), key=lambda g: -sum(map(len, g.runs.values())))


def speeds(group: Group, out: Path) -> dict[str, int]:
    """Returns {contender: tokens a second} that step_time measured with a group's settings."""
    path, recipe = out / STEP_TIME, group.recipe
    if not path.exists():
        return {}
    timed = json.loads(path.read_text())
    if any(timed["settings"].get(key) != recipe[key] for key in TIMED):
        return {}
    num_rows = recipe["rows"] * len(recipe["orders"]) * recipe["ngram_heads"]
    sizes = [size for size in timed["sizes"] if size["rows"] == num_rows]
    return sizes[0]["tokens_per_second"] if sizes else {}


def table(group: Group, speed: dict[str, int]) -> str:
    """Returns the Markdown table of a group, FP32's bytes over a contender's in it."""
    lines = [
        "| memory | validation loss | minus FP32's | minus FP32's in INT4 + 5 %'s bytes | MB "
        "| bytes a parameter | smaller than FP32 | hits | tokens/s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(group.runs, key=group.loss):
        size, rows = group.mean(name, "state_bytes"), group.mean(name, "num_rows")
        hits = next(iter(group.values(name, "hit_rate").values()))
        contender = next(iter(group.runs[name].values()))["contender"]
        is_raw = contender.get("admit_after") is not None
        numbers = rows * group.recipe["features"] * (group.recipe["ngram_heads"] if is_raw else 1)
        is_smaller = size and PLAIN in group.runs and name != PLAIN
        cells = [
            name,
            f"{group.loss(name):.4f}",
            *(
                "" if name == other else str(group.difference(name, other) or "")
                for other in (PLAIN, SMALL)
            ),
            f"{size / 1e6:.1f}",
            f"{size / numbers:.2f}" if numbers else "",
            f"{group.mean(PLAIN, 'state_bytes') / size:.2f}x" if is_smaller else "",
            f"{group.mean(name, 'hit_rate'):.3f}" if hits is not None else "",
            f"{speed[name]:,}" if name in speed else "",
            str(len(group.runs[name])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_of(groups: list[Group], out: Path) -> str:
    """Returns the Markdown of all tables; `out` may have the times of a step."""
    parts = [
        "Made by `python -m experiments.ngram.memory_table --report` from ngram_memory.jsonl. A "
        "loss is the mean over the seeds that all contenders of its table have. ± is the half "
        "95 % interval (t) of the mean over paired seeds; hits are shares of requests in "
        "training; tokens/s are those of `step_time`."
    ]
    for g in groups:
        commits = sorted(
            {r["environment"]["commit"][:10] for runs in g.runs.values() for r in runs.values()}
        )
        r = g.recipe
        parts.append(
            f"## D = {r['features']}, {r['rows']:,} rows a table, {r['steps']} steps of "
            f"{r['batch'] * r['length']:,} tokens\n\n{g.text['train']:,} training tokens of "
            f"{g.text['vocabulary']:,}; width {r['width']}; commit {', '.join(commits)}\n\n"
            f"{table(g, speeds(g, out))}"
        )
    return "\n\n".join(parts) + "\n"


def write(found: list[dict[str, Any]], out: Path) -> str:
    """Writes ngram_memory.md and ngram_memory.png into `out`; returns the Markdown.

    The picture shows the group with the most runs.
    """
    groups = group(found)
    markdown = text_of(groups, out)
    (out / "ngram_memory.md").write_text(markdown)
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    picture(axis, groups[0])
    figure.savefig(out / "ngram_memory.png", dpi=110)
    return markdown


def picture(axis: Any, group: Group) -> None:
    """Draws the loss over the bytes of the embedding state, a point for each contender."""
    sizes, points = [], []
    for name in group.runs:
        size = group.mean(name, "state_bytes") / 1e6
        if not size:
            continue
        loss = group.loss(name)
        colour = COLOURS.get(name[:4], "#aa4499")
        axis.plot(size, loss, "o", color=colour)
        points.append((name, (size, loss), colour))
        sizes.append(size)
    if "none" in group.runs:
        axis.set_title(
            f"Loss over bytes of the n-gram memory, D = {group.recipe['features']} (no memory: "
            f"{group.loss('none'):.3f})"
        )
    axis.set_xscale("log")
    if sizes:
        low, high = 0.8 * min(sizes), 2.2 * max(sizes)
        axis.set_xlim(low, high)
        ticks = [m * 10**e for e in range(-3, 6) for m in (1, 2, 5)]
        shown = [tick for tick in ticks if low <= tick <= high]
        axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("MB of the whole embedding state, optimizer included")
    axis.set_ylabel("validation loss, nats a token")
    # At least a twentieth of a nat, so that what seeds change does not look large.
    low, high = axis.get_ylim()
    middle, half = (low + high) / 2, max(0.025, 0.6 * (high - low))
    axis.set_ylim(middle - half, middle + half)
    _label(axis, points)


def _label(axis: Any, points: list[tuple[str, tuple[float, float], str]]) -> None:
    """Writes the name of each point beside it, where neither a point nor a label is yet."""
    axis.figure.draw_without_rendering()  # the layout is final, so that boxes of labels are right
    frame = axis.get_window_extent()
    centres = axis.transData.transform([place for _, place, _ in points]) if points else []
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in centres]
    for name, place, colour in points:
        for x, y in PLACES:
            side = "left" if x > 0 else "right"
            label = axis.annotate(
                name,
                place,
                (x, y),
                textcoords="offset points",
                horizontalalignment=side,
                fontsize=9,
                color=colour,
            )
            label.set_in_layout(False)  # else the axes would move afterwards
            box = label.get_window_extent()
            is_inside = frame.xmin <= box.xmin and box.xmax <= frame.xmax
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
            if (x, y) != PLACES[-1]:  # the last place is taken even if it is not free
                label.remove()
        taken.append(box)
