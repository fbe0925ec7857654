"""A linen train state that trains cached embeddings.

During one step, the gathered rows are in `params`, beside the model's own parameters. `prefetch`
puts them there, so that an unchanged jax.value_and_grad differentiates with respect to them.
`apply_gradients` updates them and removes them. It raises an error if prefetch was not called in
the step. The names follow flax.training.train_state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import core, struct
from flax.traverse_util import flatten_dict, unflatten_dict

from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.embedding.stats import CacheStats, stats
from mpembed_jax.nn import fused, ngram, prefetched, routing, verbs
from mpembed_jax.nn.linen.modules import COLLECTION, TABLE, Stack


def _fetched(stack: Stack, ids: Any, given: Any) -> tuple:
    """Returns state, plan and what `params` contain in the step: rows, or vectors if fused."""
    spec = stack.state.spec
    by_feature = stack.combiners is not None
    if stack.fused and stack.state.layout is None:
        bags: Any = (ids, None)
        if stack.combiners is not None:
            bags = routing.fusible(stack.combiners, ids)
        if bags is not None:
            nest, combiner = bags
            tables = routing.tables_of(spec, nest, by_feature)
            return fused.fetch(stack.state, nest, given, tables, combiner, stack.tx)
    tables = routing.tables_of(spec, ids, by_feature)
    return prefetched.fetch(stack.state, ids, given, tables)


def _by_module(
    what: str, given: Any, names: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, ...], Any]:
    """Returns {path of a module: its part} of a mapping that a user gave to prefetch.

    Args:
      what: the name of the mapping.
      given: the mapping, from names of modules.
      names: {name: path} of the modules that it may name.

    Raises:
      KeyError: if it is no mapping, is empty, or names another module.
    """
    if not isinstance(given, Mapping) or not set(given) <= set(names) or not given:
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise KeyError(
            f"the model has several cached embeddings; prefetch takes {{path: {what}}} for "
            f"{list(names)}, got {got}"
        )
    return {names[name]: value for name, value in given.items()}


class TrainState(struct.PyTreeNode):
    """A TrainState like flax.training's that also holds cached embeddings.

    It keeps the model's other collections and, during a step, the rows of cached embeddings.

    Attributes:
      step: int32 [], number of updates so far.
      params: the model's parameters; between prefetch and apply_gradients also the prefetched rows.
      opt_state: state of tx, for the model's parameters only.
      collections: the model's other collections, including cached embeddings.
      model_apply: the model's apply.
      tx: optax transformation for the model's parameters.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    collections: Any
    model_apply: Callable = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, *, apply_fn: Callable, variables: Mapping[str, Any], tx: optax.GradientTransformation
    ) -> "TrainState":
        """Makes a state from the result of `model.init`.

        Args:
          apply_fn: the model's apply.
          variables: all collections, from model.init.
          tx: optax transformation for the model's parameters. Rows use the transformation of their
            module.

        Returns:
          The state, with an optimizer state for the model's parameters.

        Raises:
          ValueError: if variables hold no cached embedding.
        """
        variables = core.unfreeze(dict(variables))
        others = {name: value for name, value in variables.items() if name != "params"}
        if COLLECTION not in others:
            raise ValueError(
                f"variables have no collection {COLLECTION!r}, only {list(variables)}; pass "
                "variables=model.init(..) of a model that holds a CachedEmbed, "
                "CachedEmbedBags or NGramMemory, not only its params"
            )
        params = variables.get("params", {})
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), others, apply_fn, tx)

    @property
    def variables(self) -> dict[str, Any]:
        """All collections, for `model.apply(state.variables, ..)`.

        Outside a step, such a call is an evaluation.
        """
        return {**self.collections, "params": self.params}

    def apply_fn(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the model's apply; collections that are not given are taken from the state.

        Args:
          variables: for example {"params": params}.
          *args: arguments of the model.
          **kwargs: arguments of apply and of the model.

        Returns:
          The model's result.
        """
        return self.model_apply({**self.collections, **variables}, *args, **kwargs)

    def _stacks(self) -> dict[tuple[str, ...], Stack]:
        flat = flatten_dict(self.collections[COLLECTION])
        return {path: value for path, value in flat.items() if isinstance(value, Stack)}

    @property
    def embeddings(self) -> dict[str, EmbeddingState]:
        """{path of a stack: its EmbeddingState}, for read, to_dense and the other verbs.

        The path of a stack is the path of its module and the name of the stack, such as
        "user/items/table" or "user/items/stack_0".
        """
        return {"/".join(path): stack.state for path, stack in self._stacks().items()}

    def replace_embeddings(self, embeddings: Mapping[str, EmbeddingState]) -> "TrainState":
        """Replaces states of stacks, for example by results of mpembed_jax.write_rows.

        Args:
          embeddings: {path of a stack: state of the same tables}.

        Returns:
          The new train state.

        Raises:
          KeyError: if a path is unknown.
          ValueError: if a state is of other tables, or if a step is in progress.
        """
        stacks = {"/".join(path): (path, stack) for path, stack in self._stacks().items()}
        held = flatten_dict(self.collections[COLLECTION])
        for name, state in embeddings.items():
            if name not in stacks:
                raise KeyError(f"no stack is called {name!r}; the model has {list(stacks)}")
            path, stack = stacks[name]
            verbs.check_tables(state, stack.state.spec)
            if stack.plan is not None:
                raise ValueError(
                    "the state of an embedding was replaced between prefetch and apply_gradients, "
                    "whose update would overwrite it; replace it between steps"
                )
            held[path] = dataclasses.replace(stack, state=state)
        return self.replace(collections={**self.collections, COLLECTION: unflatten_dict(held)})

    def discard(self) -> "TrainState":
        """Abandons a step: removes the prefetched rows from `params` without an update.

        Returns:
          The new state, the same if nothing is prefetched.
        """
        params, held = flatten_dict(self.params), flatten_dict(self.collections[COLLECTION])
        for path, stack in self._stacks().items():
            if stack.plan is not None:
                params.pop(path, None)
                held[path] = dataclasses.replace(stack, plan=None)
        return self.replace(
            params=unflatten_dict(params),
            collections={**self.collections, COLLECTION: unflatten_dict(held)},
        )

    def prefetch(self, ids: Any, context: Any = None) -> "TrainState":
        """Plans a batch and puts its rows into `params` for one step.

        Call it outside the differentiated function.

        Args:
          ids: all ids with which the model's cached embedding will be called in this step, as one
            nest. For an NGramMemory: tokens. If the model has several cached embeddings, a mapping
            {path of a module: its ids}, such as {"user/items": ids}. The mapping names the cached
            embeddings that this step trains.
          context: None, or the context with which an NGramMemory will be called, nested like its
            tokens; see nn.NGramMemory. If the model has several cached embeddings, a mapping {path
            of an NGramMemory: its context}. A memory without an entry has no context.

        Returns:
          The new state. If this state is donated, its tables are consumed.

        Raises:
          KeyError: if a path or feature is unknown, or if ids or context of several cached
            embeddings are not a mapping.
          TypeError: if ids are not integers.
          ValueError: if neither apply_gradients nor discard followed the last prefetch. Also if
            array ids do not fit the features, if a mesh cannot divide their leading axis evenly, if
            out_of_range is "raise" and a concrete id is outside its table, or if a concrete token
            is outside the vocabulary. Also if a context has another shape, or is for a module that
            is no NGramMemory.
        """
        stacks = self._stacks()
        modules = sorted({path[:-1] for path in stacks})
        if any(stack.plan is not None for stack in stacks.values()):
            raise ValueError(
                "prefetch was called twice without apply_gradients in between, which would lose "
                "the first batch's update; call state = state.apply_gradients(grads=grads) after "
                "each prefetch, or state = state.discard() to give up a step"
            )
        if len(modules) == 1:
            by_module = {modules[0]: ids}
            contexts = {modules[0]: context}
        else:
            names = {"/".join(path): path for path in modules}
            by_module = _by_module("ids", ids, names)
            asked = {name: names[name] for name in ids}
            is_empty = context is None or (isinstance(context, Mapping) and not context)
            contexts = {} if is_empty else _by_module("context", context, asked)
        params, held = flatten_dict(self.params), flatten_dict(self.collections[COLLECTION])
        for module, value in by_module.items():
            paths = sorted(
                (path for path in stacks if path[:-1] == module),
                key=lambda path: (len(path[-1]), path[-1]),
            )
            specs = tuple(stacks[path].state.spec for path in paths)
            first = stacks[paths[0]]
            before = contexts.get(module)
            if first.ngrams is None and before is not None:
                raise ValueError(
                    f"{'/'.join(module)!r} is no NGramMemory and takes no context; leave it out"
                )
            if first.ngrams is not None:
                part, own = ngram.ngram_ids(specs[0], first.ngrams, first.canonical, value, before)
                routed, given = [part], [own]
            elif paths[0][-1] == TABLE:
                routed, given = [routing.table_ids(specs[0], value)], [value]
            else:
                routed, given = routing.route(specs, value), routing.given(specs, value)
            for path, part, own in zip(paths, routed, given, strict=True):
                state, plan, params[path] = _fetched(stacks[path], part, own)
                held[path] = dataclasses.replace(stacks[path], state=state, plan=plan)
        return self.replace(
            params=unflatten_dict(params),
            collections={**self.collections, COLLECTION: unflatten_dict(held)},
        )

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Updates the prefetched rows and the model's parameters, and removes the rows.

        To clip by the global norm of dense and row gradients together, clip grads before this call.
        Modules with `fused=True` have gradients of vectors instead of row gradients.

        Args:
          grads: the gradients with respect to `params`, rows included.
          **kwargs: other attributes to replace.

        Returns:
          The state, one step further. If this state is donated, its tables are consumed.

        Raises:
          ValueError: if nothing was prefetched, or if grads lack the rows.
        """
        waiting = {path: stack for path, stack in self._stacks().items() if stack.plan is not None}
        if not waiting:
            raise ValueError(
                "apply_gradients found no prefetched rows, so the embeddings would stay "
                "untrained; call state = state.prefetch(ids) once before jax.value_and_grad (a "
                "step that trains no embedding needs only flax's own TrainState, see RECIPES.md)"
            )
        params, held = flatten_dict(self.params), flatten_dict(self.collections[COLLECTION])
        gradients = flatten_dict(grads)
        for path, stack in waiting.items():
            if path not in gradients or stack.plan is None:
                raise ValueError(
                    f"grads have no entry {'/'.join(path)}, the prefetched rows; differentiate "
                    "with respect to state.params, taken after prefetch, and pass the gradients "
                    "unchanged"
                )
            rows, gradient = params.pop(path), gradients.pop(path)
            if isinstance(stack.plan, fused.Embedded):
                state = fused.update(stack.state, stack.plan, gradient, stack.tx)
            else:
                state = prefetched.update(stack.state, stack.plan, rows, gradient, stack.tx)
            held[path] = dataclasses.replace(stack, state=state, plan=None)
        dense = unflatten_dict(params)
        collections = kwargs.pop("collections", self.collections)
        updates, opt_state = self.tx.update(unflatten_dict(gradients), self.opt_state, dense)
        return self.replace(
            step=self.step + 1,
            params=optax.apply_updates(dense, updates),
            opt_state=opt_state,
            collections={**collections, COLLECTION: unflatten_dict(held)},
            **kwargs,
        )

    def stats(self) -> dict[str, CacheStats]:
        """Returns {path of a stack: counts since init} as host numbers; see mpembed_jax.stats."""
        return {"/".join(path): stats(stack.state) for path, stack in self._stacks().items()}
