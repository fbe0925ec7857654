"""Deduplication and the plan by GPU kernels, interpreted, make what the reference makes.

The order of unique ids is free between hits, newcomers and bypassed ids. So decisions are compared
id by id. Tags, priorities and the sketch are compared bit for bit, after every step.
"""

import dataclasses
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import named
from hypothesis import given, settings
from hypothesis import strategies as st

from mpembed_jax import ops
from mpembed_jax.cache import residency
from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.row_ids import NO_ID

KERNEL, REFERENCE = "pallas_interpret", "xla"
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class Batches(NamedTuple):
    """Batches of `num` ids of `num_ids`, planned in a cache."""

    policy: str
    lines: int
    ways: int
    num_ids: int
    num: int
    budget: int | None = None

    @property
    def geometry(self):
        return CacheSpec(num_rows=self.lines, ways=self.ways).geometry(self.num_ids)

    @property
    def period(self):
        """Steps between two halvings of all estimates."""
        return max(1, 30 * self.geometry.lines // self.num)

    @property
    def size(self):
        return 1 + (self.num if self.budget is None else self.budget)


CASES = {
    "lfu": Batches("lfu", 64, 8, 300, 50),
    "lru": Batches("lru", 64, 8, 300, 50),
    "lfu, 3 ways and a budget": Batches("lfu", 30, 3, 90, 60, 20),
    "lru, 3 ways and a budget": Batches("lru", 30, 3, 90, 60, 20),
    "lfu, one way": Batches("lfu", 16, 1, 100, 40),
    "lru, one overfull set": Batches("lru", 32, 32, 200, 63),
    "lfu, one overfull set": Batches("lfu", 32, 32, 200, 63),
    "lfu, 64 ways": Batches("lfu", 128, 64, 150, 60),
    "lru, sets in 8 groups": Batches("lru", 192, 3, 2000, 60),
    "lfu, a budget of one id": Batches("lfu", 8, 4, 30, 12, 1),
    "lfu, more estimates than halve at once": Batches("lfu", 400_000, 8, 500_000, 30),
    "lfu, longer sets than a kernel plans": Batches("lfu", 4, 4, 150, 80),
    "lru, longer sets than a kernel plans": Batches("lru", 4, 4, 150, 80),
}
FAST = {"lfu, 3 ways and a budget", "lru, one overfull set"}
CORE = {
    "lfu, more estimates than halve at once",
    "lfu, longer sets than a kernel plans",
}


@partial(jax.jit, static_argnames=("case", "implementation"), compiler_options=FAST_COMPILE)
def plans(case, implementation, cache, batches, steps):
    """The caches after each step; the decisions about each id and position; the segments."""
    ids = jnp.arange(case.num_ids + 1, dtype=jnp.int32)

    def plan(cache, batch):
        positions, step = batch
        found = ops.unique(positions, case.size, step, implementation=implementation)
        cache, moves, inverse, hit_requests, evictions = ops.plan(
            cache, found, step, Fraction(case.num), implementation=implementation
        )
        place = jnp.arange(case.size, dtype=jnp.int32)
        kind = sum(
            (place >= first).astype(jnp.int32)
            for first in (moves.num_hits, moves.num_cached, moves.num_ids)
        )

        def by_id(values):
            return jnp.full(ids.shape, -1, jnp.int32).at[moves.ids].set(values, mode="drop")

        decided = {
            "cache": (cache.tags, cache.priority, cache.sketch),
            "ids": [by_id(values) for values in (moves.line, moves.victim_ids, kind)],
            "padding": jnp.where(
                kind == 3, jnp.stack([moves.ids, moves.line, moves.victim_ids]), 0
            ),
            "positions": moves.ids[inverse],
            "counts": [
                moves.num_hits,
                moves.num_cached,
                moves.num_ids,
                hit_requests,
                evictions,
            ],
            "dropped": found.num_dropped,
            "unique": (by_id_of(found.ids, found.counts, ids), found.ids[found.inverse]),
        }
        return cache, (decided, (moves.ids, moves.segments, found.ids, found.segments))

    return jax.lax.scan(plan, cache, (batches, steps))[1]


def by_id_of(unique_ids, counts, ids):
    return jnp.zeros(ids.shape, jnp.int32).at[unique_ids].set(counts, mode="drop")


def warm(case, seed):
    """A cache without lines, whose sketch has small and the largest estimates."""
    cache = residency.init(case.geometry, case.policy, 1)
    if cache.sketch is None:
        return cache
    values = np.random.default_rng(seed).choice([0, 0, 0, 1, 3, 65534, 65535], cache.sketch.shape)
    return dataclasses.replace(cache, sketch=jnp.asarray(values, jnp.uint16))


@pytest.mark.parametrize("case", named(CASES, fast=FAST, core=CORE))
@settings(max_examples=6)
@given(data=st.data())
def test_kernels_plan_as_the_reference_does(case, data):
    """Few and many distinct ids, padding, estimates that saturate or are halved, saturated ages."""
    draw = data.draw
    later = draw(st.sampled_from([2, case.period, 3 * case.period, 2**25 + 7, 2**31 - 5]))
    steps = jnp.asarray([0, 1, *range(later, later + 3)], jnp.int32)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    top = draw(st.sampled_from([2, case.num, case.num_ids]))
    batches = np.minimum(rng.integers(0, top, (5, case.num)), case.num_ids - 1)
    batches = np.where(rng.random((5, 1)) < 0.5, batches, case.num_ids - 1 - batches)
    is_padding = rng.random(batches.shape) < draw(st.sampled_from([0.0, 0.1, 1.0]))
    batches[-1] = draw(
        st.lists(st.integers(0, case.num_ids - 1), min_size=case.num, max_size=case.num)
    )
    batches = np.where(is_padding, NO_ID, batches).astype(np.int32)
    wanted, got = (
        jax.device_get(plans(case, name, warm(case, seed), jnp.asarray(batches), steps))
        for name in (REFERENCE, KERNEL)
    )
    jax.tree.map(np.testing.assert_array_equal, got[0], wanted[0])
    for ids, segments in (got[1][:2], got[1][2:]):
        for t, batch in enumerate(batches):
            order, first, stop = (array[t] for array in segments)
            for x, begin, end in zip(ids[t], first, stop, strict=True):
                of_id = [] if x == NO_ID else np.flatnonzero(batch == x)
                np.testing.assert_array_equal(order[begin:end], of_id)


def test_the_cases_have_hits_newcomers_bypasses_and_halvings():
    """What the property above says nothing about: that the batches bring it about."""
    case = CASES["lfu, 3 ways and a budget"]
    rng = np.random.default_rng(0)
    batches = rng.integers(0, case.num_ids, (5, case.num)).astype(np.int32)
    steps = jnp.asarray([0, 1, case.period, case.period + 1, case.period + 2], jnp.int32)
    decided, _ = jax.device_get(plans(case, KERNEL, warm(case, 0), jnp.asarray(batches), steps))
    hits, cached, num_ids, *_ = (np.sum(count) for count in decided["counts"])
    assert min(hits, cached - hits, num_ids - cached, np.sum(decided["dropped"])) > 5
    before, after = (decided["cache"][2][t].astype(int).sum() for t in (1, 2))
    assert 0.4 * before < after < 0.75 * before
