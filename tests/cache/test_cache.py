"""Residency equals a brute-force LRU / LFU model, id by id.

Lines, victims, bypasses, priorities, the sketch and counts are compared.
"""

import dataclasses
from fractions import Fraction
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import shapes
import training
from cases import crossed, named
from hypothesis import given, settings
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax import ops
from mpembed_jax.cache import policy, residency
from mpembed_jax.cache.spec import Geometry

SGD = optax.sgd(0.25)
KEY = jax.random.key(0)


locate = jax.jit(residency.locate)


@partial(jax.jit, static_argnames="train")
def record(state, batches, train=True):
    """Runs all batches.

    Returns the last state and, per step, the plan and the cache's bookkeeping after it.
    """

    def step(state, ids):
        state, plan, *_ = training.step(state, ids, SGD) if train else mpembed.prefetch(state, ids)
        return state, (plan, state.cache.tags, state.cache.priority, state.cache.dirty)

    return jax.lax.scan(step, state, batches)


def test_a_policy_without_rules_is_refused():
    """Both files check their rules as they are imported; no policy is LRU for want of a branch."""
    with pytest.raises(NotImplementedError, match=r"\['fifo'\] have no rules in here; .* RULES"):
        policy.check_rules(("lru", "lfu", "fifo"), policy.RULES, "here")
    policy.check_rules(shapes.POLICIES, policy.RULES, "here")


def check(model, state, batches, *, train=True):
    """Runs the package and the model side by side and returns summed counts.

    Asserts that every decision is the same.
    """
    state, recorded = jax.device_get(record(state, jnp.asarray(batches), train=train))
    totals = dict.fromkeys(oracles.COUNTS, 0)
    for t, ids in enumerate(batches):
        plan, tags, priority, dirty = jax.tree.map(lambda x: x[t], recorded)  # noqa: B023
        wanted = model.prefetch(ids)
        if train:
            model.mark_dirty(wanted)
        check_plan(plan, wanted, ids, model.geo.lines, f"batch {t}")
        model_tags, model_priority, model_dirty = model.arrays()
        np.testing.assert_array_equal(tags, model_tags, f"tags after batch {t}")
        np.testing.assert_array_equal(
            np.where(tags == mpembed.NO_ID, 0, priority), model_priority, f"batch {t}"
        )
        np.testing.assert_array_equal(dirty, model_dirty, f"dirty after batch {t}")
        for name in totals:
            totals[name] += wanted.counts[name]
    if model.policy == "lfu" and type(model) is oracles.DictCache:
        sketch = np.zeros(state.cache.sketch.shape, np.uint16)
        for cell, count in model.sketch.items():
            sketch[cell] = count
        np.testing.assert_array_equal(state.cache.sketch, sketch)
    found = np.asarray(locate(state.cache, np.arange(-1, model.num_ids, dtype=np.int32)))
    lines = {
        i: s * model.geo.ways + w
        for s, ways in enumerate(model_tags.tolist())
        for w, i in enumerate(ways)
    }
    lines.pop(mpembed.NO_ID, None)
    assert {
        i - 1: line for i, line in enumerate(found.tolist()) if line != model.geo.lines
    } == lines
    return totals


def check_plan(plan, wanted, ids, num_lines, what):
    unique, inverse = plan.unique_ids, np.asarray(plan.inverse)
    real = unique != mpembed.NO_ID
    assert not real[-1]
    assert real.sum() == len(wanted.line), what
    line = dict(zip(unique[real].tolist(), plan.line[real].tolist(), strict=True))
    assert line == wanted.line, what
    assert set(unique[plan.is_hit].tolist()) == wanted.hits, what
    victims = {
        int(i): int(v) for i, v in zip(unique, plan.victim_ids, strict=True) if v != mpembed.NO_ID
    }
    assert victims == {i: v.row_id for i, v in wanted.victims.items()}, what
    assert (plan.line[~real] == num_lines).all()
    assert not plan.is_hit[~real].any()
    is_kept = np.isin(ids, list(wanted.line))
    np.testing.assert_array_equal(unique[inverse[is_kept]], ids[is_kept])
    np.testing.assert_array_equal(inverse[~is_kept], len(unique) - 1)
    counts = {name: int(getattr(plan.counts, name)) for name in wanted.counts}
    assert counts == wanted.counts, what


