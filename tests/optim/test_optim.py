"""Optimizers on rows equal dense training of touched rows.

What cannot be kept by row is refused. Rounding is unbiased.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import training
from cases import named

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, optim
from mpembed_jax.optim.row_state import init_rows, update_rows

NUM_ROWS, DIM, STEPS = 24, 4, 6
APPLY_UPDATES = pytest.mark.standard_promotion(
    "optax.apply_updates adds float32 updates to narrow parameters"
)


def batches(seed=0, steps=STEPS, width=10, num_rows=20):
    """Ids with duplicates and padding, and a gradient for each position.

    The last rows of the table are never touched.
    """
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.15, (steps, width)) - 1, num_rows - 1).astype(np.int32)
    ids[:, -2] = NO_ID
    return ids, rng.normal(size=(steps, width, DIM)).astype(np.float32)


def stack(*, num_rows=NUM_ROWS, dim=DIM, storage="float32", cache=None, **options):
    return EmbeddingSpec(TableSpec("t", num_rows), dim, storage=storage, cache=cache, **options)


def step_of(tx):
    """One jitted step; `grads` are the gradients of the positions' vectors."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, ids, grads):
        return training.step(state, ids, tx, training.of_vectors(grads)).state

    return step


def summed(ids, grads, num_rows=NUM_ROWS):
    total = np.zeros((num_rows, grads.shape[-1]), np.float32)
    for i, g in zip(ids, grads, strict=True):
        if i != NO_ID:
            total[i] += g
    return total


def lazy_dense_step(tx):
    """The oracle puts the whole table through tx.

    Then rows absent from the batch get their old values and state back.
    """

    @jax.jit
    def step(table, tx_state, total, is_touched):
        updates, moved = tx.update(total, tx_state, table)

        def keep(new, old):
            if jnp.ndim(new) == 0 or new.shape[0] != table.shape[0]:
                return new
            return jnp.where(is_touched.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return keep(optax.apply_updates(table, updates), table), jax.tree.map(keep, moved, tx_state)

    return step


def decaying(init_value):
    return optax.exponential_decay(init_value, 2, 0.7)


TRANSFORMATIONS = {
    "sgd": lambda: optax.sgd(0.1),
    "sgd momentum scheduled": lambda: optax.sgd(decaying(0.1), momentum=0.9, nesterov=True),
    "rmsprop centered momentum": lambda: optax.rmsprop(
        0.05, centered=True, momentum=0.5, initial_scale=0.1
    ),
    "chain of global norm and adam": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(decaying(0.05))
    ),
    "chain of global norm, decay and sgd": lambda: optax.chain(  # its state has no row leaves
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.5), optax.sgd(0.1)
    ),
    "chain of row norm and adagrad": lambda: optax.chain(
        optim.clip_by_row_norm(0.5), optax.adagrad(0.1)
    ),
    "injected hyperparameters": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=decaying(0.05), b1=0.8
    ),
    "decay in the gradient": lambda: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
    ),
    "decoupled decay": lambda: optax.adamw(0.05, weight_decay=0.1),
    "rowwise adagrad": lambda: optim.rowwise_adagrad(decaying(0.1), weight_decay=0.1),
    "rowwise adam": lambda: optim.rowwise_adam(0.05, weight_decay=0.1),
    "injected sgd": lambda: optax.inject_hyperparams(optim.sgd)(learning_rate=decaying(0.1)),
    "injected rowwise adagrad": lambda: optax.inject_hyperparams(optim.rowwise_adagrad)(
        learning_rate=0.1
    ),
    "injected rowwise adam": lambda: optax.inject_hyperparams(optim.rowwise_adam)(
        learning_rate=0.1, weight_decay=0.1, decoupled=True
    ),
    "partition": lambda: optax.partition({"a": optax.sgd(0.1, momentum=0.9)}, "a"),
    "masked in every second step": lambda: optax.chain(
        optax.conditionally_mask(optax.trace(0.9), lambda step: step % 2 == 0), optax.sgd(0.1)
    ),
    "apply if finite": lambda: optax.apply_if_finite(optax.adagrad(0.1), 3),
    "novograd": lambda: optax.novograd(0.05),
    "injected row norm": lambda: optax.chain(
        optax.inject_hyperparams(optim.clip_by_row_norm)(max_norm=0.5), optim.sgd(0.1)
    ),
}


# Those that promote.
ADAM = {"chain of global norm and adam", "injected hyperparameters", "decoupled decay"}
QUICK = {"sgd momentum scheduled", "chain of global norm and adam", "rowwise adagrad"}
QUICK |= {"injected hyperparameters", "rowwise adam"}


def row_leaves_of(state):
    return [np.array(leaf) for leaf in jax.tree.leaves(state.row_state) if np.ndim(leaf)]


