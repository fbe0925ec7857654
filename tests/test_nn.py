"""Properties of the nnx modules: the five-line change, equality with the verbs and with nnx.Embed, what misuse raises."""

import difflib
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import CacheSpec, EmbeddingSpec, TableSpec, nn

SNIPPETS = pathlib.Path(__file__).parent / "snippets"
ROWS, DIM = 300, 4
CACHE = CacheSpec(num_rows=32, ways=4)
# One object each: optimizers are static, and tests that share them share compiled steps.
ROW_TX, HEAD_TX = optax.sgd(0.5), optax.sgd(0.25)


def code_changes(before: str, after: str) -> list[str]:
    """Returns the lines of code that were changed or added."""
    lines = difflib.ndiff((SNIPPETS / before).read_text().splitlines(), (SNIPPETS / after).read_text().splitlines())
    changed = list(lines)
    num_removed = sum(line.startswith("- ") for line in changed)
    added = [line[2:] for line in changed if line.startswith("+ ") and line[2:].strip()]
    assert num_removed <= len(added), "lines were deleted"
    return added


def run_snippet(name: str, look) -> tuple[dict, int, object, object]:
    """Runs a snippet; returns its names, how often its step was traced, and what `look` saw before and after training."""
    setup, loop = (SNIPPETS / name).read_text().split("\nfor _ in", 1)
    names: dict = {"__name__": name}
    exec(compile(setup, name, "exec"), names)
    forward, num_calls = names["Model"].__call__, []

    def counted(*args, **kwargs):
        num_calls.append(1)
        return forward(*args, **kwargs)

    names["Model"].__call__ = counted
    before = look(names)
    training, evaluation = ("for _ in" + loop).split("\n\n", 1)
    exec(compile(training, name, "exec"), names)
    num_traces = len(num_calls)
    after = look(names)
    exec(compile(evaluation, name, "exec"), names)
    return names, num_traces, before, after


def address(state) -> int:
    return state.table.rows.unsafe_buffer_pointer()


def batches(num: int, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(num):
        ids = np.minimum(rng.zipf(1.2, (16, 3)), ROWS).astype(np.int32) - 1
        yield ids, rng.normal(size=16).astype(np.float32)


((IDS, LABELS),) = batches(1)


class Model(nnx.Module):
    """One embedding and a linear head."""

    def __init__(self, rngs, embed):
        self.embed = embed
        self.head = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed(ids).mean(axis=1))[:, 0]


@functools.cache
def _built(options: tuple) -> Model:
    rngs = nnx.Rngs(0)
    return Model(rngs, nn.CachedEmbed(ROWS, DIM, rngs=rngs, **{"cache": CACHE, "tx": ROW_TX, **dict(options)}))


def cached_model(**options) -> tuple[Model, nnx.Optimizer]:
    """Returns a model with a CachedEmbed of these options, and its optimizer."""
    graphdef, state = nnx.split(_built(tuple(options.items())))
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))  # steps donate
    return model, nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)


def prefetch_embed(model, ids):
    model.embed.prefetch(ids)


def squared_error(model, ids, labels):
    return jnp.mean(jnp.square(model(ids) - labels))


@functools.cache
def jitted_step(prefetch=prefetch_embed, clip=None):
    """Returns a training step, and the list that grows with each of its traces."""
    traces = []

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, ids, labels):
        traces.append(1)
        prefetch(model, ids)
        loss, grads = nnx.value_and_grad(squared_error)(model, ids, labels)
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        grads = nn.apply_gradients(model, grads)
        optimizer.update(model, grads)
        return loss

    return step, traces


