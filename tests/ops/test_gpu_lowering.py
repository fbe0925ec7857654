"""A step lowered for CUDA and TPU on a machine that has neither.

It has no scatter of duplicates, and kernels where they are named.
"""

import dataclasses
import importlib.util
import re
import types
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lowering
import optax
import pytest
import shapes
from cases import crossed, named
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import mpembed_jax as mpembed
from mpembed_jax import ops
from mpembed_jax.vocabulary import pool

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
ADAGRAD = mpembed.optim.rowwise_adagrad(0.05)
BATCH, LENGTH = 24, 3
# The kernels that plan a step with an LFU cache. Long arrays are summed by one more.
PLANNING = {"mpembed_halve", "mpembed_plan", "mpembed_running_sums"}
OF_RAW_IDS = {"mpembed_halve_uses", "mpembed_admit", "mpembed_start_again"}
RAW_IDS = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("user", initial_bound=0.1), mpembed.TableSpec("item")],
    16,
    "int8",
    mpembed.CacheSpec(num_rows=256),
    vocabulary=mpembed.VocabularySpec(3000),
)
BEST_ON_CPU = "xla_chunked" if importlib.util.find_spec("numba") is None else "numba"

POOLS = {
    "vectors": {},
    "sum": {"combiner": "sum"},
    "weighted mean": {"combiner": "mean", "weights": True},
    "ragged sqrtn": {"combiner": "sqrtn", "weights": True, "segments": True},
}


@cache  # steps that are the same are traced and lowered once
def step_and_arguments(
    implementation,
    pooling,
    *,
    spec=None,
    tx=ADAGRAD,
    num_rows=3000,
    dim=16,
    storage="int8",
    is_pooled=False,
):
    """A training step with its abstract arguments: ids [24, 3], or flat ones in 24 ragged bags.

    Pooled: gradients of bags are applied, instead of rows'.
    """
    spec = spec or shapes.stack(num_rows, dim, storage=storage, lines=256)
    options = dict(POOLS[pooling])
    is_ragged = options.pop("segments", False)
    is_weighted = options.pop("weights", False)
    shape = (BATCH * LENGTH,) if is_ragged else (BATCH, LENGTH)

    def step(state, ids, weights, segment_ids, target):
        extra = {"segment_ids": segment_ids, "num_segments": BATCH} if is_ragged else {}
        if is_pooled:
            given = options | extra | ({"weights": weights} if is_weighted else {})
            state, plan, vectors = mpembed.embed(state, ids, **given, tx=tx)
            grads = vectors - target
            return mpembed.apply_pooled_gradients(state, plan, grads, tx=tx), weights
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)

        def pool(rows, weights):
            given = extra | ({"weights": weights} if is_weighted else {})
            return mpembed.pool(
                rows, plan.inverse, implementation=implementation, **options, **given
            )

        def loss(rows, weights):
            return jnp.sum(jnp.square(pool(rows, weights) - target))

        row_grads, weight_grads = jax.grad(loss, argnums=(0, 1))(rows, weights)
        return mpembed.apply_gradients(state, plan, rows, row_grads, tx=tx), weight_grads

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = jax.eval_shape(
        lambda key: mpembed.init(key, spec, tx, implementation=implementation), key
    )
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    if spec.vocabulary is not None:
        ids = jax.ShapeDtypeStruct((*shape, 2), jnp.uint32)
    arguments = (
        state,
        ids,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    return step, arguments


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("pooling", named(list(POOLS), fast={*POOLS} - {"sum"}, core=()))
def test_no_scatter_adds_floats_where_it_would_be_slow(platform, pooling):
    """jax#38806. A CPU's lowering of the same step has such scatters, so the test would see one."""
    step, arguments = step_and_arguments("xla", pooling)
    found = lowering.float_scatters(
        lowering.lowered_for(platform, step, *arguments, donate_argnums=0).as_text()
    )
    assert found, "rows are scattered at least"
    assert [combiner for combiner, _ in found if combiner != "set"] == []
    on_cpu = lowering.float_scatters(
        lowering.lowered_for("cpu", step, *arguments, donate_argnums=0).as_text()
    )
    assert "add" in [combiner for combiner, _ in on_cpu]


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["vectors", "weighted mean"])
def test_a_step_with_kernels_scatters_no_row_by_xla(pooling):
    step, arguments = step_and_arguments("pallas_triton", pooling)
    text = lowering.lowered_for("cuda", step, *arguments, donate_argnums=0).as_text()
    wanted = PLANNING | {"mpembed_swap", "mpembed_lookup", "mpembed_update", "mpembed_sum"}
    assert wanted | ({"mpembed_bag"} if pooling != "vectors" else set()) == set(
        lowering.kernels(text)
    )
    assert [c for c, _ in lowering.float_scatters(text) if c != "set"] == []


