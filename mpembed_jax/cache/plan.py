"""The plan of one step: its decisions about the rows of a batch, and their counts."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax

from mpembed_jax.arrays import indexing


class Segments(NamedTuple):
    """A batch's positions sorted by their row: the positions of a row are one segment."""

    order: jax.Array  # i32 [N]: the positions, row by row; those of a row ascend
    # i32 [U]: the index in `order` at which the segment of each unique row begins; equal to `stop`
    # for padding
    first: jax.Array
    stop: jax.Array  # i32 [U]: the index in `order` after the segment's last position

    def of_rows(self, rows: jax.Array) -> "Segments":
        """Returns the segments in the order of `rows` (int32 [U]), indices of unique rows."""
        return Segments(self.order, indexing.take(self.first, rows), indexing.take(self.stop, rows))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "unique_ids",
        "inverse",
        "line",
        "is_hit",
        "victim_ids",
        "counts",
        "step",
        "signature",
        "route",
        "segments",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The decisions of one step. A plan is valid until the next prefetch.

    The last of the unique ids is always padding, and its row is zero. On one device, the unique ids
    are ordered: hits, newcomers, bypassed rows, padding. At padding, ids out of range and ids over
    the budget, inverse is U - 1. At every other position, `ids == unique_ids[inverse]`.

    On a mesh, `unique_ids` and `inverse` describe the ids of this device, in the order of their
    first occurrence; with kernels, in another order. With summation blocks (see Placement), an id
    has an entry for each block that it is in. `line`, `is_hit` and `victim_ids` have Q entries
    instead of U. They describe `route.rows`: the rows of this device's shard that any device asks
    for. `counts` covers all devices.
    """

    unique_ids: jax.Array  # i32 [U], or pairs [U, 2]
    inverse: Any  # i32 [..] in the nesting of the ids: the index of each id in `unique_ids`
    line: jax.Array  # i32 [U]: the row's line during this step; C if bypassed or padding
    is_hit: jax.Array  # bool [U]: whether the id had a line before this step
    victim_ids: jax.Array  # i32 [U]: the id displaced from `line`; NO_ID if none
    counts: "Counts"
    step: jax.Array  # i32 []: the step of the state that prefetch returned with the plan
    signature: jax.Array  # u32 []: the signature of that state
    route: "Route | None" = None  # None on one device
    # The positions of each unique row, if deduplication sorted them.
    segments: Segments | None = None

    @property
    def number(self) -> jax.Array:
        """The number of the prefetch that made the plan (int32 [])."""
        return self.step - 1

    @property
    def placed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows this device plans, how many are in cache lines, and how many are not padding.

        The rows are ids, int32 [U]. On a mesh, they are local rows, int32 [Q]. The numbers are
        int32 scalars.
        """
        if self.route is None:
            return self.unique_ids, self.counts.num_cached, self.counts.unique
        return self.route.rows, self.route.num_cached[0], self.route.num_rows[0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "requests",
        "unique",
        "hits",
        "hit_requests",
        "misses",
        "bypasses",
        "evictions",
        "write_backs",
        "out_of_range",
        "dropped",
        "wide_exchanges",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Counts:
    """The counts of one step: int32 scalars on the device, so that jit and scan can log them."""

    requests: jax.Array  # positions whose id names a row of the stack
    unique: jax.Array  # distinct ids among them, within the budget
    hits: jax.Array  # unique ids that had a line before the step
    hit_requests: jax.Array  # positions whose id had a line before the step
    misses: jax.Array  # unique - hits
    bypasses: jax.Array  # misses that got no line; they are trained in the table
    evictions: jax.Array  # ids that lost their line to a newcomer
    write_backs: jax.Array  # evictions of dirty lines, whose rows are quantized into the table
    out_of_range: jax.Array  # positions whose id is outside the stack
    # Distinct ids over the budget. On a mesh, an id dropped by several devices counts once for
    # each.
    dropped: jax.Array
    # 1 if some device had more ids for one owner than the exchange has room for, so that all arrays
    # travelled in full width; else 0. Always 0 on one device.
    wide_exchanges: jax.Array

    @property
    def num_cached(self) -> jax.Array:
        """Number of unique ids that are in a line during this step; they come first in the plan."""
        return self.unique - self.bypasses


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "num_cached", "num_rows", "asked", "owner", "rank", "is_wide"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Route:
    """How the rows of one step travel between this device and the owners of the rows.

    The entries are the unique ids of this device, U in number, padding included.
    """

    # i32 [Q]: the rows of this device's shard that any device asks for. They are local rows in the
    # plan's order. NO_ID follows the first num_rows; the last entry is always NO_ID.
    rows: jax.Array
    num_cached: jax.Array  # i32 [1]: the number of these rows that are in cache lines
    num_rows: jax.Array  # i32 [1]: the number of these rows, padding not included
    # i32 [received]: for each entry that this shard received, the index in `rows` of the row that
    # it asks for; Q - 1 for no row.
    asked: jax.Array
    owner: jax.Array  # i32 [U]: the shard that owns each entry of this device; P for no shard
    rank: jax.Array  # i32 [U]: the entry's position among this device's entries for the same owner
    is_wide: jax.Array  # bool []: whether the step uses full-width arrays
