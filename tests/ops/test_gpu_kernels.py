"""The GPU kernels, interpreted, make the same bits as the reference.

For every format, at odd dims and edges of a plan. Interpreting shows values. test_gpu_lowering and
test_gpu_compile show that they compile for a GPU, experiments/gpu/bench_gpu.py that they run fast.
"""

import dataclasses
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
from mpembed_jax import ops, optim
from mpembed_jax.cache import residency
from mpembed_jax.embedding.counters import COUNTERS
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.numerics.packing import encode
from mpembed_jax.ops import Draw, Moves, Positions, Store
from mpembed_jax.ops.gpu import kernel
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable

V, LINES, WIDTH = 200, 64, 70
KEY = jnp.asarray([3, 4], jnp.uint32)
STEP = jnp.int32(5)
DRAW = Draw(KEY, STEP)
KERNEL, REFERENCE = "pallas_interpret", "xla"


class Rows(NamedTuple):
    """Rows of a dim in a format."""

    format: RowFormat
    dim: int

    @property
    def name(self):
        scale = f"-{self.format.scale_dtype}" if self.format.scale_dtype else ""
        return f"{self.format.name}{scale}-{self.dim}"


DIMS = (1, 7, 16, 64, 100, 128)
# Every format at half of the dims, and every dim in half of the formats.
EVERY = [
    Rows(RowFormat(name), dim) for i, name in enumerate(shapes.FORMATS) for dim in DIMS[i % 2 :: 2]
]
# Every format and every dim once.
SOME = [Rows(RowFormat(name), DIMS[i % len(DIMS)]) for i, name in enumerate(shapes.FORMATS)]
# Other kinds of scale, symmetric or not, nearest rounding.
OPTIONS = [
    Rows(RowFormat("float8_e4m3fn", scale_dtype="float32"), 64),
    Rows(RowFormat("float8_e5m2", scale_dtype="float16"), 16),
    Rows(RowFormat("int8", scale_dtype="float32"), 7),
    Rows(RowFormat("int8", rounding="nearest"), 128),
    Rows(RowFormat("int4", scale_dtype="float16"), 100),
    Rows(RowFormat("int2", symmetric=True, scale_dtype="float32"), 7),
]
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # programs that run once


def same(one, other):
    """Equal bit for bit: NaN equals NaN of the same bits, -0 is not 0."""
    one, other = jax.device_get((one, other))

    def as_bytes(array):
        return np.ascontiguousarray(array).view(np.uint8)

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bytes(a), as_bytes(b)), one, other)


def stage(fmt, dim, seed=0):
    """A table and cache with awkward rows, and a plan.

    11 hits, then newcomers, then bypassed rows, padding.
    """
    rng = np.random.default_rng(seed)
    fmt = fmt.resolve(dim)
    with np.errstate(over="ignore"):
        dense, lines = shapes.rows(seed, V, dim), shapes.rows(seed + 1, LINES, dim)
    lines[9, 0], lines[10, -1], lines[11, 0] = np.nan, np.inf, -0.0
    table = QuantizedTable(encode(jnp.asarray(dense), fmt), fmt, dim)
    permuted = rng.permutation(V).astype(np.int32)
    victims = np.where(rng.random(WIDTH) < 0.2, NO_ID, permuted[WIDTH : 2 * WIDTH]).astype(np.int32)
    line = np.full(WIDTH, LINES, np.int32)
    line[:57] = rng.permutation(LINES)[:57]
    ids = permuted[:WIDTH].copy()
    ids[66:] = NO_ID
    dirty = rng.random(LINES) < 0.7
    return (
        table,
        jnp.asarray(lines),
        jnp.asarray(dirty),
        jnp.asarray(ids),
        jnp.asarray(line),
        jnp.asarray(victims),
    )


def uncached(ids, line, num_ids):
    """The moves of a step without a cache."""
    return Moves(
        ids, line, jnp.full_like(ids, NO_ID), jnp.int32(0), jnp.int32(0), jnp.int32(num_ids)
    )


