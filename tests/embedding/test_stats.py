"""What stats reports: counts that outlive 32 bits, and rates.

There is one warning per setting to change. Errors name the fix.
"""

import dataclasses
import warnings
from functools import partial

import jax
import numpy as np
import optax
import pytest
import training

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, TableSpec
from mpembed_jax.embedding.counters import COUNTERS

TX = optax.sgd(0.5)


def run(state, ids):
    return training.step(state, ids, TX)[:2]


donating = jax.jit(run, donate_argnums=0)


def stack(num_rows=100, *, cache=None, name="t", **options):
    return EmbeddingSpec(TableSpec(name, num_rows), 4, storage="int8", cache=cache, **options)


def start(spec, seed=0):
    return mpembed.init(jax.random.key(seed), spec, TX)


def test_a_new_state_has_counted_nothing():
    for cache in (None, CacheSpec(num_rows=8)):
        stats = mpembed.stats(start(stack(cache=cache)))
        *counts, vocabulary = stats
        assert counts == [0] * len(counts) and vocabulary is None
        assert stats.hit_rate == stats.unique_hit_rate == 0.0
        assert all(type(value) is int for value in counts)


def test_counts_and_rates_of_two_known_batches():
    """Four requests, one padding and three ids out of range, twice.

    The first all misses, the second all hits.
    """
    ids = np.array([[7, 7, 3, 5], [NO_ID, 100, -1, NO_ID - 1]], np.int32)
    state = start(stack(cache=CacheSpec(num_rows=100, ways=32), name="two batches"))
    totals = dict.fromkeys(COUNTERS, 0)
    for _ in range(2):
        state, plan = donating(state, ids)
        for name in totals.keys() & {f.name for f in dataclasses.fields(plan.counts)}:
            totals[name] += int(getattr(plan.counts, name))
    stats = mpembed.stats(state)
    expected = dict(
        steps=2, requests=8, unique=6, hits=3, hit_requests=4, misses=3, out_of_range=6, dropped=0
    )
    assert {name: getattr(stats, name) for name in expected} == expected
    assert stats._asdict() == {"steps": 2, **totals, "vocabulary": None}
    assert stats.hit_rate == 0.5
    assert stats.unique_hit_rate == 0.5


def test_counters_carry_into_their_high_word():
    """Near 2**32 and near 2**33, without x64 mode."""
    state = start(stack(name="carry"))
    counters = np.zeros((len(COUNTERS), 2), np.uint32)
    counters[COUNTERS.index("requests")] = [2**32 - 3, 0]
    counters[COUNTERS.index("unique")] = [2**32 - 2, 1]
    counters[COUNTERS.index("misses")] = [2**32 - 1, 2**32 - 2]
    state = training.with_history(state, counters=counters)
    state, _ = donating(state, np.array([1, 1, 2, 3], np.int32))
    stats = mpembed.stats(state)
    assert stats.requests == 2**32 + 1
    assert stats.unique == 2**33 + 1
    assert stats.misses == 2**64 - 2**32 - 1 + 3 - 2**32 + 2**32
    assert stats.hits == stats.evictions == 0


def test_stats_cannot_be_traced_and_says_what_to_log_instead():
    with pytest.raises(TypeError, match=r"cannot be traced.*plan\.counts"):
        jax.jit(mpembed.stats)(start(stack()))


def test_counts_are_device_scalars_that_log_inside_jit_and_scan():
    @jax.jit
    def many(state, batches):
        def body(state, ids):
            state, plan = run(state, ids)
            return state, plan.counts.requests

        return jax.lax.scan(body, state, batches)

    batches = np.array([[1, 2], [1, NO_ID], [NO_ID, NO_ID]], np.int32)
    state, requests = many(start(stack(name="scan")), batches)
    np.testing.assert_array_equal(requests, [2, 1, 0])
    assert mpembed.stats(state).requests == 3
    assert mpembed.stats(state).steps == 3


# --- warnings


def messages(function):
    """What stats warns of in `function` under Python's default filter.

    That filter shows a warning once per place and text.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        function()
    return [str(w.message) for w in caught]


def with_counts(state, **counts):
    counters = np.zeros((len(COUNTERS), 2), np.uint32)
    for name, value in counts.items():
        counters[COUNTERS.index(name), 0] = value
    return training.with_history(state, counters=counters)


def test_more_than_a_fifth_of_bypasses_names_the_cache_setting():
    state = start(stack(cache=CacheSpec(num_rows=8), name="bypasses"))
    few = with_counts(state, unique=10_000, misses=10_000, bypasses=2_000)
    many = with_counts(state, unique=10_000, misses=10_000, bypasses=2_001)
    assert messages(lambda: mpembed.stats(few)) == []
    (message,) = messages(lambda: mpembed.stats(many))
    assert "20% of the unique ids" in message
    assert "int8" in message
    assert "8 lines" in message
    assert "raise CacheSpec(fraction=..) or num_rows" in message


def test_without_a_cache_bypasses_are_no_reason_to_warn():
    state = with_counts(
        start(stack(name="no cache")), unique=10_000, misses=10_000, bypasses=10_000
    )
    assert messages(lambda: mpembed.stats(state)) == []


def test_dropped_ids_name_the_budget():
    state = start(stack(max_unique_ids=2, name="dropped"))
    state, _ = donating(state, np.array([1, 2, 3], np.int32))
    (message,) = messages(lambda: mpembed.stats(state))
    assert "1 unique ids exceeded max_unique_ids=2" in message
    assert "raise max_unique_ids in the EmbeddingSpec" in message


@pytest.mark.parametrize("kind", ["bypasses", "dropped"])
def test_a_loop_that_asks_every_step_is_warned_once(kind):
    """The counts in the message move from step to step.

    The warning must not come back with each of them.
    """
    cache = CacheSpec(num_rows=8) if kind == "bypasses" else None
    state = start(stack(cache=cache, max_unique_ids=1, name=f"loop {kind}"))

    def loop():
        for step in range(1, 6):
            mpembed.stats(
                with_counts(
                    state,
                    unique=2_000 * step,
                    bypasses=1_500 * step,
                    dropped=step * (kind == "dropped"),
                )
            )

    assert len(messages(loop)) == 1


def test_two_runs_of_one_seed_are_not_taken_for_a_missing_donation():
    """A baseline beside the main run, a restored checkpoint.

    Same spec, same key, another buffer, both donating.
    """
    spec = stack(50_000, name="moving")

    def both():
        first, second = start(spec), start(spec)
        first, _ = donating(first, np.array([1, 2], np.int32))
        mpembed.stats(first)
        for _ in range(2):
            second, _ = donating(second, np.array([1, 2], np.int32))
        mpembed.stats(second)

    assert messages(both) == []


# --- errors


def test_raise_mode_raises_from_stats_after_traced_ids_were_out_of_range():
    spec = stack(out_of_range="raise", name="raising")

    @partial(jax.jit, donate_argnums=0)
    def step(state, local_ids):
        return run(state, spec.global_ids({"raising": local_ids})["raising"])[0]

    state = step(start(spec), np.array([1, 99, NO_ID], np.int32))
    assert mpembed.stats(state).out_of_range == 0
    state = step(state, np.array([1, 100, -1], np.int32))
    with pytest.raises(
        ValueError, match=r"2 ids were outside their tables .*spec\.global_ids.*out_of_range="
    ):
        mpembed.stats(state)
