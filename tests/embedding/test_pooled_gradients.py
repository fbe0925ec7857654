"""embed and apply_pooled_gradients make the state of the separate verbs.

This holds for every implementation.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from cases import crossed, named
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from mpembed_jax.embedding import update

KERNEL = "pallas_interpret"
NUM_IDS, BAGS, LENGTH = 90, 16, 4
SGD = mpembed.optim.sgd(0.25)


def ids_for(kind, seed=0, *, has_padding=True):
    """Batches of ids: [16, 4], flat ones, or a nest of bags.

    The bags of the nest have three lengths, one of them zero.
    """
    ids = shapes.skewed_ids(seed, 1, BAGS * LENGTH, NUM_IDS)[0]
    if has_padding:
        ids[[3, 9, 21]], ids[[5, 30]] = mpembed.NO_ID, [-7, NUM_IDS]
    if kind == "nest":
        parts = ids[:30].reshape(10, 3), ids[30:31].reshape(1, 1), ids[31:61].reshape(3, 5, 2)
        return dict(zip("abcd", (*parts, np.zeros((4, 0), np.int32)), strict=True))
    return ids if kind == "ragged" else ids.reshape(BAGS, LENGTH)


class Pool(NamedTuple):
    """The shape of the ids, and the arguments of pool."""

    kind: str
    options: dict


# Divisors are powers of two where there is no padding, so that all sums are exact.
POOLS = {
    "vectors": Pool("dense", {}),
    "sum": Pool("dense", {"combiner": "sum"}),
    "weighted sum": Pool("dense", {"combiner": "sum", "weights": True}),
    "mean": Pool("dense", {"combiner": "mean"}),
    "sqrtn": Pool("dense", {"combiner": "sqrtn"}),
    "ragged sum": Pool("ragged", {"combiner": "sum", "weights": True}),
    "ragged mean": Pool("ragged", {"combiner": "mean"}),
    "nest of vectors": Pool("nest", {}),
    "nest of sums": Pool("nest", {"combiner": "sum"}),
    "nest of weighted sums": Pool("nest", {"combiner": "sum", "weights": True}),
}
MIXED = ("vectors", "weighted sum", "ragged mean", "nest of sums")


def options_for(name, ids):
    kind, options = POOLS[name]
    options = dict(options)
    if options.pop("weights", False):
        options["weights"] = jax.tree.map(lambda i: shapes.dyadic(2, i.shape), ids)
    if (
        kind == "ragged"
    ):  # bags of 0, 1, 2, 4, .. positions, one position before all bags and one after
        sizes = [0, 1, 2, 4, 8, 16, 0, 31]
        segments = np.repeat(np.arange(len(sizes)), sizes)
        options |= {"segment_ids": np.int32([-1, *segments, 99]), "num_segments": len(sizes)}
    return options


def upstream_for(shape):
    return shapes.dyadic(1, shape, bits=3, scale=0.25)


def half_or_its_negative(shape):
    return np.random.default_rng(1).choice(np.float32([-0.5, 0.5]), shape)


def train(state, ids, options, tx, *, is_pooled, steps=3, upstream=upstream_for):
    """The state after so many steps with the same ids, by one way or the other."""
    # An interpreted kernel runs a few times, but is long to optimize.
    is_quick = state.implementation == KERNEL and not isinstance(state.step, jax.core.Tracer)
    quick = {"xla_backend_optimization_level": 0} if is_quick else None

    @partial(jax.jit, donate_argnums=0, compiler_options=quick)
    def step(state):
        if is_pooled:
            state, plan, vectors = mpembed.embed(state, ids, **options, tx=tx)
            grads = jax.tree.map(lambda v: upstream(v.shape), vectors)
            return mpembed.apply_pooled_gradients(state, plan, grads, tx=tx)
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        pool = partial(
            mpembed.pool, inverse=plan.inverse, implementation=state.implementation, **options
        )
        vectors, pull_back = jax.vjp(pool, rows)
        grads = jax.tree.map(lambda v: upstream(v.shape), vectors)
        return mpembed.apply_gradients(state, plan, rows, pull_back(grads)[0], tx=tx)

    for _ in range(steps):
        state = step(state)
    return state


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(other))


def by_both_ways(spec, ids, options, tx=SGD, implementation=KERNEL):
    results = []
    for is_pooled in (True, False):
        state = mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
        results.append(train(state, ids, options, tx, is_pooled=is_pooled))
    before = mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
    assert (np.asarray(before.table.rows) != np.asarray(results[0].table.rows)).any()
    return results


PAIRS = [(name, KERNEL) for name in POOLS]
PAIRS += [(name, implementation) for name in MIXED for implementation in ("numba", "xla_chunked")]
# Kernels take a long time to compile: with them, one nest. Vectors are in the test of gradients
# that are not finite, ragged means in the next one.
CORE = {f"nest of weighted sums-{KERNEL}"}
CORE |= {f"{name}-numba" for name in MIXED}


@pytest.mark.parametrize("case", named(PAIRS, core=CORE))
def test_the_pair_makes_the_state_of_the_separate_verbs(case):
    """With hits, evictions and bypassed rows.

    There are padding, ids outside the table and empty bags where sums stay exact.
    """
    name, implementation = case
    spec = shapes.stack(NUM_IDS, 6, storage="int8", lines=16, ways=4)
    ids = ids_for(POOLS[name].kind, has_padding="mean" not in name and name != "sqrtn")
    one, other = by_both_ways(spec, ids, options_for(name, ids), implementation=implementation)
    same(one, other)
    assert mpembed.stats(one).bypasses > 0 and mpembed.stats(one).hits > 0


@crossed(
    name=named(["weighted sum", "ragged mean", "nest of sums"], fast={"ragged mean"}),
    implementation=named(["xla", None], fast={"None"}),
    core={"nest of sums-xla"},
)
def test_without_kernels_and_with_a_rule(name, implementation):
    spec = shapes.stack(NUM_IDS, 6, storage="int4", lines=16, ways=4)
    ids = ids_for(POOLS[name].kind)
    same(
        *by_both_ways(
            spec, ids, options_for(name, ids), mpembed.optim.rowwise_adagrad(0.1), implementation
        )
    )


@pytest.mark.parametrize(
    "tx",
    named(
        {
            "rule": mpembed.optim.rowwise_adagrad(0.25, eps=0.0),
            "no rule": optax.sgd(0.25, momentum=0.5),
        },
        core={"rule"},
    ),
)
def test_transformations_with_and_without_a_rule(tx):
    """Adagrad's arithmetic is exact.

    Each row's first gradient is one bag's, all of one magnitude.
    """
    ids = np.arange(48, dtype=np.int32).reshape(12, 4)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 60)], 8, "bfloat16", None, row_state_dtype="bfloat16"
    )
    results = []
    for is_pooled in (True, False):
        state = mpembed.init(jax.random.key(0), spec, tx, implementation=KERNEL)
        assert update.has_kernel(tx, state) == (mpembed.optim.rule_of(tx) is not None)
        results.append(
            train(
                state,
                ids,
                {"combiner": "sum"},
                tx,
                is_pooled=is_pooled,
                steps=1,
                upstream=half_or_its_negative,
            )
        )
    same(*results)


@pytest.mark.parametrize(
    "options",
    named(
        {
            "ids over the budget": {"cache": mpembed.CacheSpec(num_rows=16, ways=4)}
            | {"max_unique_ids": 12},
            "a host table": {"memory_kind": "pinned_host"},
        },
        core=(),
    ),
)
def test_options_of_the_stack(options):
    """The whole command has host tables with kernels in test_host_tables.py.

    It has budgets with kernels in tests/ops/test_gpu_plan.py, with numba in test_vectors.py.
    """
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", NUM_IDS)], 6, "int8", **options)
    same(*by_both_ways(spec, ids_for("dense"), {"combiner": "sum"}))


@pytest.mark.slow
def test_rows_whose_gradient_is_not_finite_are_skipped_and_counted():
    """A cached and a bypassed row; the line of a skipped row stays clean."""
    cache = mpembed.CacheSpec(num_rows=16, ways=4)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 80)], 4, "int8", cache, skip_nonfinite=True
    )
    ids = np.arange(40, dtype=np.int32)
    grads = np.full((40, 4), 0.5, np.float32)
    results = []
    first = mpembed.init(jax.random.key(0), spec, SGD, implementation="numba")
    _, seen = jax.jit(mpembed.prefetch)(first, ids)
    is_bypassed = np.asarray(seen.inverse) >= int(seen.placed[1])
    grads[np.argmin(is_bypassed), 1], grads[np.argmax(is_bypassed), 0] = np.nan, -np.inf
    for is_pooled, implementation in ((False, "numba"), (True, KERNEL), (True, "numba")):
        state = dataclasses.replace(first, implementation=implementation)

        @partial(jax.jit, donate_argnums=0)
        def step(state, grads):
            if is_pooled:  # noqa: B023 -- traced at once
                state, plan, _ = mpembed.embed(state, ids, tx=SGD)
                return mpembed.apply_pooled_gradients(state, plan, grads, tx=SGD)
            state, plan = mpembed.prefetch(state, ids)
            rows = mpembed.lookup(state, plan)
            pull_back = jax.vjp(lambda rows: mpembed.pool(rows, plan.inverse), rows)[1]
            return mpembed.apply_gradients(state, plan, rows, pull_back(grads)[0], tx=SGD)

        results.append(step(jax.tree.map(jnp.copy, state), grads))
    for other in results[1:]:
        same(results[0], other)
    assert mpembed.stats(results[0]).nonfinite_rows == 2
    assert int(np.sum(results[0].cache.dirty)) == 15


@pytest.mark.parametrize("implementation", named([KERNEL, "numba"], core={"numba"}))
def test_a_second_call_changes_nothing_and_is_counted(implementation):
    """With kernels, the whole command does so in tests/ops/test_gpu_kernels.py."""
    spec = shapes.stack(NUM_IDS, 6, storage="int8", lines=16, ways=4)
    state = mpembed.init(jax.random.key(0), spec, SGD, implementation=implementation)
    ids, grads = ids_for("dense"), jnp.ones((BAGS, LENGTH, 6))

    @jax.jit
    def twice(state):
        state, plan, _ = mpembed.embed(state, ids, tx=SGD)
        once = mpembed.apply_pooled_gradients(state, plan, grads, tx=SGD)
        return once, mpembed.apply_pooled_gradients(
            jax.lax.optimization_barrier(once), plan, grads, tx=SGD
        )

    once, again = twice(state)
    same((once.table, once.cache), (again.table, again.cache))
    with pytest.raises(ValueError, match="1 calls changed nothing: apply_gradients"):
        mpembed.stats(again)
    eager, plan, _ = mpembed.embed(state, ids, tx=SGD)
    eager = mpembed.apply_pooled_gradients(eager, plan, grads, tx=SGD)
    with pytest.raises(ValueError, match="needs its own embed, but this state has none waiting"):
        mpembed.apply_pooled_gradients(eager, plan, grads, tx=SGD)


@pytest.mark.parametrize("implementation", named([KERNEL, "numba"], core={"numba"}))
def test_a_batch_without_ids_or_bags(implementation):
    """Kernels of empty parts of a plan are also in tests/ops/test_gpu_kernels.py."""
    spec = shapes.stack(NUM_IDS, 6, storage="int8", lines=16, ways=4)
    for ids, options, grads in (
        ([], {}, []),
        ([], {"combiner": "mean"}, []),
        (np.zeros((3, 0), np.int32), {"combiner": "sum"}, np.ones((3, 6), np.float32)),
        (
            np.arange(3, dtype=np.int32),
            {"combiner": "sum", "segment_ids": np.zeros(3, np.int32), "num_segments": 0},
            np.zeros((0, 6), np.float32),
        ),
    ):
        state = mpembed.init(jax.random.key(0), spec, SGD, implementation=implementation)
        embedded, plan, vectors = mpembed.embed(state, ids, **options, tx=SGD)
        jax.tree.map(lambda v, g: np.testing.assert_array_equal(v, 0 * g), vectors, grads)
        after = mpembed.apply_pooled_gradients(embedded, plan, grads, tx=SGD)
        np.testing.assert_array_equal(after.table.rows, embedded.table.rows)


@pytest.mark.parametrize("implementation", [KERNEL, "numba"])
def test_a_gradient_that_is_no_number_stays_in_its_bag(implementation):
    """Positions outside every bag take none, though the last bag's is not finite."""
    spec = shapes.stack(NUM_IDS, 6, storage="float32")
    ids, segments = np.int32([1, 2, 3, 4]), np.int32([0, 1, -1, 7])
    state = mpembed.init(jax.random.key(0), spec, SGD, implementation=implementation)

    @jax.jit
    def step(state):
        options = {"combiner": "sum", "segment_ids": segments, "num_segments": 2}
        state, plan, _ = mpembed.embed(state, ids, **options, tx=SGD)
        grads = jnp.ones((2, 6)).at[1].set(jnp.nan)
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=SGD)

    before, after = (np.asarray(mpembed.read(s, ids)) for s in (state, step(state)))
    np.testing.assert_array_equal(after[2:], before[2:])
    assert np.isnan(after[1]).all()
    np.testing.assert_allclose(after[0], before[0] - 0.25, atol=1e-6)


