"""Plans of modules are no wider than the rows that their features can name, with equal results."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import crossed, named
from flax import nnx
from nn_models import assert_same_bits

import mpembed_jax as mpembed
from experiments.speed import workload
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, nn, optim
from mpembed_jax.spec import most_distinct

DIM, BATCH = 4, 16
SIZES = {"a": 3, "b": 200, "c": 7}
TX = optim.rowwise_adagrad(0.1)
TABLES = tuple(TableSpec(name, size) for name, size in SIZES.items())


def spec_of(**options):
    features = {"a": "a", "b": "b", "again": "b", "c": "c"}
    options = {"storage": "int8", "cache": CacheSpec(num_rows=64, ways=4), **options}
    return EmbeddingSpec(TABLES, DIM, features=features, **options)


def ids_of(spec, seed, *shape):
    """Every row of a small table is among them, with padding and ids outside."""
    rng = np.random.default_rng(seed)
    ids = {}
    for feature, table in spec.feature_tables:
        values = rng.integers(-1, SIZES[table] + 1, shape).reshape(-1)
        values[: SIZES[table]] = np.arange(SIZES[table])[: values.size]
        ids[feature] = np.where(values == -1, NO_ID, values).reshape(shape).astype(np.int32)
    return ids


class Bound(NamedTuple):
    of_ids: tuple[tuple[str, ...], ...] | None  # the tables of each array
    sizes: list[int]  # positions of each array
    most: int


BOUNDS = {
    "unknown tables": Bound(None, [5, 6], 11),
    "a small table": Bound((("a",),), [9], 3),
    "several arrays of a table": Bound((("a",), ("b",), ("b",)), [9, 9, 8], 3 + 17),
    "columns": Bound((("a", "b", "c"),), [3 * 5], 3 + 5 + 5),
    "no ids": Bound((), [], 0),
}


@pytest.mark.parametrize("bound", named(BOUNDS))
def test_the_bound_is_a_sum_over_tables(bound):
    assert most_distinct(TABLES, bound.of_ids, bound.sizes) == bound.most


@pytest.mark.parametrize(("batch", "share"), [(2048, 0.60), (65_536, 0.34)])
def test_the_bound_of_the_kaggle_tables(batch, share):
    """In positions of a batch of 26 features."""
    tables = tuple(TableSpec(f"C{n}", size) for n, size in enumerate(workload.KAGGLE_SIZES))
    names = (tuple(table.name for table in tables),)
    most = most_distinct(tables, names, [26 * batch])
    assert most == sum(min(table.vocabulary_size, batch) for table in tables)
    assert round(most / (26 * batch), 2) == share


def width_of(module, *ids):
    module.prefetch(*ids)
    stack = module.stacks[0] if hasattr(module, "stacks") else module.stack
    width = stack.rows.get_value().shape[0]
    nn.discard(module)
    return width


@pytest.mark.slow
def test_widths_are_the_exact_bound():
    spec = spec_of()
    bags = nn.CachedEmbedBags(spec, TX, rngs=nnx.Rngs(0))
    ids = ids_of(spec, 0, BATCH, 2)
    assert width_of(bags, ids) == 3 + 2 * 2 * BATCH + 7 + 1
    assert width_of(bags, {"a": ids["a"]}) == 3 + 1
    columns = np.stack([of[:, 0] for of in ids.values()], axis=-1)
    assert width_of(bags, columns) == 3 + 2 * BATCH + 7 + 1
    embed = nn.CachedEmbed(50, DIM, rngs=nnx.Rngs(0))
    assert width_of(embed, [np.arange(20), np.arange(40)]) == 50 + 1
    assert width_of(embed, np.arange(20)) == 20 + 1
    memory = nn.NGramMemory(60, DIM, rows=5, heads=2, rngs=nnx.Rngs(0))
    sizes = [table.vocabulary_size for table in memory.stack.spec.tables]
    assert width_of(memory, np.zeros((4, 9), np.int32)) == sum(min(n, 36) for n in sizes) + 1
    budget = nn.CachedEmbedBags(spec_of(max_unique_ids=9), TX, rngs=nnx.Rngs(0))
    assert width_of(budget, ids) == 9 + 1


@crossed(
    implementation=["xla", "numba"],
    fused=[False, True],
)
def test_results_are_those_of_plans_as_wide_as_the_batch(implementation, fused):
    """A module's step, and the verbs on global ids, whose features nobody knows."""
    pytest.importorskip("numba", reason="the [cpu] extra is not installed")
    spec = spec_of()
    options = {"implementation": implementation, "fused": fused, "rngs": nnx.Rngs(0)}
    bags = nn.CachedEmbedBags(spec, TX, combiner="mean", **options)
    state = jax.tree.map(jnp.array, bags.states[0])

    def gradient(vectors):
        return jax.tree.map(lambda v: jnp.where(v < 0, v, jnp.float32(1)), vectors)

    @nnx.jit
    def by_module(bags, ids):
        bags.prefetch(ids)

        def loss_fn(bags):
            vectors = bags(ids)
            parts = jax.tree.map(lambda v: jnp.where(v < 0, v * v / 2, v).sum(), vectors)
            return sum(jax.tree.leaves(parts)), vectors

        (_, vectors), grads = nnx.value_and_grad(loss_fn, has_aux=True)(bags)
        nn.apply_gradients(bags, grads)
        return vectors

    @jax.jit
    def by_verbs(state, ids):
        nest = spec.global_ids(ids)
        if fused:
            state, plan, vectors = mpembed.embed(state, nest, combiner="mean", tx=TX)
            return mpembed.apply_pooled_gradients(state, plan, gradient(vectors), tx=TX), vectors
        state, plan = mpembed.prefetch(state, nest)
        rows = mpembed.lookup(state, plan)

        def pool(rows):
            return {
                feature: mpembed.pool(
                    rows, index, combiner="mean", implementation=state.implementation
                )
                for feature, index in plan.inverse.items()
            }

        vectors, pull_back = jax.vjp(pool, rows)
        grads = pull_back(gradient(vectors))[0]
        return mpembed.apply_gradients(state, plan, rows, grads, tx=TX), vectors

    for seed in range(4):
        ids = jax.tree.map(jnp.asarray, ids_of(spec, seed, BATCH, 2))
        vectors = by_module(bags, ids)
        state, wanted = by_verbs(state, ids)
        assert_same_bits(vectors, wanted)
    assert_same_bits(bags.states[0], state)
    assert mpembed.stats(state).dropped == 0


