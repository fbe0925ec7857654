"""The rows with the largest dot products with a query, found block by block.

No float32 table is made.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.numerics.packing import decode
from mpembed_jax.row_ids import NO_ID

BLOCK = 16384  # rows that are decoded at once


class Best:
    """The ids of the k largest scores of each query so far. Among equal scores, lower ids win.

    Ids must be added in ascending order. A score that is NaN is never among the best.
    """

    def __init__(self, num_queries: int, k: int):
        self._k = k
        # For each query, a score that at least k of the added scores reach; -inf if none is known.
        self._least = np.full(num_queries, -np.inf, np.float32)
        self._found = [(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))]
        self._num_found = 0

    def add(self, scores: np.ndarray, ids: np.ndarray) -> None:
        """Adds the scores (float32 [Q, n]) of ids (int [n])."""
        least = self._least
        if scores.shape[1] > self._k and np.isneginf(least).any():
            at = scores.shape[1] - self._k
            known = np.fmax(scores, np.float32(-np.inf))  # without NaN
            least = np.maximum(least, np.partition(known, at, axis=1)[:, at])
            is_in = (scores >= least[:, None]) & (scores > self._least[:, None])
            self._least = least  # k scores of this block reach it
        else:
            is_in = scores > least[:, None]
        # With two axes, np.nonzero takes much longer.
        query, column = np.divmod(np.flatnonzero(is_in), scores.shape[1])
        if query.size:
            self._found.append((query, scores[query, column], ids[column]))
            self._num_found += query.size
        if self._num_found > 4 * self._k * len(self._least) + 4096:
            self._compact()

    def merge(self, other: "Best") -> None:
        """Adds what `other` has found. Its ids must be higher than all ids added here."""
        self._found += other._found
        self._num_found += other._num_found

    def _compact(self) -> None:
        query, score, found = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        # Stable: of equal scores, those that were added first, which have lower ids, stay first.
        order = (
            np.lexsort((-score, query))
            if len(self._least) > 1
            else np.argsort(-score, kind="stable")
        )
        query, score, found = query[order], score[order], found[order]
        start = np.searchsorted(query, np.arange(len(self._least)))
        rank = np.arange(len(query)) - start[query]
        is_best = rank < self._k
        is_last = rank == self._k - 1
        self._least[query[is_last]] = score[is_last]
        self._found = [(query[is_best], score[is_best], found[is_best])]
        self._num_found = int(is_best.sum())

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores float32 [Q, k] and ids int32 [Q, k], the best first.

        If fewer than k scores were numbers, the last entries are -inf and NO_ID.
        """
        self._compact()
        ((query, score, found),) = self._found
        start = np.searchsorted(query, np.arange(len(self._least)))
        place = query, np.arange(len(query)) - start[query]
        scores = np.full((len(self._least), self._k), -np.inf, np.float32)
        ids = np.full((len(self._least), self._k), NO_ID, np.int32)
        scores[place], ids[place] = score, found
        return scores, ids


def on_device(
    packed: jax.Array, fmt: RowFormat, dim: int, queries: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores float32 [Q, k] and ids int32 [Q, k] of the best rows of a device array.

    Args:
      packed: [V, words].
      fmt: the rows' format, resolved (see `RowFormat.resolve`).
      dim: D.
      queries: float32 [Q, D].
      k: at most V.
    """
    num_rows = packed.shape[0]
    size = min(BLOCK, num_rows)
    num_queries = queries.shape[0]

    def body(turn: jax.Array, best: tuple[jax.Array, jax.Array]) -> Any:
        first = jnp.asarray(turn, jnp.int32) * size
        begin = jnp.minimum(first, num_rows - size)
        rows = decode(lax.dynamic_slice_in_dim(packed, begin, size), fmt, dim)
        ids = begin + jnp.arange(size, dtype=jnp.int32)
        scores = jnp.matmul(queries, rows.T, precision=lax.Precision.HIGHEST)
        # All blocks have the same size. If it does not divide the number of rows, the last block
        # begins with rows of the block before. Those get -inf here.
        scores = jnp.where((ids >= first) & ~jnp.isnan(scores), scores, -jnp.inf)
        ids = jnp.where(jnp.isneginf(scores), NO_ID, ids)
        both = jnp.concatenate([best[0], scores], 1), jnp.concatenate([best[1], ids], 1)
        scores, place = lax.top_k(both[0], k)  # among equals the first: the lowest id
        return scores, jnp.take_along_axis(both[1], place, 1)

    start = (
        jnp.full((num_queries, k), -jnp.inf, jnp.float32),
        jnp.full((num_queries, k), NO_ID, jnp.int32),
    )
    return lax.fori_loop(0, -(-num_rows // size), body, start)
