"""Optimizers on rows: row-wise optax transformations, the low-precision update, and any optax transform on gathered rows.

State and updates exist for the rows of a batch only; rows absent from it keep their state (lazy semantics: no momentum
decay, no weight decay). Row-wise Adagrad follows FBGEMM's exact row-wise Adagrad, row-wise Adam its partial row-wise Adam.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import numerics

ScalarOrSchedule = Any  # a float, or a callable from the step count


class ScaleByRowwiseAdagradState(NamedTuple):
    """One accumulator per row."""

    sum_of_squares: Any  # f32 [V], for each leaf of the parameters its leading dimensions


def scale_by_rowwise_adagrad(eps: float = 1e-8, initial_accumulator_value: float = 0.0) -> optax.GradientTransformation:
    """Scales gradients by row-wise Adagrad: G += mean_d(g^2); g / (sqrt(G) + eps).

    Args:
      eps: added to the root.
      initial_accumulator_value: G before the first update.

    Returns:
      An optax transformation for parameters [.., D]; its state has one float32 per row.
    """

    def init(params: Any) -> ScaleByRowwiseAdagradState:
        return ScaleByRowwiseAdagradState(
            jax.tree.map(lambda p: jnp.full(p.shape[:-1], initial_accumulator_value, jnp.float32), params)
        )

    def update(updates: Any, state: ScaleByRowwiseAdagradState, params: Any = None) -> tuple[Any, Any]:
        del params
        total = jax.tree.map(lambda g, s: s + jnp.mean(jnp.square(g), axis=-1), updates, state.sum_of_squares)

        def scale(g: jax.Array, s: jax.Array) -> jax.Array:
            root = jnp.sqrt(s) + eps
            return g / jnp.where(root > 0, root, jnp.float32(1))[..., None]

        return jax.tree.map(scale, updates, total), ScaleByRowwiseAdagradState(total)

    return optax.GradientTransformation(init, update)


class ScaleByRowwiseAdamState(NamedTuple):
    """Full first moments, one second moment per row."""

    count: jax.Array  # i32 []
    mu: Any
    nu: Any


def scale_by_rowwise_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Scales gradients by Adam with one second moment per row, nu = b2 nu + (1 - b2) mean_d(g^2); lazy on rows.

    Bias correction counts steps, not a row's own updates, as FBGEMM's partial row-wise Adam does.
    """

    def init(params: Any) -> ScaleByRowwiseAdamState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(lambda p: jnp.zeros(p.shape[:-1], jnp.float32), params)
        return ScaleByRowwiseAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: ScaleByRowwiseAdamState, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        steps = count.astype(jnp.float32)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.mean(jnp.square(g), axis=-1), updates, state.nu)
        mu_scale, nu_scale = 1 / (1 - b1**steps), 1 / (1 - b2**steps)
        scaled = jax.tree.map(lambda m, v: m * mu_scale / (jnp.sqrt(v * nu_scale) + eps)[..., None], mu, nu)
        return scaled, ScaleByRowwiseAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _with_decay(
    scaling: optax.GradientTransformation, learning_rate: ScalarOrSchedule, weight_decay: float, decoupled: bool
) -> optax.GradientTransformation:
    parts = [scaling]
    if weight_decay:
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
    """Row-wise Adagrad, the field's default for embedding rows: G += mean_d(g^2); w -= lr * g / (sqrt(G) + eps).

    Args:
      learning_rate: a float or an optax schedule.
      eps: added to the root.
      initial_accumulator_value: G before the first update.
      weight_decay: coefficient; applied to the rows of the batch only.
      decoupled: False adds the decay to the gradient (L2), True to the scaled update (as AdamW does).

    Returns:
      An optax transformation.
    """
    scaling = scale_by_rowwise_adagrad(eps, initial_accumulator_value)
    return _with_decay(scaling, learning_rate, weight_decay, decoupled)


def rowwise_adam(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformation:
    """Adam with one second moment per row, lazy: rows absent from a batch keep their moments. Arguments as in Adam."""
    return _with_decay(scale_by_rowwise_adam(b1, b2, eps), learning_rate, weight_decay, decoupled)


def clip_by_row_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales every row's gradient down to an L2 norm of at most max_norm; stateless."""

    def clip(g: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=-1, keepdims=True))
        return g * jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, jnp.float32(1)), jnp.float32(1))

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


# --- low-precision parameters of any optax user


class StochasticRoundState(NamedTuple):
    """Key and count that name the random bits of the next update."""

    key: jax.Array  # u32 [2]
    count: jax.Array  # i32 []


