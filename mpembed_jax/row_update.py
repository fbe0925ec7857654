"""One optimizer update of a batch's rows and their way home: to the line, or stochastically rounded into the table."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpembed_jax import access, chunks, numerics, ops, row_locality
from mpembed_jax import row_state as row_states
from mpembed_jax.table import NO_ID, QuantizedTable, encode_rows


def apply(
    tx: optax.GradientTransformation,
    table: QuantizedTable,
    cache_rows: jax.Array | None,
    row_state: Any,
    ids: jax.Array,
    line: jax.Array,
    rows: jax.Array,
    row_grads: jax.Array,
    num_cached: jax.Array,
    num_ids: jax.Array,
    dtype: str,
    key: jax.Array,
    step: jax.Array,
    is_applied: jax.Array,
    chunk: int | None,
) -> tuple[QuantizedTable, jax.Array | None, Any]:
    """Updates rows and their optimizer state and stores them.

    With a chunk length, and a transformation that treats each row by itself, a chunk's new rows are stored while the
    processor's cache still holds them: no [U, D] array of new rows exists. Either way gives the same bits.

    Args:
      tx: the transformation that `row_state` was made for.
      table: the stack.
      cache_rows: float32 [C, D] or None.
      row_state: see row_state.init_rows.
      ids: int32 [U]; NO_ID entries are not stored.
      line: int32 [U]; C entries are not stored in a line.
      rows: float32 [U, D].
      row_grads: float32 [U, D], summed per row.
      num_cached: entries [0, num_cached) go to lines.
      num_ids: entries [num_cached, num_ids) go to the table.
      dtype: storage of the row state.
      key: uint32 [2].
      step: int32 scalar.
      is_applied: bool scalar; False leaves everything as it is.
      chunk: see chunks.each.

    Returns:
      Table, cache rows and row state.
    """

    def update(row_state: Any, ids: jax.Array, rows: jax.Array, row_grads: jax.Array) -> tuple[jax.Array, Any]:
        return row_states.update_rows(tx, row_state, ids, rows, row_grads, dtype, key, step, is_applied)

    width = ids.shape[0]
    if chunk is None or not row_locality.is_row_local(tx, row_state, rows.shape[1]):
        new_rows, row_state = update(row_state, ids, rows, row_grads)
        table, cache_rows = ops.write(
            table, cache_rows, ids, line, new_rows, num_cached, num_ids, key, step, chunk
        )  # fmt: skip
        return table, cache_rows, row_state

    old_scalars = [leaf for leaf in jax.tree.leaves(row_state) if not leaf.ndim]

    def update_window(window: chunks.Window, row_state: Any) -> tuple[jax.Array, jax.Array, Any]:
        here = jnp.where(window.is_live, window.take(ids), NO_ID)
        row_state = _with_scalars(row_state, old_scalars)  # every chunk belongs to the same step
        return here, *update(row_state, here, window.take(rows), window.take(row_grads))

    def to_lines(window: chunks.Window, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        row_state, cache_rows = carry
        _, new_rows, row_state = update_window(window, row_state)
        here = jnp.where(window.is_live, window.take(line), cache_rows.shape[0])
        return row_state, access.put(cache_rows, here, new_rows)

    if cache_rows is not None:
        row_state, cache_rows = chunks.each(0, num_cached, width, chunk, to_lines, (row_state, cache_rows))
    once = (num_ids > num_cached).astype(jnp.int32)

    def to_table(window: chunks.Window, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        row_state, packed = carry
        here, new_rows, row_state = update_window(window, row_state)
        return row_state, access.put(packed, here, encode_rows(new_rows, here, table, key, numerics.BYPASS, step, once))

    row_state, packed = chunks.each(num_cached, num_ids, width, chunk, to_table, (row_state, table.rows))
    # Scalars (schedule counts) move once per step, whether or not a chunk ran.
    _, advanced = update(_with_scalars(row_state, old_scalars), jnp.full(1, NO_ID, jnp.int32), rows[:1], row_grads[:1])
    row_state = _with_scalars(row_state, [leaf for leaf in jax.tree.leaves(advanced) if not leaf.ndim])
    return QuantizedTable(packed, table.format, table.embedding_dim), cache_rows, row_state


def _with_scalars(row_state: Any, scalars: list[jax.Array]) -> Any:
    """Returns `row_state` with its scalar leaves replaced, in order."""
    remaining = iter(scalars)
    return jax.tree.map(lambda leaf: leaf if leaf.ndim else next(remaining), row_state)
