"""From unique rows to the vectors a model wants: one per id, or one per bag (sum, mean, sqrtn), weighted, ragged.

The gradient with respect to the unique rows is a sum over the positions that hold each row. It is written here, as one
custom VJP over all features of a batch, because the transpose of `rows[inverse]` would make one table of gradients per
feature, and because a scatter-add with duplicate ids is very slow on some GPU builds (jax#38806), where positions are
sorted instead. Conventions follow tf.nn.embedding_lookup_sparse.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax import access, ops, varying

COMBINERS = ("sum", "mean", "sqrtn")


def _coefficients(weights: jax.Array | None, is_real: jax.Array, combiner: str) -> jax.Array:
    """Returns the factor (float32 [.., L]) of each position in its bag; zeros for an empty bag."""
    w = is_real.astype(jnp.float32) if weights is None else jnp.where(is_real, weights, jnp.float32(0))
    if combiner == "sum":
        return w
    total = jnp.sum(w, axis=-1, keepdims=True)
    if combiner == "sqrtn":
        squares = jnp.sum(jnp.square(w), axis=-1, keepdims=True)
        total = jnp.sqrt(jnp.where(squares > 0, squares, jnp.float32(1)))
        total = jnp.where(squares > 0, total, jnp.float32(0))
    return jnp.where(total != 0, w / jnp.where(total != 0, total, jnp.float32(1)), jnp.float32(0))


@jax.custom_vjp
def _take(rows: jax.Array, index: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Gathers rows [U, D] at each index array [..]; one gather for all of them."""
    sizes = np.cumsum([i.size for i in index])[:-1]
    flat = access.take(rows, jnp.concatenate([i.reshape(-1) for i in index]))
    parts = jnp.split(flat, sizes)
    return tuple(part.reshape(*i.shape, rows.shape[1]) for part, i in zip(parts, index, strict=True))


def _take_fwd(rows: jax.Array, index: tuple[jax.Array, ...]) -> tuple:
    return _take(rows, index), (rows, index)


