"""Pooling of unique rows into one vector per id or per bag.

The vector of a bag is the sum, mean or sqrtn of its rows. Bags may be weighted and ragged. The
conventions follow tf.nn.embedding_lookup_sparse. `row_sums` holds the arithmetic and its gradients.
`positions` lists the terms of these gradients for an optimizer update that sums them itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.cache.plan import CachePlan
from mpembed_jax.embedding import row_sums
from mpembed_jax.ops import Positions

COMBINERS = ("sum", "mean", "sqrtn")


def coefficients(weights: jax.Array | None, is_real: jax.Array, combiner: str) -> jax.Array:
    """Returns the factor (float32 [.., L]) of each position; an empty bag has factors of zero."""
    w = (
        is_real.astype(jnp.float32)
        if weights is None
        else jnp.where(is_real, weights, jnp.float32(0))
    )
    if combiner == "sum":
        return w
    total = jnp.sum(w, axis=-1, keepdims=True)
    if combiner == "sqrtn":
        squares = jnp.sum(jnp.square(w), axis=-1, keepdims=True)
        total = jnp.sqrt(jnp.where(squares > 0, squares, jnp.float32(1)))
        total = jnp.where(squares > 0, total, jnp.float32(0))
    return jnp.where(total != 0, w / jnp.where(total != 0, total, jnp.float32(1)), jnp.float32(0))


def check(
    inverse: Any,
    weights: Any,
    combiner: str | None,
    segment_ids: jax.Array | None,
    num_segments: int | None,
    implementation: ops.Named | None,
) -> tuple[list[jax.Array], list[jax.Array | None], Any]:
    """Checks the arguments of `pool`.

    Returns:
      The leaves of inverse, the weights of each leaf (or None), and the tree structure.

    Raises:
      TypeError: see `pool`.
      ValueError: see `pool`.
    """
    if isinstance(implementation, str) and implementation not in ops.IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; choose one of "
            f"{', '.join(ops.IMPLEMENTATIONS)}"
        )
    if combiner is not None and combiner not in COMBINERS:
        raise ValueError(f'combiner must be None, "sum", "mean" or "sqrtn", got {combiner!r}')
    if combiner is None and (weights is not None or segment_ids is not None):
        raise ValueError(
            'weights and segment_ids need a combiner: pass combiner="sum", "mean" or "sqrtn"'
        )
    treedef: Any
    index, treedef = jax.tree.flatten(inverse)
    for i in index:
        if not hasattr(i, "dtype") or i.dtype.kind not in "iu" or isinstance(inverse, CachePlan):
            what = "a CachePlan" if isinstance(inverse, CachePlan) else getattr(i, "dtype", type(i))
            raise TypeError(
                "pool(rows, inverse, weights, combiner): inverse must be plan.inverse, int32 "
                f"arrays of places in rows, got {what}"
            )
    factors: list[jax.Array | None] = [None] * len(index)
    if weights is not None:
        factors = _weights_like(inverse, weights)
    for i, w in zip(index, factors, strict=True):
        if w is not None and w.shape != i.shape:
            raise ValueError(f"weights must have the shape of inverse {i.shape}, got {w.shape}")
    if segment_ids is not None:
        dtype = getattr(segment_ids, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(
                f"segment_ids must be int32 [N], got {dtype or type(segment_ids).__name__}"
            )
        if not isinstance(num_segments, int | np.integer | None):
            raise TypeError(
                f"num_segments must be a whole number, got {type(num_segments).__name__}"
            )
        if (
            len(index) != 1
            or index[0].ndim != 1
            or segment_ids.shape != index[0].shape
            or num_segments is None
        ):
            raise ValueError(
                f"segment_ids {segment_ids.shape} need one flat inverse [N] of the same shape and "
                f"num_segments=.., got inverse shapes {[i.shape for i in index]} and "
                f"num_segments={num_segments}"
            )
    elif combiner is not None and any(i.ndim == 0 for i in index):
        raise ValueError(
            "a combiner reduces the last axis of inverse, but one inverse is a scalar; pass "
            "combiner=None for single ids"
        )
    return index, factors, treedef


def _weights_like(inverse: Any, weights: Any) -> list[jax.Array | None]:
    """Returns the weights of each leaf of inverse, by their keys; float32 [..] or None.

    Raises:
      TypeError: if weights are not real numbers.
      ValueError: if weights have other keys than inverse.
    """

    def by_path(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    # Leaves are matched by their keys, because mappings of two types may list equal keys in two
    # orders.
    wanted = by_path(inverse)
    held = by_path(dict(weights) if isinstance(weights, Mapping) else weights)
    if set(wanted) != set(held):
        raise ValueError(
            "weights must be arrays in the nesting of inverse, "
            f"{[f'weights{path}' for path in wanted][:4]}, got "
            f"{[f'weights{path}' for path in held][:4]}"
        )
    result: list[jax.Array | None] = []
    for path in wanted:
        leaf = held[path]
        if leaf is None:
            result.append(None)
            continue
        what = getattr(leaf, "dtype", type(leaf).__name__)
        if isinstance(what, str) or not any(
            jnp.issubdtype(what, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
        ):
            raise TypeError(f"weights must be arrays of float32, got {what}")
        result.append(jnp.asarray(leaf).astype(jnp.float32))
    return result


@jax.named_scope("pool")
def pool(
    rows: jax.Array,
    inverse: Any,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    implementation: ops.Named | None = None,
) -> Any:
    """Turns unique rows into one vector per id or per bag.

    The result is differentiable (reverse mode) in rows and weights. "mean" divides the weighted sum
    by the sum of the weights. "sqrtn" divides it by the square root of the sum of the squared
    weights. Padding positions count neither in the sum nor in the divisor. The vector of an empty
    bag is zero.

    Args:
      rows: float32 [U, D], from `lookup`; the last row is padding.
      inverse: nest of int32 [..], from `plan.inverse`.
      weights: a nest like inverse with a float32 weight for each position; None instead of an array
        stands for ones. Mappings may be of another type than those of inverse. None: all are 1.
      combiner: None for one vector per id. "sum", "mean" or "sqrtn" reduces the last axis of each
        inverse.
      segment_ids: int32 [N], the bag of each position of one flat inverse [N]. They define the bags
        in place of the last axis.
      num_segments: the number of bags; required with segment_ids.
      implementation: a name from ops.IMPLEMENTATIONS, such as state.implementation. Plain XLA runs
        what this implementation does not provide. None: plain XLA.

    Returns:
      A nest of float32 arrays like inverse. Without combiner, inverse [..] gives [.., D]. With a
      combiner, inverse [.., L] gives [.., D]. With segment_ids, inverse [N] gives
      [num_segments, D].

    Raises:
      TypeError: if inverse or segment_ids are not arrays of integers, if weights are not arrays of
        numbers, or if num_segments is not a whole number.
      ValueError: if the combiner or the implementation is unknown; if weights or segment_ids come
        without a combiner or in another shape or nesting than inverse; if segment_ids come without
        num_segments or with several inverses; or if a combiner is given and an inverse is a
        scalar.
    """
    index, factors, treedef = check(
        inverse, weights, combiner, segment_ids, num_segments, implementation
    )
    if combiner is None:
        return treedef.unflatten(row_sums.take(implementation, rows, tuple(index)) if index else [])
    if segment_ids is not None and num_segments is not None:
        bags = _pool_segments(
            rows, index[0], factors[0], combiner, segment_ids, num_segments, implementation
        )
        return treedef.unflatten([bags])
    pooled = []
    for i, w in zip(index, factors, strict=True):
        pooled.append(
            row_sums.bag(implementation, rows, i, coefficients(w, i != rows.shape[0] - 1, combiner))
        )
    return treedef.unflatten(pooled)


def segments(
    num_rows: int,
    index: jax.Array,
    weights: jax.Array | None,
    combiner: str,
    segment_ids: jax.Array,
    num_segments: int,
    implementation: ops.Named | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the bag and the factor of each position (int32 [N] and float32 [N]).

    The bag of a position that does not count is num_segments.
    """
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.dtype.itemsize < 4:
        segment_ids = segment_ids.astype(jnp.int32)  # a narrower type may not hold num_segments
    # The comparison is in the type of the ids, because a cast could wrap around.
    is_inside = (segment_ids >= 0) & (segment_ids < jnp.asarray(num_segments, segment_ids.dtype))
    is_real = (index != num_rows - 1) & is_inside
    segment = jnp.where(is_real, segment_ids.astype(jnp.int32), jnp.int32(num_segments))
    w = (
        is_real.astype(jnp.float32)
        if weights is None
        else jnp.where(is_real, weights, jnp.float32(0))
    )
    if combiner == "sum":
        factors = w
    else:
        addend = w if combiner == "mean" else jnp.square(w)
        total = row_sums.segment_sum(implementation, addend[:, None], segment, num_segments + 1)
        is_full = total != 0
        total = jnp.where(is_full, total, jnp.float32(1))
        total = jnp.sqrt(total) if combiner == "sqrtn" else total
        (own,) = row_sums.take(implementation, total, (segment,))
        factors = jnp.where(indexing.take(is_full[:, 0], segment), w / own[:, 0], jnp.float32(0))
    return segment, factors


