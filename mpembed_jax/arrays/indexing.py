"""Gathers and scatters of rows, in the form that XLA compiles without copying the operands.

`array.at[index].set(values)` first wraps negative indices. On a CPU, it then copies the values (for
example the gradients of a whole batch) to a layout that differs only in the order of a dimension of
size one. Passing the canonical dimension numbers avoids both. A scatter drops indices outside the
array, including negative ones. A gather reads the nearest row for them, or a fill value.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

HOST_KINDS = ("pinned_host",)  # the kinds of host memory that can hold a table
_FILL_BLOCK = 8192  # rows


def starts(*keys: jax.Array) -> jax.Array:
    """Returns which entries begin a run of equal keys (bool [n]).

    Several arrays are one key: an entry also begins a run if any of its keys differs from the key
    before it.

    Args:
      keys: arrays [n], n > 0, in which equal keys are neighbours.
    """
    edges = [key[1:] != key[:-1] for key in keys]
    return jnp.concatenate([jnp.ones(1, bool), functools.reduce(jnp.logical_or, edges)])


def ranks(keys: np.ndarray) -> np.ndarray:
    """Returns the place, from 0 on, of each entry in its run of equal keys (int64 [n]).

    The keys are a sorted NumPy array [n].
    """
    return np.arange(keys.size) - np.searchsorted(keys, keys)


def ceil_power(n: int) -> int:
    """Returns the smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def is_on_host(array: jax.Array) -> bool:
    """Returns whether an array, traced or not, is in host memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def to_host(array: jax.Array, memory_kind: str | None) -> jax.Array:
    """Returns the array in host memory, or as it is if `memory_kind` is None."""
    if memory_kind is None or is_on_host(array):
        return array
    return jax.device_put(array, jax.memory.Space.Host)


def filled(shape: tuple[int, ...], value: jax.Array, memory_kind: str | None) -> jax.Array:
    """Returns an array of `shape` [n, ..] in which every row equals `value` [..].

    If `memory_kind` is given, the array is in host memory and is filled block by block. A single
    broadcast would first make the whole array on the device, which may be too small for it. The
    first block is stored before the loop, because this store makes XLA allocate the array in host
    memory.
    """
    size = min(shape[0], _FILL_BLOCK)
    if memory_kind is None or size == 0:
        return to_host(jnp.broadcast_to(value, shape), memory_kind)
    block = jnp.broadcast_to(value, (size, *shape[1:]))
    # If the value is 0, this store changes nothing. Without the barrier, XLA would drop it.
    array = put_block(
        to_host(jnp.zeros(shape, value.dtype), memory_kind),
        jnp.int32(0),
        lax.optimization_barrier(block),
    )

    def body(turn: jax.Array, array: jax.Array) -> jax.Array:
        first = jnp.minimum(jnp.asarray(turn, jnp.int32) * size, shape[0] - size)
        return put_block(array, first, block)

    return lax.fori_loop(1, -(-shape[0] // size), body, array)


def take(array: jax.Array, index: jax.Array, fill: int | None = None) -> jax.Array:
    """Returns array[index] for array [n, ..] and int32 index [..], in device memory.

    The array may be in host or device memory. An index outside it reads the nearest row, or `fill`
    if that is given.
    """
    window = tuple(range(index.ndim, index.ndim + array.ndim - 1))
    dimensions = lax.GatherDimensionNumbers(window, (0,), (0,))
    mode = lax.GatherScatterMode.CLIP if fill is None else lax.GatherScatterMode.FILL_OR_DROP
    # jax requires the indices in the same memory as the array. Only the indices and the rows that
    # they name cross the bus.
    if is_on_host(array):
        index = jax.device_put(index, jax.memory.Space.Host)
        rows = lax.gather(
            array, index[..., None], dimensions, (1, *array.shape[1:]), mode=mode, fill_value=fill
        )
        return jax.device_put(rows, jax.memory.Space.Device)
    return lax.gather(
        array, index[..., None], dimensions, (1, *array.shape[1:]), mode=mode, fill_value=fill
    )


def put_block(array: jax.Array, first: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` [n, ..] with rows [first, first + k) replaced by values [k, ..].

    `first` is an int32 scalar. The array may be in host or device memory.
    """
    start = (first, *[jnp.int32(0)] * (array.ndim - 1))
    if is_on_host(array):
        values, start = jax.device_put((values, start), jax.memory.Space.Host)
    return lax.dynamic_update_slice(array, values, start)


def _scatter(
    scatter: Callable,
    array: jax.Array,
    index: jax.Array,
    values: jax.Array | int,
    *,
    are_distinct: bool = False,
) -> jax.Array:
    values = jnp.broadcast_to(jnp.asarray(values, array.dtype), (*index.shape, *array.shape[1:]))
    dimensions = lax.ScatterDimensionNumbers(tuple(range(1, array.ndim + 1)), (), (0,))
    return scatter(
        array,
        index[:, None],
        values[:, None],
        dimensions,
        unique_indices=are_distinct,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


def put(array: jax.Array, index: jax.Array, values: jax.Array | int) -> jax.Array:
    """Returns `array` [n, ..] with rows `index` (int32 [m], distinct) set to values [m, ..].

    The values may also be a scalar. They are cast to the dtype of the array. Only the indices
    inside the array must be distinct. The call tells XLA that they are distinct. Otherwise, stores
    of types narrower than 32 bits would be compare-and-swap loops on a GPU.
    """
    return _scatter(lax.scatter, array, index, values, are_distinct=True)


def add(array: jax.Array, index: jax.Array, values: jax.Array | int) -> jax.Array:
    """Returns `array` [n, ..] with values [m, ..], or a scalar, added at `index` (int32 [m]).

    All values of one index are added.
    """
    return _scatter(lax.scatter_add, array, index, values)


def maximum(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` [n, ..] with the rows at `index` (int32 [m]) raised to values [m, ..].

    A row becomes the elementwise maximum of itself and all values of its index.
    """
    return _scatter(lax.scatter_max, array, index, values)


def minimum(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` [n, ..] with the rows at `index` (int32 [m]) lowered to values [m, ..].

    A row becomes the elementwise minimum of itself and all values of its index.
    """
    return _scatter(lax.scatter_min, array, index, values)
