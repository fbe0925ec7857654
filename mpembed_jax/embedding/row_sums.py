"""The gathers and sums of rows in pooling, with custom VJPs.

The gradient with respect to a unique row is a sum over the positions that hold this row. There are
two reasons for custom VJPs:
- The transpose of `rows[inverse]` makes one array of row gradients per feature. The custom VJP
  makes one for all features of a batch.
- A scatter-add with duplicate indices is very slow on some GPU builds (jax#38806). Except on a CPU,
  the custom VJPs sort the positions, so that no scatter has duplicate indices.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax import ops
from mpembed_jax.arrays import carries, indexing
from mpembed_jax.numerics import rounding


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def take(
    implementation: ops.Named | None, rows: jax.Array, index: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Returns rows[i] (float32 [.., D]) for each array i of `index`, from one gather for all.

    Args:
      implementation: see pooling.pool.
      rows: float32 [U, D].
      index: int32 [..] each, at least one array.
    """
    sizes = np.cumsum([i.size for i in index])[:-1]
    flat = ops.take(
        rows, jnp.concatenate([i.reshape(-1) for i in index]), implementation=implementation
    )
    parts = jnp.split(flat, sizes)
    return tuple(
        part.reshape(*i.shape, rows.shape[1]) for part, i in zip(parts, index, strict=True)
    )


def _take_fwd(
    implementation: ops.Named | None, rows: jax.Array, index: tuple[jax.Array, ...]
) -> tuple:
    return take(implementation, rows, index), (rows, index)


def _take_bwd(
    implementation: ops.Named | None, saved: tuple, grads: tuple[jax.Array, ...]
) -> tuple[jax.Array, None]:
    rows, index = saved
    flat_index = jnp.concatenate([i.reshape(-1) for i in index])
    flat_grads = jnp.concatenate([g.reshape(-1, rows.shape[1]) for g in grads])
    return ops.sum_duplicates(
        flat_grads, flat_index, rows.shape[0], implementation=implementation
    ), None


take.defvjp(_take_fwd, _take_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def bag(
    implementation: ops.Named | None, rows: jax.Array, index: jax.Array, factors: jax.Array
) -> jax.Array:
    """Returns sum_l factors[.., l] * rows[index[.., l]], float32 [.., D].

    Args:
      implementation: see pooling.pool.
      rows: float32 [U, D].
      index: int32 [.., L].
      factors: float32 [.., L].
    """
    return ops.bag(rows, index, factors, implementation=implementation)


def _bag_fwd(
    implementation: ops.Named | None, rows: jax.Array, index: jax.Array, factors: jax.Array
) -> tuple:
    return bag(implementation, rows, index, factors), (rows, index, factors)


def _bag_bwd(implementation: ops.Named | None, saved: tuple, grad: jax.Array) -> tuple:
    rows, index, factors = saved
    if index.size == 0:
        return jnp.zeros_like(rows), None, factors

    number = index.reshape(-1)[0]  # for `apart`: any number that the compiler does not know

    # As in the reference of the forward pass, the loop takes one position of all bags at a time, so
    # that there is no [.., L, D] array.
    def body(
        position: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        row_grads, factor_grads = carry
        here = lax.dynamic_index_in_dim(index, position, -1, keepdims=False)
        if not ops.has_kernels(implementation):
            factor = lax.dynamic_index_in_dim(factors, position, -1, keepdims=False)
            addend = rounding.apart(factor[..., None] * grad, number).reshape(-1, rows.shape[1])
            row_grads = ops.add_duplicates(row_grads, here.reshape(-1), addend)
        along = jnp.sum(grad * indexing.take(rows, here), axis=-1)
        return row_grads, lax.dynamic_update_index_in_dim(
            factor_grads, along, position, factors.ndim - 1
        )

    row_grads = jnp.zeros_like(rows)
    if ops.has_kernels(implementation):
        row_grads = ops.sum_duplicates(
            grad.reshape(-1, rows.shape[1]), index.reshape(-1), rows.shape[0],
            implementation=implementation, factors=factors.reshape(-1),
        )  # fmt: skip
    start = carries.with_final_types(
        lambda carry: body(jnp.int32(0), carry), (row_grads, jnp.zeros_like(factors))
    )
    row_grads, factor_grads = lax.fori_loop(0, index.shape[-1], body, start)
    return row_grads, None, factor_grads


bag.defvjp(_bag_fwd, _bag_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def segment_sum(
    implementation: ops.Named | None, values: jax.Array, segment: jax.Array, size: int
) -> jax.Array:
    """Returns the sum of the values of each segment, float32 [size, ..].

    The last segment is padding, and its sum is zero.

    Args:
      implementation: see pooling.pool.
      values: float32 [N, ..].
      segment: int32 [N] in [0, size).
      size: number of segments, padding included.
    """
    return ops.sum_duplicates(values, segment, size, implementation=implementation)


def _segment_sum_fwd(
    implementation: ops.Named | None, values: jax.Array, segment: jax.Array, size: int
) -> tuple:
    return segment_sum(implementation, values, segment, size), segment


def _segment_sum_bwd(
    implementation: ops.Named | None, size: int, segment: jax.Array, grad: jax.Array
) -> tuple[jax.Array, None]:
    del implementation
    return indexing.take(grad.at[size - 1].set(0), segment), None


segment_sum.defvjp(_segment_sum_fwd, _segment_sum_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def ragged_bag(
    implementation: ops.Named | None,
    rows: jax.Array,
    index: jax.Array,
    factors: jax.Array,
    segment: jax.Array,
    size: int,
) -> jax.Array:
    """Returns the sum of factors[n] * rows[index[n]] over each segment, float32 [size, D].

    The last segment is padding, and its sum is zero.

    Args:
      implementation: see pooling.pool.
      rows: float32 [U, D].
      index: int32 [N].
      factors: float32 [N].
      segment: int32 [N] in [0, size).
      size: number of segments, padding included.
    """
    return ops.sum_duplicates(
        rows, segment, size, implementation=implementation, factors=factors, source=index
    )


def _ragged_bag_fwd(
    implementation: ops.Named | None,
    rows: jax.Array,
    index: jax.Array,
    factors: jax.Array,
    segment: jax.Array,
    size: int,
) -> tuple:
    return ragged_bag(implementation, rows, index, factors, segment, size), (
        rows,
        index,
        factors,
        segment,
    )


def _ragged_bag_bwd(
    implementation: ops.Named | None, size: int, saved: tuple, grad: jax.Array
) -> tuple:
    rows, index, factors, segment = saved
    grad = grad.at[size - 1].set(0)
    row_grads = ops.sum_duplicates(
        grad, index, rows.shape[0], implementation=implementation, factors=factors, source=segment
    )  # fmt: skip
    along = jnp.sum(indexing.take(grad, segment) * indexing.take(rows, index), axis=-1)
    return row_grads, None, along, None


ragged_bag.defvjp(_ragged_bag_fwd, _ragged_bag_bwd)
