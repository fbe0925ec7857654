"""Starts rows again on a CPU, by loops that numba compiles.

The rules are those of `xla.restart`, and so are the bits. The rows are distinct, so they can be
divided among threads. The arrays are changed in place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.numerics.random_bits import Key
from mpembed_jax.ops.cpu import call_frame, codec, lanes, partitions
from mpembed_jax.ops.cpu.call_frame import (
    argument,
    argument_address,
    compiled,
    result,
    result_address,
)
from mpembed_jax.ops.records import Draw, Rows
from mpembed_jax.ops.xla.restart import with_lines
from mpembed_jax.row_ids import NO_ID

_AHEAD = 8  # rows between a prefetch and its use
_NO_ID = np.int32(NO_ID)
_PARTS = 16
U32 = np.uint32
# Positions in the int32 array that the call for rows takes. _NUM is how many rows start again.
# _NUM_ROWS is how many rows the table has.
(
    _NUM, _NUM_ROWS, _DIM, _SETS, _WAYS, _GROUPS, _TASKS,
    _VALUE_SEED0, _VALUE_SEED1, _SEED0, _SEED1,
) = range(11)  # fmt: skip
# Positions of the call's arguments, then of its results. Each result except _BUFFER is an argument
# that is changed in place: result k is argument _HELD + k.
_ROWS, _GIVEN, _BOUNDS, _HELD = range(4)
_TABLE, _TAGS, _PRIORITY, _DIRTY, _LINES, _BUFFER = range(6)


@compiled
def _range_of(part, num):
    """Returns where a part of the rows begins and ends."""
    return num * part // _PARTS, num * (part + 1) // _PARTS


@compiled
def _leave_cache(frame, x, shape, dim):
    """Empties the line of row x, if it has one.

    Other parts may empty other lines of the same set meanwhile: no tag becomes x.
    """
    sets, ways, groups = shape
    tags = result(frame, _TAGS, np.int32)
    first = partitions.set_of(x, sets, groups) * ways
    for here in range(first, first + ways):
        if tags[here] == x:
            tags[here] = _NO_ID
            result(frame, _PRIORITY, np.int32)[here] = 0
            result(frame, _DIRTY, np.uint8)[here] = 0
            lanes.erase(result_address(frame, _LINES) + here * 4 * dim, dim)


@functools.cache
def _start_of(fmt: RowFormat) -> str:
    """Registers the call that starts rows of a resolved format again; returns the call's name."""
    encode, bytes_of = codec.of(fmt).encode, codec.row_bytes(fmt)

    def start_part(frame, part):
        rows, given = argument(frame, _ROWS, np.int32), argument(frame, _GIVEN, np.int32)
        bounds = argument(frame, _BOUNDS, np.float32)
        dim, num_rows = np.int64(given[_DIM]), np.int64(given[_NUM_ROWS])
        shape = np.int64(given[_SETS]), np.int64(given[_WAYS]), np.int64(given[_GROUPS])
        table, row_bytes = result_address(frame, _TABLE), bytes_of(dim)
        buffer = lanes.buffer_of(frame, _BUFFER, part, dim)
        value_seed0, value_seed1 = U32(given[_VALUE_SEED0]), U32(given[_VALUE_SEED1])
        seed0, seed1 = U32(given[_SEED0]), U32(given[_SEED1])
        begin, end = _range_of(part, min(np.int64(given[_NUM]), np.int64(len(rows))))
        for k in range(begin, end):
            x = np.int64(rows[k])
            lanes.ask_for(table + np.int64(rows[min(k + _AHEAD, end - 1)]) * row_bytes, row_bytes)
            if not 0 <= x < num_rows:
                continue
            start, increment = codec.bits_of_row(x, value_seed0, value_seed1)
            codec.draw_uniform(buffer, bounds[k], dim, start, increment)
            encode(buffer, table + x * row_bytes, dim, x, seed0, seed1)
            if shape[0] > 0:
                _leave_cache(frame, x, shape, dim)

    start_parts = call_frame.parts(start_part)

    def start(frame):
        given = argument(frame, _GIVEN, np.int32)
        num_tasks = min(call_frame.num_threads(frame), np.int64(given[_TASKS]))
        start_parts(frame, _PARTS, num_tasks)

    name = f"mpembed_start_again_{codec.name_of(fmt)}"
    call_frame.register(name, start)
    return name


