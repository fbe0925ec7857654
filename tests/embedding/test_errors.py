"""Twelve deliberate mistakes, then odd inputs that just work.

Each mistake ends in a message that names the fix, and harms no row.
"""

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
import training
from cases import named

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec

TX = optax.sgd(0.5)
DIM = 4


def stack(sizes=(20,), *, storage="float32", cache=None, **options):
    """Tables t0, t1, .. of these sizes."""
    return EmbeddingSpec(
        [TableSpec(f"t{k}", n) for k, n in enumerate(sizes)],
        DIM,
        storage=storage,
        cache=cache,
        **options,
    )


def start(spec, tx=TX, seed=0):
    return mpembed.init(jax.random.key(seed), spec, tx)


def run(state, ids):
    state, plan, rows = training.step(state, ids, TX)
    return state, mpembed.pool(rows, plan.inverse), plan


train = jax.jit(run, donate_argnums=0)
prefetch = jax.jit(mpembed.prefetch)


def all_rows(state):
    if state.cache is None and state.spec.storage.name == "float32":
        # The packed layout of float32, without a compilation.
        return np.array(state.table.rows).view(np.float32)
    return training.all_rows(state)


def assert_only_these_rows_moved(before, after, moved):
    is_moved = (before != after).any(-1)
    assert set(np.flatnonzero(is_moved)) == set(moved)


# --- 1. int64 ids above 2**31


@pytest.mark.parametrize(
    "ids",
    [np.array([2**32 + 5]), np.array([3, 2**63], np.uint64), [1, 2**32 + 5], -(2**31) - 1],
    ids=str,
)
def test_ids_beyond_32_bits_are_refused_before_jax_truncates_them(ids):
    """jax would read 2**32 + 5 as 5."""
    for call in (mpembed.prefetch, mpembed.read):
        with pytest.raises(
            ValueError,
            match=r"ids must fit int32.*spec\.global_ids, which checks ranges before jax trunc",
        ):
            call(start(stack()), ids)


def test_ids_beyond_32_bits_pass_global_ids_without_becoming_another_row():
    spec = stack()
    ids = spec.global_ids({"t0": np.array([2**32 + 5, 7])})["t0"]
    state = start(spec)
    before = all_rows(state)
    state, vectors, plan = train(state, ids)
    assert_only_these_rows_moved(before, all_rows(state), {7})
    np.testing.assert_array_equal(vectors[0], 0.0)
    assert int(plan.counts.out_of_range) == 1
    with pytest.raises(
        ValueError,
        match=r'id 4294967301 at \[0\] is outside its table of 20 rows.*"drop" or "clip"',
    ):
        stack(out_of_range="raise").global_ids({"t0": np.array([2**32 + 5, 7])})


# --- 2. float ids


@pytest.mark.parametrize(
    "ids",
    [np.ones(3), jnp.ones((2, 2)), 1.0, [1, 2.0], np.ones(3, bool), {"a": jnp.ones(2, bool)}],
    ids=str,
)
def test_ids_that_are_no_integers_are_refused_with_their_dtype(ids):
    for call in (mpembed.prefetch, mpembed.read):
        with pytest.raises(
            TypeError,
            match=r"ids must be int32 \[..\], got .*(float|bool).*cast them .*before prefetch",
        ):
            call(start(stack()), ids)


def test_float_ids_are_refused_while_tracing_too():
    state = start(stack())
    with pytest.raises(TypeError, match=r"got float32 \[256, 20\]; cast them"):
        jax.eval_shape(mpembed.prefetch, state, jax.ShapeDtypeStruct((256, 20), jnp.float32))


# --- 3. negative ids, 4. ids of the next table


def test_negative_ids_do_not_wrap_to_the_last_rows():
    """numpy would read -1 as the last row."""
    state = start(stack())
    before = all_rows(state)
    state, vectors, plan = train(state, np.array([-1, -20, -(2**31), 3], np.int32))
    assert_only_these_rows_moved(before, all_rows(state), {3})
    np.testing.assert_array_equal(vectors[:3], 0.0)
    assert int(plan.counts.out_of_range) == 3
    np.testing.assert_array_equal(training.read(state, np.array([-1, 20, NO_ID], np.int32)), 0.0)
    with pytest.raises(ValueError, match=r"'t0': id -1 at \[1\].*out_of_range="):
        stack(out_of_range="raise").global_ids({"t0": np.array([0, -1])})


