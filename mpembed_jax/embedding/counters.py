"""The 64-bit counters of an embedding state, without jax's x64 mode.

The last counter counts refused updates. They are fewer than 2^32, so its high word is free. The
high word counts the changes of rows outside of steps. No plan names these rows, so a tracker of
changed rows compares this count.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache.plan import Counts

OF_UPDATES = ("nonfinite_rows", "refused_updates")
# The names of the counters: those of a step's Counts, then the two that count updates.
COUNTERS = (*(f.name for f in dataclasses.fields(Counts)), *OF_UPDATES)
# The counters of requests, and of what they did to the cache. They are equal on any number of
# devices, and no update changes them.
OF_REQUESTS = COUNTERS[: COUNTERS.index("dropped")]


def add(counters: jax.Array, amounts: list[jax.Array]) -> jax.Array:
    """Adds to 64-bit counters.

    Args:
      counters: uint32 [n, 2]: the low and the high word of each counter.
      amounts: n int32 scalars of at least 0.

    Returns:
      The new counters.
    """
    low = counters[:, 0] + jnp.stack(amounts).astype(jnp.uint32)
    carry = (low < counters[:, 0]).astype(jnp.uint32)
    return jnp.stack([low, counters[:, 1] + carry], axis=1)


def count_step(counters: jax.Array, counts: Counts) -> jax.Array:
    """Adds the counts of one step to a state's counters (uint32 [len(COUNTERS), 2])."""
    amounts = jax.tree.leaves(counts)
    return add(counters, amounts + [jnp.int32(0)] * (len(COUNTERS) - len(amounts)))


def count_updates(
    counters: jax.Array, num_nonfinite: jax.Array, is_refused: jax.Array
) -> jax.Array:
    """Adds one update to a state's counters.

    Args:
      counters: uint32 [len(COUNTERS), 2].
      num_nonfinite: int32 scalar, the number of rows skipped for non-finite gradients.
      is_refused: bool scalar, whether the update was refused.

    Returns:
      The new counters.
    """
    tail = [num_nonfinite, is_refused.astype(jnp.int32)]
    return add(counters, [jnp.int32(0)] * (len(COUNTERS) - len(tail)) + tail)


def count_change(counters: jax.Array, has_changed: jax.Array | bool = True) -> jax.Array:
    """Counts a change of rows outside of steps.

    Args:
      counters: uint32 [len(COUNTERS), 2].
      has_changed: bool scalar, whether rows have changed.

    Returns:
      The new counters.
    """
    one = np.zeros(counters.shape, np.uint32)
    one[-1, 1] = 1
    return counters + one * jnp.asarray(has_changed).astype(jnp.uint32)


def num_changes(counters: Any) -> Any:
    """Returns the number of changes of rows outside of steps (uint32 [])."""
    return counters[-1, 1]
