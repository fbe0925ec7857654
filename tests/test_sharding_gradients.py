"""README's sharded step gives the gradients of one device; the recipes that look as good do not."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed

README = (Path(__file__).parents[1] / "README.md").read_text()
SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("user", 500), mpembed.TableSpec("item", 900)], 16, "float32", mpembed.CacheSpec(num_rows=256, ways=2)
)
SGD = optax.sgd(1.0)  # what moves is minus the gradient
DEVICES = 4


def step_of(name, replace=()):
    """The function `name` of README's snippets, without its decorators, after (old, new) replacements in its text."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    (found,) = [n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == name]
    found.decorator_list = []
    text = ast.unparse(found)
    for old, new in replace:
        assert old in text
        text = text.replace(old, new)
    names = {"jax": jax, "jnp": jnp, "optax": optax, "mpembed": mpembed, "tx": SGD, "row_tx": SGD}
    exec(text, names)
    return names[name]


def gradients(step, mesh=None, check_vma=True):
    """Dense and row gradients of one step on one batch, whatever the number of devices."""
    rng = np.random.default_rng(0)
    batch = {
        "ids": SPEC.global_ids(np.stack([rng.zipf(1.3, 64) % 500, rng.zipf(1.3, 64) % 900], axis=1)),
        "label": rng.integers(0, 2, 64).astype(np.float32),
    }
    params = {"w": jnp.asarray(rng.standard_normal((32, 1)), jnp.float32), "b": jnp.zeros(1)}
    emb = mpembed.init(jax.random.key(0), SPEC, SGD, mesh=mesh)
    before = mpembed.to_dense(emb)
    if mesh is not None:
        specs = mpembed.partition_specs(emb)
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, P(), P(), P("x")), out_specs=(specs, P(), P(), P()), check_vma=check_vma
        )
    emb, moved, _, _ = jax.jit(step)(emb, params, SGD.init(params), batch)
    after = mpembed.to_dense(emb)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), (params, before), (moved, after))


def test_the_sharded_step_has_the_gradients_of_one_device_and_the_known_wrong_recipes_do_not():
    """Sums of 64 terms of at most 1, in another order: 64 x 2^-24 = 4e-6."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    dense, rows = gradients(step_of("train_step"))
    for wanted, got in zip((dense, rows), gradients(step_of("sharded_step"), mesh), strict=True):
        jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, rtol=0, atol=4e-6), wanted, got)
    assert max(np.abs(r).max() for r in rows.values()) > 1e-2

    _, unchecked = gradients(step_of("sharded_step"), mesh, check_vma=False)
    averaged_late = [
        ("return jax.lax.pmean(loss, 'x')", "return loss"),
        (
            "emb = mpembed.apply",
            "loss = jax.lax.pmean(loss, 'x'); grads = jax.tree.map(lambda g: g / 4, grads)\n    emb = mpembed.apply",
        ),
    ]
    late_dense, late = gradients(step_of("sharded_step", averaged_late), mesh)
    jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, rtol=0, atol=4e-6), dense, late_dense)
    for wrong in (unchecked, late):
        jax.tree.map(lambda w, g: np.testing.assert_allclose(g, DEVICES * w, rtol=0, atol=2e-5), rows, wrong)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(wrong["item"], rows["item"], rtol=0.5, atol=1e-5)
