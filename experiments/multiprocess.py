"""Does training over several processes give the numbers of one process?

    python -m experiments.multiprocess --processes 2 4      # about half a minute on 2 cores

Starts a training of one process without a mesh, then for each number of processes as many workers on this machine, joined by
jax.distributed (gloo collectives on CPUs), each with an equal share of devices, rows and batch. Gradients are small
multiples of a power of two, whose sums are exact in any order, so everything must agree in every bit: the counts of every
step, the vectors, the final rows. Prints one line per run and fails if two differ.
"""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train."""

    processes: tuple[int, ...] = (2, 4)
    devices: int = 4
    """Devices of all processes together; forced CPU devices."""
    rows: int = 20_000
    dim: int = 16
    batch: int = 512
    features: int = 4
    steps: int = 20
    worker: int | None = None
    """Set by the launcher: which worker this is, -1 for the run without a mesh."""
    port: int = 0


def train(settings: Settings, mesh: Any) -> dict[str, Any]:
    """Trains, over the mesh if there is one; returns counts and digests of the vectors and the rows."""
    tables = [mpembed.TableSpec(f"feature{k}", settings.rows) for k in range(settings.features)]
    spec = mpembed.EmbeddingSpec(tables, settings.dim, "int8", mpembed.CacheSpec(0.05, ways=8))
    tx = mpembed.optim.rowwise_adagrad(0.5)
    state = mpembed.init(jax.random.key(0), spec, tx, mesh=mesh)

    def step(state: Any, batch: Any) -> Any:
        ids, upstream = batch
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        vectors, pull_back = jax.vjp(lambda rows: mpembed.pool(rows, plan.inverse), rows)
        state = mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx)
        return state, (plan.counts, vectors)

    sharding = everywhere = None
    if mesh is not None:
        specs = mpembed.partition_specs(state)
        step = jax.shard_map(step, mesh=mesh, in_specs=(specs, P("x")), out_specs=(specs, (P(), P("x"))))
        sharding, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    run = jax.jit(step, donate_argnums=0)
    gather = partial(jax.device_get) if mesh is None else jax.jit(lambda x: x, out_shardings=everywhere)
    rng, digest, totals = np.random.default_rng(0), hashlib.sha256(), []
    for _ in range(settings.steps):
        local = np.minimum(rng.zipf(1.2, (settings.batch, settings.features)), settings.rows) - 1
        ids = spec.global_ids(local)
        upstream = rng.integers(-8, 9, (*ids.shape, settings.dim)).astype(np.float32) / 256
        batch = tuple(
            jnp.asarray(a) if sharding is None else jax.make_array_from_callback(a.shape, sharding, a.__getitem__)
            for a in (ids, upstream)
        )
        state, (counts, vectors) = run(state, batch)
        digest.update(np.asarray(gather(vectors)).tobytes())
        totals.append({name: int(value) for name, value in vars(counts).items() if name != "wide_exchanges"})
    rows = hashlib.sha256(b"".join(table.tobytes() for table in mpembed.to_dense(state).values()))
    return {
        "counts": totals,
        "vectors": digest.hexdigest()[:16],
        "rows": rows.hexdigest()[:16],
        "hit_rate": mpembed.stats(state).hit_rate,
    }


def work(settings: Settings) -> None:
    """Is one worker: joins the others, trains, prints the result if it is the first."""
    mesh = None
    if settings.worker >= 0:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        (processes,) = settings.processes
        # Heartbeats may be late: all workers share this machine, which may be busy.
        jax.distributed.initialize(f"localhost:{settings.port}", processes, settings.worker, heartbeat_timeout_seconds=600)
        mesh = jax.make_mesh((settings.devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    result = train(settings, mesh)
    if settings.worker <= 0:
        print("RESULT " + json.dumps(result), flush=True)


def launch(settings: Settings, processes: int) -> dict[str, Any]:
    """Runs one training over `processes` workers (0: one process without a mesh) and returns its result."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    share = max(1, settings.devices // max(1, processes))
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={share}", "JAX_PLATFORMS": "cpu"}
    options = [f"--{f.name}={getattr(settings, f.name)}" for f in dataclasses.fields(settings)[1:-2]]
    command = [sys.executable, "-m", "experiments.multiprocess", *options, f"--port={port}"]
    workers = [
        subprocess.Popen(
            [*command, "--processes", str(max(1, processes)), f"--worker={index if processes else -1}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(max(1, processes))
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=600) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        if worker.returncode:
            raise RuntimeError(f"a worker of {processes} ended with {worker.returncode}:\n{errors[-2000:]}")
    return json.loads(outputs[0][0].split("RESULT ", 1)[1])


def main(settings: Settings) -> None:
    """Launches every run and compares."""
    for processes in settings.processes:
        if settings.devices % processes:
            raise ValueError(f"{settings.devices} devices do not divide over {processes} processes")
    expected = launch(settings, 0)
    print(f"1 process, no mesh: rows {expected['rows']}, vectors {expected['vectors']}, hit rate {expected['hit_rate']:.3f}")
    for processes in settings.processes:
        result = launch(settings, processes)
        is_same = result == expected
        print(f"{processes} processes: rows {result['rows']}, vectors {result['vectors']}, {'same' if is_same else 'OTHER'}")
        if not is_same:
            raise SystemExit(f"{processes} processes gave other numbers than one")


if __name__ == "__main__":
    chosen = tyro.cli(Settings)
    work(chosen) if chosen.worker is not None else main(chosen)
