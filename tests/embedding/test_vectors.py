"""embed and apply_pooled_gradients: native code makes the reference's bits, in place."""

import dataclasses
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shapes
from cases import named
from hypothesis import given, settings
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax import ops
from mpembed_jax.embedding import vectors
from mpembed_jax.numerics import rounding

pytest.importorskip("numba", reason="the [cpu] extra is not installed")
KEY = jax.random.key(3)
NUM_IDS = 700
CONTRACTS = "the products of a pooling are contracted into sums only where LLVM optimizes"
TRANSFORMATIONS = {
    "adagrad": mpembed.optim.rowwise_adagrad(0.1),
    "adagrad, start": mpembed.optim.rowwise_adagrad(0.3, eps=1e-3, initial_accumulator_value=0.1),
    "sgd": mpembed.optim.sgd(0.2),
}
# Every format, symmetric or not, and every kind of scale: machine code of each takes ten seconds.
CODECS = [
    {"name": codec.name}
    | ({"symmetric": codec.symmetric} if codec.name.startswith("int") else {})
    | ({"scale_dtype": codec.scale} if codec.metadata_bytes else {})
    for codec in map(
        shapes.CODECS.get,
        [
            "int8-symmetric-bfloat16", "int8-asymmetric-float16", "int4-symmetric-bfloat16",
            "int4-asymmetric-bfloat16", "int2-symmetric-bfloat16", "int2-asymmetric-bfloat16",
            "float8_e4m3fn-bfloat16", "float8_e5m2-float32", "float32", "bfloat16", "float16",
        ],
    )
]  # fmt: skip
CODECS_BY_NAME = {"-".join(map(str, codec.values())): codec for codec in CODECS}
SOME = CODECS[1::3]


@partial(jax.jit, static_argnames=("tx", "combiner", "num_segments"), donate_argnums=0)
def train_step(state, ids, weights, segment_ids, seed, *, tx, combiner, num_segments):
    """One step; gradients depend on the vectors, so that an early difference would grow."""
    state, plan, found = mpembed.embed(
        state, ids, weights, combiner, segment_ids=segment_ids, num_segments=num_segments, tx=tx
    )

    def gradient(number, v):
        noise = jax.random.normal(jax.random.key(seed + number), v.shape, jnp.float32)
        # A choice, not a sum: two programs might contract a sum with its products in two ways.
        return jnp.where(jnp.abs(noise) < 1, noise, v)

    leaves, treedef = jax.tree.flatten(found)
    grads = treedef.unflatten([gradient(k, v) for k, v in enumerate(leaves)])
    state = mpembed.apply_pooled_gradients(state, plan, grads, tx=tx)
    return state, found, plan.counts


@dataclasses.dataclass(frozen=True)
class Case:
    """One stack and its batches."""

    codec: dict
    dim: int
    lines: int | None
    ways: int
    policy: str
    budget: int | None
    pooling: str
    transformation: str
    row_state: str = "float32"
    skips: bool = False
    num_ids: int = NUM_IDS
    width: int = 96
    seed: int = 0

    def spec(self):
        cache = None
        if self.lines is not None:
            cache = mpembed.CacheSpec(num_rows=self.lines, ways=self.ways, policy=self.policy)
        return mpembed.EmbeddingSpec(
            [mpembed.TableSpec("t", self.num_ids)], self.dim, mpembed.RowFormat(**self.codec),
            cache, max_unique_ids=self.budget, row_state_dtype=self.row_state,
            skip_nonfinite=self.skips,
        )  # fmt: skip

    def batches(self, steps):
        """Skewed ids that drift, with padding and ids outside the table, shaped for a pooling."""
        ids = shapes.skewed_ids(self.seed, steps, self.width, self.num_ids, drift=3)
        ids[:, 5::17], ids[:, 6], ids[:, 7] = mpembed.NO_ID, -3, self.num_ids
        return [self.batch(row, np.random.default_rng(self.seed + t)) for t, row in enumerate(ids)]

    def batch(self, ids, rng):
        """The arguments (ids, weights, segment_ids) and the static ones of train_step."""
        combiner = self.pooling.split()[-1] if self.pooling != "vectors" else None
        static = {"tx": TRANSFORMATIONS[self.transformation], "combiner": combiner}
        weights = segment_ids = num_segments = None
        if "nest" in self.pooling:
            half = len(ids) // 2
            ids = {
                "a": ids[:half].reshape(-1, 3),
                "b": ids[half:].reshape(-1, 2),
                "c": ids[:0].reshape(4, 0),
            }
        elif "ragged" in self.pooling:
            num_segments = 20
            segment_ids = np.sort(rng.integers(-1, num_segments + 1, ids.shape)).astype(np.int32)
            if "mixed" in self.pooling:
                segment_ids = rng.permutation(segment_ids)
        elif combiner is not None:
            ids = ids.reshape(-1, 4)
        if "weighted" in self.pooling:
            weights = jax.tree.map(lambda i: rng.normal(size=i.shape).astype(np.float32), ids)
        return (ids, weights, segment_ids), static | {"num_segments": num_segments}


