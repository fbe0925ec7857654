"""GPU kernels of pooling, by Pallas' Triton back end: sums of duplicates without atomics, and bags without [.., L, D].

Positions are sorted by the row they belong to, so that each row's positions are one segment. Segments are cut at tiles of a
fixed number of sorted positions: the first kernel walks many tiles side by side and writes every segment that lies within
one tile; the second adds up the pieces of those that do not. The work per program is bounded however skewed the batch, and
the order of additions depends on the sorted positions alone, so results are deterministic.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpembed_jax.ops import pallas_rows as rows_

_TILE = 32  # sorted positions per tile


def sum_duplicates(
    values: jax.Array, index: jax.Array, size: int, is_interpreted: bool, factors: jax.Array | None = None
) -> jax.Array:
    """Returns float32 [size, D]: the sum over positions n with index[n] == row; the last row, padding, is zero.

    Args:
      values: float32 [M, D]; position n takes row n // (N / M), so that a bag's gradient serves all its positions.
      index: int32 [N] in [0, size), N a multiple of M.
      size: rows of the result.
      is_interpreted: see pallas_rows.launch.
      factors: float32 [N], multiplied with each position's values, or None.
    """
    (num,), dim = index.shape, values.shape[1]
    if num == 0:
        return jnp.zeros((size, dim), jnp.float32)
    share = num // values.shape[0]
    segment, order = lax.sort_key_val(index, jnp.arange(num, dtype=jnp.int32))
    num_tiles, block = pl.cdiv(num, _TILE), rows_.block_rows(dim)
    columns_of, last = rows_.columns_of, size - 1

    def segment_at(ref: Any, position: jax.Array) -> jax.Array:
        """The row of each sorted position; before the first and past the last there is none."""
        return rows_.load(ref, (position,), (position >= 0) & (position < num), -1)

    def walk(*refs: Any) -> None:
        segment_ref, order_ref, values_ref, *factors_ref, _, out, pieces = refs
        tile = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        columns = columns_of(dim)

        def one(turn: jax.Array, carry: tuple) -> tuple:
            total, here, is_continued = carry
            position = tile * _TILE + turn
            is_real = (here >= 0) & (here != last)
            origin = rows_.load(order_ref, (position,), is_real)
            value = rows_.load_row(values_ref, origin // share, is_real, columns, dim)
            if factors_ref:
                value = value * rows_.load(factors_ref[0], (origin,), is_real)[:, None]
            total = total + value
            after = segment_at(segment_ref, position + 1)
            is_end = after != here
            is_cut = ~is_end & (turn == _TILE - 1)
            # Whole within the tile: the row itself. Otherwise a piece: 0 for one begun in an earlier tile, 1 for a new one.
            rows_.store_row(out, here, is_real & is_end & ~is_continued, columns, dim, total)
            is_piece = is_real & (is_cut | (is_end & is_continued))
            rows_.store_row(pieces, 2 * tile + 1 - is_continued.astype(jnp.int32), is_piece, columns, dim, total)
            return jnp.where(is_end[:, None], jnp.float32(0), total), after, is_continued & ~is_end

        first = segment_at(segment_ref, tile * _TILE)
        is_continued = (first >= 0) & (segment_at(segment_ref, tile * _TILE - 1) == first)
        start = (jnp.zeros((block, columns.shape[0]), jnp.float32), first, is_continued)
        lax.fori_loop(0, _TILE, one, start)

    def add_pieces(segment_ref: Any, pieces: Any, _out_in: Any, out: Any) -> None:
        tile = pl.program_id(0)
        end = tile * _TILE + _TILE - 1  # the last position of this tile
        columns = columns_of(dim)
        one = jnp.arange(1, dtype=jnp.int32)
        here = jnp.sum(segment_at(segment_ref, end + one))
        begins_here = jnp.sum(segment_at(segment_ref, end - _TILE + one)) != here
        is_first = (here >= 0) & (here != last) & begins_here & (jnp.sum(segment_at(segment_ref, end + 1 + one)) == here)

        @pl.when(is_first)
        def add_all() -> None:
            always = jnp.ones(1, bool)

            def more(carry: tuple) -> jax.Array:
                return carry[2]

            def add(carry: tuple) -> tuple:
                total, other, _ = carry
                total = total + rows_.load_row(pieces, 2 * other + one * 0, always, columns, dim)
                # The segment goes on where the position after this tile is still its.
                return total, other + 1, jnp.sum(segment_at(segment_ref, (other + 1) * _TILE + one * 0)) == here

            total = rows_.load_row(pieces, 2 * tile + 1 + one * 0, always, columns, dim)
            total, _, _ = lax.while_loop(more, add, (total, tile + 1, jnp.bool_(True)))
            rows_.store_row(out, here + one * 0, always, columns, dim, total)

    zeros = jnp.zeros((size, dim), jnp.float32)
    operands = [segment, order, values] + ([] if factors is None else [factors])
    out, pieces = rows_.launch(
        walk, pl.cdiv(num_tiles, block), [*operands, zeros],
        [rows_.shape_of(zeros), jax.ShapeDtypeStruct((2 * num_tiles, dim), jnp.float32)],
        name="mpembed_sum_tiles", is_interpreted=is_interpreted, aliases={len(operands): 0},
    )  # fmt: skip
    (out,) = rows_.launch(
        add_pieces, num_tiles, [segment, pieces, out], [rows_.shape_of(out)],
        name="mpembed_sum_pieces", is_interpreted=is_interpreted, aliases={2: 0},
    )  # fmt: skip
    return out


def bag(rows: jax.Array, index: jax.Array, factors: jax.Array, is_interpreted: bool) -> jax.Array:
    """Returns float32 [.., D]: sum over l of factors[.., l] * rows[index[.., l]], each bag accumulated in registers.

    Args:
      rows: float32 [U, D].
      index: int32 [.., L] in [0, U).
      factors: float32 [.., L].
      is_interpreted: see pallas_rows.launch.
    """
    *lead, length = index.shape
    dim = rows.shape[1]
    num = index.size // length if length else 0
    if num == 0:
        return jnp.zeros((*lead, dim), jnp.float32)
    block = rows_.block_rows(dim)

    def body(rows_ref: Any, index_ref: Any, factors_ref: Any, out: Any) -> None:
        bag = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
        is_inside, columns = bag < num, rows_.columns_of(dim)

        def add(turn: jax.Array, total: jax.Array) -> jax.Array:
            position = bag * length + turn
            factor = rows_.load(factors_ref, (position,), is_inside)
            row = rows_.load_row(rows_ref, rows_.load(index_ref, (position,), is_inside), is_inside, columns, dim)
            return total + factor[:, None] * row

        total = lax.fori_loop(0, length, add, jnp.zeros((block, columns.shape[0]), jnp.float32))
        rows_.store_row(out, bag, is_inside, columns, dim, total)

    (out,) = rows_.launch(
        body, pl.cdiv(num, block), [rows, index.reshape(-1), factors.reshape(-1)],
        [jax.ShapeDtypeStruct((num, dim), jnp.float32)], name="mpembed_bag", is_interpreted=is_interpreted,
    )  # fmt: skip
    return out.reshape(*lead, dim)
