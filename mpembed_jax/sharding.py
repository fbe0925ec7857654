"""Beside the verbs over a mesh: moving a state between layouts.

The verbs themselves (prefetch, lookup, apply_gradients, read, flush) take sharded states as they take others; see `init`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mpembed_jax import cache as caching
from mpembed_jax import evaluation
from mpembed_jax.cache import CacheState
from mpembed_jax.layout import Layout
from mpembed_jax.placement import Placement
from mpembed_jax.state import EmbeddingState, partition_specs
from mpembed_jax.table import NO_ID


def relayout(
    state: EmbeddingState,
    *,
    mesh: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    placement: Placement | None = None,
) -> EmbeddingState:
    """Moves a state to another number of devices or another placement; training goes on with the same rows.

    Between rows by MOD, replicated and one device everything moves: packed rows, lines, tags, sketches, row state, and
    training goes on as it would have. To or from whole tables per shard, whose cache sets are others, dirty lines are
    written to the table first (rounded, as by `flush`) and the cache starts empty.

    Args:
      state: concrete; not consumed.
      mesh: as in init; None: one device.
      axis_name: as in init.
      placement: as in init.

    Returns:
      The state, over the new mesh.

    Raises:
      ValueError: if the stack cannot be divided so.
    """
    old, new = state.layout, Layout.of(state.spec, mesh, axis_name, placement)
    is_other = (old.table_shards if old else None) != (new.table_shards if new else None)

    def move(state: EmbeddingState) -> EmbeddingState:
        if is_other:
            state = evaluation.flush(state)

        def by_row(rows: jax.Array) -> jax.Array:
            rows = rows if old is None else old.in_order(rows)
            return rows if new is None else new.by_shard(rows)

        cache = state.cache
        if cache is not None:
            geometry = state.spec.cache.geometry(state.spec.num_rows)  # type: ignore[union-attr]
            if is_other:
                cache = caching.init(geometry, cache.policy, state.spec.embedding_dim)
            elif old is not None:
                cache = _in_order(cache, old.shards)
            cache = cache if new is None else _by_shard(cache, new.shards)
        moved = dataclasses.replace(
            state,
            table=dataclasses.replace(state.table, rows=by_row(state.table.rows)),
            cache=cache,
            row_state=jax.tree.map(lambda leaf: by_row(leaf) if leaf.ndim else leaf, state.row_state),
            layout=new,
        )
        return dataclasses.replace(moved, fingerprint=jnp.asarray(moved.expected_fingerprint))

    if new is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        # Gathered by a program over the old mesh, then taken from it: one program runs on one set of devices.
        return jax.device_put(jax.jit(move)(state), here)
    abstract = jax.eval_shape(move, state)
    shardings = jax.tree.map(partial(NamedSharding, mesh), partition_specs(abstract))
    return jax.device_put(jax.jit(move)(state), shardings)


def _in_order(cache: CacheState, shards: int) -> CacheState:
    """Returns the cache of one device that the caches of `shards` shards are together."""
    sets = cache.geometry.sets

    def by_set(array: jax.Array) -> jax.Array:
        split = array.reshape(shards, sets // shards, -1, *array.shape[1:])
        return jnp.swapaxes(split, 0, 1).reshape(array.shape)

    shard = jnp.repeat(jnp.arange(shards, dtype=jnp.int32), sets // shards)[:, None]
    tags = jnp.where(cache.tags == NO_ID, NO_ID, cache.tags * shards + shard)
    sketch = cache.sketch
    if sketch is not None:
        split = sketch.reshape(sketch.shape[0], shards, -1, sketch.shape[2])
        sketch = jnp.swapaxes(split, 1, 2).reshape(sketch.shape)
    return dataclasses.replace(
        cache, tags=by_set(tags), priority=by_set(cache.priority), dirty=by_set(cache.dirty), rows=by_set(cache.rows),
        sketch=sketch, groups=cache.groups * shards,
    )  # fmt: skip


def _by_shard(cache: CacheState, shards: int) -> CacheState:
    """Returns the caches of `shards` shards, one after another, that the cache of one device is together."""
    sets = cache.geometry.sets

    def by_set(array: jax.Array) -> jax.Array:
        split = array.reshape(sets // shards, shards, -1, *array.shape[1:])
        return jnp.swapaxes(split, 0, 1).reshape(array.shape)

    tags = jnp.where(cache.tags == NO_ID, NO_ID, cache.tags // shards)
    sketch = cache.sketch
    if sketch is not None:
        split = sketch.reshape(sketch.shape[0], -1, shards, sketch.shape[2])
        sketch = jnp.swapaxes(split, 1, 2).reshape(sketch.shape)
    return dataclasses.replace(
        cache, tags=by_set(tags), priority=by_set(cache.priority), dirty=by_set(cache.dirty), rows=by_set(cache.rows),
        sketch=sketch, groups=cache.groups // shards,
    )  # fmt: skip
