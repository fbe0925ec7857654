"""Writing single rows: pretrained vectors, rows that are reset."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from mpembed_jax import row_ids
from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.cache import residency
from mpembed_jax.embedding import arguments
from mpembed_jax.embedding.counters import count_change, count_updates
from mpembed_jax.embedding.state import EmbeddingState, over_mesh
from mpembed_jax.numerics import random_bits
from mpembed_jax.optim import row_state
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import encode_rows

_BLOCK = 8192  # rows packed at once


def write_rows(
    state: EmbeddingState,
    ids: Any,
    rows: jax.Array,
    *,
    tx: optax.GradientTransformation | None = None,
) -> EmbeddingState:
    """Gives rows new values.

    A cached row is written to its line in float32. Any other row is rounded into the table by the
    rule of its format, as from_dense rounds it. Donate the state; otherwise, the call copies the
    table. Call write_rows between steps. If a prefetch waits for its update, nothing is written:
    the call raises an error if `state.pending` is concrete, and counts as a refused update if it is
    traced.

    Args:
      state: consumed if donated. A sharded state may be whole, or inside jax.shard_map, where all
        devices pass the same ids and rows.
      ids: int32 [..], global ids. NO_ID, and ids outside the stack, write nothing. If an id
        occurs several times, its last row counts.
      rows: float [.., D], one for each of the ids.
      tx: the transformation given to init: the optimizer state of these rows is reset. Scalars of
        the state, such as counts, stay. None: the optimizer state stays.

    Returns:
      The state.

    Raises:
      TypeError: if state has another type, ids are not integers of 32 bits or fewer, or rows are
        not floating or have a mask.
      ValueError: if a shape is wrong; if a prefetch is known to wait for its update; if the state
        was donated, made for another spec or transformation, or averaged; or if the stack has
        2**31 - 1 rows or more, or a vocabulary.
    """
    arguments.check_state("write_rows(state, ids, rows)", state)
    state.check_spec()
    if state.vocabulary is not None:
        raise ValueError(
            "write_rows takes row numbers, and this state has a vocabulary, whose rows change "
            "their owners; train raw ids with prefetch and apply_gradients, or number the ids"
        )
    (ids,) = row_ids.checked([ids])[0]
    row_ids.check_no_mask("rows", rows)
    rows = jnp.asarray(rows)
    shape = ids.shape
    dim = state.spec.embedding_dim
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise TypeError(f"rows must be floating [.., D], got {rows.dtype} {list(rows.shape)}")
    if rows.shape[:-1] != shape or rows.shape[-1:] != (dim,):
        raise ValueError(
            f"rows must be {[*shape, dim]}, one for each of the ids, got {list(rows.shape)}"
        )
    if state.layout is not None and state.layout.is_paired:
        raise ValueError(
            f"write_rows cannot write to this stack: its {state.spec.num_rows} rows need ids as "
            "pairs; divide its tables into stacks of fewer than 2**31 - 1 rows"
        )
    if not isinstance(state.pending, jax.core.Tracer) and bool(state.pending):
        raise ValueError(
            "write_rows was called between prefetch and apply_gradients, whose update would "
            "overwrite the rows; call it between steps"
        )
    rows = rows.astype(jnp.float32).reshape(-1, dim)
    return _write(state, *_distinct(ids.reshape(-1), rows), tx=tx)


def _distinct(ids: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorts ids [N] and their rows, and replaces all but the last occurrence of an id by NO_ID."""
    position = jnp.arange(ids.shape[0], dtype=jnp.int32)
    ids, order = lax.sort((ids, position), num_keys=1, is_stable=True)
    is_last = jnp.append(ids[1:] != ids[:-1], jnp.ones(min(1, ids.shape[0]), bool))
    return jnp.where(is_last, ids, NO_ID), indexing.take(rows, order)


def _write(
    state: EmbeddingState,
    ids: jax.Array,
    rows: jax.Array,
    tx: optax.GradientTransformation | None,
) -> EmbeddingState:
    layout = state.layout
    if layout is not None and not layout.is_bound:
        everywhere = PartitionSpec()
        write = partial(_write, tx=tx)
        return over_mesh(write, state, everywhere, everywhere)(state, ids, rows)
    is_pending = jnp.asarray(state.pending)
    is_written = row_ids.in_range(ids, state.spec.num_rows) & ~is_pending
    here = jnp.where(is_written, ids, NO_ID)
    if layout is not None:
        here = jnp.where(is_written, layout.shard(layout.index()).rows_of(ids), NO_ID)
    states = state.row_state
    if tx is not None:
        dim, dtype = state.spec.embedding_dim, state.spec.row_state_dtype
        states = row_state.reset(tx, states, here, dim, dtype)
    cache = state.cache
    if cache is not None:
        line = residency.locate(cache, here)
        num_lines = cache.geometry.lines
        lines = indexing.put(cache.rows, line, rows)
        cache = dataclasses.replace(residency.commit(cache, line), rows=lines)
        here = jnp.where(line < num_lines, NO_ID, here)

    def store(window: chunks.Window, packed: jax.Array) -> jax.Array:
        to = jnp.where(window.is_live, window.take(here), NO_ID)
        draw = (state.row_key, random_bits.INITIAL_ROUNDING, state.step)
        return indexing.put(packed, to, encode_rows(window.take(rows), to, state.table, *draw))

    num_ids = ids.shape[0]
    packed = chunks.each(0, num_ids, num_ids, _BLOCK, store, state.table.rows)
    counters = count_updates(state.counters, jnp.int32(0), is_pending)
    return dataclasses.replace(
        state,
        table=dataclasses.replace(state.table, rows=packed),
        cache=cache,
        row_state=states,
        counters=count_change(counters, jnp.any(is_written)),
    )
