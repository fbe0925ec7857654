"""The rows and the plan of a prefetch, for the calls of its step.

A call may use the prefetched ids in any shape and order, and any number of times. So a step can
call a module several times, or once per microbatch. If a call gets the same array objects as
prefetch, tracing detects it, and the plan's inverse is used. Otherwise the ids are looked up in the
plan. An id that was not prefetched raises ValueError outside jit. Inside jit, its vector is NaN. If
the step dropped ids over its budget, such an id reads as zeros instead.

This module does not use flax. Over a mesh, the rows are those of the shards. Each row of the batch,
and its gradient, then exists once. A call brings rows to the devices that request them.
"""

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from mpembed_jax import ops, row_ids
from mpembed_jax.cache.plan import CachePlan, Route
from mpembed_jax.embedding import admission, step
from mpembed_jax.embedding.pooling import pool
from mpembed_jax.embedding.state import EmbeddingState, over_mesh, partition_specs
from mpembed_jax.mesh import exchange
from mpembed_jax.nn import routing, verbs
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import TablesOfIds

_MISSING = NO_ID  # in an inverse: the row was not prefetched


def _with_table(given: Any) -> tuple[str | None, Any]:
    return tuple(given) if isinstance(given, routing.Own) else (None, given)


class Origin:
    """Tells from which array, given to prefetch, each leaf of a plan's inverse was made.

    An array may come with its table, as routing.Own. Ids that were mapped on the host are
    recognized by their values after mapping, in which masked ids are padding.

    An Origin is static. All Origins compare equal, so none causes a retrace: they are used only to
    recognize an array object within one trace.
    """

    def __init__(self, inverse: list[Any], given: list[Any], mapped: list[Any]):
        # References are weak, because a tracer must not outlive its trace. Host arrays are copied,
        # because they may change.
        self._pairs = [
            (weakref.ref(index), table, _mark(ids, leaf))
            for index, (table, ids), leaf in zip(
                inverse, map(_with_table, given), mapped, strict=True
            )
            if isinstance(index, jax.core.Tracer)
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    def inverse_of(self, ids: Any, mapped: Any, inverse: list[Any]) -> Any:
        """Returns the leaf of `inverse` that was made from `ids`, or None if that is not known.

        `mapped` is what `ids` became: global ids, or pairs.
        """
        table, ids = _with_table(ids)
        mark = _mark(ids, mapped)
        for made, of, given in self._pairs:
            if of != table:
                continue
            held = next((index for index in inverse if index is made()), None)
            if held is None:
                continue
            if isinstance(given, weakref.ref) != isinstance(mark, weakref.ref):
                continue
            if given() is ids if isinstance(given, weakref.ref) else np.array_equal(given, mark):
                return held
        return None


def _mark(ids: Any, mapped: Any) -> Any:
    """Returns what recognizes the ids: a weak reference to a jax array, or values on the host."""
    if isinstance(mapped, np.ndarray):
        return mapped.copy()
    return weakref.ref(ids) if isinstance(ids, jax.Array) else row_ids.on_host(ids).copy()


@partial(jax.tree_util.register_dataclass, data_fields=["plan"], meta_fields=["origin"])
@dataclasses.dataclass(frozen=True)
class Prefetched:
    """The plan of a step in progress."""

    plan: CachePlan
    origin: Origin


def fetch(
    state: EmbeddingState, ids: Any, given: Any, tables: TablesOfIds | None
) -> tuple[EmbeddingState, Prefetched, Any]:
    """Plans a batch and brings its rows into the cache.

    Args:
      state: not consumed.
      ids: nest of int32 arrays of global ids.
      given: the user's own arrays, from which `ids` were computed, in the same nesting.
      tables: the tables that the ids belong to; see step.prefetch_of_tables.

    Returns:
      The state and plan of step.prefetch, and the rows of step.prefetch_held (float32 [Q, D]).
    """
    state, plan, rows = verbs.run(_fetch, state, ids, tables=tables)
    treedef: Any = jax.tree.structure(ids)
    inverse, own = treedef.flatten_up_to(plan.inverse), treedef.flatten_up_to(given)
    origin = Origin(inverse, own, jax.tree.leaves(ids))
    return state, Prefetched(plan, origin), rows


def _fetch(
    state: EmbeddingState, ids: Any, *, tables: TablesOfIds | None
) -> tuple[EmbeddingState, CachePlan, jax.Array]:
    if verbs.is_whole(state):
        layout: Any = state.layout
        ids = jax.tree.map(jnp.asarray, ids)
        result = (partition_specs(state), exchange.plan_specs(layout), _held(layout))
        fetch = partial(_fetch, tables=tables)
        return over_mesh(fetch, state, _batch(layout, ids), result=result)(state, ids)
    return step.prefetch_held(state, ids, tables)


def _batch(layout: Any, ids: Any) -> PartitionSpec:
    """Returns the PartitionSpec of a batch's ids, whose leading axis the devices divide.

    Raises:
      ValueError: if an array of ids cannot be divided evenly.
    """
    for leaf in jax.tree.leaves(ids):
        if leaf.ndim < 1 or leaf.shape[0] % layout.batch_shards:
            raise ValueError(
                "with mesh=, the leading axis of each array of ids is divided over "
                f"{layout.batch_shards} devices, but there are ids {list(leaf.shape)}; pad the "
                f"batch with NO_ID to a multiple of {layout.batch_shards} (microbatches: prefetch "
                "them as a nest, such as tuple(ids))"
            )
    return PartitionSpec(layout.batch_axes)


def _held(layout: Any) -> PartitionSpec:
    """Returns the PartitionSpec of the rows that the shards hold."""
    return PartitionSpec(layout.axes or None)


def update(
    state: EmbeddingState,
    prefetched: Prefetched,
    rows: jax.Array,
    row_grads: jax.Array,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Returns the state after one update of the rows that `fetch` returned."""
    return verbs.run(_update, state, prefetched.plan, rows, row_grads, tx=tx)


def _update(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    row_grads: jax.Array,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    apply = partial(step.apply_held_gradients, tx=tx)
    layout = state.layout
    if layout is None or not verbs.is_whole(state):
        return apply(state, plan, rows, row_grads)
    held = _held(layout)
    run = over_mesh(apply, state, exchange.plan_specs(layout), held, held)
    return run(state, plan, rows, row_grads)


def part(
    state: EmbeddingState, prefetched: Prefetched, rows: jax.Array, ids: Any, given: Any
) -> routing.Part:
    """Returns a step's rows, the index of each id of a call among them, and the pool function.

    Args:
      state: the step's state.
      prefetched: the plan and its origin, from `fetch`.
      rows: float32 [Q, D], from `fetch`.
      ids: nest of int32 arrays of global ids.
      given: the user's own arrays, in the nesting of `ids`.

    Raises:
      ValueError: if the ids are concrete and one was not prefetched.
    """
    plan = prefetched.plan
    treedef: Any
    leaves, treedef = jax.tree.flatten(ids)
    planned = jax.tree.leaves(plan.inverse)
    known = [
        prefetched.origin.inverse_of(own, leaf, planned)
        for own, leaf in zip(treedef.flatten_up_to(given), leaves, strict=True)
    ]
    if all(index is not None for index in known):
        rows = _brought(state, rows, plan.route)
        return routing.Part(rows, treedef.unflatten(known), _pool_of(state, pool))
    inverse, route = verbs.run(_find, state, plan, leaves)
    is_checked = True
    for index, of_leaf in zip(inverse, leaves, strict=True):
        if isinstance(index, jax.core.Tracer) or not index.is_fully_addressable:
            is_checked = False
            continue
        missing = np.argwhere(np.asarray(index) == _MISSING)
        if missing.size:
            where = tuple(int(i) for i in missing[0])
            raise ValueError(
                f"called with ids that were not prefetched: at {list(where)} the call names row "
                f"{np.asarray(of_leaf)[where]} ({len(missing)} such ids); give prefetch all "
                "ids of the step's calls (several inputs: one nest of them)"
            )
    rows = _brought(state, rows, route)
    # If the ids were checked above, none is missing, and `pool` is enough. _pool_or_nan would make
    # a NaN that no vector takes, but jax.debug_nans would stop at it.
    chosen = pool if is_checked else _pool_or_nan
    return routing.Part(rows, treedef.unflatten(inverse), _pool_of(state, chosen))


def _find(
    state: EmbeddingState, plan: CachePlan, leaves: list[Any]
) -> tuple[list[jax.Array], Route | None]:
    """Returns the index of each id in the plan's rows, and on a mesh the route that brings them."""
    layout: Any = state.layout
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if verbs.is_whole(state):
        batch = _batch(layout, leaves)
        specs = (exchange.plan_specs(layout), batch)
        run = over_mesh(_find, state, *specs, result=(batch, exchange.route_specs(layout)))
        return run(state, plan, leaves)
    if state.vocabulary is not None:
        leaves = admission.rows_of(state, leaves)
    shapes = [np.shape(leaf) for leaf in leaves]
    if layout is not None:
        index, is_missing, route = exchange.find(
            layout, exchange.route_of(plan), leaves, plan.number, state.implementation
        )
    else:
        ids = row_ids.joined(leaves)
        ids = jnp.where(row_ids.in_range(ids, state.spec.num_rows), ids, NO_ID)
        index, is_held = ops.find(plan.unique_ids, ids, implementation=state.implementation)
        is_missing = (ids != NO_ID) & ~is_held
        route = None
    # A dropped id cannot be told from one that was not prefetched. If the step dropped ids, both
    # kinds therefore read as zeros, and none counts as missing.
    is_missing = is_missing & (plan.counts.dropped == 0)
    return row_ids.divided(jnp.where(is_missing, _MISSING, index), shapes), route


def _pool_or_nan(
    rows: jax.Array,
    inverse: Any,
    weights: Any = None,
    combiner: str | None = None,
    **options: Any,
) -> Any:
    """Runs `pool`. A vector is NaN if its id, or an id of its bag, is missing."""
    is_missing = jax.tree.map(lambda index: index == _MISSING, inverse)
    inverse = jax.tree.map(
        lambda index, missing: jnp.where(missing, rows.shape[0] - 1, index), inverse, is_missing
    )

    def or_nan(vectors: jax.Array, missing: jax.Array) -> jax.Array:
        missing = missing if combiner is None else jnp.any(missing, axis=-1)
        return jnp.where(missing[..., None], np.float32(np.nan), vectors)

    return jax.tree.map(or_nan, pool(rows, inverse, weights, combiner, **options), is_missing)


def _pool_of(state: EmbeddingState, pool: Callable) -> Callable:
    """Returns `pool` with the state's implementation.

    Over a mesh, it takes whole arrays and runs in jax.shard_map.
    """
    pool = partial(pool, implementation=state.implementation)
    if not verbs.is_whole(state):
        return pool
    layout: Any = state.layout
    batch = PartitionSpec(layout.batch_axes)

    def pool_over_mesh(
        rows: jax.Array, inverse: Any, weights: Any = None, combiner: str | None = None
    ) -> Any:
        run = partial(pool, combiner=combiner)
        if not any(index.size for index in jax.tree.leaves(inverse)):
            # There are no ids. XLA cannot partition a function whose results are all empty.
            return run(rows, inverse, weights)
        return jax.shard_map(run, mesh=layout.mesh, in_specs=batch, out_specs=batch)(
            rows, inverse, weights
        )

    return pool_over_mesh


def _brought(state: EmbeddingState, rows: jax.Array, route: Route | None) -> jax.Array:
    """Returns the rows that a route brings to each device, from those that the shards hold."""
    layout: Any = state.layout
    if layout is None:
        return rows
    bring = partial(exchange.fetch, layout, state.implementation)
    if not verbs.is_whole(state):
        return bring(route, rows)
    specs = (exchange.route_specs(layout), _held(layout))
    batch = PartitionSpec(layout.batch_axes)
    return jax.shard_map(bring, mesh=layout.mesh, in_specs=specs, out_specs=batch)(route, rows)
