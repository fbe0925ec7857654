"""A restored checkpoint has the same bits.

This holds whatever the tree contains, during training, in increments and on other shardings.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import named
from training import all_rows, assert_same

import mpembed_jax as mpembed
from mpembed_jax import CacheSpec, EmbeddingSpec, TableSpec, nn

pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")

import orbax.checkpoint as ocp

from mpembed_jax import checkpoint
from mpembed_jax.checkpoint import leaves, placements, saving

SIZES, DIM = (3000, 40), 8
ADAGRAD = mpembed.optim.rowwise_adagrad(0.1)
ADAM = optax.adam(optax.exponential_decay(0.05, 10, 0.9))
DENSE = optax.sgd(optax.linear_schedule(1e-2, 5e-3, 50), momentum=0.9)
SMALL = dict(num_rows=128, ways=8)


class Case(NamedTuple):
    """The options of a stack, and its row optimizer."""

    options: dict
    tx: optax.GradientTransformation


CASES = {
    "int8-lfu": Case(dict(storage="int8", cache=CacheSpec(**SMALL)), ADAGRAD),
    "int4-lru-bf16-adam": Case(
        dict(storage="int4", cache=CacheSpec(**SMALL, policy="lru"), row_state_dtype="bfloat16"),
        ADAM,
    ),
    "int2-none": Case(
        dict(storage="int2", cache=None, skip_nonfinite=True),
        optax.sgd(0.1, momentum=0.9),
    ),
}


def stack(**options):
    return EmbeddingSpec([TableSpec("a", SIZES[0]), TableSpec("b", SIZES[1])], DIM, **options)


def batch(step, width=48):
    """Ids of one step: skewed, drifting, with padding.

    The same step has the same ids, so a position is a whole data state.
    """
    rng = np.random.default_rng(step)
    ids = (rng.zipf(1.15, width) * 7 + step // 20 * 31) % sum(SIZES)
    return np.where(rng.random(width) < 0.1, mpembed.NO_ID, ids).astype(np.int32)


@cache
def trainer(case):
    tx = CASES[case].tx

    @partial(jax.jit, donate_argnums=0)
    def step(tree, ids):
        emb, plan = mpembed.prefetch(tree["emb"], ids)
        rows = mpembed.lookup(emb, plan)

        def loss_fn(w, rows):
            logits = mpembed.pool(rows, plan.inverse) @ w["w"]
            return jnp.mean(jnp.sin(3 * logits) ** 2 + w["b"].astype(jnp.float32))

        grads, row_grads = jax.grad(loss_fn, argnums=(0, 1))(tree["params"], rows)
        emb = mpembed.apply_gradients(emb, plan, rows, row_grads * 50, tx=tx)
        updates, opt = DENSE.update(grads, tree["opt"], tree["params"])
        params = optax.apply_updates(tree["params"], updates)
        tracker = checkpoint.mark(tree["tracker"], plan)
        return dict(
            emb=emb, params=params, opt=opt, key=jax.random.split(tree["key"])[0], tracker=tracker
        )

    return step


@cache
def first_tree(case, seed=0):
    options, tx = CASES[case]
    params = {"w": jnp.ones((DIM, 3), jnp.float32), "b": jnp.zeros(3, jnp.bfloat16)}
    emb = mpembed.init(jax.random.key(seed), stack(**options), tx)
    return dict(
        emb=emb,
        params=params,
        opt=DENSE.init(params),
        key=jax.random.key(5),
        tracker=checkpoint.track(emb),
    )


def trained(case, begin, end, tree=None):
    tree = jax.tree.map(jnp.copy, first_tree(case)) if tree is None else tree
    for step in range(begin, end):
        tree = trainer(case)(tree, batch(step))
    return tree


def only(tree, *names):
    return {name: tree[name] for name in names}


@pytest.mark.parametrize(
    "case", named(list(CASES), fast={"int8-lfu"}, marks={"int4-lru-bf16-adam": training.OPTAX_ADAM})
)
def test_training_goes_on_after_a_restore_bit_for_bit(case, tmp_path):
    """60 steps, saved at 30 and restored, against 60 without.

    Restored into shapes and into a live state of another seed.
    """
    tree = trained(case, 0, 30)
    checkpoint.save(tmp_path, 30, tree)
    uninterrupted = trained(case, 30, 60, tree)
    for target in (jax.eval_shape(lambda: first_tree(case)), first_tree(case, 1)):
        restored = checkpoint.restore(tmp_path, target)
        assert restored["emb"].spec == target["emb"].spec
        assert_same(trained(case, 30, 60, restored), uninterrupted)
    assert int(uninterrupted["emb"].step) == 60
    counters = dict(
        zip(
            ("requests", "unique", "hits"),
            np.asarray(uninterrupted["emb"].counters)[:3, 0],
            strict=True,
        )
    )
    assert counters["unique"] > 1000
    if uninterrupted["emb"].cache is not None:
        assert bool(uninterrupted["emb"].cache.dirty.any())
        assert counters["hits"] > 100


def test_everything_a_tree_may_hold_comes_back_as_it_was(tmp_path):
    tree = {
        "emb": first_tree("int8-lfu")["emb"],
        "opt": (optax.EmptyState(), [jnp.float32(0.1), None]),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 3),
        "numpy": {
            "position": np.int64(2**40 + 1),
            "order": np.arange(5)[::2],
            "half": np.float16([0.1, np.nan]),
        },
        "odd": {
            "a/b c": jnp.ones((2, 0, 3)),
            "flags": jnp.asarray([True, False]),
            "wide": jnp.float8_e4m3fn(3.0),
        },
        "plain": {
            "step": 2**70,
            "loss": 0.1,
            "nan": float("nan"),
            "on": True,
            "name": "é",
            "iterator": b"\x00\xff",
        },
    }
    checkpoint.save(tmp_path, 0, tree)
    restored = checkpoint.restore(tmp_path, tree)
    assert np.isnan(tree["plain"].pop("nan"))
    assert np.isnan(restored["plain"].pop("nan"))
    assert_same(restored, tree)
    emb = checkpoint.restore(tmp_path, {"emb": tree["emb"]}, partial=True)["emb"]
    assert_same(emb, tree["emb"])
    # A tree that is one embedding state, or one array.
    checkpoint.save(tmp_path / "emb", 0, tree["emb"])
    assert_same(checkpoint.restore(tmp_path / "emb", tree["emb"]), tree["emb"])
    checkpoint.save(tmp_path / "one", 0, jnp.arange(3))
    assert_same(
        checkpoint.restore(tmp_path / "one", jax.ShapeDtypeStruct((3,), jnp.int32)), jnp.arange(3)
    )


def test_training_with_donation_goes_on_during_a_save(tmp_path):
    """The files get the values at the call, although their buffers are reused at once.

    Nothing is copied in the steps.
    """
    tree = trained("int8-lfu", 0, 20)
    wanted = jax.tree.map(jnp.copy, tree)
    address = tree["emb"].table.rows.unsafe_buffer_pointer()
    saving = checkpoint.save(tmp_path, 20, tree, wait=False)
    tree = trained("int8-lfu", 20, 40, tree)
    assert tree["emb"].table.rows.unsafe_buffer_pointer() == address
    saving.wait()
    saving.wait()
    assert_same(checkpoint.restore(tmp_path, wanted), wanted)
    # The next save and a restore wait by themselves.
    checkpoint.save(tmp_path, 40, tree, wait=False)
    checkpoint.save(tmp_path, 41, tree, wait=False)
    assert_same(checkpoint.restore(tmp_path, wanted, step=41), tree)
    assert checkpoint.steps(tmp_path) == [20, 40, 41]


NUM_FILES = {1009: 1, 1008: 8, 1: 1}  # {rows: files} of pieces of at most 1024 bytes


@pytest.mark.parametrize("num_rows", NUM_FILES)
def test_a_stack_of_a_prime_number_of_rows_is_not_cut_into_single_rows(tmp_path, num_rows):
    """Orbax cuts arrays into equal pieces only. Criteo-Kaggle's 33,762,577 rows are prime."""
    rows = np.arange(8 * num_rows, dtype=np.uint8).reshape(num_rows, 8)
    division = saving.save_args(rows, chunk_bytes=1024)
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as orbax:
        orbax.save(
            tmp_path / "x",
            {"rows": rows, "one": np.ones(1)},
            save_args={"rows": division, "one": ocp.SaveArgs()},
        )
        np.testing.assert_array_equal(orbax.restore(tmp_path / "x")["rows"], rows)
    files = [path.name for path in (tmp_path / "x" / "rows").iterdir()]
    assert len([name for name in files if not name.startswith(".")]) == NUM_FILES[num_rows]