@pytest.mark.parametrize("name", ["vectors", "nest of weighted sums", "ragged mean"])
def test_a_user_in_x64_mode_gets_the_same_dtypes(name):
    """Traced only, both ways, with kernels and with numba."""
    spec = shapes.stack(NUM_IDS, 6, storage="int8", lines=16, ways=4)
    ids = ids_for(POOLS[name].kind)
    with jax.enable_x64(True):
        state = jax.eval_shape(
            lambda: mpembed.init(jax.random.key(0), spec, SGD, implementation=KERNEL)
        )
        native = dataclasses.replace(state, implementation="numba")
        for given, is_pooled in ((state, True), (state, False), (native, True)):
            after = jax.eval_shape(
                lambda state, is_pooled=is_pooled: train(
                    state, ids, options_for(name, ids), SGD, is_pooled=is_pooled, steps=1
                ),
                given,
            )
            assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, given)


@pytest.mark.slow
def test_over_a_mesh_it_is_that_pair():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = shapes.stack(NUM_IDS, 6, storage="int8")
    ids = ids_for("dense")
    results = []
    for is_pooled in (True, False):
        state = mpembed.init(jax.random.key(0), spec, SGD, mesh=mesh)
        specs = mpembed.partition_specs(state)

        def step(state, ids):
            if is_pooled:  # noqa: B023 -- traced at once
                state, plan, bags = mpembed.embed(state, ids, combiner="sum", tx=SGD)
                return mpembed.apply_pooled_gradients(state, plan, jnp.ones_like(bags), tx=SGD)
            state, plan = mpembed.prefetch(state, ids)
            rows = mpembed.lookup(state, plan)
            bags, pull_back = jax.vjp(
                lambda rows: mpembed.pool(rows, plan.inverse, combiner="sum"), rows
            )
            return mpembed.apply_gradients(
                state, plan, rows, pull_back(jnp.ones_like(bags))[0], tx=SGD
            )

        run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, P("x")), out_specs=specs))
        results.append(jax.device_get(run(state, ids)))
    same(*results)


