"""Twelve deliberate mistakes, then odd inputs that just work.

Each mistake ends in a message that names the fix, and harms no row.
"""

import warnings
from collections.abc import Callable
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
import training
from cases import crossed, named
from flax import nnx

import mpembed_jax as mpembed
from mpembed_jax import (
    NO_ID,
    CacheSpec,
    EmbeddingSpec,
    TableSpec,
    checkpoint,
    nn,
    optim,
    serving,
    sharding,
)  # fmt: skip
from mpembed_jax.embedding.counters import COUNTERS

TX = optax.sgd(0.5)
RULED = mpembed.optim.sgd(0.5)  # native calls run it
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


def run(state, ids, scale=1.0, tx=TX):
    state, plan, rows = training.step(state, ids, tx, lambda rows, plan: jnp.full_like(rows, scale))
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
    with pytest.raises(ValueError, match=f"1 calls changed nothing.*{FIX}, pass its plan"):
        mpembed.stats(twice)


@pytest.mark.parametrize("implementation", named(["xla", "xla_chunked", "numba"], fast={"numba"}))
def test_an_old_plan_reads_nan_changes_nothing_and_stats_names_it(implementation):
    """Two prefetches, then the first one's plan. Called directly, lookup and the update raise."""
    spec = stack(cache=CacheSpec(num_rows=8, ways=1, policy="lru"))
    state = mpembed.init(jax.random.key(0), spec, TX, implementation=implementation)
    state, old = prefetch(state, np.arange(8, dtype=np.int32))
    rows = mpembed.lookup(state, old)
    state, plan = prefetch(state, np.arange(12, 20, dtype=np.int32))
    with pytest.raises(ValueError, match="lookup needs the plan of the state's latest prefetch"):
        mpembed.lookup(state, old)
    with pytest.raises(ValueError, match="number 1, and got the plan of number 0"):
        mpembed.apply_gradients(state, old, rows, rows, tx=TX)
    assert np.isnan(jax.jit(mpembed.lookup)(state, old)).all()
    wanted = [*all_rows(state)[plan.unique_ids[:-1]], np.zeros(DIM)]
    np.testing.assert_array_equal(jax.jit(mpembed.lookup)(state, plan), wanted)
    after = jax.jit(partial(mpembed.apply_gradients, tx=TX))(state, old, rows, jnp.ones_like(rows))
    np.testing.assert_array_equal(all_rows(after), all_rows(state))
    with pytest.raises(ValueError, match=r"1 calls changed nothing: .* with an old plan"):
        mpembed.stats(after)


class Pair(NamedTuple):
    """A verb that plans, and the one that applies gradients of ones to its plan."""

    plan: Callable  # (state, ids) -> state, plan
    apply: Callable  # (state, plan) -> state


def by_rows(state, plan):
    rows = jnp.ones((plan.unique_ids.shape[0], DIM))
    held = mpembed.lookup(state, plan)
    return mpembed.apply_gradients(state, plan, jnp.nan_to_num(held), rows, tx=RULED)


def by_vectors(state, plan):
    grads = jnp.ones((*plan.pooling.shapes[0], DIM))
    return mpembed.apply_pooled_gradients(state, plan, grads, tx=RULED)


PAIRS = {
    "rows": Pair(mpembed.prefetch, by_rows),
    "vectors": Pair(lambda state, ids: mpembed.embed(state, ids, tx=RULED)[:2], by_vectors),
}


@crossed(
    is_one_trace=[False, True],
    name=list(PAIRS),
    implementation=named(["xla", "xla_chunked", "numba"], fast={"numba"}),
    core={"False-rows-xla"},
)
def test_after_a_refused_update_the_right_one_is_still_possible(name, implementation, is_one_trace):
    spec = stack(cache=CacheSpec(num_rows=8, ways=1, policy="lru"))
    start = mpembed.init(jax.random.key(0), spec, RULED, implementation=implementation)
    pair = PAIRS[name]
    jitted = (lambda verb: verb) if is_one_trace else jax.jit

    def run(state, is_mistaken):
        state, old = jitted(pair.plan)(state, np.arange(8, dtype=np.int32))
        state, plan = jitted(pair.plan)(state, np.arange(12, 20, dtype=np.int32))
        if is_mistaken:
            state = jitted(pair.apply)(state, old)
        return jitted(pair.apply)(state, plan)

    run = jax.jit(run, static_argnums=1) if is_one_trace else run
    wanted, after = run(start, False), run(start, True)
    assert not np.array_equal(all_rows(wanted), all_rows(start))
    np.testing.assert_array_equal(all_rows(after), all_rows(wanted))
    assert not bool(after.pending)
    with pytest.raises(ValueError, match="1 calls changed nothing: apply_gradients"):
        mpembed.stats(after)


