"""Nothing is lost: the parts of experiments/faults/run.py, in small."""

import json
import logging
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import named
from hypothesis import given, settings
from hypothesis import strategies as st
from training import OPTAX_ADAM

pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")

import mpembed_jax as mpembed
from experiments.faults import calls, files, invariants, killed_worker, mutations, run, sequences
from mpembed_jax import checkpoint


@pytest.mark.exhaustive
def test_a_run_killed_three_times_ends_in_the_same_bits():
    """The whole command interrupts a training twice in test_unfinished.py, and kills a writer in
    tests/checkpoint/test_checkpoint_faults.py.
    """
    found = run.kill_and_resume(kills=3, steps=50)
    assert found["kills"] == 3
    assert found["bits equal"]
    assert sorted(found["resumed at steps"]) == found["resumed at steps"]
    assert found["resumed at steps"][-1] > 0  # from a checkpoint, not from the beginning again


@pytest.mark.exhaustive
def test_a_run_of_two_processes_with_a_killed_worker_ends_in_the_same_bits():
    """The whole command has two processes that save together, and a killed writer, in
    tests/checkpoint/test_checkpoint_faults.py.
    """
    found = killed_worker.kill_and_resume(kills=1, steps=20)
    assert found["bits equal"]
    assert found["resumed at steps"][0] == 0 < found["resumed at steps"][-1]


@pytest.mark.exhaustive
@OPTAX_ADAM
def test_every_array_cut_or_changed_is_refused_by_name(caplog):
    """tests/checkpoint/test_checkpoint_faults.py damages single arrays."""
    with caplog.at_level(logging.CRITICAL):
        found = files.damage(fallback_every=8)
    assert found["files"] >= found["arrays"] >= 40
    assert found["refusals"] == 4 * (found["files"] - 4)


