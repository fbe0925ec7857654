"""The step of the embedding alone, and the copy that its time is compared with.

Benchmarks, checks and compilers of this project share them.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import mpembed_jax as mpembed
from experiments import command_line
from experiments.speed import workload


def check_memory(rows: int | None, dim: int, storage: str = "int8") -> None:
    """Refuses tables that do not fit the memory of this machine.

    Args:
      rows: of all tables; None: Kaggle's.
      dim: numbers of a row.
      storage: format of the rows; the smallest of a comparison.

    Raises:
      Refused: with the gigabytes that are needed and there.
    """
    tables = [mpembed.TableSpec(f"C{i}", v) for i, v in enumerate(workload.sizes_for(rows))]
    spec = mpembed.EmbeddingSpec(tables, dim, storage, cache=None)
    needed = mpembed.memory.report(spec, mpembed.optim.sgd(0.1)).total
    given = spec.num_rows if rows is None else rows
    command_line.check_memory("--rows", given, needed, f"tables of {dim} numbers a row")


def embedding_step(
    state: Any,
    ids: jax.Array,
    upstream: jax.Array,
    *,
    tx: Any,
    is_pooled: bool = False,
    **pooling: Any,
) -> tuple:
    """One step of the embedding alone, by the state's implementation, whatever its model.

    Args:
      state: to be donated by the caller's jit.
      ids: global ids.
      upstream: the gradient of what pool returns.
      tx: the transformation given to init.
      is_pooled: run embed and apply_pooled_gradients; otherwise prefetch, lookup, pool, the
        gradients of rows and apply_gradients.
      pooling: weights and combiner, for pool or embed.

    Returns:
      The state, the plan, the rows (None if there is no array of them) and the pooled vectors.
    """
    if is_pooled:
        state, bag_plan, vectors = mpembed.embed(state, ids, **pooling, tx=tx)
        state = mpembed.apply_pooled_gradients(state, bag_plan, upstream, tx=tx)
        return state, bag_plan, bag_plan.rows, vectors
    state, plan = mpembed.prefetch(state, ids)
    rows = mpembed.lookup(state, plan)
    pool = functools.partial(
        mpembed.pool, inverse=plan.inverse, implementation=state.implementation, **pooling
    )
    vectors, pull_back = jax.vjp(pool, rows)
    state = mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx)
    return state, plan, rows, vectors


def copy_bandwidth(num_floats: int = 64 << 20, turns: int = 5) -> float:
    """Returns bytes per second, read and written, of a large jitted pass in place.

    In place, because fresh pages would time the kernel of the operating system, not the memory.
    """
    x = jnp.zeros(num_floats, jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(step(x))
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        x = jax.block_until_ready(step(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times)
