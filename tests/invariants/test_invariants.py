"""The five invariants of DESIGN.md 5 on training streams.

The compiled step copies no table, is traced once and does not grow with the table.
"""

import dataclasses
import re
from collections import Counter
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import shapes
from cases import named
from hypothesis import given, settings
from hypothesis import strategies as st
from training import all_rows, step, train

import mpembed_jax as mpembed
from mpembed_jax import optim

KEY = jax.random.key(3)
SGD = optax.sgd(0.25)


class Optimizer(NamedTuple):
    """A row optimizer, and the settings with which NumPy computes it."""

    tx: optax.GradientTransformation
    adagrad: tuple | None  # eps, first accumulator, whether it is one per row; None for SGD


OPTIMIZERS = {
    "sgd": Optimizer(optax.sgd(0.1), None),
    "rowwise_adagrad": Optimizer(optim.rowwise_adagrad(0.1, eps=1e-3), (1e-3, 0.0, True)),
    "adagrad": Optimizer(
        optax.adagrad(0.1, initial_accumulator_value=0.1, eps=1e-6),
        (0, 0.1 + 1e-6, False),
    ),
}


# --- 1. transparency


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", named([*OPTIMIZERS, "adagrad, skipping"], fast={"sgd"}, core=())
)
def test_a_float32_cache_is_invisible(optimizer):
    """Over geometries, the table and row state of cache=None, bit for bit.

    They are those of dense float64 training within rounding. Nothing is dyadic: not even a
    contracted multiply-add may differ between programs. Gradients have feedback from their rows, so
    an early difference would grow. A row is updated at most 60 times with about five roundings of
    terms below 4, so the rounding error stays below 60 * 5 * 4 * 2^-24 = 7e-5.
    """
    optimizer, *skip = optimizer.split(", ")
    tx, adagrad = OPTIMIZERS[optimizer]
    batches = shapes.skewed_ids(0, 60, 32, 150, drift=20, ragged=True)
    grads = np.random.default_rng(0).standard_normal((60, 32, 5)).astype(np.float32) / 4
    results = []
    caches = [
        {"lines": None},
        {"lines": 24, "ways": 1, "policy": "lru"},
        {"lines": 24, "ways": 8, "policy": "lfu"},
    ]
    if skip:  # in the cheapest of all cases, once
        caches += [
            {"lines": 24, "ways": 32, "policy": "lru"},
            {"lines": 400, "ways": 2, "policy": "lfu"},
        ]
    for options in caches:
        spec = dataclasses.replace(shapes.stack(150, 5, **options), skip_nonfinite=bool(skip))
        state, *_ = train(mpembed.init(KEY, spec, tx), batches, grads, tx, 0.1)
        results.append((options, all_rows(state), jax.device_get(state.row_state)))
    _, table_only, row_state = results[0]
    for options, rows, other_row_state in results[1:]:
        np.testing.assert_array_equal(rows, table_only, err_msg=str(options))
        jax.tree.map(
            partial(np.testing.assert_array_equal, err_msg=str(options)), other_row_state, row_state
        )
    start = all_rows(mpembed.init(KEY, shapes.stack(150, 5), tx))
    wanted = oracles.dense_training(start, batches, grads, 0.1, feedback=0.1, adagrad=adagrad)
    np.testing.assert_allclose(table_only, wanted, rtol=0, atol=7e-5)
    assert np.abs(wanted - start).max() > 0.1


# --- 2. disjointness, and 4. tags where they belong


