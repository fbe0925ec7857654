"""Loops over chunks of an array with a trip count known only on the device.

A batch's number of unique ids, misses or evictions is data, while array widths are static. On a CPU a `while_loop` over
chunks does only the work that is there, stays in cache, needs no bound and updates its carry in place; on a GPU one
full-width pass is better, which is what a chunk as wide as the array gives, without any loop.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import carries, indexing

Carry = TypeVar("Carry")


class Window(NamedTuple):
    """One chunk of an array of `width` entries."""

    first: (
        jax.Array
    )  # i32 []  where the chunk is sliced; earlier than its start for the last, partial one
    position: jax.Array  # i32 [chunk]  positions in the array
    is_live: jax.Array  # bool [chunk]  which of them this chunk is responsible for

    def take(self, array: jax.Array) -> jax.Array:
        """Returns the chunk of `array` [width, ..]."""
        if self.position.shape[0] == array.shape[0]:
            return array
        return lax.dynamic_slice_in_dim(array, self.first, self.position.shape[0])

    def fill(self, array: jax.Array, values: jax.Array) -> jax.Array:
        """Returns `array` with all positions of this chunk replaced by `values` [chunk, ..], live or not.

        For values that come out the same for a position whichever chunk computes them; `put` must read and merge.
        """
        if self.position.shape[0] == array.shape[0]:
            return values
        return lax.dynamic_update_slice_in_dim(array, values, self.first, 0)

    def put(self, array: jax.Array, values: jax.Array) -> jax.Array:
        """Returns `array` with its live positions of this chunk replaced by `values` [chunk, ..]."""
        mask = self.is_live.reshape(-1, *[1] * (array.ndim - 1))
        merged = jnp.where(mask, values, self.take(array))
        if self.position.shape[0] == array.shape[0]:
            return merged
        return lax.dynamic_update_slice_in_dim(array, merged, self.first, 0)


def each(
    begin: jax.Array | int,
    end: jax.Array | int,
    width: int,
    chunk: int | None,
    body: Callable,
    carry: Carry,
) -> Carry:
    """Folds `carry = body(window, carry)` over the windows that cover positions [begin, end) of arrays of `width`.

    Args:
      begin: first position, i32 scalar.
      end: past the last position, i32 scalar, at most width.
      width: static length of the arrays that the windows slice.
      chunk: entries per window, at most width are used; None: one window, no loop.
      body: called with a Window and the carry.
      carry: any pytree.

    Returns:
      The last carry.
    """
    if width == 0:
        return carry
    begin, end = jnp.asarray(begin, jnp.int32), jnp.asarray(end, jnp.int32)
    if chunk is None:
        index = jnp.arange(width, dtype=jnp.int32)
        return body(Window(jnp.int32(0), index, (index >= begin) & (index < end)), carry)

    # A loop even where one window is enough: XLA fuses a body with nothing outside it, so results do not depend on the
    # program around it (a multiply-add contracted with a neighbour differs in the last bit).
    chunk = min(chunk, width)

    def step(loop: tuple) -> tuple:
        start, carry = loop
        first = jnp.minimum(start, width - chunk)
        index = first + jnp.arange(chunk, dtype=jnp.int32)
        return start + chunk, body(Window(first, index, (index >= start) & (index < end)), carry)

    return lax.while_loop(
        lambda loop: loop[0] < end, step, carries.with_final_types(step, (begin, carry))
    )[1]


def append(
    array: jax.Array,
    count: jax.Array,
    values: jax.Array,
    is_member: jax.Array,
    *,
    backwards: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes the members of `values`, in order, to array[count:], or to array[count - 1], array[count - 2] .. backwards.

    Returns:
      The array and the moved count.
    """
    rank = jnp.cumsum(is_member.astype(jnp.int32))
    place = count - rank if backwards else count + rank - 1
    array = indexing.put(array, jnp.where(is_member, place, array.shape[0]), values)
    return array, (count - rank[-1] if backwards else count + rank[-1])
