"""The report of a spec equals the arrays of its live state, byte for byte.

It says what float32 would take. The peak that it predicts is that of a training step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import peaks
import pytest
from cases import named

import mpembed_jax as mpembed
from mpembed_jax import CacheSpec

TABLES = (mpembed.TableSpec("a", 4_000), mpembed.TableSpec("b", 7))


class Case(NamedTuple):
    """A dim, a cache and a row optimizer; its name is the dim."""

    dim: int
    cache: CacheSpec | None
    tx: Any

    @property
    def name(self):
        return str(self.dim)


def live(spec, tx):
    return mpembed.init(jax.random.key(0), spec, tx)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "storage",
    named(
        ["float32", "bfloat16", "float8_e4m3fn", "int8", "int4", "int2"], fast={"float32", "int4"}
    ),
)
@pytest.mark.parametrize(
    "case",
    named([
        Case(16, CacheSpec(0.05), mpembed.optim.rowwise_adagrad(0.1)),
        Case(7, CacheSpec(0.3, policy="lru"), mpembed.optim.rowwise_adam(0.1)),
        Case(64, None, mpembed.optim.rowwise_adagrad(0.1)),
    ]),
)  # fmt: skip
def test_the_report_is_the_sum_of_the_live_arrays(storage, case):
    dim, cache, tx = case
    dtype = "bfloat16" if storage == "int4" else "float32"
    spec = mpembed.EmbeddingSpec(TABLES, dim, storage, cache, row_state_dtype=dtype)
    report, state = mpembed.memory.report(spec, tx), live(spec, tx)
    assert report.total == sum(report.components.values()) == nbytes(state)
    assert (
        report.components["table"]
        == state.table.rows.nbytes
        == spec.num_rows * spec.storage.row_bytes(dim)
    )
    assert report.components["row state"] == nbytes(state.row_state)
    if cache is None:
        assert report.geometry is None
        assert report.components["cache rows"] == report.components["sketch"] == 0
    else:
        assert report.geometry == state.cache.geometry
        assert report.components["cache rows"] == 4 * dim * report.geometry.lines
        assert report.components["cache metadata"] == 9 * report.geometry.lines
        assert report.components["sketch"] == (
            8 * report.geometry.lines if cache.policy == "lfu" else 0
        )


def test_ratios_count_the_optimizer_on_both_sides():
    spec = mpembed.EmbeddingSpec(TABLES, 16, "int8", None)
    report = mpembed.memory.report(spec, mpembed.optim.rowwise_adagrad(0.1))
    without = report.total - report.components["row state"]
    assert report.float32_bytes == 4 * 16 * 4_007
    assert report.ratio == report.float32_bytes / without
    assert report.ratio_with_row_state == (4 * 16 * 4_007 + 4 * 4_007) / report.total
    assert report.bytes_per_row == without / 4_007


def test_the_peak_holds_the_state_once_and_the_batch():
    spec = mpembed.EmbeddingSpec(mpembed.TableSpec("a", 300_000), 16)
    tx = mpembed.optim.rowwise_adagrad(0.1)
    report = mpembed.memory.report(spec, tx, batch_shape=(64, 4))
    batch = 64 * 4 * (16 + 1) * 4
    assert report.total + batch <= report.step_peak_bytes < report.total + 40 * batch
    empty = mpembed.memory.report(spec, tx, batch_shape=(0, 4))
    assert empty.total == report.total <= empty.step_peak_bytes < report.step_peak_bytes
    text = str(report)
    assert f"{report.total:,} B" in text
    assert f"{report.geometry.lines:,} lines" in text
    assert f"{report.ratio:.2f}x without" in text


class Batch(NamedTuple):
    """The shape of a batch's ids, and what they are trained with."""

    shape: tuple[int, ...]
    implementation: str
    cache: CacheSpec | None = CacheSpec(0.05)
    tx: Any = mpembed.optim.rowwise_adagrad(0.1)


BATCHES = {
    "ids, numba": Batch((2048, 2), "numba"),
    "bags, numba": Batch((512, 2, 20), "numba"),
    "bags, numba, no cache": Batch((512, 2, 20), "numba", cache=None),
    "bags, numba, no rule": Batch((512, 2, 20), "numba", tx=mpembed.optim.rowwise_adam(0.1)),
    "ids, xla": Batch((2048, 2), "xla"),
    "bags, xla": Batch((512, 2, 20), "xla"),
    "bags, xla, no rule": Batch((512, 2, 20), "xla", tx=mpembed.optim.rowwise_adam(0.1)),
    "bags, chunks": Batch((512, 2, 20), "xla_chunked"),
}


