"""GPU kernels of pooling by Pallas' Triton back end: sums of duplicates, and bags.

Sums use no atomics, and bags use no array [.., L, D].

Positions are sorted by the row that they belong to, so the positions of a row are one segment. If
deduplication has sorted them already, its segments are used. One program sums all positions of a
row, and may then use the sum (`update`). The rows with the most positions are neighbours at the
head of a plan. Each of them should have a program of its own, so the rows of a program are far
apart.

Short segments are summed side by side, one position of each row at a time. A long segment is summed
by the whole program, thousands of elements at a time. The order of additions depends only on the
sorted positions, so results are deterministic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpembed_jax.arrays import indexing
from mpembed_jax.cache.plan import Segments
from mpembed_jax.numerics import rounding
from mpembed_jax.ops.gpu import kernel

_MOST_ROWS = 64  # largest number of rows per program
_SHORT = 32  # largest number of positions of a row that is summed side by side with others
_WIDE = 4096  # elements of a long segment that are loaded at once: 32 per thread
_AHEAD = 4  # loads in flight before the first one is added


class Terms(NamedTuple):
    """The terms of each row's sum: sorted positions, and the segment of each row."""

    # i32 [size]: the segment's first sorted position; equal to `stop` for a row without positions
    first: jax.Array
    stop: jax.Array  # i32 [size]: the sorted position after the segment's last
    # i32 [N]: the row of values that each sorted position takes; -1 if it takes none
    source: jax.Array
    factors: jax.Array | None  # f32 [N]: the factor of each sorted position; None: all are 1

    @property
    def operands(self) -> list[jax.Array]:
        """The arrays that `sum_rows` reads, in the order of its references."""
        return [
            self.first,
            self.stop,
            self.source,
            *([] if self.factors is None else [self.factors]),
        ]


def terms_of(
    segments: Segments, num_values: int, source: jax.Array | None, factors: jax.Array | None
) -> Terms:
    """Returns the terms of each row's sum.

    Args:
      segments: the positions of each row, N > 0 of them in all.
      num_values: M, number of rows of values.
      source: int32 [N] in [-1, M), or None: position n takes row n // (N / M) of the values.
      factors: float32 [N] or None.
    """
    order = segments.order
    return Terms(
        first=segments.first,
        stop=segments.stop,
        source=order // (order.shape[0] // num_values)
        if source is None
        else indexing.take(source, order),
        factors=None if factors is None else indexing.take(factors, order),
    )


def sort_positions(index: jax.Array, size: int) -> Segments:
    """Sorts positions by row.

    Args:
      index: int32 [N] in [0, size), N > 0: the row of each position.
      size: number of rows. The last row is padding and gets no positions.
    """
    (num,) = index.shape
    position = jnp.arange(num, dtype=jnp.int32)
    # XLA's GPU back end uses a radix sort for two operands, and a comparison sort for three.
    segment, order = lax.sort_key_val(index, position)
    is_real = segment != size - 1
    edge = segment[1:] != segment[:-1]
    begins = is_real & jnp.concatenate([jnp.ones(1, bool), edge])
    ends = is_real & jnp.concatenate([edge, jnp.ones(1, bool)])
    nowhere = jnp.zeros(size, jnp.int32)
    return Segments(
        order=order,
        first=indexing.put(nowhere, jnp.where(begins, segment, size), position),
        stop=indexing.put(nowhere, jnp.where(ends, segment, size), position + 1),
    )


def block_rows(num_columns: int) -> int:
    """Returns the number of rows of `num_columns` elements (a power of two) that one program sums.

    The number is small, because a program sums its long segments one after another.
    """
    return min(_MOST_ROWS, kernel.block_rows(num_columns))