@pytest.mark.slow
@pytest.mark.parametrize("policy", shapes.POLICIES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.sampled_from([0.0, 0.6, 1.05, 2.0]),
    drift=st.sampled_from([0, 3]),
)
def test_victims_are_never_in_the_batch_and_lines_are_never_shared(policy, seed, exponent, drift):
    """24 batches of 20 ids, 16 lines; nothing here but the definitions."""
    state = first_state(policy)
    batches = shapes.skewed_ids(seed, 24, 20, 60, exponent=exponent, drift=drift)
    final, plans, _ = jax.device_get(
        train(jax.tree.map(jnp.copy, state), batches, np.zeros((24, 20, 2), np.float32), SGD)
    )
    for t, ids in enumerate(batches):
        plan = jax.tree.map(lambda x: x[t], plans)  # noqa: B023
        victims = plan.victim_ids[plan.victim_ids != mpembed.NO_ID]
        assert not set(victims) & set(ids)
        assert len(set(victims)) == len(victims)
        lines = plan.line[plan.line < 16]
        assert len(set(lines)) == len(lines)
        real = plan.unique_ids != mpembed.NO_ID
        assert set(plan.unique_ids[real]) == set(ids)
        assert real.sum() == len(set(ids))
        assert not (plan.is_hit & (plan.victim_ids != mpembed.NO_ID)).any()
    tags = final.cache.tags
    held = tags[tags != mpembed.NO_ID]
    assert len(set(held)) == len(held)
    geo = oracles.geometry(60, num_rows=16, ways=4)
    for s, ways in enumerate(tags):
        assert all(geo.set_of(int(i)) == s for i in ways if i != mpembed.NO_ID)


@cache
def first_state(policy):
    return mpembed.init(KEY, shapes.stack(60, 2, lines=16, ways=4, policy=policy), SGD)


# --- 3. position independence


@pytest.mark.parametrize("storage", named(["int8", "float8_e4m3fn"], fast={"int8"}, core=()))
def test_the_order_of_a_batch_changes_no_bit(storage):
    """Every batch shuffled: the same tables, lines and row state.

    Gradients are dyadic, so that sums do not depend on order. For every other format:
    test_training_equals_a_dictionary_of_rows.
    """
    spec = shapes.stack(150, 5, storage=storage, lines=24, ways=8)
    tx = OPTIMIZERS["rowwise_adagrad"].tx
    batches = shapes.skewed_ids(1, 40, 32, 150, drift=20, ragged=True)
    grads = shapes.dyadic(1, (40, 32, 5))
    order = np.stack([np.random.default_rng(t).permutation(32) for t in range(40)])
    shuffled = np.take_along_axis(batches, order, 1), np.take_along_axis(grads, order[..., None], 1)
    first, plans, _ = jax.device_get(train(mpembed.init(KEY, spec, tx), batches, grads, tx))
    second, *_ = jax.device_get(train(mpembed.init(KEY, spec, tx), *shuffled, tx))
    jax.tree.map(np.testing.assert_array_equal, second, first)
    assert plans.counts.write_backs.sum() > 20
    assert plans.counts.bypasses.sum() > 20


@pytest.mark.slow
def test_implementations_agree_bit_for_bit():
    """6,000 ids a batch, several chunks wide.

    Full-width passes, chunked loops and compiled planning make the same state.
    """
    tx = OPTIMIZERS["rowwise_adagrad"].tx
    batches = shapes.skewed_ids(2, 6, 6000, 30_000, exponent=0.8, drift=2)
    grads = shapes.dyadic(2, (6, 6000, 4))
    spec = shapes.stack(30_000, 4, storage="int8", lines=2500, ways=8)
    results = []
    for implementation in (
        "xla",
        "xla_chunked",
        "numba",
    ):  # kernels: test_gpu_kernels; numba: test_native
        state, plans, _ = train(
            mpembed.init(KEY, spec, tx, implementation=implementation), batches, grads, tx
        )
        results.append(jax.device_get((jax.tree.leaves(state), plans.counts)))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])
    assert results[0][1].write_backs.sum() > 100


