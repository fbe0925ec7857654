"""CachedEmbed, CachedEmbedBags and NGramMemory for linen.

A module keeps each stack of tables, with its row optimizer, in the collection "embedding". If
the params of a call contain rows (see train_state.py), the call is part of a training step and uses
them. Otherwise it reads the table, as in evaluation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.embedding.state import EmbeddingState, init
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.nn import fused, ngram, prefetched, routing, verbs
from mpembed_jax.nn.embed import DEFAULT_TX, embed_spec
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.vocabulary import ngram_hash
from mpembed_jax.vocabulary.ngram_hash import NGramHash
from mpembed_jax.vocabulary.spec import VocabularySpec

COLLECTION = "embedding"
# A CachedEmbed or NGramMemory has one stack, named TABLE. STACK begins the names of the stacks of a
# CachedEmbedBags.
TABLE, STACK = "table", "stack_"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "plan", "canonical"],
    meta_fields=["tx", "ngrams", "fused", "combiners"],
)
@dataclasses.dataclass(frozen=True)
class Stack:
    """The contents of the collection for one stack of tables."""

    state: EmbeddingState
    plan: prefetched.Prefetched | fused.Embedded | None  # the plan of the step in progress
    tx: optax.GradientTransformation
    ngrams: NGramHash | None = None  # of an NGramMemory
    canonical: jax.Array | None = None  # i32 [vocabulary_size]: an NGramMemory's map of tokens
    fused: bool = False
    combiners: routing.Combiners | None = None  # of a CachedEmbedBags


def _stack(
    module: Any,
    name: str,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    ngrams: NGramHash | None = None,
    canonical: Any = None,
    combiners: routing.Combiners | None = None,
) -> linen.Variable:
    """Declares a stack variable. Its prefetched rows are the param of the same name."""

    def make() -> Stack:
        where = {
            name: getattr(module, name)
            for name in ("mesh", "axis_name", "placement", "implementation")
        }
        state = init(module.make_rng("params"), spec, tx, **where)
        held = None if canonical is None else jnp.asarray(canonical)
        is_fused = module.fused and state.vocabulary is None
        return Stack(state, None, tx, ngrams, held, is_fused, combiners)

    return module.variable(COLLECTION, name, make)


def _checked(stack: Stack, spec: EmbeddingSpec) -> Stack:
    """Returns the stack, if it has the tables of the module's spec."""
    verbs.check_tables(stack.state, spec)
    return stack


def _check_vocabulary(stack: Stack, vocabulary_size: int, canonical: np.ndarray | None) -> None:
    """Checks that the stack of an NGramMemory has the module's vocabulary and map of tokens.

    The numbers of a traced map are not compared.

    Raises:
      ValueError: if they differ.
    """
    held = stack.canonical
    size = None if stack.ngrams is None else stack.ngrams.vocabulary_size
    is_same = size == vocabulary_size
    if held is None or canonical is None:
        is_same &= held is canonical
    elif not isinstance(held, jax.core.Tracer):
        is_same &= np.array_equal(held, canonical)
    if not is_same:
        maps = ["no map of tokens" if m is None else "a map of tokens" for m in (canonical, held)]
        raise ValueError(
            f"this module has a vocabulary of {vocabulary_size} and {maps[0]}, collection "
            f"{COLLECTION!r} was made with one of {size} and {maps[1]}, or with another map; make "
            "the module with the vocabulary_size and canonical of the model that made it"
        )


def _held_rows(module: linen.Module, name: str) -> Any:
    """Returns the rows, or the vectors of a fused step, that params hold; None outside a step."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _check_planned(stack: Stack) -> None:
    if stack.plan is None:
        raise ValueError(
            f"params hold prefetched rows, but collection {COLLECTION!r} holds no plan: params "
            "and collections are of different steps; take both from one TrainState: "
            f"state.apply_fn({{'params': params}}, ..), or state.variables"
        )


def _planned(stack: Stack, rows: Any, ids: Any, given: Any, weights: Any = None) -> Any:
    """Returns a stack's Part of a call in training, or its Vectors if the step is fused."""
    _check_planned(stack)
    if not isinstance(stack.plan, fused.Embedded):
        assert stack.plan is not None
        return prefetched.part(stack.state, stack.plan, rows, ids, given)
    routing.check_no_weights(weights)
    bags = None if stack.combiners is None else routing.fusible(stack.combiners, ids)
    nest = ids if bags is None else bags[0]
    return routing.Vectors(fused.called(stack.plan, rows, nest, given))


