"""The stream whose ids drift: batches are scored before they train, by month, at equal bytes."""

import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from sklearn import metrics
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments.accuracy import drift
from experiments.data import reddit
from experiments.dlrm import training

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
NUM = 2200  # two batches of 1,024 posts, and a part of one that is left out
RECIPE = training.Recipe(batch_size=1024, embedding_dim=16, row_learning_rate=0.02)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of posts of February to April 2012, not in their order, whose words drift."""
    rng = np.random.default_rng(0)
    place, start = np.sort(rng.random(NUM)), reddit.TEST_FROM - 50 * 86400
    path = tmp_path_factory.mktemp("posts") / "posts.parquet"
    words = [(400 * at + rng.integers(0, 80, 6)).astype(int) for at in place]
    pl.DataFrame(
        {
            "created_utc": (start + 60 * 86400 * place).astype(np.int64),
            "subreddit": [f"s{i}" for i in rng.integers(0, 20, NUM)],
            "domain": [f"d{i}.com" for i in rng.integers(0, 50, NUM)],
            "is_self": rng.random(NUM) < 0.5,
            "title": [" ".join(f"word{word}" for word in several) for several in words],
            "num_comments": rng.integers(0, 25, NUM),
        }
    ).sample(fraction=1, shuffle=True, seed=1).write_parquet(path)
    return path


@pytest.mark.slow
@OPTAX_ADAM
def test_a_batch_is_scored_by_the_model_that_has_not_seen_it(path):
    settings = drift.Settings(path=path)
    source = drift.posts_of(settings)
    job = training.make_job(source, RECIPE)
    scores, _ = drift.scores_of(source, training.FP32, RECIPE, job, 3)
    [learner] = training.begin(source, [training.FP32], RECIPE, job, seed=3).learners
    first, second = source.train(1024)
    assert np.all(np.diff(source.month) >= 0) and len(scores) == 2048
    expected = np.asarray(job.predict(learner, first))
    np.testing.assert_allclose(jax.nn.sigmoid(scores[:1024]), expected, atol=1e-6)
    learner, _ = job.train_step(learner, first)
    expected = np.asarray(job.predict(learner, second))
    np.testing.assert_allclose(jax.nn.sigmoid(scores[1024:]), expected, atol=1e-6)


@OPTAX_ADAM
@pytest.mark.exhaustive
def test_pools_recycle_or_not_beside_tables_of_as_many_bytes(path, tmp_path):
    """The whole command scores batches in the test above, and recycles rows in
    tests/vocabulary/test_vocabulary.py.
    """
    out = tmp_path / "drift.json"
    words = ["--path", str(path), "--pools", "0.2", "--seeds", "0", "1", "--month-posts", "100"]
    assert drift.main([*words, "--out", str(out)]) == 0
    found = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    recycled, kept, hashed = (found[drift.name_of(0.2, kind)] for kind in drift.KINDS)
    assert next(iter(found)) == drift.FP32 and len(found) == 4
    assert recycled["vocabulary"]["recyclings"] > 0 == kept["vocabulary"]["recyclings"]
    assert kept["vocabulary"]["refusals"] > 0
    assert recycled["bytes"] == kept["bytes"]
    assert recycled["bytes"] == pytest.approx(hashed["bytes"], rel=0.05)  # there are few rows
    for result in found.values():
        assert list(result["minus_fp32"]) == ["2012-02", "2012-03", "2012-04", "all"]
        assert result["auc"].keys() == {"0", "1"}
    assert found[drift.FP32]["minus_fp32"]["all"] == "+0.0000 ± 0.0000"
    assert out.with_suffix(".png").stat().st_size > 1000


def test_months_with_few_posts_are_left_out():
    month = reddit.created_months(pl.Series([0, 86400 * 40, 86400 * 41, 86400 * 370]))
    months = drift.months_of(month, 2)
    assert {name: list(which) for name, which in months.items()} == {
        "1970-02": [False, True, True, False]
    }
    labels, scores = np.array([1, 0, 1, 1.0]), np.array([0.0, 0.2, 0.1, 0.0])
    aucs = drift.aucs_of(scores, labels, months)
    assert aucs == {"1970-02": metrics.roc_auc_score([0, 1], [0.2, 0.1]), "all": 0.0}


def test_the_table_of_the_page_is_of_the_recorded_runs():
    page = (ROOT / "experiments" / "accuracy" / "details.md").read_text()
    lines = page[page.index("## What if the ids drift?") :].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    first = next(n for n, row in enumerate(rows) if row[0] == "rows")
    table = {row[0]: row[1:] for row in itertools.takewhile(any, rows[first + 2 :])}
    files = ("drift.json", "drift_d64.json", "drift_window300.json")
    recorded = [json.loads((RESULTS / name).read_text())["results"] for name in files]
    suffix = ", window of 300"
    assert [name for name in table if suffix not in name] == [r["name"] for r in recorded[1]]
    recorded[2] = [
        {**result, "name": result["name"] + suffix}
        for result in recorded[2]
        if result["name"].endswith("%, recycled")
    ]
    assert {name for name in table if suffix in name} == {r["name"] for r in recorded[2]}
    for at, results in zip((0, 3, 0), recorded, strict=True):
        for result in results:
            aucs = [of["all"] for of in result["auc"].values()]
            auc, last = (result["minus_fp32"][of].replace("0.", ".") for of in ("all", "2012-06"))
            if result["name"] == drift.FP32:
                auc, last = f"AUC {np.mean(aucs):.4f}", ""
            assert table[result["name"]][at : at + 3] == [auc, last, f"{result['ratio']:.2f}"]
