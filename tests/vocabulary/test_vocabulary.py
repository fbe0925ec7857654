"""Raw ids earn rows as a brute-force model says; nothing of an old owner remains."""

import dataclasses
import itertools
from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import training
from cases import named
from hypothesis import given, settings
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax import ops, table, vocabularies
from mpembed_jax.embedding import admission
from mpembed_jax.optim import rowwise_adagrad
from mpembed_jax.vocabulary import hashes, pool

TX = rowwise_adagrad(0.5)
IMPLEMENTATIONS = ("xla", "xla_chunked", "numba")


def stack(num_rows=64, dim=4, *, tables=2, storage="float32", lines=None, **pool):
    return mpembed.EmbeddingSpec(
        tuple(mpembed.TableSpec(f"table{k}") for k in range(tables)),
        dim,
        storage=storage,
        cache=None if lines is None else mpembed.CacheSpec(num_rows=lines, ways=4),
        vocabulary=mpembed.VocabularySpec(num_rows, **pool),
    )


def model_of(spec):
    v = spec.vocabulary
    return oracles.DictVocabulary(
        v.num_rows,
        admit_after=v.admit_after,
        ways=v.ways,
        recycle=v.recycle,
        shared_rows=v.shared_rows,
        sketch_bytes=v.sketch_bytes,
        first_sets=v.first_sets,
        place_bits=v.place_bits,
        window=v.window,
    )


class Stored(NamedTuple):
    """How the rows of a pool are held: the format, the lines of the cache, and what runs a step."""

    storage: str
    lines: int | None
    implementation: str


STORED = (
    Stored("float32", None, "xla"),
    Stored("int8", 12, "xla"),
    Stored("int4", 12, "xla_chunked"),
    Stored("float32", 12, "numba"),
    Stored("int8", None, "numba"),
    Stored("int4", 12, "numba"),
)
CORE = {"float32-None-xla", "int8-None-numba"}


class Pool(NamedTuple):
    num_rows: int
    admit_after: int
    ways: int
    recycle: bool = True
    shared_rows: int = 1
    sketch_bytes: int = 3
    first_sets: int | None = None
    place_bits: int = 30
    window: int = 30


POOLS = {
    "one_set": Pool(8, 2, 8),
    "every_id": Pool(40, 1, 4, sketch_bytes=1),
    "refuses": Pool(24, 2, 4, recycle=False),
    "shares_three": Pool(64, 3, 4, shared_rows=3),
    "groups": Pool(600, 2, 2),
    "one_row": Pool(1, 1, 1),
    "wide_counters": Pool(32, 5, 4, sketch_bytes=2),
    "bytes": Pool(32, 17, 4, sketch_bytes=1),
    "pairs_of_bits": Pool(24, 4, 4, recycle=False, sketch_bytes=1),
    "resized": Pool(56, 2, 4, first_sets=5),
    "doubled": Pool(1024, 2, 2, first_sets=128),
    "older": Pool(600, 2, 2, place_bits=22),
    "short_window": Pool(40, 2, 4, window=3),
}


def raw_batches(seed, steps, num, num_ids, tables, drift=0):
    """Skewed raw ids [steps, num, tables], which drift."""
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.zipf(1.3, (steps, num, tables)), num_ids)
    return ranks.astype(np.int64) + drift * np.arange(steps)[:, None, None]


def mask_of(number):
    """Which of 24 x 2 positions are ids."""
    return np.repeat(np.arange(24)[:, None] % 7 != number % 9, 2, axis=1)