@partial(jax.jit, static_argnames="implementation", compiler_options=FAST_COMPILE)
def move(implementation, table, lines, dirty, ids, line, victims, bounds):
    """Swap, then lookup, then a write of other rows: all row movements of a step.

    And swap and lookup in one.
    """
    moves = Moves(ids, line, victims, *bounds)
    given = Store(table, lines, dirty), moves, DRAW
    brought = ops.bring(*given, implementation=implementation)
    store, num_written = ops.swap(*given, implementation=implementation)
    rows = ops.lookup(store, moves, implementation=implementation)
    new_rows = jnp.where(ids[:, None] % 3 == 0, rows, rows[::-1] * jnp.float32(1.5))
    stored = ops.write(store, moves, rows, new_rows, DRAW, implementation=implementation)
    return store, num_written, rows, stored, brought


@pytest.mark.parametrize(
    "case",
    named(
        OPTIONS,
        core={"int4-float16-100", "float8_e5m2-float16-16", "int2-float32-7"},
    ),
)
def test_swap_lookup_and_write_make_the_same_bits(case):
    """Also with NaN, infinities and constant rows among the victims, padding, empty lines and clean
    victims.
    """
    staged = stage(*case)
    bounds = jnp.asarray([11, 57, 66], jnp.int32)
    wanted, got = (move(implementation, *staged, bounds) for implementation in (REFERENCE, KERNEL))
    same(got, wanted)
    assert int(wanted[1]) > 20
    same(got[-1], got[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds",
    named({
        "bypassed rows alone": (0, 0, 66),
        "hits alone": (60, 60, 60),
        "newcomers alone": (0, 57, 57),
        "nothing": (0, 0, 0),
    }),
)  # fmt: skip
def test_rows_are_brought_by_one_kernel_whatever_kinds_a_batch_has(bounds):
    """Rows of an invalid plan are NaN."""
    table, lines, dirty, ids, line, victims = stage(RowFormat("int8"), 16)
    line = jnp.where(jnp.arange(WIDTH) < bounds[1], jnp.arange(WIDTH, dtype=jnp.int32), LINES)
    moves = Moves(ids, line, victims, *(jnp.int32(bound) for bound in bounds))
    given = Store(table, lines, dirty), moves, DRAW
    for is_valid in (True, False):
        wanted, got = (
            ops.bring(*given, jnp.bool_(is_valid), implementation=name)
            for name in (REFERENCE, KERNEL)
        )
        same(got, wanted)
        assert np.isnan(got[2]).all() != is_valid


def resident(lines):
    """A cache of 8 ways that holds every third id while there is room in its set."""
    geometry = mpembed.CacheSpec(num_rows=LINES, ways=8).geometry(V)
    tags = np.full((geometry.sets, 8), NO_ID, np.int32)
    sets = np.asarray(residency.set_of(jnp.arange(V, dtype=jnp.int32), geometry))
    for x in range(0, V, 3):
        free = np.flatnonzero(tags[sets[x]] == NO_ID)
        if free.size:
            tags[sets[x], free[-1]] = x
    return dataclasses.replace(
        residency.init(geometry, "lru", lines.shape[1]), tags=jnp.asarray(tags), rows=lines
    )


def spread(rng, row_grads, num):
    """Gradients and positions whose sums are row_grads.

    Each row has an odd number of them, of which all but one cancel in pairs.
    """
    index, grads = [], []
    for row, wanted in enumerate(row_grads[:num]):
        pairs = (
            50 if row in (2, 60) else rng.integers(0, 3)
        )  # two rows are long, a cached and a bypassed one
        noise = rng.choice(np.float32([-0.5, 0.25, 2]), (pairs, wanted.size))
        grads += [wanted, *noise, *-noise]
        index += [row] * (2 * pairs + 1)
    order = rng.permutation(len(index) + 7)  # some padding
    index, grads = (
        np.int32(index + [WIDTH - 1] * 7),
        np.stack([*grads, *np.full((7, row_grads.shape[1]), np.nan)]),
    )
    return index[order], grads[order].astype(np.float32)


@pytest.mark.parametrize("case", named(EVERY, core={"bfloat16-7", "int8-128"}))
def test_every_kernel_makes_the_same_bits_in_every_format_at_every_dim(case):
    """Read through the tags, swap, lookup, both in one, and two updates.

    One update is from row gradients +-2^-k, the other from gradients of positions that sum to them.
    One is by SGD, the other by row-wise Adagrad from zero sums, at every second dim the other way
    round. The mean of squares is 4^-k and its root 2^-k, exactly. Adagrad's step is +-lr and rounds
    once, in the sum. The sums are known in advance. The whole command has kernels of the other
    formats in the test above and in test_without_a_cache, and lowers some of them for CUDA.
    """
    table, lines, dirty, ids, line, victims = stage(*case)
    rng, dim = np.random.default_rng(4), case.dim
    signs = rng.choice(np.float32([-1, 1]), (WIDTH, dim))
    magnitude = np.exp2(rng.integers(-6, 1, (WIDTH, 1))).astype(np.float32)
    queries = jnp.asarray([*range(-2, V + 2), -(2**31), NO_ID], jnp.int32)
    begin, end, num_ids = (jnp.int32(n) for n in (11, 57, 66))
    index, grads = spread(rng, signs * magnitude, 66)
    assert np.bincount(index).max() > 64

    def step(table, held, lines, dirty, ids, implementation):
        read = ops.read(table, held, queries, implementation=implementation)
        moves = Moves(ids, line, victims, begin, end, num_ids)
        before = Store(table, lines, dirty), moves, DRAW
        brought = ops.bring(*before, implementation=implementation)
        store, num = ops.swap(*before, implementation=implementation)
        dirty, lines = store.dirty, store.lines
        rows = ops.lookup(store, moves, implementation=implementation)
        options = {"draw": DRAW, "implementation": implementation}
        rules = optim.RowRule(0.25, True), optim.RowRule(0.25, False)
        given, other = rules if DIMS.index(dim) % 2 else rules[::-1]
        accumulators = {rule: jnp.zeros(V) if rule.has_sums else None for rule in rules}
        *updated, is_stored = ops.update(
            store, accumulators[given], moves, rows, signs * magnitude, rule=given, **options
        )
        positions = Positions(grads, index, None, None)
        *summed, is_updated, is_stored_too = ops.update_summed(
            store,
            accumulators[other],
            moves,
            rows,
            positions,
            rule=other,
            skip_nonfinite=False,
            **options,
        )
        if implementation == KERNEL:
            return (
                (read, dirty, num, lines, rows, is_updated, is_stored, is_stored_too, brought),
                (updated, summed),
                None,
            )
        new = {
            True: rows - jnp.float32(0.25) * signs,
            False: rows - jnp.float32(0.25) * (signs * magnitude),
        }
        sums = jnp.zeros(V).at[ids].set(jnp.square(magnitude[:, 0]), mode="drop")
        formulas = [
            [
                ops.write(store, moves, rows, new[rule.has_sums], **options)[0],
                sums if rule.has_sums else None,
            ]
            for rule in (given, other)
        ]
        return (
            (read, dirty, num, lines, rows, is_updated, is_stored, is_stored_too, brought),
            (updated, summed),
            tuple(formulas),
        )

    operands = (table, resident(lines), lines, dirty, ids)
    (wanted, updates, formulas), (got, got_updates, _) = (
        jax.jit(partial(step, implementation=name))
        .lower(*operands)
        .compile(compiler_options=FAST_COMPILE)(*operands)
        for name in (REFERENCE, KERNEL)
    )
    same(got, wanted)
    same(updates, formulas)
    same(got_updates, formulas)
    assert int(wanted[2]) > 20 and int(wanted[5].sum()) == 66


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds",
    named({
        "nothing at all": (0, 0, 0),
        "no cache line": (0, 0, 66),
        "no hit and no bypass": (0, 57, 57),
    }),
)  # fmt: skip
def test_empty_parts_of_a_plan(bounds):
    *staged, line, victims = stage(RowFormat("int8"), 16)
    staged += [
        jnp.where(jnp.arange(WIDTH) < bounds[1], line, LINES),
        victims,
    ]  # only cached rows have a line
    bounds = jnp.asarray(bounds, jnp.int32)
    same(move(KERNEL, *staged, bounds), move(REFERENCE, *staged, bounds))


