"""One update of a batch's rows, stored: by a kernel that runs the optimizer's rule, or by any optax transformation.

A kernel runs the transformations of `optim` that carry a rule (row-wise Adagrad and SGD at a constant rate). Which of the
two it will be follows from the implementation chosen at init and from the transformation; `implementation_of` tells.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpembed_jax import ops, optim
from mpembed_jax import row_state as row_states
from mpembed_jax.state import EmbeddingState
from mpembed_jax.table import QuantizedTable


def implementation_of(tx: optax.GradientTransformation, implementation: str) -> str:
    """Returns what updates rows: `implementation` where it has kernels and tx carries a rule, otherwise "xla"."""
    if not ops.has_kernels(implementation):
        return implementation
    return "xla" if optim.rule_of(tx) is None else implementation


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
    cache_rows = None if state.cache is None else state.cache.rows
    rule = optim.rule_of(tx)
    if rule is None or not ops.has_kernels(state.implementation):
        dtype = state.spec.row_state_dtype
        new_rows, row_state = row_states.update_rows(
            tx, state.row_state, ids, rows, row_grads, dtype, state.key, step, is_applied
        )
        table, cache_rows = ops.write(
            state.table, cache_rows, ids, line, new_rows, num_cached, num_ids, state.key, step,
            implementation=state.implementation,
        )  # fmt: skip
        return table, cache_rows, row_state

    treedef: Any
    leaves, treedef = jax.tree.flatten(state.row_state)
    expected: Any = jax.tree.structure(jax.eval_shape(tx.init, jax.ShapeDtypeStruct((1, rows.shape[1]), jnp.float32)))
    if treedef != expected:
        raise ValueError(
            f"tx does not match the row state: init was called with a transformation whose state is {treedef}, this "
            f"one's is {expected}; pass the same tx to init and apply_gradients"
        )
    table, cache_rows, sums = ops.update(
        state.table, cache_rows, leaves[0] if rule.has_sums else None, ids, line, rows, row_grads, num_cached, num_ids,
        state.key, step, implementation=state.implementation, learning_rate=rule.learning_rate, eps=rule.eps,
    )  # fmt: skip
    return table, cache_rows, treedef.unflatten([sums] if rule.has_sums else leaves)
