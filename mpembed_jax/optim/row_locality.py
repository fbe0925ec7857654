"""Row locality: tests whether an optimizer or an initializer treats each row by itself.

The static test inspects the jaxpr of an optax update. Row-local transformations (SGD, Adagrad, Adam
and their row-wise variants) give the same values when a batch's rows are updated in parts. An
initializer is tested in the same way: a table may be made in parts if its rows are drawn
independently.

A transformation that mixes rows, such as clipping by the global norm, needs all rows of the batch
at once. It sees them in any order, with rows of zeros between them. `check_mixing` tries an
example: in another order and with rows of zeros, the updates must stay the same. Numbers that the
transformation keeps for the whole stack must not depend on the state of rows, because a step has
only the state of its own rows.

On a CPU, updates in parts halve the time of a whole step: from 45 to 23 ms with optax.adam and from
34 to 18 ms with optax.adagrad (two cores, 53,248 ids, D = 64, INT8 + 5 %).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_ELEMENTWISE = frozenset(
    """
    abs add add_any and bitcast_convert_type cbrt ceil clamp convert_element_type copy cos cosh div
    eq erf erf_inv exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min
    mul ne neg nextafter not or pow reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    xor
    """.split()  # noqa: SIM905  one name per line would hide that this is a list of names
)
_REDUCTIONS = frozenset(
    ["argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"]
)
ROWS = 7919  # a prime that other dimensions are unlikely to equal


@contextlib.contextmanager
def evaluated() -> Iterator[None]:
    """A context in which operations run immediately, even while a function is traced.

    The arrays of the context are concrete. The mesh of jax.set_mesh does not apply to them: inside
    jax.shard_map, it would not accept concrete arrays. A user's transfer guard does not apply to
    them either. jax.ensure_compile_time_eval would give tracers inside a jax.shard_map without jit.
    """
    no_mesh = jax.sharding.AbstractMesh((), ())
    with (
        jax.core.eval_context(),
        jax.transfer_guard("allow"),
        jax.sharding.use_abstract_mesh(no_mesh),
    ):
        yield


def is_row_local(tx: optax.GradientTransformation, embedding_dim: int) -> bool:
    """Returns whether a row's update depends only on its row, gradient and state, and on scalars.

    True is a proof. False may also mean that the transformation uses an operation this analysis
    does not know.

    Args:
      tx: an optax transformation.
      embedding_dim: D.
    """
    if not callable(getattr(tx, "update", None)):
        # This is not an optax transformation. The code that applies it raises an error.
        return False
    rows = jax.ShapeDtypeStruct((ROWS, embedding_dim), jnp.float32)
    traced = jax.make_jaxpr(tx.update)(rows, jax.eval_shape(tx.init, rows), rows)
    return embedding_dim != ROWS and not traced.consts and _keeps_rows_apart(traced.jaxpr)


def draws_rows_apart(traced: Any) -> bool:
    """Returns whether an initializer draws each of its ROWS rows independently and in the same way.

    True is a proof, see `is_row_local`.

    Args:
      traced: ClosedJaxpr of the initializer as a function of a key, for ROWS rows.
    """
    (result,) = traced.jaxpr.outvars
    is_computed = _has_rows(result) and not is_literal(result) and not traced.consts
    return is_computed and _keeps_rows_apart(traced.jaxpr, True)


def inner_of(eqn: Any) -> Any:
    """Returns the jaxpr that an equation calls with its operands, or None."""
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    return getattr(inner, "jaxpr", inner)


def is_literal(atom: Any) -> bool:
    """Returns whether an operand is a number, or an array, written into the jaxpr."""
    return hasattr(atom, "val")


def check_mixing(tx: optax.GradientTransformation, embedding_dim: int) -> None:
    """Checks that updates depend neither on the order of the rows nor on rows of zeros among them.

    It runs two steps on five rows with random gradients. It repeats them on ten rows: the same
    five, shuffled, and five rows of zeros. The updates must agree. It also repeats the second step
    with the values of the rows and of their state doubled. The scalars of the state must agree.

    Args:
      tx: an optax transformation that `row_state.row_leaves` accepts.
      embedding_dim: D.

    Raises:
      ValueError: if the updates depend on either, or if a scalar depends on rows or their state.
    """
    rng = np.random.default_rng(0)
    place = np.array([7, 2, 9, 4, 0])
    few = rng.normal(size=(3, 5, embedding_dim)).astype(np.float32)
    many = np.zeros((3, 10, embedding_dim), np.float32)
    many[:, place] = few

    def updates(arrays: np.ndarray) -> list[np.ndarray]:
        rows = jnp.asarray(arrays[0])
        found = []
        state = tx.init(rows)
        for row_grads in arrays[1:]:
            step, state = tx.update(jnp.asarray(row_grads), state, rows)
            rows = rows + step
            found.append(np.asarray(step))
        return found

    with evaluated():
        alone, among = updates(few), updates(many)
    for one, other in zip(alone, among, strict=True):
        # Sums over rows add in another order, so their rounding differs.
        if not np.allclose(one, other[place], rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                "tx mixes rows in a way that depends on their order or on how many rows of zeros "
                "pad a batch, as a mean over rows does; use sums and norms over rows (such as "
                "optax.clip_by_global_norm) or what treats each row by itself (such as "
                "optim.clip_by_row_norm)"
            )
    with evaluated():
        _check_scalars(tx, few)


def _check_scalars(tx: optax.GradientTransformation, arrays: np.ndarray) -> None:
    """Checks that the scalars of tx's state depend on gradients alone.

    Args:
      tx: as for `check_mixing`.
      arrays: float32 [3, n, D]: rows, and their gradients in two steps.

    Raises:
      ValueError: if they depend on rows or on the state of rows.
    """
    rows, first, second = map(jnp.asarray, arrays)
    _, state = tx.update(first, tx.init(rows), rows)

    def scalars(factor: int) -> list[tuple[Any, np.ndarray]]:
        def scaled(leaf: Any) -> Any:
            is_row = jnp.ndim(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
            return jnp.float32(factor) * leaf if is_row else leaf

        _, after = tx.update(second, jax.tree.map(scaled, state), scaled(rows))
        leaves = jax.tree_util.tree_leaves_with_path(after)
        return [(path, np.asarray(leaf)) for path, leaf in leaves if not jnp.ndim(leaf)]

    for (path, one), (_, other) in zip(scalars(1), scalars(2), strict=True):
        if not np.allclose(one, other, rtol=1e-3, atol=0, equal_nan=True):
            raise ValueError(
                f"tx keeps one number, {jax.tree_util.keystr(path)}, that depends on the values or "
                "the state of all rows, but a step has only those of its batch; use a learning "
                "rate that is given, such as optim.rowwise_adagrad(0.05)"
            )


def _has_rows(variable: Any) -> bool:
    return ROWS in variable.aval.shape


def _keeps_rows_apart(jaxpr: Any, is_drawn: bool = False) -> bool:
    """Returns whether row i of every value depends only on row i of the inputs.

    Rows are dimension 0. If is_drawn, random numbers may be drawn for all rows.
    """
    return all(_is_local(eqn, is_drawn) for eqn in jaxpr.eqns)


def _is_local(eqn: Any, is_drawn: bool) -> bool:
    if any(ROWS in v.aval.shape[1:] for v in eqn.outvars):
        return False
    if any(is_literal(v) and np.shape(v.val) for v in eqn.invars):
        return False  # the array may hold a value for each row
    operands = [v for v in eqn.invars if _has_rows(v)]
    name = eqn.primitive.name
    params = eqn.params
    inner = inner_of(eqn)
    if inner is not None:
        is_called = name in ("jit", "pjit", "closed_call", "custom_jvp_call", "remat")
        is_closed = not inner.constvars
        return is_called and is_closed and _keeps_rows_apart(inner, is_drawn)
    if name == "random_bits":
        return is_drawn and _has_rows(eqn.outvars[0])  # a draw without a row axis is shared by rows
    if name == "broadcast_in_dim":
        return not operands or (
            params["broadcast_dimensions"][0] == 0 and params["shape"][0] == ROWS
        )
    # A value computed from scalars alone is equal in all rows, except an iota along them.
    if not operands:
        is_iota = name == "iota" and params["dimension"] != 0
        return is_iota or not any(_has_rows(v) for v in eqn.outvars)
    if name in _ELEMENTWISE:
        return True
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "reshape":
        return params["dimensions"] is None and params["new_sizes"][0] == ROWS
    if name == "slice":
        strides = params["strides"] or (1,)
        whole = (params["start_indices"][0], params["limit_indices"][0], strides[0])
        return whole == (0, ROWS, 1)
    if name == "pad":
        return params["padding_config"][0] == (0, 0, 0) and not _has_rows(eqn.invars[1])
    if name == "squeeze":
        return 0 not in params["dimensions"]
    return False