@pytest.mark.slow
def test_without_a_cache():
    table, _, _, ids, line, _ = stage(RowFormat("float8_e4m3fn"), 7)

    @partial(jax.jit, static_argnames="implementation", compiler_options=FAST_COMPILE)
    def move(implementation):
        store, moves = Store(table, None, None), uncached(ids, line, 66)
        rows = ops.lookup(store, moves, implementation=implementation)
        new_rows = rows + jnp.float32(1)
        return rows, ops.write(store, moves, rows, new_rows, DRAW, implementation=implementation)

    same(move(implementation=KERNEL), move(implementation=REFERENCE))


class Cached(NamedTuple):
    """Rows in a cache with so many ways."""

    storage: str
    dim: int
    ways: int


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    named(
        [Cached("int8", 16, 8), Cached("int4", 7, 5), Cached("float32", 100, 64)],
        fast={"int4-7-5"},
        core={"float32-100-64"},
    ),
)
def test_read_matches_the_ways_of_a_set(case):
    """Ids below zero, past the table and NO_ID among them; ways that are no power of two."""
    spec = shapes.stack(300, case.dim, storage=case.storage, lines=128, ways=case.ways)
    state = mpembed.init(jax.random.key(0), spec, optax.sgd(0.1))
    state, _ = jax.jit(mpembed.prefetch)(state, jnp.arange(0, 300, 4, dtype=jnp.int32))
    state, _ = jax.jit(mpembed.prefetch)(state, jnp.arange(0, 300, 3, dtype=jnp.int32))
    ids = jnp.asarray([[-1, 0, 3, 300], [299, NO_ID, 4, 7], [6, 9, -(2**31), 12]], jnp.int32)
    read = jax.jit(ops.read, static_argnames="implementation")
    for cached in (state.cache, None):
        same(
            read(state.table, cached, ids, implementation=KERNEL),
            read(state.table, cached, ids, implementation=REFERENCE),
        )
    lines = residency.locate(state.cache, jnp.arange(300, dtype=jnp.int32))
    assert 50 < int((lines < state.cache.geometry.lines).sum()) < 130


