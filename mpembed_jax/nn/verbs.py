"""The verbs as the flax modules call them: traced inside jit, and compiled once outside it.

If a verb ran outside jit, its loops would be compiled again at every call, and its results could
differ from those of the jitted verb in the last bit. This module also adds two functions to the
verbs: a read for evaluation that returns rows and inverse, like those of a plan, and dense logits
over all rows. It does not use flax.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from mpembed_jax.embedding import admission, evaluation
from mpembed_jax.embedding.pooling import pool
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.spec import EmbeddingSpec

_BLOCK = 8192  # rows of the table that attend decodes at once


@cache
def _jitted(verb: Callable, static: tuple[str, ...]) -> Callable:
    return jax.jit(verb, static_argnames=static)


def run(verb: Callable, state: EmbeddingState, *args: Any, **static: Any) -> Any:
    """Returns verb(state, *args, **static), jitted if the state is not traced.

    Args:
      verb: a pure function.
      state: not consumed.
      *args: pytrees of arrays.
      **static: hashable settings of the verb.

    Raises:
      ValueError: if the state is concrete, and was made for another spec or averaged.
    """
    if isinstance(state.step, jax.core.Tracer):
        return verb(state, *args, **static)
    state.check_spec()
    # The state is not donated, because a caller outside jit may still hold it.
    return _jitted(verb, tuple(static))(state, *args, **static)


def check_tables(state: EmbeddingState, spec: EmbeddingSpec) -> None:
    """Checks that a state has the tables, the dim and the hash of n-grams of a module's spec.

    Only static values are compared, so traced states are checked, too.

    Raises:
      ValueError: if they differ.
    """
    held = state.spec
    if (held.tables, held.embedding_dim) != (spec.tables, spec.embedding_dim):

        def text(of: EmbeddingSpec) -> str:
            sizes = ", ".join(f"{t.name}: {t.vocabulary_size}" for t in of.tables)
            return f"{{{sizes}}} x {of.embedding_dim}"

        raise ValueError(
            f"this module was made for tables {text(spec)}, but holds the state of {text(held)}, "
            "which came from another model (nnx.update, a restored checkpoint); make the module "
            "with the specs of that model, or move the rows with to_dense and from_dense"
        )
    ours, theirs = (None if of.ngrams is None else of.ngrams.settings for of in (spec, held))
    if ours != theirs:
        raise ValueError(
            f"this module was made for the NGramHash {ours}, but holds the state of {theirs}, "
            "which came from another model (nnx.update, a restored checkpoint), and in which "
            "n-grams have other rows; make the module with the seed, boundary and padding of that "
            "model, and a state with nn.ngram_spec"
        )


def is_whole(state: EmbeddingState) -> bool:
    """Returns whether a state over a mesh is used outside jax.shard_map, as whole arrays.

    The modules then run the verbs in jax.shard_map over the state's mesh.
    """
    return state.layout is not None and not state.layout.is_bound


def read(state: EmbeddingState, ids: Any) -> Any:
    """Reads the rows of ids for evaluation; see `evaluation.read`.

    Args:
      state: not consumed.
      ids: nest of int32 arrays [..] of global ids; for a stack with a vocabulary, of uint32 pairs
        [.., 2].

    Returns:
      float32 [.., D] for each array, in the same nesting.

    Raises:
      TypeError: as `evaluation.read`.
      ValueError: as `evaluation.read`.
    """
    return run(evaluation.read, state, ids)


def _read_unpooled(state: EmbeddingState, ids: Any) -> tuple[jax.Array, Any]:
    treedef: Any
    dim = state.spec.embedding_dim
    vectors_of = evaluation.read(state, ids)
    if state.vocabulary is not None:
        ids = admission.rows_of(state, ids)
    leaves, treedef = jax.tree.flatten(ids)
    num_positions = sum(leaf.size for leaf in leaves)
    vectors = [v.reshape(-1, dim) for v in jax.tree.leaves(vectors_of)]
    rows = jnp.concatenate([*vectors, jnp.zeros((1, dim), jnp.float32)])
    inverse = []
    first = 0
    for leaf in leaves:
        index = first + jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape)
        is_real = (jnp.asarray(leaf) >= 0) & (jnp.asarray(leaf) < state.spec.num_rows)
        inverse.append(jnp.where(is_real, index, num_positions))
        first += leaf.size
    return rows, treedef.unflatten(inverse)


def read_unpooled(state: EmbeddingState, ids: Any) -> tuple[jax.Array, Any, Callable]:
    """Reads rows for evaluation, and returns what `pool` needs to make vectors of them.

    Args:
      state: not consumed.
      ids: as for `read`.

    Returns:
      Rows: float32 [N + 1, D], one for each position, and a row of zeros at the end.
      The inverse: int32 [..] in the nesting of ids, the index of each position's row. Padding and
        ids outside the stack have the index N.
      `pool` with the state's implementation, but without foreign calls, so that jax.export can
        export an evaluation.
    """
    implementation = None if state.implementation == "numba" else state.implementation
    return *run(_read_unpooled, state, ids), partial(pool, implementation=implementation)


# --- dense logits


def _table_block(
    state: EmbeddingState, block: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the number of a block's first row (int32 scalar), and its rows ([n, D] in `dtype`).

    All blocks have the same number of rows, so the last block may begin inside the block before.
    The rows that the block before already has are zeros here.
    """
    size = min(_BLOCK, state.spec.num_rows)
    nominal = block * size
    first = jnp.minimum(nominal, state.spec.num_rows - size)
    ids = first + jnp.arange(size, dtype=jnp.int32)
    rows = evaluation.read(state, ids)
    return first, jnp.where(ids[:, None] >= nominal, rows, jnp.float32(0)).astype(dtype)


