"""The recipes of RECIPES.md do what they say."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpembed_jax as mpembed

# Snippets use optax.adam, and divide and average as users do, with jax's own promotion.
pytestmark = pytest.mark.standard_promotion("snippets are written as users write them")
RECIPES = (Path(__file__).parents[2] / "mpembed_jax/RECIPES.md").read_text()


@pytest.fixture(scope="module")
def recipes():
    """The names that the snippets make."""
    names = {"__name__": "recipes"}
    code = "\n".join(re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL))
    exec(compile(code, "RECIPES.md", "exec"), names)
    return names


def rows_of(embed, ids):
    return np.asarray(mpembed.read(embed.state, jnp.asarray(ids, jnp.int32)))


def test_four_microbatches_of_one_prefetch_are_the_whole_batch(recipes):
    """Sums in another order, and Adagrad divides by their size: 2^-12 relative."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 50_000, (4, 64, 3)).astype(np.int32)
    labels = rng.integers(0, 2, (4, 64)).astype(np.float32)
    trained = []
    for batch in ((ids, labels), (ids.reshape(1, 256, 3), labels.reshape(1, 256))):
        model = recipes["Scorer"](nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        before = rows_of(model.items, ids[0, 0])
        recipes["accumulated_step"](model, optimizer, *batch)
        assert model.items.stats().steps == 1
        trained.append((rows_of(model.items, ids[0, 0]) - before, model.out.kernel[...]))
    (rows, kernel), (expected_rows, expected_kernel) = trained
    assert np.abs(expected_rows).max() > 1e-3
    np.testing.assert_allclose(kernel, expected_kernel, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows, expected_rows, rtol=2**-12, atol=1e-6)


def test_averages_move_towards_the_rows_of_a_batch(recipes):
    model, average = recipes["Scorer"](nnx.Rngs(0)), recipes["average"]
    average = type(average)(50_000, 16, tx=optax.sgd(0.25), storage="float32", rngs=nnx.Rngs(5))
    ids = np.array([[3, 3, 7], [9, 7, mpembed.NO_ID]], np.int32)
    touched, others = np.array([3, 7, 9]), np.array([0, 4, 8])
    before, untouched = rows_of(average, touched), rows_of(average, others)
    recipes["average_rows"](average, model, ids)
    now = rows_of(model.items, touched)
    np.testing.assert_allclose(
        rows_of(average, touched), before + 0.25 * (now - before), rtol=0, atol=2**-23
    )
    np.testing.assert_array_equal(rows_of(average, others), untouched)


def test_a_target_network_keeps_its_rows_while_the_model_trains(recipes):
    model = recipes["Scorer"](nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    ids, labels = np.full((1, 4, 3), 7, np.int32), np.ones((1, 4), np.float32)
    target = recipes["target"]
    nnx.update(target, jax.tree.map(jnp.copy, nnx.state(model)))
    before = rows_of(model.items, [7])
    recipes["accumulated_step"](model, optimizer, ids, labels)
    np.testing.assert_array_equal(rows_of(target.items, [7]), before)
    assert (rows_of(model.items, [7]) != before).any()
    nnx.update(target, jax.tree.map(jnp.copy, nnx.state(model)))
    np.testing.assert_array_equal(rows_of(target.items, [7]), rows_of(model.items, [7]))


def test_an_average_over_the_whole_state_of_a_model_is_refused(recipes):
    model, twin = (recipes["Scorer"](nnx.Rngs(0)) for _ in range(2))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for id in (7, 9):
        ids, labels = np.full((1, 4, 3), id, np.int32), np.ones((1, 4), np.float32)
        recipes["accumulated_step"](model, optimizer, ids, labels)

    def floats(a, b):
        return 0.9 * a + 0.1 * b if jnp.issubdtype(a.dtype, jnp.floating) else a

    for mix in (floats, lambda a, b: 0.9 * a + 0.1 * b):
        mixed = recipes["Scorer"](nnx.Rngs(0))
        nnx.update(mixed, jax.tree.map(mix, nnx.state(twin), nnx.state(model)))
        with pytest.raises(ValueError, match="average the other parameters alone"):
            nnx.view(mixed, deterministic=True)(ids[0])
        with pytest.raises(ValueError, match="average the other parameters alone"):
            mixed.items.prefetch(ids)
