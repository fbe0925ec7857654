"""The counters of a state: 64-bit counts without jax's x64 mode."""

import dataclasses

import jax
import jax.numpy as jnp

from mpembed_jax.cache.plan import Counts

# The events a state counts since init: those of a step's Counts, then those of updates.
COUNTERS = (*(f.name for f in dataclasses.fields(Counts)), "nonfinite_rows", "refused_updates")


def _add(counters: jax.Array, amounts: list[jax.Array]) -> jax.Array:
    """Adds i32 amounts to 64-bit counters kept as two words: no x64 mode needed."""
    low = counters[:, 0] + jnp.stack(amounts).astype(jnp.uint32)
    carry = (low < counters[:, 0]).astype(jnp.uint32)
    return jnp.stack([low, counters[:, 1] + carry], axis=1)


def count_step(counters: jax.Array, counts: Counts) -> jax.Array:
    """Returns the counters with one step's counts added."""
    amounts = jax.tree.leaves(counts)
    return _add(counters, amounts + [jnp.int32(0)] * (len(COUNTERS) - len(amounts)))


def count_updates(
    counters: jax.Array, num_nonfinite: jax.Array, is_refused: jax.Array
) -> jax.Array:
    """Returns the counters with one update's skipped rows and refusal added."""
    tail = [num_nonfinite, is_refused.astype(jnp.int32)]
    return _add(counters, [jnp.int32(0)] * (len(COUNTERS) - len(tail)) + tail)