def _vectors(module: Any, stack: Stack, ids: Any, given: Any) -> Any:
    """Returns the vectors of a module's only stack: from the held rows, or read from the stack."""
    rows = _held_rows(module, TABLE)
    if rows is None:
        return verbs.read(stack.state, ids)
    part = _planned(stack, rows, ids, given)
    if isinstance(part, routing.Vectors):
        return part.vectors
    return part.pool(part.rows, part.inverse)


class CachedEmbed(linen.Module):
    """Turns ids into vectors like linen.Embed, with a quantized table and a float32 cache.

    Rows in the cache are trained in float32, all others in the table's format. Train the module
    with `nn.linen.TrainState`, which prefetches and updates the rows.

    Attributes:
      num_embeddings: V, the number of rows of the table.
      features: D, the width of a row.
      tx: optax transformation for the rows; None for optim.rowwise_adagrad(0.05).
      storage: RowFormat, or its name, in which rows outside the cache are stored.
      cache: CacheSpec, or None to train every row in the table.
      dtype: dtype of the vectors; None for float32. Updates of rows are computed in float32,
        whatever this dtype is.
      embedding_init: `(key, shape, dtype) -> array`, as for linen.Embed; see mpembed_jax.TableSpec.
        None for linen.Embed's default.
      out_of_range: the rule for ids outside the table, see mpembed_jax.EmbeddingSpec.
      max_unique_ids: the budget of distinct ids per batch, see mpembed_jax.EmbeddingSpec.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      row_state_dtype: dtype of the optimizer state per row, "float32" or "bfloat16".
      memory_kind: None, or "pinned_host" for a table in host memory.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also decides which code pools the vectors.
      fused: see the nnx module. If True, `params` hold vectors, not rows, during a step.
    """

    num_embeddings: int
    features: int
    tx: optax.GradientTransformation | None = None
    storage: RowFormat | str = "int8"
    cache: CacheSpec | None = CacheSpec()
    dtype: Any = None
    embedding_init: Callable | None = None
    out_of_range: str = "drop"
    max_unique_ids: int | None = None
    skip_nonfinite: bool = False
    row_state_dtype: str = "float32"
    memory_kind: str | None = None
    mesh: Any = None
    axis_name: Any = None
    placement: Placement | None = None
    implementation: str | None = None
    fused: bool = False

    def setup(self) -> None:
        """Declares the stack.

        Raises:
          TypeError: as the nnx module.
          ValueError: as the nnx module.
        """
        spec = embed_spec(
            self.num_embeddings,
            self.features,
            self.storage,
            self.cache,
            self.embedding_init,
            out_of_range=self.out_of_range,
            max_unique_ids=self.max_unique_ids,
            skip_nonfinite=self.skip_nonfinite,
            row_state_dtype=self.row_state_dtype,
            memory_kind=self.memory_kind,
        )
        self.spec = spec
        self.stack = _stack(self, TABLE, spec, DEFAULT_TX if self.tx is None else self.tx)

    def __call__(self, ids: Any) -> Any:
        """Returns the vectors of ids, differentiable in the prefetched rows.

        Args:
          ids: integers [..] in [0, num_embeddings) or a nest of such arrays. NO_ID is padding. In
            training, each id must have been prefetched; shape, order and number are free. With
            fused=True, they must be exactly the ids of the prefetch, in its nesting and shapes.

        Returns:
          [.., features] in `dtype`, in the nesting of ids. Padding gives zeros. Ids outside the
          table are treated by the rule `out_of_range`. In training inside jit, ids that were not
          prefetched give NaN, or zeros if the batch exceeded max_unique_ids.

        Raises:
          TypeError: if ids are not integers.
          ValueError: outside jit, if an id was not prefetched; if params and collections are of
            different steps; if out_of_range is "raise" and a concrete id is outside the table. In a
            fused step, also if nesting or shapes differ from those of the prefetch.
        """
        stack = _checked(self.stack.value, self.spec)
        mapped = routing.table_ids(stack.state.spec, ids)
        vectors = _vectors(self, stack, mapped, ids)
        return jax.tree.map(
            lambda v: v.astype(jnp.float32 if self.dtype is None else self.dtype), vectors
        )

    def attend(self, query: jax.Array) -> jax.Array:
        """Returns the dot products of queries with every row (dense logits).

        The table is decoded in blocks. The result is differentiable in the query only. With
        prefetched rows, differentiation raises an error, because the table would get no gradient.
        To train the table, use sampled softmax over prefetched rows.

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
            _checked(self.stack.value, self.spec).state,
            query,
            jnp.float32 if self.dtype is None else self.dtype,
            is_training,
        )


class CachedEmbedBags(linen.Module):
    """Turns features into one vector per bag, with quantized tables and a float32 cache.

    Rows in the cache are trained in float32, all others in the tables' format. Train the module
    with `nn.linen.TrainState`, which prefetches and updates the rows. Ids are local to their
    tables. They are {feature: ids [.., L]} with NO_ID as padding of ragged bags, or an array
    [.., T] with one column per feature. For a spec with a vocabulary, they are raw ids or pairs;
    see the nnx module.

    Attributes:
      specs: one EmbeddingSpec, or several: one per width, row format or row optimizer.
      tx: optax transformation for the rows; one for all specs, or one per spec.
      combiner: "sum", "mean" or "sqrtn" over the last axis of ids, or None for one vector per id;
        or {feature: combiner}.
      dtype: dtype of the vectors; None for float32. Updates of rows are computed in float32,
        whatever this dtype is.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also decides which code pools the vectors.
      fused: see the nnx module. If True, `params` hold vectors, not rows, during a step.
    """

    specs: Any
    tx: Any
    combiner: Any = "sum"
    dtype: Any = None
    mesh: Any = None
    axis_name: Any = None
    placement: Placement | None = None
    implementation: str | None = None
    fused: bool = False

    def setup(self) -> None:
        """Declares one stack per spec.

        Raises:
          TypeError: as the nnx module.
          ValueError: as the nnx module.
        """
        self.known = routing.as_specs(self.specs)
        self.combiners = routing.as_combiners(self.combiner, self.known)
        pairs = zip(self.known, routing.as_transformations(self.tx, self.known), strict=True)
        self.stacks = [
            _stack(self, f"{STACK}{i}", spec, tx, combiners=self.combiners)
            for i, (spec, tx) in enumerate(pairs)
        ]

    def __call__(self, ids: Any, weights: Any = None) -> Any:
        """Returns the vectors of bags, differentiable in the prefetched rows and the weights.

        Args:
          ids: {feature: integers [.., L]} of some or all features, or integers [.., T]. In
            training, each id must have been prefetched; shape, order and number are free. With
            fused=True, they must be exactly the ids of the prefetch, in its nesting and shapes.
          weights: None, or a factor for each id, in the nesting and shapes of ids; a mapping may
            leave features out. Weights are cast to float32.

        Returns:
          {feature: [.., D]}, reduced over the last axis of ids ([.., L, D] if the combiner is
          None), or [.., T, D] for array ids. The dtype is `dtype`. Empty bags give zeros. In
          training inside jit, bags with ids that were not prefetched give NaN. If the batch
          exceeded max_unique_ids, these ids read as zeros instead.

        Raises:
          KeyError: if a feature is unknown, or if weights name a feature that ids do not name.
          TypeError: if ids are not integers, or if weights have another nesting.
          ValueError: outside jit, if an id was not prefetched; if params and collections are of
            different steps; if out_of_range is "raise" and a concrete id is outside its table. Also
            if ids have no bag axis, or if array ids have another number of columns, or features of
            several widths. Also if weights have another shape, or if there are weights without a
            combiner. In a fused step, also if there are weights, or if nesting or shapes differ
            from those of the prefetch.
        """
        parts: list[Any] = []
        routed, given = routing.route(self.known, ids), routing.given(self.known, ids)
        for i, (held, part, own) in enumerate(zip(self.stacks, routed, given, strict=True)):
            stack = _checked(held.value, self.known[i])
            rows = _held_rows(self, f"{STACK}{i}")
            if rows is None:
                parts.append(routing.Part(*verbs.read_unpooled(stack.state, part)))
            else:
                parts.append(_planned(stack, rows, part, own, weights))
        dtype = jnp.float32 if self.dtype is None else self.dtype
        return routing.combine(self.known, self.combiners, parts, ids, weights, dtype)


class NGramMemory(linen.Module):
    """Turns tokens into the vectors of their n-grams, with quantized tables and a float32 cache.

    Each position gets one row from each table: `heads` tables for each of `orders`. See
    nn.NGramHash for the rows of n-grams. Train the module with `nn.linen.TrainState`, whose
    `prefetch` takes the tokens and their context.

    Attributes:
      vocabulary_size: tokens are in [0, vocabulary_size).
      features: D, the width of a row.
      rows: rows of each table: one number for all orders, or one for each. The size of each table
        is a different prime, at least this number. Or a VocabularySpec, if n-grams are raw ids; see
        the nnx module.
      orders: orders n of the n-grams, each at least 2.
      heads: tables of each order.
      canonical: None, or integers [vocabulary_size]: tokens with the same number are the same in
        n-grams. Pass a tuple if something hashes the module, because arrays have no hash. The map
        is kept in the collection. A call outside jit compares the two; inside jit, the kept one is
        used.
      boundary: a token that no n-gram crosses, or None; see nn.NGramHash.
      padding: a token that stands for no token, or None; its vectors are zeros.
      seed: the seed of the hash. Give each memory of a model a different seed. Layers of a
        linen.scan share one module, and so one hash; see the nnx module.
      tx: optax transformation for the rows; None for optim.rowwise_adagrad(0.05).
      storage: RowFormat, or its name, in which rows outside the cache are stored.
      cache: CacheSpec of all tables together, or None to train every row in its table.
      dtype: dtype of the vectors; None for float32. Updates of rows are computed in float32,
        whatever this dtype is.
      embedding_init: `(key, shape, dtype) -> array` for each table; see mpembed_jax.TableSpec. None
        for linen.Embed's default, if initial_bound is None.
      max_unique_ids: the budget of distinct rows per batch, see mpembed_jax.EmbeddingSpec.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      row_state_dtype: dtype of the optimizer state per row, "float32" or "bfloat16".
      memory_kind: see mpembed_jax.EmbeddingSpec.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also decides which code pools the vectors.
      fused: see the nnx module. If True, `params` hold vectors, not rows, during a step.
      initial_bound: see the nnx module.
    """

    vocabulary_size: int
    features: int
    rows: int | Sequence[int] | VocabularySpec
    orders: Sequence[int] = (2, 3)
    heads: int = 2
    canonical: Any = None
    boundary: int | None = None
    padding: int | None = None
    seed: int = 0
    tx: optax.GradientTransformation | None = None
    storage: RowFormat | str = "int8"
    cache: CacheSpec | None = CacheSpec()
    dtype: Any = None
    embedding_init: Callable | None = None
    max_unique_ids: int | None = None
    skip_nonfinite: bool = False
    row_state_dtype: str = "float32"
    memory_kind: str | None = None
    mesh: Any = None
    axis_name: Any = None
    placement: Placement | None = None
    implementation: str | None = None
    fused: bool = False
    initial_bound: float | None = None

    def setup(self) -> None:
        """Declares the stack.

        Raises:
          TypeError: as the nnx module.
          ValueError: as the nnx module.
        """
        rows, vocabulary = ngram.table_rows(self.rows)
        ngrams = NGramHash(
            self.vocabulary_size,
            self.orders,
            self.heads,
            rows,
            boundary=self.boundary,
            padding=self.padding,
            seed=self.seed,
        )
        spec = ngram.ngram_spec(
            ngrams,
            self.features,
            vocabulary=vocabulary,
            storage=self.storage,
            cache=self.cache,
            embedding_init=self.embedding_init,
            initial_bound=self.initial_bound,
            max_unique_ids=self.max_unique_ids,
            skip_nonfinite=self.skip_nonfinite,
            row_state_dtype=self.row_state_dtype,
            memory_kind=self.memory_kind,
        )
        canonical = (
            None if self.canonical is None else ngram_hash.check_canonical(ngrams, self.canonical)
        )
        tx = DEFAULT_TX if self.tx is None else self.tx
        self.spec = spec
        self.mapped = canonical
        self.stack = _stack(self, TABLE, spec, tx, ngrams, canonical)

    def __call__(self, tokens: Any, context: Any = None) -> Any:
        """Returns the vectors of the n-grams that end at each token.

        They are differentiable in the prefetched rows.

        Args:
          tokens: integers [.., T] in [0, vocabulary_size) or a nest of such arrays. NO_ID and
            `padding` stand for no token. In training, each n-gram must have been prefetched. With
            fused=True, these must be exactly the tokens of the prefetch, in its nesting and shapes.
          context: the tokens before these, integers [.., max(orders) - 1], nested like tokens.
            None if texts begin with these tokens. See nn.NGramHash.context_after.

        Returns:
          [.., T, orders x heads x features] in `dtype`, in the nesting of tokens. Padding gives
          zeros. In training inside jit, n-grams that were not prefetched give NaN, or zeros if the
          batch exceeded max_unique_ids.

        Raises:
          TypeError: if tokens are not integers.
          ValueError: if a concrete token is outside the vocabulary, if context has another shape,
            if params and collections are of different steps, or if the collection is of other
            tables, another hash, vocabulary or map of tokens. Outside jit, also if an n-gram was
            not prefetched. In a fused step, also if nesting or shapes differ from those of the
            prefetch.
        """
        stack = _checked(self.stack.value, self.spec)
        assert stack.ngrams is not None
        _check_vocabulary(stack, self.vocabulary_size, self.mapped)
        ids, given = ngram.ngram_ids(
            stack.state.spec, stack.ngrams, stack.canonical, tokens, context
        )
        vectors = _vectors(self, stack, ids, given)
        dtype = jnp.float32 if self.dtype is None else self.dtype
        return jax.tree.map(lambda v: ngram.joined_heads(v, dtype), vectors)
