"""Reading rows for evaluation, flushing the cache, and freezing the table."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import ops, row_ids
from mpembed_jax.embedding import admission, arguments
from mpembed_jax.embedding.state import EmbeddingState, over_batch, over_mesh
from mpembed_jax.mesh import exchange, order, requests
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable, read_rows


def read(state: EmbeddingState | QuantizedTable, ids: Any) -> Any:
    """Reads the rows of ids for evaluation; the state does not change.

    A cached row is read from its float32 line. Any other row is read from the table. A sharded
    state can be read inside jax.shard_map, where each device passes its own ids. It can also be
    read outside, where `read` divides the ids over the devices.

    Args:
      state: a state, which is not consumed, or a frozen table (see freeze).
      ids: any nest of int32 arrays of global ids. For a stack of 2**31 - 1 rows or more, pairs
        [.., 2] (see sharding.pairs). For a state with a vocabulary, pairs uint32 [.., 2] of raw ids
        (see spec.raw_ids). None of them is admitted; an unknown one reads the row it shares.

    Returns:
      float32 [.., D] for each array, in the same nesting. Padding and ids outside the table read as
      zeros. Inside jit, a state that was made for another spec, or averaged, reads as NaN.

    Raises:
      TypeError: if state is neither a state nor a table, or if ids are not integers of 32 bits or
        fewer.
      ValueError: if host ids do not fit int32, or if the state was donated. Outside jit, if the
        state was made for another spec, or averaged.
    """
    if not isinstance(state, QuantizedTable):
        arguments.check_state("read(state, ids)", state)
        if state.vocabulary is not None:
            state.check_spec()
            ids = admission.rows_of(state, ids)
    leaves, treedef = row_ids.checked(ids)
    if isinstance(state, QuantizedTable):
        return treedef.unflatten([read_rows(state, leaf) for leaf in leaves])
    state.check_spec()
    layout = state.layout
    if layout is None:
        return treedef.unflatten([_or_nan(state, _read_rows(state, leaf)) for leaf in leaves])
    shapes = [layout.shape_of(leaf) for leaf in leaves]
    width = (2,) if layout.is_paired else ()
    flat = (
        jnp.concatenate([leaf.reshape(-1, *width) for leaf in leaves])
        if leaves
        else jnp.zeros((0, *width), jnp.int32)
    )

    def read_shards(state: EmbeddingState, ids: jax.Array) -> jax.Array:
        flat = requests.masked(layout, ids)[0]
        return exchange.read(layout, flat, partial(_read_rows, state), state.implementation)

    rows = _or_nan(state, over_batch(read_shards, state, flat, NO_ID))
    ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=int)
    pieces = [rows[end - math.prod(shape) : end] for end, shape in zip(ends, shapes, strict=True)]
    return treedef.unflatten(
        [p.reshape(*shape, *rows.shape[1:]) for p, shape in zip(pieces, shapes, strict=True)]
    )


def _or_nan(state: EmbeddingState, rows: jax.Array) -> jax.Array:
    """Returns rows, or NaN if the state is traced and not sound."""
    if state.is_concrete:
        return rows  # check_spec has raised if it is not sound
    return jnp.where(state.is_sound, rows, np.float32(np.nan))


def _read_rows(state: EmbeddingState, ids: jax.Array) -> jax.Array:
    """Returns the rows of ids, which are local on a shard; ids outside the table give zeros."""
    return ops.read(state.table, state.cache, ids, implementation=state.implementation)


def flush(state: EmbeddingState) -> EmbeddingState:
    """Writes every dirty line to the table and marks it clean.

    Tags and float32 rows stay in the cache.

    Args:
      state: consumed if donated.

    Returns:
      The state.

    Raises:
      TypeError: if state has another type.
      ValueError: if the state was donated, made for another spec, or averaged.
    """
    arguments.check_state("flush(state)", state)
    state.check_spec()
    cache = state.cache
    if cache is None:
        return state
    if state.layout is not None and not state.layout.is_bound:
        return over_mesh(flush, state)(state)
    store = state.store._replace(dirty=cache.dirty.reshape(-1))
    table = ops.write_back(store, cache.tags.reshape(-1), ops.Draw(state.row_key, state.step))
    return dataclasses.replace(
        state, table=table, cache=dataclasses.replace(cache, dirty=jnp.zeros_like(cache.dirty))
    )


def freeze(state: EmbeddingState) -> QuantizedTable:
    """Returns the flushed table of a state, with its rows in the order of global ids.

    `read` accepts this table in place of a state.

    Raises:
      TypeError: if state has another type.
      ValueError: if the state was donated, made for another spec, or averaged; or if it has a
        vocabulary, because a table does not say to which raw id a row belongs.
    """
    arguments.check_state("freeze(state)", state)
    if state.vocabulary is not None:
        raise ValueError(
            "the rows of a state with a vocabulary belong to raw ids, which a frozen table does "
            "not know; evaluate with read(state, spec.raw_ids(..))"
        )
    table = flush(state).table
    layout = state.layout
    return (
        table
        if layout is None
        else dataclasses.replace(table, rows=order.rows_by_id(layout, table.rows))
    )
