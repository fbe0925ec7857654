"""Saving: embedding states become one serving file, block by block.

The rows are those that `read` returns in training. Without another format, the table's rows are
written as they are, and lines that are newer than the table are encoded as `flush` encodes them. In
another format, all rows are encoded again, with rounding to nearest. No second copy of a table is
made.
"""

import dataclasses
import errno
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing
from mpembed_jax.embedding import arguments
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.formats import RowFormat, as_format
from mpembed_jax.numerics.packing import decode, encode
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.serving import container, sources
from mpembed_jax.serving.container import Contents, Errors, NGrams, Pool, Table
from mpembed_jax.serving.sources import Source
from mpembed_jax.table import QuantizedTable, encode_rows

Progress = Callable[[int, int], None]  # (rows written, rows of all tables)
_NOTHING = Errors(0.0, 0.0, 0)


def save(
    path: Any,
    states: Any,
    *,
    storage: RowFormat | str | None = None,
    progress: Progress | None = None,
) -> Contents:
    """Writes embedding states to one serving file.

    The file appears whole or not at all. It holds the rows of every table, their formats and
    checksums, and the names of tables and features. If a stack has a vocabulary, the file holds its
    pool of rows under the name "<stack>.pool" ("pool" if the tree is one state), and the tags of
    the rows' owners. It holds neither optimizer state nor the use of rows nor counts of ids without
    a row.

    For an NGramMemory, the file also holds the hash of its n-grams and its map of tokens. Its
    tables have names such as "<stack>.2-gram_0" ("2-gram_0" if the tree is the memory itself), so
    that one file can have several memories. The hash is part of the module, not of its state: it is
    not in `nnx.state(model)`.

    Args:
      path: the path of the file. An existing file is replaced.
      states: an EmbeddingState, or any tree that holds some, such as `{name: state}`, an nnx model,
        or the variables of a linen model; not consumed. An n-gram memory is an nn.NGramMemory, or
        an NGramState for one without a module. The path in the tree is the name of the stack. A
        name of a table or feature that several stacks have begins with "<stack>." in the file:
        {"user": model.user.state, "item": model.item.state} gives "user.embedding".
      storage: None: the table's rows are written as trained, and lines that are newer than the
        table are encoded as by `flush`. A RowFormat or its name: rows of another format are encoded
        again, with rounding to nearest.
      progress: called with the number of rows written and the number of all rows.

    Returns:
      The contents of the file. The `errors` of a table are the differences between its rows and
      those that `read` returns in training.

    Raises:
      OSError: if the file cannot be written; an existing file stays. It is raised before rows are
        read if path is a directory, or its folder does not exist.
      TypeError: if path is not a path, storage not a format, or progress not a function, or if a
        map of tokens does not consist of integers.
      ValueError: if there is no embedding state, names of the file are not distinct, or a state is
        traced, abstract, donated or spread over several processes. Also if an NGramState has the
        hash of other tables, or another hash than the spec of its state, or a map that does not fit
        it.
    """
    path = arguments.path_of("serving.save(path, states)", "path", path)
    if not (progress is None or callable(progress)):
        raise TypeError(f"progress must be a function or None, got {progress!r}")
    check_place(path)
    return write(path, sources.of_tree(states), storage, progress)


def check_place(path: Path) -> None:
    """Checks that a file may have this path, before its rows are read.

    Raises:
      FileNotFoundError: if its folder does not exist.
      IsADirectoryError: if a directory has this path.
    """
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "a serving file cannot replace a directory", str(path)
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"the folder of {path.name} does not exist", str(path.parent)
        )


def write(
    path: Any,
    stacks: list[Source],
    storage: RowFormat | str | None = None,
    progress: Progress | None = None,
) -> Contents:
    """Writes the stacks of `sources` to one file; see `save`."""
    path = Path(path)
    wanted = None if storage is None else as_format(storage)
    tables: list[Table] = []
    owners: list[tuple[Source, int]] = []  # the stack and the first global row of each table
    features: list[tuple[str, str]] = []
    ngrams: list[NGrams] = []
    for source, names in zip(stacks, _names(stacks), strict=True):
        if source.ngrams is not None:
            ngrams.append(NGrams(source.name, source.ngrams, source.canonical is not None))
        spec = source.spec
        dim = spec.embedding_dim
        fmt = spec.storage if wanted is None else wanted.resolve(dim)
        form = dim, _bare(fmt)
        if spec.vocabulary is not None:
            tables.append(_pool_of(source, names.tables, *form))
            owners.append((source, 0))
        else:
            for table in spec.tables:
                first, num_rows = spec.table_range(table.name)
                name = names.tables[table.name]
                tables.append(Table(name, source.name, num_rows, *form, _NOTHING))
                owners.append((source, first))
        features += [(names.features[f], names.tables[t]) for f, t in spec.feature_tables]
    contents = container.checked(Contents(tuple(tables), tuple(features), tuple(ngrams)))
    room = container.header_room(contents)
    maps = [source.canonical for source in stacks if source.canonical is not None]
    with container.replacing(path) as file:
        contents = _write_arrays(file, contents, owners, maps, room, wanted is None, progress)
        file.seek(0)
        file.write(container.padded_header(contents, room))
    return contents


