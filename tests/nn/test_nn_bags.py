"""Properties of nn.CachedEmbedBags.

Pooling, shared tables, several widths, array and dict ids, and what misuse raises.
"""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Refused, named
from flax import nnx
from nn_models import BAG_IDS, IDS, ROW_TX, address, assert_same_bits, bag_specs

import mpembed_jax as mpembed
from mpembed_jax import EmbeddingSpec, TableSpec, nn


def pooled_by_hand(tables, ids, weights, combiner):
    out = []
    for bag, factors in zip(ids, weights, strict=True):
        real = [(tables[i], w) for i, w in zip(bag, factors, strict=True) if 0 <= i < len(tables)]
        total = sum((row * w for row, w in real), np.zeros(tables.shape[1], np.float32))
        w = np.array([w for _, w in real])
        divisor = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w**2).sum())}[combiner]
        out.append(total / divisor if real else total)
    return np.stack(out)


def test_other_mappings_than_dicts_are_taken():
    model = nn.CachedEmbedBags(bag_specs(), optax.sgd(0.1), rngs=nnx.Rngs(0))
    model.eval()
    wanted = model(BAG_IDS)
    for ids in (collections.defaultdict(list, BAG_IDS), types.MappingProxyType(BAG_IDS)):
        vectors = model(ids)
        assert type(vectors) is (dict if type(ids) is types.MappingProxyType else type(ids))
        assert_same_bits(dict(vectors), wanted)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_one_array_given_for_several_features_is_of_each_feature_s_table(kind, fused):
    """It is recognized with its table; an array of columns is none of one feature."""
    spec = EmbeddingSpec((TableSpec("a", 9), TableSpec("b", 9)), 4, "float32", None)
    model = nn.CachedEmbedBags(spec, ROW_TX, combiner="sum", rngs=nnx.Rngs(0), fused=fused)
    ids = kind(np.array([[1, 2], [3, 8]], np.int32))

    def compared(of_prefetch, *calls):
        @nnx.jit
        def both(model, ids):
            given = ids if kind is jnp.asarray else np.array([[1, 2], [3, 8]], np.int32)
            model.prefetch(of_prefetch(given))
            called = [model(call(given)) for call in calls]
            nn.discard(model)
            reader = nnx.view(model, deterministic=True)
            return called, [reader(call(given)) for call in calls]

        return both(model, ids)

    assert_same_bits(*compared(lambda x: {"a": x, "b": x}, lambda x: {"a": x, "b": x}))
    if not fused:
        called, read = compared(lambda x: {"a": x}, lambda x: {"a": x}, lambda x: {"b": x})
        assert_same_bits(called[0], read[0])
        assert np.isnan(called[1]["b"]).all()  # b was not prefetched
        called, read = compared(lambda x: x, lambda x: x, lambda x: {"a": x})
        assert_same_bits(called[0], read[0])
        assert np.isnan(called[1]["a"]).all()  # ids 2 and 8 are those of b in the columns


