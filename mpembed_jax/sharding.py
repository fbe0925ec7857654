"""Tools for stacks over a mesh: placements, moves between layouts, ids of very large stacks.

The verbs (prefetch, lookup, apply_gradients, read, flush) take sharded states like any others; see
`init`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mpembed_jax import row_ids
from mpembed_jax.arrays import huge_pages
from mpembed_jax.cache import residency
from mpembed_jax.embedding import arguments, evaluation
from mpembed_jax.embedding.state import EmbeddingState, check_spec, partition_specs
from mpembed_jax.mesh import order
from mpembed_jax.mesh.layout import Layout, undivided
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, offsets
from mpembed_jax.vocabulary import pool


def relayout(
    state: EmbeddingState,
    *,
    mesh: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    placement: Placement | None = None,
) -> EmbeddingState:
    """Moves a state to another number of devices or another placement.

    Training continues with the same rows. If neither placement puts whole tables on shards,
    everything moves: packed rows, lines, tags, sketches, row state and vocabulary. Training then
    continues exactly as it would have without the move. With whole tables per shard, the cache sets
    hold other rows. When a state moves to or from such a placement, dirty lines are therefore first
    written to the table (rounded, as by `flush`), and the cache starts empty.

    Args:
      state: concrete; not consumed.
      mesh: as in init; None for one device.
      axis_name: as in init.
      placement: as in init.

    Returns:
      The state over the new mesh.

    Raises:
      TypeError: if state has another type.
      ValueError: if the state was donated, made for another spec, or averaged, or if the stack
        cannot be divided in this way.
    """
    arguments.check_state("relayout(state, *, mesh, axis_name, placement)", state)
    state.check_spec()
    new = Layout.of(state.spec, mesh, axis_name, placement)
    if new is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        # One program runs on one set of devices. A program over the old mesh therefore gathers the
        # arrays before they are copied to one device.
        return huge_pages.place(jax.device_put(_moved(state, new), here))
    abstract = jax.eval_shape(partial(_moved, new=new), state)
    shardings = jax.tree.map(partial(NamedSharding, mesh), partition_specs(abstract))
    return huge_pages.place(jax.device_put(_moved(state, new), shardings))


def on_one_device(
    call: str, state: EmbeddingState, move: Callable[[EmbeddingState], EmbeddingState]
) -> EmbeddingState:
    """Returns move(state); a state over a mesh is brought to one device for it, and back.

    Args:
      call: the call of the user, for messages.
      state: not consumed, unless it is on one device and `move` consumes it.
      move: takes a state on one device and returns one.

    Raises:
      TypeError: if state has another type, or if a state over a mesh is traced.
      ValueError: if the state was donated, if several processes hold parts of it, or if it was made
        inside jax.pmap.
    """
    arguments.check_state(call, state)
    layout = state.layout
    if layout is None:
        return move(state)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
        raise TypeError(f"{call} moves a state over a mesh on one device and cannot be traced")
    if layout.mesh is None:
        raise ValueError(f"{call}: this state was made inside jax.pmap and has no mesh")
    if not state.key.is_fully_addressable:
        raise ValueError(
            f"{call}: this state is divided over several processes: save it, and restore and move "
            "it in one process"
        )
    moved = move(relayout(state))
    return relayout(
        moved, mesh=layout.mesh, axis_name=layout.axes or None, placement=layout.placement
    )


@partial(jax.jit, static_argnames="new")
def _moved(state: EmbeddingState, new: Layout | None) -> EmbeddingState:
    """Returns the state with its arrays in the order of another layout."""
    old = state.layout
    is_other = (old.table_shards if old else None) != (new.table_shards if new else None)
    if is_other:
        state = evaluation.flush(state)

    def by_row(rows: jax.Array) -> jax.Array:
        rows = rows if old is None else order.rows_by_id(old, rows)
        return rows if new is None else order.rows_by_shard(new, rows)

    cache = state.cache
    if cache is not None:
        assert state.spec.cache is not None
        geometry = state.spec.cache.geometry(state.spec.num_rows)
        if is_other:
            cache = residency.init(geometry, cache.policy, state.spec.embedding_dim)
        fields = {name: getattr(cache, name) for name in residency.ARRAYS}
        if old is not None and not is_other:
            fields = order.cache_by_id(old, fields)
        if new is not None:
            fields = order.cache_by_shard(new, fields)
        groups = (geometry if new is None else new.share(geometry)).groups
        cache = dataclasses.replace(cache, **fields, groups=groups)
    vocabulary = state.vocabulary
    if vocabulary is not None:
        fields = {name: getattr(vocabulary, name) for name in pool.ARRAYS}
        if old is not None:
            fields = order.vocabulary_by_id(old, fields)
        if new is not None:
            fields = order.vocabulary_by_shard(new, fields)
        before, after = (1 if layout is None else layout.shards for layout in (old, new))
        vocabulary = dataclasses.replace(
            vocabulary,
            **fields,
            groups=vocabulary.groups * before // after,
            first_sets=vocabulary.first_sets * before // after,
        )
    moved = dataclasses.replace(
        state,
        vocabulary=vocabulary,
        table=dataclasses.replace(state.table, rows=by_row(state.table.rows)),
        cache=cache,
        row_state=jax.tree.map(lambda leaf: by_row(leaf) if leaf.ndim else leaf, state.row_state),
        layout=new,
    )
    return dataclasses.replace(moved, fingerprint=jnp.asarray(moved.expected_fingerprint))


def plan(
    spec: EmbeddingSpec,
    num_shards: int,
    batches: Iterable[Any] = (),
    *,
    replicate_bytes: int = 1 << 20,
    margin: float = 1.1,
) -> Placement:
    """Chooses a placement for a stack from its size and the skew of sample batches.

    A small stack (at most replicate_bytes) is replicated. So is a stack whose cache or pool cannot
    be divided. Every device then does all of the work on the table, but only ids and gradients
    travel. Other stacks are divided by rows (MOD) or by whole tables. Whole tables are chosen if
    two conditions hold: the busiest owner serves fewer ids than with MOD, and the allocated rows
    exceed the used rows by at most a tenth. Tables are placed on shards from the largest to the
    smallest. The exchange gets the room that the fullest (device, owner) pair of the samples
    needed, times `margin`.

    Args:
      spec: the stack.
      num_shards: P, the number of devices along the sharding axis. Batches are divided over the
        same devices.
      batches: nests of int32 host arrays of global ids, whole batches. Without any, the skew is
        unknown, and rows go by MOD with the default room.
      replicate_bytes: a stack is replicated if its packed rows take at most this many bytes.
      margin: factor on the measured room, at least 1.

    Returns:
      A Placement.

    Raises:
      TypeError: if spec or num_shards has another type.
      ValueError: if margin or num_shards is below 1, a batch does not divide over the devices, or
        batches are given for a stack with a vocabulary.
    """
    check_spec("sharding.plan(spec, num_shards, batches)", spec)
    if isinstance(num_shards, bool) or not isinstance(num_shards, int | np.integer):
        raise TypeError(f"num_shards must be a number of devices, got {num_shards!r}")
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}")
    if margin < 1:
        raise ValueError(f"margin must be at least 1, got {margin}")
    num_bytes = spec.num_rows * spec.storage.row_bytes(spec.embedding_dim)
    if num_bytes <= replicate_bytes or undivided(spec, num_shards):
        return Placement("replicated")
    candidates = {"rows": Layout.bare(spec, Placement("rows"), num_shards)}
    if spec.num_rows < NO_ID and spec.vocabulary is None:
        tables = Layout.bare(spec, Placement("tables"), num_shards)
        if tables.num_rows * num_shards <= 1.1 * spec.num_rows:
            candidates["tables"] = tables
    shares = {kind: 0.0 for kind in candidates}
    for batch in batches:
        if spec.vocabulary is not None:
            raise ValueError(
                "batches show the skew of row numbers, and this stack has a vocabulary, whose ids "
                "go to shards by their hash; leave batches out"
            )
        for kind, layout in candidates.items():
            shares[kind] = max(shares[kind], _largest_share(layout, batch))
    kind = min(shares, key=lambda kind: (shares[kind], kind))
    capacity = shares[kind] * num_shards * margin
    placement = candidates[kind].placement
    return dataclasses.replace(placement, capacity=capacity) if capacity else placement


def _largest_share(layout: Layout, batch: Any) -> float:
    """Returns the most ids that a device sends to one owner, as a share of the device's budget."""
    leaves = [row_ids.on_host(leaf) for leaf in jax.tree.leaves(batch)]
    devices = layout.shards
    spec = layout.spec
    if any(leaf.ndim == 0 or leaf.shape[0] % devices for leaf in leaves):
        raise ValueError(
            f"batches must divide over {devices} devices, got {[leaf.shape for leaf in leaves]}"
        )
    largest = 0.0
    for parts in zip(*(np.split(leaf, devices) for leaf in leaves), strict=True):
        flat = np.concatenate([part.reshape(-1) for part in parts])
        ids = np.unique(flat[(flat >= 0) & (flat < spec.num_rows)]).astype(np.int64)
        budget = flat.size if spec.max_unique_ids is None else min(spec.max_unique_ids, flat.size)
        if layout.table_shards is None:
            owner = ids % devices
        else:
            owner = np.asarray(layout.table_shards)[
                np.searchsorted(offsets(spec.tables)[1:], ids, side="right")
            ]
        largest = max(largest, np.bincount(owner, minlength=1).max(initial=0) / max(1, budget))
    return largest


