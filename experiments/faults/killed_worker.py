"""The test that a run of two processes resumes with the same bits after a kill.

It is a part of `faults.run`.

    python -m experiments.faults.run --only "killed worker"

Two processes, joined by jax.distributed, train one stack whose rows are divided over them, and save
together in the background every few steps. One of the two, drawn at random, gets SIGKILL at a
random moment of training or of saving; the other is ended, as a job scheduler would; both start
again, and resume from the last good checkpoint. The bits of the whole state at the end are compared
with those of a run nobody interrupted.
"""

import contextlib
import dataclasses
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.faults import killing
from experiments.scaling import multiprocess
from experiments.speed import workload
from mpembed_jax import checkpoint

PROCESSES, SAVE_EVERY, BATCH, DIM = 2, 5, 256, 16
SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("large", 30_000), mpembed.TableSpec("small", 501)],
    DIM,
    "int8",
    mpembed.CacheSpec(num_rows=1024, ways=8),
)
TX = mpembed.optim.rowwise_adagrad(0.05)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One worker, started by the launcher."""

    worker: int = setting(-1, unit="NUMBER", is_hidden=True)
    port: int = setting(0, unit="NUMBER", is_hidden=True)
    directory: Path | None = setting(None, is_hidden=True)
    steps: int = setting(0, unit="STEPS", is_hidden=True)


# --- a worker


def work(settings: Settings) -> str:
    """Joins the other worker, resumes, trains and saves.

    Returns the hash of the whole state at the end. Says on stdout what it does, so that the
    launcher can aim, and ends when stdin does: a launcher that is late still finds it.
    """
    mesh = multiprocess.join(settings.port, PROCESSES, settings.worker)
    divided, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    emb = mpembed.init(jax.random.key(0), SPEC, TX, mesh=mesh)
    tree = {"emb": emb, "w": jax.device_put(np.ones(DIM, np.float32), everywhere)}
    specs = {"emb": mpembed.partition_specs(emb), "w": P()}

    def step(tree: dict[str, Any], ids: jax.Array) -> dict[str, Any]:
        emb, plan = mpembed.prefetch(tree["emb"], ids)
        rows = mpembed.lookup(emb, plan)

        def loss_fn(w, rows):
            return jax.lax.pmean(
                jnp.mean(jnp.sin(30 * mpembed.pool(rows, plan.inverse) @ w) + w @ w), "x"
            )

        grad, row_grads = jax.grad(loss_fn, argnums=(0, 1))(tree["w"], rows)
        return {
            "emb": mpembed.apply_gradients(emb, plan, rows, row_grads * BATCH, tx=TX),
            "w": tree["w"] - 0.01 * grad,
        }

    jitted = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(specs, P("x")), out_specs=specs), donate_argnums=0
    )
    begin, saving = 0, None
    if checkpoint.latest_step(settings.directory) is not None:
        restored = checkpoint.restore(settings.directory, {**tree, "position": 0})
        begin, tree = restored.pop("position"), restored
    print(f"resume {begin}", flush=True)
    for number in range(begin, settings.steps):
        ids = workload.zipf_ids(
            np.random.default_rng([7, number]), SPEC.num_rows, (BATCH,), 1.05
        ).astype(np.int32)
        tree = jax.block_until_ready(
            jitted(tree, jax.make_array_from_callback(ids.shape, divided, ids.__getitem__))
        )
        print(f"step {number + 1}", flush=True)
        if (number + 1) % SAVE_EVERY == 0:
            print(f"save {number + 1}", flush=True)
            saving = checkpoint.save(
                settings.directory, number + 1, {**tree, "position": number + 1}, wait=False, keep=3
            )
    print(f"end {settings.steps}", flush=True)
    sys.stdin.read()
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(whole):
        total.update(np.asarray(leaf).tobytes())
    if saving is not None:
        saving.wait()
    return total.hexdigest()


# --- the launcher


def kill_and_resume(kills: int = 4, steps: int = 60, seed: int = 0) -> dict[str, Any]:
    """Kills one of two workers again and again, lets the last two finish, and compares the bits.

    Raises:
      AssertionError: if they differ, or a worker fails by itself.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        wanted, _ = _run(Path(folder) / "uninterrupted", steps)
        directory = Path(folder) / "killed"
        victims, resumed_at, unfinished = [], [], 0
        for done in range(kills):
            # Past the second save after the latest, which waits for the end of the first: the next
            # run resumes further on, unless the end of the run leaves no room.
            ahead = 2 * SAVE_EVERY + 1
            latest = checkpoint.latest_step(directory) or 0
            until = min(
                steps - SAVE_EVERY,
                latest + rng.randint(ahead, max(ahead, (steps - latest) // (kills - done))),
            )
            victims.append(rng.randrange(PROCESSES))
            aim = "save" if done % 2 else "step"
            resumed_at.append(_run_and_kill(directory, steps, victims[-1], aim, until, rng))
            unfinished += killing.has_unfinished(directory)
        final, begin = _run(directory, steps)
        assert final == wanted, (
            f"after {kills} kills the state differs from the uninterrupted run's"
        )
        return {
            "kills": kills, "killed worker": victims, "unfinished folders left behind": unfinished,
            "resumed at steps": [*resumed_at, begin], "steps": steps, "processes": PROCESSES,
            "bits equal": True,
        }  # fmt: skip


@contextlib.contextmanager
def _started(
    directory: Path, steps: int, port: int, stdin: int
) -> Iterator[list[subprocess.Popen]]:
    """Starts both workers, and kills them at the end of the block."""
    options = [f"--port={port}", f"--directory={directory}", f"--steps={steps}"]
    one_device = f"{multiprocess.XLA_FLAGS} --xla_force_host_platform_device_count=1"
    environment = {
        **killing.environment(directory),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": one_device,
    }
    command = [sys.executable, "-m", "experiments.faults.killed_worker", *options]
    workers = []
    with contextlib.ExitStack() as stack:
        for index in range(PROCESSES):
            errors = stack.enter_context(open(directory.parent / f"errors_{index}", "w"))
            worker = running.started(
                [*command, f"--worker={index}"], cwd=provenance.ROOT, env=environment,
                stdin=stdin, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
            workers.append(stack.enter_context(worker))
        yield workers
        for worker in workers:
            worker.kill()


def _errors(directory: Path) -> str:
    return "\n".join(
        (directory.parent / f"errors_{index}").read_text()[-3000:] for index in range(PROCESSES)
    )


def _run(directory: Path, steps: int) -> tuple[str, int]:
    """Runs both workers to their end; returns the hash and where they resumed."""
    with (
        multiprocess.reserve_port() as held,
        _started(directory, steps, held.getsockname()[1], subprocess.DEVNULL) as workers,
    ):
        # gloo, too, writes to stdout; what a worker says fits a pipe that is not read yet.
        outputs = [
            killing.SAID.findall(worker.communicate(timeout=multiprocess.PATIENCE_S)[0])
            for worker in workers
        ]
    assert all(worker.returncode == 0 for worker in workers), _errors(directory)
    assert outputs[0][-1] == outputs[1][-1], "the workers end with different states"
    return outputs[0][-1][1], int(outputs[0][0][1])


def _run_and_kill(
    directory: Path, steps: int, victim: int, aim: str, until: int, rng: random.Random
) -> int:
    """Starts both workers and kills one at or after step `until`.

    The kill comes just after a step, just after a save began, or at the end of the run. Then ends
    the other. Returns the step they resumed at.
    """
    with (
        multiprocess.reserve_port() as held,
        _started(directory, steps, held.getsockname()[1], subprocess.PIPE) as workers,
    ):
        stdout = workers[victim].stdout
        assert stdout is not None
        resume, is_there = killing.listen(stdout, aim, until)
        if is_there:
            time.sleep(rng.uniform(0, 0.15 if aim == "save" else 0.02))
        workers[victim].kill()
        time.sleep(
            rng.uniform(0, 1)
        )  # the other one notices, waits, or goes on with what needs no partner
    assert is_there and workers[victim].returncode == -signal.SIGKILL, _errors(directory)
    return resume


def check(settings: Settings) -> None:
    """Refuses a call by hand.

    Raises:
      Refused: naming the command that starts it.
    """
    if settings.worker < 0 or settings.directory is None:
        raise command_line.Refused(
            'a worker is started by python -m experiments.faults.run --only "killed worker"'
        )


def run(settings: Settings) -> None:
    """Is one worker, and says its bits."""
    print(f"bits {work(settings)}")


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
