"""A checkpoint is lost, mixed or hidden by no fault.

Full tables of handles, other versions, other writers, any name.
"""

import errno
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

import mpembed_jax as mpembed

pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")

from mpembed_jax import checkpoint
from mpembed_jax.checkpoint import files, leaves, saving

TX = mpembed.optim.rowwise_adagrad(0.1)
SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("a", 900), mpembed.TableSpec("b", 13)],
    8,
    "int8",
    mpembed.CacheSpec(num_rows=32, ways=4),
)


@cache
def first():
    return mpembed.init(jax.random.key(0), SPEC, TX)


@jax.jit
def train_step(state, tracker, ids):
    state, plan, _ = training.step(state, ids, TX, lambda rows, plan: rows + 1)
    return state, checkpoint.mark(tracker, plan)


def trained(state, step):
    """The state one step further, and a tracker of this step."""
    ids = np.random.default_rng(step).integers(0, SPEC.num_rows, 24).astype(np.int32)
    return train_step(state, checkpoint.track(state), ids)


def bits_of(tree):
    """Every leaf: its type and its bits."""
    found = {}
    for name, leaf in leaves.named(tree).items():
        array = jax.random.key_data(leaf) if leaves.is_key(leaf) else leaf
        is_array = isinstance(array, jax.Array | np.ndarray | np.generic)
        found[name] = (
            (type(leaf), str(array.dtype), array.shape, np.asarray(array).tobytes())
            if is_array
            else (type(leaf), leaf)
        )
    return found


def numbers(value, size=1000):
    return {"x": np.full(size, value), "n": value}


def restored(folder, step=None, like=None):
    return checkpoint.restore(folder, numbers(0) if like is None else like, step=step)["n"]


def manifest_of(folder, step):
    path = folder / f"step_{step}" / "manifest.json"
    return json.loads(json.loads(path.read_text())["body"])


def write_manifest(folder, step, body):
    """Writes a manifest with the right checksum, as anybody can."""
    text = json.dumps(body, sort_keys=True)
    outer = {"crc32": zlib.crc32(text.encode()), "body": text}
    (folder / f"step_{step}" / "manifest.json").write_text(json.dumps(outer))


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def damage(folder):
    """Changes one bit of the largest array."""
    path = max(
        (f for f in folder.rglob("*") if f.is_file() and f.parent != folder),
        key=lambda f: f.stat().st_size,
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- what cannot be read now, is of another version, or is damaged


@pytest.fixture
def no_free_handles():
    """Leaves no file handle to open, until the with statement ends."""

    class Starved:
        def __enter__(self):
            self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            self.held = [os.open(os.devnull, os.O_RDONLY)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.held[0] + 1, self.limits[1]))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)
            os.close(self.held.pop())

    return Starved()


def test_without_a_free_handle_a_good_checkpoint_stays(tmp_path, no_free_handles):
    checkpoint.save(tmp_path, 1, numbers(1))
    with (
        no_free_handles,
        pytest.raises(checkpoint.CheckpointError, match="Too many open files"),
    ):
        checkpoint.save(tmp_path, 1, numbers(2))
    assert checkpoint.steps(tmp_path) == [1]
    assert restored(tmp_path) == 1
    with pytest.raises(checkpoint.CheckpointError, match="is already a good checkpoint"):
        checkpoint.save(tmp_path, 1, numbers(2))
    checkpoint.save(tmp_path, 2, numbers(2))


def test_without_a_free_handle_a_restore_does_not_go_back(tmp_path, no_free_handles, monkeypatch):
    """Neither where no file can be opened, nor where only one of the newest cannot."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, numbers(step))
    with no_free_handles, pytest.raises((OSError, checkpoint.CheckpointError), match="Too many"):
        restored(tmp_path)
    opening, victim = os.open, largest_file(tmp_path / "step_2")

    def refuse(path, *args, **kwargs):
        if str(path) == str(victim):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opening(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(checkpoint.CheckpointError, match=r"step 2: .*Input/output.*with step="):
        restored(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"may be a good .*Input/output error"):
        checkpoint.save(tmp_path, 2, numbers(5))
    assert restored(tmp_path, step=1) == 1
    monkeypatch.undo()
    assert restored(tmp_path) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user to be")
def save_without_a_sight_of_its_folder(folder, monkeypatch, hidden):
    """Saves while the system does not show the unfinished folder at the looks in `hidden`.

    Returns the error, or None.
    """
    stat, looks = os.stat, iter(range(10**6))

    def fail(path, *args, **kwargs):
        if str(path).endswith("step_2.orbax-checkpoint-tmp") and next(looks) in hidden:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", fail)
    try:
        checkpoint.save(folder, 2, {"x": jnp.arange(9)})
    except checkpoint.CheckpointError as error:
        return error
    finally:
        monkeypatch.undo()
    return None


def test_a_save_whose_folder_orbax_does_not_see_says_why(tmp_path, monkeypatch):
    """Orbax drops the system's reason. If the system still has one, the message names it."""
    error = save_without_a_sight_of_its_folder(tmp_path, monkeypatch, range(10**6))
    assert "Input/output error" in str(error)
    errors = [
        save_without_a_sight_of_its_folder(tmp_path / str(look), monkeypatch, {look})
        for look in range(9)
    ]
    messages = [str(error) for error in errors if error is not None]
    assert any("shows it now, but did not when orbax looked; save again" in m for m in messages)
    assert all("orbax looked" in m or "Input/output error" in m for m in messages)
    checkpoint.save(tmp_path, 2, numbers(2))
    assert restored(tmp_path) == 2