def pairs(state: EmbeddingState, ids: Any) -> Any:
    """Returns ids of a stack of any size as pairs (shard, local row).

    They are computed on the host in 64 bits. prefetch and read take them for a sharded stack of
    2**31 - 1 rows or more.

    Args:
      state: sharded; concrete or abstract.
      ids: {feature: integers [..]} or integers [.., T], local to their tables, on the host. NO_ID
        is padding.

    Returns:
      int32 [.., 2] for each array, in the same nesting.

    Raises:
      KeyError: if a feature is unknown.
      TypeError: if state has another type, or ids are not integers.
      ValueError: if the last axis is not T; if ids lie outside their table and out_of_range is
        "raise"; or if the stack takes plain ids.
    """
    arguments.expect("pairs(state, ids)", "state", state, EmbeddingState, "from init")
    layout = state.layout
    if layout is None:
        raise ValueError(
            "pairs makes ids for a stack that is divided over a mesh, but this state is not divided"
        )

    def split(rows: np.ndarray) -> np.ndarray:
        is_row = (rows >= 0) & (rows < spec.num_rows)
        shard = np.where(is_row, rows % layout.shards, layout.shards)
        row = np.where(is_row, rows // layout.shards, np.where(rows < 0, NO_ID, NO_ID - 1))
        return np.stack([shard, row], axis=-1).astype(np.int32)

    spec = layout.spec
    if not layout.is_paired:
        raise ValueError(
            f"a stack of {spec.num_rows} rows takes plain int32 ids, as spec.global_ids makes them"
        )
    return jax.tree.map(split, spec.global_ids(ids))
