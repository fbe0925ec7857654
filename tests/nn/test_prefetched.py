"""One prefetch serves every call of its step.

The calls have other orders, shapes and parts of its ids, microbatches, scan, vmap, remat.
"""

from functools import partial

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import crossed, named
from flax import nnx
from nn_models import ROW_TX, assert_same_bits

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, nn, ops
from mpembed_jax.nn.linen import CachedEmbed, TrainState

ROWS, DIM = 60, 4
FLOAT32 = {"storage": "float32", "cache": None}
CACHED = {"storage": "int8", "cache": CacheSpec(num_rows=16, ways=4)}
IDS = np.array([[3, 7, 7], [50, NO_ID, 3], [12, 59, 60], [0, 1, -1]], np.int32)


def embed_of(**options):
    options = {**FLOAT32, "tx": ROW_TX, **options}
    return nn.CachedEmbed(ROWS, DIM, rngs=nnx.Rngs(0), **options)


def bags_of(**options):
    options = {**FLOAT32, **options}
    features = {"seen": "items", "bought": "items", "user": "users"}
    items = EmbeddingSpec(
        (TableSpec("items", ROWS), TableSpec("users", ROWS)), DIM, features=features, **options
    )
    shop = EmbeddingSpec((TableSpec("shop", ROWS),), DIM, **options)
    combiner = {"seen": "mean", "bought": None, "user": "sum", "shop": "sum"}
    return nn.CachedEmbedBags([items, shop], ROW_TX, combiner=combiner, rngs=nnx.Rngs(0))


def table_of(embed):
    return mpembed.to_dense(embed.state)["embedding"]


# --- any call of prefetched ids


def test_other_ids_of_equal_shape_give_their_own_rows():
    embed = embed_of()
    a = np.arange(8, dtype=np.int32)
    b = 3 * a % 8

    @nnx.jit
    def product(embed, a, b):
        embed.prefetch(a)
        loss = (embed(a) * embed(b)).sum(-1).mean()
        nn.discard(embed)
        return loss

    table = table_of(embed)
    np.testing.assert_allclose(
        product(embed, a, b), (table[a] * table[b]).sum(-1).mean(), rtol=1e-5
    )


CALLS = {
    "the same": lambda ids: ids,
    "another order": lambda ids: ids[::-1],
    "one position": lambda ids: ids[2, 1],
    "a part": lambda ids: ids[1:3],
    "repeated": lambda ids: jnp.concatenate([ids, ids[:1]] * 2),
    "dropped": lambda ids: jnp.where(jnp.arange(3) == 0, ids, NO_ID),
    "a nest": lambda ids: {"x": ids.T, "y": [ids[0]]},
}


@crossed(
    options=named({"float32": FLOAT32, "int8 with a cache": CACHED}),
    way=named(["jit", "eager", "remat"], fast={"jit"}),
)
def test_a_call_of_prefetched_ids_equals_a_read(options, way):
    """In every bit; also of padding and of ids outside the table."""
    embed = embed_of(**options)

    def vectors(embed, ids):
        return {name: embed(call(ids)) for name, call in CALLS.items()}

    def step(embed, ids):
        embed.prefetch(ids)
        called = (nnx.remat(vectors) if way == "remat" else vectors)(embed, ids)
        nn.discard(embed)
        return called, vectors(nnx.view(embed, deterministic=True), ids)

    called, read = (step if way == "eager" else nnx.jit(step))(embed, jnp.asarray(IDS))
    assert_same_bits(called, read)
    assert not np.isnan(called["the same"]).any()


def test_calls_of_bags_share_the_prefetched_rows_of_a_stack():
    """A feature that shares a table with a prefetched one need not be prefetched itself."""
    bags = bags_of()
    ids = {name: jnp.asarray(IDS) for name in ("seen", "user", "shop")}
    weights = {"seen": jnp.arange(12, dtype=jnp.float32).reshape(4, 3)}

    def vectors(bags, ids):
        other = {"seen": ids["seen"][::-1], "bought": ids["seen"][1:], "shop": ids["shop"].T}
        return bags(ids, weights), bags(other, weights), bags({"user": ids["user"][:2]})

    @nnx.jit
    def step(bags, ids):
        bags.prefetch(ids)
        called = vectors(bags, ids)
        nn.discard(bags)
        return called, vectors(nnx.view(bags, deterministic=True), ids)

    assert_same_bits(*step(bags, ids))