class OneByte(io.FileIO):
    """A file whose reads return one byte, as the system may for any read."""

    def read(self, size=-1):
        return super().read(min(size, 1) if size >= 0 else 1)


def test_short_reads_are_no_damage(tmp_path, monkeypatch, caplog):
    checkpoint.save(tmp_path, 1, numbers(1, 20))
    checkpoint.save(tmp_path, 2, numbers(2, 20))

    def opened(path, mode, buffering, opener):
        return OneByte(path, mode, opener=opener)

    monkeypatch.setattr(files, "open", opened, raising=False)
    assert restored(tmp_path, like=numbers(0, 20)) == 2
    assert not caplog.records


def test_without_permission_to_read_a_good_checkpoint_stays(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):  # let the other user in
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    directory = tmp_path / "run"
    checkpoint.save(directory, 1, numbers(1))
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o777)
    victim = largest_file(directory / "step_1")
    victim.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(checkpoint.CheckpointError, match="Permission denied"):
            checkpoint.save(directory, 1, numbers(2))
        with pytest.raises(checkpoint.CheckpointError, match="Permission denied"):
            restored(directory)
    finally:
        os.seteuid(0)
    assert restored(directory) == 1


@pytest.mark.parametrize("place", ["body", "outside"])
def test_a_checkpoint_of_a_newer_version_is_neither_read_nor_replaced_nor_passed_over(
    place, tmp_path
):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, numbers(step))
    path = tmp_path / "step_2" / "manifest.json"
    if place == "body":
        write_manifest(tmp_path, 2, {**manifest_of(tmp_path, 2), "version": 3})
    else:
        path.write_text(json.dumps({"version": 3, "what": "a later format"}))
    content = path.read_bytes()
    for step in (2, None):
        with pytest.raises(
            checkpoint.CheckpointError, match="is of version 3, this library reads 2"
        ):
            restored(tmp_path, step)
    with pytest.raises(checkpoint.CheckpointError, match="is of version 3"):
        checkpoint.save(tmp_path, 2, numbers(5))
    assert path.read_bytes() == content
    checkpoint.save(tmp_path, 3, numbers(3), keep=1)  # deletes nothing that it cannot read
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_a_damaged_checkpoint_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, numbers(1))
    damage(tmp_path / "step_1")
    before = sorted(p.name for p in (tmp_path / "step_1").rglob("*"))

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving.manifest, "write", fail)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.save(tmp_path, 1, numbers(2))
    assert sorted(p.name for p in (tmp_path / "step_1").rglob("*")) == before
    monkeypatch.undo()
    checkpoint.save(tmp_path, 1, numbers(3))
    assert restored(tmp_path) == 3
    assert [p.name for p in tmp_path.iterdir() if p.name != ".writer"] == ["step_1"]


@pytest.mark.slow
def test_good_means_the_same_to_restore_and_to_save_chains_included(tmp_path, caplog):
    """After its base was damaged, an increment is refused by restore.

    So the run can save that step again.
    """
    state = first()
    checkpoint.save(tmp_path, 90, {"emb": state})
    middle, tracker = trained(state, 0)
    checkpoint.save(tmp_path, 100, {"emb": middle})
    newest, tracker = trained(middle, 1)
    checkpoint.save(tmp_path, 110, {"emb": newest}, tracker=tracker)
    damage(tmp_path / "step_100")
    for step in (100, 110):
        with pytest.raises(checkpoint.CheckpointError, match=r"step 100.*has changed bytes"):
            checkpoint.restore(tmp_path, {"emb": state}, step=step)
    back = checkpoint.restore(tmp_path, {"emb": first()})
    assert bits_of(back) == bits_of({"emb": state})
    checkpoint.save(tmp_path, 110, {"emb": newest})
    assert bits_of(checkpoint.restore(tmp_path, {"emb": state})) == bits_of({"emb": newest})
    with pytest.raises(checkpoint.CheckpointError, match="is already a good checkpoint"):
        checkpoint.save(tmp_path, 110, {"emb": newest})