@pytest.mark.parametrize(
    "batch",
    named(
        BATCHES,
        fast={"ids, numba", "bags, numba"},
        core={*BATCHES} - {"ids, xla", "bags, xla", "bags, xla, no rule", "bags, chunks"},
    ),
)
def test_the_temporaries_are_those_of_a_training_step(batch):
    if batch.implementation == "numba":
        pytest.importorskip("numba")
    spec = mpembed.EmbeddingSpec(TABLES, 32, "int8", batch.cache)
    report = mpembed.memory.report(spec, batch.tx, batch.shape, implementation=batch.implementation)
    measured = peaks.of_training([spec], batch.tx, batch.shape, batch.implementation)
    assert report.step_peak_bytes - report.total == pytest.approx(measured - report.total, rel=0.1)


class OverMesh(NamedTuple):
    """How a stack lies over four devices, and the shape of the ids of its batches."""

    placement: mpembed.Placement
    shape: tuple[int, ...]
    tx: Any = mpembed.optim.rowwise_adagrad(0.1)


OVER_MESHES = {
    "ids": OverMesh(mpembed.Placement("rows"), (2048, 2)),
    "bags": OverMesh(mpembed.Placement("rows"), (512, 2, 20)),
    "bags, blocks": OverMesh(mpembed.Placement("rows", summation_blocks=8), (512, 2, 20)),
    "bags, copies": OverMesh(mpembed.Placement("replicated"), (512, 2, 20)),
    "bags, tables": OverMesh(mpembed.Placement("tables"), (512, 2, 20)),
    "bags, no rule": OverMesh(
        mpembed.Placement("rows"), (512, 2, 20), mpembed.optim.rowwise_adam(0.1)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("over", named(OVER_MESHES, fast={"bags"}, core={"ids", "bags, copies"}))
def test_over_a_mesh_the_report_is_that_of_each_device(over):
    """Its total is the bytes of the live arrays there; its peak is that of a training step."""
    spec = mpembed.EmbeddingSpec(TABLES, 32, "int8", CacheSpec(0.3))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = {"mesh": mesh, "placement": over.placement}
    report = mpembed.memory.report(spec, over.tx, over.shape, **where)
    state = mpembed.init(jax.random.key(0), spec, over.tx, **where)
    for device in mesh.devices:
        held = [s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards]
        assert report.total == sum(s.data.nbytes for s in held if s.device == device)
    assert report.num_rows == state.layout.num_rows
    measured = peaks.of_training(
        [spec], over.tx, over.shape, mesh=mesh, placements=[over.placement]
    )
    assert report.step_peak_bytes - report.total == pytest.approx(measured - report.total, rel=0.1)


def test_the_step_of_a_stack_that_takes_pairs_is_not_predicted():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tables = [mpembed.TableSpec(name, 2_000_000_000) for name in "ab"]
    spec, tx = mpembed.EmbeddingSpec(tables, 16), mpembed.optim.rowwise_adagrad(0.1)
    with pytest.raises(ValueError, match="a step of a stack of 4000000000 rows takes pairs"):
        mpembed.memory.report(spec, tx, (64, 2), mesh=mesh)


def test_a_mesh_whose_devices_do_not_exist_has_bytes_but_no_peak():
    spec = mpembed.EmbeddingSpec(mpembed.TableSpec("a", 64_000), 32, cache=None)
    abstract = jax.sharding.AbstractMesh((64,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = mpembed.optim.rowwise_adagrad(0.1)
    report = mpembed.memory.report(spec, tx, mesh=abstract)
    assert report.num_rows == 1000 and f"{report.num_rows:,} rows" in str(report)
    with pytest.raises(ValueError, match=r"batch_shape=\(64, 1\) is compiled .* abstract"):
        mpembed.memory.report(spec, tx, (64, 1), mesh=abstract)
    hosted = dataclasses.replace(spec, memory_kind="pinned_host")
    with pytest.raises(ValueError, match="tables in device memory"):
        mpembed.memory.report(hosted, tx, mesh=abstract)