POOLINGS = (
    "vectors", "sum", "mean", "weighted sum", "weighted mean", "weighted sqrtn", "nest sum",
    "nest weighted mean", "ragged sum", "ragged weighted mean", "ragged mixed weighted sqrtn",
)  # fmt: skip


def state_of(case, implementation):
    return mpembed.init(
        KEY, case.spec(), TRANSFORMATIONS[case.transformation], implementation=implementation
    )


def check(case, *, implementations=("numba",), steps=6):
    """Every implementation's state, vectors and counts equal the reference's, step by step."""
    states = [state_of(case, name) for name in ("xla", *implementations)]
    for number, (arguments, static) in enumerate(case.batches(steps)):
        results = []
        for k, state in enumerate(states):
            states[k], *found = train_step(state, *arguments, 1000 * number, **static)
            results.append(jax.device_get((jax.tree.leaves(states[k]), found)))
        for other in results[1:]:
            jax.tree.map(
                partial(np.testing.assert_array_equal, err_msg=f"{case}, step {number}"),
                other,
                results[0],
            )
    return states[0]


@pytest.mark.optimized(CONTRACTS)
@pytest.mark.exhaustive
@settings(max_examples=5)
@given(
    st.builds(
        Case,
        codec=st.sampled_from(SOME),
        dim=st.sampled_from([1, 3, 8, 16, 33, 100]),
        lines=st.sampled_from([None, 1, 24, 300, 1100]),
        ways=st.sampled_from(shapes.WAYS),
        policy=st.sampled_from(shapes.POLICIES),
        budget=st.sampled_from([None, 1, 30]),
        pooling=st.sampled_from(POOLINGS),
        transformation=st.sampled_from(list(TRANSFORMATIONS)),
        row_state=st.sampled_from(["float32", "bfloat16"]),
        skips=st.booleans(),
        num_ids=st.sampled_from([40, NUM_IDS]),
        seed=st.integers(0, 1000),
    ),
    st.sampled_from([1, 2, 3, 8]),
)
def test_native_code_makes_the_reference_s_bits(case, threads):
    """Any combination of what the tests below show one by one.

    They are test_every_format, test_every_pooling, test_a_step_of_bags,
    test_any_number_of_threads_makes_the_same_bits and
    test_many_misses_of_one_set_enter_in_their_order.
    """
    numba = dataclasses.replace(ops.IMPLEMENTATIONS["numba"], max_threads=threads)
    check(case, implementations=(numba,))


@pytest.mark.parametrize(
    "codec",
    named(
        CODECS_BY_NAME,
        core={"int8-True-bfloat16", "float16", "float32"},
    ),
)
def test_every_format(codec):
    """The whole command has the other formats among extreme numbers."""
    check(Case(codec, 17, 40, 4, "lfu", None, "vectors", "adagrad"))