# Positions in the int32 array that the call for optimizer state takes: how many rows to fill, how
# many rows the array has, the bytes of a row, and the largest number of threads.
_NUM_FILLED, _NUM_HELD, _ROW_BYTES, _FILL_TASKS = range(4)


def _fill_part(frame, part):
    """Copies the fresh row to one part of the rows that are to be filled."""
    rows, given = argument(frame, 0, np.int32), argument(frame, 1, np.int32)
    fresh, held = argument_address(frame, 2), result_address(frame, 0)
    num_held, row_bytes = np.int64(given[_NUM_HELD]), np.int64(given[_ROW_BYTES])
    begin, end = _range_of(part, np.int64(given[_NUM_FILLED]))
    for k in range(begin, end):
        x = np.int64(rows[k])
        lanes.ask_for(held + np.int64(rows[min(k + _AHEAD, end - 1)]) * row_bytes, row_bytes)
        if 0 <= x < num_held:
            lanes.copy_bytes(held + x * row_bytes, fresh, row_bytes)


_fill_parts = call_frame.parts(_fill_part)


def _fill(frame):
    given = argument(frame, 1, np.int32)
    num_tasks = min(call_frame.num_threads(frame), np.int64(given[_FILL_TASKS]))
    _fill_parts(frame, _PARTS, num_tasks)


def _filled(
    held: jax.Array, fresh: jax.Array, rows: jax.Array, num_rows: jax.Array, max_threads: int
) -> jax.Array:
    """Returns `held` [V, ..] with the first num_rows of `rows` set to `fresh` [1, ..]."""
    if not held.size or not fresh.ndim:
        return held
    assert held.dtype == fresh.dtype  # the foreign call does not look at them
    call_frame.register("mpembed_fill", _fill)
    row_bytes = fresh.size * fresh.dtype.itemsize
    given = [held.shape[0], row_bytes, max_threads]
    call = jax.ffi.ffi_call(
        "mpembed_fill",
        jax.ShapeDtypeStruct(held.shape, held.dtype),
        input_output_aliases={3: 0},
        vmap_method="sequential",
    )
    words = jnp.concatenate([num_rows[None], jnp.asarray(given, jnp.int32)])
    return call(rows, words, fresh, held)


def start_again(
    of: Rows,
    fresh: Any,
    rows: jax.Array,
    num_rows: jax.Array,
    *,
    key: Key,
    bounds: jax.Array,
    max_threads: int,
) -> Rows:
    """Gives rows their initial values; see `xla.restart.start_again`.

    The table is in the memory of the device. At most `max_threads` threads of XLA's pool share the
    work.
    """
    table, cache = of.table, of.cache
    dim = table.embedding_dim
    draw = Draw(key, jnp.int32(0))
    held: list[Any] = [table.rows]
    if cache is None:
        sets, ways, groups = 0, 0, 1
        nothing = jnp.zeros((0,), jnp.int32)
        held += [nothing, nothing, jnp.zeros((0,), bool), jnp.zeros((0,), jnp.float32)]
    else:
        sets, ways, groups = cache.geometry
        assert groups & (groups - 1) == 0  # for partitions.set_of
        held += [cache.tags, cache.priority, cache.dirty, cache.rows]
    fixed = [table.num_rows, dim, sets, ways, groups, max_threads]
    seeds = [draw.seed(random_bits.INITIAL_VALUE), draw.seed(random_bits.INITIAL_ROUNDING)]
    given = [num_rows[None], jnp.asarray(fixed, jnp.int32)]
    given += [jax.lax.bitcast_convert_type(seed, jnp.int32) for seed in seeds]
    results: Any = jax.ffi.ffi_call(
        _start_of(table.format),
        [*call_frame.shapes_of(held), lanes.buffers(_PARTS, dim)],
        input_output_aliases={_HELD + k: k for k in range(len(held))},
        vmap_method="sequential",
    )(rows, jnp.concatenate(given), bounds, *held)
    row_state = jax.tree.map(
        lambda array, row: _filled(array, row, rows, num_rows, max_threads), of.row_state, fresh
    )
    return Rows(
        dataclasses.replace(table, rows=results[_TABLE]),
        row_state,
        with_lines(cache, tuple(results[_TAGS:_BUFFER])),
    )
