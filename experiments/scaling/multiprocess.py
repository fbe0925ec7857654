"""Does training over several processes give the numbers of one process?

    python -m experiments.scaling.multiprocess --processes 2 4      # about half a minute on 2 cores

Starts a training of one process without a mesh, then for each number of processes as many workers
on this machine, joined by jax.distributed (gloo collectives on CPUs), each with an equal share of
devices, rows and batch. Gradients are small multiples of a power of two, whose sums are exact in
any order, so everything must agree in every bit: the counts of every step, the vectors, the final
rows. Each run then trains a second stack, of raw ids that compete for a small pool of rows. Prints
one line per run, writes experiments/results/multiprocess.json, and fails if two differ.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
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
from experiments.speed.step import embedding_step

# Workers that share one machine may be busy or stopped for long: nothing but the launcher's own
# limit ends them.
PATIENCE_S = 3600
XLA_FLAGS = (
    f"--xla_cpu_collective_timeout_seconds={PATIENCE_S} "
    f"--xla_cpu_collective_call_terminate_timeout_seconds={PATIENCE_S}"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train."""

    processes: tuple[int, ...] = setting(
        (2, 4), "Processes of a run.", "PROCESSES", at_least=1, at_most=16
    )
    devices: int = setting(
        4,
        "CPU devices of all processes together, a power of two.",
        "DEVICES",
        at_least=1,
        at_most=16,
    )
    rows: int = setting(20_000, "Rows of each table.", "ROWS", at_least=2000, at_most=100_000_000)
    dim: int = setting(16, "Numbers in a row of a table.", "NUMBERS", at_least=1, at_most=4096)
    batch: int = setting(512, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 20)
    features: int = setting(
        4, "Tables, with one id each in a row.", "TABLES", at_least=1, at_most=64
    )
    steps: int = setting(20, "Training steps.", "STEPS", at_least=1, at_most=1_000_000)
    out: Path = setting(Path("experiments/results/multiprocess.json"), "File for the results.")
    # Set by the launcher: which worker this is, -1 for the run without a mesh.
    worker: int | None = setting(None, unit="NUMBER", is_hidden=True)
    port: int = setting(0, unit="NUMBER", is_hidden=True)


def check(settings: Settings) -> None:
    """Refuses devices that do not divide over the processes, too much memory, unwritable files.

    Raises:
      Refused: in one sentence.
    """
    if settings.worker is not None:
        return
    command_line.check_devices(settings.devices, settings.batch)
    for processes in settings.processes:
        if settings.devices % processes:
            command_line.refuse(
                "--processes", processes, f"divisors of --devices {settings.devices}"
            )
    command_line.check_out(settings.out)
    needed = (1 + 4) * settings.rows * settings.features * settings.dim
    what = f"{settings.features} INT8 tables of {settings.dim} numbers a row and their FP32 copy"
    command_line.check_memory("--rows", settings.rows, needed, what)
    needed = 4 * 4 * settings.batch * settings.features * settings.dim
    what = f"vectors of {settings.features} x {settings.dim} numbers, gradients and their copies"
    command_line.check_memory("--batch", settings.batch, needed, what)


TRAINING = (
    "devices",
    "rows",
    "dim",
    "batch",
    "features",
    "steps",
)  # the settings that workers share


def reserve_port() -> socket.socket:
    """Returns a socket that holds a free port of localhost until it is closed.

    Only the workers can use this port. It does not listen. The coordinator's gRPC server binds the
    same port beside it: both allow that (SO_REUSEPORT), which programs that ask for any free port
    do not. A port that is only probed may be another program's a second later.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("localhost", 0))
    return held


def join(port: int, processes: int, worker: int) -> jax.sharding.Mesh:
    """Joins the other workers and returns the mesh of all devices."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    limits = dict.fromkeys(
        ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"),
        PATIENCE_S,
    )
    jax.distributed.initialize(f"localhost:{port}", processes, worker, **limits)
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    # gloo connects at the first collective and waits 30 seconds for the others, whatever one sets:
    # here, where all of them come from initialize, and not after each has compiled its step.
    met = jax.shard_map(
        lambda: jax.lax.psum(jax.lax.axis_index("x"), "x"), mesh=mesh, in_specs=(), out_specs=P()
    )
    jax.block_until_ready(jax.jit(met)())
    return mesh


