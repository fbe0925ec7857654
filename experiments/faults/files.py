"""Faults of storage: every file of a checkpoint damaged, disks that are full, read-only or gone."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments import provenance
from experiments.faults.training import bits_of, first_tree, ids_at, saved_part, train_step
from mpembed_jax import checkpoint

_NOT_NEEDED = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
)  # orbax's times and mark: no restore depends on them


def damage(fallback_every: int = 1) -> dict[str, Any]:
    """Damages every file of a full checkpoint and of an increment, one at a time.

    A file is cut, emptied, deleted, or has one bit flipped. Each must be refused by name with
    `step=`, and replaced by the last good checkpoint without it. Without the two files that hold
    nothing, the checkpoint must restore all the same. `fallback_every` files restores from the last
    good one.
    """
    rng = random.Random(0)
    counts: dict[str, int] = {"files": 0, "arrays": 0, "refusals": 0, "fallbacks": 0}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        tree = first_tree()
        wanted = {}
        for step in range(3):
            tree = train_step(tree, ids_at(step))
            part = saved_part(tree, step)
            checkpoint.save(directory, step, part, tracker=tree["tracker"] if step == 2 else None)
            wanted[step] = bits_of(part)
            tree["tracker"] = checkpoint.track(tree["emb"])
        for step in (2, 1):
            files = sorted(p for p in (directory / f"step_{step}").rglob("*") if p.is_file())
            counts["arrays"] += len({p.parent for p in files if p.parent.name != f"step_{step}"})
            for number, path in enumerate(files):
                counts["files"] += 1
                content = path.read_bytes()
                for fault in ("truncate", "empty", "flip", "delete"):
                    _harm(path, content, fault, rng)
                    if path.name in _NOT_NEEDED:
                        assert bits_of(checkpoint.restore(directory, part, step=2)) == wanted[2]
                        path.write_bytes(content)
                        continue
                    _expect_refusal(directory, 2, part, path)
                    counts["refusals"] += 1
                    if fault in ("truncate", "flip") and number % fallback_every == 0:
                        restored = checkpoint.restore(directory, part)
                        good = step - 1  # an increment falls with its base
                        assert bits_of(restored) == wanted[good], (
                            f"{path} damaged ({fault}): not step {good}'s bits"
                        )
                        counts["fallbacks"] += 1
                    path.write_bytes(content)
            assert bits_of(checkpoint.restore(directory, part)) == wanted[2]
    return counts


def _harm(path: Path, content: bytes, fault: str, rng: random.Random) -> None:
    match fault:
        case "truncate":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "flip":
            at = rng.randrange(len(content) * 8) if content else 0
            changed = bytearray(content or b"\0")
            changed[at // 8] ^= 1 << at % 8
            path.write_bytes(changed)
        case _:
            path.unlink()


def _expect_refusal(directory: Path, step: int, target: Any, path: Path) -> None:
    try:
        checkpoint.restore(directory, target, step=step)
    except checkpoint.CheckpointError as error:
        assert str(path) in str(error), f"{error} does not name {path}"
    else:
        raise AssertionError(f"a checkpoint with a damaged {path} was restored")


# --- disks


def _fill_a_device() -> dict[str, str] | None:
    """Runs `fill` on a tmpfs of 4 MB in its own mount namespace.

    Returns None if the system does not allow that.
    """
    with tempfile.TemporaryDirectory() as folder:
        mount = [
            "unshare",
            "-rm",
            "sh",
            "-c",
            'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"',
            folder,
        ]
        try:
            subprocess.run([*mount, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        command = [
            *mount,
            sys.executable,
            "-m",
            "experiments.faults.run",
            "--fill",
            f"{folder}/run",
        ]
        done = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


def fill(directory: Path) -> dict[str, str]:
    """Saves until the device of `directory` is full.

    The error must say so, and every earlier checkpoint must be intact.
    """
    tree, wanted = first_tree(), {}
    for step in range(1, 100):
        part = saved_part(tree, step)
        try:
            checkpoint.save(directory, step, part, wait=False).wait()
        except checkpoint.CheckpointError as error:
            message = str(error).replace(str(directory), "DIRECTORY")
            break
        wanted[step] = bits_of(part)
    else:
        raise AssertionError("the device never filled up")
    assert wanted and checkpoint.steps(directory) == list(wanted), (
        "a checkpoint is lost, or a part of one counts"
    )

    def check() -> None:
        for step, bits in wanted.items():
            assert bits_of(checkpoint.restore(directory, part, step=step)) == bits, step

    check()
    shutil.rmtree(directory / "step_1")  # room for one more
    del wanted[1]
    checkpoint.save(directory, step, part)
    wanted[step] = bits_of(part)
    check()
    return {
        "disk full": message,
        "disk full by": f"a device of 4 MB, full after {step - 1} checkpoints",
    }


def _limit_file_size(failing: Any) -> dict[str, str]:
    """Every write beyond 300 KB fails, as on a full device, with another error number."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        failing("disk full", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    return {"disk full by": "RLIMIT_FSIZE: no device can be mounted here"}


def _put_back(away: Path, directory: Path) -> None:
    """Moves a folder back. Writers of a save that failed may still make a new one in its place."""
    for _ in range(200):
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            away.rename(directory)
            return
        time.sleep(0.05)
    raise AssertionError(f"{directory} comes back after every deletion")


def disks() -> dict[str, str]:
    """Fills the disk, takes permission away, and lets the folder vanish.

    Each must give a clear error and leave earlier checkpoints intact.
    """
    tree = train_step(first_tree(), ids_at(0))
    part = saved_part(tree, 1)
    wanted, messages = bits_of(part), {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        checkpoint.save(directory, 1, part)

        def failing(name: str, step: int) -> None:
            try:
                checkpoint.save(directory, step, part, wait=False).wait()
            except checkpoint.CheckpointError as error:
                messages[name] = str(error).replace(str(directory), "DIRECTORY")
            else:
                raise AssertionError(f"{name}: the save did not fail")
            assert checkpoint.steps(directory) == [1], name
            assert bits_of(checkpoint.restore(directory, part)) == wanted, name

        messages |= _fill_a_device() or _limit_file_size(failing)

        directory.chmod(0o555)
        os.chmod(folder, 0o755)
        is_root = os.geteuid() == 0
        if is_root:  # root may write anywhere
            os.seteuid(65534)
        try:
            failing("permission denied", 3)
        finally:
            if is_root:
                os.seteuid(0)
            directory.chmod(0o755)

        away = Path(folder) / "away"
        for step in range(4, 10):
            # 160 MB and more: longer to write than a folder to rename, if this thread is not kept
            # waiting meanwhile.
            ballast = np.random.default_rng(0).random(20_000_000 * (step - 3))
            saving = checkpoint.save(directory, step, part | {"ballast": ballast}, wait=False)
            directory.rename(away)
            try:
                saving.wait()
            except checkpoint.CheckpointError as error:
                messages["folder vanished during a save"] = str(error).replace(
                    str(directory), "DIRECTORY"
                )
            _put_back(away, directory)
            assert bits_of(checkpoint.restore(directory, part, step=1)) == wanted
            if "folder vanished during a save" in messages:
                break
            # It was complete before the folder vanished.
            assert checkpoint.steps(directory) == [1, step], (
                "a save into a folder that vanished neither failed nor is there"
            )
            shutil.rmtree(directory / f"step_{step}")
        checkpoint.save(directory, step + 1, part)
        assert bits_of(checkpoint.restore(directory, part)) == wanted
    return messages