def assert_same_bits(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- the change from plain nnx


def test_five_changed_lines_turn_a_plain_loop_into_a_cached_one():
    added = code_changes("nnx_plain.py", "nnx_cached.py")
    assert len(added) <= 5, added
    # optax's adam itself promotes a Python float and an int32.
    with jax.numpy_dtype_promotion("standard"):
        plain, plain_traces, *_ = run_snippet("nnx_plain.py", lambda names: None)
        cached, traces, before, after = run_snippet("nnx_cached.py", lambda names: address(names["model"].items.state))
    assert plain_traces == traces == 1
    assert before == after, "the step copies the table"
    for names in (plain, cached):
        assert np.mean(names["losses"][-10:]) < 0.8 * np.mean(names["losses"][:3])
    assert np.mean(cached["losses"][-10:]) < np.mean(plain["losses"][-10:]) + 0.05
    assert cached["model"].items.stats().steps == 60


def test_importing_the_package_loads_no_flax():
    code = "import sys, mpembed_jax; assert 'flax' not in sys.modules; from mpembed_jax import nn; nn.linen.TrainState"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what a step computes


@pytest.mark.parametrize("options", [{}, {"storage": "int4", "cache": None}], ids=["int8", "int4 without cache"])
def test_a_step_equals_the_functional_verbs_bit_for_bit(options):
    model, optimizer = cached_model(**options)
    step, _ = jitted_step()
    state, head = jax.tree.map(jnp.copy, (model.embed.state, nnx.to_pure_dict(nnx.state(model.head))))

    @jax.jit
    def verbs_step(state, head, ids, labels):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)

        def loss_fn(head, rows):
            vectors = mpembed.pool(rows, plan.inverse).mean(axis=1)
            logits = (vectors @ head["kernel"] + head["bias"])[:, 0]
            return jnp.mean(jnp.square(logits - labels))

        loss, (g_head, g_rows) = jax.value_and_grad(loss_fn, argnums=(0, 1))(head, rows)
        state = mpembed.apply_gradients(state, plan, rows, g_rows, tx=ROW_TX)
        return state, jax.tree.map(lambda p, g: p - 0.25 * g, head, g_head), loss

    for ids, labels in batches(6):
        loss = step(model, optimizer, ids, labels)
        state, head, expected = verbs_step(state, head, ids, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_same_bits(model.embed.state, state)


def plain_twin(cached: Model) -> Model:
    rngs = nnx.Rngs(1)
    plain = Model(rngs, nnx.Embed(ROWS, DIM, rngs=rngs))
    plain.embed.embedding.set_value(jnp.asarray(mpembed.to_dense(cached.embed.state)["embedding"]))
    nnx.update(plain.head, jax.tree.map(jnp.copy, nnx.state(cached.head)))
    return plain


@pytest.mark.parametrize("clip", [None, 0.05])
def test_float32_storage_equals_nnx_embed_with_sgd_and_with_clipping_by_the_global_norm(clip):
    cached, _ = cached_model(storage="float32")
    plain = plain_twin(cached)
    step, _ = jitted_step(clip=clip)
    optimizer = nnx.Optimizer(cached, ROW_TX, wrt=nnx.Param)
    tx = optax.sgd(0.5) if clip is None else optax.chain(optax.clip_by_global_norm(clip), optax.sgd(0.5))
    plain_optimizer = nnx.Optimizer(plain, tx, wrt=nnx.Param)

    @nnx.jit
    def plain_step(model, optimizer, ids, labels):
        loss, grads = nnx.value_and_grad(squared_error)(model, ids, labels)
        optimizer.update(model, grads)
        return loss

    for ids, labels in batches(20):
        loss = step(cached, optimizer, ids, labels)
        np.testing.assert_allclose(loss, plain_step(plain, plain_optimizer, ids, labels), rtol=1e-5)
    table = mpembed.to_dense(cached.embed.state)["embedding"]
    # 20 updates of values below 2, each rounded at 2**-24 relative.
    np.testing.assert_allclose(table, plain.embed.embedding[...], atol=20 * 2**-22)
    np.testing.assert_allclose(cached.head.kernel[...], plain.head.kernel[...], atol=20 * 2**-22)


def test_one_trace_and_no_copied_table_and_no_rows_between_steps():
    model, optimizer = cached_model()
    structure = jax.tree.structure(nnx.state(model))
    step, traces = jitted_step.__wrapped__()
    before = address(model.embed.state)
    for ids, labels in batches(4):
        step(model, optimizer, ids, labels)
        assert not any(isinstance(v, nn.CachedRows) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param)))
        assert jax.tree.structure(nnx.state(model)) == structure
    assert len(traces) == 1
    assert address(model.embed.state) == before
    assert not isinstance(model.embed.stack.state, nnx.Param)
    model.eval()
    assert model(ids).shape == (16,)
    model.train()
    step(model, optimizer, ids, labels)
    assert len(traces) == 1
    with pytest.raises(ValueError, match="without prefetch"):
        model(ids)


