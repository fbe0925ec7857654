"""Vocabularies after launch: owners keep their bits, and go on as the brute-force model does."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import training
from cases import Refused, crossed, named

import mpembed_jax as mpembed
from mpembed_jax import checkpoint, vocabularies
from mpembed_jax.cache import residency
from mpembed_jax.embedding import admission
from mpembed_jax.optim import rowwise_adagrad
from mpembed_jax.vocabulary import pool

DIM = 8
TX = rowwise_adagrad(0.5)
TABLES = (mpembed.TableSpec("user"), mpembed.TableSpec("item"))
NO_TAG = oracles.DictVocabulary.NO_TAG


def spec_of(num_rows=160, cache=None, **options):
    options = {"admit_after": 2, "ways": 8} | options
    cache = mpembed.CacheSpec(fraction=0.2, ways=8) if cache is None else cache
    vocabulary = mpembed.VocabularySpec(num_rows, **options)
    return mpembed.EmbeddingSpec(TABLES, DIM, "int8", cache, vocabulary=vocabulary)


@jax.jit
def step(state, pairs, grads):
    return training.step(state, pairs, TX, training.of_positions(grads)).state


def ids_of(num, seed, largest=300):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.zipf(1.2, (num, 24, 2)), largest)


def trained(state, num=12, seed=0):
    rng = np.random.default_rng(seed)
    for ids in ids_of(num, seed):
        grads = rng.normal(size=(24, 2, DIM)).astype(np.float32)
        state = step(state, state.spec.raw_ids(ids), grads)
    return state


def init(spec=None, **options):
    return mpembed.init(jax.random.key(0), spec or spec_of(), TX, **options)


def held(state):
    """{owner: (packed row, optimizer state, line, dirty)} by first set and tag, or shared row."""
    v = state.vocabulary
    tags = np.asarray(v.tags)
    named_rows = {
        ("owner", home % v.first_sets, int(tags[home, way])): way * v.geometry.sets + home
        for home, way in np.argwhere(tags != NO_TAG).tolist()
    }
    first = v.geometry.lines
    named_rows |= {("shared", k): first + k for k in range(state.spec.num_rows - first)}
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.row_state) if leaf.ndim]
    lines = {}
    if state.cache is not None:
        line_tags, dirty = (np.asarray(a).ravel() for a in (state.cache.tags, state.cache.dirty))
        values = np.asarray(state.cache.rows)
        use = np.asarray(state.cache.priority).ravel()
        for k in np.flatnonzero(line_tags != mpembed.NO_ID):
            lines[int(line_tags[k])] = (values[k].tobytes(), bool(dirty[k]), int(use[k]))
    rows = np.asarray(state.table.rows)
    return {
        name: (rows[row].tobytes(), [leaf[row].tobytes() for leaf in leaves], lines.get(row))
        for name, row in named_rows.items()
    }


def assert_sound(state):
    """Each owner is in its set, and each cached row in a line of its own set, once."""
    v = state.vocabulary
    tags = np.asarray(v.tags)
    home, way = np.nonzero(tags != NO_TAG)
    found = pool.split(jnp.asarray(home % v.first_sets), jnp.asarray(tags[home, way]), v.sizes)
    np.testing.assert_array_equal(found, home)
    assert len(set(zip(home.tolist(), tags[home, way].tolist(), strict=True))) == home.size
    if state.cache is not None:
        line_tags = np.asarray(state.cache.tags).ravel()
        line_tags = line_tags[line_tags != mpembed.NO_ID]
        assert len(set(line_tags.tolist())) == line_tags.size
        at = np.asarray(residency.locate(state.cache, jnp.asarray(line_tags)))
        assert (at < state.cache.geometry.lines).all()
    state.check_spec()


def model_of(state):
    v, rules = state.vocabulary, state.spec.vocabulary
    per, bits = v.sizes.counters_per_byte, v.counter_bits
    sketch = np.asarray(v.sketch)[..., None] >> (np.arange(per) * bits) & v.sizes.max_count
    names = ("admit_after", "ways", "recycle", "shared_rows", "sketch_bytes", "first_sets")
    names += ("place_bits", "window")
    options = {name: getattr(rules, name) for name in names}
    counters = sketch.reshape(*sketch.shape[:2], -1)
    model = oracles.DictVocabulary.of_arrays(
        np.asarray(v.tags), np.asarray(v.use), counters, **options
    )
    model.step = int(state.step)
    return model


def assert_goes_on_as_the_model(state):
    model = model_of(state)
    for ids in ids_of(8, 99):
        pairs = state.spec.raw_ids(ids)
        state, got = jax.jit(admission.admit)(state, pairs)
        want, _ = model.prefetch(pairs.reshape(-1, 2))
        assert np.asarray(got).reshape(-1).tolist() == want
        state = dataclasses.replace(state, step=state.step + 1)
    tags, use = model.arrays()
    np.testing.assert_array_equal(state.vocabulary.tags, tags)
    np.testing.assert_array_equal(state.vocabulary.use, use)


def counts_of(state, pairs):
    """What the sketch says of ids."""
    sizes = state.vocabulary.sizes
    sets, tags = pool.sets_of(pairs, sizes), pool.tags_of(pairs)
    cells = pool.cells(sizes, sets, pool.mixed(sets, tags, sizes))
    return np.asarray(pool.counts_of(state.vocabulary.sketch.reshape(-1), cells, sizes))


@pytest.mark.slow
@crossed(
    implementation=named(["xla", "numba"], fast={"numba"}),
    num_rows=named([176, 320, 800], fast={"320"}),
    core=(),
)
def test_growth_keeps_every_owner_bit_for_bit(num_rows, implementation):
    state = trained(init(implementation=implementation))
    before = held(state)
    after = vocabularies.grow(state, num_rows)
    assert after.vocabulary.geometry.lines == num_rows
    assert held(after) == before and any(line for *_, line in before.values())
    assert_sound(after)
    probes = jnp.asarray(after.spec.raw_ids(np.arange(300).reshape(-1, 2)).reshape(-1, 2))
    assert (counts_of(after, probes) >= counts_of(state, probes)).all()
    np.testing.assert_array_equal(mpembed.read(after, probes), mpembed.read(state, probes))
    assert_goes_on_as_the_model(after)
    # Rows without an owner are those of a new stack.
    fresh = init(after.spec)
    v = after.vocabulary
    is_free = np.asarray(v.tags).T.reshape(-1) == NO_TAG
    free = np.flatnonzero(is_free)
    np.testing.assert_array_equal(
        np.asarray(after.table.rows)[free], np.asarray(fresh.table.rows)[free]
    )
    training.assert_same(trained(after, 4), trained(vocabularies.grow(state, num_rows), 4))


@pytest.mark.exhaustive
def test_growth_in_turns_is_growth_at_once():
    """The whole command grows once, in the test above."""
    state = trained(init())
    turns = state
    for size in (208, 320, 496):
        turns = vocabularies.grow(turns, size)
    once = vocabularies.grow(state, 496)
    assert held(turns) == held(once) == held(state) and turns.spec == once.spec


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", named([480, 320, 208, 160, 120, 20], fast={"120"}, core=()))
def test_shrinking_keeps_the_most_used_owners(num_rows):
    state = trained(vocabularies.grow(init(), 640), 40)
    after = vocabularies.shrink(state, num_rows)
    geometry = after.vocabulary.geometry
    assert geometry.lines == num_rows and geometry.sets >= state.vocabulary.first_sets
    assert_sound(after)
    # The owners of each new set, by the model: descending use, then ascending tag.
    model = model_of(after)
    waiting = {}
    for home, ways in enumerate(model_of(state).sets):
        for line in filter(None, ways):
            first = home % state.vocabulary.first_sets
            waiting.setdefault(model.split(first, line.row_id), []).append(
                (-line.priority, line.row_id)
            )
    want = {(h, tag) for h, ids in waiting.items() for _, tag in sorted(ids)[: geometry.ways]}
    got = {(h, line.row_id) for h, ways in enumerate(model.sets) for line in filter(None, ways)}
    assert got == want
    before, kept = held(state), held(after)
    gone = before.keys() - kept.keys()
    assert len(gone) == sum(map(len, waiting.values())) - len(want)
    for name, (row, states, line) in kept.items():
        old_row, old_states, old_line = before[name]
        assert states == old_states
        if line is not None or old_line is None or not old_line[1]:
            assert row == old_row and line in (old_line, None)
    for home, ids in waiting.items():
        for negative, tag in sorted(ids)[geometry.ways :]:
            cells = model.cells(home, tag)
            assert min(model.sketch.get(c, 0) for c in cells) >= min(model.max_count, -negative)
    assert_goes_on_as_the_model(after)


@pytest.mark.slow
def test_a_line_without_a_place_is_written_back():
    """A cache of fixed size that is full may lose lines; each then is its line, rounded."""
    state = trained(init(spec_of(cache=mpembed.CacheSpec(num_rows=32, ways=1))), 30)
    after = vocabularies.grow(state, 320)
    before, now = held(state), held(after)
    assert before.keys() == now.keys()
    all_rows = {name: k for k, name in enumerate(before)}
    lost = [n for n in all_rows if before[n][2] is not None and now[n][2] is None]
    for name in all_rows:
        if name not in lost:
            assert before[name] == now[name]
    for name in lost:
        assert before[name][1] == now[name][1]
    assert len(lost) < 16
    assert_sound(after)


@pytest.mark.slow
def test_tables_are_added_and_the_others_stay():
    state = trained(init())
    after = vocabularies.add_tables(state, mpembed.TableSpec("city"))
    before, now = held(state), held(after)
    assert all(now[name] == value for name, value in before.items())
    assert now.keys() - before.keys() == {("shared", 2)}
    training.assert_same(after.cache, state.cache)
    pairs = after.spec.raw_ids({"city": ["Ulm", "Ulm", "Bern"], "user": [1, 2, 3]})
    np.testing.assert_array_equal(
        mpembed.read(after, pairs)["user"],
        mpembed.read(state, {"user": pairs["user"]})["user"],
    )
    after, got = jax.jit(admission.admit)(after, pairs)
    assert got["city"][0] == got["city"][1] < 160 < got["city"][2] == after.spec.num_rows - 1
    assert_sound(after)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "numba"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_counts_are_loaded_as_the_model_loads_them(implementation, is_trained):
    state = init(implementation=implementation)
    state = trained(state) if is_trained else state
    model = model_of(state)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 10**6, (400, 2))
    counts = np.minimum(rng.zipf(1.5, (400, 2)) - 1, 5000)
    pairs = state.spec.raw_ids({"user": np.tile(ids[:, 0], 2), "item": ids[:, 1]})
    numbers = {"user": np.concatenate([counts[:, 0], counts[::-1, 0]]), "item": counts[:, 1]}
    before = held(state)
    after = vocabularies.from_counts(state, pairs, numbers)
    total = Counter()
    for name, array in pairs.items():
        for pair, number in zip(array, numbers[name], strict=True):
            total[model.identity(pair)] += int(number)
    recycled = model.admit(Counter({i: n for i, n in total.items() if n}))
    tags, use = model.arrays()
    np.testing.assert_array_equal(after.vocabulary.tags, tags)
    np.testing.assert_array_equal(after.vocabulary.use, use)
    v = after.vocabulary
    rows = {
        ("owner", h % v.first_sets, int(tags[h, w])): w * v.geometry.sets + h
        for h, w in np.argwhere(tags != NO_TAG)
    }
    for name, value in held(after).items():
        if name in before and rows.get(name) not in recycled:
            assert value == before[name]
    added = (np.asarray(v.counters) - np.asarray(state.vocabulary.counters))[:, 0].tolist()
    assert added == [0, 0, model.totals["admissions"], 0, 0]
    assert model.totals["admissions"] > 50


@crossed(
    is_jitted=named([False, True], fast={"True"}),
    implementation=["xla", "numba"],
    core=(),
)
def test_nothing_of_forgotten_ids_is_left(implementation, is_jitted):
    state = trained(init(implementation=implementation))
    model = model_of(state)
    pairs = {"user": state.spec.raw_ids({"user": [1, 2, 2, None, 77777]})["user"]}
    verb = jax.jit(vocabularies.forget) if is_jitted else vocabularies.forget
    after = verb(state, pairs)
    rows = sorted(model.forget(pairs["user"].tolist()))
    assert len(rows) == 2
    tags, use = model.arrays()
    np.testing.assert_array_equal(after.vocabulary.tags, tags)
    np.testing.assert_array_equal(after.vocabulary.use, use)
    assert counts_of(after, jnp.asarray(pairs["user"]))[[0, 1, 4]].tolist() == [0, 0, 0]
    before, now = held(state), held(after)
    assert len(before.keys() - now.keys()) == 2 and all(before[n] == v for n, v in now.items())
    fresh = init()
    np.testing.assert_array_equal(
        np.asarray(after.table.rows)[rows], np.asarray(fresh.table.rows)[rows]
    )
    for leaf, first in zip(
        jax.tree.leaves(after.row_state), jax.tree.leaves(fresh.row_state), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(leaf)[rows], np.asarray(first)[rows])
    assert not np.isin(np.asarray(after.cache.tags), rows).any()
    assert_sound(after)
    assert_goes_on_as_the_model(after)


@pytest.mark.slow
def test_changes_work_on_a_restored_state_and_are_restored(tmp_path):
    state = trained(init())
    checkpoint.save(tmp_path / "a", 1, state)
    restored = checkpoint.restore(tmp_path / "a", init())
    pairs = state.spec.raw_ids({"user": [1]})

    def changed(state):
        return vocabularies.grow(vocabularies.forget(state, pairs), 320)

    after = changed(restored)
    training.assert_same(after, changed(state))
    checkpoint.save(tmp_path / "b", 2, after)
    training.assert_same(checkpoint.restore(tmp_path / "b", init(after.spec)), after)
    with pytest.raises(ValueError, match="vocabulary"):
        checkpoint.restore(tmp_path / "b", init())
    assert mpembed.stats(after).vocabulary.num_rows == 320


def test_a_traced_state_that_waits_for_its_update_forgets_nothing():
    state = trained(init())
    pairs = state.spec.raw_ids({"user": [1, 2]})
    waiting, _ = jax.jit(mpembed.prefetch)(state, pairs)
    after = jax.jit(vocabularies.forget)(waiting, pairs)
    training.assert_same(after.vocabulary, waiting.vocabulary)
    training.assert_same(after.table, waiting.table)
    with pytest.raises(ValueError, match="changed nothing"):
        mpembed.stats(after)


STATE = {}


def state_of():
    if not STATE:
        STATE["state"] = trained(init(), 4)
    return STATE["state"]


def waiting():
    return mpembed.prefetch(state_of(), state_of().spec.raw_ids({"user": [1]}))[0]


def dense():
    spec = mpembed.EmbeddingSpec((mpembed.TableSpec("t", 9),), DIM)
    return mpembed.init(jax.random.key(0), spec, TX)


def pairs_of(*ids):
    return state_of().spec.raw_ids({"user": list(ids)})


REFUSED = {
    "grow to fewer": Refused(
        lambda: vocabularies.grow(state_of(), 160), "ask for 176 or more, or see shrink", ValueError
    ),
    "grow by half a row": Refused(
        lambda: vocabularies.grow(state_of(), 320.5), "must be an integer", ValueError
    ),
    "shrink to more": Refused(
        lambda: vocabularies.shrink(state_of(), 320), "at least 20.*see grow", ValueError
    ),
    "shrink to nothing": Refused(
        lambda: vocabularies.shrink(state_of(), 5), "at least 20", ValueError
    ),
    "row numbers": Refused(lambda: vocabularies.grow(dense(), 20), "no vocabulary", ValueError),
    "forget row numbers": Refused(
        lambda: vocabularies.forget(state_of(), np.zeros(3, np.int32)), "raw_ids", TypeError
    ),
    "between the verbs": Refused(
        lambda: vocabularies.forget(waiting(), pairs_of(1)), "between steps", ValueError
    ),
    "grow between the verbs": Refused(
        lambda: vocabularies.grow(waiting(), 320), "between steps", ValueError
    ),
    "traced": Refused(
        lambda: jax.jit(lambda s: vocabularies.grow(s, 320))(state_of()), "traced", TypeError
    ),
    "no state": Refused(lambda: vocabularies.grow(3, 320), "EmbeddingState", TypeError),
    "negative counts": Refused(
        lambda: vocabularies.from_counts(state_of(), pairs_of(1), {"user": [-1]}),
        "some below 0",
        ValueError,
    ),
    "counts of another shape": Refused(
        lambda: vocabularies.from_counts(state_of(), pairs_of(1), {"user": [1, 2]}),
        r"one for each id \[1\]",
        ValueError,
    ),
    "masked counts": Refused(
        lambda: vocabularies.from_counts(
            state_of(), pairs_of(1), {"user": np.ma.array([1], mask=[True])}
        ),
        "from_counts: counts: got a masked array",
        TypeError,
    ),
    "half counts": Refused(
        lambda: vocabularies.from_counts(state_of(), pairs_of(1), {"user": [1.5]}),
        "integers",
        ValueError,
    ),
    "a table twice": Refused(
        lambda: vocabularies.add_tables(state_of(), mpembed.TableSpec("user")),
        "distinct",
        ValueError,
    ),
    "a table with a size": Refused(
        lambda: vocabularies.add_tables(state_of(), mpembed.TableSpec("city", 5)),
        "vocabulary_size",
        ValueError,
    ),
    "a name": Refused(lambda: vocabularies.add_tables(state_of(), "city"), "TableSpec", TypeError),
    "sets that cannot be the first": Refused(
        lambda: mpembed.VocabularySpec(64, ways=8, first_sets=9), "first_sets", ValueError
    ),
    "bits that no version had": Refused(
        lambda: mpembed.VocabularySpec(64, place_bits=32), "must be 30, or 22", ValueError
    ),
    "bits that are no integer": Refused(
        lambda: mpembed.VocabularySpec(64, place_bits=30.0), "place_bits must be 30", ValueError
    ),
    "a sketch without end": Refused(
        lambda: mpembed.VocabularySpec(2**30, sketch_bytes=3), "lower sketch_bytes", ValueError
    ),
}


@pytest.mark.parametrize("case", named(REFUSED))
def test_mistakes_are_refused(case):
    with pytest.raises(case.error, match=case.message):
        case.call()


def test_no_ids_change_nothing():
    state = state_of()
    for ids in ({}, pairs_of(), pairs_of(None)):
        training.assert_same(vocabularies.forget(state, ids), state)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape[:-1], int), ids)
        training.assert_same(vocabularies.from_counts(state, ids, zeros), state)


@pytest.mark.slow
@pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")
def test_wide_optimizer_state_moves_with_its_rows():
    tx = optax.adam(0.1)
    state = mpembed.init(jax.random.key(0), spec_of(), tx)
    for ids in ids_of(6, 3):
        pairs = state.spec.raw_ids(ids)
        state = training.step(state, pairs, tx).state
    assert held(vocabularies.grow(state, 320)) == held(state)
