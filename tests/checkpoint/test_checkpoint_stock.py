"""Stock orbax saves and restores a state with no code of ours.

Training goes on bit for bit as if nothing had been.
"""

import json
import os
import subprocess
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import named
from training import assert_same

import mpembed_jax as mpembed
from mpembed_jax import CacheSpec, EmbeddingSpec, RowFormat, TableSpec

ocp = pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")


NUM_ROWS, DIM = 300, 8
SMALL = dict(num_rows=96, ways=8)


class Case(NamedTuple):
    """The options of a stack, and its row optimizer."""

    options: dict
    tx: optax.GradientTransformation


CASES = {
    "int8-lfu": Case(
        dict(storage="int8", cache=CacheSpec(**SMALL)),
        mpembed.optim.rowwise_adagrad(0.1),
    ),
    "int4-lru-bf16-adam": Case(
        dict(storage="int4", cache=CacheSpec(**SMALL, policy="lru"), row_state_dtype="bfloat16"),
        optax.adam(optax.exponential_decay(0.05, 10, 0.9)),
    ),
    "float32-none": Case(
        dict(storage="float32", cache=None, skip_nonfinite=True),
        optax.sgd(0.1, momentum=0.9),
    ),
}


def stack(**options):
    return EmbeddingSpec((TableSpec("a", NUM_ROWS - 50), TableSpec("b", 50)), DIM, **options)


def ids_of(steps, seed=0, width=32):
    """i32 [steps, width]: skewed, so that there are hits and evictions, with some padding."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.02, (steps, width)), NUM_ROWS).astype(np.int32) - 1
    return np.where(rng.random(ids.shape) < 0.1, mpembed.NO_ID, ids * 7 % NUM_ROWS).astype(np.int32)


def trainer(tx):
    """A jitted scan over batches; the gradient depends on the rows, so one wrong bit spreads."""

    def step(state, ids):
        def gradient(rows, plan):
            def loss(rows):
                return jnp.sum(jnp.sin(3 * mpembed.pool(rows, plan.inverse)) + 0.1)

            return jax.grad(loss)(rows)

        return training.step(state, ids, tx, gradient).state, None

    return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches)[0])


@pytest.mark.parametrize(
    "case",
    named(
        list(CASES),
        fast={"int8-lfu"},
        core={"float32-none"},
        marks={"int4-lru-bf16-adam": training.OPTAX_ADAM},
    ),
)
def test_the_next_100_steps_after_a_restore_are_bit_equal(case, tmp_path):
    """Into shapes with shardings, as orbax documents it, and into a live state of another key."""
    options, tx = CASES[case]
    spec = stack(**options)
    state = mpembed.init(jax.random.key(0), spec, tx)
    train = trainer(tx)
    batches = ids_of(100)
    state = train(
        state, batches
    )  # 100 steps before: the cache is full, lines are dirty, counters have moved
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored = checkpointer.restore(tmp_path / "state", shapes)
        other = checkpointer.restore(tmp_path / "state", mpembed.init(jax.random.key(1), spec, tx))
    assert type(restored) is mpembed.EmbeddingState
    assert restored.spec == spec
    assert_same(restored, state)
    assert_same(other, state)
    later = ids_of(100, seed=1)
    uninterrupted, resumed = train(state, later), train(restored, later)
    assert_same(resumed, uninterrupted)
    assert int(resumed.step) == 200
    if spec.cache is not None:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # a cache this small bypasses a fifth of its ids, and stats says so
            stats = mpembed.stats(resumed)
        assert stats.write_backs > 0 or spec.cache.policy == "lfu"
        assert 0 < stats.hits < stats.unique


def test_a_state_advanced_outside_jit_is_saved_too(tmp_path):
    """Every leaf is an array that orbax knows, also where a verb was called without jit."""
    tx = optax.sgd(0.1)
    state = mpembed.init(jax.random.key(0), stack(storage="float32", cache=None), tx)
    prefetched, plan = jax.jit(mpembed.prefetch)(state, ids_of(1)[0])
    rows = jnp.zeros((plan.unique_ids.shape[0], DIM))
    applied = mpembed.apply_gradients(prefetched, plan, rows, rows, tx=tx)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "applied", applied)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "applied", state)
        assert_same(restored, jax.tree.map(jnp.asarray, applied))


MISMATCHES = """
import json, sys, jax, optax
import orbax.checkpoint as ocp
from test_checkpoint_stock import stack, CacheSpec, SMALL
import mpembed_jax as mpembed

