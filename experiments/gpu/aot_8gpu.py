"""What would eight GPUs exchange in a step? Compiled ahead of time, without one.

    pip install -e .[aot]
    JAX_PLATFORMS=cpu python -m experiments.gpu.aot_8gpu              # about a minute

Compiles the training step of mpembed_jax over a mesh of eight NVIDIA H200 (Kaggle's 33.76 M rows,
INT8 + 5 % cache, 65,536 x 26 ids) from shapes alone, and lists the collectives in the program, the
bytes each device sends, the temporaries, and copies of arrays as large as a shard's table; beside
it the plain step over a divided float32 table (divided_table.py) for the same batch. Nothing runs:
values and times are not checked here. Without the plugin it says so and ends.
"""

import dataclasses
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.gpu import targets
from experiments.scaling.collectives import collectives
from experiments.scaling.divided_table import all_gather_step
from experiments.speed import workload
from experiments.speed.step import embedding_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compile."""

    devices: int = setting(8, "GPUs of the mesh, a power of two.", "GPUS", at_least=1, at_most=64)
    dim: int = setting(64, "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096)
    batch: int = setting(65_536, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 24)
    unique_share: float = setting(
        0.4, "Room for distinct ids, over the ids of a batch.", "SHARE", above=0, at_most=1
    )
    capacity: float = setting(
        1.25, "Room of the exchange, over the mean ids per shard.", "TIMES", at_least=1
    )
    out: Path = setting(Path("experiments/results/aot_8gpu.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses a mesh that cannot divide the batch, and an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_devices(settings.devices, settings.batch)
    command_line.check_out(settings.out)


def compile_step(settings: Settings, mesh: Any) -> tuple[Any, Any]:
    """Returns the compiled step and the abstract state it is for."""
    tables = [mpembed.TableSpec(f"C{k + 1}", size) for k, size in enumerate(workload.KAGGLE_SIZES)]
    positions = settings.batch * len(tables)
    spec = mpembed.EmbeddingSpec(
        tables,
        settings.dim,
        "int8",
        mpembed.CacheSpec(0.05),
        max_unique_ids=int(settings.unique_share * positions),
    )
    tx = mpembed.optim.rowwise_adagrad(0.05)
    placement = mpembed.Placement(capacity=settings.capacity)
    init = partial(
        mpembed.init,
        spec=spec,
        tx=tx,
        mesh=mesh,
        placement=placement,
        implementation="xla",
    )
    state = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32))

    def step(state, ids, upstream):
        state, plan, _, vectors = embedding_step(state, ids, upstream, tx=tx)
        return state, vectors, plan.counts

    specs = mpembed.partition_specs(state)
    run = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, P("x"), P("x")), out_specs=(specs, P("x"), P())
    )

    shardings = jax.tree.map(partial(NamedSharding, mesh), specs)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    return jax.jit(run, donate_argnums=0).lower(
        state, *abstract_batch(settings, mesh)
    ).compile(), state


def abstract_batch(settings: Settings, mesh: Any) -> tuple[Any, Any]:
    """Returns the shapes of ids and gradients, divided over the mesh."""
    divided, shape = NamedSharding(mesh, P("x")), (settings.batch, len(workload.KAGGLE_SIZES))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=divided)
    return ids, jax.ShapeDtypeStruct((*shape, settings.dim), jnp.float32, sharding=divided)


def compile_all_gather(settings: Settings, mesh: Any) -> Any:
    """Returns the compiled step over a divided float32 table."""
    rows = -(-sum(workload.KAGGLE_SIZES) // settings.devices) * settings.devices
    table = jax.ShapeDtypeStruct(
        (rows, settings.dim), jnp.float32, sharding=NamedSharding(mesh, P("x"))
    )
    step = partial(all_gather_step, learning_rate=0.05)
    run = jax.shard_map(
        step, mesh=mesh, in_specs=(P("x"), P("x"), P("x")), out_specs=(P("x"), P("x"))
    )
    return jax.jit(run, donate_argnums=0).lower(table, *abstract_batch(settings, mesh)).compile()


def run(settings: Settings) -> None:
    """Compiles, prints and writes what the program exchanges.

    Raises:
      Failed: without the compiler.
    """
    if reason := targets.missing_compiler():
        raise command_line.Failed(f"not compiled: {reason}")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=targets.description("h200"),
        topology=f"1x1x{settings.devices}",
    )
    mesh = jax.sharding.Mesh(topology.devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with running.working("compiling the exchange"):
        compiled, state = compile_step(settings, mesh)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    arrays = {"table": state.table.rows, "cache rows": state.cache.rows, "tags": state.cache.tags}
    arrays |= {
        f"row state {k}": leaf
        for k, leaf in enumerate(jax.tree.leaves(state.row_state))
        if leaf.ndim
    }
    shard_rows = {name: leaf.shape[0] // settings.devices for name, leaf in arrays.items()}
    copied = re.findall(r"= \w+\[(\d+)[\d,]*\]\S* copy\(", text)
    copies = {name: sum(int(n) == rows for n in copied) for name, rows in shard_rows.items()}
    record = provenance.environment() | {
        "settings": dataclasses.asdict(settings) | {"out": settings.out.name},
        "compiled_for": f"{settings.devices} x NVIDIA H200, ahead of time; not run",
        "num_rows": state.spec.num_rows,
        "shard_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        // settings.devices,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "copies_of_a_shard_s_array": copies,
    }
    with running.working("compiling the divided table"):
        plain = compile_all_gather(settings, mesh).as_text()
    for name, program, is_wide in (
        ("ordinary", text, False),
        ("full_width", text, True),
        ("all_gather", plain, False),
    ):
        found = collectives(program, settings.devices, is_wide=is_wide)
        sent = sum(c.sent_bytes for c in found)
        record[name] = {"sent_bytes": sent, "collectives": [c._asdict() for c in found]}
        print(f"{name}: {len(found)} collectives, {sent / 1e6:.1f} MB sent per device and step")
        for c in found:
            print(f"  {c.kind:<15} {c.sent_bytes:>14,} B  {c.shape[:80]}")
    print(
        f"copies of a shard's arrays: {copies}; temporaries {memory.temp_size_in_bytes / 1e6:.0f} "
        "MB"
    )
    provenance.write(settings.out, record)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