@pytest.mark.optimized("users' programs may treat subnormal and undefined numbers otherwise")
@pytest.mark.parametrize(
    "codec",
    named(
        CODECS_BY_NAME,
        core={
            "int8-False-float16",
            "int4-True-bfloat16",
            "int2-False-bfloat16",
            "float8_e4m3fn-bfloat16",
            "float8_e5m2-float32",
            "bfloat16",
        },
    ),
)
def test_rows_of_extreme_numbers(codec):
    """Subnormal, huge, infinite and undefined rows read the same; the rest has the same bits.

    In the whole command, these cases have every width of codes, a bias, none, and every kind of
    scale. Other tests compile the machine code of those of INT4 and INT2, too.
    """
    case = Case(codec, 16, None, 1, "lfu", None, "vectors", "sgd", num_ids=16)
    ids = np.arange(16, dtype=np.int32)
    grads = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    grads[0], grads[1, 0], grads[2, 0], grads[3] = np.nan, np.inf, -np.inf, 3e38
    grads[3, 0] = -3e38
    grads[4] *= np.float32(1e-36)
    grads[5] *= np.float32(1e-38)
    grads[6] *= np.float32(1e30)
    tx = TRANSFORMATIONS["sgd"]

    @jax.jit
    def step(state, grads):
        state, plan, _ = mpembed.embed(state, ids, tx=tx)
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=tx)

    rows = []
    for name in ("xla", "numba"):
        state = state_of(case, name)
        zeros = mpembed.write_rows(state, ids, np.zeros((16, 16), np.float32))
        rows.append(np.asarray(jax.jit(mpembed.read)(step(zeros, grads), ids)))
    reference, native = rows
    is_number = np.isfinite(reference).all(1)
    np.testing.assert_array_equal(np.isfinite(native).all(1), is_number)
    np.testing.assert_array_equal(native, reference)
    np.testing.assert_array_equal(
        native[is_number].view(np.uint32), reference[is_number].view(np.uint32)
    )
    assert is_number[4:].all()


@pytest.mark.optimized(CONTRACTS)
@pytest.mark.parametrize(
    "pooling",
    named(
        POOLINGS,
        core=(),
    ),
)
def test_every_pooling(pooling):
    """The whole command has vectors, weighted means and ragged mixed bags below.

    It has sums, ragged means and nests in test_pooled_gradients.py.
    """
    check(Case({"name": "int8"}, 16, 100, 8, "lru", None, pooling, "adagrad"))


@pytest.mark.parametrize("dim", named([24, 32, 64, 128], core={"128"}))
def test_squares_are_summed_in_one_order_at_every_number_of_blocks(dim):
    """3, 4, 8 and 16 blocks of eight; each number is unrolled into code of its own.

    The whole command has the most; one, two and a rest are in the tests above.
    """
    check(Case({"name": "float32"}, dim, 100, 8, "lfu", None, "vectors", "adagrad"), steps=2)


QUICK = Case({"name": "int8"}, 12, 100, 8, "lfu", 40, "weighted mean", "adagrad")


@pytest.mark.optimized(CONTRACTS)
@pytest.mark.slow
def test_a_step_of_bags():
    """With hits, evictions, bypassed rows, ids over the budget, and vectors of 12 numbers.

    Eight and a rest: what native code writes must end with the vector.
    """
    state = check(QUICK)
    with pytest.warns(UserWarning, match="unique ids exceeded max_unique_ids=40"):
        stats = mpembed.stats(state)
    assert min(stats.hits, stats.evictions, stats.bypasses, stats.dropped, stats.out_of_range) > 0


MANY = Case(
    {"name": "int8"},
    8,
    2500,
    8,
    "lfu",
    2000,
    "vectors",
    "adagrad",
    num_ids=30_000,
    width=6000,
)
THREADED = {
    "lfu": MANY,
    "lru": dataclasses.replace(MANY, policy="lru"),
    "few lines": dataclasses.replace(MANY, lines=6),
    "no cache": dataclasses.replace(MANY, lines=None),
}


@pytest.mark.optimized(CONTRACTS)
@pytest.mark.parametrize("case", named(THREADED, core={"lru"}))
def test_any_number_of_threads_makes_the_same_bits(case):
    """6,000 positions; 16 or 64 partitions where the cache has so many groups of sets.

    The whole command has few lines, and none, among the pools of
    tests/vocabulary/test_vocabulary.py.
    """
    numba = ops.IMPLEMENTATIONS["numba"]
    threads = [dataclasses.replace(numba, max_threads=number) for number in (1, 3, 8)]
    check(case, implementations=threads[:2], steps=4)
    ragged = dataclasses.replace(case, pooling="ragged mixed weighted sqrtn", width=3000)
    check(ragged, implementations=threads[2:], steps=2)


