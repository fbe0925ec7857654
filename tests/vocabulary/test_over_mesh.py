"""Raw ids over a mesh: any number of devices admits, recycles and trains the rows of one device."""

import dataclasses
import json
import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from cases import named
from flax import nnx
from jax.sharding import PartitionSpec

import mpembed_jax as mpembed
from mpembed_jax import checkpoint, nn, sharding, vocabularies
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.vocabulary import pool

TX = mpembed.optim.rowwise_adagrad(0.5)
VOCABULARY = mpembed.VocabularySpec(560, admit_after=2, ways=4, shared_rows=3, sketch_bytes=2)
SPEC = mpembed.EmbeddingSpec(
    (mpembed.TableSpec("user", initial_bound=0.25), mpembed.TableSpec("item")),
    8,
    storage="int8",
    cache=mpembed.CacheSpec(num_rows=280, ways=4),
    vocabulary=VOCABULARY,
)


class Over(NamedTuple):
    shape: tuple[int, ...]
    kind: str = "rows"
    batch_axes: tuple[str, ...] | None = None
    capacity: float = 1.25


MESHES = {
    "two": Over((2,)),
    "eight": Over((8,)),
    "narrow": Over((4,), capacity=0.3),
    "replicas": Over((2, 4)),
    "same_batch": Over((4,), batch_axes=()),
    "replicated": Over((4,), kind="replicated"),
}


def placed(over):
    """The arguments of init for a mesh: its last axis divides rows."""
    names = ("data", "rows")[-len(over.shape) :]
    mesh = jax.make_mesh(over.shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    placement = Placement(
        over.kind, capacity=over.capacity, batch_axes=over.batch_axes, summation_blocks=None
    )
    return {"mesh": mesh, "axis_name": "rows", "placement": placement}


def batches(seed, num, drift=9):
    """Skewed raw ids of two columns, which drift so that rows are recycled."""
    rng = np.random.default_rng(seed)
    for number in range(num):
        ids = np.minimum(rng.zipf(1.2, (64, 2)), 900).astype(np.int64) + drift * (seed + number)
        yield ids, rng.random((64, 2)) < 0.9


def gradient(rows, plan):
    # Sums of eighths are exact in any order.
    return jax.grad(lambda rows: jnp.sum(mpembed.pool(rows, plan.inverse)) / 8)(rows)


def local_step(state, pairs):
    return training.step(state, pairs, TX, gradient).state


one_step = jax.jit(local_step, donate_argnums=0)


@partial(jax.jit, donate_argnums=0)
def mesh_step(state, pairs):
    layout, specs = state.layout, mpembed.partition_specs(state)
    batch = PartitionSpec(layout.batch_axes or None)
    run = jax.shard_map(local_step, mesh=layout.mesh, in_specs=(specs, batch), out_specs=specs)
    return run(state, pairs)


def trained(state, seed, num):
    step = one_step if state.layout is None else mesh_step
    for ids, where in batches(seed, num):
        state = step(state, state.spec.raw_ids(ids, where))
    return state


def assert_same_rows(state, other):
    """Compares the states on one device; the counters of exchanges differ."""
    here = sharding.relayout(state) if state.layout is not None else state
    training.assert_same(
        dataclasses.replace(here, implementation="xla", counters=None),
        dataclasses.replace(other, implementation="xla", counters=None),
    )


@pytest.fixture(scope="module")
def on_one_device():
    return trained(mpembed.init(jax.random.key(0), SPEC, TX), 0, 40)


@pytest.mark.slow
@pytest.mark.parametrize("case", named(list(MESHES), fast={"eight"}, core=()))
def test_any_mesh_admits_recycles_and_trains_the_rows_of_one_device(case, on_one_device):
    """Modules and moved states train over the other meshes, too.

    Ids beyond the room of an exchange are also in tests/mesh/test_sharding.py.
    """
    state = trained(mpembed.init(jax.random.key(0), SPEC, TX, **placed(MESHES[case])), 0, 40)
    assert_same_rows(state, on_one_device)
    with warnings.catch_warnings(action="ignore"):  # a third of the rows finds no place in cache
        counted, on_mesh = (mpembed.stats(s).vocabulary for s in (on_one_device, state))
    assert on_mesh == counted
    assert counted.recyclings > 100 and counted.refusals > 0 and counted.shared_requests > 100


@pytest.mark.parametrize(
    "case", named(["two", "replicas", "replicated"], fast={"replicated"}, core={"replicas"})
)
def test_a_mesh_reads_what_one_device_reads(case, on_one_device):
    """Outside of jax.shard_map, and inside, where each device has its own ids."""
    over = placed(MESHES[case])
    state = sharding.relayout(on_one_device, **over)
    ids, where = next(batches(38, 1))
    pairs = SPEC.raw_ids(ids, where)
    want = jax.jit(mpembed.read)(on_one_device, pairs)
    np.testing.assert_array_equal(jax.jit(mpembed.read)(state, pairs[:61]), want[:61])
    batch = PartitionSpec(state.layout.batch_axes)
    run = jax.shard_map(
        mpembed.read,
        mesh=state.layout.mesh,
        in_specs=(mpembed.partition_specs(state), batch),
        out_specs=batch,
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(run)(state, pairs), want)


@pytest.mark.slow
def test_training_goes_on_after_moves_and_restores_over_other_meshes(tmp_path, on_one_device):
    want = trained(sharding.relayout(on_one_device), 40, 8)
    four = sharding.relayout(on_one_device, **placed(Over((4,))))
    checkpoint.save(tmp_path / "four", 1, four)
    for over in (None, Over((8,))):
        moved = {} if over is None else placed(over)
        template = mpembed.init(jax.random.key(5), SPEC, TX, **moved)
        restored = checkpoint.restore(tmp_path / "four", template)
        assert_same_rows(trained(restored, 40, 8), want)
        assert_same_rows(trained(sharding.relayout(four, **moved), 40, 8), want)


@jax.jit
def tracked_step(state, tracker, pairs):
    layout = state.layout
    specs = (mpembed.partition_specs(state), checkpoint.partition_specs(tracker))

    def run(state, tracker, pairs):
        state, plan, _ = training.step(state, pairs, TX, gradient)
        return state, checkpoint.mark(tracker, plan)

    batch = PartitionSpec(layout.batch_axes or None)
    whole = jax.shard_map(run, mesh=layout.mesh, in_specs=(*specs, batch), out_specs=specs)
    return whole(state, tracker, pairs)


def recyclings(state):
    return int(state.vocabulary.counters[pool.COUNTERS.index("recyclings"), 0])


@pytest.mark.parametrize("shards", named({"two": 2, "four": 4}, core={"four"}))
def test_increments_over_a_mesh_restore_over_any_other_as_a_full_checkpoint_does(
    shards, tmp_path, on_one_device
):
    """Ids are forgotten before the chain, rows change their owners in it, and lines are flushed.

    Increments go to other meshes in tests/checkpoint/test_checkpoint_sharded.py.
    """
    state = LIFE["forget"](sharding.relayout(on_one_device, **placed(Over((shards,)))))
    checkpoint.save(tmp_path / "links", 0, state)
    for link in (1, 2):
        tracker, before = checkpoint.track(state), recyclings(state)
        for ids, where in batches(60 * link, 2):
            state, tracker = tracked_step(state, tracker, SPEC.raw_ids(ids, where))
        assert recyclings(state) > before
        state = jax.jit(mpembed.flush)(state) if link == 1 else state
        checkpoint.save(tmp_path / "links", link, state, tracker=tracker)
        file = tmp_path / f"links/step_{link}/manifest.json"
        assert json.loads(json.loads(file.read_text())["body"])["base"]["step"] == link - 1
    checkpoint.save(tmp_path / "full", 2, state)
    for over in (None, Over((shards,))):
        moved = {} if over is None else placed(over)
        target = mpembed.init(jax.random.key(5), SPEC, TX, **moved)
        got, want = (checkpoint.restore(tmp_path / name, target) for name in ("links", "full"))
        training.assert_same(got, want)
        if over == Over((shards,)):
            training.assert_same(got, state)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["two", "replicas"])
