"""README's sharded step gives the gradients of one device; the recipes that look as good do not."""

import ast
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from cases import named
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed

README = (Path(__file__).parents[2] / "README.md").read_text()
SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("user", 500), mpembed.TableSpec("item", 900)],
    16,
    "float32",
    mpembed.CacheSpec(num_rows=256, ways=2),
)
UNCACHED = dataclasses.replace(SPEC, cache=None)  # the same float32 rows, and less to compile
SGD = optax.sgd(1.0)  # what moves is minus the gradient
DEVICES = 4


def step_of(name, replace=()):
    """The function `name` of README's snippets, without its decorators, after (old, new)
    replacements in its text.
    """
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    (found,) = [
        n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == name
    ]
    found.decorator_list = []
    text = ast.unparse(found)
    for old, new in replace:
        assert old in text
        text = text.replace(old, new)
    names = {"jax": jax, "jnp": jnp, "optax": optax, "mpembed": mpembed, "tx": SGD, "row_tx": SGD}
    exec(text, names)
    return names[name]


def first_batch():
    rng = np.random.default_rng(0)
    batch = {
        "ids": SPEC.global_ids(
            np.stack([rng.zipf(1.3, 64) % 500, rng.zipf(1.3, 64) % 900], axis=1)
        ),
        "label": rng.integers(0, 2, 64).astype(np.float32),
    }
    return batch, {"w": jnp.asarray(rng.standard_normal((32, 1)), jnp.float32), "b": jnp.zeros(1)}


def gradients(step, mesh=None, check_vma=True, spec=UNCACHED):
    """Dense and row gradients of one step on one batch, whatever the number of devices."""
    batch, params = first_batch()
    emb = mpembed.init(jax.random.key(0), spec, SGD, mesh=mesh)
    before = mpembed.to_dense(emb)
    if mesh is not None:
        specs = mpembed.partition_specs(emb)
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, P(), P(), P("x")),
            out_specs=(specs, P(), P(), P()),
            check_vma=check_vma,
        )
    emb, moved, _, _ = jax.jit(step)(emb, params, SGD.init(params), batch)
    after = mpembed.to_dense(emb)
    return jax.tree.map(
        lambda a, b: np.asarray(a) - np.asarray(b), (params, before), (moved, after)
    )


@pytest.fixture(scope="module")
def one_device():
    return gradients(step_of("train_step"))