def test_a_cached_partial_and_a_split_and_merged_model_take_the_same_step():
    runs = []
    for way in ("cached_partial", "merge"):
        model, optimizer = cached_model()
        step, traces = jitted_step()
        num_traces = len(traces)
        for ids, labels in batches(3):
            if way == "cached_partial":
                nnx.cached_partial(step, model, optimizer)(ids, labels)
            else:
                model, optimizer = nnx.merge(*nnx.split((model, optimizer)))
                step(model, optimizer, ids, labels)
        assert len(traces) - num_traces <= 1
        runs.append(nnx.state(model))
    assert_same_bits(*runs)


def test_a_step_outside_jit_trains_and_finds_other_ids():
    model, optimizer = cached_model()
    losses = []
    for _ in range(3):
        model.embed.prefetch(IDS)
        with pytest.raises(ValueError, match="other ids than prefetch"):
            model(IDS[::-1])
        loss, grads = nnx.value_and_grad(squared_error)(model, IDS, LABELS)
        optimizer.update(model, nn.apply_gradients(model, grads))
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert model.embed.stats().steps == 3
    assert "CachedEmbed" in repr(model)


def test_a_scan_over_batches_makes_one_step_of_each():
    (model, _), (looped, optimizer) = cached_model(), cached_model()
    step, _ = jitted_step()
    given = list(batches(3))
    for ids, labels in given:
        step(looped, optimizer, ids, labels)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def scanned(carry, ids, labels):
        model, optimizer = carry
        model.embed.prefetch(ids)
        loss, grads = nnx.value_and_grad(squared_error)(model, ids, labels)
        optimizer.update(model, nn.apply_gradients(model, grads))
        return carry, loss

    scanned((model, nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)), *(np.stack(part) for part in zip(*given, strict=True)))
    assert model.embed.stats() == looped.embed.stats()
    one, other = (mpembed.to_dense(m.embed.state)["embedding"] for m in (model, looped))
    # A last bit of a gradient, compiled differently, may move an int8 row by one code: 2 / 127 of its largest value.
    np.testing.assert_allclose(one, other, atol=2 / 127 * np.abs(other).max())


def test_a_saved_model_takes_the_same_next_steps(tmp_path):
    model, optimizer = cached_model()
    step, _ = jitted_step()
    for ids, labels in batches(3):
        step(model, optimizer, ids, labels)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()

        def build():
            model = _built.__wrapped__(())
            return model, nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)

        graphdef, abstract = nnx.split(nnx.eval_shape(build))
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "model", abstract))
    assert_same_bits(nnx.state(restored), nnx.state((model, optimizer)))
    for ids, labels in batches(5, seed=1):
        step(model, optimizer, ids, labels)
        step(*restored, ids, labels)
    assert_same_bits(nnx.state(restored), nnx.state((model, optimizer)))


