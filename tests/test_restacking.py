"""States moved to other tables: what a kept row keeps, and what is refused."""

from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import training
from cases import Refused, named

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec, nn, restacking, sharding

DIM = 8
TX = mpembed.optim.rowwise_adagrad(0.5)
SIZES = {"a": 200, "b": 300}
CACHE = CacheSpec(num_rows=64, ways=4)


def spec_of(sizes, cache=CACHE, storage="int8", dim=DIM, **options):
    tables = [TableSpec(name, size) for name, size in sizes.items()]
    return EmbeddingSpec(tables, dim, storage, cache, **options)


def ngrams(orders=(2,), **options):
    return nn.ngram_spec(
        nn.NGramHash(40, orders, 1, **{"rows": 60} | options), DIM, storage="int8", cache=CACHE
    )


def batches(num, seed=0, rows=500):
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.3, (num, 40)) - 1, rows - 1).astype(np.int32)
    return ids, rng.normal(size=(num, 40, DIM)).astype(np.float32)


def trained(spec=None, tx=TX):
    spec = spec_of(SIZES) if spec is None else spec
    return training.train(mpembed.init(jax.random.key(0), spec, tx), *batches(6), tx).state


def table_of(state, name):
    """A table's packed rows, its optimizer state, and {local id: line} of its cached rows."""
    first, size = state.spec.table_range(name)
    part = slice(first, first + size)
    lines = {}
    if state.cache is not None:
        tags, dirty = (np.asarray(a).reshape(-1) for a in (state.cache.tags, state.cache.dirty))
        for line in np.flatnonzero((tags >= first) & (tags < first + size)):
            row = np.asarray(state.cache.rows[line]).tobytes()
            lines[int(tags[line]) - first] = (row, bool(dirty[line]))
    leaves = [np.asarray(leaf)[part] for leaf in jax.tree.leaves(state.row_state) if leaf.ndim]
    return np.asarray(state.table.rows)[part], leaves, lines


def assert_kept(before, after, renamed=None, *, every_line=True):
    """Each row of a kept table has its bits, its optimizer state and its line."""
    for name in (t.name for t in after.spec.tables):
        old_name = (renamed or {}).get(name, name)
        if old_name not in (t.name for t in before.spec.tables):
            continue
        (rows, states, lines), (new_rows, new_states, new_lines) = (
            table_of(before, old_name),
            table_of(after, name),
        )
        size = len(rows)
        for old, new in zip(states, new_states, strict=True):
            np.testing.assert_array_equal(new[:size], old)
        assert new_lines.items() <= lines.items()
        if every_line:
            assert new_lines == lines
        rounded = [id for id, (_, dirty) in lines.items() if dirty and id not in new_lines]
        same = np.setdiff1d(np.arange(size), rounded)
        np.testing.assert_array_equal(new_rows[:size][same], rows[same])


def restacked(state, spec, renamed):
    """The state under a spec; old tables that it does not name are removed."""
    kept = [(renamed or {}).get(t.name, t.name) for t in spec.tables]
    removed = [t.name for t in state.spec.tables if t.name not in kept]
    return restacking.restack(state, spec, TX, renamed=renamed, removed=removed)


class Change(NamedTuple):
    """The sizes of the new tables, and the old names of those that are renamed."""

    sizes: dict[str, int]
    renamed: dict[str, str] | None


GROWN = {
    "a larger last table": Change({"a": 200, "b": 400}, None),
    "one more table": Change({**SIZES, "c": 50}, None),
    "the last table removed": Change({"a": 200}, None),
    "a renamed table": Change({"a": 200, "bought": 300}, {"bought": "b"}),
}
MOVED = {
    "a larger first table": Change({"a": 250, "b": 300}, None),
    "the first table removed": Change({"b": 300}, None),
    "swapped and renamed": Change({"second": 300, "first": 210}, {"second": "b", "first": "a"}),
}


@pytest.mark.parametrize(
    "case", named(GROWN, fast={"a larger last table", "the last table removed"})
)
def test_tables_that_keep_their_ids_keep_rows_lines_and_sketch_in_place(case):
    sizes, renamed = case
    before = trained()
    after = restacked(before, spec_of(sizes), renamed)
    assert_kept(before, after, renamed)
    np.testing.assert_array_equal(after.cache.sketch, before.cache.sketch)
    tags = np.asarray(after.cache.tags)
    is_kept = tags != NO_ID
    np.testing.assert_array_equal(tags[is_kept], np.asarray(before.cache.tags)[is_kept])
    fresh = mpembed.init(jax.random.key(0), after.spec, TX)
    if "b" in sizes and sizes["b"] > 300:
        np.testing.assert_array_equal(after.table.rows[500:], fresh.table.rows[500:])
    assert mpembed.stats(after).steps == 6


@pytest.mark.parametrize("case", named(MOVED, fast={"swapped and renamed"}))
@pytest.mark.parametrize(
    "cache", [CACHE, CacheSpec(fraction=0.4), None], ids=["64", "40 %", "none"]
)
def test_tables_whose_ids_move_keep_rows_and_lines_as_far_as_there_is_room(case, cache):
    sizes, renamed = case
    before = trained()
    after = restacked(before, spec_of(sizes, cache), renamed)
    has_room = cache is not None and cache.num_rows is None
    assert_kept(before, after, renamed, every_line=has_room)
    cache = after.cache
    if cache is not None:
        held = np.asarray(cache.tags)[np.asarray(cache.tags) != NO_ID]
        sources = [(renamed or {}).get(name, name) for name in sizes]
        num_lines = sum(len(table_of(before, name)[2]) for name in sources)
        assert num_lines / 2 < held.size == np.unique(held).size <= num_lines
    # A row that found no room is rounded, as flush rounds it.
    old, new = mpembed.to_dense(before), mpembed.to_dense(after)
    for name, rows in new.items():
        source = (renamed or {}).get(name, name)
        size = SIZES[source]
        grid = np.ptp(old[source], axis=1, keepdims=True) / 100 + 1e-6
        assert (np.abs(rows[:size] - old[source]) <= grid).all()


