"""The planner's command line: python -m mpembed_jax.memory plan FILE --budget 16GB."""

import argparse
import csv
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mpembed_jax import optim
from mpembed_jax.memory.planner import plan

_COLUMNS = {"rows", "dim"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the planner.

    Args:
      arguments: the words of the command line; None: those of this process.

    Returns:
      The exit status: 0 if the plan was printed; 1 if the file or a value is wrong, or nothing
      fits. If the words cannot be parsed, argparse ends the process with status 2.
    """
    parser = argparse.ArgumentParser("python -m mpembed_jax.memory", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("plan", help="choose stacks that fit a budget")
    own.add_argument(
        "file",
        type=Path,
        help="CSV or parquet. A file of tables has the columns rows and dim, and perhaps name. A "
        "file of ids has a column for each table; its distinct ids are counted. Empty cells are no "
        "ids",
    )
    own.add_argument("--budget", required=True, help="bytes of each device, such as 16GB")
    own.add_argument("--dim", type=int, help="embedding dim of all tables, for a file of ids")
    own.add_argument(
        "--raw",
        action="store_true",
        help="for a file of ids: the ids are raw, and those that occur often get rows of a pool",
    )
    own.add_argument(
        "--devices", type=int, default=1, help="number of devices that divide the rows"
    )
    own.add_argument(
        "--batch", type=int, help="examples in a step; the bytes of its temporary arrays then count"
    )
    own.add_argument(
        "--host-budget", help="bytes of host memory for tables that do not fit, such as 64GB"
    )
    given = parser.parse_args(arguments)
    try:
        columns, is_tables = _columns(given.file)
        ids = None
        tables: dict[str, tuple[int | None, int]]
        if is_tables:
            if given.raw:
                raise ValueError(f"{given.file} is a file of tables; --raw is for a file of ids")
            numbered = (f"table{index}" for index in range(len(columns["rows"])))
            names = [*map(str, columns.get("name", numbered))]
            if twice := _twice(names):
                raise ValueError(
                    f"{given.file}: names of tables must be distinct, got {twice} several times"
                )
            sizes = zip(map(_count, columns["rows"]), map(_count, columns["dim"]), strict=True)
            tables = dict(zip(names, sizes, strict=True))
        elif given.dim is None:
            raise ValueError(
                f"{given.file} has columns {list(columns)}; a file of tables has rows and dim; for "
                "a file of ids, give --dim"
            )
        elif given.raw:
            ids = columns
            tables = dict.fromkeys(ids, (None, given.dim))
        else:
            ids = {
                name: np.unique(values, return_inverse=True)[1] for name, values in columns.items()
            }
            tables = {name: (int(own.max(initial=0)) + 1, given.dim) for name, own in ids.items()}
        chosen = plan(
            tables,
            given.budget,
            tx=optim.rowwise_adagrad(0.05),
            devices=given.devices,
            ids=ids,
            batch_shape=None if given.batch is None else (given.batch,),
            host_budget=given.host_budget,
        )
    except (TypeError, ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(chosen)
    print("optimizer: row-wise Adagrad, one number per row")
    return 0


def _twice(names: Iterable[str]) -> list[str]:
    """Returns the names that occur several times."""
    return [name for name, count in Counter(names).items() if count > 1]


def _count(value: Any) -> int:
    """Returns a cell of the column rows or dim. It may be a float, as in a column with nulls.

    Raises:
      ValueError: if it is no whole number.
    """
    text = str(value).replace("_", "").strip()
    if text.isdecimal():
        return int(text)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or not number.is_integer():
        raise ValueError(f"rows and dim must be whole numbers, got {value!r}")
    return int(number)


def _columns(path: Path) -> tuple[dict[str, Any], bool]:
    """Returns {column: cells} of a CSV or parquet file, and whether it is a file of tables.

    Names of columns of a file of tables are in lower case, without spaces around them. A file of
    ids has no cells that are empty, null or NaN.

    Raises:
      ImportError: if polars is needed and not installed.
      ValueError: if the file cannot be read, or two columns have one name.
    """
    names, cells = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    plain = [name.strip().lower() for name in names]
    is_tables = set(plain) >= _COLUMNS
    if is_tables:
        known = [(n, own) for n, own in zip(plain, cells, strict=True) if n in (*_COLUMNS, "name")]
        names, cells = [name for name, _ in known], [list(own) for _, own in known]
    if twice := _twice(names):
        raise ValueError(f"{path} has several columns of the name {', '.join(map(repr, twice))}")
    if not is_tables:
        cells = [_filled(own) for own in cells]
    return dict(zip(names, cells, strict=True)), is_tables


def _filled(cells: Any) -> Any:
    """Returns the cells of a column of ids that are neither empty nor null nor NaN."""
    if not isinstance(cells, list):  # a column of polars
        cells = cells.drop_nulls().to_numpy()
        if cells.dtype.kind == "f":
            return cells[~np.isnan(cells)]
        if cells.dtype != object:
            return cells
    return [cell for cell in cells if type(cell) not in (str, bytes, type(None)) or cell]


def _parquet(path: Path) -> tuple[list[str], list[Any]]:
    """Returns the names of the columns of a parquet file, and the columns of polars."""
    if importlib.util.find_spec("polars") is None:
        raise ImportError(f"reading {path} needs polars, or save it as CSV")
    polars = importlib.import_module("polars")
    try:
        frame = polars.read_parquet(path)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None
    return frame.columns, frame.get_columns()


def _csv(path: Path) -> tuple[list[str], list[Any]]:
    """Returns the names of the columns of a CSV file, and their cells: lists of texts.

    A cell that a row lacks is None.
    """
    try:
        # Spreadsheets begin a file with a byte order mark, which is no part of the first name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, skipinitialspace=True) if line]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None
    if len(lines) < 2:
        raise ValueError(f"{path} has no rows")
    names, *rows = lines
    if longer := [number for number, row in enumerate(rows, 1) if len(row) > len(names)]:
        raise ValueError(f"row {longer[0]} of {path} has more cells than the header has names")
    return names, [
        [row[column] if column < len(row) else None for row in rows] for column in range(len(names))
    ]


if __name__ == "__main__":
    sys.exit(main())
