"""One stack of tables inside an nnx model: its state, and for the length of one step the gathered rows and their plan.

Between steps a stack holds one variable, the EmbeddingState, which is no Param: gradients and optimizers do not see it. In
a step `prefetch` adds the plan and the rows, the latter as a Param, so that an unchanged nnx.value_and_grad differentiates
with respect to them, and `apply_gradients` takes both out again.
"""

from typing import Any

import jax
import optax
from flax import nnx

from mpembed_jax.cache.plan import CachePlan
from mpembed_jax.embedding.state import EmbeddingState, init
from mpembed_jax.nn import verbs
from mpembed_jax.nn.routing import Part
from mpembed_jax.spec import EmbeddingSpec


class EmbeddingVariable(nnx.Variable):
    """Holds the EmbeddingState of a stack; saved and restored with the model."""


class CachedRows(nnx.Param):
    """The gathered rows (float32 [U, D]) of one step, between prefetch and nn.apply_gradients."""


class PlanVariable(nnx.Variable):
    """Holds the CachePlan of one step, between prefetch and nn.apply_gradients."""


class Stack(nnx.Module):
    """A stack of tables; CachedEmbed has one, CachedEmbedBags one per spec.

    Args:
      spec: the stack.
      tx: optax transformation for its rows.
      rngs: the key of the embedding's randomness comes from its `params` stream.
      where: mesh, axis_name, placement and implementation, as init takes them.
    """

    def __init__(
        self, spec: EmbeddingSpec, tx: optax.GradientTransformation, *, rngs: nnx.Rngs, **where: Any
    ):
        self.spec = spec
        self.tx = tx
        self.state = EmbeddingVariable(init(rngs.params(), spec, tx, **where))

    @property
    def is_prefetched(self) -> bool:
        """Whether a step is under way: rows are held."""
        return hasattr(self, "rows")

    def embedding_state(self) -> EmbeddingState:
        """Returns the state, for mpembed_jax.stats, flush, freeze, to_dense."""
        return self.state.get_value()

    def prefetch(self, ids: Any, is_training: bool) -> None:
        """Plans a batch, brings its rows into the cache and holds them, for one step.

        Args:
          ids: nest of int32 arrays of global ids.
          is_training: whether the module that asks is in training mode.

        Raises:
          ValueError: if it is not, or if the last prefetch still waits for its nn.apply_gradients.
        """
        if not is_training:
            raise ValueError(
                "prefetch was called in evaluation mode, where calls only read and rows get no gradient; call model.train() "
                "before training, and no prefetch in evaluation"
            )
        if self.is_prefetched:
            raise ValueError(
                "prefetch was called twice without nn.apply_gradients in between, which would lose the first batch's "
                "update; call grads = nn.apply_gradients(model, grads) after each prefetch (several inputs in one step: "
                "prefetch one nest of them), or nn.discard(model) to give up a step"
            )
        state, plan, rows = verbs.fetch(self.state.get_value(), ids)
        self.state.set_value(state)
        self.plan = PlanVariable(plan)
        self.rows = CachedRows(rows)

    def part(self, ids: Any) -> Part:
        """Returns the held rows, the plan's inverse and the pool for them, after checking that ids are those prefetched.

        Raises:
          ValueError: if nothing is prefetched, or other ids.
        """
        if not self.is_prefetched:
            raise ValueError(
                "a cached embedding in training mode was called without prefetch, which would leave it untrained; call "
                "module.prefetch(ids) before nnx.value_and_grad, or model.eval() if this is evaluation"
            )
        plan: CachePlan = self.plan.get_value()
        verbs.check_prefetched(plan, ids)
        return Part(self.rows.get_value(), plan.inverse, verbs.pool_of(self.state.get_value()))

    def update(self, row_grads: jax.Array) -> None:
        """Applies one optimizer update to the held rows, then drops them and their plan."""
        plan, rows = self.plan.get_value(), self.rows.get_value()
        self.state.set_value(verbs.update(self.state.get_value(), plan, rows, row_grads, self.tx))
        self.drop()

    def drop(self) -> None:
        """Forgets the held rows and their plan."""
        del self.plan, self.rows


def _stacks(model: nnx.Module) -> list[tuple[tuple, Stack]]:
    found = [
        (path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Stack)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no cached embedding; pass the model that has the CachedEmbed or CachedEmbedBags"
        )
    return found


def apply_gradients(model: nnx.Module, grads: Any) -> nnx.State:
    """Updates every prefetched embedding of a model and takes its rows out of model and gradients.

    To clip by the global norm of dense and row gradients together, as dense training does, clip before this call:
    `grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())`. Until then grads hold both.

    Args:
      model: the nnx model, differentiated with its rows prefetched.
      grads: nnx.State of gradients from nnx.grad or nnx.value_and_grad over that model.

    Returns:
      The other gradients: what nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads) takes.

    Raises:
      ValueError: if the model has no cached embedding, none was prefetched, or grads miss the rows of one that was.
    """
    waiting = [(path, stack) for path, stack in _stacks(model) if stack.is_prefetched]
    if not waiting:
        raise ValueError(
            "nn.apply_gradients found no prefetched rows in the model; call module.prefetch(ids) once before each "
            "nnx.value_and_grad (a step that leaves every embedding alone needs no nn.apply_gradients)"
        )
    flat = dict(nnx.to_flat_state(nnx.state(grads)))
    row_grads = []
    for path, _ in waiting:
        name = (*path, "rows")
        if name not in flat:
            raise ValueError(
                f"grads have no entry {'.'.join(map(str, name))}, the prefetched rows; differentiate this model with "
                f"respect to all nnx.Param (the default of nnx.grad and nnx.value_and_grad) and pass the gradients unchanged"
            )
        held = flat.pop(name)
        row_grads.append(held.get_value() if isinstance(held, nnx.Variable) else held)
    # All are found before any is applied: an error leaves the model as it was.
    for (_, stack), gradient in zip(waiting, row_grads, strict=True):
        stack.update(gradient)
    return nnx.from_flat_state(flat)


def discard(model: nnx.Module) -> None:
    """Gives up a step: drops the prefetched rows of every embedding in the model, which are then not trained.

    Args:
      model: the nnx model; nothing happens where nothing is prefetched.

    Raises:
      ValueError: if the model has no cached embedding.
    """
    for _, stack in _stacks(model):
        if stack.is_prefetched:
            stack.drop()
