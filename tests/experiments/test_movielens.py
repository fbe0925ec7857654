"""MovieLens through tensorflow-datasets' own builder, on a hand-made download.

No network, no TensorFlow.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments import train_dlrm
from experiments.data import movielens
from mpembed_jax import NO_ID

GENRES = ["Action", "Children's", "Comedy", "Drama", "Film-Noir", "Horror", "Sci-Fi", "War"]
NUM_USERS, NUM_MOVIES, NUM_RATINGS = 40, 60, 900


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
    asked = []

    def given(self, url):
        asked.append(url)
        return download.parent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.download.DownloadManager, "download_and_extract", given)
        movielens.read(data, log=lambda text: None)
    assert asked == ["https://files.grouplens.org/datasets/movielens/ml-1m.zip"]
    assert "tensorflow" not in sys.modules
    return (
        data,
        {
            (str(p // NUM_MOVIES + 1), str(p % NUM_MOVIES + 1)): s
            for p, s in zip(pairs, stars, strict=True)
        },
        genres,
    )


def test_ratings_are_read_whole_and_in_one_order(folder):
    data, stars, genres = folder
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
    data, stars, _ = folder
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


def test_without_network_the_reason_is_said(tmp_path, monkeypatch):
    def unreachable(self, url):
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", unreachable)
    with pytest.raises(
        ConnectionError, match=r"MovieLens-1M is not in .*1m-ratings.* no route to host"
    ):
        movielens.MovielensRatings(tmp_path)


@OPTAX_ADAM
def test_the_main_job_trains_on_movielens(folder, tmp_path):
    settings = train_dlrm.Settings(
        data="movielens",
        cache_dir=folder[0],
        batch_size=64,
        hashed_baseline=False,
        cache_fraction=0.3,
        out=tmp_path,
    )
    record = train_dlrm.main(settings)
    assert (
        record["outcomes"][0]["num_steps"] > 5 and record["projected_kaggle_epoch_seconds"] is None
    )
    assert json.loads((tmp_path / "movielens.json").read_text())["settings"]["data"] == "movielens"
