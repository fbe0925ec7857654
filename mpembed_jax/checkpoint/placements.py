"""Rows of a stack divided over shards, on disk and in a target: host arrays in the order of global ids, and back.

A stack divided by MOD over P shards holds its arrays shard after shard: row r is row r div P of shard r mod P, set s is set
s div P of shard s mod P, a group of the sketch likewise, and tags are rows of their own shard. Whole tables per shard lie
as `Layout.table_slices` says; their cache sets are others than one device's, so a cache goes along only where the placement
stays. A checkpoint holds the arrays as they are in memory and records the placement; restored onto another they pass through
the order of one device.
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
    """How the rows of a state are divided."""

    shards: int = 1
    table_shards: tuple[int, ...] | None = None  # the shard of each table; None: rows by MOD

    @staticmethod
    def of(state: EmbeddingState) -> "Division":
        """Reads it off a state; replicas of a whole stack are one shard."""
        layout = state.layout
        if layout is None or layout.shards == 1:
            return Division()
        return Division(layout.shards, layout.table_shards)

    @staticmethod
    def read(entry: dict[str, Any]) -> "Division":
        """Reads it off a state's record in a manifest."""
        tables = entry.get("table_shards")
        return Division(entry["shards"], None if tables is None else tuple(tables))

    def record(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "shards": self.shards,
            "table_shards": self.table_shards and list(self.table_shards),
        }

    def keeps_sets(self, other: "Division") -> bool:
        """Whether every cache set holds the same rows there: any number of shards by MOD, but the same whole tables."""
        return self == other or (self.table_shards is None and other.table_shards is None)

    def __str__(self) -> str:
        return f"{self.shards} shards" + (
            f" of whole tables {self.table_shards}" if self.table_shards else ""
        )


def places(member: leaves.Member) -> dict[str, leaves.Place]:
    """Returns {name in the tree: place} of a target's leaves of which its spec or mesh says more than they do themselves.

    Those that name no devices, but whose state lies over a mesh; and those that the spec keeps in host memory, which shapes
    (of jax.eval_shape, say) do not tell.
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
    """Whether a memory kind of the spec holds for a leaf, as state.make has it: the table, and wide optimizer state."""
    return inner.startswith("table.rows") or (inner.startswith("row_state") and leaf.ndim > 1)


def _shares(array: np.ndarray, shards: int, axis: int = 0) -> np.ndarray:
    """Reorders an axis from shard after shard to the order of one device."""
    split = array.reshape(*array.shape[:axis], shards, -1, *array.shape[axis + 1 :])
    return np.swapaxes(split, axis, axis + 1).reshape(array.shape)


def _merged(array: np.ndarray, shards: int, axis: int = 0) -> np.ndarray:
    """Reorders an axis from the order of one device to shard after shard."""
    return _shares(array, array.shape[axis] // shards, axis)


def _is_by_row(name: str, array: np.ndarray) -> bool:
    return name.startswith(("table.rows", "row_state")) and array.ndim > 0


def by_id(
    arrays: dict[str, np.ndarray], division: Division, spec: EmbeddingSpec
) -> dict[str, np.ndarray]:
    """Returns a state's host arrays ({inner name: array}) as one device holds them.

    Args:
      arrays: as the shards hold them, one after another.
      division: how.
      spec: the stack; only its tables are looked at.

    Returns:
      {inner name: array}, arrays by row [V, ..], tags as global ids; the sets of whole tables stay in their order.
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
    """Returns one device's host arrays as shards hold them, one after another; padding rows are zero.

    Args:
      arrays: {inner name: array}, as from by_id.
      division: how.
      spec: the stack.

    Returns:
      {inner name: array}, arrays by row [P * rows of a shard, ..].
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


def _layout(division: Division, spec: EmbeddingSpec) -> Layout | None:
    """Returns where whole tables lie, None by MOD."""
    if division.table_shards is None:
        return None
    return Layout.bare(
        spec, Placement("tables", table_shards=division.table_shards), division.shards
    )


def _of_sets(
    reorder: Any, name: str, array: np.ndarray, arrays: dict[str, np.ndarray], shards: int
) -> np.ndarray:
    """Reorders an array of the cache, by group, by line or by set."""
    if name == "cache.sketch":
        return reorder(array, shards, 1)
    if name == "cache.rows":
        return reorder(array.reshape(len(arrays["cache.tags"]), -1), shards).reshape(array.shape)
    return reorder(array, shards)


def _shifted(
    tags: np.ndarray, first_row: np.ndarray, layout: Layout, *, inverse: bool
) -> np.ndarray:
    """Returns tags of whole tables' rows, from global ids to rows of their shards, or back (`inverse`)."""
    result = np.full_like(tags, NO_ID)
    for start, (first, size) in zip(
        offsets(layout.spec.tables), layout.table_slices(), strict=False
    ):
        local = (
            first - first_row
        )  # the table's first row on this set's shard, if it is the table's own
        begin, move = (local, int(start) - local) if inverse else (int(start), local - int(start))
        is_on_shard = (local >= 0) & (local < layout.num_rows)
        is_in = is_on_shard & (tags >= begin) & (tags < begin + size)
        result = np.where(is_in, tags + move, result)
    return result.astype(tags.dtype)