def test_keeping_few_never_deletes_the_last_good_one(tmp_path):
    """Later checkpoints, damaged or of a run that was rolled back, do not count as the newest."""
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"x": np.full(1000, step)})
    for step in (20, 30):
        largest = max(
            (f for f in (tmp_path / f"step_{step}").rglob("*") if f.is_file()),
            key=lambda f: f.stat().st_size,
        )
        largest.write_bytes(largest.read_bytes()[:10])
    target = {"x": np.zeros(1000, int)}
    assert checkpoint.restore(tmp_path, target)["x"][0] == 10
    checkpoint.save(tmp_path, 15, {"x": np.full(1000, 15)}, keep=1)
    assert checkpoint.steps(tmp_path) == [15, 20, 30]
    assert checkpoint.restore(tmp_path, target)["x"][0] == 15


def test_only_the_newest_are_kept_when_asked(tmp_path):
    tree = only(trained("int8-lfu", 0, 3), "emb", "tracker")
    for step in (1, 5, 10, 11):
        checkpoint.save(tmp_path, step, tree["emb"], keep=2)
    assert checkpoint.steps(tmp_path) == [10, 11]
    assert checkpoint.latest_step(tmp_path) == 11
    tracker = checkpoint.track(tree["emb"])
    for step in (12, 13, 14):
        checkpoint.save(tmp_path, step, tree["emb"], tracker=tracker, keep=1)
    found = checkpoint.steps(tmp_path)  # an increment keeps what it builds on
    assert found[-1] == 14
    assert 2 <= len(found) <= 4
    assert_same(checkpoint.restore(tmp_path, tree["emb"]), tree["emb"])
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save(tmp_path, 15, tree["emb"], keep=0)


