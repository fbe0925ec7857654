"""MovieLens-1M as a click-through task: did a user rate a movie above 3 stars, or below?

Ratings of exactly 3 are left out, 739,012 remain. Features: user, movie, gender, age group,
occupation, zip code, and the movie's genres as a bag. Rows are divided at random, nine parts to
train and one to test. Every distinct value has its id.

The ratings are downloaded once (GroupLens' terms forbid passing them on), or ml-1m.zip is put into
the folder of datasets by hand. `movielens/1m-ratings` of tensorflow-datasets stores one rating per
record, which is slow to read. What is read is kept beside them as parquet.
"""

import dataclasses
import functools
import hashlib
import os
import queue
import tempfile
import threading
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.structured import movielens_parsing

from experiments.data.in_memory import InMemory, hashed, numbered, numbered_bags
from experiments.data.prepared import is_whole, prepared

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


@dataclasses.dataclass(frozen=True)
class Archive:
    """The file to download."""

    url: str = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    sha256: str | None = None  # None: that which tensorflow-datasets knows
    seconds: float = 10  # the time that its host has for an answer

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[1]

    @property
    def host(self) -> str:
        """Name of the host."""
        return self.url.split("/")[2]


ML_1M = Archive()


def ratings_file(data_dir: Path | str | None = None) -> Path:
    """Returns the parquet file that keeps the ratings; see `read`."""
    return Path(_builder(data_dir).data_dir) / "ratings.parquet"


def _builder(data_dir: Path | str | None) -> Any:
    # The original makes a temporary folder, leaves it, and asks a bucket of Google's.
    not_asked = mock.patch.object(
        tfds.core.DatasetInfo, "initialize_from_bucket", lambda self: None
    )
    with not_asked:
        return tfds.builder("movielens/1m-ratings", data_dir=data_dir, file_format="array_record")


def read(
    data_dir: Path | str | None = None,
    log: Callable[[str], None] = print,
    archive: Archive = ML_1M,
) -> pl.DataFrame:
    """Returns all ratings, one row each, in the order of user and movie.

    It downloads and prepares them if needed.

    Args:
      data_dir: folder of tensorflow-datasets; None: its own default, ~/tensorflow_datasets.
      log: takes lines of progress.
      archive: what to download.

    Raises:
      ConnectionError: if the ratings are not there and cannot be downloaded.
      ValueError: if ml-1m.zip is another file.
    """
    kept = ratings_file(data_dir)
    if kept.is_file():
        return pl.read_parquet(kept)
    builder = _builder(data_dir)
    if not is_whole(builder):
        root = Path(builder.data_dir).parents[2]
        path = root / archive.name
        if not path.is_file():
            _download(archive, path, log)
        _check(archive, path, builder.url_infos)
        # tensorflow-datasets needs TensorFlow to unpack a file.
        with tempfile.TemporaryDirectory(dir=root) as folder:
            zipfile.ZipFile(path).extractall(folder)
            unpacked = mock.patch.object(
                tfds.download.DownloadManager,
                "download_and_extract",
                lambda self, url: Path(folder),
            )
            with unpacked, mock.patch.object(movielens_parsing, "tf", FILES):
                builder = prepared(functools.partial(_builder, data_dir))
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


def _download(archive: Archive, path: Path, log: Callable[[str], None]) -> None:
    """Downloads the archive to `path`, whole or not at all.

    Raises:
      ConnectionError: saying what to put where.
    """
    reason = unreachable(archive)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if reason is None:
            log(f"downloading {archive.url}, 6 MB, once")
            path.parent.mkdir(parents=True, exist_ok=True)
            with requests.get(archive.url, timeout=archive.seconds) as answer:
                answer.raise_for_status()
                part.write_bytes(answer.content)
            part.rename(path)
            return
    except requests.exceptions.RequestException as error:
        reason = str(error)
    finally:
        part.unlink(missing_ok=True)
    raise ConnectionError(
        f"MovieLens-1M is not in {path.parent} and could not be downloaded ({reason}); download "
        f"{archive.url} elsewhere and put it there"
    )


def _check(archive: Archive, path: Path, known: Mapping[str, Any]) -> None:
    """Compares the file at `path` with the archive.

    Raises:
      ValueError: if it is another one.
    """
    checksum = archive.sha256 or known[archive.url].checksum
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
            raise ValueError(
                f"{path} is not the file at {archive.url}, or was cut; download it again"
            )


def unreachable(archive: Archive) -> str | None:
    """Says why the download's host does not answer in its time, None if it does.

    In a thread, because looking up a name of a host can take longer than any limit.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            requests.head(archive.url, timeout=archive.seconds, allow_redirects=True)
            answers.put(None)
        except requests.exceptions.RequestException as error:
            answers.put(f"{type(error).__name__}: no answer from {archive.host}")

    threading.Thread(target=ask, daemon=True).start()
    limit = archive.seconds + 2
    try:
        return answers.get(timeout=limit)
    except queue.Empty:
        return f"{archive.host} did not answer within {limit:.0f} s"


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
      archive: what to download.
      raw: batches also have the pairs of MovieLens' own ids, names and codes; 70 MB more.
    """

    name = "movielens"
    bags: tuple[str, ...] = ("genres",)

    def __init__(
        self,
        data_dir: Path | str | None = None,
        num_rows: int | None = None,
        split_seed: int = 0,
        log: Callable[[str], None] = print,
        archive: Archive = ML_1M,
        *,
        raw: bool = False,
    ):
        ratings = read(data_dir, log, archive).filter(pl.col("user_rating") != 3)
        ratings = ratings[np.random.default_rng(split_seed).permutation(len(ratings))[:num_rows]]
        self.tables, ids = {}, {}
        for name, column in SINGLES.items():
            ids[name], self.tables[name] = numbered(ratings[column])
        ids["genres"], self.tables["genres"] = numbered_bags(ratings["movie_genres"], MAX_GENRES)
        label = (ratings["user_rating"] > 3).cast(pl.Float32).to_numpy()
        pairs = None
        if raw:
            columns = {name: ratings[column] for name, column in SINGLES.items()}
            # Stored as bool and float; raw ids are integers.
            columns["gender"] = columns["gender"].cast(pl.Int8)
            columns["age"] = columns["age"].cast(pl.Int16)
            pairs = hashed(columns | {"genres": ratings["movie_genres"]}, MAX_GENRES)
        super().__init__(label, ids, len(ratings) - len(ratings) // 10, pairs)