@pytest.mark.slow
@pytest.mark.parametrize("pooling", named(list(POOLS), fast={"ragged sqrtn", "vectors"}, core=()))
def test_pooled_gradients_are_summed_and_applied_by_one_kernel(pooling):
    """Ragged means sum their weights on the way, which is a kernel of its own."""
    step, arguments = step_and_arguments("pallas_triton", pooling, is_pooled=True)
    text = lowering.lowered_for("cuda", step, *arguments, donate_argnums=0).as_text()
    kernels = PLANNING | {"mpembed_bring", "mpembed_update_summed"}
    kernels |= {"vectors": set(), "ragged sqrtn": {"mpembed_sum"}}.get(pooling, {"mpembed_bag"})
    assert set(lowering.kernels(text)) == kernels
    assert [c for c, _ in lowering.float_scatters(text) if c != "set"] == []


LOOPS_AND_BRANCHES = re.compile(r"stablehlo\.(?:while|case|if)\b")


@crossed(
    policy=[*shapes.POLICIES, "no cache"],
    budget=[None, 9],
    core={"lfu-None", "no cache-9"},
)
def test_a_step_with_kernels_never_waits_for_the_device(policy, budget):
    """Its program has no loop and no branch, whose condition the host would have to read.

    The reference has some, so the test would see one. The positions are sorted by id once, for
    deduplication and for the sums of gradients. The unique ids are sorted by cache set.
    """
    is_cached = policy != "no cache"
    lines = {"lines": 256, "policy": policy} if is_cached else {}
    spec = shapes.stack(3000, 16, storage="int8", max_unique_ids=budget, **lines)
    found = {}
    for implementation in ("pallas_triton", "xla"):
        for pooling, is_pooled in (("vectors", False), ("sum", True), ("weighted mean", True)):
            if (implementation, pooling) == ("xla", "weighted mean"):
                continue  # the reference with sums has been seen
            step, arguments = step_and_arguments(
                implementation, pooling, spec=spec, is_pooled=is_pooled
            )
            lowered = lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
            text = lowered.as_text()
            found[implementation, is_pooled] = len(LOOPS_AND_BRANCHES.findall(text))
            if implementation == "pallas_triton" and is_pooled:
                assert text.count("stablehlo.sort") == 1 + is_cached
    assert found["pallas_triton", False] == found["pallas_triton", True] == 0
    assert min(found["xla", False], found["xla", True]) > 0


@pytest.mark.slow
def test_a_step_of_raw_ids_with_kernels_never_waits_for_the_device():
    """Neither the halving of uses nor rows that start again have a loop or a branch.

    Two sorts admit the ids. All sorts have one key and one value, as a radix sort needs.
    """
    found = {}
    for implementation in ("pallas_triton", "xla"):
        step, arguments = step_and_arguments(implementation, "vectors", spec=RAW_IDS)
        lowered = lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
        found[implementation] = lowered.as_text()
    assert len(LOOPS_AND_BRANCHES.findall(found["xla"])) > 0
    text = found["pallas_triton"]
    assert LOOPS_AND_BRANCHES.findall(text) == []
    assert set(lowering.kernels(text)) >= OF_RAW_IDS
    num_operands = [len(x.split(",")) for x in re.findall(r'stablehlo\.sort"\(([^)]*)\)', text)]
    assert num_operands == [2] * 5  # admit, admit, unique, plan, sums of duplicates


def test_admission_to_a_pool_of_few_sets_has_no_loop():
    """Its sets are too long for the kernel, and the reference decides after the halving."""
    vocabulary = jax.eval_shape(lambda: pool.init(mpembed.VocabularySpec(64, ways=32), None))
    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    arguments = vocabulary, jax.ShapeDtypeStruct((200, 2), jnp.uint32), scalar

    def admit(vocabulary, pairs, step):
        given = vocabulary, pairs, step, step == 7, ops.Admission(2, True, 8)
        return ops.admit(*given, cache=None, implementation="pallas_triton")

    text = lowering.lowered_for("cuda", admit, *arguments).as_text()
    assert set(lowering.kernels(text)) == {"mpembed_halve_uses"}
    assert LOOPS_AND_BRANCHES.findall(text) == []


