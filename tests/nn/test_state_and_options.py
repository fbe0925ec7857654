"""Modules take the options of a spec and states from outside; a linen step may be given up."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import named
from flax import nnx
from nn_models import BAG_IDS, ROW_TX, bag_specs

import mpembed_jax as mpembed
from mpembed_jax import EmbeddingSpec, TableSpec, nn
from mpembed_jax.nn.linen import CachedEmbed, TrainState

ROWS, DIM = 60, 4
IDS = np.array([[3, 7, 7], [50, mpembed.NO_ID, 3]], np.int32)
BASE = {"tx": ROW_TX, "cache": None, "storage": "float32"}
SETTINGS = {
    "out_of_range": "clip",
    "max_unique_ids": 2,
    "skip_nonfinite": True,
    "row_state_dtype": "bfloat16",
    "memory_kind": "pinned_host",
}


class Linen(linen.Module):
    """A CachedEmbed under a name, beside another parameter."""

    options: tuple = ()

    @linen.compact
    def __call__(self, ids):
        table = CachedEmbed(ROWS, DIM, name="items", **{**BASE, **dict(self.options)})
        return table(ids) * self.param("scale", linen.initializers.ones, ())


def embed_of(**options):
    return nn.CachedEmbed(ROWS, DIM, rngs=nnx.Rngs(0), **{**BASE, **options})


def linen_state(**options):
    model = Linen(tuple(options.items()))
    variables = model.init(jax.random.key(0), IDS)
    return TrainState.create(apply_fn=model.apply, variables=variables, tx=ROW_TX)


@nnx.jit
def nnx_step(embed, ids, scale):
    embed.prefetch(ids)
    loss, grads = nnx.value_and_grad(lambda e: (scale * e(ids)).sum())(embed)
    nn.apply_gradients(embed, grads)
    return loss


@jax.jit
def linen_step(state, ids, scale):
    state = state.prefetch(ids)

    def loss_of(params):
        return (scale * state.apply_fn({"params": params}, ids)).sum()

    return state.apply_gradients(grads=jax.grad(loss_of)(state.params))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_an_option_reaches_the_spec_of_both_kinds_of_modules(name):
    options = {name: SETTINGS[name]}
    states = embed_of(**options).state, linen_state(**options).embeddings["items/table"]
    for state in states:
        assert getattr(state.spec, name) == SETTINGS[name]
    assert states[0].spec == states[1].spec


@pytest.mark.slow
def test_options_do_in_a_step_what_they_say():
    clipped = embed_of(out_of_range="clip")
    high = np.array([ROWS + 5, -3, ROWS - 1, 0], np.int32)
    rows = np.asarray(nnx.view(clipped, deterministic=True)(high))
    np.testing.assert_array_equal(rows[:2], rows[2:])
    with pytest.raises(ValueError, match="is outside its table of 60 rows"):
        embed_of(out_of_range="raise").prefetch(high)

    few = embed_of(max_unique_ids=2)
    nnx_step(few, IDS, 1.0)
    with pytest.warns(UserWarning, match="exceeded max_unique_ids=2"):
        assert few.stats().dropped == 1

    scale = jnp.ones((*IDS.shape, 1)).at[0, 0].set(jnp.nan)  # a position of id 3
    safe = embed_of(skip_nonfinite=True)
    before = mpembed.to_dense(safe.state)["embedding"]
    nnx_step(safe, IDS, scale)
    moved = (mpembed.to_dense(safe.state)["embedding"] != before).any(axis=1)
    assert set(np.flatnonzero(moved)) == {7, 50} and safe.stats().nonfinite_rows == 1

    hosted, plain = embed_of(memory_kind="pinned_host"), embed_of()
    assert hosted.state.table.rows.sharding.memory_kind == "pinned_host"
    for embed in (hosted, plain):
        nnx_step(embed, IDS, 1.0)
    np.testing.assert_array_equal(*(training.all_rows(e.state) for e in (hosted, plain)))


def test_a_linen_step_that_is_given_up_changes_no_row_and_the_next_one_works():
    state = linen_state()
    before = state.embeddings["items/table"]
    given_up = jax.jit(lambda state: state.prefetch(IDS).discard())(state)
    assert jax.tree.structure(given_up) == jax.tree.structure(state)
    np.testing.assert_array_equal(
        training.all_rows(given_up.embeddings["items/table"]), training.all_rows(before)
    )
    assert jax.tree.structure(state.discard()) == jax.tree.structure(state)
    trained = linen_step(given_up, IDS, 1.0)
    assert trained.stats()["items/table"].refused_updates == 0
    expected = linen_step(state, IDS, 1.0)
    np.testing.assert_array_equal(
        *(training.all_rows(s.embeddings["items/table"]) for s in (trained, expected))
    )
    with pytest.raises(ValueError, match=r"state\.discard\(\) to give up a step"):
        state.prefetch(IDS).prefetch(IDS)


def test_states_from_outside_are_trained_and_those_of_other_tables_refused():
    dense = np.arange(ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM)
    embed, state = embed_of(), linen_state()

    def held():  # twice: steps may donate
        return mpembed.from_dense(jax.random.key(1), embed.state.spec, ROW_TX, {"embedding": dense})

    embed.set_state(held())
    state = state.replace_embeddings({"items/table": held()})
    np.testing.assert_array_equal(nnx.view(embed, deterministic=True)(IDS[0]), dense[IDS[0]])
    nnx_step(embed, IDS, 1.0)
    state = linen_step(state, IDS, 1.0)
    expected = dense - 0.5 * np.bincount([3, 7, 7, 50, 3], minlength=ROWS)[:, None]
    np.testing.assert_array_equal(training.all_rows(embed.state), expected)
    np.testing.assert_array_equal(training.all_rows(state.embeddings["items/table"]), expected)

    other = nn.CachedEmbed(ROWS + 1, DIM, rngs=nnx.Rngs(0), **BASE).state
    for replace in (
        embed.set_state,
        lambda other: state.replace_embeddings({"items/table": other}),
    ):
        with pytest.raises(ValueError, match=r"made for tables \{embedding: 60\} x 4"):
            replace(other)
    with pytest.raises(KeyError, match="no stack is called 'users/table'"):
        state.replace_embeddings({"users/table": other})
    embed.prefetch(IDS)
    with pytest.raises(ValueError, match=r"between prefetch and nn\.apply_gradients"):
        embed.set_state(held())
    with pytest.raises(ValueError, match="between prefetch and apply_gradients"):
        state.prefetch(IDS).replace_embeddings({"items/table": held()})


def test_the_states_of_bags_are_replaced_together_or_not_at_all():
    bags, twin = (nn.CachedEmbedBags(bag_specs(), ROW_TX, rngs=nnx.Rngs(k)) for k in range(2))
    bags.set_states(twin.states)
    views = [nnx.view(b, deterministic=True)(BAG_IDS) for b in (bags, twin)]
    jax.tree.map(np.testing.assert_array_equal, *views)
    with pytest.raises(ValueError, match="made for tables"):
        bags.set_states(tuple(reversed(twin.states)))
    with pytest.raises(ValueError, match="zip"):
        bags.set_states(twin.states[:1])


class Summarized(nnx.Module):
    """One module of each kind."""

    def __init__(self, rngs, **options):
        spec = EmbeddingSpec([TableSpec("a", 40), TableSpec("b", 30)], 8)
        self.one = nn.CachedEmbed(40, 8, rngs=rngs, **options)
        self.bags = nn.CachedEmbedBags(spec, optax.sgd(0.1), rngs=rngs, **options)
        self.ngrams = nn.NGramMemory(50, 8, rows=64, rngs=rngs, **options)

    def prefetch(self, ids):
        for module, part in ((self.one, ids), (self.bags, {"a": ids}), (self.ngrams, ids)):
            module.prefetch(part)

    def __call__(self, ids):
        return self.one(ids).sum() + self.bags({"a": ids})["a"].sum() + self.ngrams(ids).sum()


@pytest.mark.slow
@pytest.mark.parametrize("fused", named([False, True], fast={"True"}, core=()))
def test_a_model_is_tabulated_in_evaluation_and_within_a_step(fused):
    """nnx.tabulate compiles the public methods of all modules that the model holds."""
    ids = np.array([[3, 7], [7, 20]], np.int32)
    plain = {"force_terminal": False, "width": 200}
    model = Summarized(nnx.Rngs(0), fused=fused)
    views = [nnx.view(model, deterministic=True), model]
    model.prefetch(ids)
    for view in views:
        text = nnx.tabulate(view, ids, console_kwargs=plain)
        for name, shape in (("one", "2,2,8"), ("ngrams", "2,2,32"), ("bags", "2,8")):
            (row,) = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
            assert f"float32[{shape}]" in row
