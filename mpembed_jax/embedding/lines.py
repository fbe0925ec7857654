"""Moves the lines of an old cache into a new cache, when rows get other ids.

The most used lines choose their places first. A dirty line without a place is written back to
the table.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.ops import Draw, Store
from mpembed_jax.row_ids import NO_ID

_BLOCK = 65536  # lines placed at once
_sets_of = jax.jit(residency.set_of, static_argnames="geometry")


class Free(Protocol):
    """Tells which of a row's choices (see `Lines.place`) no other row has taken."""

    def of(self, n: int) -> np.ndarray:
        """Returns which choices of the n-th of `rows` (see `Lines.place`) are free, bool [k]."""

    def take(self, n: int, choice: int) -> None:
        """Gives a choice to the n-th of `rows`."""


class Lines:
    """The lines of `old`, and the places of `new` that they take.

    Args:
      old: the cache of a state that moves, or None.
      new: an empty cache, or None. If its policy is not that of `old`, no line gets a place, since
        the policies measure use in different ways.
    """

    def __init__(self, old: CacheState | None, new: CacheState | None):
        self._old, self._new = old, new
        tags = np.full(0, NO_ID) if old is None else np.asarray(old.tags).reshape(-1)
        self._line = np.flatnonzero(tags != NO_ID)
        self._line = self._line[np.argsort(tags[self._line])]
        self._row = tags[self._line]
        self._target = np.full(self._line.size, -1)
        self._geometry: Geometry | None = None  # of the places; None: no line gets one
        if old is not None and new is not None and new.policy == old.policy:
            self._geometry = new.geometry
            self._use = np.asarray(old.priority).reshape(-1)[self._line]
            self._room = np.full(new.geometry.sets, new.geometry.ways)

    def _find(self, rows: np.ndarray) -> np.ndarray:
        """Returns the index in self._row of each of `rows` (int [n]); -1 if it has no line."""
        if not self._row.size:
            return np.full(rows.size, -1)
        at = np.minimum(np.searchsorted(self._row, rows), self._row.size - 1)
        return np.where(self._row[at] == rows, at, -1)

    def have(self, rows: np.ndarray) -> np.ndarray:
        """Returns which of the old ids have a line, bool [n]."""
        return self._find(rows) >= 0

    def place(self, rows: np.ndarray, choices: np.ndarray, free: Free | None = None) -> np.ndarray:
        """Gives the lines of rows places in the new cache, in descending order of their use.

        A line takes the choice whose cache set has the most room. Lines of equal use choose in the
        order of `rows`.

        Args:
          rows: int [n], distinct old ids.
          choices: int [n, k]: the k new ids that each of them may get.
          free: which choices are free; None if all are.

        Returns:
          int [n]: the number of the choice that each row took; -1 if it has no line, or if there is
          no place for its line.
        """
        taken = np.full(rows.size, -1)
        geometry = self._geometry
        if geometry is None:
            return taken
        held = self._find(rows)
        cached = np.flatnonzero(held >= 0)
        cached = cached[np.argsort(-self._use[held[cached]].astype(np.int64), kind="stable")]
        for begin in range(0, cached.size, _BLOCK):
            part = cached[begin : begin + _BLOCK]
            sets = np.asarray(_sets_of(jnp.asarray(choices[part], jnp.int32), geometry=geometry))
            if choices.shape[1] == 1:  # one choice each: all lines are placed at once
                home = sets[:, 0]
                order = np.argsort(home, kind="stable")
                rank = np.empty(home.size, np.int64)
                rank[order] = indexing.ranks(home[order])
                way = geometry.ways - self._room[home] + rank
                fits = way < geometry.ways
                taken[part[fits]] = 0
                self._target[held[part[fits]]] = (home * geometry.ways + way)[fits]
                np.subtract.at(self._room, home[fits], 1)
                continue
            for n, own in zip(part.tolist(), sets, strict=True):
                room = self._room[own]
                if free is not None:
                    room = np.where(free.of(n), room, 0)
                best = int(np.argmax(room))
                if room[best] <= 0:
                    continue
                taken[n] = best
                if free is not None:
                    free.take(n, best)
                way = geometry.ways - room[best]
                self._room[own[best]] -= 1
                self._target[held[n]] = own[best] * geometry.ways + way
        return taken

    def moved(self, rows: np.ndarray, ids: np.ndarray) -> tuple[CacheState | None, np.ndarray]:
        """Returns the new cache, and the new ids of dirty lines without a place.

        Args:
          rows: int [n], the old ids of the rows that stay.
          ids: int [n], their new ids.

        Returns:
          The new cache. For each old line (int32), the new id of its row if the line is dirty and
          has no place; else NO_ID.
        """
        old, new = self._old, self._new
        assert old is not None
        dirty = np.asarray(old.dirty).reshape(-1)
        held = self._find(rows)
        held, ids = held[held >= 0], ids[held >= 0]
        at, target = self._line[held], self._target[held]
        has_place = target >= 0
        is_homeless = ~has_place & dirty[at]
        homeless = np.full(dirty.size, NO_ID, np.int32)
        homeless[at[is_homeless]] = ids[is_homeless]
        if new is None or self._geometry is None:
            return new, homeless
        at, target, ids = at[has_place], target[has_place], ids[has_place]
        num_places = self._geometry.lines
        shape = new.tags.shape
        line = np.full(dirty.size, num_places, np.int32)
        line[at] = target

        def placed(values: np.ndarray, empty: Any) -> jax.Array:
            result = np.full(num_places, empty, values.dtype)
            result[target] = values
            return jnp.asarray(result.reshape(shape))

        cache = dataclasses.replace(
            new,
            tags=placed(ids.astype(np.int32), NO_ID),
            priority=placed(np.asarray(old.priority).reshape(-1)[at], 0),
            dirty=placed(dirty[at], False),
            rows=_put(new.rows, line, old.rows),
        )
        return cache, homeless


@partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Sets rows `index` (int32) of `array`, which is consumed, to values, and returns it."""
    return indexing.put(array, index, values)


@partial(jax.jit, donate_argnums=0)
def write_back(
    table: Any, lines: jax.Array, ids: jax.Array, key: jax.Array, step: jax.Array
) -> Any:
    """Writes the lines of `ids` to the table, rounded as by flush, and returns the table.

    Args:
      table: a QuantizedTable; consumed.
      lines: float32 [C, D].
      ids: int32 [C]; NO_ID writes nothing.
      key: uint32 [2].
      step: int32 scalar.
    """
    return ops.write_back(Store(table, lines, ids != NO_ID), ids, Draw(key, step))
