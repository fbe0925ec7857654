"""Reordering of host arrays between the order of global ids and the order of shards.

A stack divided by MOD over P shards holds its arrays shard after shard. Row r is row r div P of
shard r mod P. Set s is set s div P of shard s mod P, and groups of the sketch are divided in the
same way. Tags are rows of their own shard. Whole tables per shard lie as `Layout.table_slices`
says. Their cache sets differ from one device's, so a cache is kept only if the placement stays the
same.

A checkpoint holds the arrays as they are in memory and records the placement. When it is restored
onto another placement, the arrays are first brought into the order of one device.
"""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from mpembed_jax.checkpoint import leaves
from mpembed_jax.embedding.state import EmbeddingState, partition_specs
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, offsets


@dataclasses.dataclass(frozen=True)
class Division:
    """How the rows of a state are divided over shards."""

    shards: int = 1
    table_shards: tuple[int, ...] | None = None  # the shard of each table; None for MOD

    @staticmethod
    def of(state: EmbeddingState) -> "Division":
        """Returns the division of a state; replicas of a whole stack count as one shard."""
        layout = state.layout
        if layout is None or layout.shards == 1:
            return Division()
        return Division(layout.shards, layout.table_shards)

    @staticmethod
    def read(entry: dict[str, Any]) -> "Division":
        """Returns the division recorded in a state's entry of a manifest."""
        tables = entry.get("table_shards")
        return Division(entry["shards"], None if tables is None else tuple(tables))

    def record(self) -> dict[str, Any]:
        """Returns the division as JSON."""
        return {
            "shards": self.shards,
            "table_shards": self.table_shards and list(self.table_shards),
        }

    def keeps_sets(self, other: "Division") -> bool:
        """Whether every cache set holds the same rows in both divisions.

        This is true for any two numbers of shards by MOD, and for equal divisions by whole tables.
        """
        return self == other or (self.table_shards is None and other.table_shards is None)

    def __str__(self) -> str:
        return f"{self.shards} shards" + (
            f" of whole tables {self.table_shards}" if self.table_shards else ""
        )


def places(member: leaves.Member) -> dict[str, leaves.Place]:
    """Returns {name in the tree: place} of the leaves whose place the state's spec or mesh decides.

    These are leaves that name no devices although their state lies over a mesh, and leaves that the
    spec keeps in host memory. The shapes of the latter (for example from jax.eval_shape) do not
    show the memory.
    """
    state = member.state
    if state.layout is None and (kind := state.spec.memory_kind) is not None:
        held = {
            inner: leaf
            for inner, leaf in leaves.named(state).items()
            if _is_kept_by_spec(inner, leaf)
        }
        return {
            member.names[n]: leaves.Place("memory", leaves.Place.of(leaf).sharding, kind)
            for n, leaf in held.items()
        }
    if state.layout is None or not isinstance(state.layout.mesh, Mesh):
        return {}
    specs = leaves.named(partition_specs(state))
    here = leaves.named(state)
    return {
        name: leaves.Place("sharding", NamedSharding(state.layout.mesh, specs[inner]))
        for inner, name in member.names.items()
        if leaves.Place.of(here[inner]).kind == "default"
    }


def _is_kept_by_spec(inner: str, leaf: Any) -> bool:
    """Whether the spec's memory kind applies to a leaf, as in state.make.

    It applies to the table and to optimizer state with several numbers per row.
    """
    return inner.startswith("table.rows") or (inner.startswith("row_state") and leaf.ndim > 1)


def _shares(array: np.ndarray, shards: int, axis: int = 0) -> np.ndarray:
    """Reorders an axis from the order of shards to the order of one device."""
    split = array.reshape(*array.shape[:axis], shards, -1, *array.shape[axis + 1 :])
    return np.swapaxes(split, axis, axis + 1).reshape(array.shape)


