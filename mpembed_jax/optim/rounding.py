"""An optax transformation that rounds updates of low-precision parameters stochastically.

It is the last link of an optax chain and works for the parameters of any model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpembed_jax.numerics import random_bits, rounding
from mpembed_jax.numerics.random_bits import key_words


class StochasticRoundState(NamedTuple):
    """The key and count that determine the random bits of the next update."""

    key: jax.Array  # u32 [2]
    count: jax.Array  # type: ignore[assignment]  # i32 [], the name that optax uses


def stochastic_round_updates(key: jax.Array) -> optax.GradientTransformation:
    """Makes the last link of a chain for bfloat16 or float16 parameters; it rounds stochastically.

    The update is SR(p + u) - p, where SR rounds to the parameter's dtype. It is float32, never in
    the parameter's dtype, so that an unmodified `optax.apply_updates` yields the rounded value. The
    result is exact if |new| >= 2^-15 |old|, and otherwise within 2^-24 |old|. Leaves of other
    dtypes pass through unchanged. Without this link, updates smaller than half a step of the format
    are lost.

    Some wrappers choose by lax.cond between a transformation's result and other updates, such as
    optax.apply_if_finite and optax.conditionally_mask. Put them inside the chain. If they are
    around the chain, lax.cond raises a TypeError: the chain's updates are float32, and the other
    updates have the dtype of the gradients. Write:

      `optax.chain(optax.apply_if_finite(optax.sgd(0.1), 3), stochastic_round_updates(key))`

    Args:
      key: jax.random.key(..) or uint32 [2].

    Returns:
      An optax transformation. Its update raises ValueError if it gets no `params`.

    Raises:
      TypeError: if key is not a key.
    """

    key_words(key)  # raises an error if this is not a key

    def init(params: Any) -> StochasticRoundState:
        del params
        return StochasticRoundState(key_words(key), jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: StochasticRoundState, params: Any = None
    ) -> tuple[Any, StochasticRoundState]:
        if params is None:
            raise ValueError(
                "stochastic_round_updates needs the parameters: call tx.update(grads, state, "
                "params)"
            )
        treedef: Any
        leaves, treedef = jax.tree.flatten(updates)
        rounded = []
        for index, (u, p) in enumerate(zip(leaves, treedef.flatten_up_to(params), strict=True)):
            if u is None or p.dtype.name not in rounding.FLOAT_FORMATS:
                rounded.append(u)
                continue
            old = p.astype(jnp.float32)
            columns = max(1, p.shape[-1]) if p.ndim else 1
            rows = jnp.arange(p.size // columns, dtype=jnp.int32)
            bits = random_bits.row_bits(state.key, index, state.count, rows, columns).reshape(
                p.shape
            )
            new = rounding.stochastic_round(old + u.astype(jnp.float32), p.dtype.name, bits)
            rounded.append(new - old)
        return treedef.unflatten(rounded), StochasticRoundState(state.key, state.count + 1)

    return optax.GradientTransformation(init, update)