@pytest.mark.parametrize("is_weighted", [False, True])
def test_bags_pool_each_feature_from_its_own_table(is_weighted):
    combiner = {"seen": "mean", "bought": "sum", "user": "sqrtn", "shop": "sum"}
    model = nn.CachedEmbedBags(bag_specs(), optax.sgd(0.1), combiner=combiner, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    weights = {
        f: rng.uniform(0.5, 2, ids.shape).astype(np.float32)
        for f, ids in BAG_IDS.items()
        if f != "user"
    }
    given = weights if is_weighted else None
    tables = {**mpembed.to_dense(model.states[0]), **mpembed.to_dense(model.states[1])}

    @nnx.jit
    def both(model):
        model.prefetch(BAG_IDS)
        trained = model(BAG_IDS, given)
        nn.discard(model)
        return trained, nnx.view(model, deterministic=True)(BAG_IDS, given)

    trained, read = both(model)
    assert set(trained) == set(BAG_IDS)
    assert_same_bits(trained, read)
    for feature, table in {
        "seen": "items",
        "bought": "items",
        "user": "users",
        "shop": "shop",
    }.items():
        factors = weights.get(feature) if is_weighted else None
        factors = np.ones(BAG_IDS[feature].shape, np.float32) if factors is None else factors
        by_hand = pooled_by_hand(tables[table], BAG_IDS[feature], factors, combiner[feature])
        np.testing.assert_allclose(trained[feature], by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_bags_train_shared_tables_and_several_widths_like_dense_tables():
    row_txs = [optax.sgd(0.5), optax.sgd(0.25)]
    bags = nn.CachedEmbedBags(bag_specs(storage="float32"), row_txs, rngs=nnx.Rngs(0))
    tables = {**mpembed.to_dense(bags.states[0]), **mpembed.to_dense(bags.states[1])}
    mixes = {f: jnp.asarray(np.random.default_rng(1).normal(size=(3, d)), jnp.float32) for f, d in
             {"seen": 4, "bought": 4, "user": 4, "shop": 3}.items()}  # fmt: skip
    weights = {"seen": np.full((3, 3), 0.5, np.float32)}

    def loss_fn(vectors):
        return sum(jnp.sum(jnp.square(vectors[f]) * mixes[f]) for f in mixes)

    traces = []

    @nnx.jit(donate_argnums=0)
    def step(bags, ids):
        traces.append(1)
        bags.prefetch(ids)
        loss, grads = nnx.value_and_grad(lambda bags: loss_fn(bags(ids, weights)))(bags)
        rest = nn.apply_gradients(bags, grads)
        assert not jax.tree.leaves(rest)
        return loss

    def dense_loss(tables, ids):
        vectors = {}
        for feature, table in {
            "seen": "items",
            "bought": "items",
            "user": "users",
            "shop": "shop",
        }.items():
            is_real = (ids[feature] >= 0) & (ids[feature] < len(tables[table]))
            factor = jnp.where(is_real, weights.get(feature, np.float32(1)), np.float32(0))
            rows = tables[table][jnp.where(is_real, ids[feature], 0)]
            vectors[feature] = jnp.sum(rows * factor[..., None], axis=1)
        return loss_fn(vectors)

    dense_step = jax.jit(jax.value_and_grad(dense_loss))
    before = [address(state) for state in bags.states]
    for shift in range(3):
        ids = {
            f: np.where(v == mpembed.NO_ID, v, (v + shift) % 51).astype(np.int32)
            for f, v in BAG_IDS.items()
        }
        loss, grads = dense_step(tables, ids)
        np.testing.assert_allclose(step(bags, ids), loss, rtol=1e-5, atol=1e-6)
        tables = {n: t - (0.25 if n == "shop" else 0.5) * grads[n] for n, t in tables.items()}
    assert len(traces) == 1
    assert [address(state) for state in bags.states] == before
    for name, table in {
        **mpembed.to_dense(bags.states[0]),
        **mpembed.to_dense(bags.states[1]),
    }.items():
        np.testing.assert_allclose(table, tables[name], rtol=1e-5, atol=1e-6)
    assert [s.steps for s in bags.stats()] == [3, 3]


@pytest.mark.parametrize("num_specs", named([1, 2], fast={"1"}))
def test_array_ids_give_the_vectors_of_bags_of_one(num_specs):
    tables = [TableSpec(n, 9) for n in "abc"]
    specs = [EmbeddingSpec(tables, 4, cache=None)]
    if num_specs == 2:
        specs = [EmbeddingSpec(tables[:2], 4, cache=None), EmbeddingSpec(tables[2:], 4, cache=None)]
    ids = np.random.default_rng(0).integers(0, 9, (2, 5, 3))
    weights = np.random.default_rng(1).uniform(0.5, 2, ids.shape).astype(np.float32)
    bags = nn.CachedEmbedBags(specs, ROW_TX, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def columns(array):
        return {n: array[..., i, None] for i, n in enumerate("abc")}

    @nnx.jit
    def vectors_in_training(bags):
        bags.prefetch(ids)
        vectors = bags(ids), bags(ids, weights)
        nn.discard(bags)
        return vectors

    @nnx.jit
    def vectors_of_bags(bags):
        bags = nnx.view(bags, deterministic=True)
        by_name = bags(columns(ids)), bags(columns(ids), columns(weights))
        return jax.tree.map(
            lambda *parts: jnp.stack(parts, axis=-2), *([v[n] for v in by_name] for n in "abc")
        )

    vectors = vectors_in_training(bags)
    assert vectors[0].shape == (2, 5, 3, 4)
    assert vectors[0].dtype == jnp.bfloat16
    assert_same_bits(vectors, vectors_of_bags(bags))


def test_bags_without_a_combiner_give_one_vector_per_id():
    bags = nn.CachedEmbedBags(bag_specs(), ROW_TX, combiner=None, rngs=nnx.Rngs(0))
    bags.eval()
    assert bags({"bought": np.zeros((2, 6), np.int32)})["bought"].shape == (2, 6, 4)
    assert bags({}) == {}


# --- what misuse raises


@functools.cache
def _built_bags() -> nn.CachedEmbedBags:
    combiner = {"seen": "sum", "bought": "sum", "shop": "mean", "user": None}
    return nn.CachedEmbedBags(bag_specs(), ROW_TX, combiner=combiner, rngs=nnx.Rngs(0))


def bags_of(**options):
    return nn.CachedEmbedBags(bag_specs(), **{"tx": ROW_TX, "rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(
                lambda: bags_of(combiner="max"),
                "combiner of feature 'seen' must be one of sum, mean",
            ),
            Refused(
                lambda: bags_of(combiner={"seen": "sum"}), "combiner must name exactly the features"
            ),
            Refused(lambda: bags_of(tx=[optax.sgd(0.1)] * 3), "got 3 for 2 specs"),
            Refused(
                lambda: nn.CachedEmbedBags([], optax.sgd(0.1), rngs=nnx.Rngs(0)),
                "one EmbeddingSpec or several",
            ),
            Refused(
                lambda: nn.CachedEmbedBags(["x"], optax.sgd(0.1), rngs=nnx.Rngs(0)),
                "one EmbeddingSpec or several",
                TypeError,
            ),
            Refused(
                lambda: nn.CachedEmbedBags(bag_specs() * 2, optax.sgd(0.1), rngs=nnx.Rngs(0)),
                "are in several specs",
            ),
            Refused(
                lambda: _built_bags().prefetch({"sean": IDS}), "unknown features.*sean", KeyError
            ),
            Refused(lambda: _built_bags().prefetch(IDS), r"array ids must be \[.., 4\]"),
            Refused(
                lambda: _built_bags().prefetch(np.zeros((2, 4), np.int32)),
                "one embedding_dim for all features",
            ),
            Refused(lambda: _built_bags()({"seen": IDS}), "without prefetch"),
        ]
    ),
)
def test_misuse_of_bags_raises_and_says_what_to_do(case):
    with pytest.raises(case.error, match=case.message):
        case.call()


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(
                lambda bags: bags({"seen": IDS[0]}),
                r"ids \[3\], but combiner 'sum' reduces the last",
            ),
            Refused(
                lambda bags: bags({"seen": IDS}, {"seen": np.ones((2, 2))}),
                "weights must have the shape",
            ),
            Refused(
                lambda bags: bags({"seen": IDS}, {"user": IDS}),
                "weights name features.*user",
                KeyError,
            ),
            Refused(
                lambda bags: bags({"seen": IDS}, np.ones((16, 3))),
                "weights must be a mapping like ids",
                TypeError,
            ),
            Refused(
                lambda bags: bags({"user": IDS}, {"user": np.ones((16, 3))}), "its combiner is None"
            ),
        ]
    ),
)
def test_misuse_of_bags_in_a_call_raises(case):
    bags = nnx.view(_built_bags(), deterministic=True)
    with pytest.raises(case.error, match=case.message):
        case.call(bags)