class _Names(NamedTuple):
    """The names that the tables and the features of a stack have in the file."""

    tables: dict[str, str]
    features: dict[str, str]


def _names(stacks: list[Source]) -> list[_Names]:
    """Returns the names of each stack.

    Names of an n-gram memory begin with the name of its stack. So do names that several other
    stacks have.
    """
    plain = [source.spec for source in stacks if source.ngrams is None]
    num_tables = Counter(table.name for spec in plain for table in spec.tables)
    num_features = Counter(feature for spec in plain for feature, _ in spec.feature_tables)

    def named(kind: str, source: Source, names: list[str], count: Counter[str]) -> dict[str, str]:
        for name in names:
            if type(name) is not str:
                raise ValueError(f"the name of {kind} {name!r} is no text")
        prefix = f"{source.name}." if source.name else ""
        has_prefix = source.ngrams is not None
        return {n: f"{prefix}{n}" if has_prefix or count[n] > 1 else n for n in names}

    return [
        _Names(
            named("table", source, [table.name for table in source.spec.tables], num_tables),
            named(
                "feature", source, [name for name, _ in source.spec.feature_tables], num_features
            ),
        )
        for source in stacks
    ]


def _pool_of(source: Source, names: dict[str, str], dim: int, fmt: RowFormat) -> Table:
    """Returns the pool of a stack with a vocabulary as a table of the file.

    Args:
      source: the stack.
      names: the name that each of its tables has in the file.
      dim: D.
      fmt: the format of its rows in the file.
    """
    spec = source.spec
    assert spec.vocabulary is not None
    sizes = spec.vocabulary.arrays
    # Readers know the prefix of an n-gram memory.
    is_renamed = source.ngrams is None and any(name != own for own, name in names.items())
    pool = Pool(
        tuple(names.values()),
        **{field: sizes[field] for field in container.POOL_SIZES},
        hashed=tuple(names) if is_renamed else (),
        place_bits=spec.vocabulary.place_bits,
    )
    name = f"{source.name}.pool" if source.name else "pool"
    return Table(name, source.name, spec.num_rows, dim, fmt, _NOTHING, pool)


def _bare(fmt: RowFormat) -> RowFormat:
    """Returns the format without its rounding, which does not matter to a reader."""
    return dataclasses.replace(fmt, rounding="stochastic")


def _write_arrays(
    file: Any,
    contents: Contents,
    owners: list[tuple[Source, int]],
    maps: list[np.ndarray],
    room: int,
    is_as_trained: bool,
    progress: Progress | None,
) -> Contents:
    """Writes the arrays after the header's room; returns the contents with errors and checksum."""
    entries = contents.tensors()
    total = sum(t.num_rows for t in contents.tables)
    num_written = 0
    sums: list[int] = []
    tables = []

    def write_whole(array: container.Array, values: np.ndarray) -> None:
        file.seek(room + entries[array.name]["data_offsets"][0])
        for begin in range(0, len(values), array.block_rows):
            part = values[begin : begin + array.block_rows].astype(array.dtype, order="C")
            sums.append(zlib.crc32(part.data))
            file.write(part)

    for table, (source, first) in zip(contents.tables, owners, strict=True):
        file.seek(room + entries[table.name]["data_offsets"][0])
        measured = _Measured()
        for packed in _blocks(source, first, table, is_as_trained, measured):
            sums.append(zlib.crc32(packed.data))
            file.write(packed)
            num_written += len(packed)
            if progress is not None:
                progress(num_written, total)
        tables.append(table._replace(errors=measured.errors(table)))
        for array in table.arrays[1:]:
            assert source.owners is not None
            write_whole(array, source.owners)
    arrays = [array for ngrams in contents.ngrams for array in ngrams.arrays]
    for array, tokens in zip(arrays, maps, strict=True):
        write_whole(array, tokens)
    checksums = np.asarray(sums, "<u4")
    file.seek(room + entries[container.CHECKSUMS]["data_offsets"][0])
    file.write(checksums)
    return dataclasses.replace(
        contents, tables=tuple(tables), checksums_crc32=zlib.crc32(checksums.data)
    )


