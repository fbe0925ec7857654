"""Conversion of a saved embedding state to another format, cache or number of shards.

Rows are encoded again, cache lines are kept or flushed, and arrays are reordered. Everything
happens on host arrays in blocks, so that no float32 table ever exists. Rows are decoded exactly and
rounded by the new format's rule, with the key and step of the state. The random streams are
INITIAL_ROUNDING for rows of the table, FLUSH for dirty lines of a cache that is not kept, and the
leaf's own stream for optimizer rows.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache import residency
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.checkpoint import digests, leaves, placements
from mpembed_jax.checkpoint.errors import DamagedError
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.numerics import random_bits, rounding
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.numerics.packing import decode
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable, encode_rows

_LOG = logging.getLogger("mpembed_jax.checkpoint")
_SMALL = {"key", "step", "pending", "fingerprint"}  # `schema` checks the shapes of these arrays
_BLOCK = 65536  # rows per block


def is_needed(prefix: str, entry: dict[str, Any], state: EmbeddingState) -> bool:
    """Returns whether the target has another spec, or layout over a mesh, than the saved state.

    Args:
      prefix: the state's name.
      entry: its record in the manifest.
      state: the target.

    Raises:
      ValueError: if the state cannot be converted. Tables, dim, vocabulary, hash of n-grams and the
        leaves of the optimizer's state must be the same. With a vocabulary, row_state_dtype must be
        the same, too.
    """
    spec = state.spec
    name = repr(prefix) if prefix else "the embedding state"
    tables = digests.table_sizes(spec)
    if (tables, spec.embedding_dim) != (entry["tables"], entry["embedding_dim"]):
        raise ValueError(
            f"{name} was saved with tables {entry['tables']} of dim {entry['embedding_dim']}, the "
            f"target has {tables} of dim {spec.embedding_dim}; only storage, cache and "
            "row_state_dtype may differ (see to_dense and from_dense)"
        )
    held, wanted = (
        {n for n in names if n.startswith("row_state")}
        for names in (entry["names"], leaves.named(state))
    )
    if held != wanted:
        raise ValueError(
            f"{name}: the optimizer's state on disk is {sorted(held)}, the target's is "
            f"{sorted(wanted)}; pass the same tx"
        )
    ours = digests.describe(spec)
    if entry.get("vocabulary") != ours.get("vocabulary"):
        raise ValueError(
            f"{name} was saved with vocabulary {entry.get('vocabulary')}, the target has "
            f"{ours.get('vocabulary')}; a pool of rows is restored with the sizes it had, of which "
            "counter_bits follows from admit_after and recycle; if it names no place_bits, make "
            "the target with VocabularySpec(.., place_bits=22)"
        )
    # Checkpoints of earlier versions do not tell the hash.
    if entry.get("ngrams") is not None and entry["ngrams"] != ours.get("ngrams"):
        raise ValueError(
            f"{name} was saved with the NGramHash {entry['ngrams']}, the target has "
            f"{ours.get('ngrams')}; n-grams have other rows in another hash: make the target with "
            "the boundary, padding and seed of the saved model"
        )
    if spec.vocabulary is not None and entry["row_state_dtype"] != spec.row_state_dtype:
        raise ValueError(
            f"{name} has a vocabulary, and was saved with row_state_dtype "
            f"{entry['row_state_dtype']}, the target has {spec.row_state_dtype}; give the target "
            "the saved one"
        )
    return entry["fingerprint"] != state.expected_fingerprint.tolist()


def check(
    prefix: str, entry: dict[str, Any], records: dict[str, Any], target: EmbeddingState
) -> None:
    """Checks the saved arrays of a state against its entry and the target, before they are read.

    Args:
      prefix: the state's name.
      entry: its record in the manifest.
      records: {name in the tree: record of an array}.
      target: concrete or abstract.

    Raises:
      DamagedError: if the arrays are not those of such a state.
      ValueError: if the optimizer's state has another structure.
    """
    spec = target.spec
    name = prefix or "the embedding state"
    held = {inner: records[outer] for inner, outer in entry["names"].items()}
    wanted = leaves.named(target)
    division = placements.Division.read(entry)
    try:
        fmt = RowFormat(*entry["storage"])
        dim = spec.embedding_dim
        num_rows = placements.num_rows(division, spec)
        expected = {
            "table.rows": ((num_rows, fmt.row_words(dim)), fmt.word_dtype(dim).name),
            "counters": (wanted["counters"].shape, "uint32"),
        }
        if entry["cache"] is not None:
            sizes = {n: v for n, v in entry["cache"].items() if n != "policy"}
            if sizes["sets"] % division.shards or sizes["groups"] % division.shards:
                raise ValueError(f"{sizes['sets']} sets in {division.shards} shards")
            make = partial(residency.init, Geometry(**sizes), entry["cache"]["policy"], dim)
            expected |= {
                f"cache.{inner}": (leaf.shape, leaf.dtype.name)
                for inner, leaf in leaves.named(jax.eval_shape(make)).items()
            }
        expected |= {
            inner: (leaf.shape, np.dtype(leaf.dtype).name)
            for inner, leaf in wanted.items()
            if inner.startswith("vocabulary.")
        }
        for inner, (shape, dtype) in expected.items():
            found = held.get(inner, {"shape": None, "dtype": None})
            if (found["shape"], found["dtype"]) != (list(shape), dtype):
                raise ValueError(f"{inner} is {found['dtype']} {found['shape']}")
        rows = [inner for inner in held if inner.startswith("row_state")]
        others = held.keys() - expected.keys() - {*rows} - _SMALL
        if others:
            raise ValueError(f"it has arrays {sorted(others)}")
        if any(held[inner]["shape"][:1] not in ([], [num_rows]) for inner in rows):
            raise ValueError(f"the optimizer's state is not that of {num_rows} rows")
    except (ValueError, TypeError, OverflowError) as error:
        raise DamagedError(f"{name} does not hold what the manifest says of it: {error}") from None
    _check_row_state(name, held, wanted)


def convert(
    prefix: str, entry: dict[str, Any], saved: dict[str, np.ndarray], target: EmbeddingState
) -> dict[str, np.ndarray]:
    """Makes the target's arrays from the saved ones.

    Args:
      prefix: the state's name, for the log.
      entry: its record in the manifest.
      saved: {path inside the state: host array}. The dict and its arrays may be changed.
      target: concrete or abstract.

    Returns:
      {path inside the state: host array} for every leaf of the target.

    Raises:
      ValueError: if the state was saved between prefetch and apply_gradients, and the cache would
        change.
    """
    spec = target.spec
    wanted = leaves.named(target)
    name = prefix or "the embedding state"
    before, after = placements.Division.read(entry), placements.Division.of(target)
    if before != after:
        _LOG.warning("%s: rows of %s placed on %s", name, before, after)
    if spec.ngrams is not None and entry.get("ngrams") is None:
        _LOG.warning(
            "%s: the checkpoint does not tell its NGramHash; taken for that of the target, %s",
            name,
            spec.ngrams.settings,
        )
    saved = placements.by_id(saved, before, spec)
    fmt = RowFormat(*entry["storage"])
    ours = digests.describe(spec)
    key, step = saved["key"], saved["step"]
    result = {inner: saved[inner] for inner in ("key", "step", "pending", "counters")}
    result |= {inner: saved[inner] for inner in saved if inner.startswith("vocabulary.")}
    result["fingerprint"] = target.expected_fingerprint
    same_cache = entry["cache"] == ours["cache"] and before.keeps_sets(after)
    if entry["is_pending"] and not same_cache:
        raise ValueError(
            f"{name} was saved between prefetch and apply_gradients; restore it with the cache "
            "and placement that it had"
        )

    rows = saved.pop("table.rows")
    is_encoded = entry["storage"] != ours["storage"]
    if is_encoded:
        recode = partial(
            _recode, key=key, step=step, before=fmt, after=spec.storage, dim=spec.embedding_dim
        )
        rows = _by_blocks(recode, rows, wanted["table.rows"])
        _LOG.warning(
            "%s: %d rows of %s encoded anew as %s",
            name,
            len(rows),
            _name(entry["storage"]),
            _name(ours["storage"]),
        )
    if same_cache:
        cache = {inner: array for inner, array in saved.items() if inner.startswith("cache.")}
        # The rows have changed, so a clean line no longer equals its row.
        if is_encoded and cache:
            cache["cache.dirty"] = cache["cache.tags"] != NO_ID
            _LOG.warning("%s: %d cache lines carried over", name, int(cache["cache.dirty"].sum()))
    else:
        cache = {}
        if spec.cache is not None:
            empty = residency.init(
                spec.cache.geometry(spec.num_rows), spec.cache.policy, spec.embedding_dim
            )
            cache = {
                f"cache.{inner}": np.asarray(array) for inner, array in leaves.named(empty).items()
            }
        num_flushed = 0
        if entry["cache"] is not None:
            dirty = saved["cache.dirty"].reshape(-1)
            ids = saved["cache.tags"].reshape(-1)[dirty]
            lines = saved["cache.rows"][dirty]
            rows = rows if rows.flags.writeable else rows.copy()
            num_flushed = len(ids)
            for block, block_ids in _blocks(lines, ids):
                packed = np.asarray(
                    _encode(
                        block, block_ids, key, step, after=spec.storage, stream=random_bits.FLUSH
                    )
                )
                rows[block_ids[block_ids != NO_ID]] = packed[block_ids != NO_ID]
        _LOG.warning(
            "%s: cache %s -> %s: starts empty, %d dirty lines written to their rows",
            name,
            entry["cache"],
            ours["cache"],
            num_flushed,
        )
    result |= cache | {"table.rows": rows}
    result |= _row_state(
        name,
        entry,
        saved,
        {n: x for n, x in wanted.items() if n.startswith("row_state")},
        key,
        step,
    )
    return placements.by_shard(result, after, spec)


def _name(storage: list) -> str:
    return " ".join(
        str(x)
        for x in (storage[0], {True: "symmetric", False: "asymmetric"}.get(storage[1]), storage[2])
        if x
    )


def _row_state(
    name: str,
    entry: dict[str, Any],
    saved: dict[str, np.ndarray],
    wanted: dict[str, Any],
    key: Any,
    step: Any,
) -> dict[str, np.ndarray]:
    """Returns the optimizer's state in the dtypes of `wanted`; bfloat16 bit patterns are uint16."""
    held = {inner: array for inner, array in saved.items() if inner.startswith("row_state")}
    result = {}
    for index, (inner, array) in enumerate(held.items()):
        leaf = wanted[inner]
        if array.dtype == leaf.dtype:
            result[inner] = array
        elif array.dtype == np.uint16:
            result[inner] = (array.astype(np.uint32) << 16).view(np.float32)
        else:
            narrow = partial(_narrow, key=key, step=step, stream=random_bits.ROW_STATE + index)
            result[inner] = _by_blocks(narrow, array, leaf)
            _LOG.warning("%s: %s rounded stochastically to bfloat16", name, inner)
    return result


