"""Sources that fit in memory: rows are numpy columns, an epoch permutes the training rows."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from experiments.data import batches
from mpembed_jax import NO_ID


def numbered(values: pl.Series) -> tuple[np.ndarray, int]:
    """Numbers the distinct values in sorted order: i32 [n] and how many there are."""
    ids = values.rank("dense").to_numpy().astype(np.int32) - 1
    return ids, int(ids.max()) + 1


def numbered_bags(lists: pl.Series, length: int) -> tuple[np.ndarray, int]:
    """Numbers the values in lists, at most `length` of each.

    Returns i32 [n, length], padded with NO_ID, and the number of distinct values.
    """
    lists = lists.list.head(length)
    ids = np.full((len(lists), length), NO_ID, np.int32)
    is_value = np.arange(length) < lists.list.len().to_numpy()[:, None]
    # An empty list explodes to one null, which is no value.
    ids[is_value], size = numbered(lists.explode().drop_nulls())
    return ids, size


class InMemory:
    """The rows of a source without dense inputs, those for training first.

    Args:
      label: f32 [n].
      ids: {feature: i32 [n] or [n, L]}.
      num_train: how many rows train.
    """

    num_dense = 0

    def __init__(self, label: np.ndarray, ids: dict[str, np.ndarray], num_train: int):
        self.label, self.ids, self.num_train, self.num_test = (
            label,
            ids,
            num_train,
            len(label) - num_train,
        )

    def _batch(self, rows: np.ndarray | slice) -> dict:
        label = self.label[rows]
        ids = {name: ids[rows] for name, ids in self.ids.items()}
        return {"dense": np.zeros((len(label), 0), np.float32), "ids": ids, "label": label}

    def train(
        self, batch_size: int, seed: int = 0, start: int = 0, num_epochs: int = 1
    ) -> Iterator[dict]:
        """Yields the full batches of the training rows in random order, from batch `start` on."""
        return map(
            self._batch,
            batches.permuted(
                self.num_train, batch_size, seed=seed, start=start, num_epochs=num_epochs
            ),
        )

    def test(self, batch_size: int) -> Iterator[dict]:
        """Yields the test rows in their order, the last batch possibly short."""
        for at in range(self.num_train, self.num_train + self.num_test, batch_size):
            yield self._batch(slice(at, min(at + batch_size, self.num_train + self.num_test)))
