"""Per-row optimizer state, and the lazy update of a batch's rows by an optax transformation.

A leaf is one array of a transformation's state. A leaf with one entry per table row is gathered at
the batch's unique ids, updated and scattered back. A scalar leaf is updated once per step. `init`
refuses a transformation with any other leaf. Rows that are not in the batch keep their state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax.arrays import carries, indexing
from mpembed_jax.numerics import random_bits, rounding
from mpembed_jax.optim import row_locality
from mpembed_jax.row_ids import NO_ID

# The state types of transformations that hold back gradients until a later step.
_ACCUMULATORS = (optax.MultiStepsState, optax.ApplyEvery)


class RowLeaf(NamedTuple):
    """One leaf of a transformation's state: an entry per table row, or a scalar for the stack."""

    is_row: bool
    shape: tuple[int, ...]  # shape of one row's entry
    dtype: Any
    initial: Any  # NumPy value of one row's entry, or of the scalar


def row_leaves(tx: optax.GradientTransformation, embedding_dim: int) -> tuple[list[RowLeaf], Any]:
    """Classifies the state leaves that `tx` makes for float32 rows [V, embedding_dim].

    A leaf is accepted if it is a scalar, or if it has one entry per row and all entries start
    equal. In both cases, its initial value must not depend on the parameters.

    Args:
      tx: an optax transformation.
      embedding_dim: D.

    Returns:
      The leaves and their tree structure.

    Raises:
      TypeError: if tx is not an optax gradient transformation.
      ValueError: if tx cannot work on gathered rows; the message names the leaf and the reason.
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            "tx must be an optax gradient transformation such as optim.rowwise_adagrad(0.05), "
            f"got {type(tx).__name__}"
        )
    abstract = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((5, embedding_dim), jnp.float32))
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(
                f"optimizer state leaf {jax.tree_util.keystr(path)} is a {leaf.dtype}, which "
                "cannot be kept by row: noise drawn by position would depend on the order of the "
                "batch"
            )
    # The state is made twice, for two numbers of rows. If the first dimension of a leaf is the
    # number of rows both times, the leaf has one entry per row.
    small, large = 5, 7

    def initial(rows: int, fill: float) -> Any:
        with row_locality.evaluated():
            return jax.tree.map(
                np.asarray, tx.init(jnp.full((rows, embedding_dim), fill, jnp.float32))
            )

    state = initial(small, 0.0)
    for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, _ACCUMULATORS)):
        if isinstance(node, _ACCUMULATORS):
            raise ValueError(
                f"tx holds back gradients until a later step ({type(node).__name__} of "
                "optax.MultiSteps or optax.apply_every), but a row gets an update only in the "
                "steps whose batch has it; accumulate instead: prefetch the ids of all "
                "microbatches at once, add up their row gradients, and apply them once"
            )
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    larger, filled = jax.tree.leaves(initial(large, 0.0)), jax.tree.leaves(initial(small, 3.7))
    leaves = []
    for (path, leaf), other, moved in zip(paths, larger, filled, strict=True):
        name = jax.tree_util.keystr(path) or "the state"
        is_row = (
            leaf.ndim >= 1 and leaf.shape[0] == small and other.shape == (large, *leaf.shape[1:])
        )
        if not is_row and leaf.ndim:
            raise ValueError(
                f"optimizer state leaf {name} of shape {leaf.shape} (for {small} rows of dim "
                f"{embedding_dim}) is neither one entry per row nor a scalar, so it cannot be "
                "kept by row; use for example optim.rowwise_adagrad, optax.adagrad, optax.adam "
                "or optax.sgd"
            )
        if moved.shape != leaf.shape or not np.array_equal(moved, leaf):
            raise ValueError(
                f"optimizer state leaf {name} starts from the parameters' values; only states "
                "that start from a constant can be kept by row without a float32 copy of the "
                "table"
            )
        if is_row and leaf.size and not (leaf == leaf[0]).all():
            raise ValueError(
                f"optimizer state leaf {name} starts differently for different rows, which is not "
                "supported"
            )
        leaves.append(
            RowLeaf(
                is_row, leaf.shape[1:] if is_row else (), leaf.dtype, leaf[0] if is_row else leaf
            )
        )
    rows = jax.ShapeDtypeStruct((small, embedding_dim), jnp.float32)
    names = ", ".join(jax.tree_util.keystr(path) for path, _ in paths)
    try:
        updates, new_state = jax.eval_shape(tx.update, rows, state, rows)
    except Exception as error:
        raise ValueError(
            "tx.update(row_grads, state, params) fails on plain float32 rows, so tx cannot train "
            f"them (state leaves: {names}): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    after: Any = jax.tree.structure(new_state)
    is_kept = after == treedef and getattr(updates, "shape", None) == rows.shape
    if not is_kept:
        raise ValueError(
            f"tx.update changes the structure of its state {treedef} or of the updates, so it "
            "cannot train rows"
        )
    return leaves, treedef


def _is_narrow(leaf: RowLeaf, dtype: str) -> bool:
    return leaf.is_row and dtype == "bfloat16" and leaf.dtype == np.float32


def init_rows(
    tx: optax.GradientTransformation,
    num_rows: int,
    embedding_dim: int,
    dtype: str,
    memory_kind: str | None = None,
) -> Any:
    """Makes the row state of a stack: the tree of tx's state with V entries per row leaf.

    If dtype is "bfloat16", float32 row leaves are stored as bfloat16 bit patterns (uint16).

    Args:
      tx: the transformation.
      num_rows: V.
      embedding_dim: D.
      dtype: "float32" or "bfloat16".
      memory_kind: None, or a host memory kind for row leaves with more than one number per row.
        Leaves with one number per row stay on the device. They are small, and a step needs their
        entries for all rows of its batch, also for the cached rows.

    Returns:
      A pytree. The leading dimension of its row leaves is V.

    Raises:
      TypeError: see row_leaves.
      ValueError: see row_leaves and row_locality.check_mixing.
    """
    leaves, treedef = row_leaves(tx, embedding_dim)
    if not row_locality.is_row_local(tx, embedding_dim):
        row_locality.check_mixing(tx, embedding_dim)

    def make(leaf: RowLeaf) -> jax.Array:
        value = _initial(leaf, dtype)
        if not leaf.is_row:
            return value
        return indexing.filled((num_rows, *leaf.shape), value, memory_kind if leaf.shape else None)

    return treedef.unflatten([make(leaf) for leaf in leaves])


def _initial(leaf: RowLeaf, dtype: str) -> jax.Array:
    """Returns the stored initial value of one row's entry, or of a scalar."""
    value = jnp.asarray(leaf.initial)
    if not _is_narrow(leaf, dtype):
        return value
    packed = rounding.encode_float(value, rounding.FLOAT_FORMATS["bfloat16"], None)
    return packed.astype(jnp.uint16)


