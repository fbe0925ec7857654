"""One update of a batch's rows, stored: by a kernel that runs the optimizer's rule, or by any optax transformation.

A kernel runs the transformations of `optim` that carry a rule (row-wise Adagrad and SGD at a constant rate). Which of the
two it will be follows from the implementation chosen at init and from the transformation; `implementation_of` tells.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpembed_jax import ops, optim
from mpembed_jax.arrays import chunks, indexing
from mpembed_jax.embedding.pooling import Positions
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.numerics import random_bits
from mpembed_jax.optim import RowRule, row_locality
from mpembed_jax.optim.row_state import update_rows
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable, encode_rows


def implementation_of(tx: optax.GradientTransformation, implementation: str) -> str:
    """Returns what updates rows: `implementation` where it has kernels and tx carries a rule, otherwise "xla"."""
    if not ops.has_kernels(implementation):
        return implementation
    return "xla" if optim.rule_of(tx) is None else implementation


def has_kernel(tx: optax.GradientTransformation, state: EmbeddingState) -> bool:
    """Whether a kernel runs `tx` on the rows of a state."""
    return optim.rule_of(tx) is not None and ops.has_kernels(state.implementation, state.table)


def apply(
    tx: optax.GradientTransformation,
    state: EmbeddingState,
    ids: jax.Array,
    line: jax.Array,
    rows: jax.Array,
    row_grads: jax.Array,
    num_cached: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    is_applied: jax.Array,
) -> tuple[QuantizedTable, jax.Array | None, Any]:
    """Updates rows once and stores them: to their lines in float32, or stochastically rounded into the table.

    Args:
      tx: the transformation given to init.
      state: table, cache, row state and key.
      ids: int32 [U]; NO_ID entries are not updated.
      line: int32 [U]; C entries are not written to a line.
      rows: float32 [U, D].
      row_grads: float32 [U, D].
      num_cached: entries [0, num_cached) go to lines.
      num_ids: entries [num_cached, num_ids) go to the table.
      step: int32 scalar, of the plan.
      is_applied: bool scalar; False leaves scalars of the row state where they are, and num_ids is then 0.

    Returns:
      Table, cache rows and row state.

    Raises:
      ValueError: if the row state was made for another transformation.
    """
    if not has_kernel(tx, state):
        return _apply_any(tx, state, ids, line, rows, row_grads, num_cached, num_ids, step, is_applied)
    rule, cache_rows, sums, with_sums = _ruled(tx, state)
    table, cache_rows, sums = ops.update(
        state.table, cache_rows, sums, ids, line, rows, row_grads, num_cached, num_ids, state.key, step,
        implementation=state.implementation, learning_rate=rule.learning_rate, eps=rule.eps,
    )  # fmt: skip
    return table, cache_rows, with_sums(sums)


def apply_summed(
    tx: optax.GradientTransformation,
    state: EmbeddingState,
    ids: jax.Array,
    line: jax.Array,
    rows: jax.Array,
    positions: Positions,
    num_cached: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    skip_nonfinite: bool,
) -> tuple[QuantizedTable, jax.Array | None, Any, jax.Array]:
    """See `apply`: from the gradients of positions, which a kernel sums itself; only where has_kernel(tx, state).

    Args:
      tx: the transformation given to init.
      state: table, cache, row state and key.
      ids: int32 [U]; NO_ID entries are not updated.
      line: int32 [U].
      rows: float32 [U, D].
      positions: see pooling.positions.
      num_cached: entries [0, num_cached) go to lines.
      num_ids: entries [num_cached, num_ids) go to the table.
      step: int32 scalar, of the plan.
      skip_nonfinite: leave rows as they are whose summed gradient is not finite.

    Returns:
      Table, cache rows, row state, and bool [U]: which rows were updated.

    Raises:
      ValueError: if the row state was made for another transformation.
    """
    rule, cache_rows, sums, with_sums = _ruled(tx, state)
    table, cache_rows, sums, is_updated = ops.update_summed(
        state.table, cache_rows, sums, ids, line, rows, *positions, num_cached, num_ids, state.key, step,
        implementation=state.implementation, learning_rate=rule.learning_rate, eps=rule.eps, skip_nonfinite=skip_nonfinite,
    )  # fmt: skip
    return table, cache_rows, with_sums(sums), is_updated


def _ruled(tx: optax.GradientTransformation, state: EmbeddingState) -> tuple[RowRule, Any, Any, Callable]:
    """Returns what an update by rule works on: the rule, cache rows, G, and what puts a new G into the row state."""
    rule: Any = optim.rule_of(tx)
    treedef: Any
    leaves, treedef = jax.tree.flatten(state.row_state)
    row = jax.ShapeDtypeStruct((1, state.spec.embedding_dim), jnp.float32)
    expected: Any = jax.tree.structure(jax.eval_shape(tx.init, row))
    if treedef != expected:
        raise ValueError(
            f"tx does not match the row state: init was called with a transformation whose state is {treedef}, this "
            f"one's is {expected}; pass the same tx to init and apply_gradients"
        )

    def with_sums(sums: jax.Array | None) -> Any:
        return treedef.unflatten([sums] if rule.has_sums else leaves)

    cache_rows = None if state.cache is None else state.cache.rows
    return rule, cache_rows, leaves[0] if rule.has_sums else None, with_sums


def _apply_any(
    tx: optax.GradientTransformation,
    state: EmbeddingState,
    ids: jax.Array,
    line: jax.Array,
    rows: jax.Array,
    row_grads: jax.Array,
    num_cached: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    is_applied: jax.Array,
) -> tuple[QuantizedTable, jax.Array | None, Any]:
    """See `apply`; for any transformation, without kernels.

    In chunks, if the transformation treats each row by itself: a chunk's new rows are stored while the processor's cache
    still holds them, and no [U, D] array of new rows exists. Either way gives the same bits.
    """
    table, row_state, key = state.table, state.row_state, state.row_key
    cache_rows = None if state.cache is None else state.cache.rows

    def update(row_state: Any, ids: jax.Array, rows: jax.Array, row_grads: jax.Array) -> tuple[jax.Array, Any]:
        dtype = state.spec.row_state_dtype
        return update_rows(tx, row_state, ids, rows, row_grads, dtype, key, step, is_applied)

    width, chunk = ids.shape[0], ops.chunk_of(state.implementation)
    if chunk is None or not row_locality.is_row_local(tx, rows.shape[1]):
        new_rows, row_state = update(row_state, ids, rows, row_grads)
        table, cache_rows = ops.write(
            table, cache_rows, ids, line, new_rows, num_cached, num_ids, key, step, implementation=state.implementation
        )
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
        native = ops.compiled(state.implementation)
        put = indexing.put if native is None else native.rows.put
        return row_state, put(cache_rows, here, new_rows)

    if cache_rows is not None:
        row_state, cache_rows = chunks.each(0, num_cached, width, chunk, to_lines, (row_state, cache_rows))
    once = (num_ids > num_cached).astype(jnp.int32)

    def to_table(window: chunks.Window, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        row_state, packed = carry
        here, new_rows, row_state = update_window(window, row_state)
        return row_state, indexing.put(packed, here, encode_rows(new_rows, here, table, key, random_bits.BYPASS, step, once))

    row_state, packed = chunks.each(num_cached, num_ids, width, chunk, to_table, (row_state, table.rows))
    if old_scalars:  # schedule counts move once per step, whether or not a chunk ran
        _, advanced = update(_with_scalars(row_state, old_scalars), jnp.full(1, NO_ID, jnp.int32), rows[:1], row_grads[:1])
        row_state = _with_scalars(row_state, [leaf for leaf in jax.tree.leaves(advanced) if not leaf.ndim])
    return QuantizedTable(packed, table.format, table.embedding_dim), cache_rows, row_state


def _with_scalars(row_state: Any, scalars: list[jax.Array]) -> Any:
    """Returns `row_state` with its scalar leaves replaced, in order."""
    remaining = iter(scalars)
    return jax.tree.map(lambda leaf: leaf if leaf.ndim else next(remaining), row_state)
