"""The training step: prefetch, lookup, and apply_gradients or apply_pooled_gradients.

One `EmbeddingState` holds a stack of tables that share dim, format and cache.
- `prefetch` plans a batch and brings its rows into the cache.
- `lookup` gathers the unique rows, from which the user computes gradients.
- `apply_gradients` updates each unique row once. A cached row is updated in its float32 line, any
  other row in the table, with stochastic rounding.
- `apply_pooled_gradients` does the same from the gradients of pooled vectors.

The verbs are pure; jit them with the state donated. `mesh.exchange` holds what a mesh adds. The
system follows Yang et al., "Mixed-Precision Embedding Using a Cache" (arXiv 2010.11305).
"""

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import ops, row_ids
from mpembed_jax.arrays import chunks
from mpembed_jax.cache import residency
from mpembed_jax.cache.plan import CachePlan, Counts
from mpembed_jax.embedding import admission, pooling, update
from mpembed_jax.embedding.counters import count_step, count_updates
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.mesh import exchange
from mpembed_jax.ops import Draw, Moves, Request
from mpembed_jax.row_ids import NO_ID


def prefetch(state: EmbeddingState, ids: Any) -> tuple[EmbeddingState, CachePlan]:
    """Plans a batch and brings its rows into the cache.

    It finds the unique ids and the cache hits, writes victims back to the table, and fills the
    lines of newcomers. In training, exactly one apply_gradients must follow each prefetch. Donate
    the state; otherwise, each step copies the table.

    Args:
      state: consumed if donated.
      ids: any nest of int32 arrays of global ids (see spec.global_ids); NO_ID is padding. On a
        mesh, this device's share of the batch. For a stack of 2**31 - 1 rows or more, pairs [.., 2]
        (see sharding.pairs). For a stack with a vocabulary, pairs uint32 [.., 2] of raw ids (see
        spec.raw_ids), which may earn rows of their own here; the plan then names rows.

    Returns:
      The state, advanced by one step, and the plan of this step.

    Raises:
      TypeError: if ids are not integers of 32 bits or fewer, or with a vocabulary not pairs.
      ValueError: if host ids do not fit int32, or the state was made for another spec.
    """
    state.check_spec()
    if state.vocabulary is not None:
        state, ids = admission.admit(state, ids)
    leaves, treedef = row_ids.checked(ids)
    layout = state.layout
    request = _ask(state, leaves) if layout is None else exchange.ask(layout, leaves, state.step)
    state, moves, inverse, counts = _place(state, request)
    unique_ids = moves.ids
    route = None
    shapes = [leaf.shape for leaf in leaves]
    if layout is not None:
        route, counts = exchange.settle(layout, request, moves, inverse, counts)
        unique_ids = request.own.ids
        inverse = request.own.inverse
        shapes = [layout.shape_of(leaf) for leaf in leaves]
    plan = CachePlan(
        unique_ids=unique_ids,
        inverse=treedef.unflatten(row_ids.divided(inverse, shapes)),
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
        # The value is concrete, so that a second apply_gradients in the same trace raises an error.
        pending=np.True_,
        counters=count_step(state.counters, counts),
    )
    return state, plan


def _ask(state: EmbeddingState, leaves: list[jax.Array]) -> Request:
    """Returns the request of a batch on one device: its distinct ids, within the budget."""
    flat = row_ids.joined(leaves)
    is_request = row_ids.in_range(flat, state.spec.num_rows)
    num_requests = jnp.sum(is_request, dtype=jnp.int32)
    num_out_of_range = jnp.sum(~is_request & (flat != NO_ID), dtype=jnp.int32)
    num_positions = flat.shape[0]
    budget = state.spec.max_unique_ids
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
    """Plans the requested rows and brings them into their cache lines.

    Returns:
      The state with its cache and table changed; the moves; for each position, the index of its row
      among the moves (int32); and the counts.
    """
    found = request.rows
    cache = state.cache
    zero = jnp.int32(0)
    if cache is None:
        width = found.ids.shape[0]
        no_line = jnp.zeros(width, jnp.int32)
        no_victim = jnp.full(width, NO_ID, jnp.int32)
        moves = Moves(found.ids, no_line, no_victim, zero, zero, found.num_ids)
        inverse = found.inverse
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


