"""The recipes of RECIPES.md do what they say: they equal dense training, or the unsplit run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import nn
from mpembed_jax.nn.linen import TrainState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.standard_promotion("snippets are written as users write them"),
]
RECIPES = (Path(__file__).parents[2] / "mpembed_jax/RECIPES.md").read_text()
FLOAT32 = {"storage": "float32"}
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def recipes():
    """The names that the snippets make."""
    names = {"__name__": "recipes"}
    code = "\n".join(re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL))
    exec(compile(code, "RECIPES.md", "exec"), names)
    return names


class DenseEmbed(nnx.Module):
    """A dense table in the place of CachedEmbed, with its initial rows and row optimizer."""

    def __init__(self, *sizes, tx, rngs, **options):
        twin = nn.CachedEmbed(*sizes, tx=tx, rngs=rngs, **options)
        self.rows = nnx.Param(jnp.asarray(mpembed.to_dense(twin.state)["embedding"]))
        self.tx, self.tx_state = tx, nnx.Variable(tx.init(self.rows[...]))

    def __call__(self, ids):
        return self.rows[...][ids]

    def prefetch(self, ids):
        """Nothing: every row is there."""


class DenseModules:
    """What the snippets use of mpembed_jax.nn, with dense tables."""

    CachedEmbed = DenseEmbed

    @staticmethod
    def apply_gradients(model, grads):
        items, flat = model.items, dict(nnx.to_flat_state(grads))
        of_rows = flat["items", "rows"].get_value()
        updates, tx_state = items.tx.update(of_rows, items.tx_state.get_value(), items.rows[...])
        items.rows[...] += updates
        items.tx_state.set_value(tx_state)
        flat["items", "rows"] = nnx.Param(jnp.zeros_like(of_rows))  # for the model's optimizer
        return nnx.from_flat_state(flat)

    @staticmethod
    def discard(model):
        """Nothing: nothing is held."""


def rows_of(embed, ids):
    if isinstance(embed, DenseEmbed):
        return np.asarray(embed.rows[...][ids])
    return np.asarray(mpembed.read(embed.state, jnp.asarray(ids, jnp.int32)))


def batch(seed=1, num_items=40):
    """Ids that repeat, and labels."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_items, (64, 3)).astype(np.int32)
    return ids, rng.integers(0, 2, 64).astype(np.float32)


def arguments(name):
    ids, labels = batch()
    return {
        "two_tower_step": (ids[:, :2], ids[:, 2]),
        "recurrent_step": (ids, labels),
        "accumulated_step": (ids.reshape(4, 16, 3), labels.reshape(4, 16)),
    }[name]


@pytest.mark.parametrize("name", ["two_tower_step", "recurrent_step", "accumulated_step"])
def test_a_step_with_many_uses_of_one_prefetch_equals_dense_training(name, recipes, monkeypatch):
    """Sums in another order, which row-wise Adagrad divides by their size: 2^-12 relative."""

    def trained():
        model = recipes["Scorer"](nnx.Rngs(0), **FLOAT32)
        optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
        before = rows_of(model.items, np.arange(50))
        for _ in range(2):
            recipes[name](model, optimizer, *arguments(name))
        return rows_of(model.items, np.arange(50)) - before, model.out.kernel[...]

    moves, kernel = trained()
    monkeypatch.setitem(recipes, "nn", DenseModules)
    dense_moves, dense_kernel = trained()
    assert np.abs(dense_moves[:40]).max() > 0.04
    np.testing.assert_allclose(moves, dense_moves, rtol=2**-12, atol=2**-16)
    np.testing.assert_allclose(kernel, dense_kernel, rtol=0, atol=1e-5)


