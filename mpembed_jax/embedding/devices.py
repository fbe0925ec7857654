"""What the devices of a mesh do for each other in a step. On one device, there is nothing to do.

`step` calls these functions, and is otherwise the step of one device. The code for several devices
is in `mesh`.
"""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpembed_jax import ops, row_ids
from mpembed_jax.cache.plan import CachePlan, Counts, Route
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.mesh import exchange
from mpembed_jax.ops import Moves, Request
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import TablesOfIds, most_distinct


class Answer(NamedTuple):
    """What a device learns about its batch when the owners have planned its rows."""

    unique_ids: jax.Array  # i32 [U]: the device's distinct ids
    inverse: list[jax.Array]  # for each array of ids, the index (i32 [..]) in unique_ids
    counts: Counts  # of the whole batch
    route: Route | None  # to the owners; None on one device


def ask(state: EmbeddingState, leaves: list[jax.Array], tables: TablesOfIds | None) -> Request:
    """Returns the rows that this device must find: the distinct ids, within the budget.

    Args:
      state: not changed.
      leaves: the ids of this device, int32 [..] or pairs [.., 2].
      tables: for each of `leaves`, the tables of its ids; None if they are not known.
    """
    if state.layout is not None:
        return exchange.ask(state.layout, leaves, state.step, tables, state.implementation)
    flat = row_ids.joined(leaves)
    is_request = row_ids.in_range(flat, state.spec.num_rows)
    num_requests = jnp.sum(is_request, dtype=jnp.int32)
    num_out_of_range = jnp.sum(~is_request & (flat != NO_ID), dtype=jnp.int32)
    num_positions = flat.shape[0]
    budget = state.spec.max_unique_ids
    most = most_distinct(state.spec.tables, tables, [leaf.size for leaf in leaves])
    width = (most if budget is None else min(budget, most)) + 1
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


def answer(
    state: EmbeddingState,
    leaves: list[jax.Array],
    request: Request,
    moves: Moves,
    inverse: jax.Array,
    counts: Counts,
) -> Answer:
    """Returns what this device learns about its batch.

    Args:
      state: not changed.
      leaves: as for `ask`.
      request: the result of `ask`.
      moves: the planned rows of this device.
      inverse: int32 [n], the index in `moves` of each entry of the request.
      counts: the counts of this device.
    """
    layout = state.layout
    if layout is None:
        shapes = [leaf.shape for leaf in leaves]
        return Answer(moves.ids, row_ids.divided(inverse, shapes), counts, None)
    route, counts = exchange.settle(layout, request, moves, inverse, counts)
    shapes = [layout.shape_of(leaf) for leaf in leaves]
    own = request.own
    return Answer(own.ids, row_ids.divided(own.inverse, shapes), counts, route)


def delivered(
    state: EmbeddingState, plan: CachePlan, held: jax.Array, is_valid: jax.Array
) -> jax.Array:
    """Returns the unique rows of this device (float32 [U, D]).

    Args:
      state: not changed.
      plan: from the state's latest prefetch.
      held: float32 [Q, D], the planned rows that this device holds; NaN if not is_valid.
      is_valid: bool []. If it is False, the result is NaN, as `held` is on one device.
    """
    if state.layout is None:
        return held
    rows = exchange.fetch(state.layout, state.implementation, exchange.route_of(plan), held)
    return ops.only_if(is_valid, rows, implementation=state.implementation)


def collected(verb: str, state: EmbeddingState, plan: CachePlan, row_grads: jax.Array) -> jax.Array:
    """Returns the gradients [Q, D] of the planned rows that this device holds.

    Args:
      verb: the name of the caller, for errors.
      state: not changed.
      plan: from the state's latest prefetch.
      row_grads: float32 [U, D], this device's part of the gradients of its unique rows.
    """
    layout = state.layout
    if layout is None:
        return row_grads
    layout.check_bound(verb)
    return exchange.collect(layout, state.implementation, exchange.route_of(plan), row_grads)


def total(state: EmbeddingState, value: jax.Array) -> jax.Array:
    """Sums a scalar over all shards."""
    return value if state.layout is None else exchange.total_over_shards(state.layout, value)