@pytest.mark.parametrize("implementation", named(["xla", "numba"], fast={"numba"}))
@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.parametrize("differs", ["key", "tables", "ids"])
def test_the_plan_of_another_state_is_refused_though_its_number_is_right(
    name, implementation, differs
):
    spec = stack(cache=CacheSpec(num_rows=8))
    other = EmbeddingSpec([TableSpec("other", spec.num_rows)], DIM, cache=CacheSpec(num_rows=8))
    make = partial(mpembed.init, tx=RULED, implementation=implementation)
    key, pair = jax.random.key(0), PAIRS[name]
    mine = make(key, spec)
    theirs = make(
        jax.random.key(1) if differs == "key" else key, spec if differs != "tables" else other
    )
    ids, num = np.arange(8, dtype=np.int32), 7 if differs == "ids" else 8
    mine, plan = jax.jit(pair.plan)(mine, ids)
    _, of_other = jax.jit(pair.plan)(theirs, np.where(np.arange(8) < num, ids, 0))
    with pytest.raises(
        ValueError, match="latest prefetch, number 0, and got the plan of another state"
    ):
        pair.apply(mine, of_other)
    refused = jax.jit(pair.apply)(mine, of_other)
    np.testing.assert_array_equal(all_rows(refused), all_rows(mine))
    with pytest.raises(ValueError, match="1 calls changed nothing"):
        mpembed.stats(refused)
    if name == "rows":
        assert np.isnan(jax.jit(mpembed.lookup)(mine, of_other)).all()
    after, wanted = (jax.jit(pair.apply)(state, plan) for state in (refused, mine))
    np.testing.assert_array_equal(all_rows(after), all_rows(wanted))


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
        with pytest.raises(ValueError, match="pass the same tx to init and to every verb"):
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


class Specs(NamedTuple):
    """The options of a saved stack, and of the target that its arrays are put into."""

    saved: dict
    target: dict


OTHER_SPECS = {
    "storage": Specs(dict(storage="bfloat16"), dict(storage="float16")),
    "scale": Specs(
        dict(storage=mpembed.RowFormat("int8", scale_dtype="bfloat16")),
        dict(storage=mpembed.RowFormat("int8", scale_dtype="float16")),
    ),
    "tables": Specs(dict(sizes=(8, 12)), dict(sizes=(12, 8))),
    "same": Specs(dict(storage="int8"), dict(storage="int8")),
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


class Empty(NamedTuple):
    """A batch without ids, and the lines of a cache; None without one."""

    ids: Any
    lines: int | None


EMPTY = {
    "empty bags": Empty(np.zeros((3, 0), np.int32), None),
    "no features": Empty({}, 8),
    "all padding": Empty(PADDING, 8),
}


@pytest.mark.parametrize("batch", named(EMPTY, fast={"all padding"}))
def test_batches_without_ids_just_work(batch):
    """A step is counted, nothing else happens, before and after real batches."""
    ids, lines = batch
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


@pytest.mark.slow
def test_reading_no_ids_gives_no_rows():
    """In every format, with a cache and frozen, on one device and over a mesh."""
    ids = {str(shape): np.zeros(shape, np.int32) for shape in ((0,), (4, 0), (0, 4))}
    wanted = {name: (*array.shape, DIM) for name, array in ids.items()}

    def shapes_of(rows):
        return {name: array.shape for name, array in rows.items()}

    for name in shapes.FORMATS:
        spec = stack(storage=name, cache=CacheSpec(num_rows=4))
        state = jax.eval_shape(lambda: start(spec))  # noqa: B023
        for held in (state, jax.eval_shape(mpembed.freeze, state)):
            assert shapes_of(jax.eval_shape(mpembed.read, held, ids)) == wanted
        for shape in wanted.values():
            packed = jax.eval_shape(partial(mpembed.encode, format=name), jnp.zeros(shape))
            decode = partial(mpembed.decode, format=name, embedding_dim=DIM)
            assert jax.eval_shape(decode, packed).shape == shape
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = mpembed.init(jax.random.key(0), stack(storage="int8"), TX, mesh=mesh)
    for held in (start(stack(storage="int8")), state, jax.jit(mpembed.freeze)(state)):
        rows = training.read(held, ids | {"one": np.int32(3)})
        assert shapes_of(rows) == wanted | {"one": (DIM,)}


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


class Mode(NamedTuple):
    storage: str
    policy: str | None
    implementation: str
    tx: optax.GradientTransformation


MODES = {
    "int8": Mode("int8", "lfu", "numba", mpembed.optim.rowwise_adagrad(0.1)),
    "int4": Mode("int4", "lru", "xla", mpembed.optim.rowwise_adam(0.1, weight_decay=0.1)),
    "bfloat16": Mode("bfloat16", None, "xla_chunked", optax.adam(0.1)),
    "float8": Mode("float8_e5m2", "lfu", "pallas_interpret", mpembed.optim.sgd(0.1)),
}


def whole_life(spec, tx, implementation, combiners=(None, "sum", "mean", "sqrtn")):
    """Every verb, every way of pooling, and the update of each."""
    state = mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
    ids = {
        "a": jnp.asarray([[1, 2, 2], [3, NO_ID, 4]], jnp.int32),
        "b": jnp.arange(4, dtype=jnp.int32),
    }
    for combiner in combiners:
        state, plan = mpembed.prefetch(state, ids)
        rows, index = mpembed.lookup(state, plan), plan.inverse
        weights = combiner and jax.tree.map(lambda i: jnp.ones(i.shape), index)
        pool = partial(mpembed.pool, combiner=combiner, implementation=implementation)
        vectors, pull_back = jax.vjp(lambda rows: pool(rows, index, weights), rows)  # noqa: B023
        state = mpembed.apply_gradients(state, plan, rows, pull_back(vectors)[0], tx=tx)
        state, plan, vectors = mpembed.embed(state, ids, weights, combiner, tx=tx)
        state = mpembed.apply_pooled_gradients(state, plan, vectors, tx=tx)
    state, plan = mpembed.prefetch(state, ids["b"])
    rows, segments = mpembed.lookup(state, plan), jnp.asarray([0, 0, 1, 1], jnp.int32)
    ragged = partial(
        mpembed.pool,
        combiner="mean",
        segment_ids=segments,
        num_segments=2,
        implementation=implementation,
    )
    vectors, pull_back = jax.vjp(lambda rows: ragged(rows, plan.inverse), rows)
    state = mpembed.apply_gradients(state, plan, rows, pull_back(vectors)[0], tx=tx)
    read = mpembed.read(state, jnp.arange(20, dtype=jnp.int32))
    mapped = spec.global_ids(jnp.zeros((2, 3, 1), jnp.int32))
    table = mpembed.freeze(mpembed.flush(state))
    return {"read": read, "frozen": mpembed.read(table, mapped), "state": state}


def spec_of_mode(mode):
    storage, policy, implementation, tx = MODES[mode]
    cache = policy and CacheSpec(num_rows=6, ways=2, policy=policy)
    narrow = "bfloat16" if mode == "int4" else "float32"
    spec = stack(
        storage=storage, cache=cache, row_state_dtype=narrow, skip_nonfinite=mode == "float8"
    )
    return spec, tx, implementation


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    named(list(MODES), fast={"int8"}, core=(), marks={"bfloat16": training.OPTAX_ADAM}),
)
def test_no_rank_is_promoted(mode):
    """Traced only, over a mesh too."""
    spec, tx, implementation = spec_of_mode(mode)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda: whole_life(spec, tx, implementation))
        if mode != "bfloat16":
            return
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        for placement in (mpembed.Placement(), mpembed.Placement("tables", summation_blocks=2)):
            state = jax.eval_shape(
                lambda: mpembed.init(jax.random.key(0), spec, tx, mesh=mesh, placement=placement)  # noqa: B023
            )
            specs, batch = mpembed.partition_specs(state), jax.sharding.PartitionSpec("x")
            step = jax.shard_map(
                lambda state, ids: run(state, ids, tx=tx)[0],
                mesh=mesh,
                in_specs=(specs, batch),
                out_specs=specs,
            )
            jax.eval_shape(step, state, jax.ShapeDtypeStruct((4, 3), jnp.int32))
            jax.eval_shape(mpembed.read, state, jax.ShapeDtypeStruct((4, 3), jnp.int32))


