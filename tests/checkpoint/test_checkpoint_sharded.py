"""Checkpoints of stacks over a mesh are restored on any number of devices.

The rows, and the training that follows, are those of the state that was saved.
"""

import dataclasses
import json
import logging
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import shapes
import training
from cases import named
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from training import all_rows

import mpembed_jax as mpembed
from mpembed_jax import sharding

pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")

from mpembed_jax import checkpoint

SIZES, DIM, STEPS, BATCH = (1200, 2797, 2), 4, 12, 64  # V = 3,999: no multiple of 2
V = sum(SIZES)
SPEC = shapes.stack(SIZES, DIM, storage="int8", lines=256, ways=2)
TX = mpembed.optim.rowwise_adagrad(optax.linear_schedule(0.5, 0.25, 8))
TABLES = mpembed.Placement("tables", table_shards=(1, 0, 1))


def init(shards, seed=3, placement=None):
    mesh = None if shards is None else jax.make_mesh((shards,), ("x",), axis_types=(AxisType.Auto,))
    return mpembed.init(jax.random.key(seed), SPEC, TX, mesh=mesh, placement=placement)


def step(state, batch):
    ids, upstream = batch
    state, plan, _ = training.step(state, ids, TX, training.of_vectors(upstream))
    return state, plan.counts


@cache
def trainer(shards, placement=None):
    run = partial(jax.lax.scan, step)
    if shards is not None:
        abstract = jax.eval_shape(lambda: init(shards, placement=placement))
        specs = mpembed.partition_specs(abstract)
        batch = P(None, abstract.layout.batch_axes)
        run = jax.shard_map(
            run, mesh=abstract.layout.mesh, in_specs=(specs, (batch, batch)), out_specs=(specs, P())
        )
    return jax.jit(run)


def stream(seed):
    ids = shapes.skewed_ids(seed, STEPS, BATCH, V, drift=5, ragged=True)
    return ids, shapes.dyadic(seed, (STEPS, BATCH, DIM))


def train(state, seed):
    """Trains STEPS steps more; the state is not donated."""
    layout = state.layout
    return trainer(layout and layout.shards, layout and layout.placement)(state, stream(seed))[0]


