"""The tensorflow-datasets builder of Criteo-Kaggle (Display Advertising Challenge 2014).

`train.txt` or `train.txt.gz` lies in the manual download folder (Criteo's terms forbid passing it
on). Config `raw` holds the categories as the u32 they are written as; `min_count_N` holds ids,
numbered by a dictionary of the training rows, and is made from `raw`. Records are blocks of 4,096
rows in the order of the file; array_record is the format.

Splits: the file is in time order over seven days, and line i (from 0) of n is taken to be of day 1
+ 7 i // n, as DLRM's own reader does. Days 1 to 6 are `train`; the first half of day 7's lines, the
longer one if they are odd, is `validation`, the rest `test`. So a file cut off anywhere still has
all three, down to 14 lines. Bad lines belong to the split they stand in and are skipped, up to a
limit.

It is a ShardBasedBuilder and not a GeneratorBasedBuilder, whose shuffler holds a whole split in
memory and spills to disk through TensorFlow from 1 GB on, even where nothing is shuffled.
"""

import dataclasses
import functools
import gzip
import itertools
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import criteo_format, numbering
from experiments.data.batches import Arrays, in_order, rebatched
from experiments.data.prepared import (
    SIZES,
    BlockSplit,
    Sizes,
    block_features,
    described,
    is_whole,
    prepared,
)

NAMES = ("train.txt", "train.txt.gz")
NUM_DAYS = 7
SHOWN = 10  # bad lines quoted in a report
CATEGORIES = criteo_format.COLUMNS[1 + criteo_format.NUM_DENSE :]


class BadLinesError(ValueError):
    """More lines are bad than the limit allows, or the file is not in Criteo's format."""


def find(path: Path | str) -> Path:
    """Returns the file: `path` itself, or train.txt or train.txt.gz in it.

    Raises:
      FileNotFoundError: saying what was looked for.
    """
    path = Path(path).expanduser()
    for place in (path, *(path / name for name in NAMES)):
        if place.is_file():
            return place
    raise FileNotFoundError(f"{path} is neither a file nor a folder with {' or '.join(NAMES)}")