@pytest.mark.parametrize(
    "combination",
    named(
        list(itertools.product(POOLS, IMPLEMENTATIONS)),
        fast={f"{case}-numba" for case in POOLS},
        core={"one_set-xla", "groups-xla_chunked"},
    ),
)
def test_rows_owners_and_use_are_those_of_a_brute_force_model(combination):
    case, implementation = combination
    spec = stack(**POOLS[case]._asdict())
    model = model_of(spec)
    tx = optax.sgd(0.5)
    state = mpembed.init(jax.random.key(0), spec, tx, implementation=implementation)
    admit = jax.jit(admission.admit)
    for number, batch in enumerate(raw_batches(1, 60, 24, 400, 2, drift=1)):
        pairs = spec.raw_ids(batch, where=mask_of(number))
        state, got = admit(state, pairs)
        want, _ = model.prefetch(pairs.reshape(-1, 2))
        assert np.asarray(got).reshape(-1).tolist() == want
        tags, use = model.arrays()
        np.testing.assert_array_equal(state.vocabulary.tags, tags)
        np.testing.assert_array_equal(state.vocabulary.use, use)
        state = dataclasses.replace(state, step=state.step + 1)
    counted = dict(zip(pool.COUNTERS, np.asarray(state.vocabulary.counters)[:, 0], strict=True))
    assert counted == {name: model.totals[name] for name in pool.COUNTERS}
    if spec.vocabulary.recycle and case != "one_row":
        assert counted["recyclings"] > 0
    assert counted["admissions"] > 0
    probes = spec.raw_ids(np.arange(300).reshape(-1, 2))
    got = jax.jit(admission.rows_of)(state, probes)
    assert np.asarray(got).reshape(-1).tolist() == [model.row_of(p) for p in probes.reshape(-1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["many", "resized"])
def test_any_number_of_threads_admits_as_the_reference_does(case):
    """Batches of 6,000 positions over all partitions; sets overflow, and rows are recycled."""
    pools = {"many": Pool(2048, 2, 8), "resized": Pool(2048 + 512, 2, 8, first_sets=128)}
    spec = stack(**pools[case]._asdict())
    native = ops.IMPLEMENTATIONS["numba"]
    threads = [dataclasses.replace(native, max_threads=number) for number in (1, 2, 3, 8)]
    first = mpembed.init(jax.random.key(0), spec, optax.sgd(0.5), implementation="xla")
    assert first.vocabulary.groups >= 16
    rng = np.random.default_rng(1)
    states = [dataclasses.replace(first, implementation=each) for each in ("xla", *threads)]
    for number in range(5):
        batch = rng.integers(0, 3000, (3000, 2)) // 2 * rng.integers(1, 3, (3000, 2)) + 400 * number
        pairs = spec.raw_ids(batch, where=np.arange(6000).reshape(-1, 2) % 7 != number % 9)
        states, rows = zip(*(_admit(state, pairs) for state in states), strict=True)
        for state, row in zip(states[1:], rows[1:], strict=True):
            training.assert_same(row, rows[0])
            training.assert_same(state.vocabulary, states[0].vocabulary)
            training.assert_same(state.table, states[0].table)
        states = [dataclasses.replace(state, step=state.step + 1) for state in states]
    counted = dict(zip(pool.COUNTERS, np.asarray(states[0].vocabulary.counters)[:, 0], strict=True))
    assert counted["recyclings"] > 1000 and counted["refusals"] > 1000


class Fused(NamedTuple):
    """A pool with a cache of `lines`, and what `embed` is asked for."""

    pool: Pool
    lines: int | None
    combiner: str | None = None
    budget: int | None = None  # of unique ids
    storage: str = "int8"


FUSED = {
    "fewer groups in the cache": Fused(Pool(2048, 2, 8), 128),
    "fewer groups in the pool": Fused(Pool(512, 2, 32, shared_rows=3), 480),
    "no cache": Fused(Pool(2048, 2, 8, shared_rows=40), None),
    "bags": Fused(Pool(2048, 2, 8), 500, "mean"),
    "budget": Fused(Pool(2048, 2, 8, shared_rows=3), 500, None, 300),
    "budget of bags": Fused(Pool(2048, 2, 8), None, "sum", 300),
    "resized": Fused(Pool(2048 + 512, 2, 8, first_sets=128), 500),
    "one row": Fused(Pool(1, 1, 1), 1),
    "refuses": Fused(Pool(512, 1, 8, recycle=False), 200),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    named(FUSED, fast={"fewer groups in the cache", "budget of bags", "resized"}, core=()),
)
def test_embed_trains_raw_ids_to_the_reference_s_bits_with_any_number_of_threads(case):
    """The native step takes the partitions of its admission. All of the state is compared."""
    pytest.importorskip("numba", reason="the [cpu] extra is not installed")
    spec = stack(dim=8, storage=case.storage, **case.pool._asdict())
    if case.lines is not None:
        spec = dataclasses.replace(spec, cache=mpembed.CacheSpec(num_rows=case.lines, ways=4))
    spec = dataclasses.replace(spec, max_unique_ids=case.budget)
    tx = rowwise_adagrad(0.5)

    @jax.jit
    def train(state, pairs, grads):
        state, plan, vectors = mpembed.embed(state, pairs, combiner=case.combiner, tx=tx)
        state = mpembed.apply_pooled_gradients(state, plan, grads, tx=tx)
        return state, vectors, plan.counts

    native = ops.IMPLEMENTATIONS["numba"]
    threads = [dataclasses.replace(native, max_threads=number) for number in (1, 8)]
    first = mpembed.init(jax.random.key(0), spec, tx, implementation="xla")
    states = [dataclasses.replace(first, implementation=each) for each in ("xla", *threads)]
    rng = np.random.default_rng(1)
    for number in range(8):
        batch = rng.zipf(1.2, (600, 4)) % 3000 + 100 * number
        batch[:, 2:] = batch[:, :2] if number % 2 else batch[:, 2:]
        tables = {"table0": batch[:, :3], "table1": batch[:, 3:]}
        where = {
            name: np.arange(x.size).reshape(x.shape) % 7 != number for name, x in tables.items()
        }
        pairs = spec.raw_ids(tables, where=where)
        lead = [x.shape if case.combiner is None else x.shape[:1] for x in tables.values()]
        grads = [rng.integers(-8, 9, (*shape, 8)).astype(np.float32) / 64 for shape in lead]
        grads = dict(zip(tables, grads, strict=True))
        states, vectors, counts = zip(
            *(train(state, pairs, grads) for state in states), strict=True
        )
        for state, found, counted in zip(states[1:], vectors[1:], counts[1:], strict=True):
            training.assert_same(found, vectors[0])
            training.assert_same(counted, counts[0])
            training.assert_same(dataclasses.replace(state, implementation="xla"), states[0])
    counted = dict(zip(pool.COUNTERS, np.asarray(states[0].vocabulary.counters)[:, 0], strict=True))
    assert counted["admissions"] > 0 and counted["shared_requests"] > 0
    assert case.pool.num_rows == 1 or (counted["recyclings"] > 50) == case.pool.recycle


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=16, max_size=16), min_size=1, max_size=12),
    st.sampled_from(sorted(POOLS)),
)
def test_any_stream_agrees_with_the_model(batches, case):
    spec = stack(tables=1, **POOLS[case]._asdict())
    model = model_of(spec)
    state = mpembed.init(jax.random.key(0), spec, optax.sgd(0.5))
    for batch in batches:
        pairs = spec.raw_ids({"table0": np.asarray(batch)})
        state, got = _admit(state, pairs)
        want, _ = model.prefetch(pairs["table0"])
        assert np.asarray(got["table0"]).tolist() == want
        state = dataclasses.replace(state, step=state.step + 1)