@cache
def initial(spec, implementation=None):
    """Chunked loops run many turns, the last one partial, on batches that the models can follow."""
    by = ops.IMPLEMENTATIONS[ops.choose(implementation)]
    by = by if by.chunk is None else dataclasses.replace(by, chunk=16)
    return mpembed.init(KEY, spec, SGD, implementation=by)


def start(num_ids, lines, ways, policy, implementation=None, **options):
    """(initial state, model) of one cache."""
    spec = shapes.stack(num_ids, 1, lines=lines, ways=ways, policy=policy, **options)
    geo = oracles.geometry(num_ids, num_rows=lines, ways=ways)
    return initial(spec, implementation), oracles.DictCache(num_ids, geo, policy, **options)


@crossed(
    ways=named([*shapes.WAYS, 64], fast={"1", "32"}),
    policy=shapes.POLICIES,
    core=(),
)
def test_residency_equals_brute_force(policy, ways):
    """320 skewed, drifting batches of 0 to 160 ids into 96 lines.

    Batches larger than the cache are among them.
    """
    state, model = start(700, 96, ways, policy)
    totals = check(model, state, shapes.skewed_ids(ways, 320, 160, 700, drift=60, ragged=True))
    for name in ("hits", "misses", "evictions", "write_backs", "bypasses"):
        assert totals[name] > 20, (name, totals)
    if policy == "lfu":
        assert model.halvings > 10


@pytest.mark.slow
@pytest.mark.parametrize("policy", named(shapes.POLICIES, fast={"lfu"}, core=()))
def test_residency_in_full_width_passes(policy):
    """The implementation that loops over no chunks, an accelerator's default.

    All other tests here use chunks of 16.
    """
    state, model = start(700, 96, 4, policy, "xla")
    check(model, state, shapes.skewed_ids(11, 60, 160, 700, drift=10, ragged=True))


class End(NamedTuple):
    """A geometry of shapes.GEOMETRIES, and a policy."""

    geometry: str
    policy: str


ENDS = [End("one-line", "lru"), End("one-line", "lfu"), End("larger-than-table", "lfu")]
ENDS += [End("groups", "lru"), End("groups", "lfu")]


@pytest.mark.parametrize(
    "end", named(ENDS, fast={"one-line-lru", "groups-lfu"}, core={"larger-than-table-lfu"})
)
def test_residency_at_the_geometries_ends(end):
    """One line; more lines than rows; 512 sets in 64 groups of id mod 64."""
    geometry, policy = end
    num_ids, lines, ways = shapes.GEOMETRIES[geometry]
    state, model = start(num_ids, lines, ways, policy)
    check(
        model,
        state,
        shapes.skewed_ids(
            3, 60, 400 if geometry == "groups" else 30, num_ids, exponent=0.8, ragged=True
        ),
    )