@pytest.mark.parametrize("implementation", named([KERNEL, "numba"], fast={"numba"}, core=()))
def test_bad_gradients_and_arguments_are_refused(implementation):
    """One check for every implementation, before its first operation."""
    spec = shapes.stack(NUM_IDS, 6, storage="int8", lines=16, ways=4)
    state = mpembed.init(jax.random.key(0), spec, SGD, implementation=implementation)
    embed = partial(mpembed.embed, state, ids_for("dense"), tx=SGD)
    vectors, bags = jnp.ones((BAGS, LENGTH, 6)), jnp.ones((BAGS, 6))
    for grads, combiner in (
        (bags, None),
        (vectors, "sum"),
        ([vectors], None),
        (vectors.astype(jnp.bfloat16), None),
        (jnp.ones((BAGS, LENGTH, 5)), None),
    ):
        embedded, plan, _ = embed(combiner=combiner)
        with pytest.raises(ValueError, match="pooled_grads must be like the vectors of embed"):
            mpembed.apply_pooled_gradients(embedded, plan, grads, tx=SGD)
    with pytest.raises(ValueError, match="combiner must be None"):
        embed(combiner="max")
    with pytest.raises(ValueError, match="weights and segment_ids need a combiner"):
        embed(weights=vectors[..., 0])
    if implementation == "numba":
        embedded, plan, _ = embed()
        with pytest.raises(ValueError, match="pass the same tx to init, embed and"):
            mpembed.apply_pooled_gradients(embedded, plan, vectors, tx=optax.adam(0.1))


