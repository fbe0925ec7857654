"""What a compiled step may cost, counted and not timed: copies, sorts and temporaries.

Traces are counted in test_invariants.py. `compiled_steps.json` records the costs of the steps in
RECORDED, for each implementation. After a change that is meant to change them, write it again:

    PYTHONPATH=tests python tests/embedding/test_cost.py
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import crossed, named

import mpembed_jax as mpembed

pytestmark = pytest.mark.optimized("counts what is in compiled programs")
BATCH, FEATURES, DIM, ROWS = 512, 8, 32, 1_000_000
POSITIONS = BATCH * FEATURES


class Stack(NamedTuple):
    """A stack of one table; `policy` is None without a cache."""

    storage: str
    policy: str | None
    budget: int | None = None  # of unique ids


def compiled_step(stack, implementation):
    cache = None if stack.policy is None else mpembed.CacheSpec(0.05, policy=stack.policy)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("items", ROWS)], DIM, stack.storage, cache, max_unique_ids=stack.budget
    )
    tx = mpembed.optim.rowwise_adagrad(0.05)

    @partial(jax.jit, donate_argnums=0)
    def step(state, ids, upstream):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        vectors, pull_back = jax.vjp(
            partial(mpembed.pool, inverse=plan.inverse, implementation=implementation), rows
        )
        return mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx), vectors

    state = jax.eval_shape(
        lambda: mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
    )
    ids = jax.ShapeDtypeStruct((BATCH, FEATURES), jnp.int32)
    return state, step.lower(
        state, ids, jax.ShapeDtypeStruct((*ids.shape, DIM), jnp.float32)
    ).compile()


@crossed(
    stack=named(
        {
            "int8": Stack("int8", "lfu"),
            "int8 lru with a budget": Stack("int8", "lru", 800),
            "int4 with a budget": Stack("int4", "lfu", 800),
            "float32 without cache": Stack("float32", None),
        },
    ),
    implementation=["xla_chunked", "numba"],
    core={"int4 with a budget-numba", "float32 without cache-xla_chunked"},
)
def test_a_step_passes_over_nothing_larger_than_its_batch(stack, implementation):
    if implementation == "numba":
        pytest.importorskip("numba", reason="the [cpu] extra is not installed")
    state, compiled = compiled_step(stack, implementation)
    text = compiled.as_text()
    assert copies_of_the_state(state, text) == [], "an array of the state is copied"
    # No key-value sort. With a budget XLA has one single-operand sort, inside the branch that runs
    # when it overflows.
    sorts = re.findall(r" sort\(([^)]*)\)", text)
    assert len(sorts) == (stack.budget is not None and implementation != "numba")
    assert all("," not in operands for operands in sorts)
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * POSITIONS * DIM * 4


@pytest.mark.slow
@pytest.mark.parametrize("verbs", ["embed", "prefetch"])
def test_a_native_step_on_raw_ids_sorts_nothing_and_copies_no_table(verbs):
    """Its ids are admitted, rows start again, and the step runs on the rows."""
    pytest.importorskip("numba", reason="the [cpu] extra is not installed")
    tx = mpembed.optim.rowwise_adagrad(0.05)
    tables = [mpembed.TableSpec(f"table{k}") for k in range(FEATURES)]
    vocabulary = mpembed.VocabularySpec(ROWS)
    spec = mpembed.EmbeddingSpec(
        tables, DIM, "int8", mpembed.CacheSpec(0.05), vocabulary=vocabulary
    )

    @partial(jax.jit, donate_argnums=0)
    def step(state, pairs, upstream):
        if verbs == "embed":
            state, plan, vectors = mpembed.embed(state, pairs, tx=tx)
            return mpembed.apply_pooled_gradients(state, plan, upstream, tx=tx), vectors
        state, plan = mpembed.prefetch(state, pairs)
        rows = mpembed.lookup(state, plan)
        vectors, pull_back = jax.vjp(
            partial(mpembed.pool, inverse=plan.inverse, implementation="numba"), rows
        )
        return mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx), vectors

    state = jax.eval_shape(
        lambda: mpembed.init(jax.random.key(0), spec, tx, implementation="numba")
    )
    pairs = jax.ShapeDtypeStruct((BATCH, FEATURES, 2), jnp.uint32)
    upstream = jax.ShapeDtypeStruct((BATCH, FEATURES, DIM), jnp.float32)
    compiled = step.lower(state, pairs, upstream).compile()
    text = compiled.as_text()
    assert "mpembed_admit" in text and "mpembed_start_again" in text
    assert copies_of_the_state(state, text) == []
    assert " sort(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * POSITIONS * DIM * 4


def copies_of_the_state(state, text):
    """The shapes of copied arrays that are as large as a large array of the state."""
    large = {math_prod(leaf.shape) for leaf in jax.tree.leaves(state) if leaf.size > 4 * POSITIONS}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    return [shape for shape in copied if math_prod(shape) in large]


def math_prod(shape):
    return int(
        np.prod(
            [int(n) for n in (shape.split(",") if isinstance(shape, str) else shape)],
            dtype=np.int64,
        )
    )


RECORD = Path(__file__).with_name("compiled_steps.json")
RECORDED = {
    "int8 lfu": Stack("int8", "lfu"),
    "int4 lru with a budget": Stack("int4", "lru", 800),
    "float32 without cache": Stack("float32", None),
}


def cost_of(stack, implementation):
    """Operations of the compiled step, its floating-point operations, and bytes of temporaries."""
    _, compiled = compiled_step(stack, implementation)
    return {
        "operations": len(re.findall(r"^\s*(?:ROOT )?%?\S+ = ", compiled.as_text(), re.MULTILINE)),
        "flops": int(compiled.cost_analysis()["flops"]),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


@crossed(
    name=list(RECORDED),
    implementation=["xla", "xla_chunked", "numba"],
    core={"int8 lfu-numba", "float32 without cache-xla"},
)
def test_a_step_costs_what_is_recorded(name, implementation):
    """Up to a tenth; another jax compiles to something else."""
    if implementation == "numba":
        pytest.importorskip("numba", reason="the [cpu] extra is not installed")
    record = json.loads(RECORD.read_text())
    if record["jax"] != jax.__version__:
        pytest.skip(f"the record is of jax {record['jax']}")
    wanted = record["steps"][name][implementation]
    assert cost_of(RECORDED[name], implementation) == pytest.approx(wanted, rel=0.1)


if __name__ == "__main__":
    steps = {
        name: {way: cost_of(stack, way) for way in ("xla", "xla_chunked", "numba")}
        for name, stack in RECORDED.items()
    }
    RECORD.write_text(json.dumps({"jax": jax.__version__, "steps": steps}, indent=1) + "\n")