@pytest.mark.slow
def test_the_sharded_step_has_the_gradients_of_one_device_and_the_known_wrong_recipes_do_not(
    one_device,
):
    """Sums of 64 terms of at most 1, in another order: 64 x 2^-24 = 4e-6."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    dense, rows = one_device
    for wanted, got in zip(
        (dense, rows), gradients(step_of("sharded_step"), mesh, spec=SPEC), strict=True
    ):
        jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, rtol=0, atol=4e-6), wanted, got)
    assert max(np.abs(r).max() for r in rows.values()) > 1e-2

    _, unchecked = gradients(step_of("sharded_step"), mesh, check_vma=False)
    averaged_late = [
        ("return jax.lax.pmean(loss, 'x')", "return loss"),
        (
            "emb = mpembed.apply",
            "loss = jax.lax.pmean(loss, 'x'); grads = jax.tree.map(lambda g: g / 4, grads)\n"
            "    emb = mpembed.apply",
        ),
    ]
    late_dense, late = gradients(step_of("sharded_step", averaged_late), mesh)
    jax.tree.map(
        lambda w, g: np.testing.assert_allclose(g, w, rtol=0, atol=4e-6), dense, late_dense
    )
    for wrong in (unchecked, late):
        jax.tree.map(
            lambda w, g: np.testing.assert_allclose(g, DEVICES * w, rtol=0, atol=2e-5), rows, wrong
        )
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(wrong["item"], rows["item"], rtol=0.5, atol=1e-5)


@pytest.mark.slow
def test_readmes_recipe_for_pmap_has_the_gradients_of_one_device(one_device):
    """The loss divided by the number of devices, dense gradients summed.

    No other change to the sharded step.
    """
    recipe = [
        ("return jax.lax.pmean(loss, 'x')", "return loss / jax.lax.axis_size('x')"),
        (
            "updates, opt_state = tx",
            "grads = jax.lax.psum(grads, 'x')\n    updates, opt_state = tx",
        ),
    ]
    step, (batch, params) = step_of("sharded_step", recipe), first_batch()

    def run(batch):
        emb = mpembed.init(jax.random.key(0), UNCACHED, SGD, axis_name="x")
        every = jnp.arange(SPEC.num_rows, dtype=jnp.int32)
        before = mpembed.read(emb, every)
        emb, moved, _, loss = step(emb, params, SGD.init(params), batch)
        return (
            jax.tree.map(jnp.subtract, params, moved),
            before - mpembed.read(emb, every),
            jax.lax.psum(loss, "x"),
        )

    divided = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), batch)
    got_dense, got_rows, losses = jax.pmap(run, axis_name="x", devices=jax.devices()[:DEVICES])(
        divided
    )
    dense, rows = one_device
    for device in range(DEVICES):
        np.testing.assert_allclose(
            got_rows[device], np.concatenate([rows["user"], rows["item"]]), rtol=0, atol=4e-6
        )
        jax.tree.map(
            lambda w, g, d=device: np.testing.assert_allclose(g[d], w, rtol=0, atol=4e-6),
            dense,
            got_dense,
        )
    assert (losses == losses[0]).all()


# --- optimizers that mix the rows of a batch

MIXING = {
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), SGD),
    "lamb": optax.lamb(0.05, eps=1e-3),
    "novograd": optax.novograd(0.05, eps=1e-3),  # keeps a norm, a scalar, from step to step
}
MIXED_SPEC = mpembed.EmbeddingSpec(
    mpembed.TableSpec("t", 500), 8, "float32", mpembed.CacheSpec(num_rows=64, ways=2)
)


def mixed_steps(tx, mesh=None, placement=None):
    """Rows and row state after two steps with gradients of ones.

    Several devices ask for one of the rows.
    """
    ids = np.array([*range(12), 3, 3, 7, mpembed.NO_ID], np.int32)
    state = mpembed.init(jax.random.key(0), MIXED_SPEC, tx, mesh=mesh, placement=placement)

    def step(state, ids):
        ones = jnp.ones((*ids.shape, MIXED_SPEC.embedding_dim))
        return training.step(state, ids, tx, training.of_vectors(ones)).state

    if mesh is not None:
        specs = mpembed.partition_specs(state)
        step = jax.shard_map(step, mesh=mesh, in_specs=(specs, P("x")), out_specs=specs)
    step = jax.jit(step)
    for moved in (ids, ids[::-1].copy()):
        state = step(state, moved)
    scalars = [np.asarray(leaf) for leaf in jax.tree.leaves(state.row_state) if not leaf.ndim]
    return mpembed.to_dense(state)["t"], scalars


@pytest.mark.parametrize(
    "case",
    named(
        {
            "global norm": ("global norm", "rows"),
            "lamb": ("lamb", "rows"),
            "novograd": ("novograd", "rows"),
            "global norm, replicated": ("global norm", "replicated"),
        },
        core=(),
        marks={"lamb": training.OPTAX_ADAM},
    ),
)
def test_optimizers_that_mix_rows_see_those_of_all_shards(case):
    """Norms summed in another order: values of about 1 agree within 8 roundings.

    The whole command has the next test, and norms over a mesh in the last one.
    """
    name, placement = case
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-6, atol=2**-21),
        mixed_steps(MIXING[name], mesh, mpembed.Placement(kind=placement)),
        mixed_steps(MIXING[name]),
    )


@pytest.mark.slow
def test_optimizers_that_mix_rows_see_those_of_all_shards_inside_pmap():
    tx, ids = MIXING["global norm"], np.arange(16, dtype=np.int32)

    def run(ids, axis_name=None):
        state = mpembed.init(jax.random.key(0), MIXED_SPEC, tx, axis_name=axis_name)
        state = training.step(state, ids, tx).state
        return mpembed.read(state, jnp.arange(16, dtype=jnp.int32))

    got = jax.pmap(lambda ids: run(ids, "x"), axis_name="x", devices=jax.devices()[:DEVICES])(
        ids.reshape(DEVICES, -1)
    )
    expected = jax.jit(run)(ids)
    for device in got:
        np.testing.assert_allclose(device, expected, rtol=0, atol=2**-21)


@pytest.mark.slow
def test_the_norm_of_row_gradients_is_that_of_one_device_with_and_without_a_mesh():
    """A row that several devices ask for counts once, with the sum; padding rows do not count."""
    ids = np.array([*range(10), 3, 3, 7, mpembed.NO_ID, 3, 3], np.int32)
    upstream = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    dense = np.zeros((500, 8))
    np.add.at(dense, ids[ids != mpembed.NO_ID], upstream[ids != mpembed.NO_ID])

    def norm(state, ids, upstream):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        row_grads = jax.grad(lambda rows: (mpembed.pool(rows, plan.inverse) * upstream).sum())(rows)
        if mesh is None:  # on a mesh, padding may lie anywhere
            row_grads = row_grads.at[-2].set(jnp.nan)
        return mpembed.gradient_norm(state, plan, row_grads)

    for mesh in (None, jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        state = mpembed.init(jax.random.key(0), MIXED_SPEC, SGD, mesh=mesh)
        run = norm
        if mesh is not None:
            specs = (mpembed.partition_specs(state), P("x"), P("x"))
            run = jax.shard_map(norm, mesh=mesh, in_specs=specs, out_specs=P())
        np.testing.assert_allclose(
            jax.jit(run)(state, ids, upstream), np.linalg.norm(dense), rtol=1e-5
        )