# --- row update


def update_both(tx, spec, ids, grads):
    """The state after one update, by the XLA path and by the kernel.

    Both start from the same planned state.
    """
    results = []
    for implementation in (REFERENCE, KERNEL):
        state = mpembed.init(jax.random.key(1), spec, tx, implementation=implementation)

        @partial(jax.jit, compiler_options=FAST_COMPILE)
        def step(state):
            state, _, rows = training.step(state, ids, tx, training.of_positions(grads))
            return state, rows

        results.append(jax.device_get(step(state)))
    return results


@pytest.mark.parametrize("case", named(SOME, core=()))
def test_the_row_update_makes_the_same_bits_where_arithmetic_is_exact(case):
    """Adagrad with gradients of one magnitude 2^-k per row.

    The mean of squares is 4^-k, its root 2^-k, and -lr g / root is +-lr, all exact. There are
    bypassed rows, padding and a cache. The whole command has each format in the test of every
    kernel.
    """
    rng = np.random.default_rng(0)
    tx = optim.rowwise_adagrad(0.25, eps=0.0)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 150)],
        case.dim,
        case.format,
        mpembed.CacheSpec(num_rows=24, ways=4),
        row_state_dtype=("float32", "bfloat16")[SOME.index(case) % 2],
    )
    ids = np.concatenate([rng.permutation(150)[:60], [NO_ID] * 5]).astype(np.int32)
    signs = rng.choice(np.float32([-1, 1]), (65, case.dim))
    grads = signs * np.exp2(rng.integers(-6, 1, (65, 1))).astype(np.float32)
    (one, _), (other, _) = update_both(tx, spec, ids, grads)
    same(jax.tree.leaves(other), jax.tree.leaves(one))
    assert one.row_state != () and np.asarray(jax.tree.leaves(one.row_state)[0]).any()