@pytest.mark.exhaustive
def test_full_and_vanished_disks_lose_nothing(tmp_path, request):
    """In a process of its own. tests/checkpoint/test_checkpoint_faults.py has full disks, too.

    Orbax leaves unfinished writes behind when one fails, which would be reported elsewhere.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.faults.run",
        "--only",
        "disks",
        "--out",
        str(tmp_path / "report.json"),
    ]
    done = subprocess.run(command, cwd=request.path.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    messages = json.loads((tmp_path / "report.json").read_text())["parts"]["disks"]
    for name in ("seconds", "commit", "command"):
        messages.pop(name)
    is_real = "a device of" in messages.pop("disk full by")
    assert ("No space left on device" if is_real else "File too large") in messages["disk full"]
    assert "Permission denied" in messages["permission denied"]
    assert all("checkpoints saved earlier are unchanged" in m for m in messages.values())


@pytest.mark.slow
def test_ids_from_hell_change_only_what_was_asked_for():
    found = invariants.ids_from_hell(300)
    assert found["examples"] >= 300
    assert min(found.values()) > 100


@pytest.mark.slow
def test_bad_gradients_stay_where_they_are():
    found = invariants.bad_gradients(40, ("int8", "float32"))
    assert found["rows skipped"] > 20
    assert found["rows that became no number"] > 20


@pytest.mark.exhaustive
def test_a_soak_of_a_thousand_steps():
    """Three states, invariants every 125 steps, increments restored exactly at the end, memory
    flat.

    The whole command checks the invariants after steps with bad ids and gradients, above, and
    increments in tests/checkpoint.
    """
    found = invariants.soak(1000, 125, ())
    assert found["checks"] == 8
    assert found["evictions"]["int8"] > 1000


@pytest.mark.parametrize("broken", ["duplicate", "foreign set", "dirty and empty", "counts"])
def test_the_invariants_notice_a_broken_state(broken):
    state = mpembed.init(jax.random.key(1), invariants._hell_spec("lfu", "int8"), invariants._SGD)
    ids = np.broadcast_to(
        np.arange(24, dtype=np.int32)[:, None], (24, 3)
    )  # as in the test above: compiled once
    state, _, _ = invariants._train(state, ids, np.ones((24, 3, 4), np.float32), invariants._SGD)
    invariants.check_state(state, 1)
    tags, dirty, counters = (
        np.array(x) for x in (state.cache.tags, state.cache.dirty, state.counters)
    )
    held = np.argwhere(tags != mpembed.NO_ID)
    empty = tuple(np.argwhere(tags == mpembed.NO_ID)[0])
    match broken:
        case "duplicate":
            tags[empty] = tags[tuple(held[0])]
        case "foreign set":
            first, second = tuple(held[0]), next(tuple(h) for h in held if h[0] != held[0][0])
            tags[first], tags[second] = tags[second], tags[first]
        case "dirty and empty":
            dirty[empty] = True
        case _:
            counters[2, 0] += 1
    cache = {**vars(state.cache), "tags": tags, "dirty": dirty}
    with pytest.raises(AssertionError):
        invariants.check_state(
            type(state)(
                **{**vars(state), "cache": mpembed.CacheState(**cache), "counters": counters}
            ),
            1,
        )


def test_steps_of_a_directory_ignore_what_is_unfinished(tmp_path):
    for name in ("step_3.orbax-checkpoint-tmp", "step_4", "step_x", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == []
    checkpoint.save(tmp_path, 3, np.arange(2))
    assert checkpoint.steps(tmp_path) == [3]
    assert not (tmp_path / "step_3.orbax-checkpoint-tmp").exists()
    with pytest.raises(checkpoint.CheckpointError, match="was not written by mpembed_jax"):
        checkpoint.save(tmp_path, 4, np.arange(2))
    assert (tmp_path / "step_4").exists()


# --- every call, random sequences, mutated files


LONG = ("incremental save", "restore of an increment")  # a thousand calls, of raw ids


def failed_calls(stride):
    """Every `stride`-th call, of the long operations every twelfth of these, meets every fault."""
    short = tuple(name for name in calls.OPERATIONS if name not in LONG)
    total = 0
    for names, each in ((short, stride), (LONG, 12 * stride)):
        if (found := calls.everything(each, names=names)) is None:
            pytest.skip("calls can be made to fail on Linux with a C compiler")
        for name in names:
            counts = found[name]
            assert counts["calls"] > 50, name
            assert counts["unnamed"] <= 12, f"{name}: messages without their cause"
            assert all(counts["faults"][k] >= counts["calls"] // each for k in calls.ERRORS), name
            total += sum(counts["faults"].values())
    return total


@pytest.mark.exhaustive
def test_many_calls_of_every_operation_fail_and_nothing_is_lost():
    """Every 29th call, each kind of fault beginning at another one.

    The whole command has full and forbidden disks above. It has processes without a free handle,
    short reads and failed saves in tests/checkpoint/test_checkpoint_faults.py.
    """
    assert failed_calls(29) > 40


ACTIONS = st.lists(
    st.builds(
        sequences.Action,
        kind=st.sampled_from(sequences.KINDS),
        step=st.integers(0, sequences.MAX_STEP),
        keep=st.sampled_from((0, 0, 1, 2)),
        devices=st.sampled_from(sequences.DEVICES),
        seed=st.integers(0, 999),
    ),
    max_size=15,
)


@pytest.mark.slow
@settings(max_examples=8)
@given(ACTIONS)
def test_a_directory_of_checkpoints_agrees_with_full_copies_in_memory(actions):
    sequences.run(actions)


@pytest.mark.exhaustive
def test_a_sequence_of_every_action_agrees_with_full_copies_in_memory(caplog):
    """Longer sequences than those of the test above."""
    with caplog.at_level(logging.CRITICAL):
        found = sequences.many(3, 20)
    for what in ("full saves", "increments", "files damaged", "restores refused", "saves refused"):
        assert found[what] > 0, what


@pytest.mark.parametrize(
    "kind",
    named(list(mutations.KINDS), fast={"parquet"}, core={"criteo cache", "serving"}),
)
def test_mutated_files_are_refused_or_right(kind):
    """The whole command cuts and changes every file of a checkpoint in a test above."""
    found = mutations.many(kind, 25, first=10**6)
    assert found["files"] == sum(
        n for what, n in found.items() if what.startswith(("ref", "right"))
    )
    assert found["right"] < 25
