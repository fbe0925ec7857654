"""Block-wise reading and creation of arrays in an accelerator's host memory.

The device never holds such an array whole. Orbax cannot restore them: if the sharding names host
memory, it returns an array whose type says device memory, and a step compiled for that array
aborts. The arrays therefore pass through NumPy here. They are read by the same gathers as in a
step, and written by the same block stores that fill them at first.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing

BLOCK_BYTES = 1 << 25


def is_kept(array: Any) -> bool:
    """Returns whether an array is in one device's host memory."""
    return (
        isinstance(array, jax.Array)
        and indexing.is_on_host(array)
        and len(array.sharding.device_set) == 1
    )


def _rows_of_block(array: Any, block_bytes: int) -> int:
    """Returns the number of rows of an array [n, ..] per block: at least one and at most n."""
    return max(1, min(array.shape[0], block_bytes // max(1, array.nbytes // array.shape[0])))


@partial(jax.jit, static_argnames="size")
def _read(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return indexing.take(array, first + jnp.arange(size, dtype=jnp.int32))


@partial(jax.jit, donate_argnums=0)
def _store(array: jax.Array, first: jax.Array, values: jax.Array) -> jax.Array:
    return indexing.put_block(array, first, values)


@partial(jax.jit, static_argnames=("shape", "dtype", "memory_kind"))
def _zeros(shape: tuple[int, ...], dtype: Any, memory_kind: str) -> jax.Array:
    return indexing.filled(shape, jnp.zeros((), dtype), memory_kind)


def blocks(array: jax.Array, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, jax.Array]]:
    """Yields (first row, rows on the device) of an array [n, ..] in host memory.

    Every row is in exactly one block of at most `block_bytes`, or of one row.
    """
    if array.size == 0:
        return
    size = _rows_of_block(array, block_bytes)
    for first in range(0, array.shape[0], size):
        # All slices have the same length, so that one compiled program reads them all.
        begin = min(first, array.shape[0] - size)
        yield first, _read(array, np.int32(begin), size)[first - begin :]


def to_numpy(array: jax.Array, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """Returns a NumPy copy of the array that later donation cannot change.

    With np.array, jax would keep a second copy next to the array.
    """
    if array.ndim == 0:
        return np.array(array)
    result = np.empty(array.shape, array.dtype)
    for first, rows in blocks(array, block_bytes):
        result[first : first + len(rows)] = rows
    return result


def gather(array: jax.Array, index: np.ndarray, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """Returns array[index] on the host, for int32 indices [m] inside the array.

    Rows are read one block at a time.
    """
    result = np.empty((index.size, *array.shape[1:]), array.dtype)
    take = jax.jit(indexing.take)
    size = min(_rows_of_block(array, block_bytes), indexing.ceil_power(index.size))
    for first in range(0, index.size, size):
        piece = index[first : first + size]
        result[first : first + size] = np.asarray(
            take(array, np.pad(piece, (0, size - piece.size)))
        )[: piece.size]
    return result


def from_numpy(
    array: np.ndarray, memory_kind: str, device: Any = None, block_bytes: int = BLOCK_BYTES
) -> jax.Array:
    """Returns a jax-owned array in host memory with a copy of the values.

    Because jax owns it, it can be donated to a step.

    Args:
      array: any shape.
      memory_kind: a memory kind of the host.
      device: the device whose host memory is used; None for the default device.
      block_bytes: at most so many are on the device at once, or one row.
    """
    with contextlib.nullcontext() if device is None else jax.default_device(device):
        if array.ndim == 0 or array.size == 0:
            return jax.jit(indexing.to_host, static_argnums=1)(array, memory_kind)
        size = _rows_of_block(array, block_bytes)
        result = _zeros(array.shape, array.dtype, memory_kind)
        for first in range(0, array.shape[0], size):
            begin = min(first, array.shape[0] - size)
            result = _store(result, np.int32(begin), array[begin : begin + size])
        return result
