"""Ahead-of-time compilation for GPUs this machine does not have: no copy of the table, bounded temporaries, real kernels.

Needs XLA's GPU compiler: pip install -e .[aot]. Runs under JAX_PLATFORMS=cpu like every other test.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import shapes

import mpembed_jax as mpembed
from experiments import compile_gpu

REASON = compile_gpu.missing_compiler()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore"),  # of the plugin and of Pallas' Triton back end, which is deprecated
]
BATCH, DIM = (65536, 26), 16
CASES = [("h200", "xla"), ("h200", "pallas_triton"), ("a100", "pallas_triton"), ("l4", "pallas_triton"), ("t4", "xla")]


@pytest.mark.parametrize(("target", "implementation"), CASES)
def test_a_step_copies_no_array_of_the_state_and_bounds_its_temporaries(target, implementation):
    """33.76 M rows. The vectors of all positions are 109 MB; everything temporary together is at most five times that."""
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("ids", 33_762_577)], DIM, "int8")
    step, arguments = compile_gpu.step_and_arguments(spec, implementation, BATCH, mpembed.optim.rowwise_adagrad(0.05))
    found = compile_gpu.figures(compile_gpu.compile_for(target, step, *arguments, donate_argnums=0), arguments[0])
    assert found["state_sized_copies"] == 0
    assert found["temporary_bytes"] < 5 * 4 * DIM * BATCH[0] * BATCH[1]
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0]))
    assert found["aliased_bytes"] >= state_bytes
    # swap, lookup, update, and two for the sums of duplicates
    assert found["kernels"] == (5 if implementation == "pallas_triton" else 0)


@pytest.mark.parametrize(("storage", "dim"), [("float8_e4m3fn", 7), ("int4", 100), ("int2", 64), ("bfloat16", 1)])
def test_kernels_of_other_formats_compile_to_machine_code(storage, dim):
    spec = shapes.stack(100_000, dim, storage=storage, lines=1024)
    step, arguments = compile_gpu.step_and_arguments(spec, "pallas_triton", (64, 4), mpembed.optim.sgd(0.1))
    compiled = compile_gpu.compile_for("a100", step, *arguments, donate_argnums=0)
    assert compile_gpu.figures(compiled, arguments[0])["kernels"] == 5
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    read = compile_gpu.compile_for("a100", mpembed.read, arguments[0], ids)
    assert compile_gpu.figures(read, arguments[0])["kernels"] == 1


def test_bags_and_their_gradients_compile_to_kernels_alone():
    rows = jax.ShapeDtypeStruct((1000, 100), jnp.float32)
    index, factors = jax.ShapeDtypeStruct((64, 20), jnp.int32), jax.ShapeDtypeStruct((64, 20), jnp.float32)

    def pooled(rows, index, factors):
        pool = partial(mpembed.pool, inverse=index, weights=factors, combiner="sum", implementation="pallas_triton")
        bags, pull_back = jax.vjp(pool, rows)
        return bags, pull_back(bags)

    compiled = compile_gpu.compile_for("h200", pooled, rows, index, factors)
    found = compile_gpu.figures(compiled, rows)
    assert found["kernels"] == 3
    # Less than the [64, 20, 100] array of vectors that is never made, besides the zeros and pieces of the sums.
    assert found["temporary_bytes"] < 4 * 100 * (1000 + 2 * 40) + 65536
