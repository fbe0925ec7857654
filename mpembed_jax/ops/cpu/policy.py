"""The rules of `cache.policy`, compiled by numba. They give the same numbers.

`by` is the index of a policy in POLICIES. All other arguments are scalars, except those of `age`.
"""

import numpy as np

from mpembed_jax.cache import policy
from mpembed_jax.cache.spec import POLICIES
from mpembed_jax.ops.cpu.call_frame import compiled
from mpembed_jax.row_ids import NO_ID

_NO_ID = np.int32(NO_ID)
_LFU = POLICIES.index("lfu")
RULES = frozenset({"lfu", "lru"})  # the policies whose rules are in this file
policy.check_rules(POLICIES, RULES, __name__)
_MAX_ESTIMATE, _PINNED, _MAX_AGE = policy.MAX_ESTIMATE, policy.PINNED, policy.MAX_AGE


@compiled
def counts_use(by):
    """Returns whether a policy estimates the use of ids; see policy.counts_use."""
    return by == _LFU


@compiled
def estimate(by, use, count):
    """Returns the estimated use of an id; 0 if the policy has no estimates. See policy.estimate."""
    return min(use + count, _MAX_ESTIMATE) if by == _LFU else 0


@compiled
def pinned(by, step):
    """Returns the priority of a line that holds a row of this batch; see policy.pinned."""
    return _PINNED if by == _LFU else step


@compiled
def rank(by, tag, priority, step):
    """Returns the rank (uint64) of one way; see policy.ranks."""
    if by == _LFU:
        dear = np.uint64(priority + 1)
    else:
        dear = np.uint64(_MAX_AGE + 1 - min(np.int64(np.int32(step - priority)), _MAX_AGE))
    return np.uint64(0) if tag == _NO_ID else dear


@compiled
def comes_first(estimate, x, other_estimate, other):
    """Returns whether id x takes its turn before another miss of its set; see policy.estimate."""
    return estimate > other_estimate or (estimate == other_estimate and x < other)


@compiled
def use_of(rank):
    """Returns the estimated use of the id at a way of this rank; see policy.use_of."""
    return rank - 1


@compiled
def may_enter(by, rank, estimate):
    """Returns whether a newcomer may take a way of this rank; see policy.may_enter."""
    return rank <= (estimate if by == _LFU else _MAX_AGE)


@compiled
def age(priority, sketch):
    """Halves every estimate in place, at the lines and in the sketch; see policy.age.

    It is called only if policy.is_time_to_halve, which is never true without estimates. Both arrays
    are flat: int32 [C] and uint16.
    """
    for k in range(len(priority)):
        priority[k] >>= 1
    for k in range(len(sketch)):
        sketch[k] >>= 1