@pytest.mark.exhaustive
def test_sgd_makes_the_same_bits_on_dyadic_numbers():
    """The whole command has SGD in the test of every kernel."""
    spec = shapes.stack(150, 9, storage="bfloat16", lines=24)
    ids = np.random.default_rng(1).permutation(150)[:50].astype(np.int32)
    (one, _), (other, _) = update_both(optim.sgd(0.5), spec, ids, shapes.dyadic(1, (50, 9)))
    same(jax.tree.leaves(other), jax.tree.leaves(one))


@pytest.mark.slow
@pytest.mark.parametrize("dim", named(DIMS, fast={"7"}, core=()))
def test_row_wise_adagrad_within_its_rounding_errors(dim):
    """|difference| <= 2^-23 (|w| + |u| (D / 2 + 5)), also where rows without a number are skipped.

    G is D + 1 roundings off at most, its root half of that. Then come a sum, a quotient and a
    product. The sum with w rounds once in each program. The whole command has other dims in
    the test of every kernel.
    """
    rng = np.random.default_rng(2)
    tx = optim.rowwise_adagrad(0.1, eps=1e-3)
    spec = shapes.stack(150, dim, storage="float32", lines=24)
    spec = dataclasses.replace(spec, skip_nonfinite=True)
    ids = rng.permutation(150)[:60].astype(np.int32)
    grads = rng.standard_normal((60, dim)).astype(np.float32)
    grads[3, 0], grads[33, -1] = np.nan, -np.inf
    (one, before), (other, _) = update_both(tx, spec, ids, grads)
    for state in (one, other):
        assert state.counters[COUNTERS.index("nonfinite_rows"), 0] == 2
    for a, b in ((one.table.rows, other.table.rows), (one.cache.rows, other.cache.rows)):
        a, b = (np.asarray(x).view(np.float32) for x in (a, b))
        bound = 2.0**-23 * (np.abs(a) + 0.1 * np.sqrt(dim) * (dim / 2 + 5))
        assert (np.abs(a - b) <= bound).all()
    np.testing.assert_allclose(
        *(jax.tree.leaves(s.row_state)[0] for s in (one, other)), rtol=(dim + 2) * 2.0**-23
    )
    assert before.shape == (61, dim)


@pytest.mark.slow
def test_a_plan_that_was_applied_before_changes_nothing():
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 90)],
        4,
        "int8",
        mpembed.CacheSpec(num_rows=16, ways=4),
        skip_nonfinite=True,
    )
    tx = optim.rowwise_adagrad(0.25, eps=0.0)
    ids = np.arange(0, 80, 2, dtype=np.int32)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def twice(state):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        once = mpembed.apply_gradients(state, plan, rows, jnp.ones_like(rows), tx=tx)
        stale = jax.lax.optimization_barrier(once)
        return once, mpembed.apply_gradients(stale, plan, rows, jnp.ones_like(rows), tx=tx)

    state = mpembed.init(jax.random.key(1), spec, tx, implementation=KERNEL)
    once, again = twice(state)
    same((once.table, once.cache, once.row_state), (again.table, again.cache, again.row_state))


def test_an_optimizer_of_another_state_is_refused():
    spec = shapes.stack(50, 4)
    state = mpembed.init(jax.random.key(0), spec, optax.trace(0.9), implementation=KERNEL)
    state, plan = mpembed.prefetch(state, jnp.arange(5, dtype=jnp.int32))
    rows = mpembed.lookup(state, plan)
    with pytest.raises(ValueError, match="tx does not match the row state"):
        mpembed.apply_gradients(state, plan, rows, rows, tx=optim.rowwise_adagrad(0.1))