def _merged(array: np.ndarray, shards: int, axis: int = 0) -> np.ndarray:
    """Reorders an axis from the order of one device to the order of shards."""
    return _shares(array, array.shape[axis] // shards, axis)


def _is_by_row(name: str, array: np.ndarray) -> bool:
    return name.startswith(("table.rows", "row_state")) and array.ndim > 0


def by_id(
    arrays: dict[str, np.ndarray], division: Division, spec: EmbeddingSpec
) -> dict[str, np.ndarray]:
    """Returns a state's host arrays ({inner name: array}) in the order of one device.

    Args:
      arrays: in the order of shards.
      division: how the arrays are divided.
      spec: the stack; only its tables are used.

    Returns:
      {inner name: array}. Arrays by row are [V, ..], and tags are global ids. The cache sets of
      whole tables stay in their order.
    """
    shards = division.shards
    if shards == 1:
        return arrays
    result = dict(arrays)
    layout = _layout(division, spec)
    for name, array in arrays.items():
        if _is_by_row(name, array):
            if layout is None:
                result[name] = _shares(array, shards)[: spec.num_rows]
            else:
                result[name] = np.concatenate(
                    [array[first : first + size] for first, size in layout.table_slices()]
                )
        elif name == "cache.tags":
            shard = np.repeat(np.arange(shards, dtype=np.int32), len(array) // shards)[:, None]
            if layout is None:
                result[name] = _shares(
                    np.where(array == NO_ID, NO_ID, array * shards + shard), shards
                )
            else:
                result[name] = _shifted(array, shard * layout.num_rows, layout, inverse=True)
        elif layout is None and name.startswith("cache."):
            result[name] = _of_sets(_shares, name, array, arrays, shards)
    return result


def by_shard(
    arrays: dict[str, np.ndarray], division: Division, spec: EmbeddingSpec
) -> dict[str, np.ndarray]:
    """Returns one device's host arrays in the order of shards; padding rows are zero.

    Args:
      arrays: {inner name: array}, as returned by by_id.
      division: how to divide the arrays.
      spec: the stack.

    Returns:
      {inner name: array}. Arrays by row are [P * rows of a shard, ..].
    """
    shards = division.shards
    if shards == 1:
        return arrays
    result = dict(arrays)
    layout = _layout(division, spec)
    for name, array in arrays.items():
        if _is_by_row(name, array):
            if layout is None:
                padded = np.pad(array, [(0, -len(array) % shards), *[(0, 0)] * (array.ndim - 1)])
                result[name] = _merged(padded, shards)
                continue
            held = np.zeros((shards * layout.num_rows, *array.shape[1:]), array.dtype)
            for start, (first, size) in zip(
                offsets(spec.tables), layout.table_slices(), strict=False
            ):
                held[first : first + size] = array[start : start + size]
            result[name] = held
        elif name == "cache.tags":
            if layout is None:
                result[name] = _merged(np.where(array == NO_ID, NO_ID, array // shards), shards)
            else:
                shard = np.repeat(np.arange(shards, dtype=np.int32), len(array) // shards)[:, None]
                result[name] = _shifted(array, shard * layout.num_rows, layout, inverse=False)
        elif layout is None and name.startswith("cache."):
            result[name] = _of_sets(_merged, name, array, arrays, shards)
    return result


def num_rows(division: Division, spec: EmbeddingSpec) -> int:
    """Returns the rows of all shards together, padding included."""
    layout = _layout(division, spec)
    size = -(-spec.num_rows // division.shards) if layout is None else layout.num_rows
    return division.shards * size


def _layout(division: Division, spec: EmbeddingSpec) -> Layout | None:
    """Returns the layout of whole tables, or None for MOD."""
    if division.table_shards is None:
        return None
    return Layout.bare(
        spec, Placement("tables", table_shards=division.table_shards), division.shards
    )


def _of_sets(
    reorder: Any, name: str, array: np.ndarray, arrays: dict[str, np.ndarray], shards: int
) -> np.ndarray:
    """Reorders an array of the cache by group, by line or by set."""
    if name == "cache.sketch":
        return reorder(array, shards, 1)
    if name == "cache.rows":
        return reorder(array.reshape(len(arrays["cache.tags"]), -1), shards).reshape(array.shape)
    return reorder(array, shards)


def _shifted(
    tags: np.ndarray, first_row: np.ndarray, layout: Layout, *, inverse: bool
) -> np.ndarray:
    """Converts tags of whole tables from global ids to local rows, or back if `inverse`."""
    result = np.full_like(tags, NO_ID)
    for start, (first, size) in zip(
        offsets(layout.spec.tables), layout.table_slices(), strict=False
    ):
        # The table's first row on the shard of this set, if the shard holds the table.
        local = first - first_row
        begin, move = (local, int(start) - local) if inverse else (int(start), local - int(start))
        is_on_shard = (local >= 0) & (local < layout.num_rows)
        is_in = is_on_shard & (tags >= begin) & (tags < begin + size)
        result = np.where(is_in, tags + move, result)
    return result.astype(tags.dtype)