@pytest.mark.slow
def test_a_row_is_rounded_alike_in_any_company_and_place():
    """Row 5, trained in an int4 table.

    Alone, or among others, in another position and another batch size.
    """
    spec = shapes.stack(64, 8, storage="int4")
    wanted = None
    for ids in ([5], [63, 1, 5, 2], list(range(40, 0, -1))):
        batch = np.asarray([ids], np.int32)
        grads = np.broadcast_to(shapes.dyadic(4, (8,)), (1, len(ids), 8))
        state, *_ = train(mpembed.init(KEY, spec, SGD), batch, grads, SGD)
        row = np.asarray(state.table.rows)[5]
        wanted = row if wanted is None else wanted
        np.testing.assert_array_equal(row, wanted)


# --- 5. clean lines


@pytest.mark.slow
@pytest.mark.parametrize("policy", named(shapes.POLICIES, fast={"lfu"}, core=()))
def test_clean_lines_are_never_written_back(policy):
    """Loads and evictions leave no trace.

    int2 rows re-encode to other bits, so a single needless write would show. The first turn is
    without training, the second one after training and a flush.
    """
    spec = shapes.stack(200, 6, storage="int2", lines=24, ways=4, policy=policy)
    state = mpembed.init(KEY, spec, SGD)

    @jax.jit
    def browse(state, batches):
        return jax.lax.scan(
            lambda s, ids: (lambda s, plan: (s, plan.counts))(*mpembed.prefetch(s, ids)),
            state,
            batches,
        )

    batches = shapes.skewed_ids(5, 40, 32, 200, drift=4)
    for turn in range(2):
        seen, counts = browse(state, batches)
        assert int(counts.evictions.sum()) > 50
        assert int(counts.write_backs.sum()) == 0
        np.testing.assert_array_equal(seen.table.rows, state.table.rows)
        if turn == 0:
            trained, *_ = train(seen, batches, shapes.dyadic(5, (40, 32, 6)), SGD)
            state = jax.jit(mpembed.flush)(trained)


# --- rounding is unbiased through the verbs too


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_thousand_small_updates_of_a_bfloat16_table(cached):
    """-1e-5 a thousand times from 1.0, 4,096 elements: within 0.1 % of 0.99.

    Nearest stays at 1.0 without a cache.

    With 64 one-way lines among 256 rows that all come in every batch, a row is in the table or a
    line by turns.
    """
    start = {"table0": np.ones((256, 16), np.float32)}
    ids = np.arange(256, dtype=np.int32)
    tx = optax.sgd(1.0)

    @jax.jit
    def run(state):
        def body(_, state):
            return step(state, ids, tx, lambda rows, plan: jnp.full_like(rows, 1e-5)).state

        return jax.lax.fori_loop(0, 1000, body, state)

    for rounding in ("stochastic",) if cached else ("stochastic", "nearest"):
        storage = mpembed.RowFormat("bfloat16", rounding=rounding)
        spec = shapes.stack(
            256, 16, storage=storage, lines=64 if cached else None, ways=1, policy="lru"
        )
        mean = all_rows(run(mpembed.from_dense(KEY, spec, tx, start))).mean()
        if rounding == "stochastic":
            assert abs(mean - 0.99) < 0.00099
        else:
            assert mean == 1.0


# --- the compiled step

DIM, BATCH, FEATURES = 16, 64, 3
ROWS = 400_009  # in no other shape


def compiled_spec(storage, num_rows=ROWS, lines=20_000):
    return shapes.stack((1000, 9, num_rows - 1009), DIM, storage=storage, lines=lines, ways=8)


