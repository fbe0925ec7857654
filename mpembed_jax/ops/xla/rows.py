"""The reference of the row movements in plain jax.numpy: swap, lookup, read, write, write_back.

With a chunk length, these functions are also the fast path on a CPU.

Reads and writes of the same array are ordered by data dependencies: the values that are written
depend on the read that must come first. Otherwise XLA would copy the whole table to keep its old
values for the read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.cache import residency
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.packing import decode
from mpembed_jax.ops.records import Draw, Moves, Store
from mpembed_jax.optim import row_state
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable, encode_rows, read_rows

# (rows [n, m] of 32-bit words, index i32 [k]) -> rows[index] [k, m]
Gather = Callable[[jax.Array, jax.Array], jax.Array]


@jax.named_scope("swap")
def swap(
    store: Store, moves: Moves, draw: Draw, *, chunk: int | None, gather: Gather | None = None
) -> tuple[Store, jax.Array]:
    """Evicts victims and fills newcomers, the entries [num_hits, num_cached) of the moves.

    Dirty victims are quantized into the table. Newcomers are dequantized into their lines.

    Args:
      store: table, lines and dirty bits. The dirty bits still describe the victims.
      moves: the rows of the step.
      draw: the source of the random bits that round the victims.
      chunk: see chunks.each.
      gather: gathers rows; it may return anything for an index outside the array. None: XLA's
        gather.

    Returns:
      The store, and the number of dirty victims (int32 scalar).
    """
    table, lines, dirty = store
    assert lines is not None and dirty is not None
    ids, line, victim_ids = moves.ids, moves.line, moves.victim_ids
    begin, end = moves.num_hits, moves.num_cached
    once = (end > begin).astype(jnp.int32) if chunk else None
    gather = gather or indexing.take

    def body(window: chunks.Window, carry: tuple) -> tuple:
        rows, lines, dirty, num_written = carry
        here = jnp.where(window.is_live, window.take(line), lines.shape[0])
        victims = window.take(victim_ids)
        # Without the barrier, XLA on a GPU reads the bits a second time after they are cleared, and
        # keeps a copy of the whole array for this.
        was_dirty = lax.optimization_barrier(window.is_live & indexing.take(dirty, here))
        must_write = was_dirty & (victims != NO_ID)
        old = gather(lines, here)
        packed = encode_rows(old, victims, table, draw.key, random_bits.WRITE_BACK, draw.step, once)
        # Writes the victims back. The read uses the result of the write, which orders the two. The
        # rows that are written and read are disjoint, so the order does not change the values.
        rows = indexing.put(rows, jnp.where(must_write, victims, rows.shape[0]), packed)
        take = gather if rows.dtype == jnp.uint32 else indexing.take
        new = decode(
            lax.optimization_barrier(take(rows, _wanted(window, ids, rows))),
            table.format,
            table.embedding_dim,
        )
        lines = indexing.put(lines, here, new)
        dirty = indexing.put(dirty, jnp.where(was_dirty, here, dirty.shape[0]), False)
        return rows, lines, dirty, num_written + jnp.sum(must_write, dtype=jnp.int32)

    # There are few newcomers, and a chunk is always processed as a whole. A chunk of half the
    # length wastes less.
    carry = (table.rows, lines, dirty, jnp.int32(0))
    rows, lines, dirty, num_written = chunks.each(
        begin, end, ids.shape[0], chunk and chunk // 2, body, carry
    )
    return Store(QuantizedTable(rows, table.format, table.embedding_dim), lines, dirty), num_written


@jax.named_scope("lookup")
def lookup(
    store: Store, moves: Moves, *, chunk: int | None, gather: Gather | None = None
) -> jax.Array:
    """Gathers the unique rows.

    Rows [0, num_cached) come from their lines, and rows [num_cached, num_ids) from the table. The
    rest are zeros.

    Args:
      store: table and lines.
      moves: the rows of the step.
      chunk: see chunks.each.
      gather: a Gather that gives zeros for an index outside the array. None: XLA's gather.

    Returns:
      float32 [U, D].
    """
    table, lines, _ = store
    ids, line, num_cached, num_ids = moves.ids, moves.line, moves.num_cached, moves.num_ids
    width = ids.shape[0]
    if lines is None:
        out = jnp.zeros((width, table.embedding_dim), jnp.float32)
    else:
        # This pass over the full width also makes the zeros. On a CPU, a loop over the chunks of
        # cached rows alone was slower.
        out = indexing.take(lines, line, 0) if gather is None else gather(lines, line)

    def from_table(window: chunks.Window, out: jax.Array) -> jax.Array:
        here = _wanted(window, ids, table.rows)
        take = gather if gather and table.rows.dtype == jnp.uint32 else indexing.take
        packed = lax.optimization_barrier(take(table.rows, here))
        return window.put(out, decode(packed, table.format, table.embedding_dim))

    return chunks.each(num_cached, num_ids, width, chunk, from_table, out)


def only_if(is_valid: jax.Array, rows: jax.Array, chunk: int | None) -> jax.Array:
    """Returns rows (float32 [U, D]) if is_valid (bool scalar) is True, else NaN.

    With a chunk length, there is no pass over valid rows.
    """
    (width, _) = rows.shape
    end = jnp.where(is_valid, 0, width)
    return chunks.each(
        0, end, width, chunk, lambda window, rows: window.put(rows, np.float32(np.nan)), rows
    )


def _wanted(window: chunks.Window, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the ids of the rows that one window reads from a table.

    If the table is in host memory, entries that are not live in the window become row 0. Their rows
    are not used. Because all of them read row 0, no other row crosses the bus for them.
    """
    here = window.take(ids)
    return jnp.where(window.is_live, here, 0) if indexing.is_on_host(rows) else here