def _take_bwd(saved: tuple, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    rows, index = saved
    flat_index = jnp.concatenate([i.reshape(-1) for i in index])
    flat_grads = jnp.concatenate([g.reshape(-1, rows.shape[1]) for g in grads])
    return ops.add_duplicates(jnp.zeros_like(rows), flat_index, flat_grads), None


_take.defvjp(_take_fwd, _take_bwd)


@jax.custom_vjp
def _bag(rows: jax.Array, index: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns sum_l factors[.., l] * rows[index[.., l]], one position of all bags at a time: no [.., L, D] array."""
    shape = (*index.shape[:-1], rows.shape[1])
    if index.shape[-1] == 0:
        return jnp.zeros(shape, jnp.float32)

    def body(position: jax.Array, total: jax.Array) -> jax.Array:
        here = lax.dynamic_index_in_dim(index, position, -1, keepdims=False)
        factor = lax.dynamic_index_in_dim(factors, position, -1, keepdims=False)
        return total + factor[..., None] * access.take(rows, here)

    start = varying.settle(lambda total: body(jnp.int32(0), total), jnp.zeros(shape, jnp.float32))
    return lax.fori_loop(0, index.shape[-1], body, start)


def _bag_fwd(rows: jax.Array, index: jax.Array, factors: jax.Array) -> tuple:
    return _bag(rows, index, factors), (rows, index, factors)


def _bag_bwd(saved: tuple, grad: jax.Array) -> tuple:
    rows, index, factors = saved
    if index.shape[-1] == 0:
        return jnp.zeros_like(rows), None, factors

    def body(position: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row_grads, factor_grads = carry
        here = lax.dynamic_index_in_dim(index, position, -1, keepdims=False)
        factor = lax.dynamic_index_in_dim(factors, position, -1, keepdims=False)
        addend = (factor[..., None] * grad).reshape(-1, rows.shape[1])
        row_grads = ops.add_duplicates(row_grads, here.reshape(-1), addend)
        along = jnp.sum(grad * access.take(rows, here), axis=-1)
        return row_grads, lax.dynamic_update_index_in_dim(factor_grads, along, position, factors.ndim - 1)

    start = varying.settle(lambda carry: body(jnp.int32(0), carry), (jnp.zeros_like(rows), jnp.zeros_like(factors)))
    row_grads, factor_grads = lax.fori_loop(0, index.shape[-1], body, start)
    return row_grads, None, factor_grads


_bag.defvjp(_bag_fwd, _bag_bwd)


@jax.named_scope("pool")
def pool(
    rows: jax.Array,
    inverse: Any,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
) -> Any:
    """Turns unique rows into vectors per id or per bag; differentiable (reverse mode) in rows and weights.

    Padding positions count for nothing: not in sums, not in the denominators of mean and sqrtn. An empty bag is zeros.
    mean divides by the sum of weights, sqrtn by sqrt(sum of squared weights).

    Args:
      rows: float32 [U, D], from `lookup`; the last row is padding.
      inverse: nest of int32 [..], from `plan.inverse`.
      weights: None, or like inverse: float32 factor of each position.
      combiner: None for one vector per id; "sum", "mean" or "sqrtn" reduces the last axis of each inverse.
      segment_ids: int32 [N], the bag of each position of a flat inverse [N], instead of the last axis.
      num_segments: number of bags; needed with segment_ids.

    Returns:
      Nest of float32: [.., D] without combiner; [.., D] with the last axis of inverse reduced; [num_segments, D].

    Raises:
      ValueError: on an unknown combiner, weights without combiner or of other shape, or segment_ids of another shape.
    """
    if combiner is not None and combiner not in COMBINERS:
        raise ValueError(f'combiner must be None, "sum", "mean" or "sqrtn", got {combiner!r}')
    if combiner is None and (weights is not None or segment_ids is not None):
        raise ValueError('weights and segment_ids need a combiner: pass combiner="sum", "mean" or "sqrtn"')
    treedef: Any
    index, treedef = jax.tree.flatten(inverse)
    factors = [None] * len(index) if weights is None else treedef.flatten_up_to(weights)
    for i, w in zip(index, factors, strict=True):
        if w is not None and w.shape != i.shape:
            raise ValueError(f"weights must have the shape of inverse {i.shape}, got {w.shape}")
    if combiner is None:
        return treedef.unflatten(_take(rows, tuple(index)) if index else [])
    if segment_ids is not None:
        if len(index) != 1 or index[0].ndim != 1 or segment_ids.shape != index[0].shape or num_segments is None:
            raise ValueError(
                f"segment_ids {segment_ids.shape} need one flat inverse [N] of their shape and num_segments=, "
                f"got {[i.shape for i in index]} and num_segments={num_segments}"
            )
        return treedef.unflatten([_pool_segments(rows, index[0], factors[0], combiner, segment_ids, num_segments)])
    pooled = []
    for i, w in zip(index, factors, strict=True):
        if i.ndim == 0:
            raise ValueError("a combiner reduces the last axis of inverse, but an inverse is a scalar")
        pooled.append(_bag(rows, i, _coefficients(w, i != rows.shape[0] - 1, combiner)))
    return treedef.unflatten(pooled)


def _pool_segments(
    rows: jax.Array,
    index: jax.Array,
    weights: jax.Array | None,
    combiner: str,
    segment_ids: jax.Array,
    num_segments: int,
) -> jax.Array:
    is_real = (index != rows.shape[0] - 1) & (segment_ids >= 0) & (segment_ids < num_segments)
    segment = jnp.where(is_real, segment_ids, num_segments)
    w = is_real.astype(jnp.float32) if weights is None else jnp.where(is_real, weights, jnp.float32(0))
    add = partial(jax.ops.segment_sum, segment_ids=segment, num_segments=num_segments + 1)
    if combiner == "sum":
        factors = w
    else:
        total = add(w if combiner == "mean" else jnp.square(w))
        is_full = total != 0
        total = jnp.where(is_full, total, jnp.float32(1))
        total = jnp.sqrt(total) if combiner == "sqrtn" else total
        factors = jnp.where(is_full[segment], w / total[segment], jnp.float32(0))
    (vectors,) = _take(rows, (index,))
    return add(factors[:, None] * vectors)[:num_segments]


def segments_from_offsets(offsets: jax.Array, num_positions: int) -> jax.Array:
    """Returns the segment of each position from bag offsets, as torch.nn.EmbeddingBag takes them.

    Args:
      offsets: int32 [B], the first position of each bag, ascending, offsets[0] == 0; equal neighbours are empty bags.
      num_positions: N.

    Returns:
      int32 [N].
    """
    position = jnp.arange(num_positions, dtype=offsets.dtype)
    return (jnp.searchsorted(offsets, position, side="right") - 1).astype(jnp.int32)
