"""Kernels over a mesh, interpreted, make what the reference makes on one device.

The reference over a mesh is in test_sharding.py, and kernels on one device are in tests/ops.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
import training
from cases import named
from jax._src import config, core  # how kernels are interpreted is not public
from jax._src.interpreters import mlir
from jax._src.pallas import pallas_call
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from mpembed_jax import sharding

KERNEL, REFERENCE = "pallas_interpret", "xla"
KEY = jax.random.key(3)
SIZES = (1200, 797, 3)
V, DIM, STEPS, BATCH = sum(SIZES), 4, 5, 32
RULES = {
    "sgd": mpembed.optim.sgd(0.25),
    "momentum": optax.sgd(0.25, momentum=0.5),  # kernels only store its rows
    "adagrad": mpembed.optim.rowwise_adagrad(0.5),
}


class Over(NamedTuple):
    """A stack over a mesh with the axes x and y; y divides rows."""

    shape: tuple[int, ...]
    policy: str | None
    storage: str
    rule: str = "sgd"
    capacity: float = 1.25
    budget: int | None = None
    kind: str = "rows"
    batch_axes: tuple[str, ...] | None = None
    row_state: str = "float32"

    @property
    def spec(self):
        lines = {} if self.policy is None else {"lines": 128, "ways": 2, "policy": self.policy}
        spec = shapes.stack(SIZES, DIM, storage=self.storage, max_unique_ids=self.budget, **lines)
        return dataclasses.replace(spec, row_state_dtype=self.row_state)

    @property
    def placed(self):
        """The arguments of init."""
        names = ("x", "y")[-len(self.shape) :]
        return {
            "mesh": jax.make_mesh(self.shape, names, axis_types=(AxisType.Auto,) * len(names)),
            "axis_name": "y",
            "placement": mpembed.Placement(
                self.kind, capacity=self.capacity, batch_axes=self.batch_axes
            ),
        }


CASES = {
    # An eighth of the ids that a device has for an owner has room, so most exchanges are wide.
    "lfu, 2 devices, wide exchanges": Over((2,), "lfu", "int8", capacity=0.12),
    "lru, 4 devices, replicas and a budget": Over((2, 2), "lru", "int4", capacity=2, budget=8),
    "4 devices without a cache": Over((4,), None, "int2", "momentum", capacity=4),
    "adagrad, bfloat16 row state": Over(
        (2,), "lfu", "float32", "adagrad", capacity=2, row_state="bfloat16"
    ),
    "replicated": Over((2,), "lfu", "int8", kind="replicated"),
    "whole tables": Over((2,), None, "int8", kind="tables", capacity=2),
    "rows of the same batch": Over((2,), "lfu", "int8", batch_axes=(), capacity=2),
}
CORE = {"lfu, 2 devices, wide exchanges"}


@pytest.fixture(autouse=True, scope="module")
def _interpreted_without_types():
    """Interprets the inside of kernels without the types that say what differs between devices.

    jax traces a kernel without them, and would then interpret it with them, which fails. The
    results of a kernel have their types all the same. Compiled kernels need none of this: see
    `test_a_step_over_a_mesh_lowers_with_kernels` in tests/ops/test_gpu_lowering.py.
    """

    def bare(avals):
        return [aval.update_manual_axis_type(core.empty_mat) for aval in avals]

    def lower(context, *nodes, **params):
        context = context.replace(
            avals_in=bare(context.avals_in), avals_out=bare(context.avals_out)
        )
        with config._check_vma(False):
            return pallas_call._pallas_call_lowering(context, *nodes, **params)

    mlir.register_lowering(pallas_call.pallas_call_p, lower)
    yield
    mlir.register_lowering(pallas_call.pallas_call_p, pallas_call._pallas_call_lowering)


def batches():
    ids = shapes.skewed_ids(0, STEPS, BATCH, V, drift=5, ragged=True)
    return jnp.asarray(ids), jnp.asarray(shapes.dyadic(0, (STEPS, BATCH, DIM)))


def trained(state, tx, batches):
    """The state after all steps, and the counts and vectors of each."""

    def step(state, batch):
        ids, upstream = batch
        gradient = training.of_vectors(upstream, implementation=state.implementation)
        state, plan, rows = training.step(state, ids, tx, gradient)
        return state, (plan.counts, mpembed.pool(rows, plan.inverse))

    def run(state, batches):
        return jax.lax.scan(step, state, batches)

    if state.layout is not None:
        specs = mpembed.partition_specs(state)
        batch = P(None, state.layout.batch_axes or None)
        run = jax.shard_map(
            run, mesh=state.layout.mesh, in_specs=(specs, batch), out_specs=(specs, (P(), batch))
        )
    return jax.jit(run)(state, batches)


@pytest.mark.parametrize("case", named(CASES, core=CORE))
def test_kernels_over_a_mesh_make_the_state_of_the_reference_on_one_device(case):
    """Tags, priorities, sketches, packed rows, lines, counts and vectors, bit for bit.

    Sums of gradients are exact. Random bits are those of global ids. In the whole command, LRU's
    kernel plans on one device in tests/ops/test_gpu_plan.py. The reference has replicas and budgets
    over a mesh, in test_sharding.py and test_sharding_nn.py.
    """
    spec, tx = case.spec, RULES[case.rule]
    one = mpembed.init(KEY, spec, tx, implementation=REFERENCE)
    one, (counts, vectors) = trained(one, tx, batches())
    state = mpembed.init(KEY, spec, tx, **case.placed, implementation=KERNEL)
    state, (got_counts, got_vectors) = trained(state, tx, batches())
    np.testing.assert_array_equal(got_vectors, vectors)
    wide = np.asarray(got_counts.wide_exchanges)
    assert (wide.sum() > 2) == (case.capacity < 1)
    assert case.budget is None or counts.dropped.sum() > 20
    training.assert_same(
        dataclasses.replace(
            got_counts, wide_exchanges=counts.wide_exchanges, dropped=counts.dropped
        ),
        counts,
    )
    here = sharding.relayout(state)
    training.assert_same(
        dataclasses.replace(here, implementation=REFERENCE, counters=one.counters, clock=one.clock),
        one,
    )
    every = np.arange(-1, V + 1, dtype=np.int32)
    np.testing.assert_array_equal(mpembed.read(state, every), mpembed.read(one, every))


@pytest.mark.slow
def test_raw_ids_over_two_devices_get_the_rows_of_one():
    """Owners, sketch and rows, of which some start again for new owners."""
    vocabulary = mpembed.VocabularySpec(32, ways=2, admit_after=1, shared_rows=3)
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t")], DIM, "int8", None, vocabulary=vocabulary)
    ids = np.minimum(np.random.default_rng(0).zipf(1.2, (4, BATCH)), 200)
    ids = ids + 40 * np.arange(4)[:, None]
    pairs = np.stack([spec.raw_ids(of_step[:, None])[:, 0] for of_step in ids])
    given = jnp.asarray(pairs), batches()[1][:4]
    tx = RULES["sgd"]
    one, two = (
        mpembed.init(KEY, spec, tx, implementation=by, **placed)
        for by, placed in (
            (REFERENCE, {}),
            (KERNEL, Over((2,), None, "int8", capacity=2).placed),
        )
    )
    one, (_, vectors) = trained(one, tx, given)
    two, (_, got_vectors) = trained(two, tx, given)
    np.testing.assert_array_equal(got_vectors, vectors)
    assert mpembed.stats(one).vocabulary.recyclings > 0
    training.assert_same(dataclasses.replace(sharding.relayout(two), implementation=REFERENCE), one)


@pytest.mark.slow
def test_dense_gradients_over_two_devices_are_those_of_one():
    """Kernels have types that say what differs between devices, so jax sums dense gradients."""
    spec = dataclasses.replace(CASES["replicated"].spec, cache=None)
    ids, upstream = (array[0] for array in batches())
    weights = jnp.asarray(shapes.dyadic(1, (DIM, DIM)))

    def gradients(state, weights, ids, upstream):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)

        def loss(rows, weights):
            vectors = mpembed.pool(rows, plan.inverse, implementation=state.implementation)
            total = jnp.sum(jnp.dot(vectors, weights) * upstream)
            return total if state.layout is None else jax.lax.psum(total, "y")

        row_grads, dense = jax.grad(loss, argnums=(0, 1))(rows, weights)
        return dense, mpembed.apply_gradients(state, plan, rows, row_grads, tx=RULES["sgd"])

    def of(state):
        run = gradients
        if state.layout is not None:
            specs = mpembed.partition_specs(state)
            run = jax.shard_map(
                run,
                mesh=state.layout.mesh,
                in_specs=(specs, P(), P("y"), P("y")),
                out_specs=(P(), specs),
            )
        dense, state = jax.jit(run)(state, weights, ids, upstream)
        return dense, mpembed.read(state, np.arange(V, dtype=np.int32))

    init = partial(mpembed.init, KEY, spec, RULES["sgd"])
    one = of(init(implementation=REFERENCE))
    two = of(init(**Over((2,), None, "int8").placed, implementation=KERNEL))
    np.testing.assert_allclose(two[0], one[0], rtol=0, atol=2**-20)
    np.testing.assert_array_equal(two[1], one[1])
