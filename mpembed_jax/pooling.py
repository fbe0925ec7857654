"""From unique rows to the vectors a model wants: one per id, or one per bag (sum, mean, sqrtn), weighted, ragged.

The gradient with respect to the unique rows is a sum over the positions that hold each row. It is written here, as one
custom VJP over all features of a batch, because the transpose of `rows[inverse]` would make one table of gradients per
feature, and because a scatter-add with duplicate ids is very slow on some GPU builds (jax#38806), where positions are
sorted instead: no gradient of this file is a scatter of duplicates there. Conventions follow tf.nn.embedding_lookup_sparse.
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(implementation: str | None, rows: jax.Array, index: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Gathers rows [U, D] at each index array [..]; one gather for all of them."""
    sizes = np.cumsum([i.size for i in index])[:-1]
    flat = ops.take(rows, jnp.concatenate([i.reshape(-1) for i in index]), implementation=implementation)
    parts = jnp.split(flat, sizes)
    return tuple(part.reshape(*i.shape, rows.shape[1]) for part, i in zip(parts, index, strict=True))


def _take_fwd(implementation: str | None, rows: jax.Array, index: tuple[jax.Array, ...]) -> tuple:
    return _take(implementation, rows, index), (rows, index)


def _take_bwd(implementation: str | None, saved: tuple, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    rows, index = saved
    flat_index = jnp.concatenate([i.reshape(-1) for i in index])
    flat_grads = jnp.concatenate([g.reshape(-1, rows.shape[1]) for g in grads])
    return ops.sum_duplicates(flat_grads, flat_index, rows.shape[0], implementation=implementation), None


_take.defvjp(_take_fwd, _take_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bag(implementation: str | None, rows: jax.Array, index: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns sum_l factors[.., l] * rows[index[.., l]]."""
    return ops.bag(rows, index, factors, implementation=implementation)


def _bag_fwd(implementation: str | None, rows: jax.Array, index: jax.Array, factors: jax.Array) -> tuple:
    return _bag(implementation, rows, index, factors), (rows, index, factors)


def _bag_bwd(implementation: str | None, saved: tuple, grad: jax.Array) -> tuple:
    rows, index, factors = saved
    if index.size == 0:
        return jnp.zeros_like(rows), None, factors

    # One position of all bags at a time, as in the forward pass: no [.., L, D] array.
    def body(position: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row_grads, factor_grads = carry
        here = lax.dynamic_index_in_dim(index, position, -1, keepdims=False)
        if not ops.has_kernels(implementation):
            factor = lax.dynamic_index_in_dim(factors, position, -1, keepdims=False)
            addend = (factor[..., None] * grad).reshape(-1, rows.shape[1])
            row_grads = ops.add_duplicates(row_grads, here.reshape(-1), addend)
        along = jnp.sum(grad * access.take(rows, here), axis=-1)
        return row_grads, lax.dynamic_update_index_in_dim(factor_grads, along, position, factors.ndim - 1)

    row_grads = jnp.zeros_like(rows)
    if ops.has_kernels(implementation):
        row_grads = ops.sum_duplicates(
            grad.reshape(-1, rows.shape[1]), index.reshape(-1), rows.shape[0],
            implementation=implementation, factors=factors.reshape(-1),
        )  # fmt: skip
    start = varying.settle(lambda carry: body(jnp.int32(0), carry), (row_grads, jnp.zeros_like(factors)))
    row_grads, factor_grads = lax.fori_loop(0, index.shape[-1], body, start)
    return row_grads, None, factor_grads


_bag.defvjp(_bag_fwd, _bag_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _segment_sum(implementation: str | None, values: jax.Array, segment: jax.Array, size: int) -> jax.Array:
    """Sums values [N, ..] by segment -> [size, ..]; the last segment, padding, is zero."""
    return ops.sum_duplicates(values, segment, size, implementation=implementation)


def _segment_sum_fwd(implementation: str | None, values: jax.Array, segment: jax.Array, size: int) -> tuple:
    return _segment_sum(implementation, values, segment, size), segment


def _segment_sum_bwd(implementation: str | None, size: int, segment: jax.Array, grad: jax.Array) -> tuple[jax.Array, None]:
    del implementation
    return access.take(grad.at[size - 1].set(0), segment), None


_segment_sum.defvjp(_segment_sum_fwd, _segment_sum_bwd)


@jax.named_scope("pool")
def pool(
    rows: jax.Array,
    inverse: Any,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    implementation: str | None = None,
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
      implementation: a name from ops.IMPLEMENTATIONS, such as state.implementation, for what it has; None: plain XLA.

    Returns:
      Nest of float32: [.., D] without combiner; [.., D] with the last axis of inverse reduced; [num_segments, D].

    Raises:
      ValueError: on an unknown combiner, weights without combiner or of other shape, segment_ids of another shape, or an
        unknown implementation.
    """
    if implementation is not None and implementation not in ops.IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {', '.join(ops.IMPLEMENTATIONS)}")
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
        return treedef.unflatten(_take(implementation, rows, tuple(index)) if index else [])
    if segment_ids is not None:
        if len(index) != 1 or index[0].ndim != 1 or segment_ids.shape != index[0].shape or num_segments is None:
            raise ValueError(
                f"segment_ids {segment_ids.shape} need one flat inverse [N] of their shape and num_segments=, "
                f"got {[i.shape for i in index]} and num_segments={num_segments}"
            )
        bags = _pool_segments(rows, index[0], factors[0], combiner, segment_ids, num_segments, implementation)
        return treedef.unflatten([bags])
    pooled = []
    for i, w in zip(index, factors, strict=True):
        if i.ndim == 0:
            raise ValueError("a combiner reduces the last axis of inverse, but an inverse is a scalar")
        pooled.append(_bag(implementation, rows, i, _coefficients(w, i != rows.shape[0] - 1, combiner)))
    return treedef.unflatten(pooled)


def _pool_segments(
    rows: jax.Array,
    index: jax.Array,
    weights: jax.Array | None,
    combiner: str,
    segment_ids: jax.Array,
    num_segments: int,
    implementation: str | None,
) -> jax.Array:
    is_real = (index != rows.shape[0] - 1) & (segment_ids >= 0) & (segment_ids < num_segments)
    segment = jnp.where(is_real, segment_ids, num_segments)
    w = is_real.astype(jnp.float32) if weights is None else jnp.where(is_real, weights, jnp.float32(0))
    if combiner == "sum":
        factors = w
    else:
        addend = w if combiner == "mean" else jnp.square(w)
        total = _segment_sum(implementation, addend[:, None], segment, num_segments + 1)
        is_full = total != 0
        total = jnp.where(is_full, total, jnp.float32(1))
        total = jnp.sqrt(total) if combiner == "sqrtn" else total
        (own,) = _take(implementation, total, (segment,))
        factors = jnp.where(access.take(is_full[:, 0], segment), w / own[:, 0], jnp.float32(0))
    (vectors,) = _take(implementation, rows, (index,))
    return _segment_sum(implementation, factors[:, None] * vectors, segment, num_segments + 1)[:num_segments]


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
