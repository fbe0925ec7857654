"""The planner's command line: python -m mpembed_jax.memory plan FILE --budget 16GB."""

import argparse
import csv
import importlib
import importlib.util
import sys
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
        columns = _columns(given.file)
        ids = None
        tables: dict[str, tuple[int | None, int]]
        if columns.keys() >= _COLUMNS:
            if given.raw:
                raise ValueError(f"{given.file} is a file of tables; --raw is for a file of ids")
            names = columns.get("name", [f"table{i}" for i in range(len(columns["rows"]))])
            sizes = zip(map(_count, columns["rows"]), map(_count, columns["dim"]), strict=True)
            tables = dict(zip(map(str, names), sizes, strict=True))
            if len(tables) != len(columns["rows"]):
                raise ValueError(f"{given.file}: names of tables must be distinct")
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


def _count(value: Any) -> int:
    text = str(value).replace("_", "").strip()
    if not text.isdecimal():
        raise ValueError(f"rows and dim must be whole numbers, got {value!r}")
    return int(text)


def _columns(path: Path) -> dict[str, Any]:
    """Returns {column: values} of a CSV or parquet file, without empty cells in a file of ids."""
    if path.suffix == ".parquet":
        if importlib.util.find_spec("polars") is None:
            raise ImportError(f"reading {path} needs polars, or save it as CSV")
        polars = importlib.import_module("polars")
        try:
            frame = polars.read_parquet(path)
        except polars.exceptions.PolarsError as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from None
        if not set(frame.columns) >= _COLUMNS:
            return {name: frame[name].drop_nulls().to_numpy() for name in frame.columns}
        return {name: frame[name].to_numpy() for name in frame.columns}
    try:
        # Spreadsheets begin a file with a byte order mark, which is no part of the first name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    # DictReader puts the cells for which there is no name under None.
    if longer := [number for number, row in enumerate(rows, 1) if None in row]:
        raise ValueError(f"row {longer[0]} of {path} has more cells than the header has names")
    if not rows[0].keys() >= _COLUMNS:
        return {name: [row[name] for row in rows if row[name]] for name in rows[0]}
    return {name: [row[name] for row in rows] for name in rows[0]}


if __name__ == "__main__":
    sys.exit(main())