@pytest.mark.parametrize("dim", named(DIMS, fast={"7"}, core={"128"}))
def test_sums_and_update_in_one_kernel_within_their_rounding_errors(dim):
    """By SGD: lr (n + 1) 2^-24 sum |g| + 2^-24 |w|, to first order.

    There are n products and n - 1 sums, then a product and a sum.
    """
    rng = np.random.default_rng(dim)
    fmt = RowFormat("float32").resolve(dim)
    num, width, lr = 400, 21, 0.1
    table = QuantizedTable(
        encode(jnp.asarray(rng.standard_normal((30, dim)), jnp.float32), fmt), fmt, dim
    )
    ids, line = (
        jnp.asarray([*rng.permutation(30)[: width - 1], NO_ID], jnp.int32),
        jnp.zeros(width, jnp.int32),
    )
    moves = uncached(ids, line, width - 1)
    rows = ops.lookup(Store(table, None, None), moves, implementation=REFERENCE)
    index = np.where(rng.random(num) < 0.5, 3, rng.integers(0, width, num)).astype(np.int32)
    source, factors = (
        rng.integers(0, 9, num).astype(np.int32),
        rng.standard_normal(num).astype(np.float32),
    )
    grads = rng.standard_normal((9, dim)).astype(np.float32)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def update(table, rows):
        return ops.update_summed(
            Store(table, None, None),
            None,
            moves,
            rows,
            Positions(grads, index, source, factors),
            rule=optim.RowRule(lr, False),
            draw=DRAW,
            skip_nonfinite=False,
            implementation=KERNEL,
        )

    new, _, is_updated, _ = update(table, rows)
    terms = factors[:, None].astype(np.float64) * grads[source]
    total, size = np.zeros((2, width, dim))
    np.add.at(total, index, terms)
    np.add.at(size, index, np.abs(terms))
    wanted = np.asarray(rows, np.float64) - np.float32(lr) * total
    most = np.bincount(index, minlength=width)[:, None] + 2
    error = np.abs(np.asarray(new.table.rows).view(np.float32)[np.asarray(ids[:-1])] - wanted[:-1])
    unit = 2.0**-24 * 1.001
    assert (error <= unit * (np.abs(wanted) + lr * most * size)[:-1]).all()
    assert np.asarray(is_updated).tolist() == [True] * (width - 1) + [False]


@pytest.mark.slow
def test_skipped_rows_and_infinite_factors_are_the_reference_s():
    """D = 6 is padded to 8 in a kernel.

    Zero times an infinite factor must not reach the mean of squares.
    """
    dim, width = 6, 9
    fmt = RowFormat("float32").resolve(dim)
    table = QuantizedTable(encode(jnp.asarray(shapes.dyadic(0, (20, dim))), fmt), fmt, dim)
    ids, line = jnp.asarray([*range(2, 10), NO_ID], jnp.int32), jnp.zeros(width, jnp.int32)
    index = jnp.asarray([0, 0, 1, 2, 2, 3, 4, 8], jnp.int32)
    grads = (
        jnp.asarray(shapes.dyadic(1, (8, dim)))
        .at[2, 3]
        .set(jnp.nan)
        .at[4, 0]
        .set(-jnp.inf)
        .at[5]
        .set(0.5)
    )
    factors = jnp.ones(8).at[5].set(jnp.inf)

    @partial(
        jax.jit,
        static_argnames=("implementation", "skip_nonfinite"),
        compiler_options=FAST_COMPILE,
    )
    def update(table, implementation, skip_nonfinite):
        store, moves = Store(table, None, None), uncached(ids, line, 8)
        rows = ops.lookup(store, moves, implementation=REFERENCE)
        return ops.update_summed(
            store,
            jnp.ones(20),
            moves,
            rows,
            Positions(grads, index, None, factors),
            rule=optim.RowRule(0.5, True),
            draw=DRAW,
            skip_nonfinite=skip_nonfinite,
            implementation=implementation,
        )

    for skip_nonfinite in (True, False):
        wanted, got = (update(table, name, skip_nonfinite) for name in (REFERENCE, KERNEL))
        same(got[2:], wanted[2:])
        assert int(got[2].sum()) == (5 if skip_nonfinite else 8)
        for one, other in ((wanted[0].table.rows, got[0].table.rows), (wanted[1], got[1])):
            one, other = (np.asarray(x).view(np.float32) for x in (one, other))
            np.testing.assert_allclose(other, one, rtol=1e-6)


