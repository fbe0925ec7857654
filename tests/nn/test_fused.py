"""Modules with fused=True: the bits of fused=False, and what their calls refuse."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import named
from flax import nnx
from nn_models import assert_same_bits

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, nn, optim
from mpembed_jax.nn.linen import CachedEmbed, CachedEmbedBags, NGramMemory, TrainState

ROWS, DIM = 60, 4
OPTIONS = {
    "int8 with a cache": {"storage": "int8", "cache": CacheSpec(num_rows=16, ways=4)},
    "int4": {"storage": "int4", "cache": None},
}
ADAGRAD = optim.rowwise_adagrad(0.1)
MOMENTUM = optax.sgd(0.1, momentum=0.9)  # not native: the pair runs the separate verbs


def ids_of(seed, *shape):
    ids = np.random.default_rng(seed).integers(-1, ROWS + 2, shape)
    return jnp.asarray(np.where(ids < 0, NO_ID, ids), jnp.int32)


def embed_of(fused, tx=ADAGRAD, **options):
    options = {**OPTIONS["int8 with a cache"], **options}
    return nn.CachedEmbed(ROWS, DIM, tx=tx, fused=fused, rngs=nnx.Rngs(0), **options)


def bags_of(fused, combiner, tx=ADAGRAD, **options):
    options = {**OPTIONS["int8 with a cache"], **options}
    features = {"seen": "items", "user": "users", "last": "more"}
    tables = [TableSpec(name, ROWS) for name in ("items", "users", "more")]
    specs = [
        EmbeddingSpec(tables, DIM, features=features, **options),
        EmbeddingSpec((TableSpec("shop", ROWS),), DIM, **options),
    ]
    return nn.CachedEmbedBags(specs, tx, combiner=combiner, fused=fused, rngs=nnx.Rngs(0))


def ngrams_of(fused, tx=ADAGRAD, **options):
    options = {**OPTIONS["int8 with a cache"], **options}
    return nn.NGramMemory(
        ROWS, DIM, rows=23, padding=0, tx=tx, fused=fused, rngs=nnx.Rngs(0), **options
    )


class Model(NamedTuple):
    """A module, and its ids."""

    make: Callable  # fused, options -> the module
    batch: Callable  # seed -> a nest of ids


MODELS = {
    "embed": Model(embed_of, lambda s: ids_of(s, 6, 3)),
    "a nest": Model(embed_of, lambda s: {"y": ids_of(s, 6, 3), "x": [ids_of(s + 9, 5)]}),
    "one combiner": Model(
        lambda fused, **o: bags_of(fused, "mean", **o),
        lambda s: {"user": ids_of(s, 6, 1), "seen": ids_of(s, 6, 3), "shop": ids_of(s, 6, 2)},
    ),
    "single ids": Model(
        lambda fused, **o: bags_of(fused, "sum", **o),
        lambda s: {"seen": ids_of(s, 6, 1), "user": ids_of(s + 1, 6, 1)},
    ),
    "none and sqrtn": Model(
        lambda fused, **o: bags_of(
            fused, {"seen": None, "user": "sqrtn", "shop": None, "last": "sum"}, **o
        ),
        lambda s: {"seen": ids_of(s, 6, 3), "user": ids_of(s, 5, 2), "shop": ids_of(s, 7)},
    ),
    "several combiners": Model(
        lambda fused, **o: bags_of(
            fused, {"seen": "sum", "user": "mean", "shop": "sum", "last": "sum"}, **o
        ),
        lambda s: {"seen": ids_of(s, 6, 3), "user": ids_of(s, 5, 2), "shop": ids_of(s, 7, 2)},
    ),
    "columns": Model(lambda fused, **o: bags_of(fused, "sum", **o), lambda s: ids_of(s, 6, 4)),
    "n-grams": Model(ngrams_of, lambda s: jnp.maximum(ids_of(s, 3, 7) % ROWS, 0)),
}


@nnx.jit
def train_step(model, ids, seed):
    model.prefetch(ids)

    def loss_fn(model):
        vectors = model(ids)
        # Gradients depend on the vectors. A choice, not a sum: see tests/embedding/test_vectors.
        parts = [
            jnp.where(jax.random.normal(jax.random.key(seed + i), v.shape) < 0, v * v / 2, 3 * v)
            for i, v in enumerate(jax.tree.leaves(vectors))
        ]
        return sum(jnp.sum(p) for p in parts), vectors

    (_, vectors), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    nn.apply_gradients(model, grads)
    return vectors


class Case(NamedTuple):
    model: str
    tx: str = "adagrad"
    options: str = "int8 with a cache"


CASES = [*map(Case, MODELS), Case("embed", tx="momentum"), Case("one combiner", options="int4")]


@pytest.mark.parametrize(
    "case",
    named(
        CASES,
        fast={"embed-momentum-int8 with a cache", "one combiner-adagrad-int8 with a cache"},
        core={"several combiners-adagrad-int8 with a cache"},
    ),
)
def test_fused_trains_the_same_bits(case):
    make, batch = MODELS[case.model]
    tx = {"adagrad": ADAGRAD, "momentum": MOMENTUM}[case.tx]
    models = [make(fused, tx=tx, **OPTIONS[case.options]) for fused in (False, True)]
    for step in range(4):
        assert_same_bits(*(train_step(model, batch(7 * step), step) for model in models))
    assert_same_bits(*(nnx.state(model) for model in models))


@pytest.mark.parametrize("name", named(list(MODELS), fast={"columns"}))
def test_a_fused_step_holds_vectors_and_no_rows(name):
    """Where bags of several ids have several combiners, the stack holds rows."""
    make, batch = MODELS[name]
    model = make(True)
    model.prefetch(batch(0))
    held = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    wanted = {"rows", "held_vectors"} if name == "several combiners" else {"held_vectors"}
    assert held == wanted
    nn.discard(model)
    assert not nnx.to_flat_state(nnx.state(model, nnx.Param))
    model.prefetch(batch(1))


@pytest.mark.slow
def test_over_a_mesh_a_step_holds_rows():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), auto, devices=jax.devices()[:2])
    models = [embed_of(fused, mesh=mesh, cache=None) for fused in (False, True)]
    for step in range(2):
        assert_same_bits(*(train_step(model, ids_of(step, 6, 3), step) for model in models))
    assert_same_bits(*(nnx.state(model) for model in models))


# --- what a call may be


@pytest.mark.slow
def test_several_calls_with_the_same_ids_add_their_gradients():
    def step(model, ids):
        model.prefetch(ids)

        def loss_fn(model):
            return (model(ids) * 2).sum() + (nnx.remat(lambda m, i: m(i) ** 2)(model, ids)).sum()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        nn.apply_gradients(model, grads)
        return loss

    models = [embed_of(fused, storage="float32", tx=optim.sgd(0.1)) for fused in (False, True)]
    losses = [nnx.jit(step)(model, ids_of(0, 6, 3)) for model in models]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    tables = [mpembed.to_dense(model.state)["embedding"] for model in models]
    assert not np.array_equal(tables[1], mpembed.to_dense(embed_of(True).state)["embedding"])
    np.testing.assert_allclose(*tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [embed_of, lambda fused: bags_of(fused, "sum")])
def test_other_ids_of_equal_shape_are_nan_in_jit_and_an_error_outside(make):
    """Also where tracing cannot know them: NaN only where they differ."""
    model = make(True)
    ids = ids_of(0, 6, 3)
    other = ids.at[2, 1].set((ids[2, 1] + 1) % ROWS)
    nest = (lambda x: x) if make is embed_of else lambda x: {"seen": x}

    @nnx.jit
    def step(model, ids, again):
        model.prefetch(nest(ids))
        called, same = model(nest(again)), model(nest(ids))
        nn.discard(model)
        return jax.tree.leaves(called)[0], jax.tree.leaves(same)[0]

    called, same = step(model, ids, other)
    is_nan = np.isnan(called).all(-1)
    assert is_nan.sum() == 1
    assert is_nan[2, 1] if make is embed_of else is_nan[2]
    assert_same_bits(called[~is_nan], same[~is_nan])
    assert_same_bits(*step(model, ids, ids + 0))
    model.prefetch(nest(ids))
    assert_same_bits(model(nest(np.array(ids))), model(nest(ids)))
    with pytest.raises(ValueError, match=r"at \[2, 1\] prefetch got row"):
        model(nest(other))


def _called(call, of=lambda x: x, make=embed_of):
    def run(traced):
        def step(model, ids):
            model.prefetch(of(ids))
            return call(model, ids)

        return (nnx.jit(step) if traced else step)(make(True), ids_of(0, 6, 3))

    return run


REFUSED = {
    "a microbatch": _called(lambda m, x: m(x[:3])),
    "another shape": _called(lambda m, x: m(x.reshape(-1))),
    "another nest": _called(lambda m, x: m({"x": x})),
    "one of two": _called(lambda m, x: m(x), of=lambda x: {"x": x, "y": x}),
    "vmap": _called(lambda m, x: nnx.vmap(lambda m, i: m(i), in_axes=(None, 0))(m, x)),
    "scan": _called(lambda m, x: jax.lax.scan(lambda c, i: (c, m(i)), 0, x)[1]),
    "some features": _called(
        lambda m, x: m({"seen": x}),
        of=lambda x: {"seen": x, "user": x},
        make=lambda fused: bags_of(fused, "sum"),
    ),
    "a part of the columns' rows": _called(
        lambda m, x: m(jnp.concatenate([x, x[:, :1]], 1)[:2]),
        of=lambda x: jnp.concatenate([x, x[:, :1]], 1),
        make=lambda fused: bags_of(fused, "sum"),
    ),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_calls_of_another_shape_are_refused(name, traced):
    with pytest.raises(ValueError, match=r"takes exactly the ids of its prefetch.*fused=False"):
        REFUSED[name](traced)


def test_weights_are_refused():
    model = bags_of(True, "sum")
    ids = {"seen": ids_of(0, 6, 3)}
    model.prefetch(ids)
    with pytest.raises(ValueError, match=r"takes no weights.*fused=False"):
        model(ids, {"seen": jnp.ones((6, 3))})


def test_a_call_before_prefetch_and_apply_gradients_without_the_vectors_are_refused():
    model, ids = embed_of(True), ids_of(0, 6, 3)
    with pytest.raises(ValueError, match="without prefetch"):
        model(ids)
    model.prefetch(ids)
    with pytest.raises(ValueError, match=r"twice without nn.apply_gradients"):
        model.prefetch(ids)
    with pytest.raises(ValueError, match=r"grads have no entry stack.held_vectors"):
        nn.apply_gradients(model, nnx.State({}))
    model.eval()
    assert_same_bits(model(ids[:2]), mpembed.read(model.state, ids[:2]))


# --- gradients of rows


@pytest.mark.slow
def test_clipping_by_the_global_norm_of_rows_needs_gradients_of_rows():
    """Two positions of one row: the gradients of the vectors have another norm than the row's."""
    norms = {}
    for fused in (False, True):
        model = embed_of(fused)
        model.prefetch(jnp.zeros(4, jnp.int32))
        grads = nnx.grad(lambda model: model(jnp.zeros(4, jnp.int32)).sum())(model)
        norms[fused] = float(optax.tree.norm(grads))
    np.testing.assert_allclose([norms[False], norms[True]], [4 * DIM**0.5, (4 * DIM) ** 0.5])


