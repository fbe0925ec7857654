"""Which optimizers may be applied to a part of a batch's rows at a time.

Applied so, they make the bits of the whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import named

import mpembed_jax as mpembed
from mpembed_jax.optim import row_locality, row_state

LOCAL = {
    "rowwise_adagrad": mpembed.optim.rowwise_adagrad(0.1),
    "scheduled": mpembed.optim.rowwise_adagrad(
        optax.exponential_decay(0.1, 100, 0.5), weight_decay=0.1
    ),
    "rowwise_adam": mpembed.optim.rowwise_adam(0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adamw": optax.adamw(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "clipped by value": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
}


def counting_rows():
    """Its update of a row depends on where the row stands."""

    def update(updates, state, params=None):
        return updates * jnp.arange(updates.shape[0], dtype=jnp.float32)[:, None], state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


MIXING = {
    "clipped by global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "lamb": optax.lamb(0.1),
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "centralized over rows": optax.stateless(
        lambda updates, _: updates - jnp.mean(updates, axis=0)
    ),
    "shifted rows": optax.stateless(lambda updates, _: jnp.roll(updates, 1, axis=0)),
    "counting rows": counting_rows(),
}


@pytest.mark.parametrize("tx", named(LOCAL, marks={"adamw": training.OPTAX_ADAM}))
def test_optimizers_that_treat_each_row_by_itself_are_recognized(tx):
    assert row_locality.is_row_local(tx, 8)


@pytest.mark.parametrize("tx", named(MIXING, marks={"lamb": training.OPTAX_ADAM}))
def test_optimizers_that_mix_rows_are_not_taken_for_local(tx):
    assert not row_locality.is_row_local(tx, 8)


@training.OPTAX_ADAM
def test_examples_are_tried_inside_a_shard_map_without_jit():
    """As in jax.disable_jit; each device tries for itself, outside of the shard_map."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))

    def per_device(values):
        leaves, _ = row_state.row_leaves(tx, 4)
        row_locality.check_mixing(tx, 4)
        return values + len(leaves)

    spec = jax.sharding.PartitionSpec("x")
    run = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(run(jnp.zeros(2, jnp.int32)), [3, 3])


@pytest.mark.parametrize(
    "name", named(["scheduled", "clipped by global norm"], core={"clipped by global norm"})
)
def test_chunks_and_full_width_passes_give_the_same_bits(name):
    """More unique ids than a chunk holds.

    The schedule's count moves once per step, also in a step without any id.
    """
    tx = (LOCAL | MIXING)[name]
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("a", 9000)], 8, "int8", mpembed.CacheSpec(0.3))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9000, (3, 6000)).astype(np.int32)
    ids[1] = mpembed.NO_ID
    grads = rng.normal(size=(6000, 8)).astype(np.float32)

    @jax.jit
    def step(state, ids):
        return training.step(state, ids, tx, training.of_vectors(grads)).state

    results = []
    for implementation in ("xla", "xla_chunked"):
        state = mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
        for batch in ids:
            state = step(state, batch)
        results.append(jax.tree.leaves(state))
    for full, chunked in zip(*results, strict=True):
        np.testing.assert_array_equal(full, chunked)
