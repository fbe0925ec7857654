"""Properties of nn.CachedEmbed in nnx models.

The change of five lines, equality with the verbs and with nnx.Embed, and misuse.
"""

import copy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import Refused, named
from flax import nnx
from nn_models import (
    DIM,
    HEAD_TX,
    IDS,
    LABELS,
    OTHER_IDS,
    ROW_TX,
    ROWS,
    SMALL,
    Model,
    address,
    assert_same_bits,
    batches,
    build_model,
    cached_model,
    code_changes,
    jitted_step,
    run_snippet,
    squared_error,
)
from training import OPTAX_ADAM

import mpembed_jax as mpembed
from mpembed_jax import nn

# --- the change from plain nnx


@pytest.mark.slow
@OPTAX_ADAM
def test_five_changed_lines_turn_a_plain_loop_into_a_cached_one():
    added = code_changes("nnx_plain.py", "nnx_cached.py")
    assert len(added) <= 5, added
    plain, plain_traces, *_ = run_snippet("nnx_plain.py", lambda names: None)
    cached, traces, before, after = run_snippet(
        "nnx_cached.py", lambda names: address(names["model"].items.state)
    )
    assert plain_traces == traces == 1
    assert before == after, "the step copies the table"
    for names in (plain, cached):
        assert np.mean(names["losses"][-10:]) < 0.8 * np.mean(names["losses"][:3])
    assert np.mean(cached["losses"][-10:]) < np.mean(plain["losses"][-10:]) + 0.05
    assert cached["model"].items.stats().steps == 60


@pytest.mark.parametrize("tx", [mpembed.optim.sgd(0.1), mpembed.optim.rowwise_adagrad(0.1)])
def test_a_model_with_a_row_transformation_is_printed_and_copied(tx):
    """print, copy.deepcopy and nnx.clone build attributes that are tuples anew.

    A copy trains alike.
    """
    model = nn.CachedEmbed(ROWS, DIM, tx=tx, rngs=nnx.Rngs(0), **SMALL)
    assert "RowRule" in str(model)
    twins = [copy.deepcopy(model), nnx.clone(model)]
    for held in (model, *twins):
        assert held.stack.tx == tx
        held.prefetch(IDS)
        nn.apply_gradients(held, nnx.grad(lambda m: jnp.sum(m(IDS) ** 2))(held))
    for twin in twins:
        assert_same_bits(twin.state, model.state)


def test_importing_the_package_loads_no_flax():
    code = "import sys, mpembed_jax; assert 'flax' not in sys.modules; "
    code += "from mpembed_jax import nn; nn.linen.TrainState"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what a step computes


@pytest.mark.parametrize(
    "options", named({"int8": {}, "int4 without cache": SMALL}, fast={"int4 without cache"})
)
def test_a_step_equals_the_functional_verbs_bit_for_bit(options):
    model, optimizer = cached_model(**options)
    step, _ = jitted_step()
    state, head = jax.tree.map(
        jnp.copy, (model.embed.state, nnx.to_pure_dict(nnx.state(model.head)))
    )

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


@pytest.mark.slow
def test_float32_storage_equals_nnx_embed_with_sgd_clipped_by_the_global_norm():
    clip = 1.5
    cached, _ = cached_model(storage="float32")
    plain = plain_twin(cached)
    step, _ = jitted_step(clip=clip)
    optimizer = nnx.Optimizer(cached, ROW_TX, wrt=nnx.Param)
    plain_optimizer = nnx.Optimizer(
        plain, optax.chain(optax.clip_by_global_norm(clip), optax.sgd(0.5)), wrt=nnx.Param
    )

    @nnx.jit
    def plain_step(model, optimizer, ids, labels):
        loss, grads = nnx.value_and_grad(squared_error)(model, ids, labels)
        optimizer.update(model, grads)
        return loss, optax.tree.norm(grads)

    norms = []
    for ids, labels in batches(20):
        loss = step(cached, optimizer, ids, labels)
        expected, norm = plain_step(plain, plain_optimizer, ids, labels)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        norms.append(norm)
    assert min(norms) < clip < max(norms), "some steps are clipped, some are not"
    table = mpembed.to_dense(cached.embed.state)["embedding"]
    # 20 updates of values below 2, each rounded at 2**-24 relative.
    np.testing.assert_allclose(table, plain.embed.embedding[...], atol=20 * 2**-22)
    np.testing.assert_allclose(cached.head.kernel[...], plain.head.kernel[...], atol=20 * 2**-22)