@pytest.mark.exhaustive
def test_every_verb_runs_without_jit():
    """Up to the last bits of float32, which may decide between two steps of a grid below 0.02.

    The whole command runs the verbs outside jit in
    test_sound_steps_pass_debug_nans_without_jit, and with jit disabled in
    tests/documents/test_contexts.py.
    """
    spec, tx, implementation = spec_of_mode("int8")
    with jax.disable_jit():
        plain = whole_life(spec, tx, implementation, ["mean"])
    jitted = jax.jit(lambda: whole_life(spec, tx, implementation, ["mean"]))()
    for name in ("read", "frozen"):
        np.testing.assert_allclose(plain[name], jitted[name], rtol=0, atol=0.02)
    for name in ("step", "counters"):
        np.testing.assert_array_equal(getattr(plain["state"], name), getattr(jitted["state"], name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    named(["int8", "bfloat16"], fast={"int8"}, core=(), marks={"bfloat16": training.OPTAX_ADAM}),
)
def test_a_guard_against_transfers_lets_jitted_verbs_pass(mode):
    """Also when they are traced for the first time."""
    spec, tx, implementation = spec_of_mode(mode)
    ids, key = jax.device_put((np.arange(6, dtype=np.int32), jax.random.key(1)))
    with jax.transfer_guard("disallow"):
        state = mpembed.init(key, spec, tx, implementation=implementation)
        state, _, _ = jax.jit(partial(run, tx=tx))(state, ids)
        jax.jit(mpembed.read)(jax.jit(mpembed.flush)(state), ids)
        assert mpembed.to_dense(state)["t0"].shape == (20, DIM)
        assert mpembed.stats(state).steps == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation", named({"default": None, "xla": "xla"}, fast={"default"}, core=())
)
def test_sound_steps_pass_debug_nans_without_jit(implementation):
    """Outside jit, jax.debug_nans looks at the result of every operation."""
    spec, ids = stack(storage="int8", cache=CacheSpec(num_rows=4)), np.array([[3, 7], [7, NO_ID]])
    with jax.debug_nans(True):
        state = mpembed.init(jax.random.key(0), spec, RULED, implementation=implementation)
        state, _, _ = run(state, ids, tx=RULED)
        state, plan, vectors = mpembed.embed(state, ids, None, "mean", tx=RULED)
        state = mpembed.apply_pooled_gradients(state, plan, vectors, tx=RULED)
        assert mpembed.stats(mpembed.flush(state)).steps == 2
        with pytest.raises(FloatingPointError):
            run(state, ids, np.nan, tx=RULED)


