"""ServingTable: the tables of a file, mapped into memory and read from their packed rows."""

import dataclasses
import functools
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax import row_ids
from mpembed_jax.embedding import arguments, pooling
from mpembed_jax.ops import numba_package
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.serving import container, host_rows, pools, top_k
from mpembed_jax.serving.container import Contents, NGrams, Pool, Table
from mpembed_jax.serving.errors import ServingError
from mpembed_jax.table import QuantizedTable, read_rows
from mpembed_jax.vocabulary import hashes

IMPLEMENTATIONS = ("numba", "numpy")
# Up to this many queries are scored one by one from packed rows. For more queries, each block of
# rows is decoded once.
_FEW_QUERIES = 8


def load(
    path: Any,
    *,
    out_of_range: str = "drop",
    threads: int | None = None,
    implementation: str | None = None,
) -> "ServingTable":
    """Maps a serving file into memory.

    This takes milliseconds for any size: the header is checked, and no row is read. Processes that
    load the same file share its memory. Only `verify` checks the bytes of the rows.

    Args:
      path: the path of a file that `save` wrote. It must not change while it is mapped.
      out_of_range: "drop": ids outside their table read as zeros and are counted. "raise": they
        raise an error on the host. On a device they always read as zeros and are not counted.
      threads: threads that read a large batch on the host; None: one for each core.
      implementation: "numba" or "numpy", for the host. Both give the same rows and bags. None:
        numba if it can be used.

    Returns:
      The tables.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if numba is named, and cannot be used.
      ServingError: if the file is not a serving file, is cut short, has a newer version, or has a
        damaged header.
      TypeError: if path is not a path, or threads is not an integer.
      ValueError: if out_of_range, threads or implementation has a value that is not allowed.
    """
    if out_of_range not in ("drop", "raise"):
        raise ValueError(f'out_of_range must be "drop" or "raise", got {out_of_range!r}')
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f'implementation must be "numba" or "numpy", got {implementation!r}')
    call = "serving.load(path)"
    if threads is not None:
        threads = arguments.integer(call, "threads", threads)
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
    if implementation is None:
        implementation = "numba" if numba_package.is_default() else "numpy"
    if implementation == "numba" and (reason := numba_package.why_not()):
        raise ImportError(
            f'implementation="numba" cannot be used: {reason}; leave implementation out for NumPy'
        )
    opened = container.open_file(arguments.path_of(call, "path", path))
    return ServingTable(
        rows={array.name: opened.array(array.name) for array in opened.contents.arrays},
        contents=opened.contents,
        host=_Host(
            out_of_range,
            threads or os.cpu_count() or 1,
            implementation,
            Path(path).absolute(),
        ),
    )


class _Host:
    """The settings for reads on the host, the compiled readers, and the count of dropped ids."""

    def __init__(self, out_of_range: str, threads: int, implementation: str, path: Path):
        self.out_of_range, self.threads = out_of_range, threads
        self.implementation, self.path = implementation, path
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.num_out_of_range = 0

    def reader(self, table: Table, packed: np.ndarray) -> Any:
        """Returns the compiled reader of a table, or None for NumPy."""
        if (found := self._readers.get(table.name)) is not None:
            return found
        if self.implementation != "numpy":
            # Imported here, because numba is optional.
            from mpembed_jax.serving import compiled

            made = compiled.Reader(packed, table.format, table.embedding_dim, self.threads)
            found = self._readers[table.name] = made
        return found

    def rows_of(self, owners: np.ndarray, pairs: np.ndarray, sizes: Pool) -> np.ndarray:
        """Returns the rows (int32 [n]) of pairs (uint32 [n, 2])."""
        if self.implementation == "numpy":
            return pools.locate(owners, pairs, sizes)
        # Imported here, because numba is optional.
        from mpembed_jax.serving import compiled

        return compiled.locate(owners, pairs, sizes)

    def count(self, num_outside: int, feature: str, ids: Any, table: Table) -> None:
        """Counts ids that are outside their table. `ids` are those that came.

        Raises:
          ValueError: if out_of_range is "raise". Then nothing is counted.
        """
        if self.out_of_range == "raise":
            given = row_ids.on_host(ids).reshape(-1)
            is_outside = ((given < 0) | (given >= table.num_rows)) & (given != NO_ID)
            place = int(np.argmax(is_outside))
            raise ValueError(
                f"feature {feature!r}: id {int(given[place])} at position {place} is outside table "
                f"{table.name!r} of {table.num_rows} rows ({num_outside} such ids); "
                'out_of_range="drop" reads them as zeros and counts them'
            )
        with self._lock:
            self.num_out_of_range += num_outside


