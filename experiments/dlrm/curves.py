"""Learning curves, written while a run trains.

A CSV file, and events where TensorBoard is installed.

A point is the mean over the steps since the last one. AUC is of the model before it has trained on
a row: every row is seen once, so it is that of unseen rows. The CSV file is one table that a
spreadsheet opens. An interrupted run writes both anew from the points that were saved.
"""

import contextlib
import csv
import importlib
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Point(NamedTuple):
    """What a contender did over some steps, the last of which is `step`."""

    step: int
    seconds: float  # since the seed began, of all contenders together, interruptions left out
    loss: float  # mean binary cross-entropy of a row, in nats
    auc: float  # of the rows trained on, before each was trained on; NaN where all labels are one
    hit_rate: float  # share of ids found in the cache
    rows_touched: float  # distinct rows of embedding tables in a batch


HEAD = ("seed", "run", *Point._fields)


class Curves:
    """The files of one run; `add` writes a point at once.

    Args:
      path: of the CSV file.
      events: folder of TensorBoard's events, a folder in it per contender and seed.
    """

    def __init__(self, path: Path, events: Path):
        self._file = path.open("w", newline="")
        self._table = csv.writer(self._file)
        self._table.writerow(HEAD)
        self._events, self._writers = events, dict[Any, Any]()
        shutil.rmtree(events, ignore_errors=True)
        try:
            self._summary: Any = importlib.import_module("tensorboard.summary")
        except ImportError:
            self._summary = None

    def add(self, seed: int, name: str, points: Iterable[Point]) -> None:
        """Writes points of a contender."""
        for point in points:
            cells = ["" if math.isnan(x) else f"{x:.6g}" for x in point[1:]]
            self._table.writerow([seed, name, point.step, *cells])
            if self._summary is not None:
                self._add_events(seed, name, point)
        self._file.flush()

    def _add_events(self, seed: int, name: str, point: Point) -> None:
        if (seed, name) not in self._writers:
            folder = self._events / re.sub(r"[^\w.]+", "_", name).strip("_") / f"seed_{seed}"
            self._writers[seed, name] = self._summary.Writer(str(folder))
        for tag, value in zip(Point._fields[1:], point[1:], strict=True):
            if not math.isnan(value):
                self._writers[seed, name].add_scalar(tag, value, point.step)
        self._writers[seed, name].flush()

    def close(self) -> None:
        """Closes all files."""
        self._file.close()
        for writer in self._writers.values():
            writer.close()


@contextlib.contextmanager
def curves(path: Path, events: Path) -> Iterator[Curves]:
    """Yields open Curves and closes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = Curves(path, events)
    try:
        yield opened
    finally:
        opened.close()
