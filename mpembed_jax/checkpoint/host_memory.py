"""Jax arrays in host memory (memory kind "pinned_host"), read and made block by block.

The device holds one block of such an array at a time. Orbax cannot restore these arrays: if the
sharding names host memory, orbax returns an array whose type says device memory, and a step
compiled for that array aborts. The arrays therefore pass through NumPy here. They are read by the
gathers of a step (`indexing.take`), and written by the block stores of init (`indexing.put_block`).
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing

BLOCK_BYTES = 1 << 25  # bytes of a block


def is_kept(array: Any) -> bool:
    """Returns whether a value is a jax array in the host memory of a single device."""
    return (
        isinstance(array, jax.Array)
        and indexing.is_on_host(array)
        and len(array.sharding.device_set) == 1
    )


def _rows_of_block(array: Any, block_bytes: int) -> int:
    """Returns the number of rows in a block of an array [n, ..], n > 0: from 1 to n."""
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
    """Yields (number of the first row, rows on the device) of each block of an array [n, ..].

    The array is in host memory. Its blocks follow one another. A block has at most `block_bytes`
    bytes, but at least one row. An empty array has no block.
    """
    if array.size == 0:
        return
    size = _rows_of_block(array, block_bytes)
    for first in range(0, array.shape[0], size):
        # All reads have the same length, so that one compiled program does them all. The last read
        # therefore begins earlier, and the rows that were read before are cut off.
        begin = min(first, array.shape[0] - size)
        yield first, _read(array, np.int32(begin), size)[first - begin :]


def to_numpy(array: jax.Array, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """Returns a NumPy copy of an array in host memory. Later donation does not change the copy.

    np.array would make jax keep one more copy for as long as the array lives.
    """
    if array.ndim == 0:
        return np.array(array)
    result = np.empty(array.shape, array.dtype)
    for first, rows in blocks(array, block_bytes):
        result[first : first + len(rows)] = rows
    return result


def gather(array: jax.Array, index: np.ndarray, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    """Returns array[index] as a NumPy array [m, ..].

    Args:
      array: [n, ..] in host memory, n > 0.
      index: int32 [m], from 0 to n - 1.
      block_bytes: the most bytes that are on the device at once; a block has at least one row.
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
    """Returns a jax array in host memory with a copy of the values.

    Jax owns the copy, so it can be donated to a step.

    Args:
      array: any shape and dtype.
      memory_kind: a memory kind of the host; see indexing.HOST_KINDS.
      device: the device whose host memory is used; None for the default device.
      block_bytes: the most bytes that are on the device at once; a block has at least one row.
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