MANY_THREADS = """
import hashlib, jax, numpy as np
import mpembed_jax as mpembed
tx = mpembed.optim.rowwise_adagrad(0.1)
cache = mpembed.CacheSpec(num_rows=4096, ways=4)
spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 20_000)], 16, cache=cache)
@jax.jit
def step(state, ids):
    state, plan, vectors = mpembed.embed(state, ids, tx=tx)
    return mpembed.apply_pooled_gradients(state, plan, vectors, tx=tx), plan.places.facts[0]
state = mpembed.init(jax.random.key(0), spec, tx)
for seed in range(3):
    ids = np.random.default_rng(seed).zipf(1.2, 4000) % 20_000
    state, num_parts = step(state, ids.astype(np.int32))
made = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(
    (state.table, state.cache, state.row_state))))
print(num_parts, made.hexdigest())
"""


@pytest.mark.slow
def test_processes_with_few_and_many_threads_train_the_same_bits():
    """A pool of more than four threads divides the ids over more partitions."""
    ran = [
        subprocess.run(
            [sys.executable, "-c", MANY_THREADS],
            env=os.environ | {"NPROC": str(num), "XLA_FLAGS": ""},
            capture_output=True, text=True, check=True,
        ).stdout.split()
        for num in (1, 8)
    ]  # fmt: skip
    (few, first), (many, second) = ran
    assert (few, many) == ("16", "64")
    assert first == second


def test_a_product_is_rounded_before_it_is_added():
    """(1 + 2^-12)^2 - 1: contracted, the last bit of the square would be kept."""
    x = jnp.float32(1 + 2**-12)

    @jax.jit
    def difference(x, number, ones):
        return rounding.apart(x * x, number) - ones

    exact = np.float64(x) * np.float64(x)
    for number in (0, 3, -1, 2**31 - 1, -(2**31)):
        found = difference(jnp.full(64, x), jnp.int32(number), jnp.ones(64, jnp.float32))
        np.testing.assert_array_equal(found, np.float32(exact) - np.float32(1))
    assert np.float32(exact - 1) != np.float32(exact) - np.float32(1)


@pytest.mark.parametrize("policy", named(shapes.POLICIES, core={"lfu"}))
def test_many_misses_of_one_set_enter_in_their_order(policy):
    """300 ids meet 2 sets of 4 ways, again and again, with estimates that differ."""
    check(Case({"name": "int4"}, 4, 8, 4, policy, None, "vectors", "sgd", num_ids=300, width=900))


@pytest.mark.slow
def test_rows_that_do_not_move_keep_their_bits():
    """A zero gradient for even ids, in lines and in the table: the flushed rows are as before."""
    case = Case({"name": "int8"}, 8, 24, 8, "lfu", None, "vectors", "adagrad", num_ids=200)
    states, tx = [state_of(case, name) for name in ("xla", "numba")], TRANSFORMATIONS["adagrad"]

    @partial(jax.jit, donate_argnums=0)
    def step(state, ids):
        state, plan, found = mpembed.embed(state, ids, tx=tx)
        grads = jnp.where(ids[:, None] % 2 == 0, jnp.float32(0), jnp.ones_like(found))
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=tx)

    before = np.array(states[0].table.rows)
    for ids in shapes.skewed_ids(0, 6, 60, 200, drift=2):
        states = [step(state, ids) for state in states]
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(*(jax.device_get(jax.tree.leaves(state)) for state in states))
    after = np.asarray(jax.jit(mpembed.flush)(states[1]).table.rows)
    np.testing.assert_array_equal(after[::2], before[::2])
    assert (after[1::2] != before[1::2]).any()


# --- what the compiled step may cost, and who takes which way


def compiled_step(tx, spec, ids, combiner):
    @partial(jax.jit, donate_argnums=0)
    def step(state, ids, upstream):
        state, plan, found = mpembed.embed(state, ids, combiner=combiner, tx=tx)
        return mpembed.apply_pooled_gradients(state, plan, upstream, tx=tx), found

    state = jax.eval_shape(lambda: mpembed.init(KEY, spec, tx, implementation="numba"))
    lead = ids.shape if combiner is None else ids.shape[:-1]
    grads = jax.ShapeDtypeStruct((*lead, spec.embedding_dim), jnp.float32)
    return state, step.lower(state, ids, grads).compile()


