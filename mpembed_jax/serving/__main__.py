"""The command line of serving files: python -m mpembed_jax.serving export | inspect | verify."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.serving import container
from mpembed_jax.serving.container import Contents, NGrams, Pool
from mpembed_jax.serving.errors import ServingError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words of the command line; None: those of this process.

    Returns:
      The exit status: 0 if the command succeeded; 1 if a file is wrong, or a package that the
      command needs is not installed. If an argument is wrong, argparse ends the process with status
      2.
    """
    parser = argparse.ArgumentParser("python -m mpembed_jax.serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write the tables of a checkpoint to one file",
        description="Write the tables of a checkpoint to one file. A checkpoint does not hold the "
        "map of tokens and the whole hash of an n-gram memory: to serve one, restore the model and "
        "call serving.save with it.",
    )
    export.add_argument("checkpoint", type=Path, help="the directory given to checkpoint.save")
    export.add_argument("out", type=Path, help="the file to write")
    export.add_argument(
        "--storage",
        help="encode rows again, with rounding to nearest, in a format such as int8, int4, int2 or "
        "float16; int4:float16 has scales of float16; default: rows as trained",
    )
    export.add_argument(
        "--step", type=int, help="step of the checkpoint; default: the newest good one"
    )
    for name, text in (
        ("inspect", "print the format, the bytes and the rounding errors of each table"),
        ("verify", "check every byte"),
    ):
        commands.add_parser(name, help=text).add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        match given.command:
            case "export":
                try:
                    storage = None if given.storage is None else _format(given.storage)
                except ValueError as error:
                    parser.error(str(error))
                contents = _export(given.checkpoint, given.out, storage, given.step)
            case "inspect":
                contents = container.open_file(given.file).contents
            case _:
                contents = container.verify(given.file)
                print(f"{given.file}: every byte is right")
    except (ServingError, OSError, RuntimeError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(table_of(contents))
    return 0


def _format(text: str) -> RowFormat:
    """Returns the format of a text: its name, or name:dtype of scales.

    Raises:
      ValueError: if there is no such format.
    """
    name, colon, scale_dtype = text.partition(":")
    return RowFormat(name, scale_dtype=scale_dtype if colon else None)


def _export(checkpoint: Path, out: Path, storage: RowFormat | None, step: int | None) -> Contents:
    try:
        # Only this command needs orbax.
        from mpembed_jax.serving import checkpoints
    except ImportError as error:
        raise ImportError(f"{error}; export needs mpembed_jax[checkpoint]") from None
    return checkpoints.export(checkpoint, out, storage=storage, step=step, progress=_progress())


def _progress() -> Callable[[int, int], None]:
    """Returns a function that prints each further tenth of the rows."""
    last = -1

    def show(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // total
        if tenth > last:
            last = tenth
            print(f"{done:,} of {total:,} rows", file=sys.stderr, flush=True)

    return show


def table_of(contents: Contents) -> str:
    """Returns the tables of a file as text: rows, dim, format, bytes, errors."""
    lines = [("table", "rows", "dim", "format", "bytes", "largest error", "mean error")]
    for table in contents.tables:
        fmt = table.format
        kind = {True: "symmetric", False: "with bias", None: ""}[fmt.symmetric]
        largest, mean, num_nonfinite = table.errors
        prefix = f"{table.stack}." if table.stack else ""
        lines.append(
            (
                table.name if table.name.startswith(prefix) else f"{table.stack}/{table.name}",
                f"{table.num_rows:,}",
                str(table.embedding_dim),
                " ".join(word for word in (fmt.name, kind, fmt.scale_dtype) if word),
                f"{table.nbytes:,}",
                f"{largest:.3g}",
                f"{mean:.3g}" + (f" ({num_nonfinite} not finite)" if num_nonfinite else ""),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in lines]
    total = sum(table.nbytes for table in contents.tables)
    return "\n".join(
        [
            *(row.rstrip() for row in rows),
            f"{total:,} bytes of packed rows",
            *(_pool_of(table.name, table.pool) for table in contents.tables if table.pool),
            *map(_ngrams_of, contents.ngrams),
        ]
    )


def _pool_of(name: str, pool: Pool) -> str:
    shared = f"{pool.shared_rows:,} shared row" + ("s" if pool.shared_rows > 1 else "")
    return (
        f"{name}: rows of raw ids of {', '.join(pool.tables)}; {pool.sets:,} sets of {pool.ways} "
        f"ways, {shared} for each table, {pool.nbytes:,} bytes of owners, hash {pool.hash}"
    )


def _ngrams_of(ngrams: NGrams) -> str:
    spec = ngrams.hash
    orders = ", ".join(f"{order}-grams" for order in spec.orders)
    found = [
        f"{spec.vocabulary_size:,} tokens",
        f"heads {spec.heads}",
        f"boundary {spec.boundary}",
        f"padding {spec.padding}",
        f"seed {spec.seed}",
        *(f"map of tokens of {array.nbytes:,} bytes" for array in ngrams.arrays),
        f"hash {container.NGRAM_HASH}",
    ]
    return f"{ngrams.stack or 'n-gram memory'}: {orders} of {', '.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
