"""Large arrays of a CPU on huge pages, and the values that they keep."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpembed_jax as mpembed
from mpembed_jax import EmbeddingSpec, TableSpec, checkpoint, optim
from mpembed_jax.arrays import huge_pages
from mpembed_jax.sharding import relayout

NUM_ROWS, DIM = 1 << 19, 16  # 10 MiB of INT8 rows
TX = optim.rowwise_adagrad(0.1)


def asks_for_huge_pages(array):
    """Whether the kernel was asked for huge pages in the mapping of an array's middle.

    How many it gives depends on how fragmented its memory is at that moment.
    """
    address = array.unsafe_buffer_pointer() + array.nbytes // 2
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_inside = int(found[1], 16) <= address < int(found[2], 16)
        elif is_inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.fixture(scope="module")
def spec():
    return EmbeddingSpec([TableSpec("t", NUM_ROWS)], DIM, cache=None)


@pytest.fixture(scope="module")
def made(spec):
    return mpembed.init(jax.random.key(0), spec, TX)


def kernel_says_what_it_was_asked():
    if sys.platform != "linux" or not Path("/proc/self/smaps").exists():
        return False
    array = jnp.ones(16 << 20, jnp.uint8)
    huge_pages.place(array)
    return asks_for_huge_pages(array)


@pytest.mark.skipif(not kernel_says_what_it_was_asked(), reason="this kernel has no huge pages")
@pytest.mark.parametrize("way", ["init", "from_dense", "restore", "relayout"])
def test_tables_of_every_new_state_are_on_huge_pages(spec, made, way, tmp_path):
    state = made
    if way == "from_dense":
        dense = {"t": np.zeros((NUM_ROWS, DIM), np.float32)}
        state = mpembed.from_dense(jax.random.key(0), spec, TX, dense)
    elif way == "restore":
        checkpoint.save(tmp_path, 1, state)
        state = checkpoint.restore(tmp_path, state)
    elif way == "relayout":
        state = relayout(state)
    assert asks_for_huge_pages(state.table.rows)


def test_it_can_be_turned_off(made, monkeypatch):
    (table,) = huge_pages.candidates(made) if sys.platform == "linux" else (made.table.rows,)
    assert table.unsafe_buffer_pointer() == made.table.rows.unsafe_buffer_pointer()
    monkeypatch.setenv("MPEMBED_JAX_HUGE_PAGES", "0")
    assert not list(huge_pages.candidates(made))


def test_abstract_and_traced_states_are_left_alone(spec, made):
    abstract = jax.eval_shape(lambda key: mpembed.init(key, spec, TX), jax.random.key(0))
    assert abstract.table.rows.shape[0] == NUM_ROWS
    jitted = jax.jit(lambda key: mpembed.init(key, spec, TX))(jax.random.key(0))
    np.testing.assert_array_equal(jitted.table.rows, made.table.rows)


def test_a_table_that_does_not_fit_is_an_error():
    """It ended the process: an array that could not be made was asked for its address."""
    spec = EmbeddingSpec([TableSpec("t", 2**31 - 2)], 1 << 16, "float32", cache=None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        mpembed.init(jax.random.key(0), spec, TX, implementation="xla")
