"""Admission by GPU kernels, interpreted, makes the bits of the reference."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import named
from hypothesis import given, settings
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax import ops
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes, pool

KERNEL, REFERENCE = "pallas_interpret", "xla"
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class Batches(NamedTuple):
    """Batches of `num` raw ids that compete for a pool of rows."""

    spec: mpembed.VocabularySpec
    num: int
    num_ids: int
    has_occurrences: bool = False
    starts_all: bool = False  # first owners' rows, too


def batches(num_rows, num, num_ids, has_occurrences=False, starts_all=False, **pool):
    spec = mpembed.VocabularySpec(num_rows, **pool)
    return Batches(spec, num, num_ids, has_occurrences, starts_all)


CASES = {
    "one set": batches(32, 40, 60, ways=32),
    "one row": batches(1, 20, 5, ways=1),
    "every id, 4 ways": batches(64, 40, 200, ways=4, admit_after=1, starts_all=True),
    "3 ways, no recycling": batches(30, 50, 90, ways=3, recycle=False),
    "groups, shared rows and occurrences": batches(
        600, 60, 300, True, starts_all=True, ways=2, shared_rows=3
    ),
    "counters of a byte": batches(32, 50, 60, ways=8, admit_after=40),
    "counters of two bits": batches(24, 40, 40, ways=3, recycle=False, admit_after=4),
    "resized": batches(56, 50, 90, starts_all=True, ways=4, first_sets=5),
    "doubled": batches(1024, 60, 900, ways=2, first_sets=128),
    "occurrences": batches(64, 40, 60, True, ways=8),
    "longer sets than a kernel decides": batches(8, 150, 60, ways=4, starts_all=True),
}
CORE = {
    "one set",
    "counters of two bits",
    "groups, shared rows and occurrences",
    "resized",
    "longer sets than a kernel decides",
}


def warm(spec, seed):
    """A vocabulary some of whose rows have other owners, with small uses and any counters."""
    vocabulary = pool.init(spec, None)
    rng = np.random.default_rng(seed)
    sketch = rng.integers(0, 256, vocabulary.sketch.shape) * (rng.random() < 0.5)
    tags = rng.integers(0, pool.NO_OWNER, vocabulary.owners.shape, dtype=np.uint32)
    owners = tags << pool.USE_BITS | rng.integers(0, 9, tags.shape, dtype=np.uint32)
    owners = np.where(rng.random(tags.shape) < rng.random(), owners, np.uint32(pool.EMPTY))
    return dataclasses.replace(
        vocabulary, owners=jnp.asarray(owners), sketch=jnp.asarray(sketch, jnp.uint8)
    )


@partial(jax.jit, static_argnames=("case", "implementation"), compiler_options=FAST_COMPILE)
def admissions(case, implementation, vocabulary, pairs, steps, halves, occurrences):
    """The vocabularies after each step, and what was decided."""
    spec = case.spec
    rules = ops.Admission(spec.admit_after, spec.recycle, spec.shared_rows, case.starts_all)

    def admit(vocabulary, batch):
        vocabulary, made = ops.admit(
            vocabulary, *batch[:3], rules, *batch[3:], cache=None, implementation=implementation
        )
        # The reference lists rows in another order.
        order = jnp.argsort(made.started)
        tables = None if made.tables is None else made.tables[order]
        made = made._replace(started=made.started[order], tables=tables)
        return vocabulary, (vocabulary.owners, vocabulary.sketch, made)

    given = (pairs, steps, halves, *([occurrences] if case.has_occurrences else []))
    return jax.lax.scan(admit, vocabulary, given)[1]


def drawn(case, seed, top, padding):
    """Pairs [6, num, 2] of ids below `top`, and their occurrences; places and tags may collide."""
    rng = np.random.default_rng(seed)
    all_pairs = rng.integers(0, 2**32 - 2, (case.num_ids, 2), dtype=np.uint32)
    all_pairs[::3, 1] = all_pairs[0, 1]  # ids of one set
    all_pairs[1::4, 0] = all_pairs[1, 0]  # tags of several sets
    ranks = np.minimum(rng.zipf(1.5, (6, case.num)), rng.integers(1, top + 1, (6, case.num)))
    drawn = all_pairs[ranks - 1]
    drawn[rng.random(drawn.shape[:2]) < padding] = hashes.PADDING
    times = rng.integers(1, 9, (6, case.num)) ** rng.integers(1, 7, (6, 1))
    return jnp.asarray(drawn), jnp.asarray(times, jnp.int32)


@pytest.mark.parametrize("case", named(CASES, core=CORE))
@settings(max_examples=10)
@given(data=st.data())
def test_kernels_admit_as_the_reference_does(case, data):
    """Few and many ids, sets that overflow, padding, halvings in some steps."""
    draw = data.draw
    seed = draw(st.integers(0, 2**32 - 1))
    top = draw(st.sampled_from([2, case.num_ids // 3 + 1, case.num_ids]))
    pairs, times = drawn(case, seed, top, draw(st.sampled_from([0.0, 0.2, 1.0])))
    halves = jnp.asarray(draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    steps = jnp.arange(6, dtype=jnp.uint32) + jnp.uint32(draw(st.integers(0, 2**32 - 7)))
    wanted, got = (
        jax.device_get(admissions(case, name, warm(case.spec, seed), pairs, steps, halves, times))
        for name in (REFERENCE, KERNEL)
    )
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.slow
def test_the_cases_admit_recycle_refuse_share_and_halve():
    """What the property above says nothing about: that the batches bring it about."""
    case, uses = CASES["every id, 4 ways"], []
    pairs, times = drawn(case, 0, case.num_ids, 0.1)
    steps = jnp.arange(6, dtype=jnp.uint32)
    for halves in (False, True):
        first = warm(case.spec, 0)
        given = (first, pairs, steps, jnp.full(6, halves), times)
        owners, _, made = jax.device_get(admissions(case, KERNEL, *given))
        counts = [made.num_admitted, made.num_recycled, made.num_refused, made.num_shared]
        assert min(np.sum(count) for count in counts) > 2
        num_started = made.num_admitted if case.starts_all else made.num_recycled
        assert (made.started != NO_ID).sum() == np.sum(num_started) == np.sum(made.num_started)
        uses.append(int(pool.use_of(jnp.asarray(owners[-1])).sum()))
    assert uses[1] < 0.7 * uses[0]