_admit = jax.jit(admission.admit)


@partial(jax.jit, static_argnames="tx", donate_argnames="state")
def step(state, pairs, grads, tx):
    state, plan, rows_ = training.step(state, pairs, tx, training.of_positions(grads))
    return state, plan, rows_


@pytest.mark.parametrize("stored", named(STORED, fast={"int8-None-numba"}, core={"int4-12-numba"}))
def test_without_recycling_training_is_that_of_the_same_rows_as_dense_ids(stored):
    storage, lines, implementation = stored
    spec = stack(400, 8, storage=storage, lines=lines, ways=8, recycle=False, admit_after=2)
    dense = dataclasses.replace(
        spec, vocabulary=None, tables=(mpembed.TableSpec("pool", spec.num_rows),)
    )
    tx = rowwise_adagrad(0.5)
    state = mpembed.init(jax.random.key(3), spec, tx, implementation=implementation)
    other = mpembed.init(jax.random.key(3), dense, tx, implementation=implementation)
    model = model_of(spec)
    rng = np.random.default_rng(0)
    for batch in raw_batches(2, 20, 32, 300, 2):
        pairs = spec.raw_ids(batch)
        grads = jnp.asarray(rng.integers(-8, 8, (32, 2, 8)) / 64, jnp.float32)
        state, plan, got = step(state, pairs, grads, tx)
        ids = np.asarray(model.prefetch(pairs.reshape(-1, 2))[0], np.int32).reshape(32, 2)
        other, other_plan, want = step(other, ids, grads, tx)
        training.assert_same(got, want)
        plan, other_plan = (dataclasses.replace(p, signature=None) for p in (plan, other_plan))
        training.assert_same(plan, other_plan)
    training.assert_same(state.table.rows, other.table.rows)
    training.assert_same(state.row_state, other.row_state)
    training.assert_same(state.cache, other.cache)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", named(IMPLEMENTATIONS, fast={"numba"}))