def test_norms_of_examples_equal_dense_ones_and_change_nothing(recipes, monkeypatch):
    ids, labels = batch()
    model = recipes["Scorer"](nnx.Rngs(0), **FLOAT32)
    before = rows_of(model.items, np.arange(50))
    norms = recipes["example_norms"](model, ids, labels)
    np.testing.assert_array_equal(rows_of(model.items, np.arange(50)), before)
    monkeypatch.setitem(recipes, "nn", DenseModules)
    dense = recipes["Scorer"](nnx.Rngs(0), **FLOAT32)
    loss_of = recipes["loss_fn"]
    expected = [
        optax.tree.norm(nnx.grad(loss_of)(dense, *one)) for one in zip(ids, labels, strict=True)
    ]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_microbatches_in_linen_are_the_whole_batch(recipes):
    ids, labels = batch()
    trained = []
    for k in (4, 1):
        scorer = recipes["scorer"]
        variables = scorer.init(jax.random.key(0), ids)
        state = TrainState.create(apply_fn=scorer.apply, variables=variables, tx=SGD)
        before = mpembed.read(state.embeddings["items/table"], np.arange(40, dtype=np.int32))
        state = recipes["accumulated_linen_step"](
            state, ids.reshape(k, -1, 3), labels.reshape(k, -1)
        )
        after = mpembed.read(state.embeddings["items/table"], np.arange(40, dtype=np.int32))
        trained.append((after - before, state.params["Dense_0"]["kernel"]))
    (moves, kernel), (expected, expected_kernel) = trained
    assert np.abs(expected).max() > 0.03
    np.testing.assert_allclose(moves, expected, rtol=2**-12, atol=2**-16)
    np.testing.assert_allclose(kernel, expected_kernel, rtol=0, atol=1e-6)


def test_microbatches_of_the_verbs_are_the_whole_batch_on_one_device_and_over_a_mesh(recipes):
    ids, labels = batch()
    spec, tx = recipes["spec"], recipes["row_tx"]
    weights = jnp.linspace(-1, 1, 16)
    results = []
    for run, k in ((recipes["update"], 4), (recipes["update"], 1), (recipes["over_mesh"], 4)):
        mesh = recipes["mesh"] if run is recipes["over_mesh"] else None
        emb = mpembed.init(jax.random.key(0), spec, tx, mesh=mesh)
        emb, after = jax.jit(run)(
            emb, jnp.array(weights), ids.reshape(k, -1, 3), labels.reshape(k, -1)
        )
        results.append((mpembed.to_dense(emb)["item"], after))
    first = mpembed.to_dense(mpembed.init(jax.random.key(0), spec, tx))["item"]
    (expected, expected_weights) = results.pop(1)
    assert np.abs(expected[:40] - first[:40]).max() > 0.03
    for rows, after in results:
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2**-14)
        np.testing.assert_allclose(after, expected_weights, rtol=0, atol=1e-6)


def test_prefetch_ahead_gives_the_bits_of_the_plain_loop(recipes):
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("item", 1000)], 16, cache=recipes["cache"])
    prefetch = jax.jit(mpembed.prefetch, donate_argnums=0)
    step, batches = recipes["ahead_step"], [batch(k, 1000) for k in range(4)]

    def start():
        return mpembed.init(jax.random.key(0), spec, recipes["row_tx"]), jnp.linspace(-1, 1, 16)

    plain, weights = start()
    for ids, labels in batches:
        plain, plan = prefetch(plain, ids)
        plain, _, weights = step(plain, plan, weights, labels, None)
    ahead, ahead_weights = start()
    ahead, plan = prefetch(ahead, batches[0][0])
    for k, (_, labels) in enumerate(batches):
        next_ids = batches[k + 1][0] if k + 1 < len(batches) else None
        ahead, plan, ahead_weights = step(ahead, plan, ahead_weights, labels, next_ids)
    training.assert_same((ahead, ahead_weights), (plain, weights))
    assert mpembed.stats(ahead).steps == 4


def test_averages_move_towards_the_rows_of_a_batch(recipes):
    model, average = recipes["Scorer"](nnx.Rngs(0)), recipes["average"]
    average = type(average)(10_000, 16, tx=optax.sgd(0.25), storage="float32", rngs=nnx.Rngs(5))
    ids = np.array([[3, 3, 7], [9, 7, mpembed.NO_ID]], np.int32)
    touched, others = np.array([3, 7, 9]), np.array([0, 4, 8])
    before, untouched = rows_of(average, touched), rows_of(average, others)
    recipes["average_rows"](average, model, ids)
    now = rows_of(model.items, touched)
    np.testing.assert_allclose(
        rows_of(average, touched), before + 0.25 * (now - before), rtol=0, atol=2**-23
    )
    np.testing.assert_array_equal(rows_of(average, others), untouched)