def programs(row_tx):
    """The verbs and the whole step of DESIGN.md 4, each counting its traces."""
    traces, tx = Counter(), optax.sgd(1e-3, momentum=0.9)

    def prefetch(emb, ids):
        traces["prefetch"] += 1
        return mpembed.prefetch(emb, ids)

    def apply_gradients(emb, plan, rows, grads):
        traces["apply_gradients"] += 1
        return mpembed.apply_gradients(emb, plan, rows, grads, tx=row_tx)

    def train_step(emb, params, opt_state, batch):
        traces["train_step"] += 1
        emb, plan = mpembed.prefetch(emb, batch["ids"])
        rows = mpembed.lookup(emb, plan)

        def loss_fn(params, rows):
            vectors = mpembed.pool(rows, plan.inverse)
            logits = vectors.reshape(BATCH, -1) @ params
            return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()

        loss, (g_params, g_rows) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, rows)
        emb = mpembed.apply_gradients(emb, plan, rows, g_rows, tx=row_tx)
        updates, opt_state = tx.update(g_params, opt_state, params)
        return emb, optax.apply_updates(params, updates), opt_state, loss

    params = jnp.zeros(FEATURES * DIM)
    return (
        traces,
        params,
        tx.init(params),
        {
            "prefetch": jax.jit(prefetch, donate_argnums=0),
            "apply_gradients": jax.jit(apply_gradients, donate_argnums=0),
            "train_step": jax.jit(train_step, donate_argnames=("emb", "params", "opt_state")),
        },
    )


def batch(spec, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, t.vocabulary_size, BATCH) for t in spec.tables], 1)
    return {
        "ids": jnp.asarray(spec.global_ids(ids)),
        "label": jnp.asarray(rng.random(BATCH) < 0.5, jnp.float32),
    }


def check_compiled(compiled, num_rows):
    """No float table, no operation that makes a table-sized array.

    Temporaries are far below a table.
    """
    text = compiled.as_text()
    assert not re.search(rf"\b(f32|bf16|f16|f8\w*)\[{num_rows},", text), (
        "a float array with a row per id"
    )
    makes_table = {
        m.group(1)
        for m in re.finditer(rf"= \S*\[{num_rows}[,\]]\S* (\S+)\(", text)
        if m.group(1).split(".")[0] not in ALLOWED
    }
    assert not makes_table, "operations whose result is as large as the table"
    # Batch-sized work, 57 KB when written: 192 ids of 16 floats, 1,024 hash buckets. The smallest
    # table has 3.2 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 200_000


# Operations that pass an array on or write into it. XLA:CPU writes scatters as loops of
# dynamic-update-slice.
ALLOWED = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "fusion",
    "scatter",
}
ALLOWED |= {"dynamic-update-slice", "optimization-barrier"}


@pytest.mark.parametrize("storage", named(shapes.FORMATS, fast={"int8"}, core=()))
def test_steps_work_in_place_and_compile_once(storage):
    """prefetch, apply_gradients and the whole step; the whole command has INT8.

    From shapes alone they compile without a copy of the table. Run twice, they keep every large
    buffer where it is, consume their donated argument and do not trace again.
    """
    row_tx = OPTIMIZERS["rowwise_adagrad"].tx
    spec = compiled_spec(storage)
    abstract = jax.eval_shape(lambda: mpembed.init(KEY, spec, row_tx))
    traces, params, opt_state, jitted = programs(row_tx)
    first, second = batch(spec, 0), batch(spec, 1)
    _, plan = jax.eval_shape(mpembed.prefetch, abstract, first["ids"])
    rows = jax.eval_shape(mpembed.lookup, abstract, plan)
    arguments = {
        "prefetch": (abstract, first["ids"]),
        "apply_gradients": (abstract, plan, rows, rows),
        "train_step": (abstract, params, opt_state, first),
    }
    for name, args in arguments.items():
        check_compiled(jitted[name].lower(*args).compile(), ROWS)

    emb = mpembed.init(KEY, spec, row_tx)
    pointers = large_buffers(emb)
    assert {".table.rows", ".cache.rows", ".cache.tags", ".cache.sketch"} < set(pointers)
    assert any(name.startswith(".row_state") for name in pointers)
    for data in (first, second):
        before = emb
        emb, plan = jitted["prefetch"](emb, data["ids"])
        assert is_consumed(before)
        before = emb
        emb = jitted["apply_gradients"](
            emb, plan, np.zeros(rows.shape, np.float32), np.ones(rows.shape, np.float32)
        )
        assert is_consumed(before)
        before = emb
        emb, params, opt_state, loss = jitted["train_step"](emb, params, opt_state, data)
        assert is_consumed(before)
        assert np.isfinite(float(loss))
        assert large_buffers(emb) == pointers
    assert set(traces.values()) == {1}, traces