def test_array_ids_of_bags_are_found_in_any_rows():
    tables = [TableSpec(n, 9) for n in "abc"]
    specs = [EmbeddingSpec(tables[:2], DIM, **FLOAT32), EmbeddingSpec(tables[2:], DIM, **FLOAT32)]
    bags = nn.CachedEmbedBags(specs, ROW_TX, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 9, (5, 3)), jnp.int32)

    @nnx.jit
    def step(bags, ids):
        bags.prefetch(ids)
        called = bags(ids), bags(ids[::-1]), bags(ids[2:3])
        nn.discard(bags)
        bags = nnx.view(bags, deterministic=True)
        return called, (bags(ids), bags(ids[::-1]), bags(ids[2:3]))

    assert_same_bits(*step(bags, ids))


def linen_state(model, *ids):
    variables = jax.jit(model.init)(jax.random.key(0), *ids)
    return TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1))


class LinenPair(linen.Module):
    """History and target of one embedding."""

    @linen.compact
    def __call__(self, history, target):
        embed = CachedEmbed(ROWS, DIM, ROW_TX, **FLOAT32, name="embed")
        return (embed(history).mean(axis=1) * embed(target)).sum(-1)


def test_two_calls_of_a_linen_module_train_like_the_dense_table():
    history, target = np.abs(IDS) % ROWS, np.array([3, 3, 59, 50], np.int32)
    state = linen_state(LinenPair(), history, target)
    table = mpembed.to_dense(state.collections["embedding"]["embed"]["table"].state)["embedding"]

    def dense_loss(table):
        return (table[history].mean(axis=1) * table[target]).sum(-1).mean()

    @jax.jit
    def step(state, history, target):
        state = state.prefetch([history, target])
        loss_of = lambda params: state.apply_fn({"params": params}, history, target).mean()  # noqa: E731
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    state, loss = step(state, history, target)
    expected, gradient = jax.value_and_grad(dense_loss)(jnp.asarray(table))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    trained = mpembed.to_dense(state.collections["embedding"]["embed"]["table"].state)["embedding"]
    np.testing.assert_allclose(trained, table - 0.5 * gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_prefetched_arrays_themselves_are_not_looked_up(monkeypatch):
    """The usual step costs no look-up.

    It calls with the arrays of prefetch, in a closure or as an argument, whole or one leaf of the
    nest.
    """

    def fail(*args, **kwargs):
        raise AssertionError("looked up")

    monkeypatch.setattr(ops, "find", fail)
    embed, ids = embed_of(), jnp.asarray(IDS)

    def loss(embed, ids, other):
        return (embed({"x": ids})["x"] + embed(other) + embed([ids, other])[0]).sum()

    @nnx.jit
    def step(embed, ids, other):
        embed.prefetch({"ids": ids, "other": other})
        grads = nnx.grad(loss)(embed, ids, other)
        nnx.grad(lambda embed: loss(embed, ids, other))(embed)
        nn.apply_gradients(embed, grads)
        embed.prefetch(IDS)  # of the host, a copy of the same values
        nn.apply_gradients(embed, nnx.grad(lambda embed: embed(IDS.copy()).sum())(embed))

    step(embed, ids, ids + 1)
    with pytest.raises(AssertionError, match="looked up"):
        nnx.jit(lambda embed, ids: (embed.prefetch(ids), embed(ids + 0)))(embed_of(), ids)
    bags = bags_of()

    @nnx.jit
    def bag_step(bags, ids):
        bags.prefetch(ids)
        nn.apply_gradients(bags, nnx.grad(lambda bags: bags(ids)["shop"].sum())(bags))

    bag_step(bags, {"seen": ids, "shop": ids})
    state = linen_state(LinenPair(), ids, ids[:, 0])

    @jax.jit
    def linen_step(state, history, target):
        state = state.prefetch([history, target])
        return jax.grad(lambda p: state.apply_fn({"params": p}, history, target).sum())(
            state.params
        )

    linen_step(state, ids, ids[:, 0])


def test_a_jitted_loss_sees_what_was_prefetched_for_it():
    """The inner function is traced once, for two prefetches of different ids."""
    embed = embed_of()

    @nnx.jit
    def steps(embed, a, b):
        traces = []

        @nnx.jit
        def inner(embed, ids):
            traces.append(1)
            return embed(ids)

        vectors = []
        for given, called in ((a, a), (b, a[::-1]), (b, b)):
            embed.prefetch(given)
            vectors.append(inner(embed, called))
            nn.discard(embed)
        assert len(traces) == 1
        return vectors

    a = np.arange(6, dtype=np.int32)
    b = (a + 2) % 6
    for got, ids in zip(steps(embed, a, b), (a, a[::-1], b), strict=True):
        np.testing.assert_array_equal(got, table_of(embed)[ids])


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_prefetch_and_call_may_be_jitted_apart():
    embed, ids = embed_of(), np.abs(IDS) % ROWS
    traces = []

    @nnx.jit
    def prefetch(embed, ids):
        embed.prefetch(ids)

    @nnx.jit(donate_argnums=0)
    def train(embed, ids):
        traces.append(1)
        nn.apply_gradients(embed, nnx.grad(lambda embed: embed(ids).sum())(embed))

    expected = table_of(embed)
    for turn in range(3):
        moved = jnp.asarray((ids + turn) % ROWS)
        prefetch(embed, moved)
        train(embed, moved)
        np.add.at(expected, np.asarray(moved).reshape(-1), np.float32(-0.5))
        assert not moved.is_deleted()
    np.testing.assert_allclose(table_of(embed), expected, rtol=1e-6)
    assert len(traces) == 1


def memory_of(**options):
    """A memory of 2-grams in one table, whose vectors are as wide as those of `embed_of`."""
    options = {"orders": (2,), "heads": 1, "rows": 50, "tx": ROW_TX, **options}
    return nn.NGramMemory(ROWS, DIM, rngs=nnx.Rngs(0), **options)


AHEAD = {
    "float32": (embed_of, FLOAT32),
    "int8 with a cache": (embed_of, CACHED),
    "n-grams": (memory_of, CACHED),
}


@pytest.mark.parametrize("case", named(AHEAD, core={"int8 with a cache", "n-grams"}))
def test_a_step_that_ends_with_the_next_prefetch_trains_the_same_bits(case):
    """RECIPES.md: prefetch ahead, in modules."""
    made, options = case
    batches = [batch(seed=k) for k in range(4)]

    def start():
        model = Model(made, **options)
        return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def train(model, optimizer, ids, labels):
        grads = nnx.grad(squared_error)(model, ids, labels)
        optimizer.update(model, nn.apply_gradients(model, grads))

    @nnx.jit
    def plain_step(model, optimizer, ids, labels):
        model.embed.prefetch(ids)
        train(model, optimizer, ids, labels)

    @partial(nnx.jit, static_argnames="is_last")
    def ahead_step(model, optimizer, ids, labels, next_ids, is_last):
        train(model, optimizer, ids, labels)
        if not is_last:
            model.embed.prefetch(next_ids)

    plain, ahead = start(), start()
    for ids, labels in batches:
        plain_step(*plain, ids, labels)
    ahead[0].embed.prefetch(batches[0][0])
    for k, (ids, labels) in enumerate(batches):
        is_last = k + 1 == len(batches)
        ahead_step(*ahead, ids, labels, batches[(k + 1) % 4][0], is_last)
    assert_same_bits(*(jax.tree.leaves(nnx.state(model)) for model, _ in (ahead, plain)))


# --- ids that were not prefetched


def test_ids_that_were_not_prefetched_are_nan_inside_jit_and_an_error_outside():
    embed = embed_of()

    @nnx.jit
    def step(embed, ids, other):
        embed.prefetch(ids)
        vectors = embed(other)
        grads = nnx.grad(lambda embed: jnp.nan_to_num(embed(other)).sum())(embed)
        nn.apply_gradients(embed, grads)
        return vectors

    ids, other = np.array([3, 7, NO_ID, 9]), np.array([[9, 8], [NO_ID, 3], [-1, 60]])
    before = table_of(embed)
    vectors = np.asarray(step(embed, ids, other))
    np.testing.assert_array_equal(np.isnan(vectors).all(-1), other == 8)
    np.testing.assert_array_equal(vectors[0, 0], before[9])
    np.testing.assert_array_equal(vectors[1:, 0], np.zeros((2, DIM)))
    assert np.isfinite(table_of(embed)).all()
    embed.prefetch(ids)
    with pytest.raises(
        ValueError, match=r"not prefetched: at \[0, 1\] the call names row 8 \(1 such"
    ):
        embed(other)
    bags = bags_of()
    bags.prefetch({"seen": IDS})
    with pytest.raises(ValueError, match="not prefetched"):
        bags({"user": IDS})
    called = nnx.jit(lambda bags: bags({"seen": np.array([[3, 7], [3, 8], [NO_ID, NO_ID]])}))(bags)
    np.testing.assert_array_equal(np.isnan(called["seen"]).all(-1), [False, True, False])


def test_ids_over_the_budget_read_as_zeros_in_any_call():
    spec = EmbeddingSpec(TableSpec("t", ROWS), DIM, max_unique_ids=4, **FLOAT32)
    bags = nn.CachedEmbedBags(spec, ROW_TX, combiner=None, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(bags, ids):
        bags.prefetch({"t": ids})
        vectors = bags({"t": ids})["t"], bags({"t": ids[::-1]})["t"]
        nn.discard(bags)
        return vectors

    forward, backward = step(bags, np.arange(10, dtype=np.int32))
    np.testing.assert_array_equal(forward, backward[::-1])
    assert (np.asarray(forward) == 0).all(-1).sum() == 6


# --- many uses of one prefetch


class Model(nnx.Module):
    """An embedding and a linear head."""

    def __init__(self, made=embed_of, **options):
        self.embed = made(**options)
        self.head = nnx.Linear(DIM, 1, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        return self.head(self.embed(ids).mean(axis=-2))[..., 0]


def squared_error(model, ids, labels):
    return jnp.mean(jnp.square(model(ids) - labels))


def batch(size=12, length=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, ROWS, (size, length)).astype(np.int32)
    return ids, rng.normal(size=size).astype(np.float32)


def gradients_of(split):
    """Gradients of one batch: `split(model, ids, labels)` inside jit, after the prefetch.

    The gradients of rows are those of a dense table.
    """
    model, (ids, labels) = Model(), batch()
    before = table_of(model.embed)

    @nnx.jit
    def step(model, ids, labels):
        model.embed.prefetch(ids)
        loss, grads = split(model, ids, labels)
        return loss, nn.apply_gradients(model, grads)

    loss, rest = step(model, ids, labels)
    return loss, rest["head"], (before - table_of(model.embed)) / 0.5


def whole(model, ids, labels):
    return nnx.value_and_grad(squared_error)(model, ids, labels)


def in_microbatches(model, ids, labels):
    parts = [nnx.value_and_grad(squared_error)(model, ids[i::3], labels[i::3]) for i in range(3)]
    return jax.tree.map(lambda *g: sum(g) / 3, *parts)


def in_scanned_microbatches(model, ids, labels):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def add(total, part):
        loss_of = lambda params: squared_error(nnx.merge(graph, params, rest), *part)  # noqa: E731
        return jax.tree.map(
            lambda t, g: t + g / 3, total, jax.value_and_grad(loss_of)(params)
        ), None

    start = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    return jax.lax.scan(add, start, (ids.reshape(3, 4, 3), labels.reshape(3, 4)))[0]


def per_example(model, ids, labels):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params, ids, label):
        return jnp.square(nnx.merge(graph, params, rest)(ids) - label)

    each = jax.vmap(jax.value_and_grad(loss_of), (None, 0, 0))(params, ids, labels)
    return jax.tree.map(lambda g: g.mean(axis=0), each)


def per_time_step(model, ids, labels):
    def loss_of(model, ids, labels):
        @nnx.scan(in_axes=(None, 1), out_axes=0)
        def over_time(model, ids):
            return model.embed(ids)

        return jnp.mean(jnp.square(model.head(over_time(model, ids).mean(axis=0))[:, 0] - labels))

    return nnx.value_and_grad(loss_of)(model, ids, labels)


def rematerialized(model, ids, labels):
    def loss_of(model, ids, labels):
        return jnp.mean(jnp.square(nnx.remat(lambda model, ids: model(ids))(model, ids) - labels))

    return nnx.value_and_grad(loss_of)(model, ids, labels)


def of_two_tasks(model, ids, labels):
    """The halves of the batch as two tasks, each with a gradient of its own."""
    tasks = [nnx.value_and_grad(squared_error)(model, ids[i::2], labels[i::2]) for i in range(2)]
    return jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, *tasks)


@pytest.fixture(scope="module")
def of_the_whole_batch():
    return gradients_of(whole)


SPLITS = (
    in_microbatches,
    in_scanned_microbatches,
    per_example,
    per_time_step,
    rematerialized,
    of_two_tasks,
)


@pytest.mark.parametrize(
    "split",
    named({split.__name__: split for split in SPLITS}, fast={"in_microbatches", "per_example"}),
)
def test_any_split_of_a_batch_after_one_prefetch_has_the_gradients_of_the_whole(
    split, of_the_whole_batch
):
    """Sums of 12 terms in another order: 12 x 2^-24 of terms below 8."""
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=8 * 12 * 2**-24),
        jax.tree.leaves(gradients_of(split)),
        jax.tree.leaves(of_the_whole_batch),
    )