# --- linen


class Linen(linen.Module):
    """A model of one cached module."""

    made: linen.Module

    def __call__(self, *ids):
        return self.made(*ids)


LINEN = {
    "embed": Model(
        lambda fused: CachedEmbed(ROWS, DIM, tx=ADAGRAD, fused=fused), MODELS["embed"].batch
    ),
    "one combiner": Model(
        lambda fused: CachedEmbedBags(
            bags_of(False, "mean").specs, ADAGRAD, combiner="mean", fused=fused
        ),
        MODELS["one combiner"].batch,
    ),
    "n-grams": Model(
        lambda fused: NGramMemory(ROWS, DIM, 23, padding=0, tx=ADAGRAD, fused=fused),
        MODELS["n-grams"].batch,
    ),
}


@pytest.mark.parametrize("name", named(list(LINEN), core={"one combiner"}))
def test_linen_modules_train_the_same_bits(name):
    """The whole command has n-grams in linen in test_ngram.py, and fused ones of nnx above."""
    make, batch = LINEN[name]

    @jax.jit
    def step(state, ids):
        state = state.prefetch(ids)
        held = jax.tree.leaves(state.params)

        def loss_fn(params):
            vectors = state.apply_fn({"params": params}, ids)
            return sum(jnp.sum(v * v / 2) for v in jax.tree.leaves(vectors)), vectors

        grads, vectors = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), vectors, len(held)

    states = []
    for fused in (False, True):
        model = Linen(make(fused))
        variables = jax.jit(model.init)(jax.random.key(0), batch(0))
        states.append(TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(1)))
    for seed in range(3):
        (a, v, _), (b, w, num_held) = (step(state, batch(7 * seed)) for state in states)
        states = [a, b]
        assert_same_bits(v, w)
        assert num_held == len(jax.tree.leaves(v))
    assert_same_bits(*(jax.tree.leaves(state.embeddings) for state in states))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", named(list(LINEN), fast={"n-grams"}))
def test_a_linen_stack_keeps_what_it_is_when_a_step_is_given_up_or_its_state_replaced(name, fused):
    make, batch = LINEN[name]
    model, ids = Linen(make(fused)), batch(0)
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    state = TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(1))
    held = jax.tree.structure(state.prefetch(ids).params)
    for again in (state.prefetch(ids).discard(), state.replace_embeddings(state.embeddings)):
        assert jax.tree.structure(again.collections) == jax.tree.structure(state.collections)
        assert jax.tree.structure(again.prefetch(ids).params) == held


def test_linen_refuses_what_nnx_refuses():
    model = Linen(LINEN["one combiner"].make(True))
    ids = {"seen": ids_of(0, 6, 3)}
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    state = TrainState.create(apply_fn=model.apply, variables=variables, tx=optax.sgd(1))
    state = state.prefetch(ids)
    with pytest.raises(ValueError, match="takes exactly the ids of its prefetch"):
        state.apply_fn({"params": state.params}, {"seen": ids["seen"][:2]})
    with pytest.raises(ValueError, match="takes no weights"):
        state.apply_fn({"params": state.params}, ids, {"seen": jnp.ones((6, 3))})
    state = state.discard()
    assert not jax.tree.leaves(state.params)
