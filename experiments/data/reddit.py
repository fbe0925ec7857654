"""Reddit posts as a click-through task: does a post get at least 11 comments?

Features: subreddit, domain, hour, weekday, is_self, and the title's words as a bag of at most 16.
Posts before 2012-04 train, 2012-04 to 06 test, so the test set has new words, domains and
subreddits. Every distinct value has its own id, no minimum count; ids of values that only test
posts have are never trained. The file (posts_before_2012-07.parquet, PDDL 1.0, public domain) is
not part of the project: its folder is given, or named by MPEMBED_DATA, or ../shared/data beside the
repository. Links, scores and authors are not used.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from experiments.data import batches
from experiments.data.in_memory import InMemory, hashed, numbered, numbered_bags

FILE = Path("reddit") / "posts_before_2012-07.parquet"
COLUMNS = ("created_utc", "subreddit", "domain", "is_self", "title", "num_comments")
SINGLES = ("subreddit", "domain", "hour", "weekday", "is_self")
MAX_TOKENS = 16
MIN_COMMENTS = 11
TEST_FROM = int(datetime.datetime(2012, 4, 1, tzinfo=datetime.UTC).timestamp())
WORD = r"[\w']+"


def find(path: Path | str | None = None) -> Path:
    """Returns the parquet file.

    It is `path` (file or folder), else under MPEMBED_DATA, else under ../shared/data.

    Raises:
      FileNotFoundError: naming every place looked at.
    """
    if path is not None:
        roots = [Path(path)]
    elif "MPEMBED_DATA" in os.environ:
        roots = [Path(os.environ["MPEMBED_DATA"])]
    else:
        roots = [Path(__file__).resolve().parents[3] / "shared" / "data"]
    places = [place for root in roots for place in (root, root / FILE.name, root / FILE)]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no {FILE.name} at {', '.join(map(str, places))}; pass its folder, or set MPEMBED_DATA "
        "to the data folder"
    )


def check(path: Path | str | None = None) -> None:
    """Looks whether the file is a parquet file with the columns of posts; reads no rows.

    Raises:
      FileNotFoundError: naming every place looked at.
      ValueError: if it is something else.
    """
    file = find(path)
    with _told(file):
        columns = pl.read_parquet_schema(file)
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f"{file} has no column {missing[0]}; posts have {', '.join(COLUMNS)}")


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Turns what polars raises into a ValueError of one line."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except BaseException as error:
        # A panic of polars is no Exception.
        is_polars = isinstance(error, pl.exceptions.PolarsError)
        if not is_polars and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is not a parquet file of posts: {reason}") from error


def created_months(created_utc: pl.Series) -> np.ndarray:
    """Returns the month of each second since 1970: int32 [n], twelve times the year and more."""
    created = pl.from_epoch(created_utc, time_unit="s")
    return (12 * created.dt.year().cast(pl.Int32) + created.dt.month() - 1).to_numpy()


class RedditPosts(InMemory):
    """The source, about 60 MB: 588,138 posts in time order.

    `month` has the month of each post, see created_months.

    Args:
      path: the parquet file or its folder; None looks in the default places.
      num_rows: keep only the last `num_rows` training and the first `num_rows` test posts; None
        keeps all.
      in_time_order: train on the posts as they came, whatever the seed; the ids then drift while
        training.
      raw: batches also have the pairs of the names, words and integers themselves; 100 MB more.
    """

    name = "reddit"
    bags: tuple[str, ...] = ("title",)

    def __init__(
        self,
        path: Path | str | None = None,
        num_rows: int | None = None,
        *,
        in_time_order: bool = False,
        raw: bool = False,
    ):
        self.in_time_order = in_time_order
        check(path)
        with _told(find(path)):
            self._read(path, num_rows, raw)

    def _read(self, path: Path | str | None, num_rows: int | None, raw: bool) -> None:
        posts = pl.read_parquet(find(path)).sort("created_utc", maintain_order=True)
        if num_rows is not None:
            is_train = pl.col("created_utc") < TEST_FROM
            posts = pl.concat(
                [posts.filter(is_train).tail(num_rows), posts.filter(~is_train).head(num_rows)]
            )
        if posts.is_empty():
            raise ValueError(f"{find(path)} has no posts")
        created = pl.from_epoch(pl.col("created_utc"), time_unit="s")
        posts = posts.with_columns(
            hour=created.dt.hour(),
            weekday=created.dt.weekday() - 1,
            is_self=pl.col("is_self").cast(pl.Int8),
            words=pl.col("title").str.to_lowercase().str.extract_all(WORD),
        )
        self.tables, ids = {}, {}
        for name in SINGLES:
            ids[name], self.tables[name] = numbered(posts[name])
        for name, size in (("hour", 24), ("weekday", 7), ("is_self", 2)):
            ids[name], self.tables[name] = posts[name].to_numpy().astype(np.int32), size
        ids["title"], self.tables["title"] = numbered_bags(posts["words"], MAX_TOKENS)
        label = (posts["num_comments"] >= MIN_COMMENTS).cast(pl.Float32).to_numpy()
        columns = {name: posts[name] for name in SINGLES} | {"title": posts["words"]}
        pairs = hashed(columns, MAX_TOKENS) if raw else None
        self.month = created_months(posts["created_utc"])
        super().__init__(label, ids, int((posts["created_utc"] < TEST_FROM).sum()), pairs)

    def train(
        self, batch_size: int, seed: int = 0, start: int = 0, num_epochs: int = 1
    ) -> Iterator[dict]:
        """Yields the full batches of the training posts, from batch `start` on.

        The order is random unless `in_time_order`.
        """
        if not self.in_time_order:
            yield from super().train(batch_size, seed, start, num_epochs)
            return
        for _, taken in batches.epochs(self.num_train, batch_size, start, num_epochs):
            for at in range(taken * batch_size, self.num_train - batch_size + 1, batch_size):
                yield self._batch(slice(at, at + batch_size))
