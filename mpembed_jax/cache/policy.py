"""The rules of LFU and LRU: how use is measured, when it ages, what a line costs, who may take it, who is pinned."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.cache.residency import CacheState

MAX_AGE = 2**25 - 1  # LRU ages saturate here, so that (age, way) fits 32 bits
MAX_ESTIMATE = 2**16 - 1
PINNED = 2**24  # an LFU priority no estimate reaches: the line belongs to this batch


def is_time_to_halve(cache: CacheState, step: jax.Array, num_positions: Fraction) -> jax.Array:
    """Whether all LFU estimates are halved in this step: every 30 C / N steps."""
    if cache.policy != "lfu" or not num_positions:
        return jnp.bool_(False)
    period = max(1, 30 * cache.geometry.lines // num_positions)
    return (step != 0) & (step.astype(jnp.uint32) % jnp.uint32(period) == 0)  # as an unsigned number it passes 2^31


def age(cache: CacheState, halve: jax.Array) -> CacheState:
    """Halves every estimate, in the sketch and at the lines, where `halve` holds: a loop of one turn or none, in place."""

    if cache.policy != "lfu":
        return cache

    def halve_both(_: jax.Array, both: tuple) -> tuple:
        return both[0] >> 1, both[1] >> 1

    sketch, priority = lax.fori_loop(0, halve.astype(jnp.int32), halve_both, (cache.sketch, cache.priority))
    return dataclasses.replace(cache, sketch=sketch, priority=priority)