def lookup(state: EmbeddingState, plan: CachePlan, *, dtype: Any = jnp.float32) -> jax.Array:
    """Gathers the unique rows of a plan.

    A cached row is read from its float32 line, any other row from the table. Padding rows are zero.

    A later prefetch gives lines to other rows. The rows of a plan that is not the state's latest
    are therefore NaN. If the step numbers are concrete, the call raises ValueError instead.

    Args:
      state: the state that prefetch returned with the plan.
      plan: from that prefetch.
      dtype: dtype of the result; apply_gradients needs float32 rows.

    Returns:
      [U, D] in dtype.

    Raises:
      ValueError: if the plan is concrete and not of the state's latest prefetch.
    """
    _check_latest("lookup", state, plan)
    rows = lookup_held(state, plan)
    if state.layout is not None:
        rows = exchange.fetch(state.layout, exchange.route_of(plan), rows)
    width = rows.shape[0]
    rows = chunks.each(
        0,
        jnp.where(_is_latest(state, plan), 0, width),  # empty range if the plan is the latest
        width,
        ops.chunk_of(state.implementation),
        lambda window, rows: window.put(rows, jnp.float32(jnp.nan)),
        rows,
    )
    return rows.astype(dtype)


def lookup_held(state: EmbeddingState, plan: CachePlan) -> jax.Array:
    """Gathers the planned rows that this device holds.

    On a mesh, these are the rows of its shard that any device requests. Each row of
    the batch is on exactly one device. `exchange.fetch`, which is differentiable, brings the rows
    to the devices that request them.

    Returns:
      float32 [Q, D]. On one device, the same as `lookup`.
    """
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
    """Applies exactly one optimizer update to each unique row of the plan and stores the row.

    A cached row is written to its line in float32. A bypassed row is stochastically rounded into
    the table. A row that its update does not move keeps its stored bits. Donate the state. A plan
    that is not the state's latest, or was already applied, changes nothing and is counted in
    `stats`. If the step numbers are concrete, the call raises ValueError instead.

    Args:
      state: from prefetch; consumed if donated.
      plan: from the same prefetch.
      rows: float32 [U, D], from lookup.
      row_grads: float32 [U, D], the gradient with respect to rows.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      ValueError: if a shape or dtype is wrong, if tx is not the one given to init, or on a second
        call for one prefetch.
    """
    layout = state.layout
    if layout is not None:
        width = plan.unique_ids.shape[0]
        _check("apply_gradients", state, plan, width, rows=rows, row_grads=row_grads)
        layout.check_bound("apply_gradients")
        rows = lookup_held(state, plan)
        row_grads = exchange.collect(layout, exchange.route_of(plan), row_grads)
    return apply_held_gradients(state, plan, rows, row_grads, tx=tx)


