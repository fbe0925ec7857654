"""How large the FP32 cache of a stack is and which policy it follows: what a user says, and the sizes decided from it."""

import dataclasses
from typing import NamedTuple

import numpy as np

MAX_WAYS = 64


class Geometry(NamedTuple):
    """Decided sizes of a cache; `groups` is G: ids congruent modulo G share their sets, so MOD sharding keeps sets whole."""

    sets: int
    ways: int
    groups: int

    @property
    def lines(self) -> int:
        """Number of lines C."""
        return self.sets * self.ways

    def election_buckets(self, width: int) -> int:
        """Returns how many buckets sets share in the elections of a batch of `width` unique ids: no more than it can use."""
        return min(self.sets, 1 << max(4, (2 * width - 1).bit_length()))


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """How large the FP32 cache is and who may stay in it.

    Attributes:
      fraction: lines as a fraction of the stack's rows, in (0, 1]; ignored where num_rows is given.
      num_rows: lines asked for, instead of a fraction.
      ways: lines per set, 1 to 64.
      policy: "lfu" (a newcomer must be used more than the line it takes) or "lru".

    Raises:
      ValueError: on a value outside these ranges.
    """

    fraction: float = 0.05
    num_rows: int | None = None
    ways: int = 32
    policy: str = "lfu"

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(
            self.fraction, int | float | np.integer | np.floating
        ):
            raise ValueError(f"cache fraction must be a number in (0, 1], got {self.fraction!r}")
        if self.num_rows is None and not 0 < self.fraction <= 1:
            raise ValueError(
                f"cache fraction must be in (0, 1], got {self.fraction}; use cache=None for no cache"
            )
        for name, value in (("num_rows", self.num_rows), ("ways", self.ways)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | np.integer)
            ):
                raise ValueError(f"cache {name} must be an integer, got {value!r}")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(
                f"cache num_rows must be at least 1, got {self.num_rows}; use cache=None for no cache"
            )
        if not 1 <= self.ways <= MAX_WAYS:
            raise ValueError(f"cache ways must be in [1, {MAX_WAYS}], got {self.ways}")
        if self.policy not in ("lru", "lfu"):
            raise ValueError(f'cache policy must be "lru" or "lfu", got {self.policy!r}')

    def geometry(self, num_table_rows: int) -> Geometry:
        """Returns the geometry for a stack of `num_table_rows` rows; lines are rounded down to whole sets."""
        # The factor keeps 0.57 * 100 from being 56.99999: a fraction means the decimal number that was written.
        lines = max(1, self.num_rows or int(self.fraction * num_table_rows * (1 + 1e-12)))
        ways = min(self.ways, lines)
        sets = lines // ways
        groups = 64
        while groups > 1 and sets // groups < 8:
            groups //= 2
        return Geometry(sets - sets % groups, ways, groups)
