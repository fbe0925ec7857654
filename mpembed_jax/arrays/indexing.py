"""Gathers and scatters of rows, in the one form that XLA compiles without copying its operands.

`array.at[index].set(values)` first wraps negative indices and then, on a CPU, copies the values to a layout that differs in
nothing but the order of a dimension of size one (a copy of the whole batch's gradients, say). Passing the canonical
dimension numbers avoids both. Indices outside the array, negative ones included, are dropped (scatter) or read as the
fill value or the nearest row (gather).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

HOST_KINDS = ("pinned_host",)  # memory kinds that a table may be kept in
_FILL_BLOCK = 8192  # rows


def is_on_host(array: jax.Array) -> bool:
    """Whether an array (traced or not) is kept in host memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def to_host(array: jax.Array, memory_kind: str | None) -> jax.Array:
    """Returns the array in host memory if a memory kind of the host is named, unchanged for None."""
    if memory_kind is None or is_on_host(array):
        return array
    return jax.device_put(array, jax.memory.Space.Host)


def filled(shape: tuple[int, ...], value: jax.Array, memory_kind: str | None) -> jax.Array:
    """Returns an array of `shape` [n, ..] whose rows all equal `value` [..], in host memory if a memory kind is named.

    There it is made block by block: of one broadcast, XLA makes an array on the device, perhaps larger than the device,
    and copies it. (A block stored straight into fresh host memory makes XLA allocate it there.)
    """
    size = min(shape[0], _FILL_BLOCK)
    if memory_kind is None or size == 0:
        return to_host(jnp.broadcast_to(value, shape), memory_kind)
    block = jnp.broadcast_to(value, (size, *shape[1:]))
    # Without the barrier XLA knows that the first block changes nothing.
    array = put_block(
        to_host(jnp.zeros(shape, value.dtype), memory_kind),
        jnp.int32(0),
        lax.optimization_barrier(block),
    )

    def body(turn: jax.Array, array: jax.Array) -> jax.Array:
        return put_block(array, jnp.minimum(turn.astype(jnp.int32) * size, shape[0] - size), block)

    return lax.fori_loop(1, -(-shape[0] // size), body, array)


def take(array: jax.Array, index: jax.Array, fill: int | None = None) -> jax.Array:
    """Returns array[index] (array [n, ..], int32 index [..]); outside: the nearest row, or `fill` if given."""
    window = tuple(range(index.ndim, index.ndim + array.ndim - 1))
    dimensions = lax.GatherDimensionNumbers(window, (0,), (0,))
    mode = lax.GatherScatterMode.CLIP if fill is None else lax.GatherScatterMode.FILL_OR_DROP
    if is_on_host(
        array
    ):  # jax asks for indices in the same memory; only they and the rows they name cross the bus
        index = jax.device_put(index, jax.memory.Space.Host)
        rows = lax.gather(
            array, index[..., None], dimensions, (1, *array.shape[1:]), mode=mode, fill_value=fill
        )
        return jax.device_put(rows, jax.memory.Space.Device)
    return lax.gather(
        array, index[..., None], dimensions, (1, *array.shape[1:]), mode=mode, fill_value=fill
    )


def take_or_zeros(array: jax.Array, index: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns rows array[index] (array float32 or uint32 [n, m], int32 index [k]), zeros outside; fast for cold rows.

    XLA:CPU unrolls the copy of a row below about 80 words into scalar moves. They fill the processor's store queue, so that
    one row's cache misses are not overlapped with the next one's: four times the time at m = 64. A few operations with a
    zero that the compiler cannot know keep the loop over the row, which is then vectorized.

    Args:
      array: rows.
      index: row numbers.
      zero: uint32 scalar, zero, computed from data.
    """
    words = array.shape[1]
    is_unrolled = 24 <= words < 80
    if not is_unrolled and not is_on_host(array):
        return take(array, index, 0)
    rows = lax.bitcast_convert_type(take(array, index), jnp.uint32)
    num_turns = (
        max(1, -(-300 // words) - 4) if is_unrolled else 0
    )  # 300 instructions are unrolled, a word's copy has four
    for turn in range(num_turns):
        rows = rows + zero if turn % 2 else rows ^ zero
    is_inside = (index >= 0) & (index < array.shape[0])
    rows = jnp.where(is_inside[:, None], rows, jnp.uint32(0))
    return lax.bitcast_convert_type(rows, array.dtype)


def put_block(array: jax.Array, first: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` [n, ..] with rows [first, first + k) replaced by values [k, ..], wherever the array is kept."""
    start = (first, *[jnp.int32(0)] * (array.ndim - 1))
    if is_on_host(array):
        values, start = jax.device_put((values, start), jax.memory.Space.Host)
    return lax.dynamic_update_slice(array, values, start)


def _scatter(
    scatter: Callable, array: jax.Array, index: jax.Array, values: jax.Array | int
) -> jax.Array:
    values = jnp.broadcast_to(jnp.asarray(values, array.dtype), (*index.shape, *array.shape[1:]))
    dimensions = lax.ScatterDimensionNumbers(tuple(range(1, array.ndim + 1)), (), (0,))
    return scatter(
        array, index[:, None], values[:, None], dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP
    )


def put(array: jax.Array, index: jax.Array, values: jax.Array | int) -> jax.Array:
    """Returns `array` [n, ..] with rows `index` (int32 [m], distinct) replaced by values [m, ..] or a scalar."""
    return _scatter(lax.scatter, array, index, values)


def add(array: jax.Array, index: jax.Array, values: jax.Array | int) -> jax.Array:
    """Returns `array` with values added at `index`, duplicates summed."""
    return _scatter(lax.scatter_add, array, index, values)


def maximum(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` raised to values at `index`."""
    return _scatter(lax.scatter_max, array, index, values)


def minimum(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` lowered to values at `index`."""
    return _scatter(lax.scatter_min, array, index, values)