def reset(
    tx: optax.GradientTransformation,
    row_state: Any,
    ids: jax.Array,
    embedding_dim: int,
    dtype: str,
) -> Any:
    """Gives rows their initial optimizer state.

    Args:
      tx: the transformation that `row_state` was made for.
      row_state: as returned by `init_rows`.
      ids: int32 [n]. Only NO_ID may appear more than once, and it resets nothing.
      embedding_dim: D.
      dtype: storage dtype of the row state.

    Returns:
      The new row state. Its scalars are unchanged.

    Raises:
      ValueError: if row_state was made for another transformation.
    """
    leaves, treedef, held = _matched(tx, row_state, embedding_dim, dtype)
    return treedef.unflatten(
        [
            indexing.put(array, ids, _initial(leaf, dtype)) if leaf.is_row else array
            for array, leaf in zip(held, leaves, strict=True)
        ]
    )


def _matched(
    tx: optax.GradientTransformation, row_state: Any, embedding_dim: int, dtype: str
) -> tuple[list[RowLeaf], Any, list[jax.Array]]:
    """Returns the leaves and structure of tx's state, and the arrays of a row state made for tx.

    Raises:
      ValueError: if row_state was made for another transformation.
    """
    leaves, treedef = row_leaves(tx, embedding_dim)
    held, held_def = jax.tree.flatten(row_state)
    wide = [jnp.uint16 if _is_narrow(leaf, dtype) else leaf.dtype for leaf in leaves]
    is_same = held_def == treedef and all(
        a.dtype == d and a.shape[1 if leaf.is_row else 0 :] == leaf.shape
        for a, d, leaf in zip(held, wide, leaves, strict=True)
    )
    if not is_same:
        raise mismatch(row_state, treedef)
    return leaves, treedef, held


def mismatch(row_state: Any, treedef: Any) -> ValueError:
    """Returns the error to raise for a row state that was made for another transformation.

    Args:
      row_state: as returned by `init_rows`.
      treedef: the structure of the transformation's state.
    """
    held, held_def = jax.tree.flatten(row_state)
    return ValueError(
        "tx does not match the row state: init was called with a transformation that has the "
        f"state {held_def} {[a.shape for a in held]}, but this tx has the state {treedef}; pass "
        "the same tx to init and to every verb"
    )