@pytest.mark.slow
def test_an_increment_does_not_build_on_what_is_lost(tmp_path):
    state = first()
    checkpoint.save(tmp_path, 1, {"emb": state})
    after, tracker = trained(state, 0)
    largest_file(tmp_path / "step_1").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* holds the rows"):
        checkpoint.save(tmp_path, 2, {"emb": after}, tracker=tracker)
    checkpoint.save(tmp_path, 2, {"emb": after})
    assert bits_of(checkpoint.restore(tmp_path, {"emb": state})) == bits_of({"emb": after})


def test_a_manifest_that_is_damaged_does_not_stop_pruning(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, numbers(step))
    (tmp_path / "step_3" / "manifest.json").write_text("{}")
    checkpoint.save(tmp_path, 5, numbers(5), keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]


# --- two writers


WRITER = """
import sys, numpy as np
from mpembed_jax import checkpoint
from mpembed_jax.checkpoint import saving
folder, value = sys.argv[1], int(sys.argv[2])
if sys.argv[3] == "hold":
  write = saving.manifest.write
  def held_up(*args):
    print("writing", flush=True)
    sys.stdin.readline()
    write(*args)
  saving.manifest.write = held_up
for step in range(int(sys.argv[4])):
  try:
    arrays = {"x": np.full((40, 1000), value), "y": np.full(5, value)}
    checkpoint.save(folder, step, arrays | {"n": value})
    print("saved", step, flush=True)
  except checkpoint.CheckpointError as error:
    print("refused", str(error).splitlines()[0], flush=True)
"""


def start_writer(request, folder, value, mode, steps):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(value), mode, str(steps)],
        cwd=request.path.parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
def test_the_second_writer_is_told_who_the_first_is(tmp_path, request):
    """Also under another path of the same directory.

    The first one's checkpoint becomes complete.
    """
    with start_writer(request, tmp_path, 7, "hold", 1) as writer:
        assert writer.stdout.readline() == "writing\n"
        link = tmp_path.parent / f"{tmp_path.name}-link"
        link.symlink_to(tmp_path)
        for folder in (tmp_path, link):
            with pytest.raises(
                checkpoint.CheckpointError,
                match=rf"process {writer.pid} on \S+ \(since \d{{4}}-\d\d-\d\d .*\) saves in",
            ):
                checkpoint.save(folder, 5, numbers(5))
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "saved 0\n"
        checkpoint.save(tmp_path, 5, numbers(5))  # although the first one still runs
        writer.stdin.close()
    assert checkpoint.steps(tmp_path) == [0, 5]


@pytest.mark.slow
def test_the_claim_of_a_killed_writer_is_taken_over(tmp_path, request):
    with start_writer(request, tmp_path, 7, "hold", 1) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    checkpoint.save(tmp_path, 0, numbers(5))
    assert restored(tmp_path) == 5


@pytest.mark.slow
def test_two_writers_at_once_never_mix(tmp_path, request):
    """What is saved is one's or the other's; readers meanwhile see nothing else either."""
    writers = [start_writer(request, tmp_path, value, "go", 30) for value in (1, 2)]
    like = {"x": np.zeros((40, 1000), int), "y": np.zeros(5, int), "n": 0}
    seen = 0
    while any(writer.poll() is None for writer in writers):
        try:
            tree = checkpoint.restore(tmp_path, like)
        except FileNotFoundError:
            time.sleep(0.01)
            continue
        assert set(np.unique(tree["x"])) == set(np.unique(tree["y"])) == {tree["n"]}
        seen += 1
    said = [writer.communicate()[0].splitlines() for writer in writers]
    assert all(len(lines) == 30 for lines in said)
    assert all("good checkpoint" in t or "saves in" in t for s in said for t in s if "refused" in t)
    saved = [line.split()[1] for lines in said for line in lines if line.startswith("saved")]
    assert sorted(map(int, saved)) == checkpoint.steps(tmp_path)
    assert len(saved) == len(set(saved)) > 10
    assert seen > 3
    for step in checkpoint.steps(tmp_path):
        tree = checkpoint.restore(tmp_path, like, step=step)
        assert set(np.unique(tree["x"])) == set(np.unique(tree["y"])) == {tree["n"]}


