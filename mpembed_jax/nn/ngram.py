"""NGramMemory: an nnx module of n-gram tables, whose rows are quantized and cached.

It is the memory of Engram (arXiv 2601.07372) and of other language models with n-gram embeddings.
At each token, each n-gram that ends there looks up one row in each of its tables. These tables are
the largest of such a model: they have a fifth of all parameters in Engram-27B, and nearly half in
LongCat-Flash-Lite. A step touches few of their rows. Accesses are Zipf-distributed. What the model
does with the vectors (gates, projections) is left to it.

An n-gram finds its rows by a hash. Instead, n-grams can be raw ids: an n-gram that occurs often
enough then competes for a row of its own. All others of its order share
`VocabularySpec.shared_rows` rows, one by default.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.embedding.stats import CacheStats, stats
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.nn.embed import DEFAULT_INIT, DEFAULT_TX
from mpembed_jax.nn.stack import Stack, vectors_of
from mpembed_jax.numerics.formats import RowFormat, as_format
from mpembed_jax.spec import EmbeddingSpec, TableSpec
from mpembed_jax.vocabulary import ngram_hash
from mpembed_jax.vocabulary.ngram_hash import NGramHash
from mpembed_jax.vocabulary.spec import VocabularySpec


class CanonicalTokens(nnx.Variable):
    """Holds the map of tokens, int32 [vocabulary_size]: `canonical` of NGramMemory.

    It is saved and restored with the model.
    """


def ngram_spec(
    ngrams: NGramHash,
    features: int,
    *,
    vocabulary: VocabularySpec | None = None,
    storage: RowFormat | str = "int8",
    cache: CacheSpec | None = CacheSpec(),  # noqa: B008
    embedding_init: Any = None,
    initial_bound: float | None = None,
    max_unique_ids: int | None = None,
    skip_nonfinite: bool = False,
    row_state_dtype: str = "float32",
    memory_kind: str | None = None,
) -> EmbeddingSpec:
    """Returns the spec of an NGramMemory's stack, for example for mpembed_jax.memory.report.

    Args:
      ngrams: the hash; each of its tables is one of the stack.
      features: D, the width of a row.
      vocabulary: the pool of rows, if the n-grams are raw ids; else None.
      storage: RowFormat, or its name.
      cache: CacheSpec of the whole stack, or None.
      embedding_init: see NGramMemory.
      initial_bound: see NGramMemory.
      max_unique_ids: the budget of distinct rows per batch.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      row_state_dtype: dtype of the optimizer state per row.
      memory_kind: see mpembed_jax.EmbeddingSpec.

    Raises:
      TypeError: if ngrams is not an NGramHash, or if another argument has the wrong type.
      ValueError: see mpembed_jax.EmbeddingSpec. Also if only one of vocabulary and ngrams says that
        n-grams are raw ids; or if embedding_init is given with a vocabulary or an initial_bound.
    """
    if not isinstance(ngrams, NGramHash):
        raise TypeError(
            "ngram_spec(ngrams, features): ngrams must be an NGramHash, got "
            f"{type(ngrams).__name__}"
        )
    if (vocabulary is None) != (ngrams.rows is not None):
        raise ValueError(
            "n-grams are raw ids if NGramHash has rows=None and there is a VocabularySpec; got "
            f"rows={ngrams.rows!r} and vocabulary={vocabulary!r}"
        )
    if embedding_init is not None and (vocabulary is not None or initial_bound is not None):
        raise ValueError(
            "if n-grams are raw ids, or if there is an initial_bound, rows start from "
            "uniform(+-initial_bound); leave embedding_init out"
        )
    sizes: Sequence[int | None] = ngrams.table_sizes
    if vocabulary is not None:
        sizes = [None] * len(ngrams.table_names)
    elif initial_bound is None and embedding_init is None:
        embedding_init = DEFAULT_INIT
    tables = tuple(
        TableSpec(name, size, embedding_init, initial_bound)
        for name, size in zip(ngrams.table_names, sizes, strict=True)
    )
    return EmbeddingSpec(
        tables,
        features,
        as_format(storage),
        cache,
        max_unique_ids=max_unique_ids,
        skip_nonfinite=skip_nonfinite,
        row_state_dtype=row_state_dtype,
        memory_kind=memory_kind,
        vocabulary=vocabulary,
        ngrams=ngrams,
    )


def table_rows(rows: Any) -> tuple[Any, VocabularySpec | None]:
    """Returns the `rows` of NGramHash and the vocabulary, of which one is None."""
    return (None, rows) if isinstance(rows, VocabularySpec) else (rows, None)


def ngram_ids(
    spec: EmbeddingSpec, ngrams: NGramHash, canonical: Any, tokens: Any, context: Any
) -> tuple[Any, Any]:
    """Returns the ids of tokens, and the arrays by which the calls of a step recognize these ids.

    Args:
      spec: the spec of the stack.
      ngrams: the hash of the stack.
      canonical: the map of tokens, integers [vocabulary_size], or None.
      tokens: any nest of integers [.., T].
      context: None, or the nest of integers [.., context_size].

    Returns:
      The nest of global ids, int32 [.., T, tables], and the nest of tokens. If n-grams are raw ids,
      the first nest is one of pairs, uint32 [.., T, tables, 2]. With a context, tokens alone do not
      determine the ids, so the second nest is the first one again.
    """

    def of(tokens: Any, context: Any = None) -> Any:
        if spec.vocabulary is not None:
            return ngrams.pairs(tokens, canonical, context)
        return spec.global_ids(ngrams.ids(tokens, canonical, context))

    if context is None:
        return jax.tree.map(of, tokens), tokens
    ids = jax.tree.map(of, tokens, context)
    return ids, ids


def joined_heads(vectors: jax.Array, dtype: Any) -> jax.Array:
    """Returns vectors [.., tables, D] as [.., tables x D] in `dtype`."""
    *lead, tables, dim = vectors.shape
    return vectors.reshape(*lead, tables * dim).astype(dtype)


class NGramMemory(nnx.Module):
    """Turns tokens into the vectors of their n-grams, with quantized tables and a float32 cache.

    Each position gets one row from each table: `heads` tables for each of `orders`. See
    nn.NGramHash for the rows of n-grams. All tables share one cache. Rows in the cache are trained
    in float32, all others in the tables' format. A training step runs under nnx.jit with the model
    donated. It calls `prefetch(tokens)` before nnx.value_and_grad, and
    `grads = nn.apply_gradients(model, grads)` after it. After `model.eval()`, calls need no
    prefetch.

    Args:
      vocabulary_size: tokens are in [0, vocabulary_size).
      features: D, the width of a row.
      orders: orders n of the n-grams, each at least 2.
      heads: tables of each order.
      rows: rows of each table: one number for all orders, or one for each. The number of rows that
        a table gets is the smallest prime that is at least this number and that no earlier table
        has. Or a VocabularySpec: n-grams are raw ids, which earn rows of one pool; heads must be 1.
        No n-gram earns a row in evaluation or decoding.
      canonical: None, or integers [vocabulary_size]: tokens with the same number are the same in
        n-grams, such as a word in upper and lower case. It is saved with the model.
      boundary: a token that no n-gram crosses, or None; see nn.NGramHash.
      padding: a token that stands for no token, or None; its vectors are zeros.
      seed: the seed of the hash. Give each memory of a model a seed of its own. The seed is not an
        array: memories that nnx.vmap makes, as for an nnx.scan over layers, share one hash. Keep
        the memories of such layers outside the scan, for example in an nnx.List.
      tx: optax transformation for the rows. None: optim.rowwise_adagrad(0.05). The model's own
        optimizer never sees the tables.
      storage: RowFormat, or its name, in which rows outside the cache are stored.
      cache: CacheSpec of all tables together, or None to train every row in its table.
      dtype: dtype of the vectors; None for float32. Updates of rows are computed in float32,
        whatever this dtype is.
      embedding_init: `(key, shape, dtype) -> array` for each table; see mpembed_jax.TableSpec. None
        for nnx.Embed's default, if initial_bound is None. Raw ids take no embedding_init.
      initial_bound: rows start from uniform(+-initial_bound). With raw ids, a row starts so when an
        n-gram gets it. None: embedding_init says how rows start; for raw ids, the bound is
        1/sqrt(rows of pool and shared rows).
      max_unique_ids: the budget of distinct rows per batch, see mpembed_jax.EmbeddingSpec.
      skip_nonfinite: whether rows whose gradient is not finite are skipped and counted.
      row_state_dtype: dtype of the optimizer state per row, "float32" or "bfloat16".
      memory_kind: "pinned_host" keeps the packed rows in host memory, behind the cache; see
        mpembed_jax.EmbeddingSpec.
      mesh: jax.sharding.Mesh over which tables and batches are divided; None for one device. With
        a mesh, the model is still called on whole arrays; it divides their leading axis. In
        training, the length of this axis must be a multiple of the number of devices.
      axis_name: the mesh axis that divides rows, see mpembed_jax.init.
      placement: see mpembed_jax.Placement.
      implementation: see mpembed_jax.init; it also decides which code pools the vectors.
      fused: True: prefetch makes the vectors, and the loss is differentiated with respect to them.
        With numba on a CPU and an optimizer such as rowwise_adagrad, a step then makes no array of
        rows or of their gradients. Each call must get exactly the tokens and context of its
        prefetch, in the same nesting and shapes. Leave it False where something reads or changes
        gradients of rows, such as clipping by the global norm, and for microbatches, vmap or scan.
        Over a mesh, or if rows is a VocabularySpec, fused=True changes nothing.
      rngs: its `params` stream determines the initial values and the embedding's own randomness.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if a size is out of range, if canonical does not have vocabulary_size numbers or
        one of them is out of range, or if tx cannot work on gathered rows. Also as NGramHash,
        ngram_spec and mpembed_jax.init.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        orders: Sequence[int] = (2, 3),
        heads: int = 2,
        rows: int | Sequence[int] | VocabularySpec,
        canonical: Any = None,
        boundary: int | None = None,
        padding: int | None = None,
        seed: int = 0,
        tx: optax.GradientTransformation | None = None,
        storage: RowFormat | str = "int8",
        cache: CacheSpec | None = CacheSpec(),  # noqa: B008
        dtype: Any = None,
        embedding_init: Any = None,
        initial_bound: float | None = None,
        max_unique_ids: int | None = None,
        skip_nonfinite: bool = False,
        row_state_dtype: str = "float32",
        memory_kind: str | None = None,
        mesh: Any = None,
        axis_name: Any = None,
        placement: Placement | None = None,
        implementation: str | None = None,
        fused: bool = False,
        rngs: nnx.Rngs,
    ):
        hashed, vocabulary = table_rows(rows)
        self.ngrams = NGramHash(
            vocabulary_size, orders, heads, hashed, boundary=boundary, padding=padding, seed=seed
        )
        self.features = features
        self.dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        self.deterministic = False
        self.canonical = (
            None
            if canonical is None
            else CanonicalTokens(jnp.asarray(ngram_hash.check_canonical(self.ngrams, canonical)))
        )
        spec = ngram_spec(
            self.ngrams,
            features,
            vocabulary=vocabulary,
            storage=storage,
            cache=cache,
            embedding_init=embedding_init,
            initial_bound=initial_bound,
            max_unique_ids=max_unique_ids,
            skip_nonfinite=skip_nonfinite,
            row_state_dtype=row_state_dtype,
            memory_kind=memory_kind,
        )
        where = {
            "mesh": mesh,
            "axis_name": axis_name,
            "placement": placement,
            "implementation": implementation,
            "fused": fused,
        }
        self.stack = Stack(spec, DEFAULT_TX if tx is None else tx, rngs=rngs, **where)

    @property
    def state(self) -> EmbeddingState:
        """The EmbeddingState, for mpembed_jax.to_dense, freeze, read and the other verbs."""
        return self.stack.embedding_state

    def set_state(self, state: EmbeddingState) -> None:
        """Replaces the EmbeddingState between steps, for example by one from write_rows.

        Args:
          state: a state of the same tables, boundary, padding and seed. The map of tokens is not
            part of it. Later steps consume the state if they donate the model.

        Raises:
          ValueError: if the state is of other tables or of another hash, or if a step is in
            progress.
        """
        self.stack.set_embedding_state(state)

    def _ids(self, tokens: Any, context: Any) -> tuple[Any, Any]:
        canonical = None if self.canonical is None else self.canonical.get_value()
        return ngram_ids(self.stack.spec, self.ngrams, canonical, tokens, context)

    def prefetch(self, tokens: Any, context: Any = None) -> None:
        """Plans a batch and holds its rows for one step.

        Call it once per step, outside the differentiated function, with the tokens of all calls.
        The rows depend only on tokens and context, so prefetch can run before all other work of the
        step.

        Args:
          tokens: integers [.., T] in [0, vocabulary_size), or any nest of such arrays. NO_ID and
            `padding` stand for no token. Inside jit, n-grams with a token outside the vocabulary
            read as zeros. They are counted as out of range, unless n-grams are raw ids.
          context: the max(orders) - 1 tokens before each sequence, integers [.., max(orders) - 1]
            in the nesting of tokens. None: texts begin with these tokens.

        Raises:
          TypeError: if tokens are not integers.
          ValueError: if a concrete token is outside the vocabulary; if context has another shape;
            in evaluation mode; if neither nn.apply_gradients nor nn.discard followed the last
            prefetch; or if a mesh cannot divide the leading axis of tokens evenly.
        """
        ids, given = self._ids(tokens, context)
        self.stack.prefetch(ids, given, not self.deterministic)

    def __call__(self, tokens: Any, context: Any = None) -> Any:
        """Returns the vectors of the n-grams that end at each token.

        In training, they are differentiable in what prefetch holds: the rows, or the vectors with
        fused=True.

        Args:
          tokens: integers [.., T], or any nest of such arrays. In training, tokens whose n-grams
            were prefetched; after eval(), any tokens. For decoding, pass one new token at a time,
            [.., 1], with its context.
          context: see prefetch. `context_after` returns the context of the next token.

        Returns:
          [.., T, orders x heads x features] in `dtype`, in the nesting of tokens: the rows of the
          first order's heads, then those of the next order, and so on. Padding gives zeros. In
          training inside jit, n-grams that were not prefetched give NaN, or zeros if the batch
          exceeded max_unique_ids.

        Raises:
          TypeError: if tokens are not integers.
          ValueError: if a concrete token is outside the vocabulary, or if context has another
            shape. In training, also if prefetch was not called. In training outside jit, also if an
            n-gram of the call was not prefetched. With fused=True, also if nesting or shapes differ
            from those of the prefetch.
        """
        ids, given = self._ids(tokens, context)
        vectors = vectors_of(self.stack, ids, given, not self.deterministic)
        return jax.tree.map(lambda v: joined_heads(v, self.dtype), vectors)

    def context_after(self, tokens: Any, context: Any = None) -> Any:
        """Returns the context for the token that follows (int32 [.., max(orders) - 1]).

        Args:
          tokens: integers [.., T], one array. Padding is in front of a shorter sequence: at the
            end, it counts as the tokens just before the next one (see nn.NGramHash.context_after).
          context: the context of these tokens; None if a text begins with them.

        Raises:
          TypeError: if tokens are not integers.
          ValueError: if a concrete token is outside the vocabulary, or context has another shape.
        """
        return self.ngrams.context_after(tokens, context)

    def stats(self) -> CacheStats:
        """Returns the counts since init (hit_rate and others) as host numbers.

        See mpembed_jax.stats.
        """
        return stats(self.state)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view, for nnx.view; `deterministic=True` means evaluation."""
        if deterministic is not None:
            self.deterministic = deterministic
