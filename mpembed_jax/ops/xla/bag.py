"""The reference of `bag` in plain jax.numpy: weighted sums of rows."""

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import carries, indexing
from mpembed_jax.numerics import rounding


def bag(rows: jax.Array, index: jax.Array, factors: jax.Array) -> jax.Array:
    """Returns the sum over l of factors[.., l] * rows[index[.., l]], in ascending order of l.

    A loop adds the l-th row of all bags at a time. So there is no array [.., L, D].

    Args:
      rows: float32 [U, D].
      index: int32 [.., L] in [0, U).
      factors: float32 [.., L].

    Returns:
      float32 [.., D].
    """
    zeros = jnp.zeros((*index.shape[:-1], rows.shape[1]), jnp.float32)
    if index.size == 0:
        return zeros
    number = index.reshape(-1)[0]

    def body(position: jax.Array, total: jax.Array) -> jax.Array:
        here = lax.dynamic_index_in_dim(index, position, -1, keepdims=False)
        factor = lax.dynamic_index_in_dim(factors, position, -1, keepdims=False)
        return total + rounding.apart(factor[..., None] * indexing.take(rows, here), number)

    start = carries.with_final_types(lambda total: body(jnp.int32(0), total), zeros)
    return lax.fori_loop(0, index.shape[-1], body, start)