def test_new_owners_start_within_the_bound_of_their_table(implementation):
    """Rows that had no owner, and rows of owners from the other table; after growth, too."""
    spec = stack(64, 8, storage="int8", lines=12, ways=4, admit_after=1)
    bounds = {"table0": 0.5, "table1": 0.01}
    tables = tuple(dataclasses.replace(t, initial_bound=bounds[t.name]) for t in spec.tables)
    spec = dataclasses.replace(spec, tables=tables)
    state = mpembed.init(jax.random.key(3), spec, TX, implementation=implementation)
    shared = np.abs(table.read_rows(state.table, np.arange(64, 66)))
    assert 0.25 < shared[0].max() <= 0.51 and 0.005 < shared[1].max() <= 0.0102
    drawn = {name: [] for name in bounds}
    for number, batch in enumerate(raw_batches(5, 30, 12, 60, 2, drift=3)):
        if number == 20:
            state = vocabularies.grow(state, 128)
        pairs = state.spec.raw_ids(batch)
        before, state = state.vocabulary, _admit(state, pairs)[0]
        rows = np.asarray(admission.rows_of(state, pairs))
        for column, name in enumerate(bounds):
            own = np.unique(rows[:, column][rows[:, column] < state.vocabulary.geometry.lines])
            sets, ways = own % before.geometry.sets, own // before.geometry.sets
            is_new = np.asarray(before.tags != state.vocabulary.tags)[sets, ways]
            drawn[name].append(np.abs(table.read_rows(state.table, own[is_new])))
        # Lines and optimizer state of an owner are not those of the next one.
        state = step(state, state.spec.raw_ids(batch), jnp.ones((12, 2, 8)), TX)[0]
    for name, values in drawn.items():
        values = np.concatenate(values)
        assert values.size > 500 and 0.97 * bounds[name] < values.max() <= 1.02 * bounds[name]


@pytest.mark.parametrize("stored", named(STORED, fast={"float32-12-numba"}, core=CORE))
def test_a_recycled_row_starts_as_init_made_it(stored):
    """Every row that changes its owner has its first bits, fresh optimizer state and no line."""
    storage, lines, implementation = stored
    spec = stack(24, 8, storage=storage, lines=lines, ways=4, admit_after=1)
    tx = rowwise_adagrad(0.5)
    state = mpembed.init(jax.random.key(3), spec, tx, implementation=implementation)
    first = np.asarray(state.table.rows)
    first_rows = np.asarray(
        mpembed.read(
            dataclasses.replace(state, vocabulary=None), np.arange(spec.num_rows, dtype=np.int32)
        )
    )
    model = model_of(spec)
    num_checked = 0
    for batch in raw_batches(5, 30, 12, 60, 2, drift=3):
        pairs = spec.raw_ids(batch)
        _, recycled = model.prefetch(pairs.reshape(-1, 2))
        recycled = np.asarray(sorted(recycled), int)
        after, _ = _admit(state, pairs)
        np.testing.assert_array_equal(np.asarray(after.table.rows)[recycled], first[recycled])
        for leaf in jax.tree.leaves(after.row_state):
            assert (np.asarray(leaf)[recycled] == 0).all()
        kept = np.setdiff1d(np.arange(spec.num_rows), recycled)
        np.testing.assert_array_equal(
            np.asarray(after.table.rows)[kept], np.asarray(state.table.rows)[kept]
        )
        if lines is not None:
            assert not np.isin(np.asarray(after.cache.tags), recycled).any()
        state, plan, got = step(state, pairs, jnp.ones((12, 2, 8)), tx)
        own = np.isin(np.asarray(plan.unique_ids), recycled)
        np.testing.assert_array_equal(
            np.asarray(got)[own], first_rows[np.asarray(plan.unique_ids)[own]]
        )
        num_checked += own.sum()
    assert num_checked > 20


