"""Tables in host memory: the same verbs and the same bits.

Nothing but the table changes its place.
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

import mpembed_jax as mpembed
from mpembed_jax import ops
from mpembed_jax.arrays import indexing


class Case(NamedTuple):
    storage: str
    lines: int | None
    tx: optax.GradientTransformation


CASES = {
    "int8 cached": Case("int8", 24, mpembed.optim.rowwise_adagrad(0.1)),
    "int4 without cache": Case("int4", None, optax.sgd(0.25)),
    "float32 momentum": Case("float32", 24, optax.sgd(0.25, momentum=0.5)),
}


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@partial(jax.jit, static_argnames="tx", donate_argnames="state")
def train_step(state, ids, upstream, tx):
    state, plan, rows = training.step(state, ids, tx, training.of_vectors(upstream))
    return state, mpembed.pool(rows, plan.inverse)


def stack(storage, lines, memory_kind):
    tables = [
        mpembed.TableSpec("a", 120),
        mpembed.TableSpec("b", 30, jax.nn.initializers.normal(0.1)),
    ]
    cache = None if lines is None else mpembed.CacheSpec(num_rows=lines, ways=4)
    return mpembed.EmbeddingSpec(tables, 6, storage, cache, memory_kind=memory_kind)


@pytest.mark.parametrize("case", named(list(CASES), core={"int8 cached", "float32 momentum"}))
def test_a_table_in_host_memory_trains_to_the_same_bits(case):
    """Six steps, then flush and read; arrays stay where they are, buffers are reused."""
    storage, lines, tx = CASES[case]
    batches = shapes.skewed_ids(3, 3, 40, 150, drift=1, ragged=True)
    grads = shapes.dyadic(3, (3, 40, 6))
    results = []
    for memory_kind in (None, "pinned_host"):
        spec = stack(storage, lines, memory_kind)
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
    assert spec.fingerprint.tolist() == stack(storage, lines, None).fingerprint.tolist()


@pytest.mark.parametrize(
    "implementation", named(["xla", "pallas_interpret"], core={"pallas_interpret"})
)
def test_an_accelerator_moves_only_wanted_rows_and_makes_the_same_bits(implementation):
    """In chunks of rows, here of 16, over the newcomers and over the bypassed.

    No gather from host memory is wider. Kernels look up and read bypassed rows there themselves.
    Where they are named, XLA moves the other rows all the same.
    """
    tx = mpembed.optim.sgd(0.25)
    batches = shapes.skewed_ids(3, 6, 90, 150, drift=1), shapes.dyadic(3, (6, 90, 6))

    def steps(state, batches):
        return jax.lax.scan(
            lambda state, batch: train_step.__wrapped__(state, *batch, tx=tx), state, batches
        )

    results = []
    small = dataclasses.replace(ops.IMPLEMENTATIONS[implementation], host_chunk=16)
    for kind, name in ((None, None), ("pinned_host", small)):
        state = mpembed.init(jax.random.key(0), stack("int4", 24, kind), tx, implementation=name)
        traced = jax.jit(steps).trace(state, batches)
        if kind is not None:  # newcomers in half chunks, bypassed rows in whole ones
            by_xla = [8, 16] if implementation == "xla" else [8]
            assert sorted(host_gathers(traced.jaxpr.jaxpr)) == by_xla
        made = traced.lower().compile()(state, batches)
        read = jax.jit(mpembed.read)(made[0], jnp.arange(-1, 151, dtype=jnp.int32))
        assert read.sharding.memory_kind == "device"
        results.append(jax.device_get((jax.tree.leaves(made), read)))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("lines", named([24, None], core={"24"}))
def test_only_rows_that_miss_are_read_from_host_memory(lines, monkeypatch):
    """By every verb that reads, hits among the ids; row 0 stands for what a chunk does not need."""
    found = []

    def spy(array, index, fill=None):
        if indexing.is_on_host(array):
            found.extend(np.asarray(index).tolist())
        return take(array, index, fill)

    take = indexing.take
    ids = np.arange(1, 71, dtype=np.int32)
    by = dataclasses.replace(ops.IMPLEMENTATIONS["xla"], host_chunk=16)
    state = mpembed.init(
        jax.random.key(0), stack("int8", lines, "pinned_host"), optax.sgd(0.25), implementation=by
    )
    state, _ = jax.jit(mpembed.prefetch)(state, ids[:40])
    monkeypatch.setattr(indexing, "take", spy)
    with jax.disable_jit():
        state, plan = mpembed.prefetch(state, ids)
        unique, num_cached, num_ids = (np.asarray(x) for x in plan.placed)
        newcomers = unique[np.asarray(plan.counts.hits) : num_cached].tolist()
        assert sorted(x for x in found if x) == sorted(newcomers)
        found.clear()
        mpembed.lookup(state, plan)
        bypassed = unique[num_cached:num_ids].tolist()
        assert sorted(x for x in found if x) == sorted(bypassed)
        found.clear()
        mpembed.read(state, np.int32([*ids, 5, -3, mpembed.NO_ID, 150]))
    held = set() if lines is None else set(np.asarray(state.cache.tags).ravel().tolist())
    assert sorted(x for x in found if x) == sorted(x for x in [*ids.tolist(), 5] if x not in held)
    assert len(found) <= 16 * -(-len([x for x in found if x]) // 16)
    assert len(bypassed) > 20 and (lines is None or (newcomers and plan.counts.hits > 3))


def host_gathers(jaxpr):
    """Rows of the result of every gather from host memory, in a jaxpr and in those within it."""
    found = []
    for eqn in jaxpr.eqns:
        if (
            eqn.primitive is jax.lax.gather_p
            and eqn.invars[0].aval.memory_space == jax.memory.Space.Host
        ):
            found.append(eqn.outvars[0].aval.shape[0])
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += host_gathers(getattr(inner, "jaxpr", inner))
    return found


def test_the_report_says_what_is_in_host_memory():
    spec, tx = stack("int8", 24, "pinned_host"), optax.sgd(0.25, momentum=0.5)
    state = mpembed.init(jax.random.key(0), spec, tx)
    held = [
        leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.sharding.memory_kind == "pinned_host"
    ]
    report = mpembed.memory.report(spec, tx)
    assert report.host_bytes == sum(held) > report.components["table"]
    assert f"in host memory: {sum(held):,} B" in str(report)
    assert mpembed.memory.report(stack("int8", 24, None), tx).host_bytes == 0


def test_tables_loaded_from_dense_arrays_go_to_host_memory_too():
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 50)], 4, "float32", None, memory_kind="pinned_host"
    )
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    state = mpembed.from_dense(jax.random.key(0), spec, optax.sgd(0.1), {"t": rows})
    assert kinds(state.table) == {"pinned_host"}
    np.testing.assert_array_equal(mpembed.to_dense(state)["t"], rows)


def test_other_memory_kinds_are_refused():
    with pytest.raises(ValueError, match="memory_kind must be None"):
        mpembed.EmbeddingSpec([mpembed.TableSpec("t", 50)], 4, memory_kind="vram")
