"""The verbs that end a training step: exactly one optimizer update of each unique row, from gradients of rows or of vectors.

`apply_gradients` takes the gradient of the rows that lookup returned, whatever the model made of them. Where pooled vectors
are all that it sees, `apply_pooled_gradients` takes theirs, and a kernel sums and updates in one pass.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import cache as caching
from mpembed_jax import embedding, exchange, pooling
from mpembed_jax import state as states
from mpembed_jax import update as updating
from mpembed_jax.cache import CachePlan
from mpembed_jax.state import EmbeddingState
from mpembed_jax.table import NO_ID


class _Turn(NamedTuple):
    """Whether a plan may be applied, and what to; nothing where it may not."""

    is_pending: jax.Array  # bool []
    unique_ids: jax.Array  # i32 [U]
    num_cached: jax.Array  # i32 []
    num_ids: jax.Array  # i32 []


def apply_gradients(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Applies exactly one optimizer update to each unique row of the plan and stores it.

    Cached rows are written to their lines in float32, bypassed rows are stochastically rounded into the table. Donate the
    state. A plan that is not the state's latest, or was applied before, changes nothing and is counted; where that is
    known while tracing, it raises.

    Args:
      state: from prefetch; consumed where donated.
      plan: from the same prefetch.
      rows: float32 [U, D], from lookup.
      row_grads: float32 [U, D], the gradient with respect to rows.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      ValueError: on other shapes or dtypes, another tx than init's, or a second call for one prefetch.
    """
    spec, layout = state.spec, state.layout
    _check("apply_gradients", state, plan, rows=rows, row_grads=row_grads)
    turn = _begin(state, plan)
    if layout is not None:
        layout.check_bound("apply_gradients")
        rows, row_grads = embedding.gather_placed(state, plan), exchange.collect(layout, plan.route, row_grads)
    is_updated = jnp.arange(turn.unique_ids.shape[0], dtype=jnp.int32) < turn.num_ids
    num_nonfinite = jnp.int32(0)
    if spec.skip_nonfinite:
        is_finite = jnp.all(jnp.isfinite(row_grads), axis=-1)
        num_nonfinite = jnp.sum(is_updated & ~is_finite, dtype=jnp.int32)
        is_updated = is_updated & is_finite
        row_grads = jnp.where(is_updated[:, None], row_grads, jnp.float32(0))
    else:  # padding rows are read by no position, except the last one, which all padding positions share
        row_grads = row_grads.at[-1].set(0)
    line = _lines(state, plan, is_updated)
    changed = updating.apply(
        tx, state, jnp.where(is_updated, turn.unique_ids, NO_ID), line, rows, row_grads,
        turn.num_cached, turn.num_ids, plan.step, turn.is_pending,
    )  # fmt: skip
    if layout is not None:
        num_nonfinite = exchange.total_over_shards(layout, num_nonfinite)
    return _finish(state, changed, line, num_nonfinite, turn)


def apply_pooled_gradients(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    pooled_grads: Any,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Applies exactly one optimizer update to each unique row of the plan, from the gradients of pooled vectors.

    The same as differentiating `pool(rows, plan.inverse, weights, combiner, ..)` with respect to rows and calling
    `apply_gradients` with the result. Where kernels run the transformation, one kernel sums the gradients of each row,
    updates it and stores it, and no array of row gradients exists; elsewhere, and over a mesh, that very pair is called.
    Gradients with respect to weights are for jax.grad.

    Args:
      state: from prefetch; consumed where donated.
      plan: from the same prefetch.
      rows: float32 [U, D], from lookup.
      pooled_grads: nest of float32, the gradient with respect to what `pool` returned for plan.inverse; inside
        jax.shard_map it varies over the mesh as that does.
      weights: given to pool.
      combiner: given to pool.
      segment_ids: given to pool.
      num_segments: given to pool.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      ValueError: as `pool` and `apply_gradients`; on gradients of another tree, shape or dtype than pool's result.
    """
    spec, pooling_of = state.spec, (weights, combiner)
    options: dict[str, Any] = {
        "segment_ids": segment_ids, "num_segments": num_segments, "implementation": state.implementation
    }  # fmt: skip
    _check("apply_pooled_gradients", state, plan, rows=rows)
    index, factors, leaves = pooling.check_gradients(spec.embedding_dim, plan.inverse, pooled_grads, *pooling_of, **options)
    is_empty = not sum(i.size for i in index) or not sum(g.size for g in leaves)
    if state.layout is not None or not updating.has_kernel(tx, state) or is_empty:
        _, pull_back = jax.vjp(lambda rows: pooling.pool(rows, plan.inverse, *pooling_of, **options), rows)
        return apply_gradients(state, plan, rows, pull_back(pooled_grads)[0], tx=tx)
    positions = pooling.positions(rows.shape[0], index, factors, leaves, combiner, **options)
    turn = _begin(state, plan)
    *changed, is_updated = updating.apply_summed(
        tx, state, turn.unique_ids, plan.line, rows, positions, turn.num_cached, turn.num_ids, plan.step, spec.skip_nonfinite
    )
    num_nonfinite = turn.num_ids - jnp.sum(is_updated, dtype=jnp.int32)
    return _finish(state, tuple(changed), _lines(state, plan, is_updated), num_nonfinite, turn)


def _check(verb: str, state: EmbeddingState, plan: CachePlan, **arrays: jax.Array) -> None:
    """Checks the shapes and dtypes of arrays per unique row, and that the state has a prefetch waiting, if that is known."""
    expected = (plan.unique_ids.shape[0], state.spec.embedding_dim)
    for name, array in arrays.items():
        if array.shape != expected:
            raise ValueError(
                f"{name} must be float32 {expected}, one row per unique id of the plan, got {array.dtype} {array.shape}; "
                f"differentiate with respect to the rows that lookup returned"
            )
        if array.dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32 {expected}, got {array.dtype}; keep the rows in float32 and cast after"
            )
    if not isinstance(state.pending, jax.core.Tracer) and not bool(state.pending):
        raise ValueError(
            f"{verb} needs a prefetch of its own: this state has none waiting (init, or already applied); "
            f"call prefetch once before each {verb}"
        )


def _begin(state: EmbeddingState, plan: CachePlan) -> _Turn:
    is_own = jnp.all(state.fingerprint == state.expected_fingerprint)
    is_pending = state.pending & is_own & (plan.step == state.step - 1)
    unique_ids, num_cached, num_ids = plan.placed
    return _Turn(is_pending, unique_ids, jnp.where(is_pending, num_cached, 0), jnp.where(is_pending, num_ids, 0))


def _lines(state: EmbeddingState, plan: CachePlan, is_updated: jax.Array) -> jax.Array:
    """Returns the line of each row, past the last one where it is not updated."""
    return plan.line if state.cache is None else jnp.where(is_updated, plan.line, state.cache.geometry.lines)


def _finish(state: EmbeddingState, changed: tuple, line: jax.Array, num_nonfinite: jax.Array, turn: _Turn) -> EmbeddingState:
    """Returns the state after an update that made (table, cache rows, row state) of it and wrote the lines named."""
    table, cache_rows, row_state = changed
    cache = state.cache
    if cache is not None:
        cache = caching.commit(dataclasses.replace(cache, rows=cache_rows), line)
    return dataclasses.replace(
        state,
        table=table,
        cache=cache,
        row_state=row_state,
        pending=np.False_,
        counters=states.count_updates(state.counters, num_nonfinite, ~turn.is_pending),
    )