def _pool_segments(
    rows: jax.Array,
    index: jax.Array,
    weights: jax.Array | None,
    combiner: str,
    segment_ids: jax.Array,
    num_segments: int,
    implementation: ops.Named | None,
) -> jax.Array:
    segment, factors = segments(
        rows.shape[0], index, weights, combiner, segment_ids, num_segments, implementation
    )
    return row_sums.ragged_bag(implementation, rows, index, factors, segment, num_segments + 1)[
        :num_segments
    ]


def check_gradients(
    dim: int,
    inverse: Any,
    pooled_grads: Any,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    implementation: ops.Named | None = None,
) -> tuple[list[jax.Array], list[jax.Array | None], list[jax.Array]]:
    """Checks that gradients match what `pool` returns for rows [U, D] and the other arguments.

    Args:
      dim: D.
      inverse: as for `pool`.
      pooled_grads: nest of float32, the gradient with respect to pool's result.
      weights: as for `pool`.
      combiner: as for `pool`.
      segment_ids: as for `pool`.
      num_segments: as for `pool`.
      implementation: as for `pool`.

    Returns:
      The leaves of inverse, the weights of each leaf (or None), and the leaves of the gradients.

    Raises:
      TypeError: as in `pool`.
      ValueError: as in `pool`, or if the tree, a shape or a dtype of the gradients differs from
        that of pool's result.
    """
    index, weight, treedef = check(
        inverse, weights, combiner, segment_ids, num_segments, implementation
    )
    leaves, grads_def = jax.tree.flatten(pooled_grads)
    is_ragged = segment_ids is not None
    lead = [
        i.shape if combiner is None else (num_segments,) if is_ragged else i.shape[:-1]
        for i in index
    ]
    wanted = [(*of_leaf, dim) for of_leaf in lead]
    if (
        grads_def != treedef
        or [g.shape for g in leaves] != wanted
        or any(g.dtype != jnp.float32 for g in leaves)
    ):
        raise ValueError(
            "pooled_grads must match what pool returned for these arguments: float32 "
            f"{wanted} in {treedef}, got {[f'{g.dtype} {g.shape}' for g in leaves]} in {grads_def}"
        )
    return index, weight, leaves


