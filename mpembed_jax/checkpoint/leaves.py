"""The named leaves of a pytree: arrays for the disk and plain values for the manifest.

Names are paths through the tree, joined by dots. They appear in messages and in the manifest. The
folders of arrays have numbers instead, so a name may contain any character.
"""

import base64
import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing
from mpembed_jax.checkpoint import array_files, host_memory
from mpembed_jax.embedding.state import EmbeddingState, clock_of

_PLAIN = (bool, int, float, str, bytes)


def _names(paths: list[tuple]) -> list[str]:
    """Returns a name for each path: its keys, joined by dots.

    If several paths would get the same name, they are written in full, such as ['a'][0]. If that
    name is taken, too, a number is appended. The names are distinct and depend on the paths alone.
    """
    simple = [jax.tree_util.keystr(path, simple=True, separator=".") or "tree" for path in paths]
    num_of = collections.Counter(simple)
    names: list[str] = []
    taken = set(simple)
    for path, name in zip(paths, simple, strict=True):
        if num_of[name] > 1:
            full = name = jax.tree_util.keystr(path)
            number = 1
            while name in taken:
                number += 1
                name = f"{full}#{number}"
            taken.add(name)
        names.append(name)
    return names


def named(tree: Any) -> dict[str, Any]:
    """Returns {name: leaf} in the order of the tree's leaves."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return dict(zip(_names([path for path, _ in found]), (leaf for _, leaf in found), strict=True))


def without_clocks(tree: Any) -> Any:
    """Returns a tree whose embedding states have no clocks, as a checkpoint holds it."""
    return _each_state(tree, lambda state: dataclasses.replace(state, clock=None))


def with_clocks(tree: Any) -> Any:
    """Returns a restored tree whose embedding states have their clocks again."""
    on_device = jax.jit(clock_of)

    def changed(state: EmbeddingState) -> EmbeddingState:
        clock = on_device if isinstance(state.step, jax.Array) else clock_of
        return dataclasses.replace(state, clock=clock(*state.history))

    return _each_state(tree, changed)


def _each_state(tree: Any, changed: Callable[[EmbeddingState], Any]) -> Any:
    return jax.tree.map(
        lambda node: changed(node) if isinstance(node, EmbeddingState) else node,
        tree,
        is_leaf=lambda node: isinstance(node, EmbeddingState),
    )


class Member(NamedTuple):
    """An EmbeddingState inside a tree."""

    state: EmbeddingState
    # From a path inside the state, such as "table.rows", to the name in the tree.
    names: dict[str, str]


def embeddings(tree: Any) -> dict[str, Member]:
    """Returns every EmbeddingState of a tree by its name, which is "" if the tree itself is one."""
    if isinstance(tree, EmbeddingState):
        return {"": Member(tree, {name: name for name in named(tree)})}
    found = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, EmbeddingState)
    )
    prefixes = iter(_names([path for path, leaf in found if isinstance(leaf, EmbeddingState)]))
    names = iter(named(tree))
    result = {}
    for _, leaf in found:
        if isinstance(leaf, EmbeddingState):
            inner = {name: next(names) for name in named(leaf)}
            result[next(prefixes)] = Member(leaf, inner)
        else:
            next(names)
    return result


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def split(leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates arrays from plain Python values.

    Returns:
      Two dicts:
      - {name: array}. For random keys, the array is their key data.
      - {name: [name of the type, value]} for leaves of type bool, int, float, str or bytes. The
        value is JSON: bytes become base64 text.

    Raises:
      TypeError: if a leaf is neither, or is an array of a dtype that orbax cannot write. The
        message names the leaf.
    """
    arrays: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            arrays[name] = jax.random.key_data(leaf) if is_key(leaf) else leaf
        elif isinstance(leaf, np.ndarray | np.generic):
            arrays[name] = np.asarray(leaf)
        elif type(leaf) in _PLAIN:
            text = base64.b64encode(leaf).decode() if isinstance(leaf, bytes) else leaf
            values[name] = [type(leaf).__name__, text]
        else:
            what = f"a {type(leaf).__name__}" if not isinstance(leaf, jax.core.Tracer) else "traced"
            raise TypeError(
                f"leaf {name!r} is {what}; a checkpoint holds concrete arrays, numbers, strings "
                "and bytes"
            )
        if name in arrays and array_files.zarr_dtype(arrays[name].dtype.name) is None:
            raise TypeError(
                f"leaf {name!r} is an array of {arrays[name].dtype}, which orbax cannot write; "
                "convert it to numbers"
            )
    return arrays, values


