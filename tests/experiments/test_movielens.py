"""MovieLens through tensorflow-datasets' own builder, on a hand-made download.

No network, no TensorFlow.
"""

import hashlib
import json
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import requests
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

import mpembed_jax as mpembed
from experiments import train_dlrm
from experiments.data import movielens
from mpembed_jax import NO_ID

GENRES = ["Action", "Children's", "Comedy", "Drama", "Film-Noir", "Horror", "Sci-Fi", "War"]
NUM_USERS, NUM_MOVIES, NUM_RATINGS = 40, 60, 900


def pack(download, data):
    with zipfile.ZipFile(data / "ml-1m.zip", "w") as archive:
        for path in sorted(download.iterdir()):
            archive.write(path, f"ml-1m/{path.name}")


def packed(data):
    """The archive that `pack` wrote."""
    digest = hashlib.sha256((data / "ml-1m.zip").read_bytes()).hexdigest()
    return movielens.Archive(sha256=digest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder prepared by the real builder from files in the format of ml-1m.zip.

    The pairs and their ratings.
    """
    rng = np.random.default_rng(0)
    download = tmp_path_factory.mktemp("download") / "ml-1m"
    download.mkdir()
    genres = [
        "|".join(rng.choice(GENRES, rng.integers(1, 9), replace=False)) for _ in range(NUM_MOVIES)
    ]
    movies = [f"{m + 1}::Film é {m} (1999)::{genres[m]}" for m in range(NUM_MOVIES)]
    users = [
        f"{u + 1}::{'MF'[u % 2]}::{[1, 18, 25][u % 3]}::{u % 21}::{10000 + u % 7}"
        for u in range(NUM_USERS)
    ]
    pairs = rng.choice(NUM_USERS * NUM_MOVIES, NUM_RATINGS, replace=False)
    stars = rng.integers(1, 6, NUM_RATINGS)
    rated = [
        f"{pair // NUM_MOVIES + 1}::{pair % NUM_MOVIES + 1}::{star}::97830{i:04}"
        for i, (pair, star) in enumerate(zip(pairs, stars, strict=True))
    ]
    for name, lines in (("movies", movies), ("users", users), ("ratings", rated)):
        (download / f"{name}.dat").write_bytes("\n".join([*lines, ""]).encode("iso-8859-1"))
    data = tmp_path_factory.mktemp("data")
    pack(download, data)
    movielens.read(data, lambda text: None, packed(data))
    assert "tensorflow" not in sys.modules
    return (
        data,
        {
            (str(p // NUM_MOVIES + 1), str(p % NUM_MOVIES + 1)): s
            for p, s in zip(pairs, stars, strict=True)
        },
        genres,
        download,
    )


def test_ratings_are_read_whole_and_in_one_order(folder):
    data, stars, genres, _ = folder
    ratings = movielens.read(data)
    assert len(ratings) == NUM_RATINGS
    got = {
        (user, movie): rating
        for user, movie, rating in ratings.select("user_id", "movie_id", "user_rating").iter_rows()
    }
    assert got == stars and list(got) == sorted(got)
    first = ratings.row(0, named=True)
    assert len(first["movie_genres"]) == len(genres[int(first["movie_id"]) - 1].split("|"))
    assert (data / "movielens" / "1m-ratings").is_dir()


def test_threes_are_left_out_and_a_tenth_is_held_out_by_the_seed(folder):
    data, stars, *_ = folder
    source = movielens.MovielensRatings(data)
    kept = [s for s in stars.values() if s != 3]
    assert source.num_test == len(kept) // 10 and source.num_train + source.num_test == len(kept)
    assert source.label.sum() == sum(s > 3 for s in kept)
    assert list(source.tables) == [*movielens.SINGLES, "genres"]
    assert (source.tables["gender"], source.tables["age"], source.tables["zip"]) == (2, 3, 7)
    for name, ids in source.ids.items():
        real = ids[ids != NO_ID]
        assert ids.dtype == np.int32 and real.min() >= 0 and real.max() < source.tables[name]
    assert (
        source.ids["genres"].shape == (len(kept), 6) and (source.ids["genres"][:, 0] != NO_ID).all()
    )
    again, other = movielens.MovielensRatings(data), movielens.MovielensRatings(data, split_seed=1)
    np.testing.assert_array_equal(again.ids["movie"], source.ids["movie"])
    assert not np.array_equal(other.ids["movie"], source.ids["movie"])
    few = movielens.MovielensRatings(data, num_rows=100)
    assert (few.num_train, few.num_test) == (90, 10)
    batch = next(source.train(32, seed=1))
    assert batch["dense"].shape == (32, 0) and batch["label"].dtype == np.float32


def test_a_download_that_breaks_off_is_told(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "head", lambda *_, **__: None)
    monkeypatch.setattr(requests, "get", broken)
    with pytest.raises(ConnectionError, match=r"MovieLens-1M is not in .*no route to host"):
        movielens.MovielensRatings(tmp_path)
    assert not list(tmp_path.rglob("*.zip*"))


def test_raw_ids_are_movielens_own(folder):
    source = movielens.MovielensRatings(folder[0], raw=True)
    tables = tuple(map(mpembed.TableSpec, source.tables))
    spec = mpembed.EmbeddingSpec(tables, 1, vocabulary=mpembed.VocabularySpec(64))
    [batch] = source.test(1000)
    pairs = batch["pairs"]
    ratings = movielens.read(folder[0]).filter(pl.col("user_rating") != 3)
    ratings = ratings[np.random.default_rng(0).permutation(len(ratings))][source.num_train :]
    for name in ("user", "movie", "occupation", "zip"):
        values = ratings[movielens.SINGLES[name]].to_list()
        assert isinstance(values[0], str)
        np.testing.assert_array_equal(pairs[name], spec.raw_ids({name: values})[name])
    for name in ("gender", "age"):
        values = [int(value) for value in ratings[movielens.SINGLES[name]]]
        np.testing.assert_array_equal(pairs[name], spec.raw_ids({name: values})[name])
    bags = [[*genres[:6], *[None] * (6 - len(genres))] for genres in ratings["movie_genres"]]
    want = spec.raw_ids({"genres": np.array(bags, object)})["genres"]
    np.testing.assert_array_equal(pairs["genres"], want)
    assert "pairs" not in next(movielens.MovielensRatings(folder[0]).test(9))


def test_a_download_is_kept_whole(folder, tmp_path, monkeypatch):
    asked = []

    class Answer:
        content = (folder[0] / "ml-1m.zip").read_bytes()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def raise_for_status(self):
            pass

    monkeypatch.setattr(requests, "head", lambda *_, **__: None)
    monkeypatch.setattr(requests, "get", lambda url, **_: asked.append(url) or Answer())
    assert len(movielens.read(tmp_path, lambda text: None, packed(folder[0]))) == NUM_RATINGS
    assert asked == ["https://files.grouplens.org/datasets/movielens/ml-1m.zip"]
    assert (tmp_path / "ml-1m.zip").read_bytes() == Answer.content


def test_without_network_one_line_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    """The way to the host leads over a proxy that no network has; nothing waits for long."""
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:9")
    words = ["--data", "movielens", "--cache-dir", str(tmp_path / "data"), "--out", str(tmp_path)]
    start = time.perf_counter()
    assert train_dlrm.main(words) == 2
    assert time.perf_counter() - start < 15
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "--data is movielens" in line and "ml-1m.zip elsewhere and put it there" in line
    assert f"is not in {tmp_path / 'data'}" in line


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(requests, "head", lambda *_, **__: threading.Event().wait())
    assert "did not answer" in movielens.unreachable(movielens.Archive(seconds=-1.5))


def test_another_archive_is_refused(folder, tmp_path):
    pack(folder[3], tmp_path)
    with pytest.raises(ValueError, match=r"ml-1m\.zip is not the file at"):
        movielens.read(tmp_path)


def test_no_temporary_folder_is_left(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    movielens.read(folder[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@OPTAX_ADAM
def test_the_main_job_trains_on_raw_ids_of_movielens(folder, tmp_path):
    """FP32 on numbered ones."""
    settings = train_dlrm.Settings(
        data="movielens",
        cache_dir=folder[0],
        batch_size=64,
        hashed_baseline=False,
        cache_fraction=0.3,
        ids="raw",
        out=tmp_path,
    )
    record = train_dlrm.run(settings)
    assert record["outcomes"][1]["contender"]["pool_rows"] > 20
    assert (
        record["outcomes"][0]["num_steps"] > 5 and record["projected_kaggle_epoch_seconds"] is None
    )
    assert json.loads((tmp_path / "movielens.json").read_text())["settings"]["data"] == "movielens"