def positions(
    num_rows: int,
    index: list[jax.Array],
    weights: list[jax.Array | None],
    pooled_grads: list[jax.Array],
    combiner: str | None,
    *,
    segment_ids: jax.Array | None,
    num_segments: int | None,
    implementation: ops.Named | None,
) -> Positions:
    """Lists the terms that the transpose of `pool` adds up, without adding them.

    There must be at least one position and one gradient.

    Args:
      num_rows: U.
      index: leaves of inverse, from `check_gradients`.
      weights: weights of each leaf (or None), from `check_gradients`.
      pooled_grads: leaves of the gradients, from `check_gradients`.
      combiner: as for `pool`.
      segment_ids: as for `pool`.
      num_segments: as for `pool`.
      implementation: as for `pool`.

    Returns:
      The gradient, the row and the factor of each position.
    """
    dim = pooled_grads[0].shape[-1]
    grads = jnp.concatenate([g.reshape(-1, dim) for g in pooled_grads])
    row = jnp.concatenate([i.reshape(-1) for i in index])
    if combiner is None:
        return Positions(grads, row, None, None)
    if segment_ids is not None and num_segments is not None:
        segment, factors = segments(
            num_rows, index[0], weights[0], combiner, segment_ids, num_segments, implementation
        )
        # A position outside every bag goes to the padding row and takes no gradient. Its factor is
        # zero, but zero times an infinite gradient is NaN.
        is_inside = segment < num_segments
        row = jnp.where(is_inside, index[0], num_rows - 1)
        return Positions(grads, row, jnp.where(is_inside, segment, -1), factors)
    weighted = source = None
    if combiner != "sum" or any(w is not None for w in weights):
        of_leaves = [
            coefficients(w, i != num_rows - 1, combiner)
            for i, w in zip(index, weights, strict=True)
        ]
        weighted = jnp.concatenate([factor.reshape(-1) for factor in of_leaves])
    lengths = [i.shape[-1] for i in index]
    if len(set(lengths)) > 1:
        firsts = np.cumsum([0, *[g.size // dim for g in pooled_grads[:-1]]])
        numbers = [
            jnp.arange(i.size, dtype=jnp.int32) // max(1, n)
            for i, n in zip(index, lengths, strict=True)
        ]
        source = jnp.concatenate(
            [jnp.int32(k) + number for k, number in zip(firsts, numbers, strict=True)]
        )
    return Positions(grads, row, source, weighted)


def segments_from_offsets(offsets: jax.Array, num_positions: int) -> jax.Array:
    """Converts bag offsets, as torch.nn.EmbeddingBag takes them, to the segment of each position.

    Args:
      offsets: int32 [B], the first position of each bag, ascending, with offsets[0] == 0. A bag is
        empty if the next offset is equal to its own.
      num_positions: N.

    Returns:
      int32 [N], the segment_ids for `pool`.

    Raises:
      TypeError: if offsets are not integers, or num_positions is not a whole number.
    """
    if not isinstance(num_positions, int | np.integer):
        raise TypeError(
            "segments_from_offsets(offsets, num_positions): num_positions must be a whole number, "
            f"got {type(num_positions).__name__}"
        )
    offsets = jnp.asarray(offsets)
    if offsets.dtype.kind not in "iu":
        raise TypeError(f"offsets must be int32 [B], got {offsets.dtype} {list(offsets.shape)}")
    position = jnp.arange(num_positions, dtype=offsets.dtype)
    return (jnp.searchsorted(offsets, position, side="right") - 1).astype(jnp.int32)