def test_a_target_network_keeps_its_rows_while_the_model_trains(recipes):
    model = recipes["Scorer"](nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    ids, labels = np.full((1, 4, 3), 7, np.int32), np.ones((1, 4), np.float32)
    target = recipes["target"]
    nnx.update(target, jax.tree.map(jnp.copy, nnx.state(model)))
    before = rows_of(model.items, [7])
    recipes["accumulated_step"](model, optimizer, ids, labels)
    np.testing.assert_array_equal(rows_of(target.items, [7]), before)
    assert (rows_of(model.items, [7]) != before).any()
    nnx.update(target, jax.tree.map(jnp.copy, nnx.state(model)))
    np.testing.assert_array_equal(rows_of(target.items, [7]), rows_of(model.items, [7]))


def test_an_average_over_the_whole_state_of_a_model_is_refused(recipes):
    model, twin = (recipes["Scorer"](nnx.Rngs(0)) for _ in range(2))
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    for id in (7, 9):
        ids, labels = np.full((1, 4, 3), id, np.int32), np.ones((1, 4), np.float32)
        recipes["accumulated_step"](model, optimizer, ids, labels)

    def floats(a, b):
        return 0.9 * a + 0.1 * b if jnp.issubdtype(a.dtype, jnp.floating) else a

    for mix in (floats, lambda a, b: 0.9 * a + 0.1 * b):
        mixed = recipes["Scorer"](nnx.Rngs(0))
        nnx.update(mixed, jax.tree.map(mix, nnx.state(twin), nnx.state(model)))
        with pytest.raises(ValueError, match="average the other parameters alone"):
            nnx.view(mixed, deterministic=True)(ids[0])
        with pytest.raises(ValueError, match="average the other parameters alone"):
            mixed.items.prefetch(ids)


def test_grown_stacks_and_models_keep_their_rows(recipes):
    fresh = mpembed.to_dense(mpembed.init(jax.random.key(0), recipes["larger"], recipes["row_tx"]))
    restored = mpembed.to_dense(recipes["restored"])
    np.testing.assert_array_equal(restored["user"], fresh["user"])
    np.testing.assert_array_equal(restored["product"][10_000:], fresh["product"][10_000:])
    saved = jax.eval_shape(
        lambda: mpembed.init(jax.random.key(0), recipes["spec"], recipes["row_tx"])
    )
    saved = recipes["checkpoint"].restore(recipes["folder"], {"emb": saved})["emb"]
    np.testing.assert_array_equal(restored["product"][:10_000], mpembed.to_dense(saved)["item"])
    # The grown model was made before the rows of the old one were replaced.
    model, grown = recipes["Scorer"](nnx.Rngs(0)), recipes["Scorer"](nnx.Rngs(1), num_items=12_000)
    state = recipes["restacking"].restack(
        model.items.state, grown.items.state.spec, recipes["row_tx"]
    )
    grown.items.set_state(state)
    nnx.update(grown.out, nnx.state(model.out))
    ids, labels = batch()
    np.testing.assert_array_equal(*(nnx.view(m, deterministic=True)(ids) for m in (grown, model)))
    optimizer = nnx.Optimizer(grown, SGD, wrt=nnx.Param)
    recipes["accumulated_step"](grown, optimizer, ids[None] + 11_900, labels[None])
    assert grown.items.stats().out_of_range == 0


def test_written_and_pretrained_rows_are_there(recipes):
    near = {"rtol": 0, "atol": 2**-5}  # an INT8 grid of rows below 4
    pretrained = recipes["pretrained"]
    np.testing.assert_allclose(mpembed.to_dense(recipes["emb"])["item"], pretrained, **near)
    ids = np.arange(10_000, dtype=np.int32)
    np.testing.assert_allclose(rows_of(recipes["model"].items, ids), pretrained, **near)
    held = recipes["state"].embeddings["items/table"]
    np.testing.assert_allclose(mpembed.to_dense(held)["embedding"], pretrained, **near)
    of_init = nn.CachedEmbed(
        10_000, 16, embedding_init=lambda *_: pretrained, storage="float32", rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(rows_of(of_init, ids), pretrained)


def test_a_frozen_embedding_keeps_its_bits(recipes):
    frozen = recipes["frozen"]
    before, kernel = jax.tree.map(np.array, frozen.items.state), frozen.out.kernel[...]
    optimizer = nnx.Optimizer(frozen, SGD, wrt=nnx.Param)
    kernel = np.array(kernel)
    recipes["head_step"](frozen, optimizer, *batch())
    after = jax.tree.map(np.array, frozen.items.state)
    training.assert_same(after, before)
    assert (frozen.out.kernel[...] != kernel).any()


def test_a_linen_head_trains_over_a_frozen_embedding_as_over_a_dense_table(recipes):
    ids, labels = batch()
    scorer = recipes["scorer"]
    held = scorer.init(jax.random.key(0), ids)
    before = jax.tree.map(np.array, held["embedding"])
    rows = mpembed.read(held["embedding"]["items"]["table"].state, ids)

    def loss_of(dense):
        scores = (rows.mean(axis=-2) @ dense["kernel"] + dense["bias"])[:, 0]
        return optax.sigmoid_binary_cross_entropy(scores, labels).mean()

    dense = held["params"]["Dense_0"]
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, dense, jax.grad(loss_of)(dense))
    head = recipes["train_state"].TrainState.create(
        apply_fn=scorer.apply, params=jax.tree.map(jnp.copy, held["params"]), tx=SGD
    )
    head = recipes["linen_head_step"](head, held["embedding"], ids, labels)
    assert set(head.params) == {"Dense_0"}
    training.assert_same(jax.tree.map(np.array, held["embedding"]), before)
    for name, value in expected.items():
        np.testing.assert_allclose(head.params["Dense_0"][name], value, rtol=0, atol=1e-6)
        assert np.abs(value - dense[name]).max() > 1e-4


def test_maximum_pooling_is_the_maximum_of_the_rows_of_each_bag(recipes):
    rows = rows_of(recipes["model"].items, np.arange(10_000))
    bags = np.concatenate([recipes["bags"], np.full((1, 3), mpembed.NO_ID, np.int32)])
    model = nnx.view(recipes["model"].items, deterministic=True)
    got = recipes["max_pool"](model(bags), bags)
    for bag, vector in zip(bags, got, strict=True):
        members = rows[bag[bag != mpembed.NO_ID]]
        np.testing.assert_array_equal(vector, members.max(axis=0) if len(members) else 0)
    grads = jax.grad(lambda v: recipes["max_pool"](v, bags).sum())(model(bags))
    assert np.isfinite(grads).all()


def test_rows_of_bounded_norm_are_those_of_dense_projected_descent(recipes):
    tx = optax.chain(optax.sgd(1.0), recipes["max_norm"](0.5))
    embed = nn.CachedEmbed(10_000, 16, tx=tx, storage="float32", rngs=nnx.Rngs(0))
    ids = np.array([3, 3, 7, 9], np.int32)
    upstream = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    upstream[3] *= 1e-3  # a row that stays short
    dense = rows_of(embed, np.arange(10)) * np.float32(1)

    @nnx.jit
    def step(embed, ids, upstream):
        embed.prefetch(ids)
        nn.apply_gradients(embed, nnx.grad(lambda e: (e(ids) * upstream).sum())(embed))

    for _ in range(3):
        step(embed, ids, upstream)
        np.subtract.at(dense, ids, upstream)
        norm = np.linalg.norm(dense, axis=1, keepdims=True)
        is_touched = np.isin(np.arange(10), ids)[:, None]
        dense = np.where(is_touched & (norm > 0.5), dense * 0.5 / norm, dense)
    rows = rows_of(embed, np.arange(10))
    np.testing.assert_allclose(rows, dense, rtol=0, atol=1e-5)
    assert (np.linalg.norm(rows[[3, 7]], axis=1) < 0.5 + 1e-6).all()


def test_a_served_memory_has_the_rows_of_its_n_grams(recipes):
    memory, served, tokens = recipes["memories"]["layer7"], recipes["served"], recipes["tokens"]
    dense, ids = mpembed.to_dense(memory.state), memory.ngrams.ids(tokens)
    names = memory.ngrams.table_names
    wanted = np.concatenate([dense[name][ids[..., n]] for n, name in enumerate(names)], axis=-1)
    error = np.abs(recipes["vectors"] - wanted).max()
    assert 0 < error <= max(table.errors.largest for table in served.tables)
    whole = np.concatenate([tokens, recipes["new"]], axis=1)
    vectors = served.ngram_vectors(whole, stack="layer7")
    np.testing.assert_array_equal(recipes["next_vectors"], vectors[:, -1:])


def test_every_section_of_the_contents_exists():
    titles = re.findall(r"^## (.*)$", RECIPES, re.MULTILINE)
    anchors = {title.lower().replace(" ", "-").replace(",", "") for title in titles}
    assert set(re.findall(r"\]\(#([a-z-]+)\)", RECIPES)) == anchors
