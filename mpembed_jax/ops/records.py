"""What travels together through the ops: rows that move, what is changed in place, random bits, gradients, a back end."""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache.plan import Route
from mpembed_jax.numerics.random_bits import Key, draw_seed
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable


class Unique(NamedTuple):
    """The distinct ids of a batch. Positions without one (padding, over the budget) hold U - 1 in `inverse`."""

    ids: jax.Array  # i32 [U]  distinct, NO_ID after the first num_ids
    inverse: jax.Array  # i32 [N]
    counts: jax.Array  # i32 [U]  occurrences, 0 for padding
    num_ids: jax.Array  # i32 []
    num_dropped: jax.Array  # i32 []  distinct ids over the budget


class Request(NamedTuple):
    """What a batch asks of one device: its own distinct ids, and the rows it has to find for any device."""

    rows: Unique  # to find here; on a mesh those of this shard that any device asks for
    own: Unique  # of this device's positions; the same as rows on one device
    num_requests: jax.Array  # i32 []  positions of this device that name a row of the stack
    num_out_of_range: jax.Array  # i32 []
    num_dropped: jax.Array  # i32 []  over the budget, of the whole batch
    num_positions: Fraction  # ids of the batch, padding included; on a mesh this shard's share
    route: Route | None  # on a mesh


class Moves(NamedTuple):
    """The unique rows of one device in one step, in the order hits, newcomers, bypassed rows, padding."""

    ids: jax.Array  # i32 [U]  NO_ID for padding
    line: jax.Array  # i32 [U]  C where the row has none
    victim_ids: jax.Array  # i32 [U]  id displaced from `line`, NO_ID if none
    num_hits: jax.Array  # i32 []
    num_cached: jax.Array  # i32 []  hits and newcomers: rows that sit in lines during this step
    num_ids: jax.Array  # i32 []

    @property
    def is_row(self) -> jax.Array:
        """bool [U]: which entries are rows; the others are padding, or rows that stay as they are."""
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
    """What an op changes in place."""

    table: QuantizedTable
    lines: jax.Array | None  # f32 [C, D]  None without a cache
    dirty: jax.Array | None  # bool [C]  None without a cache, and where an op does not use it

    @property
    def num_lines(self) -> int:
        """C, 0 without a cache."""
        return 0 if self.lines is None else self.lines.shape[0]


class Draw(NamedTuple):
    """Names the random bits of a step; the op adds the stream."""

    key: Key  # u32 [2]; on a shard a key bound to its local rows
    step: jax.Array  # i32 []

    def seed(self, stream: int) -> jax.Array:
        """Returns the uint32 [2] from which a kernel draws the bits of a stream.

        Raises:
          TypeError: for a key bound to a shard, whose rows are no global ids.
        """
        if not isinstance(self.key, jax.Array | np.ndarray):
            raise TypeError("kernels draw random bits by global ids and do not run over a mesh")
        return draw_seed(self.key, stream, self.step)


class Positions(NamedTuple):
    """Which gradient each position of a batch takes, and for which row."""

    grads: jax.Array  # f32 [M, D]  of all vectors or bags; M > 0
    row: jax.Array  # i32 [N]  in [0, U), N > 0; U - 1 is padding
    source: jax.Array | None  # i32 [N]  of grads; None: position n takes grads[n // (N / M)]
    factors: jax.Array | None  # f32 [N]  multiplied with each position's gradient


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How a back end runs the ops; static.

    Attributes:
      name: see ops.IMPLEMENTATIONS.
      chunk: rows per turn of XLA's loops, None for passes of full width.
      host_chunk: the same for a table in host memory, where chunk is None.
      is_native: numba runs deduplication, planning and the movements of large rows.
      is_kernel: Pallas kernels run the row movements.
      is_interpreted: the kernels are traced into plain jax operations.
    """

    name: str
    chunk: int | None = None
    host_chunk: int = (
        16384  # a third of a megabyte at INT8 and D = 16, some microseconds of the bus
    )
    is_native: bool = False
    is_kernel: bool = False
    is_interpreted: bool = False