def _num_blocks(state: EmbeddingState) -> int:
    return -(-state.spec.num_rows // min(_BLOCK, state.spec.num_rows))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _logits(state: EmbeddingState, query: jax.Array, is_training: bool) -> jax.Array:
    """Returns the product of a query [N, D] and the transposed table, float32 [N, V]."""

    def body(block: jax.Array, logits: jax.Array) -> jax.Array:
        first, rows = _table_block(state, block, query.dtype)
        part = jnp.matmul(query, rows.T, preferred_element_type=jnp.float32)
        held = lax.dynamic_slice_in_dim(logits, first, rows.shape[0], axis=1)
        return lax.dynamic_update_slice_in_dim(logits, held + part, first, axis=1)

    logits = jnp.zeros((query.shape[0], state.spec.num_rows), jnp.float32)
    return lax.fori_loop(0, _num_blocks(state), body, logits)


def _logits_fwd(state: Any, query: CustomVJPPrimal, is_training: bool) -> tuple[jax.Array, tuple]:
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    is_table_trained = any(leaf.perturbed for leaf in jax.tree.leaves(state, is_leaf=is_primal))
    if is_training or is_table_trained:
        raise ValueError(
            "attend gives the table no gradient, so training through it would silently not train "
            "the table. To train it, use sampled softmax over prefetched rows: prefetch the "
            "inputs' ids together with the positive and sampled negative ids, call the module "
            "with the same nest, and take the dot products of its vectors. To differentiate with "
            "respect to the query only, switch the module to evaluation first: module.eval() "
            "(linen: an apply without prefetched rows)"
        )
    held = jax.tree.map(lambda leaf: leaf.value, state, is_leaf=is_primal)
    return _logits(held, query.value, is_training), (held, query.value)


def _logits_bwd(is_training: bool, saved: tuple, grad: Any) -> tuple[None, jax.Array]:
    state, query = saved
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, jnp.zeros_like(query)

    def body(block: jax.Array, total: jax.Array) -> jax.Array:
        first, rows = _table_block(state, block, query.dtype)
        part = lax.dynamic_slice_in_dim(grad, first, rows.shape[0], axis=1).astype(query.dtype)
        return total + jnp.matmul(part, rows, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, _num_blocks(state), body, jnp.zeros(query.shape, jnp.float32))
    return None, total.astype(query.dtype)


_logits.defvjp(_logits_fwd, _logits_bwd, symbolic_zeros=True)


def _attend(state: EmbeddingState, query: jax.Array, *, dtype: Any, is_training: bool) -> jax.Array:
    flat = query.astype(dtype).reshape(-1, query.shape[-1])
    return (
        _logits(state, flat, is_training)
        .reshape(*query.shape[:-1], state.spec.num_rows)
        .astype(dtype)
    )


def attend(state: EmbeddingState, query: jax.Array, dtype: Any, is_training: bool) -> jax.Array:
    """Returns the dot products of queries with every row of a stack.

    The rows are read and decoded block by block.

    Args:
      state: not consumed. It gets no gradient.
      query: float [.., D].
      dtype: query and rows are cast to this dtype before they are multiplied. Products are
        accumulated in float32, and the result is cast to this dtype.
      is_training: if True, differentiation with respect to the query raises an error, too.

    Returns:
      [.., V] in `dtype`.

    Raises:
      TypeError: if query is not floating.
      ValueError: if the last axis of query is not D; if the products are differentiated with
        respect to the state; or if they are differentiated at all and is_training is True.
    """
    dim = state.spec.embedding_dim
    query = jnp.asarray(query)
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(
            f"query must be floating [.., {dim}], got {query.dtype} {list(query.shape)}; attend "
            "takes vectors"
        )
    if query.ndim < 1 or query.shape[-1] != dim:
        raise ValueError(
            f"query must be [.., {dim}], the embedding's features, got {list(query.shape)}"
        )
    return run(_attend, state, query, dtype=np.dtype(dtype), is_training=is_training)