@pytest.mark.slow
def test_a_step_over_a_mesh_lowers_with_kernels():
    """Kernels take part in the types that say what differs between devices: jax checks them.

    A loop would wait for the device. The branches choose the width of an exchange: of raw ids,
    their rows, row numbers, rows and gradients.
    """
    abstract = {}
    if lowering.HAS_ABSTRACT_DEVICES:
        abstract["abstract_device"] = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,), **abstract)
    spec = dataclasses.replace(RAW_IDS, cache=mpembed.CacheSpec(num_rows=256, ways=8))
    init = partial(mpembed.init, spec=spec, tx=ADAGRAD, mesh=mesh)
    init = partial(init, implementation="pallas_triton")
    state = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32))
    specs = mpembed.partition_specs(state)

    def step(state, ids, grads):
        state, plan, vectors = mpembed.embed(state, ids, tx=ADAGRAD)
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=ADAGRAD), vectors

    divided = P("x")
    run = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, divided, divided), out_specs=(specs, divided)
    )
    arguments = (
        state,
        jax.ShapeDtypeStruct((BATCH, LENGTH, 2), jnp.uint32),
        jax.ShapeDtypeStruct((BATCH, LENGTH, 16), jnp.float32),
    )
    text = lowering.lowered_for("cuda", run, *arguments, donate_argnums=0).as_text()
    moving_rows = {f"mpembed_{name}" for name in ("bring", "lookup", "update", "sum")}
    assert set(lowering.kernels(text)) == PLANNING | OF_RAW_IDS | moving_rows
    assert LOOPS_AND_BRANCHES.findall(text) == ["stablehlo.case"] * 5


@crossed(
    dim=[1, 100],
    storage=shapes.FORMATS,
    core={"100-float32", "1-float8_e4m3fn"},
)
def test_every_kernel_lowers_for_cuda_in_every_format(storage, dim):
    """Odd dims too.

    Triton's front end refuses unsupported primitives and shapes here, without a GPU. The whole
    command lowers all kernels of INT8 in test_kernels_have_no_atomics.
    """
    for is_pooled in (False, True):
        step, arguments = step_and_arguments(
            "pallas_triton", "sum", storage=storage, dim=dim, is_pooled=is_pooled
        )
        lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
    read = partial(lowering.lowered_for, "cuda", mpembed.read)
    assert "mpembed_read" in lowering.kernels(read(arguments[0], arguments[1]).as_text())


@pytest.mark.slow
def test_other_optimizers_take_the_xla_update_and_say_so():
    for tx in (ADAGRAD, mpembed.optim.sgd(0.1)):
        assert mpembed.optim.rule_of(tx) is not None
    for tx in (
        optax.sgd(0.1, momentum=0.9),
        optax.chain(ADAGRAD),
        mpembed.optim.rowwise_adagrad(0.1, weight_decay=0.1),
    ):
        assert mpembed.optim.rule_of(tx) is None
    step, arguments = step_and_arguments(
        "pallas_triton", "vectors", tx=optax.sgd(0.1, momentum=0.9)
    )
    lowered = lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
    # Rows are still stored by the kernel; only the arithmetic is XLA's.
    assert "mpembed_update" in lowering.kernels(lowered.as_text())


class Sizes(NamedTuple):
    """Rows of a table and lines of its cache."""

    num_rows: int
    lines: int


SIZES = {
    "table": Sizes(100_000_000, 1024),
    "lines": Sizes(10_000_000, 10_000_000),
    "none": Sizes(3000, 256),
}