@pytest.mark.parametrize(
    "name",
    named(
        list(TRANSFORMATIONS),
        fast=QUICK,
        core=[name for name in TRANSFORMATIONS if not name.startswith("injected")],
        marks=dict.fromkeys(ADAM, training.OPTAX_ADAM),
    ),
)
def test_training_equals_dense_training_of_the_touched_rows(name):
    """Same values and same state as the lazy oracle.

    An untouched row and its state do not move by a bit.
    """
    tx, (ids, grads) = TRANSFORMATIONS[name](), batches()
    state = mpembed.init(jax.random.key(0), stack(), tx)
    table = np.asarray(state.table.rows).view(np.float32)
    step, oracle = step_of(tx), lazy_dense_step(tx)
    expected, expected_state = table, tx.init(jnp.asarray(table))
    for t in range(STEPS):
        is_touched = np.isin(np.arange(NUM_ROWS), ids[t])
        before, before_leaves = np.array(state.table.rows), row_leaves_of(state)
        state = step(state, ids[t], grads[t])
        np.testing.assert_array_equal(
            np.asarray(state.table.rows)[~is_touched], before[~is_touched]
        )
        for new, old in zip(row_leaves_of(state), before_leaves, strict=True):
            np.testing.assert_array_equal(new[~is_touched], old[~is_touched])
        expected, expected_state = oracle(
            expected, expected_state, summed(ids[t], grads[t]), is_touched
        )
    trained = np.asarray(state.table.rows).view(np.float32)
    assert np.abs(trained - table)[:5].max(axis=1).min() > 1e-3  # it did train
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-6)
    # The state too: same tree, scalars advanced once per step.
    assert jax.tree.structure(state.row_state) == jax.tree.structure(expected_state)
    for ours, dense in zip(
        jax.tree.leaves(state.row_state), jax.tree.leaves(expected_state), strict=True
    ):
        assert ours.dtype == jnp.asarray(dense).dtype
        np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-6)


@training.OPTAX_ADAM
def test_row_state_does_not_care_whether_its_row_is_cached():
    """Adam with a cache of 8 lines that evicts all the time.

    Values equal those of the lazy oracle.
    """
    tx, (ids, grads) = optax.adam(0.05), batches(1, 8)
    state = mpembed.init(
        jax.random.key(0), stack(cache=CacheSpec(num_rows=8, ways=4, policy="lru")), tx
    )
    expected = mpembed.to_dense(state)["t"]
    step, oracle, expected_state = step_of(tx), lazy_dense_step(tx), tx.init(jnp.asarray(expected))
    for t in range(len(ids)):
        state = step(state, ids[t], grads[t])
        is_touched = np.isin(np.arange(NUM_ROWS), ids[t])
        expected, expected_state = oracle(
            expected, expected_state, summed(ids[t], grads[t]), is_touched
        )
    assert mpembed.stats(state).write_backs > 0
    np.testing.assert_allclose(mpembed.to_dense(state)["t"], expected, rtol=1e-5, atol=1e-6)


@training.OPTAX_ADAM
def test_transformations_across_rows_see_the_touched_rows_only():
    """Lamb's trust ratio is the touched rows' norm over their updates' norm.

    Padding and other rows play no part.
    """
    tx, (ids, grads) = optax.lamb(0.05, eps=1e-3), batches(2, 1)
    state = mpembed.init(jax.random.key(0), stack(), tx)
    table = np.asarray(state.table.rows).view(np.float32)
    touched = np.unique(ids[ids != NO_ID])
    expected = table.copy()
    rows = jnp.asarray(table[touched])
    updates, _ = tx.update(jnp.asarray(summed(ids[0], grads[0])[touched]), tx.init(rows), rows)
    expected[touched] += np.asarray(updates)
    state = step_of(tx)(state, ids[0], grads[0])
    np.testing.assert_allclose(
        np.asarray(state.table.rows).view(np.float32), expected, rtol=1e-5, atol=1e-6
    )


@training.OPTAX_ADAM
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_has_no_part_in_norms_of_what_a_state_holds(dtype):
    """Padding names no row, so it has the momentum of none: not that of the table's last row."""
    tx = optax.chain(
        optax.scale_by_adam(eps=1e-3), optax.clip_by_global_norm(0.5), optax.scale(-1.0)
    )
    rng, touched = np.random.default_rng(0), np.array([3, 5, NUM_ROWS - 1])
    few = np.array(touched, np.int32)
    many = np.concatenate([few, np.full(9, NO_ID, np.int32)])
    state = mpembed.init(jax.random.key(0), stack(row_state_dtype=dtype), tx)
    rows = jnp.asarray(mpembed.to_dense(state)["t"][touched])
    tx_state, step = tx.init(rows), step_of(tx)
    for _ in range(4):
        grads = rng.normal(size=(len(many), DIM)).astype(np.float32)
        updates, tx_state = tx.update(jnp.asarray(grads[: len(few)]), tx_state, rows)
        rows = rows + updates
        state = step(state, many, grads)
    # Bfloat16 keeps 8 bits of each moment.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(mpembed.to_dense(state)["t"][touched], rows, rtol=0, atol=tolerance)


def test_injected_hyperparameters_can_be_changed_in_the_state():
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    step, (ids, grads) = step_of(tx), batches()
    state = step(mpembed.init(jax.random.key(0), stack(), tx), ids[0], grads[0])
    before = np.array(state.table.rows)
    state.row_state.hyperparams["learning_rate"] = jnp.float32(0)
    state = step(state, ids[0], grads[0])
    np.testing.assert_array_equal(state.table.rows, before)


@pytest.mark.parametrize(
    "make",
    named(
        {make.__name__: make for make in (optim.sgd, optim.rowwise_adagrad, optim.rowwise_adam)},
        fast={"rowwise_adagrad"},
        core=(),
    ),
)
def test_injected_hyperparameters_train_as_given_ones(make):
    """Also a coefficient of decay, which may be zero in one step and not in the next."""
    ids, grads = batches()
    decays = {} if make is optim.sgd else {"weight_decay": 0.1}
    injected, given = optax.inject_hyperparams(make)(learning_rate=0.1), make(0.1)
    states = [mpembed.init(jax.random.key(0), stack(), tx) for tx in (injected, given)]
    steps = [step_of(tx) for tx in (injected, given)]
    for t in range(2):
        states = [step(s, ids[t], grads[t]) for step, s in zip(steps, states, strict=True)]
    one, other = (np.asarray(s.table.rows).view(np.float32) for s in states)
    # 1 - b2 of a float32 b2 is off by 1e-5.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    states[0].row_state.hyperparams.update({name: jnp.float32(x) for name, x in decays.items()})
    changed = step_of(injected)(states[0], ids[2], 0 * grads[2])
    moved = (np.asarray(changed.table.rows).view(np.float32) != one).any()
    assert moved == (make is not optim.sgd)


