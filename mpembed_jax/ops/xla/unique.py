"""The reference of `unique` in plain jax.numpy: the distinct ids of a batch."""

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import carries, indexing
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops.records import Unique
from mpembed_jax.row_ids import NO_ID


@jax.named_scope("unique")
def unique(ids: jax.Array, size: int, step: jax.Array) -> Unique:
    """Returns the distinct ids of a batch, which are found with a hash table.

    Each position claims the bucket of its id's hash, and the lowest position gets it. A position is
    done if the owner of its bucket has the same id. The others try again with another hash.

    If there are more than size - 1 distinct ids, only the size - 1 ids that are smallest by
    fmix32(id xor step) stay.

    Args:
      ids: int32 [N]; NO_ID is padding.
      size: U; the last of the returned ids is always NO_ID.
      step: int32 scalar, the number of this prefetch.

    Returns:
      A Unique, with its ids in the order of their first occurrence.
    """
    (num_positions,) = ids.shape
    if num_positions == 0:
        zero = jnp.int32(0)
        return Unique(jnp.full(size, NO_ID, jnp.int32), ids, jnp.zeros(size, jnp.int32), zero, zero)
    position = jnp.arange(num_positions, dtype=jnp.int32)
    num_buckets = max(16, indexing.ceil_power(4 * num_positions))

    def claim(carry: tuple) -> tuple:
        attempt, first, is_open = carry
        salt = attempt.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
        bucket = (
            random_bits.fmix32(ids.astype(jnp.uint32) + salt) & jnp.uint32(num_buckets - 1)
        ).astype(jnp.int32)
        owner = jnp.full(num_buckets, num_positions, jnp.int32)
        owner = indexing.minimum(owner, jnp.where(is_open, bucket, num_buckets), position)
        candidate = indexing.take(owner, bucket)
        is_same = is_open & (indexing.take(ids, candidate) == ids)
        return attempt + 1, jnp.where(is_same, candidate, first), is_open & ~is_same

    is_real = ids != NO_ID
    start = carries.with_final_types(claim, (jnp.int32(0), position, is_real))
    _, first, _ = lax.while_loop(lambda carry: jnp.any(carry[2]), claim, start)
    is_first = is_real & (first == position)
    rank = jnp.cumsum(is_first.astype(jnp.int32))
    num_found = rank[-1]
    num_ids = jnp.minimum(rank[-1], size - 1)
    rank = rank - 1
    if size - 1 < num_positions:

        def keep_smallest(_: None) -> tuple[jax.Array, jax.Array]:
            mixed = random_bits.fmix32(ids.astype(jnp.uint32) ^ step.astype(jnp.uint32))
            limit = jnp.sort(jnp.where(is_first, mixed, jnp.uint32(0xFFFFFFFF)))[size - 2]
            kept = is_first & (mixed <= limit)
            return kept, jnp.cumsum(kept.astype(jnp.int32)) - 1

        is_over = num_found > size - 1
        is_first, rank = lax.cond(is_over, keep_smallest, lambda _: (is_first, rank), None)
    unique_ids = indexing.put(
        jnp.full(size, NO_ID, jnp.int32), jnp.where(is_first, rank, size), ids
    )
    inverse = jnp.where(
        is_real & indexing.take(is_first, first), indexing.take(rank, first), size - 1
    )
    counts = indexing.add(jnp.zeros(size, jnp.int32), inverse, 1).at[size - 1].set(0)
    return Unique(unique_ids, inverse, counts, num_ids, num_found - num_ids)


@jax.named_scope("find")
def find(known: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the position of each id among the known ids, and whether the id is known.

    Args:
      known: int32 [n], n > 0: distinct ids in any order, then NO_ID.
      ids: int32 [N].

    Returns:
      Two arrays:
      - int32 [N]: the position in `known`. It is n - 1 for an unknown id and for padding.
      - bool [N]: whether the id is known.
    """
    order = jnp.argsort(known).astype(jnp.int32)
    ascending = indexing.take(known, order)
    place = jnp.searchsorted(ascending, ids).astype(jnp.int32)
    is_known = (indexing.take(ascending, place) == ids) & (ids != NO_ID)
    return jnp.where(is_known, indexing.take(order, place), known.shape[0] - 1), is_known
