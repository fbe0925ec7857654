"""Rows that start again: numba gives the bits of the reference in tables, state and cache."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import named

pytest.importorskip("numba", reason="the [cpu] extra is not installed")

import training

import mpembed_jax as mpembed
from mpembed_jax import ops, optim
from mpembed_jax.embedding import admission
from mpembed_jax.row_ids import NO_ID

ROWS = 700


class Kept(NamedTuple):
    """How rows are kept: format, dim, lines of the cache, and the transformation."""

    storage: object
    dim: int
    lines: int | None = 96
    tx: object = optim.rowwise_adagrad(0.5)
    state: str = "float32"


KEPT = {
    "int8": Kept("int8", 16),
    "int4, half a block": Kept("int4", 12),
    "int2, no cache": Kept("int2", 5, None),
    "float32": Kept("float32", 3),
    "float16, no state": Kept("float16", 9, tx=optim.sgd(0.1)),
    "float8": Kept("float8_e4m3fn", 8),
    "nearest": Kept(mpembed.RowFormat("int8", rounding="nearest"), 17),
    "state of columns and a count": Kept("int8", 10, tx=optax.adam(0.1)),
    "narrow state": Kept("int4", 8, state="bfloat16"),
}


def trained(kept):
    """Returns a state of raw ids whose rows, lines and optimizer state have all moved."""
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("a")],
        kept.dim,
        kept.storage,
        kept.lines and mpembed.CacheSpec(num_rows=kept.lines, ways=4),
        vocabulary=mpembed.VocabularySpec(ROWS, admit_after=1, ways=4),
        row_state_dtype=kept.state,
    )
    state = mpembed.init(jax.random.key(3), spec, kept.tx, implementation="xla")

    def gradient(rows, plan):
        return jnp.cos(jnp.arange(rows.size, dtype=jnp.float32).reshape(rows.shape)) * (rows + 1)

    for seed in range(3):
        ids = np.random.default_rng(seed).zipf(1.1, 400).clip(max=3000)
        state = training.step(state, spec.raw_ids({"a": ids}), kept.tx, gradient).state
    return state


@pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")
@pytest.mark.parametrize("case", named(KEPT, fast={"int4, half a block"}))
def test_rows_that_start_again_have_the_references_bits(case):
    state = trained(case)
    rows = np.random.default_rng(9).permutation(state.spec.num_rows).astype(np.int32)[:300]
    if state.cache is not None:  # some of them have lines
        assert np.isin(state.cache.tags, rows).sum() > 10
    rows = jnp.asarray(np.concatenate([rows, np.full(20, NO_ID, np.int32)]))
    results = []
    for implementation in ("xla", "xla_chunked", "numba"):
        again = jax.jit(
            partial(
                ops.start_again,
                key=state.row_key,
                bound=jnp.float32(0.25),
                implementation=implementation,
            )
        )
        of = ops.Rows(state.table, state.row_state, state.cache)
        results.append(again(of, state.vocabulary.fresh_row_state, rows, jnp.int32(300)))
    jax.tree.map(np.testing.assert_array_equal, *results[:2])
    jax.tree.map(np.testing.assert_array_equal, *results[1:])
    values = mpembed.table.read_rows(results[2].table, rows[:300])
    before = mpembed.table.read_rows(state.table, rows[:300])
    assert 0.2 < np.abs(values).max() <= 0.27 and (values != before).any(axis=1).all()


@pytest.mark.parametrize("num", [0, 1, 3])
def test_only_the_named_rows_start_again(num):
    """The first ones, whatever follows them. Rows outside the table are dropped."""
    state = trained(KEPT["int8"])
    rows = jnp.asarray([5, 2, ROWS * 2, 7, 1], jnp.int32)
    native = dataclasses.replace(state, implementation="numba")
    new = jax.jit(admission.start_again)(native, rows, jnp.int32(num))
    changed = np.flatnonzero((new.table.rows != state.table.rows).any(axis=1))
    assert set(changed) <= set(np.asarray(rows[:num]).tolist())
    assert not np.isin(new.cache.tags, rows[:num]).any()
