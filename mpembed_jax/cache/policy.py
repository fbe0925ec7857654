"""The cache policies LFU and LRU: use, ageing, the rank of a line, admission, pinning.

A policy is named "lfu" or "lru". The last branch of each rule is the rule of LRU.
`ops.xla.plan.make_plan` states the rules as a whole.
"""

import dataclasses
from collections.abc import Collection
from fractions import Fraction
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mpembed_jax.arrays import carries
from mpembed_jax.cache.spec import POLICIES
from mpembed_jax.row_ids import NO_ID

if TYPE_CHECKING:
    from mpembed_jax.cache.residency import CacheState

MAX_AGE = 2**25 - 1  # LRU ages saturate here, so that the pair (age, way) fits 32 bits
MAX_ESTIMATE = 2**16 - 1
PINNED = 2**24  # LFU priority of a line that holds a row of this batch; exceeds every estimate


RULES = frozenset({"lfu", "lru"})  # the policies whose rules are in this file


def check_rules(policies: Collection[str], rules: Collection[str], where: str) -> None:
    """Checks that a file has rules for every policy.

    Without this check, a policy without rules would silently behave as LRU.

    Args:
      policies: the names that a CacheSpec takes.
      rules: the names whose rules the file has.
      where: the file.

    Raises:
      NotImplementedError: if a policy has no rules there.
    """
    if missing := sorted(set(policies) - set(rules)):
        raise NotImplementedError(
            f"the cache policies {missing} have no rules in {where}; write them, then add the "
            "names to its RULES"
        )


check_rules(POLICIES, RULES, __name__)


def counts_use(policy: str) -> bool:
    """Returns whether a policy estimates the use of ids. Such a policy has a count-min sketch."""
    return policy == "lfu"


def estimate(policy: str, use: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the estimated use (int32) of ids; zeros if the policy has no estimates.

    LFU: it is `use` + `counts`, at most MAX_ESTIMATE. `use` is the earlier estimate, from the line
    or the sketch. `counts` are the occurrences in this batch.

    The misses of a set take their turns in descending order of estimates, then in ascending order
    of ids.
    """
    return jnp.minimum(use + counts, MAX_ESTIMATE) if policy == "lfu" else jnp.zeros_like(counts)


def pinned(policy: str, step: jax.Array) -> jax.Array | int:
    """Returns the priority (int32) of a line that holds a row of this batch.

    No newcomer may take such a line.
    """
    return PINNED if policy == "lfu" else step


def ranks(policy: str, tags: jax.Array, priority: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the rank of each way (uint32, shape of tags). Newcomers take ways of low rank first.

    An empty way has rank 0. LFU: the rank is the line's estimated use + 1 (see `use_of`). LRU: the
    rank is higher for a line that was used more recently.
    """
    if policy == "lfu":
        rank = priority.astype(jnp.uint32) + jnp.uint32(1)
    else:
        rank = (MAX_AGE + 1 - jnp.minimum(step - priority, MAX_AGE)).astype(jnp.uint32)
    return jnp.where(tags == NO_ID, jnp.uint32(0), rank)


def use_of(rank: jax.Array) -> jax.Array:
    """Returns the estimated use (int32) of the id at a way of this rank; -1 for an empty way.

    It is asked only of policies that have estimates.
    """
    return rank - 1


def may_enter(policy: str, rank: jax.Array, estimates: jax.Array) -> jax.Array:
    """Returns whether newcomers with these estimates may take ways of these ranks (both int32).

    A newcomer may always take an empty way. LFU: the line's estimate must be below the newcomer's.
    LRU: the line must hold no row of this batch.

    Every rule must be monotone: if it refuses a newcomer, it refuses all later newcomers of the
    set, because planners then close the set. Later newcomers have no larger estimates, and meet no
    lower ranks.
    """
    return rank <= estimates if policy == "lfu" else rank <= MAX_AGE


def is_time_to_halve(cache: "CacheState", step: jax.Array, num_positions: Fraction) -> jax.Array:
    """Returns whether this step halves all LFU estimates (bool []).

    The period is 30 C / N steps, with C lines and N = num_positions ids in a batch.
    """
    if not counts_use(cache.policy) or not num_positions:
        return jnp.bool_(False)
    # Read as uint32, the step counts to 2^32 - 1. A longer period (small batches and a huge
    # cache) would never end, so it is cut to 2^32 - 1.
    period = min(max(1, 30 * cache.geometry.lines // num_positions), 2**32 - 1)
    return (step != 0) & (step.astype(jnp.uint32) % jnp.uint32(period) == 0)


def halved(estimates: jax.Array) -> jax.Array:
    """Returns estimates (an integer array) with half their values."""
    return estimates >> 1


def age(cache: "CacheState", halve: jax.Array) -> "CacheState":
    """Halves every estimate, in the sketch and at the lines, if `halve` (bool scalar) is true.

    `carries.at_most_once` updates the arrays in place. An LRU cache has no estimates, and is
    returned unchanged.
    """

    if not counts_use(cache.policy):
        return cache

    def halve_both(both: tuple) -> tuple:
        return halved(both[0]), halved(both[1])

    sketch, priority = carries.at_most_once(
        halve_both, halve.astype(jnp.int32), (cache.sketch, cache.priority)
    )
    return dataclasses.replace(cache, sketch=sketch, priority=priority)
