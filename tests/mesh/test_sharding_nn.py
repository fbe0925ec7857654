"""Flax modules over a mesh: the same loop, the same numbers."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import nn
from mpembed_jax.nn.linen import CachedEmbed, CachedEmbedBags, TrainState

TX = optax.sgd(1.0)
TABLES, CACHE = (
    [mpembed.TableSpec("user", 700), mpembed.TableSpec("item", 900)],
    mpembed.CacheSpec(num_rows=128, ways=2),
)
SPECS = (
    mpembed.EmbeddingSpec(TABLES, 4, "int8", CACHE),
    mpembed.EmbeddingSpec(mpembed.TableSpec("tags", 600), 8, "int8", None),
)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


class Model(nnx.Module):
    def __init__(self, mesh):
        self.bags = nn.CachedEmbedBags(SPECS, TX, combiner="sum", mesh=mesh, rngs=nnx.Rngs(0))
        self.words = nn.CachedEmbed(500, 4, tx=TX, cache=None, mesh=mesh, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        bags = self.bags(
            {name: ids[name] for name in ("user", "item", "tags")}, {"tags": ids["weights"]}
        )
        return jnp.concatenate([*bags.values(), self.words(ids["words"])], axis=-1)


@nnx.jit(donate_argnums=0)
def train_step(model, ids, upstream):
    model.bags.prefetch({name: ids[name] for name in ("user", "item", "tags")})
    model.words.prefetch(ids["words"])
    loss, grads = nnx.value_and_grad(lambda model: (model(ids) * upstream).sum())(model)
    nn.apply_gradients(model, grads)
    return loss


def batch(seed):
    rng = np.random.default_rng(seed)

    def draw(size, length):
        return np.minimum(rng.zipf(1.3, (16, length)), size).astype(np.int32) - 1

    tags = np.where(rng.random((16, 3)) < 0.3, mpembed.NO_ID, draw(600, 3))
    weights = rng.integers(0, 5, (16, 3)).astype(np.float32) / 4
    ids = {
        "user": draw(700, 1),
        "item": draw(900, 2),
        "tags": tags,
        "words": draw(500, 1)[:, 0],
        "weights": weights,
    }
    return ids, rng.integers(-8, 9, (16, 20)).astype(np.float32) / 64


@pytest.fixture(scope="module")
def one_device():
    return trained(None)


def trained(mesh):
    model, losses = Model(mesh), []
    for seed in range(4):
        losses.append(float(train_step(model, *batch(seed))))
    model.eval()
    return model, losses, np.asarray(model(batch(9)[0]))


@pytest.mark.slow
def test_modules_over_a_mesh_train_as_on_one_device(one_device):
    """Gradients with exact sums: every row in every bit, evaluation too."""
    model, losses, vectors = trained(mesh_of(4))
    wanted, wanted_losses, wanted_vectors = one_device
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    np.testing.assert_array_equal(vectors, wanted_vectors)
    for got, want in zip(
        (*model.bags.states, model.words.state),
        (*wanted.bags.states, wanted.words.state),
        strict=True,
    ):
        jax.tree.map(np.testing.assert_array_equal, mpembed.to_dense(got), mpembed.to_dense(want))
    assert len(model.words.state.table.rows.sharding.device_set) == 4


class LinenModel(linen.Module):
    mesh: Any = None

    @linen.compact
    def __call__(self, ids):
        bags = CachedEmbedBags(SPECS[1], TX, mesh=self.mesh, name="bags")(
            {"tags": ids["tags"]}, {"tags": ids["weights"]}
        )
        words = CachedEmbed(500, 4, TX, cache=CACHE, mesh=self.mesh, name="words")(ids["words"])
        return jnp.concatenate([bags["tags"], words], axis=-1)


@jax.jit(donate_argnums=0)
def linen_step(state, ids, upstream):
    state = state.prefetch({"bags": {"tags": ids["tags"]}, "words": ids["words"]})
    loss, grads = jax.value_and_grad(
        lambda params: (state.apply_fn({"params": params}, ids) * upstream).sum()
    )(state.params)
    return state.apply_gradients(grads=grads), loss


def linen_trained(mesh):
    model = LinenModel(mesh)
    state = TrainState.create(
        apply_fn=model.apply, variables=model.init(jax.random.key(0), batch(0)[0]), tx=TX
    )
    losses = []
    for seed in range(3):
        ids, upstream = batch(seed)
        state, loss = linen_step(state, ids, upstream[:, :12])
        losses.append(float(loss))
    states = [
        state.collections["embedding"][m][s].state
        for m, s in (("bags", "stack_0"), ("words", "table"))
    ]
    return states, losses, np.asarray(model.apply(state.variables, batch(9)[0]))


@pytest.mark.slow
def test_linen_modules_over_a_mesh_train_as_on_one_device():
    """As above: every row in every bit, evaluation too."""
    states, losses, vectors = linen_trained(mesh_of(4))
    wanted, wanted_losses, wanted_vectors = linen_trained(None)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    np.testing.assert_array_equal(vectors, wanted_vectors)
    for got, want in zip(states, wanted, strict=True):
        jax.tree.map(np.testing.assert_array_equal, mpembed.to_dense(got), mpembed.to_dense(want))
        assert len(got.table.rows.sharding.device_set) == 4
        assert mpembed.stats(got).steps == 3