def apply_held_gradients(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Does what `apply_gradients` does, for the rows that `lookup_held` returned.

    Args:
      state: from prefetch; consumed if donated.
      plan: from the same prefetch.
      rows: float32 [Q, D], from lookup_held.
      row_grads: float32 [Q, D], summed over all devices.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      ValueError: as apply_gradients.
    """
    layout = state.layout
    moves, is_pending = _pending(state, plan)
    _check("apply_gradients", state, plan, moves.ids.shape[0], rows=rows, row_grads=row_grads)
    is_updated = moves.is_row
    num_nonfinite = jnp.int32(0)
    if state.spec.skip_nonfinite:
        is_finite = jnp.all(jnp.isfinite(row_grads), axis=-1)
        num_nonfinite = jnp.sum(is_updated & ~is_finite, dtype=jnp.int32)
        is_updated = is_updated & is_finite
    moves = moves.only(is_updated, state.store.num_lines)
    state, is_stored = update.apply(
        tx, state, moves, rows, row_grads, step=plan.step, is_applied=is_pending
    )
    if layout is not None:
        num_nonfinite = exchange.total_over_shards(layout, num_nonfinite)
    return _finish(state, moves.only(is_stored, state.store.num_lines), num_nonfinite, is_pending)


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
    """Applies exactly one optimizer update to each unique row, from gradients of pooled vectors.

    The result is the same as differentiating `pool(rows, plan.inverse, weights, combiner, ..)` with
    respect to rows and passing the gradient to `apply_gradients`. If a kernel can run the
    transformation, this kernel sums the gradients of each row, updates the row and stores it. No
    array of row gradients then exists. Otherwise, and over a mesh, the function runs the gradient
    of pool and `apply_gradients`. For gradients with respect to weights, use jax.grad.

    Args:
      state: from prefetch; consumed if donated.
      plan: from the same prefetch.
      rows: float32 [U, D], from lookup.
      pooled_grads: nest of float32, the gradient with respect to what `pool` returned for
        plan.inverse. Inside jax.shard_map, it varies over the same mesh axes as pool's result.
      weights: as given to pool.
      combiner: as given to pool.
      segment_ids: as given to pool.
      num_segments: as given to pool.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      ValueError: as in `pool` and `apply_gradients`, or if the tree, a shape or a dtype of
        pooled_grads differs from that of pool's result.
    """
    spec = state.spec
    pooling_of = (weights, combiner)
    options: dict[str, Any] = {
        "segment_ids": segment_ids,
        "num_segments": num_segments,
        "implementation": state.implementation,
    }
    _check("apply_pooled_gradients", state, plan, plan.unique_ids.shape[0], rows=rows)
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
    state, is_updated, is_stored = update.apply_summed(
        tx, state, moves, rows, positions, step=plan.step
    )
    num_nonfinite = moves.num_ids - jnp.sum(is_updated, dtype=jnp.int32)
    return _finish(state, moves.only(is_stored, state.store.num_lines), num_nonfinite, is_pending)


def _check(
    verb: str, state: EmbeddingState, plan: CachePlan, width: int, **arrays: jax.Array
) -> None:
    """Checks that `arrays` have `width` rows each, and that the plan was not applied yet.

    If state.pending is traced, `_pending` makes the latter check on the device.

    Raises:
      ValueError: if a check fails.
    """
    expected = (width, state.spec.embedding_dim)
    for name, array in arrays.items():
        if array.shape != expected:
            raise ValueError(
                f"{name} must be float32 {expected}, one row per unique id of the plan, got "
                f"{array.dtype} {array.shape}; differentiate with respect to the rows that lookup "
                "returned"
            )
        if array.dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32 {expected}, got {array.dtype}; keep the rows in float32 "
                "and cast the vectors computed from them"
            )
    if not isinstance(state.pending, jax.core.Tracer) and not bool(state.pending):
        raise ValueError(
            f"{verb} needs a prefetch of its own, but this state has none waiting (it comes from "
            "init, or its plan was already applied); call prefetch once before each "
            f"{verb}"
        )
    _check_latest(verb, state, plan)


def _check_latest(verb: str, state: EmbeddingState, plan: CachePlan) -> None:
    """Raises ValueError if the plan is known not to be of the state's latest prefetch."""
    if not isinstance(state.step, jax.core.Tracer) and not isinstance(plan.step, jax.core.Tracer):
        made, latest = int(plan.step), int(state.step) - 1
        if made != latest:
            raise ValueError(
                f"{verb} needs the plan of the state's latest prefetch, number {latest}, and got "
                f"that of number {made}: its rows may have left their lines since; pass the state "
                "and the plan that one prefetch returned"
            )


def _is_latest(state: EmbeddingState, plan: CachePlan) -> jax.Array:
    """Returns whether the plan is of this state's latest prefetch (bool [])."""
    is_own = jnp.all(state.fingerprint == state.expected_fingerprint)
    return is_own & (plan.step == state.step - 1)


def _pending(state: EmbeddingState, plan: CachePlan) -> tuple[Moves, jax.Array]:
    """Returns the rows that an update may touch, and whether the plan is pending (bool []).

    A plan is pending if it is the state's latest and was not applied yet. If it is not pending, an
    update may touch no row.
    """
    is_pending = state.pending & _is_latest(state, plan)
    moves = _moves(plan)
    num_cached, num_ids = (
        jnp.where(is_pending, moves.num_cached, 0),
        jnp.where(is_pending, moves.num_ids, 0),
    )
    return moves._replace(num_cached=num_cached, num_ids=num_ids), is_pending


def _finish(
    state: EmbeddingState, moves: Moves, num_nonfinite: jax.Array, is_pending: jax.Array
) -> EmbeddingState:
    """Returns the state after an update that stored the rows of `moves`.

    Their lines are marked dirty, and the update is counted.
    """
    return dataclasses.replace(
        state,
        cache=None if state.cache is None else residency.commit(state.cache, moves.line),
        pending=np.False_,
        counters=count_updates(state.counters, num_nonfinite, ~is_pending),
    )