def test_a_reader_is_told_when_its_checkpoint_was_replaced(tmp_path, monkeypatch):
    """A checkpoint that changes between the check of its files and their reading.

    Values of one must not go with arrays of the other.
    """
    checkpoint.save(tmp_path, 1, numbers(1))
    checkpoint.save(tmp_path / "other", 1, numbers(2))
    read = checkpoint.restoring.read_arrays

    def replaced(*args):
        (tmp_path / "step_1").rename(tmp_path / "away")
        (tmp_path / "other" / "step_1").rename(tmp_path / "step_1")
        chain = [manifest_of(tmp_path, 1)]
        return read(args[0], chain, args[2])

    monkeypatch.setattr(checkpoint.restoring, "read_arrays", replaced)
    with pytest.raises(
        checkpoint.CheckpointError, match="was replaced while it was being restored"
    ):
        restored(tmp_path)


# --- names


NAMES = [
    "checkpoint", "manifest.json", "_METADATA", "_CHECKPOINT_METADATA", "_sharding",
    "array_metadatas", "commit_success.txt", "..", ".", "", "a/b", "/", "\x00", "x" * 300,
    "é" * 200, "%2e", "tree", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_key_is_saved_and_restored(name, tmp_path):
    for step, tree in enumerate(
        [
            {name: np.arange(3)},
            {name: 5},
            {name: {name: jnp.arange(2), "x": np.zeros((0, 2))}, "other": [1, np.float32(2)]},
        ]
    ):
        checkpoint.save(tmp_path, step, tree)
        assert bits_of(checkpoint.restore(tmp_path, tree)) == bits_of(tree)


def test_keys_that_look_alike_are_kept_apart(tmp_path):
    emb = first()
    trees = [
        {"a": {"b": np.arange(1)}, "a.b": np.arange(2), "['a.b']": np.arange(3)},
        {"": np.arange(1), "tree": np.arange(2)},
        {"a": {"b": 1}, "a.b": 2},
        {"a": {"emb": emb}, "a.emb": trained(emb, 3)[0]},
        {"": emb, "x": 1},
        {"emb": emb, "emb.touched_rows": np.arange(5), "emb.touched_lines": 3},
    ]
    for step, tree in enumerate(trees):
        checkpoint.save(tmp_path, step, tree)
        assert bits_of(checkpoint.restore(tmp_path, tree)) == bits_of(tree), tree.keys()
    after, tracker = trained(emb, 0)
    tree = trees[-1] | {"emb": after}
    checkpoint.save(tmp_path, 99, tree, tracker=tracker)
    assert manifest_of(tmp_path, 99)["base"]
    assert bits_of(checkpoint.restore(tmp_path, tree)) == bits_of(tree)
    # A part of an ambiguous tree is refused, not guessed.
    with pytest.raises(ValueError, match="lacks leaves of the target"):
        checkpoint.restore(tmp_path, {"a.b": np.arange(2)}, step=0, partial=True)


def test_a_tree_without_arrays_is_saved(tmp_path):
    for step, tree in enumerate([{"step": 3}, {}, [], {"x": np.zeros((0, 3))}]):
        checkpoint.save(tmp_path, step, tree)
        assert bits_of(checkpoint.restore(tmp_path, tree)) == bits_of(tree)


@pytest.mark.parametrize("dtype", ["U5", "datetime64[s]", "i4,f4", "O"])
def test_an_array_that_cannot_be_written_is_named(dtype, tmp_path):
    with pytest.raises(TypeError, match="leaf 'x' is an array of"):
        checkpoint.save(tmp_path, 1, {"x": np.zeros(2, dtype)})
    assert list(tmp_path.iterdir()) == []


# --- a failed save and the next one


def test_a_failed_save_does_not_hinder_the_next(tmp_path, monkeypatch, caplog):
    """Not even if closing its checkpointer fails again, or if nobody waited for it."""
    checkpoint.save(tmp_path, 1, numbers(1))
    write = saving.manifest.write

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_to_close(self):
        raise OSError(errno.ENOSPC, "close: no space")

    for is_awaited in (True, False):
        monkeypatch.setattr(saving.manifest, "write", fail)
        monkeypatch.setattr(saving.ocp.AsyncCheckpointer, "close", fail_to_close)
        under_way = checkpoint.save(tmp_path, 2, numbers(2), wait=False)
        if is_awaited:
            for _ in range(2):
                with pytest.raises(checkpoint.CheckpointError, match=r"step 2 .* No space left"):
                    under_way.wait()
        else:
            under_way._thread.join()
        monkeypatch.setattr(saving.manifest, "write", write)
        step = 3 + is_awaited
        with caplog.at_level(logging.ERROR, "mpembed_jax.checkpoint"):
            checkpoint.save(tmp_path, step, numbers(step))
        assert restored(tmp_path, step) == step
        assert ("step 2 could not be saved" in caplog.text) == (not is_awaited)
        caplog.clear()
    assert checkpoint.steps(tmp_path) == [1, 3, 4]
    assert restored(tmp_path, 1) == 1


AT_EXIT = """
import sys, numpy as np
from mpembed_jax import checkpoint
checkpoint.save(sys.argv[1], 1, {"x": np.random.default_rng(0).random(3_000_000)}, wait=False)
"""


@pytest.mark.slow
def test_a_save_that_nobody_waits_for_is_complete_when_the_program_ends(tmp_path, request):
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path)],
        cwd=request.path.parents[2],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    tree = checkpoint.restore(tmp_path, {"x": np.zeros(3_000_000)})
    np.testing.assert_array_equal(tree["x"], np.random.default_rng(0).random(3_000_000))


