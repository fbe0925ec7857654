"""Loops over chunks of an array, with a trip count that is known only on the device.

The number of unique ids, misses or evictions depends on the batch, while array widths are static.
On a CPU, a `while_loop` over chunks visits only the entries that have work. A chunk stays in the
processor's cache, and the carry is updated in place. On a GPU, one pass over the full width is
better. For such a pass, `chunk` is None, and there is no loop.
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

    # i32 []: where the slice begins. All slices have the same length. A slice that would pass the
    # end of the array begins earlier, so it also covers positions of the chunk before.
    first: jax.Array
    position: jax.Array  # i32 [chunk]: positions in the array
    # bool [chunk]: the positions that are in [begin, end) and in no earlier chunk
    is_live: jax.Array

    def take(self, array: jax.Array) -> jax.Array:
        """Returns the chunk [chunk, ..] of `array` [width, ..]."""
        if self.position.shape[0] == array.shape[0]:
            return array
        return lax.dynamic_slice_in_dim(array, self.first, self.position.shape[0])

    def fill(self, array: jax.Array, values: jax.Array) -> jax.Array:
        """Returns `array` with this chunk's positions, live or not, set to `values` [chunk, ..].

        Slices may overlap. So every chunk that covers a position must give it the same value. If
        the values may differ, use `put`, which also reads the array.
        """
        if self.position.shape[0] == array.shape[0]:
            return values
        return lax.dynamic_update_slice_in_dim(array, values, self.first, 0)

    def put(self, array: jax.Array, values: jax.Array) -> jax.Array:
        """Returns `array` with this chunk's live positions set to `values` [chunk, ..]."""
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
    """Folds `carry = body(window, carry)` over the windows that cover positions [begin, end).

    Args:
      begin: first position, i32 scalar.
      end: position after the last, i32 scalar, at most width.
      width: static length of the arrays that the windows slice. If it is 0, the carry is returned.
      chunk: entries per window, limited to width. None: one window and no loop.
      body: called with a Window and the carry; returns the new carry.
      carry: any pytree.

    Returns:
      The final carry.
    """
    if width == 0:
        return carry
    begin, end = jnp.asarray(begin, jnp.int32), jnp.asarray(end, jnp.int32)
    if chunk is None:
        index = jnp.arange(width, dtype=jnp.int32)
        return body(Window(jnp.int32(0), index, (index >= begin) & (index < end)), carry)

    # The loop stays even if one window covers everything. XLA fuses nothing outside a loop into its
    # body, so the results do not depend on the surrounding program. Without the loop, XLA could
    # contract a multiplication of the body with an addition outside, and the last bit could differ.
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
    """Writes the members of `values`, in order, to array[count], array[count + 1] and so on.

    Members that would lie outside the array are dropped, but counted.

    Args:
      array: [n, ..] of any dtype.
      count: i32 scalar.
      values: [m, ..], m > 0; cast to the dtype of the array.
      is_member: bool [m]; the other values are not written.
      backwards: if True, write to array[count - 1], array[count - 2] and so on.

    Returns:
      The array, and the count plus (backwards: minus) the number of members.
    """
    rank = jnp.cumsum(is_member.astype(jnp.int32))
    place = count - rank if backwards else count + rank - 1
    array = indexing.put(array, jnp.where(is_member, place, array.shape[0]), values)
    return array, (count - rank[-1] if backwards else count + rank[-1])