def is_consumed(emb):
    """Whether donation was accepted for every array.

    The flag `pending` is overwritten, so jit drops it as an argument.
    """
    kept = [k for k, x in jax.tree_util.tree_leaves_with_path(emb) if not x.is_deleted()]
    return {jax.tree_util.keystr(k) for k in kept} <= {".pending"}


def large_buffers(emb):
    """Addresses of the state's arrays of 64 KB or more, by place."""
    leaves = jax.tree_util.tree_leaves_with_path(emb)
    return {
        jax.tree_util.keystr(k): x.unsafe_buffer_pointer() for k, x in leaves if x.nbytes >= 2**16
    }


@pytest.mark.slow
def test_the_step_does_not_grow_with_the_table():
    """V = 1,000,003 against 33,762,577, from shapes.

    The same operations in the same numbers, flops and temporaries.
    """
    row_tx = OPTIMIZERS["rowwise_adagrad"].tx
    seen = []
    for num_rows in (1_000_003, 33_762_577):
        spec = compiled_spec("int8", num_rows, 50_000)
        abstract = jax.eval_shape(lambda: mpembed.init(KEY, spec, row_tx))  # noqa: B023
        _, params, opt_state, jitted = programs(row_tx)
        compiled = jitted["train_step"].lower(abstract, params, opt_state, batch(spec, 0)).compile()
        check_compiled(compiled, num_rows)
        operations = Counter(re.findall(r"= \S+ ([a-z-]+)\(", compiled.as_text()))
        seen.append(
            (
                operations,
                compiled.cost_analysis()["flops"],
                compiled.memory_analysis().temp_size_in_bytes,
            )
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["flush", "read"])
def test_flush_and_read_copy_no_table(name):
    spec = compiled_spec("int8")
    abstract = jax.eval_shape(lambda: mpembed.init(KEY, spec, SGD))
    if name == "flush":
        compiled = jax.jit(mpembed.flush, donate_argnums=0).lower(abstract).compile()
        assert (
            compiled.memory_analysis().temp_size_in_bytes < 3_000_000
        )  # blocks of 8,192 lines of 16 floats
    else:
        compiled = jax.jit(mpembed.read).lower(abstract, batch(spec, 0)["ids"]).compile()
        check_compiled(compiled, ROWS)
    assert not re.search(rf"\b(f32|bf16|f16)\[{ROWS},", compiled.as_text())


@pytest.mark.slow
def test_verbs_run_on_abstract_values_and_in_a_scan_of_scans():
    """eval_shape of a whole life, and jit(scan(..)) of it.

    Nothing concrete is asked for, no key is threaded.
    """
    spec = shapes.stack((30, 50), 4, storage="int4", lines=16, ways=4)

    def life(key):
        state = mpembed.init(key, spec, SGD)

        def body(state, ids):
            state, plan, _ = step(state, {"a": ids, "b": ids[:2]}, SGD, lambda rows, plan: rows)
            return state, plan.counts.hits

        ids = jnp.arange(24, dtype=jnp.int32).reshape(2, 3, 4)
        state, hits = jax.lax.scan(lambda s, block: jax.lax.scan(body, s, block), state, ids)
        return mpembed.read(mpembed.flush(state), ids), mpembed.freeze(state).rows, hits

    shape = jax.eval_shape(life, KEY)
    assert (shape[0].shape, shape[1].shape, shape[2].shape) == ((2, 3, 4, 4), (80, 1), (2, 3))
    rows, _, _ = jax.jit(life)(KEY)
    assert np.isfinite(np.asarray(rows)).all()
