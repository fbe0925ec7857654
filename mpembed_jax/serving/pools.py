"""The rows that raw ids have in a pool of a serving file: on the host, and under jit.

The definition is `vocabulary.pool.locate`. `locate` does the same in NumPy, and `compiled.locate`
in numba. An id without a row of its own has a shared row of its table, as in training. A file holds
hashes of ids, not ids.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.numerics.random_bits import fmix32
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.serving.container import Pool
from mpembed_jax.vocabulary import hashes, pool
from mpembed_jax.vocabulary.pool import VocabularyState

_BLOCK = 4096  # ids whose sets are compared at once


def on_device(owners: jax.Array, pairs: jax.Array, sizes: Pool) -> jax.Array:
    """Returns the row (int32 [..]) of each pair (uint32 [.., 2]); NO_ID for padding."""
    vocabulary = VocabularyState(
        owners=jnp.asarray(owners),
        sketch=jnp.zeros((2, sizes.groups, 0), jnp.uint8),  # no counters: only training counts ids
        counters=jnp.zeros((0, 2), jnp.uint32),
        fresh_row_state=(),
        groups=sizes.groups,
        first_sets=sizes.first_sets,
        counter_bits=8,
        place_bits=sizes.place_bits,
    )
    rows = pool.locate(vocabulary, pairs.reshape(-1, 2), sizes.shared_rows)
    return rows.reshape(pairs.shape[:-1])


def locate(owners: np.ndarray, pairs: np.ndarray, sizes: Pool) -> np.ndarray:
    """Returns the rows of pairs, on the host.

    Args:
      owners: uint32 [S, W].
      pairs: uint32 [n, 2].
      sizes: the sizes of the pool.

    Returns:
      int32 [n]; NO_ID for padding.
    """
    rows = np.empty(len(pairs), np.int32)
    for first in range(0, len(pairs), _BLOCK):
        here = slice(first, first + _BLOCK)
        rows[here] = _rows(owners, pairs[here], sizes)
    return rows


def _rows(owners: np.ndarray, pairs: np.ndarray, sizes: Pool) -> np.ndarray:
    shift = np.uint32(pool.USE_BITS)
    tags = np.minimum(pairs[:, 0] >> shift, np.uint32(pool.NO_OWNER - 1))
    places = fmix32(pairs[:, 1] ^ pairs[:, 0] & np.uint32(pool.tag_mask(sizes.place_bits)))
    groups = np.uint32(sizes.groups)
    first = (places % groups).astype(np.int64)
    first += sizes.groups * _scaled(fmix32(places // groups), sizes.first_sets // sizes.groups)
    # The number of sets into which each id's first set was split; see vocabulary.pool.
    numbers = sizes.sets // sizes.first_sets + (first < sizes.sets % sizes.first_sets)
    span = 2 ** np.ceil(np.log2(numbers)).astype(np.int64)
    own = fmix32(tags ^ np.uint32(pool.SPLIT_SEED)).astype(np.int64) & (span - 1)
    own = np.where(own < numbers, own, own & ((span >> 1) - 1))
    sets = first + sizes.first_sets * own
    is_own = owners[sets] >> shift == tags[:, None]
    shared = (pairs[:, 1] & hashes.NUMBER).astype(np.int64) * sizes.shared_rows
    shared += _scaled(fmix32(pairs[:, 0]), sizes.shared_rows) + sizes.sets * sizes.ways
    rows = np.where(is_own.any(1), is_own.argmax(1) * sizes.sets + sets, shared)
    return np.where(pairs[:, 0] == hashes.PADDING, NO_ID, rows).astype(np.int32)


def _scaled(mixed: np.ndarray, size: int) -> np.ndarray:
    return (mixed.astype(np.uint64) * np.uint64(size) >> np.uint64(32)).astype(np.int64)
