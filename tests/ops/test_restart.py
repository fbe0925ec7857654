"""Rows that start again: numba and kernels give the reference's bits in tables, state and cache."""

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

import mpembed_jax as mpembed
from mpembed_jax import ops, optim
from mpembed_jax.cache import residency
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


def used(kept):
    """Returns a state of raw ids whose rows, lines and optimizer state hold anything."""
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("a")],
        kept.dim,
        kept.storage,
        kept.lines and mpembed.CacheSpec(num_rows=kept.lines, ways=4),
        vocabulary=mpembed.VocabularySpec(ROWS, admit_after=1, ways=4),
        row_state_dtype=kept.state,
    )
    state = mpembed.init(jax.random.key(3), spec, kept.tx, implementation="xla")
    rng = np.random.default_rng(0)

    def anything(array):
        return jnp.asarray(rng.integers(1, 100, array.shape).astype(array.dtype))

    table = dataclasses.replace(state.table, rows=anything(state.table.rows))
    cache = state.cache
    if cache is not None:
        tags = np.full(cache.tags.shape, NO_ID)
        rows = np.arange(spec.num_rows, dtype=np.int32)
        sets, first = np.unique(residency.set_of(rows, cache.geometry), return_index=True)
        tags[sets, 1] = rows[first]
        cache = dataclasses.replace(
            cache,
            tags=jnp.asarray(tags, jnp.int32),
            **{name: anything(getattr(cache, name)) for name in ("priority", "dirty", "rows")},
        )
    row_state = jax.tree.map(anything, state.row_state)
    return dataclasses.replace(state, table=table, cache=cache, row_state=row_state)


@pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")
@pytest.mark.parametrize(
    "case",
    named(
        KEPT,
        core={
            "int4, half a block",
            "int2, no cache",
            "float32",
            "nearest",
            "state of columns and a count",
        },
    ),
)
def test_rows_that_start_again_have_the_references_bits(case):
    state = used(case)
    rows = np.random.default_rng(9).permutation(state.spec.num_rows).astype(np.int32)[:300]
    if state.cache is not None:  # some of them have lines
        assert np.isin(state.cache.tags, rows).sum() > 5
    rows = jnp.asarray(np.concatenate([rows, np.full(20, NO_ID, np.int32)]))
    bounds = np.where(np.arange(320) % 3 == 0, 0.25, 0.125)
    results = []
    for implementation in ("xla_chunked", "pallas_interpret", "numba"):
        again = jax.jit(
            partial(
                ops.start_again,
                key=state.row_key,
                bounds=jnp.asarray(bounds, jnp.float32),
                implementation=implementation,
            )
        )
        of = ops.Rows(state.table, state.row_state, state.cache)
        results.append(again(of, state.vocabulary.fresh_row_state, rows, jnp.int32(300)))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])
    values = np.abs(mpembed.table.read_rows(results[1].table, rows[:300])) / bounds[:300, None]
    for of_bound in (values[::3], values[1::3]):
        assert 0.8 < of_bound.max() <= 1.08
    if state.cache is not None:
        assert not np.isin(results[1].cache.tags, rows[:300]).any()
    untouched = np.setdiff1d(np.arange(state.spec.num_rows), rows)
    np.testing.assert_array_equal(results[1].table.rows[untouched], state.table.rows[untouched])


@pytest.mark.parametrize("implementation", ["numba", "pallas_interpret"])
@pytest.mark.parametrize("num", [0, 1, 3])
def test_only_the_named_rows_start_again(num, implementation):
    """The first ones, whatever follows them. Rows outside the table are dropped."""
    state = used(KEPT["int8"])
    rows = jnp.asarray([5, 2, ROWS * 2, 7, 1], jnp.int32)
    state = dataclasses.replace(state, implementation=implementation)
    new = jax.jit(admission.start_again)(state, rows, jnp.int32(num))
    changed = np.flatnonzero((new.table.rows != state.table.rows).any(axis=1))
    assert set(changed) <= set(np.asarray(rows[:num]).tolist())
    assert not np.isin(new.cache.tags, rows[:num]).any()