def test_read_admits_nothing_and_reads_the_row_of_training():
    spec = stack(64, tables=1, admit_after=2)
    tx = optax.sgd(1.0)
    state = mpembed.init(jax.random.key(0), spec, tx)
    known, once, unknown = (spec.raw_ids({"table0": [name]}) for name in ("a", "b", "c"))
    state, *_ = step(state, spec.raw_ids([["a"], ["a"], ["b"]]), jnp.ones((3, 1, 4)), tx)
    before = jax.tree.map(np.asarray, state.vocabulary)
    a, b, c = (mpembed.read(state, ids)["table0"] for ids in (known, once, unknown))
    np.testing.assert_array_equal(b, c)
    assert (np.asarray(a) != np.asarray(b)).all()
    padding = spec.raw_ids({"table0": [None, "a"]})
    assert (np.asarray(mpembed.read(state, padding)["table0"])[0] == 0).all()
    training.assert_same(jax.tree.map(np.asarray, state.vocabulary), before)


@pytest.mark.parametrize("first_sets", [16, 5], ids=["new", "resized"])
def test_two_ids_share_a_tag_as_often_as_birthdays_do(first_sets):
    """Two ids have the same tag and set with probability 2^-24 / S, where S are the first sets.

    The tags are cut to 12 bits, so that 3,000 ids make collisions that can be counted: of their
    n (n - 1) / 2 pairs, 68.6 on average if S = 16, with a deviation of 8.3; 220 if S = 5.
    """
    spec = mpembed.VocabularySpec(16 * 16, ways=16, first_sets=first_sets)
    sizes = pool.init(spec, None).sizes
    pairs = hashes.of_column(np.arange(3000), "t", 0)
    pairs[:, 0] &= np.uint32(0xFFF00)
    sets = np.asarray(pool.sets_of(jnp.asarray(pairs), sizes))
    tags = np.asarray(pool.tags_of(jnp.asarray(pairs)))
    seen = Counter(zip(sets.tolist(), tags.tolist(), strict=True))
    collisions = sum(n * (n - 1) // 2 for n in seen.values())
    expected = 3000 * 2999 / 2 / first_sets / 2**12
    assert abs(collisions - expected) < 5 * np.sqrt(expected)
    first = np.bincount(sets % first_sets, minlength=first_sets)
    assert abs(first - 3000 / first_sets).max() < 6 * np.sqrt(3000 / first_sets)
    assert len(set(sets.tolist())) == 16


@pytest.mark.parametrize("place_bits", [22, 30])
def test_the_shard_of_an_id_holds_its_set(place_bits):
    sizes = pool.init(mpembed.VocabularySpec(2048, ways=4, place_bits=place_bits), None).sizes
    pairs = jnp.asarray(hashes.of_column(np.arange(1000), "t", 3))
    sets = np.asarray(pool.sets_of(pairs, sizes))
    for shards in (2, 4):
        geometry = sizes.geometry
        part = geometry._replace(sets=geometry.sets // shards, groups=geometry.groups // shards)
        local = sizes._replace(geometry=part, first_sets=sizes.first_sets // shards)
        shard = np.asarray(pool.shard_of(pairs, place_bits, shards))
        np.testing.assert_array_equal(shard, sets % shards)
        np.testing.assert_array_equal(pool.sets_of(pairs, local, shards), sets // shards)


def test_ids_of_one_table_have_more_places_than_a_place_has_bits():
    word = np.random.default_rng(0).integers(0, 2**32, (2**20, 2), dtype=np.uint32)
    word[:, 1] &= np.uint32(-hashes.MAX_TABLES & 0xFFFFFFFF)
    places = {
        bits: len(set(np.asarray(pool._mixed_places(jnp.asarray(word), bits)).tolist()))
        for bits in (22, 30)
    }
    thrown = 2**22 * (1 - np.exp(-(2.0**-2)))  # of 2^20 balls into 2^22 places
    assert abs(places[22] - thrown) < 5 * np.sqrt(thrown) and places[30] > 2**20 * 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [10_000_000, pytest.param(30_000_000, marks=pytest.mark.exhaustive)]
)
def test_as_many_ids_of_one_table_as_rows_fill_most_of_a_large_pool(rows):
    want = {10_000_000: {22: 0.870, 30: 0.929}, 30_000_000: {22: 0.799, 30: 0.929}}[rows]
    for bits, share in want.items():
        sizes = pool.init(mpembed.VocabularySpec(rows, place_bits=bits), None).sizes
        find = jax.jit(partial(pool.sets_of, sizes=sizes))
        rng, num = np.random.default_rng(0), np.zeros(sizes.geometry.sets, np.int64)
        for _ in range(10):
            pairs = rng.integers(0, 2**32, (rows // 10, 2), dtype=np.uint32)
            pairs[:, 1] &= np.uint32(-hashes.MAX_TABLES & 0xFFFFFFFF)
            num += np.bincount(find(pairs), minlength=num.size)
        assert abs(np.minimum(num, 32).sum() / rows - share) < 0.001


def test_a_stranger_finds_a_row_as_often_as_a_set_has_owners_of_its_tag():
    """An id without a row takes that of another with probability W / 2^24 if its set is full.

    The owners have all tags whose low 13 bits are zero, in every set. So a stranger's tag is among
    them with probability 2^-13: of 200,000 strangers, 24.4 on average, with a deviation of 4.9.
    """
    spec = mpembed.VocabularySpec(2 * 64, ways=64, sketch_bytes=1)
    vocabulary = pool.init(spec, None)
    tags = (np.arange(64, dtype=np.uint32) << 13)[None].repeat(2, 0)
    vocabulary = dataclasses.replace(vocabulary, owners=jnp.asarray(tags << pool.USE_BITS))
    pairs = hashes.of_column(np.arange(200_000), "t", 0)
    pairs[:, 0] &= np.uint32(2**27 - 1)  # tags below 2^19: each of 2^19 is as likely
    rows = np.asarray(pool.locate(vocabulary, jnp.asarray(pairs), 1))
    assert abs((rows < 128).sum() - 24.4) < 5 * 4.9


def test_a_use_is_rounded_without_bias_and_halved_exactly():
    uses = np.asarray([*range(70), 100, 1000, 12345, 300_000, pool.MAX_USE], np.int32)
    noise = np.random.default_rng(0).integers(0, 2**32, (4000, len(uses)), np.uint32)
    tags = np.full(noise.shape, 77, np.uint32)
    owners = pool.owners_of(jnp.asarray(tags), jnp.asarray(uses[None].repeat(4000, 0)), noise)
    assert (np.asarray(owners) >> pool.USE_BITS == 77).all()
    got = np.asarray(pool.use_of(owners))
    want = [
        [oracles.use_of_code(oracles.code_of(int(u), int(n)))]
        for u, n in zip(uses, noise[0], strict=True)
    ]
    np.testing.assert_array_equal(got[0], np.ravel(want))
    assert (got[:, :33] == uses[:33]).all() and (got[:, -1] == pool.MAX_USE).all()
    # The step is a sixteenth of the use at most, so a mean has a deviation of use / 16 / 2 / 63.
    assert (abs(got.mean(0) - uses) <= 5 * uses / 32 / 63).all()
    codes = jnp.arange(255, dtype=jnp.uint32)
    half = np.asarray(pool.use_of(pool.halved(codes | jnp.uint32(77 << 8))))
    np.testing.assert_array_equal(half, np.asarray(pool.use_of(codes)) // 2)
    assert pool.use_of(jnp.uint32(pool.PINNED)) > pool.MAX_USE


def test_a_row_has_four_bytes_and_its_share_of_the_sketch():
    for count in (1, 3):
        spec = stack(6144, ways=32, sketch_bytes=count)
        state = mpembed.init(jax.random.key(0), spec, optax.sgd(1.0))
        v = state.vocabulary
        assert v.owners.nbytes == 4 * 6144 and v.sketch.nbytes == count * 6144
    assert mpembed.VocabularySpec(64).sketch_bytes == 3


def test_a_stack_without_a_vocabulary_has_the_leaves_it_had():
    spec = mpembed.EmbeddingSpec((mpembed.TableSpec("t", 10),), 4)
    state = mpembed.init(jax.random.key(0), spec, optax.sgd(1.0))
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names[-1] == ".fingerprint" and not any("vocabulary" in name for name in names)
