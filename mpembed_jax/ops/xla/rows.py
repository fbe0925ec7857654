"""Row movements in plain jax.numpy: swap, lookup, read, write, write_back. The reference of these ops.

With a chunk length they are also the fast path on a CPU.

Reads and writes of the same array are ordered by data: a write's values depend on the read they must follow. Without that
XLA copies the whole table to keep the old one alive.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.cache import residency
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.packing import decode
from mpembed_jax.ops.records import Draw, Moves, Store
from mpembed_jax.optim import row_state
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable, encode_rows, read_rows

Gather = Callable[
    [jax.Array, jax.Array], jax.Array
]  # of rows of 32-bit words [n, m] by index i32 [k]


@jax.named_scope("swap")
def swap(
    store: Store, moves: Moves, draw: Draw, *, chunk: int | None, gather: Gather | None = None
) -> tuple[Store, jax.Array]:
    """Evicts and fills: the newcomers, entries [num_hits, num_cached) of the moves, take their lines.

    Args:
      store: table, lines, and the dirty bits of the victims.
      moves: the rows of the step.
      draw: names the random bits of the victims' rounding.
      chunk: see chunks.each.
      gather: takes rows; what it returns for an index outside does not matter. None: XLA's.

    Returns:
      The store and the number of dirty victims.
    """
    table, cache_rows, dirty = store
    assert cache_rows is not None and dirty is not None
    ids, line, victim_ids = moves.ids, moves.line, moves.victim_ids
    begin, end = moves.num_hits, moves.num_cached
    once = (end > begin).astype(jnp.int32) if chunk else None
    gather = gather or indexing.take

    def body(window: chunks.Window, carry: tuple) -> tuple:
        rows, cache_rows, dirty, num_written = carry
        here = jnp.where(window.is_live, window.take(line), cache_rows.shape[0])
        victims = window.take(victim_ids)
        # Without the barrier a GPU reads the bits again after they were cleared, from a copy of all of them.
        was_dirty = lax.optimization_barrier(window.is_live & indexing.take(dirty, here))
        must_write = was_dirty & (victims != NO_ID)
        old = gather(cache_rows, here)
        packed = encode_rows(old, victims, table, draw.key, random_bits.WRITE_BACK, draw.step, once)
        # Writing first and reading from the result orders the two; the ids are disjoint, so the values are the same.
        rows = indexing.put(rows, jnp.where(must_write, victims, rows.shape[0]), packed)
        take = gather if rows.dtype == jnp.uint32 else indexing.take
        new = decode(
            lax.optimization_barrier(take(rows, _wanted(window, ids, rows))),
            table.format,
            table.embedding_dim,
        )
        cache_rows = indexing.put(cache_rows, here, new)
        dirty = indexing.put(dirty, jnp.where(was_dirty, here, dirty.shape[0]), False)
        return rows, cache_rows, dirty, num_written + jnp.sum(must_write, dtype=jnp.int32)

    # Newcomers are few and a chunk is worked on as a whole: half a chunk wastes less.
    carry = (table.rows, cache_rows, dirty, jnp.int32(0))
    rows, cache_rows, dirty, num_written = chunks.each(
        begin, end, ids.shape[0], chunk and chunk // 2, body, carry
    )
    return Store(
        QuantizedTable(rows, table.format, table.embedding_dim), cache_rows, dirty
    ), num_written


@jax.named_scope("lookup")
def lookup(
    store: Store, moves: Moves, *, chunk: int | None, gather: Gather | None = None
) -> jax.Array:
    """Gathers the unique rows: [0, num_cached) from their lines, [num_cached, num_ids) from the table, zeros for the rest.

    Args:
      store: table and lines.
      moves: the rows of the step.
      chunk: see chunks.each.
      gather: takes rows, zeros outside. None: XLA's.

    Returns:
      float32 [U, D].
    """
    table, cache_rows, _ = store
    ids, line, num_cached, num_ids = moves.ids, moves.line, moves.num_cached, moves.num_ids
    width = ids.shape[0]
    if gather is None:
        zero = jnp.minimum(num_ids, 0).astype(
            jnp.uint32
        )  # counts are not negative, which the compiler cannot know
        gather = (
            partial(indexing.take_or_zeros, zero=zero) if chunk else partial(indexing.take, fill=0)
        )
    if cache_rows is None:
        out = jnp.zeros((width, table.embedding_dim), jnp.float32)
    else:  # one full-width pass makes the zeros, too; a loop over exact chunks was slower by half on a CPU
        out = gather(cache_rows, line)

    def from_table(window: chunks.Window, out: jax.Array) -> jax.Array:
        here = _wanted(window, ids, table.rows)
        is_wide = chunk and table.rows.dtype == jnp.uint32
        packed = gather(table.rows, here) if is_wide else indexing.take(table.rows, here)
        packed = lax.optimization_barrier(packed)
        return window.put(out, decode(packed, table.format, table.embedding_dim))

    return chunks.each(num_cached, num_ids, width, chunk, from_table, out)


def _wanted(window: chunks.Window, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the ids of a window to read from a table's rows: in host memory row 0 for all that the window does not own.

    What is read of them does not matter, but no row that nobody wants is to cross the bus.
    """
    here = window.take(ids)
    return jnp.where(window.is_live, here, 0) if indexing.is_on_host(rows) else here