def test_copies_of_a_transformation_keep_its_rule():
    """Printing, copying, mapping over leaves and pickling build the pair (init, update) anew."""
    for tx in (optim.sgd(0.1), optim.rowwise_adagrad(0.1, eps=1e-3)):
        rule = optim.rule_of(tx)
        assert rule is not None
        for twin in (
            copy.copy(tx),
            copy.deepcopy(tx),
            jax.tree.map(lambda f: f, tx),
            type(tx)(*tx),
        ):
            assert optim.rule_of(twin) == rule
            assert twin == tx and hash(twin) == hash(tx)  # one compiled step for both
        assert "RowRule" in repr(tx)
        assert optim.rule_of(tx._replace(update=optax.sgd(1.0).update)) is None
        ruled = tx._replace(init=np.zeros_like, update=type(tx.update)(np.add, rule))
        assert optim.rule_of(pickle.loads(pickle.dumps(ruled))) == rule
        assert optim.rule_of(optax.chain(tx)) is None


@training.OPTAX_ADAM
def test_a_refused_update_leaves_schedules_where_they_are():
    """Applying a plan twice across jitted calls changes nothing.

    No row, no row state, no schedule count.
    """
    tx, ids = optax.adam(decaying(0.05)), batches()[0]
    state, plan = jax.jit(mpembed.prefetch)(mpembed.init(jax.random.key(0), stack(), tx), ids[0])
    rows = mpembed.lookup(state, plan)
    apply = jax.jit(partial(mpembed.apply_gradients, tx=tx))
    once = apply(state, plan, rows, jnp.ones_like(rows))
    twice = apply(once, plan, rows, jnp.ones_like(rows))
    counts = [leaf for leaf in jax.tree.leaves(twice.row_state) if jnp.ndim(leaf) == 0]
    assert [int(c) for c in counts] == [1] * len(counts)
    jax.tree.map(np.testing.assert_array_equal, twice.row_state, once.row_state)
    np.testing.assert_array_equal(twice.table.rows, once.table.rows)
    with pytest.raises(ValueError, match="1 calls changed nothing: apply_gradients"):
        mpembed.stats(twice)


# --- our own transformations against NumPy


def rowwise_oracle(
    kind, w, grads, rates, *, decay, decoupled, initial=0.0, b1=0.9, b2=0.999, eps=1e-8
):
    w = w.astype(np.float64)
    total, mu, nu = np.full(w.shape[:-1], initial), np.zeros_like(w), np.zeros(w.shape[:-1])
    for t, (g, rate) in enumerate(zip(grads.astype(np.float64), rates, strict=True), 1):
        g = g + (0 if decoupled else decay * w)
        if kind == "adagrad":
            total = total + (g**2).mean(-1)
            scaled = g / (np.sqrt(total) + eps)[..., None]
        else:
            mu = b1 * mu + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * (g**2).mean(-1)
            scaled = (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)[..., None]
        w = w - rate * (scaled + (decay * w if decoupled else 0))
    return w


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
@pytest.mark.parametrize("decay", ["none", "of gradients", "decoupled"])
def test_rowwise_transformations_equal_numpy(kind, decay):
    """Over a tree of leaves [.., D], with a schedule; one accumulator per row."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3), "b": (2, 3, 4)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    grads = {k: rng.normal(size=(5, *s)).astype(np.float32) for k, s in shapes.items()}
    schedule = decaying(0.1)
    rate, decoupled = 0.0 if decay == "none" else 0.1, decay == "decoupled"
    options = dict(weight_decay=rate, decoupled=decoupled)
    extra = {"initial_accumulator_value": 0.3} if kind == "adagrad" else {"b1": 0.8, "b2": 0.9}
    tx = getattr(optim, f"rowwise_{kind}")(schedule, eps=1e-3, **extra, **options)
    tx_state, trained = tx.init(params), params
    sizes = {leaf.shape for leaf in jax.tree.leaves(tx_state) if leaf.ndim}
    assert {(5,), (2, 3)} <= sizes
    update = jax.jit(tx.update)
    for t in range(5):
        updates, tx_state = update({k: g[t] for k, g in grads.items()}, tx_state, trained)
        trained = optax.apply_updates(trained, updates)
    renamed = {"initial": 0.3} if kind == "adagrad" else extra
    rates = [float(schedule(t)) for t in range(5)]
    for k in shapes:
        expected = rowwise_oracle(
            kind, params[k], grads[k], rates, decay=rate, decoupled=decoupled, eps=1e-3, **renamed
        )
        np.testing.assert_allclose(trained[k], expected, rtol=1e-5, atol=1e-6)


def test_rowwise_transformations_survive_zero_gradients_and_zero_eps():
    """A row whose gradient is zero from the start divides 0 by 0."""
    g = jnp.zeros((3, 2)).at[1].set(2.0)
    for tx in (optim.rowwise_adagrad(0.5, eps=0.0), optim.rowwise_adagrad(0.5)):
        updates, _ = tx.update(g, tx.init(g), g)
        np.testing.assert_array_equal(updates, [[0, 0], [-0.5, -0.5], [0, 0]])


def test_clip_by_row_norm_scales_long_rows_to_the_norm_and_leaves_others():
    g = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-6.0, 8.0], [1.0, 0.0]], np.float32)
    tx = optim.clip_by_row_norm(1.0)
    updates, _ = jax.jit(tx.update)({"x": g, "y": g[:, None]}, tx.init({"x": g, "y": g[:, None]}))
    updates = jax.tree.map(np.asarray, updates)
    np.testing.assert_allclose(
        updates["x"], [[0.6, 0.8], [0.3, 0.4], [0, 0], [-0.6, 0.8], [1, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(updates["y"][:, 0], updates["x"])
    np.testing.assert_array_equal(updates["x"][[1, 2, 4]], g[[1, 2, 4]])


def test_clipping_by_the_global_norm_of_dense_and_row_gradients_equals_dense_training():
    """Three steps of a linear model on two features.

    Gradients of (weights, unique rows) are clipped together, then applied.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, NUM_ROWS, (3, 8, 2)).astype(np.int32)
    labels = rng.normal(size=(3, 8)).astype(np.float32) * 3
    clip, sgd = optax.clip_by_global_norm(0.5), optax.sgd(0.25)
    norms = []

    def norm_of(grads):
        return jnp.sqrt(sum(jnp.sum(g**2) for g in grads))

    def loss_of(weights, vectors, label):
        return jnp.mean((vectors.reshape(8, -1) @ weights - label) ** 2)

    @jax.jit
    def ours(state, weights, ids, label):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        grads = jax.grad(
            lambda w, r: loss_of(w, mpembed.pool(r, plan.inverse), label), argnums=(0, 1)
        )(weights, rows)
        (weight_grads, row_grads), _ = clip.update(grads, clip.init(grads))
        state = mpembed.apply_gradients(state, plan, rows, row_grads, tx=sgd)
        return state, weights - 0.25 * weight_grads, norm_of(grads)

    @jax.jit
    def dense(table, weights, ids, label):
        grads = jax.grad(lambda w, t: loss_of(w, t[ids], label), argnums=(0, 1))(weights, table)
        (weight_grads, table_grads), _ = clip.update(grads, clip.init(grads))
        return table - 0.25 * table_grads, weights - 0.25 * weight_grads, norm_of(grads)

    state = mpembed.init(jax.random.key(0), stack(), sgd)
    table = np.asarray(state.table.rows).view(np.float32)
    weights = expected_weights = rng.normal(size=2 * DIM).astype(np.float32)
    for t in range(3):
        state, weights, norm = ours(state, weights, ids[t], labels[t])
        table, expected_weights, expected_norm = dense(table, expected_weights, ids[t], labels[t])
        norms.append((float(norm), float(expected_norm)))
    np.testing.assert_allclose(*zip(*norms, strict=True), rtol=1e-5)
    assert min(n for n, _ in norms) > 0.5  # clipping did act
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(state.table.rows).view(np.float32), table, rtol=1e-5, atol=1e-6
    )


