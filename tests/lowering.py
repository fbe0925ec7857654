"""Lowers functions for devices this machine lacks, and reads what came out: scatters, kernels."""

import collections
import contextlib
import re

import jax
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton

# From jax 0.11, kernels are lowered for the device of the mesh; before, sm_90 is assumed.
HAS_ABSTRACT_DEVICES = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)


def lowered_for(platform, function, *args, donate_argnums=()):
    """The lowered `function` for "cuda" (an H200) or "tpu".

    Args are arrays or their shape structs.
    """
    context = contextlib.nullcontext()
    if platform == "cuda" and HAS_ABSTRACT_DEVICES:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

        context = use_abstract_mesh(
            AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda"))
        )
    with context:
        return (
            jax.jit(function, donate_argnums=donate_argnums)
            .trace(*args)
            .lower(lowering_platforms=(platform,))
        )


def float_scatters(text):
    """(combiner, are indices unique) of every scatter of floats in a lowered module."""
    found = []
    for match in re.finditer(
        r'"stablehlo\.scatter"\(.*?unique_indices = (true|false).*?\}\) : \(([^)]*)\)',
        text,
        re.DOTALL,
    ):
        body = match.group(0)
        if re.search(r"tensor<(\d+x)*(f32|bf16|f16)>", match.group(2)):
            combiner = next(
                (
                    op
                    for op in ("add", "maximum", "minimum", "multiply")
                    if f"stablehlo.{op} " in body
                ),
                "set",
            )
            found.append((combiner, match.group(1) == "true"))
    return found


def kernels(text):
    """Names of the Triton kernels that a lowered module calls."""
    return re.findall(r"mpembed_(?!jax)\w+", text)


def kernel_modules(lowered):
    """{kernel: its Triton module as text} of the kernels that a lowered module calls."""
    found = {}

    def look(operation):
        attributes = operation.attributes
        if "mhlo.backend_config" in attributes and "ir" in (
            config := attributes["mhlo.backend_config"]
        ):
            with ir.Context() as context:
                triton.register_dialect(context)
                context.allow_unregistered_dialects = True  # the barrier is of another one
                found[config["name"].value] = str(ir.Module.parse(config["ir"].value_bytes))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(look)
    return found


def address_widths(lowered):
    """{kernel: {"i32" or "i64": number of address computations}}.

    Of the Triton kernels that a lowered module calls.
    """
    kernels = kernel_modules(lowered).items()
    return {
        name: collections.Counter(re.findall(r"tt\.addptr .*, tensor<\S*?(i\d+)>", text))
        for name, text in kernels
    }