# --- checkpoints of earlier code


def test_a_checkpoint_of_earlier_code_is_restored(tmp_path, request):
    """Full and incremental, written when folders still had the names of leaves.

    Increments go on from it.
    """
    with zipfile.ZipFile(request.path.parent / "version_1.zip") as archive:
        archive.extractall(tmp_path)
    tree = {
        "emb": first(),
        "key": jax.random.key(0),
        "odd": {
            "a/b c": np.zeros((2, 3)),
            "empty": np.zeros((2, 0), np.int8),
            "half": jnp.zeros(2, jnp.bfloat16),
        },
        "plain": {"position": 0, "loss": 0.0, "name": "", "iterator": b"", "on": False},
    }
    assert checkpoint.steps(tmp_path) == [4, 5]
    for step in (4, 5):
        back = checkpoint.restore(tmp_path, tree, step=step)
        with np.load(io.BytesIO((tmp_path / f"wanted_{step}.npz").read_bytes())) as wanted:
            for name, leaf in leaves.named(leaves.without_clocks(back["emb"])).items():
                np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
        back["emb"].check_spec()
        plain = dict(position=step, loss=0.25, name="é", iterator=b"\x00\xff", on=True)
        assert back["plain"] == plain
        np.testing.assert_array_equal(back["odd"]["a/b c"], np.arange(6.0).reshape(2, 3))
        np.testing.assert_array_equal(np.float32(back["odd"]["half"]), [1.5, -2])
        assert (jax.random.key_data(back["key"]) == jax.random.key_data(jax.random.key(5))).all()
    after, tracker = trained(back["emb"], 5)
    checkpoint.save(tmp_path, 6, {**back, "emb": after}, tracker=tracker)
    assert manifest_of(tmp_path, 6)["base"]["step"] == 5
    assert bits_of(checkpoint.restore(tmp_path, tree)) == bits_of({**back, "emb": after})


# --- files from strangers


def crafted(folder, change, step=1):
    """Changes a manifest and gives it the right checksum."""
    body = manifest_of(folder, step)
    change(body)
    write_manifest(folder, step, body)


def put(folder, body, name, content):
    """Writes a file of a checkpoint, with its right size and checksum in the manifest."""
    (folder / "step_1" / name).write_bytes(content)
    body["files"][name] = [len(content), zlib.crc32(content)]


def refused(folder, target, match):
    with pytest.raises(checkpoint.CheckpointError, match=match):
        checkpoint.restore(folder, target)
    assert [p for p in folder.iterdir() if p.name not in ("step_1", ".writer")] == []