@dataclasses.dataclass(frozen=True)
class ServingTable:
    """The tables of a serving file. Read-only, and safe to use from many threads.

    It is a pytree. `to_device` copies its rows to the device. Pass the result to a jitted function
    as an argument: the same methods read it there. Ids are local to their tables: id r is row r.
    `mpembed_jax.NO_ID` is padding.

    Tables of raw ids have the rows of a pool. Their ids are raw ids, or the pairs uint32 [.., 2]
    that `EmbeddingSpec.raw_ids` and `raw_ids` return. On the host, raw ids are integers, bytes or
    strings of any kind that `EmbeddingSpec.raw_ids` takes. In a jitted function, they are integers.
    Raw ids of dtype uint32 must be cast, because arrays of this dtype are taken for pairs. Every id
    has a row: an unknown id has a row that it shares with other ids.

    If an n-gram memory was saved, `ngram_vectors` turns tokens into what the memory returns.

    Attributes:
      rows: {name: array}. A table has its packed words [V, words]. A pool also has its owners,
        "<pool>.owners", uint32 [S, W]. An n-gram memory may have its map of tokens,
        "<stack>.canonical" or "canonical", int32 [vocabulary_size].
      contents: the description of the file: tables and features.
      host: the settings for reads on the host; None for a table on the device.
    """

    rows: dict[str, Any]
    contents: Contents
    host: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables: name, number of rows, dim, format and rounding errors of each."""
        return self.contents.tables

    @property
    def nbytes(self) -> int:
        """Bytes of all packed rows, of the owners of pools, and of maps of tokens."""
        return sum(array.nbytes for array in self.contents.arrays)

    @property
    def num_out_of_range(self) -> int:
        """The number of ids outside their table that the host has read as zeros so far."""
        return 0 if self.host is None else self.host.num_out_of_range

    def to_device(self) -> "ServingTable":
        """Returns the tables with their rows on the default device."""
        return ServingTable({n: jnp.asarray(a) for n, a in self.rows.items()}, self.contents)

    def lookup(self, ids: Any) -> Any:
        """Returns the rows of ids.

        If the file has rows as trained, the result equals `read(flush(state), ids)` in every bit.

        Args:
          ids: {feature: integers [..]}, or integers [..] if there is a single feature. On the host,
            any integer dtype is accepted. In a jitted function, ids are int32. A table of raw ids
            takes raw ids [..] or pairs uint32 [.., 2].

        Returns:
          float32 [.., D] for each array: NumPy from the host, jax from the device. Padding and ids
          outside their table read as zeros.

        Raises:
          KeyError: if a feature is unknown.
          TypeError: if ids are not integers; raw ids may be bytes and strings, too.
          ValueError: if an id is outside its table and out_of_range is "raise"; if pairs are of
            another table; if ids are not a mapping, but there are several features.
        """
        reader = self._only_reader if type(ids) is np.ndarray else None
        if reader is not None and (found := reader.quick_take(ids)) is not None:
            return found
        return self._each(ids, self._lookup)

    def raw_ids(self, ids: Any) -> Any:
        """Hashes raw ids to pairs, as `EmbeddingSpec.raw_ids` does, without the spec.

        Args:
          ids: as in lookup, of tables of raw ids.

        Returns:
          uint32 [.., 2] for each array.

        Raises:
          KeyError, TypeError, ValueError: as in lookup; ValueError also if a table has no raw ids.
        """

        def pairs(feature: str, table: Table, here: Any) -> Any:
            if table.pool is None:
                raise ValueError(
                    f"feature {feature!r}: the ids of table {table.name!r} are row numbers, not raw"
                )
            return self._pairs(feature, table, here)

        return self._each(ids, pairs, is_raw=True)

    def rows_of(self, ids: Any) -> Any:
        """Returns the numbers of the rows that raw ids have in their pool.

        An id without a row of its own has a shared row, as several other ids do. Shared rows are
        the last rows of the pool. A file does not say to which id a row belongs.

        Args:
          ids: as in lookup.

        Returns:
          int32 [..] for each array; NO_ID for padding. Ids that are row numbers stay as they are.

        Raises:
          KeyError, TypeError, ValueError: as in lookup.
        """
        return self._each(ids, lambda feature, table, here: here)

    def count_outside(self, ids: Any) -> Any:
        """Returns how many ids are outside their tables. Padding is not counted.

        A table on the device reads such ids as zeros and keeps no count. Call this method in
        addition to `lookup` to count them.

        Args:
          ids: as in lookup.

        Returns:
          An integer: int32 [] from the device.
        """

        def count(feature: str, table: Table, here: Any) -> Any:
            if self._is_on_host(self.rows[table.name], here):
                host, _ = _host_ids(feature, here)
                is_outside = ((host < 0) | (host >= table.num_rows)) & (host != NO_ID)
                return int(np.count_nonzero(is_outside))
            rows = _device_ids(feature, here)
            is_outside = ~row_ids.in_range(rows, table.num_rows) & (rows != NO_ID)
            return jnp.sum(is_outside, dtype=jnp.int32)

        return sum(jax.tree.leaves(self._each(ids, count)))

    def bag(self, ids: Any, combiner: str = "sum", weights: Any = None, offsets: Any = None) -> Any:
        """Returns one vector for each bag of ids.

        Terms are added in the order of the positions. Padding and ids outside their table are left
        out. "mean" divides by the sum of the weights. "sqrtn" divides by the root of the sum of
        squared weights. The vector of an empty bag, or of one whose divisor is 0, is zero.

        Args:
          ids: {feature: integers [.., L]}, or one such array, as in lookup. If offsets are given,
            ids have the shape [N].
          combiner: "sum", "mean" or "sqrtn".
          weights: float32 of the shapes of ids, in the same nesting; None: all are 1.
          offsets: {feature: integers [B + 1]}, or one such array: bag b has the positions
            offsets[b] to offsets[b + 1] - 1. Offsets work on the host only. If they are None, the
            last axis of ids is one bag.

        Returns:
          float32 [.., D] for each array; [B, D] with offsets.

        Raises:
          KeyError, TypeError, ValueError: as in lookup. TypeError also if offsets are given for a
            table on the device or are not integers, or if they or weights have a mask, or if
            weights are not real numbers. ValueError also if the combiner is unknown, or if weights
            or offsets do not fit the ids.
        """
        if combiner not in pooling.COMBINERS:
            raise ValueError(f'combiner must be "sum", "mean" or "sqrtn", got {combiner!r}')
        is_plain = weights is None and offsets is None and type(ids) is np.ndarray
        reader = self._only_reader if is_plain else None
        if reader is not None and (found := reader.quick_bag(ids, combiner)) is not None:
            return found
        if isinstance(ids, Mapping):
            weights = {} if weights is None else weights
            offsets = {} if offsets is None else offsets
            for name, given in (("weights", weights), ("offsets", offsets)):
                if not isinstance(given, Mapping) or set(given) - set(ids):
                    raise ValueError(
                        f"{name} must be a mapping of features, as ids is; its keys must be in ids"
                    )

        def of(given: Any, feature: str) -> Any:
            return given.get(feature) if isinstance(ids, Mapping) else given

        def read(feature: str, table: Table, here: Any) -> Any:
            own = of(weights, feature), of(offsets, feature)
            return self._bag(feature, table, here, combiner, *own)

        return self._each(ids, read)

    def ngram_vectors(self, tokens: Any, context: Any = None, stack: str | None = None) -> Any:
        """Returns the vectors of the n-grams that end at each token, as NGramMemory does.

        The result is float32. If the file has rows as trained, and the memory has no cache, it
        equals that of a float32 memory in evaluation in every bit. Rows in a cache were rounded by
        `save`. N-grams that are raw ids get no new rows here.

        Args:
          tokens: integers [.., T] in [0, vocabulary_size). NO_ID and the memory's padding stand for
            no token. In a jitted function, n-grams with a token outside the vocabulary read as
            zeros. For decoding, pass one new token at a time, [.., 1], with its context.
          context: the max(orders) - 1 tokens before them, integers [.., max(orders) - 1]. None:
            texts begin with these tokens. `context_after` returns the context of the next token.
          stack: the name of the memory's stack; optional if the file has one memory.

        Returns:
          float32 [.., T, orders x heads x D]: NumPy from the host, jax from the device. Padding
          gives zeros.

        Raises:
          KeyError: if the file has no such memory.
          TypeError: if tokens are not integers; if the table is on the host and tokens are traced.
          ValueError: if a concrete token is outside the vocabulary, if context has another shape,
            or if the file has several memories and stack is None.
        """
        chosen = self._ngrams(stack)
        canonical = self.rows[chosen.map_name] if chosen.has_map else None
        if chosen.hash.rows is None:
            table = self._pool_of[chosen.tables[0]]
            rows = self._rows_of(table, chosen.hash.pairs(tokens, canonical, context))
            vectors = self._lookup(table.name, table, rows)
            return vectors.reshape(*rows.shape[:-1], rows.shape[-1] * table.embedding_dim)
        ids = chosen.hash.ids(tokens, canonical, context)
        of_tables = [
            self._lookup(name, self._by_name[name], ids[..., column])
            for column, name in enumerate(chosen.tables)
        ]
        xp: Any = np if isinstance(of_tables[0], np.ndarray) else jnp
        return xp.concatenate(of_tables, axis=-1)

    def context_after(self, tokens: Any, context: Any = None, stack: str | None = None) -> Any:
        """Returns the context for the token that follows, for `ngram_vectors`.

        Args:
          tokens: integers [.., T]. Padding is in front of a shorter sequence: at the end, it
            counts as the tokens just before the next one, and no n-gram reaches across it.
          context: the context of these tokens; None if a text begins with them.
          stack: see ngram_vectors.

        Returns:
          int32 [.., max(orders) - 1]; NO_ID stands for no token.

        Raises:
          KeyError, TypeError, ValueError: as in ngram_vectors.
        """
        return self._ngrams(stack).hash.context_after(tokens, context)

    def top_k(
        self,
        query: Any,
        k: int,
        table: str | None = None,
        *,
        among: Any = None,
        sketch: Any = None,
        oversample: int = 10,
    ) -> tuple[Any, Any]:
        """Returns, for each query, the k rows with the largest dot products with it.

        Rows are decoded in blocks, so no float32 table exists. If rows have equal scores, lower
        ids come first. A score is a float32 sum. Its last bits depend on the order in which its
        terms are added.

        The rows of a pool belong to raw ids of several tables, and the file does not hold the ids.
        So top_k refuses the name of a table of raw ids. It takes the name of the pool, and returns
        numbers of rows. `rows_of` returns the rows of the ids that you know. Pass them as `among`
        to get no other rows.

        Args:
          query: float32 [.., D].
          k: the number of rows, at most V.
          table: its name; optional if there is a single table, and this table is not a pool.
          among: integers [n]: only these rows are scored. NO_ID is left out. On the host only.
            None: all rows.
          sketch: a SignSketch of the table in this file. It chooses `oversample` * k candidates,
            and exact scores choose the best k of them. On the host only. None: all rows are scored.
          oversample: candidates of the sketch for each result, at least 1.

        Returns:
          Scores float32 [.., k], in descending order, and ids int32 [.., k]. If fewer than k
          scores are numbers (not NaN), the last entries are -inf and NO_ID.

        Raises:
          KeyError: if the table is unknown, or a table of raw ids.
          TypeError: if k or oversample is not an integer, if sketch is not a SignSketch, or if
            query does not consist of real numbers or has a mask.
          ValueError: if k or a shape is wrong, if a row of `among` is outside, if both `among` and
            a sketch are given, or if the sketch is of another table or file.
        """
        chosen = self.table(table)
        packed = self.rows[chosen.name]
        dim, num_rows = chosen.embedding_dim, chosen.num_rows
        call = "top_k(query, k)"
        k = arguments.integer(call, "k", k)
        if not 1 <= k <= num_rows:
            raise ValueError(f"k must be in [1, {num_rows}] for table {chosen.name!r}, got {k}")
        _check_numbers("query", query)
        if np.ndim(query) < 1 or np.shape(query)[-1] != dim:
            raise ValueError(
                f"query must be float32 [.., {dim}] for table {chosen.name!r}, got "
                f"{list(np.shape(query))}"
            )
        lead = np.shape(query)[:-1]
        if not self._is_on_host(packed, query):
            if sketch is not None or among is not None:
                raise ValueError(
                    "sketch and among need a table on the host: call top_k of what `load` returned"
                )
            given = jnp.asarray(query, jnp.float32).reshape(-1, dim)
            on_device = top_k.on_device(packed, chosen.format, dim, given, k)
            return on_device[0].reshape(*lead, k), on_device[1].reshape(*lead, k)
        queries = np.ascontiguousarray(query, np.float32).reshape(-1, dim)
        if among is not None:
            if sketch is not None:
                raise ValueError("top_k takes either `among` or a sketch")
            scores, ids = self._among(chosen, queries, among, k)
        elif sketch is None:
            scores, ids = self._best(chosen, packed, queries, k)
        else:
            # SignSketch is not imported: its module imports this one.
            if not hasattr(sketch, "candidates"):
                raise TypeError(
                    f"{call}: sketch must be a SignSketch (from serving.sketch), got "
                    f"{type(sketch).__name__}"
                )
            if sketch.checksums_crc32 != self.contents.checksums_crc32:
                raise ValueError(
                    f"the sketch of table {sketch.table!r} was made for another file; make it for "
                    f"this one: serving.sketch(tables, {chosen.name!r})"
                )
            oversample = arguments.integer(call, "oversample", oversample)
            if oversample < 1:
                raise ValueError(f"oversample must be at least 1, got {oversample}")
            reader = self.host.reader(chosen, packed)
            parts = None if reader is None else reader.parts
            candidates = sketch.candidates(chosen, queries, min(num_rows, oversample * k), parts)
            scores, ids = self._ranked(chosen, queries, candidates, k)
        return scores.reshape(*lead, k), ids.reshape(*lead, k)

    def decode_block(self, table: Table, first: int, last: int) -> np.ndarray:
        """Returns rows [first, last) of a table on the host, float32 [last - first, D].

        Raises:
          TypeError: if the table is on the device.
        """
        if self.host is None:
            raise TypeError(
                f"table {table.name!r} is on the device, or lost its settings in jax.tree.map; "
                "pass what serving.load returned"
            )
        packed = self.rows[table.name]
        reader = self.host.reader(table, packed)
        if reader is None:
            return host_rows.decode(packed[first:last], table.format, table.embedding_dim)
        out = np.empty((last - first, table.embedding_dim), np.float32)
        reader.decode(first, last, out)
        return out

    def __reduce__(self) -> Any:
        """Pickles a host table as its path: the process that unpickles it maps the file again.

        If another file is there by then, unpickling raises a ServingError.
        """
        if self.host is None:
            return ServingTable, (self.rows, self.contents)
        return _load_again, (
            self.host.path,
            self.host.out_of_range,
            self.host.threads,
            self.host.implementation,
            zlib.crc32(self.contents.header()),
        )

    # --- one feature

    @functools.cached_property
    def _by_name(self) -> dict[str, Table]:
        return {table.name: table for table in self.tables}

    @functools.cached_property
    def _pool_of(self) -> dict[str, Table]:
        """The pool of each table of raw ids."""
        return {raw: t for t in self.tables if t.pool is not None for raw in t.pool.tables}

    @functools.cached_property
    def _raw_of(self) -> dict[str, tuple[str, int]]:
        """For each feature of raw ids, the name that its hash takes and its table's number."""
        # Prefixes belong to the file. Ids were hashed without them.
        prefixes = {ngrams.stack: ngrams.prefix for ngrams in self.contents.ngrams}
        numbers = {}
        for table in self.tables:
            if table.pool is not None:
                prefix = prefixes.get(table.stack, "")
                hashed = table.pool.hashed or [n.removeprefix(prefix) for n in table.pool.tables]
                for number, name in enumerate(table.pool.tables):
                    numbers[name] = hashed[number], number
        return {f: numbers[name] for f, name in self.contents.features if name in numbers}

    @functools.cached_property
    def _by_feature(self) -> dict[str, Table]:
        tables = self._by_name | self._pool_of
        return {feature: tables[name] for feature, name in self.contents.features}

    @functools.cached_property
    def _only_reader(self) -> Any:
        """The compiled reader of the single feature, if its ids are rows; or None."""
        tables = [*self._by_feature.values()]
        if self.host is None or len(tables) != 1 or tables[0].pool is not None:
            return None
        return self.host.reader(tables[0], self.rows[tables[0].name])

    def table(self, name: str | None = None) -> Table:
        """Returns a table, or a pool, by its name. The name of a single table is optional.

        Raises:
          KeyError: if it is unknown, or a table of raw ids.
          TypeError: if name is not a text.
        """
        known = self._by_name
        if not isinstance(name, str | None):
            raise TypeError(f"table must be the name of a table, got {name!r}")
        if name is None and len(known) == 1 and not self._pool_of:
            return self.tables[0]
        if name in self._pool_of or (name is None and len(known) == 1):
            pool = self._pool_of.get(name or "", self.tables[0])
            assert pool.pool is not None
            raise KeyError(
                f"name the pool {pool.name!r}: it has the rows of all raw ids of "
                f"{list(pool.pool.tables)}, and does not say which row belongs to which id; "
                "rows_of returns the rows of given ids"
            )
        if name not in known:
            raise KeyError(f"unknown table {name!r}; this file has {list(known)}")
        return known[name]

    def _ngrams(self, stack: str | None) -> NGrams:
        """Returns the hash of a stack's n-grams.

        Raises:
          KeyError: if the file does not have it.
          ValueError: if stack is None, and there are several.
        """
        known = {ngrams.stack: ngrams for ngrams in self.contents.ngrams}
        if stack is None and len(known) > 1:
            raise ValueError(
                f"this file has several n-gram memories; stack must be one of {[*known]}"
            )
        if not known:
            raise KeyError(
                "this file has no n-gram memory; save the module itself, which has the hash of its "
                "n-grams: serving.save(path, memory)"
            )
        if stack is None:
            (stack,) = known
        if stack not in known:
            raise KeyError(f"unknown n-gram memory {stack!r}; this file has {[*known]}")
        return known[stack]

    def _pairs(self, feature: str, table: Table, ids: Any, *, on_host: bool = False) -> Any:
        """Returns the pairs (uint32 [.., 2]) of a table's raw ids; on the host, a NumPy array."""
        name, number = self._raw_of[feature]
        made = hashes.pairs_on_host if on_host else hashes.pairs_of
        return made(feature, ids, name, number)

    def _local(self, feature: str, table: Table, ids: Any) -> Any:
        """Returns ids as rows of their table or pool."""
        if table.pool is None:
            return ids
        is_host = self._is_on_host(self.rows[table.owners_name], ids)
        return self._rows_of(table, self._pairs(feature, table, ids, on_host=is_host))

    def _rows_of(self, table: Table, pairs: Any) -> Any:
        """Returns the rows (int32 [..]) of pairs (uint32 [.., 2]) in their pool."""
        assert table.pool is not None
        owners = self.rows[table.owners_name]
        if not self._is_on_host(owners, pairs):
            return pools.on_device(owners, jnp.asarray(pairs), table.pool)
        pairs = np.asarray(pairs)
        rows = self.host.rows_of(owners, pairs.reshape(-1, 2), table.pool)
        return rows.reshape(pairs.shape[:-1])

    def _each(
        self, ids: Any, read: Callable[[str, Table, Any], Any], *, is_raw: bool = False
    ) -> Any:
        features = self._by_feature

        def read_of(feature: str, here: Any) -> Any:
            table = features[feature]
            return read(feature, table, here if is_raw else self._local(feature, table, here))

        if type(ids) is np.ndarray or not isinstance(ids, Mapping):
            if len(features) > 1:
                raise ValueError(
                    f"ids must be a mapping from features to arrays; this file has {list(features)}"
                )
            (feature,) = features
            return read_of(feature, ids)
        if unknown := [feature for feature in ids if feature not in features]:
            raise KeyError(f"unknown features {unknown}; this file has {list(features)}")
        found = {feature: read_of(feature, here) for feature, here in ids.items()}
        return row_ids.in_mapping_of(ids, found)

    def _is_on_host(self, packed: Any, given: Any) -> bool:
        """Returns whether the host reads the rows.

        Raises:
          TypeError: if it would have to read them while a function is traced, or if the tables lost
            the settings of the host.
        """
        is_host = isinstance(packed, np.ndarray)
        if is_host and self.host is None:
            raise TypeError(
                "these tables are on the host and lost its settings, as jax.tree.map makes them "
                "from what serving.load returned; load them again, or call to_device()"
            )
        if is_host and isinstance(given, jax.core.Tracer):
            raise TypeError(
                "a table on the host cannot be read in a jitted function; pass table.to_device() "
                "as an argument of the function"
            )
        return is_host

    def _lookup(self, feature: str, table: Table, ids: Any) -> Any:
        packed = self.rows[table.name]
        dim = table.embedding_dim
        if not self._is_on_host(packed, ids):
            stored = QuantizedTable(packed, table.format, dim)
            return read_rows(stored, _device_ids(feature, ids))
        host, shape = _host_ids(feature, ids)
        reader = self.host.reader(table, packed)
        if reader is None:
            rows, num_outside = host_rows.take(packed, table.format, dim, host)
        else:
            rows, num_outside = reader.take(host)
        if num_outside:
            self.host.count(num_outside, feature, ids, table)
        return rows.reshape(*shape, dim)

    def _bag(
        self, feature: str, table: Table, ids: Any, combiner: str, weights: Any, offsets: Any
    ) -> Any:
        packed = self.rows[table.name]
        dim = table.embedding_dim
        if weights is not None and np.shape(weights) != np.shape(ids):
            raise ValueError(
                f"feature {feature!r}: weights must have the shape of ids "
                f"{list(np.shape(ids))}, got {list(np.shape(weights))}"
            )
        if weights is not None:
            _check_numbers(f"feature {feature!r}: weights", weights)
        if not self._is_on_host(packed, ids):
            if offsets is not None:
                raise TypeError("offsets are used on the host only; pad the bags with NO_ID")
            rows = _device_ids(feature, ids)
            return _device_bag(QuantizedTable(packed, table.format, dim), rows, combiner, weights)
        host, shape = _host_ids(feature, ids)
        ends = None
        length = shape[-1] if shape else 0
        if offsets is not None:
            ends = _checked_offsets(feature, offsets, shape)
            lead: tuple[int, ...] = (len(ends) - 1,)
        elif not shape:
            raise ValueError(f"feature {feature!r}: a bag is the last axis of ids, got a scalar")
        else:
            lead = shape[:-1]
            if length == 0:
                return np.zeros((*lead, dim), np.float32)
        if weights is not None:
            weights = np.ascontiguousarray(weights, np.float32).reshape(-1)
        reader = self.host.reader(table, packed)
        if reader is None:
            if ends is None:
                ends = np.arange(0, len(host) + 1, length, dtype=np.int64)
            given = (packed, table.format, dim, host, ends, weights, combiner)
            bags, num_outside = host_rows.bag(*given)
        else:
            bags, num_outside = reader.bag(host, ends, length, weights, combiner)
        if num_outside:
            self.host.count(num_outside, feature, ids, table)
        return bags.reshape(*lead, dim)

    # --- top k on the host

    def _best(
        self, table: Table, packed: np.ndarray, queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        reader = self.host.reader(table, packed)
        best = top_k.Best(len(queries), k)
        step = top_k.BLOCK
        if reader is None or len(queries) > _FEW_QUERIES:
            for first in range(0, table.num_rows, step):
                last = min(first + step, table.num_rows)
                rows = self.decode_block(table, first, last)
                best.add(queries @ rows.T, np.arange(first, last))
            return best.result()

        def part(begin: int, end: int) -> top_k.Best:
            own = top_k.Best(len(queries), k)
            for first in range(begin, end, step):
                last = min(first + step, end)
                scores = np.empty((len(queries), last - first), np.float32)
                for query, out in zip(queries, scores, strict=True):
                    reader.score(first, last, query, out)
                own.add(scores, np.arange(first, last))
            return own

        for own in reader.parts(part, table.num_rows, step):
            best.merge(own)
        return best.result()

    def _among(
        self, table: Table, queries: np.ndarray, among: Any, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best k of the rows `among`. NO_ID is no row."""
        rows = np.unique(_host_ids(table.name, among)[0])
        rows = rows[rows != NO_ID]
        if rows.size and not 0 <= rows[0] <= rows[-1] < table.num_rows:
            raise ValueError(
                f"the rows of `among` must be in [0, {table.num_rows}), got {rows[0]} to {rows[-1]}"
            )
        best = top_k.Best(len(queries), k)
        for first in range(0, len(rows), top_k.BLOCK):
            here = rows[first : first + top_k.BLOCK]
            best.add(queries @ self._lookup(table.name, table, here).T, here)
        return best.result()

    def _ranked(
        self, table: Table, queries: np.ndarray, candidates: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores and ids of the best k candidates of each query.

        Candidates are int32 [Q, m], in ascending order of ids, padded with NO_ID.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), NO_ID, np.int32)
        for index, (query, found) in enumerate(zip(queries, candidates, strict=True)):
            rows = self._lookup(table.name, table, found[found != NO_ID])
            best = top_k.Best(1, k)
            best.add((rows @ query)[None], found[found != NO_ID])
            scores[index : index + 1], ids[index : index + 1] = best.result()
        return scores, ids


jax.tree_util.register_pytree_node(
    ServingTable,
    lambda table: (
        tuple(table.rows[a.name] for a in table.contents.arrays),
        table.contents,
    ),
    lambda contents, rows: ServingTable(
        {a.name: array for a, array in zip(contents.arrays, rows, strict=True)}, contents
    ),
)


def _load_again(
    path: Path, out_of_range: str, threads: int, implementation: str, crc32: int | None = None
) -> ServingTable:
    """Loads a pickled table's file. Its header has a CRC-32, unless an earlier version pickled it.

    Raises:
      ServingError: if the file has another header, which has the checksum of all rows.
    """
    table = load(path, out_of_range=out_of_range, threads=threads, implementation=implementation)
    if crc32 is not None and zlib.crc32(table.contents.header()) != crc32:
        raise ServingError(f"{path} is another file than the one whose table was pickled")
    return table


def _integers(feature: str, ids: Any) -> np.ndarray:
    """Returns ids on the host as integers of any dtype. No ids are int32.

    Raises:
      TypeError: if they are not integers.
    """
    array = row_ids.on_host(ids)
    if not array.size:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"feature {feature!r}: ids must be integers, got {array.dtype}; cast them first"
        )
    return array


def _host_ids(feature: str, ids: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns ids as int32 or int64 [N], and their shape."""
    array = _integers(feature, ids)
    kind = array.dtype
    if kind != np.int64 and kind != np.int32:
        if kind == np.uint64:
            array = np.minimum(array, np.uint64(2**63 - 1))
        array = array.astype(np.int64)
    return np.ascontiguousarray(array).reshape(-1), array.shape


def _device_ids(feature: str, ids: Any) -> jax.Array:
    """Returns ids as int32 [..] for a table on the device.

    Raises:
      TypeError: if they are not integers, or a jax array has a dtype that int32 cannot hold.
      ValueError: if an id that is not a jax array does not fit int32.
    """
    if isinstance(ids, jax.Array):
        if ids.dtype not in (jnp.int32, jnp.int16, jnp.int8, jnp.uint16, jnp.uint8):
            raise TypeError(
                f"feature {feature!r}: ids must be integers that int32 holds, got "
                f"{ids.dtype}; cast them"
            )
        return ids.astype(jnp.int32)
    array = _integers(feature, ids)
    outside = array[(array > NO_ID) | (array < -(2**31))]
    if outside.size:
        raise ValueError(
            f"feature {feature!r}: a table on the device takes ids that fit int32, got "
            f"{outside[0]}; a table on the host takes 64 bits"
        )
    return jnp.asarray(array.astype(np.int32))


def _check_numbers(name: str, values: Any) -> None:
    """Raises TypeError if values are not real numbers, or have a mask."""
    row_ids.check_no_mask(name, values)
    kind = values.dtype if isinstance(values, jax.Array) else np.asarray(values).dtype
    if not (jnp.issubdtype(kind, jnp.floating) or kind.kind in "iub"):
        raise TypeError(f"{name} must be float32, got {kind}")


def _checked_offsets(feature: str, offsets: Any, shape: tuple[int, ...]) -> np.ndarray:
    row_ids.check_no_mask(f"feature {feature!r}: offsets", offsets)
    given = np.asarray(offsets)
    if given.dtype.kind not in "iu":
        raise TypeError(f"feature {feature!r}: offsets must be integers, got {given.dtype}")
    ends = np.ascontiguousarray(given, np.int64)
    is_right = len(shape) == 1 and ends.ndim == 1 and len(ends) > 0
    if not is_right or ends[0] != 0 or ends[-1] != shape[0] or (np.diff(ends) < 0).any():
        raise ValueError(
            f"feature {feature!r}: offsets must be one array that begins with 0, never falls and "
            f"ends with the number of ids [N]; got {ends} for ids {list(shape)}"
        )
    return ends


def _device_bag(table: QuantizedTable, ids: jax.Array, combiner: str, weights: Any) -> jax.Array:
    """Returns bags (float32 [.., D]) of ids (int32 [.., L]), in a loop over the positions."""
    if ids.ndim == 0:
        raise ValueError("a bag is the last axis of ids, got a scalar")
    is_row = row_ids.in_range(ids, table.num_rows)
    given = None if weights is None else jnp.asarray(weights, jnp.float32)
    factors = pooling.coefficients(given, is_row, combiner)

    def body(position: jax.Array, total: jax.Array) -> jax.Array:
        here = lax.dynamic_index_in_dim(ids, position, -1, keepdims=False)
        factor = lax.dynamic_index_in_dim(factors, position, -1, keepdims=False)
        return total + factor[..., None] * read_rows(table, here)

    zeros = jnp.zeros((*ids.shape[:-1], table.embedding_dim), jnp.float32)
    if not ids.size:  # the body cannot be traced: there is no position
        return zeros
    return lax.fori_loop(0, ids.shape[-1], body, zeros)