def key_words(key: jax.Array) -> jax.Array:
    """Returns the uint32 [2] words of a jax key, typed or raw.

    Raises:
      TypeError: if it is neither.
    """
    if isinstance(key, jax.Array | np.ndarray) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        words = jax.random.key_data(key)
        return words if words.shape == (2,) else words[:2] ^ words[2:4]
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.shape == (2,):
        return jnp.asarray(key)
    raise TypeError(f"key must be jax.random.key(..) or uint32 [2], got {getattr(key, 'dtype', type(key).__name__)}")


def stochastic_round_updates(key: jax.Array) -> optax.GradientTransformation:
    """Makes the last link of a chain for bfloat16, float16 or float8 parameters: the new value is rounded stochastically.

    It returns SR(p + u) - p in float32, never in the parameter's dtype, so that unmodified `optax.apply_updates` lands on
    the rounded value: exactly while |new| >= 2^-15 |old|, within 2^-24 |old| otherwise. Leaves of other dtypes pass
    through. Without it, updates below half a step of the format vanish.

    Args:
      key: jax.random.key(..) or uint32 [2].

    Returns:
      An optax transformation whose update needs `params`.
    """

    def init(params: Any) -> StochasticRoundState:
        del params
        return StochasticRoundState(key_words(key), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: StochasticRoundState, params: Any = None) -> tuple[Any, StochasticRoundState]:
        if params is None:
            raise ValueError("stochastic_round_updates needs the parameters: call tx.update(grads, state, params)")
        leaves, treedef = jax.tree.flatten(updates)
        rounded = []
        for index, (u, p) in enumerate(zip(leaves, treedef.flatten_up_to(params), strict=True)):
            if u is None or p.dtype.name not in numerics.FLOAT_FORMATS:
                rounded.append(u)
                continue
            old = p.astype(jnp.float32)
            columns = max(1, p.shape[-1]) if p.ndim else 1
            rows = jnp.arange(p.size // columns, dtype=jnp.int32)
            bits = numerics.row_bits(state.key, index, state.count, rows, columns).reshape(p.shape)
            new = numerics.stochastic_round(old + u.astype(jnp.float32), p.dtype.name, bits)
            rounded.append(new - old)
        return treedef.unflatten(rounded), StochasticRoundState(state.key, state.count + 1)

    return optax.GradientTransformation(init, update)


# --- any optax transformation on gathered rows


class RowLeaf(NamedTuple):
    """What one leaf of a transformation's state is: one entry per table row, or a scalar for the whole stack."""

    is_row: bool
    shape: tuple[int, ...]  # of one row's entry
    dtype: Any
    initial: Any  # numpy value of one row's entry, or of the scalar


def row_leaves(tx: optax.GradientTransformation, embedding_dim: int) -> tuple[list[RowLeaf], Any]:
    """Classifies the state leaves of `tx`, initialized for float32 rows [V, embedding_dim].

    A leaf is accepted if it is a scalar, or has V leading entries whose initial value does not depend on the parameters.

    Returns:
      The leaves and their tree structure.

    Raises:
      TypeError: if tx is not an optax gradient transformation.
      ValueError: naming the leaf and the reason, if tx cannot work on gathered rows.
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"tx must be an optax gradient transformation such as optim.rowwise_adagrad(0.05), got {type(tx).__name__}"
        )
    small, large = 5, 7  # two sizes no usual state dimension equals: what changes with them is a row dimension

    def initial(rows: int, fill: float) -> Any:
        with jax.ensure_compile_time_eval():
            return jax.tree.map(np.asarray, tx.init(jnp.full((rows, embedding_dim), fill, jnp.float32)))

    state = initial(small, 0.0)
    for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.MultiStepsState)):
        if isinstance(node, optax.MultiStepsState):
            raise ValueError(
                "optax.MultiSteps accumulates dense gradients of the whole table; accumulate batches instead"
            )
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    larger, filled = jax.tree.leaves(initial(large, 0.0)), jax.tree.leaves(initial(small, 3.7))
    leaves = []
    for (path, leaf), other, moved in zip(paths, larger, filled, strict=True):
        name = jax.tree_util.keystr(path) or "the state"
        is_row = leaf.ndim >= 1 and leaf.shape[0] == small and other.shape == (large, *leaf.shape[1:])
        if not is_row and leaf.ndim:
            raise ValueError(
                f"optimizer state leaf {name} of shape {leaf.shape} (for {small} rows of dim {embedding_dim}) is neither "
                f"one entry per row nor a scalar, so it cannot be kept by row; use for example optim.rowwise_adagrad, "
                f"optax.adagrad, optax.adam or optax.sgd"
            )
        if moved.shape != leaf.shape or not np.array_equal(moved, leaf):
            raise ValueError(
                f"optimizer state leaf {name} starts from the parameters' values; only states that start from a "
                f"constant can be kept by row without a float32 copy of the table"
            )
        if is_row and leaf.size and not (leaf == leaf[0]).all():
            raise ValueError(
                f"optimizer state leaf {name} starts differently for different rows, which is not supported"
            )
        leaves.append(RowLeaf(is_row, leaf.shape[1:] if is_row else (), leaf.dtype, leaf[0] if is_row else leaf))
    return leaves, treedef


def _is_narrow(leaf: RowLeaf, dtype: str) -> bool:
    return leaf.is_row and dtype == "bfloat16" and leaf.dtype == np.float32


def init_rows(tx: optax.GradientTransformation, num_rows: int, embedding_dim: int, dtype: str) -> Any:
    """Makes the row state of a stack: the tree of tx's state, float32 row leaves in bfloat16 bit patterns (uint16) if asked.

    Args:
      tx: the transformation.
      num_rows: V.
      embedding_dim: D.
      dtype: "float32" or "bfloat16".

    Returns:
      A pytree; row leaves have leading dimension V.
    """
    leaves, treedef = row_leaves(tx, embedding_dim)

    def make(leaf: RowLeaf) -> jax.Array:
        if not leaf.is_row:
            return jnp.asarray(leaf.initial)
        value = jnp.asarray(leaf.initial)
        if _is_narrow(leaf, dtype):
            value = numerics.encode_float(value, numerics.FLOAT_FORMATS["bfloat16"], None).astype(jnp.uint16)
        return jnp.broadcast_to(value, (num_rows, *leaf.shape))

    return treedef.unflatten([make(leaf) for leaf in leaves])


def update_rows(
    tx: optax.GradientTransformation,
    row_state: Any,
    ids: jax.Array,
    rows: jax.Array,
    row_grads: jax.Array,
    dtype: str,
    key: jax.Array,
    step: jax.Array,
    is_applied: jax.Array,
) -> tuple[jax.Array, Any]:
    """Updates gathered rows and their optimizer state.

    Args:
      tx: the transformation that `row_state` was made for.
      row_state: see `init_rows`.
      ids: int32 [U]; entries that are not ids of the table keep no state.
      rows: float32 [U, D].
      row_grads: float32 [U, D], summed per row.
      dtype: storage of the row state.
      key: uint32 [2].
      step: int32 scalar.
      is_applied: bool scalar; False leaves scalars (schedule counts) where they are.

    Returns:
      New rows [U, D] and the row state.

    Raises:
      ValueError: if row_state was made for another transformation.
    """
    leaves, treedef = row_leaves(tx, rows.shape[1])
    held, held_def = jax.tree.flatten(row_state)
    wide = [jnp.uint16 if _is_narrow(leaf, dtype) else leaf.dtype for leaf in leaves]
    is_same = held_def == treedef and all(
        a.dtype == d and a.shape[1 if leaf.is_row else 0 :] == leaf.shape
        for a, d, leaf in zip(held, wide, leaves, strict=True)
    )
    if not is_same:
        raise ValueError(
            f"tx does not match the row state: init was called with a transformation whose state is {held_def} "
            f"{[a.shape for a in held]}, this one's is {treedef}; pass the same tx to init and apply_gradients"
        )
    num_rows = next((a.shape[0] for a, leaf in zip(held, leaves, strict=True) if leaf.is_row), 0)
    is_row_id = (ids >= 0) & (ids < num_rows)
    place = jnp.where(is_row_id, ids, num_rows)

    def gather(array: jax.Array, leaf: RowLeaf) -> jax.Array:
        if not leaf.is_row:
            return array
        values = array.at[place].get(mode="clip")
        if _is_narrow(leaf, dtype):
            return numerics.decode_float(values.astype(jnp.uint32), numerics.FLOAT_FORMATS["bfloat16"])
        return values

    gathered = treedef.unflatten([gather(a, leaf) for a, leaf in zip(held, leaves, strict=True)])
    updates, new_state = tx.update(row_grads, gathered, rows)

    def scatter(index: int, array: jax.Array, leaf: RowLeaf, value: jax.Array) -> jax.Array:
        if not leaf.is_row:
            return jnp.where(is_applied, value, array).astype(array.dtype)
        if _is_narrow(leaf, dtype):
            columns = int(np.prod(leaf.shape))
            bits = numerics.row_bits(key, numerics.ROW_STATE + index, step, place, columns).reshape(value.shape)
            value = numerics.encode_float(value, numerics.FLOAT_FORMATS["bfloat16"], bits)
        return array.at[place].set(value.astype(array.dtype), mode="drop")

    scattered = [
        scatter(i, a, leaf, v)
        for i, (a, leaf, v) in enumerate(zip(held, leaves, jax.tree.leaves(new_state), strict=True))
    ]
    return rows + updates.astype(jnp.float32), treedef.unflatten(scattered)
