"""The compilation of a step for a GPU, ahead of time, on a machine without one.

It counts fusions, kernels, copies and temporaries.

    pip install -e .[aot]
    JAX_PLATFORMS=cpu python -m experiments.gpu.compile_gpu      # writes results/compile_gpu.json

The plugin wheels hold XLA's whole GPU compiler; a target is described by its hardware figures, no
driver is needed. What the figures cannot say is time: for that there is bench_gpu, on a GPU. Needs
no more than jax, optax and numpy.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.gpu.targets import TARGETS, description, missing_compiler
from experiments.speed.step import embedding_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made: its optimized module as text, and XLA's account of memory."""

    text: str
    sizes: Any


# What XLA calls the dtypes of a state and a batch.
_HLO_DTYPES = {"bool": "pred", "int32": "s32", "uint8": "u8", "uint16": "u16", "uint32": "u32"}
_HLO_DTYPES |= {"float32": "f32"}


def is_on_host(leaf: Any) -> bool:
    """Returns whether an abstract array is one in host memory."""
    return getattr(leaf, "memory_space", None) == jax.memory.Space.Host


def _layout(aval: Any) -> str:
    """Returns an array's shape as XLA writes it, in row-major order.

    XLA numbers host memory as memory space 5.
    """
    order = ",".join(str(axis) for axis in reversed(range(len(aval.shape))))
    layout = f"{{{order}{':S(5)' if is_on_host(aval) else ''}}}" if aval.shape else ""
    return f"{_HLO_DTYPES[str(aval.dtype)]}[{','.join(map(str, aval.shape))}]{layout}"


def compile_for(target: str, function: Any, *args: Any, donate_argnums: Any = ()) -> Compiled:
    """Compiles a function for one of TARGETS.

    Its arguments are shape structs, or `jax.core.ShapedArray` for arrays in host memory. Through
    jaxlib's own compiler call and not `Lowered.compile`: the devices of a described target have no
    memory kinds, so that way drops those of the arguments without a word, and compiles for a table
    on the device. On a real device jax passes them as layouts, which is what is done here.
    """
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh
    from jaxlib import _jax, xla_client

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description(target), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))

    def placed(leaf: Any) -> Any:
        if is_on_host(leaf):
            return leaf
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        )

    args = jax.tree.map(placed, args)
    # Only abstractly inside the mesh, which says what kernels are lowered for (jax before 0.11
    # assumes sm_90): what tracing evaluates (initial optimizer states) runs on this machine's
    # device.
    with use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate_argnums, keep_unused=True).trace(*args)
    with jax.set_mesh(mesh):
        module = traced.lower().compiler_ir()
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    options.argument_layouts = [xla_client.Shape(_layout(leaf)) for leaf in jax.tree.leaves(args)]
    results = [_layout(aval) for aval in traced.jaxpr.out_avals]
    result = results[0] if len(results) == 1 else f"({', '.join(results)})"
    options.executable_build_options.result_layout = xla_client.Shape(result)
    (device,) = topology.devices
    devices = _jax.DeviceList((device,))
    executable = device.client.compile(module, executable_devices=devices, compile_options=options)
    return Compiled(executable.hlo_modules()[0].to_string(), executable.get_compiled_memory_stats())


def abstract_state(
    spec: mpembed.EmbeddingSpec, implementation: str, tx: optax.GradientTransformation
) -> Any:
    """Returns the shapes of a state.

    Arrays in host memory are `jax.core.ShapedArray`, because eval_shape forgets their memory.
    """
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    traced = jax.jit(lambda key: mpembed.init(key, spec, tx, implementation=implementation)).trace(
        key
    )

    def shape_of(aval: Any) -> Any:
        if is_on_host(aval):
            return jax.core.ShapedArray(aval.shape, aval.dtype, memory_space=aval.memory_space)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return jax.tree.unflatten(
        jax.tree.structure(traced.out_info), [shape_of(aval) for aval in traced.jaxpr.out_avals]
    )


