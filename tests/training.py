"""The training step of the tests, gradients of its rows, and how two trained trees are compared."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpembed_jax as mpembed
from mpembed_jax.embedding.state import clock_of

OPTAX_ADAM = pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")


class Step(NamedTuple):
    """The state after a step, the step's plan, and its rows before the update."""

    state: mpembed.EmbeddingState
    plan: mpembed.CachePlan
    rows: jax.Array


def step(state, ids, tx, gradient=lambda rows, plan: jnp.ones_like(rows)):
    """Trains on the ids of one batch; `gradient(rows, plan)` is that of the rows."""
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    row_grads = gradient(rows, plan)
    return Step(mpembed.apply_gradients(state, plan, rows, row_grads, tx=tx), plan, rows)


def with_history(state, **changed):
    """The state as if it had come to another step or other counters."""
    state = dataclasses.replace(state, **jax.tree.map(jnp.asarray, changed))
    return dataclasses.replace(state, clock=clock_of(*state.history))


def of_positions(grads):
    """The gradient of rows: each is the sum of `grads`, [.., D], over its positions."""
    return lambda rows, plan: jnp.zeros_like(rows).at[plan.inverse].add(grads)


def of_vectors(grads, **pooling):
    """The gradient of rows whose pooled vectors have the gradients `grads`."""

    def gradient(rows, plan):
        def loss(rows):
            vectors = mpembed.pool(rows, plan.inverse, **pooling)
            return sum(jax.tree.leaves(jax.tree.map(lambda v, g: jnp.sum(v * g), vectors, grads)))

        return jax.grad(loss)(rows)

    return gradient


@partial(jax.jit, static_argnames=("tx", "feedback"), donate_argnames="state")
def train(state, batches, grads, tx, feedback=0.0):
    """Trains on ids [steps, N]; the state is donated.

    The gradient of a position is that of `grads`, f32 [steps, N, D], plus `feedback` times its row.
    Returns a Step whose plan and rows are those of all steps.
    """

    def body(state, batch):
        ids, g = batch

        def gradient(rows, plan):
            own = g + jnp.float32(feedback) * rows[plan.inverse] if feedback else g
            return of_positions(own)(rows, plan)

        state, plan, rows = step(state, ids, tx, gradient)
        return state, (plan, rows)

    state, (plans, rows) = jax.lax.scan(body, state, (batches, grads))
    return Step(state, plans, rows)


read = jax.jit(mpembed.read)


def all_rows(state):
    """Every row as training sees it, f32 [V, D] in NumPy."""
    return np.asarray(read(state, np.arange(state.spec.num_rows, dtype=np.int32)))


def assert_same(one, other):
    """Two trees have the same structure, types, dtypes and bits.

    Random keys and plain numbers too.
    """
    assert jax.tree.structure(one) == jax.tree.structure(other)
    leaves = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in leaves:
        assert type(a) is type(b), path
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if hasattr(a, "dtype"):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            assert np.array(a).tobytes() == np.array(b).tobytes(), path
        else:
            assert a == b, path