def test_one_trace_and_no_copied_table_and_no_rows_between_steps():
    model, optimizer = cached_model()
    structure = jax.tree.structure(nnx.state(model))
    step, traces = jitted_step()
    num_traces = len(traces)
    before = address(model.embed.state)
    for ids, labels in batches(4):
        step(model, optimizer, ids, labels)
        assert not any(
            isinstance(v, nn.CachedRows) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
        )
        assert jax.tree.structure(nnx.state(model)) == structure
    assert len(traces) <= num_traces + 1  # one, here or in an earlier test
    assert address(model.embed.state) == before
    assert not isinstance(model.embed.stack.state, nnx.Param)
    model.eval()
    assert model(ids).shape == (16,)
    model.train()
    step(model, optimizer, ids, labels)
    assert len(traces) <= num_traces + 1
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
    model, optimizer = cached_model(**SMALL)
    losses = []
    for _ in range(3):
        model.embed.prefetch(IDS)
        with pytest.raises(ValueError, match="called with ids that were not prefetched"):
            model(OTHER_IDS[:1])
        loss, grads = nnx.value_and_grad(squared_error)(model, IDS, LABELS)
        optimizer.update(model, nn.apply_gradients(model, grads))
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert int(model.embed.state.step) == 3
    assert "CachedEmbed" in repr(model)


def test_a_scan_over_batches_makes_one_step_of_each():
    (model, _), (looped, optimizer) = cached_model(**SMALL), cached_model(**SMALL)
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

    scanned(
        (model, nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)),
        *(np.stack(part) for part in zip(*given, strict=True)),
    )
    assert_same_bits(model.embed.state.counters, looped.embed.state.counters)
    one, other = (mpembed.to_dense(m.embed.state)["embedding"] for m in (model, looped))
    # A last bit of a gradient, compiled differently, may move an int4 row by one code: 2 / 7 of its
    # largest value.
    np.testing.assert_allclose(one, other, atol=2 / 7 * np.abs(other).max())
    assert np.mean(one != other) < 0.05


def test_a_saved_model_takes_the_same_next_steps(tmp_path):
    model, optimizer = cached_model()
    step, _ = jitted_step()
    for ids, labels in batches(3):
        step(model, optimizer, ids, labels)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()

        def build():
            model = build_model.__wrapped__(())
            return model, nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)

        graphdef, abstract = nnx.split(nnx.eval_shape(build))
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "model", abstract))
    assert_same_bits(nnx.state(restored), nnx.state((model, optimizer)))
    for ids, labels in batches(100, seed=1):
        step(model, optimizer, ids, labels)
        step(*restored, ids, labels)
    assert_same_bits(nnx.state(restored), nnx.state((model, optimizer)))


class Towers(nnx.Module):
    """Cached modules in a list, nested, and one module at two places."""

    def __init__(self, rngs):
        self.embeds = nnx.List(
            [nn.CachedEmbed(ROWS, DIM, tx=ROW_TX, rngs=rngs, **SMALL) for _ in range(2)]
        )
        self.again = self.embeds[0]
        self.tower = cached_model(**SMALL)[0]

    def __call__(self, ids):
        first, second = (embed(ids) for embed in self.embeds)
        return self.tower(ids) + (first + second + self.again(ids)).sum(axis=(1, 2))


