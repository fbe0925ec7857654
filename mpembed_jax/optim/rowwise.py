"""Row-wise optax transformations: SGD, Adagrad, Adam, and clipping by row norm.

A step updates only the rows of its batch and their state. All other rows keep their values and
their state (lazy semantics): their momentum does not decay, and they get no weight decay. Row-wise
Adagrad follows FBGEMM's exact row-wise Adagrad. Row-wise Adam follows FBGEMM's partial row-wise
Adam.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mpembed_jax.arrays import indexing

ScalarOrSchedule = Any  # a float, or a function of the step count


@dataclasses.dataclass(frozen=True)
class RowRule:
    """A transformation's update of one row, in a form that a kernel can run.

    The update is w -= learning_rate * g / divisor. If `has_sums`, the state has one sum G per row.
    The update first adds mean_d(g^2) to G. The divisor is then sqrt(G) + eps. Without sums, the
    divisor is 1.
    """

    learning_rate: float
    has_sums: bool
    eps: float = 0.0


@dataclasses.dataclass(frozen=True)
class RuledUpdate:
    """An optax update function, with the rule that describes its update.

    The rule belongs to the function, not to the pair (init, update). A copy of the pair, or a new
    pair with this function, therefore has the rule. A pair with another function does not.
    """

    update: Callable
    rule: RowRule

    def __call__(self, updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        """Returns the updates and the new state, as optax does."""
        return self.update(updates, state, params)


def rule_of(tx: optax.GradientTransformation) -> RowRule | None:
    """Returns the rule of `tx`, or None if `tx` has no rule.

    A user's chain of several transformations, for example, has no rule. Without a rule, only plain
    XLA can run the update.

    Raises:
      TypeError: if tx is not an optax transformation.
    """
    update = getattr(tx, "update", None)
    if update is None:
        raise TypeError(
            "tx must be an optax gradient transformation such as optim.rowwise_adagrad(0.05), got "
            f"{type(tx).__name__}"
        )
    return update.rule if isinstance(update, RuledUpdate) else None


def _with_rule(
    tx: optax.GradientTransformation, learning_rate: Any, has_sums: bool, eps: Any = 0.0
) -> optax.GradientTransformation:
    """Returns `tx` with a rule, or `tx` itself if a number is traced or the rate is a schedule."""
    if callable(learning_rate) or any(isinstance(x, jax.core.Tracer) for x in (learning_rate, eps)):
        return tx
    rule = RowRule(float(learning_rate), has_sums, float(eps))
    return optax.GradientTransformation(tx.init, RuledUpdate(tx.update, rule))


def _check_rate(learning_rate: Any) -> None:
    if not callable(learning_rate):
        _check_numbers("a number or an optax schedule", learning_rate=learning_rate)


def _check_numbers(wanted: str = "a number", **values: Any) -> None:
    """Raises TypeError if a value is not a number. A number may be traced."""
    for name, value in values.items():
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be {wanted}, got {value!r}")


def sgd(learning_rate: ScalarOrSchedule) -> optax.GradientTransformation:
    """Stochastic gradient descent, w -= lr * g, like optax.sgd without momentum.

    If the learning rate is a number that is not traced, kernels can run the update.

    Args:
      learning_rate: a float or an optax schedule.

    Returns:
      An optax transformation.
    """
    _check_rate(learning_rate)
    return _with_rule(optax.sgd(learning_rate), learning_rate, False)


class ScaleByRowwiseAdagradState(NamedTuple):
    """One accumulator per row."""

    # For each leaf of the parameters, f32 with the leaf's shape without the last axis. For a table
    # [V, D], this is f32 [V].
    sum_of_squares: Any


def mean_of_squares(g: jax.Array) -> jax.Array:
    """Returns the mean of g^2 over the last axis. The result has the same bits in every program.

    XLA's own reduction does not have this property. Its order depends on the vector length of the
    processor and on the other dimensions. XLA also contracts a multiplication and an addition into
    one operation that rounds once. Here, the squares are padded with zeros to a power of two of at
    least 8 and summed by halves: the upper half is added to the lower half until one number is
    left. The mean is the sum times 1 / D. Each operation is rounded on its own.

    Args:
      g: float [.., D].

    Returns:
      float [..].
    """
    dim = g.shape[-1]
    squares = _rounded(jnp.square(g))
    half = max(8, indexing.ceil_power(dim)) // 2
    while half:
        lower, upper = squares[..., :half], squares[..., half:]
        missing = lower.shape[-1] - upper.shape[-1]
        upper = jnp.pad(upper, [(0, 0)] * (g.ndim - 1) + [(0, missing)]) if missing else upper
        squares, half = lower + upper, half // 2
    return _rounded(squares[..., 0] * jnp.asarray(1 / dim, g.dtype))


def _rounded(x: jax.Array) -> jax.Array:
    """Returns x, a product that is not negative, in a form that XLA cannot contract with a sum."""
    if x.dtype != jnp.float32:
        return x
    # The sign bit of x is 0, so clearing it does not change x. But the extra operation separates
    # the multiplication from a later addition.
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    return lax.bitcast_convert_type(bits, jnp.float32)


def scale_by_rowwise_adagrad(
    eps: float = 1e-8, initial_accumulator_value: float = 0.0
) -> optax.GradientTransformation:
    """Scales gradients by row-wise Adagrad: G += mean_d(g^2), then g becomes g / (sqrt(G) + eps).

    Args:
      eps: added to the square root.
      initial_accumulator_value: G before the first update.

    Returns:
      An optax transformation for parameters [.., D]. Its state has one float32 per row.

    Raises:
      TypeError: if an argument is not a number.
    """
    _check_numbers(eps=eps, initial_accumulator_value=initial_accumulator_value)

    def init(params: Any) -> ScaleByRowwiseAdagradState:
        return ScaleByRowwiseAdagradState(
            jax.tree.map(
                lambda p: jnp.full(p.shape[:-1], initial_accumulator_value, jnp.float32), params
            )
        )

    def update(
        updates: Any, state: ScaleByRowwiseAdagradState, params: Any = None
    ) -> tuple[Any, Any]:
        del params
        total = jax.tree.map(lambda g, s: s + mean_of_squares(g), updates, state.sum_of_squares)

        def scale(g: jax.Array, s: jax.Array) -> jax.Array:
            root = jnp.sqrt(s) + eps
            return g * (1 / jnp.where(root > 0, root, jnp.float32(1)))[..., None]

        return jax.tree.map(scale, updates, total), ScaleByRowwiseAdagradState(total)

    return optax.GradientTransformation(init, update)


class ScaleByRowwiseAdamState(NamedTuple):
    """One first moment per element of a row, and one second moment per row."""

    count: jax.Array  # type: ignore[assignment]  # i32 []: steps; optax uses this name, too
    mu: Any
    nu: Any


def scale_by_rowwise_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Scales gradients by Adam with one second moment per row: nu = b2 nu + (1 - b2) mean_d(g^2).

    Rows that are not in a batch keep their moments. Bias correction uses the number of steps, not
    the number of updates of the row. FBGEMM's partial row-wise Adam does the same.

    Args:
      b1: decay of the first moment, which has D entries per row.
      b2: decay of the second moment, which has one float32 per row.
      eps: added to the square root of the second moment.

    Returns:
      An optax transformation for parameters [.., D].

    Raises:
      TypeError: if an argument is not a number.
    """
    _check_numbers(b1=b1, b2=b2, eps=eps)

    def init(params: Any) -> ScaleByRowwiseAdamState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(lambda p: jnp.zeros(p.shape[:-1], jnp.float32), params)
        return ScaleByRowwiseAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: ScaleByRowwiseAdamState, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        steps = count.astype(jnp.float32)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(
            lambda g, v: b2 * v + (1 - b2) * jnp.mean(jnp.square(g), axis=-1), updates, state.nu
        )
        mu_scale, nu_scale = 1 / (1 - b1**steps), 1 / (1 - b2**steps)
        scaled = jax.tree.map(
            lambda m, v: m * mu_scale / (jnp.sqrt(v * nu_scale) + eps)[..., None], mu, nu
        )
        return scaled, ScaleByRowwiseAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _is_given(weight_decay: Any) -> bool:
    """Returns whether there is decay. An array (of optax.inject_hyperparams) counts as decay."""
    return isinstance(weight_decay, jax.Array) or bool(weight_decay)


