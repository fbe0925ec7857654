"""TableSpec and EmbeddingSpec: a user's description of a stack, and the map to global row ids."""

import dataclasses
import hashlib
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import row_ids
from mpembed_jax.arrays import indexing
from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.numerics.formats import RowFormat, as_format
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes
from mpembed_jax.vocabulary.ngram_hash import NGramHash
from mpembed_jax.vocabulary.spec import VocabularySpec


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """One table of a stack.

    Attributes:
      name: unique within the stack.
      vocabulary_size: number of rows, at least 1. None for a table of raw ids, in a stack with a
        vocabulary.
      initializer: None for uniform(+-1/sqrt(vocabulary_size)), or a jax-style function `(key,
        shape, dtype) -> array`. Its values are distributed as for the shape of the whole table. An
        initializer that draws each row by itself (all of jax.nn.initializers except orthogonal) is
        called on blocks of up to 8,192 rows, with a key folded by table and block. Any other
        initializer is called once for the whole table, which is then in memory in float32 while the
        stack is made. To start from an array of values, use `from_dense`, which reads it in blocks.
        Equality and hash of a TableSpec ignore the initializer.
      initial_bound: rows start from uniform(+-initial_bound). With raw ids, a row gets these values
        when an id gets the row. If a table has about n ids, 1/sqrt(n) is a good bound. Set it if
        the tables of a stack of raw ids differ much in size. None: see initializer; for raw ids,
        1/sqrt(rows of the stack).

    Raises:
      ValueError: if vocabulary_size is not an integer in [1, 2**31 - 2]; if initial_bound is not a
        finite number of at least 0; or if there are both an initializer and an initial_bound.
    """

    name: str
    vocabulary_size: int | None = None
    initializer: Callable | None = dataclasses.field(default=None, compare=False)
    initial_bound: float | None = None

    def __post_init__(self) -> None:
        size = self.vocabulary_size
        if size is not None and (
            isinstance(size, bool)
            or not isinstance(size, int | np.integer)
            or not 1 <= size < NO_ID
        ):
            raise ValueError(
                f"table {self.name!r}: vocabulary_size must be an integer in [1, 2**31 - 2], got "
                f"{size!r}"
            )
        bound = self.initial_bound
        if bound is None:
            return
        is_number = isinstance(bound, numbers.Real) and not isinstance(bound, bool)
        if not is_number or not 0 <= bound <= float(np.finfo(np.float32).max):
            raise ValueError(
                f"table {self.name!r}: initial_bound must be a finite number of at least 0, got "
                f"{bound!r}"
            )
        if self.initializer is not None:
            raise ValueError(
                f"table {self.name!r} has an initializer and an initial_bound; leave one out"
            )
        object.__setattr__(self, "initial_bound", float(bound))


def size_of(table: TableSpec) -> int:
    """Returns the number of rows of a table of dense ids.

    Raises:
      ValueError: if it is a table of raw ids, whose rows are those of a pool.
    """
    if table.vocabulary_size is None:
        raise ValueError(
            f"table {table.name!r} has no vocabulary_size: its raw ids have rows of a pool; this "
            "operation needs tables of dense ids"
        )
    return int(table.vocabulary_size)


def initial_bounds(tables: tuple[TableSpec, ...]) -> tuple[float, ...]:
    """Returns the bounds of the initial values of tables with sizes and without initializers."""
    return tuple(
        float(1.0 / np.sqrt(size_of(t))) if t.initial_bound is None else t.initial_bound
        for t in tables
    )


def offsets(tables: tuple[TableSpec, ...]) -> np.ndarray:
    """Returns the first global row of each table, followed by the total (int64 [T + 1])."""
    return np.concatenate([[0], np.cumsum([size_of(t) for t in tables], dtype=np.int64)])


# For each array of ids: the tables of its columns (its last axis), or the one table of all its ids.
TablesOfIds = tuple[tuple[str, ...], ...]


