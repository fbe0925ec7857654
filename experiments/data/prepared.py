"""Datasets of tensorflow-datasets on disk, with rows in blocks of thousands.

One process prepares a dataset once. It is there whole or not at all. tensorflow-datasets (4.9.10)
writes and reads array_record files without TensorFlow, at some 30,000 records/s whatever their
size, which is why a record of ours is a block of rows: one array per feature, stored as its bytes.
It prepares a dataset in a folder of another name and renames that at the end, so a folder with the
right name is whole. Two processes that prepare the same dataset at once would collide in the
renaming: here the second waits for the first and uses its result.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError

from experiments.data import batches, criteo_format
from experiments.data.batches import Arrays

INFO = "dataset_info.json"  # what tensorflow-datasets writes last


class Sizes(NamedTuple):
    """How much is read, stored and shuffled at once.

    Attributes:
      text_bytes: bytes of text that are parsed at once.
      block_rows: rows of a block.
      blocks_per_file: blocks of a file of the dataset.
      blocks_together: blocks whose rows are shuffled together.
    """

    text_bytes: int = criteo_format.BLOCK_BYTES
    block_rows: int = 4096
    blocks_per_file: int = 256
    blocks_together: int = batches.BLOCKS_TOGETHER


SIZES = Sizes()


class DamagedError(RuntimeError):
    """Files of a prepared dataset are missing, cut or changed."""

    @staticmethod
    def at(folder: Path, reason: object) -> "DamagedError":
        """Returns the error that says what to do."""
        text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        return DamagedError(f"{folder} is damaged ({text}); delete it and prepare it again")


@contextlib.contextmanager
def described(folder: Path) -> Iterator[None]:
    """Turns what a damaged description of a dataset in `folder` raises into a DamagedError.

    It may come from a stranger, so nothing that it says is taken for granted.
    """
    try:
        yield
    except (DamagedError, FileNotFoundError, PermissionError, FileExistsError):
        raise
    except (
        ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, OSError,
        RuntimeError, AssertionError, ParseError,
    ) as error:  # fmt: skip
        raise DamagedError.at(folder, error) from error


def block_features(features: dict[str, tuple[tuple[int, ...], type]]) -> tfds.features.FeaturesDict:
    """Describes a record that is a block: {feature: (shape of one row, dtype)}."""
    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(
                shape=(None, *shape), dtype=dtype, encoding=tfds.features.Encoding.BYTES
            )
            for name, (shape, dtype) in features.items()
        }
    )


class BlockSplit:
    """One split of a prepared dataset of blocks, as `batches.Blocks`.

    Args:
      builder: prepared; its metadata holds num_rows {split: rows} and block_rows.
      split: its name.
      limits: {feature: numbers [columns] below which its values lie, from 0 on}.

    Raises:
      DamagedError: if the files do not hold the blocks that the metadata promises.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        limits: dict[str, np.ndarray] | None = None,
    ):
        self.folder, self._limits = Path(builder.data_dir), limits or {}
        with described(self.folder):
            metadata = builder.info.metadata
            self.num_rows: int = metadata["num_rows"][split]
            self.block_rows: int = metadata["block_rows"]
            for size in (self.num_rows, self.block_rows):
                if type(size) is not int or size < 1:
                    raise ValueError(f"{size!r} rows")
            self._records = builder.as_data_source(split)
            if len(self._records) != -(-self.num_rows // self.block_rows):
                raise ValueError(
                    f"{len(self._records)} blocks of {self.block_rows} for {split}'s "
                    f"{self.num_rows} rows"
                )

    def read(self, numbers: Sequence[int]) -> list[Arrays]:
        """Returns the blocks with these numbers.

        Raises:
          DamagedError: if a file is missing, cut or changed.
        """
        # array_record raises RuntimeError and ValueError for its files, the decoding for records.
        with described(self.folder):
            blocks = self._records.__getitems__(numbers)
            for number, block in zip(numbers, blocks, strict=True):
                num_rows = min(self.block_rows, self.num_rows - number * self.block_rows)
                if any(len(array) != num_rows for array in block.values()):
                    raise ValueError(f"block {number} has not {num_rows} rows")
                for name, limit in self._limits.items():
                    if not ((block[name] >= 0) & (block[name] < limit)).all():
                        raise ValueError(f"{name} of block {number} are out of range")
        return blocks


def is_whole(builder: tfds.core.DatasetBuilder) -> bool:
    """Says whether the builder's dataset is on disk."""
    return (Path(builder.data_dir) / INFO).is_file()


def prepared(
    make: Callable[[], tfds.core.DatasetBuilder],
    download_config: tfds.download.DownloadConfig | None = None,
) -> tfds.core.DatasetBuilder:
    """Returns a builder whose dataset is on disk, after writing it if need be.

    Args:
      make: makes the builder; called again once the dataset is there, since a builder reads its
        description when made.
      download_config: as for download_and_prepare.

    Raises:
      PermissionError: if the folder cannot be written.
      FileExistsError: if something else lies where the dataset should be.
    """
    builder = make()
    place = Path(builder.data_dir)
    if is_whole(builder):
        return builder
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = (place.parent / ".lock").open("w")
    except OSError as error:
        raise PermissionError(
            f"cannot write {place.parent} ({error}); name a writable folder with cache_dir"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed when the file is closed, or the process dies
        if not is_whole(builder):
            if place.exists():
                raise FileExistsError(
                    f"{place} is there but holds no whole dataset ({INFO} is missing); delete it"
                )
            delete_unfinished(place)  # of a process that was killed
            try:
                builder.download_and_prepare(download_config=download_config)
            except BaseException:
                # The builder deletes its folder too, but not if a signal comes while it makes it.
                delete_unfinished(place)
                raise
    return make()


def delete_unfinished(place: Path) -> None:
    """Deletes the folders in which a dataset was being written that belongs at `place`."""
    for folder in place.parent.glob(f"incomplete.*_{place.name}"):
        shutil.rmtree(folder)