class _Measured:
    """Sums of the differences between rows in training and rows in the file."""

    def __init__(self) -> None:
        self.largest, self.total, self.num_nonfinite = 0.0, 0.0, 0

    def add(self, largest: Any, total: Any, num_nonfinite: Any) -> None:
        """Adds the differences of some rows."""
        self.largest = max(self.largest, float(largest))
        self.total += float(total)
        self.num_nonfinite += int(num_nonfinite)

    def errors(self, table: Table) -> Errors:
        """Returns the errors of a whole table."""
        num_finite = table.num_rows * table.embedding_dim - self.num_nonfinite
        return Errors(self.largest, self.total / max(1, num_finite), self.num_nonfinite)


def _blocks(
    source: Source, first: int, table: Table, is_as_trained: bool, measured: _Measured
) -> Iterator[np.ndarray]:
    """Yields the packed rows of a table of the file, block by block."""
    before, after = source.spec.storage, table.format
    is_kept = (before.name, before.symmetric, before.scale_dtype) == (
        after.name,
        after.symmetric,
        after.scale_dtype,
    )
    rounding = before if is_as_trained else dataclasses.replace(after, rounding="nearest")
    for begin in range(0, table.num_rows, table.block_rows):
        num = min(table.block_rows, table.num_rows - begin)
        packed = source.read(first + begin, num)
        low, high = np.searchsorted(source.line_ids, [first + begin, first + begin + num])
        ids = source.line_ids[low:high]
        lines = source.lines(source.line_of[low:high])
        # Lengths are powers of two, so that few programs are compiled.
        extra = indexing.ceil_power(len(ids)) - len(ids) if len(ids) else 0
        padded_ids = np.pad(ids, (0, extra), constant_values=NO_ID).astype(np.int32)
        lines = np.pad(lines, [(0, extra), (0, 0)])
        if is_kept:
            if len(ids):
                new, *differences = _encode_lines(
                    lines, padded_ids, source.key, source.step, fmt=rounding
                )
                measured.add(*differences)
                packed = packed.copy()
                packed[ids - (first + begin)] = np.asarray(new)[: len(ids)]
        else:
            size = min(table.block_rows, table.num_rows)
            rows = np.pad(packed, [(0, size - num), (0, 0)])
            place = np.where(padded_ids == NO_ID, size, padded_ids - (first + begin))
            new, *differences = _encode_again(
                rows, np.int32(num), place.astype(np.int32), lines, before=before, after=rounding
            )
            measured.add(*differences)
            packed = np.asarray(new)[:num]
        yield np.ascontiguousarray(packed)


@partial(jax.jit, static_argnames="fmt")
def _encode_lines(
    lines: Any, ids: Any, key: Any, step: Any, *, fmt: RowFormat
) -> tuple[jax.Array, ...]:
    """Packs lines (float32 [n, D]) with the random bits of a flush; also returns differences."""
    lines, ids = jnp.asarray(lines), jnp.asarray(ids)
    # encode_rows uses only the format and the dim of the table.
    table = QuantizedTable(lines, fmt, lines.shape[1])
    draw = (jnp.asarray(key), random_bits.FLUSH, jnp.asarray(step))
    packed = encode_rows(lines, ids, table, *draw)
    return packed, *_differences(lines, packed, fmt, ids != NO_ID)


@partial(jax.jit, static_argnames=("before", "after"))
def _encode_again(
    packed: Any, num: Any, place: Any, lines: Any, *, before: RowFormat, after: RowFormat
) -> tuple[jax.Array, ...]:
    """Packs rows in another format, with rounding to nearest; also returns differences."""
    dim = lines.shape[1]
    rows = indexing.put(decode(jnp.asarray(packed), before, dim), jnp.asarray(place), lines)
    new = encode(rows, after)
    is_row = jnp.arange(rows.shape[0], dtype=jnp.int32) < num
    return new, *_differences(rows, new, after, is_row)


def _differences(
    rows: jax.Array, packed: jax.Array, fmt: RowFormat, is_row: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the largest difference, the sum of all, and how many elements are not finite.

    An element counts as not finite if it is not in `rows`, or not in what `packed` decodes to.
    """
    decoded = decode(packed, fmt, rows.shape[1])
    # In a format with a scale, one element that is not finite can make all of its row so.
    is_finite = jnp.isfinite(rows) & jnp.isfinite(decoded)
    is_counted = is_finite & is_row[:, None]
    difference = jnp.where(is_counted, jnp.abs(decoded - rows), jnp.float32(0))
    num = jnp.sum(~is_finite & is_row[:, None], dtype=jnp.int32)
    return jnp.max(difference, initial=0), jnp.sum(difference), num