def is_moved(old_rows: jax.Array, new_rows: jax.Array) -> jax.Array:
    """Returns which rows an update changed: bool [U] for rows float32 [U, D].

    A row with a NaN counts as changed. A change from -0 to 0 does not count.
    """
    return jnp.any(new_rows != old_rows, axis=-1)


@jax.named_scope("update")
def update_rows(
    tx: optax.GradientTransformation,
    row_state: Any,
    ids: jax.Array,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    dtype: str,
    key: random_bits.Key,
    step: jax.Array,
    is_applied: jax.Array,
    is_local: bool = False,
    over_all_rows: Callable | None = None,
) -> tuple[jax.Array, Any]:
    """Updates gathered rows and their optimizer state.

    Args:
      tx: the transformation that `row_state` was made for.
      row_state: as returned by `init_rows`.
      ids: int32 [U]. An entry NO_ID is padding. No state is stored for padding. tx gets zeros as
        its gradient. If is_local is False, tx also gets zeros as its row, and the initial state.
      rows: float32 [U, D].
      row_grads: float32 [U, D], summed per row.
      dtype: storage dtype of the row state.
      key: uint32 [2].
      step: int32 scalar.
      is_applied: bool scalar. If False, the update is skipped: rows and state, with its scalars
        (such as schedule counts), do not change.
      is_local: whether tx is known to treat each row by itself.
      over_all_rows: None, or a function that is called instead of tx.update. It is needed if tx
        mixes rows and `rows` are only a part of the batch's rows. It runs tx.update on all of them
        and returns the results for `rows`.

    Returns:
      The new rows [U, D] and the new row state.

    Raises:
      ValueError: if row_state was made for another transformation.
    """
    leaves, treedef, held = _matched(tx, row_state, rows.shape[1], dtype)
    over_all_rows = tx.update if over_all_rows is None else over_all_rows
    num_rows = next((a.shape[0] for a, leaf in zip(held, leaves, strict=True) if leaf.is_row), 0)
    is_row = ids != NO_ID
    place = jnp.where((ids >= 0) & (ids < num_rows), ids, num_rows)

    def of_rows(values: jax.Array, padding: jax.Array) -> jax.Array:
        return jnp.where(is_row.reshape(-1, *[1] * (values.ndim - 1)), values, padding)

    def gather(array: jax.Array, leaf: RowLeaf) -> jax.Array:
        if not leaf.is_row:
            return array
        values = indexing.take(array, place)
        if _is_narrow(leaf, dtype):
            values = rounding.decode_float(
                values.astype(jnp.uint32), rounding.FLOAT_FORMATS["bfloat16"]
            )
        # For padding, `take` returns the state of some real row. An update from that state would
        # change norms over all rows, so padding gets the initial state.
        return values if is_local else of_rows(values, jnp.asarray(leaf.initial))

    gathered = treedef.unflatten([gather(a, leaf) for a, leaf in zip(held, leaves, strict=True)])

    def update(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        rows, old_state = carry
        own_grads = jnp.where(is_row[:, None], row_grads, jnp.float32(0))
        own_rows = rows if is_local else of_rows(rows, jnp.float32(0))
        updates, new_state = over_all_rows(own_grads, old_state, own_rows)
        new_state = jax.tree.map(
            lambda new, old: jnp.asarray(new).astype(old.dtype), new_state, old_state
        )
        return rows + rounding.apart(updates.astype(jnp.float32), step), new_state

    new_rows, new_state = carries.at_most_once(
        update, is_applied.astype(jnp.int32), (rows, gathered)
    )

    def scatter(index: int, array: jax.Array, leaf: RowLeaf, value: jax.Array) -> jax.Array:
        if not leaf.is_row:
            return value
        if _is_narrow(leaf, dtype):
            columns = int(np.prod(leaf.shape))
            bits = random_bits.row_bits(
                key, random_bits.ROW_STATE + index, step, place, columns
            ).reshape(value.shape)
            value = rounding.encode_float(value, rounding.FLOAT_FORMATS["bfloat16"], bits)
        return indexing.put(array, place, value.astype(array.dtype))

    scattered = [
        scatter(i, a, leaf, v)
        for i, (a, leaf, v) in enumerate(zip(held, leaves, jax.tree.leaves(new_state), strict=True))
    ]
    return new_rows, treedef.unflatten(scattered)
