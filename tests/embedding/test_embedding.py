"""The verbs, end to end.

Every row, line and bit of a training stream equals those of a dictionary of rows.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import row_oracle
import shapes
import training
from cases import named
from training import all_rows, read, train

import mpembed_jax as mpembed
from mpembed_jax.numerics import random_bits
from mpembed_jax.table import read_rows

SGD = optax.sgd(0.25)
KEY = jax.random.key(7)
flush = jax.jit(mpembed.flush)
row_bits = jax.jit(random_bits.row_bits, static_argnames=("stream", "num_columns"))


@jax.jit
def table_rows(state):
    """What the table holds, whatever the cache does."""
    return read_rows(state.table, jnp.arange(state.spec.num_rows, dtype=jnp.int32))


def stream(seed, steps, num, num_ids, dim):
    """Skewed ids with padding and ids out of range among them, and dyadic gradients for every
    position.
    """
    ids = shapes.skewed_ids(seed, steps, num, num_ids, drift=10, ragged=True)
    ids[:, 0] = np.resize([-1, num_ids, oracles.NO_ID, 2**31 - 2], steps)
    return ids, shapes.dyadic(seed, (steps, num, dim))


# --- against the model, bit for bit


class Case(NamedTuple):
    """A stack of 120 rows; `policy` is None without a cache."""

    storage: str
    dim: int
    policy: str | None = "lfu"
    lines: int = 24
    ways: int = 8
    budget: int | None = None  # of unique ids
    rounding: str = "stochastic"


MODELS = {
    "float32 with a budget": Case("float32", 33, "lru", ways=1, budget=9),
    "bfloat16": Case("bfloat16", 7),
    "bfloat16 to nearest": Case("bfloat16", 7, rounding="nearest"),
    "float16": Case("float16", 33, ways=2),
    "float8_e4m3fn": Case("float8_e4m3fn", 16),
    "float8_e5m2": Case("float8_e5m2", 100, "lru", ways=32),
    "int8": Case("int8", 33),
    "int8 without cache": Case("int8", 1, None, budget=9),
    "int8 to nearest": Case("int8", 33, "lru", rounding="nearest"),
    "int4 with a budget": Case("int4", 7, budget=9),
    "int4 of one line": Case("int4", 16, "lru", lines=1, ways=4, rounding="nearest"),
    "int2": Case("int2", 100),
}
QUICK = {"bfloat16", "int8 without cache", "int4 with a budget"}
CORE = {"float16", "float8_e4m3fn", "float8_e5m2", "int4 of one line", "int2"}


@pytest.mark.parametrize("case", named(MODELS, fast=QUICK, core=CORE))
def test_training_equals_a_dictionary_of_rows(case):
    """40 steps of SGD: every looked-up row, line and stored row, after flush too.

    Rows whose trip through the table is stochastic take their bits from row_bits(key, stream, step,
    id), so the line and the company of a row cannot matter. The same batches shuffled make the same
    state.
    """
    num_ids, dim, policy = 120, case.dim, case.policy or "lru"
    lines = case.lines if case.policy else None
    spec = shapes.stack(
        num_ids, dim, storage=mpembed.RowFormat(case.storage, rounding=case.rounding), lines=lines,
        ways=case.ways, policy=policy, max_unique_ids=case.budget,
    )  # fmt: skip
    state = mpembed.init(KEY, spec, SGD)
    codec = shapes.default_codec(case.storage, dim)
    key = np.asarray(state.key)

    def store(row, stream, step, row_id):
        if case.rounding == "nearest" or case.storage == "float32":
            return codec.store(row)
        bits = row_bits(
            key, getattr(random_bits, stream), np.int32(step), np.int32([row_id]), num_columns=dim
        )
        return codec.store(row, np.asarray(bits)[0])

    geo = oracles.geometry(num_ids, num_rows=lines, ways=case.ways) if lines else oracles.NO_CACHE
    model = oracles.DictEmbedding(
        np.asarray(table_rows(state)), geo, policy, store, max_unique_ids=case.budget
    )
    batches, grads = stream(dim, 40, 24, num_ids, dim)
    twin = jax.tree.map(jnp.copy, state)
    state, plans, rows = train(state, batches, grads, SGD)
    order = np.stack([np.random.default_rng(t).permutation(24) for t in range(40)])
    shuffled = np.take_along_axis(batches, order, 1), np.take_along_axis(grads, order[..., None], 1)
    jax.tree.map(np.testing.assert_array_equal, train(twin, *shuffled, SGD)[0], state)
    for t, ids in enumerate(batches):
        _, wanted = model.train(ids, grads[t], 0.25)
        got = {int(i): row for i, row in zip(plans.unique_ids[t], np.asarray(rows[t]), strict=True)}
        np.testing.assert_array_equal(got.pop(mpembed.NO_ID), np.zeros(dim))
        assert sorted(got) == sorted(wanted)
        for i, row in wanted.items():
            np.testing.assert_array_equal(got[i], row, err_msg=f"row {i} at step {t}")
    for _ in range(2):
        np.testing.assert_array_equal(table_rows(state), [model.table[i] for i in range(num_ids)])
        np.testing.assert_array_equal(all_rows(state), [model.read(i) for i in range(num_ids)])
        state = flush(state)
        model.flush()


# --- flush, read, freeze


def trained(storage="int4", *, num_ids=(70, 1, 129), dim=6, policy="lfu", steps=20):
    spec = shapes.stack(num_ids, dim, storage=storage, lines=40, ways=4, policy=policy)
    batches, grads = stream(0, steps, 24, spec.num_rows, dim)
    return train(mpembed.init(KEY, spec, SGD), batches, grads, SGD)[0]


@pytest.fixture(scope="module")
def int4_state():
    return trained()


@pytest.mark.slow
def test_flush_keeps_what_read_returns_and_writes_only_dirty_lines(int4_state):
    before = all_rows(int4_state)
    flushed = flush(int4_state)
    np.testing.assert_array_equal(all_rows(flushed), before)
    np.testing.assert_array_equal(flushed.cache.tags, int4_state.cache.tags)
    np.testing.assert_array_equal(flushed.cache.rows, int4_state.cache.rows)
    assert not np.asarray(flushed.cache.dirty).any()
    dirty_ids = np.asarray(int4_state.cache.tags)[np.asarray(int4_state.cache.dirty)]
    assert dirty_ids.size > 10
    clean = np.setdiff1d(np.arange(200), dirty_ids)
    old, new = np.asarray(int4_state.table.rows), np.asarray(flushed.table.rows)
    np.testing.assert_array_equal(new[clean], old[clean])
    stored = np.asarray(table_rows(flushed))
    gap = (
        np.abs(before).max(1, keepdims=True) / 7 * 1.01
    )  # int4 symmetric: scale <= absmax / 7, up to bfloat16
    assert (np.abs(stored - before)[dirty_ids] <= gap[dirty_ids]).all()
    again = flush(flushed)
    np.testing.assert_array_equal(again.table.rows, flushed.table.rows)


def test_freeze_is_the_flushed_table(int4_state):
    frozen = mpembed.freeze(int4_state)
    assert isinstance(frozen, mpembed.QuantizedTable)
    np.testing.assert_array_equal(frozen.rows, flush(int4_state).table.rows)
    ids = np.array([0, 199, 200, -5, mpembed.NO_ID], np.int32)
    rows = np.asarray(read_rows(frozen, jnp.asarray(ids)))
    np.testing.assert_array_equal(rows[2:], 0)


def test_read_takes_any_nest_and_gives_zeros_outside(int4_state):
    ids = {
        "a": np.array([[0, 5], [199, -1]], np.int32),
        "b": (np.int32(3), np.array([mpembed.NO_ID, 200], np.int32)),
    }
    rows = read(int4_state, ids)
    whole = all_rows(int4_state)
    np.testing.assert_array_equal(rows["a"].reshape(4, 6)[:3], whole[[0, 5, 199]])
    np.testing.assert_array_equal(rows["a"][1, 1], 0)
    np.testing.assert_array_equal(rows["b"][0], whole[3])
    np.testing.assert_array_equal(rows["b"][1], 0)
    assert rows["a"].dtype == jnp.float32


def test_lookup_casts_only_its_result(int4_state):
    state, plan = jax.jit(mpembed.prefetch)(int4_state, np.arange(24, dtype=np.int32))
    rows = mpembed.lookup(state, plan)
    np.testing.assert_array_equal(
        mpembed.lookup(state, plan, dtype=jnp.bfloat16), rows.astype(jnp.bfloat16)
    )


def test_the_same_state_makes_the_same_next_state():
    batches, grads = stream(0, 20, 24, 200, 6)
    first, second = (jax.device_get(trained()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    spec = first.spec
    other = train(mpembed.init(jax.random.key(8), spec, SGD), batches, grads, SGD)[0]
    assert not np.array_equal(other.table.rows, first.table.rows)
    raw = mpembed.init(jax.random.PRNGKey(7), spec, SGD)
    np.testing.assert_array_equal(raw.table.rows, mpembed.init(KEY, spec, SGD).table.rows)


# --- dense tables in and out


@pytest.mark.parametrize("storage", named(["float32", "int8"], fast={"int8"}))
def test_to_dense_is_read_of_all_ids(storage):
    state = trained(storage)
    dense = mpembed.to_dense(state)
    assert {name: x.shape for name, x in dense.items()} == {
        "table0": (70, 6),
        "table1": (1, 6),
        "table2": (129, 6),
    }
    np.testing.assert_array_equal(np.concatenate(list(dense.values())), all_rows(state))
    np.testing.assert_array_equal(mpembed.to_dense(state, ["table2"])["table2"], dense["table2"])


def test_float32_tables_survive_from_dense_to_dense():
    state = trained("float32")
    dense = mpembed.to_dense(state)
    back = mpembed.from_dense(KEY, state.spec, SGD, dense)
    jax.tree.map(np.testing.assert_array_equal, mpembed.to_dense(back), dense)
    assert int(back.step) == 0
    assert (np.asarray(back.cache.tags) == mpembed.NO_ID).all()


def test_from_dense_rounds_each_row_with_its_own_bits_and_reads_memory_maps(tmp_path):
    """150,003 rows, more than a block.

    Nearest rounding equals the codec. Stochastic rounding stays within a gap and is unbiased.
    Memory maps give the same table.
    """
    x = np.random.default_rng(0).standard_normal((150_003, 3)).astype(np.float32)
    spec = shapes.stack((5, len(x)), 3, storage=mpembed.RowFormat("int4"), lines=64)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[:] = x
    first = np.full((5, 3), 7.0)  # seven steps of 1.0
    state = mpembed.from_dense(KEY, spec, SGD, {"table0": first, "table1": mapped})
    same = mpembed.from_dense(KEY, spec, SGD, {"table1": x, "table0": first})
    np.testing.assert_array_equal(state.table.rows, same.table.rows)
    got = mpembed.to_dense(state)
    np.testing.assert_array_equal(got["table0"], 7.0)
    gap = np.abs(x).max(1, keepdims=True) / 7 * 1.01
    error = got["table1"] - x
    assert (np.abs(error) <= gap).all()
    assert abs((error / gap).mean()) < 5 * 0.5 / np.sqrt(error.size)
    near = dataclasses.replace(spec, storage=mpembed.RowFormat("int4", rounding="nearest"))
    packed = np.asarray(
        mpembed.from_dense(KEY, near, SGD, {"table0": first, "table1": x}).table.rows
    )
    codec = row_oracle.Codec("int4", True, "bfloat16")
    for i in (0, 65_535, 65_536, 131_072, 150_002):
        np.testing.assert_array_equal(packed[5 + i], codec.encode(x[i]))


def test_init_does_not_depend_on_the_cache_or_its_implementation():
    spec = shapes.stack((5, 30), 6, storage="int8", lines=8)
    states = [mpembed.init(KEY, s, SGD) for s in (spec, dataclasses.replace(spec, cache=None))]
    states.append(mpembed.init(KEY, spec, SGD, implementation="xla"))
    for state in states:
        np.testing.assert_array_equal(state.table.rows, states[0].table.rows)


# --- ids


def test_a_budget_above_the_batch_is_no_budget():
    state = mpembed.init(KEY, shapes.stack(50, 3, lines=8, max_unique_ids=1000), SGD)
    _, plan = jax.jit(mpembed.prefetch)(state, np.arange(10, dtype=np.int32))
    assert int(plan.counts.unique) == 10


def test_nested_ids_keep_their_nesting(int4_state):
    ids = {
        "a": np.array([[1, 2], [2, 150]], np.int32),
        "b": [np.array([199, 1, mpembed.NO_ID], np.int32)],
    }
    _, plan = jax.jit(mpembed.prefetch)(int4_state, ids)
    unique = np.asarray(plan.unique_ids)
    jax.tree.map(lambda i, x: np.testing.assert_array_equal(unique[i], x), plan.inverse, ids)
    assert unique.shape == (7 + 1,)


def test_counters_pass_the_limits_of_32_bits():
    """Each counter starts 10 below a limit of 31, 32, 34 or 53 bits.

    What 20 steps add must arrive, no more, no less.
    """
    state = mpembed.init(KEY, shapes.stack(200, 2, lines=150, ways=4, policy="lru"), SGD)
    begin = np.resize(
        [2**31 - 10, 2**32 - 10, 5 * 2**32 - 10, 2**53 - 10], len(oracles.COUNTS)
    ).astype(np.uint64)
    begin[[oracles.COUNTS.index("dropped"), oracles.COUNTS.index("bypasses")]] = (
        0  # these would warn
    )
    words = np.zeros(state.counters.shape, np.uint32)
    words[: len(begin)] = np.stack([begin & 0xFFFFFFFF, begin >> 32], 1)
    state = training.with_history(state, counters=words)
    batches, grads = stream(1, 20, 24, 200, 2)
    state, plans, _ = train(state, batches, grads, SGD)
    stats = mpembed.stats(state)
    for name, start in zip(oracles.COUNTS, begin.tolist(), strict=True):
        assert getattr(stats, name) == start + int(np.sum(getattr(plans.counts, name))), name
        assert isinstance(getattr(stats, name), int)
    assert stats.requests > begin[0] + 10
    assert stats.hits > begin[2] + 10


# --- rows that do not move


class Frozen(NamedTuple):
    """A transformation and a gradient that give updates of zero."""

    tx: optax.GradientTransformation
    gradient: int
    implementation: str


ZEROS = optax.set_to_zero()
FROZEN = {
    "set_to_zero": Frozen(ZEROS, 1, "numba"),
    "set_to_zero, full width": Frozen(ZEROS, 1, "xla"),
    "set_to_zero, kernels": Frozen(ZEROS, 1, "pallas_interpret"),
    "rate zero": Frozen(mpembed.optim.sgd(0.0), 1, "xla_chunked"),
    "no gradient": Frozen(mpembed.optim.rowwise_adagrad(0.1), 0, "pallas_interpret"),
    "no gradient, no momentum": Frozen(optax.adam(0.1), 0, "numba"),
    "masked": Frozen(optax.masked(ZEROS, True), 1, "numba"),
    "labels": Frozen(optax.multi_transform({"frozen": ZEROS}, "frozen"), 1, "numba"),
    "mixing rows": Frozen(
        optax.chain(optax.normalize_by_update_norm(), optax.scale(0.0)), 1, "numba"
    ),
}


@pytest.mark.parametrize(
    "case",
    named(
        FROZEN,
        fast={"set_to_zero", "rate zero"},
        core={"set_to_zero, kernels", "no gradient", "masked", "mixing rows"},
        marks={"no gradient, no momentum": training.OPTAX_ADAM},
    ),
)
def test_a_row_whose_update_is_zero_keeps_its_bits(case):
    """Every visit of INT8 rows, in lines and in the table, leaves the flushed table as it was."""
    spec = shapes.stack(200, 8, storage="int8", lines=24, ways=8)
    state = mpembed.init(KEY, spec, case.tx, implementation=case.implementation)
    before = np.array(state.table.rows)
    batches = np.stack([np.random.default_rng(t).permutation(200)[:60] for t in range(4)])
    batches[:, 0] = mpembed.NO_ID
    grads = np.full((4, 60, 8), case.gradient, np.float32)
    state, plans, _ = train(state, batches.astype(np.int32), grads, case.tx)
    counts = plans.counts
    assert int(counts.bypasses.sum()) > 20
    assert int(counts.evictions.sum()) > 5
    assert int(counts.write_backs.sum()) == 0
    np.testing.assert_array_equal(flush(state).table.rows, before)


@pytest.mark.slow
@pytest.mark.parametrize("storage", named(shapes.FORMATS, fast={"bfloat16"}, core=()))
def test_rows_that_move_do_so_beside_rows_that_do_not(storage):
    """Even ids have no gradient and keep their bits. Every implementation makes the same state.

    The whole command has each implementation here, and rows of each format in a dictionary.
    """
    others = ("xla_chunked", "numba", "pallas_interpret")
    other = others[shapes.FORMATS.index(storage) % 3]
    tx = mpembed.optim.sgd(0.5)
    spec = shapes.stack(60, 7, storage=storage, lines=16, ways=8, policy="lru")
    ids = np.random.default_rng(0).permutation(60).astype(np.int32)[None]
    grads = np.where(ids[..., None] % 2 == 0, np.float32(0), shapes.dyadic(0, (1, 60, 7)))
    states = [mpembed.init(KEY, spec, tx, implementation=name) for name in ("xla", other)]
    before = np.array(states[0].table.rows)
    one, two = (jax.device_get(train(state, ids, grads, tx)[0]) for state in states)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(two))
    is_even = np.arange(60) % 2 == 0
    is_other = (np.asarray(flush(one).table.rows) != before).any(axis=1)
    assert not is_other[is_even].any()
    assert is_other[~is_even].mean() > 0.9
    held = one.cache.tags[one.cache.dirty]
    assert held.size and (held % 2 == 1).all()


class Unhashable:
    """A callable object that is equal to others, and therefore has no hash."""

    __hash__ = None

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["functions", "callable objects", "an initializer"])
def test_a_second_state_of_a_stack_is_made_by_the_program_of_the_first(kind):
    """Another key and another implementation; a transformation without a hash is compiled again.

    So is an initializer: what it returns may have changed.
    """
    spec, tx = shapes.stack(61, 4, storage="int8", lines=8, ways=4), optax.sgd(0.125)
    if kind == "callable objects":
        tx = optax.GradientTransformation(*map(Unhashable, tx))
    if kind == "an initializer":
        table = mpembed.TableSpec("table0", 61, initializer=jax.nn.initializers.normal(0.5))
        assert dataclasses.replace(spec, tables=(table,)) == spec
        mpembed.init(jax.random.key(0), spec, tx)
        spec = dataclasses.replace(spec, tables=(table,))
    compiled = []

    def listen(event, seconds, **kwargs):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    states = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed, implementation in ((0, "xla"), (0, "xla_chunked"), (1, "xla")):
            key = jax.block_until_ready(jax.random.key(seed))
            compiled.clear()
            states.append(mpembed.init(key, spec, tx, implementation=implementation))
            assert bool(compiled) == (len(states) == 1 or kind != "functions")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [s.implementation for s in states] == ["xla", "xla_chunked", "xla"]
    first, second, other = (np.asarray(state.table.rows) for state in states)
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert states[0].spec.tables[0].initializer is spec.tables[0].initializer
