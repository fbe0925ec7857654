"""One step's decisions about the rows of a batch, and their counts."""

import dataclasses
from functools import partial
from typing import Any

import jax


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
        "route",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class CachePlan:
    """One step's decisions; it lives until the next prefetch.

    Unique ids stand in the order hits, newcomers, bypassed rows, padding; the last entry is always padding with a zero
    row. `ids == unique_ids[inverse]`, except that padding, out-of-range and over-budget positions hold U - 1.

    On a mesh, unique_ids and inverse are those of this device's ids, in order of first occurrence; line, is_hit and
    victim_ids are about the rows of this device's shard that any device asks for, `route.rows`; counts are of all devices.
    """

    unique_ids: jax.Array  # i32 [U]
    inverse: Any  # nest of i32 [..], like the ids
    line: jax.Array  # i32 [U]  where the row is during this step; C = bypass or padding
    is_hit: jax.Array  # bool [U]
    victim_ids: jax.Array  # i32 [U]  id displaced from `line`, NO_ID if none
    counts: "Counts"
    step: jax.Array  # i32 []  which prefetch made it
    route: "Route | None" = None  # on a mesh

    @property
    def placed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows that `line` is about (int32, local on a shard), how many of them sit in lines, how many are real."""
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
    """One step's counts, i32 scalars on the device, so that logging works inside jit and scan."""

    requests: jax.Array  # id positions that name a row of the table
    unique: jax.Array  # distinct ids among them, after the budget
    hits: jax.Array  # unique ids found in the cache
    hit_requests: jax.Array  # positions whose id was found in the cache
    misses: jax.Array  # unique - hits
    bypasses: jax.Array  # misses that found no way, trained in the table
    evictions: jax.Array  # residents displaced
    write_backs: jax.Array  # of these, dirty ones, quantized and written
    out_of_range: jax.Array  # positions outside the table
    dropped: (
        jax.Array
    )  # unique ids over the budget; on a mesh, one that several devices drop counts for each
    wide_exchanges: (
        jax.Array
    )  # 1 if ids exceeded the exchange's room and travelled in full-width arrays; 0 on one device

    @property
    def num_cached(self) -> jax.Array:
        """Unique ids that sit in a line during this step; they come first in the plan."""
        return self.unique - self.bypasses


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "num_cached", "num_rows", "asked", "owner", "rank", "is_wide"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Route:
    """How the rows of one step travel between this device and the owners of the rows.

    U is the number of entries of this device. Q is the length of `rows`, which holds the rows of
    this device's shard that any device asks for.
    """

    # i32 [Q]: local rows in the plan's order. NO_ID follows the first num_rows; the last entry is
    # always NO_ID.
    rows: jax.Array
    num_cached: jax.Array  # i32 [1]: the number of these rows that are in cache lines
    num_rows: jax.Array  # i32 [1]
    # i32 [received]: the position in `rows` that each received entry asks for; Q - 1 for no row.
    asked: jax.Array
    owner: jax.Array  # i32 [U]: the shard that owns each entry of this device; P for no shard
    rank: jax.Array  # i32 [U]: the entry's position among this device's entries for the same owner
    is_wide: jax.Array  # bool []: whether the step uses full-width arrays
