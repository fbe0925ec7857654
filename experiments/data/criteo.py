"""Criteo-Kaggle from the raw `train.txt` of the Display Advertising Challenge.

The text, plain or gzipped, lies in a user's folder. The text (11 GB) is read once into a dataset of
tensorflow-datasets beside it (criteo_kaggle.py says how it is split and stored); runs with the same
file start from that. Ids are numbered by a dictionary of the training days, stored as a second
dataset per minimum count, or hashed as they are read, or left as the text has them: 8 hex digits
are a 32-bit word. A file that has changed since is another file: it is prepared anew, in another
folder. Nothing here downloads the data. Bad lines are reported by file and line number.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data import batches, criteo_format, criteo_kaggle, numbering
from experiments.data.criteo_kaggle import (
    CATEGORIES,
    BadLinesError,
    CriteoKaggle,
    find,
    fingerprint,
    quote,
)
from experiments.data.prepared import SIZES, BlockSplit, Sizes, described, prepared

NUM_WORDS = 1 << 32  # that 8 hex digits can be
HOLDOUTS = {"test": ("test",), "validation": ("validation",), "day": ("validation", "test")}


class Mapped:
    """Blocks whose categories become ids as they are read.

    Args:
      blocks: of the raw config.
      ids_of: returns the ids [n, 26] of categories u32 [n, 26].
    """

    def __init__(self, blocks: batches.Blocks, ids_of: Callable[[np.ndarray], np.ndarray]):
        self.num_rows, self.block_rows = blocks.num_rows, blocks.block_rows
        self._blocks, self._ids_of = blocks, ids_of

    def read(self, numbers: Sequence[int]) -> list[batches.Arrays]:
        """Returns the blocks with these numbers."""
        read = self._blocks.read(numbers)
        return [{"ids": self._ids_of(b.pop("categories")), **b} for b in read]


class CriteoLog:
    """The source.

    Args:
      path: train.txt, train.txt.gz, or the folder that holds one.
      cache_dir: where the datasets go; None: `mpembed_cache` in the folder of the text.
      mapping: "dictionary", "hash", or "raw": the words of the text, u32, 0 for missing ones.
        Nothing counts or numbers them.
      min_count: dictionary: values seen fewer times in training share one id.
      hash_size: hash: vocabulary size of every table.
      max_bad_lines: bad lines skipped before giving up.
      max_rows: use only so many lines of the file; None: all.
      holdout: "test" or "validation", a half of the last day, or "day", all of it.
      log: takes lines of progress and the report of bad lines.
      sizes: of the pieces in which the data is read, stored and shuffled.

    Raises:
      FileNotFoundError: if there is no such file.
      BadLinesError: if too many lines are bad.
      ValueError: on a mapping that makes no sense.
    """

    name = "criteo"
    num_dense = criteo_format.NUM_DENSE
    bags: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path | str,
        *,
        cache_dir: Path | str | None = None,
        mapping: Literal["dictionary", "hash", "raw"] = "dictionary",
        min_count: int = 1,
        hash_size: int = 1_000_000,
        max_bad_lines: int = 100,
        max_rows: int | None = None,
        holdout: Literal["test", "validation", "day"] = "test",
        log: Callable[[str], None] = print,
        sizes: Sizes = SIZES,
    ):
        is_known = mapping in ("dictionary", "hash", "raw")
        if not is_known or min_count < 1 or not 3 <= hash_size < 2**31 - 1:
            raise ValueError(
                'mapping must be "raw", "dictionary" with min_count >= 1 or "hash" with 3 <= '
                "hash_size < 2**31 - 1, "
                f"got {mapping!r}, min_count={min_count}, hash_size={hash_size}"
            )
        file = find(path)
        key = hashlib.sha256(
            " ".join(map(str, [*fingerprint(file), max_rows])).encode()
        ).hexdigest()[:16]
        folder = Path(cache_dir or file.parent / "mpembed_cache") / key
        is_numbered = mapping == "dictionary"
        config = criteo_kaggle.by_dictionary(min_count) if is_numbered else criteo_kaggle.RAW

        def make() -> CriteoKaggle:
            options = {"max_bad_lines": max_bad_lines, "max_rows": max_rows, "log": log}
            with described(folder):
                return CriteoKaggle(
                    text=file, data_dir=folder, config=config, sizes=sizes, **options
                )

        builder = prepared(make)
        with described(folder):
            self.bad_lines = [
                criteo_format.BadLine(int(number), str(reason))
                for number, reason in builder.info.metadata["bad_lines"]
            ]
            self.tables: dict[str, int] = (
                _tables(builder.info.metadata["tables"])
                if is_numbered
                else dict.fromkeys(CATEGORIES, hash_size if mapping == "hash" else NUM_WORDS)
            )
        if len(self.bad_lines) > max_bad_lines:
            raise BadLinesError(
                f"{file} has {len(self.bad_lines)} bad lines, more than {max_bad_lines} "
                "(max_bad_lines):\n"
                f"{quote(file, self.bad_lines)}"
            )
        if self.bad_lines:
            log(f"{len(self.bad_lines)} bad lines skipped:\n{quote(file, self.bad_lines)}")

        def blocks(split: str) -> batches.Blocks:
            match mapping:
                case "raw":
                    return Mapped(BlockSplit(builder, split), lambda words: words)
                case "hash":
                    by_hash = functools.partial(numbering.number_by_hash, hash_size=hash_size)
                    return Mapped(BlockSplit(builder, split), by_hash)
            return BlockSplit(builder, split, {"ids": np.array(list(self.tables.values()))})

        self._blocks_together = sizes.blocks_together
        self.train_blocks, self._held_out = (
            blocks("train"),
            [blocks(split) for split in HOLDOUTS[holdout]],
        )
        self.num_train, self.num_test = (
            self.train_blocks.num_rows,
            sum(b.num_rows for b in self._held_out),
        )

    def train(
        self, batch_size: int, seed: int = 0, start: int = 0, num_epochs: int = 1
    ) -> Iterator[batches.Arrays]:
        """Yields full batches of the first six days from batch `start` on.

        They are shuffled as in `batches.shuffled`.
        """
        taken = batches.shuffled(
            self.train_blocks,
            batch_size,
            seed=seed,
            start=start,
            num_epochs=num_epochs,
            blocks_together=self._blocks_together,
        )
        return map(_as_batch, taken)

    def test(self, batch_size: int) -> Iterator[batches.Arrays]:
        """Yields the held-out rows in their order.

        The last batch of a half of the day may be short.
        """
        for blocks in self._held_out:
            yield from map(_as_batch, batches.in_order(blocks, batch_size))


def _tables(sizes: dict[str, int]) -> dict[str, int]:
    """Returns the vocabulary sizes of a dataset's description, after checking them."""
    if list(sizes) != list(CATEGORIES):
        raise ValueError(f"tables {list(sizes)}")
    for name, size in sizes.items():
        if type(size) is not int or not 2 <= size < 2**31:
            raise ValueError(f"{name} has {size!r} ids")
    return dict(sizes)


def _as_batch(rows: batches.Arrays) -> batches.Arrays:
    return {"dense": rows["dense"], "ids": rows["ids"], "label": rows["label"].astype(np.float32)}
