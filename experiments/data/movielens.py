"""MovieLens-1M as a click-through task: did a user rate a movie above 3 stars, or below?

Ratings of exactly 3 are left out, 739,012 remain. Features: user, movie, gender, age group,
occupation, zip code, and the movie's genres as a bag. Rows are divided at random, nine parts to
train and one to test. Every distinct value has its id.

The ratings come from `movielens/1m-ratings` of tensorflow-datasets, which downloads them once
(GroupLens' terms forbid passing them on) and stores one rating per record, slow to read; what is
read is kept beside them as parquet.
"""

import functools
import os
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from tensorflow_datasets.structured import movielens_parsing

from experiments.data.in_memory import InMemory, numbered, numbered_bags
from experiments.data.prepared import prepared

SINGLES = {
    "user": "user_id",
    "movie": "movie_id",
    "gender": "user_gender",
    "age": "bucketized_user_age",
    "occupation": "user_occupation_text",
    "zip": "user_zip_code",
}
MAX_GENRES = 6
TOGETHER = 4096  # records read at once
# The parser of this config opens its three files with tf.io.gfile.GFile(path, mode="rb"), all it
# needs TensorFlow for.
FILES = types.SimpleNamespace(io=types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open)))


def read(data_dir: Path | str | None = None, log: Callable[[str], None] = print) -> pl.DataFrame:
    """Returns all ratings, one row each, in the order of user and movie.

    It downloads and prepares them if needed.

    Args:
      data_dir: folder of tensorflow-datasets; None: its own default, ~/tensorflow_datasets.
      log: takes lines of progress.

    Raises:
      ConnectionError: if the ratings are not there and cannot be downloaded.
    """
    make = functools.partial(
        tfds.builder, "movielens/1m-ratings", data_dir=data_dir, file_format="array_record"
    )
    try:
        with mock.patch.object(movielens_parsing, "tf", FILES):
            builder = prepared(make)
    except OSError as error:
        # Errors of requests are OSErrors of its own.
        if not isinstance(error, ConnectionError) and not type(error).__module__.startswith(
            "requests"
        ):
            raise
        place = make().data_dir
        raise ConnectionError(
            f"MovieLens-1M is not in {place} and could not be downloaded: {error}"
        ) from error
    kept = Path(builder.data_dir) / "ratings.parquet"
    if kept.is_file():
        return pl.read_parquet(kept)
    records, parts = builder.as_data_source("train"), []
    names = [*SINGLES.values(), "user_rating", "movie_genres"]
    log(f"reading {len(records):,} ratings, once")
    for at in range(0, len(records), TOGETHER):
        rows = records.__getitems__(list(range(at, min(at + TOGETHER, len(records)))))
        parts.append(pl.DataFrame({name: [_plain(row[name]) for row in rows] for name in names}))
    ratings = pl.concat(parts).sort("user_id", "movie_id")
    unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
    ratings.write_parquet(unfinished)
    unfinished.rename(kept)
    return ratings


def _plain(value: object) -> object:
    """Returns text, a number or a list for what a record holds."""
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


class MovielensRatings(InMemory):
    """The source, about 50 MB: ratings above 3 against those below.

    Args:
      data_dir: as for `read`.
      num_rows: keep only so many rows, drawn at random; None keeps all.
      split_seed: which rows train and which test.
      log: takes lines of progress.
    """

    name = "movielens"
    bags: tuple[str, ...] = ("genres",)

    def __init__(
        self,
        data_dir: Path | str | None = None,
        num_rows: int | None = None,
        split_seed: int = 0,
        log: Callable[[str], None] = print,
    ):
        ratings = read(data_dir, log).filter(pl.col("user_rating") != 3)
        ratings = ratings[np.random.default_rng(split_seed).permutation(len(ratings))[:num_rows]]
        self.tables, ids = {}, {}
        for name, column in SINGLES.items():
            ids[name], self.tables[name] = numbered(ratings[column])
        ids["genres"], self.tables["genres"] = numbered_bags(ratings["movie_genres"], MAX_GENRES)
        label = (ratings["user_rating"] > 3).cast(pl.Float32).to_numpy()
        super().__init__(label, ids, len(ratings) - len(ratings) // 10)