def spread_positions(block: int, num_rows: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the rows of a program (int32 [block]), and whether each exists (bool [block]).

    The rows are as far apart as possible.
    """
    stride = lax.div(jnp.asarray(num_rows, jnp.int32) + (block - 1), jnp.int32(block))
    row = pl.program_id(0) + stride * jnp.arange(block, dtype=jnp.int32)
    return row, (row < num_rows) & (pl.program_id(0) < stride)


def sum_rows(
    refs: list, values: Any, row: jax.Array, mask: jax.Array, columns: jax.Array, dim: int
) -> jax.Array:
    """Sums the values of each row's positions.

    Args:
      refs: references to Terms.operands.
      values: reference to float32 [M, D].
      row: int32 [R], the rows of the program.
      mask: bool [R], whether each is a row.
      columns: int32 [P], see kernel.columns_of.
      dim: D.

    Returns:
      float32 [R, P]. It is zero where the mask is false, for rows without positions, and past
      `dim`.
    """
    first_ref, stop_ref, source_ref, *factors_ref = refs
    first, stop = (kernel.load(ref, (row,), mask) for ref in (first_ref, stop_ref))
    length = stop - first
    lane = jnp.arange(row.shape[0], dtype=jnp.int32)
    is_short = length <= _SHORT

    number = jnp.max(row)

    def vectors(position: jax.Array, is_inside: jax.Array) -> jax.Array:
        source = kernel.load(source_ref, (position,), is_inside, -1)
        found = kernel.load_row(values, source, source >= 0, columns, dim)
        if not factors_ref:
            return found
        factor = kernel.load(factors_ref[0], (position,), is_inside)[:, None]
        return rounding.apart(found * factor, number)

    def side_by_side(carry: tuple) -> tuple:
        turn, total = carry
        loaded = [vectors(first + turn + k, is_short & (turn + k < length)) for k in range(_AHEAD)]
        for vector in loaded:
            total = total + vector
        return turn + _AHEAD, total

    longest = jnp.max(jnp.where(is_short, length, 0))
    start = (jnp.int32(0), jnp.zeros((row.shape[0], columns.shape[0]), jnp.float32))
    _, total = lax.while_loop(lambda carry: carry[0] < longest, side_by_side, start)

    width = max(1, _WIDE // columns.shape[0])
    offset = jnp.arange(width, dtype=jnp.int32)

    def next_long(after: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(~is_short & (lane > after), lane, row.shape[0]))

    def one_long(carry: tuple) -> tuple:
        here, total = carry
        is_here = lane == here
        begin, end = (
            jnp.sum(jnp.where(is_here, bound, 0), dtype=jnp.int32) for bound in (first, stop)
        )

        def further(carry: tuple) -> tuple:
            position, sums = carry
            places = [position + k * width + offset for k in range(_AHEAD)]
            loaded = [vectors(place, place < end) for place in places]
            for vector in loaded:
                sums = sums + vector
            return position + _AHEAD * width, sums

        start = (begin, jnp.zeros((width, columns.shape[0]), jnp.float32))
        _, sums = lax.while_loop(lambda carry: carry[0] < end, further, start)
        own = jnp.sum(sums, axis=0)[None, :]
        return next_long(here), jnp.where(is_here[:, None], own, total)

    _, total = lax.while_loop(
        lambda carry: carry[0] < row.shape[0], one_long, (next_long(jnp.int32(-1)), total)
    )
    # A padded column is zero times a factor. The factor may be infinite, and the product then NaN.
    return jnp.where((columns < dim)[None, :], total, jnp.float32(0))


def sum_duplicates(
    values: jax.Array,
    index: jax.Array,
    size: int,
    is_interpreted: bool,
    factors: jax.Array | None = None,
    source: jax.Array | None = None,
) -> jax.Array:
    """Sums values float32 [M, D] that share an index (float32 [size, D]).

    See `xla.sums.sum_duplicates`.
    """
    dim = values.shape[1]
    if 0 in (index.shape[0], values.shape[0]):
        return jnp.zeros((size, dim), jnp.float32)
    terms = terms_of(sort_positions(index, size), values.shape[0], source, factors)
    block = block_rows(indexing.ceil_power(dim))

    def body(*refs: Any) -> None:
        *term_refs, values_ref, out = refs
        row, is_row = spread_positions(block, size)
        columns = kernel.columns_of(dim)
        kernel.store_row(
            out,
            row,
            is_row,
            columns,
            dim,
            sum_rows(term_refs, values_ref, row, is_row, columns, dim),
        )

    (out,) = kernel.launch(
        body,
        pl.cdiv(size, block),
        [*terms.operands, values],
        [jax.ShapeDtypeStruct((size, dim), jnp.float32)],
        name="mpembed_sum",
        is_interpreted=is_interpreted,
    )
    return out


def bag(rows: jax.Array, index: jax.Array, factors: jax.Array, is_interpreted: bool) -> jax.Array:
    """Returns weighted sums of rows (float32 [.., D]); see `xla.bag.bag`.

    Each bag is accumulated in registers.
    """
    *lead, length = index.shape
    dim = rows.shape[1]
    num = index.size // length if length else 0
    if num == 0:
        return jnp.zeros((*lead, dim), jnp.float32)
    block = kernel.block_rows(dim)

    def body(rows_ref: Any, index_ref: Any, factors_ref: Any, out: Any) -> None:
        number = pl.program_id(0)
        bag = number * block + jnp.arange(block, dtype=jnp.int32)
        is_inside = bag < num
        columns = kernel.columns_of(dim)

        def add(turn: jax.Array, total: jax.Array) -> jax.Array:
            position = bag * length + turn
            factor = kernel.load(factors_ref, (position,), is_inside)
            row = kernel.load_row(
                rows_ref, kernel.load(index_ref, (position,), is_inside), is_inside, columns, dim
            )
            return total + rounding.apart(factor[:, None] * row, number)

        total = lax.fori_loop(0, length, add, jnp.zeros((block, columns.shape[0]), jnp.float32))
        kernel.store_row(out, bag, is_inside, columns, dim, total)

    (out,) = kernel.launch(
        body,
        pl.cdiv(num, block),
        [rows, index.reshape(-1), factors.reshape(-1)],
        [jax.ShapeDtypeStruct((num, dim), jnp.float32)],
        name="mpembed_bag",
        is_interpreted=is_interpreted,
    )
    return out.reshape(*lead, dim)
