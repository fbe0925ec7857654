"""One stack of tables inside an nnx model: its state, and its rows and plan during a step.

Between steps, a stack holds one variable, the EmbeddingState. It is not a Param, so gradients and
optimizers do not see it. In a step, `prefetch` adds the plan and the rows. The rows are a Param, so
that an unchanged nnx.value_and_grad differentiates with respect to them. `apply_gradients` removes
both again. In a step of a module with fused=True (a fused step), vectors take the place of the
rows.
"""

from typing import Any

import optax
from flax import nnx

from mpembed_jax.embedding.state import EmbeddingState, init
from mpembed_jax.nn import fused, prefetched, routing, verbs
from mpembed_jax.nn.routing import Part
from mpembed_jax.spec import EmbeddingSpec


class EmbeddingVariable(nnx.Variable):
    """Holds the EmbeddingState of a stack; it is saved and restored with the model."""


class CachedRows(nnx.Param):
    """Holds the rows of one step, float32 [U, D] on one device.

    Over a mesh, each row of the batch is held once, by its shard. Each of the P shards has rows
    [Q, D], and the whole array is [P * Q, D]. The variable exists between prefetch and
    nn.apply_gradients.
    """


class CachedVectors(nnx.Param):
    """Holds the vectors of one fused step: a tuple of float32 arrays, one for each array of ids.

    It exists between prefetch and nn.apply_gradients.
    """


class PlanVariable(nnx.Variable):
    """Holds the plan of one step; it exists between prefetch and nn.apply_gradients."""