def describe(key: str, leaf: Any, array: Any) -> dict[str, Any]:
    """Returns an array's entry in the manifest; `key` is the name of its folder."""
    record = {
        "key": key,
        "shape": list(array.shape),
        "dtype": np.dtype(array.dtype).name,
    }
    if is_key(leaf):
        record["random_key"] = str(jax.random.key_impl(leaf))
    return record


def plain_value(name: str, saved: list, target: Any) -> Any:
    """Returns a saved Python value.

    Raises:
      ValueError: if the target's leaf is of another type.
    """
    kind, value = saved
    if type(target).__name__ != kind:
        raise ValueError(
            f"leaf {name!r} was saved as a Python {kind}, the target has a {type(target).__name__}"
        )
    return base64.b64decode(value) if kind == "bytes" else value


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a restored array goes: the host, a device, or shards of a mesh."""

    # "host": a NumPy array. "default": an uncommitted jax array on the default device, because the
    # target names no device. "sharding": a jax array with the target's sharding. "memory": a jax
    # array in host memory.
    kind: str
    sharding: Any = None
    # The memory kind, for "memory" only. The sharding is then one device's, or None for the default
    # device.
    memory_kind: str = ""

    @staticmethod
    def of(leaf: Any) -> "Destination":
        """Returns the destination of a target's leaf.

        NumPy arrays stay NumPy. A jax array or shape gives its sharding. If it has no sharding, or
        is not committed, the destination is the default device. An array in the host memory of one
        device goes there again.
        """
        if isinstance(leaf, np.ndarray | np.generic):
            return Destination("host")
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or (isinstance(leaf, jax.Array) and not leaf.committed):
            return Destination("default")
        if sharding.memory_kind in indexing.HOST_KINDS and len(sharding.device_set) == 1:
            return Destination("memory", sharding, sharding.memory_kind)
        return Destination("sharding", sharding)

    def put(self, array: np.ndarray) -> Any:
        """Puts a host array at this destination.

        If the result is a jax array, jax owns it as a copy. It can then be donated to a step.
        """
        match self.kind:
            case "host":
                return array
            case "default":
                return jnp.array(array, copy=True)
            case "memory":
                device = None if self.sharding is None else next(iter(self.sharding.device_set))
                return host_memory.from_numpy(array, self.memory_kind, device)
            case _:
                return jax.make_array_from_callback(
                    array.shape, self.sharding, lambda index: np.array(array[index])
                )


def finish(leaf: Any, record: dict[str, Any], array: Any) -> Any:
    """Converts a restored array to the type of the target's leaf."""
    if is_key(leaf):
        return jax.random.wrap_key_data(array, impl=record["random_key"])
    return array[()] if isinstance(leaf, np.generic) else array


def mismatch(name: str, leaf: Any, record: dict[str, Any]) -> str | None:
    """Returns how an array on disk differs from the target's leaf, or None if it does not."""
    if isinstance(leaf, _PLAIN) and not isinstance(leaf, np.generic):
        return f"{name!r} is an array on disk, the target has a Python {type(leaf).__name__}"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return f"{name!r}: the target's leaf is a {type(leaf).__name__}"
    if is_key(leaf) != ("random_key" in record):
        return f"{name!r}: random keys on one side, plain numbers on the other"
    shape, dtype = (
        (tuple(leaf.shape), None)
        if is_key(leaf)
        else (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    )
    saved = tuple(record["shape"])
    if is_key(leaf):
        saved, words = saved[: len(shape)], saved[len(shape) :]
        if (fault := _key_fault(record, words)) is not None:
            return f"{name!r}: {fault}"
    if shape != saved or dtype not in (None, record["dtype"]):
        return (
            f"{name!r} is {record['dtype']} {list(saved)} on disk, but {leaf.dtype} {list(shape)} "
            "in the target"
        )
    return None


def _key_fault(record: dict[str, Any], words: tuple[int, ...]) -> str | None:
    """Returns why an array on disk holds no random keys, or None if it does."""
    impl = record["random_key"]
    try:
        one = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    except (ValueError, TypeError):
        return f"random keys of an unknown kind {impl!r}"
    if (one.shape, one.dtype.name) == (words, record["dtype"]):
        return None
    return f"{record['dtype']} {list(words)} on disk is no random key of kind {impl!r}"