adam, rowwise = optax.adam(0.1), mpembed.optim.rowwise_adagrad(0.1)
saved = dict(storage="int8", cache=CacheSpec(**SMALL))
targets = {
  "format": (dict(saved, storage="int4"), adam),
  "cache size": (dict(saved, cache=CacheSpec(num_rows=64, ways=8)), adam),
  "no cache": (dict(saved, cache=None), adam),
  "row state": (saved, rowwise),
}
found = {}
with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(sys.argv[1], mpembed.init(jax.random.key(0), stack(**saved), adam))
  checkpointer.wait_until_finished()
  for name, (options, tx) in targets.items():
    try:
      checkpointer.restore(sys.argv[1], mpembed.init(jax.random.key(0), stack(**options), tx))
      found[name] = "restored"
    except Exception as error:
      found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.mark.slow
def test_restoring_into_a_spec_of_other_shapes_is_an_error(tmp_path, request):
    """In a process of its own.

    Orbax leaves unfinished reads behind when it refuses, which would be reported elsewhere.
    """
    done = subprocess.run(
        [sys.executable, "-c", MISMATCHES, str(tmp_path / "state")],
        cwd=request.path.parents[1],
        env=dict(os.environ, PYTHONPATH=":".join(map(str, request.path.parents[:3]))),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    dim8_int4, dim8_int8 = (RowFormat(name).row_words(DIM) for name in ("int4", "int8"))
    assert found["format"].startswith("ValueError")
    assert f"({NUM_ROWS}, {dim8_int4})" in found["format"]  # asked for
    assert f"({NUM_ROWS}, {dim8_int8})" in found["format"]  # stored
    assert found["cache size"].startswith("ValueError")
    assert found["no cache"].startswith("ValueError")
    assert "cache" in found["no cache"]
    assert found["row state"].startswith("ValueError")
    assert "row_state" in found["row state"]


class Specs(NamedTuple):
    """The options of a saved stack, and of the target that it is restored into."""

    saved: dict
    target: dict


EQUAL_SHAPES = {
    "policy": Specs(
        dict(storage="int8", cache=CacheSpec(**SMALL)),
        dict(storage="int8", cache=CacheSpec(**SMALL, policy="lru")),
    ),
    "row state dtype": Specs(
        dict(storage="int8", cache=None),
        dict(storage="int8", cache=None, row_state_dtype="bfloat16"),
    ),
    "format": Specs(dict(storage="bfloat16", cache=None), dict(storage="float16", cache=None)),
}


@pytest.mark.parametrize("case", EQUAL_SHAPES)
def test_restoring_into_another_spec_of_equal_shapes_does_not_go_unnoticed(case, tmp_path):
    """orbax ignores what the target lacks, casts dtypes and compares shapes only.

    The state must notice by itself.
    """
    saved, target = (stack(**options) for options in EQUAL_SHAPES[case])
    tx = mpembed.optim.rowwise_adagrad(0.1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", mpembed.init(jax.random.key(0), saved, tx))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="spec"):
            mpembed.stats(
                checkpointer.restore(
                    tmp_path / "state", mpembed.init(jax.random.key(0), target, tx)
                )
            )


def test_a_checkpoint_needs_no_flush_and_holds_every_array_of_the_state(tmp_path):
    """What is on disk is the state's own tree: no array is missing, none is added."""
    tx = CASES["int8-lfu"].tx
    state = mpembed.init(jax.random.key(0), stack(**CASES["int8-lfu"].options), tx)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        on_disk = checkpointer.metadata(tmp_path / "state").item_metadata.tree

    def by_name(tree):
        leaves = jax.tree.leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves
        }

    stored, held = by_name(on_disk), by_name(state)
    assert stored.keys() == held.keys()
    for name, leaf in held.items():
        assert (tuple(stored[name].shape), np.dtype(stored[name].dtype)) == (leaf.shape, leaf.dtype)