class Towers(nnx.Module):
    """Cached modules in a list, nested, and one module at two places."""

    def __init__(self, rngs):
        self.embeds = nnx.List([nn.CachedEmbed(ROWS, DIM, tx=ROW_TX, cache=None, rngs=rngs) for _ in range(2)])
        self.again = self.embeds[0]
        self.tower = cached_model()[0]

    def __call__(self, ids):
        first, second = (embed(ids) for embed in self.embeds)
        return self.tower(ids) + (first + second + self.again(ids)).sum(axis=(1, 2))


def test_nested_listed_and_shared_modules_are_each_updated_once():
    model = Towers(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)

    def prefetch(model, ids):
        for embed in (*model.embeds, model.tower.embed):
            embed.prefetch(ids)

    step, traces = jitted_step(prefetch)
    before = mpembed.to_dense(model.embeds[1].state)["embedding"]
    for ids, labels in batches(3):
        step(model, optimizer, ids, labels)
    assert len(traces) == 1
    for embed in (*model.embeds, model.tower.embed):
        assert embed.stats().steps == 3
        assert not bool(embed.state.pending)
    assert (mpembed.to_dense(model.embeds[1].state)["embedding"] != before).any()


def test_only_the_prefetched_modules_are_updated():
    model = Towers(nnx.Rngs(0))
    model.embeds[1].prefetch(IDS)
    grads = nnx.grad(lambda model: model.embeds[1](IDS).sum())(model)
    rest = nn.apply_gradients(model, grads)
    assert [embed.stats().steps for embed in model.embeds] == [0, 1]
    assert {path[0] for path, _ in nnx.to_flat_state(rest)} == {"tower"}


# --- modes and values of CachedEmbed


def test_initial_values_follow_nnx_embed_and_a_given_initializer():
    embed = nn.CachedEmbed(20_000, 16, storage="float32", rngs=nnx.Rngs(0))
    table = mpembed.to_dense(embed.state)["embedding"]
    # n = 320,000 normal values: the standard deviation of their spread is 1 / sqrt(2 n) relative; 5 sigma.
    assert abs(table.std() * 4 - 1) < 5 / np.sqrt(2 * table.size)
    ones = nn.CachedEmbed(10, 3, storage="bfloat16", embedding_init=jax.nn.initializers.ones, rngs=nnx.Rngs(0))
    ones.eval()
    np.testing.assert_array_equal(ones(np.array([0, 9, 10, -1, mpembed.NO_ID]))[:, 0], [1, 1, 0, 0, 0])


def test_evaluation_reads_and_changes_nothing_and_views_switch_mode():
    model, _ = cached_model(dtype=jnp.bfloat16, cache=None)
    ids = {"a": np.array([[1, 2], [3, 4]]), "b": [np.array(5)]}
    view = nnx.view(model.embed, deterministic=True)
    before = jax.tree.map(np.asarray, model.embed.state)
    vectors = view(ids)
    assert vectors["a"].shape == (2, 2, DIM)
    assert vectors["b"][0].dtype == jnp.bfloat16
    assert_same_bits(before, model.embed.state)
    model.embed.prefetch(ids)
    assert_same_bits(model.embed(ids), vectors)
    nn.discard(model)
    with pytest.raises(ValueError, match="without prefetch"):
        model.embed(ids)


@pytest.mark.parametrize("num_rows", [3, 20_001])
def test_attend_equals_the_product_with_the_dense_table_and_differentiates_in_the_query(num_rows):
    embed = nn.CachedEmbed(num_rows, DIM, cache=None if num_rows < 10 else CACHE, rngs=nnx.Rngs(0))
    query = jax.random.normal(jax.random.key(1), (2, 3, DIM))
    table = mpembed.to_dense(embed.state)["embedding"]
    logits = embed.attend(query)
    np.testing.assert_allclose(logits, query @ table.T, atol=1e-5)
    embed.eval()
    weights = jax.random.normal(jax.random.key(2), logits.shape)
    gradient = jax.jit(jax.grad(lambda query: jnp.sum(embed.attend(query) * weights)))(query)
    np.testing.assert_allclose(gradient, np.einsum("abv,vd->abd", weights, table), rtol=1e-4, atol=1e-4 * num_rows**0.5)


