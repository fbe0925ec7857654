"""The step of the embedding alone that benchmarks, checks and compilers of this project share."""

import functools
from typing import Any

import jax

import mpembed_jax as mpembed


def embedding_step(
    state: Any,
    ids: jax.Array,
    upstream: jax.Array,
    *,
    tx: Any,
    is_pooled: bool = False,
    **pooling: Any,
) -> tuple:
    """One step of the embedding alone, by the state's implementation, whatever its model.

    Args:
      state: to be donated by the caller's jit.
      ids: global ids.
      upstream: the gradient of what pool returns.
      tx: the transformation given to init.
      is_pooled: end in apply_pooled_gradients, otherwise in the gradients of rows and
        apply_gradients.
      pooling: weights and combiner, for pool.

    Returns:
      The state, the plan, the rows and the pooled vectors.
    """
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    pool = functools.partial(
        mpembed.pool, inverse=plan.inverse, implementation=state.implementation, **pooling
    )
    vectors, pull_back = jax.vjp(pool, rows)
    if is_pooled:
        state = mpembed.apply_pooled_gradients(state, plan, rows, upstream, **pooling, tx=tx)
    else:
        state = mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx)
    return state, plan, rows, vectors
