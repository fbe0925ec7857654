"""The rules of LFU and LRU: how use is measured, when it ages, what a line costs, who may take it, who is pinned."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.cache.residency import CacheState
from mpembed_jax.row_ids import NO_ID

MAX_AGE = 2**25 - 1  # LRU ages saturate here, so that (age, way) fits 32 bits
MAX_ESTIMATE = 2**16 - 1
PINNED = 2**24  # an LFU priority no estimate reaches: the line belongs to this batch


def counts_use(policy: str) -> bool:
    """Whether a policy estimates how often each id is used, and so has a sketch."""
    return policy == "lfu"


def estimate(use: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns an id's estimated use (int32) from what was remembered of it and its occurrences in this batch."""
    return jnp.minimum(use + counts, MAX_ESTIMATE)


def pinned(policy: str, step: jax.Array) -> jax.Array | int:
    """Returns the priority of a line that belongs to this batch: no newcomer may take it."""
    return PINNED if policy == "lfu" else step


def ranks(policy: str, tags: jax.Array, priority: jax.Array, step: jax.Array) -> jax.Array:
    """Returns how dear each way is (uint32, shape of tags): 0 if empty; LFU: use + 1; LRU: the younger, the dearer."""
    if policy == "lfu":
        rank = priority.astype(jnp.uint32) + jnp.uint32(1)
    else:
        rank = (MAX_AGE + 1 - jnp.minimum(step - priority, MAX_AGE)).astype(jnp.uint32)
    return jnp.where(tags == NO_ID, jnp.uint32(0), rank)


def may_enter(policy: str, rank: jax.Array, estimates: jax.Array) -> jax.Array:
    """Whether a newcomer may take a way of this rank (int32). LFU: used less than the newcomer; LRU: not used this step."""
    return rank <= estimates if policy == "lfu" else rank <= MAX_AGE


def is_time_to_halve(cache: CacheState, step: jax.Array, num_positions: Fraction) -> jax.Array:
    """Whether all LFU estimates are halved in this step: every 30 C / N steps."""
    if not counts_use(cache.policy) or not num_positions:
        return jnp.bool_(False)
    # A step number has 31 bits. A longer period (small batches beside a huge cache) never ends.
    period = min(max(1, 30 * cache.geometry.lines // num_positions), 2**32 - 1)
    return (step != 0) & (
        step.astype(jnp.uint32) % jnp.uint32(period) == 0
    )  # as an unsigned number it passes 2^31


def age(cache: CacheState, halve: jax.Array) -> CacheState:
    """Halves every estimate, in the sketch and at the lines, where `halve` holds: a loop of one turn or none, in place."""

    if not counts_use(cache.policy):
        return cache

    def halve_both(_: jax.Array, both: tuple) -> tuple:
        return both[0] >> 1, both[1] >> 1

    sketch, priority = lax.fori_loop(
        0, halve.astype(jnp.int32), halve_both, (cache.sketch, cache.priority)
    )
    return dataclasses.replace(cache, sketch=sketch, priority=priority)