@pytest.mark.exhaustive
def test_positions_outside_every_bag_take_no_gradient():
    """They belong to a row all the same. They must not make it NaN beside an infinite gradient.

    The whole command has them beside NaN, in test_a_gradient_that_is_no_number_stays_in_its_bag.
    """
    spec = shapes.stack(60, 4, storage="float32", lines=16, ways=4)
    place = jnp.arange(24, dtype=jnp.int32)
    bags = jnp.where(place % 5 == 0, -1, place % 6)
    grads = jnp.asarray(shapes.dyadic(0, (6, 4))).at[0].set(jnp.inf).at[5].set(jnp.inf)

    @partial(jax.jit, static_argnames="implementation")
    def rows_after(implementation):
        state = mpembed.init(jax.random.key(0), spec, SGD, implementation=implementation)
        given = {"combiner": "sum", "segment_ids": bags, "num_segments": 6}
        state, plan, _ = mpembed.embed(state, place % 7, **given, tx=SGD)
        state = mpembed.apply_pooled_gradients(state, plan, grads, tx=SGD)
        return mpembed.read(state, jnp.arange(7, dtype=jnp.int32)), plan.plan

    (wanted, _), (got, plan) = rows_after("xla"), rows_after(KERNEL)
    assert plan.segments is not None
    assert jnp.isinf(wanted).any() and jnp.isfinite(wanted).any() and not jnp.isnan(wanted).any()
    assert (wanted == got).all()