# --- what cannot be kept by row


def shampoo_like():
    return optax.GradientTransformation(
        lambda params: {"preconditioner": jnp.zeros((params.shape[1], params.shape[1]))},
        lambda g, s, p=None: (g, s),
    )


def averaging_parameters():
    return optax.GradientTransformation(
        lambda params: {"average": jnp.asarray(params)},
        lambda g, s, p=None: (g, {"average": 0.9 * s["average"] + 0.1 * p}),
    )


def unequal_rows():
    return optax.GradientTransformation(
        lambda params: {"rank": jnp.arange(params.shape[0], dtype=jnp.float32)},
        lambda g, s, p=None: (g, s),
    )


class Unfit(NamedTuple):
    """A transformation that cannot train gathered rows, and what init says of it."""

    make: Callable[[], optax.GradientTransformation]
    message: str  # a regular expression


REFUSED = {
    "adafactor": Unfit(
        lambda: optax.adafactor(0.1),
        r"leaf .*v_row.* neither one entry per row nor a scalar.*rowwise_adagrad",
    ),
    "sm3": Unfit(lambda: optax.sm3(0.1), r"leaf .*mu.* neither one entry per row nor a scalar"),
    "shampoo": Unfit(shampoo_like, r"leaf .*preconditioner.* of shape \(4, 4\)"),
    "lbfgs": Unfit(lambda: optax.lbfgs(), r"leaf .*params_memory.* neither one entry"),
    "muon": Unfit(lambda: optax.contrib.muon(0.1), r"leaf .*ns_coeffs"),
    "multi-steps": Unfit(
        lambda: optax.MultiSteps(optax.sgd(0.1), 2),
        "holds back gradients.*MultiSteps.*prefetch the ids of all microbatches at once",
    ),
    "apply every": Unfit(
        lambda: optax.chain(optax.apply_every(2), optax.sgd(0.1)),
        "holds back gradients.*apply_every",
    ),
    "mean over rows": Unfit(
        lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
        "mixes rows.*how many rows of zeros.*clip_by_row_norm",
    ),
    "mean of parameters": Unfit(
        lambda: optax.chain(optax.scale_by_param_block_rms(), optax.sgd(0.1)),
        "mixes rows.*how many rows of zeros",
    ),
    "order of rows": Unfit(
        lambda: optax.stateless(lambda updates, _: jnp.cumsum(updates, axis=0)),
        "mixes rows.*depends on their order",
    ),
    "a rate found from all rows": Unfit(
        lambda: optax.contrib.dadapt_adamw(),
        r"keeps one number, \.numerator_weighted, that depends on .* all rows",
    ),
    "multi-steps in a chain": Unfit(
        lambda: optax.chain(
            optax.clip(1.0), optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
        ),
        "MultiSteps",
    ),
    "average of parameters": Unfit(
        averaging_parameters,
        r"leaf .*average.* starts from the parameters' values",
    ),
    "schedule free": Unfit(
        lambda: optax.contrib.schedule_free_sgd(),
        r"leaf .*z.* starts from the parameters' values",
    ),
    "prodigy": Unfit(
        lambda: optax.contrib.prodigy(),
        r"leaf .*params0.* starts from the parameters' values",
    ),
    "rows that start apart": Unfit(
        unequal_rows, r"leaf .*rank.* starts differently for different rows"
    ),
    "stochastic rounding": Unfit(
        lambda: optim.stochastic_round_updates(jax.random.key(0)),
        r"leaf .*key",
    ),
    # These keep scalars only, or a typed key, and cannot be updated with gathered rows alone.
    "lookahead": Unfit(
        lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5),
        "lookahead|LookaheadParams|params",
    ),
    "noise": Unfit(lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)), r"leaf .*(rng_)?key"),
    "polyak": Unfit(lambda: optax.polyak_sgd(), "value"),
    "reduce on plateau": Unfit(
        lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        "value",
    ),
}