# --- increments


@pytest.mark.parametrize(
    "case", named(list(CASES), fast={"int8-lfu"}, marks={"int4-lru-bf16-adam": training.OPTAX_ADAM})
)
def test_a_chain_of_increments_restores_exactly(case, tmp_path):
    """Every link equals the live tree, flushes in between included, and is far smaller than a full
    checkpoint.
    """
    tree = trained(case, 0, 40)
    full = checkpoint.save(tmp_path, 40, only(tree, "emb", "params"))
    for step in range(40, 64, 8):
        tree["tracker"] = checkpoint.track(tree["emb"])
        tree = trained(case, step, step + 4, tree)
        tree["emb"] = jax.jit(mpembed.flush, donate_argnums=0)(tree["emb"])
        tree = trained(case, step + 4, step + 8, tree)
        saving = checkpoint.save(
            tmp_path, step + 8, only(tree, "emb", "params"), tracker=tree["tracker"]
        )
        assert saving.nbytes < 0.6 * full.nbytes
        live = only(tree, "emb", "params")
        assert_same(checkpoint.restore(tmp_path, live), live)
    for step in (40, 48, 56):
        assert (
            int(checkpoint.restore(tmp_path, only(tree, "emb", "params"), step=step)["emb"].step)
            == step
        )


@pytest.mark.parametrize("implementation", named(["xla", "numba"], core={"numba"}))
@pytest.mark.parametrize(
    "cache", [None, mpembed.CacheSpec(num_rows=32, ways=4, policy="lru")], ids=["none", "lru"]
)
def test_increments_of_steps_from_ids_to_vectors(cache, implementation, tmp_path):
    """embed's plan names no victims; the increments hold them all the same."""
    tx = mpembed.optim.rowwise_adagrad(0.1)
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 3000)], DIM, "int8", cache)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(emb, tracker, ids):
        emb, plan, vectors = mpembed.embed(emb, ids, tx=tx)
        grads = jax.grad(lambda v: jnp.sum(jnp.sin(3 * v)))(vectors)
        return mpembed.apply_pooled_gradients(emb, plan, grads, tx=tx), checkpoint.mark(
            tracker, plan
        )

    def train(emb, tracker, first):
        for number in range(first, first + 8):
            rng = np.random.default_rng(number)
            ids = rng.integers(0, 3000, 40) * (rng.random(40) < 0.8)
            ids[:4] = [mpembed.NO_ID, -1, 3000, 7]
            emb, tracker = step(emb, tracker, ids.astype(np.int32))
        return emb, tracker

    emb = mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
    emb, _ = train(emb, checkpoint.track(emb), 0)
    full = checkpoint.save(tmp_path, 8, emb)
    tracker = checkpoint.track(emb)
    for first in (8, 16):
        emb, tracker = train(emb, tracker, first)
        saving = checkpoint.save(tmp_path, first + 8, emb, tracker=tracker)
        assert saving.nbytes < 0.6 * full.nbytes
        assert_same(checkpoint.restore(tmp_path, emb), emb)
    assert cache is None or mpembed.stats(emb).write_backs > 100


