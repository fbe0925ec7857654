"""The paper's grid resumes, pairs and counts bytes.

Its baselines do the mathematics they are named after.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import named
from scipy import stats
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

import mpembed_jax as mpembed
from experiments.accuracy import (
    baselines,
    grid,
    intervals,
    paper_report,
    paper_runs,
    paper_table,
    records,
)
from experiments.accuracy.grid import FP32, Case
from experiments.data import synthetic
from experiments.dlrm import stacks, training

ROOT = Path(__file__).resolve().parents[2]


def small(tmp_path, **changes):
    settings = {
        "num_rows": 7_000,
        "scale": 0.001,
        "batch_size": 256,
        "hidden": (16, 8),
        "dims": (4,),
        "seeds": (0,),
    }
    return paper_table.Settings(out=tmp_path, **{**settings, **changes})


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "paper_table.jsonl").read_text().splitlines()]


# --- the grid


def test_names_and_settings_of_cases_are_distinct():
    cases = grid.full(64)
    assert len(cases) == len({c.name for c in cases}) > 250
    keys = {
        records.key_of(paper_runs.depends_on({}, training.Recipe(), c, s))
        for c in cases
        for s in (0, 1)
    }
    assert len(keys) == 2 * len(cases)
    assert all(
        len(set(cs)) == len(cs) and cs[0] == FP32
        for cs in (grid.headline(16), grid.headline(64), grid.raw(16), cases)
    )
    assert len({c.name for c in grid.raw(16)}) == len(grid.raw(16))


def test_the_full_grid_is_the_product_it_says():
    cases = {
        c for c in grid.full(16) if c.method == "trained" and c.storage == "int4" and not c.small
    }
    assert (
        len(cases) == 2 + 5 * 2 * 2 * 2
    )  # no cache: two roundings; five sizes x policies x roundings x ways
    chosen = grid.choose(
        grid.full(16), storage=["int4"], cache=[0.01], ways=[1], method=["trained"]
    )
    assert [c.small for c in chosen] == [0.0] * 5 and chosen[0] == FP32
    with pytest.raises(ValueError, match="no case of the grid has"):
        grid.choose(grid.full(16), cache=[0.33])


def test_a_field_added_later_does_not_change_the_key_of_older_runs():
    recipe = training.Recipe()
    assert paper_runs.depends_on({"name": "x"}, recipe, FP32, 3) == {
        "data": {"name": "x"}, "recipe": {}, "case": {}, "seed": 3,
    }  # fmt: skip
    assert paper_runs.depends_on({}, recipe, Case("int4", 0.01), 0)["case"] == {
        "storage": "int4",
        "cache": 0.01,
    }


def test_a_pool_has_a_row_for_each_id_that_occurs_often_enough():
    source = synthetic.CriteoTwin(num_rows=7_000, scale=0.001)
    bench = paper_runs.Workbench(source, training.Recipe(embedding_dim=4, batch_size=256))
    counts = {name: np.zeros(size, int) for name, size in source.tables.items()}
    for batch in source.train(256, 0):
        for name, ids in zip(source.tables, np.asarray(batch["ids"]).T, strict=True):
            np.add.at(counts[name], ids, 1)
    for times in (1, 3):
        case = Case("int4", 0.05, admit_after=times)
        num = sum(int((of >= times).sum()) for of in counts.values())
        contender = bench.contender_of(case)
        assert contender.pool_rows == math.ceil(1.1 * num)
        assert contender.admit_after == times
        assert case.name == case.family.replace("INT4", "INT4 + 5 %")
    case = Case("int4", 0.05, admit_after=2, pool=0.25)
    assert bench.contender_of(case).pool_rows == round(0.25 * sum(source.tables.values()))
    assert case.name == "INT4 + 5 %, a row from 2 on, pool of 25 %"
    assert case.family == "INT4, a row from 2 on, small pools"


@OPTAX_ADAM
@pytest.mark.exhaustive
def test_raw_ids_are_cases_of_the_grid_and_their_vocabulary_is_counted(tmp_path):
    """The whole command runs cases of the grid below, and trains raw ids in
    test_the_main_job_trains_on_raw_ids_of_movielens of test_movielens.py.
    """
    settings = {"grid": "raw", "storage": ("int8",), "method": ("trained",)}
    paper_table.run(small(tmp_path, **settings))
    bytes_of = {line["name"]: line["outcome"]["bytes_per_row"] for line in lines(tmp_path)}
    assert bytes_of.keys() >= {"FP32", "INT8 + 5 %"} and len(bytes_of) == 2 + 4
    assert bytes_of["INT8 + 5 %, a row from 1 on"] > bytes_of["INT8 + 5 %, a row from 5 on"]
    assert bytes_of["INT8 + 5 %, a row from 5 on"] < bytes_of["INT8 + 5 %"]


# --- the file of finished runs


def test_a_line_cut_short_is_removed_and_any_other_damage_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert records.load(path) == {}
    for number in range(3):
        records.append(path, {"key": str(number), "value": number})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "3", "val')
    assert list(records.load(path)) == ["0", "1", "2"]
    assert path.read_bytes() == whole
    records.append(path, {"key": "3"})
    assert list(records.load(path)) == ["0", "1", "2", "3"]
    path.write_bytes(whole[:30] + b"\n" + whole[30:])
    with pytest.raises(ValueError, match=r"runs\.jsonl:2: not a record"):
        records.load(path)


def test_the_key_is_of_the_content():
    assert (
        records.key_of({"a": 1, "b": [2]})
        == records.key_of({"b": [2], "a": 1})
        != records.key_of({"a": 1, "b": [3]})
    )


# --- intervals


def test_intervals_are_students_and_cover():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        found = intervals.interval(rng.normal(1.0, 2.0, 5))
        covered += abs(found.mean - 1.0) <= found.half
    assert (
        abs(covered / 2000 - 0.95) < 0.015
    )  # three standard errors of a share of .95 over 2,000 are .0146
    values = [0.1, 0.3, 0.2]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = intervals.interval(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert (
        math.isnan(intervals.interval([1.0]).half) and not intervals.interval([1.0]).excludes_zero
    )
    with pytest.raises(ValueError, match="at least one"):
        intervals.interval([])


def test_pairs_are_by_seed():
    found = intervals.paired({0: 1.5, 1: 2.5, 7: 9.0}, {1: 2.0, 0: 1.0, 5: 0.0})
    assert found == (0.5, 0.0, 2) and found.excludes_zero
    with pytest.raises(ValueError, match="no seed in common"):
        intervals.paired({0: 1.0}, {1: 1.0})


def test_bytes_needed():
    points = [(64.0, 0.0), (16.0, -0.001), (32.0, -0.0004), (8.0, -0.01)]
    needed = intervals.bytes_needed(points, 0.0007)
    assert needed.relation == "=" and needed.bytes_per_row == pytest.approx(2**4.5)
    assert intervals.bytes_needed(points, 0.1) == (8.0, "<=")
    assert intervals.bytes_needed(points[1:], 0.0001) == (32.0, ">")
    assert intervals.bytes_needed([(8.0, math.nan), (16.0, 0.0)], 0.1) == (16.0, "<=")
    # A method that is good, bad, then good again needs the bytes beyond its last failure.
    assert intervals.bytes_needed([(8.0, 0.0), (16.0, -1.0), (32.0, 1.0)], 0.5).bytes_per_row > 16


# --- baselines


class Tiny:
    """Two tables of 4 and 3 ids, ids as an array or as a dictionary with a bag."""

    name, num_dense, bags, num_train, num_test = "tiny", 0, (), 4, 4

    def __init__(self, as_dict=False):
        self.as_dict, self.bags, self.tables = as_dict, ("b",) if as_dict else (), {"a": 4, "b": 3}

    def train(self, batch_size, seed=0, start=0, num_epochs=1):
        a, b = np.array([3, 3, 1, 0], np.int32), np.array([2, 2, 2, 0], np.int32)
        ids = np.stack([a, b], axis=1)
        if self.as_dict:
            ids = {
                "a": a,
                "b": np.stack([b, [mpembed.NO_ID, 2, 0, mpembed.NO_ID]], axis=1).astype(np.int32),
            }
        yield {"dense": np.zeros((4, 0), np.float32), "ids": ids, "label": np.zeros(4, np.float32)}

    test = train


def test_pruning_keeps_the_most_frequent_ids_and_maps_the_rest_to_one_row():
    counts = baselines.count_ids(Tiny(), 4)
    assert {k: v.tolist() for k, v in counts.items()} == {"a": [1, 1, 0, 2], "b": [1, 0, 3]}
    pruned = baselines.Pruned(Tiny(), counts, 3)
    assert pruned.tables == {"a": 3, "b": 2}  # kept: a3, b2 and, of those that tie, a0
    [batch] = pruned.train(4)
    assert batch["ids"].tolist() == [[1, 0], [1, 0], [2, 0], [0, 1]]
    with_bags = Tiny(as_dict=True)
    counts = baselines.count_ids(with_bags, 4)
    assert counts["b"].tolist() == [2, 0, 4]
    [batch] = baselines.Pruned(with_bags, counts, 2).test(4)
    no_id = mpembed.NO_ID
    assert batch["ids"]["a"].tolist() == [0, 0, 1, 1] and batch["ids"]["b"].tolist() == [
        [0, no_id],
        [0, 0],
        [0, 1],
        [1, no_id],
    ]


def test_pruned_rows_fill_their_share_with_the_index_counted():
    for share in (0.5, 0.2):
        num_kept = baselines.rows_to_keep(100_000, 26, 16, share)
        total = (num_kept + 26) * 64 + baselines.index_bytes(100_000)
        assert 0 <= share * 6_400_000 - total < 64
    assert baselines.index_bytes(512) == 64 + 4 and baselines.rows_to_keep(1000, 26, 16, 0.001) == 0


def test_fake_quantization_rounds_clips_and_passes_gradients_straight_through():
    rows, scale = jnp.array([[0.14, -0.26, 9.0], [0.0, 1.0, -3.0]]), jnp.array([0.1, 1.0])
    np.testing.assert_allclose(
        baselines.fake_quantize(rows, scale), [[0.1, -0.3, 0.7], [0, 1, -3]], rtol=1e-5
    )
    upstream = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    grads = jax.grad(lambda r: jnp.sum(baselines.fake_quantize(r, scale) * upstream))(rows)
    np.testing.assert_array_equal(grads, upstream)


@pytest.mark.slow
@OPTAX_ADAM
def test_scales_are_the_absmax_of_each_table_and_are_refreshed_on_time():
    source, recipe = synthetic.CriteoTwin(7_000, 0.001), training.Recipe(4, 256, hidden=(16, 8))
    refreshed, view = [], baselines.quantization_aware(source.tables, period=5)

    def refresh(learner):
        learner = view.refresh(learner)
        dense = mpembed.to_dense(learner.emb[0])
        want = [np.abs(dense[name]).max() / 7 for name in source.tables]
        np.testing.assert_allclose(learner.extra, want, rtol=1e-6)
        refreshed.append(int(learner.emb[0].step))
        return learner

    job = training.make_job(source, recipe, view._replace(refresh=refresh))
    [fitted] = training.fit(
        source, [FP32.contender()], recipe, job, seed=0, on_chunk=lambda *_: None
    )
    assert fitted.num_steps == 6000 // 256 and refreshed == [0, 5, 10, 15, 20, 23]
    # What is predicted with is on the grid of the table, 15 levels at most.
    ids = jnp.arange(source.tables["C5"]) + sum(list(source.tables.values())[:4])
    seen = view.see(fitted.learner, mpembed.read(fitted.learner.emb[0], ids), ids)
    codes = np.asarray(seen / fitted.learner.extra[4])
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert np.abs(codes).max() == pytest.approx(7, abs=1e-4) and len(np.unique(np.round(codes))) > 3
    assert (
        np.abs(fitted.learner.extra[4] * 7 - np.abs(mpembed.read(fitted.learner.emb[0], ids)).max())
        < 1e-6
    )


@pytest.mark.slow
def test_post_training_quantization_is_the_nearest_row_of_the_format():
    tables = (mpembed.TableSpec("a", 50), mpembed.TableSpec("b", 7))
    spec, tx = mpembed.EmbeddingSpec(tables, 8, "float32", None), optax.sgd(0.1)
    state = mpembed.init(jax.random.key(0), spec, tx)
    after = baselines.quantize_after(state, "int4", tx)
    assert after.spec.storage.name == "int4" and after.spec.cache is None and after.cache is None
    ids = jnp.arange(57)
    want = mpembed.decode(
        mpembed.encode(mpembed.read(state, ids), after.spec.storage), after.spec.storage, 8
    )
    np.testing.assert_array_equal(mpembed.read(after, ids), want)


def test_served_bytes_of_quantization_aware_training():
    assert baselines.int4_served_bytes({"a": 10, "b": 5}, 16) == 15 * 8 + 2 * 4
    assert baselines.int4_served_bytes({"a": 10}, 7) == 10 * 4 + 4


# --- small tables in FP32


def test_the_smallest_tables_fill_their_share():
    tables = {"a": 10, "b": 1, "c": 900, "d": 89}
    assert stacks.smallest(tables, 0.011) == {"a", "b"} and stacks.smallest(tables, 0.0109) == {"b"}
    assert stacks.smallest(tables, 0.0) == set() and stacks.smallest(tables, 1.0) == set(tables)


@pytest.mark.slow
@OPTAX_ADAM
@pytest.mark.parametrize("as_dict", named([False, True], fast={"True"}, core=()))
def test_two_stacks_of_fp32_train_as_one(as_dict):
    """Initial values and the order of vectors agree. The order of float additions may differ."""

    class Source(Tiny):
        num_train, num_test = 64, 64

        def train(self, batch_size, seed=0, start=0, num_epochs=1):
            rng = np.random.default_rng(seed)
            for _ in range(self.num_train // batch_size):
                bag = rng.integers(0, 3, (batch_size, 2)).astype(np.int32)
                bag[::3, 1] = mpembed.NO_ID
                ids = {
                    "a": rng.integers(0, 40, batch_size, np.int32),
                    "b": bag,
                    "c": rng.integers(0, 9, batch_size, np.int32),
                }
                label = (ids["a"] % 2).astype(np.float32)
                if not self.as_dict:
                    ids = np.stack([ids["a"], ids["b"][:, 0], ids["c"]], axis=1)
                yield {"dense": np.zeros((batch_size, 0), np.float32), "ids": ids, "label": label}

        test = train

    source = Source(as_dict)
    source.tables = {"c": 9, "a": 40, "b": 3}  # columns are in this order
    if not as_dict:
        source.tables = {"a": 40, "b": 3, "c": 9}
    one, two = training.FP32, training.Contender("two", "float32", 0.0, float32_share=0.25)
    recipe = training.Recipe(4, 16)
    job = training.make_job(source, recipe)
    fitted = training.fit(source, [one, two], recipe, job, seed=0, on_chunk=lambda *_: None)
    names = [[t.name for t in spec.tables] for spec in fitted[1].specs]
    assert sorted(map(sorted, names)) == [["a"], ["b", "c"]] and len(fitted[0].specs) == 1
    batch = next(source.test(16, 9))
    scores = [job.predict(f.learner, batch) for f in fitted]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    assert np.ptp(scores[0]) > 1e-3
    sizes = [
        sum(mpembed.memory.report(spec, job.row_tx).components["table"] for spec in f.specs)
        for f in fitted
    ]
    assert sizes[0] == sizes[1] == 52 * 4 * 4


# --- the whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny grid.

    The cases of the paper's claim and every kind of baseline, two seeds, killed once on the way.
    """
    out = tmp_path_factory.mktemp("grid")
    settings = small(out)
    cases = [
        FP32, Case("int4", 0.05), Case("int4"), Case(method="hashed", share=0.5),
        Case(method="pruned", share=0.5), Case(method="narrow", share=0.5),
        Case("int4", method="post-training"), Case("int4", method="quantization-aware"),
    ]  # fmt: skip
    assert set(cases) <= set(paper_table.cases_of(settings, 4))
    with pytest.MonkeyPatch.context() as patch:
        append, calls = records.append, []

        def killed(path, record):
            append(path, record)
            calls.append(record["name"])
            if len(calls) == 3:
                raise KeyboardInterrupt

        patch.setattr(records, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            paper_table.run(settings, lambda *_: cases)
        patch.setattr(records, "append", append)
        before = (out / "paper_table.jsonl").read_bytes()
        with (out / "paper_table.jsonl").open("ab") as file:
            file.write(b'{"key": "cut')
        paper_table.run(settings, lambda *_: cases)
    return settings, before, calls


@OPTAX_ADAM
@pytest.mark.slow
def test_a_killed_grid_continues_where_it_was(finished):
    settings, before, calls = finished
    after = (settings.out / "paper_table.jsonl").read_bytes()
    assert after.startswith(before) and len(calls) == 3
    found = lines(settings.out)
    names = [r["name"] for r in found]
    assert len(names) == len(set(names)) == len({r["key"] for r in found})
    assert set(names) == {
        "FP32", "INT4 + 5 %", "INT4 no cache", "FP32 hashed to 0.5",
        "FP32 pruned to 0.5", "FP32 narrow to 0.5", "INT4 post-training", "INT4 quantization-aware",
    }  # fmt: skip


@pytest.mark.slow
@OPTAX_ADAM
def test_bytes_of_every_method_are_what_they_keep(finished):
    settings, _, _ = finished
    by_name = {r["name"]: r for r in lines(settings.out)}
    data = by_name["FP32"]["data"]
    num_ids, full = data["ids"], 16.0

    def size(name):
        return by_name[name]["outcome"]["bytes_per_row"]

    assert size("FP32") == pytest.approx(full, rel=0.01)
    assert size("FP32 hashed to 0.5") == pytest.approx(full / 2, rel=0.01)
    assert size("FP32 pruned to 0.5") == pytest.approx(full / 2, rel=0.01)
    assert size("FP32 narrow to 0.5") == pytest.approx(full / 2, rel=0.01)
    assert (
        size("INT4 no cache") == pytest.approx(4, rel=0.02) == size("INT4 post-training")
    )  # D / 2 and a 2-byte scale
    assert size("INT4 + 5 %") > 4 + 0.045 * (16 + 9)
    assert size("INT4 quantization-aware") == pytest.approx(2 + 4 * 26 / num_ids)
    for name, record in by_name.items():
        outcome = record["outcome"]
        master = "post" in name or "aware" in name
        assert record["training_bytes_per_row"] == pytest.approx(
            full if master else size(name), rel=0.01
        )
        assert outcome["ratio"] == pytest.approx(full / size(name)) and 0.5 < outcome["auc"] < 1
        total = (
            outcome["embedding_bytes"] + outcome["row_state_bytes"]
        )  # row-wise Adagrad: one float32 per row
        with_row_state = 1.0 if master else num_ids * (full + 4) / total
        assert outcome["ratio_with_row_state"] == pytest.approx(with_row_state)
        assert {"commit", "device", "versions", "command"} <= set(record["environment"])


@pytest.mark.slow
@OPTAX_ADAM
def test_the_report_pairs_and_draws(finished):
    settings, _, _ = finished
    text = (settings.out / "paper_table.md").read_text()
    [group] = paper_report.group(lines(settings.out))
    assert group.title == "synthetic, D = 4" and set(group.cases) >= {FP32, Case("int4", 0.05)}
    found = group.difference(Case("int4", 0.05), "auc")
    assert found.mean == group.values(Case("int4", 0.05), "auc")[0] - group.values(FP32, "auc")[0]
    assert (
        f"| INT4 + 5 % | {group.mean(Case('int4', 0.05), 'auc'):.4f} | {found.mean:+.4f} |" in text
    )
    for name in ("accuracy", "hits", "losses"):
        assert (settings.out / f"paper_table_{name}.png").stat().st_size > 10_000


@pytest.mark.exhaustive
@OPTAX_ADAM
def test_criteos_own_file_goes_the_same_way(tmp_path):
    """The whole command reads this file in test_the_main_job_reads_criteo of
    test_criteo_kaggle.py.
    """
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [rng.integers(0, 2, (1400, 1)), rng.integers(0, 50, (1400, 13))], axis=1
    ).astype(str)
    categories = [[f"{value:08x}" for value in row] for row in rng.integers(1, 40, (1400, 26))]
    text = ["\t".join([*row, *more]) for row, more in zip(rows, categories, strict=True)]
    (tmp_path / "train.txt").write_text("\n".join(text) + "\n")
    settings = small(
        tmp_path / "out",
        data="criteo",
        path=tmp_path,
        num_rows=None,
        grid="targets",
        batch_size=200,
        min_count=2,
    )
    paper_table.run(settings, lambda *_: [FP32, Case("int4", 0.3)])
    found = lines(tmp_path / "out")
    assert [r["name"] for r in found] == ["FP32", "INT4 + 30 %"]
    assert (
        found[0]["data"]["name"] == "criteo"
        and found[0]["data"]["train"] == 1200
        and found[0]["data"]["min_count"] == 2
    )


def test_without_results_the_report_says_so(tmp_path, capsys):
    assert paper_table.main(["--report", "--out", str(tmp_path)]) == 2
    assert "run without --report first" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_script_runs_as_a_file_and_shows_its_settings():
    """The whole command runs train_dlrm.py as a file, in test_experiments_data.py."""
    command = [sys.executable, str(ROOT / "experiments" / "accuracy" / "paper_table.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--report" in shown.stdout and "--dims" in shown.stdout
