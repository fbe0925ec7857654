"""The rules of `cache.policy`, compiled by numba. They give the same numbers."""

import numpy as np

from mpembed_jax.cache import policy
from mpembed_jax.ops.cpu.call_frame import compiled
from mpembed_jax.row_ids import NO_ID

_NO_ID = np.int32(NO_ID)
_MAX_ESTIMATE, _PINNED, _MAX_AGE = policy.MAX_ESTIMATE, policy.PINNED, policy.MAX_AGE


@compiled
def estimate(use, count):
    """Returns the estimated use of an id; see policy.estimate."""
    return min(use + count, _MAX_ESTIMATE)


@compiled
def pinned(is_lfu, step):
    """Returns the priority of a line of this batch; see policy.pinned."""
    return _PINNED if is_lfu else step


@compiled
def rank(is_lfu, tag, priority, step):
    """Returns the rank (uint64) of one way; see policy.ranks."""
    if is_lfu:
        dear = np.uint64(priority + 1)
    else:
        dear = np.uint64(_MAX_AGE + 1 - min(np.int64(np.int32(step - priority)), _MAX_AGE))
    return np.uint64(0) if tag == _NO_ID else dear


@compiled
def may_enter(is_lfu, rank, estimate):
    """Returns whether a newcomer may take a way of this rank; see policy.may_enter."""
    return rank <= (estimate if is_lfu else _MAX_AGE)