@pytest.mark.slow
def test_a_batch_that_the_devices_cannot_divide_raises_and_a_nest_of_its_parts_works():
    """2 microbatches over 4 devices, in a step like gradient accumulation in RECIPES.md."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("x",), auto, devices=jax.devices()[:4])
    embed, alone = embed_of(mesh=mesh), embed_of()
    parts = np.arange(2 * 4 * 3, dtype=np.int32).reshape(2, 4, 3) % 20
    for ids in (parts, parts[0, :3], np.int32(3)):
        with pytest.raises(ValueError, match=rf"4 devices.*\[{', '.join(map(str, ids.shape))}\]"):
            embed.prefetch(ids)
    embed.prefetch(tuple(parts))
    with pytest.raises(ValueError, match=r"4 devices.*\[3, 3\].*NO_ID"):
        embed(parts[0, :3])
    nn.discard(embed)

    @nnx.jit
    def step(embed, parts):
        embed.prefetch(tuple(parts))
        grads = [nnx.grad(lambda e, ids=ids: jnp.sin(e(ids)).sum())(embed) for ids in parts]
        nn.apply_gradients(embed, jax.tree.map(lambda *g: sum(g), *grads))

    for model in (embed, alone):
        step(model, parts)
    one, other = (mpembed.to_dense(m.state)["embedding"] for m in (embed, alone))
    np.testing.assert_allclose(one, other, rtol=0, atol=8 * 2**-24)


@pytest.mark.parametrize("options", named({"one device": FLOAT32, "cached": CACHED}))
def test_a_product_with_the_hessian_is_the_gradient_of_a_gradient(options):
    """RECIPES.md: forward mode raises an error, reverse mode twice is right."""
    embed = embed_of(**options)
    ids = np.array([[3, 7, 7], [50, 3, 12]], np.int32)
    embed.prefetch(ids)
    graph, params, rest = nnx.split(embed, nnx.Param, ...)

    def loss_of(params):
        return jnp.sin(nnx.merge(graph, params, rest)(ids)).sum()

    def norm_of_gradient(params):
        return 0.5 * sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(loss_of)(params)))

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss_of, (params,), (jax.tree.map(jnp.ones_like, params),))
    (product,) = jax.tree.leaves(jax.grad(norm_of_gradient)(params))
    (rows,) = jax.tree.leaves(params)
    count = np.zeros(len(rows))
    plan = embed.stack.plan.get_value().plan
    np.add.at(count, np.asarray(jax.tree.leaves(plan.inverse)[0]).ravel(), 1)
    count = count[:, None]
    want = -count * np.sin(rows) * count * np.cos(rows)  # the gradient of (count cos)**2 / 2
    want = np.where(count > 0, want, 0)
    np.testing.assert_allclose(product, want, rtol=0, atol=16 * 2**-24)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0, 2), (4, 0), (0,)])
def test_empty_batches_over_a_mesh_change_nothing(shape):
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    empty = np.zeros(shape, np.int32)
    spec = EmbeddingSpec((TableSpec("a", ROWS), TableSpec("b", ROWS)), DIM, **FLOAT32)
    bags = nn.CachedEmbedBags(spec, ROW_TX, combiner=None, mesh=mesh, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, ids):
        model.prefetch(ids)
        loss_of = lambda m: sum(jnp.sin(v).sum() for v in jax.tree.leaves(m(ids)))  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_of)(model)
        nn.apply_gradients(model, grads)
        return loss

    def tables(model):
        return mpembed.to_dense(model.state if hasattr(model, "state") else model.states[0])

    for model, ids in ((embed_of(mesh=mesh), empty), (bags, {"a": empty, "b": empty})):
        before = tables(model)
        assert step(model, ids) == 0
        jax.tree.map(np.testing.assert_array_equal, before, tables(model))
