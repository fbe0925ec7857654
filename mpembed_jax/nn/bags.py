"""CachedEmbedBags: many tables, shared or of several widths, as one module from features to pooled vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.embedding.stats import CacheStats, stats
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.nn import routing, verbs
from mpembed_jax.nn.stack import Stack
from mpembed_jax.spec import EmbeddingSpec


class CachedEmbedBags(nnx.Module):
    """Turns features into one vector per bag; tables are quantized, rows in use cached and trained in float32.

    A training step calls `prefetch(ids)` before nnx.value_and_grad and `grads = nn.apply_gradients(model, grads)` after it,
    under nnx.jit with the model donated. After `model.eval()` calls need no prefetch. Ids are local to their tables:
    {feature: ids [.., L]} with NO_ID padding ragged bags, or an array [.., T] with one column per feature.

    Args:
      specs: one EmbeddingSpec, or several: one per width, row format or row optimizer. Features that name one table in
        `EmbeddingSpec(features=..)` share it.
      tx: optax transformation for the rows, one for all specs or one per spec.
      combiner: "sum", "mean" or "sqrtn" over the last axis of ids, or None for one vector per id; or {feature: combiner}.
      dtype: of the vectors; None: float32. Rows are trained in float32 whatever it is.
      mesh: jax.sharding.Mesh to divide tables and batches over, None for one device; the model is called as without, on
        whole arrays whose leading axis is divided.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; the pooling follows it.
      rngs: the initial values and the embedding's own randomness derive from its `params` stream.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if two specs have a feature of one name, combiner does not fit the features, or tx the specs.
    """

    def __init__(
        self,
        specs: EmbeddingSpec | Sequence[EmbeddingSpec],
        tx: optax.GradientTransformation | Sequence[optax.GradientTransformation],
        *,
        combiner: str | Mapping[str, str | None] | None = "sum",
        dtype: Any = None,
        mesh: Any = None,
        axis_name: Any = None,
        placement: Placement | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.specs = routing.as_specs(specs)
        self.combiners = routing.as_combiners(combiner, self.specs)
        self.dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        self.deterministic = False
        transformations = routing.as_transformations(tx, self.specs)
        where = {
            "mesh": mesh,
            "axis_name": axis_name,
            "placement": placement,
            "implementation": implementation,
        }
        self.stacks = nnx.List(
            [
                Stack(s, t, rngs=rngs, **where)
                for s, t in zip(self.specs, transformations, strict=True)
            ]
        )

    @property
    def states(self) -> tuple[EmbeddingState, ...]:
        """The EmbeddingState of each spec, for mpembed_jax.to_dense, freeze, read and the other verbs."""
        return tuple(stack.embedding_state() for stack in self.stacks)

    def prefetch(self, ids: Any) -> None:
        """Plans a batch and holds its rows for one step; call it outside the differentiated function.

        Args:
          ids: {feature: integers [.., L]} of some or all features, or integers [.., T]; local to their tables.

        Raises:
          KeyError: on an unknown feature.
          TypeError: if ids are not integers.
          ValueError: if an array does not fit the features, in evaluation mode, or if the last prefetch still waits for its
            nn.apply_gradients.
        """
        for stack, part in zip(self.stacks, routing.route(self.specs, ids), strict=True):
            stack.prefetch(part, not self.deterministic)

    def __call__(self, ids: Any, weights: Any = None) -> Any:
        """Returns the vectors of bags, differentiable with respect to the prefetched rows and the weights.

        Args:
          ids: what prefetch was given, in training; any ids, after eval().
          weights: None, or the factor of each id, nested and shaped as ids; a mapping may leave features out.

        Returns:
          {feature: [.., D]} with the last axis of ids reduced ([.., L, D] where the combiner is None), or [.., T, D] for
          array ids; in dtype. Empty bags are zeros.

        Raises:
          KeyError: on an unknown feature.
          TypeError: if ids are not integers, or weights are nested otherwise.
          ValueError: in training, without prefetch or with other ids than it was given; on ids without a bag axis, or
            weights of another shape or without a combiner.
        """
        parts = [
            routing.Part(*verbs.read_unpooled(stack.embedding_state(), part))
            if self.deterministic
            else stack.part(part)
            for stack, part in zip(self.stacks, routing.route(self.specs, ids), strict=True)
        ]
        return routing.combine(self.specs, self.combiners, parts, ids, weights, self.dtype)

    def stats(self) -> tuple[CacheStats, ...]:
        """Returns for each spec the counts since init, hit_rate among them, as host numbers; see mpembed_jax.stats."""
        return tuple(stats(state) for state in self.states)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view, as nnx.view(model, deterministic=True) asks; True is evaluation."""
        if deterministic is not None:
            self.deterministic = deterministic