def set_layout(folder, **fields):
    """Changes fields of the layout of array x, in a manifest with the right checksums."""

    def change(body):
        name = f"{body['arrays']['x']['key']}/.zarray"
        layout = json.loads((folder / "step_1" / name).read_text())
        put(folder, body, name, json.dumps({**layout, **fields}).encode())

    crafted(folder, change)


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_allocated(tmp_path):
    checkpoint.save(tmp_path, 1, numbers(1))
    good = {"shape": [1000], "chunks": [1000], "compressor": {"id": "zstd", "level": 1}}
    for fields in (
        {"chunks": [10**11]},
        {"shape": [10**11], "chunks": [10**11]},
        {"chunks": [1]},
        {"chunks": [0]},
        {"chunks": [-1]},
        {"chunks": "1000"},
        {"chunks": None},
        {"shape": [10, 100], "chunks": [10, 100]},
        {"dtype": "<f8"},
        {"fill_value": 1},
        {"filters": [{"id": "delta"}]},
        {"order": "F"},
        {"zarr_format": 3},
        {"dimension_separator": "/"},
        {"compressor": {"id": "blosc"}},
        {"compressor": None},
        {"compressor": 5},
    ):
        set_layout(tmp_path, **fields)
        refused(tmp_path, numbers(0), "array 'x': ")
        set_layout(tmp_path, **good, dtype="<i8", fill_value=None, filters=None, order="C",
                   zarr_format=2, dimension_separator=".")  # fmt: skip
        assert restored(tmp_path) == 1