@pytest.mark.slow
def test_pooling_follows_the_implementation_of_the_state():
    """Kernels where they are named, in training and after eval().

    Bags without weights are the same sums in order.
    """

    def vectors(implementation):
        specs = bag_specs(storage="float32")
        model = nn.CachedEmbedBags(specs, ROW_TX, implementation=implementation, rngs=nnx.Rngs(0))
        graph, held = nnx.split(model)

        def both(held):
            model = nnx.merge(graph, held)
            model.prefetch(BAG_IDS)
            return model(BAG_IDS), nnx.view(model, deterministic=True)(BAG_IDS)

        traced = jax.jit(both).trace(held)
        return str(traced.jaxpr).count("name=mpembed_bag"), traced.lower().compile()(held)

    (none, plain), (found, kernels) = vectors(None), vectors("pallas_interpret")
    assert (none, found) == (
        0,
        4,
    )  # two features have bags of more than one id; each is pooled twice
    assert_same_bits(kernels, plain)


# --- states of other models


def bags_of_sizes(a, b, seed=0):
    spec = EmbeddingSpec([TableSpec("a", a), TableSpec("b", b)], 4, cache=None)
    return nn.CachedEmbedBags(spec, ROW_TX, rngs=nnx.Rngs(seed))


@pytest.mark.slow
def test_the_state_of_a_model_of_other_tables_is_refused_at_its_next_use():
    """As many rows in all, so that every array has the same shape."""
    ids = {"a": np.array([[25]]), "b": np.array([[5]])}
    bags = bags_of_sizes(30, 20)
    nnx.update(bags, nnx.state(bags_of_sizes(20, 30)))
    message = r"made for tables \{a: 30, b: 20\} x 4, but holds the state of \{a: 20, b: 30\}"
    uses = [
        lambda bags: bags.prefetch(ids),
        lambda bags: nnx.view(bags, deterministic=True)(ids),
        lambda bags: bags.states,
    ]
    for use in uses:
        for call in (use, nnx.jit(use)):
            with pytest.raises(ValueError, match=message):
                call(bags)
    with pytest.raises(ValueError, match=message):
        bags.stats()
    # A model of the same tables takes the state, and reads what the other did.
    twin, other = bags_of_sizes(20, 30, seed=1), bags_of_sizes(20, 30)
    nnx.update(twin, nnx.state(other))
    ids = {"a": np.array([[15]]), "b": np.array([[25]])}
    assert_same_bits(*(nnx.view(b, deterministic=True)(ids) for b in (twin, other)))


def test_arrays_of_other_tables_under_the_own_spec_are_refused_too():
    """As a checkpointer that keeps arrays alone restores them."""
    bags, other = bags_of_sizes(30, 20), bags_of_sizes(20, 30)
    graph, held = nnx.split(bags)
    bags = nnx.merge(
        graph, jax.tree.unflatten(jax.tree.structure(held), jax.tree.leaves(nnx.state(other)))
    )
    ids = {"a": np.array([[25]]), "b": np.array([[5]])}
    with pytest.raises(ValueError, match="another spec"):
        bags.prefetch(ids)
    view = nnx.view(bags, deterministic=True)
    with pytest.raises(ValueError, match="another spec"):
        view(ids)
    assert np.isnan(nnx.jit(lambda bags: bags(ids)["a"])(view)).all()