class OutOfRange(NamedTuple):
    """A rule for ids outside their table, and what it does with two such ids."""

    name: str
    moved_rows: set[int]
    num_counted: int


@pytest.mark.parametrize("rule", named([OutOfRange("drop", {0}, 2), OutOfRange("clip", {0, 2}, 0)]))
def test_an_id_past_its_table_never_reaches_the_next_table(rule):
    """Tables of 3 and 5 rows: id 3 of the first is row 0 of the second in a naive stack."""
    spec = stack((3, 5), out_of_range=rule.name)
    state = start(spec)
    before = all_rows(state)
    state, _, plan = train(state, spec.global_ids({"t0": np.array([3, 7, 0])})["t0"])
    assert_only_these_rows_moved(before, all_rows(state), rule.moved_rows)
    assert int(plan.counts.out_of_range) == rule.num_counted
    with pytest.raises(
        ValueError, match=r"'t0': id 3 at \[0\] is outside its table of 3 rows \(2 such ids\)"
    ):
        stack((3, 5), out_of_range="raise").global_ids({"t0": np.array([3, 7, 0])})


# --- 5. a forgotten prefetch, 6. two apply_gradients for one prefetch

FIX = "call prefetch once before each apply_gradients"


def test_a_forgotten_prefetch_is_refused():
    state = start(stack())
    _, plan = prefetch(state, np.array([1, 2], np.int32))
    rows = jnp.zeros((3, DIM))
    with pytest.raises(ValueError, match=FIX):
        mpembed.apply_gradients(state, plan, rows, rows, tx=TX)


def test_a_second_update_for_one_prefetch_is_refused_wherever_it_happens():
    """Called directly or within one trace it raises.

    Across jitted calls it changes nothing, is counted and stats raises.
    """
    state = start(stack(cache=CacheSpec(num_rows=8)))
    state, plan = prefetch(state, np.array([1, 2], np.int32))
    rows = mpembed.lookup(state, plan)
    apply = jax.jit(partial(mpembed.apply_gradients, tx=TX))
    once = apply(state, plan, rows, jnp.ones_like(rows))

    with pytest.raises(ValueError, match=FIX):
        mpembed.apply_gradients(once, plan, rows, rows, tx=TX)

    @jax.jit
    def twice_in_one_step(state, ids):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        for _ in range(2):
            state = mpembed.apply_gradients(state, plan, rows, rows, tx=TX)
        return state

    with pytest.raises(ValueError, match=FIX):
        jax.eval_shape(twice_in_one_step, state, jax.ShapeDtypeStruct((2,), jnp.int32))

    twice = apply(once, plan, rows, jnp.ones_like(rows))
    jax.tree.map(
        np.testing.assert_array_equal, (twice.table, twice.cache), (once.table, once.cache)
    )
    with pytest.raises(ValueError, match=f"1 apply_gradients calls.*{FIX} and pass its plan"):
        mpembed.stats(twice)


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked", "numba"])
def test_an_old_plan_reads_nan_changes_nothing_and_stats_names_it(implementation):
    """Two prefetches, then the first one's plan. Called directly, lookup and the update raise."""
    spec = stack(cache=CacheSpec(num_rows=8, ways=1, policy="lru"))
    state = mpembed.init(jax.random.key(0), spec, TX, implementation=implementation)
    state, old = prefetch(state, np.arange(8, dtype=np.int32))
    rows = mpembed.lookup(state, old)
    state, plan = prefetch(state, np.arange(12, 20, dtype=np.int32))
    with pytest.raises(ValueError, match="lookup needs the plan of the state's latest prefetch"):
        mpembed.lookup(state, old)
    with pytest.raises(ValueError, match="number 1, and got that of number 0"):
        mpembed.apply_gradients(state, old, rows, rows, tx=TX)
    assert np.isnan(jax.jit(mpembed.lookup)(state, old)).all()
    wanted = [*all_rows(state)[plan.unique_ids[:-1]], np.zeros(DIM)]
    np.testing.assert_array_equal(jax.jit(mpembed.lookup)(state, plan), wanted)
    after = jax.jit(partial(mpembed.apply_gradients, tx=TX))(state, old, rows, jnp.ones_like(rows))
    np.testing.assert_array_equal(all_rows(after), all_rows(state))
    with pytest.raises(ValueError, match="an old plan and changed nothing"):
        mpembed.stats(after)


