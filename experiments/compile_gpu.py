"""What does a step compile to on a GPU? Ahead of time, on a machine that has none: fusions, kernels, copies, temporaries.

    pip install -e .[aot]
    JAX_PLATFORMS=cpu python -m experiments.compile_gpu            # writes results/compile_gpu.json

The plugin wheels hold XLA's whole GPU compiler; a target is described by its hardware figures, no driver is needed. What
the figures cannot say is time: for that there is bench_gpu, on a GPU. Needs no more than jax, optax and numpy.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed

# XLA's GpuTargetConfigProto. Figures of the hardware; versions of a driver and a toolkit that this compiler accepts.
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory} pcie_bandwidth: 34359738368
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.{minor}" name: "{name}"
  device_address_bits: 64 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str
    major: int
    minor: int
    cores: int
    fpus: int
    per_core: int  # bytes of shared memory
    optin: int
    bandwidth: int  # bytes a second
    l2: int
    clock: float
    memory: int
    extension: str = "NONE"

    @property
    def has_kernels(self) -> bool:
        """Whether Pallas' Triton back end supports it."""
        return self.major >= 8


TARGETS = {
    "h200": Target("NVIDIA H200", 9, 0, 132, 128, 233472, 232448, 4800000000000, 52428800, 1.98, 151397597184,
                   "ACCELERATED_FEATURES"),
    "a100": Target("NVIDIA A100-SXM4-40GB", 8, 0, 108, 64, 167936, 166912, 1555200000000, 41943040, 1.41, 42331013120),
    "l4": Target("NVIDIA L4", 8, 9, 58, 128, 102400, 101376, 300000000000, 50331648, 2.04, 24000000000),
    "t4": Target("Tesla T4", 7, 5, 40, 64, 65536, 65536, 320000000000, 4194304, 1.59, 15800000000),
}  # fmt: skip


def missing_compiler() -> str | None:
    """Says why nothing can be compiled here for a GPU, None if it can."""
    version = importlib.metadata.version("jaxlib")
    for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed (pip install -e .[aot])"
        if found != version:
            return f"{name} is {found}, jaxlib is {version}: install the same version"
    return None


def compile_for(target: str, function: Any, *args: Any, donate_argnums: Any = ()) -> Any:
    """Compiles a function of shape structs for one of TARGETS."""
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    config = _TARGET.format(**dataclasses.asdict(TARGETS[target]))
    description = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    mesh = topologies.make_mesh(description, (1,), ("x",))

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = getattr(getattr(leaf, "sharding", None), "memory_kind", None)
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # Traced outside the mesh: what tracing evaluates (initial optimizer states) runs on this machine's device.
    traced = jax.jit(function, donate_argnums=donate_argnums).trace(*jax.tree.map(placed, args))
    with jax.set_mesh(mesh):
        return traced.lower().compile()


def step_and_arguments(
    spec: mpembed.EmbeddingSpec, implementation: str, batch_shape: tuple[int, ...], tx: optax.GradientTransformation
) -> tuple[Any, tuple]:
    """Returns the embedding's training step and its abstract arguments; the first is donated."""

    def step(state: Any, ids: jax.Array, upstream: jax.Array) -> Any:
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        pool = functools.partial(mpembed.pool, inverse=plan.inverse, implementation=implementation)
        vectors, pull_back = jax.vjp(pool, rows)
        return mpembed.apply_gradients(state, plan, rows, pull_back(upstream)[0], tx=tx), vectors

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = jax.eval_shape(lambda key: mpembed.init(key, spec, tx, implementation=implementation), key)
    ids = jax.ShapeDtypeStruct(batch_shape, jnp.int32)
    return step, (state, ids, jax.ShapeDtypeStruct((*batch_shape, spec.embedding_dim), jnp.float32))


def figures(compiled: Any, state: Any) -> dict:
    """Counts what a compiled step does.

    Args:
      compiled: from compile_for.
      state: the donated first argument, or its shapes: keys, counters and scalars (below 1,000 elements) may be copied.

    Returns:
      Numbers of fusions, kernels, sorts, loops and state-sized copies, and XLA's bytes.
    """
    text, sizes = compiled.as_text(), compiled.memory_analysis()
    large = {int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(state)} - set(range(1000))
    copies = [_elements(shape) for shape in re.findall(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", text)]
    return {
        "fusions": len(re.findall(r"= .* fusion\(", text)),
        "kernels": len(re.findall(r'custom_call_target="[^"]*triton', text)),
        "sorts": len(re.findall(r" sort\(|cub|custom_call_target=\"[^\"]*[Ss]ort", text)),
        "loops": len(re.findall(r" while\(", text)),
        "state_sized_copies": sum(elements in large for elements in copies),
        "argument_bytes": sizes.argument_size_in_bytes,
        "aliased_bytes": sizes.alias_size_in_bytes,
        "temporary_bytes": sizes.temp_size_in_bytes,
    }


def _elements(shape: str) -> int:
    return int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))


def main() -> None:
    """Compiles the step for every target and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--rows", type=int, default=33_762_577)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/results/compile_gpu.json"))
    options = parser.parse_args()
    if reason := missing_compiler():
        raise SystemExit(reason)
    tx, shape, runs = mpembed.optim.rowwise_adagrad(0.05), (options.batch, 26), []
    for target in options.targets:
        for dim in options.dims:
            for implementation in ("xla", "pallas_triton") if TARGETS[target].has_kernels else ("xla",):
                spec = mpembed.EmbeddingSpec([mpembed.TableSpec("ids", options.rows)], dim, "int8")
                step, arguments = step_and_arguments(spec, implementation, shape, tx)
                begin = time.perf_counter()
                compiled = compile_for(target, step, *arguments, donate_argnums=0)
                seconds = time.perf_counter() - begin
                case = {"target": target, "dim": dim, "implementation": implementation}
                case |= figures(compiled, arguments[0])
                case["temporaries_per_vector_array"] = case["temporary_bytes"] / (4 * dim * options.batch * 26)
                runs.append(case | {"compile_seconds": round(seconds, 2)})
                print(json.dumps(runs[-1]), flush=True)
    settings = {"batch": options.batch, "features": 26, "rows": options.rows, "storage": "int8", "cache": "5 %, 32 ways"}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "jax-cuda12-plugin")}
    options.out.write_text(json.dumps({"settings": settings, "versions": versions, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