class Tiny(NamedTuple):
    """The rows and the options of a stack of one table."""

    size: int
    options: dict


TINY = {
    "1-int2-lru": Tiny(1, dict(storage="int2", cache=CacheSpec(1.0, policy="lru"))),
    "1-float32-table": Tiny(1, dict(storage="float32")),
    "3-int4-lfu": Tiny(3, dict(storage="int4", cache=CacheSpec())),
}


@pytest.mark.parametrize("case", named(TINY, fast={"1-int2-lru"}))
def test_vocabularies_of_one_and_three_rows_just_work(case):
    size, options = case
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


# --- states that were computed with


def averages(average, state):
    """Ways to average two states leaf by leaf, as averages over a whole model state do."""

    def mix(a, b):
        return (0.9 * np.asarray(a) + 0.1 * np.asarray(b)).astype(np.float32)

    def is_float(leaf):
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    return {
        "all arrays": jax.tree.map(mix, average, state),
        "all arrays, in their dtypes": jax.tree.map(
            lambda a, b: mix(a, b).astype(a.dtype), average, state
        ),
        "floats, the rest of the average": jax.tree.map(
            lambda a, b: mix(a, b) if is_float(a) else a, average, state
        ),
        "floats, the rest of the state": jax.tree.map(
            lambda a, b: mix(a, b) if is_float(a) else b, average, state
        ),
    }


@pytest.mark.parametrize("cache", [None, CacheSpec(num_rows=4, ways=2)], ids=["uncached", "cached"])
@pytest.mark.parametrize("are_alike", [False, True], ids=["other steps", "same step"])
def test_an_average_of_two_states_is_refused_at_its_next_use(cache, are_alike):
    """Lines of one number hold other ids in the two states, and packed rows are no numbers."""
    first = start(stack(cache=cache, storage="int8"))
    later = first
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 5, 9, 2]):
        later, _, _ = jax.jit(run)(later, jnp.asarray(ids, jnp.int32))
        if are_alike:  # of one key, and of batches with other counts
            first, _, _ = jax.jit(run)(first, jnp.asarray([ids[0]] * 4, jnp.int32))
    for name, average in averages(first, later).items():
        for use in (mpembed.stats, mpembed.flush, mpembed.to_dense):
            message = r"made for another spec" if "dtypes" in name else r"cannot be averaged"
            with pytest.raises(ValueError, match=message):
                use(average)
        if name == "all arrays":
            with pytest.raises(ValueError, match=r"its packed rows are float32"):
                training.read(average, jnp.arange(4, dtype=jnp.int32))
            continue
        assert np.isnan(training.read(average, jnp.arange(4, dtype=jnp.int32))).all()
        trained, _, _ = jax.jit(run)(average, jnp.arange(4, dtype=jnp.int32))
        assert int(trained.counters[COUNTERS.index("refused_updates"), 0]) == 1
        training.assert_same(trained.row_state, jax.tree.map(jnp.asarray, average.row_state))
        with pytest.raises(ValueError, match=r"belong to several states|made for another spec"):
            mpembed.stats(trained)


def test_a_state_under_another_spec_reads_as_nan_inside_jit():
    """Tables of 8 and 12 rows under a spec of 12 and 8, as other checkpointers may restore them."""
    state, other = start(stack((8, 12))), start(stack((12, 8)))
    mixed = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(state))
    with pytest.raises(ValueError, match="another spec"):
        mpembed.read(mixed, jnp.arange(4, dtype=jnp.int32))
    assert np.isnan(training.read(mixed, {"a": jnp.arange(4, dtype=jnp.int32)})["a"]).all()
    assert np.isfinite(training.read(state, jnp.arange(4, dtype=jnp.int32))).all()


