"""CacheSpec, a user's choice of cache size and policy, and the geometry computed from it."""

import dataclasses
from typing import NamedTuple

import numpy as np

from mpembed_jax.arrays import indexing

MAX_WAYS = 64
POLICIES = ("lru", "lfu")  # compiled code gets the index of a policy in this tuple


class Geometry(NamedTuple):
    """The sizes of a cache.

    The sets are divided into G groups. Ids that are congruent modulo G use the sets of one group.
    If rows go to shards by MOD, and the number of shards divides G, every set therefore stays whole
    on one shard.
    """

    sets: int  # S
    ways: int  # W, lines per set
    groups: int  # G, groups of sets

    @property
    def lines(self) -> int:
        """Number of lines, C = S * W."""
        return self.sets * self.ways

    def election_buckets(self, width: int) -> int:
        """Returns the number of buckets to which the misses of a batch are hashed by their sets.

        Misses enter the cache in rounds. In each round, one miss of each bucket meets a line (see
        `ops/xla/rounds.py`). A batch of `width` unique ids has at most 2 * width buckets, rounded
        up to a power of two, and at least 16. If there are no more sets than that, each set has a
        bucket of its own. Otherwise, sets share buckets.
        """
        return min(self.sets, max(16, indexing.ceil_power(2 * width)))


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """The size of the FP32 cache and its policy.

    Attributes:
      fraction: lines as a fraction of the stack's rows, in (0, 1]. It is ignored if num_rows is
        given.
      num_rows: number of lines, at least 1; None: use fraction.
      ways: lines per set, 1 to 64.
      policy: "lfu" or "lru". With "lfu", a newcomer must be used more than the id whose line it
        takes.

    Raises:
      ValueError: if a value is outside these ranges.
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
                f"cache fraction must be in (0, 1], got {self.fraction}; use cache=None for no "
                "cache"
            )
        for name, value in (("num_rows", self.num_rows), ("ways", self.ways)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | np.integer)
            ):
                raise ValueError(f"cache {name} must be an integer, got {value!r}")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(
                f"cache num_rows must be at least 1, got {self.num_rows}; use cache=None for no "
                "cache"
            )
        if not 1 <= self.ways <= MAX_WAYS:
            raise ValueError(f"cache ways must be in [1, {MAX_WAYS}], got {self.ways}")
        if self.policy not in POLICIES:
            names = " or ".join(f'"{name}"' for name in POLICIES)
            raise ValueError(f"cache policy must be {names}, got {self.policy!r}")

    def geometry(self, num_table_rows: int) -> Geometry:
        """Returns the geometry for a stack of `num_table_rows` rows.

        The number of lines is rounded down to whole sets, and the number of sets to a multiple of
        G.
        """
        # In binary, 0.57 * 100 is 56.99999. The factor makes a fraction mean the decimal number
        # that the user wrote.
        lines = max(1, self.num_rows or int(self.fraction * num_table_rows * (1 + 1e-12)))
        ways = min(self.ways, lines)
        sets = lines // ways
        groups = 64
        while groups > 1 and sets // groups < 8:
            groups //= 2
        return Geometry(sets - sets % groups, ways, groups)