def test_training_through_attend_raises_and_names_sampled_softmax_which_trains():
    model, _ = cached_model(cache=None)
    ids = {"inputs": np.arange(8, dtype=np.int32), "candidates": np.arange(20, dtype=np.int32)}
    model.embed.prefetch(ids)
    with pytest.raises(ValueError, match="sampled softmax over prefetched rows"):
        nnx.grad(lambda model: model.embed.attend(model.embed(ids)["inputs"]).sum())(model)

    def loss_fn(model):
        vectors = model.embed(ids)
        logits = vectors["inputs"] @ vectors["candidates"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)[::-1]).mean()

    losses = []
    for _ in range(3):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        nn.apply_gradients(model, grads)
        losses.append(float(loss))
        model.embed.prefetch(ids)
    assert losses[2] < losses[0]


# --- CachedEmbedBags


def bag_specs(**options) -> list[EmbeddingSpec]:
    """Two widths; features `seen` and `bought` share a table. Without a cache unless asked: it compiles faster."""
    options = {"cache": None, **options}
    features = {"seen": "items", "bought": "items", "user": "users"}
    items = EmbeddingSpec((TableSpec("items", 50), TableSpec("users", 20)), 4, features=features, **options)
    return [items, EmbeddingSpec((TableSpec("shop", 7),), 3, **options)]


BAG_IDS = {
    "shop": np.array([[0], [6], [7]]),  # 7 is no shop
    "seen": np.array([[1, 2, mpembed.NO_ID], [2, 2, 49], [mpembed.NO_ID] * 3]),
    "user": np.array([[3], [19], [3]]),
    "bought": np.array([[2, 1], [50, 0], [4, mpembed.NO_ID]]),  # 50 is no item, and not the first user either
}