def test_a_flush_alone_is_in_the_increment(tmp_path):
    """It changes table rows that no plan since the last checkpoint names."""
    tree = trained("int8-lfu", 0, 40)
    checkpoint.save(tmp_path, 40, tree["emb"])
    tracker = checkpoint.track(tree["emb"])
    before = np.array(tree["emb"].table.rows)
    flushed = jax.jit(mpembed.flush)(tree["emb"])
    assert (np.array(flushed.table.rows) != before).any()
    checkpoint.save(tmp_path, 41, flushed, tracker=tracker)
    assert_same(checkpoint.restore(tmp_path, flushed), flushed)


@pytest.mark.slow
def test_an_increment_after_write_rows_is_refused_before_it_is_written(tmp_path):
    """No plan names written rows. A call that writes no row, or one before track, is no matter."""
    emb = trained("int8-lfu", 0, 40)["emb"]
    emb = mpembed.write_rows(emb, np.arange(3), jnp.ones((3, DIM)))
    checkpoint.save(tmp_path, 40, emb)
    tracker = checkpoint.track(emb)
    written = mpembed.write_rows(emb, np.arange(9), jnp.ones((9, DIM)))
    with pytest.raises(ValueError, match=r"outside of steps after the tracker was.*full"):
        checkpoint.save(tmp_path, 41, written, tracker=tracker)
    assert checkpoint.steps(tmp_path) == [40]
    nothing = mpembed.write_rows(emb, np.full(9, mpembed.NO_ID), jnp.ones((9, DIM)))
    checkpoint.save(tmp_path, 42, nothing, tracker=tracker)
    assert_same(checkpoint.restore(tmp_path, nothing), emb)


@pytest.mark.slow
def test_an_increment_after_a_change_by_hand_is_refused(tmp_path):
    """By save, if no step came in between, else by restore: no plan names the changed row."""
    tree = trained("int8-lfu", 0, 40)
    checkpoint.save(tmp_path, 40, tree["emb"])

    def changed(emb):
        rows = emb.table.rows.at[-1, 0].add(1)
        return dataclasses.replace(emb, table=dataclasses.replace(emb.table, rows=rows))

    with pytest.raises(ValueError, match="outside of steps"):
        checkpoint.save(tmp_path, 41, changed(tree["emb"]), tracker=checkpoint.track(tree["emb"]))
    tracker = checkpoint.track(tree["emb"])
    emb, plan = mpembed.prefetch(tree["emb"], np.arange(3, dtype=np.int32))
    rows = mpembed.lookup(emb, plan)
    emb = changed(mpembed.apply_gradients(emb, plan, rows, rows, tx=ADAGRAD))
    checkpoint.save(tmp_path, 41, emb, tracker=checkpoint.mark(tracker, plan))
    with pytest.raises(checkpoint.CheckpointError, match="rows that no plan named"):
        checkpoint.restore(tmp_path, emb, step=41)
    assert_same(checkpoint.restore(tmp_path, emb, step=40), tree["emb"])


def test_a_tracker_that_missed_something_is_refused(tmp_path):
    """Whatever could lose a row.

    A step or plan left out, another state's plan or tracker, another start.
    """
    emb = trained("int8-lfu", 0, 10)["emb"]
    checkpoint.save(tmp_path, 10, emb)
    start = checkpoint.track(emb)

    @jax.jit
    def advance(emb, ids):
        waiting, plan = mpembed.prefetch(emb, ids)
        rows = mpembed.lookup(waiting, plan)
        return mpembed.apply_gradients(waiting, plan, rows, rows, tx=ADAGRAD), plan, waiting

    first, plan_10, pending = advance(emb, batch(10))
    second, plan_11, _ = advance(first, batch(11))
    _, other_plan, _ = advance(emb, batch(99))
    mark = jax.jit(checkpoint.mark)
    wrong = {
        "none": start,
        "last": mark(start, plan_10),
        "first": mark(start, plan_11),
        "twice": mark(mark(mark(start, plan_10), plan_10), plan_11),
        "other": mark(mark(start, other_plan), plan_11),
    }
    for name, tracker in wrong.items():
        with pytest.raises(ValueError, match="did not see every step"):
            checkpoint.save(tmp_path, 12, second, tracker=tracker)
        assert checkpoint.steps(tmp_path) == [10], name
    right = mark(mark(start, plan_10), plan_11)
    with pytest.raises(ValueError, match="another embedding state"):
        checkpoint.save(tmp_path, 12, first_tree("int8-lfu", 1)["emb"], tracker=right)
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* holds the rows that the tracker started from"
    ):
        checkpoint.save(tmp_path / "other", 12, second, tracker=right)
    with pytest.raises(
        ValueError, match=r"no embedding state is called 'x'; the tree has \['emb'\]"
    ):
        checkpoint.save(tmp_path, 12, {"emb": second}, tracker={"x": right})
    with pytest.raises(ValueError, match="2 embedding states"):
        checkpoint.save(tmp_path, 12, {"a": second, "b": second}, tracker=right)
    with pytest.raises(ValueError, match="without its apply_gradients"):
        checkpoint.track(pending)
    # A run of other values, though of the same key, spec and counts, is not the one in the
    # directory.
    checkpoint.save(tmp_path, 11, first)
    changed = dataclasses.replace(
        first, table=dataclasses.replace(first.table, rows=first.table.rows.at[7, 0].add(1))
    )
    with pytest.raises(ValueError, match=r"no checkpoint in .* holds the rows"):
        checkpoint.save(tmp_path, 12, changed, tracker=checkpoint.track(changed))
    checkpoint.save(tmp_path, 12, second, tracker=right)
    assert_same(checkpoint.restore(tmp_path, second), second)


