"""Flax modules over a mesh: the same loop, the same numbers."""

import itertools
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import named
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
    return state.apply_gradients(grads=grads), (loss, optax.tree.norm(grads))


def linen_trained(mesh):
    model = LinenModel(mesh)
    state = TrainState.create(
        apply_fn=model.apply, variables=model.init(jax.random.key(0), batch(0)[0]), tx=TX
    )
    losses = []
    for seed in range(3):
        ids, upstream = batch(seed)
        state, numbers = linen_step(state, ids, upstream[:, :12])
        losses.append(jnp.stack(numbers))
    states = [
        state.collections["embedding"][m][s].state
        for m, s in (("bags", "stack_0"), ("words", "table"))
    ]
    return states, losses, np.asarray(model.apply(state.variables, batch(9)[0]))


@pytest.mark.exhaustive
def test_linen_modules_over_a_mesh_train_as_on_one_device():
    """As above: every row in every bit, evaluation too. So is the norm of all gradients.

    The whole command trains linen modules over a mesh with microbatches, below.
    """
    states, losses, vectors = linen_trained(mesh_of(4))
    wanted, wanted_losses, wanted_vectors = linen_trained(None)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    np.testing.assert_array_equal(vectors, wanted_vectors)
    for got, want in zip(states, wanted, strict=True):
        jax.tree.map(np.testing.assert_array_equal, mpembed.to_dense(got), mpembed.to_dense(want))
        assert len(got.table.rows.sharding.device_set) == 4
        assert mpembed.stats(got).steps == 3


# --- rows and gradients of one step, over a mesh as on one device