@pytest.mark.slow
def test_nested_listed_and_shared_modules_are_each_updated_once():
    model = Towers(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, HEAD_TX, wrt=nnx.Param)

    def prefetch(model, ids):
        for embed in (*model.embeds, model.tower.embed):
            embed.prefetch(ids)

    step, traces = jitted_step(prefetch)
    before = np.asarray(model.embeds[1].state.table.rows)
    for ids, labels in batches(3):
        step(model, optimizer, ids, labels)
    assert len(traces) == 1
    for embed in (*model.embeds, model.tower.embed):
        assert int(embed.state.step) == 3
        assert not bool(embed.state.pending)
    assert (np.asarray(model.embeds[1].state.table.rows) != before).any()

    # Of several modules, those that a step prefetched are updated.
    model.tower.embed.prefetch(IDS)
    grads = nnx.grad(squared_error)(model.tower, IDS, LABELS)
    rest = nn.apply_gradients(model.tower, grads)
    assert [int(embed.state.step) for embed in (*model.embeds, model.tower.embed)] == [3, 3, 4]
    assert {path[0] for path, _ in nnx.to_flat_state(rest)} == {"head"}


# --- modes and values of CachedEmbed


def test_initial_values_follow_nnx_embed_and_a_given_initializer():
    embed = nn.CachedEmbed(20_000, 16, storage="float32", rngs=nnx.Rngs(0))
    table = mpembed.to_dense(embed.state)["embedding"]
    # n = 320,000 normal values: the standard deviation of their spread is 1 / sqrt(2 n) relative. 5
    # sigma.
    assert abs(table.std() * 4 - 1) < 5 / np.sqrt(2 * table.size)
    ones = nn.CachedEmbed(
        10, 3, storage="bfloat16", embedding_init=jax.nn.initializers.ones, rngs=nnx.Rngs(0)
    )
    ones.eval()
    np.testing.assert_array_equal(
        ones(np.array([0, 9, 10, -1, mpembed.NO_ID]))[:, 0], [1, 1, 0, 0, 0]
    )


def test_evaluation_reads_and_changes_nothing_and_views_switch_mode():
    model, _ = cached_model(dtype=jnp.bfloat16, **SMALL)
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


@pytest.mark.parametrize("num_rows", named([3, 20_001], fast={"20001"}))
def test_attend_equals_the_product_with_the_dense_table_and_differentiates_in_the_query(num_rows):
    embed = nn.CachedEmbed(num_rows, DIM, cache=None, rngs=nnx.Rngs(0))
    query = jax.random.normal(jax.random.key(1), (2, 3, DIM))
    table = mpembed.to_dense(embed.state)["embedding"]
    logits = embed.attend(query)
    np.testing.assert_allclose(logits, query @ table.T, atol=1e-5)
    embed.eval()
    weights = jax.random.normal(jax.random.key(2), logits.shape)
    gradient = jax.jit(jax.grad(lambda query: jnp.sum(embed.attend(query) * weights)))(query)
    np.testing.assert_allclose(
        gradient, np.einsum("abv,vd->abd", weights, table), rtol=1e-4, atol=1e-4 * num_rows**0.5
    )


@pytest.mark.slow
def test_training_through_attend_raises_and_names_sampled_softmax_which_trains():
    model, _ = cached_model(**SMALL)
    ids = {"inputs": np.arange(8, dtype=np.int32), "candidates": np.arange(20, dtype=np.int32)}
    model.embed.prefetch(ids)
    with pytest.raises(ValueError, match="sampled softmax over prefetched rows"):
        nnx.grad(lambda model: model.embed.attend(model.embed(ids)["inputs"]).sum())(model)

    nn.discard(model)

    def loss_fn(model):
        vectors = model.embed(ids)
        logits = vectors["inputs"] @ vectors["candidates"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)[::-1]).mean()

    @nnx.jit
    def step(model):
        model.embed.prefetch(ids)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        nn.apply_gradients(model, grads)
        return loss

    losses = [float(step(model)) for _ in range(3)]
    assert losses[2] < losses[0]


