"""The layout of a stack over devices: which shard owns an id, its local row, and the batch axes.

A stack is laid out in one of three ways:
- By MOD: row r of the stack is row r div P of shard r mod P. This is the usual convention. It keeps
  every cache set and every sketch group whole on one shard.
- By tables: each table is whole on one shard.
- Replicated: every device has all rows.

Inside a shard, a row is named by its local row everywhere, also in tags. The one exception is the
drawing of random bits, which depends on the global id. The state of one device and the state of P
devices therefore hold the same rows, for any P.
"""

import dataclasses
import hashlib
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from mpembed_jax.cache.spec import Geometry
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.mesh.shard import Shard
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, offsets, size_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """A placement on a given mesh. It is static and hashable. `Layout.of` makes it."""

    spec: EmbeddingSpec
    placement: Placement
    axes: tuple[str, ...]  # mesh axes over which rows are divided; empty if replicated
    shards: int  # P, the product of the sizes of `axes`
    batch_axes: tuple[str, ...]  # mesh axes over which batches are divided
    batch_shards: int  # the product of the sizes of `batch_axes`
    mesh: Any  # None inside jax.pmap
    table_shards: tuple[int, ...] | None  # the shard of each table; None if rows go by MOD

    @staticmethod
    def of(
        spec: EmbeddingSpec, mesh: Any, axis_name: Any, placement: Placement | None
    ) -> "Layout | None":
        """Returns the layout for `init`'s arguments, or None for one device without a mesh.

        Args:
          spec: the stack.
          mesh: as in init.
          axis_name: as in init.
          placement: as in init.

        Raises:
          TypeError: if mesh is neither None nor a jax mesh.
          ValueError: if the mesh lacks an axis that an argument names, or if the stack cannot be
            divided over this mesh with this placement.
        """
        if mesh is None and axis_name is None:
            if placement is not None:
                raise ValueError(
                    "placement needs mesh= (or axis_name= inside jax.pmap): without a mesh there "
                    "is only one device"
                )
            if spec.num_rows >= NO_ID:
                raise ValueError(
                    "one device holds at most 2**31 - 2 rows of a stack, but these tables have "
                    f"{spec.num_rows}; divide the stack over a mesh, or make two stacks"
                )
            return None
        if not isinstance(placement, Placement | None):
            raise TypeError(f"placement must be a Placement, got {placement!r}")
        if not isinstance(axis_name, str | tuple | list | None):
            raise TypeError(f"axis_name must be the name of a mesh axis, got {axis_name!r}")
        placement = Placement() if placement is None else placement
        if mesh is not None and not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
            raise TypeError(
                f"mesh must be a jax.sharding.Mesh (jax.make_mesh), got {type(mesh).__name__}"
            )
        _check_axis_types(mesh)
        if mesh is None:
            assert axis_name is not None  # see the first lines
            names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
            sizes = {name: _bound_size(name) for name in names}
        else:
            sizes = dict(mesh.shape)
            if axis_name is None and len(sizes) > 1 and placement.kind != "replicated":
                raise ValueError(
                    f"the mesh has several axes {tuple(sizes)}: name the one that divides rows, "
                    "axis_name=.."
                )
            names = (
                tuple(sizes)
                if axis_name is None
                else (axis_name,)
                if isinstance(axis_name, str)
                else tuple(axis_name)
            )
        batch_axes = tuple(sizes) if placement.batch_axes is None else placement.batch_axes
        unknown = [name for name in (*names, *batch_axes) if name not in sizes]
        if unknown:
            raise ValueError(f"no mesh axis {unknown[0]!r}; the mesh has {tuple(sizes)}")
        axes = () if placement.kind == "replicated" else names
        if len({name in batch_axes for name in axes}) > 1:
            raise ValueError(
                f"batch_axes {batch_axes} must name all of the sharding axes {axes} or none"
            )
        shards = math.prod(sizes[name] for name in axes)
        batch_shards = math.prod(sizes[name] for name in batch_axes)
        if (
            spec.cache is not None
            and (groups := spec.cache.geometry(spec.num_rows).groups) % shards
        ):
            geometry = spec.cache.geometry(spec.num_rows)
            raise ValueError(
                f"the cache's {geometry.sets} sets cannot be divided evenly over {shards} shards; "
                "possible numbers of shards are "
                f"{_alternatives([n for n in range(1, groups + 1) if groups % n == 0])}. "
                "Replicate this stack, "
                'Placement("replicated"), or use a power of two of at most 64 shards, with at '
                "least 8 sets for each"
            )
        _check_pool(spec, shards)
        blocks = placement.summation_blocks
        if blocks is not None and blocks % batch_shards:
            raise ValueError(
                f"summation_blocks={blocks} must be a multiple of the {batch_shards} devices of a "
                "batch"
            )
        if blocks is not None and batch_axes != (
            *(name for name in batch_axes if name not in axes),
            *axes,
        ):
            raise ValueError(
                f"with summation_blocks, batch_axes must end with the sharding axes {axes}, got "
                f"{batch_axes}"
            )
        if spec.num_rows >= NO_ID and any(t.initializer is not None for t in spec.tables):
            raise ValueError(
                f"a stack of {spec.num_rows} rows cannot use initializer functions, because they "
                "are called on blocks of whole tables"
            )
        tables = _table_shards(spec, placement, shards)
        layout = Layout(spec, placement, axes, shards, batch_axes, batch_shards, mesh, tables)
        if layout.num_rows >= NO_ID:
            raise ValueError(
                f"a shard holds at most 2**31 - 2 rows, but {spec.num_rows} rows on {shards} "
                f"shards give each {layout.num_rows}; use more shards or several stacks"
            )
        return layout

    @staticmethod
    def bare(spec: EmbeddingSpec, placement: Placement, shards: int) -> "Layout":
        """Returns a layout over `shards` hypothetical devices, for planning."""
        tables = _table_shards(spec, placement, shards)
        return Layout(spec, placement, ("shards",), shards, ("shards",), shards, None, tables)

    @property
    def fingerprint(self) -> np.ndarray:
        """A hash (uint32 [2]) of the number of shards and the shard of each table.

        For one shard, the hash is zero.
        """
        if self.shards == 1:
            return np.zeros(2, np.uint32)
        text = repr((self.shards, self.table_shards))
        return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4").astype(
            np.uint32
        )

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """Axes that divide batches but not rows.

        All devices along these axes hold the same shard and apply the same updates to it.
        """
        return tuple(name for name in self.batch_axes if name not in self.axes)

    @property
    def replicas(self) -> int:
        """The number of devices along the replica axes."""
        # Either all sharding axes divide batches, or no sharding axis does.
        return self.batch_shards // (self.shards if self.is_batch_divided else 1)

    @property
    def is_batch_divided(self) -> bool:
        """Whether the sharding axes divide batches, too.

        If they do not, all devices along the sharding axes have the same ids.
        """
        return all(name in self.batch_axes for name in self.axes)

    @property
    def all_axes(self) -> tuple[str, ...]:
        """All mesh axes over which the verbs communicate."""
        return (*self.axes, *self.replica_axes)

    @property
    def num_rows(self) -> int:
        """The number of rows in one shard's arrays, padding included."""
        if self.table_shards is None:
            return -(-self.spec.num_rows // self.shards)
        sizes = [0] * self.shards
        for table, shard in zip(self.spec.tables, self.table_shards, strict=True):
            sizes[shard] += size_of(table)
        return max(sizes)

    def share(self, geometry: Geometry) -> Geometry:
        """Returns the geometry of one shard's cache: its share of all sets and groups."""
        return Geometry(geometry.sets // self.shards, geometry.ways, geometry.groups // self.shards)

    @property
    def is_paired(self) -> bool:
        """Whether ids are pairs (shard, local row).

        In a stack of NO_ID rows or more, ids do not fit into int32, so they are pairs.
        """
        return self.spec.num_rows >= NO_ID

    def shape_of(self, ids: jax.Array) -> tuple[int, ...]:
        """Returns the shape of ids, without the last axis (of size 2) if they are pairs.

        Raises:
          ValueError: if ids must be pairs but are not.
        """
        if self.is_paired and (not ids.ndim or ids.shape[-1] != 2):
            raise ValueError(
                f"ids of a stack of {self.spec.num_rows} rows must be pairs int32 [.., 2], got "
                f"{list(ids.shape)}; make them with sharding.pairs(state, ids)"
            )
        return ids.shape[:-1] if self.is_paired else ids.shape

    @property
    def is_bound(self) -> bool:
        """True inside a jax.shard_map or jax.pmap over all axes of this layout."""
        return set(self.all_axes) <= set(jax.sharding.get_abstract_mesh().manual_axes)

    def check_bound(self, verb: str) -> None:
        """Raises ValueError outside jax.shard_map and jax.pmap."""
        if not self.is_bound:
            raise ValueError(
                f"{verb} of a sharded state runs per device: call it inside jax.shard_map over "
                f"the mesh axes {self.all_axes}, with in_specs and out_specs "
                "partition_specs(state) for the state"
            )

    def index(self) -> jax.Array:
        """Returns the number of this device's shard, i32 []."""
        return lax.axis_index(self.axes).astype(jnp.int32) if self.axes else jnp.int32(0)

    def positions(self, num_positions: int) -> Fraction:
        """Returns N / P (a fraction), where N is the number of ids in the whole batch.

        num_positions is the number of ids of one device.
        """
        return Fraction(num_positions * self.batch_shards, self.shards)

    def room(self, num_ids: int) -> int:
        """Returns how many ids a device can send to one owner, unless arrays have full width.

        num_ids is the number of unique ids of the device.
        """
        return max(1, min(num_ids, math.ceil(self.placement.capacity * num_ids / self.shards)))

    # --- rows

    @property
    def first_rows(self) -> np.ndarray:
        """int32 [P, T + 1]: the first local row of each table on each shard.

        The last entry of a shard is the shard's number of rows, without padding. If a shard has no
        row of a table, the table's entry equals the next entry.
        """
        if self.table_shards is None:
            starts = offsets(self.spec.row_tables)
            shard = np.arange(self.shards)[:, None]
            return ((starts - shard + self.shards - 1) // self.shards).astype(np.int32)
        sizes = np.zeros((self.shards, len(self.spec.tables)), np.int64)
        for number, table in enumerate(self.spec.tables):
            sizes[self.table_shards[number], number] = size_of(table)
        return np.cumsum(np.pad(sizes, ((0, 0), (1, 0))), axis=1).astype(np.int32)

    def home_of(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns shard and local row (int32 [..] each) of global ids [..] or pairs [.., 2].

        For the id NO_ID, the shard is P and the local row is NO_ID.
        """
        if self.is_paired:
            return ids[..., 0], ids[..., 1]
        is_id = ids != NO_ID
        if self.table_shards is None:
            shard, row = ids % jnp.int32(self.shards), ids // jnp.int32(self.shards)
        else:
            starts = jnp.asarray(offsets(self.spec.tables)[:-1], jnp.int32)
            others = starts[1:].reshape(*[1] * ids.ndim, -1)
            table = jnp.sum((ids[..., None] >= others).astype(jnp.int32), axis=-1)
            shards = np.asarray(self.table_shards)
            first = self.first_rows[shards, np.arange(len(shards))]
            shard = jnp.asarray(shards, jnp.int32)[table]
            row = ids - starts[table] + jnp.asarray(first)[table]
        return jnp.where(is_id, shard, self.shards), jnp.where(is_id, row, NO_ID)

    def table_slices(self) -> list[tuple[int, int]]:
        """Returns each table's first row and its number of rows.

        The first row is an index into the concatenated arrays of all shards. Call this method only
        if each table is whole on one shard (table_shards is not None).
        """
        first = self.first_rows
        shards = self.table_shards or ()
        return [
            (shard * self.num_rows + int(first[shard, number]), size_of(table))
            for number, (table, shard) in enumerate(zip(self.spec.tables, shards, strict=True))
        ]

    def shard(self, index: jax.Array | int) -> Shard:
        """Returns the shard number `index`. The number may be traced."""
        return Shard(self, jnp.asarray(index, jnp.int32), jnp.asarray(self.first_rows)[index])


def _check_pool(spec: EmbeddingSpec, shards: int) -> None:
    """Raises ValueError if the sets of a stack's pool of rows cannot be divided over shards."""
    if spec.vocabulary is None or spec.vocabulary.geometry.groups % shards == 0:
        return
    sets, _, groups = spec.vocabulary.geometry
    possible = _alternatives([n for n in range(1, groups + 1) if groups % n == 0])
    raise ValueError(
        f"the {sets} sets of the vocabulary's pool cannot be divided evenly over {shards} shards; "
        f"possible numbers of shards are {possible}; "
        'replicate this stack, Placement("replicated"), or give its VocabularySpec more rows or '
        "fewer ways: a shard needs at least 8 sets"
    )


def _alternatives(numbers: list[int]) -> str:
    """Returns numbers as text, such as "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _check_axis_types(mesh: Any) -> None:
    """Raises ValueError if an axis of the mesh is not of type Auto. None stands for no mesh."""
    types = () if mesh is None else mesh.axis_types
    if any(kind != AxisType.Auto for kind in types):
        sizes, names = tuple(mesh.shape.values()), tuple(mesh.shape)
        raise ValueError(
            f"the mesh has axes of the types {types}, as jax.make_mesh makes them by default, but "
            "a stack is divided over axes of the type Auto only; make the mesh with\n"
            f"  jax.make_mesh({sizes}, {names}, "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(names)})"
        )


def _bound_size(name: str) -> int:
    try:
        return lax.axis_size(name)
    except NameError:
        raise ValueError(
            f"axis_name={name!r} without mesh= is only for calling init inside jax.pmap(.., "
            f"axis_name={name!r}); pass mesh="
        ) from None


def _table_shards(spec: EmbeddingSpec, placement: Placement, shards: int) -> tuple[int, ...] | None:
    """Returns the shard of each table, or None if rows go by MOD."""
    if placement.kind != "tables":
        return None
    if spec.vocabulary is not None:
        raise ValueError(
            "the tables of a stack with a vocabulary share one pool of rows, so none can be whole "
            'on a shard; use Placement("rows") or Placement("replicated")'
        )
    if spec.num_rows >= NO_ID:
        raise ValueError(
            f"whole tables per shard need a stack of fewer than 2**31 - 1 rows, got {spec.num_rows}"
        )
    if placement.table_shards is None:
        loads = [0] * shards
        chosen = {}
        for number in sorted(range(len(spec.tables)), key=lambda n: -size_of(spec.tables[n])):
            chosen[number] = loads.index(min(loads))
            loads[chosen[number]] += size_of(spec.tables[number])
        return tuple(chosen[n] for n in range(len(spec.tables)))
    if len(placement.table_shards) != len(spec.tables) or not all(
        0 <= s < shards for s in placement.table_shards
    ):
        raise ValueError(
            f"table_shards must give one shard in [0, {shards}) for each of {len(spec.tables)} "
            f"tables, got {placement.table_shards}"
        )
    return placement.table_shards


def undivided(spec: EmbeddingSpec, shards: int) -> str:
    """Returns "cache" or "pool" if its groups cannot be divided over so many shards, else ""."""
    cache, pool = spec.cache, spec.vocabulary
    if cache is not None and cache.geometry(spec.num_rows).groups % shards:
        return "cache"
    return "pool" if pool is not None and pool.geometry.groups % shards else ""
