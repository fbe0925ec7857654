"""Tests for optimizers that treat each row independently of the others, and for those that do not.

The first test inspects the jaxpr of an optax update. Row-local transformations (SGD, Adagrad, Adam
and their row-wise variants) give the same values when a batch's rows are updated in parts. A
transformation that mixes rows, such as clipping by the global norm, needs all rows of the batch at
once. It sees them in any order, with rows of zeros between them. The second test is whether it
gives the same updates then.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_ELEMENTWISE = frozenset(
    """
    abs add add_any and cbrt ceil clamp convert_element_type copy cos cosh div eq erf exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905  one name per line would hide that this is a list of names
)
_REDUCTIONS = frozenset(
    ["argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"]
)
_ROWS = 7919  # a prime that other dimensions are unlikely to equal


def is_row_local(tx: optax.GradientTransformation, embedding_dim: int) -> bool:
    """Whether each row's update depends only on that row, its gradient and state, and scalars.

    True is a proof. False may also mean that the transformation uses an operation this analysis
    does not know.

    Args:
      tx: an optax transformation.
      embedding_dim: D.
    """
    if not callable(getattr(tx, "update", None)):
        # Not an optax transformation. The caller that applies it raises an error.
        return False
    rows = jax.ShapeDtypeStruct((_ROWS, embedding_dim), jnp.float32)
    traced = jax.make_jaxpr(tx.update)(rows, jax.eval_shape(tx.init, rows), rows)
    return embedding_dim != _ROWS and not traced.consts and _keeps_rows_apart(traced.jaxpr)


def check_mixing(tx: optax.GradientTransformation, embedding_dim: int) -> None:
    """Checks that updates depend neither on the order of the rows nor on rows of zeros among them.

    Two steps of five rows with random gradients are compared with the same steps of ten shuffled
    rows, of which five are zero.

    Args:
      tx: an optax transformation that `row_state.row_leaves` accepts.
      embedding_dim: D.

    Raises:
      ValueError: if they do.
    """
    rng = np.random.default_rng(0)
    place = np.array([7, 2, 9, 4, 0])
    few = rng.normal(size=(3, 5, embedding_dim)).astype(np.float32)
    many = np.zeros((3, 10, embedding_dim), np.float32)
    many[:, place] = few

    def updates(arrays: np.ndarray) -> list[np.ndarray]:
        rows, found = jnp.asarray(arrays[0]), []
        state = tx.init(rows)
        for row_grads in arrays[1:]:
            step, state = tx.update(jnp.asarray(row_grads), state, rows)
            rows = rows + step
            found.append(np.asarray(step))
        return found

    with jax.ensure_compile_time_eval():
        alone, among = updates(few), updates(many)
    for one, other in zip(alone, among, strict=True):
        # The sums that mix rows are rounded in another order.
        if not np.allclose(one, other[place], rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                "tx mixes rows in a way that depends on their order or on how many rows of zeros "
                "pad a batch, as a mean over rows does; use sums and norms over rows (such as "
                "optax.clip_by_global_norm) or what treats each row by itself (such as "
                "optim.clip_by_row_norm)"
            )


def _has_rows(variable: Any) -> bool:
    return _ROWS in variable.aval.shape


def _keeps_rows_apart(jaxpr: Any) -> bool:
    """Whether row i of every value depends only on row i of the inputs; rows are dimension 0."""
    return all(_is_local(eqn) for eqn in jaxpr.eqns)


def _is_local(eqn: Any) -> bool:
    if any(_ROWS in v.aval.shape[1:] for v in eqn.outvars):
        return False
    operands = [v for v in eqn.invars if _has_rows(v)]
    name, params = eqn.primitive.name, eqn.params
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None:
        return name in (
            "jit",
            "pjit",
            "closed_call",
            "custom_jvp_call",
            "remat",
        ) and _keeps_rows_apart(getattr(inner, "jaxpr", inner))
    if name == "broadcast_in_dim":
        return not operands or (
            params["broadcast_dimensions"][0] == 0 and params["shape"][0] == _ROWS
        )
    # A value computed from scalars is the same for every row, unless an iota counts the rows.
    if not operands:
        return name != "iota" or not _has_rows(eqn.outvars[0]) or params["dimension"] != 0
    if name in _ELEMENTWISE:
        return True
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "reshape":
        return params["dimensions"] is None and params["new_sizes"][0] == _ROWS
    if name == "squeeze":
        return 0 not in params["dimensions"]
    return False
