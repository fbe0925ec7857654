"""Rows of a stack divided over shards, on disk and in a target: host arrays in the order of global ids, and back.

A stack divided by MOD over P shards holds its arrays shard after shard: row r is row r div P of shard r mod P, set s is set
s div P of shard s mod P, a group of the sketch likewise, and tags are rows of their own shard. A checkpoint holds them as
they are in memory and records P; restored onto another P they pass through the order of one device, which is P = 1.
"""

from typing import Any

import numpy as np

from mpembed_jax.state import EmbeddingState
from mpembed_jax.table import NO_ID


def layout_of(state: EmbeddingState) -> Any:
    """Returns how a state lies over a mesh, None on one device."""
    return getattr(state, "layout", None)


def shards_of(state: EmbeddingState) -> int:
    """Returns P, over how many shards a state's rows are divided by MOD.

    Raises:
      ValueError: if whole tables are placed on shards, whose cache sets are no permutation of one device's.
    """
    layout = layout_of(state)
    if layout is None:
        return 1
    if layout.shards > 1 and layout.table_shards is not None:
        raise ValueError(
            "rows placed by whole tables are restored onto the same placement only; restore them there, then move them with "
            "sharding.relayout"
        )
    return layout.shards


def fingerprint_of(state: EmbeddingState) -> np.ndarray:
    """Returns uint32 [2] of the target's spec and of which row lies where."""
    return np.asarray(getattr(state, "expected_fingerprint", state.spec.fingerprint))


def _shares(array: np.ndarray, shards: int, axis: int = 0) -> np.ndarray:
    """Reorders an axis from shard after shard to the order of one device."""
    split = array.reshape(*array.shape[:axis], shards, -1, *array.shape[axis + 1 :])
    return np.swapaxes(split, axis, axis + 1).reshape(array.shape)


def _merged(array: np.ndarray, shards: int, axis: int = 0) -> np.ndarray:
    """Reorders an axis from the order of one device to shard after shard."""
    return _shares(array, array.shape[axis] // shards, axis)


def by_id(arrays: dict[str, np.ndarray], shards: int, num_rows: int) -> dict[str, np.ndarray]:
    """Returns a state's host arrays ({inner name: array}) as one device holds them.

    Args:
      arrays: as `shards` shards hold them, one after another.
      shards: P.
      num_rows: V; padding rows are left out.

    Returns:
      {inner name: array}, arrays by row [V, ..].
    """
    if shards == 1:
        return arrays
    result = dict(arrays)
    for name, array in arrays.items():
        if name.startswith(("table.rows", "row_state")) and array.ndim:
            result[name] = _shares(array, shards)[:num_rows]
        elif name == "cache.sketch":
            result[name] = _shares(array, shards, 1)
        elif name == "cache.rows":
            by_set = array.reshape(len(arrays["cache.tags"]), -1)
            result[name] = _shares(by_set, shards).reshape(array.shape)
        elif name == "cache.tags":
            shard = np.repeat(np.arange(shards, dtype=np.int32), len(array) // shards)[:, None]
            result[name] = _shares(np.where(array == NO_ID, NO_ID, array * shards + shard), shards)
        elif name.startswith("cache."):
            result[name] = _shares(array, shards)
    return result


def by_shard(arrays: dict[str, np.ndarray], shards: int) -> dict[str, np.ndarray]:
    """Returns one device's host arrays as `shards` shards hold them, one after another; padding rows are zero.

    Args:
      arrays: {inner name: array}, as from by_id.
      shards: P.

    Returns:
      {inner name: array}, arrays by row [P * ceil(V / P), ..].
    """
    if shards == 1:
        return arrays
    result = dict(arrays)
    for name, array in arrays.items():
        if name.startswith(("table.rows", "row_state")) and array.ndim:
            padded = np.pad(array, [(0, -len(array) % shards), *[(0, 0)] * (array.ndim - 1)])
            result[name] = _merged(padded, shards)
        elif name == "cache.sketch":
            result[name] = _merged(array, shards, 1)
        elif name == "cache.rows":
            by_set = array.reshape(len(arrays["cache.tags"]), -1)
            result[name] = _merged(by_set, shards).reshape(array.shape)
        elif name == "cache.tags":
            result[name] = _merged(np.where(array == NO_ID, NO_ID, array // shards), shards)
        elif name.startswith("cache."):
            result[name] = _merged(array, shards)
    return result
