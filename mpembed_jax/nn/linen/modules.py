"""CachedEmbed and CachedEmbedBags for linen.

A module keeps each stack of tables, with its row optimizer, in the collection "embedding". If
the params of a call contain rows (see train_state.py), the call is part of a training step and uses
them. Otherwise it reads the table, as in evaluation.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import optax

from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.embedding.state import EmbeddingState, init
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.nn import prefetched, routing, verbs
from mpembed_jax.nn.embed import DEFAULT_TX, embed_spec
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.spec import EmbeddingSpec

COLLECTION = "embedding"
# The name of a CachedEmbed's only stack, and the prefix of the names of a CachedEmbedBags's stacks.
TABLE, STACK = "table", "stack_"


@partial(jax.tree_util.register_dataclass, data_fields=["state", "plan"], meta_fields=["tx"])
@dataclasses.dataclass(frozen=True)
class Stack:
    """The contents of the collection for one stack of tables."""

    state: EmbeddingState
    plan: prefetched.Prefetched | None  # the plan of the step in progress
    tx: optax.GradientTransformation


def _stack(
    module: Any, name: str, spec: EmbeddingSpec, tx: optax.GradientTransformation
) -> linen.Variable:
    """Declares a stack variable. Its prefetched rows are the param of the same name."""

    def make() -> Stack:
        where = {
            name: getattr(module, name)
            for name in ("mesh", "axis_name", "placement", "implementation")
        }
        return Stack(init(module.make_rng("params"), spec, tx, **where), None, tx)

    return module.variable(COLLECTION, name, make)


def _held_rows(module: linen.Module, name: str) -> jax.Array | None:
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _planned(stack: Stack, rows: jax.Array, ids: Any, given: Any) -> routing.Part:
    if stack.plan is None:
        raise ValueError(
            f"params hold prefetched rows, but collection {COLLECTION!r} holds no plan: params "
            "and collections are of different steps; take both from one TrainState: "
            f"state.apply_fn({{'params': params}}, ..), or state.variables"
        )
    return prefetched.part(stack.state, stack.plan, rows, ids, given)


class CachedEmbed(linen.Module):
    """Turns ids into vectors like linen.Embed, with a quantized table and a float32 cache.

    The rows in use are cached and trained in float32. Train the module with `nn.linen.TrainState`,
    which prefetches and updates the rows.

    Attributes:
      num_embeddings: V, the number of rows of the table.
      features: D, the width of a row.
      tx: optax transformation for the rows; None for optim.rowwise_adagrad(0.05).
      storage: RowFormat, or its name, in which rows outside the cache are stored.
      cache: CacheSpec, or None to train every row in the table.
      dtype: dtype of the vectors; None for float32. Rows are always trained in float32.
      embedding_init: `(key, shape, dtype) -> array`, called on blocks of up to 8,192 rows; None for
        linen.Embed's default.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also selects the pooling.
    """

    num_embeddings: int
    features: int
    tx: optax.GradientTransformation | None = None
    storage: RowFormat | str = "int8"
    cache: CacheSpec | None = CacheSpec()
    dtype: Any = None
    embedding_init: Callable | None = None
    mesh: Any = None
    axis_name: Any = None
    placement: Placement | None = None
    implementation: str | None = None

    def setup(self) -> None:
        """Declares the stack."""
        spec = embed_spec(
            self.num_embeddings, self.features, self.storage, self.cache, self.embedding_init
        )
        self.stack = _stack(self, TABLE, spec, DEFAULT_TX if self.tx is None else self.tx)

    def __call__(self, ids: Any) -> Any:
        """Returns the vectors of ids, differentiable in the prefetched rows.

        Args:
          ids: integers [..] in [0, num_embeddings) or a nest of such arrays. If rows were
            prefetched, the ids must be among them, in any shape, order and number.

        Returns:
          [.., features] in `dtype`, in the nesting of ids. Padding and ids outside the table give
          zeros. In training inside jit, ids that were not prefetched give NaN.

        Raises:
          TypeError: if ids are not integers.
          ValueError: outside jit, if an id was not prefetched.
        """
        stack, rows = self.stack.value, _held_rows(self, TABLE)
        mapped = routing.table_ids(stack.state.spec, ids)
        if rows is None:
            vectors = verbs.read(stack.state, mapped)
        else:
            part = _planned(stack, rows, mapped, ids)
            vectors = part.pool(part.rows, part.inverse)
        return jax.tree.map(
            lambda v: v.astype(jnp.float32 if self.dtype is None else self.dtype), vectors
        )

    def attend(self, query: jax.Array) -> jax.Array:
        """Returns the dot products of queries with every row (dense logits).

        The table is decoded in blocks. The result is differentiable only in the query, and only
        without prefetched rows: in training, the table would silently not be trained. To train it,
        use sampled softmax over prefetched rows.

        Args:
          query: float [.., features].

        Returns:
          [.., num_embeddings] in `dtype`.

        Raises:
          TypeError: if query is not floating.
          ValueError: if its last axis is not features, or if attend is differentiated in a step
            with prefetched rows.
        """
        is_training = _held_rows(self, TABLE) is not None
        return verbs.attend(
            self.stack.value.state,
            query,
            jnp.float32 if self.dtype is None else self.dtype,
            is_training,
        )


class CachedEmbedBags(linen.Module):
    """Turns features into one vector per bag, with quantized tables and a float32 cache.

    The rows in use are cached and trained in float32. Train the module with `nn.linen.TrainState`,
    which prefetches and updates the rows. Ids are local to their tables. They are {feature: ids
    [.., L]} with NO_ID as padding of ragged bags, or an array [.., T] with one column per feature.

    Attributes:
      specs: one EmbeddingSpec, or several: one per width, row format or row optimizer.
      tx: optax transformation for the rows; one for all specs, or one per spec.
      combiner: "sum", "mean" or "sqrtn" over the last axis of ids, or None for one vector per id;
        or {feature: combiner}.
      dtype: dtype of the vectors; None for float32. Rows are always trained in float32.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also selects the pooling.
    """

    specs: Any
    tx: Any
    combiner: Any = "sum"
    dtype: Any = None
    mesh: Any = None
    axis_name: Any = None
    placement: Placement | None = None
    implementation: str | None = None

    def setup(self) -> None:
        """Declares one stack per spec."""
        self.known = routing.as_specs(self.specs)
        self.combiners = routing.as_combiners(self.combiner, self.known)
        pairs = zip(self.known, routing.as_transformations(self.tx, self.known), strict=True)
        self.stacks = [_stack(self, f"{STACK}{i}", spec, tx) for i, (spec, tx) in enumerate(pairs)]

    def __call__(self, ids: Any, weights: Any = None) -> Any:
        """Returns the vectors of bags, differentiable in the prefetched rows and the weights.

        Args:
          ids: {feature: integers [.., L]} of some or all features, or integers [.., T]. If rows
            were prefetched, the ids must be among them, in any shape, order and number.
          weights: None, or a factor for each id, in the nesting and shapes of ids; a mapping may
            leave features out.

        Returns:
          {feature: [.., D]}, reduced over the last axis of ids ([.., L, D] if the combiner is
          None), or [.., T, D] for array ids. The dtype is `dtype`. Empty bags give zeros. In
          training inside jit, bags with ids that were not prefetched give NaN.

        Raises:
          KeyError: if a feature is unknown.
          TypeError: if ids are not integers, or if weights have another nesting.
          ValueError: outside jit, if an id was not prefetched. Also if ids have no bag axis, if
            weights have another shape, or if there are weights without a combiner.
        """
        parts = []
        routed, given = routing.route(self.known, ids), routing.given(self.known, ids)
        for i, (held, part, own) in enumerate(zip(self.stacks, routed, given, strict=True)):
            stack, rows = held.value, _held_rows(self, f"{STACK}{i}")
            if rows is None:
                parts.append(routing.Part(*verbs.read_unpooled(stack.state, part)))
            else:
                parts.append(_planned(stack, rows, part, own))
        dtype = jnp.float32 if self.dtype is None else self.dtype
        return routing.combine(self.known, self.combiners, parts, ids, weights, dtype)
