"""The distinct ids of a batch on a GPU, by one sort of its positions.

After the sort, all positions of an id are neighbours. They are the segments over which an update
sums gradients, so no second sort is needed. Nothing is counted by atomics, and no loop has an end
that only the device knows. The reference is `xla.unique`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import indexing
from mpembed_jax.cache.plan import Segments
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops import xla
from mpembed_jax.ops.records import Unique
from mpembed_jax.row_ids import NO_ID

_DIGIT_BITS = 4  # bits of the budget's limit that one turn finds


def unique(ids: jax.Array, size: int, step: jax.Array) -> Unique:
    """Returns the distinct ids of a batch in ascending order; see `xla.unique.unique`.

    The result has the segments of the ids.
    """
    (num_positions,) = ids.shape
    if num_positions == 0:
        return xla.unique.unique(ids, size, step)
    position = jnp.arange(num_positions, dtype=jnp.int32)
    # XLA's GPU back end uses a radix sort for two operands. It keeps positions in order.
    sorted_ids, order = lax.sort_key_val(ids, position)
    is_kept = sorted_ids != NO_ID
    edge = sorted_ids[1:] != sorted_ids[:-1]
    begins = is_kept & jnp.concatenate([jnp.ones(1, bool), edge])
    ends = is_kept & jnp.concatenate([edge, jnp.ones(1, bool)])
    num_found = jnp.sum(begins, dtype=jnp.int32)
    num_ids = jnp.minimum(num_found, size - 1)
    if size - 1 < num_positions:
        mixed = random_bits.fmix32(sorted_ids.astype(jnp.uint32) ^ step.astype(jnp.uint32))
        is_kept = is_kept & (mixed <= _smallest(mixed, begins, num_ids))
        begins, ends = begins & is_kept, ends & is_kept
    rank = jnp.cumsum(begins.astype(jnp.int32)) - 1
    begin, end = jnp.where(begins, rank, size), jnp.where(ends, rank, size)
    zeros = jnp.zeros(size, jnp.int32)
    first = indexing.put(zeros, begin, position)
    stop = indexing.put(zeros, end, position + 1)
    return Unique(
        ids=indexing.put(jnp.full(size, NO_ID, jnp.int32), begin, sorted_ids),
        inverse=indexing.put(
            jnp.zeros(num_positions, jnp.int32), order, jnp.where(is_kept, rank, size - 1)
        ),
        counts=stop - first,
        num_ids=num_ids,
        num_dropped=num_found - num_ids,
        segments=Segments(order, first, stop),
    )


def _smallest(values: jax.Array, is_counted: jax.Array, number: jax.Array) -> jax.Array:
    """Returns the number-th smallest (uint32, from 1) of the values (uint32 [N]) that are counted.

    It has a fixed number of turns. Each finds one digit: the largest below which there are fewer
    values than `number`.
    """
    digit = jnp.arange(1 << _DIGIT_BITS, dtype=jnp.uint32)
    found = jnp.uint32(0)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        least = found | (digit << shift)
        is_below = is_counted[None, :] & (values[None, :] < least[:, None])
        num_below = jnp.sum(is_below, axis=1, dtype=jnp.int32)
        place = jnp.sum(num_below < number, dtype=jnp.int32) - 1
        found = found | (place.astype(jnp.uint32) << shift)
    return found
