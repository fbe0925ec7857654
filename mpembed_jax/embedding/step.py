"""The verbs that begin a training step: prefetch, lookup. (Those that end it are in `gradients`, those of no step in
`evaluation`.)

One `EmbeddingState` holds a stack of tables that share dim, format and cache. A training step plans and swaps (prefetch),
gathers unique rows (lookup), and after the user's gradient applies one optimizer update per unique row (apply_gradients):
to the FP32 line where the row is cached, else stochastically rounded into the table. The system follows Yang et al.,
"Mixed-Precision Embedding Using a Cache" (arXiv 2010.11305). The verbs are pure; jit them with the state donated.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import ops, row_ids
from mpembed_jax.cache import residency
from mpembed_jax.cache.plan import CachePlan, Counts
from mpembed_jax.embedding import pooling, update
from mpembed_jax.embedding.counters import count_step, count_updates
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.mesh import exchange, requests
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
      TypeError: if ids are not integers of 32 bits or fewer.
      ValueError: if host ids do not fit int32.
    """
    state.check_spec()
    spec, layout = state.spec, state.layout
    leaves, treedef = row_ids.checked(ids)
    route: Any = None
    if layout is None:
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.int32)
        is_request = row_ids.in_range(flat, spec.num_rows)
        num_requests = jnp.sum(is_request, dtype=jnp.int32)
        num_out_of_range = jnp.sum(~is_request & (flat != NO_ID), dtype=jnp.int32)
        num_positions = flat.shape[0]
        width = (num_positions if spec.max_unique_ids is None else min(spec.max_unique_ids, num_positions)) + 1
        found = wanted = ops.unique(
            jnp.where(is_request, flat, NO_ID), width, state.step, implementation=state.implementation
        )
        num_dropped, share = found.num_dropped, Fraction(num_positions)
    else:  # `wanted` is what this device's ids are, `found` the rows of its shard that any device asks for
        layout.check_bound("prefetch")
        wanted, num_requests, num_out_of_range = requests.deduplicate(layout, leaves, state.step)
        num_dropped, num_positions = wanted.num_dropped, wanted.inverse.shape[0]
        found, wanted, route = exchange.request(layout, wanted, state.step)
        width, share = found.ids.shape[0], layout.positions(num_positions)
        num_dropped = exchange.total_over_batch(layout, num_dropped) + exchange.total_over_shards(layout, found.num_dropped)

    table, cache = state.table, state.cache
    zero = jnp.int32(0)
    if cache is None:
        unique_ids, inverse = found.ids, found.inverse
        line, victim_ids = jnp.zeros(width, jnp.int32), jnp.full(width, NO_ID, jnp.int32)
        num_hits = num_cached = evictions = write_backs = hit_requests = zero
    else:
        cache, placed = ops.plan(cache, found, state.step, share, state.implementation)
        unique_ids, inverse, line, victim_ids, num_hits, num_cached, hit_requests = placed
        evictions = jnp.sum(victim_ids != NO_ID, dtype=jnp.int32)
        table, rows, dirty, write_backs = ops.swap(
            table, cache.rows, cache.dirty.reshape(-1), unique_ids, line, victim_ids,
            num_hits, num_cached, state.row_key, state.step, implementation=state.implementation,
        )  # fmt: skip
        cache = dataclasses.replace(cache, rows=rows, dirty=dirty.reshape(cache.dirty.shape))

    counts = Counts(
        requests=num_requests,
        unique=found.num_ids,
        hits=num_hits,
        hit_requests=hit_requests,
        misses=found.num_ids - num_hits,
        bypasses=found.num_ids - num_cached,
        evictions=evictions,
        write_backs=write_backs,
        out_of_range=num_out_of_range,
        dropped=num_dropped,
        wide_exchanges=zero,
    )
    is_hit = jnp.arange(width, dtype=jnp.int32) < num_hits
    if layout is not None:
        route = dataclasses.replace(
            route, rows=unique_ids, num_cached=num_cached[None], num_rows=found.num_ids[None], asked=inverse
        )
        counts = exchange.total_counts(layout, counts, route)
        unique_ids, inverse = wanted.ids, wanted.inverse
    shapes = [leaf.shape if layout is None else layout.shape_of(leaf) for leaf in leaves]
    pieces = jnp.split(inverse, np.cumsum([math.prod(shape) for shape in shapes])[:-1]) if leaves else []
    plan = CachePlan(
        unique_ids=unique_ids,
        inverse=treedef.unflatten([p.reshape(shape) for p, shape in zip(pieces, shapes, strict=True)]),
        line=line,
        is_hit=is_hit,
        victim_ids=victim_ids,
        counts=counts,
        step=state.step,
        route=route,
    )
    state = dataclasses.replace(
        state,
        table=table,
        cache=cache,
        step=state.step + 1,
        pending=np.True_,  # a concrete value: within one trace a second apply_gradients is seen at once
        counters=count_step(state.counters, counts),
    )
    return state, plan


def lookup(state: EmbeddingState, plan: CachePlan, *, dtype: Any = jnp.float32) -> jax.Array:
    """Gathers the unique rows of a plan: the FP32 line where cached, else the table's row, zeros for padding.

    Args:
      state: the state that prefetch returned with the plan.
      plan: see prefetch.
      dtype: of the result; apply_gradients takes float32 rows.

    Returns:
      [U, D] in dtype.
    """
    gathered = gather_placed(state, plan)
    if state.layout is not None:
        gathered = exchange.fetch(state.layout, plan.route, gathered)
    return gathered.astype(dtype)


def gather_placed(state: EmbeddingState, plan: CachePlan) -> jax.Array:
    """Gathers the rows that the plan placed; on a mesh those of this device's shard."""
    ids, num_cached, num_ids = plan.placed
    rows = None if state.cache is None else state.cache.rows
    return ops.lookup(state.table, rows, ids, plan.line, num_cached, num_ids, implementation=state.implementation)


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
        rows, row_grads = gather_placed(state, plan), exchange.collect(layout, plan.route, row_grads)
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
    changed = update.apply(
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
    if state.layout is not None or not update.has_kernel(tx, state) or is_empty:
        _, pull_back = jax.vjp(lambda rows: pooling.pool(rows, plan.inverse, *pooling_of, **options), rows)
        return apply_gradients(state, plan, rows, pull_back(pooled_grads)[0], tx=tx)
    positions = pooling.positions(rows.shape[0], index, factors, leaves, combiner, **options)
    turn = _begin(state, plan)
    *changed, is_updated = update.apply_summed(
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
        cache = residency.commit(dataclasses.replace(cache, rows=cache_rows), line)
    return dataclasses.replace(
        state,
        table=table,
        cache=cache,
        row_state=row_state,
        pending=np.False_,
        counters=count_updates(state.counters, num_nonfinite, ~turn.is_pending),
    )
