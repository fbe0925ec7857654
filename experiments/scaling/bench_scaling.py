"""What do several devices exchange in a step, and what does the step cost?

    python -m experiments.scaling.bench_scaling             # about ten minutes on 2 cores

One global batch of the Kaggle step (2,048 x 26 ids) is divided over 1, 2, 4, 8 forced CPU devices.
Two ways:
  exchange    mpembed_jax: ids are deduplicated; then all_to_all moves ids, rows and gradients with
              measured room.
  all-gather  A float32 table is divided by rows, without a cache. Every device gathers all ids,
              sends every position's row and gathers every position's gradient (divided_table.py).
Bytes are exact: the collectives of the compiled program, per device and step. Times are indicative:
all devices share the machine's cores. Results must not change: the rows after all steps are
compared with those of one device, bit for bit (gradients are small multiples of a power of two,
whose sums are exact).
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import dataclasses
import hashlib
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.scaling.collectives import collectives
from experiments.scaling.divided_table import all_gather_step
from experiments.speed import workload
from experiments.speed.step import check_memory, embedding_step
from mpembed_jax import sharding


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    devices: tuple[int, ...] = setting(
        (1, 2, 4, 8), "Devices of a run, powers of two.", "DEVICES", at_least=1, at_most=8
    )
    dims: tuple[int, ...] = setting(
        (16, 64), "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096
    )
    rows: int = setting(
        2_000_000, "Rows of all tables.", "ROWS", at_least=100_000, at_most=1_000_000_000
    )
    batch: int = setting(2048, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 20)
    skew: float = setting(1.05, "Exponent of the ids' Zipf law.", "EXPONENT", above=0, at_most=4)
    steps: int = setting(20, "Timed steps.", "STEPS", at_least=1, at_most=10_000)
    warm: int = setting(5, "Steps before the timed ones.", "STEPS", at_least=0, at_most=10_000)
    samples: int = setting(
        8,
        "Batches from which the planner measures the exchange's room; others than the run's.",
        "BATCHES",
        at_least=1,
        at_most=10_000,
    )
    out: Path = setting(Path("experiments/results/bench_scaling.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses numbers of devices that do not divide the batch, and an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    for devices in settings.devices:
        command_line.check_devices(devices, settings.batch, "powers of two")
    command_line.check_out(settings.out)
    check_memory(settings.rows, max(settings.dims))


def exchange_step(tx: Any) -> Any:
    """Returns the step of mpembed_jax: (state, ids, upstream) -> (state, vectors, counts)."""

    def step(state, ids, upstream):
        state, plan, _, vectors = embedding_step(state, ids, upstream, tx=tx)
        return state, vectors, plan.counts

    return step


def timed(compiled: Any, state: Any, batches: list, warm: int) -> tuple[Any, list[Any], float]:
    """Runs all batches.

    Returns the last state, the other results of each step, and the median seconds after `warm`.
    """
    seconds, results = [], []
    for batch in batches:
        start = time.perf_counter()
        state, *rest = jax.block_until_ready(compiled(state, *batch))
        seconds.append(time.perf_counter() - start)
        results.append(rest)
    return state, results, statistics.median(seconds[warm:])


def measure(
    settings: Settings, dim: int, devices: int, ids: list[np.ndarray], samples: list[np.ndarray]
) -> dict[str, Any]:
    """Runs both ways on one number of devices."""
    sizes = workload.sizes_for(settings.rows)
    tables = [mpembed.TableSpec(f"C{k + 1}", size) for k, size in enumerate(sizes)]
    spec = mpembed.EmbeddingSpec(tables, dim, "int8", mpembed.CacheSpec(0.05))
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    placement = sharding.plan(spec, devices, samples, replicate_bytes=0)
    tx = mpembed.optim.rowwise_adagrad(0.25)
    state = mpembed.init(jax.random.key(0), spec, tx, mesh=mesh, placement=placement)
    specs, divided = mpembed.partition_specs(state), NamedSharding(mesh, P("x"))
    rng = np.random.default_rng(3)
    upstream = rng.integers(-8, 9, (*ids[0].shape, dim)).astype(np.float32) / 1024
    upstream = jax.device_put(upstream, divided)
    batches = [(jax.device_put(i, divided), upstream) for i in ids]

    over_mesh = jax.shard_map(
        exchange_step(tx),
        mesh=mesh,
        in_specs=(specs, P("x"), P("x")),
        out_specs=(specs, P("x"), P()),
    )
    compiled = jax.jit(over_mesh, donate_argnums=0).lower(state, *batches[0]).compile()
    text = compiled.as_text()
    state, results, seconds = timed(compiled, state, batches, settings.warm)
    counts = [jax.device_get(counts) for _, counts in results]
    digest = hashlib.sha256(
        b"".join(t.tobytes() for t in mpembed.to_dense(state).values())
    ).hexdigest()[:16]
    ordinary, wide = collectives(text, devices), collectives(text, devices, is_wide=True)

    rows = -(-spec.num_rows // devices) * devices
    table = jax.device_put(np.zeros((rows, dim), np.float32), divided)
    step = partial(all_gather_step, learning_rate=0.25)
    plain = jax.shard_map(
        step, mesh=mesh, in_specs=(P("x"), P("x"), P("x")), out_specs=(P("x"), P("x"))
    )
    plain_compiled = jax.jit(plain, donate_argnums=0).lower(table, *batches[0]).compile()
    plain_collectives = collectives(plain_compiled.as_text(), devices)
    _, _, plain_seconds = timed(plain_compiled, table, batches, settings.warm)

    wide_steps = sum(int(c.wide_exchanges) for c in counts)
    sent = sum(c.sent_bytes for c in ordinary)
    sent_wide = sum(c.sent_bytes for c in wide)
    plain_sent = sum(c.sent_bytes for c in plain_collectives)
    mean_sent = (sent * (len(counts) - wide_steps) + sent_wide * wide_steps) / len(counts)
    return {
        "dim": dim, "devices": devices, "rows": spec.num_rows,
        "placement": dataclasses.asdict(placement),
        "unique": float(np.mean([int(c.unique) for c in counts])), "wide_steps": wide_steps,
        "steps": len(counts),
        "sent_bytes": sent, "sent_bytes_wide": sent_wide, "sent_bytes_mean": mean_sent,
        "all_gather_sent_bytes": plain_sent, "fewer": plain_sent / mean_sent if mean_sent else None,
        "ms": 1e3 * seconds, "all_gather_ms": 1e3 * plain_seconds, "rows_digest": digest,
        "collectives": [c._asdict() for c in ordinary],
        "all_gather_collectives": [c._asdict() for c in plain_collectives],
    }  # fmt: skip


def run(settings: Settings) -> None:
    """Measures every case, prints a line each, writes the results."""
    sizes = workload.sizes_for(settings.rows)

    def draw(seed: int, count: int) -> list[np.ndarray]:
        local = workload.batches(seed, count, settings.batch, sizes, settings.skew)
        return [workload.to_global(b, sizes) for b in local]

    ids, samples = draw(1, settings.warm + settings.steps), draw(2, settings.samples)
    results = []
    for dim in settings.dims:
        for devices in settings.devices:
            with running.working(f"D={dim} devices={devices}"):
                result = measure(settings, dim, devices, ids, samples)
            results.append(result)
            is_same = result["rows_digest"] == next(
                r["rows_digest"] for r in results if r["dim"] == dim
            )
            result["same_rows_as_first"] = is_same
            print(
                f"D={dim} devices={devices}: sent {result['sent_bytes_mean'] / 1e6:.3f} MB per "
                "device and step, all-gather "
                f"{result['all_gather_sent_bytes'] / 1e6:.3f} MB ({result['fewer'] or 0:.1f}x), "
                "wide steps "
                f"{result['wide_steps']}, {result['ms']:.1f} ms against "
                f"{result['all_gather_ms']:.1f}, same rows: {is_same}",
                flush=True,
            )
    # At the end: the cases are compared with one another, and a run that is cut leaves the file of
    # the run before.
    record = provenance.environment() | {
        "settings": dataclasses.asdict(settings) | {"out": settings.out.name},
        "results": results,
    }
    provenance.write(settings.out, record)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
