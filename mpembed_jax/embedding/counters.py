"""The 64-bit counters of an embedding state, without jax's x64 mode."""

import dataclasses

import jax
import jax.numpy as jnp

from mpembed_jax.cache.plan import Counts

OF_UPDATES = ("nonfinite_rows", "refused_updates")
# The names of the counters: those of a step's Counts, then the two that count updates.
COUNTERS = (*(f.name for f in dataclasses.fields(Counts)), *OF_UPDATES)
# The counters that tell what was requested so far. They are equal on any number of devices.
OF_REQUESTS = COUNTERS[: COUNTERS.index("dropped")]


def add(counters: jax.Array, amounts: list[jax.Array]) -> jax.Array:
    """Adds int32 amounts to 64-bit counters, each kept as two uint32 words."""
    low = counters[:, 0] + jnp.stack(amounts).astype(jnp.uint32)
    carry = (low < counters[:, 0]).astype(jnp.uint32)
    return jnp.stack([low, counters[:, 1] + carry], axis=1)


def count_step(counters: jax.Array, counts: Counts) -> jax.Array:
    """Returns the counters after adding the counts of one step."""
    amounts = jax.tree.leaves(counts)
    return add(counters, amounts + [jnp.int32(0)] * (len(COUNTERS) - len(amounts)))


def count_updates(
    counters: jax.Array, num_nonfinite: jax.Array, is_refused: jax.Array
) -> jax.Array:
    """Returns the counters after adding one update.

    Args:
      counters: uint32 [len(COUNTERS), 2].
      num_nonfinite: int32 scalar, the number of rows skipped for non-finite gradients.
      is_refused: bool scalar, whether the update was refused.
    """
    tail = [num_nonfinite, is_refused.astype(jnp.int32)]
    return add(counters, [jnp.int32(0)] * (len(COUNTERS) - len(tail)) + tail)
