"""The stacks of a checkpoint as sources of a serving file, without the model that was trained.

Only packed rows, cache lines and the owners of rows are read, into host memory. The optimizer's
state stays on disk. A checkpoint of an earlier version records neither features nor the rule of
rounding. Each table is then its own feature. Cached rows are then rounded stochastically, unless
all rows are encoded again. No checkpoint records the whole hash of n-grams. Their tables are
exported as tables of row numbers or raw ids. To serve an n-gram memory, restore the model and save
that.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpembed_jax.cache.spec import Geometry
from mpembed_jax.checkpoint import leaves, manifest, placements, restoring
from mpembed_jax.checkpoint.errors import DamagedError
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.serving import saving, sources
from mpembed_jax.serving.container import Contents
from mpembed_jax.serving.sources import Source
from mpembed_jax.spec import EmbeddingSpec, TableSpec
from mpembed_jax.vocabulary.spec import OLD_PLACE_BITS, VocabularySpec

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

    The file has no hashes of n-grams, because a checkpoint does not hold them. Names are those of
    saving.save.

    Args:
      checkpoint: directory of `checkpoint.save`.
      path: as in save.
      storage: as in save.
      step: the step of the checkpoint; None for the newest good one.
      progress: as in save.

    Returns:
      The contents of the file.

    Raises:
      FileNotFoundError: if the directory has no checkpoint (of this step), or if the folder of path
        does not exist.
      CheckpointError: if the checkpoint is damaged or cannot be read now.
      OSError: if the file cannot be written, as where path is a directory.
      ValueError: if the checkpoint holds no embedding state, or one of 2**31 - 1 rows or more;
        or if names are not distinct.
    """
    saving.check_place(Path(path))
    directory = Path(checkpoint).absolute()
    chain = restoring.choose(directory, step)
    held = chain[0]
    if not held["embeddings"]:
        raise ValueError(f"step {held['step']} of {directory} holds no embedding state")
    _LOG.info("exporting step %d of %s", held["step"], directory)
    stacks = [_source(directory, chain, prefix) for prefix in held["embeddings"]]
    return saving.write(path, stacks, storage, progress)


def _source(directory: Path, chain: list[dict[str, Any]], prefix: str) -> Source:
    """Returns the source of one embedding state, whose rows are then in memory.

    Raises:
      CheckpointError: if its arrays are not those of such a state, or cannot be read.
      ValueError: if it has more rows than a serving file holds.
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
    with _as_damage(held["step"], prefix):
        tables = tuple(TableSpec(name, size) for name, size in entry["tables"])
        rounding = entry.get("rounding") or RowFormat.rounding
        name, symmetric, scale_dtype = entry["storage"]
        storage = RowFormat(name, symmetric, scale_dtype, rounding)
        features = entry.get("features")
        spec = EmbeddingSpec(
            tables,
            entry["embedding_dim"],
            storage,
            None,
            features=None if features is None else tuple((f, t) for f, t in features),
            vocabulary=None if pool is None else _vocabulary(pool),
        )
    sources.check_rows(prefix, spec)
    with _as_damage(held["step"], prefix):
        division = placements.Division.read(entry)
        _check_arrays(entry, {i: held["arrays"][n] for i, n in names.items()}, spec, division)
        layout = None if division.shards == 1 else placements.layout(division, spec)
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


@contextlib.contextmanager
def _as_damage(step: int, prefix: str) -> Iterator[None]:
    """Turns an error about what a manifest says of a state into a DamagedError."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise DamagedError(
            f"step {step}: embedding state {prefix!r} does not hold what the manifest says of it: "
            f"{error}"
        ) from None


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
        place_bits=sizes.get("place_bits", OLD_PLACE_BITS),
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