# --- sums of duplicates and bags


INDICES = {
    "uniform": lambda rng, num, size: rng.integers(0, size, num),
    "distinct": lambda rng, num, size: rng.permutation(num) % size,
    "one row": lambda rng, num, size: np.zeros(num, int),
    "mostly one row": lambda rng, num, size: np.where(
        rng.random(num) < 0.9, 1, rng.integers(0, size, num)
    ),
    "padding": lambda rng, num, size: np.full(num, size - 1),
}


class Sums(NamedTuple):
    """So many positions of so many rows."""

    num: int
    size: int
    dim: int


@partial(jax.jit, static_argnames=("size", "implementation"), compiler_options=FAST_COMPILE)
def summed(values, index, size, implementation):
    if implementation == "sorted":
        return ops.xla.sums.add_sorted(
            jnp.ones((size, values.shape[1])), index, values
        ) - jnp.float32(1)
    return ops.sum_duplicates(values, index, size, implementation=implementation)


@pytest.mark.parametrize("implementation", [KERNEL, "sorted"])
@pytest.mark.parametrize(
    "case",
    named([Sums(96, 97, 7), Sums(300, 40, 16), Sums(1, 3, 4), Sums(64, 3, 1), Sums(150, 30, 100)]),
)
def test_sums_of_duplicates_equal_a_loop(case, implementation):
    """Rows of up to 32 positions, which are summed side by side, and longer ones.

    Dyadic, so sums are exact.
    """
    num, size, dim = case
    for kind, draw in INDICES.items():
        index = draw(np.random.default_rng(num), num, size).astype(np.int32)
        values = shapes.dyadic(num, (num, dim))
        wanted = np.zeros((size, dim), np.float32)
        np.add.at(wanted, index, values)
        wanted[-1] = 0
        np.testing.assert_array_equal(
            summed(values, index, size, implementation), wanted, err_msg=kind
        )


@pytest.mark.parametrize("dim", named(DIMS, fast={"7"}, core={"128"}))
def test_bags_and_their_sums_at_every_dim_within_their_rounding_errors(dim):
    """|error| <= n 2^-24 / (1 - n 2^-24) sum |factor row|.

    There are n products and n - 1 sums, each rounded once. Dyadic numbers have no error.
    """
    rng = np.random.default_rng(dim)
    index = rng.integers(0, 12, (37, 5)).astype(np.int32)
    gather = jax.jit(partial(ops.bag, implementation=KERNEL), compiler_options=FAST_COMPILE)
    spread = jax.jit(
        lambda v, i, f: ops.sum_duplicates(v, i, 13, implementation=KERNEL, factors=f),
        compiler_options=FAST_COMPILE,
    )
    for is_dyadic in (True, False):
        draw = (
            partial(shapes.dyadic, dim)
            if is_dyadic
            else lambda shape: rng.standard_normal(shape).astype(np.float32)
        )
        rows, factors, grads = draw((12, dim)), draw((37, 5)), draw((37, dim))
        terms = factors[..., None].astype(np.float64) * rows[index]
        close(
            gather(rows, index, factors), terms.sum(1), np.abs(terms).sum(1), 0 if is_dyadic else 5
        )
        terms = (factors[..., None].astype(np.float64) * grads[:, None]).reshape(-1, dim)
        wanted, size = np.zeros((2, 13, dim))
        np.add.at(wanted, index.reshape(-1), terms)
        np.add.at(size, index.reshape(-1), np.abs(terms))
        most = np.bincount(index.reshape(-1)).max()
        assert most > 13
        close(
            spread(grads, index.reshape(-1), factors.reshape(-1)),
            wanted,
            size,
            0 if is_dyadic else most,
        )


