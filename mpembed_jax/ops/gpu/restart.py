"""Rows that start again for new owners, by a GPU kernel. The reference is `xla.restart`.

After the first steps, few rows of a batch start again. A program takes blocks of them until none is
left. It makes their initial values, stores them packed, and empties their lines.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpembed_jax.arrays import indexing
from mpembed_jax.cache import residency
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops.gpu import kernel
from mpembed_jax.ops.gpu.kernel import RowWords
from mpembed_jax.ops.records import Rows
from mpembed_jax.ops.xla.restart import with_fresh, with_lines
from mpembed_jax.row_ids import NO_ID

_MOST_PROGRAMS = 1024


@jax.named_scope("start_again")
def start_again(
    of: Rows,
    fresh: Any,
    rows: jax.Array,
    num_rows: jax.Array,
    *,
    key: random_bits.Key,
    bounds: jax.Array,
    is_interpreted: bool,
) -> Rows:
    """Gives rows their initial values and fresh optimizer state; see `xla.restart.start_again`."""
    (width,) = rows.shape
    if width == 0:
        return of
    table, cache = of.table, of.cache
    dim = table.embedding_dim
    row_words = RowWords(table.format, dim, is_interpreted)
    block = kernel.block_rows(dim)
    num_programs = min(_MOST_PROGRAMS, pl.cdiv(width, block))
    held = [table.rows]
    if cache is not None:
        held += [cache.tags.reshape(-1), cache.priority.reshape(-1), cache.rows]

    def body(*refs: Any) -> None:
        num_rows_ref, bounds_ref, rows_ref, *seeds = refs[:7]
        packed, *cached = refs[7 + len(held) :]
        num_rows = num_rows_ref[0]

        def restart(start: jax.Array) -> jax.Array:
            position = start + jnp.arange(block, dtype=jnp.int32)
            is_live = (position < num_rows) & (position < width)
            here = kernel.load(rows_ref, (position,), is_live, -1)
            is_row = (here >= 0) & (here < table.num_rows)
            here = jnp.where(is_row, here, 0)
            of_values, of_rounding = (
                kernel.load_seeds(both, position, is_row) for both in (seeds[:2], seeds[2:])
            )
            bound = kernel.load(bounds_ref, (position,), is_row, 0)
            places = []
            for column in kernel.place_columns(row_words):
                bits = kernel.bits_of(of_values, column)
                places.append((random_bits.uniform(bits) * 2 - 1) * bound[:, None])
            kernel.write_packed(packed, here, is_row, places, row_words, of_rounding)
            if cache is not None:
                tags, priority, lines, line_out = cached
                ways = cache.geometry.ways
                way = jnp.arange(indexing.ceil_power(ways), dtype=jnp.int32)
                first_line = residency.set_of(here, cache.geometry) * ways
                wide = is_row[:, None] & (way < ways)[None, :]
                place = jnp.where(wide, first_line[:, None] + way[None, :], 0)
                is_here = kernel.load(tags, (place,), wide, NO_ID) == here[:, None]
                found = jnp.max(jnp.where(is_here, way[None, :], -1), axis=1)
                is_cached = is_row & (found >= 0)
                line = first_line + found
                # All threads must have read a row's tag before one of them clears it.
                kernel.barrier(is_interpreted)
                kernel.store(tags, (line,), jnp.full(block, NO_ID, jnp.int32), is_cached)
                kernel.store(priority, (line,), jnp.zeros(block, jnp.int32), is_cached)
                columns = kernel.columns_of(dim)
                zeros = jnp.zeros((block, columns.shape[0]), jnp.float32)
                kernel.store_row(lines, line, is_cached, columns, dim, zeros)
                line = jnp.where(is_cached, line, cache.geometry.lines)
                kernel.store(line_out, (position,), line, is_live)
            return start + num_programs * block

        lax.while_loop(lambda start: start < num_rows, restart, pl.program_id(0) * block)

    operands = [num_rows[None], bounds, rows]
    for stream in (random_bits.INITIAL_VALUE, random_bits.INITIAL_ROUNDING):
        operands += random_bits.row_seeds(key, stream, jnp.int32(0), rows)
    operands += held
    outputs = [kernel.shape_of(array) for array in held]
    if cache is not None:
        outputs.append(jax.ShapeDtypeStruct((width,), jnp.int32))
    packed, *cached = kernel.launch(
        body,
        num_programs,
        operands,
        outputs,
        name="mpembed_start_again",
        is_interpreted=is_interpreted,
        aliases={len(operands) - len(held) + k: k for k in range(len(held))},
    )
    is_live = jnp.arange(width, dtype=jnp.int32) < num_rows
    here = jnp.where(is_live, rows, NO_ID)
    row_state = with_fresh(of.row_state, fresh, here)
    if cache is not None:
        tags, priority, lines, line = cached
        line = jnp.where(is_live, line, cache.geometry.lines)
        dirty = indexing.put(cache.dirty.reshape(-1), line, False)
        by_set = (array.reshape(cache.tags.shape) for array in (tags, priority, dirty))
        cache = with_lines(cache, (*by_set, lines))
    return Rows(dataclasses.replace(table, rows=packed), row_state, cache)
