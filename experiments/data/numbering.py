"""Numbers the values of categorical columns: by a dictionary of the training rows, or by hashing.

Values are u32, 0 meaning missing. A dictionary gives 0 to missing, 1 to values that training rows
have fewer than `min_count` times or never, and 2 and up to the others in order of value. Counts are
gathered in pieces, so that no column is ever in memory as a whole.
"""

import numpy as np

from experiments.data.hashing import fmix32


class Counts:
    """How often each value of each column occurred.

    Args:
      num_columns: columns of every piece.
      rows_together: rows that are sorted at once.
    """

    def __init__(self, num_columns: int, rows_together: int = 1 << 21):
        self._rows_together = rows_together
        self._values = [np.zeros(0, np.uint32)] * num_columns
        self._counts = [np.zeros(0, np.int64)] * num_columns
        self._waiting: list[np.ndarray] = []

    def add(self, raw: np.ndarray) -> None:
        """Counts the values of u32 [n, num_columns]."""
        self._waiting.append(raw)
        if sum(map(len, self._waiting)) >= self._rows_together:
            self._merge()

    def _merge(self) -> None:
        waiting, self._waiting = np.concatenate(self._waiting), []
        for t, (old, old_counts) in enumerate(zip(self._values, self._counts, strict=True)):
            new, new_counts = np.unique(waiting[:, t], return_counts=True)
            values, counts = np.concatenate([old, new]), np.concatenate([old_counts, new_counts])
            order = np.argsort(values, kind="stable")  # two sorted runs: merged in linear time
            values, counts = values[order], counts[order]
            first = np.flatnonzero(np.diff(values, prepend=values[:1] ^ 1))
            self._values[t], self._counts[t] = values[first], np.add.reduceat(counts, first)

    def dictionaries(self, min_count: int) -> list[np.ndarray]:
        """Returns the frequent values of each column: sorted u32, without 0.

        A value is frequent if it occurred at least `min_count` times.
        """
        if self._waiting:
            self._merge()
        return [
            v[(c >= min_count) & (v != 0)] for v, c in zip(self._values, self._counts, strict=True)
        ]


def vocabulary_size(dictionary: np.ndarray) -> int:
    """Returns how many ids `number_by_dictionary` can give."""
    return 2 + len(dictionary)


def number_by_dictionary(raw: np.ndarray, dictionary: np.ndarray) -> np.ndarray:
    """Numbers u32 [n] by a sorted dictionary: i32 [n], 0 for missing and 1 for unknown values."""
    if not len(dictionary):
        return (raw != 0).astype(np.int32)
    place = np.minimum(np.searchsorted(dictionary, raw), len(dictionary) - 1)
    ids = np.where(dictionary[place] == raw, place + 2, 1)
    return np.where(raw == 0, 0, ids).astype(np.int32)


def number_by_hash(raw: np.ndarray, hash_size: int) -> np.ndarray:
    """Hashes u32 [n, T] to ids i32 [n, T] in [1, hash_size), and keeps 0 for missing.

    Each column has its own hash.
    """
    salts = np.arange(1, raw.shape[1] + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    return np.where(raw == 0, 0, 1 + fmix32(raw ^ salts) % np.uint32(hash_size - 1)).astype(
        np.int32
    )