def test_an_increment_whose_base_was_replaced_or_lost_is_refused(tmp_path, caplog):
    emb = trained("int8-lfu", 0, 10)["emb"]
    checkpoint.save(tmp_path, 5, emb)
    checkpoint.save(tmp_path, 10, emb)
    checkpoint.save(tmp_path, 11, emb, tracker=checkpoint.track(emb))
    (tmp_path / "step_10").rename(tmp_path / "away")
    with pytest.raises(checkpoint.CheckpointError, match="step 11 builds on step 10"):
        checkpoint.restore(tmp_path, emb, step=11)
    with caplog.at_level(logging.WARNING):
        assert_same(checkpoint.restore(tmp_path, emb), emb)
    assert "step 11 builds on step 10" in caplog.text
    assert "using step 5" in caplog.text
    checkpoint.save(tmp_path, 10, first_tree("int8-lfu")["emb"])
    with pytest.raises(
        checkpoint.CheckpointError,
        match="step 10 is no longer the checkpoint that step 11 builds on",
    ):
        checkpoint.restore(tmp_path, emb, step=11)


# --- shardings


@pytest.mark.slow
def test_arrays_go_to_the_shardings_of_the_target(tmp_path):
    """Rows split over 2 and 8 devices and replicated, from one device and back; increments too."""
    tree = trained("int8-lfu", 0, 30)
    checkpoint.save(tmp_path, 30, tree)
    flushed = dict(tree, emb=jax.jit(mpembed.flush)(tree["emb"]))

    def sharding(num, array, spec):
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:num]), "x")
        is_split = array.ndim and array.shape[0] % num == 0 and array.shape[0] >= 128
        return jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*[spec] * bool(is_split))
        )

    for num, spec in ((8, "x"), (2, "x"), (4, None)):
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(num, x, spec)),  # noqa: B023
            jax.eval_shape(lambda: first_tree("int8-lfu")),
        )
        spread = checkpoint.restore(tmp_path, shapes, step=30)
        for leaf, shape in zip(jax.tree.leaves(spread), jax.tree.leaves(shapes), strict=True):
            assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
        assert_same(spread, tree)
        # Increments and full checkpoints of spread states.
        if spec:
            folder = tmp_path / f"{num}"
            checkpoint.save(folder, 30, spread)
            tracker = checkpoint.track(spread["emb"])
            after = jax.tree.map(
                lambda x, shape: jax.device_put(x, shape.sharding), flushed, shapes
            )
            checkpoint.save(folder, 31, after, tracker=tracker)
            assert_same(checkpoint.restore(folder, tree), flushed)
            assert_same(checkpoint.restore(folder, shapes), flushed)


# --- what does not fit


def test_a_target_that_does_not_fit_is_named(tmp_path):
    tree = {
        "emb": first_tree("int8-lfu")["emb"],
        "w": jnp.zeros((2, 3)),
        "n": 1,
        "key": jax.random.key(0),
    }
    checkpoint.save(tmp_path, 1, tree)
    cases = {
        "lacks leaves of the target: ['v']": dict(tree, v=jnp.zeros(1)),
        "holds leaves that the target lacks: ['n']": {k: v for k, v in tree.items() if k != "n"},
        "'w' is float32 [2, 3] on disk, but float32 [3, 2] in the target": dict(
            tree, w=jnp.zeros((3, 2))
        ),
        "'w' is float32 [2, 3] on disk, but int32 [2, 3] in the target": dict(
            tree, w=jnp.zeros((2, 3), jnp.int32)
        ),
        "'n' was saved as a Python int, the target has a float": dict(tree, n=1.0),
        "'key': random keys on one side": dict(tree, key=jax.random.key_data(tree["key"])),
        "no embedding state 'w'": dict(tree, w=tree["emb"]),
        "holds leaves that the target lacks: ['n', 'w']": only(tree, "emb", "key"),
    }
    for message, target in cases.items():
        with pytest.raises(ValueError) as caught:
            checkpoint.restore(tmp_path, target)
        assert message in str(caught.value)
    with pytest.raises(TypeError, match=r"leaf 'f' is a function"):
        checkpoint.save(tmp_path, 2, {"f": stack})
    with pytest.raises(ValueError, match="step must be at least 0"):
        checkpoint.save(tmp_path, -1, tree)
    with pytest.raises(checkpoint.CheckpointError, match="is already a good checkpoint"):
        checkpoint.save(tmp_path, 1, tree)


