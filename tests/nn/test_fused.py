"""Modules with fused=True: the bits of fused=False, and what their calls refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nn_models import assert_same_bits

from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, nn, optim

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


MODELS = {
    "embed": (embed_of, lambda s: ids_of(s, 6, 3)),
    "a nest": (embed_of, lambda s: {"y": ids_of(s, 6, 3), "x": [ids_of(s + 9, 5)]}),
    "one combiner": (
        lambda fused, **o: bags_of(fused, "mean", **o),
        lambda s: {"user": ids_of(s, 6, 1), "seen": ids_of(s, 6, 3), "shop": ids_of(s, 6, 2)},
    ),
    "single ids": (
        lambda fused, **o: bags_of(fused, "sum", **o),
        lambda s: {"seen": ids_of(s, 6, 1), "user": ids_of(s + 1, 6, 1)},
    ),
    "none and sqrtn": (
        lambda fused, **o: bags_of(
            fused, {"seen": None, "user": "sqrtn", "shop": None, "last": "sum"}, **o
        ),
        lambda s: {"seen": ids_of(s, 6, 3), "user": ids_of(s, 5, 2), "shop": ids_of(s, 7)},
    ),
    "several combiners": (
        lambda fused, **o: bags_of(
            fused, {"seen": "sum", "user": "mean", "shop": "sum", "last": "sum"}, **o
        ),
        lambda s: {"seen": ids_of(s, 6, 3), "user": ids_of(s, 5, 2), "shop": ids_of(s, 7, 2)},
    ),
    "columns": (lambda fused, **o: bags_of(fused, "sum", **o), lambda s: ids_of(s, 6, 4)),
    "n-grams": (ngrams_of, lambda s: jnp.maximum(ids_of(s, 3, 7) % ROWS, 0)),
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


CASES = [(name, "adagrad", "int8 with a cache") for name in MODELS]
CASES += [("embed", "momentum", "int8 with a cache"), ("one combiner", "adagrad", "int4")]


@pytest.mark.parametrize(("name", "tx", "options"), CASES, ids=[", ".join(case) for case in CASES])
def test_fused_trains_the_same_bits(name, tx, options):
    make, batch = MODELS[name]
    tx = {"adagrad": ADAGRAD, "momentum": MOMENTUM}[tx]
    models = [make(fused, tx=tx, **OPTIONS[options]) for fused in (False, True)]
    for step in range(4):
        assert_same_bits(*(train_step(model, batch(7 * step), step) for model in models))
    assert_same_bits(*(nnx.state(model) for model in models))
