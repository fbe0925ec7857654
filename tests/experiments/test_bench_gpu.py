"""The GPU benchmark runs as it is, tiny and interpreted; its floors count what they say."""

import ast
import gzip
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.gpu import bench_gpu, checks, parts, roofline, steps
from experiments.speed import step, workload

MODULES = [
    command_line, bench_gpu, checks, parts, steps, roofline, workload, step, provenance, running
]  # fmt: skip
TINY = steps.Bench(is_tiny=True, bandwidth=1e9)


@pytest.mark.exhaustive
def test_the_kernels_part_and_a_step_run_tiny():
    """The whole command runs a step and the parts without one below, and compares kernels in
    tests/ops.
    """
    checked = list(bench_gpu.rows_of("kernels against xla", TINY))
    assert [(row["is_pooled"], row["rule"]) for row in checked] == [
        (False, "sgd"), (False, "adagrad"), (False, "momentum"), (True, "sgd"), (True, "adagrad")
    ]  # fmt: skip
    for row in checked:
        assert row["largest_difference"] <= (1e-6 if row["rule"] == "adagrad" else 0), row
        assert row["rule"] == "adagrad" or row["unequal_elements"] == {}
        assert row["passed"] and row["bound"] == (1e-6 if row["rule"] == "adagrad" else 0)
    assert {row["implementation"] for row in checked} == {"pallas_interpret"}
    by_kernels, by_xla = bench_gpu.rows_of("step", TINY)
    assert set(by_kernels["verbs"]) == {
        "prefetch",
        "lookup",
        "pool",
        "row gradients",
        "apply_gradients",
    }
    assert by_xla["implementation"] == "xla" and "verbs" not in by_xla
    for name, count in (("host memory", 4), ("host tables against device", 1)):
        found = list(bench_gpu.rows_of(name, TINY))
        assert len(found) == count and not [
            row for row in found if "error" in row or row.get("unequal_elements")
        ]
    (pooled,) = bench_gpu.rows_of("step, pooled gradients", TINY)
    assert set(pooled["verbs"]) == {"embed", "apply_pooled_gradients"}
    rows = list(bench_gpu.rows_of("step, float32 without cache", TINY))
    assert len(rows) == 2
    for row in bench_gpu.rows_of("gather alone", TINY):
        assert row["floor_milliseconds"] == pytest.approx(100 * (4 + 10 + 4 * 8) / 1e9 * 1e3)
    for row in bench_gpu.rows_of("bags alone", TINY):
        assert (
            row["bags"]["floor_milliseconds"]
            == (4 * 8 * (row["rows"] + 16) + 4 * 16 * 26) / 1e9 * 1e3
        )
        assert row["gradients"]["times_floor"] > 0
    for row in rows:
        assert row["times_floor"] == pytest.approx(row["milliseconds"] / row["floor_milliseconds"])
        assert row["counts"]["unique"] > 0


@pytest.mark.slow
def test_a_step_is_compiled_from_shapes_and_its_program_is_kept(tmp_path):
    """The compiled step takes the state that init makes. It returns the vectors, unsummed."""
    bench = TINY._replace(programs=tmp_path / "programs")
    run = steps.Case(8, 8, rows=40_000, is_pooled=True), bench.kernels
    compiled = steps.compiled_steps(bench, [run])
    row = steps.measured(bench, *run, by_verb=False, compiled=compiled[run])
    assert "error" not in row and row["compile_seconds"] > 0 and row["counts"]["unique"] > 0
    (path,) = bench.programs.iterdir()
    text = gzip.decompress(path.read_bytes()).decode()
    assert re.search(r"->\s*\(.*f32\[8,26,8\]", text)


def test_parts_without_a_step_run_tiny():
    names = [row["name"] for row in bench_gpu.rows_of("primitives", TINY)]
    assert names == ["sort of pairs", "running sum", "scatter", "gather"]


@pytest.mark.slow
def test_a_profile_tells_what_ran_by_its_time():
    rows = list(bench_gpu.rows_of("profile", TINY))
    times = [row["microseconds"] for row in rows]
    assert times[0] > 0 and times == sorted(times, reverse=True)


def test_bits_that_differ_are_counted_by_name():
    nan = np.float32(np.nan)
    one = {"a": np.array([1, nan, 0], np.float32), "b": np.arange(3)}
    assert checks.differences(one, one) == {}
    assert checks.differences(one, {"a": np.array([1, 2, 5], np.float32), "b": np.arange(3)}) == {
        "['a']": 2
    }


def test_only_floats_may_differ_and_only_by_little():
    floats = np.array([1, np.nan, 4], np.float32)
    one = {"rows": floats, "tags": np.arange(3)}
    assert checks.largest_difference(one, one) == 0
    near = one | {"rows": floats + np.float32(0.5)}
    assert checks.largest_difference(one, near) == 0.5 / 4
    for wrong in (
        {"tags": np.array([0, 1, 3])},
        {"rows": np.array([1, 0, 4], np.float32)},
        {"rows": np.array([1, np.nan, np.inf], np.float32)},
    ):
        assert checks.largest_difference(one, one | wrong) == np.inf


