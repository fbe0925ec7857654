"""VocabularySpec, a user's choice of how raw ids earn rows."""

import dataclasses
from typing import Any

import numpy as np

from mpembed_jax.cache.spec import CacheSpec, Geometry
from mpembed_jax.row_ids import NO_ID

MAX_ADMIT_AFTER = 255  # the largest count that a counter of the sketch can hold
PLACE_BITS, OLD_PLACE_BITS = 30, 22


def groups_of(sets: int) -> int:
    """Returns the number of groups into which the sets of a pool are divided."""
    return CacheSpec(num_rows=sets, ways=1).geometry(sets).groups


@dataclasses.dataclass(frozen=True)
class VocabularySpec:
    """The pool of rows that the raw ids of all tables of a stack compete for.

    An id that was seen fewer than `admit_after` times shares a row with other ids of its table.
    From then on, it has a row of its own, if its set has an empty row or a row that is used less.
    With R rows in the pool and N positions in a batch, padding included, all counts are halved
    every `window` * R / N steps, rounded down. So occurrences that are more than some `window` * R
    positions apart do not add up. No table can reserve rows for itself; give such a table a stack
    of its own.

    Attributes:
      num_rows: rows of the pool, at least 1. They are rounded down to whole sets.
      admit_after: the number of occurrences, the current batch included, at which an id gets a row
        of its own; 1 to 255. With 1, every id asks for a row when it first occurs.
      ways: rows in a set, 1 to 64.
      recycle: whether an id may take the row of an id that is used less. If False, an id that finds
        its set full shares a row for good.
      shared_rows: shared rows per table, at least 1; an id's hash chooses among them. One was best
        when measured.
      sketch_bytes: bytes of counters for ids without a row, per row of the pool; at least 1. More
        make admission more exact: an id that shares its counters with others is admitted too
        early. A counter has 4 bits if admit_after is at most 16, else 8. With recycle=False, it has
        2 bits if admit_after is at most 4.
      first_sets: None, or the sets that the pool had when it was made, if it was resized since.
        `vocabularies.grow` and `shrink` set it.
      place_bits: bits that differ among the hashes of one table's ids and choose their sets: 30.
        With 22, as in older pools, they fill a pool of more than some ten million rows badly. To
        restore a checkpoint that names no place_bits, make the target with 22.
      window: counts are halved after so many ids per row of the pool; at least 1. With 30, old ids
        make room for new ones. If the ids of a stream hardly change, 300 loses less. More ids that
        occur once are then counted together.

    Raises:
      ValueError: if a value is outside these ranges.
    """

    num_rows: int
    admit_after: int = 2
    ways: int = 32
    recycle: bool = True
    shared_rows: int = 1
    sketch_bytes: int = 3
    first_sets: int | None = None
    place_bits: int = PLACE_BITS
    window: int = 30

    def __post_init__(self) -> None:
        limits = {
            "num_rows": NO_ID - 1,
            "admit_after": MAX_ADMIT_AFTER,
            "shared_rows": 1 << 20,
            "sketch_bytes": 256,
            "window": 1 << 20,
        }
        for name, most in limits.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not is_number or not 1 <= value <= most:
                raise ValueError(
                    f"vocabulary {name} must be an integer in [1, {most}], got {value!r}"
                )
        bits = self.place_bits
        if type(bits) is not int or bits not in (PLACE_BITS, OLD_PLACE_BITS):
            raise ValueError(
                f"vocabulary place_bits must be {PLACE_BITS}, or {OLD_PLACE_BITS} for a pool of an "
                f"earlier version, got {bits!r}"
            )
        CacheSpec(num_rows=self.num_rows, ways=self.ways)
        if self.num_rows * self.sketch_bytes >= 2**31:
            raise ValueError(
                f"a sketch holds fewer than 2**31 bytes, got {self.num_rows} rows with "
                f"sketch_bytes={self.sketch_bytes}; lower sketch_bytes"
            )
        first = self.first_sets
        if first is not None:
            is_number = isinstance(first, int | np.integer) and not isinstance(first, bool)
            if not is_number or first < 1 or first % groups_of(first) or first > self.geometry.sets:
                raise ValueError(
                    f"vocabulary first_sets={first!r} are not the first sets of a pool of "
                    f"{self.num_rows} rows in sets of {self.ways}; take the spec from the state "
                    "that grow or shrink returned"
                )

    def __setstate__(self, fields: dict[str, Any]) -> None:
        # Older pickles lack these two.
        self.__dict__.update({"place_bits": OLD_PLACE_BITS, "window": 30} | fields)

    @property
    def geometry(self) -> Geometry:
        """The sets, ways and groups of the pool, by the rules of a cache."""
        if self.first_sets is None:
            return CacheSpec(num_rows=self.num_rows, ways=self.ways).geometry(self.num_rows)
        groups = groups_of(self.first_sets)
        sets = self.num_rows // self.ways
        return Geometry(sets - sets % groups, self.ways, groups)

    @property
    def counter_bits(self) -> int:
        """Bits of a counter of the sketch: 2, 4 or 8, the fewest that can count to admit_after - 1.

        If rows are recycled, there are at least 4. With 2, a counter would stop at 3, and an id
        would seldom get the row of an id that is used less.
        """
        least = 4 if self.recycle else 2
        return next(bits for bits in (2, 4, 8) if bits >= least and self.admit_after <= 2**bits)

    @property
    def sketch_width(self) -> int:
        """Bytes of one group in one of the two rows of the sketch."""
        geometry = self.geometry
        return max(1, geometry.lines * self.sketch_bytes // (2 * geometry.groups))

    @property
    def arrays(self) -> dict[str, int]:
        """The numbers that are needed to read the arrays of a vocabulary, by name.

        Without place_bits, they are 22, as in checkpoints of earlier versions.
        """
        places = {} if self.place_bits == OLD_PLACE_BITS else {"place_bits": self.place_bits}
        return {
            **self.geometry._asdict(),
            "first_sets": int(self.first_sets or self.geometry.sets),
            "sketch_width": self.sketch_width,
            "counter_bits": self.counter_bits,
            "shared_rows": self.shared_rows,
            **places,
        }

    def num_stack_rows(self, num_tables: int) -> int:
        """Returns the rows of a stack: those of the pool, then the shared rows of each table."""
        return self.geometry.lines + num_tables * self.shared_rows
