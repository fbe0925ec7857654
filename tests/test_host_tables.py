"""Tables in host memory: the same verbs, the same bits, and nothing but the table changes its place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes

import mpembed_jax as mpembed

pytestmark = pytest.mark.usefixtures("strict_promotion")
CASES = {
    "int8 cached": ("int8", 24, mpembed.optim.rowwise_adagrad(0.1)),
    "int4 without cache": ("int4", None, optax.sgd(0.25)),
    "float32 momentum": ("float32", 24, optax.sgd(0.25, momentum=0.5)),
}


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@partial(jax.jit, static_argnames="tx", donate_argnames="state")
def train_step(state, ids, upstream, tx):
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    vectors, pull_back = jax.vjp(lambda rows: mpembed.pool(rows, plan.inverse), rows)
    return mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx), vectors


@pytest.mark.parametrize("case", CASES)
def test_a_table_in_host_memory_trains_to_the_same_bits(case):
    """Six steps, then flush and read; arrays stay where they are, buffers are reused."""
    storage, lines, tx = CASES[case]
    batches = shapes.skewed_ids(3, 3, 40, 150, drift=1, ragged=True)
    grads = shapes.dyadic(3, (3, 40, 6))
    results = []
    for memory_kind in (None, "pinned_host"):
        spec = mpembed.EmbeddingSpec(
            [mpembed.TableSpec("a", 120), mpembed.TableSpec("b", 30, jax.nn.initializers.normal(0.1))],
            6,
            storage,
            None if lines is None else mpembed.CacheSpec(num_rows=lines, ways=4),
            memory_kind=memory_kind,
        )
        state = mpembed.init(jax.random.key(0), spec, tx)
        home = kinds(state.table)
        for ids, upstream in 2 * [*zip(batches, grads, strict=True)]:
            before = state
            state, vectors = train_step(state, ids, upstream, tx)
            assert before.table.rows.is_deleted()
        flushed = jax.jit(mpembed.flush)(state)
        assert kinds(state.table) == kinds(flushed.table) == home == {memory_kind or "device"}
        assert kinds((state.cache, state.key, state.counters)) == {"device"}
        wide = [leaf for leaf in jax.tree.leaves(state.row_state) if leaf.ndim > 1]
        assert kinds(wide) == ({memory_kind or "device"} if wide else set())
        read = jax.jit(mpembed.read)(state, jnp.arange(-1, 151, dtype=jnp.int32))
        dense = mpembed.to_dense(flushed)
        results.append(jax.device_get((jax.tree.leaves(flushed), vectors, read, dense)))
        assert read.sharding.memory_kind == "device"
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert (
        spec.fingerprint.tolist()
        == mpembed.EmbeddingSpec(spec.tables, 6, storage, spec.cache, memory_kind=None).fingerprint.tolist()
    )


def test_tables_loaded_from_dense_arrays_go_to_host_memory_too():
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 50)], 4, "float32", None, memory_kind="pinned_host")
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    state = mpembed.from_dense(jax.random.key(0), spec, optax.sgd(0.1), {"t": rows})
    assert kinds(state.table) == {"pinned_host"}
    np.testing.assert_array_equal(mpembed.to_dense(state)["t"], rows)


def test_other_memory_kinds_are_refused():
    with pytest.raises(ValueError, match="memory_kind must be None"):
        mpembed.EmbeddingSpec([mpembed.TableSpec("t", 50)], 4, memory_kind="vram")