# --- what misuse raises


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(
                lambda m: m.embed.prefetch(IDS.astype(np.float32)),
                "ids must be integers, got float32",
                TypeError,
            ),
            Refused(
                lambda m: (m.embed.prefetch(IDS), m.embed({"x": OTHER_IDS})),
                "give prefetch all ids",
            ),
            Refused(
                lambda m: (m.embed.prefetch(IDS), m.embed.prefetch(IDS)),
                "prefetch was called twice",
            ),
            Refused(
                lambda m: (m.eval(), m.embed.prefetch(IDS)), "in evaluation mode.*call model.train"
            ),
            Refused(
                lambda m: nn.apply_gradients(m, nnx.state(m, nnx.Param)), "found no prefetched rows"
            ),
            Refused(
                lambda m: nn.apply_gradients(m.head, nnx.state(m.head)),
                "Linear holds no cached embedding",
            ),
            Refused(
                lambda m: (m.embed.prefetch(IDS), nn.apply_gradients(m, nnx.state(m.head))),
                "embed.stack.rows",
            ),
            Refused(lambda m: m.embed.attend(IDS), "query must be floating", TypeError),
            Refused(
                lambda m: m.embed.attend(jnp.zeros((2, 9))),
                r"query must be \[.., 4\].*got \[2, 9\]",
            ),
            Refused(lambda m: nn.CachedEmbed(0, 4, rngs=nnx.Rngs(0)), "vocabulary_size must be"),
            Refused(
                lambda m: nn.CachedEmbed(9, 4, storage="int9", rngs=nnx.Rngs(0)),
                "unknown row format 'int9'",
            ),
            Refused(
                lambda m: nn.CachedEmbed(9, 4, cache=0.05, rngs=nnx.Rngs(0)),
                "cache must be a CacheSpec or None",
                TypeError,
            ),
            Refused(
                lambda m: nn.CachedEmbed(9, 4, tx=0.1, rngs=nnx.Rngs(0)),
                "tx must be an optax",
                TypeError,
            ),
        ]
    ),
)
def test_misuse_of_an_embed_raises_and_says_what_to_do(case):
    model, _ = cached_model(**SMALL)
    with pytest.raises(case.error, match=case.message):
        case.call(model)


@pytest.mark.parametrize("ids", [[3, 1, 3], [[3, 1], [2, 3]], (3, 1, 3)], ids=str)
def test_a_list_of_integers_is_an_array_of_ids(ids):
    """What one types first."""
    embed = nn.CachedEmbed(50, 4, tx=optax.sgd(0.1), rngs=nnx.Rngs(0))
    embed.prefetch(ids)
    vectors = embed(ids)
    np.testing.assert_array_equal(vectors, embed(np.asarray(ids)))
    assert vectors.shape == (*np.shape(ids), 4)
    nn.discard(embed)
    embed.eval()
    np.testing.assert_array_equal(embed(ids), vectors)


def test_lists_of_different_lengths_are_refused():
    embed = nn.CachedEmbed(50, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="different lengths; pad them with NO_ID"):
        embed.prefetch([[1, 2], [3]])


@pytest.mark.parametrize("rngs", [jax.random.key(0), 0, None], ids=["key", "seed", "none"])
def test_what_is_no_rngs_is_refused_with_the_way_to_make_one(rngs):
    with pytest.raises(TypeError, match=r"rngs must be nnx.Rngs, such as nnx.Rngs\(0\), got"):
        nn.CachedEmbed(50, 4, rngs=rngs)
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 50)], 4)
    with pytest.raises(TypeError, match=r"rngs must be nnx\.Rngs"):
        nn.CachedEmbedBags(spec, optax.sgd(0.1), rngs=rngs)
