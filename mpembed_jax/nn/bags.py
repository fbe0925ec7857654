"""CachedEmbedBags: an nnx module that turns features into pooled vectors, with many tables.

Features may share tables, and the tables may have several widths.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.embedding.stats import CacheStats, stats
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.nn import fused, routing, verbs
from mpembed_jax.nn.stack import Stack, part_of
from mpembed_jax.spec import EmbeddingSpec


def _held(
    stack: Stack, combiners: routing.Combiners, ids: Any, given: Any, weights: Any
) -> routing.Part | routing.Vectors:
    """Returns what a stack holds for a call in training: rows, or the vectors of a fused step."""
    if not stack.is_prefetched or not stack.holds_vectors:
        return part_of(stack, ids, given)
    routing.check_no_weights(weights)
    bags = routing.fusible(combiners, ids)
    return routing.Vectors(fused.called(*stack.held, ids if bags is None else bags[0], given))


class CachedEmbedBags(nnx.Module):
    """Turns features into one vector per bag, with quantized tables and a float32 cache.

    Rows in the cache are trained in float32, all others in the tables' format. A training step
    runs under nnx.jit with the model donated. It calls `prefetch(ids)` before
    nnx.value_and_grad, and `grads = nn.apply_gradients(model, grads)` after it. After
    `model.eval()`, calls need no prefetch. Ids are local to their tables. They are {feature:
    ids [.., L]} with NO_ID as padding of ragged bags, or an array [.., T] with one column per
    feature. For a spec with a vocabulary, they are raw ids, padded with None or a mask (NO_ID is an
    ordinary raw id), or the pairs uint32 [.., 2] that `spec.raw_ids` returns. Pass pairs to a
    jitted function: jax passes no strings to it, and only 32 bits of an integer.

    Args:
      specs: one EmbeddingSpec, or several: one per width, row format or row optimizer. Features
        that name the same table in `EmbeddingSpec(features=..)` share it.
      tx: optax transformation for the rows; one for all specs, or one per spec.
      combiner: "sum", "mean" or "sqrtn" over the last axis of ids, or None for one vector per id;
        or {feature: combiner}.
      dtype: dtype of the vectors; None for float32. Updates of rows are computed in float32,
        whatever this dtype is.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device. With
        a mesh, the model is still called on whole arrays; it divides their leading axis. In
        training, the length of this axis must be a multiple of the number of devices.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also decides which code pools the vectors.
      fused: True: prefetch makes the vectors, and the loss is differentiated with respect to them.
        With numba on a CPU and an optimizer such as rowwise_adagrad, a step then makes no array of
        rows or of their gradients. Each call must get exactly the ids of its prefetch, in the same
        nesting and shapes, and no weights. Leave it False where something reads or changes
        gradients of rows, such as clipping by the global norm, and for microbatches, vmap or scan.
        fused=True changes nothing over a mesh, in a stack with a vocabulary, and in a stack whose
        bags of several ids have different combiners.
      rngs: its `params` stream determines the initial values and the embedding's own randomness.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if two specs have a feature of the same name, if combiner does not fit the
        features, or if tx does not fit the specs.
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
        fused: bool = False,
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
            "fused": fused,
        }
        self.stacks = nnx.List(
            [
                Stack(s, t, rngs=rngs, **where)
                for s, t in zip(self.specs, transformations, strict=True)
            ]
        )

    @property
    def states(self) -> tuple[EmbeddingState, ...]:
        """The EmbeddingState of each spec, for to_dense, freeze, read and the other verbs."""
        return tuple(stack.embedding_state for stack in self.stacks)

    def set_states(self, states: Sequence[EmbeddingState]) -> None:
        """Replaces the EmbeddingStates between steps, for example by those of write_rows.

        Args:
          states: one per spec, of the same tables. Later steps consume them if they donate the
            model.

        Raises:
          ValueError: if a state is of other tables, or if a step is in progress.
        """
        for stack, state in zip(self.stacks, states, strict=True):
            verbs.check_tables(state, stack.spec)
        for stack, state in zip(self.stacks, states, strict=True):
            stack.set_embedding_state(state)

    def prefetch(self, ids: Any) -> None:
        """Plans a batch and holds its rows for one step.

        Call it once per step, outside the differentiated function, with the ids of all calls.

        Args:
          ids: {feature: integers [.., L]} of some or all features, or integers [.., T]; local to
            their tables, or raw ids or pairs.

        Raises:
          KeyError: if a feature is unknown.
          TypeError: if ids are not integers, or if uint32 ids of a vocabulary are not pairs.
          ValueError: if concrete pairs are of another table; if an array does not fit the
            features; in evaluation mode; if neither nn.apply_gradients nor nn.discard followed the
            last prefetch; if a mesh cannot divide the leading axis of ids evenly; or if
            out_of_range is "raise" and a concrete id is outside its table.
        """
        routed, given = routing.route(self.specs, ids), routing.given(self.specs, ids)
        for stack, part, own in zip(self.stacks, routed, given, strict=True):
            bags = routing.fusible(self.combiners, part) if stack.fused else None
            nest, combiner = (part, None) if bags is None else bags
            stack.prefetch(
                nest,
                own,
                not self.deterministic,
                combiner,
                fusible=bags is not None,
                by_feature=True,
            )

    def __call__(self, ids: Any, weights: Any = None) -> Any:
        """Returns the vectors of bags.

        In training, they are differentiable in the weights and in what prefetch holds: the rows, or
        the vectors with fused=True.

        Args:
          ids: in training, ids that were prefetched, of any of the features, in any shape, order
            and number (with fused=True, exactly those of the prefetch); after eval(), any ids.
          weights: None, or a factor for each id, in the nesting and shapes of ids; a mapping may
            leave features out.

        Returns:
          {feature: [.., D]}, reduced over the last axis of ids ([.., L, D] if the combiner is
          None), or [.., T, D] for array ids. The dtype is `dtype`. Empty bags give zeros. In
          training inside jit, bags with ids that were not prefetched give NaN. If the batch
          exceeded max_unique_ids, these ids read as zeros instead.

        Raises:
          KeyError: if a feature is unknown, or if weights name a feature that ids do not name.
          TypeError: if ids are not integers, or if weights have another nesting.
          ValueError: in training, if prefetch was not called, or, outside jit, if an id of the
            call was not prefetched. Also if ids have no bag axis, if weights have another shape, or
            if there are weights without a combiner. With fused=True, also if there are weights, or
            if nesting or shapes differ from those of the prefetch. Also if out_of_range is "raise"
            and a concrete id is outside its table.
        """
        routed, given = routing.route(self.specs, ids), routing.given(self.specs, ids)
        parts = [
            routing.Part(*verbs.read_unpooled(stack.embedding_state, part))
            if self.deterministic
            else _held(stack, self.combiners, part, own, weights)
            for stack, part, own in zip(self.stacks, routed, given, strict=True)
        ]
        return routing.combine(self.specs, self.combiners, parts, ids, weights, self.dtype)

    def stats(self) -> tuple[CacheStats, ...]:
        """Returns the counts since init for each spec (hit_rate and others) as host numbers.

        See mpembed_jax.stats.
        """
        return tuple(stats(state) for state in self.states)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view, for nnx.view; `deterministic=True` means evaluation."""
        if deterministic is not None:
            self.deterministic = deterministic
