"""The stacks of a checkpoint as sources of a serving file, without the model that was trained.

Only packed rows, cache lines and the owners of rows are read, into host memory. The optimizer's
state stays on disk. A checkpoint of an earlier version records neither features nor the rule of
rounding. Each table is then its own feature. Cached rows are then rounded stochastically, unless
all rows are encoded again. No checkpoint records the whole hash of n-grams. Their tables are
exported as tables of row numbers or raw ids. To serve an n-gram memory, restore the model and save
that.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

from mpembed_jax.cache.spec import Geometry
from mpembed_jax.checkpoint import leaves, manifest, placements, restoring
from mpembed_jax.checkpoint.errors import DamagedError
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.serving import saving, sources
from mpembed_jax.serving.container import Contents
from mpembed_jax.serving.sources import Source
from mpembed_jax.spec import EmbeddingSpec, TableSpec
from mpembed_jax.vocabulary.spec import VocabularySpec

_LOG = logging.getLogger("mpembed_jax.serving")
_CACHE = ("tags", "dirty", "rows")


def export(
    checkpoint: Any,
    path: Any,
    *,
    storage: RowFormat | str | None = None,
    step: int | None = None,
    progress: saving.Progress | None = None,
) -> Contents:
    """Writes all embedding states of a checkpoint to one serving file.

    The file has no hashes of n-grams, because a checkpoint does not hold them; see saving.save. If
    two stacks have a feature of the same name, each table of all stacks becomes a feature of its
    own name, and a UserWarning says so.

    Args:
      checkpoint: directory of `checkpoint.save`.
      path: as in save.
      storage: as in save.
      step: the step of the checkpoint; None for the newest good one.
      progress: as in save.

    Returns:
      The contents of the file.

    Raises:
      FileNotFoundError: if the directory has no checkpoint (of this step).
      CheckpointError: if the checkpoint is damaged or cannot be read now.
      OSError: if the file cannot be written.
      ValueError: if the checkpoint holds no embedding state, or if names are not distinct.
    """
    directory = Path(checkpoint).absolute()
    chain = restoring.choose(directory, step)
    held = chain[0]
    if not held["embeddings"]:
        raise ValueError(f"step {held['step']} of {directory} holds no embedding state")
    _LOG.info("exporting step %d of %s", held["step"], directory)
    named = [name for entry in held["embeddings"].values() for name in _feature_names(entry)]
    has_features = len(set(named)) == len(named)
    if not has_features:
        twice = next(name for name in named if named.count(name) > 1)
        warnings.warn(
            f"several stacks have the feature {twice!r}: in the file, each table is a feature of "
            "its own name",
            stacklevel=2,
        )
    stacks = [_source(directory, chain, prefix, has_features) for prefix in held["embeddings"]]
    return saving.write(path, stacks, storage, progress)


def _feature_names(entry: dict[str, Any]) -> list[str]:
    """Returns the names of the features of a stack, from its record in a manifest."""
    features = entry.get("features")
    return [name for name, _ in (entry["tables"] if features is None else features)]


def _source(
    directory: Path, chain: list[dict[str, Any]], prefix: str, has_features: bool
) -> Source:
    """Returns the source of one embedding state, whose rows are then in memory.

    Without `has_features`, each table is its own feature.

    Raises:
      CheckpointError: if its arrays are not those of such a state, or cannot be read.
    """
    held = chain[0]
    entry = held["embeddings"][prefix]
    pool = entry.get("vocabulary")
    wanted = {"table.rows", "key", "step"}
    if entry["cache"] is not None:
        wanted |= {f"cache.{field}" for field in _CACHE}
    if pool is not None:
        wanted.add("vocabulary.owners")
    names = {inner: entry["names"][inner] for inner in wanted}
    try:
        tables = tuple(TableSpec(name, size) for name, size in entry["tables"])
        rounding = entry.get("rounding") or RowFormat.rounding
        name, symmetric, scale_dtype = entry["storage"]
        storage = RowFormat(name, symmetric, scale_dtype, rounding)
        features = entry.get("features") if has_features else None
        spec = EmbeddingSpec(
            tables,
            entry["embedding_dim"],
            storage,
            None,
            features=None if features is None else tuple((f, t) for f, t in features),
            vocabulary=None if pool is None else _vocabulary(pool),
        )
        division = placements.Division.read(entry)
        _check_arrays(entry, {i: held["arrays"][n] for i, n in names.items()}, spec, division)
        layout = None if division.shards == 1 else placements.layout(division, spec)
    except (ValueError, TypeError, OverflowError) as error:
        raise DamagedError(
            f"step {held['step']}: embedding state {prefix!r} does not hold what the manifest says "
            f"of it: {error}"
        ) from None
    places = {name: leaves.Destination("host") for name in names.values()}
    found = restoring.read_arrays(directory, chain, places)
    if any(manifest.read(directory, body["step"]) != body for body in chain):
        raise DamagedError(f"step {held['step']} of {directory} was replaced while it was read")
    arrays = {inner: found[name] for inner, name in names.items()}
    restoring.check_tags(directory, held["step"], prefix, entry, arrays)
    cache = {field: arrays[f"cache.{field}"] for field in _CACHE if f"cache.{field}" in arrays}
    return sources.of_arrays(
        prefix,
        spec,
        layout,
        arrays["table.rows"],
        cache,
        key=arrays["key"],
        step=arrays["step"],
        owners=arrays.get("vocabulary.owners"),
    )


def _vocabulary(sizes: dict[str, int]) -> VocabularySpec:
    """Returns a vocabulary whose pool has the sizes of a manifest.

    Raises:
      ValueError: if no pool has them.
    """
    rules = VocabularySpec(
        sizes["sets"] * sizes["ways"],
        ways=sizes["ways"],
        shared_rows=sizes["shared_rows"],
        sketch_bytes=1,
        first_sets=sizes["first_sets"],
    )
    for field in ("sets", "ways", "groups"):
        if getattr(rules.geometry, field) != sizes[field]:
            raise ValueError(f"no pool has the sizes {sizes}")
    return rules


def _check_arrays(
    entry: dict[str, Any],
    records: dict[str, Any],
    spec: EmbeddingSpec,
    division: placements.Division,
) -> None:
    """Checks the shapes and dtypes of a state's arrays, which the manifest gives as records.

    Raises:
      ValueError: if they are not those of the spec and the cache.
    """
    dim = spec.embedding_dim
    if spec.num_rows >= NO_ID:
        raise ValueError(f"it has {spec.num_rows} rows; a serving file holds fewer than 2**31 - 1")
    num_rows = placements.num_rows(division, spec)
    expected: dict[str, tuple[Any, str]] = {
        "table.rows": (
            (num_rows, spec.storage.row_words(dim)),
            spec.storage.word_dtype(dim).name,
        )
    }
    if entry["cache"] is not None:
        geometry = Geometry(*(entry["cache"][field] for field in Geometry._fields))
        lines = (geometry.sets, geometry.ways)
        if geometry.sets % division.shards or geometry.groups % division.shards:
            raise ValueError(f"{geometry.sets} sets in {division.shards} shards")
        expected |= {
            "cache.tags": (lines, "int32"),
            "cache.dirty": (lines, "bool"),
            "cache.rows": ((geometry.lines, dim), "float32"),
        }
    if spec.vocabulary is not None:
        pool = spec.vocabulary.geometry
        if pool.groups % division.shards or division.table_shards is not None:
            raise ValueError(f"a pool of {pool.groups} groups in {division}")
        expected["vocabulary.owners"] = (pool.sets, pool.ways), "uint32"
    for inner, (shape, dtype) in expected.items():
        record = records[inner]
        if (record["shape"], record["dtype"]) != (list(shape), dtype):
            raise ValueError(f"{inner} is {record['dtype']} {record['shape']}")
