"""The plain way to divide a table over devices, beside which the exchange's bytes are measured.

A float32 table divided by rows, without a cache: every device gathers all ids, sends every
position's row (reduce-scatter) and gathers every position's gradient. Ids are not deduplicated: a
position that repeats an id sends its row again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def all_gather_step(
    table: jax.Array, ids: jax.Array, upstream: jax.Array, learning_rate: Any
) -> tuple[jax.Array, jax.Array]:
    """Runs one SGD step inside jax.shard_map over the axis "x".

    Args:
      table: float32 [V / P, D], the rows congruent to this device's index.
      ids: int32 [B, T], this device's part of the batch.
      upstream: float32 [B, T, D], gradients of the vectors.
      learning_rate: of SGD.

    Returns:
      The table after the step, and the vectors, float32 [B, T, D].
    """
    shards, me = lax.axis_size("x"), lax.axis_index("x")
    every = lax.all_gather(ids.reshape(-1), "x", tiled=True)
    here = jnp.where(every % shards == me, every // shards, table.shape[0])
    found = table.at[here].get(mode="fill", fill_value=0)
    vectors = lax.psum_scatter(found, "x", scatter_dimension=0, tiled=True)
    grads = lax.all_gather(upstream.reshape(-1, upstream.shape[-1]), "x", tiled=True)
    return table.at[here].add(-learning_rate * grads, mode="drop"), vectors.reshape(upstream.shape)