def zstd(blocks, size):
    """A frame of zstd that says it becomes `size` bytes: of blocks (kind, length, content)."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + size.to_bytes(8, "little")
    for at, (kind, length, content) in enumerate(blocks):
        head = (at == len(blocks) - 1) | kind << 1 | length << 3
        frame += head.to_bytes(3, "little") + content
    return frame


def test_a_piece_that_would_swell_is_refused_before_it_is_decompressed(tmp_path):
    checkpoint.save(tmp_path, 1, numbers(1))
    repeated = (1, 1 << 17, b"a")
    pieces = {
        "becomes 2147483648 bytes": zstd([repeated], 1 << 31),
        "is not what zstd makes of 8000 bytes": zstd([repeated] * 10_000, 8000),
        "is not compressed": b"PK" * 50,
        "is not what zstd makes": zstd([(3, 5, b"aaaaa")], 8000),
        "has bytes after": zstd([(1, 8000, b"a")], 8000) + b"more",
    }
    for match, piece in pieces.items():
        crafted(tmp_path, lambda body: put(tmp_path, body, f"{key_of(body)}/0", piece))  # noqa: B023
        refused(tmp_path, numbers(0), match)
    frame = zstd([(1, 8000, b"\x01")], 8000)
    crafted(tmp_path, lambda body: put(tmp_path, body, f"{key_of(body)}/0", frame))
    assert checkpoint.restore(tmp_path, numbers(0))["x"][0] == 0x0101010101010101


def key_of(body, name="x"):
    return body["arrays"][name]["key"]


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd", "a/../../b", "..", "a/b/c", "a//b"]
)
def test_names_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    checkpoint.save(tmp_path, 1, numbers(1))
    body = manifest_of(tmp_path, 1)
    crafted(tmp_path, lambda body: body["arrays"]["x"].update(key=name))
    refused(tmp_path, numbers(0), r"is not a manifest: arrays\['x'\]\['key'\] is ")
    write_manifest(tmp_path, 1, body)
    crafted(tmp_path, lambda body: body["files"].update({name: [1, 1]}))
    refused(tmp_path, numbers(0), "is not a manifest: a name of files is ")


def test_links_pipes_and_folders_instead_of_files_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, numbers(1))
    body = manifest_of(tmp_path, 1)
    folder = tmp_path / "step_1"
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    for name in ("manifest.json", f"{key_of(body)}/0", f"{key_of(body)}/.zarray"):
        path = folder / name
        content = path.read_bytes()
        (outside / "copy").write_bytes(content)
        for make, match in (
            (lambda: path.symlink_to(outside / "copy"), "is a link out of the checkpoint"),  # noqa: B023
            (lambda: path.symlink_to("/dev/zero"), "is a link out of the checkpoint"),  # noqa: B023
            (lambda: os.mkfifo(path), "is not a file"),  # noqa: B023
            (path.mkdir, "is not a file|Is a directory"),
        ):
            path.unlink()
            make()
            refused(tmp_path, numbers(0), match)
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(content)
    array = folder / key_of(body)
    array.rename(outside / "array")
    array.symlink_to(outside / "array")
    refused(tmp_path, numbers(0), "is a link out of the checkpoint")
    array.unlink()
    (outside / "array").rename(array)
    assert restored(tmp_path) == 1


WRONG_FIELDS = {
    "arrays is": lambda body: body.update(arrays=[]),
    "values is": lambda body: body.update(values=None),
    "files is": lambda body: body.pop("files"),
    "embeddings is": lambda body: body.update(embeddings=[1]),
    "base is": lambda body: body.update(base={"step": "0", "identity": 1}),
    "step is": lambda body: body.update(step=7),
    "version is": lambda body: body.update(version="1"),
    r"arrays\['x'\] is": lambda body: body["arrays"].update(x=3),
    r"arrays\['x'\]\['shape'\] is": lambda body: body["arrays"]["x"].update(shape=[-1]),
    r"arrays\['x'\]\['dtype'\] is": lambda body: body["arrays"]["x"].update(dtype="O"),
    r"arrays\['x'\]\['patch'\] is": lambda body: body["arrays"]["x"].update(patch="y"),
    r"values\['n'\] is": lambda body: body["values"].update(n=["int", "1"]),
    r"files\['_METADATA'\] is": lambda body: body["files"].update(_METADATA=["1", 2]),
    r"embeddings\['e'\]": lambda body: body["embeddings"].update(e={}),
    "missing in the manifest": lambda body: [
        body["files"].pop(name) for name in list(body["files"]) if name.endswith(".zarray")
    ],
    "has 0 of 1 files": lambda body: [
        body["files"].pop(name) for name in list(body["files"]) if name.endswith("/0")
    ],
}


@pytest.mark.parametrize("match", WRONG_FIELDS)
def test_a_manifest_with_a_wrong_field_is_refused_by_name(match, tmp_path):
    checkpoint.save(tmp_path, 1, numbers(1))
    crafted(tmp_path, WRONG_FIELDS[match])
    refused(tmp_path, numbers(0), match)


def crafted_array(folder, step, name, change):
    """Changes the values of an array on disk, with the right checksums; it has one piece."""
    body = manifest_of(folder, step)
    record = body["arrays"][name]
    path = folder / f"step_{step}" / record["key"]
    store = checkpoint.restoring.array_files.tensorstore.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    ).result()
    store.write(change(store.read().result())).result()
    for file in path.iterdir():
        content = file.read_bytes()
        body["files"][f"{record['key']}/{file.name}"] = [len(content), zlib.crc32(content)]
    write_manifest(folder, step, body)


def test_numbers_that_point_outside_of_the_table_are_refused(tmp_path):
    """A step writes where a tag says, and an increment where its index says."""
    state = first()
    checkpoint.save(tmp_path, 1, {"emb": state})
    after, tracker = trained(state, 0)
    checkpoint.save(tmp_path, 2, {"emb": after}, tracker=tracker)
    for value in (SPEC.num_rows, 2**30, -1):
        crafted_array(tmp_path, 2, "emb.touched_rows", lambda index: np.full_like(index, value))  # noqa: B023
        with pytest.raises(checkpoint.CheckpointError, match=r"names a row outside \[0, 913\)"):
            checkpoint.restore(tmp_path, {"emb": state})
        crafted_array(tmp_path, 1, "emb.cache.tags", lambda tags: np.full_like(tags, value))  # noqa: B023
        for spec in (SPEC, mpembed.EmbeddingSpec(SPEC.tables, 8, "int4", None)):
            with pytest.raises(checkpoint.CheckpointError, match=r"names a row outside \[0, 913\)"):
                checkpoint.restore(
                    tmp_path, {"emb": mpembed.init(jax.random.key(1), spec, TX)}, step=1
                )


def test_a_chain_that_comes_back_to_itself_ends(tmp_path, monkeypatch):
    """The identities of a circle can be computed, as those of CRC-32 can."""
    checkpoint.save(tmp_path, 1, numbers(1))
    crafted(tmp_path, lambda body: body.update(base={"step": 1, "identity": 0}))
    monkeypatch.setattr(saving.manifest, "identity", lambda _: 0)
    refused(tmp_path, numbers(0), "step 1 builds on itself")


def test_an_embedding_whose_entry_does_not_fit_its_arrays_is_refused(tmp_path):
    """Sizes of arrays that are to be converted come from the entry, and must be the target's."""
    checkpoint.save(tmp_path, 1, {"emb": first()})
    body = manifest_of(tmp_path, 1)
    other = mpembed.init(jax.random.key(1), mpembed.EmbeddingSpec(SPEC.tables, 8, "int4", None), TX)
    for fields in (
        {"shards": 2},
        {"shards": 2**20},
        {"shards": 4, "table_shards": [0, 1]},
        {"storage": ["int2", None, None]},
        {"storage": ["int9", None, None]},
        {"cache": {**body["embeddings"]["emb"]["cache"], "sets": 2**20}},
        {"cache": None},
    ):
        crafted(tmp_path, lambda body: body["embeddings"]["emb"].update(fields))  # noqa: B023
        with pytest.raises(checkpoint.CheckpointError, match=r"does not hold what|differ from"):
            checkpoint.restore(tmp_path, {"emb": other})
        write_manifest(tmp_path, 1, body)
    checkpoint.restore(tmp_path, {"emb": other})