def pooled_by_hand(tables, ids, weights, combiner):
    out = []
    for bag, factors in zip(ids, weights, strict=True):
        real = [(tables[i], w) for i, w in zip(bag, factors, strict=True) if 0 <= i < len(tables)]
        total = sum((row * w for row, w in real), np.zeros(tables.shape[1], np.float32))
        w = np.array([w for _, w in real])
        divisor = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w**2).sum())}[combiner]
        out.append(total / divisor if real else total)
    return np.stack(out)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_bags_pool_each_feature_from_its_own_table(is_weighted):
    combiner = {"seen": "mean", "bought": "sum", "user": "sqrtn", "shop": "sum"}
    model = nn.CachedEmbedBags(bag_specs(), optax.sgd(0.1), combiner=combiner, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    weights = {f: rng.uniform(0.5, 2, ids.shape).astype(np.float32) for f, ids in BAG_IDS.items() if f != "user"}
    given = weights if is_weighted else None
    tables = {**mpembed.to_dense(model.states[0]), **mpembed.to_dense(model.states[1])}
    model.prefetch(BAG_IDS)
    trained = model(BAG_IDS, given)
    model.eval()
    read = model(BAG_IDS, given)
    assert list(trained) == list(read) == list(BAG_IDS)
    assert_same_bits(trained, read)
    for feature, table in {"seen": "items", "bought": "items", "user": "users", "shop": "shop"}.items():
        factors = weights.get(feature) if is_weighted else None
        factors = np.ones(BAG_IDS[feature].shape, np.float32) if factors is None else factors
        by_hand = pooled_by_hand(tables[table], BAG_IDS[feature], factors, combiner[feature])
        np.testing.assert_allclose(trained[feature], by_hand, rtol=1e-6, atol=1e-6)


def test_bags_train_shared_tables_and_several_widths_like_dense_tables():
    row_txs = [optax.sgd(0.5), optax.sgd(0.25)]
    bags = nn.CachedEmbedBags(bag_specs(storage="float32", cache=CACHE), row_txs, rngs=nnx.Rngs(0))
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
        for feature, table in {"seen": "items", "bought": "items", "user": "users", "shop": "shop"}.items():
            is_real = (ids[feature] >= 0) & (ids[feature] < len(tables[table]))
            factor = is_real * weights.get(feature, np.float32(1))
            rows = tables[table][np.where(is_real, ids[feature], 0)]
            vectors[feature] = jnp.sum(rows * jnp.asarray(factor, jnp.float32)[..., None], axis=1)
        return loss_fn(vectors)

    before = [address(state) for state in bags.states]
    for shift in range(3):
        ids = {f: np.where(v == mpembed.NO_ID, v, (v + shift) % 51).astype(np.int32) for f, v in BAG_IDS.items()}
        loss, grads = jax.value_and_grad(dense_loss)(tables, ids)
        np.testing.assert_allclose(step(bags, ids), loss, rtol=1e-5, atol=1e-6)
        tables = {n: t - (0.25 if n == "shop" else 0.5) * grads[n] for n, t in tables.items()}
    assert len(traces) == 1
    assert [address(state) for state in bags.states] == before
    for name, table in {**mpembed.to_dense(bags.states[0]), **mpembed.to_dense(bags.states[1])}.items():
        np.testing.assert_allclose(table, tables[name], rtol=1e-5, atol=1e-6)
    assert [s.steps for s in bags.stats()] == [3, 3]


def test_array_ids_give_the_vectors_of_bags_of_one():
    names = ("a", "b", "c")
    one = EmbeddingSpec(tuple(TableSpec(n, 9) for n in names), 4, cache=None)
    several = [EmbeddingSpec((TableSpec("a", 9), TableSpec("b", 9)), 4), EmbeddingSpec((TableSpec("c", 9),), 4, cache=None)]
    ids = np.random.default_rng(0).integers(0, 9, (2, 5, 3))
    weights = np.random.default_rng(1).uniform(0.5, 2, ids.shape).astype(np.float32)
    for specs in (one, several):
        bags = nn.CachedEmbedBags(specs, optax.sgd(0.1), combiner="sum", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        by_name = {n: ids[..., i, None] for i, n in enumerate(names)}
        bags.prefetch(ids)
        vectors, weighted = bags(ids), bags(ids, weights)
        bags.eval()
        expected = bags(by_name)
        assert vectors.shape == (2, 5, 3, 4)
        assert vectors.dtype == jnp.bfloat16
        assert_same_bits(vectors, np.stack([np.asarray(expected[n]) for n in names], axis=-2))
        factors = {n: weights[..., i, None] for i, n in enumerate(names)}
        expected = bags(by_name, factors)
        assert_same_bits(weighted, np.stack([np.asarray(expected[n]) for n in names], axis=-2))
    per_id = nn.CachedEmbedBags(one, optax.sgd(0.1), combiner=None, rngs=nnx.Rngs(0))
    per_id.eval()
    assert per_id({"b": np.zeros((2, 6), np.int32)})["b"].shape == (2, 6, 4)
    assert per_id({}) == {}


# --- what misuse raises


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.embed.prefetch(IDS.astype(np.float32)), TypeError, "ids must be integers, got float32"),
        (lambda m: (m.embed.prefetch(IDS), m(IDS[:1])), ValueError, r"called with ids of shapes \[1, 3\].* \[16, 3\]"),
        (lambda m: (m.embed.prefetch(IDS), m.embed({"x": IDS})), ValueError, "give prefetch and the call the same ids"),
        (lambda m: (m.embed.prefetch(IDS), m.embed.prefetch(IDS)), ValueError, "prefetch was called twice"),
        (lambda m: nn.apply_gradients(m, nnx.state(m, nnx.Param)), ValueError, "found no prefetched rows"),
        (lambda m: nn.apply_gradients(m.head, nnx.state(m.head)), ValueError, "Linear holds no cached embedding"),
        (lambda m: (m.embed.prefetch(IDS), nn.apply_gradients(m, nnx.state(m.head))), ValueError, "embed.stack.rows"),
        (lambda m: m.embed.attend(IDS), TypeError, "query must be floating"),
        (lambda m: m.embed.attend(jnp.zeros((2, 9))), ValueError, r"query must be \[.., 4\].*got \[2, 9\]"),
        (lambda m: nn.CachedEmbed(0, 4, rngs=nnx.Rngs(0)), ValueError, "vocabulary_size must be"),
        (lambda m: nn.CachedEmbed(9, 4, storage="int9", rngs=nnx.Rngs(0)), ValueError, "unknown row format 'int9'"),
        (lambda m: nn.CachedEmbed(9, 4, cache=0.05, rngs=nnx.Rngs(0)), TypeError, "cache must be a CacheSpec or None"),
        (lambda m: nn.CachedEmbed(9, 4, tx=0.1, rngs=nnx.Rngs(0)), TypeError, "tx must be an optax"),
    ],
)  # fmt: skip
def test_misuse_of_an_embed_raises_and_says_what_to_do(call, error, message):
    model, _ = cached_model()
    with pytest.raises(error, match=message):
        call(model)


