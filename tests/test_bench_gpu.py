"""The GPU benchmark runs as it is, tiny and interpreted; its floors count what they say."""

import ast
import json
import pathlib
import sys

import pytest

import mpembed_jax as mpembed
from experiments import bench_gpu, roofline, workload


def test_the_kernels_part_and_a_step_run_tiny(tmp_path):
    out = tmp_path / "bench.json"
    parts = ["kernels against xla", "step, float32 without cache"]
    written = bench_gpu.main(["--interpret", "--out", str(out), "--parts", *parts])
    assert json.loads(out.read_text()) == written
    assert written["device"]["is_smoke_test"]
    found = written["parts"]
    assert not [row for rows in found.values() for row in rows if "error" in row], found
    assert {row["unequal_arrays"] for row in found["kernels against xla"]} == {0}
    for row in found["step, float32 without cache"]:
        assert row["times_floor"] == pytest.approx(row["milliseconds"] / row["floor_milliseconds"])
        assert row["counts"]["unique"] > 0


def test_what_does_not_fit_the_budget_is_named(tmp_path):
    out = tmp_path / "bench.json"
    written = bench_gpu.main(["--interpret", "--budget", "0", "--out", str(out)])
    assert set(written["left_out"]) == set(bench_gpu.PARTS)
    assert not any(written["parts"].values())


def test_without_a_gpu_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("module", [bench_gpu, roofline, workload])
def test_it_imports_nothing_that_a_plain_checkout_lacks(module):
    """jax, numpy, the standard library and this repository; torch where it is installed."""
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    allowed = {"jax", "numpy", "torch", "mpembed_jax"} | sys.stdlib_module_names
    assert not [n for n in names if n.split(".")[0] not in allowed and n != "experiments"]


def test_the_floor_of_a_step_by_hand():
    """10 positions, 6 unique rows of D = 16: 5 cached, 2 of them new, 1 written back; INT8 rows of 18 bytes."""
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 1000)], 16, "int8", mpembed.CacheSpec(num_rows=64, ways=8))
    work = roofline.Work.of(spec, 10, {"unique": 6, "bypasses": 1, "hits": 3, "write_backs": 1})
    assert work.by_verb() == {
        "prefetch": 8 * 10 + 6 * (4 * 8 + 16 + 8) + 3 * (64 + 18),
        "lookup": 5 * 64 + 18 + 6 * 64,
        "pool": (6 + 10) * 64 + 40,
        "row gradients": (6 + 10) * 64 + 40,
        "apply_gradients": 6 * (128 + 16) + 5 * 64 + 18,
    }
    assert work.step == sum(work.by_verb().values())