@pytest.mark.parametrize("cache", [None, CacheSpec(num_rows=4)], ids=["uncached", "cached"])
def test_stacked_states_are_refused_outside_of_vmap(cache):
    """Each array has an axis more. The message says so, before an operation fails."""
    ids = jnp.arange(4, dtype=jnp.int32)
    states = [start(stack(cache=cache), seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
    one = jax.tree.map(lambda array: array[1], stacked)
    np.testing.assert_array_equal(mpembed.read(one, ids), mpembed.read(states[1], ids))
    rows = jax.jit(jax.vmap(mpembed.read, (0, None)))(stacked, ids)
    np.testing.assert_array_equal(rows[2], mpembed.read(states[2], ids))
    verbs = {
        "read": lambda state: mpembed.read(state, ids),
        "prefetch": lambda state: mpembed.prefetch(state, ids),
        "embed": lambda state: mpembed.embed(state, ids, tx=TX),
        "flush": mpembed.flush,
        "write_rows": lambda state: mpembed.write_rows(state, ids, jnp.ones((4, DIM))),
    }
    host = {"stats": mpembed.stats, "to_dense": mpembed.to_dense}
    for name, verb in (verbs | host).items():
        for call in (verb, jax.jit(verb)) if name in verbs else (verb,):
            with pytest.raises(ValueError, match=r"\[3\] states, stacked.*inside jax\.vmap"):
                call(stacked)


# --- mistakes of the first hour: one per public function, and each says what goes where


class Mistake(NamedTuple):
    """A wrong call; it gets a state, its plan, its rows, and a state that was donated."""

    call: Callable
    error: type
    says: str


KEY = jax.random.key(0)
MISTAKES = {
    "init, swapped": Mistake(
        lambda m: mpembed.init(m.spec, KEY, TX), TypeError, r"init\(key, spec, tx\): spec must be"
    ),
    "init, tables": Mistake(
        lambda m: mpembed.init(KEY, m.spec.tables, TX), TypeError, "an EmbeddingSpec, got tuple"
    ),
    "init, tx not called": Mistake(
        lambda m: mpembed.init(KEY, m.spec, mpembed.optim.rowwise_adagrad), TypeError, "tx must be"
    ),
    "init, mesh by name": Mistake(
        lambda m: mpembed.init(KEY, m.spec, TX, mesh="x"), TypeError, "mesh must be a jax.sharding"
    ),
    "CacheSpec, text": Mistake(
        lambda m: CacheSpec("5 %"), ValueError, r"fraction must be a number in \(0, 1\], got '5 %'"
    ),
    "CacheSpec, per cent": Mistake(lambda m: CacheSpec(5), ValueError, r"in \(0, 1\], got 5"),
    "TableSpec, swapped": Mistake(lambda m: TableSpec(50, "t"), ValueError, "vocabulary_size must"),
    "VocabularySpec, share": Mistake(
        lambda m: mpembed.VocabularySpec(0.5), ValueError, r"num_rows must be an integer in \[1"
    ),
    "EmbeddingSpec, nothing": Mistake(
        lambda m: EmbeddingSpec(None, DIM), TypeError, "sequence of TableSpec, got None"
    ),
    "EmbeddingSpec, mapping": Mistake(
        lambda m: EmbeddingSpec({"t": 5}, DIM), TypeError, "a non-empty sequence of TableSpec"
    ),
    "EmbeddingSpec, fraction": Mistake(
        lambda m: EmbeddingSpec([TableSpec("t", 5)], DIM, "int8", 0.05), TypeError, "a CacheSpec or"
    ),
    "RowFormat, bits": Mistake(lambda m: mpembed.RowFormat(8), ValueError, "unknown row format 8"),
    "Placement, axis": Mistake(
        lambda m: mpembed.Placement("x"), ValueError, "one of rows, tables, replicated"
    ),
    "prefetch, swapped": Mistake(
        lambda m: mpembed.prefetch(m.ids, m.state), TypeError, r"prefetch\(state, ids\): state must"
    ),
    "prefetch, spec": Mistake(
        lambda m: mpembed.prefetch(m.spec, m.ids), TypeError, "from init.*got EmbeddingSpec"
    ),
    "prefetch, donated": Mistake(
        lambda m: mpembed.prefetch(m.donated, m.ids),
        ValueError,
        "was donated.*go on with the state",
    ),
    "lookup, swapped": Mistake(
        lambda m: mpembed.lookup(m.plan, m.state), TypeError, r"lookup\(state, plan\): state must"
    ),
    "lookup, ids": Mistake(
        lambda m: mpembed.lookup(m.state, m.ids), TypeError, "plan must be a CachePlan.*of prefetch"
    ),
    "lookup, donated": Mistake(
        lambda m: mpembed.lookup(m.donated, m.plan), ValueError, "was donated to an earlier call"
    ),
    "pool, swapped": Mistake(
        lambda m: mpembed.pool(m.plan.inverse, m.rows),
        TypeError,
        "must be plan.inverse.*got float32",
    ),
    "pool, plan": Mistake(
        lambda m: mpembed.pool(m.rows, m.plan), TypeError, "must be plan.inverse.*got a CachePlan"
    ),
    "pool, list": Mistake(
        lambda m: mpembed.pool(m.rows, [0, 1]), TypeError, "must be plan.inverse.*int"
    ),
    "apply_gradients, swapped": Mistake(
        lambda m: mpembed.apply_gradients(m.plan, m.state, m.rows, m.rows, tx=TX),
        TypeError,
        "state must be an EmbeddingState.*got CachePlan",
    ),
    "apply_gradients, list": Mistake(
        lambda m: mpembed.apply_gradients(m.state, m.plan, m.rows, [1.0], tx=TX),
        TypeError,
        "row_grads must be an array, float32",
    ),
    "apply_gradients, donated": Mistake(
        lambda m: mpembed.apply_gradients(m.donated, m.plan, m.rows, m.rows, tx=TX),
        ValueError,
        "was donated to an earlier call",
    ),
    "apply_pooled_gradients, ids": Mistake(
        lambda m: mpembed.apply_pooled_gradients(m.state, m.plan, m.rows, tx=TX),
        TypeError,
        "plan must be a VectorPlan.*of embed.*got CachePlan",
    ),
    "embed, swapped": Mistake(
        lambda m: mpembed.embed(m.ids, m.state, tx=TX), TypeError, "state must be an EmbeddingState"
    ),
    "read, swapped": Mistake(
        lambda m: mpembed.read(m.ids, m.state), TypeError, r"read\(state, ids\): state must be"
    ),
    "write_rows, swapped": Mistake(
        lambda m: mpembed.write_rows(m.ids, m.state, m.rows),
        TypeError,
        r"write_rows\(state, ids, rows\): state must be",
    ),
    "write_rows, integers": Mistake(
        lambda m: mpembed.write_rows(m.state, m.ids, m.ids), TypeError, "rows must be floating"
    ),
    "gradient_norm, ids": Mistake(
        lambda m: mpembed.gradient_norm(m.state, m.ids, m.rows), TypeError, "plan must be a Cache"
    ),
    "read, donated": Mistake(
        lambda m: mpembed.read(m.donated, m.ids), ValueError, "was donated to an earlier call"
    ),
    "flush, plan": Mistake(
        lambda m: mpembed.flush(m.plan), TypeError, r"flush\(state\): state must"
    ),
    "freeze, table": Mistake(
        lambda m: mpembed.freeze(m.state.table), TypeError, "got QuantizedTable"
    ),
    "to_dense, spec": Mistake(lambda m: mpembed.to_dense(m.spec), TypeError, "got EmbeddingSpec"),
    "to_dense, donated": Mistake(
        lambda m: mpembed.to_dense(m.donated), ValueError, "was donated to an earlier call"
    ),
    "from_dense, swapped": Mistake(
        lambda m: mpembed.from_dense(m.spec, KEY, TX, {}), TypeError, "spec must be an Embedding"
    ),
    "from_dense, array": Mistake(
        lambda m: mpembed.from_dense(KEY, m.spec, TX, np.zeros((20, DIM))),
        TypeError,
        r"tables must be a mapping \{name: \[rows, D\]\}, got ndarray",
    ),
    "stats, spec": Mistake(lambda m: mpembed.stats(m.spec), TypeError, "got EmbeddingSpec"),
    "partition_specs, spec": Mistake(
        lambda m: mpembed.partition_specs(m.spec), TypeError, "got EmbeddingSpec"
    ),
    "segments_from_offsets, float": Mistake(
        lambda m: mpembed.segments_from_offsets([0.0, 2.0], 4), TypeError, "must be int32"
    ),
    "encode, integers": Mistake(
        lambda m: mpembed.encode(np.arange(4), mpembed.RowFormat("int8")), TypeError, "float32"
    ),
    "decode, rows": Mistake(
        lambda m: mpembed.decode(m.rows, mpembed.RowFormat("int8"), DIM), ValueError, "are uint16"
    ),
    "memory.report, swapped": Mistake(
        lambda m: mpembed.memory.report(TX, m.spec), TypeError, r"report\(spec, tx, batch_shape\)"
    ),
    "memory.plan, number": Mistake(
        lambda m: mpembed.memory.plan(5, "16GB", tx=TX), TypeError, r"tables must be \{name: \(rows"
    ),
    "memory.plan, specs": Mistake(
        lambda m: mpembed.memory.plan(m.spec.tables, "16GB", tx=TX),
        ValueError,
        r"must be \(rows, dim",
    ),
    "nn.ngram_spec, text": Mistake(
        lambda m: nn.ngram_spec("x", DIM), TypeError, "ngrams must be an NGramHash, got str"
    ),
    "memory.report, batch": Mistake(
        lambda m: mpembed.memory.report(m.spec, TX, 2048), TypeError, r"such as \(2048, 26\)"
    ),
    "sgd, text": Mistake(lambda m: mpembed.optim.sgd("0.1"), TypeError, "a number or an optax"),
    "rowwise_adagrad, None": Mistake(
        lambda m: mpembed.optim.rowwise_adagrad(None), TypeError, "a number or an optax schedule"
    ),
    "rowwise_adam, text": Mistake(
        lambda m: mpembed.optim.rowwise_adam("0.1"), TypeError, "a number or an optax schedule"
    ),
    "stochastic_round_updates, seed": Mistake(
        lambda m: mpembed.optim.stochastic_round_updates(0), TypeError, "key must be jax.random.key"
    ),
    "sharding.plan, text": Mistake(
        lambda m: sharding.plan(m.spec, "2"), TypeError, "num_shards must be a number of devices"
    ),
    "sharding.plan, no shards": Mistake(
        lambda m: sharding.plan(m.spec, 0), ValueError, "num_shards must be at least 1"
    ),
    "sharding.relayout, spec": Mistake(
        lambda m: sharding.relayout(m.spec), TypeError, r"relayout\(state.*got EmbeddingSpec"
    ),
    "sharding.pairs, swapped": Mistake(
        lambda m: sharding.pairs(m.ids, m.state), TypeError, r"pairs\(state, ids\): state must be"
    ),
    "sharding.on_one_device, spec": Mistake(
        lambda m: sharding.on_one_device("call", m.spec, lambda s: s),
        TypeError,
        r"call: state must be an EmbeddingState \(from init, .*\), got EmbeddingSpec",
    ),
    "scale_by_rowwise_adagrad, text": Mistake(
        lambda m: optim.scale_by_rowwise_adagrad("x"), TypeError, "eps must be a number, got 'x'"
    ),
    "scale_by_rowwise_adam, None": Mistake(
        lambda m: optim.scale_by_rowwise_adam(None), TypeError, "b1 must be a number, got None"
    ),
    "rowwise_adagrad, decay": Mistake(
        lambda m: optim.rowwise_adagrad(0.1, weight_decay="x"), TypeError, "weight_decay must be a"
    ),
    "clip_by_row_norm, negative": Mistake(
        lambda m: optim.clip_by_row_norm(-1.0), ValueError, "max_norm must be at least 0, got -1.0"
    ),
    "rule_of, rate": Mistake(
        lambda m: optim.rule_of(0.1), TypeError, "tx must be an optax gradient"
    ),
    "transformation_of, tx": Mistake(
        lambda m: optim.transformation_of(TX), TypeError, "rule must be a RowRule, got Gradient"
    ),
    "encode, swapped": Mistake(
        lambda m: mpembed.encode(mpembed.RowFormat("int8"), m.rows),
        TypeError,
        r"encode\(rows, format, random_bits\): rows must be float32",
    ),
    "decode, swapped": Mistake(
        lambda m: mpembed.decode(mpembed.RowFormat("int8"), m.rows, DIM),
        TypeError,
        "packed must be an array of words, got RowFormat",
    ),
    "segments_from_offsets, swapped": Mistake(
        lambda m: mpembed.segments_from_offsets(4, m.ids),
        TypeError,
        "num_positions must be a whole",
    ),
    "checkpoint.save, tree first": Mistake(
        lambda m: checkpoint.save(m.state, 1, "x"),
        TypeError,
        r"save\(directory, step, tree\): directory must be a path, got EmbeddingState",
    ),
    "serving.load, state": Mistake(
        lambda m: serving.load(m.state),
        TypeError,
        r"serving.load\(path\): path must be a path, got",
    ),
    "serving.load, threads": Mistake(
        lambda m: serving.load("x", threads="a"), TypeError, "threads must be an integer, got 'a'"
    ),
    "serving.save, progress": Mistake(
        lambda m: serving.save("x", m.state, progress=5), TypeError, "progress must be a function"
    ),
    "memory.report, sizes": Mistake(
        lambda m: mpembed.memory.report(m.spec, TX, ("a", 2)),
        TypeError,
        "each of batch_shape must be an integer, got 'a'",
    ),
    "memory.report, placement": Mistake(
        lambda m: mpembed.memory.report(
            m.spec, TX, mesh=jax.sharding.AbstractMesh((2,), ("x",)), placement="rows"
        ),
        TypeError,
        "placement must be a Placement, got 'rows'",
    ),
    "serving.verify, nothing": Mistake(
        lambda m: serving.verify(None), TypeError, r"path must be a path, got NoneType"
    ),
    "serving.save, swapped": Mistake(
        lambda m: serving.save(m.state, "x"), TypeError, r"serving.save\(path, states\): path must"
    ),
    "serving.sketch, path": Mistake(
        lambda m: serving.sketch("x"),
        TypeError,
        r"tables must be a ServingTable \(from serving.load",
    ),
    "serving.write_npy, swapped": Mistake(
        lambda m: serving.write_npy("x", m.state), TypeError, "tables must be a ServingTable"
    ),
    "serving.export_program, swapped": Mistake(
        lambda m: serving.export_program(m.state, abs), TypeError, "tables must be a ServingTable"
    ),
    "checkpoint.save, donated": Mistake(
        lambda m: checkpoint.save("x", 1, {"w": 1, "emb": m.donated}),
        ValueError,
        r"save\(directory, step, tree\): leaf 'emb\.\S+' was donated to an earlier call",
    ),
    "checkpoint.save, swapped": Mistake(
        lambda m: checkpoint.save("x", m.state, 1), TypeError, "step must be a whole number, got"
    ),
    "checkpoint.save, state as tracker": Mistake(
        lambda m: checkpoint.save("x", 1, m.state, tracker=m.state),
        TypeError,
        "tracker must be a RowTracker.*got EmbeddingState",
    ),
    "checkpoint.restore, swapped": Mistake(
        lambda m: checkpoint.restore(m.state, "x"), TypeError, "directory must be a path, got Embed"
    ),
    "checkpoint.restore, text": Mistake(
        lambda m: checkpoint.restore("x", m.state, step="1"), TypeError, "step must be a whole numb"
    ),
    "checkpoint.steps, state": Mistake(
        lambda m: checkpoint.steps(m.state), TypeError, r"steps\(directory\): directory must be"
    ),
    "checkpoint.latest_step, number": Mistake(
        lambda m: checkpoint.latest_step(3), TypeError, "directory must be a path, got int"
    ),
    "checkpoint.track, plan": Mistake(
        lambda m: checkpoint.track(m.plan), TypeError, r"track\(state\): state must be.*CachePlan"
    ),
    "checkpoint.track, donated": Mistake(
        lambda m: checkpoint.track(m.donated), ValueError, "was donated to an earlier call"
    ),
    "checkpoint.mark, swapped": Mistake(
        lambda m: checkpoint.mark(m.plan, m.tracker),
        TypeError,
        r"mark\(tracker, plan\): tracker must be a RowTracker",
    ),
    "checkpoint.mark, state": Mistake(
        lambda m: checkpoint.mark(m.tracker, m.state), TypeError, "plan must be a CachePlan"
    ),
    "checkpoint.partition_specs, state": Mistake(
        lambda m: checkpoint.partition_specs(m.state), TypeError, "tracker must be a RowTracker"
    ),
    "nn.apply_gradients, swapped": Mistake(
        lambda m: nn.apply_gradients(nnx.State({}), m.model), ValueError, "pass the model that has"
    ),
    "nn.apply_gradients, loss": Mistake(
        lambda m: nn.apply_gradients(m.model, jnp.float32(1)),
        TypeError,
        r"apply_gradients\(model, grads\): grads must be what nnx.grad",
    ),
    "nn.discard, state": Mistake(
        lambda m: nn.discard(m.state), ValueError, "holds no cached embedding; pass the model"
    ),
}


@pytest.fixture(scope="module")
def mistaken():
    ids = np.arange(3, dtype=np.int32)
    state, plan = mpembed.prefetch(start(stack()), ids)
    model = nn.CachedEmbed(20, DIM, tx=TX, rngs=nnx.Rngs(0))
    model.prefetch(ids)
    donated = start(stack())
    jax.block_until_ready(train(donated, ids))
    return SimpleNamespace(
        spec=stack(), ids=ids, state=state, plan=plan, rows=mpembed.lookup(state, plan),
        donated=donated, tracker=checkpoint.track(start(stack())), model=model,
    )  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_first_hour_says_what_goes_where(name, mistaken):
    call, error, says = MISTAKES[name]
    with pytest.raises(error, match=says):
        call(mistaken)


def masked(*shape, dtype=np.float32):
    return np.ma.array(np.ones(shape, dtype), mask=True)


MASKS = {
    "from_dense": lambda m: mpembed.from_dense(KEY, m.spec, TX, {"t0": masked(20, DIM)}),
    "write_rows": lambda m: mpembed.write_rows(m.state, [1], masked(1, DIM)),
    "write_rows, list": lambda m: mpembed.write_rows(m.state, [1], [masked(DIM)]),
}


@pytest.mark.parametrize("call", named(MASKS))
def test_values_with_a_mask_are_refused(call, mistaken):
    """NumPy would drop the mask and use what is under it. What jax gets, jax refuses."""
    with pytest.raises(TypeError, match="masked array"):
        call(mistaken)


def test_every_public_function_has_a_mistake():
    functions = {n for n in mpembed.__all__ if callable(getattr(mpembed, n))}
    functions -= {
        "CachePlan", "CacheState", "CacheStats", "EmbeddingState", "QuantizedTable", "VectorPlan"
    }  # fmt: skip
    for room in (sharding, checkpoint, optim, mpembed.memory, nn, serving):
        place = "" if room is optim else room.__name__.split(".")[-1] + "."
        functions |= {
            place + name
            for name, value in vars(room).items()
            if isinstance(value, FunctionType)
            and name in getattr(room, "__all__", vars(room))
            and (value.__module__ == room.__name__ or hasattr(room, "__all__"))
            and not name.startswith("_")
        }
    assert {name.split(",")[0] for name in MISTAKES} >= functions


def test_one_table_may_be_named_without_a_list(mistaken):
    assert list(mpembed.to_dense(start(stack((5, 6))), "t1")) == ["t1"]