HASH = nn.NGramHash(40, (2, 3), 1, 30, boundary=0, padding=1, seed=3)


def ngram_state(key=0, **fields):
    spec = nn.ngram_spec(dataclasses.replace(HASH, **fields), DIM, cache=CacheSpec(num_rows=16))
    return mpembed.init(jax.random.key(key), spec, ADAGRAD)


@pytest.mark.parametrize(
    "fields",
    named({"seed": {"seed": 0}, "boundary": {"boundary": None}, "padding": {"padding": 2}}),
)
def test_rows_of_another_hash_of_n_grams_are_not_restored(fields, tmp_path):
    state = ngram_state()
    checkpoint.save(tmp_path, 1, {"memory": state})
    assert_same(checkpoint.restore(tmp_path, {"memory": ngram_state(1)})["memory"], state)
    message = r"'memory' was saved with the NGramHash \{.*'seed': 3\}, the target has"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, {"memory": ngram_state(1, **fields)})
    plain = dataclasses.replace(state.spec, ngrams=None)
    with pytest.raises(ValueError, match=f"{message} None"):
        checkpoint.restore(tmp_path, {"memory": mpembed.init(jax.random.key(0), plain, ADAGRAD)})


def test_a_checkpoint_that_does_not_tell_its_hash_of_n_grams_is_restored(tmp_path, caplog):
    """As earlier versions wrote it: neither fingerprint nor manifest know the hash."""
    wanted = ngram_state()
    plain = dataclasses.replace(wanted.spec, ngrams=None)
    checkpoint.save(tmp_path, 1, mpembed.init(jax.random.key(0), plain, ADAGRAD))
    with caplog.at_level(logging.WARNING):
        assert_same(checkpoint.restore(tmp_path, ngram_state(1)), wanted)
    assert "does not tell its NGramHash; taken for that of the target, {'bound" in caplog.text


@pytest.mark.slow
def test_an_average_of_states_is_not_saved_and_a_clock_is_not_on_disk(tmp_path):
    """The clock follows from the rest; a file without it says nothing of an average."""
    first = mpembed.init(jax.random.key(0), stack(), optax.sgd(0.1))
    ids = np.arange(8, dtype=np.int32)
    later = jax.jit(partial(training.step, tx=optax.sgd(0.1)))(first, ids).state
    half = np.float32(0.5)
    mix = lambda a, b: half * a + half * b if a.dtype == np.float32 else a  # noqa: E731
    average = jax.tree.map(mix, later, first)
    with pytest.raises(ValueError, match="belong to several states"):
        checkpoint.save(tmp_path, 1, {"emb": average})
    assert checkpoint.steps(tmp_path) == []
    checkpoint.save(tmp_path, 1, {"emb": later})
    text = (tmp_path / "step_1" / "manifest.json").read_text()
    body = json.loads(json.loads(text)["body"])
    assert "emb.step" in body["arrays"] and "emb.clock" not in body["arrays"]
    back = checkpoint.restore(tmp_path, {"emb": first})["emb"]
    assert_same(back, later)
    assert float(back.clock) == float(later.clock) != float(first.clock)


def test_a_directory_without_checkpoints_says_so(tmp_path):
    target = jnp.zeros(1)
    assert checkpoint.steps(tmp_path / "none") == []
    assert checkpoint.latest_step(tmp_path) is None
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint in .*none, which does not exist; save one first"
    ):
        checkpoint.restore(tmp_path / "none", target)
    checkpoint.save(tmp_path, 3, target)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 in .*; there are \[3\]"):
        checkpoint.restore(tmp_path, target, step=4)


IMPORTS = """
import json, sys
import mpembed_jax
before = "orbax" in sys.modules
from mpembed_jax import checkpoint
print(json.dumps([before, "orbax" in sys.modules]))
"""


@pytest.mark.slow
def test_orbax_is_imported_by_this_adapter_only(request):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=request.path.parents[2],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [False, True], done.stderr