# --- 7. a missing donation


def test_a_step_that_copies_the_table_is_warned_of_once():
    """stats sees that the table moved between two of its looks; donated, it stays where it is."""
    spec = EmbeddingSpec(TableSpec("donation", 50_000), DIM, cache=None)

    def loop(step, state):
        for _ in range(5):
            mpembed.stats(state)
            state = step(state, np.array([1, 2], np.int32))[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        loop(train, start(spec, seed=1))
        assert not caught
        loop(jax.jit(run), start(spec, seed=2))
    messages = [str(w.message) for w in caught]
    assert messages, "no warning"
    assert "moved to another buffer" in messages[0]
    assert "donate_argnames (or donate_argnums) for the embedding state" in messages[0]
    assert len(messages) == 1


# --- 8. the wrong tx, 10. an unsupported one


def test_another_tx_than_inits_is_refused():
    state = start(stack(), optax.sgd(0.1, momentum=0.9))
    state, plan = prefetch(state, np.array([1, 2], np.int32))
    rows = mpembed.lookup(state, plan)
    for tx in (
        optax.sgd(0.1),
        mpembed.optim.rowwise_adagrad(0.1),
        optax.chain(optax.sgd(0.1, momentum=0.9), optax.clip(1.0)),
    ):
        with pytest.raises(ValueError, match="pass the same tx to init and apply_gradients"):
            mpembed.apply_gradients(state, plan, rows, rows, tx=tx)
    with pytest.raises(
        TypeError,
        match=r"tx must be an optax gradient transformation such as optim\.rowwise_adagrad",
    ):
        mpembed.apply_gradients(state, plan, rows, rows, tx=0.1)


def test_an_optimizer_that_cannot_be_kept_by_row_is_refused_at_init():
    with pytest.raises(
        ValueError,
        match=r"leaf .*v_row.* cannot be kept by row; use for example optim\.rowwise_adagrad",
    ):
        start(stack(), optax.adafactor(0.1))


# --- 9. another spec at restore


OTHER_SPECS = {
    "storage": (dict(storage="bfloat16"), dict(storage="float16")),
    "scale": (
        dict(storage=mpembed.RowFormat("int8", scale_dtype="bfloat16")),
        dict(storage=mpembed.RowFormat("int8", scale_dtype="float16")),
    ),
    "tables": (dict(sizes=(8, 12)), dict(sizes=(12, 8))),
    "same": (dict(storage="int8"), dict(storage="int8")),
}


@pytest.mark.parametrize("case", OTHER_SPECS)
def test_a_checkpoint_of_another_spec_is_refused_even_where_all_shapes_agree(case):
    """A checkpointer puts saved arrays into the tree of a target.

    Equal shapes pass it (test_checkpoint_stock.py), so the state itself must tell that its arrays
    were made for another spec.
    """
    saved, target = (stack(**options) for options in OTHER_SPECS[case])
    structure = jax.tree.structure(
        jax.eval_shape(lambda key: mpembed.init(key, target, TX), jax.random.key(0))
    )
    restored = jax.tree.unflatten(structure, jax.tree.leaves(start(saved)))
    if case == "same":
        mpembed.stats(restored)
        return
    with pytest.raises(ValueError, match="spec"):
        mpembed.stats(restored)


# --- 11. a unique budget that is too small


def test_ids_over_the_budget_are_counted_read_as_zeros_and_harm_no_row():
    spec = stack(max_unique_ids=4, cache=CacheSpec(num_rows=10))
    state = start(spec)
    before = all_rows(state)
    ids = np.array([[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 1]], np.int32)
    state, vectors, plan = train(state, ids)
    kept = set(np.asarray(plan.unique_ids)[:4].tolist())
    assert kept < set(range(1, 11))
    assert len(kept) == 4
    assert plan.unique_ids.shape == (5,)
    assert int(plan.counts.dropped) == 6
    assert_only_these_rows_moved(before, all_rows(state), kept)
    is_kept = np.isin(ids, list(kept))
    np.testing.assert_array_equal(np.asarray(vectors)[~is_kept], 0.0)
    np.testing.assert_array_equal(np.asarray(vectors)[is_kept], before[ids[is_kept]])
    with pytest.warns(
        UserWarning,
        match=r"6 unique ids exceeded max_unique_ids=4.*raise max_unique_ids in the Embedding",
    ):
        assert mpembed.stats(state).dropped == 6


# --- 12. a cache smaller than the batch


def test_a_cache_smaller_than_the_batch_trains_every_row_and_is_warned_of():
    """Six lines, 100 unique ids a batch: the values are those of no cache at all.

    The warning names both numbers.
    """
    ids = np.stack([np.random.default_rng(s).permutation(120)[:100] for s in range(11)]).astype(
        np.int32
    )
    small, none = start(stack((120,), cache=CacheSpec(num_rows=6))), start(stack((120,)))
    for batch in ids:
        (small, _, _), (none, _, _) = train(small, batch), train(none, batch)
    np.testing.assert_array_equal(all_rows(small), all_rows(none))
    with pytest.warns(
        UserWarning,
        match=r"about 100 unique ids, the cache 6 lines: raise CacheSpec\(fraction=\.\.\)",
    ):
        stats = mpembed.stats(small)
    assert stats.bypasses > 0.9 * stats.unique


# --- other arguments


def test_rows_and_gradients_of_another_shape_or_dtype_are_refused():
    state = start(stack())
    state, plan = prefetch(state, np.array([1, 2], np.int32))
    rows = mpembed.lookup(state, plan)
    with pytest.raises(
        ValueError,
        match=r"row_grads must be float32 \(3, 4\).*differentiate with respect to the rows that",
    ):
        mpembed.apply_gradients(state, plan, rows, rows[plan.inverse], tx=TX)
    with pytest.raises(
        ValueError, match=r"rows must be float32 \(3, 4\), got bfloat16; keep the rows in float32"
    ):
        mpembed.apply_gradients(
            state, plan, mpembed.lookup(state, plan, dtype=jnp.bfloat16), rows, tx=TX
        )


@pytest.mark.parametrize(
    "key",
    [0, np.zeros(2, np.int32), jnp.zeros((2, 2), jnp.uint32), jax.random.split(jax.random.key(0))],
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match=r"key must be jax\.random\.key\(\.\.\) or uint32 \[2\]"):
        mpembed.init(key, stack(), TX)


def test_typed_and_raw_keys_are_the_same_key():
    old_style = mpembed.init(jax.random.PRNGKey(3), stack(), TX)
    np.testing.assert_array_equal(old_style.table.rows, start(stack(), seed=3).table.rows)


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown implementation 'cuda'; choose one of xla, xla_chunked"
    ):
        mpembed.init(jax.random.key(0), stack(), TX, implementation="cuda")