def close(got, wanted, size, num_terms):
    unit = num_terms * 2.0**-24
    assert (np.abs(np.asarray(got, np.float64) - wanted) <= unit / (1 - unit) * size).all()


@pytest.mark.parametrize("combiner", named([None, "sum", "mean", "sqrtn"], core={"None", "mean"}))
def test_pooling_and_its_gradients_by_kernels(combiner):
    """Exact for sums; means and roots round alike, so all must agree bit for bit on dyadic rows."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(shapes.dyadic(0, (30, 7)))
    index = {
        "a": rng.integers(0, 30, (5, 4)).astype(np.int32),
        "b": rng.integers(0, 30, (3, 2, 3)).astype(np.int32),
    }
    weights = (
        None
        if combiner is None
        else jax.tree.map(lambda i: jnp.asarray(shapes.dyadic(2, i.shape)), index)
    )

    @partial(jax.jit, static_argnames="implementation", compiler_options=FAST_COMPILE)
    def value_and_grads(rows, weights, implementation):
        def loss(rows, weights):
            out = mpembed.pool(rows, index, weights, combiner, implementation=implementation)
            return sum(jnp.sum(x * jnp.float32(0.5)) for x in jax.tree.leaves(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1) if combiner else (0,), has_aux=True)(
            rows, weights
        )

    (_, wanted), wanted_grads = value_and_grads(rows, weights, REFERENCE)
    (_, got), got_grads = value_and_grads(rows, weights, KERNEL)
    check = (
        np.testing.assert_array_equal
        if combiner in (None, "sum")
        else partial(np.testing.assert_allclose, atol=2e-6)
    )
    jax.tree.map(check, got, wanted)
    jax.tree.map(check, got_grads, wanted_grads)


# --- whole steps


@pytest.mark.slow
def test_training_with_kernels_makes_the_state_of_the_reference():
    """20 batches, evictions, bypasses and ragged bags: every array of the state, bit for bit."""
    tx = optim.sgd(0.25)
    spec = shapes.stack((120, 30), 6, storage="int4", lines=24, ways=4)
    batches = shapes.skewed_ids(5, 20, 40, 150, drift=5, ragged=True).reshape(20, 10, 4)
    grads = shapes.dyadic(5, (20, 10, 6))

    @partial(jax.jit, donate_argnames="state", compiler_options=FAST_COMPILE)
    def train(state, batches, grads):
        def step(state, batch):
            ids, upstream = batch
            gradient = training.of_vectors(
                upstream, combiner="sum", implementation=state.implementation
            )
            state, plan, _ = training.step(state, ids, tx, gradient)
            return state, plan.counts

        return jax.lax.scan(step, state, (batches, grads))

    results = []
    for implementation in (REFERENCE, KERNEL):
        state = mpembed.init(jax.random.key(2), spec, tx, implementation=implementation)
        state, counts = train(state, batches, grads)
        results.append((jax.tree.leaves(jax.jit(mpembed.flush)(state)), counts))
    same(results[1], results[0])
    assert int(results[0][1].write_backs.sum()) > 20
    assert int(results[0][1].bypasses.sum()) > 20


@pytest.mark.parametrize("size", [1, 3, 60, 4096, 4097, 70_001])
def test_running_sums_are_those_of_all_elements_before(size):
    """One block and several, the last one partly filled; numbers of both signs, and flags.

    The last of them is only counted.
    """
    rng = np.random.default_rng(size)
    numbers, flags, others = (
        rng.integers(-9, 9, size).astype(np.int32),
        rng.random(size) < 0.5,
        rng.random(size) < 0.2,
    )
    found, totals = jax.jit(partial(kernel.running_sums_and_totals, is_interpreted=True))(
        [numbers, flags], [others]
    )
    for sums, values in zip(found, (numbers, flags), strict=True):
        assert sums.dtype == jnp.int32
        np.testing.assert_array_equal(sums, np.cumsum(values))
    np.testing.assert_array_equal(totals, [numbers.sum(), flags.sum(), others.sum()])