def read(
    table: QuantizedTable, held: residency.CacheState | None, ids: jax.Array, chunk: int | None
) -> jax.Array:
    """Reads rows for evaluation: from the line if the cache holds the id, else from the table.

    Args:
      table: the stack.
      held: the cache, or None.
      ids: int32 [..]; ids outside the table, NO_ID included, read as zeros.
      chunk: positions per iteration of the loop over ids without a line. It is used only for a
        table in host memory.

    Returns:
      float32 [.., D].
    """
    ids = jnp.where((ids >= 0) & (ids < table.num_rows), ids, NO_ID)
    line = None if held is None else residency.locate(held, ids)
    num_lines = 0 if held is None else held.geometry.lines
    from_table = ids if line is None else jnp.where(line < num_lines, NO_ID, ids)
    if indexing.is_on_host(table.rows):
        rows = _read_missing(table, from_table.reshape(-1), chunk).reshape(
            *ids.shape, table.embedding_dim
        )
    else:
        rows = read_rows(table, from_table)
    if held is None or line is None:
        return rows
    return jnp.where((line < num_lines)[..., None], indexing.take(held.rows, line), rows)


def _read_missing(table: QuantizedTable, ids: jax.Array, chunk: int | None) -> jax.Array:
    """Returns the rows (float32 [N, D]) of ids int32 [N], with zeros for NO_ID.

    A loop visits only the positions that have an id.
    """
    (width,) = ids.shape
    if width == 0:
        return jnp.zeros((0, table.embedding_dim), jnp.float32)
    position = jnp.arange(width, dtype=jnp.int32)
    missing, count = chunks.append(
        jnp.zeros(width, jnp.int32), jnp.int32(0), position, ids != NO_ID
    )

    def body(window: chunks.Window, out: jax.Array) -> jax.Array:
        here = window.take(missing)
        row = jnp.where(window.is_live, indexing.take(ids, here), 0)
        values = decode(indexing.take(table.rows, row), table.format, table.embedding_dim)
        return indexing.put(out, jnp.where(window.is_live, here, width), values)

    return chunks.each(
        0, count, width, chunk, body, jnp.zeros((width, table.embedding_dim), jnp.float32)
    )


@jax.named_scope("write")
def write(
    store: Store,
    moves: Moves,
    old_rows: jax.Array,
    new_rows: jax.Array,
    draw: Draw,
    *,
    chunk: int | None,
) -> tuple[Store, jax.Array]:
    """Stores updated rows: in their lines as float32, or rounded into the table.

    A row that did not move is not stored, so it keeps its bits. A decoded row that is encoded again
    may get another scale.

    Args:
      store: table and lines.
      moves: the rows of the step. Entries with line C are not written to a line. Entries with id
        NO_ID are not written to the table.
      old_rows: float32 [U, D], from lookup.
      new_rows: float32 [U, D].
      draw: the source of the random bits for rounding.
      chunk: see chunks.each.

    Returns:
      The store, and which rows were stored (bool [U]).
    """
    table, lines, _ = store
    is_stored = moves.is_row & row_state.is_moved(old_rows, new_rows)
    moves = moves.only(is_stored, store.num_lines)
    ids, line, num_cached, num_ids = moves.ids, moves.line, moves.num_cached, moves.num_ids
    width = ids.shape[0]
    if lines is not None:
        # One pass over the full width writes the lines, because slices of new_rows would be copied.
        # Lines out of range are dropped.
        lines = indexing.put(lines, line, new_rows)

    once = (num_ids > num_cached).astype(jnp.int32) if chunk else None

    def to_table(window: chunks.Window, rows: jax.Array) -> jax.Array:
        here = window.take(ids)
        packed = encode_rows(
            window.take(new_rows), here, table, draw.key, random_bits.BYPASS, draw.step, once
        )
        return indexing.put(rows, jnp.where(window.is_live, here, NO_ID), packed)

    rows = chunks.each(num_cached, num_ids, width, chunk, to_table, table.rows)
    table = QuantizedTable(rows, table.format, table.embedding_dim)
    return store._replace(table=table, lines=lines), is_stored


@jax.named_scope("write_back")
def write_back(store: Store, tags: jax.Array, draw: Draw) -> QuantizedTable:
    """Quantizes every dirty line into the table, in blocks of lines.

    Args:
      store: table, lines and dirty bits.
      tags: int32 [C], the id in each line.
      draw: the source of the random bits for rounding.

    Returns:
      The table.
    """
    table, lines, dirty = store
    assert lines is not None and dirty is not None

    def body(window: chunks.Window, rows: jax.Array) -> jax.Array:
        ids = jnp.where(window.is_live & window.take(dirty), window.take(tags), NO_ID)
        packed = encode_rows(window.take(lines), ids, table, draw.key, random_bits.FLUSH, draw.step)
        return indexing.put(rows, ids, packed)

    rows = chunks.each(0, tags.shape[0], tags.shape[0], 8192, body, table.rows)
    return QuantizedTable(rows, table.format, table.embedding_dim)
