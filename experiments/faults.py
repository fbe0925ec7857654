"""Does anything get lost? Kills, damaged files, full and vanished disks, ids from hell, NaN gradients and a long soak.

Every part works by itself and returns counts; a part that finds anything wrong raises. The training is that of README's
step: an INT8 table with an LFU cache, row-wise Adagrad, Adam on dense parameters, checkpoints in the background, full and
incremental in turns. Kills are SIGKILL in a process of its own (`--worker`), at random moments of training and of saving;
the bits at the end are compared with those of a run nobody interrupted. In `killed_worker` one of two processes that train
together is killed. Writes experiments/results/faults.json.
"""

import dataclasses
import hashlib
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
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import mpembed_jax as mpembed
from experiments import invariants, killed_worker, killing, workload
from mpembed_jax import checkpoint


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of each."""

    kills: int = 24
    """SIGKILLs, half of them aimed at saves."""
    steps: int = 400
    """Steps of the killed run."""
    worker_kills: int = 4
    """SIGKILLs of one of two workers."""
    examples: int = 4000
    """Batches of ids from hell."""
    gradients: int = 300
    """Steps with NaN and inf gradients."""
    soak: int = 20_000
    """Steps of the soak."""
    check_every: int = 1000
    """Steps between checks of the invariants in the soak."""
    only: tuple[str, ...] = ()
    """Parts to run; none: all."""
    worker: Path | None = None
    """Internal: train in this directory, resuming from what is there."""
    fill: Path | None = None
    """Internal: save into this directory until its device is full."""
    out: Path = Path("experiments/results/faults.json")


# --- the run that is killed

SIZES, DIM, WIDTH, SAVE_EVERY = (60_000, 500), 16, 512, 10
SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("large", SIZES[0]), mpembed.TableSpec("small", SIZES[1])],
    DIM,
    "int8",
    mpembed.CacheSpec(num_rows=2048, ways=16),
)
ROW_TX, TX = mpembed.optim.rowwise_adagrad(0.05), optax.adam(1e-3)


def ids_at(step: int, num_rows: int = sum(SIZES), width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Returns the ids of one step: skewed, drifting, the same for the same step."""
    rng = np.random.default_rng([seed, step])
    ids = workload.zipf_ids(rng, num_rows, (width,), 1.05)
    return ((ids + step // 50 * 977) % num_rows).astype(np.int32)


@partial(jax.jit, donate_argnums=0)
def train_step(tree: dict[str, Any], ids: jax.Array) -> dict[str, Any]:
    """README's step with a row tracker."""
    emb, plan = mpembed.prefetch(tree["emb"], ids)
    tracker = checkpoint.mark(tree["tracker"], plan)
    rows = mpembed.lookup(emb, plan)

    def loss_fn(params, rows):
        vectors = mpembed.pool(rows, plan.inverse)
        return jnp.mean(jnp.sin(vectors @ params["w"] * 30) + params["b"] ** 2)

    grads, row_grads = jax.grad(loss_fn, argnums=(0, 1))(tree["params"], rows)
    emb = mpembed.apply_gradients(emb, plan, rows, row_grads * WIDTH, tx=ROW_TX)
    updates, opt_state = TX.update(grads, tree["opt_state"], tree["params"])
    return dict(emb=emb, tracker=tracker, params=optax.apply_updates(tree["params"], updates), opt_state=opt_state)


def first_tree() -> dict[str, Any]:
    """Returns the state before the first step."""
    params = {"w": jnp.ones((DIM, 8)), "b": jnp.ones(8)}
    emb = mpembed.init(jax.random.key(0), SPEC, ROW_TX)
    return dict(emb=emb, tracker=checkpoint.track(emb), params=params, opt_state=TX.init(params))


def saved_part(tree: dict[str, Any], position: int) -> dict[str, Any]:
    """Returns what a checkpoint holds: everything but the tracker, and the position in the data."""
    return {**{k: v for k, v in tree.items() if k != "tracker"}, "position": position}


def bits_of(tree: Any) -> str:
    """Returns a hash of every bit of a tree of arrays."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.array(leaf).tobytes())
    return total.hexdigest()


def work(directory: Path, steps: int) -> str:
    """Trains to `steps`, saving in the background every SAVE_EVERY steps; resumes from what is there.

    Says on stdout what it does, so that a parent can aim, and ends when stdin does: a parent that is late still finds it.
    Returns the hash of the last state.
    """
    tree, begin = first_tree(), 0
    if checkpoint.latest_step(directory) is not None:
        restored = checkpoint.restore(directory, saved_part(tree, 0))
        begin = restored.pop("position")
        tree = dict(restored, tracker=checkpoint.track(restored["emb"]))
    print(f"resume {begin}", flush=True)
    for step in range(begin, steps):
        tree = train_step(tree, ids_at(step))
        print(f"step {step + 1}", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            print(f"save {step + 1}", flush=True)
            is_full = (step + 1) % (5 * SAVE_EVERY) == 0 or checkpoint.latest_step(directory) is None
            part, tracker = saved_part(tree, step + 1), None if is_full else tree["tracker"]
            checkpoint.save(directory, step + 1, part, tracker=tracker, wait=False, keep=3)
            tree["tracker"] = checkpoint.track(tree["emb"])
    print(f"end {steps}", flush=True)
    sys.stdin.read()
    return bits_of(saved_part(tree, steps))


def kill_and_resume(kills: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Kills a worker again and again at random moments, lets the last one finish, and compares the bits.

    Raises:
      AssertionError: if they differ, or a worker fails by itself.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        wanted = _run(Path(folder) / "uninterrupted", steps)
        directory = Path(folder) / "killed"
        unfinished, resumed_at = 0, []
        for done in range(kills):
            # Aimed so that the run advances a little between kills and is not over before the last one.
            latest = checkpoint.latest_step(directory) or 0
            until = min(steps - 1, latest + rng.randint(1, max(2, 2 * (steps - latest) // (kills - done + 1))))
            resumed_at.append(_run_and_kill(directory, steps, "save" if done % 2 else "step", until, rng))
            unfinished += killing.has_unfinished(directory)
        assert _run(directory, steps) == wanted, f"after {kills} kills the state differs from the uninterrupted run's"
        return {
            "kills": kills, "aimed at saves": kills // 2, "unfinished folders left behind": unfinished,
            "resumed at steps": resumed_at, "steps": steps, "bits equal": True,
        }  # fmt: skip


def _start(directory: Path, steps: int, stdin: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.faults", "--worker", str(directory), "--steps", str(steps)]
    pipe, environment = subprocess.PIPE, killing.environment(directory)
    return subprocess.Popen(command, cwd=killing.ROOT, env=environment, stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def _run(directory: Path, steps: int) -> str:
    """Runs a worker to its end; returns its hash."""
    process = _start(directory, steps, subprocess.DEVNULL)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    word, bits = killing.SAID.findall(out)[-1]
    assert word == "bits"
    return bits


def _run_and_kill(directory: Path, steps: int, aim: str, until: int, rng: random.Random) -> int:
    """Starts a worker and kills it just after a step, or a save that begins, at or after step `until`, or at its end.

    Returns the step it resumed at.
    """
    with _start(directory, steps, subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        resume, is_there = killing.listen(process.stdout, aim, until)
        if is_there:
            time.sleep(rng.uniform(0, 0.08 if aim == "save" else 0.02))
            process.kill()
        errors = process.stderr.read()
    assert is_there and process.returncode == -signal.SIGKILL, errors[-3000:]
    return resume


# --- damaged files

_NOT_NEEDED = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax's times and mark: no restore depends on them


def damage(fallback_every: int = 1) -> dict[str, Any]:
    """Cuts, empties, deletes and flips a bit of every file of a full checkpoint and of an increment, one at a time.

    Each must be refused by name with `step=`, and replaced by the last good checkpoint without it. Without the two files
    that hold nothing, the checkpoint must restore all the same. `fallback_every` files restores from the last good one.
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
                        assert bits_of(restored) == wanted[good], f"{path} damaged ({fault}): not step {good}'s bits"
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
    """Runs `fill` on a tmpfs of 4 MB in a mount namespace of its own; None where the system does not allow that."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"', folder]
        try:
            subprocess.run([*mount, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        command = [*mount, sys.executable, "-m", "experiments.faults", "--fill", f"{folder}/run"]
        done = subprocess.run(command, cwd=killing.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


def fill(directory: Path) -> dict[str, str]:
    """Saves until the device of `directory` is full: an error that says so, and every earlier checkpoint intact."""
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
    assert wanted and checkpoint.steps(directory) == list(wanted), "a checkpoint is lost, or a part of one counts"

    def check() -> None:
        for step, bits in wanted.items():
            assert bits_of(checkpoint.restore(directory, part, step=step)) == bits, step

    check()
    shutil.rmtree(directory / "step_1")  # room for one more
    del wanted[1]
    checkpoint.save(directory, step, part)
    wanted[step] = bits_of(part)
    check()
    return {"disk full": message, "disk full by": f"a device of 4 MB, full after {step - 1} checkpoints"}


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


def disks() -> dict[str, str]:
    """Fills the disk, takes permission away and lets the folder vanish: a clear error each, earlier checkpoints intact."""
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
            # 160 MB and more: longer to write than a folder to rename, if this thread is not kept waiting meanwhile.
            ballast = np.random.default_rng(0).random(20_000_000 * (step - 3))
            saving = checkpoint.save(directory, step, part | {"ballast": ballast}, wait=False)
            directory.rename(away)
            try:
                saving.wait()
            except checkpoint.CheckpointError as error:
                messages["folder vanished during a save"] = str(error).replace(str(directory), "DIRECTORY")
            shutil.rmtree(directory, ignore_errors=True)
            away.rename(directory)
            assert bits_of(checkpoint.restore(directory, part, step=1)) == wanted
            if "folder vanished during a save" in messages:
                break
            # It was complete before the folder vanished.
            assert checkpoint.steps(directory) == [1, step], "a save into a folder that vanished neither failed nor is there"
            shutil.rmtree(directory / f"step_{step}")
        checkpoint.save(directory, step + 1, part)
        assert bits_of(checkpoint.restore(directory, part)) == wanted
    return messages


def main(settings: Settings) -> None:
    """Runs every part and writes the report."""
    if settings.worker is not None:
        print(f"bits {work(settings.worker, settings.steps)}")
        return
    if settings.fill is not None:
        print(json.dumps(fill(settings.fill)))
        return
    from experiments import reporting  # draws pictures: workers start without it

    parts = {
        "kills": lambda: kill_and_resume(settings.kills, settings.steps),
        "killed worker": lambda: killed_worker.kill_and_resume(settings.worker_kills),
        "damaged files": damage,
        "disks": disks,
        "ids from hell": lambda: invariants.ids_from_hell(settings.examples),
        "gradients": lambda: invariants.bad_gradients(settings.gradients),
        "soak": lambda: invariants.soak(settings.soak, settings.check_every),
    }
    environment = reporting.environment()
    report: dict[str, Any] = {**environment, "parts": {}}
    if settings.only and settings.out.exists():  # parts that run again replace their own
        report["parts"] = json.loads(settings.out.read_text())["parts"]
    if unknown := [name for name in settings.only if name not in parts]:
        raise SystemExit(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
    for name in settings.only or parts:
        start = time.perf_counter()
        found = parts[name]()
        report["parts"][name] = {**found, "seconds": round(time.perf_counter() - start, 1), "commit": environment["commit"]}
        print(f"{name}: {json.dumps(report['parts'][name])}", flush=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