def train(settings: Settings, mesh: Any) -> dict[str, Any]:
    """Trains a stack of numbered ids, and one of raw ids, over the mesh if there is one.

    Returns counts and digests of the vectors and the rows; those of raw ids under "raw_ids".
    """
    names = [f"feature{k}" for k in range(settings.features)]
    tables = [mpembed.TableSpec(name, settings.rows) for name in names]
    spec = mpembed.EmbeddingSpec(tables, settings.dim, "int8", mpembed.CacheSpec(0.05, ways=8))
    # Every device needs a group of sets of the pool and of the cache.
    pool = max(settings.rows // 50, 16 * settings.devices)
    raw = mpembed.EmbeddingSpec(
        [mpembed.TableSpec(name) for name in names],
        settings.dim,
        "int8",
        mpembed.CacheSpec(num_rows=max(pool // 4, 8 * settings.devices), ways=1),
        vocabulary=mpembed.VocabularySpec(pool, admit_after=2, ways=2),
    )
    return train_stack(settings, mesh, spec) | {"raw_ids": train_stack(settings, mesh, raw)}


def train_stack(settings: Settings, mesh: Any, spec: mpembed.EmbeddingSpec) -> dict[str, Any]:
    """Trains one stack; returns its counts and digests."""
    tx = mpembed.optim.rowwise_adagrad(0.5)
    state = mpembed.init(jax.random.key(0), spec, tx, mesh=mesh)

    def step(state: Any, batch: Any) -> Any:
        ids, upstream = batch
        state, plan, _, vectors = embedding_step(state, ids, upstream, tx=tx)
        return state, (plan.counts, vectors)

    sharding = everywhere = None
    if mesh is not None:
        specs = mpembed.partition_specs(state)
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, P("x")), out_specs=(specs, (P(), P("x")))
        )
        sharding, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    jitted = jax.jit(step, donate_argnums=0)
    gather = (
        partial(jax.device_get) if mesh is None else jax.jit(lambda x: x, out_shardings=everywhere)
    )

    def placed(array: np.ndarray) -> jax.Array:
        if sharding is None:
            return jnp.asarray(array)
        share = len(array) // jax.process_count()  # every process gives its part
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        return jax.make_array_from_process_local_data(sharding, array[mine])

    rng, digest, totals = np.random.default_rng(0), hashlib.sha256(), []
    seen = []
    for number in range(settings.steps):
        local = np.minimum(rng.zipf(1.2, (settings.batch, settings.features)), settings.rows) - 1
        if spec.vocabulary is None:
            ids = spec.global_ids(local)
        else:  # integers of 64 bits, of which other ones are popular in each step
            ids = spec.raw_ids((local + 7 * number).astype(np.int64) << 32)
        upstream = rng.integers(-8, 9, (*local.shape, settings.dim)).astype(np.float32) / 256
        seen.append(ids)
        state, (counts, vectors) = jitted(state, (placed(ids), placed(upstream)))
        digest.update(np.asarray(gather(vectors)).tobytes())
        totals.append(
            {name: int(value) for name, value in vars(counts).items() if name != "wide_exchanges"}
        )
    if spec.vocabulary is None:
        dense = list(mpembed.to_dense(state).values())
    else:  # the rows of a pool are those that its ids read
        dense = [np.asarray(gather(jax.jit(mpembed.read)(state, placed(np.concatenate(seen)))))]
    rows = hashlib.sha256(b"".join(table.tobytes() for table in dense))
    counted = mpembed.stats(state)
    result = {
        "counts": totals,
        "vectors": digest.hexdigest()[:16],
        "rows": rows.hexdigest()[:16],
        "hit_rate": counted.hit_rate,
    }
    if counted.vocabulary is not None:
        result["vocabulary"] = counted.vocabulary._asdict()
    return result


def work(settings: Settings) -> None:
    """Is one worker: joins the others, trains, prints the result if it is the first."""
    mesh = None
    if settings.worker >= 0:
        (processes,) = settings.processes
        mesh = join(settings.port, processes, settings.worker)
    result = train(settings, mesh)
    if settings.worker <= 0:
        print("RESULT " + json.dumps(result), flush=True)


def launch(settings: Settings, processes: int) -> dict[str, Any]:
    """Runs one training over `processes` workers and returns its result.

    0 stands for one process without a mesh.
    """
    share = max(1, settings.devices // max(1, processes))
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count={share}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    options = [f"--{name}={getattr(settings, name)}" for name in TRAINING]
    workers: list[subprocess.Popen] = []
    with reserve_port() as held, tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "experiments.scaling.multiprocess",
            *options,
            f"--port={held.getsockname()[1]}",
        ]
        # Files, not pipes, which a worker nobody reads yet could fill.
        said = [Path(folder) / f"{index}" for index in range(max(1, processes))]
        with contextlib.ExitStack() as stack:
            for index, path in enumerate(said):
                which = [
                    "--processes",
                    str(max(1, processes)),
                    f"--worker={index if processes else -1}",
                ]
                file = stack.enter_context(path.open("w"))
                worker = running.started(
                    [*command, *which], env=environment, stdout=file, stderr=subprocess.STDOUT,
                    text=True,
                )  # fmt: skip
                workers.append(stack.enter_context(worker))
            for index, process in enumerate(workers):
                if process.wait(PATIENCE_S):
                    text = said[index].read_text().strip() or "it said nothing"
                    raise command_line.Failed(
                        f"worker {index} of {processes} ended with an error: "
                        f"{text.splitlines()[-1]}"
                    ) from RuntimeError(text[-3000:])
        return json.loads(said[0].read_text().split("RESULT ", 1)[1].splitlines()[0])


def run(settings: Settings) -> None:
    """Launches every run, compares, writes the results; as a worker, trains.

    Raises:
      Failed: if two runs differ.
    """
    if settings.worker is not None:
        work(settings)
        return
    record = provenance.environment() | {
        "settings": {name: getattr(settings, name) for name in TRAINING},
        "runs": [],
    }
    with running.working("training in one process"):
        expected = launch(settings, 0)
    for processes in (0, *settings.processes):
        with running.working(f"training in {processes} processes"):
            result = launch(settings, processes) if processes else expected
        is_same = result == expected
        totals = {
            name: sum(step[name] for step in result["counts"]) for name in result["counts"][0]
        }
        record["runs"].append(
            {
                **result,
                "processes": processes or 1,
                "mesh": bool(processes),
                "counts": totals,
                "same_bits": is_same,
            }
        )
        name = f"{processes} processes" if processes else "1 process, no mesh"
        print(
            f"{name}: rows {result['rows']}, vectors {result['vectors']}, hit rate "
            f"{result['hit_rate']:.3f}, "
            f"{'same' if is_same else 'OTHER'}",
            flush=True,
        )
        if not is_same:
            raise command_line.Failed(f"{processes} processes gave other numbers than one")
    provenance.write(settings.out, record)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