def test_modules_over_a_mesh_train_the_rows_of_one_device(case):
    """The whole command trains the verbs above, and modules in tests/mesh/test_sharding_nn.py."""

    @nnx.jit
    def train(module, pairs):
        module.prefetch(pairs)
        grads = nnx.grad(lambda m: jnp.sum(m(pairs)["user"]) / 8 + jnp.sum(m(pairs)["item"]) / 4)
        nn.apply_gradients(module, grads(module))

    modules = [
        nn.CachedEmbedBags(SPEC, TX, combiner=None, rngs=nnx.Rngs(0), **over)
        for over in ({}, placed(MESHES[case]))
    ]
    for ids, _ in batches(0, 12):
        for module in modules:
            train(module, {"user": ids[:, 0].astype(np.int32), "item": ids[:, 1].astype(np.int32)})
    states = [module.stacks[0].embedding_state for module in modules]
    assert_same_rows(states[1], sharding.relayout(states[0]))
    for module in modules:
        module.eval()
    ids, _ = next(batches(3, 1))
    features = {"user": ids[:30, 0], "item": ids[:30, 1]}
    one, mesh = (module(features) for module in modules)
    for feature in features:
        np.testing.assert_array_equal(one[feature], mesh[feature])


@pytest.mark.exhaustive
def test_calls_over_a_mesh_find_the_rows_of_other_positions_by_raw_ids(on_one_device):
    """Other orders and parts of the prefetched ids, in jit and outside; others are NaN.

    The whole command has calls by row numbers, in tests/mesh/test_sharding_nn.py.
    """
    over = placed(MESHES["replicas"])
    module = nn.CachedEmbedBags(SPEC, TX, combiner=None, rngs=nnx.Rngs(0), **over)
    module.set_states([sharding.relayout(on_one_device, **over)])
    ids = np.arange(300, 348, 3, dtype=np.int32)
    features = {"user": ids, "item": ids}
    calls = ({"user": ids[::-1], "item": ids}, {"item": ids[8:]})

    def step(module, features, calls):
        module.prefetch(features)
        called = [module(call) for call in calls]
        nn.discard(module)
        return called, [nnx.view(module, deterministic=True)(call) for call in calls]

    for run in (nnx.jit(step), step):
        called, read = run(module, features, calls)
        jax.tree.map(np.testing.assert_array_equal, called, read)
    strangers = {"item": np.arange(2**20, 2**20 + 16, dtype=np.int32)}
    ((missing,), _) = nnx.jit(step)(module, features, [strangers])
    assert np.isnan(missing["item"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY], ids=["row numbers", "raw ids"])
