"""Records of the ops: groups of arrays and settings that are always passed together.

They hold the distinct ids of a batch, the rows that a step moves, the arrays that an op changes,
the key of random bits, the gradients of positions, and the settings of an implementation.
"""

import dataclasses
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache.plan import Route, Segments
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.numerics.random_bits import Key, RowSeeds, draw_seed, row_seeds
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable


class Unique(NamedTuple):
    """The distinct ids of a batch.

    Some positions have no unique id: padding, and ids over the budget. Their `inverse` is U - 1.
    """

    ids: jax.Array  # i32 [U]: the distinct ids; NO_ID after the first num_ids
    inverse: jax.Array  # i32 [N]: the index in `ids` of each position's id
    counts: jax.Array  # i32 [U]: occurrences; 0 for padding
    num_ids: jax.Array  # i32 []
    num_dropped: jax.Array  # i32 []: distinct ids over the budget
    segments: Segments | None = None  # the positions of each id, if they were sorted


class Request(NamedTuple):
    """The part of a batch that one device works on.

    A device has distinct ids of its own positions, and rows that it must find.
    """

    # The rows that this device must find. On a mesh, these are the rows of its shard that any
    # device asks for.
    rows: Unique
    own: Unique  # the distinct ids of this device's positions; on one device the same as `rows`
    num_requests: jax.Array  # i32 []: positions of this device whose id names a row of the stack
    num_out_of_range: jax.Array  # i32 []: positions of this device whose id is outside the stack
    num_dropped: jax.Array  # i32 []: distinct ids over the budget, in the whole batch
    # Number of ids in the batch, padding included. On a mesh, it is this shard's share of them.
    num_positions: Fraction
    route: Route | None  # None on one device


class Moves(NamedTuple):
    """The unique rows of one device in one step.

    They are ordered: hits, newcomers, bypassed rows, padding.
    """

    ids: jax.Array  # i32 [U]; NO_ID for padding
    line: jax.Array  # i32 [U]: the row's line during this step; C if it has none
    victim_ids: jax.Array  # i32 [U]: the id displaced from `line`; NO_ID if none
    num_hits: jax.Array  # i32 []
    num_cached: jax.Array  # i32 []: hits and newcomers, the rows in lines during this step
    num_ids: jax.Array  # i32 []: rows that are not padding
    segments: Segments | None = None  # the positions of each row, if they were sorted

    @property
    def is_row(self) -> jax.Array:
        """Which entries are rows (bool [U]). The others are padding, or rows that stay as is."""
        position = jnp.arange(self.ids.shape[0], dtype=jnp.int32)
        return (position < self.num_ids) & (self.ids != NO_ID)

    def only(self, is_row: jax.Array, num_lines: int) -> "Moves":
        """Returns the moves of the entries in `is_row` (bool [U]).

        The others have no id, and the line num_lines.
        """
        return self._replace(
            ids=jnp.where(is_row, self.ids, NO_ID), line=jnp.where(is_row, self.line, num_lines)
        )


class Store(NamedTuple):
    """The arrays that an op changes in place."""

    table: QuantizedTable
    lines: jax.Array | None  # f32 [C, D]; None without a cache
    dirty: jax.Array | None  # bool [C]; None without a cache, and for ops that do not use it

    @property
    def num_lines(self) -> int:
        """C, 0 without a cache."""
        return 0 if self.lines is None else self.lines.shape[0]


class Rows(NamedTuple):
    """All arrays that hold data of rows."""

    table: QuantizedTable
    row_state: Any  # the optimizer state: leaves [V, ..], and scalars
    cache: CacheState | None


class Draw(NamedTuple):
    """The source of the random bits of one step: a key and the step.

    Each op adds its own stream.
    """

    key: Key  # u32 [2], or on a shard a key bound to its local rows
    step: jax.Array  # i32 []

    def seed(self, stream: int) -> jax.Array:
        """Returns the seed (uint32 [2]) from which native code draws the bits of a stream.

        Raises:
          TypeError: if the key is bound to a shard, because the rows of a shard are not global ids.
        """
        if not isinstance(self.key, jax.Array | np.ndarray):
            raise TypeError(
                "native code draws random bits for global ids, so it cannot run over a mesh; "
                'choose implementation="xla"'
            )
        return draw_seed(self.key, stream, self.step)

    def row_seeds(self, stream: int, rows: jax.Array) -> RowSeeds:
        """Returns the sequences from which a kernel draws the bits of rows (int32 [..])."""
        return row_seeds(self.key, stream, self.step, rows)


