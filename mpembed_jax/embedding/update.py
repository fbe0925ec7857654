"""One optimizer update of a batch's rows, and the storage of the new rows.

Row-wise Adagrad and SGD of `optim`, at a constant rate and without weight decay, have a rule that a
kernel can run. XLA runs all other optax transformations. Kernels may store their rows. `has_kernel`
tells whether a kernel runs the transformation. This depends on the transformation, on the
implementation chosen at init, and on the memory that holds the table.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpembed_jax import ops, optim
from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.mesh import exchange
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops import Draw, Moves, Positions, Store
from mpembed_jax.optim import RowRule, row_locality
from mpembed_jax.optim.row_state import is_moved, mismatch, update_rows
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable, encode_rows


def has_kernel(tx: optax.GradientTransformation, state: EmbeddingState) -> bool:
    """Returns whether a kernel runs `tx` on the rows of a state."""
    return optim.rule_of(tx) is not None and ops.has_kernels(state.implementation, state.table)


def apply(
    tx: optax.GradientTransformation,
    state: EmbeddingState,
    moves: Moves,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    step: jax.Array,
    is_applied: jax.Array,
) -> tuple[EmbeddingState, jax.Array]:
    """Updates rows once and stores them.

    A row that has a line is stored there in float32. Any other row is rounded into the table by the
    rule of its format. A row that its update does not move is not stored: it keeps its bits.

    Args:
      tx: the transformation given to init.
      state: its table, cache, row state and key are used.
      moves: the rows. An entry with the id NO_ID is not updated. An entry with the line C (no
        line) is not written to a line.
      rows: float32 [U, D], before the update.
      row_grads: float32 [U, D], summed per row.
      step: int32 scalar, the number of the plan.
      is_applied: bool scalar, whether the plan may be applied. If it is False, the scalars of the
        row state do not change. The caller has then set moves.num_cached and moves.num_ids to 0, so
        that no row changes.

    Returns:
      The state with its table, cache rows and row state changed, and which rows were stored
      (bool [U]).

    Raises:
      ValueError: if the row state was made for another transformation.
    """
    rule = optim.rule_of(tx)
    if rule is None or not has_kernel(tx, state):
        return _apply_any(tx, state, moves, rows, row_grads, step=step, is_applied=is_applied)
    store, accumulator, is_stored = ops.update(
        state.store,
        accumulator_of(tx, rule, state),
        moves,
        rows,
        row_grads,
        rule=rule,
        draw=Draw(state.row_key, step),
        implementation=state.implementation,
    )
    return stored(state, store, with_accumulator(state, accumulator)), is_stored


def apply_summed(
    tx: optax.GradientTransformation,
    state: EmbeddingState,
    moves: Moves,
    rows: jax.Array,
    positions: Positions,
    *,
    step: jax.Array,
) -> tuple[EmbeddingState, jax.Array, jax.Array]:
    """Sums the gradients of positions for each row, and updates each row once, as `apply` does.

    If skip_nonfinite of the spec is True, a row whose sum is not finite is not updated.

    Args:
      tx: the transformation given to init. It has a rule (see `optim.rule_of`).
      state: see `apply`.
      moves: see `apply`.
      rows: float32 [U, D], before the update.
      positions: see pooling.positions.
      step: int32 scalar, the number of the plan.

    Returns:
      The state with its table, cache rows and row state changed.
      Which rows were updated (bool [U]).
      Which rows were stored (bool [U]).

    Raises:
      ValueError: if the row state was made for another transformation, or if tx has no rule.
    """
    rule = optim.rule_of(tx)
    if rule is None:
        raise ValueError(
            "apply_summed needs a transformation with a rule (see optim.rule_of); call apply for "
            "all others"
        )
    store, accumulator, is_updated, is_stored = ops.update_summed(
        state.store,
        accumulator_of(tx, rule, state),
        moves,
        rows,
        positions,
        rule=rule,
        draw=Draw(state.row_key, step),
        skip_nonfinite=state.spec.skip_nonfinite,
        implementation=state.implementation,
    )
    state = stored(state, store, with_accumulator(state, accumulator))
    return state, is_updated, is_stored


def accumulator_of(
    tx: optax.GradientTransformation, rule: RowRule, state: EmbeddingState
) -> jax.Array | None:
    """Returns the accumulator that the rule updates, or None if the rule has none.

    It is float32 [V], or uint16 [V] with bit patterns of bfloat16.

    Raises:
      ValueError: if the row state was made for another transformation.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(state.row_state)
    row = jax.ShapeDtypeStruct((1, state.spec.embedding_dim), jnp.float32)
    expected: Any = jax.tree.structure(jax.eval_shape(tx.init, row))
    if treedef != expected:
        raise mismatch(state.row_state, expected)
    return leaves[0] if rule.has_sums else None


def with_accumulator(state: EmbeddingState, accumulator: jax.Array | None) -> Any:
    """Returns the row state with a new accumulator; None leaves it unchanged."""
    if accumulator is None:
        return state.row_state
    treedef: Any = jax.tree.structure(state.row_state)
    return treedef.unflatten([accumulator])


