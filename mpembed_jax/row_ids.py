"""Ids from a user: any nest of integer arrays, checked before jax could truncate them to int32."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Padding, and the tag of an empty line. It sorts last, and `mode="drop"` discards it.
NO_ID = 2**31 - 1


def on_host(ids: Any) -> np.ndarray:
    """Returns ids on the host as a NumPy array. Masked integers become NO_ID, in 64 bits.

    Raises:
      TypeError: if ids are a list of masked arrays.
    """
    check_list(ids)
    array = np.asarray(ids)
    if isinstance(ids, np.ma.MaskedArray) and array.dtype.kind in "iu":
        array = array.astype(np.uint64 if array.dtype.kind == "u" else np.int64)
        array[np.ma.getmaskarray(ids)] = NO_ID
    return array


def check_list(ids: Any) -> None:
    """Checks that ids are not a list of masked arrays, whose masks NumPy would drop.

    Raises:
      TypeError: if they are.
    """
    if not isinstance(ids, list | tuple):
        return
    kinds = set(map(type, ids))
    if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
        raise TypeError(
            "ids are a list of masked arrays, whose masks would be lost; pass one masked array, "
            "such as np.ma.stack(ids)"
        )
    if any(issubclass(kind, list | tuple) for kind in kinds):
        for part in ids:
            check_list(part)


def check_no_mask(name: str, values: Any) -> None:
    """Checks that values which are not ids have no mask, which NumPy would drop.

    Raises:
      TypeError: if they are a masked array, or a list of masked arrays.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: got a masked array, whose mask would be lost; fill it: array.filled(..)"
        )
    if isinstance(values, list | tuple) and any(
        issubclass(kind, np.ma.MaskedArray | list | tuple) for kind in set(map(type, values))
    ):
        for part in values:
            check_no_mask(name, part)


def checked(ids: Any) -> tuple[list[jax.Array], Any]:
    """Returns the leaves of a nest of ids as int32 arrays, and the structure of the nest.

    Args:
      ids: any pytree of ints, numpy arrays [..] and jax arrays [..]. Masked entries are padding.

    Raises:
      TypeError: if an id is not an integer, or a jax array has a dtype that int32 cannot hold.
      ValueError: if a host id does not fit int32.
    """
    leaves, treedef = jax.tree.flatten(ids)
    checked = []
    for leaf in leaves:
        if isinstance(leaf, int | np.ndarray | np.generic) and not isinstance(leaf, bool):
            array = on_host(leaf)
            if array.dtype.kind in "iu":
                if array.size and (array.max() > NO_ID or array.min() < -(2**31)):
                    raise ValueError(
                        f"ids must fit int32, got {array.dtype} values up to {array.max()}; map "
                        "them with spec.global_ids, which checks ranges before jax truncates to "
                        "32 bits"
                    )
                checked.append(jnp.asarray(array.astype(np.int32)))
                continue
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or dtype not in (jnp.int32, jnp.int16, jnp.int8, jnp.uint16, jnp.uint8):
            what = f"{dtype} {list(leaf.shape)}" if dtype is not None else type(leaf).__name__
            raise TypeError(
                f"ids must be int32 [..], got {what}; cast them (spec.global_ids does) before "
                "prefetch"
            )
        checked.append(leaf.astype(jnp.int32))
    return checked, treedef


def in_mapping_of(ids: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """Returns `values` in a mapping of the type of `ids`, which have the same keys.

    If jax does not treat that type as a pytree, the mapping is a dict.
    """
    if type(ids) is dict:
        return values
    treedef: Any
    paths, treedef = jax.tree_util.tree_flatten_with_path(ids, is_leaf=lambda node: node is not ids)
    keys: list[Any] = [getattr(path[0], "key", None) for path, _ in paths if path]
    is_known = len(paths) == len(keys) and set(keys) == set(values)
    return treedef.unflatten([values[key] for key in keys]) if is_known else values


def joined(
    leaves: list[jax.Array], width: tuple[int, ...] = (), dtype: Any = jnp.int32
) -> jax.Array:
    """Returns the ids of all leaves (dtype [.., *width] each) one after another, [N, *width]."""
    flat = [leaf.reshape(-1, *width) for leaf in leaves]
    return jnp.concatenate(flat) if flat else jnp.zeros((0, *width), dtype)


def divided(flat: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """Splits an array [N] into consecutive pieces of the given shapes."""
    if not shapes:
        return []
    pieces = jnp.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def in_range(ids: jax.Array, num_rows: int) -> jax.Array:
    """Returns whether each id names a row of a stack of `num_rows` rows (bool, shape of ids)."""
    return (ids >= 0) & (ids < num_rows)
