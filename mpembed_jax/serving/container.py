"""The serving file: its header, and where its rows and checksums lie.

The file is a safetensors file: 8 bytes with the length of a JSON header, the header, the arrays.
Each table is one array of packed words [V, words], in the layout of `numerics.packing`. The array
`mpembed_jax.checksums` (uint32) has a CRC-32 for each block of rows of each array, in the order of
the tables. The header's metadata have a JSON text `mpembed_jax` that describes the tables, and its
CRC-32. Every byte of the file is therefore covered by a check.

Tables of raw ids share one pool of rows, which is one table of the file. A second array, uint32
[S, W], has the tags of the rows' owners (see `vocabulary.pool`), in the high 24 bits of each word.
The pool's entry names the tables, the sizes and the hash.

For a stack of n-grams, the description has the parameters of their hash. The names of its tables
begin with the name of the stack, because every memory has tables of the same names. Its map of
tokens, if there is one, is an array, int32 [vocabulary_size].

If other stacks have tables of the same names, the names of a stack's tables begin with the name of
the stack. Raw ids are hashed with the names that the tables have in training: the pool's entry then
has these, too.

A file has the lowest version that supports its contents: 5 with a pool of 30 place_bits (see
`VocabularySpec`), 4 with a pool of renamed tables, 3 with n-grams, 2 with a pool, else 1.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mpembed_jax.cache.spec import MAX_WAYS
from mpembed_jax.embedding import arguments
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.serving.errors import ServingError
from mpembed_jax.vocabulary import hashes
from mpembed_jax.vocabulary.ngram_hash import NGramHash
from mpembed_jax.vocabulary.spec import OLD_PLACE_BITS, PLACE_BITS

VERSION = 5  # the newest that this library reads
# The names of the hashes of `vocabulary.hashes` and `vocabulary.ngram_hash`. A file that names
# another hash is refused, because these hashes would find wrong rows in it.
HASHES = {  # by place_bits; see VocabularySpec
    OLD_PLACE_BITS: "splitmix64(integer or xxh64(bytes) + xxh64(table))",
    PLACE_BITS: "splitmix64(integer or xxh64(bytes) + xxh64(table)), 30 bits of place",
}
NGRAM_HASH = "fmix32(x xor token * multiplier)"
OURS = "mpembed_jax"
CHECKSUMS = "mpembed_jax.checksums"
_MAX_DIM = 1 << 20
_MAX_HEADER = 100_000_000  # bytes; the limit of safetensors
_ALIGNMENT = 64  # bytes; the arrays begin at a multiple of it
_ROOM = 96  # bytes kept free in the header for each table's errors, known only at the end
# The dtypes of 32 bits come first, so that every array is aligned.
_DTYPES: dict[str, np.dtype] = {
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U16": np.dtype("<u2"),
}


class Errors(NamedTuple):
    """The difference between a table's rows in the file and its rows in training."""

    largest: float  # of all finite elements
    mean: float  # of their absolute differences
    # Elements that are not finite in training or in the file. In a format with a scale, one such
    # element can make all of its row so.
    num_nonfinite: int


class Array(NamedTuple):
    """An array of the file, whose first axis is checked by blocks."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    block_rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_blocks(self) -> int:
        """The number of blocks, each with a checksum. The last one may be shorter."""
        return -(-self.shape[0] // self.block_rows)


class Pool(NamedTuple):
    """The sizes of a pool, and the tables whose raw ids have its rows; see VocabularySpec."""

    tables: tuple[str, ...]  # the index of a table is its number in pairs
    sets: int
    ways: int
    groups: int
    first_sets: int
    shared_rows: int  # for each table
    # The names that hashes take, if those are not `tables`, and not `tables` without the prefix of
    # a stack of n-grams; else ().
    hashed: tuple[str, ...] = ()
    place_bits: int = OLD_PLACE_BITS  # a file tells them by the name of the hash

    @property
    def num_rows(self) -> int:
        """Rows of the pool, and the shared rows of all tables."""
        return self.sets * self.ways + len(self.tables) * self.shared_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the owners' tags."""
        return 4 * self.sets * self.ways

    @property
    def hash(self) -> str:
        """The name that a file has for the hash of the raw ids."""
        return HASHES[self.place_bits]


POOL_SIZES = ("sets", "ways", "groups", "first_sets", "shared_rows")  # fields of Pool


