"""The distinct ids of a batch on a GPU, by one sort of its positions.

After the sort, all positions of an id are neighbours. They are the segments over which an update
sums gradients, so no second sort is needed. There are no atomics, and no loop whose number of turns
only the device knows. The reference is `xla.unique`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import indexing
from mpembed_jax.cache.plan import Segments
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops import xla
from mpembed_jax.ops.gpu import kernel
from mpembed_jax.ops.records import Unique
from mpembed_jax.row_ids import NO_ID


def unique(ids: jax.Array, size: int, step: jax.Array, *, is_interpreted: bool) -> Unique:
    """Returns the distinct ids of a batch and their segments; see `xla.unique.unique`.

    Ids are sorted, and returned, in the order of fmix32(id xor step), which is a bijection. So the
    ids that stay within the budget are the first ones.
    """
    (num_positions,) = ids.shape
    if num_positions == 0:
        return xla.unique.unique(ids, size, step)

    def mixed(ids: jax.Array) -> jax.Array:
        return random_bits.fmix32(ids.astype(jnp.uint32) ^ step.astype(jnp.uint32))

    position = jnp.arange(num_positions, dtype=jnp.int32)
    # XLA's GPU back end uses a radix sort for two operands. Equal keys keep the order of positions.
    keys, order = lax.sort_key_val(mixed(ids), position)
    is_real = keys != mixed(jnp.int32(NO_ID))
    is_first = is_real & kernel.starts(keys)
    after = indexing.take(keys, jnp.minimum(position + 1, num_positions - 1))
    is_last = (position == num_positions - 1) | (keys != after)
    (rank,) = kernel.running_sums([is_first], is_interpreted=is_interpreted)
    rank = rank - 1
    num_found = rank[-1] + 1
    num_ids = jnp.minimum(num_found, size - 1)
    place = jnp.where(is_real, jnp.minimum(rank, size - 1), size - 1)
    nowhere = jnp.zeros(size, jnp.int32)
    # The last entry is padding, and nothing is stored there.
    is_kept = place < size - 1
    first = indexing.put(nowhere, jnp.where(is_first & is_kept, place, size), position)
    stop = indexing.put(nowhere, jnp.where(is_last & is_kept, place, size), position + 1)
    is_id = jnp.arange(size, dtype=jnp.int32) < num_ids
    return Unique(
        ids=jnp.where(is_id, indexing.take(ids, indexing.take(order, first)), NO_ID),
        inverse=indexing.put(jnp.zeros(num_positions, jnp.int32), order, place),
        counts=stop - first,
        num_ids=num_ids,
        num_dropped=num_found - num_ids,
        segments=Segments(order, first, stop),
    )