# --- what just works


PADDING = {"a": np.full((2, 3), NO_ID, np.int32), "b": np.zeros(0, np.int32)}


@pytest.mark.parametrize(
    ("ids", "lines"),
    [(np.zeros((3, 0), np.int32), None), ({}, 8), (PADDING, 8)],
    ids=["empty bags-table", "no features-cache", "all padding-cache"],
)
def test_batches_without_ids_just_work(ids, lines):
    """A step is counted, nothing else happens, before and after real batches."""
    cache = lines and CacheSpec(num_rows=lines, ways=4)
    state = start(stack(storage="int8", cache=cache), seed=4)
    state, _, _ = train(state, np.array([1, 2, 2], np.int32))
    before, leaves = all_rows(state), jax.tree.map(np.array, (state.table, state.cache))
    state, vectors, plan = train(state, ids)
    assert jax.tree.map(lambda v: v.shape, vectors) == jax.tree.map(lambda i: (*i.shape, DIM), ids)
    assert all((np.asarray(v) == 0).all() for v in jax.tree.leaves(vectors))
    assert (np.asarray(plan.unique_ids) == NO_ID).all()
    np.testing.assert_array_equal(all_rows(state), before)
    np.testing.assert_array_equal(state.table.rows, leaves[0].rows)
    if cache is not None:
        np.testing.assert_array_equal(state.cache.tags, leaves[1].tags)
        np.testing.assert_array_equal(state.cache.dirty, leaves[1].dirty)
    state, _, _ = train(state, np.array([1, 2, 2], np.int32))
    stats = mpembed.stats(state)
    assert (stats.steps, stats.requests, stats.unique, stats.refused_updates) == (3, 6, 4, 0)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4)], ids=str)