def test_targets_are_reached_or_not_or_were_not_measured():
    step = {"dim": 64, "batch": 65536, "milliseconds": 1.0, "times_floor": 1.5}
    spilled = {"dim": 64, "batch": 16384, "milliseconds": 3.0}
    parts = {
        "step": [step, step | {"dim": 128, "milliseconds": 2.0, "times_floor": 2.5}],
        "step, pooled gradients": [step | {"milliseconds": 0.8}, {"dim": 64, "error": "raised"}],
        "torch sparse": [{"dim": 64, "milliseconds": 2.0}, {"dim": 128, "milliseconds": 2.0}],
        "host memory": [
            spilled | {"storage": "int8", "memory_kind": None, "fraction": 0.05},
            spilled | {"storage": "float32", "memory_kind": "pinned_host", "fraction": None},
        ],
    }
    found = bench_gpu.targets_of(parts)
    assert [(row["value"], row["passed"]) for row in found] == [
        (1.5, True), (0.4, True), (2.5, False), (1.0, False), (None, None), (1.0, False)
    ]  # fmt: skip
    assert {row["passed"] for row in bench_gpu.targets_of({})} == {None}


@pytest.mark.slow
def test_a_part_that_fails_costs_no_other_its_results(tmp_path, monkeypatch):
    """One raises inside its process, one is ended for taking too long, one would begin too late.

    All is in the file.
    """
    out = tmp_path / "bench.json"
    monkeypatch.setitem(bench_gpu.PARTS, "step", bench_gpu.PARTS["step"]._replace(limit=0.2))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    written = bench_gpu.run(bench_gpu.Settings(interpret=True, out=out, parts=("step",)))
    assert json.loads(out.read_text()) == written and written["is_smoke_test"]
    assert written["parts"]["copy bandwidth"][0]["bytes_per_second"] > 0
    assert written["parts"]["step"][-1]["error"] == "ended after 0.2 seconds"
    rows = list(
        bench_gpu.rows_of("step", TINY._replace(bandwidth=0.0))
    )  # divided by: both cases raise, and both are tried
    assert [row["implementation"] for row in rows] == ["pallas_interpret", "xla"]
    assert all(
        "ZeroDivisionError" in row["error"] and "measure_step" in row["where"] for row in rows
    )


def test_what_does_not_fit_the_budget_is_named(tmp_path):
    out = tmp_path / "bench.json"
    written = bench_gpu.run(bench_gpu.Settings(interpret=True, budget=0, out=out))
    assert set(written["left_out"]) == set(bench_gpu.PARTS)
    assert not any(written["parts"].values()) and json.loads(out.read_text()) == written


@pytest.mark.parametrize("words", [[], ["--part", "copy bandwidth"]])
def test_without_a_gpu_it_says_what_to_do(words, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench_gpu.main([*words, "--out", str(out)]) == 2
    assert re.search(r"a GPU is needed.*--interpret", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.slow
def test_importing_it_loads_nothing_that_a_plain_checkout_lacks():
    code = "import sys; from experiments.gpu import bench_gpu; "
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=provenance.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "optax" in loaded.stdout.split()
    assert not {*loaded.stdout.split()} & {
        "flax",
        "matplotlib",
        "numba",
        "polars",
        "rich",
        "sklearn",
        "torch",
    }


@pytest.mark.parametrize("module", MODULES)
def test_it_imports_nothing_that_a_plain_checkout_lacks(module):
    """jax, numpy, the standard library and this repository; torch where it is installed."""
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {
        "experiments",
        "experiments.gpu",
        "experiments.speed",
        *(module.__name__ for module in MODULES),
    }
    allowed = {"jax", "numpy", "optax", "torch", "mpembed_jax"} | sys.stdlib_module_names
    assert not [n for n in names if n.split(".")[0] not in allowed and n not in ours]


def test_the_floor_of_a_step_by_hand():
    """10 positions, 6 unique rows of D = 16: 5 cached, 2 of them new, 1 written back.

    INT8 rows of 18 bytes.
    """
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("t", 1000)], 16, "int8", mpembed.CacheSpec(num_rows=64, ways=8)
    )
    work = roofline.Work.of(spec, 10, {"unique": 6, "bypasses": 1, "hits": 3, "write_backs": 1})
    assert work.by_verb() == {
        "prefetch": 8 * 10 + 6 * (4 * 8 + 16 + 8) + 3 * (64 + 18),
        "lookup": 5 * 64 + 18 + 6 * 64,
        "pool": (6 + 10) * 64 + 40,
        "row gradients": (6 + 10) * 64 + 40,
        "apply_gradients": 6 * (128 + 16) + 5 * 64 + 18,
    }
    assert work.step == sum(work.by_verb().values())
    pooled = work.by_verb(is_pooled=True)
    assert pooled.pop("apply_pooled_gradients") == 10 * 64 + 40 + 6 * (64 + 16) + 5 * 64 + 18
    assert pooled == {"embed": sum(work.by_verb()[v] for v in ("prefetch", "lookup", "pool"))}
