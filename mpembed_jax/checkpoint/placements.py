"""The division of saved arrays over shards, and their reordering for another division.

A checkpoint holds the arrays as they are in memory, and records their division. When it is restored
with another division, the arrays are brought into the order of one device, and then into the order
of the new shards (see `mesh.order`). If each table is whole on one shard, a cache set holds other
rows than on one device. Such a cache is kept only if the division stays the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from mpembed_jax.cache import residency
from mpembed_jax.checkpoint import leaves
from mpembed_jax.embedding.state import EmbeddingState, partition_specs
from mpembed_jax.mesh import order
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.vocabulary import pool


@dataclasses.dataclass(frozen=True)
class Division:
    """How the rows of a state are divided over shards."""

    shards: int = 1
    table_shards: tuple[int, ...] | None = None  # the shard of each table; None for MOD

    @staticmethod
    def of(state: EmbeddingState) -> "Division":
        """Returns the division of a state. A replicated stack counts as one shard."""
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
        """Returns the division as fields of a state's entry in a manifest; see `read`."""
        return {
            "shards": self.shards,
            "table_shards": self.table_shards and list(self.table_shards),
        }

    def keeps_sets(self, other: "Division") -> bool:
        """Returns whether every cache set holds the same rows in both divisions.

        This is so for two divisions by MOD, with any numbers of shards, and for equal divisions.
        """
        return self == other or (self.table_shards is None and other.table_shards is None)

    def __str__(self) -> str:
        return f"{self.shards} shards" + (
            f" of whole tables {self.table_shards}" if self.table_shards else ""
        )


def places(member: leaves.Member) -> dict[str, leaves.Destination]:
    """Returns the destinations that the leaves of a target take from its state.

    Leaves that are only shapes, for example from jax.eval_shape, name neither devices nor memory.
    If the state is over a mesh, a leaf that names no devices goes to this mesh. If the state's spec
    keeps a leaf in host memory, the leaf goes there.

    Returns:
      {name in the tree: destination}.
    """
    state = member.state
    if state.layout is None and (kind := state.spec.memory_kind) is not None:
        held = {
            inner: leaf
            for inner, leaf in leaves.named(state).items()
            if _is_kept_by_spec(inner, leaf)
        }
        return {
            member.names[n]: leaves.Destination(
                "memory", leaves.Destination.of(leaf).sharding, kind
            )
            for n, leaf in held.items()
        }
    if state.layout is None or not isinstance(state.layout.mesh, Mesh):
        return {}
    specs = leaves.named(partition_specs(state))
    here = leaves.named(state)
    return {
        name: leaves.Destination("sharding", NamedSharding(state.layout.mesh, specs[inner]))
        for inner, name in member.names.items()
        if leaves.Destination.of(here[inner]).kind == "default"
    }


def _is_kept_by_spec(inner: str, leaf: Any) -> bool:
    """Returns whether the spec's memory kind applies to a leaf, as in `state.assemble`.

    It applies to the table, and to optimizer state with several numbers per row.
    """
    return inner.startswith("table.rows") or (inner.startswith("row_state") and leaf.ndim > 1)


def _is_by_row(name: str, array: np.ndarray) -> bool:
    return name.startswith(("table.rows", "row_state")) and array.ndim > 0


def by_id(
    arrays: dict[str, np.ndarray], division: Division, spec: EmbeddingSpec
) -> dict[str, np.ndarray]:
    """Returns a state's NumPy arrays in the order of one device.

    Args:
      arrays: {inner name: array}, in the order of shards.
      division: how the arrays are divided.
      spec: the stack; only its tables are used.

    Returns:
      {inner name: array}. Arrays by row are [V, ..], and tags are global ids. If each table is
      whole on one shard, the cache sets keep their order.
    """
    reorder = order.rows_by_id, order.cache_by_id, order.vocabulary_by_id
    return _reordered(arrays, division, spec, *reorder)


def by_shard(
    arrays: dict[str, np.ndarray], division: Division, spec: EmbeddingSpec
) -> dict[str, np.ndarray]:
    """Returns a state's NumPy arrays in the order of shards.

    Args:
      arrays: {inner name: array}, in the order of one device, as `by_id` returns them.
      division: how to divide the arrays.
      spec: the stack; only its tables are used.

    Returns:
      {inner name: array}. Arrays by row are [P * rows of a shard, ..], and tags are local rows.
      Padding rows are zero.
    """
    reorder = order.rows_by_shard, order.cache_by_shard, order.vocabulary_by_shard
    return _reordered(arrays, division, spec, *reorder)


def _reordered(
    arrays: dict[str, np.ndarray],
    division: Division,
    spec: EmbeddingSpec,
    reorder_rows: Callable,
    reorder_cache: Callable,
    reorder_vocabulary: Callable,
) -> dict[str, np.ndarray]:
    if division.shards == 1:
        return arrays
    placed = layout(division, spec)
    result = dict(arrays)
    for name, array in arrays.items():
        if _is_by_row(name, array):
            result[name] = reorder_rows(placed, array)
    for prefix, names, reorder in (
        ("cache.", residency.ARRAYS, reorder_cache),
        ("vocabulary.", pool.ARRAYS, reorder_vocabulary),
    ):
        held = {name: arrays[prefix + name] for name in names if prefix + name in arrays}
        if held:
            result |= {prefix + name: array for name, array in reorder(placed, held).items()}
    return result


def num_rows(division: Division, spec: EmbeddingSpec) -> int:
    """Returns the number of rows of all shards together, padding included."""
    return division.shards * layout(division, spec).num_rows


def layout(division: Division, spec: EmbeddingSpec) -> Layout:
    """Returns the layout of arrays with this division. The layout has no mesh."""
    tables = division.table_shards
    placement = Placement() if tables is None else Placement("tables", table_shards=tables)
    return Layout.bare(spec, placement, division.shards)