@pytest.mark.slow
def test_a_state_that_grew_at_its_end_trains_on_as_if_it_had_not():
    before = trained()
    after = restacking.restack(before, spec_of({"a": 200, "b": 400}), TX)
    more = batches(5, seed=1)
    old = training.train(before, *more, TX).state
    new = training.train(after, *more, TX).state
    assert_kept(old, new)
    np.testing.assert_array_equal(new.cache.priority, old.cache.priority)
    # New rows are trained like any others.
    ids = np.full((1, 40), 450, np.int32)
    moved = training.train(new, ids, more[1][:1], TX)
    assert (np.asarray(training.read(moved.state, ids[0])) != np.asarray(moved.rows[0][0])).any()


@pytest.mark.slow
def test_a_state_over_a_mesh_grows_as_on_one_device():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cache = CacheSpec(num_rows=128, ways=4)
    before, sizes = trained(spec_of(SIZES, cache)), {"a": 250, "b": 301, "c": 7}
    expected = restacking.restack(before, spec_of(sizes, cache), TX)
    four = sharding.relayout(before, mesh=mesh)
    after = restacking.restack(four, spec_of(sizes, cache), TX)
    assert after.layout.shards == 4
    assert_same = training.assert_same
    assert_same(sharding.relayout(after), jax.device_put(expected))


@pytest.mark.slow
def test_a_table_in_host_memory_grows_as_on_the_device():
    sizes = {"a": 250, "b": 300}
    hosted, plain = (
        restacking.restack(
            trained(spec_of(SIZES, memory_kind=kind)), spec_of(sizes, memory_kind=kind), TX
        )
        for kind in ("pinned_host", None)
    )
    assert hosted.table.rows.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(training.all_rows(hosted), training.all_rows(plain))


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(
                lambda s: restacking.restack(s, ngrams(rows=300), TX),
                r"the hash {'boundary'.* instead of None",
            ),
            Refused(
                lambda s: restacking.restack(s, spec_of({"a": 199, "b": 300}), TX),
                "table 'a' would lose rows: 'a' has 200 rows, the new table has 199",
            ),
            Refused(
                lambda s: restacking.restack(s, spec_of(SIZES), TX, renamed={"a": "z"}),
                "must map a table of",
                KeyError,
            ),
            Refused(
                lambda s: restacking.restack(
                    s, spec_of({"a": 300, "b": 300}), TX, renamed={"a": "b"}
                ),
                "two tables of .* would take the rows of one",
            ),
            Refused(
                lambda s: restacking.restack(s, spec_of({"a": 200, "bought": 300}), TX),
                r"must be in the new spec .* \['b'\] break this rule",
            ),
            Refused(
                lambda s: restacking.restack(s, spec_of({"a": 200}), TX, removed=["c"]),
                r"removed=\['c'\] names unknown tables",
                KeyError,
            ),
            Refused(
                lambda s: restacking.restack(s, spec_of(SIZES, storage="int4"), TX),
                "cannot change storage from .* to",
            ),
            Refused(
                lambda s: restacking.restack(s, spec_of(SIZES), optax.sgd(0.1)), "pass the same tx"
            ),
            Refused(
                lambda s: restacking.restack(
                    jax.jit(mpembed.prefetch)(s, batches(1)[0][0])[0], spec_of(SIZES), TX
                ),
                "between prefetch and apply_gradients",
            ),
        ]
    ),
)
def test_misuse_is_refused(case):
    with pytest.raises(case.error, match=case.message):
        case.call(trained())


def test_what_is_no_state_and_a_donated_state_are_refused():
    spec = spec_of(SIZES)
    with pytest.raises(TypeError, match=r"restack\(state, spec, tx\): state must be"):
        restacking.restack(spec, spec, TX)
    state = trained()
    jax.jit(mpembed.prefetch, donate_argnums=0)(state, np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="this state was donated to an earlier call"):
        restacking.restack(state, spec, TX)


def test_a_memory_of_n_grams_keeps_its_hash_and_the_sizes_of_its_tables():
    state = mpembed.init(jax.random.key(0), ngrams(), TX)
    name = "2-gram_0"
    for other, options, told in (
        (ngrams(rows=90), {}, "of an n-gram memory has 61 rows, the new table '2-gram_0' has 97"),
        (ngrams(seed=1), {}, "cannot give n-grams the hash"),
        (ngrams(boundary=3), {}, "cannot give n-grams the hash"),
        (spec_of(SIZES), {"removed": [name]}, "cannot give n-grams the hash"),
        (ngrams((3,)), {"renamed": {"3-gram_0": name}}, "cannot rename tables of n-grams"),
    ):
        with pytest.raises(ValueError, match=told):
            restacking.restack(state, other, TX, **options)
    more = restacking.restack(state, ngrams((2, 3)), TX)
    np.testing.assert_array_equal(mpembed.to_dense(more)[name], mpembed.to_dense(state)[name])