@functools.cache
def _built_bags() -> nn.CachedEmbedBags:
    combiner = {"seen": "sum", "bought": "sum", "shop": "mean", "user": None}
    return nn.CachedEmbedBags(bag_specs(), ROW_TX, combiner=combiner, rngs=nnx.Rngs(0))


def bags_of(**options):
    return nn.CachedEmbedBags(bag_specs(), **{"tx": ROW_TX, "rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bags_of(combiner="max"), ValueError, "combiner of feature 'seen' must be one of sum, mean"),
        (lambda: bags_of(combiner={"seen": "sum"}), ValueError, "combiner must name exactly the features"),
        (lambda: bags_of(tx=[optax.sgd(0.1)] * 3), ValueError, "got 3 for 2 specs"),
        (lambda: nn.CachedEmbedBags([], optax.sgd(0.1), rngs=nnx.Rngs(0)), ValueError, "one EmbeddingSpec or several"),
        (lambda: nn.CachedEmbedBags(["x"], optax.sgd(0.1), rngs=nnx.Rngs(0)), TypeError, "one EmbeddingSpec or several"),
        (lambda: nn.CachedEmbedBags(bag_specs() * 2, optax.sgd(0.1), rngs=nnx.Rngs(0)), ValueError, "are in several specs"),
        (lambda: _built_bags().prefetch({"sean": IDS}), KeyError, "unknown features.*sean"),
        (lambda: _built_bags().prefetch(IDS), ValueError, r"array ids must be \[.., 4\]"),
        (lambda: _built_bags().prefetch(np.zeros((2, 4), np.int32)), ValueError, "one embedding_dim for all features"),
        (lambda: _built_bags()({"seen": IDS}), ValueError, "without prefetch"),
    ],
)
def test_misuse_of_bags_raises_and_says_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("ids", "weights", "error", "message"),
    [
        ({"seen": IDS[0]}, None, ValueError, r"ids \[3\], but combiner 'sum' reduces the last axis"),
        ({"seen": IDS}, {"seen": np.ones((2, 2))}, ValueError, r"weights must have the shape"),
        ({"seen": IDS}, {"user": IDS}, KeyError, "weights name features.*user"),
        ({"seen": IDS}, np.ones((16, 3)), TypeError, "weights must be a mapping like ids"),
        ({"user": IDS}, {"user": np.ones((16, 3))}, ValueError, "its combiner is None"),
    ],
)
def test_misuse_of_bags_in_a_call_raises(ids, weights, error, message):
    bags = nnx.view(_built_bags(), deterministic=True)
    with pytest.raises(error, match=message):
        bags(ids, weights)
