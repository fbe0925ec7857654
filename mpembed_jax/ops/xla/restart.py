"""The reference of `start_again` in plain jax.numpy: rows that start again for new owners."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.numerics.random_bits import Key
from mpembed_jax.ops.records import Rows
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import initial_rows

# Rows per iteration, if there is a loop. After the first steps, few rows of a batch start again.
_AT_ONCE = 128


def start_again(
    of: Rows,
    fresh: Any,
    rows: jax.Array,
    num_rows: jax.Array,
    *,
    key: Key,
    bounds: jax.Array,
    chunk: int | None,
) -> Rows:
    """Gives rows their initial values and fresh optimizer state, and takes them out of the cache.

    The lines of the rows become empty. They are not written back.

    Args:
      of: the arrays that hold the rows.
      fresh: a tree like of.row_state: the optimizer state [1, ..] of a row before its first update.
        Its scalar leaves are not used.
      rows: int32 [n], distinct; the first num_rows are rows, the others NO_ID.
      num_rows: int32 scalar.
      key: uint32 [2], or a key bound to a shard.
      bounds: float32 [n]. Initial values of a row are uniform in +-bounds. With the key and the
        bound of init, a row gets the values that init gave it.
      chunk: see chunks.each.

    Returns:
      The arrays, changed.
    """
    cache = of.cache
    lines: tuple = () if cache is None else (cache.tags, cache.priority, cache.dirty, cache.rows)

    def reset(window: chunks.Window, carry: tuple) -> tuple:
        packed, row_state, lines = carry
        here = jnp.where(window.is_live, window.take(rows), NO_ID)
        table = dataclasses.replace(of.table, rows=packed)
        bounds_here = window.take(bounds)[:, None]
        packed = indexing.put(packed, here, initial_rows(table, key, here, bounds_here))
        row_state = with_fresh(row_state, fresh, here)
        if cache is not None:
            tags, priority, dirty, values = lines
            held = dataclasses.replace(cache, tags=tags)
            line = residency.locate(held, here)
            lines = tuple(
                indexing.put(array.reshape(-1), line, value).reshape(array.shape)
                for array, value in ((tags, NO_ID), (priority, 0), (dirty, False))
            )
            lines = (*lines, indexing.put(values, line, 0))
        return packed, row_state, lines

    packed, row_state, lines = chunks.each(
        0,
        num_rows,
        rows.shape[0],
        chunk if chunk is None else min(chunk, _AT_ONCE),
        reset,
        (of.table.rows, of.row_state, lines),
    )
    return Rows(dataclasses.replace(of.table, rows=packed), row_state, with_lines(cache, lines))


def with_fresh(row_state: Any, fresh: Any, rows: jax.Array) -> Any:
    """Returns row_state with fresh state for the given rows (int32 [n]); see start_again."""
    return jax.tree.map(
        lambda held, first: indexing.put(held, rows, first) if first.ndim else held,
        row_state,
        fresh,
    )


def with_lines(cache: CacheState | None, lines: tuple) -> CacheState | None:
    """Returns the cache with other tags, priorities, dirty bits and rows."""
    if cache is None:
        return None
    tags, priority, dirty, rows = lines
    return dataclasses.replace(cache, tags=tags, priority=priority, dirty=dirty, rows=rows)
