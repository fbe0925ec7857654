"""The reference implementation of the row update: the rules of `optim` by plain jax.numpy, then `xla.write`."""

from typing import Any

import jax
import jax.numpy as jnp

from mpembed_jax import optim
from mpembed_jax.ops import xla
from mpembed_jax.optim.row_state import update_rows
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable


def update(
    table: QuantizedTable,
    cache_rows: jax.Array | None,
    sums: jax.Array | None,
    ids: jax.Array,
    line: jax.Array,
    rows: jax.Array,
    row_grads: jax.Array,
    num_cached: jax.Array,
    num_ids: jax.Array,
    key: jax.Array,
    step: jax.Array,
    chunk: int | None,
    *,
    learning_rate: float,
    eps: float,
) -> tuple[QuantizedTable, jax.Array | None, jax.Array | None]:
    """Updates each row once and stores it: w -= lr g (SGD), or w -= lr g / (sqrt(G) + eps), G += mean(g^2).

    Args:
      table: the stack.
      cache_rows: float32 [C, D] or None.
      sums: G of row-wise Adagrad, float32 [V] or bfloat16 bit patterns uint16 [V] (rounded stochastically); None: SGD.
      ids: int32 [U]; NO_ID entries are not updated.
      line: int32 [U]; C entries are not written to a line.
      rows: float32 [U, D].
      row_grads: float32 [U, D], summed per row.
      num_cached: entries [0, num_cached) go to lines.
      num_ids: entries [num_cached, num_ids) go to the table; the rest are not updated.
      key: uint32 [2].
      step: int32 scalar.
      chunk: see chunks.each; of the stores.
      learning_rate: of the rule.
      eps: of Adagrad.

    Returns:
      Table, cache rows and sums.
    """
    is_updated = (jnp.arange(ids.shape[0], dtype=jnp.int32) < num_ids) & (ids != NO_ID)
    ids = jnp.where(is_updated, ids, NO_ID)
    if cache_rows is not None:
        line = jnp.where(is_updated, line, cache_rows.shape[0])
    tx = optim.sgd(learning_rate) if sums is None else optim.rowwise_adagrad(learning_rate, eps)
    treedef: Any = jax.tree.structure(jax.eval_shape(tx.init, jax.ShapeDtypeStruct((1, rows.shape[1]), jnp.float32)))
    dtype = "bfloat16" if sums is not None and sums.dtype == jnp.uint16 else "float32"
    state = treedef.unflatten([] if sums is None else [sums])
    new_rows, state = update_rows(tx, state, ids, rows, row_grads, dtype, key, step, jnp.bool_(True))
    table, cache_rows = xla.rows.write(table, cache_rows, ids, line, new_rows, num_cached, num_ids, key, step, chunk)
    return table, cache_rows, None if sums is None else jax.tree.leaves(state)[0]


def update_summed(
    table: QuantizedTable,
    cache_rows: jax.Array | None,
    sums: jax.Array | None,
    ids: jax.Array,
    line: jax.Array,
    rows: jax.Array,
    grads: jax.Array,
    index: jax.Array,
    source: jax.Array | None,
    factors: jax.Array | None,
    num_cached: jax.Array,
    num_ids: jax.Array,
    key: jax.Array,
    step: jax.Array,
    chunk: int | None,
    *,
    learning_rate: float,
    eps: float,
    skip_nonfinite: bool,
) -> tuple[QuantizedTable, jax.Array | None, jax.Array | None, jax.Array]:
    """Sums the gradients of each row's positions, then `update`.

    Args:
      table: this and what is not named here, see `update`.
      cache_rows: see `update`.
      sums: see `update`.
      ids: int32 [U].
      line: int32 [U].
      rows: float32 [U, D].
      grads: float32 [M, D], of vectors or bags; M > 0.
      index: int32 [N] in [0, U), N > 0, the row that each position holds; U - 1 is padding.
      source: int32 [N] in [0, M), the gradient of each position; None: position n takes grads[n // (N / M)].
      factors: float32 [N], multiplied with each position's gradient, or None.
      num_cached: see `update`.
      num_ids: see `update`.
      key: uint32 [2].
      step: int32 scalar.
      chunk: see `update`.
      learning_rate: of the rule.
      eps: of Adagrad.
      skip_nonfinite: leave rows as they are whose summed gradient is not finite.

    Returns:
      Table, cache rows, sums, and bool [U]: which rows were updated.
    """
    row_grads = xla.sums.sum_duplicates(grads, index, rows.shape[0], factors, source)
    is_updated = (jnp.arange(ids.shape[0], dtype=jnp.int32) < num_ids) & (ids != NO_ID)
    if skip_nonfinite:
        is_updated = is_updated & jnp.all(jnp.isfinite(row_grads), axis=1)
    updated = update(
        table, cache_rows, sums, jnp.where(is_updated, ids, NO_ID), line, rows, row_grads, num_cached, num_ids, key, step,
        chunk, learning_rate=learning_rate, eps=eps,
    )  # fmt: skip
    return *updated, is_updated