@pytest.mark.parametrize("blocks", named([None, 4], core={"4"}))
def test_over_a_mesh_results_are_those_of_one_device(blocks):
    """Each device knows the bound of its own share of the batch."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), auto, devices=jax.devices()[:2])
    placement = mpembed.Placement(summation_blocks=blocks)
    spec = spec_of(storage="float32", cache=None)
    options = {"combiner": "sum", "rngs": nnx.Rngs(0)}
    one = nn.CachedEmbedBags(spec, optim.sgd(0.1), **options)
    two = nn.CachedEmbedBags(
        spec, optim.sgd(0.1), combiner="sum", mesh=mesh, placement=placement, rngs=nnx.Rngs(0)
    )

    @nnx.jit
    def step(bags, ids):
        bags.prefetch(ids)
        width = jax.tree.leaves(bags.stacks[0].plan.get_value().plan.unique_ids)[0].shape[0]

        def loss_fn(bags):
            vectors = bags(ids)
            return sum(jax.tree.leaves(jax.tree.map(lambda v: (v * v).sum(), vectors))), vectors

        (_, vectors), grads = nnx.value_and_grad(loss_fn, has_aux=True)(bags)
        nn.apply_gradients(bags, grads)
        return vectors, width

    for seed in range(3):
        ids = jax.tree.map(jnp.asarray, ids_of(spec, seed, BATCH, 2))
        (alone, _), (shared, width) = step(one, ids), step(two, ids)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, shared
        )
    num = BATCH // (blocks or 2)  # examples that one device deduplicates at once
    each = min(3, 2 * num) + min(200, 4 * num) + min(7, 2 * num)
    assert width == 2 * ((blocks or 2) // 2 * each + 1)
    tables = [mpembed.to_dense(bags.states[0]) for bags in (one, two)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *tables)
    assert mpembed.stats(two.states[0]).dropped == 0
