"""GPU kernels of the row movements lookup, read, swap and bring, by Pallas' Triton back end.

Each op gives the bits of its reference in `xla.rows`; `bring` gives those of swap and lookup. The
kernels need compute capability 8.0. Addresses have 64 bits if an array is larger than 2^32 bytes.
There are no atomics, because each row is written by only one program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mpembed_jax.arrays import indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops.gpu import kernel
from mpembed_jax.ops.gpu.kernel import RowWords
from mpembed_jax.ops.records import Draw, Moves, Store
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable


def _positions(block: int) -> jax.Array:
    return pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)


def lookup(
    store: Store, moves: Moves, is_valid: jax.Array | None, *, is_interpreted: bool
) -> jax.Array:
    """Gathers the unique rows (float32 [U, D]); see `ops.lookup`.

    One pass writes each row once, from its line or dequantized from the table. The table may be in
    host memory.
    """
    table, lines, _ = store
    ids, line, num_cached, num_ids = moves.ids, moves.line, moves.num_cached, moves.num_ids
    width = ids.shape[0]
    dim = table.embedding_dim
    row_words = RowWords(table.format, dim, is_interpreted)
    block = kernel.block_rows(dim)

    def body(*refs: Any) -> None:
        bounds, ids_ref, line_ref, packed, *lines, out = refs
        position = _positions(block)
        columns = kernel.columns_of(dim)
        is_inside = position < width
        from_table = is_inside & (position < bounds[1])
        row = jnp.zeros((block, columns.shape[0]), jnp.float32)
        if lines:
            from_line = is_inside & (position < bounds[0])
            here = kernel.load(line_ref, (position,), from_line)
            row = kernel.load_row(lines[0], here, from_line, columns, dim)
            from_table = from_table & ~from_line
        read = kernel.read_packed(
            packed, kernel.load(ids_ref, (position,), from_table), from_table, row_words
        )
        row = jnp.where(from_table[:, None], read, row)
        row = jnp.where(bounds[2] != 0, row, jnp.float32(jnp.nan))
        kernel.store_row(out, position, is_inside, columns, dim, row)

    # Without a cache num_cached is 0.
    is_valid = jnp.bool_(True) if is_valid is None else is_valid
    bounds = jnp.stack([num_cached, num_ids, is_valid.astype(jnp.int32)])
    operands = [bounds, ids, line, table.rows]
    operands += [] if lines is None else [lines]
    (out,) = kernel.launch(
        body,
        pl.cdiv(width, block),
        operands,
        [jax.ShapeDtypeStruct((width, dim), jnp.float32)],
        name="mpembed_lookup",
        is_interpreted=is_interpreted,
    )
    return out


def read(
    table: QuantizedTable, held: CacheState | None, ids: jax.Array, is_interpreted: bool
) -> jax.Array:
    """Reads rows for evaluation in one pass; see `xla.rows.read`.

    Each id is compared with the tags of its set. The row comes from the line with that tag, or else
    from the table, which may be in host memory.

    Args:
      table: the stack.
      held: the cache, or None.
      ids: int32 [..]; ids outside the table read as zeros.
      is_interpreted: see kernel.launch.

    Returns:
      float32 [.., D].
    """
    flat = ids.reshape(-1)
    dim = table.embedding_dim
    num_rows = table.num_rows
    (width,) = flat.shape
    if width == 0:
        return jnp.zeros((*ids.shape, dim), jnp.float32)
    row_words = RowWords(table.format, dim, is_interpreted)
    block = kernel.block_rows(dim)

    def body(*refs: Any) -> None:
        ids_ref, packed, *cached, out = refs
        position = _positions(block)
        columns = kernel.columns_of(dim)
        is_inside = position < width
        here = kernel.load(ids_ref, (position,), is_inside)
        is_valid = is_inside & (here >= 0) & (here < num_rows)
        here = jnp.where(is_valid, here, 0)
        row = jnp.zeros((block, columns.shape[0]), jnp.float32)
        from_table = is_valid
        if held is not None:
            tags, lines = cached
            ways = held.geometry.ways
            sets = residency.set_of(here, held.geometry)
            way = jnp.arange(indexing.ceil_power(ways), dtype=jnp.int32)
            wide = is_valid[:, None] & (way < ways)[None, :]
            tag = kernel.load(
                tags,
                (jnp.where(wide, sets[:, None], 0), jnp.where(wide, way[None, :], 0)),
                wide,
                NO_ID,
            )
            found = jnp.sum(
                jnp.where(tag == here[:, None], way[None, :] + 1, 0), axis=1, dtype=jnp.int32
            )
            from_line = is_valid & (found > 0)
            from_table = is_valid & ~from_line
            row = kernel.load_row(lines, sets * ways + found - 1, from_line, columns, dim)
        read = kernel.read_packed(packed, here, from_table, row_words)
        kernel.store_row(
            out, position, is_inside, columns, dim, jnp.where(from_table[:, None], read, row)
        )

    operands = [flat, table.rows] + ([] if held is None else [held.tags, held.rows])
    (out,) = kernel.launch(
        body,
        pl.cdiv(width, block),
        operands,
        [jax.ShapeDtypeStruct((width, dim), jnp.float32)],
        name="mpembed_read",
        is_interpreted=is_interpreted,
    )
    return out.reshape(*ids.shape, dim)


def swap(
    store: Store, moves: Moves, draw: Draw, *, is_interpreted: bool
) -> tuple[Store, jax.Array]:
    """Evicts victims and fills newcomers; see `xla.rows.swap`.

    Each dirty victim is quantized into the table, and its newcomer is dequantized into the line.
    Programs without newcomers end at once.
    """
    store, num_written, _ = _moved(store, moves, draw, None, is_interpreted)
    return store, num_written


def bring(
    store: Store,
    moves: Moves,
    draw: Draw,
    is_valid: jax.Array | None,
    *,
    is_interpreted: bool,
) -> tuple[Store, jax.Array, jax.Array]:
    """Does what `swap` and then `lookup` do, in one kernel; see `ops.bring`.

    A newcomer's row is dequantized once, for its line and for the result.
    """
    is_valid = jnp.bool_(True) if is_valid is None else is_valid
    store, num_written, (rows,) = _moved(store, moves, draw, is_valid, is_interpreted)
    return store, num_written, rows


def _moved(
    store: Store, moves: Moves, draw: Draw, is_valid: jax.Array | None, is_interpreted: bool
) -> tuple[Store, jax.Array, list[jax.Array]]:
    """Evicts and fills.

    If is_valid (bool scalar) is given, the third result holds one array: the unique rows (float32
    [U, D]), which are NaN if is_valid is False. Otherwise, it is empty.
    """
    table, lines, dirty = store
    assert lines is not None and dirty is not None
    ids, line, victim_ids = moves.ids, moves.line, moves.victim_ids
    begin, end = moves.num_hits, moves.num_cached
    width = ids.shape[0]
    dim = table.embedding_dim
    row_words = RowWords(table.format, dim, is_interpreted)
    block = kernel.block_rows(dim)
    position = jnp.arange(width, dtype=jnp.int32)
    is_live = (position >= begin) & (position < end)
    # Without the barrier, XLA would read the bits again after they were cleared, from a copy of all
    # of them.
    was_dirty = lax.optimization_barrier(is_live & indexing.take(dirty, line))
    must_write = was_dirty & (victim_ids != NO_ID)

    def body(*refs: Any) -> None:
        bounds, ids_ref, line_ref, victim_ref, *seeds = refs[:6]
        packed_in, _lines_in, packed, lines, *out = refs[6:]
        position = _positions(block)
        columns = kernel.columns_of(dim)

        def read(mask: jax.Array) -> jax.Array:
            # A row of this batch is never a victim in it (invariant 2). So no program writes what
            # is read here.
            return kernel.read_packed(
                packed_in, kernel.load(ids_ref, (position,), mask), mask, row_words
            )

        def exchange(new: jax.Array) -> None:
            is_live = (position >= bounds[0]) & (position < bounds[1])
            here = kernel.load(line_ref, (position,), is_live)
            victim = kernel.load(victim_ref, (position,), is_live, -1)
            writes = is_live & (victim >= 0)
            old = [
                kernel.load_row(lines, here, writes, c, dim)
                for c in kernel.place_columns(row_words)
            ]
            kernel.barrier(is_interpreted)
            # Writes the victims back.
            own = kernel.load_seeds(seeds, position, writes)
            kernel.write_packed(packed, victim, writes, old, row_words, own)
            kernel.store_row(lines, here, is_live, columns, dim, new)

        if not out:

            @pl.when(_overlaps(bounds, block))
            def swap() -> None:
                exchange(read((position >= bounds[0]) & (position < bounds[1])))

            return
        from_line = position < bounds[0]
        from_table = (position >= bounds[0]) & (position < bounds[2])
        new = read(from_table)
        # Hits keep their lines, so no program writes the lines that are read here.
        here = kernel.load(line_ref, (position,), from_line)
        row = kernel.load_row(lines, here, from_line, columns, dim)
        pl.when(_overlaps(bounds, block))(lambda: exchange(new))
        row = jnp.where(from_table[:, None], new, row)
        row = jnp.where(bounds[3] != 0, row, jnp.float32(jnp.nan))
        kernel.store_row(out[0], position, position < width, columns, dim, row)

    bounds = [begin, end]
    outputs = [kernel.shape_of(table.rows), kernel.shape_of(lines)]
    if is_valid is not None:
        bounds += [moves.num_ids, is_valid.astype(jnp.int32)]
        outputs += [jax.ShapeDtypeStruct((width, dim), jnp.float32)]
    operands = [
        jnp.stack(bounds),
        ids,
        line,
        jnp.where(must_write, victim_ids, -1),
        *draw.row_seeds(random_bits.WRITE_BACK, victim_ids),
        table.rows,
        lines,
    ]
    packed, lines, *rows = kernel.launch(
        body,
        pl.cdiv(width, block),
        operands,
        outputs,
        name="mpembed_swap" if is_valid is None else "mpembed_bring",
        is_interpreted=is_interpreted,
        aliases={6: 0, 7: 1},
    )
    dirty = indexing.put(dirty, jnp.where(was_dirty, line, dirty.shape[0]), False)
    num_written = jnp.sum(must_write, dtype=jnp.int32)
    return Store(QuantizedTable(packed, table.format, dim), lines, dirty), num_written, rows


def _overlaps(bounds: Any, block: int) -> jax.Array:
    first = pl.program_id(0) * block
    return (first < bounds[1]) & (first + block > bounds[0])