@pytest.mark.parametrize(
    "name", named(list(REFUSED), marks={"a rate found from all rows": training.OPTAX_ADAM})
)
def test_what_cannot_be_kept_by_row_is_refused_at_init(name):
    """The message names the state leaf, or the argument that gathered rows cannot give."""
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        mpembed.init(jax.random.key(0), stack(), make())


@pytest.mark.parametrize("tx", [0.1, None, optax.adam, "sgd"])
def test_what_is_no_transformation_is_refused(tx):
    with pytest.raises(
        TypeError,
        match=r"tx must be an optax gradient transformation such as optim\.rowwise_adagrad",
    ):
        mpembed.init(jax.random.key(0), stack(), tx)


@training.OPTAX_ADAM
def test_no_float32_copy_of_the_table_is_made_to_initialize_row_state():
    """Two billion rows: shapes only."""
    spec = stack(num_rows=2**31 - 2, dim=16, storage="int8")
    shapes = jax.eval_shape(
        lambda key: init_rows(optax.adam(0.1), spec.num_rows, 16, "bfloat16"), 0
    )
    assert sorted(leaf.shape for leaf in jax.tree.leaves(shapes)) == [
        (),
        (2**31 - 2, 16),
        (2**31 - 2, 16),
    ]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {"int32", "uint16"}


# --- row state in bfloat16


def bf16(words):
    return np.asarray(words).view(ml_dtypes.bfloat16).astype(np.float32)


def test_bfloat16_row_state_takes_two_bytes_per_value_and_starts_at_its_initial_value():
    tx = optax.chain(optax.adagrad(0.1, initial_accumulator_value=0.3), optax.trace(0.9))
    state = mpembed.init(jax.random.key(0), stack(row_state_dtype="bfloat16"), tx)
    leaves = [leaf for leaf in jax.tree.leaves(state.row_state) if leaf.ndim]
    assert [(leaf.dtype, leaf.shape) for leaf in leaves] == [(jnp.uint16, (NUM_ROWS, DIM))] * 2
    assert all(leaf.nbytes == 2 * NUM_ROWS * DIM for leaf in leaves)
    np.testing.assert_array_equal(bf16(leaves[0]), np.float32(ml_dtypes.bfloat16(0.3)))
    np.testing.assert_array_equal(bf16(leaves[1]), 0.0)