def test_a_batch_without_ids_is_read_and_trained_over_a_mesh(vocabulary):
    spec = SPEC if vocabulary else mpembed.EmbeddingSpec(mpembed.TableSpec("user", 500), 8)
    spec = dataclasses.replace(spec, cache=None)
    module = nn.CachedEmbedBags(spec, TX, combiner=None, rngs=nnx.Rngs(0), **placed(Over((4,))))
    ids = {"user": np.zeros((4, 0), np.int32)}

    @nnx.jit
    def step(module, ids):
        module.prefetch(ids)
        loss, grads = nnx.value_and_grad(lambda module: module(ids)["user"].sum())(module)
        nn.apply_gradients(module, grads)
        return loss, nnx.view(module, deterministic=True)(ids)["user"]

    loss, read = step(module, ids)
    assert loss == 0
    assert read.shape == (4, 0, 8)


@pytest.mark.exhaustive
def test_inside_pmap_the_rows_are_those_of_one_device():
    """The whole command has row numbers inside pmap, in tests/mesh/test_sharding.py."""
    devices = jax.devices()[:4]
    make = jax.pmap(
        lambda key: mpembed.init(key, SPEC, TX, axis_name="rows"), "rows", devices=devices
    )
    state = make(jnp.broadcast_to(jax.random.key_data(jax.random.key(0)), (4, 2)))
    run = jax.pmap(local_step, "rows", donate_argnums=0, devices=devices)
    one = mpembed.init(jax.random.key(0), SPEC, TX)
    for ids, where in batches(0, 10):
        pairs = SPEC.raw_ids(ids, where)
        one = one_step(one, pairs)
        state = run(state, pairs.reshape(4, 16, 2, 2))
    num = SPEC.num_rows
    rows = np.asarray(state.table.rows).swapaxes(0, 1).reshape(-1, one.table.rows.shape[1])[:num]
    np.testing.assert_array_equal(rows, one.table.rows)
    owners = one.vocabulary.owners
    sets = np.asarray(state.vocabulary.owners).swapaxes(0, 1).reshape(owners.shape)
    np.testing.assert_array_equal(sets, owners)


LIFE = {
    "grow": lambda state: vocabularies.grow(state, 1400),
    "shrink": lambda state: vocabularies.shrink(state, 300),
    "add_tables": lambda state: vocabularies.add_tables(state, mpembed.TableSpec("city")),
    "from_counts": lambda state: vocabularies.from_counts(
        state, SPEC.raw_ids({"user": np.arange(300)}), {"user": np.arange(300)}
    ),
    "forget": lambda state: vocabularies.forget(
        state, SPEC.raw_ids({"user": np.arange(380), "item": np.arange(40)})
    ),
}


@pytest.mark.parametrize("change", named(list(LIFE), core={"from_counts", "forget"}))
def test_vocabularies_over_a_mesh_change_and_train_as_on_one_device(change, on_one_device):
    """Growing and shrinking move owners by the same code, and added tables move none.

    The whole command grows on one device in tests/test_vocabularies.py, and moves rows over a mesh
    to a larger stack in tests/test_restacking.py.
    """
    with warnings.catch_warnings(action="ignore"):  # lines without room are written back
        one = LIFE[change](sharding.relayout(on_one_device))
        four = LIFE[change](sharding.relayout(on_one_device, **placed(Over((4,)))))
    assert four.layout is not None
    assert_same_rows(four, one)
    assert_same_rows(_further(four), _further(one))


def _further(state):
    """Six more steps of the first two features."""
    for ids, where in batches(44, 6):
        pairs = SPEC.raw_ids(ids, where)
        state = (one_step if state.layout is None else mesh_step)(state, pairs)
    return state


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="share one pool of rows"):
        mpembed.init(jax.random.key(0), SPEC, TX, **placed(Over((2,), kind="tables")))
    few = dataclasses.replace(SPEC, cache=None, vocabulary=mpembed.VocabularySpec(64, ways=8))
    with pytest.raises(ValueError, match=r"8 sets of the vocabulary's pool .* over 4 shards"):
        mpembed.init(jax.random.key(0), few, TX, **placed(Over((4,))))
    assert sharding.plan(few, 4, replicate_bytes=0) == Placement("replicated")
    assert sharding.plan(SPEC, 4, replicate_bytes=0) == Placement("rows")
    with pytest.raises(ValueError, match="leave batches out"):
        sharding.plan(SPEC, 4, [np.zeros((8, 2, 2), np.uint32)], replicate_bytes=0)
