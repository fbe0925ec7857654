"""Paired differences over seeds, and the bytes that keep a method's loss below a limit.

Differences have 95 % intervals. The interval is Student's t of the differences by seed: it says how
well the mean over seeds is known on this data, and nothing about other data. Two runs that differ
by less than it are called equal.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean with its 95 % interval; of a single value the half width is NaN."""

    mean: float
    half: float
    num: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is larger than its noise; a single value never is."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4f}" if math.isnan(self.half) else f"{self.mean:+.4f} ± {self.half:.4f}"
        )


def interval(values: Sequence[float]) -> Interval:
    """Returns mean and 95 % t interval of at least one value."""
    array = np.asarray(values, np.float64)
    if not len(array):
        raise ValueError("an interval needs at least one value")
    half = math.nan
    if len(array) > 1:
        half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return Interval(float(array.mean()), half, len(array))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Returns the interval of value minus baseline over the seeds that both have.

    Raises:
      ValueError: if they share no seed.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(values)} and {sorted(baseline)}")
    return interval([values[seed] - baseline[seed] for seed in seeds])


class Needed(NamedTuple):
    """Bytes per row from which on a method stays within a limit; `relation` is "=", "<=" or ">"."""

    bytes_per_row: float
    relation: str


def bytes_needed(points: Sequence[tuple[float, float]], limit: float) -> Needed:
    """Returns the bytes per row that keep the loss within a limit, read off between points.

    Args:
      points: (bytes per row, mean difference to FP32, negative is worse) of one method.
      limit: loss allowed, positive.

    Returns:
      The bytes, with a relation. "=": the bytes lie between the last point that loses more and the
      next point, on a straight line in log2 of the bytes. "<=": the smallest measured point is
      within the limit. ">": the largest measured point is not.
    """
    ordered = sorted(points)
    failing = [
        i for i, (_, difference) in enumerate(ordered) if not difference >= -limit
    ]  # NaN fails
    if not failing:
        return Needed(ordered[0][0], "<=")
    last = failing[-1]
    if last == len(ordered) - 1:
        return Needed(ordered[-1][0], ">")
    (low, worse), (high, better) = ordered[last], ordered[last + 1]
    if not math.isfinite(worse):
        return Needed(high, "<=")
    share = (-limit - worse) / (better - worse)
    return Needed(2 ** (math.log2(low) + share * (math.log2(high) - math.log2(low))), "=")
