"""The vectors and the plan of a fused step, for the calls of a module in that step.

With `fused=True`, prefetch makes the vectors, and the loss is differentiated with respect to them.
So there are no gradients of rows. In a step, the module may be called any number of times, and the
gradients of the calls add. Each call must get the ids of the prefetch, in the same nesting and
shapes. A call with other shapes raises ValueError. A call with other ids raises ValueError outside
jit; inside jit, the vectors of these ids are NaN.

This module does not use flax. It is for one device: over a mesh, modules use `prefetched`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax.embedding import vectors
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.nn import verbs
from mpembed_jax.nn.prefetched import Origin
from mpembed_jax.spec import TablesOfIds


@partial(jax.tree_util.register_dataclass, data_fields=["plan", "ids"], meta_fields=["origin"])
@dataclasses.dataclass(frozen=True)
class Embedded:
    """The plan of a fused step in progress, and the ids of its prefetch."""

    plan: vectors.VectorPlan
    ids: list[jax.Array]  # i32 [..] each: global ids
    origin: Origin  # the user's array behind each of `ids`


def fetch(
    state: EmbeddingState,
    ids: Any,
    given: Any,
    tables: TablesOfIds | None,
    combiner: str | None,
    tx: optax.GradientTransformation,
) -> tuple[EmbeddingState, Embedded, tuple[jax.Array, ...]]:
    """Plans a batch, brings its rows into the cache and makes its vectors.

    Args:
      state: not consumed.
      ids: nest of int32 arrays of global ids.
      given: the user's own arrays, from which `ids` were computed, in the same nesting.
      tables: the tables of the ids in each array; see step.prefetch_of_tables.
      combiner: "sum", "mean" or "sqrtn" reduces the last axis of each array of ids; None: nothing
        is reduced.
      tx: the transformation given to init.

    Returns:
      The state after `embed`; its plan, with the ids; and its vectors: float32 [.., D] for each
      array of ids, without the last axis of ids if there is a combiner.
    """
    how = {"tables": tables, "combiner": combiner, "tx": tx}
    state, plan, found, leaves = verbs.run(_fetch, state, ids, **how)
    treedef: Any = jax.tree.structure(ids)
    origin = Origin(leaves, treedef.flatten_up_to(given), jax.tree.leaves(ids))
    return state, Embedded(plan, leaves, origin), found


def _fetch(
    state: EmbeddingState,
    ids: Any,
    *,
    tables: TablesOfIds | None,
    combiner: str | None,
    tx: optax.GradientTransformation,
) -> tuple:
    state, plan, found = vectors.embed_of_tables(state, ids, tables, combiner=combiner, tx=tx)
    # Origin compares arrays by identity, so each leaf is a copy, an object of its own.
    leaves = [jnp.array(leaf, jnp.int32) for leaf in jax.tree.leaves(ids)]
    return state, plan, tuple(jax.tree.leaves(found)), leaves


def update(
    state: EmbeddingState,
    embedded: Embedded,
    grads: tuple[jax.Array, ...],
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Returns the state after one update, from the gradients of the vectors of `fetch`."""
    return verbs.run(_update, state, embedded.plan, tuple(grads), tx=tx)


def _update(
    state: EmbeddingState,
    plan: vectors.VectorPlan,
    grads: tuple[jax.Array, ...],
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    nest = plan.pooling.tree.unflatten(grads)
    return vectors.apply_pooled_gradients(state, plan, nest, tx=tx)


def called(embedded: Embedded, held: tuple[jax.Array, ...], ids: Any, given: Any) -> Any:
    """Returns the vectors of a call, in the nesting of its ids.

    Args:
      embedded: from `fetch`.
      held: the vectors of `fetch`.
      ids: nest of int32 arrays of global ids, as they were given to `fetch`. If they are traced,
        the vectors of other ids are NaN.
      given: the user's own arrays, in the nesting of `ids`.

    Returns:
      float32 [.., D] for each array of ids, as `fetch` returned them.

    Raises:
      ValueError: if the nesting or a shape differs from prefetch's, or if the ids are concrete and
        differ from prefetch's.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(ids)
    how = embedded.plan.pooling
    shapes = tuple(np.shape(leaf) for leaf in leaves)
    if treedef != how.tree or shapes != how.shapes:
        raise ValueError(
            "a module with fused=True takes exactly the ids of its prefetch, but prefetch got ids "
            f"{[list(shape) for shape in how.shapes]} in {how.tree}, and the call got "
            f"{[list(shape) for shape in shapes]} in {treedef}; make the module with fused=False "
            "for microbatches, parts of a batch, vmap or scan over it"
        )
    found = [
        vector
        if embedded.origin.inverse_of(own, leaf, embedded.ids) is wanted
        else _where_equal(leaf, wanted, vector)
        for leaf, own, wanted, vector in zip(
            leaves, treedef.flatten_up_to(given), embedded.ids, held, strict=True
        )
    ]
    return treedef.unflatten(found)


def _where_equal(ids: Any, wanted: jax.Array, vectors: jax.Array) -> jax.Array:
    """Returns the vectors, with NaN where an id of a vector differs from prefetch's.

    Raises:
      ValueError: if an id is known to differ.
    """
    differs = jnp.asarray(ids) != wanted
    if not isinstance(differs, jax.core.Tracer) and differs.any():
        where = tuple(int(i) for i in np.argwhere(np.asarray(differs))[0])
        raise ValueError(
            "a module with fused=True takes exactly the ids of its prefetch, but at "
            f"{list(where)} prefetch got row {int(wanted[where])}, and the call got "
            f"{int(np.asarray(ids)[where])} ({int(differs.sum())} such ids); give both the same "
            "ids, or make the module with fused=False"
        )
    if differs.ndim == vectors.ndim:  # a combiner reduces the last axis
        differs = jnp.any(differs, axis=-1)
    return jnp.where(differs[..., None], np.float32(np.nan), vectors)