@training.OPTAX_ADAM
def test_bfloat16_row_state_is_rounded_without_bias_and_each_leaf_by_its_own_bits():
    """8,192 rows x 2, one Adam step from zero.

    Both moments round up as often as they should, within 5 sigma.
    """
    num, dim = 8192, 2
    tx = optax.adam(0.1, b1=0.5, b2=0.5)
    state = mpembed.init(
        jax.random.key(3), stack(num_rows=num, dim=dim, row_state_dtype="bfloat16"), tx
    )
    ids = np.arange(num, dtype=np.int32)
    # b = 0.5 makes both moments half of g and g^2; bfloat16 steps are 2^-7 at 1.
    g = 2 * (1 + 2**-9)  # mu = 1 + step / 4;  nu = g^2 / 2 = 2 (1 + 2^-8 + 2^-18)
    step = step_of(tx)
    trained = step(state, ids, jnp.full((num, dim), g, jnp.float32))
    adam_state = trained.row_state[0]
    mu, nu = bf16(adam_state.mu), bf16(adam_state.nu)
    values = {"mu": (mu, 1.0, 2.0**-7, 0.25), "nu": (nu, 2.0, 2.0**-6, (2**-7 + 2**-17) / 2**-6)}
    is_up = {}
    for name, (array, low, gap, share) in values.items():
        assert set(np.unique(array)) == {np.float32(low), np.float32(low + gap)}
        is_up[name] = array > low
        sigma = np.sqrt(share * (1 - share) / array.size)
        assert abs(is_up[name].mean() - share) < 5 * sigma
    # Independent streams: both up as often as the product says.
    both, expected = (is_up["mu"] & is_up["nu"]).mean(), is_up["mu"].mean() * is_up["nu"].mean()
    assert abs(both - expected) < 5 * np.sqrt(expected * (1 - expected) / mu.size)
    # Another order of the batch draws the same bits for the same rows.
    state = mpembed.init(
        jax.random.key(3), stack(num_rows=num, dim=dim, row_state_dtype="bfloat16"), tx
    )
    again = step(state, ids[::-1].copy(), jnp.full((num, dim), g, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, again.row_state, trained.row_state)


def test_small_increments_accumulate_in_bfloat16_row_state():
    """100 increments of 2^-11 to an accumulator of 1, an eighth of a half step.

    Nearest rounding would stay at 1.
    """
    num, dim, steps = 4096, 1, 100
    tx = optim.rowwise_adagrad(0.0, initial_accumulator_value=1.0)
    state = mpembed.init(
        jax.random.key(0), stack(num_rows=num, dim=dim, row_state_dtype="bfloat16"), tx
    )
    step, ids, g = (
        step_of(tx),
        np.arange(num, dtype=np.int32),
        np.full((num, dim), 2.0**-5.5, np.float32),
    )
    for _ in range(steps):
        state = step(state, ids, g)
    (total,) = [bf16(leaf) for leaf in jax.tree.leaves(state.row_state) if leaf.ndim]
    share = 2.0**-4  # of a bfloat16 step, the chance to go up each time
    sigma = 2.0**-7 * np.sqrt(steps * share * (1 - share) / num)
    assert abs(total.mean() - (1 + steps * 2.0**-11)) < 5 * sigma


def test_bfloat16_row_state_of_untouched_rows_does_not_move():
    tx, (ids, grads) = optim.rowwise_adagrad(0.1), batches()
    state = mpembed.init(jax.random.key(0), stack(row_state_dtype="bfloat16", storage="int4"), tx)
    step = step_of(tx)
    for t in range(3):
        is_touched = np.isin(np.arange(NUM_ROWS), ids[t])
        before, (accumulator,) = np.array(state.table.rows), row_leaves_of(state)
        state = step(state, ids[t], grads[t])
        np.testing.assert_array_equal(
            np.asarray(state.table.rows)[~is_touched], before[~is_touched]
        )
        np.testing.assert_array_equal(
            row_leaves_of(state)[0][~is_touched], accumulator[~is_touched]
        )
        assert (row_leaves_of(state)[0][is_touched] != accumulator[is_touched]).all()


# --- transformations that mix rows

MIXING = {
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)),
    "update norm": lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.5)),
    "lamb": lambda: optax.lamb(0.05, eps=1e-3),
    "novograd": lambda: optax.novograd(0.05, eps=1e-3),
    "adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.5)),
    "if finite": lambda: optax.apply_if_finite(optax.sgd(0.5), 3),
}


@pytest.mark.slow
@pytest.mark.optimized("compares bits of two programs with sums over rows")
@training.OPTAX_ADAM
@pytest.mark.parametrize("name", named(list(MIXING), fast={"global norm"}, core=()))
def test_gradients_of_padding_rows_are_nothing_whatever_they_are(name):
    """The rows are normalized before pooling.

    All padding rows are zeros, so their gradients are not numbers.
    """
    tx, ids = MIXING[name](), np.array([3, 3, 3, 5, NO_ID], np.int32)

    def trained(with_padding):
        state = mpembed.init(jax.random.key(0), stack(), tx)

        @jax.jit
        def step(state, ids):
            state, plan = mpembed.prefetch(state, ids)
            rows = mpembed.lookup(state, plan)

            def loss_of(rows):
                if not with_padding:
                    rows = jnp.where((plan.unique_ids == NO_ID)[:, None], jnp.float32(1), rows)
                unit = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
                return jnp.sum(mpembed.pool(unit, plan.inverse[:4]) ** 3)

            row_grads = jax.grad(loss_of)(rows)
            return mpembed.apply_gradients(state, plan, rows, row_grads, tx=tx), row_grads

        before = mpembed.to_dense(state)["t"]
        state, row_grads = step(state, ids)
        assert np.isnan(row_grads[2:]).all() == with_padding
        moved = mpembed.to_dense(state)["t"]
        assert (moved != before).any()
        return moved

    np.testing.assert_array_equal(trained(True), trained(False))


# --- rows with non-finite gradients