class Stack(nnx.Module):
    """A stack of tables; CachedEmbed and NGramMemory have one, CachedEmbedBags one per spec.

    The calls of a module use only properties of Stack and the functions `part_of` and `vectors_of`.
    The two functions are not methods, because nnx.tabulate compiles public methods and needs arrays
    as their results.

    Args:
      spec: the stack.
      tx: optax transformation for its rows.
      rngs: its `params` stream gives the key of the embedding's randomness.
      fused: whether a step holds vectors in the place of rows; see nn/fused.py. It has no effect
        on a stack with a vocabulary or over a mesh.
      where: mesh, axis_name, placement and implementation, as in init.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        tx: optax.GradientTransformation,
        *,
        rngs: nnx.Rngs,
        fused: bool = False,
        **where: Any,
    ):
        if not callable(getattr(rngs, "params", None)):
            raise TypeError(
                f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}"
            )
        self.spec = spec
        self.tx = tx
        self.fused = fused and spec.vocabulary is None
        self.state = EmbeddingVariable(init(rngs.params(), spec, tx, **where))

    @property
    def is_prefetched(self) -> bool:
        """Whether a step is in progress: rows or vectors are held."""
        return hasattr(self, "plan")

    @property
    def holds_vectors(self) -> bool:
        """Whether a fused step is in progress."""
        return hasattr(self, "held_vectors")

    @property
    def leaf(self) -> str:
        """The name of the attribute with respect to which the loss is differentiated."""
        return "held_vectors" if self.holds_vectors else "rows"

    @property
    def embedding_state(self) -> EmbeddingState:
        """The state, for mpembed_jax.stats, flush, freeze, to_dense.

        Raises:
          ValueError: if it is the state of other tables than those of the spec.
        """
        state = self.state.get_value()
        verbs.check_tables(state, self.spec)
        return state

    def set_embedding_state(self, state: EmbeddingState) -> None:
        """Replaces the state.

        Raises:
          ValueError: if it is the state of other tables than those of the spec, or if a step is
            in progress.
        """
        verbs.check_tables(state, self.spec)
        if self.is_prefetched:
            raise ValueError(
                "the state of an embedding cannot be replaced between prefetch and "
                "nn.apply_gradients, whose update needs the state of its prefetch; replace it "
                "between steps"
            )
        self.state.set_value(state)

    def prefetch(
        self,
        ids: Any,
        given: Any,
        is_training: bool,
        combiner: str | None = None,
        fusible: bool = True,
        by_feature: bool = False,
    ) -> None:
        """Plans a batch, brings its rows into the cache and holds them for one step.

        Args:
          ids: nest of int32 arrays of global ids; of a stack with a vocabulary, uint32 pairs.
          given: the user's own arrays, in the nesting of `ids`.
          is_training: whether the calling module is in training mode.
          combiner: how a fused step reduces the last axis of ids; None: not at all.
          fusible: whether one combiner makes all vectors of these ids, so that the step can be
            fused.
          by_feature: whether the keys of a mapping of ids are features.

        Raises:
          ValueError: if is_training is False, or if a step is in progress.
        """
        if not is_training:
            raise ValueError(
                "prefetch was called in evaluation mode, in which calls only read and rows get "
                "no gradient; call model.train() before training, and do not call prefetch in "
                "evaluation"
            )
        if self.is_prefetched:
            raise ValueError(
                "prefetch was called twice without nn.apply_gradients in between, which would "
                "lose the first batch's update; call grads = nn.apply_gradients(model, grads) "
                "after each prefetch (several inputs in one step: prefetch one nest of them), or "
                "nn.discard(model) to give up a step"
            )
        state = self.embedding_state
        tables = routing.tables_of(self.spec, ids, by_feature)
        if self.fused and fusible and state.layout is None:
            state, embedded, found = fused.fetch(state, ids, given, tables, combiner, self.tx)
            self.held_vectors = CachedVectors(found)
            self.plan = PlanVariable(embedded)
        else:
            state, plan, rows = prefetched.fetch(state, ids, given, tables)
            self.rows = CachedRows(rows)
            self.plan = PlanVariable(plan)
        self.state.set_value(state)

    @property
    def held(self) -> tuple[Any, Any]:
        """The plan of the step in progress, and the rows or vectors that it holds.

        Raises:
          ValueError: if nothing was prefetched.
        """
        if not self.is_prefetched:
            raise ValueError(
                "a cached embedding in training mode was called without prefetch, which would "
                "leave it untrained; call module.prefetch(ids) before nnx.value_and_grad, or "
                "model.eval() if this is evaluation"
            )
        return self.plan.get_value(), getattr(self, self.leaf).get_value()

    def update(self, grads: Any) -> None:
        """Applies one optimizer update to the rows of the step, then drops what the step held.

        Args:
          grads: the gradients of the held rows, or of the held vectors in a fused step.

        Raises:
          ValueError: if nothing was prefetched.
        """
        state = self.embedding_state
        plan, held = self.held
        if self.holds_vectors:
            state = fused.update(state, plan, grads, self.tx)
        else:
            state = prefetched.update(state, plan, held, grads, self.tx)
        self.state.set_value(state)
        self.drop()

    def drop(self) -> None:
        """Drops the held rows or vectors, and their plan."""
        delattr(self, self.leaf)
        del self.plan


def part_of(stack: Stack, ids: Any, given: Any) -> Part:
    """Returns the held rows, the index of each id among them, and the function that pools them.

    Args:
      stack: a stack whose step in progress is not fused.
      ids: nest of int32 arrays of global ids; of a stack with a vocabulary, uint32 pairs.
      given: the user's own arrays, in the nesting of `ids`.

    Raises:
      ValueError: if nothing was prefetched, or if a concrete id was not prefetched.
    """
    plan, rows = stack.held
    return prefetched.part(stack.embedding_state, plan, rows, ids, given)


def vectors_of(stack: Stack, ids: Any, given: Any, is_training: bool) -> Any:
    """Returns the vectors of ids, from what prefetch holds in training, else from the state.

    Args:
      stack: the stack of a module that pools nothing: one vector for each id.
      ids: nest of int32 arrays of global ids; of a stack with a vocabulary, uint32 pairs.
      given: the user's own arrays, in the nesting of `ids`.
      is_training: whether the calling module is in training mode.

    Returns:
      float32 [.., D] for each array of ids, in the nesting of ids.

    Raises:
      ValueError: as `part_of`, and as `fused.called`.
    """
    if not is_training:
        return verbs.read(stack.embedding_state, ids)
    if stack.holds_vectors:
        return fused.called(*stack.held, ids, given)
    part = part_of(stack, ids, given)
    return part.pool(part.rows, part.inverse)


def _stacks(model: nnx.Module) -> list[tuple[tuple, Stack]]:
    found = [
        (path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Stack)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no cached embedding; pass the model that has the "
            "CachedEmbed, CachedEmbedBags or NGramMemory"
        )
    return found


def apply_gradients(model: nnx.Module, grads: Any) -> nnx.State:
    """Updates every prefetched embedding of a model and removes its rows from model and gradients.

    Before this call, grads hold the gradients of dense parameters and of rows. If a module has
    fused=True, they hold the gradients of its vectors instead. To clip by the global norm of
    dense and row gradients together, as dense training does, clip before this call:

      `grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())`

    Args:
      model: the nnx model, differentiated with its rows prefetched.
      grads: nnx.State of gradients from nnx.grad or nnx.value_and_grad over that model.

    Returns:
      The other gradients, for nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads).

    Raises:
      TypeError: if grads are not gradients of a model.
      ValueError: if the model has no cached embedding, if none was prefetched, or if grads lack the
        gradients of a prefetched one.
    """
    waiting = [(path, stack) for path, stack in _stacks(model) if stack.is_prefetched]
    if not waiting:
        raise ValueError(
            "nn.apply_gradients found no prefetched rows in the model; call module.prefetch(ids) "
            "once before each nnx.value_and_grad (a step that trains no embedding needs no "
            "nn.apply_gradients)"
        )
    if hasattr(grads, "shape"):
        raise TypeError(
            "nn.apply_gradients(model, grads): grads must be what nnx.grad or nnx.value_and_grad "
            f"returned for the model, got {type(grads).__name__}"
        )
    flat = dict(nnx.to_flat_state(nnx.state(grads)))
    held_grads = []
    for path, stack in waiting:
        name = (*path, stack.leaf)
        if name not in flat:
            raise ValueError(
                f"grads have no entry {'.'.join(map(str, name))}, which prefetch made; "
                "differentiate this model with respect to all nnx.Param (the default of nnx.grad "
                "and nnx.value_and_grad) and pass the gradients unchanged"
            )
        held = flat.pop(name)
        held_grads.append(held.get_value() if isinstance(held, nnx.Variable) else held)
    # All gradients are looked up before any is applied: if one is missing, no row has changed.
    for (_, stack), gradient in zip(waiting, held_grads, strict=True):
        stack.update(gradient)
    return nnx.from_flat_state(flat)


def discard(model: nnx.Module) -> None:
    """Abandons a step: drops the prefetched rows of every embedding in the model without an update.

    Args:
      model: the nnx model; nothing happens if nothing is prefetched.

    Raises:
      ValueError: if the model has no cached embedding.
    """
    for _, stack in _stacks(model):
        if stack.is_prefetched:
            stack.drop()
