"""Batches in an order that a seed fixes and a number of steps resumes.

An epoch of rows in memory is a permutation of them. An epoch of a file of blocks, too large for
that, takes the blocks in random order and shuffles the rows of a few dozen blocks at a time:
two rows far apart in the file can meet in a batch, two of one block are likelier to. The order
depends on the seed and the epoch only, so whoever has taken `start` batches goes on with exactly
the next one: only the blocks it lies in are read for that. Nothing here knows what a row holds.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

BLOCKS_TOGETHER = 64
Arrays = dict[str, np.ndarray]  # of the same rows: the first axis counts them


class Blocks(Protocol):
    """Rows in blocks of `block_rows`, the last possibly short, that can be read in any order."""

    num_rows: int
    block_rows: int

    def read(self, numbers: Sequence[int]) -> list[Arrays]:
        """Returns the blocks with these numbers."""
        ...


def rebatched(
    parts: Iterable[Arrays], batch_size: int, *, skip: int = 0, keep_rest: bool = False
) -> Iterator[Arrays]:
    """Yields the rows of `parts` after the first `skip`, in batches.

    The last batch has fewer rows with `keep_rest`; otherwise it is left out.
    """
    rest: Arrays = {}
    for part in parts:
        length = len(next(iter(part.values())))
        part = {k: a[min(skip, length) :] for k, a in part.items()}
        skip -= min(skip, length)
        joined = {k: np.concatenate([rest[k], a]) for k, a in part.items()} if rest else part
        num_rows = len(next(iter(joined.values())))
        full = num_rows // batch_size * batch_size
        for at in range(0, full, batch_size):
            yield {k: a[at : at + batch_size] for k, a in joined.items()}
        rest = {k: a[full:].copy() for k, a in joined.items()} if full < num_rows else {}
    if rest and keep_rest:
        yield rest


def epochs(
    num_rows: int, batch_size: int, start: int, num_epochs: int
) -> Iterator[tuple[int, int]]:
    """Yields (epoch, number of its batches already taken), from the batch `start` on.

    Every epoch has its full batches.

    Raises:
      ValueError: if start is negative, or there is no batch or epoch.
    """
    if start < 0 or num_epochs < 1 or batch_size < 1:
        raise ValueError(f"{start=} must be at least 0, {num_epochs=} and {batch_size=} at least 1")
    if per_epoch := num_rows // batch_size:
        for epoch in range(start // per_epoch, num_epochs):
            yield epoch, max(start - epoch * per_epoch, 0)


def permuted(
    num_rows: int, batch_size: int, *, seed: int, start: int = 0, num_epochs: int = 1
) -> Iterator[np.ndarray]:
    """Yields the row numbers of each batch, a new permutation of all rows in each epoch.

    The last incomplete batch of an epoch is left out.

    Args:
      num_rows: rows in memory.
      batch_size: rows of every batch.
      seed: of the order; another one in each epoch.
      start: batches taken before, counted through all epochs.
      num_epochs: how often the rows are gone through.
    """
    for epoch, taken in epochs(num_rows, batch_size, start, num_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for at in range(taken * batch_size, num_rows - batch_size + 1, batch_size):
            yield order[at : at + batch_size]


def shuffled(
    blocks: Blocks,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    num_epochs: int = 1,
    blocks_together: int = BLOCKS_TOGETHER,
) -> Iterator[Arrays]:
    """Yields full batches: blocks in random order, rows shuffled within `blocks_together` of them.

    The other arguments are those of `permuted`. The rows left over at the end of an epoch, fewer
    than a batch and others in each epoch, are left out.
    """
    num_blocks = -(-blocks.num_rows // blocks.block_rows)
    lengths = np.full(num_blocks, blocks.block_rows)
    lengths[-1:] = blocks.num_rows - (num_blocks - 1) * blocks.block_rows
    for epoch, taken in epochs(blocks.num_rows, batch_size, start, num_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_blocks)
        firsts = np.arange(0, num_blocks, blocks_together)
        ends = np.cumsum(np.add.reduceat(lengths[order], firsts))
        group = int(np.searchsorted(ends, taken * batch_size, "right"))
        before = int(ends[group - 1]) if group else 0
        groups = np.split(order, firsts[1:])
        parts = (
            _mixed(blocks, groups[g].tolist(), [seed, epoch, 1 + g])
            for g in range(group, len(groups))
        )
        yield from rebatched(parts, batch_size, skip=taken * batch_size - before)


def _mixed(blocks: Blocks, numbers: list[int], seed: list[int]) -> Arrays:
    """Reads blocks and shuffles their rows."""
    read = blocks.read(numbers)
    mixed = np.random.default_rng(seed).permutation(
        sum(len(next(iter(block.values()))) for block in read)
    )
    return {k: np.concatenate([block[k] for block in read])[mixed] for k in read[0]}


def in_order(blocks: Blocks, batch_size: int) -> Iterator[Arrays]:
    """Yields all rows in their order, the last batch possibly short."""
    num_blocks = -(-blocks.num_rows // blocks.block_rows)
    parts = (part for number in range(num_blocks) for part in blocks.read([number]))
    yield from rebatched(parts, batch_size, keep_rest=True)