def test_a_hash_of_n_grams_of_wrong_form_is_refused_by_name(tmp_path):
    checkpoint.save(tmp_path, 1, {"emb": first()})
    body = manifest_of(tmp_path, 1)
    settings = {"boundary": None, "padding": 1, "seed": 0}
    for wrong in (3, {}, [], {**settings, "seed": -1}, {**settings, "seed": "0"}, {"seed": 0}):
        crafted(tmp_path, lambda body: body["embeddings"]["emb"].update(ngrams=wrong))  # noqa: B023
        with pytest.raises(checkpoint.CheckpointError, match=r"embeddings\['emb'\]\['ngrams'\] is"):
            checkpoint.restore(tmp_path, {"emb": first()})
        write_manifest(tmp_path, 1, body)
    crafted(tmp_path, lambda body: body["embeddings"]["emb"].update(ngrams=settings))
    with pytest.raises(ValueError, match=r"was saved with the NGramHash .* the target has None"):
        checkpoint.restore(tmp_path, {"emb": first()})


# --- several processes


TOGETHER = """
import sys, json, numpy as np, jax
from pathlib import Path
from experiments.scaling import multiprocess
port, worker, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
mesh = multiprocess.join(port, 2, worker)
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from mpembed_jax import checkpoint
from mpembed_jax.checkpoint import agreement
divided = NamedSharding(mesh, P("x"))
def tree(value):
  whole = np.full((8, 3), value)
  return {"x": jax.make_array_from_callback(whole.shape, divided, whole.__getitem__), "n": value}
said = []
def attempt(do):
  try:
    said.append(str(do()))
  except (checkpoint.CheckpointError, FileNotFoundError, ZeroDivisionError) as error:
    said.append(f"{type(error).__name__}: {error}")
def value_of(tree):
  parts = [np.unique(shard.data) for shard in tree["x"].addressable_shards]
  return {int(part) for part in np.concatenate(parts)}, tree["n"]
def save(where, step, value):
  checkpoint.save(where, step, tree(value))
  return "saved"
attempt(lambda: value_of(checkpoint.restore(folder / "run", tree(0))))
attempt(lambda: save(folder / "file" / "run", 1, 1))
attempt(lambda: save(folder / "run", 1, 1))
attempt(lambda: save(folder / "run", 1, 2))
attempt(lambda: value_of(checkpoint.restore(folder / "run", tree(0))))
multihost_utils.sync_global_devices("both have read")
if worker == 0:
  pieces = [p for p in (folder / "run").rglob("*") if p.parent.parent.name == "step_1"]
  piece = max(pieces, key=lambda p: p.stat().st_size)
  piece.write_bytes(b"damaged")
attempt(lambda: value_of(checkpoint.restore(folder / "run", tree(0), step=1)))
attempt(lambda: save(folder / "run", 1, 3))
attempt(lambda: value_of(checkpoint.restore(folder / "run", tree(0))))
attempt(lambda: agreement.from_first(lambda: 1 // 0))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_processes_that_save_together_fail_together(tmp_path, request):
    """The first one looks; an error is raised in all, and none of them waits for another one."""
    from experiments.scaling import multiprocess

    (tmp_path / "file").write_text("no folder")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{multiprocess.XLA_FLAGS} --xla_force_host_platform_device_count=1",
    }
    with multiprocess.reserve_port() as held:
        port = str(held.getsockname()[1])
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", TOGETHER, port, str(worker), str(tmp_path)],
                cwd=request.path.parents[2],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for worker in (0, 1)
        ]
        outputs = [worker.communicate(timeout=300) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs[0][1][-2000:]
    said = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    unexpected = [lines.pop() for lines in said]
    text = "ZeroDivisionError: integer division or modulo by zero"
    assert unexpected == [text, f"CheckpointError: the first process failed: {text}"]
    assert said[0] == said[1]
    expected = [
        "FileNotFoundError: no checkpoint in", "CheckpointError: step 1 could not be saved in",
        "saved", "is already a good checkpoint", "({1}, 1)", "DamagedError: step 1: array 'x': ",
        "saved", "({3}, 3)",
    ]  # fmt: skip
    for text, found in zip(expected, said[0], strict=True):
        assert text in found