def _with_decay(
    scaling: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: float,
    decoupled: bool,
) -> optax.GradientTransformation:
    _check_rate(learning_rate)
    _check_numbers(weight_decay=weight_decay)
    parts = [scaling]
    if _is_given(weight_decay):
        parts.insert(1 if decoupled else 0, optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def rowwise_adagrad(
    learning_rate: ScalarOrSchedule,
    eps: float = 1e-8,
    initial_accumulator_value: float = 0.0,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformation:
    """Row-wise Adagrad, the usual optimizer for embedding rows.

    The update is G += mean_d(g^2); w -= lr * g / (sqrt(G) + eps).

    Args:
      learning_rate: a float or an optax schedule.
      eps: added to the square root.
      initial_accumulator_value: G before the first update.
      weight_decay: coefficient of the decay, which applies only to the rows of the batch.
      decoupled: False adds the decay to the gradient (L2 regularization). True adds it to the
        scaled update (as AdamW does).

    Returns:
      An optax transformation.
    """
    scaling = scale_by_rowwise_adagrad(eps, initial_accumulator_value)
    tx = _with_decay(scaling, learning_rate, weight_decay, decoupled)
    return tx if _is_given(weight_decay) else _with_rule(tx, learning_rate, True, eps)


def rowwise_adam(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformation:
    """Row-wise Adam. Rows that are not in a batch keep their moments.

    Args:
      learning_rate: a float or an optax schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: coefficient of the decay, which applies only to the rows of the batch.
      decoupled: False adds the decay to the gradient (L2 regularization). True adds it to the
        scaled update (as AdamW does).

    Returns:
      An optax transformation.
    """
    return _with_decay(scale_by_rowwise_adam(b1, b2, eps), learning_rate, weight_decay, decoupled)


def clip_by_row_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales each row's gradient down to an L2 norm of at most max_norm.

    The transformation has no state.

    Raises:
      TypeError: if max_norm is not a number.
      ValueError: if max_norm is negative.
    """
    _check_numbers(max_norm=max_norm)
    if isinstance(max_norm, int | float) and max_norm < 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")

    def clip(g: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=-1, keepdims=True))
        return g * jnp.where(
            norm > max_norm, max_norm / jnp.where(norm > 0, norm, jnp.float32(1)), jnp.float32(1)
        )

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def transformation_of(rule: RowRule) -> optax.GradientTransformation:
    """Returns the transformation that makes the update described by `rule`.

    Raises:
      TypeError: if rule is not a RowRule.
    """
    if not isinstance(rule, RowRule):
        raise TypeError(
            f"transformation_of(rule): rule must be a RowRule, got {type(rule).__name__}"
        )
    if rule.has_sums:
        return rowwise_adagrad(rule.learning_rate, rule.eps)
    return sgd(rule.learning_rate)