def stored(state: EmbeddingState, store: Store, row_state: Any) -> EmbeddingState:
    """Returns the state with the table and the lines of `store`, and with `row_state`."""
    cache = state.cache
    if cache is not None:
        assert store.lines is not None
        cache = dataclasses.replace(cache, rows=store.lines)
    return dataclasses.replace(state, table=store.table, cache=cache, row_state=row_state)


def _apply_any(
    tx: optax.GradientTransformation,
    state: EmbeddingState,
    moves: Moves,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    step: jax.Array,
    is_applied: jax.Array,
) -> tuple[EmbeddingState, jax.Array]:
    """Runs any transformation by XLA, and stores the new rows; see `apply`.

    If the implementation loops over chunks, a transformation that treats each row by itself runs
    chunk by chunk. The new rows of a chunk are stored while the processor's cache still holds them,
    and there is no [U, D] array of new rows. The bits are the same with and without chunks.

    A transformation that mixes rows runs on all rows at once. Over a mesh, every device runs it on
    the rows of all shards.
    """
    table = state.table
    row_state = state.row_state
    draw = Draw(state.row_key, step)
    lines = None if state.cache is None else state.cache.rows
    ids, line, num_cached, num_ids = moves.ids, moves.line, moves.num_cached, moves.num_ids

    width = ids.shape[0]
    chunk = ops.chunk_of(state.implementation)
    is_local = row_locality.is_row_local(tx, rows.shape[1])
    over_all_rows = None
    if state.layout is not None and not is_local:
        over_all_rows = partial(exchange.over_shards, state.layout, tx.update)

    def update(
        row_state: Any, ids: jax.Array, rows: jax.Array, row_grads: jax.Array
    ) -> tuple[jax.Array, Any]:
        dtype = state.spec.row_state_dtype
        return update_rows(
            tx,
            row_state,
            ids,
            rows,
            row_grads,
            dtype=dtype,
            key=draw.key,
            step=step,
            is_applied=is_applied,
            is_local=is_local,
            over_all_rows=over_all_rows,
        )

    if chunk is None or not is_local:
        new_rows, row_state = update(row_state, ids, rows, row_grads)
        store, is_stored = ops.write(
            state.store, moves, rows, new_rows, draw, implementation=state.implementation
        )
        return stored(state, store, row_state), is_stored

    old_scalars = [leaf for leaf in jax.tree.leaves(row_state) if not leaf.ndim]

    def update_window(
        window: chunks.Window, row_state: Any, is_stored: jax.Array
    ) -> tuple[jax.Array, Any, jax.Array]:
        here = jnp.where(window.is_live, window.take(ids), NO_ID)
        old_rows = window.take(rows)
        # All chunks belong to the same step, so each begins with the scalars from before the step.
        row_state = _with_scalars(row_state, old_scalars)
        new_rows, row_state = update(row_state, here, old_rows, window.take(row_grads))
        is_stored = window.put(is_stored, (here != NO_ID) & is_moved(old_rows, new_rows))
        return new_rows, row_state, is_stored

    def to_lines(window: chunks.Window, carry: tuple) -> tuple:
        row_state, lines, is_stored = carry
        new_rows, row_state, is_stored = update_window(window, row_state, is_stored)
        is_here = window.is_live & window.take(is_stored)
        here = jnp.where(is_here, window.take(line), lines.shape[0])
        native = ops.compiled(state.implementation)
        put = indexing.put if native is None else native.rows.put
        return row_state, put(lines, here, new_rows), is_stored

    is_stored = jnp.zeros(width, bool)
    if lines is not None:
        row_state, lines, is_stored = chunks.each(
            0, num_cached, width, chunk, to_lines, (row_state, lines, is_stored)
        )
    # If to_table runs, `once` is 1. The compiler cannot know this; see encode_rows.
    once = (num_ids > num_cached).astype(jnp.int32)

    def to_table(window: chunks.Window, carry: tuple) -> tuple:
        row_state, packed, is_stored = carry
        new_rows, row_state, is_stored = update_window(window, row_state, is_stored)
        here = jnp.where(window.is_live & window.take(is_stored), window.take(ids), NO_ID)
        encoded = encode_rows(new_rows, here, table, draw.key, random_bits.BYPASS, step, once)
        return row_state, indexing.put(packed, here, encoded), is_stored

    row_state, packed, is_stored = chunks.each(
        num_cached, num_ids, width, chunk, to_table, (row_state, table.rows, is_stored)
    )
    if old_scalars:
        # Scalars, such as the count of a schedule, advance once per step, even if no chunk ran.
        _, advanced = update(
            _with_scalars(row_state, old_scalars),
            jnp.full(1, NO_ID, jnp.int32),
            rows[:1],
            row_grads[:1],
        )
        row_state = _with_scalars(
            row_state, [leaf for leaf in jax.tree.leaves(advanced) if not leaf.ndim]
        )
    table = QuantizedTable(packed, table.format, table.embedding_dim)
    return stored(state, Store(table, lines, None), row_state), is_stored


def _with_scalars(row_state: Any, scalars: list[jax.Array]) -> Any:
    """Returns `row_state` with its scalar leaves replaced by `scalars`, in order."""
    remaining = iter(scalars)
    return jax.tree.map(lambda leaf: leaf if leaf.ndim else next(remaining), row_state)
