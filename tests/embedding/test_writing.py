"""Rows that are written: their new values, everything else as it was, and what is refused."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
import training
from cases import Refused, crossed, named
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, sharding
from mpembed_jax.numerics.packing import decode, encode

ROWS, DIM = 120, 8
TX = optax.sgd(0.5)
CACHE = CacheSpec(num_rows=32, ways=4)
IDS = np.array([3, NO_ID, 9, 3, 50, ROWS, -1], np.int32)  # the first row of 3 does not count
write = jax.jit(mpembed.write_rows, static_argnames="tx")


def trained(storage="float32", cache=CACHE, tx=TX, mesh=None, **options):
    spec = EmbeddingSpec([TableSpec("t", ROWS)], DIM, storage, cache, **options)
    state = mpembed.init(jax.random.key(0), spec, tx)
    batches = np.random.default_rng(0).integers(0, ROWS, (4, 24)).astype(np.int32)
    state = training.train(state, batches, np.ones((4, 24, DIM), np.float32), tx).state
    return state if mesh is None else sharding.relayout(state, mesh=mesh)


def values(num=IDS.size):
    return np.random.default_rng(1).normal(size=(num, DIM)).astype(np.float32)


@crossed(
    cache=named({"uncached": None, "cached": CACHE}),
    storage=named(["float32", "int8", "bfloat16"], fast={"int8"}),
    core={"cached-bfloat16"},
)
def test_written_rows_have_their_values_and_all_others_their_bits(storage, cache):
    state = trained(storage, cache)
    before, rows = training.all_rows(state), values()
    after = training.all_rows(write(state, IDS, rows))
    changed = {3: rows[3], 9: rows[2], 50: rows[4]}
    others = np.setdiff1d(np.arange(ROWS), list(changed))
    np.testing.assert_array_equal(after[others], before[others])
    is_cached = np.isin(list(changed), [] if cache is None else np.asarray(state.cache.tags))
    assert cache is None or is_cached.any(), "the batches must leave one of the ids in a line"
    for (id, row), exact in zip(changed.items(), is_cached, strict=True):
        near = decode(encode(row[None], state.spec.storage, None), state.spec.storage, DIM)[0]
        grid = 0 if exact or storage == "float32" else np.abs(row).max() / 64
        np.testing.assert_allclose(after[id], row if exact else near, rtol=0, atol=grid)
    flushed = training.all_rows(jax.jit(mpembed.flush)(write(state, IDS, rows)))
    np.testing.assert_allclose(flushed[3], rows[3], rtol=0, atol=np.abs(rows[3]).max() / 64)


def test_writing_every_row_of_a_new_state_is_from_dense_bit_for_bit():
    spec = EmbeddingSpec([TableSpec("t", ROWS)], DIM, cache=None)
    dense = values(ROWS)
    state = write(mpembed.init(jax.random.key(0), spec, TX), np.arange(ROWS, dtype=np.int32), dense)
    made = mpembed.from_dense(jax.random.key(0), spec, TX, {"t": dense})
    # A state counts the changes of its rows outside of steps.
    training.assert_same(dataclasses.replace(state, counters=made.counters), made)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", named(["float32", "bfloat16"], fast={"bfloat16"}, core=()))
def test_a_row_may_get_its_initial_optimizer_state(dtype):
    tx = optax.adam(0.1) if dtype == "float32" else mpembed.optim.rowwise_adagrad(0.1)
    with jax.numpy_dtype_promotion("standard"):  # optax.adam
        state = trained(tx=tx, row_state_dtype=dtype)
        fresh = mpembed.init(jax.random.key(0), state.spec, tx)
        after = write(state, IDS, values(), tx=tx)
        kept = write(state, IDS, values())
    training.assert_same(kept.row_state, state.row_state)
    is_written = np.isin(np.arange(ROWS), IDS)
    held = (after.row_state, state.row_state, fresh.row_state)
    for new, old, initial in zip(*map(jax.tree.leaves, held), strict=True):
        wanted = old
        if old.ndim:
            by_row = is_written.reshape(-1, *[1] * (old.ndim - 1))
            wanted = np.where(by_row, initial, old)
            assert (wanted != np.asarray(old)).any()
        np.testing.assert_array_equal(new, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside shard_map"])
def test_rows_are_written_over_a_mesh_as_on_one_device(inside):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"storage": "int8", "cache": CacheSpec(num_rows=64, ways=2)}
    one, four = trained(**options), trained(**options, mesh=mesh)
    run = partial(mpembed.write_rows, tx=TX)
    if inside:
        specs = mpembed.partition_specs(four)
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs)
    four = jax.jit(run)(four, IDS, values())
    training.assert_same(sharding.relayout(four), jax.device_put(write(one, IDS, values(), tx=TX)))


@pytest.mark.slow
def test_rows_are_written_into_a_table_in_host_memory():
    hosted = trained("int8", memory_kind="pinned_host")
    after = write(hosted, IDS, values())
    assert after.table.rows.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(
        training.all_rows(after), training.all_rows(write(trained("int8"), IDS, values()))
    )


def test_a_pending_state_stays_as_it_is_and_the_call_is_counted():
    state, plan = jax.jit(mpembed.prefetch)(trained(), IDS)
    after = write(state, IDS, values())
    same = dataclasses.replace(after, counters=state.counters)
    training.assert_same(same, state)
    with pytest.raises(ValueError, match=r"1 calls changed nothing.* write_rows"):
        mpembed.stats(after)
    assert plan is not None


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(lambda s: write(s, IDS.astype(np.float32), values()), "int32", TypeError),
            Refused(lambda s: write(s, IDS, values().astype(np.int32)), "floating", TypeError),
            Refused(lambda s: write(s, IDS[:-1], values()), "one for each of the ids"),
            Refused(lambda s: write(s, IDS, values(), tx=optax.adam(0.1)), "pass the same tx"),
            Refused(
                lambda s: mpembed.write_rows(mpembed.prefetch(s, IDS)[0], IDS, values()),
                "between prefetch and apply_gradients",
            ),
        ]
    ),
)
def test_misuse_is_refused(case):
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(case.error, match=case.message),
    ):
        case.call(trained())