def most_distinct(
    tables: tuple[TableSpec, ...], of_ids: TablesOfIds | None, sizes: Sequence[int]
) -> int:
    """Returns a number of distinct rows that a batch cannot exceed.

    A batch has at most min(rows, positions) distinct rows of a table.

    Args:
      tables: the tables of the stack.
      of_ids: the tables that the ids belong to; None if they are not known.
      sizes: positions of each array of ids.
    """
    if of_ids is None:
        return sum(sizes)
    positions = dict.fromkeys((table.name for table in tables), 0)
    for names, size in zip(of_ids, sizes, strict=True):
        for name in names:
            positions[name] += size // len(names)
    return sum(min(size_of(table), positions[table.name]) for table in tables)


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """A stack of tables that share embedding dim, row format and cache; frozen and hashable.

    Attributes:
      tables: TableSpecs with distinct names. Their rows follow one another in the stack.
      embedding_dim: D, at least 1.
      storage: a RowFormat or its name. Rows outside the cache are stored and trained in this
        format.
      cache: a CacheSpec. None: every row is trained in the table.
      max_unique_ids: the budget of distinct ids per batch; on a mesh, of the whole batch. None: as
        many as the batch has positions. A smaller budget makes smaller arrays. Ids over the budget
        read as zeros, are not trained, and are counted as dropped. A raw id over the budget may
        still earn a row.
      out_of_range: the rule of `global_ids` for ids outside their own table. "drop": they read as
        zeros and are counted. "clip": they are clipped to their own table. "raise": concrete ids
        raise an error; traced ids are dropped and counted, and `stats` raises an error.
      features: {feature: table name}. Several features may share a table. None: each table is its
        own feature.
      row_state_dtype: dtype of the optimizer state that is kept per row: "float32", or "bfloat16",
        which is rounded stochastically.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      memory_kind: None: everything is on the device. "pinned_host": the packed rows, and optimizer
        state of more than one number per row, are in host memory. The cache and the arrays of a
        batch stay on the device. Results are the same, bit for bit. Only rows that miss the cache,
        and dirty rows that leave it, cross the bus, in packed form. The optimizer state in host
        memory crosses the bus for all rows of a batch.
      vocabulary: None: ids are row numbers (see global_ids). A VocabularySpec: ids are raw (see
        raw_ids), the tables have no vocabulary_size, and their ids compete for one pool of rows.
        Rows start as the initial_bound of their table says.
      ngrams: None, or the nn.NGramHash that turns tokens into the ids of this stack. Its tables are
        those of the stack; see nn.ngram_spec. A state of another hash is then recognized: the rows
        of one hash mean nothing to another.

    Raises:
      TypeError: if a field has the wrong type.
      ValueError: if a value is out of range or names clash. The message says which.
    """

    tables: tuple[TableSpec, ...]
    embedding_dim: int
    storage: RowFormat = "int8"  # type: ignore[assignment]  # a name is converted to a RowFormat
    cache: CacheSpec | None = CacheSpec()
    max_unique_ids: int | None = None
    out_of_range: str = "drop"
    _: dataclasses.KW_ONLY
    features: Mapping[str, str] | tuple[tuple[str, str], ...] | None = None
    row_state_dtype: str = "float32"
    skip_nonfinite: bool = False
    memory_kind: str | None = None
    vocabulary: VocabularySpec | None = None
    ngrams: NGramHash | None = None

    def __post_init__(self) -> None:
        tables = (self.tables,) if isinstance(self.tables, TableSpec) else self.tables
        tables = tuple(tables) if isinstance(tables, Iterable) else ()
        if not tables or not all(isinstance(t, TableSpec) for t in tables):
            raise TypeError(
                f"tables must be a non-empty sequence of TableSpec, got {self.tables!r}"
            )
        names = [t.name for t in tables]
        if len(set(names)) != len(names):
            raise ValueError(f"table names must be distinct, got {names}")
        dim = self.embedding_dim
        if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or dim < 1:
            raise ValueError(f"embedding_dim must be an integer of at least 1, got {dim!r}")
        if self.cache is not None and not isinstance(self.cache, CacheSpec):
            raise TypeError(f"cache must be a CacheSpec or None, got {self.cache!r}")
        budget = self.max_unique_ids
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 1
        ):
            raise ValueError(
                f"max_unique_ids must be an integer of at least 1 or None, got {budget!r}"
            )
        if self.out_of_range not in ("drop", "clip", "raise"):
            raise ValueError(
                f'out_of_range must be "drop", "clip" or "raise", got {self.out_of_range!r}'
            )
        if self.row_state_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f'row_state_dtype must be "float32" or "bfloat16", got {self.row_state_dtype!r}'
            )
        if self.memory_kind not in (None, *indexing.HOST_KINDS):
            raise ValueError(f'memory_kind must be None or "pinned_host", got {self.memory_kind!r}')
        self._check_vocabulary(tables)
        self._check_ngrams(tables)
        features = self.features
        if features is not None:
            features = tuple(features.items() if isinstance(features, Mapping) else features)
            unknown = [f"{f!r} -> {t!r}" for f, t in features if t not in names]
            if len({f for f, _ in features}) != len(features):
                raise ValueError(f"feature names must be distinct, got {[f for f, _ in features]}")
            if unknown or not features:
                raise ValueError(
                    f"features must map feature names to tables of {names}, got "
                    f"{', '.join(unknown) or 'none'}"
                )
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "embedding_dim", int(dim))
        object.__setattr__(self, "storage", as_format(self.storage).resolve(int(dim)))
        object.__setattr__(self, "features", features)

    def _check_vocabulary(self, tables: tuple[TableSpec, ...]) -> None:
        vocabulary = self.vocabulary
        if vocabulary is None:
            unsized = [t.name for t in tables if t.vocabulary_size is None]
            if unsized:
                raise ValueError(
                    f"tables {unsized} need a vocabulary_size; for raw ids, give the stack a "
                    "vocabulary: EmbeddingSpec(.., vocabulary=VocabularySpec(num_rows=..))"
                )
            return
        if not isinstance(vocabulary, VocabularySpec):
            raise TypeError(f"vocabulary must be a VocabularySpec or None, got {vocabulary!r}")
        sized = [t.name for t in tables if t.vocabulary_size is not None]
        drawn = [t.name for t in tables if t.initializer is not None]
        if sized or drawn:
            raise ValueError(
                f"tables {sized or drawn} of a stack with a vocabulary must have neither "
                "vocabulary_size nor initializer: their raw ids have rows of one pool. Put tables "
                "of dense ids into a stack of their own"
            )
        if len(tables) > hashes.MAX_TABLES:
            raise ValueError(
                f"a stack with a vocabulary holds at most {hashes.MAX_TABLES} tables, got "
                f"{len(tables)}; make several stacks"
            )
        if vocabulary.num_stack_rows(len(tables)) >= NO_ID:
            raise ValueError(
                f"a stack with a vocabulary holds at most 2**31 - 2 rows, got "
                f"{vocabulary.num_stack_rows(len(tables))} with the shared ones"
            )
        if self.out_of_range != "drop":
            raise ValueError(
                "a stack with a vocabulary has no out_of_range, because no raw id is out of range; "
                "leave it out"
            )

    def _check_ngrams(self, tables: tuple[TableSpec, ...]) -> None:
        if self.ngrams is None:
            return
        if not isinstance(self.ngrams, NGramHash):
            raise TypeError(f"ngrams must be an nn.NGramHash or None, got {self.ngrams!r}")
        names = self.ngrams.table_names
        wanted = dict(zip(names, self.ngrams.table_sizes or [None] * len(names), strict=True))
        found = {t.name: t.vocabulary_size for t in tables}
        if list(found.items()) != list(wanted.items()):
            raise ValueError(
                f"a stack with ngrams must have the tables of this hash, {wanted}, got {found}; "
                "nn.ngram_spec makes them"
            )

    @property
    def num_rows(self) -> int:
        """Number of rows of the stack, V; with a vocabulary, pool and shared rows."""
        if self.vocabulary is not None:
            return self.vocabulary.num_stack_rows(len(self.tables))
        return int(offsets(self.tables)[-1])

    @property
    def row_tables(self) -> tuple[TableSpec, ...]:
        """The tables that `init_table` makes.

        With a vocabulary, they are its pool, then the shared rows of each table. A row of the pool
        without an owner starts within the bound of tables that have none of their own.
        """
        if self.vocabulary is None:
            return self.tables
        bound = float(1.0 / np.sqrt(self.num_rows))
        bounds = [bound if t.initial_bound is None else t.initial_bound for t in self.tables]
        return (
            TableSpec("pool", self.vocabulary.geometry.lines, initial_bound=bound),
            *(
                TableSpec(f"shared {k}", self.vocabulary.shared_rows, initial_bound=own)
                for k, own in enumerate(bounds)
            ),
        )

    @property
    def feature_tables(self) -> tuple[tuple[str, str], ...]:
        """The pairs (feature, table name), in the order of the last axis of array ids."""
        if not self.features:
            return tuple((t.name, t.name) for t in self.tables)
        assert isinstance(self.features, tuple)  # made by __post_init__
        return self.features

    def table_range(self, name: str) -> tuple[int, int]:
        """Returns the first global row of the table `name` and its number of rows.

        Raises:
          KeyError: if the stack has no such table.
          ValueError: if the stack has a vocabulary, whose tables share their rows.
        """
        starts = offsets(self.tables)
        names = [t.name for t in self.tables]
        if name not in names:
            raise KeyError(f"unknown table {name!r}; this spec has {names}")
        index = names.index(name)
        return int(starts[index]), size_of(self.tables[index])

    @property
    def fingerprint(self) -> np.ndarray:
        """A hash (uint32 [2]) of the fields that a state's arrays depend on; every state keeps it.

        The fields are the names and sizes of tables, dim, format without its rounding, the sizes
        and policy of the cache, row_state_dtype, the sizes of a vocabulary, and the settings of a
        hash of n-grams.
        """
        cache = (
            None if self.cache is None else (*self.cache.geometry(self.num_rows), self.cache.policy)
        )
        storage = (self.storage.name, self.storage.symmetric, self.storage.scale_dtype)
        meaning: tuple = (
            [(t.name, t.vocabulary_size and int(t.vocabulary_size)) for t in self.tables],
            self.embedding_dim,
            storage,
            cache,
            self.row_state_dtype,
        )
        if self.vocabulary is not None:
            meaning = (*meaning, tuple(self.vocabulary.arrays.values()))
        if self.ngrams is not None:
            meaning = (*meaning, self.ngrams.settings)
        text = repr(meaning)
        return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4").astype(
            np.uint32
        )

    def global_ids(self, ids: Any) -> Any:
        """Maps ids that are local to their tables to global row ids.

        Each id is checked against its own table. The rule for ids outside is `out_of_range`.

        Host ids (numpy arrays, lists, ints) of any integer dtype are checked in 64 bits and
        returned as numpy int32. jax itself would silently truncate 2**32 + 5 to 5. Traced ids and
        ids on a device are also accepted. NO_ID is padding and stays NO_ID. Masked entries of
        NumPy's masked arrays are padding.

        A stack of 2**31 - 1 rows or more accepts host ids only. They are mapped to int64, with -1
        for padding; see sharding.pairs.

        Args:
          ids: {feature: integers [..]}, or integers [.., T] with one column per feature, in the
            order of `feature_tables`. For a mapping that is not a pytree, the result is a dict.

        Returns:
          int32 (or int64, see above), in the nesting and shapes of ids.

        Raises:
          KeyError: if a feature is unknown.
          TypeError: if ids are not integers, or are a list of masked arrays; or if the stack has
            2**31 - 1 rows or more and the ids are not on the host.
          ValueError: if the last axis is not T; if out_of_range is "raise" and a concrete id is
            outside its table; or if the stack has a vocabulary.
        """
        if self.vocabulary is not None:
            raise ValueError(
                "this stack has a vocabulary, so its ids are raw: pass them through spec.raw_ids"
            )
        pairs = self.feature_tables
        if isinstance(ids, Mapping):
            known = dict(pairs)
            unknown = [f for f in ids if f not in known]
            if unknown:
                raise KeyError(f"unknown features {unknown}; this spec has {list(known)}")
            mapped = {f: self._map(v, [f], *self.table_range(known[f])) for f, v in ids.items()}
            return row_ids.in_mapping_of(ids, mapped)
        array = ids if isinstance(ids, jax.Array) else row_ids.on_host(ids)
        if array.ndim < 1 or array.shape[-1] != len(pairs):
            raise ValueError(
                f"array ids must be [.., {len(pairs)}], one column per feature "
                f"{[f for f, _ in pairs]}, got {array.shape}; for bags pass a dict of features"
            )
        ranges = np.asarray([self.table_range(t) for _, t in pairs], np.int64)
        ranges = ranges.reshape(*[1] * (array.ndim - 1), len(pairs), 2)
        return self._map(array, [f for f, _ in pairs], ranges[..., 0], ranges[..., 1])

    def raw_ids(self, ids: Any, where: Any = None) -> Any:
        """Hashes raw ids of any kind to the pairs that `prefetch` and `read` take.

        Ids on the host are hashed on the host, and the result is a NumPy array. Integers on a
        device, traced or not, are hashed on the device, to the same values. `vocabulary.hashes`
        defines the hash: equal ids of a table have equal pairs on any machine, in any process and
        version.

        None, nulls of Arrow and masked entries of NumPy's masked arrays are padding. NO_ID is not:
        it is the integer 2147483647. A string and its UTF-8 bytes are the same id. Strings are not
        normalized, so "é" written as one or as two code points is two ids. NumPy's arrays of bytes
        drop zeros at the end of each element.

        Args:
          ids: {feature: raw ids}, or an array or list [.., T] with one column per feature, in the
            order of `feature_tables`. Raw ids are integers, bytes or strings: NumPy arrays [..],
            lists, arrays of dtype object, columns [n] of Arrow or polars; or integers of jax [..].
          where: bool in the nesting and shapes of ids; False, or masked, is padding. A mapping may
            leave features out. None: all are ids.

        Returns:
          uint32 [.., 2] in the nesting of ids: pairs [tag, place].

        Raises:
          KeyError: if a feature is unknown.
          TypeError: if ids are neither integers nor bytes nor strings, or are a list of masked
            arrays; or if only one of ids and `where` is a mapping.
          ValueError: if the last axis is not T, if lists have different lengths, if `where` has
            another shape, or if the stack has no vocabulary.
        """
        if self.vocabulary is None:
            raise ValueError(
                "this stack has no vocabulary, so its ids are row numbers: map them with "
                "spec.global_ids, or make it with EmbeddingSpec(.., vocabulary=VocabularySpec(..))"
            )
        numbers = {t.name: n for n, t in enumerate(self.tables)}
        known = dict(self.feature_tables)
        if where is not None and isinstance(where, Mapping) != isinstance(ids, Mapping):
            raise TypeError(
                f"where must be nested like ids ({type(ids).__name__}): a mapping of features or "
                f"one array, got {type(where).__name__}"
            )
        if isinstance(ids, Mapping):
            given: Mapping = {} if where is None else where
            unknown = [f for f in (*ids, *given) if f not in known]
            if unknown:
                raise KeyError(f"unknown features {unknown}; this spec has {list(known)}")
            hashed = {
                f: _hashed(v, known[f], numbers[known[f]], given.get(f)) for f, v in ids.items()
            }
            return row_ids.in_mapping_of(ids, hashed)
        array = ids if isinstance(ids, jax.Array | np.ndarray) else hashes.as_array(ids)
        if array.ndim < 1 or array.shape[-1] != len(known):
            raise ValueError(
                f"array ids must be [.., {len(known)}], one column per feature {list(known)}, got "
                f"{array.shape}; for bags pass a dict of features"
            )
        _check_where(where, array.shape)
        if not (where is None or isinstance(where, jax.Array)):
            where = np.asanyarray(where)  # a masked array stays one
        columns = [
            _hashed(array[..., n], t, numbers[t], None if where is None else where[..., n])
            for n, t in enumerate(known.values())
        ]
        library = jnp if any(isinstance(column, jax.Array) for column in columns) else np
        return library.stack(columns, axis=-2)

    def _map(self, ids: Any, names: list[str], start: Any, size: Any) -> Any:
        if isinstance(ids, jax.Array):
            if not jnp.issubdtype(ids.dtype, jnp.integer):
                raise TypeError(
                    f"ids must be integers, got {ids.dtype} {list(ids.shape)}; cast them first"
                )
            if self.num_rows >= NO_ID:
                raise TypeError(
                    f"ids of a stack of {self.num_rows} rows are mapped on the host: pass numpy "
                    "arrays"
                )
            if not isinstance(ids, jax.core.Tracer) and self.out_of_range == "raise":
                return jnp.asarray(self._map(np.asarray(ids), names, start, size))
            if ids.dtype.itemsize < 4:
                ids = ids.astype(jnp.int32)
            # The comparison is in the dtype of the ids, because a cast could wrap around.
            most = jnp.asarray(size, ids.dtype)
            is_padding = ids == NO_ID
            is_inside = (ids >= 0) & (ids < most)
            if self.out_of_range == "clip":
                ids = jnp.clip(ids, 0, most - 1)
                is_inside = jnp.ones_like(is_inside)
            moved = jnp.where(is_inside, ids, 0).astype(jnp.int32) + jnp.asarray(start, jnp.int32)
            return jnp.where(is_padding, NO_ID, jnp.where(is_inside, moved, self.num_rows)).astype(
                jnp.int32
            )
        host: Any = row_ids.on_host(ids)
        if host.dtype.kind not in "iu" and host.size:
            raise TypeError(
                f"ids must be integers, got {host.dtype} {list(host.shape)}; cast them first"
            )
        host = (
            np.minimum(host, np.uint64(2**63 - 1)).astype(np.int64)
            if host.dtype == np.uint64
            else host.astype(np.int64)
        )
        is_padding = host == NO_ID
        is_inside = (host >= 0) & (host < size)
        bad = ~is_padding & ~is_inside
        if self.out_of_range == "raise" and bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            column = names[where[-1]] if len(names) > 1 else names[0]
            limit = int(np.broadcast_to(size, host.shape)[where])
            raise ValueError(
                f"feature {column!r}: id {int(host[where])} at {list(where)} is outside its table "
                f"of {limit} rows ({int(bad.sum())} such ids); "
                'out_of_range="drop" or "clip" accepts them'
            )
        local = np.clip(host, 0, size - 1) if self.out_of_range == "clip" else host
        outside = bad & (self.out_of_range != "clip")
        rows = np.where(outside, self.num_rows, local + start)
        if self.num_rows >= NO_ID:
            return np.where(is_padding, -1, rows)
        return np.where(is_padding, NO_ID, rows).astype(np.int32)


def _check_where(where: Any, shape: tuple[int, ...]) -> None:
    if where is not None and np.shape(where) != shape:
        raise ValueError(
            f"where must have the shape of the ids {list(shape)}, got {list(np.shape(where))}"
        )


def _hashed(ids: Any, table: str, number: int, where: Any) -> Any:
    """Returns the pairs (uint32 [.., 2]) of one table's raw ids; padding where `where` is False."""
    is_on_device = isinstance(ids, jax.Array)
    hash_ = hashes.of_traced if is_on_device else hashes.of_column
    pairs = hash_(ids, table, number)
    if where is None:
        return pairs
    _check_where(where, pairs.shape[:-1])
    xp: Any = jnp if is_on_device or isinstance(where, jax.Array) else np
    if not isinstance(where, jax.Array):
        where = np.ma.filled(where, False)
    return xp.where(xp.asarray(where, bool)[..., None], pairs, xp.uint32(hashes.PADDING))
