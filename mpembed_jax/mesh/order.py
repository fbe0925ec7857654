"""Reordering of a stack's arrays between the order of global ids and the order of shards.

A stack divided by MOD over P shards holds its arrays shard after shard. Row r is row r div P of
shard r mod P. Cache set s is set s div P of shard s mod P, and the groups of the sketch are divided
in the same way. A tag is a local row of its shard.

If each table is whole on one shard, rows lie as `Layout.table_slices` says. A cache set then holds
other rows than it would on one device. So the sets keep their order, and only the tags are
renumbered.

The functions take NumPy arrays (checkpoints) or jax arrays (`sharding.relayout`), and return the
same kind.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpembed_jax.mesh.layout import Layout
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import offsets

Array = Any  # np.ndarray or jax.Array


def rows_by_id(layout: Layout, rows: Array) -> Array:
    """Reorders rows [P * num_rows, ..] of all shards to the order of global ids [V, ..]."""
    if layout.table_shards is None:
        return _transposed(rows, layout.shards, 0)[: layout.spec.num_rows]
    parts = [rows[first : first + size] for first, size in layout.table_slices()]
    return _library(rows).concatenate(parts)


def rows_by_shard(layout: Layout, rows: Array) -> Array:
    """Reorders rows [V, ..] to the order of the shards [P * num_rows, ..]; padding is zero."""
    library = _library(rows)
    total = layout.shards * layout.num_rows
    if layout.table_shards is None:
        widths = [(0, total - rows.shape[0]), *[(0, 0)] * (rows.ndim - 1)]
        return _transposed(library.pad(rows, widths), layout.num_rows, 0)
    starts = offsets(layout.spec.tables)
    # Every shard is as long as the longest one. This leaves gaps between tables, which are zero.
    parts = []
    end = 0
    for start, (first, size) in sorted(
        zip(starts, layout.table_slices(), strict=False), key=lambda pair: pair[1]
    ):
        parts.append(library.zeros((first - end, *rows.shape[1:]), rows.dtype))
        parts.append(rows[int(start) : int(start) + size])
        end = first + size
    parts.append(library.zeros((total - end, *rows.shape[1:]), rows.dtype))
    return library.concatenate(parts)


def cache_by_id(layout: Layout, cache: dict[str, Array]) -> dict[str, Array]:
    """Merges the caches of all shards into the cache of one device.

    If each table is whole on one shard, only the tags are renumbered.

    Args:
      layout: the layout of the stack.
      cache: {field of CacheState: array}. Tags must be among them.

    Returns:
      The same fields. Tags are global ids.
    """
    tags = cache["tags"]
    shard = _shard_of_sets(layout, tags)
    if layout.table_shards is not None:
        return cache | {"tags": _renumbered(layout, tags, shard, is_to_ids=True)}
    global_tags = _library(tags).where(tags == NO_ID, NO_ID, tags * layout.shards + shard)
    return _by_set(cache | {"tags": global_tags}, tags.shape[0], lambda size: layout.shards)


def cache_by_shard(layout: Layout, cache: dict[str, Array]) -> dict[str, Array]:
    """Splits the cache of one device into the caches of all shards, one after another.

    If each table is whole on one shard, only the tags are renumbered.

    Arguments and result are as in `cache_by_id`; tags become local rows.
    """
    tags = cache["tags"]
    if layout.table_shards is not None:
        shard = _shard_of_sets(layout, tags)
        return cache | {"tags": _renumbered(layout, tags, shard, is_to_ids=False)}
    local_tags = _library(tags).where(tags == NO_ID, NO_ID, tags // layout.shards)
    return _by_set(cache | {"tags": local_tags}, tags.shape[0], lambda size: size // layout.shards)


def vocabulary_by_id(layout: Layout, vocabulary: dict[str, Array]) -> dict[str, Array]:
    """Merges the parts of a vocabulary ({name of pool.ARRAYS: array}) into that of one device."""
    return _by_set(vocabulary, len(vocabulary["owners"]), lambda size: layout.shards)


def vocabulary_by_shard(layout: Layout, vocabulary: dict[str, Array]) -> dict[str, Array]:
    """Splits the vocabulary of one device into the parts of all shards, one after another."""
    return _by_set(vocabulary, len(vocabulary["owners"]), lambda size: size // layout.shards)


def _library(array: Array) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def _transposed(array: Array, count: int, axis: int) -> Array:
    """Reads an axis as a matrix [count, n / count] and reorders it to the matrix's transpose."""
    if not array.shape[axis]:
        return array
    matrix = array.reshape(*array.shape[:axis], count, -1, *array.shape[axis + 1 :])
    return matrix.swapaxes(axis, axis + 1).reshape(array.shape)


def _by_set(
    fields: dict[str, Array], num_sets: int, count: Callable[[int], int]
) -> dict[str, Array]:
    """Reorders the fields of a cache or vocabulary by set, line or group; see `_transposed`.

    Args:
      fields: {name: array}.
      num_sets: the number of sets of all shards together.
      count: a function from the number of sets or groups to the `count` of `_transposed`.
    """

    def reordered(name: str, array: Array) -> Array:
        if array is None:
            return None
        axis = 1 if name == "sketch" else 0
        by_set = array.reshape(num_sets, -1) if name == "rows" else array
        return _transposed(by_set, count(by_set.shape[axis]), axis).reshape(array.shape)

    return {name: reordered(name, array) for name, array in fields.items()}


def _shard_of_sets(layout: Layout, tags: Array) -> Array:
    """Returns the shard (int32 [S, 1]) of each set of tags [S, W] in the order of shards."""
    library = _library(tags)
    shards = library.arange(layout.shards, dtype=np.int32)
    return library.repeat(shards, tags.shape[0] // layout.shards)[:, None]


def _renumbered(layout: Layout, tags: Array, shard: Array, *, is_to_ids: bool) -> Array:
    """Converts tags of whole tables from local rows to global ids, or from ids to local rows."""
    library = _library(tags)
    result = library.full_like(tags, NO_ID)
    first_row = shard * layout.num_rows
    for start, (first, size) in zip(
        offsets(layout.spec.tables), layout.table_slices(), strict=False
    ):
        # The table's first row on the shard of this set, if the shard holds the table.
        local = first - first_row
        begin = local if is_to_ids else int(start)
        move = int(start) - local if is_to_ids else local - int(start)
        is_on_shard = (local >= 0) & (local < layout.num_rows)
        is_in = is_on_shard & (tags >= begin) & (tags < begin + size)
        result = library.where(is_in, tags + move, result)
    return result.astype(tags.dtype)