def step_and_arguments(
    spec: mpembed.EmbeddingSpec,
    implementation: str,
    batch_shape: tuple[int, ...],
    tx: optax.GradientTransformation,
    *,
    is_pooled: bool = False,
) -> tuple[Any, tuple]:
    """Returns the embedding's training step and its abstract arguments; the first one is donated.

    If is_pooled, the step ends in apply_pooled_gradients.
    """

    def step(state: Any, ids: jax.Array, upstream: jax.Array) -> Any:
        state, _, _, vectors = embedding_step(state, ids, upstream, tx=tx, is_pooled=is_pooled)
        return state, vectors

    state = abstract_state(spec, implementation, tx)
    ids = jax.ShapeDtypeStruct(batch_shape, jnp.int32)
    if spec.vocabulary is not None:
        ids = jax.ShapeDtypeStruct((*batch_shape, 2), jnp.uint32)
    return step, (state, ids, jax.ShapeDtypeStruct((*batch_shape, spec.embedding_dim), jnp.float32))


def host_verbs(
    spec: mpembed.EmbeddingSpec,
    batch_shape: tuple[int, ...],
    tx: optax.GradientTransformation,
    implementation: str = "xla",
) -> dict:
    """Returns {verb: (function, abstract arguments, donated ones)} of a table in host memory."""
    step, arguments = step_and_arguments(spec, implementation, batch_shape, tx)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return {
        "step": (step, arguments, 0),
        "read": (mpembed.read, arguments[:2], ()),
        "flush": (mpembed.flush, arguments[:1], 0),
        "init": (
            lambda key: mpembed.init(key, spec, tx, implementation=implementation),
            (key,),
            (),
        ),
    }


def figures(compiled: Compiled, state: Any) -> dict:
    """Counts what a compiled step does.

    Args:
      compiled: from compile_for.
      state: the donated first argument, or its shapes: keys, counters and scalars (below 1,000
        elements) may be copied.

    Returns:
      Numbers of fusions, kernels, sorts, loops, branches, launches and state-sized copies, and
        XLA's bytes, on the device and in host memory.
    """
    text, sizes = compiled.text, compiled.sizes
    large = {int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(state)} - set(
        range(1000)
    )
    copies = [
        _elements(shape) for shape in re.findall(r"= \(?\w+\[([\d,]*)\]\S* copy(?:-start)?\(", text)
    ]
    return {
        "fusions": len(re.findall(r"= .* fusion\(", text)),
        "kernels": len(re.findall(r'custom_call_target="[^"]*triton', text)),
        "sorts": len(re.findall(r" sort\(|cub|custom_call_target=\"[^\"]*[Ss]ort", text)),
        "loops": len(re.findall(r" while\(", text)),
        "branches": len(re.findall(r" conditional\(", text)),
        "launches": _launches(text),
        "state_sized_copies": sum(elements in large for elements in copies),
        "argument_bytes": sizes.argument_size_in_bytes,
        "aliased_bytes": sizes.alias_size_in_bytes,
        "temporary_bytes": sizes.temp_size_in_bytes,
        "host_argument_bytes": sizes.host_argument_size_in_bytes,
        "host_aliased_bytes": sizes.host_alias_size_in_bytes,
        "host_temporary_bytes": sizes.host_temp_size_in_bytes,
    }


def _launches(text: str) -> int:
    """Returns what the host launches for one run of a module, outside its loops and branches.

    A sort counts once. On a device, it is a library call of several kernels.
    """
    entry = text[text.index("\nENTRY ") :]
    return len(re.findall(r"^.* = .* (?:fusion|custom-call|copy|sort)\(", entry, re.MULTILINE))


def _elements(shape: str) -> int:
    return int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))


