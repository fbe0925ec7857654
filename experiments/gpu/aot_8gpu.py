"""What would eight GPUs exchange in a step? Compiled ahead of time, without one.

    # JAX is the version of the installed jax. Leave the dependencies out.
    pip install jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX
    # About a minute:
    JAX_PLATFORMS=cpu python -m experiments.gpu.aot_8gpu

Compiles the training step of mpembed_jax over a mesh of eight NVIDIA H200 (Kaggle's 33.76 M rows,
INT8 + 5 % cache, 65,536 x 26 ids) from shapes alone, and lists the collectives in the program, the
bytes each device sends, the temporaries, and copies of arrays as large as a shard's table; beside
it the plain step over a divided float32 table (divided_table.py) for the same batch. Nothing runs:
values and times are not checked here. Without the plugin it says so and ends.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from experiments import provenance
from experiments.gpu import targets
from experiments.scaling.collectives import collectives
from experiments.scaling.divided_table import all_gather_step
from experiments.speed import workload
from experiments.speed.step import embedding_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compile."""

    devices: int = 8
    dim: int = 64
    batch: int = 65_536
    unique_share: float = 0.4
    """max_unique_ids over the ids of a whole batch."""
    capacity: float = 1.25
    out: Path = Path("experiments/results/aot_8gpu.json")


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


def main(settings: Settings) -> None:
    """Compiles, prints and writes what the program exchanges."""
    if reason := targets.missing_compiler():
        print(f"not compiled: {reason}")
        return
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=targets.description("h200"),
        topology=f"1x1x{settings.devices}",
    )
    mesh = jax.sharding.Mesh(topology.devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
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
    settings.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
