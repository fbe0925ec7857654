"""Properties of the linen twins and their TrainState.

The change of five lines, equality with nnx, and what misuse raises.
"""

import copy

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from nn_models import (
    BAG_IDS,
    CACHE,
    DIM,
    IDS,
    LABELS,
    OTHER_IDS,
    ROW_TX,
    ROWS,
    address,
    assert_same_bits,
    bag_specs,
    batches,
    cached_model,
    code_changes,
    jitted_step,
    run_snippet,
)
from training import OPTAX_ADAM

import mpembed_jax as mpembed
from mpembed_jax import nn
from mpembed_jax.nn.linen import CachedEmbed, CachedEmbedBags, TrainState


class Model(linen.Module):
    """One embedding, a normalization with statistics of its own, and a linear head."""

    cache: mpembed.CacheSpec | None = CACHE
    with_norm: bool = False

    @linen.compact
    def __call__(self, ids, train=False):
        vectors = CachedEmbed(ROWS, DIM, ROW_TX, cache=self.cache, name="embed")(ids).mean(axis=1)
        if self.with_norm:
            vectors = linen.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(
                vectors
            )
        return linen.Dense(1, name="head")(vectors)[:, 0]


def created(model, seed=0) -> TrainState:
    variables = jax.jit(model.init)(jax.random.key(seed), IDS)
    return TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.25))


def loss_of(state, ids=IDS, labels=LABELS):
    return lambda params: jnp.mean(jnp.square(state.apply_fn({"params": params}, ids) - labels))


@pytest.mark.parametrize("tx", [mpembed.optim.sgd(0.1), mpembed.optim.rowwise_adagrad(0.1)])
def test_a_module_with_a_row_transformation_is_made_printed_and_copied(tx):
    """flax and copy build attributes that are tuples anew."""
    module = CachedEmbed(ROWS, DIM, tx, cache=None)
    variables = module.init(jax.random.key(0), IDS)
    assert variables["embedding"]["table"].tx == tx
    twin = copy.deepcopy(module)
    assert twin.clone() == module and "tx" in repr(twin)
    np.testing.assert_array_equal(twin.apply(variables, IDS), module.apply(variables, IDS))


@pytest.mark.slow
@OPTAX_ADAM
def test_five_changed_lines_turn_a_plain_loop_into_a_cached_one():
    added = code_changes("linen_plain.py", "linen_cached.py")
    assert len(added) <= 5, added

    def look(names):
        return address(names["state"].collections["embedding"]["items"]["table"].state)

    plain, plain_traces, *_ = run_snippet("linen_plain.py", lambda names: None)
    cached, traces, before, after = run_snippet("linen_cached.py", look)
    assert plain_traces == traces == 1
    assert before == after, "the step copies the table"
    for names in (plain, cached):
        assert np.mean(names["losses"][-10:]) < 0.8 * np.mean(names["losses"][:3])
    assert cached["state"].stats()["items/table"].steps == 60


@pytest.mark.slow
def test_linen_and_nnx_make_the_same_table_bit_for_bit():
    state = created(Model())
    twin, optimizer = cached_model()
    # The same start: linen and nnx derive their keys differently.
    stack = state.collections["embedding"]["embed"]["table"]
    twin.embed.stack.state.set_value(jax.tree.map(jnp.copy, stack.state))
    for name in ("kernel", "bias"):
        getattr(twin.head, name).set_value(jnp.copy(state.params["head"][name]))
    nnx_step, _ = jitted_step()
    structure, traces = jax.tree.structure(state), []

    @jax.jit(donate_argnums=0)
    def step(state, ids, labels):
        traces.append(1)
        state = state.prefetch(ids)
        loss, grads = jax.value_and_grad(loss_of(state, ids, labels))(state.params)
        return state.apply_gradients(grads=grads), loss

    before = address(stack.state)
    for ids, labels in batches(4):
        state, loss = step(state, ids, labels)
        nnx_loss = nnx_step(twin, optimizer, ids, labels)
    np.testing.assert_allclose(loss, nnx_loss, rtol=1e-6)
    trained = state.collections["embedding"]["embed"]["table"].state
    assert_same_bits(trained, twin.embed.state)
    assert len(traces) == 1
    assert address(trained) == before
    assert jax.tree.structure(state) == structure
    assert set(state.params) == {"head"}
    # Evaluation, either way, inserts nothing.
    vectors = state.apply_fn({"params": state.params}, IDS)
    np.testing.assert_array_equal(vectors, Model().apply(state.variables, IDS))


@pytest.mark.slow
def test_a_restored_state_with_batch_statistics_takes_the_same_next_step(tmp_path):
    model = Model(cache=None, with_norm=True)

    @jax.jit
    def step(state, ids, labels):
        state = state.prefetch(ids)

        def loss_fn(params):
            logits, updates = state.apply_fn(
                {"params": params}, ids, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.square(logits - labels)), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(
            grads=grads, collections={**state.collections, **updates}
        ), loss

    state, _ = step(created(model), IDS, LABELS)
    assert (np.asarray(state.collections["batch_stats"]["norm"]["mean"]) != 0).any()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    for ids, labels in batches(2, seed=3):
        (state, _), (restored, _) = step(state, ids, labels), step(restored, ids, labels)
    assert_same_bits(state, restored)