MESHES = {
    "x": lambda: mesh_of(4),
    "replicas": lambda: jax.make_mesh(
        (2, 2), ("r", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    ),
}
PLACEMENTS = {
    "rows": {},
    "replicated": {"placement": mpembed.Placement(kind="replicated")},
    "blocks": {"placement": mpembed.Placement(summation_blocks=8)},
    "undivided": {"placement": mpembed.Placement(batch_axes="r")},
}


def embed_over(mesh, **options):
    axis_name = None if mesh is None else "x"
    return nn.CachedEmbed(
        500, 8, tx=TX, storage="float32", cache=None, mesh=mesh, axis_name=axis_name,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    named(
        [*itertools.product(MESHES, list(PLACEMENTS)[:3]), ("replicas", "undivided")],
        core={"replicas-undivided"},
    ),
)
def test_the_norm_of_row_gradients_over_a_mesh_is_that_of_one_device(case):
    """A row that several devices ask for has one gradient, their sum.

    Clipping by any norm is therefore right.
    """
    ids = np.array([0, 0, 1, 9, 0, 0, 9, 0] * 2, np.int32)

    @nnx.jit
    def step(embed, ids):
        embed.prefetch(ids)
        grads = nnx.grad(lambda embed: (embed(ids) * jnp.arange(8.0)).sum())(embed)
        norms = optax.tree.norm(grads), optax.tree.norm(grads, ord=1), optax.tree.max(grads)
        grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
        nn.apply_gradients(embed, grads)
        return norms

    mesh, placement = case
    one = embed_over(None)
    many = embed_over(MESHES[mesh](), **PLACEMENTS[placement])
    np.testing.assert_allclose(step(many, ids), step(one, ids), rtol=1e-6)
    np.testing.assert_allclose(
        mpembed.to_dense(many.state)["embedding"],
        mpembed.to_dense(one.state)["embedding"],
        rtol=0,
        atol=2**-23,
    )


@pytest.mark.parametrize("mesh", named(list(MESHES), core={"replicas"}))
def test_ids_prefetched_on_one_device_are_found_from_another(mesh):
    """Microbatches take other parts of the batch than prefetch divided.

    Ids that no device prefetched are NaN.
    """
    ids = np.random.default_rng(0).integers(0, 500, (32, 3)).astype(np.int32)
    ids[3], ids[5, 0] = mpembed.NO_ID, -1

    @nnx.jit
    def step(embed, ids):
        embed.prefetch(ids)
        missing = embed(jnp.full((4, 1), 499, jnp.int32).at[0].set(ids[0, 0]))
        vectors = embed({"a": ids[::-1], "b": ids[8:16, 0]}), embed(ids)
        parts = [nnx.grad(lambda embed, part=part: jnp.sin(embed(part)).sum())(embed)
                 for part in (ids[:16], ids[16:])]  # fmt: skip
        nn.apply_gradients(embed, jax.tree.map(jnp.add, *parts))
        return vectors, missing

    assert 499 not in ids
    first, second = embed_over(None), embed_over(MESHES[mesh]())
    (one, one_missing), (many, missing) = step(first, ids), step(second, ids)
    jax.tree.map(np.testing.assert_array_equal, many, one)
    np.testing.assert_array_equal(missing, one_missing)
    np.testing.assert_array_equal(np.isnan(missing)[:, 0, 0], [False, True, True, True])
    np.testing.assert_allclose(
        mpembed.to_dense(second.state)["embedding"],
        mpembed.to_dense(first.state)["embedding"],
        rtol=0,
        atol=2**-23,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", list(MESHES))
def test_outside_jit_ids_of_another_device_are_found_and_others_refused(mesh):
    """The whole command has the test above, and refuses such ids in tests/nn/test_prefetched.py."""
    embed, ids = embed_over(MESHES[mesh]()), np.arange(96, dtype=np.int32).reshape(32, 3)
    embed.prefetch(ids)
    np.testing.assert_array_equal(embed(ids[::-1])[-1, 0], mpembed.read(embed.state, ids[0, 0]))
    with pytest.raises(ValueError, match="the call names row 499"):
        embed(np.full(4, 499, np.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    named(
        {
            "rowwise_adagrad": mpembed.optim.rowwise_adagrad(0.1),
            "mixing rows": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        },
        fast={"rowwise_adagrad"},
        core=(),
    ),
)
def test_under_set_mesh_a_step_is_the_same(tx):
    """jax.set_mesh sets the mesh for everything that is traced, also for what tx starts from."""
    ids = np.arange(16, dtype=np.int32).reshape(8, 2)

    def trained():
        embed = nn.CachedEmbed(500, 4, tx=tx, cache=None, mesh=mesh_of(4), rngs=nnx.Rngs(0))

        @nnx.jit
        def step(embed, ids):
            embed.prefetch(ids)
            nn.apply_gradients(embed, nnx.grad(lambda embed: embed(ids).sum())(embed))

        step(embed, ids)
        return mpembed.to_dense(embed.state)["embedding"]

    plain = trained()
    with jax.set_mesh(mesh_of(4)):
        under = trained()
    np.testing.assert_array_equal(under, plain)


@pytest.mark.exhaustive
def test_a_step_over_a_mesh_without_jit_passes_debug_nans():
    """Outside jit, jax.debug_nans looks at every result of a call, also within a shard_map.

    The whole command does so on one device, in tests/embedding/test_errors.py.
    """
    embed, ids = embed_over(mesh_of(4)), np.array([[3, 7], [7, 9], [3, 3], [499, 0]], np.int32)
    before = mpembed.to_dense(embed.state)["embedding"]
    with jax.debug_nans(True):
        embed.prefetch(ids)
        nn.apply_gradients(embed, nnx.grad(lambda embed: embed(ids[::-1]).sum())(embed))
    np.subtract.at(before, ids.reshape(-1), np.float32(1))
    np.testing.assert_allclose(
        mpembed.to_dense(embed.state)["embedding"], before, rtol=0, atol=2**-22
    )


@jax.jit
def microbatched_linen_step(state, ids, upstream):
    """As linen_step, in two microbatches of one prefetch."""
    state = state.prefetch({"bags": {"tags": ids["tags"]}, "words": ids["words"]})

    def loss_of(params, part):
        given = jax.tree.map(lambda leaf: leaf[part::2], ids)
        return (state.apply_fn({"params": params}, given) * upstream[part::2]).sum()

    parts = [jax.value_and_grad(loss_of)(state.params, part) for part in range(2)]
    loss, grads = jax.tree.map(jnp.add, *parts)
    return state.apply_gradients(grads=grads), (loss, optax.tree.norm(grads))


@pytest.mark.exhaustive
def test_linen_microbatches_over_a_mesh_equal_the_whole_batch_on_one_device():
    """Gradients with exact sums: the INT8 rows agree in every bit.

    The whole command has microbatches in linen, and those of the verbs over a mesh, in
    tests/documents/test_recipes.py.
    """
    trained = []
    for mesh, step in ((mesh_of(4), microbatched_linen_step), (None, linen_step)):
        model = LinenModel(mesh)
        ids, upstream = batch(0)
        state = TrainState.create(
            apply_fn=model.apply, variables=model.init(jax.random.key(0), ids), tx=TX
        )
        state, numbers = step(state, ids, upstream[:, :12])
        held = state.collections["embedding"]
        trained.append((jnp.stack(numbers), [mpembed.to_dense(held[m][s].state) for m, s in
                               (("bags", "stack_0"), ("words", "table"))]))  # fmt: skip
    (numbers, many), (expected, one) = trained
    np.testing.assert_allclose(numbers, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, many, one)
