"""What numba compiles: deduplication, planning and movements of rows.

It makes the reference's bits, in place. It is refused where numba is missing.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import named

pytest.importorskip("numba", reason="the [cpu] extra is not installed")

import shapes
import training

import mpembed_jax as mpembed
from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.nn import verbs
from mpembed_jax.ops import cpu

TX = mpembed.optim.sgd(0.1)
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@jax.jit
def plan_batches(state, batches):
    def step(state, ids):
        return training.step(state, ids, TX, lambda rows, plan: jnp.ones_like(rows))[:2]

    return jax.lax.scan(step, state, batches)


class Planned(NamedTuple):
    """A cache, and batches of `width` ids of `rows` rows."""

    rows: int
    lines: int
    ways: int
    width: int
    policy: str = "lfu"
    budget: int | None = None  # of unique ids


PLANS = {
    "small": Planned(300, 24, 4, 64),
    "lru": Planned(5000, 480, 32, 700, "lru"),
    "budget": Planned(5000, 3000, 8, 700, budget=300),
    "one way": Planned(5000, 64, 1, 700, "lru", budget=40),
    "more sets than election buckets": Planned(70_000, 60_000, 1, 80),
    "more sets than election buckets, lru": Planned(70_000, 60_000, 1, 80, "lru"),
    "one line": Planned(10, 1, 1, 3, budget=1),
}


@pytest.mark.parametrize(
    "case",
    named(
        PLANS,
        fast={"budget"},
        core={"more sets than election buckets"},
    ),
)
def test_plans_and_states_equal_the_references(case):
    """Skewed ids with drift, uniform ones, padding and ids out of range.

    LFU's counts are halved on the way. In the whole command, both policies and caches of one line
    are planned as brute force plans them, in tests/cache.
    """
    rng = np.random.default_rng(0)
    rows, width = case.rows, case.width
    batches = shapes.skewed_ids(1, 24, width, rows, exponent=1.05, drift=rows // 50).astype(
        np.int32
    )
    batches[::5] = rng.integers(-2, rows + 2, batches[::5].shape)
    batches[rng.random(batches.shape) < 0.1] = mpembed.NO_ID
    batches[7] = mpembed.NO_ID
    results = []
    for implementation in ("xla", "numba"):
        spec = mpembed.EmbeddingSpec(
            [mpembed.TableSpec("a", rows)], 2, "int8",
            mpembed.CacheSpec(num_rows=case.lines, ways=case.ways, policy=case.policy),
            max_unique_ids=case.budget,
        )  # fmt: skip
        state = mpembed.init(jax.random.key(0), spec, TX, implementation=implementation)
        state, plans = plan_batches(state, batches)
        results.append(
            jax.device_get((jax.tree.leaves(state.cache), state.table.rows, jax.tree.leaves(plans)))
        )
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_the_cache_is_updated_in_place():
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("a", 400_000)], 2, "int8", mpembed.CacheSpec(num_rows=200_000)
    )
    state = mpembed.init(jax.random.key(0), spec, TX, implementation="numba")
    compiled = (
        jax.jit(mpembed.prefetch, donate_argnums=0).lower(state, jnp.zeros(64, jnp.int32)).compile()
    )
    copies = [
        line
        for line in compiled.as_text().splitlines()
        if " copy(" in line and "[200000]" in line.replace(",32", "")
    ]
    assert not copies
    assert compiled.memory_analysis().temp_size_in_bytes < 100_000


def test_without_numba_it_is_not_chosen_and_refused_by_name(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "numba" else find(name, *rest),
    )
    assert ops.choose(None) == "xla_chunked"
    with pytest.raises(ValueError, match=r'"numba" cannot be used: .* not installed .pip install'):
        ops.choose("numba")


@pytest.mark.parametrize("version", ["0.61.2", "0.8"])
def test_a_numba_that_is_too_old_is_warned_of_and_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.warns(UserWarning, match=rf"numba {version} is installed, but .* slower code"):
        assert ops.choose(None) == "xla_chunked"
    with pytest.raises(ValueError, match=f"numba {version} is installed, but"):
        ops.choose("numba")


def test_a_numba_with_other_private_names_is_warned_of_and_refused_by_name(monkeypatch):
    """Machine code is kept by names that numba does not promise."""
    text = ops.numba_package.source_of_codegen()
    assert "unserialize_library" in text
    other = text.replace("unserialize_library", "load_library")
    monkeypatch.setattr(ops.numba_package, "source_of_codegen", lambda: other)
    with pytest.warns(UserWarning, match=r"has no unserialize_library.* slower code"):
        assert ops.choose(None) == "xla_chunked"
    with pytest.raises(ValueError, match=r"cannot be used: numba .* has no unserialize_library"):
        ops.choose("numba")


def test_the_oldest_numba_is_the_lower_bound_of_the_package():
    bounds = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert bounds["cpu"] == [f"numba>={ops.numba_package.OLDEST}"]
    assert ops.numba_package.why_not() is None


class Size(NamedTuple):
    """A number of indices, and the array [rows, dim] that they point into."""

    num: int
    rows: int
    dim: int


@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
@pytest.mark.parametrize(
    "size", named([Size(700, 900, 16), Size(1, 3, 5), Size(0, 4, 2), Size(40, 40, 1)])
)
def test_put_equals_a_scatter_and_drops_what_lies_outside(dtype, size):
    num, rows, dim = size
    rng = np.random.default_rng(num)
    array, values = (rng.integers(0, 1 << 20, (n, dim)).astype(dtype) for n in (rows, num))
    index = rng.permutation(rows)[:num].astype(np.int32)
    index[::7] = np.resize([-1, rows, -rows, 2**31 - 1, -(2**31)], len(index[::7]))
    wanted = indexing.put(jnp.asarray(array), jnp.asarray(index), jnp.asarray(values))
    found = jax.jit(cpu.rows.put, donate_argnums=0)(
        jnp.asarray(array), jnp.asarray(index), jnp.asarray(values)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
@pytest.mark.parametrize(
    "size",
    named([
        Size(700, 900, 16), Size(1, 3, 5), Size(0, 4, 2), Size(40, 1, 1), Size(53_000, 900, 64),
        Size(50_000, 300, 65),
    ]),
)  # fmt: skip
def test_take_equals_a_gather_with_zeros_outside(dtype, size):
    """The last two are past 12 MiB.

    The first of them is written past the caches, the other is not aligned for it.
    """
    num, rows, dim = size
    rng = np.random.default_rng(num)
    array = rng.integers(1, 1 << 20, (rows, dim)).astype(dtype)
    index = rng.integers(0, rows, num).astype(np.int32)
    index[::7] = np.resize([-1, rows, -rows, 2**31 - 1, -(2**31)], len(index[::7]))
    found = jax.jit(cpu.rows.take)(jnp.asarray(array), jnp.asarray(index))
    is_inside = (index >= 0) & (index < rows)
    np.testing.assert_array_equal(
        found, np.where(is_inside[:, None], array[np.where(is_inside, index, 0)], 0)
    )


@pytest.mark.exhaustive
def test_batches_of_whole_lives_are_lives_one_after_another():
    """vmap over keys and batches equals one after another.

    This holds for init, three steps, flush and read, bit for bit. One state may serve many batches.
    The whole command has steps under vmap in tests/embedding/test_vectors.py, and the verbs and
    `read` in tests/documents/test_contexts.py.
    """
    spec = shapes.stack(300, 32, storage="int8", lines=32, ways=4)
    ids = np.random.default_rng(0).integers(0, 300, (2, 3, 40)).astype(np.int32)
    grads = shapes.dyadic(1, (2, 3, 40, 32))

    def life(key, ids, grads):
        def step(state, batch):
            state, plan = mpembed.prefetch(state, batch[0])
            rows = mpembed.lookup(state, plan)
            pool = partial(mpembed.pool, inverse=plan.inverse, implementation="numba")
            vectors, pull_back = jax.vjp(pool, rows)
            row_grads = pull_back(batch[1])[0]
            return mpembed.apply_gradients(state, plan, rows, row_grads, tx=TX), (
                vectors,
                plan.counts,
            )

        state = mpembed.init(key, spec, TX, implementation="numba")
        state, seen = jax.lax.scan(step, state, (ids, grads))
        return state, seen, mpembed.flush(state), mpembed.read(state, ids)

    keys = jax.random.split(jax.random.key(0), 2)
    many = jax.device_get(jax.jit(jax.vmap(life))(keys, ids, grads))
    for number in range(2):
        one = jax.device_get(jax.jit(life)(keys[number], ids[number], grads[number]))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[number], b), many, one)  # noqa: B023
    state, (_, counts), _, rows = one
    assert counts.write_backs.sum() > 5
    assert counts.bypasses.sum() > 5
    shared = jax.jit(jax.vmap(lambda ids: mpembed.lookup(*mpembed.prefetch(state, ids))))(ids[1])
    assert shared.shape == (3, 41, 32)
    np.testing.assert_array_equal(jax.vmap(partial(mpembed.read, state))(ids[1]), rows)


@pytest.mark.parametrize("combiner", [None, "mean"])
def test_pooling_by_foreign_calls_equals_xlas_with_its_derivatives_and_batches(combiner):
    """First and second derivative, a batch of index arrays, one of rows.

    An index outside takes the nearest row.
    """
    rng = np.random.default_rng(3)
    rows = jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)
    index = jnp.asarray(rng.integers(-2, 42, (3, 5, 4)), jnp.int32)
    if combiner:
        index = jnp.clip(index, 0, 39)

    def results(implementation):
        def loss(rows, index):
            return jnp.sum(
                jnp.sin(mpembed.pool(rows, index, combiner=combiner, implementation=implementation))
            )

        def squared(rows):
            return jnp.sum(jax.grad(loss)(rows, index) ** 2)

        by_index = jax.vmap(jax.value_and_grad(loss), (None, 0))(rows, index)
        by_rows = jax.vmap(loss, (0, None))(jnp.stack([rows, 2 * rows]), index)
        return (
            loss(rows, index),
            jax.grad(loss)(rows, index),
            jax.grad(squared)(rows),
            by_index,
            by_rows,
        )

    native_results, plain = (
        jax.jit(results, static_argnums=0)("numba"),
        jax.jit(results, static_argnums=0)("xla"),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), native_results, plain
    )


@pytest.mark.parametrize(
    "dtype", named(["int8", "uint8", "int16", "uint16", "uint32"], fast={"int8", "uint32"})
)
def test_indices_of_other_dtypes_are_pooled_right(dtype):
    """The foreign call reads int32: others go to XLA."""
    rows = jnp.arange(80, dtype=jnp.float32).reshape(40, 2)
    index, segments = np.asarray([3, 1, 4, 1, 5, 9], dtype), np.asarray([0, 0, 1, 1, 2, 2], dtype)
    np.testing.assert_array_equal(
        mpembed.pool(rows, index, implementation="numba"), rows[index.astype(np.int32)]
    )
    pool = partial(
        mpembed.pool,
        rows,
        index.astype(np.int32),
        None,
        "mean",
        num_segments=3,
        implementation="numba",
    )
    bags = [pool(segment_ids=jnp.asarray(s)) for s in (segments, segments.astype(np.int32))]
    np.testing.assert_array_equal(*bags)


def test_over_a_mesh_xla_pools():
    rows, index = jnp.ones((4, 2)), jnp.zeros(3, jnp.int32)
    mesh, whole = (
        jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]),
        jax.sharding.PartitionSpec(),
    )

    def pool(rows):
        return mpembed.pool(rows, index, implementation="numba")

    assert "mpembed_take" in jax.jit(pool).lower(rows).as_text()
    over_mesh = jax.shard_map(pool, mesh=mesh, in_specs=whole, out_specs=whole)
    assert "mpembed_take" not in jax.jit(over_mesh).lower(rows).as_text()


@pytest.mark.slow
def test_lookup_and_pool_are_foreign_calls_and_evaluation_is_not():
    """Evaluation stays plain XLA: jax.export takes no foreign call."""
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("a", 500)], 8, "int8", mpembed.CacheSpec(num_rows=64)
    )
    state = mpembed.init(jax.random.key(0), spec, TX, implementation="numba")
    state, plan = mpembed.prefetch(state, jnp.arange(9, dtype=jnp.int32))
    rows = mpembed.lookup(state, plan)
    pool = jax.jit(lambda rows: mpembed.pool(rows, plan.inverse, implementation="numba"))
    assert "mpembed_take" in pool.lower(rows).as_text()
    assert "mpembed_take" in jax.jit(mpembed.lookup).lower(state, plan).as_text()
    ids = jnp.arange(9, dtype=jnp.int32)

    def evaluate(state, ids):
        rows, inverse, pool = verbs.read_unpooled(state, ids)
        return mpembed.read(state, ids), pool(rows, inverse)

    jax.export.export(jax.jit(evaluate))(state, ids)
    with pytest.raises(ValueError, match="mpembed_take"):
        jax.export.export(pool)(rows)


ONE_THREAD = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from mpembed_jax.ops.cpu import rows
index = jnp.arange(5000, dtype=jnp.int32)[::-1]
values = jnp.arange(5000.0)[:, None] * jnp.ones(3)
put = jax.jit(rows.put)
for _ in range(20):
    assert (put(jnp.zeros((5000, 3)), index, values) == values[::-1]).all()
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs Linux: a process on one core"
)
def test_both_halves_are_done_where_xla_has_no_thread_to_spare():
    """XLA's pool has one thread then, which may be the one that calls and waits."""
    path = os.pathsep.join(
        [str(Path(mpembed.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", ONE_THREAD],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("done\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_find_equals_the_reference_alone_and_under_vmap():
    """Known ids in any order before padding; ids that are known or not, padding, none at all."""
    rng = np.random.default_rng(0)
    for num_known, width, num_ids in ((40, 64, 300), (0, 1, 5), (64, 64, 0), (7, 8, 8)):
        known = np.full(width, mpembed.NO_ID, np.int32)
        known[:num_known] = rng.permutation(100)[:num_known]
        ids = rng.choice([*range(-3, 103), mpembed.NO_ID], num_ids).astype(np.int32)
        index, is_known = jax.jit(partial(ops.find, implementation="numba"))(known, ids)
        np.testing.assert_array_equal(is_known, np.isin(ids, known[:num_known]))
        np.testing.assert_array_equal(known[index][np.asarray(is_known)], ids[np.asarray(is_known)])
        assert (np.asarray(index)[~np.asarray(is_known)] == width - 1).all()
        for wanted, got in zip(jax.jit(ops.find)(known, ids), (index, is_known), strict=True):
            np.testing.assert_array_equal(got, wanted)
        batched = jax.vmap(partial(ops.find, implementation="numba"), (None, 0))(
            known, ids.reshape(-1, 1)
        )
        for wanted, got in zip((index, is_known), batched, strict=True):
            np.testing.assert_array_equal(got[:, 0], wanted)


def test_a_step_that_was_compiled_ahead_compiles_nothing_when_it_is_traced(monkeypatch):
    """init does so for large tables only, and only where the step runs natively."""
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("a", 50)], 4, "int8", None)
    state = mpembed.init(jax.random.key(0), spec, TX, implementation="numba")
    assert not ops.compile_ahead("numba", state.table)
    assert not ops.compile_ahead("xla", state.table, 0)
    for make in (cpu.bag_step._forward_of, cpu.bag_step._backward_of):
        make.cache_clear()  # as in a new process
    assert ops.compile_ahead("numba", state.table, state.table.nbytes)

    def refuse(name, body):
        raise AssertionError(f"{name} is compiled in the step")

    monkeypatch.setattr(cpu.call_frame, "register", refuse)
    state, plan, vectors = mpembed.embed(state, jnp.arange(8, dtype=jnp.int32), tx=TX)
    state = mpembed.apply_pooled_gradients(state, plan, vectors, tx=TX)
    assert int(state.step) == 1