class Two(linen.Module):
    """A module in a module, and bags of two widths beside it."""

    @linen.compact
    def __call__(self, ids, bag_ids):
        vectors = CachedEmbedBags(bag_specs(), ROW_TX, combiner="mean", name="bags")(bag_ids)
        return Model(cache=None, name="inner")(ids), vectors


@pytest.mark.slow
def test_several_modules_are_prefetched_by_path_and_bags_equal_those_of_nnx():
    model = Two()
    variables = jax.jit(model.init)(jax.random.key(0), IDS, BAG_IDS)
    state = TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1))
    with pytest.raises(KeyError, match=r"bags.*inner/embed"):
        state.prefetch(IDS)
    bags = nn.CachedEmbedBags(bag_specs(), ROW_TX, combiner="mean", rngs=nnx.Rngs(0))
    for stack, name in zip(bags.stacks, ("stack_0", "stack_1"), strict=True):
        stack.state.set_value(state.collections["embedding"]["bags"][name].state)
    bags.eval()
    expected = nnx.jit(lambda bags: bags(BAG_IDS))(bags)

    @jax.jit
    def step(state):
        state = state.prefetch({"inner/embed": IDS, "bags": BAG_IDS})

        def loss_fn(params):
            logits, vectors = state.apply_fn({"params": params}, IDS, BAG_IDS)
            return jnp.sum(logits) + sum(jnp.sum(v) for v in jax.tree.leaves(vectors)), vectors

        (_, vectors), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), vectors

    state, vectors = step(state)
    assert_same_bits(vectors, expected)
    assert {path: s.steps for path, s in state.stats().items()} == {
        "bags/stack_0": 1, "bags/stack_1": 1, "inner/embed/table": 1,
    }  # fmt: skip
    # A shop's vector is its row: the gradient of their sum is one, and row optimizers saw it.
    old = mpembed.to_dense(bags.states[1])["shop"]
    new = mpembed.to_dense(state.collections["embedding"]["bags"]["stack_1"].state)["shop"]
    assert (new[[0, 6]] < old[[0, 6]]).all()
    np.testing.assert_array_equal(new[1:6], old[1:6])


def test_attend_reads_the_table_and_raises_in_a_step():
    module = CachedEmbed(ROWS, DIM, ROW_TX, cache=None)
    state = created(module)
    query = jnp.ones((2, DIM))
    table = mpembed.to_dense(state.collections["embedding"]["table"].state)["embedding"]

    def logits(params, query):
        return state.apply_fn({"params": params}, query, method="attend")

    np.testing.assert_allclose(logits({}, query), query @ table.T, atol=1e-5)
    gradient = jax.grad(lambda query: logits({}, query).sum())(query)
    np.testing.assert_allclose(gradient, np.tile(table.sum(axis=0), (2, 1)), rtol=1e-4, atol=1e-3)
    state = state.prefetch(IDS)
    with pytest.raises(ValueError, match="sampled softmax over prefetched rows"):
        jax.grad(lambda query: logits(state.params, query).sum())(query)


def test_misuse_raises_and_says_what_to_do():
    state = created(Model(cache=None))
    with pytest.raises(ValueError, match=r"found no prefetched rows.*state\.prefetch"):
        state.apply_gradients(grads=jax.grad(loss_of(state))(state.params))
    fetched = state.prefetch(IDS)
    with pytest.raises(ValueError, match="prefetch was called twice"):
        fetched.prefetch(IDS)
    with pytest.raises(ValueError, match="called with ids that were not prefetched"):
        loss_of(fetched, OTHER_IDS[:1])(fetched.params)
    with pytest.raises(ValueError, match="are of different steps"):
        loss_of(state)(fetched.params)
    with pytest.raises(ValueError, match="grads have no entry embed/table"):
        fetched.apply_gradients(grads=state.params)
    with pytest.raises(TypeError, match="ids must be integers"):
        state.prefetch(IDS.astype(np.float32))
    with pytest.raises(ValueError, match="variables have no collection 'embedding'"):
        TrainState.create(
            apply_fn=Model().apply, variables={"params": state.params}, tx=optax.sgd(0.1)
        )


def test_variables_of_other_tables_are_refused():
    table = CachedEmbed(30, DIM, ROW_TX, cache=None)
    variables = table.init(jax.random.key(0), IDS)
    with pytest.raises(ValueError, match=r"made for tables \{embedding: 20\} x 4, but holds"):
        CachedEmbed(20, DIM, ROW_TX, cache=None).apply(variables, IDS)
    specs = [
        mpembed.EmbeddingSpec([mpembed.TableSpec("a", a), mpembed.TableSpec("b", b)], 4, cache=None)
        for a, b in ((20, 30), (30, 20))
    ]
    ids = {"a": np.array([[5]])}
    variables = CachedEmbedBags(specs[0], ROW_TX).init(jax.random.key(0), ids)
    with pytest.raises(ValueError, match=r"made for tables \{a: 30, b: 20\} x 4, but holds"):
        jax.jit(CachedEmbedBags(specs[1], ROW_TX).apply)(variables, ids)
