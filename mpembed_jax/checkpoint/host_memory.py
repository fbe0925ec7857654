"""Arrays in an accelerator's host memory, read and made block by block: the device never holds one of them whole.

orbax restores onto a sharding of host memory an array whose type says device memory, and a step compiled for it aborts. So
such arrays pass through NumPy here: read by the gathers that a step uses, written by the stores that fill them at first.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing

_BLOCK = 1 << 25  # bytes moved at once


def is_kept(array: Any) -> bool:
    """Whether an array is one device's, in its host memory."""
    return (
        isinstance(array, jax.Array)
        and indexing.is_on_host(array)
        and len(array.sharding.device_set) == 1
    )


def _rows_of_block(array: Any) -> int:
    """Returns how many rows of an array [n, ..] are moved at once: at most n, at least one."""
    return max(1, min(array.shape[0], _BLOCK // max(1, array.nbytes // array.shape[0])))


@partial(jax.jit, static_argnames="size")
def _read(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return indexing.take(array, first + jnp.arange(size, dtype=jnp.int32))


@partial(jax.jit, donate_argnums=0)
def _store(array: jax.Array, first: jax.Array, values: jax.Array) -> jax.Array:
    return indexing.put_block(array, first, values)


@partial(jax.jit, static_argnames=("shape", "dtype", "memory_kind"))
def _zeros(shape: tuple[int, ...], dtype: Any, memory_kind: str) -> jax.Array:
    return indexing.filled(shape, jnp.zeros((), dtype), memory_kind)


def blocks(array: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """Yields (first row, rows on the device) of an array [n, ..] in host memory, every row once."""
    if array.size == 0:
        return
    size = _rows_of_block(array)
    for first in range(0, array.shape[0], size):
        begin = min(first, array.shape[0] - size)  # blocks of one length: one program
        yield first, _read(array, np.int32(begin), size)[first - begin :]


def to_numpy(array: jax.Array) -> np.ndarray:
    """Returns a copy that later donation cannot change; unlike np.array, jax keeps no second one beside it."""
    if array.ndim == 0:
        return np.array(array)
    result = np.empty(array.shape, array.dtype)
    for first, rows in blocks(array):
        result[first : first + len(rows)] = rows
    return result


def gather(array: jax.Array, index: np.ndarray) -> np.ndarray:
    """Returns array[index] on the host, for int32 indices [m] inside; so many rows at once as a block has."""
    result = np.empty((index.size, *array.shape[1:]), array.dtype)
    take, size = (
        jax.jit(indexing.take),
        min(_rows_of_block(array), 1 << max(0, index.size - 1).bit_length()),
    )
    for first in range(0, index.size, size):
        piece = index[first : first + size]
        result[first : first + size] = np.asarray(
            take(array, np.pad(piece, (0, size - piece.size)))
        )[: piece.size]
    return result


def from_numpy(array: np.ndarray, memory_kind: str, device: Any = None) -> jax.Array:
    """Returns an array of jax's own in host memory, with a copy of the values, so that a step can take it donated.

    Args:
      array: any shape.
      memory_kind: of the host.
      device: whose host memory; None: the default device's.
    """
    with contextlib.nullcontext() if device is None else jax.default_device(device):
        if array.ndim == 0 or array.size == 0:
            return jax.jit(indexing.to_host, static_argnums=1)(array, memory_kind)
        size = _rows_of_block(array)
        result = _zeros(array.shape, array.dtype, memory_kind)
        for first in range(0, array.shape[0], size):
            begin = min(first, array.shape[0] - size)
            result = _store(result, np.int32(begin), array[begin : begin + size])
        return result
