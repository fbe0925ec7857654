"""Ahead-of-time compilation for GPUs this machine does not have.

There is no copy of the table, temporaries are bounded, and kernels are real.

Needs XLA's GPU compiler: pip install -e .[aot]. Runs under JAX_PLATFORMS=cpu like every other test.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import shapes
from cases import named

import mpembed_jax as mpembed
from experiments.gpu import checks, compile_gpu, targets

REASON = targets.missing_compiler()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings(
        "ignore"
    ),  # of the plugin and of Pallas' Triton back end, which is deprecated
]
BATCH, DIM = (65536, 26), 16
ADAGRAD = mpembed.optim.rowwise_adagrad(0.05)


class Program(NamedTuple):
    """A verb compiled for a GPU; of a step, whether it takes the gradients of bags."""

    target: str
    implementation: str
    verb: str = "step"
    is_pooled: bool = False


STEPS = [Program("h200", "xla"), Program("t4", "xla")]
STEPS += [
    Program(target, "pallas_triton", is_pooled=is_pooled)
    for target in ("h200", "a100", "l4")
    for is_pooled in (False, True)
]


@pytest.mark.parametrize("case", named(STEPS))
def test_a_step_copies_no_array_of_the_state_and_bounds_its_temporaries(case):
    """33.76 M rows, and 109 MB for the vectors of all positions.

    Everything temporary together is at most six times that. Where gradients are applied as they are
    summed, there is one array of that size less: at most 2.5 times.
    """
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("ids", 33_762_577)], DIM, "int8")
    step, arguments = compile_gpu.step_and_arguments(
        spec, case.implementation, BATCH, ADAGRAD, is_pooled=case.is_pooled
    )
    found = compile_gpu.figures(
        compile_gpu.compile_for(case.target, step, *arguments, donate_argnums=0), arguments[0]
    )
    assert found["state_sized_copies"] == 0
    assert found["temporary_bytes"] < (2.5 if case.is_pooled else 6) * 4 * DIM * BATCH[0] * BATCH[1]
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0]))
    assert found["aliased_bytes"] >= state_bytes - 1  # the flag `pending` leaves as a constant
    if case.implementation == "xla":
        assert found["kernels"] == 0
        return
    # halve, plan, swap, lookup, update, two for each of three running sums, and one for the sums of
    # duplicates if they are not the update's. `embed` swaps and looks up in one.
    assert found["kernels"] == (10 if case.is_pooled else 12)
    # The host never waits for the device: XLA added no loop and no branch.
    assert found["loops"] == found["branches"] == 0
    assert found["launches"] <= (60 if case.is_pooled else 66)


def test_a_step_of_raw_ids_has_no_loop_and_copies_no_array_of_the_state():
    """A pool of 33.76 M rows. Ids are admitted, and rows start again, in every step."""
    tables = [mpembed.TableSpec(f"t{k}", initial_bound=0.5 / (k + 1)) for k in range(26)]
    spec = mpembed.EmbeddingSpec(tables, DIM, "int8", vocabulary=mpembed.VocabularySpec(33_762_577))
    step, arguments = compile_gpu.step_and_arguments(
        spec, "pallas_triton", (2048, 26), ADAGRAD, is_pooled=True
    )
    compiled = compile_gpu.compile_for("h200", step, *arguments, donate_argnums=0)
    found = compile_gpu.figures(compiled, arguments[0])
    assert found["loops"] == found["branches"] == found["state_sized_copies"] == 0
    # halve uses, admit, start again, halve, plan, bring, update, six running sums
    assert found["kernels"] == 13
    assert found["launches"] <= 120
    assert found["temporary_bytes"] < 2.5 * 4 * DIM * 2048 * 26


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
def test_a_copy_of_the_state_would_be_seen(implementation):
    """A step whose state is not donated must copy what it changes."""
    spec = shapes.stack(100_000, DIM, storage="int8", lines=1024)
    step, arguments = compile_gpu.step_and_arguments(
        spec, implementation, (64, 4), mpembed.optim.rowwise_adagrad(0.05)
    )
    found = compile_gpu.figures(compile_gpu.compile_for("h200", step, *arguments), arguments[0])
    assert found["state_sized_copies"] >= 2 and found["aliased_bytes"] == 0


HOST_PROGRAMS = [Program("h200", "xla", verb) for verb in ("step", "read", "flush", "init")]
HOST_PROGRAMS += [Program("a100", "xla"), Program("t4", "xla"), Program("h200", "pallas_triton")]
HOST_PROGRAMS += [Program(target, "pallas_triton", "read") for target in ("h200", "a100", "l4")]


@pytest.mark.parametrize("case", named(HOST_PROGRAMS))
def test_a_table_in_host_memory_stays_there_and_is_worked_on_in_place(case):
    """33.76 M rows, 608 MB, in the program's host memory from beginning to end.

    The table is aliased, never on the device and never copied. Through host memory go chunks of
    packed rows alone: at most 16,384 rows of 18 bytes, of three verbs' loops. No part of the
    program is handed to the host's processor, although XLA warns that it might be. A kernel reads
    the rows themselves, without a loop and without a place for them in host memory.
    """
    tx = mpembed.optim.rowwise_adagrad(0.05)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("ids", 33_762_577)], DIM, "int8", memory_kind="pinned_host"
    )
    verb = case.verb
    function, arguments, donated = compile_gpu.host_verbs(spec, BATCH, tx, case.implementation)[
        verb
    ]
    state = compile_gpu.abstract_state(spec, case.implementation, tx)
    assert compile_gpu.is_on_host(state.table.rows)
    compiled = compile_gpu.compile_for(case.target, function, *arguments, donate_argnums=donated)
    found, table_bytes = compile_gpu.figures(compiled, state), 18 * 33_762_577
    assert found["state_sized_copies"] == 0
    assert found["host_argument_bytes"] == (0 if verb == "init" else table_bytes)
    assert found["host_aliased_bytes"] == (table_bytes if donated == 0 else 0)
    assert found["host_temporary_bytes"] < 18 * 3 * 16384 + 65536
    assert found["temporary_bytes"] < (
        6 * 4 * DIM * BATCH[0] * BATCH[1] if verb in ("step", "read") else 2**24
    )
    if verb == "read" and case.implementation == "pallas_triton":
        assert found["kernels"] == 1 and found["launches"] <= 4  # three say whether to answer NaN
        assert found["loops"] == found["host_temporary_bytes"] == 0
    if verb == "step" and case.implementation == "pallas_triton":
        assert found["loops"] <= 5  # newcomers and updates; rows are looked up by a kernel
    assert 'execution_thread="host"' not in compiled.text and "HostExecute" not in compiled.text


def test_wide_optimizer_state_is_made_in_host_memory():
    """Momentum of 16 floats for each of 10 M rows, and a float32 table.

    No array of their size on the device.
    """
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("ids", 10_000_000)], DIM, "float32", None, memory_kind="pinned_host"
    )
    function, arguments, _ = compile_gpu.host_verbs(spec, (64, 4), optax.sgd(0.1, momentum=0.9))[
        "init"
    ]
    compiled = compile_gpu.compile_for("h200", function, *arguments)
    assert compiled.sizes.host_output_size_in_bytes == 2 * 4 * DIM * 10_000_000
    assert compiled.sizes.temp_size_in_bytes < 2**24


@pytest.mark.parametrize(
    ("storage", "dim"), [("float8_e4m3fn", 7), ("int4", 100), ("int2", 64), ("bfloat16", 1)]
)
def test_kernels_of_other_formats_compile_to_machine_code(storage, dim):
    spec = shapes.stack(100_000, dim, storage=storage, lines=1024)
    for is_pooled in (False, True):
        tx = mpembed.optim.sgd(0.1)
        step, arguments = compile_gpu.step_and_arguments(
            spec, "pallas_triton", (64, 4), tx, is_pooled=is_pooled
        )
        compiled = compile_gpu.compile_for("a100", step, *arguments, donate_argnums=0)
        assert compile_gpu.figures(compiled, arguments[0])["kernels"] == (7 if is_pooled else 9)
    for target in ("h200", "a100", "l4"):
        read = compile_gpu.compile_for(
            target, mpembed.read, arguments[0], jax.ShapeDtypeStruct((64,), jnp.int32)
        )
        assert compile_gpu.figures(read, arguments[0])["kernels"] == 1


@pytest.mark.parametrize(("storage", "dim"), [("int8", 16), ("float32", 64)])
def test_what_the_benchmark_compares_compiles_with_the_table_in_host_memory(storage, dim):
    """Twelve steps in one scan, the table in host memory, momentum too.

    Nothing of their size on the device.
    """
    tx = optax.sgd(0.25, momentum=0.5) if storage == "float32" else mpembed.optim.sgd(0.25)
    small = checks.Small(storage, dim, "xla", tx, "pinned_host")
    cache = mpembed.CacheSpec(num_rows=128, ways=8)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 3_000_000)], dim, storage, cache, memory_kind="pinned_host"
    )
    state = compile_gpu.abstract_state(spec, "xla", tx)
    batches = (
        jax.ShapeDtypeStruct((12, 60, 6), jnp.int32),
        jax.ShapeDtypeStruct((12, 60, dim), jnp.float32),
    )
    compiled = compile_gpu.compile_for(
        "h200", partial(checks.Small.run.__wrapped__, small), state, *batches, donate_argnums=0
    )
    found = compile_gpu.figures(compiled, state)
    assert found["state_sized_copies"] == 0
    assert found["host_aliased_bytes"] == found["host_argument_bytes"] >= 3_000_000 * 18
    assert found["temporary_bytes"] + found["host_temporary_bytes"] < 2**24


def test_what_was_chosen_for_a_cpu_is_refused_by_the_compiler():
    """Never another program: XLA names the function that it lacks, before anything runs."""
    pytest.importorskip("numba", reason="the [cpu] extra is not installed")
    spec = shapes.stack(3000, DIM, storage="int8", lines=256)
    assert mpembed.init(jax.random.key(0), spec, mpembed.optim.sgd(0.1)).implementation == "numba"
    step, arguments = compile_gpu.step_and_arguments(spec, "numba", (64, 4), mpembed.optim.sgd(0.1))
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"No FFI handler registered for mpembed_.* on a platform CUDA",
    ):
        compile_gpu.compile_for("h200", step, *arguments)


@pytest.mark.parametrize(
    ("target", "is_ragged"), [("h200", False), ("a100", False), ("l4", False), ("h200", True)]
)
def test_bags_and_their_gradients_compile_to_kernels_alone(target, is_ragged):
    """Ragged ones too, weighted: there is no array of all positions' vectors."""
    shape = (64 * 20,) if is_ragged else (64, 20)
    rows = jax.ShapeDtypeStruct((1000, 100), jnp.float32)
    index, factors = (
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )

    def pooled(rows, index, factors):
        extra = (
            {"segment_ids": jnp.arange(64 * 20, dtype=jnp.int32) // 20, "num_segments": 64}
            if is_ragged
            else {}
        )
        pool = partial(
            mpembed.pool, inverse=index, combiner="sum", implementation="pallas_triton", **extra
        )
        bags, pull_back = jax.vjp(lambda rows, factors: pool(rows, weights=factors), rows, factors)
        return bags, pull_back(bags)

    compiled = compile_gpu.compile_for(target, pooled, rows, index, factors)
    found = compile_gpu.figures(compiled, rows)
    assert found["kernels"] == 2
    # The [64, 20, 100] vectors would be 512,000 bytes; a ragged batch is sorted twice.
    assert found["temporary_bytes"] < 131072
