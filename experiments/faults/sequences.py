"""Random sequences of events in a directory of checkpoints, compared with copies in memory.

    python -m experiments.faults.run --only sequences

A run trains on 1, 2 or 4 devices, saves in full and in increments, keeps few, loses folders, has
files damaged, and restores on any of the three. The model below knows, from the definitions alone,
which steps are there, which are good, and what each holds. After every action the directory must
agree with it.
"""

import dataclasses
import functools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from experiments import provenance, running
from experiments.faults.training import bits_of
from experiments.speed.step import embedding_step
from mpembed_jax import checkpoint

DEVICES = (1, 2, 4)
MAX_STEP = 6
_SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("a", 200), mpembed.TableSpec("b", 7)],
    4,
    "int8",
    mpembed.CacheSpec(num_rows=64, ways=2),
)
_TX = mpembed.optim.rowwise_adagrad(0.5)
_BATCH = 8


# --- training on 1, 2 or 4 devices


def _mesh(devices: int) -> Any:
    if devices == 1:
        return None
    return jax.make_mesh(
        (devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


@functools.cache
def first_state(devices: int) -> Any:
    """Returns the state before the first step; it is never donated."""
    return mpembed.init(jax.random.key(0), _SPEC, _TX, mesh=_mesh(devices))


def _step(state: Any, tracker: Any, ids: Any, upstream: Any) -> tuple[Any, Any]:
    state, plan, _, _ = embedding_step(state, ids, upstream, tx=_TX)
    return state, checkpoint.mark(tracker, plan)


@functools.cache
def _trainer(devices: int) -> Any:
    state = first_state(devices)
    if devices == 1:
        return jax.jit(_step)
    specs = mpembed.partition_specs(state), checkpoint.partition_specs(checkpoint.track(state))
    return jax.jit(
        jax.shard_map(
            _step, mesh=state.layout.mesh, in_specs=(*specs, P("x"), P("x")), out_specs=specs
        )
    )


def _rows(state: Any, devices: int) -> np.ndarray:
    """Returns all rows as a step would see them."""
    return np.asarray(_reader(devices)(state, np.arange(_SPEC.num_rows, dtype=np.int32)))


@functools.cache
def _reader(devices: int) -> Any:
    return jax.jit(mpembed.read)


def _row_state(state: Any, devices: int) -> list[np.ndarray]:
    """Returns optimizer rows by id: row r is row r div P of shard r mod P."""
    ids = np.arange(_SPEC.num_rows)
    where = ids % devices * -(-_SPEC.num_rows // devices) + ids // devices
    return [np.asarray(leaf)[where] for leaf in jax.tree.leaves(state.row_state) if leaf.ndim]


# --- actions


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing that happens. Fields that an action does not need are ignored."""

    kind: str  # "train", "save", "increment", "delete", "damage" or "restore"
    step: int = 0  # of the checkpoint; 0 for restore: the newest good one
    keep: int = 0  # 0: keep all
    devices: int = 1  # for restore
    seed: int = 0  # of ids, and of the file that is damaged


KINDS = ("train", "train", "save", "increment", "increment", "delete", "damage", "restore")


def draw(rng: random.Random, length: int) -> list[Action]:
    """Draws a sequence."""
    return [
        Action(
            rng.choice(KINDS),
            rng.randint(0, MAX_STEP),
            rng.choice((0, 0, 1, 2)),
            rng.choice(DEVICES),
            rng.randrange(1000),
        )
        for _ in range(length)
    ]


@dataclasses.dataclass
class _Saved:
    """What the model knows of a checkpoint."""

    tree: dict[str, Any]
    devices: int
    base: "_Saved | None"
    base_step: int | None
    is_damaged: bool = False
    is_manifest_damaged: bool = False
    is_incomplete: bool = False  # a file is missing or has another size


class Run:
    """A run, its directory, and the model of both."""

    def __init__(self, directory: Path) -> None:
        """Begins on one device, before the first step."""
        self.directory = directory
        self.saved: dict[int, _Saved] = {}
        self.counts: dict[str, int] = {}
        self._go_on(first_state(1), 1)

    def _go_on(self, state: Any, devices: int) -> None:
        self.state, self.devices, self.start = state, devices, state
        self.tracker = checkpoint.track(state)

    def _tree(self) -> dict[str, Any]:
        return {"emb": self.state, "position": int(self.state.step), "w": np.arange(3.0)}

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # --- the model

    def is_good(self, step: int | None, saved: _Saved | None = None) -> bool:
        """Returns whether a step can be restored: it and all that it builds on are undamaged."""
        held = self.saved.get(step) if step is not None else None
        if held is None or held.is_damaged or (saved is not None and held is not saved):
            return False
        return held.base is None or self.is_good(held.base_step, held.base)

    def _looks_good(self, step: int | None, saved: _Saved | None = None) -> bool:
        """As is_good, without reading files: a changed byte is not seen."""
        held = self.saved.get(step) if step is not None else None
        if held is None or held.is_manifest_damaged or held.is_incomplete:
            return False
        if saved is not None and held is not saved:
            return False
        return held.base is None or self._looks_good(held.base_step, held.base)

    def _prune(self, keep: int, newest: int) -> None:
        readable = [s for s in self.saved if not self.saved[s].is_manifest_damaged]
        earlier = sorted(s for s in readable if s <= newest)
        needed = {s for s in self.saved if s > newest} | set(earlier[-keep:])
        for step in list(needed):
            base = self.saved[step].base_step if step in readable else None
            while base in self.saved and base not in needed and base in readable:
                needed.add(base)
                base = self.saved[base].base_step
        self.saved = {s: held for s, held in self.saved.items() if s in needed}

    # --- what happens

    def do(self, action: Action) -> None:
        """Does an action, in the directory and in the model, and compares."""
        getattr(self, f"_{action.kind}")(action)
        assert checkpoint.steps(self.directory) == sorted(self.saved), action

    def _train(self, action: Action) -> None:
        rng = np.random.default_rng(action.seed)
        ids = rng.integers(0, _SPEC.num_rows, _BATCH).astype(np.int32)
        upstream = np.ones((_BATCH, _SPEC.embedding_dim), np.float32)
        self.state, self.tracker = _trainer(self.devices)(self.state, self.tracker, ids, upstream)

    def _save(self, action: Action, tracker: Any = None) -> None:
        step, keep = action.step, action.keep or None
        if self.is_good(step):
            self._refused(step, "is already a good checkpoint", tracker, keep)
            return
        candidates = [
            s
            for s, held in self.saved.items()
            if s != step
            and self._looks_good(s)
            and held.devices == self.devices
            and bits_of(held.tree["emb"]) == bits_of(self.start)
        ]
        if tracker is not None and not candidates:
            self._refused(step, "no checkpoint in", tracker, keep)
            return
        checkpoint.save(self.directory, step, self._tree(), tracker=tracker, keep=keep)
        base = self._base_of(step)
        assert base is None or (tracker is not None and base == max(candidates)), base
        self._count("increments" if base is not None else "full saves")
        self.saved[step] = _Saved(
            self._tree(), self.devices, None if base is None else self.saved[base], base
        )
        self._go_on(self.state, self.devices)
        if keep is not None:
            self._prune(keep, step)

    def _base_of(self, step: int) -> int | None:
        text = (self.directory / f"step_{step}" / "manifest.json").read_text()
        base = json.loads(json.loads(text)["body"])["base"]
        return None if base is None else base["step"]

    def _refused(self, step: int, why: str, tracker: Any, keep: int | None) -> None:
        try:
            checkpoint.save(self.directory, step, self._tree(), tracker=tracker, keep=keep)
        except (checkpoint.CheckpointError, ValueError) as error:
            assert why in str(error), error
            self._count("saves refused")
            return
        raise AssertionError(f"step {step} was saved, although: {why}")

    def _increment(self, action: Action) -> None:
        self._save(action, self.tracker)

    def _delete(self, action: Action) -> None:
        if self.saved.pop(action.step, None) is not None:
            shutil.rmtree(self.directory / f"step_{action.step}")
            self._count("folders deleted")

    def _damage(self, action: Action) -> None:
        if (held := self.saved.get(action.step)) is None:
            return
        rng = random.Random(action.seed)
        folder = self.directory / f"step_{action.step}"
        files = sorted(
            p
            for p in folder.rglob("*")
            if p.is_file() and p.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
        )
        path = rng.choice(files)
        content, way = path.read_bytes(), rng.choice(("flip", "cut", "delete"))
        is_manifest = path.name == "manifest.json"
        if way == "flip" or (is_manifest and way == "delete"):
            at = rng.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        elif way == "cut":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        held.is_damaged = True
        held.is_manifest_damaged |= is_manifest
        held.is_incomplete |= way in ("cut", "delete") and not is_manifest
        self._count("files damaged")

    def _restore(self, action: Action) -> None:
        step, devices = action.step or None, action.devices
        good = [s for s in sorted(self.saved) if self.is_good(s)]
        target = {"emb": first_state(devices), "position": 0, "w": np.zeros(3)}
        expected = (good[-1] if good else None) if step is None else step
        try:
            tree = checkpoint.restore(self.directory, target, step=step)
        except (checkpoint.CheckpointError, FileNotFoundError) as error:
            is_missing = not self.saved if step is None else step not in self.saved
            assert expected not in good, error
            assert isinstance(error, FileNotFoundError) == is_missing, repr(error)
            self._count("restores refused")
            return
        assert expected in good, f"step {step} is not good, but was restored"
        self._compare(tree, devices, self.saved[expected])
        self._count(f"restores on {devices} devices")
        self._go_on(tree["emb"], devices)

    def _compare(self, tree: dict[str, Any], devices: int, held: _Saved) -> None:
        state, wanted = tree["emb"], held.tree["emb"]
        assert tree["position"] == held.tree["position"]
        np.testing.assert_array_equal(tree["w"], held.tree["w"])
        if devices == held.devices:
            assert bits_of(state) == bits_of(wanted)
            return
        np.testing.assert_array_equal(_rows(state, devices), _rows(wanted, held.devices))
        for ours, theirs in zip(
            _row_state(state, devices), _row_state(wanted, held.devices), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        for name in ("key", "step", "counters"):
            np.testing.assert_array_equal(getattr(state, name), getattr(wanted, name))

    def check_all(self) -> None:
        """Restores every step that is good, where it was saved; the others must be refused."""
        for step, held in self.saved.items():
            self._restore(Action("restore", step, devices=held.devices))


def run(actions: list[Action]) -> dict[str, int]:
    """Does a sequence in a new directory; returns counts of what happened.

    Raises:
      AssertionError: if the directory does not agree with the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        sequence = Run(Path(folder))
        for action in actions:
            sequence.do(action)
        sequence.check_all()
        return sequence.counts


def many(sequences: int, length: int = 25, seed: int = 0) -> dict[str, int]:
    """Runs random sequences; returns counts over all of them."""
    logging.getLogger("mpembed_jax.checkpoint").setLevel(logging.CRITICAL)
    total = {"sequences": sequences, "actions": sequences * length}
    for number in range(sequences):
        actions = draw(random.Random(seed * 1_000_003 + number), length)
        try:
            counts = run(actions)
        except Exception as error:
            raise AssertionError(f"sequence {number} of seed {seed}: {error!r}") from error
        for what, count in counts.items():
            total[what] = total.get(what, 0) + count
    return total


def in_a_process(sequences: int) -> dict[str, int]:
    """Runs random sequences in a process with as many devices of a CPU as they need."""
    flags = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.faults.sequences", str(sequences)],
        cwd=provenance.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(many(*running.words_from("faults.run", int))))