def _check_row_state(name: str, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Checks that the optimizer's state on disk, given as records, can become the target's."""
    saved, ours = (
        [inner for inner in names if inner.startswith("row_state")] for names in (held, wanted)
    )
    if saved != ours:
        raise ValueError(
            f"{name}: the optimizer's state on disk is {saved}, the target's is {ours}; pass the "
            "same tx"
        )
    for inner in saved:
        leaf, record = wanted[inner], held[inner]
        if (record["shape"][1:], len(record["shape"])) != (list(leaf.shape[1:]), leaf.ndim):
            raise ValueError(
                f"{name}: {inner} is {record['shape']} on disk, {list(leaf.shape)} in the target; "
                "pass the same tx"
            )
        dtypes = {record["dtype"], np.dtype(leaf.dtype).name}
        if len(dtypes) > 1 and dtypes != {"uint16", "float32"}:
            raise ValueError(
                f"{name}: {inner} is {record['dtype']} on disk, {leaf.dtype} in the target; pass "
                "the same tx"
            )


def _blocks(array: np.ndarray, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of equal length of an array and its ids.

    The last block is filled up with zeros, and its ids with NO_ID.
    """
    size = min(_BLOCK, max(1, len(array)))
    for first in range(0, len(array), size):
        block, block_ids = array[first : first + size], ids[first : first + size]
        extra = size - len(block)
        yield (
            np.pad(block, [(0, extra), *[(0, 0)] * (block.ndim - 1)]),
            np.pad(block_ids.astype(np.int32), (0, extra), constant_values=NO_ID),
        )


def _by_blocks(
    work: Callable[[np.ndarray, np.ndarray], jax.Array], array: np.ndarray, like: Any
) -> np.ndarray:
    """Applies work(block of rows, their ids) to all rows and returns the results as one array.

    The result has the row shape and dtype of `like`.
    """
    result = np.empty((len(array), *like.shape[1:]), like.dtype)
    first = 0
    for block, ids in _blocks(array, np.arange(len(array), dtype=np.int32)):
        num = min(len(block), len(array) - first)
        result[first : first + num] = np.asarray(work(block, ids))[:num]
        first += num
    return result


@partial(jax.jit, static_argnames=("after", "stream"))
def _encode(
    rows: Any, ids: Any, key: Any, step: Any, *, after: RowFormat, stream: int
) -> jax.Array:
    """Packs float32 rows [n, D] of ids [n] with the rounding of the format `after`."""
    rows = jnp.asarray(rows)
    # encode_rows uses only the format and the dim of the table.
    table = QuantizedTable(rows, after, rows.shape[1])
    return encode_rows(rows, jnp.asarray(ids), table, jnp.asarray(key), stream, jnp.asarray(step))


@partial(jax.jit, static_argnames=("before", "after", "dim"))
def _recode(
    packed: Any, ids: Any, key: Any, step: Any, *, before: RowFormat, after: RowFormat, dim: int
) -> jax.Array:
    """Converts packed rows [n, ..] of one format to another."""
    return _encode(
        decode(jnp.asarray(packed), before, dim),
        ids,
        key,
        step,
        after=after,
        stream=random_bits.INITIAL_ROUNDING,
    )


@partial(jax.jit, static_argnames="stream")
def _narrow(values: Any, ids: Any, key: Any, step: Any, *, stream: int) -> jax.Array:
    """Rounds float32 [n, ..] stochastically to bfloat16 bit patterns."""
    columns = int(np.prod(values.shape[1:]))
    bits = random_bits.row_bits(
        jnp.asarray(key), stream, jnp.asarray(step), jnp.asarray(ids), columns
    ).reshape(values.shape)
    return rounding.encode_float(
        jnp.asarray(values), rounding.FLOAT_FORMATS["bfloat16"], bits
    ).astype(jnp.uint16)
