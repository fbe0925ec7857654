"""The inputs of the experiments do what their files promise.

The main job runs end to end on small data.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from cases import named
from criteo_text import line, random_lines, write
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

import mpembed_jax as mpembed
from experiments import train_dlrm
from experiments.data import criteo_format, reddit, synthetic
from experiments.data.background import in_background
from experiments.dlrm import models, stacks, training
from mpembed_jax import NO_ID

ROOT = Path(__file__).resolve().parents[2]

# --- the synthetic twin

SAMPLED = 137_139


class Skew(NamedTuple):
    """What a sample of SAMPLED rows of Criteo-Kaggle has."""

    num_distinct: int
    # The shares of the top 1, 5 and 10 %.
    top_1: float
    top_5: float
    top_10: float


PUBLISHED = {
    "C3": Skew(61763, 0.42, 0.52, 0.58),
    "C12": Skew(56396, 0.44, 0.56, 0.61),
    "C21": Skew(52249, 0.46, 0.58, 0.63),
    "C16": Skew(46381, 0.48, 0.61, 0.66),
    "C4": Skew(32222, 0.51, 0.67, 0.73),
    "C24": Skew(14595, 0.60, 0.76, 0.83),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_skewed_as_in_criteo(name):
    law = synthetic.FEATURES[name]
    feature = synthetic.FeatureIds(law, law.vocabulary_size, salt=1)
    ids, _, _ = feature.draw(np.random.default_rng(0), SAMPLED, day=0)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < law.vocabulary_size
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
    shares = np.cumsum(counts) / counts.sum()
    skew = PUBLISHED[name]
    assert abs(len(counts) / skew.num_distinct - 1) < 0.05
    for share, want in ((0.01, skew.top_1), (0.05, skew.top_5), (0.1, skew.top_10)):
        assert abs(shares[int(len(counts) * share) - 1] - want) < 0.04


def test_hot_ids_are_not_neighbours():
    law = synthetic.FEATURES["C3"]
    ids, _, _ = synthetic.FeatureIds(law, law.vocabulary_size, salt=1).draw(
        np.random.default_rng(0), 50_000, day=0
    )
    values, counts = np.unique(ids, return_counts=True)
    hot = np.sort(values[np.argsort(counts)[-100:]])
    assert np.min(np.diff(hot)) > 1000


def test_the_head_stays_and_the_body_drifts():
    law = synthetic.FEATURES["C3"]
    feature = synthetic.FeatureIds(law, law.vocabulary_size, salt=1)
    first, last = (feature.draw(np.random.default_rng(0), 50_000, day=day)[0] for day in (0, 6))
    moved = np.mean(first != last)
    assert 0.02 < moved < 0.3
    assert np.bincount(first).argmax() == np.bincount(last).argmax()


def test_rates_and_sizes():
    twin = synthetic.CriteoTwin(num_rows=300_000, scale=0.01)
    assert sum(synthetic.scaled_sizes(1.0).values()) == 33_762_577
    assert twin.tables["C9"] == 3 and twin.tables["C3"] == 101_312
    batches = [b for source in (twin.train(1000), twin.test(1000)) for b in source]
    dense, ids, label = (np.concatenate([b[k] for b in batches]) for k in ("dense", "ids", "label"))
    assert (
        dense.dtype == np.float32
        and dense.shape[1] == 13
        and ids.dtype == np.int32
        and label.dtype == np.float32
    )
    assert np.isfinite(dense).all() and (dense >= 0).all()
    assert (ids.min(axis=0) >= 0).all() and (ids.max(axis=0) < list(twin.tables.values())).all()
    assert len(label) == 300_000 - twin.num_train % 1000
    # Days differ a little by drift; sampling noise alone is sqrt(.19 / 3e5) = .0008.
    assert abs(label.mean() - 0.2562) < 0.005
    assert abs(np.mean(ids[:, list(twin.tables).index("C22")] == 0) - 0.761) < 0.005
    rows = twin._rows(50_000, day=0, key=0, block=0)
    assert np.mean(rows[0][:, 11] == 0) > 0.765 > 0.7  # missing I12 reads as 0, like real zeros


@pytest.mark.slow
def test_dense_features_alone_are_clearly_worse():
    twin = synthetic.CriteoTwin(num_rows=7, scale=0.01)
    dense, _, label, logits = twin._rows(60_000, day=2, key=0, block=0)
    fitted = LogisticRegression(max_iter=300).fit(dense[:40_000], label[:40_000])
    alone = roc_auc_score(label[40_000:], fitted.predict_proba(dense[40_000:])[:, 1])
    planted = roc_auc_score(label, logits)
    assert 0.62 < alone < 0.70 and 0.84 < planted < 0.88


@pytest.mark.slow
def test_the_seed_fixes_the_data_and_only_the_batch_seed_the_order():
    def rows(seed=0, batch_seed=0, batch_size=512):
        batches = list(synthetic.CriteoTwin(7000, 0.001, seed).train(batch_size, batch_seed))
        return {k: np.concatenate([b[k] for b in batches]) for k in ("dense", "ids", "label")}

    one, same, longer = rows(), rows(), rows(batch_size=100)
    other_order, other_data = rows(batch_seed=1), rows(seed=1)
    for k in one:
        np.testing.assert_array_equal(one[k], same[k])
        np.testing.assert_array_equal(one[k][:5500], longer[k][:5500])
    assert not np.array_equal(one["ids"], other_order["ids"])
    assert not np.array_equal(one["ids"], other_data["ids"])
    everything = [
        {tuple(map(float, r)) for r in rows(batch_seed=s, batch_size=6)["dense"]} for s in (0, 1)
    ]
    assert everything[0] == everything[1] and len(everything[0]) == 6000


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5])
def test_a_scale_outside_0_1_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be in"):
        synthetic.CriteoTwin(scale=scale)


# --- Criteo's text format


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_parsing_gives_back_what_was_written(newline):
    text, label, dense, categories = random_lines(500)
    rows = criteo_format.parse((newline.join(text) + newline).encode())
    assert rows.bad == [] and rows.num_lines == 500
    np.testing.assert_array_equal(rows.label, label)
    np.testing.assert_array_equal(rows.dense, dense)
    np.testing.assert_array_equal(rows.categories, categories)


def test_a_line_of_missing_values_is_good():
    rows = criteo_format.parse((line(0, [""] * 13, [""] * 26) + "\n").encode())
    assert (
        rows.bad == []
        and rows.label.tolist() == [0]
        and not rows.dense.any()
        and not rows.categories.any()
    )


@pytest.mark.parametrize("text", ["0", "-1", "12345678", "1234567890123"])
def test_integers_of_any_length_and_zero_for_negative_ones(text):
    rows = criteo_format.parse((line(1, [text] * 13) + "\n").encode())
    value = max(int(text), 0)
    np.testing.assert_array_equal(rows.dense, np.log1p(np.full((1, 13), value, np.float32)))


@pytest.mark.parametrize("text", ["FFFFFFFF", "ffffffff", "DeadBeef", "09afAF90"])
def test_hex_of_either_case(text):
    rows = criteo_format.parse((line(1, categories=[text] * 26) + "\n").encode())
    assert rows.categories[0].tolist() == [int(text, 16)] * 26


class BadLine(NamedTuple):
    """A line that is refused, and what is said of it."""

    text: str
    reason: str


BAD = {
    "2": BadLine(line(2), "label is '2'; expected 0 or 1"),
    "empty label": BadLine(line(""), "label is ''; expected 0 or 1"),
    "long label": BadLine(line("01"), "label is '01'"),
    "few columns": BadLine("\t".join(["1"] * 39), "39 columns instead of 40"),
    "many columns": BadLine(line() + "\t7", "41 columns instead of 40"),
    "empty": BadLine("", "the line is empty"),
    "spaces": BadLine(line().replace("\t", " "), "1 columns instead of 40"),
    "float": BadLine(
        line(1, ["1"] * 4 + ["1.5"] + ["1"] * 8),
        "I5 is '1.5'; expected an integer or nothing",
    ),
    "minus": BadLine(line(1, ["-"] + ["1"] * 12), "I1 is '-'"),
    "two minus": BadLine(line(1, ["--5"] + ["1"] * 12), "I1 is '--5'"),
    "slash": BadLine(line(1, ["1/2"] + ["1"] * 12), "I1 is '1/2'"),
    "space in front": BadLine(line(1, [" 5"] + ["1"] * 12), "I1 is ' 5'"),
    "too long": BadLine(line(1, ["9" * 19] + ["1"] * 12), "I1 is '9999999999999999999'"),
    "long and wrong": BadLine(line(1, ["123456789x"] + ["1"] * 12), "I1 is '123456789x'"),
    "bad hex": BadLine(
        line(1, categories=["0000000a"] * 25 + ["0000000g"]),
        "C26 is '0000000g'; expected 8 hex digits",
    ),
    "short hex": BadLine(line(1, categories=["a"] + ["0000000a"] * 25), "C1 is 'a'"),
    "long hex": BadLine(line(1, categories=["0000000aa"] + ["0000000a"] * 25), "C1 is '0000000aa'"),
    "signed hex": BadLine(line(1, categories=["+000000a"] + ["0000000a"] * 25), "C1 is '+000000a'"),
    "umlaut": BadLine(line(1, categories=["000000ä"] + ["0000000a"] * 25), "C1 is '000000ä'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_found_and_the_others_kept(name):
    text, label, _, categories = random_lines(6)
    bad, reason = BAD[name]
    rows = criteo_format.parse(
        ("\n".join([*text[:4], bad, *text[4:]]) + "\n").encode(), first_line=101
    )
    assert len(rows.bad) == 1 and rows.bad[0].number == 105 and reason in rows.bad[0].reason
    np.testing.assert_array_equal(rows.label, label)
    np.testing.assert_array_equal(rows.categories, categories)


def test_every_wrong_byte_in_a_number_is_noticed():
    for byte in range(256):
        char = bytes([byte])
        if char in (b"\t", b"\n"):
            continue
        good_hex, good_int = char in b"0123456789abcdefABCDEF", char in b"0123456789"
        for column, template, is_good in (
            ("C1", b"12345%b78", good_hex),
            ("I1", b"1%b2", good_int),
        ):
            field = template.replace(b"%b", char)
            cells = line().encode().split(b"\t")
            cells[criteo_format.COLUMNS.index(column)] = field
            rows = criteo_format.parse(b"\t".join(cells) + b"\n")
            assert (not rows.bad) == is_good, (column, field)


def test_blocks_join_to_the_file(tmp_path):
    text, *_ = random_lines(50)
    path = write(tmp_path, text, end=False)
    with criteo_format.open_file(path) as file:
        blocks = list(criteo_format.read_blocks(file, 1000))
    assert len(blocks) > 5 and all(b.endswith(b"\n") for b in blocks)
    assert b"".join(blocks) == path.read_bytes() + b"\n"


# --- Reddit


@pytest.fixture(scope="module")
def posts():
    try:
        reddit.find()
    except FileNotFoundError as error:
        pytest.skip(f"optional data is absent: {error}")
    return reddit.RedditPosts()


def test_reddit_is_the_task_of_its_readme(posts):
    assert (posts.num_train, posts.num_test) == (404_537, 183_601)
    assert abs(posts.label.mean() - 0.46) < 0.01
    assert (
        list(posts.tables) == [*reddit.SINGLES, "title"]
        and 220_000 < sum(posts.tables.values()) < 235_000
    )
    batch = next(posts.train(256, seed=1))
    assert batch["dense"].shape == (256, 0) and batch["label"].dtype == np.float32
    assert batch["ids"]["title"].shape == (256, 16)
    for name, ids in batch["ids"].items():
        real = ids[ids != NO_ID]
        assert ids.dtype == np.int32 and real.min() >= 0 and real.max() < posts.tables[name]
    is_padding = posts.ids["title"] == NO_ID
    assert (np.diff(is_padding.astype(int), axis=1) >= 0).all() and 9 < (~is_padding).sum(
        axis=1
    ).mean() < 11
    assert not np.array_equal(batch["label"], next(posts.train(256, seed=2))["label"])
    assert sum(len(b["label"]) for b in posts.test(1000)) == posts.num_test


def test_a_missing_reddit_file_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="MPEMBED_DATA"):
        reddit.RedditPosts(tmp_path)


@pytest.fixture(scope="module")
def made_up_posts(tmp_path_factory):
    """A file of posts, some without a word."""
    rng, count = np.random.default_rng(0), 900
    words = np.array([f"Word{i}" for i in range(60)])
    path = tmp_path_factory.mktemp("posts") / "posts.parquet"
    pl.DataFrame(
        {
            "created_utc": reddit.TEST_FROM - 600 + np.arange(count),
            "subreddit": [f"s{i}" for i in rng.integers(0, 20, count)],
            "domain": [f"d{i}.com" for i in rng.integers(0, 50, count)],
            "is_self": rng.random(count) < 0.5,
            "title": [" ".join(rng.choice(words, rng.integers(0, 20))) for _ in range(count)],
            "num_comments": rng.integers(0, 25, count),
        }
    ).write_parquet(path)
    return path


def test_raw_posts_are_names_and_words_as_they_are(made_up_posts):
    posts, source = pl.read_parquet(made_up_posts), reddit.RedditPosts(made_up_posts, raw=True)
    contender = training.Contender("ours", pool_rows=64)
    [spec] = stacks.make_specs(source, contender, training.Recipe(4))
    [batch] = source.test(1000)
    posts = posts[source.num_train :]
    words = [title.lower().split()[:16] for title in posts["title"]]
    assert not all(words)
    want = {
        **{name: posts[name].to_list() for name in ("subreddit", "domain")},
        "is_self": [int(value) for value in posts["is_self"]],
        "title": np.array([[*given, *[None] * (16 - len(given))] for given in words], object),
    }
    for name, pairs in spec.raw_ids(want).items():
        np.testing.assert_array_equal(batch["pairs"][name], pairs)
    assert list(batch["pairs"]) == list(source.tables)
    taken = next(source.train(100, seed=1))
    at = np.flatnonzero((source.ids["title"] == taken["ids"]["title"][7]).all(axis=1))[0]
    np.testing.assert_array_equal(taken["pairs"]["title"][7], source.pairs["title"][at])


# --- model and loop


def test_interaction_is_all_pairs_of_dot_products_and_so_is_its_gradient():
    vectors = jax.random.normal(jax.random.key(0), (3, 5, 4))
    weights = jax.random.normal(jax.random.key(1), (10,))

    def slowly(vectors):
        pairs = [
            jnp.sum(vectors[:, i] * vectors[:, j], axis=-1) for i in range(5) for j in range(i)
        ]
        return jnp.stack(pairs, axis=-1)

    np.testing.assert_allclose(models.interact(vectors), slowly(vectors), rtol=1e-5, atol=1e-6)
    grads = [
        jax.grad(lambda v, f=f: jnp.sum(jnp.sin(f(v)) @ weights))(vectors)
        for f in (models.interact, slowly)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-5)


def test_background_batches_keep_order_and_raise_in_the_consumer():
    assert list(in_background(range(100), depth=3)) == list(range(100))

    def broken():
        yield 1
        raise RuntimeError("bad disk")

    with pytest.raises(RuntimeError, match="bad disk"):
        list(in_background(broken()))
    endless = in_background(iter(int, 1), depth=2)
    assert next(endless) == 0
    endless.close()  # must not leave the thread waiting


def small_settings(tmp_path, **changes):
    settings = {
        "num_rows": 14_000,
        "scale": 0.002,
        "batch_size": 256,
        "hidden": (32, 16),
        "cache_fraction": 0.3,
    }
    return train_dlrm.Settings(out=tmp_path / "out", **{**settings, **changes})


@pytest.mark.slow
@OPTAX_ADAM
def test_the_main_job_trains_evaluates_and_saves(tmp_path):
    record = train_dlrm.run(small_settings(tmp_path, seeds=(0, 1)))
    assert json.loads((tmp_path / "out" / "synthetic.json").read_text()) == json.loads(
        json.dumps(record)
    )
    assert (tmp_path / "out" / "synthetic.png").stat().st_size > 10_000
    assert "INT8 + 30 %" in (tmp_path / "out" / "synthetic.txt").read_text()
    assert {"commit", "device", "versions", "settings", "command"} <= set(record)
    full, ours, hashed = record["outcomes"][:3]
    assert (
        full["num_steps"] == ours["num_steps"] == 46
        and [o["seed"] for o in record["outcomes"]] == [0] * 3 + [1] * 3
    )
    assert full["losses"][0][1] == pytest.approx(ours["losses"][0][1], abs=0.02)
    assert full["losses"][-1][1] < full["losses"][0][1]
    assert full["auc"] > 0.6 and abs(full["auc"] - ours["auc"]) < 0.02
    assert (
        0.3 < full["normalized_entropy"] < 1.1
        and 0 < ours["hit_rate"] < 1
        and full["hit_rate"] == 0
    )
    assert full["ratio"] == pytest.approx(1, abs=0.01) and ours["ratio"] > 1.5
    assert hashed["embedding_bytes"] == pytest.approx(ours["embedding_bytes"], rel=0.01)


def test_posts_can_come_in_time_order(posts):
    ordered = reddit.RedditPosts(num_rows=2_000, in_time_order=True)
    batches = [
        np.concatenate([b["ids"]["domain"] for b in ordered.train(500, seed)]) for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*batches)
    np.testing.assert_array_equal(batches[0], ordered.ids["domain"][:2_000])


@OPTAX_ADAM
def test_contenders_are_paired_and_bags_are_trained(tmp_path, posts):
    # A float32 cache changes nothing (DESIGN.md 5.1), so any difference would come from other
    # batches or initial values.
    contenders = [training.FP32, training.Contender("cached", "float32", 0.3)]
    source, recipe = reddit.RedditPosts(num_rows=20_000), training.Recipe(16, 1024, 0.05, 2e-3)
    job = training.make_job(source, recipe)
    plain, cached = training.train(
        source, contenders, recipe, job, seed=0, on_chunk=lambda *_: None
    )
    assert cached.auc == pytest.approx(plain.auc, abs=1e-5)
    assert plain.auc > 0.6 and cached.hit_rate > 0.5


@pytest.mark.exhaustive
@OPTAX_ADAM
@pytest.mark.parametrize("data", ["posts with bags", "a click log"])
def test_gradients_of_vectors_and_of_rows_train_the_same_tables(request, data):
    """Two stacks, and bags with padding. Only the dense layers may round differently.

    The whole command compares one step, in the next test.
    """
    contender = training.Contender("ours", "int8", 0.1, float32_share=0.2)
    if data == "a click log":
        source, recipe = synthetic.CriteoTwin(7_000, 0.001), training.Recipe(4, 256, hidden=(16, 8))
    else:
        request.getfixturevalue("posts")
        source, recipe = reddit.RedditPosts(num_rows=4_000), training.Recipe(8, 512, 0.05, 2e-3)
    batch = next(iter(source.train(recipe.batch_size, 0)))
    learners, logs = [], []
    for row_gradients in (False, True):
        job = training.make_job(source, recipe, row_gradients=row_gradients)
        [learner] = training.begin(source, [contender], recipe, job, seed=0).learners
        assert len(learner.emb) == 2
        for _ in range(3):
            learner, log = job.train_step(learner, batch)
        learners.append(learner)
        logs.append(log)
    np.testing.assert_allclose(logs[0].scores, logs[1].scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logs[0].counts[1:], logs[1].counts[1:])
    for ours, theirs in zip(learners[0].emb, learners[1].emb, strict=True):
        before = mpembed.to_dense(ours), mpembed.to_dense(theirs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *before)


@pytest.mark.parametrize(
    "names",
    named([("item", "user", "words"), ("words",), ("item", "user")], core={"item-user-words"}),
)
def test_vectors_of_embed_are_those_of_pooled_rows(names):
    """In every bit, and so are the rows that their gradients leave."""
    bags = [name for name in names if name == "words"]
    tables = tuple(mpembed.TableSpec(name, 40) for name in names)
    tx, rng = mpembed.optim.rowwise_adagrad(0.1), np.random.default_rng(0)
    spec = mpembed.EmbeddingSpec(tables, 4, "int8", mpembed.CacheSpec(num_rows=16, ways=4))
    ids = {name: rng.integers(0, 40, (8, 3) if name in bags else 8, np.int32) for name in names}
    ids |= {name: np.where(ids[name] < 9, NO_ID, ids[name]) for name in bags}
    ids = jax.tree.map(jnp.asarray, spec.global_ids(ids))

    @jax.jit
    def by_vectors(state):
        state, plan, vectors = stacks.embed(state, ids, bags, tx)
        seen, pull_back = jax.vjp(stacks.joined, vectors)
        return mpembed.apply_pooled_gradients(state, plan, *pull_back(2 * seen), tx=tx), seen

    @jax.jit
    def by_rows(state):
        state, plan = mpembed.prefetch(state, ids)
        rows = mpembed.lookup(state, plan)
        pool = partial(stacks.pooled, inverse=plan.inverse, bags=bags, implementation="xla")
        seen, pull_back = jax.vjp(pool, rows)
        return mpembed.apply_gradients(state, plan, rows, *pull_back(2 * seen), tx=tx), seen

    state = mpembed.init(jax.random.key(0), spec, tx)
    for one, other in zip(*map(jax.tree.leaves, (by_vectors(state), by_rows(state))), strict=True):
        np.testing.assert_array_equal(jax.device_get(one), jax.device_get(other))


def test_hashing_caps_the_largest_tables():
    tables = {"a": 1000, "b": 10_000, "c": 90_000}
    assert stacks.table_sizes(tables, 0.5) == {"a": 1000, "b": 10_000, "c": 101_000 // 2 - 11_000}
    assert stacks.table_sizes(tables, 0.1) == {"a": 1000, "b": 4550, "c": 4550}
    assert stacks.table_sizes(tables, 1.0) == tables


@pytest.mark.slow
def test_the_script_runs_as_a_file_and_shows_its_settings():
    command = [sys.executable, str(ROOT / "experiments" / "train_dlrm.py"), "--help"]
    shown = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120"},
        check=True,
    )
    assert "--cache-fraction" in shown.stdout and "--max-bad-lines" in shown.stdout


@pytest.mark.exhaustive
@OPTAX_ADAM
def test_raw_ids_train_in_a_pool_of_fewer_rows(tmp_path):
    """The whole command trains raw ids of other data in the next test and in test_movielens.py."""
    record = train_dlrm.run(
        small_settings(
            tmp_path, num_rows=7_000, ids="raw", admit_after=2, pool_rows=9_000, save_every=0.01
        )
    )
    _, ours, hashed = record["outcomes"]
    assert ours["contender"]["pool_rows"] == 9_000 and "raw ids from 2 on" in str(ours)
    assert ours["ratio"] > 2 and ours["auc"] > 0.55
    assert hashed["embedding_bytes"] == pytest.approx(ours["embedding_bytes"], rel=0.01)


@pytest.mark.slow
@OPTAX_ADAM
def test_raw_posts_train_beside_numbered_ones(made_up_posts, tmp_path):
    settings = train_dlrm.Settings(
        data="reddit", path=made_up_posts, ids="raw", pool_rows=100, batch_size=64,
        cache_fraction=0.3, out=tmp_path,
    )  # fmt: skip
    full, ours, _ = train_dlrm.run(settings)["outcomes"]
    assert full["contender"]["pool_rows"] == 0 and ours["contender"]["pool_rows"] == 100
    assert ours["num_steps"] == 600 // 64 and 0 < ours["hit_rate"] < 1
    assert ours["losses"][0][1] == pytest.approx(full["losses"][0][1], abs=0.05)


# --- raw ids in a stack


def raw_stack(names):
    tables, tx = tuple(map(mpembed.TableSpec, names)), mpembed.optim.rowwise_adagrad(0.1)
    pool = mpembed.VocabularySpec(256, admit_after=1)
    spec = mpembed.EmbeddingSpec(tables, 4, "float32", None, vocabulary=pool)
    return spec, mpembed.init(jax.random.key(0), spec, tx), tx


def step_of(bags, tx):
    """A step whose gradients are ones; it also returns the vectors that the model saw."""

    @jax.jit
    def step(state, batch):
        ids = stacks.global_ids(batch, {}, state.spec)
        state, plan, vectors = stacks.embed(state, ids, bags, tx)
        seen, pull_back = jax.vjp(stacks.joined, vectors)
        grads = pull_back(jnp.ones_like(seen))
        return mpembed.apply_pooled_gradients(state, plan, *grads, tx=tx), seen

    return step


@pytest.mark.slow
def test_every_word_is_an_id_in_training_and_evaluation():
    """Those above 2^31, the number that pads row ids, and that of the empty column."""
    spec, state, tx = raw_stack(("C1", "C2"))
    words = np.array([0, 1, NO_ID, 2**31, 2**31 + 1, 2**32 - 1], np.uint32)
    ids = np.stack([words, words[::-1]], axis=1)
    batch = {"ids": jnp.asarray(ids)}
    pairs = jax.jit(lambda batch: stacks.global_ids(batch, {}, spec))(batch)
    np.testing.assert_array_equal(pairs, spec.raw_ids(ids))
    state, seen = step_of((), tx)(state, batch)
    counts = mpembed.stats(state).vocabulary
    assert (counts.admissions, counts.shared_requests) == (12, 0)
    read = stacks.read_raw(state, batch, ())
    assert read.shape == seen.shape == (6, 2, 4) and (read != seen).all()
    np.testing.assert_array_equal(read, mpembed.read(state, spec.raw_ids(ids)))


def test_words_are_hashed_into_fewer_rows():
    tables = {"C1": 2**32, "C2": 2**32}
    sizes = (mpembed.TableSpec("C1", 7), mpembed.TableSpec("C2", 5))
    spec = mpembed.EmbeddingSpec(sizes, 4, "float32", None)
    words = np.random.default_rng(0).integers(0, 2**32, (4000, 2), np.uint32)
    words[0] = NO_ID
    rows = jax.jit(lambda batch: stacks.global_ids(batch, tables, spec))({"ids": words})
    assert rows.dtype == jnp.int32
    assert [set(column.tolist()) for column in np.asarray(rows).T] == [{*range(7)}, {*range(7, 12)}]


@pytest.mark.slow
def test_bags_of_raw_ids_are_averaged_over_the_ids_they_have():
    """In evaluation as in training: features of one id in order of their names, then bags."""
    names, bags = ("word", "user", "item"), ("word",)
    spec, state, tx = raw_stack(names)
    words = [["a", "b", "c"], ["b", None, None], [None, None, None], ["c", "c", None]]
    raw = {
        "word": np.array(words, object),
        "user": ["ann", "bob", "ann", "cem"],
        "item": [2**40, 3, -1, 3],
    }
    ids = {name: np.zeros(4, np.int32) for name in ("user", "item")}
    ids["word"] = np.where([[v is not None for v in bag] for bag in raw["word"]], 0, NO_ID)
    batch = {"ids": ids, "pairs": spec.raw_ids(raw)}
    step = step_of(bags, tx)
    state, _ = step(state, batch)
    read = stacks.read_raw(state, batch, bags)
    distinct = {"word": list("abc"), "user": ["ann", "bob", "cem"], "item": [2**40, 3, -1]}
    rows = mpembed.read(state, spec.raw_ids(distinct))
    row = {name: dict(zip(distinct[name], np.asarray(rows[name]), strict=True)) for name in rows}
    for at, bag in enumerate(words):
        values = [row["word"][value] for value in bag if value is not None]
        mean = sum(values, np.zeros(4)) / max(1, len(values))
        want = [row["item"][raw["item"][at]], row["user"][raw["user"][at]], mean]
        np.testing.assert_allclose(read[at], want, rtol=1e-6)
    np.testing.assert_allclose(step(state, batch)[1], read, rtol=1e-6)