def measure(target: str, function: Any, arguments: tuple, donated: Any, state: Any) -> dict:
    """Compiles for a target and returns the figures, and the seconds it took."""
    begin = time.perf_counter()
    with running.working(f"compiling for {target}"):
        compiled = compile_for(target, function, *arguments, donate_argnums=donated)
    seconds = time.perf_counter() - begin
    return figures(compiled, state) | {"compile_seconds": round(seconds, 2)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compile."""

    batch: int = setting(
        65_536, "Rows of data in a step, of 26 ids each.", "ROWS", at_least=1, at_most=1 << 24
    )
    rows: int = setting(33_762_577, "Rows of the table.", "ROWS", at_least=1, at_most=2**31 - 2)
    dims: tuple[int, ...] = setting(
        (16, 64, 128), "Numbers in a row of the table.", "NUMBERS", at_least=1, at_most=4096
    )
    targets: tuple[str, ...] = setting(
        tuple(TARGETS), "GPUs to compile for.", choices=tuple(TARGETS)
    )
    out: Path = setting(Path("experiments/results/compile_gpu.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)


def run(settings: Settings) -> None:
    """Compiles the step for every target and writes the figures.

    A run that was stopped goes on: its cases are in a file beside the results until all are done.

    Raises:
      Failed: without the compiler.
    """
    if reason := missing_compiler():
        raise command_line.Failed(reason)
    found = provenance.environment()
    found["versions"] |= provenance.versions(("jax-cuda12-plugin",))
    found["settings"] = {
        "batch": settings.batch,
        "features": 26,
        "rows": settings.rows,
        "storage": "int8",
        "cache": "5 %, 32 ways",
    }
    found |= {"runs": [], "host_tables": []}
    unfinished = settings.out.with_name(f"{settings.out.stem}.unfinished.json")
    earlier = earlier_cases(unfinished, found)
    for kind, case, program in cases(settings):
        done = [run for run in earlier[kind] if case.items() <= run.items()]
        found[kind] += done[:1] or [case | program()]
        print(kind, json.dumps(found[kind][-1]), flush=True)
        provenance.write(unfinished, found)
    provenance.write(settings.out, found)
    unfinished.unlink()


def earlier_cases(path: Path, found: dict) -> dict[str, list[dict]]:
    """Returns the cases that an earlier run wrote before it was stopped.

    There are none if anything differs that could change them: the commit, the settings or the
    versions.
    """
    none: dict[str, list[dict]] = {"runs": [], "host_tables": []}
    if not path.is_file() or not found["commit"] or found["commit"].endswith("+changes"):
        return none
    earlier = json.loads(path.read_text())
    same = ("commit", "python", "versions", "settings")
    if any(earlier.get(name) != found[name] for name in same):
        return none
    return {kind: earlier[kind] for kind in none}


def cases(settings: Settings) -> Iterator[tuple[str, dict, Callable[[], dict]]]:
    """Yields for each program its kind, the names of its case, and a function that measures it."""
    tx, shape = mpembed.optim.rowwise_adagrad(0.05), (settings.batch, 26)
    table = [mpembed.TableSpec("ids", settings.rows)]

    def measure_step(target: str, dim: int, implementation: str, is_pooled: bool) -> dict:
        step, arguments = step_and_arguments(
            mpembed.EmbeddingSpec(table, dim), implementation, shape, tx, is_pooled=is_pooled
        )
        found = measure(target, step, arguments, 0, arguments[0])
        vectors = 4 * dim * settings.batch * 26
        return found | {"temporaries_per_vector_array": found["temporary_bytes"] / vectors}

    for target in settings.targets:
        for dim in settings.dims:
            for implementation, is_pooled in (
                ("xla", False),
                ("pallas_triton", False),
                ("pallas_triton", True),
            ):
                if implementation != "xla" and not TARGETS[target].has_kernels:
                    continue
                case = {
                    "target": target,
                    "dim": dim,
                    "implementation": implementation,
                    "is_pooled": is_pooled,
                }
                yield "runs", case, partial(measure_step, **case)
        dim = settings.dims[-1]
        spec = mpembed.EmbeddingSpec(table, dim, memory_kind="pinned_host")
        state = abstract_state(spec, "xla", tx)
        for verb, (function, arguments, donated) in host_verbs(spec, shape, tx).items():
            case = {
                "target": target,
                "dim": dim,
                "verb": verb,
                "table_bytes": spec.storage.row_bytes(dim) * settings.rows,
            }
            yield "host_tables", case, partial(measure, target, function, arguments, donated, state)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