def check(path: Path | str) -> None:
    """Looks whether the first lines of the text are Criteo's.

    Raises:
      FileNotFoundError: as find.
      BadLinesError: if none of them is.
    """
    file = find(path)
    try:
        with criteo_format.open_file(file) as source:
            block = next(criteo_format.read_blocks(source, 1 << 16), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadLinesError(f"{file} is a gzip file, cut short or damaged: {error}") from error
    if not block:
        raise BadLinesError(f"{file} is empty")
    rows = criteo_format.parse(block)
    if len(rows.bad) == rows.num_lines:
        raise BadLinesError(f"{file} is not Criteo's text: line 1 has {rows.bad[0].reason}")


def fingerprint(file: Path) -> list:
    """Returns the identity of a file's contents: name, bytes and time of the last change in ns."""
    seen = file.stat()
    return [file.name, seen.st_size, seen.st_mtime_ns]


def quote(file: Path | str, bad: list) -> str:
    """Lists bad lines, (number, reason) each, as `file:number: reason`."""
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "\n".join(f"  {file}:{number}: {reason}" for number, reason in bad[:SHOWN]) + more


def split_lines(num_lines: int) -> dict[str, tuple[int, int]]:
    """Returns the first line (from 0) of each split, and the line after its last.

    The splits are days 1 to 6, and the two halves of day 7.

    Raises:
      ValueError: if one of them would have no line.
    """
    day_7 = num_lines - num_lines // NUM_DAYS
    half = (day_7 + num_lines + 1) // 2
    if not 0 < day_7 < half < num_lines:
        raise ValueError(
            f"{num_lines} lines are too few: both halves of day 7 need one each, so 14 in all"
        )
    return {"train": (0, day_7), "validation": (day_7, half), "test": (half, num_lines)}


class TextRows:
    """Reads the text on and on, and keeps account of bad lines.

    Args:
      file: the text.
      max_bad_lines: how many bad lines are skipped.
      log: takes lines of progress.
      text_bytes: bytes that are parsed at once.
    """

    def __init__(self, file: Path, max_bad_lines: int, log: Callable[[str], None], text_bytes: int):
        self.file, self.max_bad_lines, self.log = file, max_bad_lines, log
        self.text_bytes = text_bytes
        self.bad: list[criteo_format.BadLine] = []
        self.line = 0  # lines that were given out
        self._blocks = self._read()
        self._rows: criteo_format.Rows | None = (
            None  # parsed, from line `_first` on, not all given out
        )
        self._first = 0

    def _read(self) -> Generator[bytes, None, None]:
        """Yields blocks of whole lines.

        Raises:
          BadLinesError: instead of what reading raises, with the line reached.
        """
        num_lines = 0
        try:
            with criteo_format.open_file(self.file) as source:
                for block in criteo_format.read_blocks(source, self.text_bytes):
                    yield block
                    num_lines += block.count(b"\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BadLinesError(
                f"{self.file}:{num_lines + 1}: the gzip file is cut short or damaged: {error}"
            ) from error
        except BadLinesError:
            raise
        except ValueError as error:
            raise BadLinesError(f"{self.file}:{num_lines + 1}: {error}") from error

    def close(self) -> None:
        """Closes the file, wherever reading has come to."""
        self._blocks.close()

    def count_lines(self) -> int:
        """Returns how many lines the file has; a last line may lack its line feed."""
        return sum(block.count(b"\n") for block in self._read())

    def _parse(self) -> criteo_format.Rows:
        block = next(self._blocks, None)
        if block is None:
            raise BadLinesError(
                f"{self.file} ends after {self.line} lines: it was cut while it was read"
            )
        rows = criteo_format.parse(block, self.line + 1)
        self.bad += rows.bad
        if len(self.bad) > self.max_bad_lines:
            raise BadLinesError(
                f"{self.file} has more than {self.max_bad_lines} bad lines (max_bad_lines) among "
                "its first "
                f"{self.line + rows.num_lines}:\n{quote(self.file, self.bad)}"
            )
        return rows

    def until(self, last: int) -> Iterator[Arrays]:
        """Yields the good rows up to line `last` (from 0, not included), in pieces.

        It begins where the previous call stopped.
        """
        while self.line < last:
            if self._rows is None:
                self._rows, self._first = self._parse(), self.line
            bad = [b.number - 1 for b in self._rows.bad]
            good = np.setdiff1d(
                np.arange(self._first, self._first + self._rows.num_lines), bad, assume_unique=True
            )
            taken = slice(*np.searchsorted(good, [self.line, last]))
            piece = {
                "label": self._rows.label,
                "dense": self._rows.dense,
                "categories": self._rows.categories,
            }
            end = self._first + self._rows.num_lines
            if self.line // 5_000_000 < min(last, end) // 5_000_000:
                self.log(f"{self.file.name}: {min(last, end):,} lines read")
            self.line = min(last, end)
            if self.line == end:
                self._rows = None
            if taken.start < taken.stop:
                yield {name: array[taken] for name, array in piece.items()}


@dataclasses.dataclass
class CriteoConfig(tfds.core.BuilderConfig):
    """A config: raw categories, or ids by a dictionary.

    The dictionary has the values that occur at least `min_count` times in training.
    """

    min_count: int | None = None


RAW = CriteoConfig(
    name="raw", description="categories as the u32 they are written as, 0 for missing"
)


@functools.cache  # a registered config has to be given as the same object
def by_dictionary(min_count: int) -> CriteoConfig:
    """Returns the config of ids numbered by a dictionary."""
    description = (
        f"ids: 0 missing, 1 fewer than {min_count} times in training, then values in order"
    )
    return CriteoConfig(name=f"min_count_{min_count}", description=description, min_count=min_count)


class Info(tfds.core.DatasetInfo):
    """A description that is not looked for in a bucket of Google's, which has none."""

    def initialize_from_bucket(self) -> None:
        """Does nothing; the original makes a temporary folder, leaves it, and asks the network."""


class CriteoKaggle(tfds.core.ShardBasedBuilder):
    """Criteo-Kaggle in blocks of rows.

    As every builder it takes a dataset that is there for what it would make; whether the text has
    changed since is asked by `criteo.CriteoLog`, which gives each state of a file a data_dir of its
    own.

    Args:
      text: the file; None: train.txt or train.txt.gz in the manual download folder.
      max_bad_lines: bad lines skipped before giving up.
      max_rows: use only so many lines of the file; None: all.
      log: takes lines of progress.
      sizes: of blocks and files.
      **kwargs: of every builder (data_dir, config); the file format is array_record.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: tuple = (RAW, by_dictionary(1), by_dictionary(10))
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put train.txt or train.txt.gz of Criteo's Display Advertising Challenge there."
    )

    def __init__(
        self,
        *,
        text: Path | None = None,
        max_bad_lines: int = 100,
        max_rows: int | None = None,
        log: Callable[[str], None] = print,
        sizes: Sizes = SIZES,
        **kwargs: Any,
    ):
        self._text, self._max_bad_lines, self._max_rows, self._log = (
            text,
            max_bad_lines,
            max_rows,
            log,
        )
        self._sizes = sizes
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        categories: dict = {"categories": ((len(CATEGORIES),), np.uint32)}
        if self.builder_config.min_count is not None:
            categories = {"ids": ((len(CATEGORIES),), np.int32)}
        dense = {
            "dense": ((criteo_format.NUM_DENSE,), np.float32)
        }  # log(x + 1), missing and negative 0
        return Info(
            builder=self,
            description=__doc__,
            features=block_features({"label": ((), np.uint8), **dense, **categories}),
            homepage="https://www.kaggle.com/c/criteo-display-ad-challenge",
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(block_rows=self._sizes.block_rows),
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable]]:
        """Lists for each split one function per file that yields its blocks.

        The functions must be called in order.
        """
        if self.builder_config.min_count is None:
            return self._from_text(self._text or find(dl_manager.manual_dir))
        return self._from_raw(dl_manager)

    def _files(self, split: str, num_rows: int, parts: Iterator[Arrays]) -> list[Callable]:
        """Divides the rows that `parts` will yield, about `num_rows`, into files.

        The last file takes the remaining rows.
        """
        counts = self.info.metadata.setdefault("num_rows", {})
        counts[split] = 0
        blocks_per_file = self._sizes.blocks_per_file
        blocks = rebatched(parts, self._sizes.block_rows, keep_rest=True)
        num_files = max(1, num_rows // (self._sizes.block_rows * blocks_per_file))

        def write(number: int) -> Iterator[tuple[int, Arrays]]:
            last = None if number == num_files - 1 else blocks_per_file
            for index, block in enumerate(itertools.islice(blocks, last)):
                counts[split] += len(block["label"])
                yield number * blocks_per_file + index, block
            if last is None and not counts[split]:
                raise BadLinesError(f"{split} has no good line")

        return [functools.partial(write, number) for number in range(num_files)]

    def _from_text(self, file: Path) -> dict[str, list[Callable]]:
        seen = fingerprint(file)
        rows = TextRows(file, self._max_bad_lines, self._log, self._sizes.text_bytes)
        num_lines = rows.count_lines()
        num_lines = num_lines if self._max_rows is None else min(num_lines, self._max_rows)
        try:
            lines = split_lines(num_lines)
        except ValueError as error:
            raise BadLinesError(f"{file}: {error}") from error
        self.info.metadata.update(num_lines=num_lines, source=seen, bad_lines=rows.bad)

        def checked(last: int) -> Iterator[Arrays]:
            try:
                yield from rows.until(last)
                if fingerprint(file) != seen:
                    raise BadLinesError(f"{file} was changed while it was read; prepare it again")
            except BaseException:
                rows.close()
                raise
            if last == num_lines:
                rows.close()

        return {
            name: self._files(name, last - first, checked(last))
            for name, (first, last) in lines.items()
        }

    def _from_raw(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Callable]]:
        """Numbers the categories of config `raw`, which is prepared first if it is not there."""
        options = {
            "max_bad_lines": self._max_bad_lines,
            "max_rows": self._max_rows,
            "log": self._log,
            "sizes": self._sizes,
        }
        text = self._text

        def make() -> CriteoKaggle:
            with described(Path(self.data_dir_root)):
                return CriteoKaggle(config=RAW, data_dir=self.data_dir_root, text=text, **options)

        if text is None and not is_whole(make()):
            text = find(dl_manager.manual_dir)
        raw = prepared(make)
        splits = {name: BlockSplit(raw, name) for name in raw.info.metadata["num_rows"]}
        self._log(f"numbering the ids of {len(CATEGORIES)} columns")
        counts = numbering.Counts(len(CATEGORIES))
        for block in in_order(splits["train"], self._sizes.block_rows):
            counts.add(block["categories"])
        dictionaries = counts.dictionaries(self.builder_config.min_count)
        tables = {
            n: numbering.vocabulary_size(d) for n, d in zip(CATEGORIES, dictionaries, strict=True)
        }
        copied = {k: raw.info.metadata[k] for k in ("num_lines", "source", "bad_lines")}
        self.info.metadata.update(copied, tables=tables)

        def numbered(split: BlockSplit) -> Iterator[Arrays]:
            for block in in_order(split, self._sizes.block_rows):
                columns = zip(block.pop("categories").T, dictionaries, strict=True)
                yield {
                    **block,
                    "ids": np.stack([numbering.number_by_dictionary(*c) for c in columns], axis=1),
                }

        return {
            name: self._files(name, split.num_rows, numbered(split))
            for name, split in splits.items()
        }