@training.OPTAX_ADAM
def test_rows_with_nonfinite_gradients_are_skipped_and_counted():
    """Row and row state stay as they were, bit for bit; the other rows train as without them."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    step, ids = step_of(tx), np.array([3, 5, 7, 3, 9, NO_ID], np.int32)
    grads = np.random.default_rng(0).normal(size=(6, DIM)).astype(np.float32)
    bad = grads.copy()
    bad[1, 2], bad[3, 0] = np.nan, np.inf  # rows 5 and 3
    good = grads.copy()
    good[[0, 1, 3]] = 0  # what the rest of the batch should see of them
    spec = stack(
        cache=CacheSpec(num_rows=2, ways=2), skip_nonfinite=True
    )  # both ways: lines and bypassed rows

    def start():
        return step(mpembed.init(jax.random.key(0), spec, tx), ids, grads)

    read = jax.jit(mpembed.read)
    everything = np.arange(NUM_ROWS, dtype=np.int32)
    before = start()
    rows_before, leaves_before = np.array(read(before, everything)), row_leaves_of(before)
    after, clean = step(before, ids, bad), step(start(), ids, good)
    for row in (3, 5):
        np.testing.assert_array_equal(read(after, everything)[row], rows_before[row])
        for new, old in zip(row_leaves_of(after), leaves_before, strict=True):
            np.testing.assert_array_equal(new[row], old[row])
    for row in (7, 9):
        np.testing.assert_array_equal(read(after, everything)[row], read(clean, everything)[row])
    assert mpembed.stats(after).nonfinite_rows == 2
    assert mpembed.stats(after).refused_updates == 0


# --- low-precision parameters of any optax user

FORMATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def neighbours(x, dtype):
    """The values of a format just below and above float32 x, as float64.

    Equal where the format holds x.
    """
    with np.errstate(over="ignore"):
        nearest = x.astype(dtype)
        other = np.nextafter(
            nearest, np.where(nearest.astype(np.float32) > x, -np.inf, np.inf).astype(dtype)
        )
    other = np.where(
        nearest.astype(np.float32) == x, nearest.astype(np.float64), other.astype(np.float64)
    )
    low, high = np.sort([nearest.astype(np.float64), other], axis=0)
    return low, high


@APPLY_UPDATES
@pytest.mark.parametrize("name", FORMATS)
def test_unmodified_apply_updates_lands_on_the_rounded_value(name):
    """New values from 2^-30 to 2^8 times the old, of both signs.

    They are exact down to 2^-15, and within 2^-24 |old| below it.
    """
    dtype, rng, num = FORMATS[name], np.random.default_rng(0), 200_000
    exponents = (-14, 15) if name == "float16" else (-60, 60)
    old = rng.choice([-1, 1], num) * rng.uniform(1, 2, num) * 2.0 ** rng.integers(*exponents, num)
    old = old.astype(dtype).astype(np.float32)
    ratio = rng.choice([-1, 1], num) * 2.0 ** rng.uniform(-30, 8, num)
    updates = (old * ratio - old).astype(np.float32)
    # Adversarial: everything cancels but the last bits of the update.
    towards = np.where(rng.random(num // 4) < 0.5, -np.inf, np.inf).astype(np.float32)
    updates[: num // 4] = np.nextafter(-old[: num // 4], towards)
    x = old + updates
    params = jnp.asarray(old.astype(dtype))
    tx = optim.stochastic_round_updates(jax.random.key(0))
    rounded, _ = jax.jit(tx.update)(jnp.asarray(updates), tx.init(params), params)
    assert rounded.dtype == jnp.float32
    result = optax.apply_updates(params, rounded)
    assert result.dtype == dtype
    result = np.asarray(result).astype(np.float64)
    low, high = neighbours(x, dtype)
    limit = 65504.0 if name == "float16" else 3.3895313892515355e38
    low, high = np.clip(low, -limit, limit), np.clip(high, -limit, limit)
    error = np.minimum(np.abs(result - low), np.abs(result - high))
    is_large = np.minimum(np.abs(low), np.abs(high)) >= 2.0**-15 * np.abs(old)
    assert 0.3 < is_large.mean() < 0.7
    np.testing.assert_array_equal(error[is_large], 0.0)
    assert (error <= 2.0**-24 * np.abs(old)).all()
    assert np.isfinite(result).all()


class Added(NamedTuple):
    """An update of a parameter's value in a narrow format."""

    format: str
    old: float
    update: float


@APPLY_UPDATES
@pytest.mark.parametrize(
    "case",
    named([
        Added("bfloat16", 1.0, 2**-9),
        Added("bfloat16", -3.0, 0.007),
        Added("float16", 1.0, -(2**-13)),
        Added("float16", 2.0**-20, 2**-27),  # subnormal: steps of 2^-24
        Added("float16", 0.0, 2**-26),
        Added("bfloat16", 0.0, 1e-6),
    ]),
)  # fmt: skip
def test_rounding_is_unbiased(case):
    """16,384 equal elements: the mean of the new values is old + update within 5 sigma."""
    (name, old, update), num = case, 16384
    params = jnp.full(num, old, name)
    tx = optim.stochastic_round_updates(jax.random.key(1))
    updates = jnp.full(num, update, jnp.float32)
    rounded, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    result = optax.apply_updates(params, rounded).astype(jnp.float32)
    target = np.float32(old) + np.float32(update)
    low, high = (v.item() for v in neighbours(np.array([target]), FORMATS[name]))
    assert set(np.unique(result)) <= {np.float32(low), np.float32(high)}
    share = (target - low) / (high - low)
    sigma = (high - low) * np.sqrt(share * (1 - share) / num)
    assert abs(np.mean(np.asarray(result, np.float64)) - target) < 5 * sigma


@APPLY_UPDATES
def test_a_thousand_tiny_updates_move_a_bfloat16_parameter_and_nearest_never_does():
    """1,000 updates of -1e-5 from 1.0.

    The mean of 4,096 elements ends within 0.1 % of 0.99 (10 sigma).
    """
    tx = optim.stochastic_round_updates(jax.random.key(0))
    params = jnp.ones(4096, jnp.bfloat16)
    small = jnp.full(4096, -1e-5, jnp.float32)

    @jax.jit
    def train(params, tx_state):
        def body(carry, _):
            rounded, nearest, tx_state = carry
            updates, tx_state = tx.update(small, tx_state, rounded)
            return (
                optax.apply_updates(rounded, updates),
                optax.apply_updates(nearest, small),
                tx_state,
            ), None

        return jax.lax.scan(body, (params, params, tx_state), None, 1000)[0]

    rounded, nearest, tx_state = train(params, tx.init(params))
    assert rounded.dtype == jnp.bfloat16
    assert abs(np.mean(np.asarray(rounded, np.float64)) - 0.99) < 1e-3 * 0.99
    np.testing.assert_array_equal(np.asarray(nearest, np.float32), 1.0)
    assert int(tx_state.count) == 1000


