"""The reference of the row update in plain jax.numpy.

It applies a rule of `optim` to gathered rows. `rows.write` stores them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mpembed_jax import optim
from mpembed_jax.ops.records import Draw, Moves, Positions, Store
from mpembed_jax.ops.xla import rows, sums
from mpembed_jax.optim.row_state import update_rows


def update(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    old_rows: jax.Array,
    row_grads: jax.Array,
    *,
    rule: optim.RowRule,
    draw: Draw,
    chunk: int | None,
) -> tuple[Store, jax.Array | None, jax.Array]:
    """Updates each row once and stores it.

    SGD is w -= lr g. Row-wise Adagrad is G += mean(g^2), then w -= lr g / (sqrt(G) + eps).

    Args:
      store: table and lines.
      accumulator: G of row-wise Adagrad, one number per row: float32 [V], or the bit patterns of
        bfloat16, uint16 [V]. bfloat16 is rounded stochastically. None for SGD.
      moves: the rows of the step. Entries with id NO_ID are not updated. Entries with line C are
        not written to a line.
      old_rows: float32 [U, D], from lookup.
      row_grads: float32 [U, D], summed per row.
      rule: the rule of the optimizer.
      draw: the source of the random bits for rounding.
      chunk: see chunks.each. The loops store rows; the arithmetic is one pass over all rows.

    Returns:
      The store, the accumulator, and which rows were stored (bool [U]; see `rows.write`).
    """
    moves = moves.only(moves.is_row, store.num_lines)
    tx = optim.transformation_of(rule)
    treedef: Any = jax.tree.structure(
        jax.eval_shape(tx.init, jax.ShapeDtypeStruct((1, old_rows.shape[1]), jnp.float32))
    )
    dtype = "bfloat16" if accumulator is not None and accumulator.dtype == jnp.uint16 else "float32"
    state = treedef.unflatten([] if accumulator is None else [accumulator])
    new_rows, state = update_rows(
        tx,
        state,
        moves.ids,
        old_rows,
        row_grads,
        dtype=dtype,
        key=draw.key,
        step=draw.step,
        is_applied=jnp.bool_(True),
        is_local=True,
    )
    store, is_stored = rows.write(store, moves, old_rows, new_rows, draw, chunk=chunk)
    return store, None if accumulator is None else jax.tree.leaves(state)[0], is_stored


def update_summed(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    old_rows: jax.Array,
    positions: Positions,
    *,
    rule: optim.RowRule,
    draw: Draw,
    skip_nonfinite: bool,
    chunk: int | None,
) -> tuple[Store, jax.Array | None, jax.Array, jax.Array]:
    """Sums the gradients of each row's positions, then updates the rows as `update` does.

    Args:
      store: see `update`.
      accumulator: see `update`.
      moves: see `update`.
      old_rows: float32 [U, D].
      positions: the gradients, and the row of each position.
      rule: see `update`.
      draw: see `update`.
      skip_nonfinite: whether rows whose summed gradient is not finite stay as they are.
      chunk: see `update`.

    Returns:
      The store, the accumulator, which rows were updated, and which of them were stored (bool [U]
      each).
    """
    row_grads = sums.sum_duplicates(
        positions.grads, positions.row, old_rows.shape[0], positions.factors, positions.source
    )
    is_row = moves.is_row
    if skip_nonfinite:
        is_row = is_row & jnp.all(jnp.isfinite(row_grads), axis=1)
    moves = moves.only(is_row, store.num_lines)
    store, accumulator, is_stored = update(
        store, accumulator, moves, old_rows, row_grads, rule=rule, draw=draw, chunk=chunk
    )
    return store, accumulator, is_row, is_stored