ID_LISTS = st.lists(
    st.lists(
        st.integers(0, 30) | st.sampled_from([-1, 31, -(2**31), 2**31 - 2, mpembed.NO_ID]),
        min_size=0,
        max_size=12,
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize(("policy", "budget"), [("lru", None), ("lru", 5), ("lfu", 5)])
@settings(max_examples=60)
@given(lists=ID_LISTS)
def test_residency_of_any_stream(policy, budget, lists):
    """Any ids, in and out of range, under any repetition.

    With a budget, the five smallest by fmix32(id xor step).
    """
    batches = np.full((12, 12), mpembed.NO_ID, np.int32)
    for row, ids in zip(batches, lists, strict=False):
        row[: len(ids)] = ids
    state, model = start(31, 8, 2, policy, max_unique_ids=budget)
    check(model, state, batches)


def test_prefetch_alone_leaves_lines_clean():
    state, model = start(200, 24, 4, "lru")
    totals = check(model, state, shapes.skewed_ids(0, 40, 30, 200), train=False)
    assert totals["evictions"] > 100
    assert totals["write_backs"] == 0


def test_lru_ages_saturate_and_then_ties_go_to_the_lowest_way():
    """Stamps older than 2^25 - 1 steps are all alike.

    The model says so too, and plain LRU would choose otherwise.
    """
    state, model = start(200, 24, 8, "lru")
    batches = shapes.skewed_ids(1, 90, 20, 200)
    check(model, state, batches[:45])
    state, _ = record(state, jnp.asarray(batches[:45]))
    for step in (2**25 - 1, 2**25 + 10, 2**30):
        model.step = step
        jumped = training.with_history(state, step=np.int32(step))
        check(copy_of(model), jumped, batches[45:])


def copy_of(model):
    twin = oracles.DictCache(model.num_ids, model.geo, model.policy, step=model.step)
    twin.sets = [[line and dataclasses.replace(line) for line in ways] for ways in model.sets]
    twin.sketch = dict(model.sketch)
    return twin


def test_lfu_estimates_saturate():
    """One id in almost all of 8,192 positions.

    65,535 is reached in nine steps, the halving comes after eleven.
    """
    state, model = start(20000, 3072, 32, "lfu")
    batches = np.full((14, 8192), 7, np.int32)
    batches[:, :200] = shapes.skewed_ids(0, 14, 200, 20000)
    twin = copy_of(model)
    for ids in batches[:10]:
        twin.prefetch(ids)
    assert twin.line_of(7).priority == 65535
    check(model, state, batches)
    assert model.halvings == 1


@pytest.mark.parametrize("step", [1, 2**31 - 1])
def test_a_period_longer_than_32_bits_never_halves(step):
    """2**29 lines and one position a step: 30 C / N is 16 times 2**30."""
    huge = jax.eval_shape(lambda: residency.init(Geometry(2**24, 32, 64), "lfu", 4))
    assert not policy.is_time_to_halve(huge, jnp.int32(step), Fraction(1))
    few = residency.init(Geometry(8, 4, 8), "lfu", 4)
    assert policy.is_time_to_halve(few, jnp.int32(960), Fraction(1))


def test_lfu_without_collisions_equals_exact_counts():
    """Ids that own a cell of the sketch each: true counts, halved alike, decide the same.

    Collisions would differ.
    """
    geo = oracles.geometry(5000, num_rows=64, ways=4)
    owners, ids = {}, []
    for i in range(
        5000
    ):  # an id is taken if it owns a cell that nobody uses, and disturbs no owner of one
        cells = geo.columns(i)
        free = [cell for cell in cells if cell not in owners]
        if free and not any(owners.get(cell) for cell in cells) and geo.set_of(i) < 4:
            owners.update(dict.fromkeys(cells, False))
            owners[free[0]] = True
            ids.append(i)
    assert len(ids) > 16 + 4  # more than the four sets hold
    state, _ = start(5000, 64, 4, "lfu")
    rng = np.random.default_rng(0)
    chosen = np.asarray(ids, np.int32)[
        shapes.skewed_ids(0, 300, 24, len(ids), exponent=0.7, drift=40)
    ]
    batches = np.where(rng.random(chosen.shape) < 0.2, mpembed.NO_ID, chosen).astype(np.int32)
    totals = check(oracles.ExactLfuCache(5000, geo, "lfu"), state, batches)
    assert totals["evictions"] > 20
    assert totals["bypasses"] > 20


@pytest.mark.slow
@settings(max_examples=30)
@given(
    num_ids=st.integers(1, 200_000),
    fraction=st.sampled_from([0.0001, 0.01, 0.05, 0.29, 1.0]),
    num_rows=st.none() | st.integers(1, 20_000),
    ways=st.sampled_from([1, 2, 3, 8, 32, 64]),
    policy=st.sampled_from(shapes.POLICIES),
)
def test_geometry(num_ids, fraction, num_rows, ways, policy):
    """Sets, ways, lines and the sketch's size, from the spec alone."""
    asked = mpembed.CacheSpec(fraction=fraction, num_rows=num_rows, ways=ways, policy=policy)
    spec = mpembed.EmbeddingSpec((mpembed.TableSpec("a", num_ids),), 3, storage="int8", cache=asked)
    state = jax.eval_shape(lambda: mpembed.init(KEY, spec, SGD))
    geo = oracles.geometry(num_ids, fraction=fraction, num_rows=num_rows, ways=ways)
    assert state.cache.tags.shape == (geo.num_sets, geo.ways)
    assert state.cache.rows.shape == (geo.lines, 3)
    if policy == "lfu":
        assert state.cache.sketch.shape == (2, geo.groups, 2 * geo.lines // geo.groups)
        assert state.cache.sketch.dtype == jnp.uint16
    else:
        assert not jax.tree.leaves(state.cache.sketch) or state.cache.sketch.size == 0