@pytest.mark.parametrize("combiner", [None, "mean"])
@pytest.mark.parametrize("storage", ["int8", "int4", "float32"])
def test_a_step_makes_no_array_of_unique_rows_and_copies_nothing(storage, combiner):
    """The only float arrays as wide as the batch are the vectors and their gradients.

    The float32 rows have no cache; the table is then an array of float32 itself.
    """
    lines = None if storage == "float32" else 20_000
    spec = shapes.stack(400_009, 24, storage=storage, lines=lines, ways=8)
    ids = jax.ShapeDtypeStruct((500, 6), jnp.int32)
    state, compiled = compiled_step(TRANSFORMATIONS["adagrad"], spec, ids, combiner)
    text = compiled.as_text()
    rows_of = [int(n) for n in re.findall(r"f32\[(\d+),24\]", text)]
    wanted = 3000 if combiner is None else 500
    assert wanted in rows_of
    held = state.table.rows if state.cache is None else state.cache.rows
    assert set(rows_of) <= {0, wanted, held.shape[0]}
    large = {leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 20_000}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    assert not [s for s in copied if np.prod([int(n) for n in s.split(",")]) in large]
    # Integers: some 20 words a position. There is nothing as large as 3,000 rows of 24 floats.
    assert compiled.memory_analysis().temp_size_in_bytes < 3000 * (24 * 4 + 4 * 20)


@pytest.mark.parametrize("name", ["momentum", "clipped", "mesh of one"])
def test_what_is_not_fused_takes_the_separate_verbs(name):
    """A momentum, a clipping of rows; one pass over them makes the state of the separate verbs."""
    tx = {
        "momentum": optax.sgd(0.1, momentum=0.9),
        "clipped": optax.chain(mpembed.optim.clip_by_row_norm(0.5), mpembed.optim.sgd(0.1)),
    }.get(name, TRANSFORMATIONS["sgd"])
    spec = shapes.stack(60, 4, storage="int8", lines=16, ways=4)
    mesh = None
    if name == "mesh of one":
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((1,), ("x",), auto, devices=jax.devices()[:1])
    state = jax.eval_shape(lambda: mpembed.init(KEY, spec, tx, mesh=mesh, implementation="numba"))
    assert not vectors.is_fused(tx, state)
    assert vectors.is_fused(TRANSFORMATIONS["sgd"], dataclasses.replace(state, layout=None))
    if mesh is None:
        state = mpembed.init(KEY, spec, tx, implementation="numba")
        ids = np.arange(30, dtype=np.int32)
        state, plan, found = mpembed.embed(state, ids, tx=tx)
        assert plan.places is None
        np.testing.assert_array_equal(found, mpembed.read(state, ids))
        mpembed.apply_pooled_gradients(state, plan, found, tx=tx)


@pytest.mark.parametrize("combiner", named([None, "mean"], core={"mean"}))
def test_steps_of_several_states_under_vmap_are_steps_one_after_another(combiner):
    """Foreign calls run in turn; the states and vectors are equal in every bit."""
    tx = TRANSFORMATIONS["adagrad"]
    spec = shapes.stack(NUM_IDS, 16, storage="int8", lines=32, ways=4)

    def life(key, batches):
        def step(state, ids):
            options = {"combiner": combiner, "num_segments": None, "tx": tx}
            return train_step(state, ids, None, None, 0, **options)[:2]

        state = mpembed.init(key, spec, tx, implementation="numba")
        assert vectors.is_fused(tx, state)
        return jax.lax.scan(step, state, batches)

    keys = jax.random.split(KEY, 2)
    batches = np.random.default_rng(0).integers(0, NUM_IDS, (2, 3, 20, 4)).astype(np.int32)
    many = jax.device_get(jax.jit(jax.vmap(life))(keys, batches))
    for number in range(2):
        one = jax.device_get(jax.jit(life)(keys[number], batches[number]))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[number], b), many, one)  # noqa: B023
