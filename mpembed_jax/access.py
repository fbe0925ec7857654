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


def take(array: jax.Array, index: jax.Array, fill: int | None = None) -> jax.Array:
    """Returns array[index] (array [n, ..], int32 index [..]); outside: the nearest row, or `fill` if given."""
    window = tuple(range(index.ndim, index.ndim + array.ndim - 1))
    dimensions = lax.GatherDimensionNumbers(window, (0,), (0,))
    mode = lax.GatherScatterMode.CLIP if fill is None else lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(array, index[..., None], dimensions, (1, *array.shape[1:]), mode=mode, fill_value=fill)


def _scatter(scatter: Callable, array: jax.Array, index: jax.Array, values: jax.Array | int) -> jax.Array:
    values = jnp.broadcast_to(jnp.asarray(values, array.dtype), (*index.shape, *array.shape[1:]))
    dimensions = lax.ScatterDimensionNumbers(tuple(range(1, array.ndim + 1)), (), (0,))
    return scatter(array, index[:, None], values[:, None], dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP)


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
