"""Checkpoints of tables in host memory hold the same bits as those of tables on the device.

They are restored from either memory to either. The device never holds such a table whole.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import named

import mpembed_jax as mpembed

pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")

from mpembed_jax import checkpoint
from mpembed_jax.arrays import indexing
from mpembed_jax.checkpoint import digests, host_memory, increments, leaves, saving

MOMENTUM = optax.sgd(0.125, momentum=0.5)
HOST = "pinned_host"
SMALL = 1 << 11  # bytes of a block: several of every array, the last one shorter
KINDS = pytest.mark.parametrize(
    "kinds", named([(None, HOST), (HOST, None), (HOST, HOST)], fast={f"{HOST}-{HOST}"})
)


def stack(kind, storage="int8"):
    cache = mpembed.CacheSpec(num_rows=32, ways=4)
    return mpembed.EmbeddingSpec([mpembed.TableSpec("t", 500)], 6, storage, cache, memory_kind=kind)


@cache
def first(kind, seed=0):
    return mpembed.init(jax.random.key(seed), stack(kind), MOMENTUM)


def batch(step):
    return np.random.default_rng(step).integers(0, 500, 40).astype(np.int32)


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(state, tracker, ids):
    state, plan, _ = training.step(state, ids, MOMENTUM, lambda rows, plan: rows * 8)
    return state, checkpoint.mark(tracker, plan)


def trained(kind, begin, end, state=None, tracker=None):
    """A state (not consumed) after the steps from `begin` to `end`, and a tracker of them."""
    state = jax.tree.map(jnp.copy, first(kind) if state is None else state)
    tracker = checkpoint.track(state) if tracker is None else tracker
    for step in range(begin, end):
        state, tracker = train_step(state, tracker, batch(step))
    return state, tracker


def assert_same(state, other):
    """Every bit is the same, and every array lies where a state of its spec keeps it.

    Its type says so, as its sharding does.
    """
    named = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True)
    for ((path, a), b), home in zip(
        named, jax.tree.leaves(first(state.spec.memory_kind)), strict=True
    ):
        assert a.dtype == b.dtype, path
        assert np.array(a).tobytes() == np.array(b).tobytes(), path
        assert a.sharding.memory_kind == home.sharding.memory_kind, path
        assert indexing.is_on_host(a) == indexing.is_on_host(home), path


@KINDS
def test_training_goes_on_after_a_restore_from_either_memory_to_either(kinds, tmp_path):
    """Into a live state and into shapes, which do not say where a table is kept."""
    before, after = kinds
    state, _ = trained(before, 0, 4)
    checkpoint.save(tmp_path, 4, {"emb": state})
    uninterrupted, _ = trained(before, 4, 8, state)
    for target in (first(after, 1), jax.eval_shape(lambda: first(after, 1))):
        restored = checkpoint.restore(tmp_path, {"emb": target})["emb"]
        assert_same(restored, state)
        assert_same(trained(after, 4, 8, restored)[0], uninterrupted)


@KINDS
def test_increments_restore_from_either_memory_to_either(kinds, tmp_path):
    before, after = kinds
    state, _ = trained(before, 0, 4)
    full = checkpoint.save(tmp_path, 4, {"emb": state})
    for step in (4, 6):
        state, tracker = trained(before, step, step + 2, state)
        assert (
            checkpoint.save(tmp_path, step + 2, {"emb": state}, tracker=tracker).nbytes
            < full.nbytes
        )
    restored = checkpoint.restore(tmp_path, {"emb": first(after, 1)})["emb"]
    assert_same(restored, state)
    assert_same(trained(after, 8, 10, restored)[0], trained(before, 8, 10, state)[0])


def test_a_save_in_the_background_keeps_the_values_of_its_call(tmp_path):
    state, tracker = trained(HOST, 0, 4)
    wanted = jax.tree.map(np.array, state)
    # Where jax.device_put to host memory copies nothing, as on accelerators, orbax would read what
    # the steps overwrite.
    assert isinstance(saving._snapshot(state.table.rows), np.ndarray)
    background = checkpoint.save(tmp_path, 4, {"emb": state}, wait=False)
    for step in range(4, 8):
        state, tracker = train_step(state, tracker, batch(step))
    background.wait()
    assert_same(checkpoint.restore(tmp_path, {"emb": first(HOST, 1)})["emb"], wanted)


def test_a_damaged_file_is_refused_and_the_older_checkpoint_taken(tmp_path):
    older, _ = trained(HOST, 0, 2)
    checkpoint.save(tmp_path, 2, {"emb": older})
    checkpoint.save(tmp_path, 4, {"emb": trained(HOST, 2, 4, older)[0]})
    file = max(
        (f for f in (tmp_path / "step_4").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="step 4"):
        checkpoint.restore(tmp_path, {"emb": first(HOST)}, step=4)
    assert_same(checkpoint.restore(tmp_path, {"emb": first(HOST)})["emb"], older)


@pytest.mark.slow
def test_another_format_is_encoded_anew_in_host_memory(tmp_path):
    """To the bits that the same conversion makes on the device."""
    state, _ = trained(HOST, 0, 4)
    checkpoint.save(tmp_path, 4, {"emb": state})
    results = []
    for kind in (HOST, None):
        target = mpembed.init(jax.random.key(1), stack(kind, "int4"), MOMENTUM)
        restored = checkpoint.restore(tmp_path, {"emb": target})["emb"]
        assert indexing.is_on_host(restored.table.rows) == (kind == HOST)
        results.append(jax.device_get(jax.tree.leaves(trained(kind, 4, 6, restored)[0])))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_the_digest_of_a_table_in_host_memory_is_that_of_the_table_on_the_device():
    """In blocks of any size."""
    states = [trained(kind, 0, 4)[0] for kind in (None, HOST)]
    wanted = digests.digest_of(states[0]).tolist()
    assert digests.digest_of(states[1]).tolist() == wanted
    arrays = leaves.named(states[1])
    rows, lines = digests.row_names(states[1])
    assert digests.digest({n: arrays[n] for n in rows + lines}, SMALL).tolist() == wanted


def test_no_more_than_a_block_is_on_the_device_at_once(monkeypatch):
    array = first(HOST).table.rows
    assert array.nbytes > SMALL
    read = [(at, np.asarray(rows)) for at, rows in host_memory.blocks(array, SMALL)]
    assert all(rows.nbytes <= SMALL for _, rows in read)
    assert [at for at, _ in read] == np.cumsum([0, *[len(rows) for _, rows in read]])[:-1].tolist()
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in read]), array)
    np.testing.assert_array_equal(host_memory.to_numpy(array, SMALL), array)
    sent = host_memory.from_numpy(np.array(array), HOST, block_bytes=SMALL)
    assert indexing.is_on_host(sent)
    np.testing.assert_array_equal(sent, array)
    take, sizes = indexing.take, []
    monkeypatch.setattr(
        indexing, "take", lambda rows, index: sizes.append(index.size) or take(rows, index)
    )
    index = np.arange(500, dtype=np.int32)[::-1]
    np.testing.assert_array_equal(increments.gather(array, index), np.array(array)[index])
    sizes.clear()
    np.testing.assert_array_equal(host_memory.gather(array, index, SMALL), np.array(array)[index])
    assert max(sizes) * array.nbytes // len(array) <= SMALL


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (700,), (700, 3)])
def test_arrays_outside_of_embedding_states_stay_in_host_memory(shape, tmp_path):
    values = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
    tree = {
        "x": host_memory.from_numpy(values, HOST, block_bytes=SMALL),
        "step": np.arange(3),
    }  # orbax writes no tree without entries
    checkpoint.save(tmp_path, 0, tree)
    restored = checkpoint.restore(tmp_path, tree)["x"]
    assert indexing.is_on_host(restored)
    np.testing.assert_array_equal(restored, values)
