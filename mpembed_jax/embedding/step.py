"""The training step: prefetch, lookup, apply_gradients, and apply_pooled_gradients for who has gradients of vectors.

One `EmbeddingState` holds a stack of tables that share dim, format and cache. prefetch plans and swaps, lookup gathers the
unique rows, and after the user's gradient apply_gradients updates each unique row once: in its FP32 line where it is cached,
else stochastically rounded in the table. The system follows Yang et al., "Mixed-Precision Embedding Using a Cache"
(arXiv 2010.11305). The verbs are pure; jit them with the state donated. What a mesh adds is in `mesh.exchange`.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import ops, row_ids
from mpembed_jax.cache import residency
from mpembed_jax.cache.plan import CachePlan, Counts
from mpembed_jax.embedding import arguments, pooling, update
from mpembed_jax.embedding.counters import count_step, count_updates
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.mesh import exchange
from mpembed_jax.ops import Draw, Moves, Request
from mpembed_jax.row_ids import NO_ID


def prefetch(state: EmbeddingState, ids: Any) -> tuple[EmbeddingState, CachePlan]:
    """Plans a batch and brings its rows into the cache: unique ids, hits, victims written back, newcomers filled.

    Exactly one apply_gradients follows each prefetch in training. Donate the state: without it a step copies the table.

    Args:
      state: consumed where donated.
      ids: any nest of int32 arrays of global ids (see spec.global_ids); NO_ID is padding. On a mesh, this device's share of
        the batch; of a stack of 2**31 - 1 rows or more, pairs [.., 2] (see sharding.pairs).

    Returns:
      The state, one step further, and the plan of this step.

    Raises:
      TypeError: if state is no state, or ids are not integers of 32 bits or fewer.
      ValueError: if host ids do not fit int32, or the state was donated before.
    """
    arguments.check_state("prefetch(state, ids)", state)
    state.check_spec()
    leaves, treedef = row_ids.checked(ids)
    layout = state.layout
    request = _ask(state, leaves) if layout is None else exchange.ask(layout, leaves, state.step)
    state, moves, inverse, counts = _place(state, request)
    unique_ids, route, shapes = moves.ids, None, [leaf.shape for leaf in leaves]
    if layout is not None:
        route, counts = exchange.settle(layout, request, moves, inverse, counts)
        unique_ids, inverse, shapes = (
            request.own.ids,
            request.own.inverse,
            [layout.shape_of(leaf) for leaf in leaves],
        )
    plan = CachePlan(
        unique_ids=unique_ids,
        inverse=treedef.unflatten(_divided(inverse, shapes)),
        line=moves.line,
        is_hit=jnp.arange(moves.ids.shape[0], dtype=jnp.int32) < moves.num_hits,
        victim_ids=moves.victim_ids,
        counts=counts,
        step=state.step,
        route=route,
    )
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        pending=np.True_,  # a concrete value: within one trace a second apply_gradients is seen at once
        counters=count_step(state.counters, counts),
    )
    return state, plan


def _ask(state: EmbeddingState, leaves: list[jax.Array]) -> Request:
    """Returns what a batch asks of the one device there is: its distinct ids, within the budget."""
    flat = (
        jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
        if leaves
        else jnp.zeros(0, jnp.int32)
    )
    is_request = row_ids.in_range(flat, state.spec.num_rows)
    num_requests = jnp.sum(is_request, dtype=jnp.int32)
    num_out_of_range = jnp.sum(~is_request & (flat != NO_ID), dtype=jnp.int32)
    num_positions, budget = flat.shape[0], state.spec.max_unique_ids
    width = (num_positions if budget is None else min(budget, num_positions)) + 1
    found = ops.unique(
        jnp.where(is_request, flat, NO_ID), width, state.step, implementation=state.implementation
    )
    return Request(
        found,
        found,
        num_requests,
        num_out_of_range,
        found.num_dropped,
        Fraction(num_positions),
        None,
    )


def _place(
    state: EmbeddingState, request: Request
) -> tuple[EmbeddingState, Moves, jax.Array, Counts]:
    """Plans the rows that are asked for and brings them into their lines.

    Returns:
      The state with its cache and table changed, the moves, where each position went (int32), and the counts.
    """
    found, cache, zero = request.rows, state.cache, jnp.int32(0)
    if cache is None:
        width = found.ids.shape[0]
        no_line, no_victim = jnp.zeros(width, jnp.int32), jnp.full(width, NO_ID, jnp.int32)
        moves, inverse = (
            Moves(found.ids, no_line, no_victim, zero, zero, found.num_ids),
            found.inverse,
        )
        evictions = write_backs = hit_requests = zero
    else:
        cache, moves, inverse, hit_requests = ops.plan(
            cache, found, state.step, request.num_positions, implementation=state.implementation
        )
        evictions = jnp.sum(moves.victim_ids != NO_ID, dtype=jnp.int32)
        draw = Draw(state.row_key, state.step)
        store = state.store._replace(dirty=cache.dirty.reshape(-1))
        store, write_backs = ops.swap(store, moves, draw, implementation=state.implementation)
        state = dataclasses.replace(
            state, table=store.table, cache=residency.refilled(cache, store.lines, store.dirty)
        )
    counts = Counts(
        requests=request.num_requests,
        unique=found.num_ids,
        hits=moves.num_hits,
        hit_requests=hit_requests,
        misses=found.num_ids - moves.num_hits,
        bypasses=found.num_ids - moves.num_cached,
        evictions=evictions,
        write_backs=write_backs,
        out_of_range=request.num_out_of_range,
        dropped=request.num_dropped,
        wide_exchanges=zero,
    )
    return state, moves, inverse, counts


def _divided(inverse: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """Returns consecutive pieces of `inverse` in the shapes of the ids."""
    if not shapes:
        return []
    pieces = jnp.split(inverse, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def lookup(state: EmbeddingState, plan: CachePlan, *, dtype: Any = jnp.float32) -> jax.Array:
    """Gathers the unique rows of a plan: the FP32 line where cached, else the table's row, zeros for padding.

    Args:
      state: the state that prefetch returned with the plan.
      plan: see prefetch.
      dtype: of the result; apply_gradients takes float32 rows.

    Returns:
      [U, D] in dtype.

    Raises:
      TypeError: if state or plan is something else.
    """
    arguments.check_state("lookup(state, plan)", state)
    arguments.check_plan("lookup(state, plan)", plan)
    rows = _gather(state, plan)
    if state.layout is not None:
        rows = exchange.fetch(state.layout, exchange.route_of(plan), rows)
    return rows.astype(dtype)


def _gather(state: EmbeddingState, plan: CachePlan) -> jax.Array:
    """Gathers the planned rows of this device; on a mesh those of its shard."""
    return ops.lookup(state.store, _moves(plan), implementation=state.implementation)


def _moves(plan: CachePlan) -> Moves:
    ids, num_cached, num_ids = plan.placed
    return Moves(
        ids, plan.line, plan.victim_ids, jnp.sum(plan.is_hit, dtype=jnp.int32), num_cached, num_ids
    )


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
      TypeError: if state or plan is something else.
      ValueError: on other shapes or dtypes, another tx than init's, or a second call for one prefetch.
    """
    _check("apply_gradients", state, plan, rows=rows, row_grads=row_grads)
    layout = state.layout
    moves, is_pending = _pending(state, plan)
    if layout is not None:
        layout.check_bound("apply_gradients")
        rows, row_grads = (
            _gather(state, plan),
            exchange.collect(layout, exchange.route_of(plan), row_grads),
        )
    is_updated = jnp.arange(moves.ids.shape[0], dtype=jnp.int32) < moves.num_ids
    num_nonfinite = jnp.int32(0)
    if state.spec.skip_nonfinite:
        is_finite = jnp.all(jnp.isfinite(row_grads), axis=-1)
        num_nonfinite = jnp.sum(is_updated & ~is_finite, dtype=jnp.int32)
        is_updated = is_updated & is_finite
        row_grads = jnp.where(is_updated[:, None], row_grads, jnp.float32(0))
    else:  # padding rows are read by no position, except the last one, which all padding positions share
        row_grads = row_grads.at[-1].set(0)
    moves = moves._replace(
        ids=jnp.where(is_updated, moves.ids, NO_ID), line=_lines(state, plan, is_updated)
    )
    state = update.apply(tx, state, moves, rows, row_grads, step=plan.step, is_applied=is_pending)
    if layout is not None:
        num_nonfinite = exchange.total_over_shards(layout, num_nonfinite)
    return _finish(state, moves.line, num_nonfinite, is_pending)


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
      TypeError: if state or plan is something else.
      ValueError: as `pool` and `apply_gradients`; on gradients of another tree, shape or dtype than pool's result.
    """
    _check("apply_pooled_gradients", state, plan, rows=rows)
    spec, pooling_of = state.spec, (weights, combiner)
    options: dict[str, Any] = {
        "segment_ids": segment_ids,
        "num_segments": num_segments,
        "implementation": state.implementation,
    }
    index, factors, leaves = pooling.check_gradients(
        spec.embedding_dim, plan.inverse, pooled_grads, *pooling_of, **options
    )
    is_empty = not sum(i.size for i in index) or not sum(g.size for g in leaves)
    if state.layout is not None or not update.has_kernel(tx, state) or is_empty:
        _, pull_back = jax.vjp(
            lambda rows: pooling.pool(rows, plan.inverse, *pooling_of, **options), rows
        )
        return apply_gradients(state, plan, rows, pull_back(pooled_grads)[0], tx=tx)
    positions = pooling.positions(rows.shape[0], index, factors, leaves, combiner, **options)
    moves, is_pending = _pending(state, plan)
    state, is_updated = update.apply_summed(tx, state, moves, rows, positions, step=plan.step)
    num_nonfinite = moves.num_ids - jnp.sum(is_updated, dtype=jnp.int32)
    return _finish(state, _lines(state, plan, is_updated), num_nonfinite, is_pending)


def _check(verb: str, state: EmbeddingState, plan: CachePlan, **arrays: jax.Array) -> None:
    """Checks the shapes and dtypes of arrays per unique row, and that the state has a prefetch waiting, if that is known."""
    call = f"{verb}(state, plan, rows, ..)"
    arguments.check_state(call, state)
    arguments.check_plan(call, plan)
    expected = (plan.unique_ids.shape[0], state.spec.embedding_dim)
    for name, array in arrays.items():
        if not hasattr(array, "shape"):
            raise TypeError(
                f"{call}: {name} must be an array, float32 {expected}, got {type(array).__name__}"
            )
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


def _pending(state: EmbeddingState, plan: CachePlan) -> tuple[Moves, jax.Array]:
    """Returns the rows an update may touch, none if the plan is not the state's latest; and whether it is (bool [])."""
    is_own = jnp.all(state.fingerprint == state.expected_fingerprint)
    is_pending = state.pending & is_own & (plan.step == state.step - 1)
    moves = _moves(plan)
    num_cached, num_ids = (
        jnp.where(is_pending, moves.num_cached, 0),
        jnp.where(is_pending, moves.num_ids, 0),
    )
    return moves._replace(num_cached=num_cached, num_ids=num_ids), is_pending


def _lines(state: EmbeddingState, plan: CachePlan, is_updated: jax.Array) -> jax.Array:
    """Returns the line of each row, past the last one where it is not updated."""
    return (
        plan.line
        if state.cache is None
        else jnp.where(is_updated, plan.line, state.cache.geometry.lines)
    )


def _finish(
    state: EmbeddingState, line: jax.Array, num_nonfinite: jax.Array, is_pending: jax.Array
) -> EmbeddingState:
    """Returns the state after an update that wrote the lines named: they are dirty, and the update is counted."""
    return dataclasses.replace(
        state,
        cache=None if state.cache is None else residency.commit(state.cache, line),
        pending=np.False_,
        counters=count_updates(state.counters, num_nonfinite, ~is_pending),
    )
