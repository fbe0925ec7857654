"""The invariants of a state under bad ids, bad gradients and long training.

The inputs are ids from hell, NaN and inf gradients, and a long soak with drift. `check_state` is
written from the definitions, in NumPy, independent of the package. Used by `run` and, in small, by
the tests.
"""

import dataclasses
import gc
import inspect
import tempfile
import warnings
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments.speed import workload
from experiments.speed.step import embedding_step
from mpembed_jax import checkpoint


def _mix(x: np.ndarray) -> np.ndarray:
    """Murmur3's 32-bit finalizer."""
    x = x.astype(np.uint32)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def check_state(state: Any, steps: int | None = None) -> None:
    """Checks tags, sets, counts and that flushing changes nothing one can read.

    Raises:
      AssertionError: saying what does not hold.
    """
    counters = {
        n: int(low) + (int(high) << 32)
        for n, (low, high) in zip(_names(), np.array(state.counters), strict=False)
    }
    assert counters["hits"] + counters["misses"] == counters["unique"], counters
    assert counters["bypasses"] <= counters["misses"], counters
    assert (
        counters["write_backs"]
        <= counters["evictions"]
        <= counters["misses"] - counters["bypasses"]
    ), counters
    assert counters["unique"] <= counters["requests"], counters
    assert not bool(state.pending)
    if steps is not None:
        assert int(state.step) == steps
    if state.cache is None:
        return
    tags, dirty = np.array(state.cache.tags), np.array(state.cache.dirty)
    sets, _ = tags.shape
    groups = state.cache.groups
    held = tags[tags != mpembed.NO_ID]
    assert len(np.unique(held)) == len(held), "an id is in two lines"
    assert ((held >= 0) & (held < state.table.num_rows)).all(), "a tag is no row"
    assert not (dirty & (tags == mpembed.NO_ID)).any(), "an empty line is dirty"
    place = np.where(tags == mpembed.NO_ID, 0, tags)
    own = place % groups + groups * (
        (_mix(place // groups).astype(np.uint64) * np.uint64(sets // groups)) >> np.uint64(32)
    )
    assert ((own == np.arange(sets)[:, None]) | (tags == mpembed.NO_ID)).all(), (
        "a tag is not in its own set"
    )
    probe = np.unique(
        np.concatenate([held[:500], np.linspace(0, state.table.num_rows - 1, 500).astype(np.int32)])
    )
    probe = np.pad(probe, (0, 1000 - len(probe)), constant_values=mpembed.NO_ID).astype(np.int32)
    before, after = _read_and_flushed(state, probe)
    assert np.array_equal(np.array(before), np.array(after), equal_nan=True), (
        "flushing changed what is read"
    )


@jax.jit
def _read_and_flushed(state: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mpembed.read(state, ids), mpembed.read(mpembed.flush(state), ids)


def _names() -> list[str]:
    return [name for name in inspect.signature(mpembed.CacheStats).parameters if name != "steps"]


@partial(jax.jit, static_argnames="tx", donate_argnums=0)
def _train(state: Any, ids: jax.Array, row_grads: jax.Array, tx: Any) -> tuple[Any, Any, jax.Array]:
    """Runs one step whose gradient of position i is row_grads[i].

    Returns the state, the plan and the rows as they were before.
    """
    return embedding_step(state, ids, row_grads, tx=tx)[:3]


# --- ids from hell

_SIZES, _DIM, _WIDTH = (300, 7, 1), 4, 24
_SGD = optax.sgd(0.25)
_AWKWARD = [-(2**63), -(2**31) - 1, -(2**31), -300, -1, 0, 1, 6, 7, 299, 300, 301, 307, 308, 2**30]
_AWKWARD += [2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**62, 2**63 - 1]


@cache
def _hell_spec(policy: str, storage: str) -> mpembed.EmbeddingSpec:
    tables = [mpembed.TableSpec(f"t{i}", size) for i, size in enumerate(_SIZES)]
    return mpembed.EmbeddingSpec(
        tables,
        _DIM,
        storage,
        mpembed.CacheSpec(num_rows=32, ways=4, policy=policy),
        max_unique_ids=12,
    )


def ids_from_hell(examples: int) -> dict[str, Any]:
    """Trains on `examples` batches drawn by hypothesis.

    Every row that was not asked for must keep its bits. Negative, huge and 64-bit ids, all the
    same, all padding, features that do not exist; more unique ids than the budget.
    """
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    seen = {"examples": 0, "out of range": 0, "over the budget": 0, "padding": 0}
    states = {("lfu", "int8"): None, ("lru", "float32"): None}
    one_id = st.one_of(
        st.sampled_from(_AWKWARD), st.integers(-(2**63), 2**63 - 1), st.just(mpembed.NO_ID)
    )
    pool = st.one_of(st.lists(one_id, min_size=1, max_size=8), one_id.map(lambda i: [i]))

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(sorted(states)),
        pool,
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.booleans(),
    )
    def example(which, pool, seed, share, is_raw):
        spec = _hell_spec(*which)
        if states[which] is None:
            states[which] = mpembed.init(jax.random.key(1), spec, _SGD)
        state: Any = states[which]
        rng = np.random.default_rng(seed)
        awkward, usual = (
            rng.choice(np.asarray(pool, np.int64), (_WIDTH, 3)),
            rng.integers(0, _SIZES, (_WIDTH, 3)),
        )
        local = np.where(rng.random((_WIDTH, 3)) < share, awkward, usual)
        if is_raw:  # straight to prefetch: global ids that anything may have mangled to 32 bits
            ids = local.astype(np.int32)
        else:
            ids = spec.global_ids(local)
            assert ids.dtype == np.int32
            starts, sizes = np.cumsum([0, *_SIZES[:-1]]), np.asarray(_SIZES)
            is_real = (local >= 0) & (local < sizes) & (local != mpembed.NO_ID)
            assert (ids[is_real] == (local + starts)[is_real]).all()
            assert (
                (ids[~is_real] >= spec.num_rows) | (ids[~is_real] < 0)
            ).all()  # never a row of another table
            try:
                spec.global_ids({"no such table": local[:, 0]})
            except KeyError as error:
                assert "no such table" in str(error)
            else:
                raise AssertionError("an unknown feature was accepted")
        before = _all_rows(state)
        state, plan, rows = _train(state, jnp.asarray(ids), jnp.ones((*ids.shape, _DIM)), _SGD)
        states[which] = state
        after = _all_rows(state)
        counts = jax.device_get(plan.counts)
        flat = ids.reshape(-1)
        is_row = (flat >= 0) & (flat < spec.num_rows)
        asked = np.unique(flat[is_row])
        assert counts.requests == is_row.sum()
        assert counts.out_of_range == (~is_row & (flat != mpembed.NO_ID)).sum()
        assert counts.unique + counts.dropped == len(asked)
        trained = np.array(plan.unique_ids)
        trained = trained[trained != mpembed.NO_ID]
        assert len(set(trained)) == len(trained) == counts.unique
        assert set(trained) <= set(asked)
        inverse, unique = np.array(plan.inverse).reshape(-1), np.array(plan.unique_ids)
        is_served = inverse < len(unique) - 1
        assert (unique[inverse[is_served]] == flat[is_served]).all()
        assert not np.array(rows)[-1].any()
        changed = np.flatnonzero((before != after).any(axis=1))
        moved = np.array(plan.victim_ids)
        assert set(changed) <= set(trained) | set(moved), "a row changed that nobody asked for"
        if (
            which[1] == "float32"
        ):  # exactly one update per row, of the summed gradient: the values are dyadic
            times = np.asarray([(flat == i).sum() for i in trained])
            assert (
                after[trained]
                == (before[trained] - np.float32(0.25) * times[:, None]).astype(np.float32)
            ).all()
        seen["examples"] += 1
        seen["out of range"] += int(counts.out_of_range)
        seen["over the budget"] += int(counts.dropped)
        seen["padding"] += int((flat == mpembed.NO_ID).sum())

    example()
    for state in states.values():
        if state is not None:
            check_state(state)
    return seen


@jax.jit
def _all_rows_of(state: Any) -> jax.Array:
    return mpembed.read(state, jnp.arange(state.table.num_rows, dtype=jnp.int32))


def _all_rows(state: Any) -> np.ndarray:
    return np.array(_all_rows_of(state))


# --- gradients that are no numbers


def bad_gradients(
    steps: int, storages: tuple[str, ...] = ("int8", "int4", "float32")
) -> dict[str, int]:
    """Trains with NaN and inf among the gradients.

    INT8 must skip and count them; the other formats must keep them within their own rows.
    """
    rng = np.random.default_rng(0)
    result = {"steps": steps, "rows skipped": 0, "rows that became no number": 0}
    tx = mpembed.optim.rowwise_adagrad(0.1)
    for storage in storages:
        skips = storage == "int8"
        spec = mpembed.EmbeddingSpec(
            [mpembed.TableSpec("t", 400)],
            _DIM,
            storage,
            mpembed.CacheSpec(num_rows=64, ways=8),
            skip_nonfinite=skips,
        )
        state = mpembed.init(jax.random.key(2), spec, tx)
        poisoned: set[int] = set()
        bad_rows = 0
        for step in range(steps):
            ids = workload.zipf_ids(rng, 400, (_WIDTH,), 1.05).astype(np.int32)
            grads = rng.normal(size=(_WIDTH, _DIM)).astype(np.float32)
            is_bad = rng.random(_WIDTH) < 0.05
            grads[is_bad, step % _DIM] = [np.nan, np.inf, -np.inf, 3e38][step % 4]
            is_bad = is_bad if step % 4 < 3 else np.zeros_like(is_bad)  # large, and finite
            before = _all_rows(state)
            state, _, _ = _train(state, jnp.asarray(ids), jnp.asarray(grads), tx)
            after = _all_rows(state)
            bad_ids = set(ids[is_bad].tolist())
            summed = np.zeros((400, _DIM), np.float64)
            np.add.at(summed, ids, grads.astype(np.float64))
            bad_ids |= set(np.flatnonzero((np.abs(summed) > 3.4e38).any(axis=1)).tolist())
            bad_rows += len(bad_ids)
            if skips:
                assert np.isfinite(after).all()
                assert (
                    (before[sorted(bad_ids)] == after[sorted(bad_ids)]).all() if bad_ids else True
                )
            else:
                poisoned |= bad_ids
                overflown = np.flatnonzero(~np.isfinite(after).all(axis=1))
                # Squares of 3e38 overflow the accumulator, which freezes its row; nothing else is
                # touched.
                assert set(overflown) <= poisoned, "a bad gradient spread to another row"
        if skips:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # a cache as small as this bypasses much, and stats says so
                assert mpembed.stats(state).nonfinite_rows == bad_rows
            result["rows skipped"] += bad_rows
        else:
            result["rows that became no number"] += int(
                (~np.isfinite(_all_rows(state))).any(axis=1).sum()
            )
        with tempfile.TemporaryDirectory() as folder:  # NaNs keep their bits on disk
            checkpoint.save(folder, 0, state)
            restored = checkpoint.restore(folder, state)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert np.array(a).tobytes() == np.array(b).tobytes()
    return result


# --- soak


def soak(steps: int, check_every: int, others: tuple[str, ...] = ("int4 lru",)) -> dict[str, Any]:
    """Trains `steps` steps with drift.

    Every `check_every` steps, it checks the invariants, saves an increment, and measures memory.
    Beside the int8 run two in float32, with a cache and without: the cache must stay invisible, bit
    for bit. `others` train in int4 under the policy they name.
    """
    num_rows, width, dim = 20_000, 256, 8
    cache = mpembed.CacheSpec(num_rows=1024, ways=16)
    specs = {
        "int8": ("int8", cache),
        "float32": ("float32", cache),
        "float32 without cache": ("float32", None),
        **{name: ("int4", dataclasses.replace(cache, policy=name.split()[1])) for name in others},
    }
    tx = mpembed.optim.rowwise_adagrad(0.05)
    states = {
        name: mpembed.init(
            jax.random.key(3),
            mpembed.EmbeddingSpec([mpembed.TableSpec("t", num_rows)], dim, *options),
            tx,
        )
        for name, options in specs.items()
    }

    @partial(jax.jit, donate_argnums=(0, 1))
    def chunk(states, tracker, ids, targets):
        def step(carry, batch):
            states, tracker = carry
            ids, target = batch
            trained = {}
            for name, state in states.items():
                state, plan = mpembed.prefetch(state, ids)
                if name == "int8":
                    tracker = checkpoint.mark(tracker, plan)
                rows = mpembed.lookup(state, plan)

                def loss(rows, plan=plan):
                    return jnp.sum((mpembed.pool(rows, plan.inverse) - target) ** 2)

                trained[name] = mpembed.apply_gradients(
                    state, plan, rows, jax.grad(loss)(rows), tx=tx
                )
            return (trained, tracker), None

        return jax.lax.scan(step, (states, tracker), (ids, targets))[0]

    rng = np.random.default_rng(4)
    wanted = rng.normal(size=(num_rows, dim)).astype(np.float32)
    memory, arrays, increments = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, 0, states["int8"])
        tracker = checkpoint.track(states["int8"])
        for done in range(check_every, steps + 1, check_every):
            drift = (done - check_every + np.arange(check_every)) // 100 * 311
            ids = workload.zipf_ids(rng, num_rows, (check_every, width), 1.05)
            ids = ((ids + drift[:, None]) % num_rows).astype(np.int32)
            states, tracker = chunk(states, tracker, ids, wanted[ids])
            for state in states.values():
                check_state(state, done)
            with_cache, without = (
                _all_rows(states[name]) for name in ("float32", "float32 without cache")
            )
            assert np.array_equal(with_cache, without), f"the cache shows after {done} steps"
            saving = checkpoint.save(
                folder,
                done,
                states["int8"],
                tracker=tracker if done % (5 * check_every) else None,
                keep=2,
            )
            increments.append(saving.nbytes)
            tracker = checkpoint.track(states["int8"])
            gc.collect()
            memory.append(workload.resident_bytes())
            arrays.append(len(jax.live_arrays()))
        restored = checkpoint.restore(folder, states["int8"])
    for a, b in zip(jax.tree.leaves(states["int8"]), jax.tree.leaves(restored), strict=True):
        assert np.array(a).tobytes() == np.array(b).tobytes()
    del restored
    assert arrays[-1] <= arrays[0], f"live arrays grew from {arrays[0]} to {arrays[-1]}"
    quarter = max(1, len(memory) // 4)
    growth = (
        int(np.median(memory[-quarter:]) - np.median(memory[quarter : 2 * quarter]))
        if len(memory) >= 8
        else 0
    )
    limit = 20 << 20
    assert growth < limit, f"memory grew by {growth / 1e6:.1f} MB: {[m >> 20 for m in memory]}"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a cache of four batches bypasses much, and says so
        evictions = {name: mpembed.stats(state).evictions for name, state in states.items()}
    return {
        "steps": steps, "checks": len(memory), "states": len(states), "evictions": evictions,
        "resident MB at the second check": memory[min(1, len(memory) - 1)] >> 20,
        "at the end": memory[-1] >> 20,
        "growth in bytes, median of the second quarter of checks to that of the last": growth,
        "limit in bytes": limit,
        "live arrays": [arrays[0], arrays[-1]],
        "checkpoint bytes": increments,
    }  # fmt: skip