def test_a_save_returns_before_it_is_complete(tmp_path, monkeypatch):
    """The end of the save, in the background, is held up until the call has returned."""
    tree, may_end = {"w": jnp.arange(1 << 10)}, threading.Event()
    write = saving.manifest.write

    def held_up(*args):
        assert may_end.wait(600), "the save waits for its end"
        write(*args)

    monkeypatch.setattr(saving.manifest, "write", held_up)
    under_way = checkpoint.save(tmp_path, 1, tree, wait=False)
    assert checkpoint.steps(tmp_path) == []
    may_end.set()
    under_way.wait()
    assert checkpoint.steps(tmp_path) == [1]


# --- into another format or cache


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained int8 state with dirty lines, and its folder; its optimizer rows are not zero."""
    emb = trained("int8-lfu", 0, 40)["emb"]
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(folder, 40, emb)
    assert bool(emb.cache.dirty.any())
    return folder, emb


def restored_into(folder, caplog, **options):
    target = jax.eval_shape(lambda: mpembed.init(jax.random.key(9), stack(**options), ADAGRAD))
    with caplog.at_level(logging.WARNING):
        emb = checkpoint.restore(folder, target)
    emb.check_spec()
    step = jax.jit(training.step, static_argnames="tx")
    trained = step(emb, np.arange(64, dtype=np.int32), ADAGRAD).state
    assert int(trained.step) == int(emb.step) + 1
    return emb


@pytest.mark.slow
def test_another_format_keeps_what_rows_mean(saved, caplog):
    """Lines are carried over bit for bit.

    Other rows lie within one step of the new grid, without bias. In float32 they are equal.
    """
    folder, emb = saved
    before, held = all_rows(emb), set(np.array(emb.cache.tags).ravel()) - {mpembed.NO_ID}
    outside = np.asarray([i for i in range(sum(SIZES)) if i not in held])
    for storage, bits in (("int4", 4), ("int2", 2), ("float32", None)):
        other = restored_into(folder, caplog, **{**CASES["int8-lfu"].options, "storage": storage})
        after = all_rows(other)
        np.testing.assert_array_equal(after[sorted(held)], before[sorted(held)])
        assert np.array(other.cache.dirty).sum() == len(held)  # each is newer than its row
        np.testing.assert_array_equal(
            np.array(other.row_state[0].sum_of_squares), np.array(emb.row_state[0].sum_of_squares)
        )
        if bits is None:
            np.testing.assert_array_equal(after, before)
            continue
        error, most = (after - before)[outside], np.abs(before[outside]).max(axis=1, keepdims=True)
        step = 1.02 * most / (2 ** (bits - 1) - 1)
        assert (np.abs(error) <= step).all()
        # Mean of n errors, each within one step: below 5 standard deviations of step / sqrt(4 n).
        assert abs((error / step).mean()) < 5 / np.sqrt(4 * error.size)
        assert np.abs(error).max() > 0
        assert f"rows of int8 symmetric bfloat16 encoded anew as {storage}" in caplog.text
        assert "cache lines carried over" in caplog.text


@pytest.mark.parametrize(
    "new",
    named(
        {
            "none": None,
            "smaller": CacheSpec(num_rows=64, ways=4),
            "lru": CacheSpec(**SMALL, policy="lru"),
        },
        fast={"smaller"},
        core={"none"},
    ),
)
def test_another_cache_starts_empty_after_a_flush(new, saved, caplog):
    """The same bits as `flush` leaves in the table; the rest of the state is carried over."""
    folder, emb = saved
    flushed = mpembed.flush(emb)
    other = restored_into(folder, caplog, **{**CASES["int8-lfu"].options, "cache": new})
    np.testing.assert_array_equal(np.array(other.table.rows), np.array(flushed.table.rows))
    for name in ("key", "step", "counters", "row_state"):
        assert_same(getattr(other, name), getattr(emb, name))
    assert "starts empty" in caplog.text
    assert f"{int(emb.cache.dirty.sum())} dirty lines written to their rows" in caplog.text
    if new is not None:
        assert (np.array(other.cache.tags) == mpembed.NO_ID).all()
    narrow = restored_into(
        folder, caplog, **{**CASES["int8-lfu"].options, "cache": new, "storage": "int4"}
    )
    assert np.abs(all_rows(narrow) - all_rows(emb)).max() < 0.5


@pytest.mark.slow
def test_optimizer_rows_change_their_dtype(saved, caplog, tmp_path):
    folder, emb = saved
    options = {**CASES["int8-lfu"].options, "row_state_dtype": "bfloat16"}
    narrow = restored_into(folder, caplog, **options)
    bits = np.array(narrow.row_state[0].sum_of_squares)
    wide = np.array(emb.row_state[0].sum_of_squares)
    assert bits.dtype == np.uint16
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert (np.abs(values - wide) <= wide * 2**-7).all()
    assert (values != wide).any()
    checkpoint.save(tmp_path, 0, narrow)
    back = restored_into(tmp_path, caplog, **CASES["int8-lfu"].options)
    np.testing.assert_array_equal(np.array(back.row_state[0].sum_of_squares), values)


@training.OPTAX_ADAM
def test_what_cannot_be_converted_is_refused(saved, tmp_path):
    folder, emb = saved
    options = CASES["int8-lfu"].options
    with pytest.raises(
        ValueError, match=r"saved with tables .*'a', 3000.* the target has .*'a', 3001"
    ):
        other = EmbeddingSpec(
            [TableSpec("a", SIZES[0] + 1), TableSpec("b", SIZES[1])], DIM, **options
        )
        checkpoint.restore(
            folder, jax.eval_shape(lambda: mpembed.init(jax.random.key(0), other, ADAGRAD))
        )
    for storage, tx in (("int4", ADAM), ("int8", ADAM), ("int8", optax.sgd(0.1))):
        other = stack(**{**options, "storage": storage})
        target = jax.eval_shape(lambda: mpembed.init(jax.random.key(0), other, tx))  # noqa: B023
        with pytest.raises(
            ValueError, match=r"state on disk is \['row_state.*sum_of_squares'\].* pass the same tx"
        ):
            checkpoint.restore(folder, target)
    pending, _ = jax.jit(mpembed.prefetch)(emb, batch(40))
    checkpoint.save(tmp_path, 0, pending)
    with pytest.raises(ValueError, match="between prefetch and apply_gradients"):
        without = stack(**{**options, "cache": None})
        checkpoint.restore(
            tmp_path, jax.eval_shape(lambda: mpembed.init(jax.random.key(0), without, ADAGRAD))
        )


def test_an_increment_is_converted_too(saved, caplog):
    folder, emb = saved
    flushed = jax.jit(mpembed.flush)(emb)
    checkpoint.save(folder, 41, flushed, tracker=checkpoint.track(emb))
    other = restored_into(
        folder, caplog, **{**CASES["int8-lfu"].options, "storage": "float32", "cache": None}
    )
    np.testing.assert_array_equal(
        all_rows(other), all_rows(dataclasses.replace(emb, table=flushed.table, cache=None))
    )


# --- over shards


def test_arrays_of_shards_are_a_permutation_of_one_devices(saved):
    """By definition: row r is row r div P of shard r mod P, sets and groups likewise.

    Tags are rows of their shard.
    """
    _, emb = saved
    num_rows = sum(SIZES) - 3  # not a multiple
    spec = EmbeddingSpec([TableSpec("a", num_rows)], DIM)
    arrays = {name: np.array(leaf) for name, leaf in leaves.named(emb).items()}
    for name, array in arrays.items():
        if name.startswith(("table.rows", "row_state")) and array.ndim:
            arrays[name] = array[:num_rows]
    arrays["cache.tags"] = np.where(
        arrays["cache.tags"] >= num_rows, mpembed.NO_ID, arrays["cache.tags"]
    )
    sets, ways = arrays["cache.tags"].shape
    for shards in (1, 2):
        spread = placements.by_shard(arrays, placements.Division(shards), spec)
        local = -(-num_rows // shards)
        for row in (0, 1, 2, 77, num_rows - 1):
            np.testing.assert_array_equal(
                spread["table.rows"][row % shards * local + row // shards],
                arrays["table.rows"][row],
            )
        share = sets // shards
        for line, tag in enumerate(arrays["cache.tags"].ravel()):
            number, way = divmod(line, ways)
            place = (number % shards * share + number // shards, way)
            if tag == mpembed.NO_ID:
                assert spread["cache.tags"][place] == tag
            else:
                assert spread["cache.tags"][place] * shards + number % shards == tag
            np.testing.assert_array_equal(
                spread["cache.rows"][place[0] * ways + way], arrays["cache.rows"][line]
            )
            assert spread["cache.dirty"][place] == arrays["cache.dirty"][number, way]
        groups = arrays["cache.sketch"].shape[1]
        for group in range(groups):
            place = group % shards * (groups // shards) + group // shards
            np.testing.assert_array_equal(
                spread["cache.sketch"][:, place], arrays["cache.sketch"][:, group]
            )
        back = placements.by_id(spread, placements.Division(shards), spec)
        for name, array in arrays.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)
