"""Values under `jax.shard_map`, typed by the mesh axes over which they vary.

The type system of `jax.shard_map` records which values differ between devices. A loop's carry must
have the same type at the beginning and at the end. A constant is equal on all devices. If the body
replaces it by a value that differs between devices, the two types differ. `with_final_types`
gives the carry its later type from the beginning. `at_most_once` is a loop of one iteration or
none, inside and outside a mesh. `with_common_type` gives the operands of a kernel one type, which
is also that of its results.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import lax

Carry = TypeVar("Carry")


def with_final_types(body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Returns `carry` with the types that the loop gives it in the end.

    The type of a leaf says over which mesh axes the leaf varies. Outside `jax.shard_map`, nothing
    is traced, and the carry is returned as it is.

    Args:
      body: one iteration of the loop. It is traced again until no type changes.
      carry: any pytree.

    Returns:
      The same values, with types that `body` preserves.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    treedef: Any
    leaves, treedef = jax.tree.flatten(carry)
    while True:
        results = treedef.flatten_up_to(jax.eval_shape(body, treedef.unflatten(leaves)))
        missing = [tuple(_axes(new) - _axes(old)) for new, old in zip(results, leaves, strict=True)]
        if not any(missing):
            return treedef.unflatten(leaves)
        leaves = [
            lax.pcast(leaf, axes, to="varying") if axes else leaf
            for leaf, axes in zip(leaves, missing, strict=True)
        ]


def at_most_once(body: Callable[[Carry], Carry], count: jax.Array, carry: Carry) -> Carry:
    """Returns body(carry) if `count` is 1, and carry if it is 0, by a loop of `count` iterations.

    XLA fuses nothing outside a loop into its body. It therefore contracts the body's
    multiplications and additions in the same way in every program. On a CPU, XLA also does not fuse
    the body with the operations that follow the loop.

    Args:
      body: a function of the carry that returns the new carry.
      count: int32 scalar, 0 or 1, whose value the compiler cannot see.
      carry: any pytree.
    """
    start = with_final_types(body, carry)
    return lax.fori_loop(0, count, lambda _, carry: body(carry), start)


def with_common_type(values: Sequence[jax.Array]) -> tuple[list[jax.Array], frozenset[str]]:
    """Returns values that all vary over the same mesh axes, and these axes.

    They are the axes over which any of the given values varies. Outside `jax.shard_map`, there are
    none.
    """
    axes = frozenset().union(*map(_axes, values))
    missing = [tuple(axes - _axes(value)) for value in values]
    same = [
        lax.pcast(value, others, to="varying") if others else value
        for value, others in zip(values, missing, strict=True)
    ]
    return same, axes


def _axes(value: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    held = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    kind = held.manual_axis_type
    return frozenset() if kind is None else frozenset(kind.varying)