def test_reading_no_ids_gives_no_rows(shape):
    """In every format, with a cache and frozen, on one device and over a mesh."""
    ids, wanted = np.zeros(shape, np.int32), (*shape, DIM)
    for name in shapes.FORMATS:
        spec = stack(storage=name, cache=CacheSpec(num_rows=4))
        state = jax.eval_shape(lambda: start(spec))  # noqa: B023
        for held in (state, jax.eval_shape(mpembed.freeze, state)):
            assert jax.eval_shape(mpembed.read, held, ids).shape == wanted
        packed = jax.eval_shape(lambda rows: mpembed.encode(rows, name), jnp.zeros(wanted))  # noqa: B023
        decoded = jax.eval_shape(lambda words: mpembed.decode(words, name, DIM), packed)  # noqa: B023
        assert decoded.shape == wanted
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = mpembed.init(jax.random.key(0), stack(storage="int8"), TX, mesh=mesh)
    for held in (start(stack(storage="int8")), state, mpembed.freeze(state)):
        assert mpembed.read(held, {"a": ids, "b": np.int32(3)})["a"].shape == wanted


@pytest.mark.parametrize(
    "cache", [None, CacheSpec(), CacheSpec(policy="lru")], ids=["table", "lfu", "lru"]
)
def test_a_user_in_x64_mode_gets_the_same_state(cache):
    """Traced only: no index or count widens, and the state keeps its dtypes from step to step."""
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda: start(stack((500,), storage="int8", cache=cache)))
        after, vectors, _ = jax.eval_shape(run, state, jax.ShapeDtypeStruct((6,), jnp.int32))
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
    assert vectors.dtype == jnp.float32


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, dict(storage="int2", cache=CacheSpec(1.0, policy="lru"))),
        (1, dict(storage="float32")),
        (3, dict(storage="int4", cache=CacheSpec())),
    ],
    ids=["1-int2-lru", "1-float32-table", "3-int4-lfu"],
)
def test_vocabularies_of_one_and_three_rows_just_work(size, options):
    spec = stack((size,), **options)
    state = start(spec)
    before = all_rows(state)
    assert np.abs(before).max() <= 1.01 / np.sqrt(size)
    ids = np.array([0, 0, size - 1, size, NO_ID], np.int32)
    for _ in range(3):
        state, vectors, _ = train(state, ids)
    assert np.isfinite(np.asarray(vectors)).all()
    np.testing.assert_array_equal(vectors[3:], 0.0)
    moved = all_rows(state)[[0, size - 1]] - before[[0, size - 1]]
    # Every step takes 0.5; a format's grid adds at most one gap per rounding.
    gap = {"float32": 1e-6, "int4": 4.5 / 7, "int2": 1.0}[options["storage"]]
    np.testing.assert_allclose(moved, -1.5, atol=3 * gap)
    np.testing.assert_array_equal(mpembed.to_dense(state)["t0"], all_rows(state))


@pytest.mark.parametrize("storage", ["int8"])
def test_a_nonfinite_gradient_stays_in_its_row(storage):
    """Without skip_nonfinite the row is lost, and no other.

    This holds in the cache, at its eviction and in the table.
    """
    state = start(stack(storage=storage, cache=CacheSpec(num_rows=2, ways=2, policy="lru")))

    @partial(jax.jit, donate_argnums=0)
    def step(state, ids, value):
        def gradient(rows, plan):
            return jnp.where(plan.unique_ids[:, None] == 5, value, jnp.ones_like(rows))

        return training.step(state, ids, TX, gradient).state

    state = step(state, np.array([5, 6], np.int32), jnp.float32(jnp.nan))
    for pair in ([7, 8], [5, 9], [1, 2]):
        state = step(state, np.array(pair, np.int32), jnp.float32(jnp.inf))
    rows = all_rows(state)
    assert not np.isfinite(rows[5]).any()
    assert np.isfinite(np.delete(rows, 5, axis=0)).all()