class Table(NamedTuple):
    """One table of a file, or the pool of rows of several tables of raw ids."""

    name: str
    stack: str  # the name of its stack in the saved tree, "" if the tree was one state
    num_rows: int  # V
    embedding_dim: int  # D
    format: RowFormat  # resolved
    errors: Errors
    pool: Pool | None = None  # None: ids are row numbers

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of its packed rows."""
        return self.num_rows, self.format.row_words(self.embedding_dim)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its words."""
        return self.format.word_dtype(self.embedding_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of its packed rows."""
        return self.num_rows * self.format.row_bytes(self.embedding_dim)

    @property
    def block_rows(self) -> int:
        """The number of rows in a block of about two million elements."""
        return max(1, (1 << 21) // self.embedding_dim)

    @property
    def owners_name(self) -> str:
        """The name of the array of a pool's owners."""
        return f"{self.name}.owners"

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The array of its rows, and that of a pool's owners."""
        rows = Array(self.name, self.dtype, self.shape, self.block_rows)
        if self.pool is None:
            return (rows,)
        sets, ways = self.pool.sets, self.pool.ways
        return rows, Array(self.owners_name, _DTYPES["U32"], (sets, ways), (1 << 21) // ways)


class NGrams(NamedTuple):
    """The hash of the n-grams of a stack."""

    stack: str
    hash: NGramHash
    has_map: bool  # whether the file has a map of tokens

    @property
    def prefix(self) -> str:
        """The prefix of the names of its tables and arrays."""
        return f"{self.stack}." if self.stack else ""

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of its tables, in the order of the hash."""
        return tuple(self.prefix + name for name in self.hash.table_names)

    @property
    def map_name(self) -> str:
        """The name of the array of its map of tokens."""
        return f"{self.prefix}canonical"

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The array of its map of tokens, if there is one."""
        if not self.has_map:
            return ()
        return (Array(self.map_name, _DTYPES["I32"], (self.hash.vocabulary_size,), 1 << 21),)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a file: its tables and features, and the hashes of its n-grams."""

    tables: tuple[Table, ...]
    features: tuple[tuple[str, str], ...]  # (feature, its table, which may be one of a pool)
    ngrams: tuple[NGrams, ...] = ()
    checksums_crc32: int = 0  # of the array of checksums

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of all tables, then the maps of tokens."""
        maps = [array for ngrams in self.ngrams for array in ngrams.arrays]
        return (*(array for table in self.tables for array in table.arrays), *maps)

    @property
    def version(self) -> int:
        """The lowest version that supports everything in the file."""
        pools = [table.pool for table in self.tables if table.pool is not None]
        if any(pool.place_bits == PLACE_BITS for pool in pools):
            return 5
        if any(pool.hashed for pool in pools):
            return 4
        if self.ngrams:
            return 3
        return 2 if pools else 1

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Returns the header's entry of each array.

        Checksums come first, then the arrays in the order of their dtypes in `_DTYPES`.
        """
        num_blocks = sum(a.num_blocks for a in self.arrays)
        arrays: list[tuple[str, str, tuple[int, ...]]] = [(CHECKSUMS, "U32", (num_blocks,))]
        for code, dtype in _DTYPES.items():
            arrays += [(a.name, code, a.shape) for a in self.arrays if a.dtype == dtype]
        entries = {}
        end = 0
        for name, code, shape in arrays:
            begin, end = end, end + math.prod(shape) * _DTYPES[code].itemsize
            entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        return entries

    def header(self) -> bytes:
        """Returns the JSON of the header, without padding."""
        body = {
            "version": self.version,
            "checksums_crc32": self.checksums_crc32,
            "features": [list(pair) for pair in self.features],
            "tables": [_described(t) for t in self.tables],
        }
        if self.ngrams:
            body["ngrams"] = [
                {"stack": n.stack, "hash": NGRAM_HASH, "map": n.has_map}
                | dataclasses.asdict(n.hash)
                for n in self.ngrams
            ]
        text = json.dumps(body)
        metadata = {OURS: text, "crc32": str(zlib.crc32(text.encode()))}
        return json.dumps({"__metadata__": metadata} | self.tensors()).encode()


def _described(table: Table) -> dict[str, Any]:
    storage = table.format
    pool = None
    if table.pool is not None:
        pool = table.pool._asdict() | {"hash": table.pool.hash}
        del pool["place_bits"]
        if not table.pool.hashed:
            del pool["hashed"]
    return {
        "name": table.name,
        "stack": table.stack,
        "rows": table.num_rows,
        "dim": table.embedding_dim,
        "storage": [storage.name, storage.symmetric, storage.scale_dtype],
        "errors": list(table.errors),
        "vocabulary": pool,
    }


def header_room(contents: Contents) -> int:
    """Returns the number of bytes before the arrays, with room for the errors of all tables."""
    size = 8 + len(contents.header()) + _ROOM * (1 + len(contents.tables))
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def padded_header(contents: Contents, room: int) -> bytes:
    """Returns the bytes before the arrays: the length, the JSON, and spaces.

    Raises:
      ValueError: if the JSON does not fit `room`, or is longer than safetensors allows.
    """
    text = contents.header()
    if len(text) > min(room - 8, _MAX_HEADER):
        raise ValueError(f"{len(contents.tables)} tables need a header of {len(text)} bytes")
    return (room - 8).to_bytes(8, "little") + text.ljust(room - 8)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file whose header is right and whose size fits it. Its arrays were not read."""

    path: Path
    contents: Contents
    data: np.ndarray  # u8 [bytes of the arrays], mapped and read-only

    def array(self, name: str) -> np.ndarray:
        """Returns an array of the file, mapped and read-only."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        return self.data[begin:end].view(dtype).reshape(entry["shape"])

    @functools.cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return self.contents.tensors()


def open_file(path: Any) -> Opened:
    """Opens a serving file and checks everything but the bytes of its arrays.

    Args:
      path: the path of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ServingError: if it is not a serving file, is cut short, has a newer version, or has a damaged
        header.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait
        raise ServingError(f"{path} is no serving file: it is a pipe or a device")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ServingError(
                f"{path} is no serving file, or is cut short: it has {size} bytes, and its first "
                "8 bytes are not the length of a header"
            )
        head = file.read(length)
        contents = _read_header(path, head)
        tensors = contents.tensors()
        total = 8 + length + max(entry["data_offsets"][1] for entry in tensors.values())
        if size < total:
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in tensors.items()}
            lost = [name for name, end in ends.items() if end > size]
            raise ServingError(
                f"{path} is cut short: it has {size} of {total} bytes; table {lost[0]!r} is not "
                "whole"
            )
        if size > total:
            raise ServingError(f"{path} has {size} bytes, but its header says {total}")
        if (8 + length) % _ALIGNMENT:
            raise ServingError(f"{path} is damaged: its arrays are not aligned")
        # The open file, not the path: another file may have taken its place since.
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
    if len(data) != total - 8 - length:
        raise ServingError(f"{path} changed while it was opened")
    return Opened(path, contents, data)


def _read_header(path: Path, head: bytes) -> Contents:
    try:
        header = json.loads(head)
    except (ValueError, RecursionError):
        header = None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(OURS), str):
        if isinstance(header, dict):
            raise ServingError(f"{path} is a safetensors file that mpembed_jax did not write")
        raise ServingError(f"{path} is no serving file: its header is not JSON of safetensors")
    text = metadata[OURS]
    # JSON can name half of a surrogate pair, which cannot be encoded. "?" takes its place.
    if metadata.get("crc32") != str(zlib.crc32(text.encode(errors="replace"))):
        raise ServingError(f"{path} is damaged: the checksum of its description differs")
    try:
        body = json.loads(text)
        version = body["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ServingError(f"{path} is damaged: its description is not JSON: {error}") from None
    if type(version) is int and version > VERSION:
        raise ServingError(
            f"{path} is of version {version}, this library reads {VERSION}; use the version of "
            "mpembed_jax that wrote it, or a newer one"
        )
    try:
        contents = _contents(body)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ServingError(f"{path} is damaged: {error}") from None
    # The description determines every byte of the header, so each changed byte is noticed.
    if contents.header().ljust(len(head)) != head:
        raise ServingError(f"{path} is damaged: its header is not what its description says")
    return contents


def _contents(body: dict[str, Any]) -> Contents:
    """Returns the contents that the body of a header describes.

    Raises:
      ValueError, KeyError, TypeError or OverflowError: if a field is missing, or has a wrong type
        or value.
    """
    tables = []
    if type(body["version"]) is not int or body["version"] < 1:
        raise ValueError(f"its version is {body['version']!r}")
    for entry in body["tables"]:
        name = entry["name"]
        num_rows, dim = entry["rows"], entry["dim"]
        if type(name) is not str or type(entry["stack"]) is not str:
            raise ValueError(f"the name of table {name!r} is no text")
        if type(num_rows) is not int or type(dim) is not int or not 1 <= num_rows < NO_ID:
            raise ValueError(f"table {name!r} has {num_rows!r} rows of dim {dim!r}")
        if not 1 <= dim <= _MAX_DIM:
            raise ValueError(f"table {name!r} has dim {dim}")
        code, symmetric, scale_dtype = entry["storage"]
        if type(symmetric) not in (bool, type(None)):
            raise ValueError(f"table {name!r} has storage {entry['storage']}")
        storage = RowFormat(code, symmetric, scale_dtype)
        if storage != storage.resolve(dim):
            raise ValueError(f"table {name!r} has storage {entry['storage']}")
        largest, mean, num_nonfinite = entry["errors"]
        errors = Errors(float(largest), float(mean), int(num_nonfinite))
        pool = None if entry["vocabulary"] is None else _pool(name, entry["vocabulary"], num_rows)
        tables.append(Table(name, entry["stack"], num_rows, dim, storage, errors, pool))
    features = tuple((str(f), str(t)) for f, t in body["features"])
    num_tables = sum(1 if t.pool is None else len(t.pool.tables) for t in tables)
    ngrams = tuple(_ngrams(entry, num_tables) for entry in body.get("ngrams", ()))
    checksum = body["checksums_crc32"]
    if type(checksum) is not int or not 0 <= checksum < 1 << 32:
        raise ValueError(f"the checksum of its checksums is {checksum!r}")
    return checked(Contents(tuple(tables), features, ngrams, checksum))


def _pool(name: str, entry: dict[str, Any], num_rows: int) -> Pool:
    """Returns the description of a pool.

    Raises:
      ValueError, KeyError, TypeError or OverflowError: as _contents.
    """
    bits_of = {known: bits for bits, known in HASHES.items()}
    if (hash_ := entry["hash"]) not in bits_of:
        raise ValueError(
            f"the raw ids of table {name!r} have the hash {hash_!r}, which this library does not "
            "know"
        )
    names, hashed = tuple(entry["tables"]), tuple(entry.get("hashed", ()))
    if any(type(table) is not str for table in names + hashed):
        raise ValueError(f"the name of a table of raw ids in {name!r} is no text")
    if hashed and (len(hashed) != len(names) or len({*hashed}) != len(hashed)):
        raise ValueError(f"table {name!r} hashes the raw ids of {len(names)} tables by {hashed}")
    sizes = [entry[field] for field in POOL_SIZES]
    fields = dict(zip(POOL_SIZES, sizes, strict=True))
    pool = Pool(names, **fields, hashed=hashed, place_bits=bits_of[hash_])
    is_right = (
        all(type(size) is int and 0 < size < NO_ID for size in sizes)
        and pool.ways <= MAX_WAYS
        and pool.sets >= pool.first_sets
        and pool.sets % pool.groups == pool.first_sets % pool.groups == 0
        and 0 < len(pool.tables) <= hashes.MAX_TABLES
        and pool.num_rows == num_rows
    )
    if not is_right:
        raise ValueError(f"table {name!r} of {num_rows} rows has the sizes {sizes} of a pool")
    return pool


def _ngrams(entry: dict[str, Any], num_tables: int) -> NGrams:
    """Returns the description of a hash of n-grams, in a file of `num_tables` tables.

    Raises:
      ValueError, KeyError, TypeError or OverflowError: as _contents.
    """
    stack, has_map = entry["stack"], entry["map"]
    if type(stack) is not str or type(has_map) is not bool:
        raise ValueError(f"the n-grams of stack {stack!r} have the map of tokens {has_map!r}")
    if (name := entry["hash"]) != NGRAM_HASH:
        raise ValueError(
            f"the n-grams of stack {stack!r} have the hash {name!r}, which this library does not "
            "know"
        )
    orders, heads = entry.get("orders"), entry.get("heads")
    # Before the sizes are computed: the time for those of many tables is not in the file's hands.
    if type(heads) is int and isinstance(orders, list) and len(orders) * heads > num_tables:
        raise ValueError(
            f"the n-grams of stack {stack!r} have {len(orders)} orders x {heads} heads, the file "
            f"has {num_tables} tables"
        )
    fields = [field.name for field in dataclasses.fields(NGramHash)]
    try:
        hash_ = NGramHash(**{field: entry[field] for field in fields})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the n-grams of stack {stack!r}: {error}") from None
    return NGrams(stack, hash_, has_map)


def checked(contents: Contents) -> Contents:
    """Checks the names of a file, and the tables of its n-grams; returns the contents.

    Raises:
      ValueError: if a dim is too large, if a name is no text or occurs twice, if a feature names an
        unknown table, if there is no table or no feature, or if the tables of a stack of n-grams do
        not fit its hash.
    """
    names: set[str] = set()
    tables: set[str] = set()  # those that a feature may name
    for table in contents.tables:
        if table.embedding_dim > _MAX_DIM:
            raise ValueError(f"table {table.name!r} has dim {table.embedding_dim} > {_MAX_DIM}")
        raw = () if table.pool is None else table.pool.tables
        tables.update(raw or (table.name,))
        for name in (*(array.name for array in table.arrays), *raw):
            if type(name) is not str:
                raise ValueError(f"the name of table {name!r} is no text")
            if name in names or name in ("__metadata__", CHECKSUMS):
                raise ValueError(f"the name of table {name!r} is taken; names must be distinct")
            names.add(name)
    for ngrams in contents.ngrams:
        for name in (array.name for array in ngrams.arrays):
            if name in names:
                raise ValueError(f"the name of the map of tokens {name!r} is taken")
            names.add(name)
        _check_tables(contents, ngrams)
    stacks = [ngrams.stack for ngrams in contents.ngrams]
    if len(set(stacks)) < len(stacks):
        raise ValueError(f"stacks {stacks} of n-grams are not distinct")
    features: set[str] = set()
    for feature, owner in contents.features:
        if type(feature) is not str:
            raise ValueError(f"the name of feature {feature!r} is no text")
        if feature in features or owner not in tables:
            raise ValueError(f"feature {feature!r} occurs twice, or its table {owner!r} is unknown")
        features.add(feature)
    if not names or not features:
        raise ValueError("it has no tables")
    return contents


def _check_tables(contents: Contents, ngrams: NGrams) -> None:
    """Checks that a stack has the tables of its hash of n-grams, in this order.

    Raises:
      ValueError: if it does not.
    """
    of_hash: list[tuple[str, int | None]]  # names and rows; no number of rows for raw ids
    of_hash = list(itertools.zip_longest(ngrams.tables, ngrams.hash.table_sizes))
    of_stack: list[tuple[str, int | None]] = []
    for table in contents.tables:
        if table.stack == ngrams.stack:
            raw = None if table.pool is None else table.pool.tables
            of_stack += [(table.name, table.num_rows)] if raw is None else [(t, None) for t in raw]
    for wanted, found in itertools.zip_longest(of_hash, of_stack):
        if wanted != found:
            raise ValueError(
                f"stack {ngrams.stack!r} has {_told(found)} where its NGramHash has {_told(wanted)}"
            )


def _told(table: tuple[str, int | None] | None) -> str:
    """Returns a table in words: its name and its number of rows."""
    if table is None:
        return "no table"
    name, num_rows = table
    return f"table {name!r} of " + ("raw ids" if num_rows is None else f"{num_rows} rows")


def verify(path: Any) -> Contents:
    """Checks every byte of a serving file.

    Args:
      path: the path of the file.

    Returns:
      The contents of the file.

    Raises:
      ServingError: if a byte is wrong; the message names the file, the table and its rows.
      TypeError: if path is not a path.
    """
    opened = open_file(arguments.path_of("serving.verify(path)", "path", path))
    sums = opened.array(CHECKSUMS)
    if zlib.crc32(sums.data) != opened.contents.checksums_crc32:
        raise ServingError(f"{path} is damaged: its checksums have changed")
    first = 0
    for array in opened.contents.arrays:
        rows = opened.array(array.name)
        for block in range(array.num_blocks):
            begin = block * array.block_rows
            end = min(begin + array.block_rows, len(rows))
            if zlib.crc32(rows[begin:end].data) != sums[first + block]:
                raise ServingError(
                    f"{path} is damaged: table {array.name!r} has changed bytes in rows {begin} to "
                    f"{end - 1}"
                )
        first += array.num_blocks
    return opened.contents


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file for writing, which becomes `path` when it is whole and on the disk.

    After an error, the file that was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