def read(
    table: QuantizedTable, held: residency.CacheState | None, ids: jax.Array, chunk: int | None
) -> jax.Array:
    """Reads rows for evaluation: the line where resident, else the table's row.

    Args:
      table: the stack.
      held: the cache, or None.
      ids: int32 [..]; outside the table, NO_ID among them, reads as zeros.
      chunk: of a table in host memory: positions per turn of the loop over those that need a row of it. Of others, unused.

    Returns:
      float32 [.., D].
    """
    ids = jnp.where((ids >= 0) & (ids < table.num_rows), ids, NO_ID)
    line, lines = (None, 0) if held is None else (residency.locate(held, ids), held.geometry.lines)
    from_table = ids if line is None else jnp.where(line < lines, NO_ID, ids)
    if indexing.is_on_host(table.rows):
        rows = _read_missing(table, from_table.reshape(-1), chunk).reshape(
            *ids.shape, table.embedding_dim
        )
    else:
        rows = read_rows(table, from_table)
    if held is None or line is None:
        return rows
    return jnp.where((line < lines)[..., None], indexing.take(held.rows, line), rows)


def _read_missing(table: QuantizedTable, ids: jax.Array, chunk: int | None) -> jax.Array:
    """Reads rows [N, D] of ids [N], zeros for NO_ID, by a loop over the positions that have one."""
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
    """Stores updated rows: to their lines in float32, or stochastically rounded into the table.

    A row that did not move is not stored. It keeps its bits: a decoded row, encoded again, may get
    another scale.

    Args:
      store: table and lines.
      moves: the rows of the step; NO_ID entries are not written, C entries not to a line.
      old_rows: float32 [U, D], from lookup.
      new_rows: float32 [U, D].
      draw: names the random bits of the rounding.
      chunk: see chunks.each.

    Returns:
      The store, and bool [U]: which rows were stored.
    """
    table, cache_rows, _ = store
    is_stored = moves.is_row & row_state.is_moved(old_rows, new_rows)
    moves = moves.only(is_stored, store.num_lines)
    ids, line, num_cached, num_ids = moves.ids, moves.line, moves.num_cached, moves.num_ids
    width = ids.shape[0]
    if (
        cache_rows is not None
    ):  # the whole width at once: lines out of range are dropped, and slices would be copied
        cache_rows = indexing.put(cache_rows, line, new_rows)

    once = (num_ids > num_cached).astype(jnp.int32) if chunk else None

    def to_table(window: chunks.Window, rows: jax.Array) -> jax.Array:
        here = window.take(ids)
        packed = encode_rows(
            window.take(new_rows), here, table, draw.key, random_bits.BYPASS, draw.step, once
        )
        return indexing.put(rows, jnp.where(window.is_live, here, NO_ID), packed)

    rows = chunks.each(num_cached, num_ids, width, chunk, to_table, table.rows)
    table = QuantizedTable(rows, table.format, table.embedding_dim)
    return store._replace(table=table, lines=cache_rows), is_stored


@jax.named_scope("write_back")
def write_back(store: Store, tags: jax.Array, draw: Draw) -> QuantizedTable:
    """Quantizes every dirty line into the table, in blocks of lines; tags int32 [C]."""
    table, cache_rows, dirty = store
    assert cache_rows is not None and dirty is not None

    def body(window: chunks.Window, rows: jax.Array) -> jax.Array:
        ids = jnp.where(window.is_live & window.take(dirty), window.take(tags), NO_ID)
        packed = encode_rows(
            window.take(cache_rows), ids, table, draw.key, random_bits.FLUSH, draw.step
        )
        return indexing.put(rows, ids, packed)

    rows = chunks.each(0, tags.shape[0], tags.shape[0], 8192, body, table.rows)
    return QuantizedTable(rows, table.format, table.embedding_dim)
