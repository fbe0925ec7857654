"""Stacks over a mesh: any number of shards makes the plan, the bits and the rows of one device."""

import dataclasses
import re
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
import training
from cases import named
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from experiments.scaling.collectives import collectives
from mpembed_jax import sharding
from mpembed_jax.embedding.counters import COUNTERS
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.numerics import random_bits

KEY = jax.random.key(3)
SIZES = (1200, 3797, 3)  # V = 5,000
V, DIM, STEPS, BATCH = sum(SIZES), 4, 16, 128
SGD = optax.sgd(0.25)


def mesh_of(*sizes, names=("x", "y")):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def spec_of(policy="lfu", storage="int8", **options):
    return shapes.stack(
        SIZES,
        DIM,
        storage=storage,
        lines=None if policy is None else 256,
        ways=2,
        policy=policy,
        **options,
    )


def step(tx, state, batch):
    ids, upstream = batch
    state, plan, rows = training.step(state, ids, tx, training.of_vectors(upstream))
    return state, (plan.counts, mpembed.pool(rows, plan.inverse))


@cache
def initial(spec, *sizes, tx=SGD, axis_name=None, placement=None):
    """A state made once for all tests: over a mesh of these sizes, or on one device.

    None of them donates it.
    """
    mesh = mesh_of(*sizes) if sizes else None
    return mpembed.init(KEY, spec, tx, mesh=mesh, axis_name=axis_name, placement=placement)


@cache
def trainer(layout, tx):
    """All steps, over the layout's mesh with divided batches; compiled once per layout."""
    run = partial(jax.lax.scan, partial(step, tx))
    if layout is None:
        return jax.jit(run)
    abstract = jax.eval_shape(
        lambda: mpembed.init(
            KEY,
            layout.spec,
            tx,
            mesh=layout.mesh,
            axis_name=layout.axes or None,
            placement=layout.placement,
        )
    )
    specs = mpembed.partition_specs(dataclasses.replace(abstract, layout=layout))
    batch = P(None, layout.batch_axes)
    return jax.jit(
        jax.shard_map(
            run, mesh=layout.mesh, in_specs=(specs, (batch, batch)), out_specs=(specs, (P(), batch))
        )
    )


def train(state, ids, upstream, tx=SGD):
    """Trains over all steps [STEPS, BATCH]; a sharded state over its mesh, its batches divided."""
    return trainer(state.layout, tx)(state, (ids, upstream))


def stream(seed=0, steps=STEPS):
    ids = shapes.skewed_ids(seed, steps, BATCH, V, drift=5, ragged=True)
    return ids, shapes.dyadic(seed, (steps, BATCH, DIM))


@cache
def on_one_device(spec, tx=SGD):
    state, (counts, vectors) = train(initial(spec, tx=tx), *stream(), tx)
    return jax.device_get((state, counts, vectors))


def assert_same_state(state, expected):
    """Every array of the state, brought to one device, bit for bit."""
    state = jax.device_get(sharding.relayout(state))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        if "counters" not in str(path):  # the wide exchanges of one device are none
            np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path))


def assert_same_counts(counts, expected):
    for name, want in vars(expected).items():
        if name != "wide_exchanges":
            np.testing.assert_array_equal(getattr(counts, name), want, err_msg=name)


@pytest.mark.slow
def test_an_old_plan_reads_nan_over_a_mesh():
    state = initial(spec_of(), 2)
    specs, ids = mpembed.partition_specs(state), jnp.arange(64, dtype=jnp.int32).reshape(2, 32)

    def late(state, ids):
        state, old = mpembed.prefetch(state, ids[0])
        state, plan = mpembed.prefetch(state, ids[1])
        return mpembed.lookup(state, old), mpembed.lookup(state, plan)

    run = jax.shard_map(
        late, mesh=state.layout.mesh, in_specs=(specs, P(None, "x")), out_specs=P("x")
    )
    old, rows = jax.jit(run)(state, ids)
    assert np.isnan(old).all()
    assert np.isfinite(rows).all()


# --- results do not depend on the number of devices


class Case(NamedTuple):
    """A stack over a mesh of one axis; `policy` is None without a cache."""

    policy: str | None
    storage: str
    shards: int


