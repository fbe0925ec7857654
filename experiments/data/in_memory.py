"""Sources that fit in memory: rows are numpy columns, an epoch permutes the training rows."""

from collections.abc import Iterator

import numpy as np
import polars as pl

import mpembed_jax as mpembed
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
    is_value, values = _flat(lists, length)
    ids = np.full(is_value.shape, NO_ID, np.int32)
    ids[is_value], size = numbered(values)
    return ids, size


def _flat(lists: pl.Series, length: int) -> tuple[np.ndarray, pl.Series]:
    """Returns which places of bool [n, length] the lists fill, and with what, list by list."""
    lists = lists.list.head(length)
    is_value = np.arange(length) < lists.list.len().to_numpy()[:, None]
    # An empty list explodes to one null, which is no value.
    return is_value, lists.explode().drop_nulls()


def hashed(columns: dict[str, pl.Series], length: int) -> dict[str, np.ndarray]:
    """Hashes values as they are, to the pairs that a stack of these tables has for them.

    Args:
      columns: {table: integers or strings, or lists of them}, all tables in their order.
      length: of a list, at most so many values are taken.

    Returns:
      {table: u32 [n, 2], or [n, length, 2] with padding}.
    """
    tables = tuple(mpembed.TableSpec(name) for name in columns)
    spec = mpembed.EmbeddingSpec(tables, 1, cache=None, vocabulary=mpembed.VocabularySpec(1))
    pairs: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        if not isinstance(values.dtype, pl.List):
            pairs |= spec.raw_ids({name: values})
            continue
        is_value, flat = _flat(values, length)
        padding = spec.raw_ids({name: [None]})[name]  # u32 [1, 2]
        pairs[name] = np.tile(padding, (*is_value.shape, 1))
        pairs[name][is_value] = spec.raw_ids({name: flat})[name]
    return pairs


class InMemory:
    """The rows of a source without dense inputs, those for training first.

    Args:
      label: f32 [n].
      ids: {feature: i32 [n] or [n, L]}.
      num_train: how many rows train.
      pairs: of raw ids, from `hashed`; None: batches have none.
    """

    num_dense = 0

    def __init__(
        self,
        label: np.ndarray,
        ids: dict[str, np.ndarray],
        num_train: int,
        pairs: dict[str, np.ndarray] | None = None,
    ):
        self.label, self.ids, self.pairs = label, ids, pairs
        self.num_train, self.num_test = num_train, len(label) - num_train

    def _batch(self, rows: np.ndarray | slice) -> dict:
        label = self.label[rows]
        ids = {name: ids[rows] for name, ids in self.ids.items()}
        batch: dict = {"dense": np.zeros((len(label), 0), np.float32), "ids": ids, "label": label}
        if self.pairs is not None:
            batch["pairs"] = {name: pairs[rows] for name, pairs in self.pairs.items()}
        return batch

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
