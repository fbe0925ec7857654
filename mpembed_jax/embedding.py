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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import exchange, ops, planning, requests
from mpembed_jax import ids as ids_
from mpembed_jax import state as states
from mpembed_jax.cache import CachePlan, Counts
from mpembed_jax.state import EmbeddingState
from mpembed_jax.table import NO_ID


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
    leaves, treedef = ids_.checked(ids)
    route: Any = None
    if layout is None:
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.int32)
        is_request = ids_.in_range(flat, spec.num_rows)
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
        cache, placed = planning.place(cache, found, state.step, share, state.implementation)
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
        counters=states.count_step(state.counters, counts),
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
