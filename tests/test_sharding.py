"""Stacks over a mesh: any number of shards makes the plan, the bits and the rows of one device."""

from functools import cache, partial

import jax
import numpy as np
import optax
import pytest
import shapes
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from mpembed_jax import sharding

pytestmark = pytest.mark.usefixtures("strict_promotion")
KEY = jax.random.key(3)
SIZES = (1200, 3797, 3)  # V = 5,000
V, DIM, STEPS, BATCH = sum(SIZES), 4, 16, 128
SGD = optax.sgd(0.25)


def mesh_of(*sizes, names=("x", "y")):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def spec_of(policy="lfu", storage="int8", **options):
    return shapes.stack(SIZES, DIM, storage=storage, lines=None if policy is None else 256, ways=2, policy=policy, **options)


def step(tx, state, batch):
    ids, upstream = batch
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    vectors, pull_back = jax.vjp(lambda rows: mpembed.pool(rows, plan.inverse), rows)
    state = mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx)
    return state, (plan.counts, vectors)


def train(state, ids, upstream, tx=SGD):
    """Trains over all steps [STEPS, BATCH]; a sharded state over its mesh, its batches divided."""
    run = partial(jax.lax.scan, partial(step, tx))
    layout = state.layout
    if layout is None:
        return jax.jit(run, donate_argnums=0)(state, (ids, upstream))
    specs, batch = mpembed.partition_specs(state), P(None, layout.batch_axes)
    run = jax.shard_map(run, mesh=layout.mesh, in_specs=(specs, (batch, batch)), out_specs=(specs, (P(), batch)))
    return jax.jit(run, donate_argnums=0)(state, (ids, upstream))


def stream(seed=0, steps=STEPS):
    ids = shapes.skewed_ids(seed, steps, BATCH, V, drift=5, ragged=True)
    return ids, shapes.dyadic(seed, (steps, BATCH, DIM))


@cache
def on_one_device(spec, tx=SGD):
    state, (counts, vectors) = train(mpembed.init(KEY, spec, tx), *stream(), tx)
    return jax.device_get((state, counts, vectors))


def assert_same_state(state, expected):
    """Every array of the state, brought to one device, bit for bit."""
    state = jax.device_get(sharding.relayout(state))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        if "counters" not in str(path):  # the wide exchanges of one device are none
            np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path))


def assert_same_counts(counts, expected):
    for name, want in vars(expected).items():
        if name != "wide_exchanges":
            np.testing.assert_array_equal(getattr(counts, name), want, err_msg=name)


# --- results do not depend on the number of devices


@pytest.mark.parametrize(
    ("policy", "storage", "shards"),
    [("lfu", "int8", 1), ("lfu", "int8", 2), ("lfu", "int8", 4), ("lfu", "int8", 8), ("lru", "int4", 4), (None, "int2", 8)],
)
def test_any_number_of_shards_makes_the_state_of_one_device(policy, storage, shards):
    """Tags, priorities, sketches, packed rows, lines, counts, vectors: gradients whose sums are exact, so every bit."""
    spec = spec_of(policy, storage)
    expected, counts, vectors = on_one_device(spec)
    state = mpembed.init(KEY, spec, SGD, mesh=mesh_of(shards))
    state, (got_counts, got_vectors) = train(state, *stream())
    np.testing.assert_array_equal(got_vectors, vectors)
    assert_same_counts(got_counts, counts)
    assert_same_state(state, expected)
    if policy is not None:
        assert counts.evictions.sum() > 20
        assert counts.bypasses.sum() + counts.hits.sum() > 20