NUMBERS = [
    Case("lfu", "int8", 1),
    Case("lfu", "int8", 2),
    Case("lru", "int4", 4),
    Case(None, "int2", 4),
    Case("lfu", "int8", 8),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", named(NUMBERS, fast={"lru-int4-4"}, core=()))
def test_any_number_of_shards_makes_the_state_of_one_device(case):
    """Tags, priorities, sketches, packed rows, lines, counts and vectors.

    The whole command has two and eight shards in the tests of float sums and of the room below.
    Sums of gradients are exact, so every bit is equal.
    """
    spec = spec_of(case.policy, case.storage)
    expected, counts, vectors = on_one_device(spec)
    state = initial(spec, case.shards)
    state, (got_counts, got_vectors) = train(state, *stream())
    np.testing.assert_array_equal(got_vectors, vectors)
    assert_same_counts(got_counts, counts)
    assert_same_state(state, expected)
    if case.policy is not None:
        assert counts.evictions.sum() > 20
        assert counts.bypasses.sum() + counts.hits.sum() > 20


class TwoAxes(NamedTuple):
    """A mesh with axes x and y of these sizes, and what they divide."""

    sizes: tuple[int, int]
    row_axes: str | tuple[str, ...]
    batch_axes: tuple[str, ...] | None = None  # None: both


MESHES = {
    "rows over y": TwoAxes((2, 4), "y"),
    "rows over both": TwoAxes((2, 4), ("x", "y")),
    "rows over y, batches over x": TwoAxes((4, 2), "y", ("x",)),
}


@pytest.mark.parametrize("mesh", named(MESHES, core={"rows over y, batches over x"}))
def test_two_dimensional_meshes_make_the_state_of_one_device(mesh):
    """Rows over one axis or both; batches over both, or over another axis than the rows."""
    spec = spec_of("lfu")
    expected, counts, vectors = on_one_device(spec)
    placement = mpembed.Placement(batch_axes=mesh.batch_axes)
    state = initial(spec, *mesh.sizes, axis_name=mesh.row_axes, placement=placement)
    state, (got_counts, got_vectors) = train(state, *stream())
    np.testing.assert_array_equal(got_vectors, vectors)
    assert_same_counts(got_counts, counts)
    assert_same_state(state, expected)


@pytest.mark.exhaustive
def test_replicated_stacks_train_as_one_device():
    """The whole command trains one with kernels, in test_kernels_over_a_mesh.py.

    It moves and restores one in tests/checkpoint/test_checkpoint_sharded.py.
    """
    spec = spec_of("lfu")
    expected, counts, _ = on_one_device(spec)
    state = initial(spec, 4, placement=mpembed.Placement("replicated"))
    state, (got_counts, _) = train(state, *stream())
    assert_same_counts(got_counts, counts)
    assert_same_state(state, expected)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_ids_beyond_the_room_of_the_exchange_travel_all_the_same():
    """A tenth of an even share has room, and one owner gets nearly all.

    Counted, and nothing else changes.
    """
    spec = spec_of("lfu")
    ids, upstream = stream()
    ids = np.where(ids == mpembed.NO_ID, ids, ids // 8 * 8 % V)
    expected, (counts, _) = train(initial(spec), ids, upstream)
    placement = mpembed.Placement(capacity=0.1)
    state = initial(spec, 8, placement=placement)
    state, (got_counts, _) = train(state, ids, upstream)
    assert_same_counts(got_counts, counts)
    assert_same_state(state, jax.device_get(expected))
    assert (
        STEPS >= mpembed.stats(state).wide_exchanges == got_counts.wide_exchanges.sum() > STEPS // 2
    )


class Budget(NamedTuple):
    """Unique ids of a batch, and the policy of the cache; None without one."""

    budget: int
    policy: str | None


@pytest.mark.parametrize("case", named([Budget(60, None), Budget(12, "lfu")], core={"12-lfu"}))
def test_a_budget_of_unique_ids_is_that_of_the_whole_batch(case):
    """Also where one device alone exceeds it.

    An id that several devices drop on their own counts for each of them.
    """
    budget, policy = case
    spec = spec_of(policy, max_unique_ids=budget)
    expected, counts, vectors = on_one_device(spec)
    state, (got_counts, got_vectors) = train(initial(spec, 4), *stream())
    np.testing.assert_array_equal(got_vectors, vectors)
    assert counts.dropped.sum() > 20
    if budget == 12:
        assert (got_counts.dropped >= counts.dropped).all()
        got_counts, counts = (jax.tree.map(np.copy, c) for c in (got_counts, counts))
        got_counts.dropped[:] = counts.dropped[:] = 0
    assert_same_counts(got_counts, counts)
    assert_same_state(state, expected)


@pytest.mark.slow
def test_float_sums_in_a_fixed_order_have_the_same_bits_on_any_number_of_devices():
    """Eight summation blocks.

    Gradients are not dyadic. Without blocks the sums differ, within rounding.
    """
    spec, (ids, _) = spec_of(None, "float32"), stream()  # sums are made before any cache is asked
    upstream = np.random.default_rng(0).standard_normal((STEPS, BATCH, DIM)).astype(np.float32)
    ids = np.where(ids == mpembed.NO_ID, ids, ids % 300)  # many duplicates
    states = []
    for shards, blocks in ((1, 8), (2, 8), (8, 8), (2, None)):
        placement = mpembed.Placement(summation_blocks=blocks)
        state = initial(spec, shards, placement=placement if blocks else None)
        states.append(train(state, ids, upstream)[0])
    first = jax.device_get(sharding.relayout(states[0]))
    for state in states[1:3]:
        assert_same_state(state, first)
    rows, wanted = (training.all_rows(s) for s in (states[3], jax.device_put(first)))
    assert (rows != wanted).any()
    # STEPS updates of a quarter of a sum of at most BATCH terms, whose magnitudes add up to less
    # than BATCH.
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=STEPS * 0.25 * BATCH * 2**-24 * BATCH)


@pytest.mark.slow
def test_whole_tables_per_shard_train_the_same_float32_rows():
    """Their cache sets are others, so only what a float32 stack guarantees: the rows."""
    spec = spec_of("lfu", "float32")
    expected, _, vectors = on_one_device(spec)
    placement = mpembed.Placement("tables", table_shards=(1, 0, 1))
    state = initial(spec, 2, placement=placement)
    assert state.table.rows.shape[0] == 2 * SIZES[1]
    state, (_, got_vectors) = train(state, *stream())
    np.testing.assert_array_equal(got_vectors, vectors)
    one = mpembed.to_dense(jax.device_put(expected))
    for name, rows in mpembed.to_dense(state).items():
        np.testing.assert_array_equal(rows, one[name])
    assert_same_rows(sharding.relayout(state), one)


def assert_same_rows(state, tables):
    for name, rows in mpembed.to_dense(state).items():
        np.testing.assert_array_equal(rows, tables[name])


@pytest.mark.slow
def test_initial_rows_are_those_of_one_device():
    """Uniform ones and those of an initializer function, rows by MOD and whole tables."""
    tables = [
        mpembed.TableSpec("a", 9000, jax.nn.initializers.normal(0.1)),
        mpembed.TableSpec("b", 1001),
    ]
    tables.append(mpembed.TableSpec("c", 10, jax.nn.initializers.ones))
    spec = mpembed.EmbeddingSpec(tables, DIM, "int4", None)
    wanted = mpembed.to_dense(mpembed.init(KEY, spec, SGD))
    for placement in (mpembed.Placement("rows"), mpembed.Placement("tables")):
        assert_same_rows(mpembed.init(KEY, spec, SGD, mesh=mesh_of(4), placement=placement), wanted)


@pytest.mark.slow
def test_row_state_schedules_and_skipped_rows_are_those_of_one_device():
    """Row state in bfloat16, rounded stochastically, and a step count.

    Some positions have NaN gradients.
    """
    spec = dataclasses.replace(spec_of("lru"), row_state_dtype="bfloat16", skip_nonfinite=True)
    tx = mpembed.optim.rowwise_adagrad(optax.linear_schedule(0.5, 0.25, 8), 1e-3)
    ids, upstream = stream()
    upstream = np.where(
        np.random.default_rng(5).random((STEPS, BATCH, 1)) < 0.02, np.float32(np.nan), upstream
    )
    expected = train(initial(spec, tx=tx), ids, upstream, tx)[0]
    state = train(initial(spec, 4, tx=tx), ids, upstream, tx)[0]
    assert mpembed.stats(state).nonfinite_rows == mpembed.stats(expected).nonfinite_rows > 10
    assert_same_state(state, jax.device_get(expected))


# --- the verbs beside training


@pytest.mark.slow
def test_read_flush_freeze_and_dense_tables_of_a_sharded_state():
    spec = spec_of("lfu")
    expected, _, _ = on_one_device(spec)
    expected = jax.device_put(expected)
    mesh = mesh_of(4)
    state, _ = train(initial(spec, 4), *stream())
    ids = {
        "a": np.asarray([[0, 7, V - 1], [mpembed.NO_ID, V, -1]], np.int32),
        "b": np.arange(9, dtype=np.int32),
    }
    wanted = training.read(expected, ids)
    jax.tree.map(np.testing.assert_array_equal, training.read(state, ids), wanted)
    specs = mpembed.partition_specs(state)
    inside = jax.jit(
        jax.shard_map(mpembed.read, mesh=mesh, in_specs=(specs, P("x")), out_specs=P("x"))
    )
    every = jnp.arange(V, dtype=jnp.int32)
    np.testing.assert_array_equal(inside(state, every), training.all_rows(expected))
    assert_same_state(
        jax.jit(mpembed.flush)(state), jax.device_get(jax.jit(mpembed.flush)(expected))
    )
    np.testing.assert_array_equal(
        jax.jit(mpembed.freeze)(state).rows, jax.jit(mpembed.freeze)(expected).rows
    )
    tables = mpembed.to_dense(expected)
    assert_same_rows(state, tables)
    again, one = (
        mpembed.from_dense(KEY, spec, SGD, tables, mesh=mesh),
        mpembed.from_dense(KEY, spec, SGD, tables),
    )
    assert_same_state(again, jax.device_get(one))
    got, want = mpembed.stats(state), mpembed.stats(expected)
    assert got._replace(wide_exchanges=0) == want


@pytest.mark.slow
def test_a_state_moves_between_layouts_and_trains_on_as_if_it_had_not():
    spec = spec_of("lfu")
    ids, upstream = stream(1, 2 * STEPS)
    expected = train(
        train(initial(spec), ids[:STEPS], upstream[:STEPS])[0], ids[STEPS:], upstream[STEPS:]
    )[0]
    state = train(initial(spec, 4), ids[:STEPS], upstream[:STEPS])[0]
    state = sharding.relayout(state, mesh=mesh_of(2))
    assert_same_state(train(state, ids[STEPS:], upstream[STEPS:])[0], jax.device_get(expected))


# --- what a shard costs


@pytest.mark.slow
def test_a_sharded_step_copies_no_table_and_exchanges_only_its_room():
    """The compiled step copies no array of a shard.

    It has an all_to_all of ids, rows and gradients, narrow and wide.
    """
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("items", 400_000)], 32, "int8", max_unique_ids=2048
    )
    mesh, tx = mesh_of(4), mpembed.optim.rowwise_adagrad(0.05)
    state = jax.eval_shape(lambda: mpembed.init(KEY, spec, tx, mesh=mesh))
    specs = mpembed.partition_specs(state)
    run = jax.shard_map(
        partial(step, tx),
        mesh=mesh,
        in_specs=(specs, (P("x"), P("x"))),
        out_specs=(specs, (P(), P("x"))),
    )
    shardings = jax.tree.map(partial(jax.sharding.NamedSharding, mesh), specs)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    batch = (
        jax.ShapeDtypeStruct((512, 4), jnp.int32),
        jax.ShapeDtypeStruct((512, 4, 32), jnp.float32),
    )
    compiled = jax.jit(run, donate_argnums=0).lower(state, batch).compile()
    text = compiled.as_text()
    rows = {
        leaf.shape[0] // 4
        for leaf in jax.tree.leaves((state.table, state.row_state, state.cache.rows))
    }
    copies = [int(n) for n in re.findall(r"= \w+\[(\d+)[\d,]*\]\S* copy\(", text)]
    assert not rows & set(copies), "an array of a shard is copied"
    entries = 512  # a device's ids, fewer than the budget
    narrow, wide = -(-5 * entries // 16), entries
    for width, is_wide in ((narrow, False), (wide, True)):
        found = [c for c in collectives(text, 4, is_wide=is_wide) if c.kind != "all-reduce"]
        assert [(c.kind, c.sent_bytes) for c in found] == [
            ("all-to-all", 3 * width * size) for size in (8, 128, 128)
        ]


@pytest.mark.exhaustive
def test_a_sharded_step_is_traced_once_and_keeps_its_buffers():
    """The whole command has the test above, and the step of one device in tests/invariants."""
    spec, mesh = spec_of("lfu"), mesh_of(2)
    state = mpembed.init(KEY, spec, SGD, mesh=mesh)
    specs = mpembed.partition_specs(state)
    run = jax.shard_map(
        partial(step, SGD), mesh=mesh, in_specs=(specs, P("x")), out_specs=(specs, (P(), P("x")))
    )
    run = jax.jit(run, donate_argnums=0)
    ids, upstream = stream()
    buffers = set()
    for batch in zip(ids[:3], upstream[:3], strict=True):
        state, _ = run(state, batch)
        buffers.add(
            tuple(
                shard.data.unsafe_buffer_pointer() for shard in state.table.rows.addressable_shards
            )
        )
    assert run._cache_size() == 1
    assert len(buffers) == 1


# --- what is refused


def test_what_cannot_be_sharded_is_refused_with_its_fix():
    spec, mesh = spec_of("lfu"), mesh_of(4)
    with pytest.raises(
        ValueError,
        match=r'over 3 shards; .* 1, 2, 4, 8 or 16\. Replicate .*, Placement\("replicated"\)',
    ):
        mpembed.init(KEY, spec, SGD, mesh=mesh_of(3))
    with pytest.raises(ValueError, match=r"several axes \('x', 'y'\)"):
        mpembed.init(KEY, spec, SGD, mesh=mesh_of(2, 2))
    plain = jax.make_mesh((2, 2), ("x", "y"))  # its axes are explicit
    line = (
        r"jax\.make_mesh\(\(2, 2\), \('x', 'y'\), axis_types=\(jax.sharding.AxisType.Auto,\) \* 2\)"
    )
    with pytest.raises(ValueError, match=line):
        mpembed.init(KEY, spec, SGD, mesh=plain, axis_name="x")
    with pytest.raises(ValueError, match=line):
        tables = {t.name: np.zeros((t.vocabulary_size, DIM), np.float32) for t in spec.tables}
        mpembed.from_dense(KEY, spec, SGD, tables, mesh=plain, axis_name="x")
    with pytest.raises(ValueError, match=line):
        sharding.relayout(initial(spec), mesh=plain, axis_name="x")
    with pytest.raises(ValueError, match="no mesh axis 'z'"):
        mpembed.init(KEY, spec, SGD, mesh=mesh, axis_name="z")
    with pytest.raises(ValueError, match="for calling init inside"):
        mpembed.init(KEY, spec, SGD, axis_name="x")
    with pytest.raises(ValueError, match="placement needs mesh="):
        mpembed.init(KEY, spec, SGD, placement=mpembed.Placement())
    with pytest.raises(ValueError, match="multiple of the 4 devices"):
        mpembed.init(KEY, spec, SGD, mesh=mesh, placement=mpembed.Placement(summation_blocks=6))
    with pytest.raises(ValueError, match="all of the sharding axes"):
        mpembed.init(
            KEY,
            spec,
            SGD,
            mesh=mesh_of(2, 2),
            axis_name=("x", "y"),
            placement=mpembed.Placement(batch_axes=("x",)),
        )
    with pytest.raises(ValueError, match=r"must end with the sharding axes"):
        placement = mpembed.Placement(batch_axes=("x", "y"), summation_blocks=4)
        mpembed.init(KEY, spec, SGD, mesh=mesh_of(2, 2), axis_name="x", placement=placement)
    with pytest.raises(ValueError, match="one shard in"):
        mpembed.init(
            KEY, spec, SGD, mesh=mesh, placement=mpembed.Placement("tables", table_shards=(0, 4, 1))
        )
    with pytest.raises(ValueError, match="one of rows, tables, replicated"):
        mpembed.Placement("columns")
    state = initial(spec, 4)
    with pytest.raises(
        ValueError, match=r"call it inside jax.shard_map over the mesh axes \('x',\)"
    ):
        mpembed.prefetch(state, jnp.zeros(8, jnp.int32))
    other = dataclasses.replace(state, layout=initial(spec, 2).layout)
    with pytest.raises(ValueError, match="another spec"):
        mpembed.stats(other)


def test_stats_warn_where_most_steps_exceed_the_room_of_the_exchange():
    state = initial(spec_of("lfu"), 2)
    words = np.zeros((len(COUNTERS), 2), np.uint32)
    words[COUNTERS.index("wide_exchanges"), 0] = 60

    def after(steps):
        return training.with_history(state, counters=words, step=np.int32(steps))

    for steps in (99, 121):
        mpembed.stats(after(steps))
    with pytest.warns(UserWarning, match=r"in 60 of 100 steps, .*: raise Placement\(capacity"):
        mpembed.stats(after(100))


# --- choosing a placement


def test_the_planner_replicates_small_stacks_divides_large_ones_and_measures_the_room():
    small = shapes.stack((100, 50), 4, lines=32, ways=4)
    assert sharding.plan(small, 4) == mpembed.Placement("replicated")
    large = shapes.stack((1000, 1000, 1000, 1000), 16, lines=512, ways=2, max_unique_ids=64)
    assert sharding.plan(large, 4, replicate_bytes=0) == mpembed.Placement("rows")
    # Ids 0, 4, 8 ..: all on shard 0 by MOD, but of four tables, and so four owners, by tables.
    ids = (np.arange(64)[:, None] * 4 % 1000 + 1000 * np.arange(4)).astype(np.int32)
    chosen = sharding.plan(large, 4, [ids], replicate_bytes=0)
    assert (chosen.kind, chosen.capacity) == ("tables", pytest.approx(16 / 64 * 4 * 1.1))
    # Consecutive ids: 16 of 64 for every owner by MOD, all of one owner by tables.
    ids = np.arange(256, dtype=np.int32).reshape(64, 4)
    chosen = sharding.plan(large, 4, [ids], replicate_bytes=0)
    assert (chosen.kind, chosen.capacity) == ("rows", pytest.approx(16 / 64 * 4 * 1.1))
    with pytest.raises(ValueError, match="divide over 4 devices"):
        sharding.plan(large, 4, [ids[:62]], replicate_bytes=0)


# --- more rows than 32-bit ids can name


def huge(shards, cache=None):
    tables = [mpembed.TableSpec(f"t{k}", 2_000_000_000) for k in range(50)]  # 10^11 rows
    spec = mpembed.EmbeddingSpec(tables, 8, "int8", cache)
    mesh = jax.sharding.AbstractMesh((shards,), ("x",), axis_types=(AxisType.Auto,))
    return mesh, jax.eval_shape(lambda: mpembed.init(KEY, spec, SGD, mesh=mesh))


@pytest.mark.slow
def test_a_step_over_ten_to_the_eleven_rows_on_64_shards_traces():
    mesh, state = huge(64, mpembed.CacheSpec(num_rows=64 * 1024))
    assert state.table.rows.shape[0] == 64 * 1_562_500_000
    specs = mpembed.partition_specs(state)
    run = jax.shard_map(
        partial(step, SGD),
        mesh=mesh,
        in_specs=(specs, (P("x"), P("x"))),
        out_specs=(specs, (P(), P("x"))),
    )
    ids = jax.ShapeDtypeStruct((128, 50, 2), jnp.int32)
    after, (_, vectors) = jax.eval_shape(
        run, state, (ids, jax.ShapeDtypeStruct((128, 50, 8), jnp.float32))
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert vectors.shape == (128, 50, 8)


@pytest.mark.slow
def test_pairs_are_the_rows_of_64_bit_ids():
    _, state = huge(64)
    rng = np.random.default_rng(0)
    local = rng.integers(0, 2_000_000_000, (1000, 50))
    local[0, :3] = mpembed.NO_ID, -5, 2_000_000_000
    pairs = sharding.pairs(state, local).astype(np.int64)
    assert pairs[0, 0].tolist() == [64, mpembed.NO_ID]
    assert (pairs[0, 1:3, 0] == 64).all() and (pairs[0, 1:3, 1] != mpembed.NO_ID).all()
    wanted = local + 2_000_000_000 * np.arange(50, dtype=np.int64)
    np.testing.assert_array_equal((pairs[..., 1] * 64 + pairs[..., 0])[1:], wanted[1:])
    # The shard finds the id again, in two words, from which random bits are drawn.
    shard = state.layout.shard(63)
    low, high = shard.ids_of(jnp.asarray(pairs[..., 1], jnp.int32))
    ids = np.asarray(low, np.uint64) + (np.asarray(high, np.uint64) << np.uint64(32))
    np.testing.assert_array_equal(ids[1:], (pairs[..., 1] * 64 + 63)[1:].astype(np.uint64))
    key = shard.key(jnp.asarray([1, 2], jnp.uint32))
    rows = jnp.asarray(pairs[1:, 0, 1], jnp.int32)
    bits = random_bits.row_bits(key, 1, jnp.int32(3), rows, 8)
    assert len(np.unique(np.asarray(bits))) > 0.99 * bits.size
    with pytest.raises(ValueError, match="must be pairs"):
        state.layout.shape_of(jnp.zeros((3,), jnp.int32))


class PairedLayout(Layout):
    """A layout whose ids are pairs, however small the stack."""

    is_paired = True


@pytest.mark.slow
def test_pairs_train_as_plain_ids_do():
    """A small stack that takes pairs: the same state."""
    spec = spec_of("lfu")
    expected, counts, vectors = on_one_device(spec)
    ids, upstream = stream()
    state = initial(spec, 4)
    layout = PairedLayout(**vars(state.layout))
    is_row = ids != mpembed.NO_ID
    as_pairs = np.stack([np.where(is_row, ids % 4, 4), np.where(is_row, ids // 4, ids)], axis=-1)
    paired = dataclasses.replace(state, layout=layout)
    paired, (got_counts, got_vectors) = trainer(layout, SGD)(paired, (as_pairs, upstream))
    state = dataclasses.replace(paired, layout=state.layout)
    np.testing.assert_array_equal(got_vectors, vectors)
    assert_same_counts(got_counts, counts)
    assert_same_state(state, expected)


# --- pmap


@pytest.mark.exhaustive
def test_the_verbs_run_inside_pmap():
    """Without a typed mesh a loss of one device has no pmean inside.

    Here gradients are given, so nothing changes. The whole command has README's recipe for pmap,
    and an optimizer that mixes rows, in test_sharding_gradients.py.
    """
    spec = spec_of("lfu")
    expected, _, vectors = on_one_device(spec)
    ids, upstream = (
        np.moveaxis(a.reshape(STEPS, 4, BATCH // 4, *a.shape[2:]), 1, 0) for a in stream()
    )

    def run(ids, upstream):
        state = mpembed.init(KEY, spec, SGD, axis_name="x")
        state, (_, vectors) = jax.lax.scan(partial(step, SGD), state, (ids, upstream))
        return vectors, mpembed.read(state, jnp.arange(V, dtype=jnp.int32)), state.cache.tags

    got, rows, tags = jax.pmap(run, axis_name="x", devices=jax.devices()[:4])(ids, upstream)
    np.testing.assert_array_equal(np.moveaxis(got, 0, 1).reshape(vectors.shape), vectors)
    for device in rows:
        np.testing.assert_array_equal(
            device, mpembed.read(jax.device_put(expected), jnp.arange(V, dtype=jnp.int32))
        )
    assert tags.shape == (4, 128 // 4, 2)