@pytest.mark.parametrize("sizes", named(SIZES, core={"table", "lines"}))
def test_arrays_past_32_bits_are_addressed_with_64(sizes):
    """100 M packed rows of 33 words are 3.3e9 elements, 10 M lines of 128 floats 5.1 GB.

    3,000 rows need none of it.
    """
    num_rows, lines = sizes
    spec = shapes.stack(num_rows, 128, storage="int8", lines=lines)
    widths = {}
    for is_pooled in (False, True):
        step, arguments = step_and_arguments(
            "pallas_triton", "vectors", spec=spec, is_pooled=is_pooled
        )
        widths |= lowering.address_widths(
            lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
        )
    read = lowering.lowered_for("cuda", mpembed.read, arguments[0], arguments[1])
    widths |= lowering.address_widths(read)
    moving_rows = {
        "mpembed_read",
        "mpembed_swap",
        "mpembed_lookup",
        "mpembed_bring",
        "mpembed_update",
        "mpembed_update_summed",
    }
    assert set(widths) == moving_rows | {"mpembed_sum"} | PLANNING
    moving_rows = moving_rows if num_rows > 3000 else set()
    assert {name for name, count in widths.items() if count["i64"]} == moving_rows


@pytest.mark.slow
def test_kernels_have_no_atomics():
    """Every row is written by one program.

    Results do not depend on the order in which programs run.
    """
    modules = {}
    for is_pooled in (False, True):
        step, arguments = step_and_arguments("pallas_triton", "weighted mean", is_pooled=is_pooled)
        modules |= lowering.kernel_modules(
            lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
        )
    modules |= lowering.kernel_modules(
        lowering.lowered_for("cuda", mpembed.read, arguments[0], arguments[1])
    )
    step, arguments = step_and_arguments("pallas_triton", "vectors", spec=RAW_IDS)
    modules |= lowering.kernel_modules(
        lowering.lowered_for("cuda", step, *arguments, donate_argnums=0)
    )
    assert set(modules) == PLANNING | OF_RAW_IDS | {
        f"mpembed_{x}"
        for x in ("read", "swap", "lookup", "bring", "update", "update_summed", "bag", "sum")
    }
    assert all("tt.store" in text and "atomic" not in text for text in modules.values())
    # A thread must not store what another one has yet to read: victims before newcomers, old sums
    # of squares before new, tags of rows that start again. In the plan, and when ids are admitted,
    # it must not read what another one has yet to store.
    waiting = {name for name, text in modules.items() if "gpu.barrier" in text}
    assert waiting == {
        f"mpembed_{x}"
        for x in ("plan", "admit", "start_again", "swap", "bring", "update", "update_summed")
    }


DEVICES = {
    "cpu": types.SimpleNamespace(platform="cpu", device_kind="cpu"),
    "tpu": types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"),
    "T4": types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5"),
    "MI300": types.SimpleNamespace(
        platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942"
    ),
    "L4": types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9"),
    "H200": types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0"
    ),
    "B200": types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0"
    ),
}


@pytest.mark.parametrize("name", DEVICES)
def test_the_choice_follows_the_device_and_its_compute_capability(name, monkeypatch):
    """None is plain XLA on every accelerator.

    Kernels named where they cannot run are refused before anything is traced.
    """
    monkeypatch.setattr(jax, "local_devices", lambda: [DEVICES[name]])
    monkeypatch.setattr(jax, "default_backend", lambda: DEVICES[name].platform)
    assert ops.choose("xla") == "xla"
    assert ops.choose(None) == ("xla" if name != "cpu" else BEST_ON_CPU)
    if name in ("L4", "H200", "B200"):
        assert ops.choose("pallas_triton") == "pallas_triton"
    else:
        with pytest.raises(
            ValueError,
            match=f"compute capability 8.0 or more, this device is {DEVICES[name].device_kind}",
        ):
            ops.choose("pallas_triton")


def test_the_choice_is_made_once_at_init_and_never_by_failing():
    spec = shapes.stack(100, 4, lines=8)
    with pytest.raises(ValueError, match=r"pallas_triton needs an NVIDIA GPU.*this device is cpu"):
        mpembed.init(jax.random.key(0), spec, ADAGRAD, implementation="pallas_triton")
    with pytest.raises(
        ValueError, match="unknown implementation 'cuda'; choose one of xla, xla_chunked"
    ):
        mpembed.init(jax.random.key(0), spec, ADAGRAD, implementation="cuda")
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        mpembed.pool(jnp.zeros((3, 2)), jnp.zeros(4, jnp.int32), implementation="cuda")
    assert (
        mpembed.init(jax.random.key(0), spec, ADAGRAD).implementation
        == ops.choose(None)
        == BEST_ON_CPU
    )