class Admission(NamedTuple):
    """The rules by which raw ids get rows of their own; static."""

    admit_after: int
    recycle: bool
    shared_rows: int  # per table
    # Whether a row starts again for its first owner, too. If not, only rows of other owners do.
    starts_all: bool = False


class Admitted(NamedTuple):
    """The rows of a batch's raw ids in one step, and the counts of their admission."""

    rows: jax.Array  # i32 [N]: the row of each position's id; NO_ID for padding
    started: jax.Array  # i32 [N]: rows that start again for new owners, followed by NO_ID
    tables: jax.Array | None  # i32 [N]: the tables of their owners; None without rules.starts_all
    num_started: jax.Array  # i32 []
    num_recycled: jax.Array  # i32 []: rows that were taken from another owner
    num_requests: jax.Array  # i32 []: positions that are not padding
    num_shared: jax.Array  # i32 []: positions whose id has no row of its own
    num_admitted: jax.Array  # i32 []: ids that got a row
    num_refused: jax.Array  # i32 []: ids that earned a row and found none
    dealt: "Dealt | None" = None  # from the native admission


class Dealt(NamedTuple):
    """The positions whose ids have rows of their own, by partition, from a native admission.

    A fused step takes them as they are: it need not deal and deduplicate them again. A partition's
    entries begin where its positions begin. Entries after its last one have no meaning.
    """

    facts: jax.Array  # i32 [..]: how many entries each partition has; see ops.cpu.admit
    rows: jax.Array  # i32 [N]: the distinct rows
    counts: jax.Array  # i32 [N]: the occurrences of each row
    positions: jax.Array  # i32 [N]: ascending in each partition
    row_of: jax.Array  # i32 [N]: for each of these positions, the index of its row in its partition


class Positions(NamedTuple):
    """The gradients of a batch's positions, and the row that each of them belongs to."""

    grads: jax.Array  # f32 [M, D], M > 0: the gradients of all vectors or bags
    row: jax.Array  # i32 [N], N > 0: the row of each position, in [0, U); U - 1 is padding
    # i32 [N]: the index in `grads` of each position. -1: the position has no gradient, and its row
    # is U - 1. None: position n takes grads[n // (N / M)].
    source: jax.Array | None
    factors: jax.Array | None  # f32 [N]: factors of the positions' gradients; None: all are 1
    # The positions of each row. They may include positions that take no gradient. None: not sorted.
    segments: Segments | None = None


class Places(NamedTuple):
    """The rows of a batch by partition, and the positions of each row, from a fused forward call.

    A partition's rows (in ids, line and stop) begin at the index at which its positions (in order)
    begin. Entries between the last row of a partition and the next partition have no meaning.
    """

    facts: jax.Array  # i32 [..]  counts, and where each partition begins; see ops.cpu.bag_step
    ids: jax.Array  # i32 [N]
    line: jax.Array  # i32 [N]  -1 where the row has none
    # i32 [N]  where the positions of a row end in `order`, counted from its partition's beginning
    stop: jax.Array
    order: jax.Array  # i32 [N]  positions, row by row, ascending


@dataclasses.dataclass(frozen=True)
class Implementation:
    """The settings of an implementation of the ops; static.

    Attributes:
      name: see ops.IMPLEMENTATIONS.
      chunk: rows per iteration of XLA's loops; None: passes over whole arrays.
      host_chunk: the same for a table in host memory, used if chunk is None.
      is_native: whether numba runs unique, find, admit, start_again, plan, the gathers and scatters
        of rows, and the fused step.
      max_threads: the largest number of threads of XLA's pool that share a fused step.
      is_kernel: whether Pallas kernels run the row movements.
      is_interpreted: whether the kernels are traced into plain jax operations.
    """

    name: str
    chunk: int | None = None
    # At INT8 and D = 16, 16384 rows take a third of a megabyte, which crosses the bus in a few
    # microseconds.
    host_chunk: int = 16384
    is_native: bool = False
    max_threads: int = 64
    is_kernel: bool = False
    is_interpreted: bool = False