@training.OPTAX_ADAM
def test_it_is_the_last_link_of_a_chain_and_other_dtypes_pass_through():
    """Adam on a tree of bfloat16, float16, float32 and integer leaves.

    Each low-precision leaf rounds Adam's own update.
    """
    num = 4096
    params = {"b": jnp.full((num // 4, 4), 1.0, jnp.bfloat16), "h": jnp.full(num, 0.5, jnp.float16)}
    params |= {"f": jnp.linspace(0, 1, 5), "s": jnp.asarray(1.0, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    adam = optax.adam(1e-3)
    tx = optax.chain(adam, optim.stochastic_round_updates(jax.random.key(0)))
    plain, _ = jax.jit(adam.update)(grads, adam.init(params), params)
    update = jax.jit(tx.update)
    updates, tx_state = update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda p: p.dtype, new) == jax.tree.map(lambda p: p.dtype, params)
    np.testing.assert_array_equal(updates["f"], plain["f"])
    assert updates["f"].dtype == jnp.float32
    for name, gap in (("b", 2.0**-8), ("h", 2.0**-12)):  # steps below 1 and below 0.5
        moved = np.asarray(updates[name])
        assert updates[name].dtype == jnp.float32
        wanted = float(jnp.ravel(plain[name])[0])
        share = -wanted / gap % 1
        sigma = gap * np.sqrt(share * (1 - share) / num)
        assert abs(moved.mean() - wanted) < 5 * sigma
        assert len(np.unique(moved)) == 2
    # Another step draws other bits; the same state draws the same.
    again, _ = update(grads, tx.init(params), params)
    np.testing.assert_array_equal(again["b"], updates["b"])
    later, _ = update(grads, tx_state, params)
    assert (np.asarray(later["b"]) != np.asarray(updates["b"])).any()
    # Equal leaves draw their own bits.
    twins = {"one": params["b"], "two": params["b"]}
    small = jax.tree.map(lambda p: jnp.full(p.shape, -1e-3, jnp.float32), twins)
    link = optim.stochastic_round_updates(jax.random.key(0))
    twin_updates, _ = jax.jit(link.update)(small, link.init(twins), twins)
    assert (np.asarray(twin_updates["one"]) != np.asarray(twin_updates["two"])).any()


WRAPPED = {  # of which the second step is the one that moves nothing
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step != 1),
    "MultiSteps": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


@pytest.mark.standard_promotion("optax's wrappers add float32 zeros to bfloat16 updates")
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_that_leave_out_updates_stand_before_the_rounding_link(name):
    """A step that is left out leaves bfloat16 parameters as they are.

    Around the link lax.cond refuses some.
    """
    link = optim.stochastic_round_updates(jax.random.key(0))
    params = {"b": jnp.full(64, 0.5, jnp.bfloat16), "f": jnp.ones(3)}
    tx = optax.chain(WRAPPED[name](optax.sgd(0.1)), link)
    update, tx_state = jax.jit(tx.update), tx.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda p: jnp.full_like(p, np.nan if step == 1 else 1e-3), params)  # noqa: B023
        updates, tx_state = update(grads, tx_state, params)
        new = optax.apply_updates(params, updates)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), new, params)
        assert moved == dict.fromkeys(params, step != 1)
        params = new
    if name != "MultiSteps":
        around = WRAPPED[name](optax.chain(optax.sgd(0.1), link))
        with pytest.raises(TypeError, match="cond branches must have equal output types"):
            around.update(grads, around.init(params), params)


def test_integer_leaves_and_missing_leaves_pass_through():
    params = {"i": jnp.arange(3), "none": None, "b": jnp.ones(2, jnp.bfloat16)}
    updates = {"i": jnp.ones(3, jnp.int32), "none": None, "b": jnp.zeros(2, jnp.bfloat16)}
    tx = optim.stochastic_round_updates(jax.random.PRNGKey(0))
    out, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    assert out["none"] is None
    np.testing.assert_array_equal(out["i"], 1)
    np.testing.assert_array_equal(out["b"], 0.0)


@APPLY_UPDATES
def test_rounding_saturates_instead_of_overflowing():
    params = jnp.asarray([65504.0, -65504.0], jnp.float16)
    tx = optim.stochastic_round_updates(jax.random.key(0))
    updates, _ = jax.jit(tx.update)(jnp.asarray([1e6, -1e6], jnp.float32), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), params)


def test_the_rounding_link_names_what_it_misses():
    tx = optim.stochastic_round_updates(jax.random.key(0))
    params = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"call tx\.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match=r"key must be jax\.random\.key\(\.\.\) or uint32 \[2\]"):
        optim.stochastic_round_updates(0).init(params)


TOLD_APART = ["sgd momentum scheduled", "chain of global norm and adam", "rowwise adagrad", "sgd"]


PAIRS = {f"{a} for {b}": (a, b) for a, b in itertools.combinations(TOLD_APART, 2)}


@pytest.mark.parametrize(
    "pair",
    named(
        PAIRS, marks={name: training.OPTAX_ADAM for name, pair in PAIRS.items() if ADAM & set(pair)}
    ),
)
def test_another_transformation_than_inits_is_refused(pair):
    """Where the state tells them apart; the message says to pass the same one."""
    first, second = pair
    spec = stack()
    state = jax.eval_shape(
        lambda key: mpembed.init(key, spec, TRANSFORMATIONS[first]()), jax.random.key(0)
    )
    with pytest.raises(ValueError, match="pass the same tx to init and to every verb"):
        jax.eval_shape(
            lambda held, ids, rows: update_rows(
                TRANSFORMATIONS[second](),
                held,
                ids,
                rows,
                rows,
                dtype="float32",
                key=jnp.zeros(2, jnp.uint32),
                step=ids[0],
                is_applied=ids[0] == 0,
            ),
            state.row_state,
            jax.ShapeDtypeStruct((3,), jnp.int32),
            jax.ShapeDtypeStruct((3, DIM), jnp.float32),
        )
