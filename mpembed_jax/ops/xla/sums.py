"""The reference of `sum_duplicates` in plain jax.numpy: sums of values that share an index."""

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import indexing
from mpembed_jax.numerics import rounding


def sum_duplicates(
    values: jax.Array,
    index: jax.Array,
    size: int,
    factors: jax.Array | None = None,
    source: jax.Array | None = None,
) -> jax.Array:
    """Sums the values of each index. The last row of the result is padding and is zero.

    `add_duplicates` adds them. It uses no scatter with duplicate indices on a GPU.

    Args:
      values: float32 [M, ..].
      index: int32 [N] in [0, size).
      size: number of rows of the result.
      factors: float32 [N]: the values of position n are multiplied by factors[n]. None: all are 1.
      source: int32 [N]: position n takes values[source[n]]. Where index[n] is size - 1, source[n]
        may be -1, for no value. None: position n takes values[n // (N / M)], and N is a multiple
        of M.

    Returns:
      float32 [size, ..].
    """
    if source is not None:
        values = indexing.take(values, source)
    elif values.shape[0] != index.shape[0]:
        values = jnp.repeat(values, index.shape[0] // values.shape[0], axis=0)
    if factors is not None:
        values = values * factors.reshape(-1, *[1] * (values.ndim - 1))
        values = rounding.apart(values, index[0]) if index.shape[0] else values
    return add_duplicates(jnp.zeros((size, *values.shape[1:]), values.dtype), index, values)


def add_duplicates(total: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `total` [U, ..] with values [n, ..] added at index (int32 [n], in [0, U)).

    All values of one index are added. The last row of `total` is padding and stays as it is.

    The method depends on the platform that the program is lowered for. On a CPU, values are added
    in place, in the order of positions. On other platforms, they are sorted and scanned
    (`add_sorted`): a float32 scatter-add with duplicate indices is hundreds of times slower on some
    GPU builds (jax#38806), and its order is not deterministic.
    """
    return lax.platform_dependent(total, index, values, cpu=_add_in_order, default=add_sorted)


def _add_in_order(total: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    last = total.shape[0] - 1
    return indexing.add(total, jnp.where(index == last, last + 1, index), values)


def add_sorted(total: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Does what `add_duplicates` does, by a segmented scan over sorted positions.

    The last entry of each segment of the scan is the sum of the segment. The scan adds in a fixed
    order. This is not the order of positions, in which a CPU adds, so the last bits may differ. No
    scatter sees an index twice. This matters for sorted indices, too, because XLA's GPU back end
    adds sorted duplicates atomically.

    Args:
      total: float32 [U, ..].
      index: int32 [n] in [0, U).
      values: float32 [n, ..].
    """
    (num,) = index.shape
    last = total.shape[0] - 1
    if num == 0:
        # Nothing is added. But inside jax.shard_map, the type of the result must say that it varies
        # over the mesh axes of the values.
        return _add_in_order(total, index, values)
    segment, order = lax.sort_key_val(index, jnp.arange(num, dtype=jnp.int32))
    begins = jnp.concatenate([jnp.ones(1, bool), segment[1:] != segment[:-1]])
    ends = jnp.concatenate([begins[1:], jnp.ones(1, bool)])

    def join(left: tuple, right: tuple) -> tuple:
        begins = right[1].reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(begins, right[0], left[0] + right[0]), left[1] | right[1]

    sums, _ = lax.associative_scan(join, (indexing.take(values, order), begins))
    place = jnp.where(ends & (segment != last), segment, last + 1)
    return indexing.put(total, place, sums + indexing.take(total, segment))