def assert_same(state, expected):
    """Every array of two states of one layout, bit for bit, and where they lie."""
    training.assert_same(state, expected)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained state of 4 devices, one of one device that was trained alike, and their folders."""
    folders = {shards: tmp_path_factory.mktemp(f"shards_{shards}") for shards in (4, None)}
    states = {}
    for shards, folder in folders.items():
        states[shards] = train(init(shards), 0)
        checkpoint.save(folder, STEPS, {"emb": states[shards], "position": STEPS})
    assert bool(np.asarray(states[4].cache.dirty).any())
    return folders, states


@pytest.fixture(scope="module")
def of_tables():
    return train(init(2, placement=TABLES), 0)


class Moved(NamedTuple):
    """The devices before and after a restore; None: one, without a mesh."""

    before: int | None
    after: int | None


MOVES = [Moved(4, 4), Moved(4, 2), Moved(4, 8), Moved(4, None), Moved(None, 4)]


@pytest.mark.parametrize("case", named(MOVES, core={"4-4", "4-None", "4-8", "None-4"}))
def test_a_state_comes_back_on_any_number_of_devices_and_trains_on(case, saved, caplog):
    """Rows as they were.

    All arrays those of `relayout`. On as many devices, training goes on as if uninterrupted.
    """
    folders, states = saved
    before, after = case
    target = {"emb": init(after, seed=9), "position": 0}
    with caplog.at_level(logging.WARNING):
        restored = checkpoint.restore(folders[before], target)
    state = restored["emb"]
    assert restored["position"] == STEPS
    assert ("placed on" in caplog.text) == (before != after)
    np.testing.assert_array_equal(all_rows(state), all_rows(states[before]))
    layout = target["emb"].layout
    moved = (
        states[before]
        if before == after
        else sharding.relayout(states[before], mesh=layout and layout.mesh)
    )
    assert_same(state, moved)
    if (
        before == after
    ):  # elsewhere it is the state that relayout makes, which test_sharding trains on
        assert_same(train(state, 1), train(states[before], 1))


@pytest.mark.slow
def test_a_state_comes_back_replicated_and_divided_again(saved, tmp_path):
    folders, states = saved
    everywhere = mpembed.Placement("replicated")
    copies = checkpoint.restore(folders[4], {"emb": init(4, 9, everywhere), "position": 0})["emb"]
    assert_same(copies, sharding.relayout(states[4], mesh=copies.layout.mesh, placement=everywhere))
    checkpoint.save(tmp_path, 1, copies)
    divided = checkpoint.restore(tmp_path, init(4))
    assert_same(divided, sharding.relayout(copies, mesh=copies.layout.mesh))


@pytest.mark.slow
def test_a_target_of_shapes_is_placed_by_its_layout(saved):
    folders, states = saved
    target = {"emb": jax.eval_shape(lambda: init(4)), "position": 0}
    assert_same(checkpoint.restore(folders[4], target)["emb"], states[4])


@pytest.mark.parametrize("after", named([None, 4], fast=()))
def test_whole_tables_move_with_their_dirty_lines_written(
    after, saved, of_tables, tmp_path, caplog
):
    """From whole tables per shard to rows by MOD and back.

    As `relayout`, which flushes and begins with an empty cache.
    """
    state = of_tables
    checkpoint.save(tmp_path, 1, state)
    assert_same(checkpoint.restore(tmp_path, init(2, 9, TABLES)), state)
    target = init(after, 9)
    with caplog.at_level(logging.WARNING):
        restored = checkpoint.restore(tmp_path, target)
    moved = sharding.relayout(state, mesh=target.layout and target.layout.mesh)
    assert_same(restored, moved)
    assert "of 2 shards of whole tables (1, 0, 1) placed on" in caplog.text
    folders, states = saved
    back = checkpoint.restore(folders[4], {"emb": init(2, 9, TABLES), "position": 0})["emb"]
    layout = back.layout
    assert_same(back, sharding.relayout(states[4], mesh=layout.mesh, placement=TABLES))


@pytest.mark.slow
def test_a_format_is_changed_on_whole_tables_with_their_lines(of_tables, tmp_path):
    """The cache stays as it is where only the storage is another."""
    state = of_tables
    checkpoint.save(tmp_path, 1, state)
    mesh = state.layout.mesh
    target = mpembed.init(
        jax.random.key(0),
        dataclasses.replace(SPEC, storage="float32"),
        TX,
        mesh=mesh,
        placement=TABLES,
    )
    wide = checkpoint.restore(tmp_path, target)
    np.testing.assert_array_equal(all_rows(wide), all_rows(state))
    for name in ("tags", "rows", "priority", "sketch"):
        np.testing.assert_array_equal(getattr(wide.cache, name), getattr(state.cache, name))


# --- increments


@cache
def marked_trainer(shards, placement=None):
    """A few steps, each of them marked; donated, as in a loop."""
    abstract = jax.eval_shape(lambda: init(shards, placement=placement))

    def run(state, tracker, batches):
        def marked(carry, batch):
            (state, tracker), (ids, upstream) = carry, batch
            state, plan, _ = training.step(state, ids, TX, training.of_vectors(upstream))
            return (state, checkpoint.mark(tracker, plan)), None

        return jax.lax.scan(marked, (state, tracker), batches)[0]

    def train(state, tracker, batches):
        specs, of_tracker = mpembed.partition_specs(abstract), checkpoint.partition_specs(tracker)
        batch = P(None, abstract.layout.batch_axes)
        whole = jax.shard_map(
            run,
            mesh=abstract.layout.mesh,
            in_specs=(specs, of_tracker, (batch, batch)),
            out_specs=(specs, of_tracker),
        )
        return whole(state, tracker, batches)

    return jax.jit(run if abstract.layout is None else train, donate_argnums=(0, 1))


def marked(state, steps):
    """Trains a copy of the state over some steps of stream 1; returns it with its tracker."""
    layout, batches = state.layout, jax.tree.map(lambda a: a[steps], stream(1))
    tracker, state = checkpoint.track(state), jax.tree.map(jax.numpy.copy, state)
    return marked_trainer(layout and layout.mesh.size, layout and layout.placement)(
        state, tracker, batches
    )


def manifest_of(folder, step):
    return json.loads(json.loads((folder / f"step_{step}" / "manifest.json").read_text())["body"])


@pytest.mark.parametrize("kind", named(["rows", "tables", "replicated"], core={"rows"}))
def test_increments_over_a_mesh_restore_exactly_anywhere(kind, saved, of_tables, tmp_path):
    """Two links, a flush between their steps.

    On other devices too. As many rows as one device's increment holds.
    """
    _, states = saved
    state = states[4]
    if kind == "replicated":
        state = sharding.relayout(
            state, mesh=state.layout.mesh, placement=mpembed.Placement("replicated")
        )
    state = of_tables if kind == "tables" else state
    full = checkpoint.save(tmp_path, 0, {"emb": state})
    for link, steps in ((1, slice(0, 2)), (2, slice(2, 4))):
        after, tracker = marked(state, steps)
        if link == 1:
            after = jax.jit(mpembed.flush)(
                after
            )  # writes lines that were dirty, of rows that no step named
            assert (np.asarray(tracker.was_dirty) & ~np.asarray(tracker.bits)).any()
        part = checkpoint.save(tmp_path, link, {"emb": after}, tracker=tracker)
        assert part.nbytes < 0.7 * full.nbytes
        assert manifest_of(tmp_path, link)["base"]["step"] == link - 1
        assert_same(checkpoint.restore(tmp_path, {"emb": init(*place_of(state))})["emb"], after)
        state = after
    assert_same(checkpoint.restore(tmp_path, {"emb": init(None)})["emb"], sharding.relayout(state))
    if kind == "rows":
        assert_same(checkpoint.restore(tmp_path, {"emb": init(8)})["emb"], relaid(state, 8))
        one, tracker = marked(states[None], slice(0, 2))
        checkpoint.save(tmp_path / "one", 0, {"emb": states[None]})
        checkpoint.save(tmp_path / "one", 1, {"emb": jax.jit(mpembed.flush)(one)}, tracker=tracker)
        rows, lines = (
            [
                manifest_of(folder, 1)["arrays"][f"emb.touched_{kind}"]["shape"]
                for folder in (tmp_path, tmp_path / "one")
            ]
            for kind in ("rows", "lines")
        )
        assert rows[0] == rows[1]
        assert lines[0] == lines[1]


def place_of(state):
    return state.layout.mesh.size, 9, state.layout.placement


def relaid(state, shards):
    return sharding.relayout(state, mesh=init(shards).layout.mesh)


@pytest.mark.slow
def test_a_tracker_over_a_mesh_that_missed_a_step_is_refused(saved, tmp_path):
    _, states = saved
    checkpoint.save(tmp_path, 0, states[4])
    after, tracker = marked(states[4], slice(0, 2))
    checkpoint.save(tmp_path, 1, after, tracker=tracker)
    later, _ = marked(after, slice(2, 4))
    with pytest.raises(ValueError, match="did not see every step"):
        checkpoint.save(tmp_path, 2, later, tracker=tracker)
    with pytest.raises(ValueError, match=r"mark of a sharded state .* inside jax.shard_map"):
        checkpoint.mark(checkpoint.track(after), None)
    with pytest.raises(ValueError, match="another embedding state"):
        checkpoint.save(tmp_path, 2, sharding.relayout(after), tracker=tracker)
