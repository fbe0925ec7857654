"""A sign sketch of a table: a few bits per row, by which `top_k` chooses rows to score exactly.

Bit j of a row says on which side of a random hyperplane through the origin the row lies. The share
of bits in which a row and a query differ, times pi, estimates the angle between them. So
norm * cos(pi * share), with the row's norm, estimates their product divided by the query's norm.
The hyperplanes are orthogonal to each other in groups of D.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mpembed_jax.embedding import arguments
from mpembed_jax.serving import top_k
from mpembed_jax.serving.container import Table
from mpembed_jax.serving.table import ServingTable

_WORD = 64  # bits


@dataclasses.dataclass(frozen=True)
class SignSketch:
    """The signs and norms of a table's rows; for ServingTable.top_k. It can be pickled."""

    table: str
    signs: np.ndarray  # u64 [V, bits / 64]
    norms: np.ndarray  # f32 [V]
    planes: np.ndarray  # f32 [bits, D]
    score: Any  # the compiled function of compiled.sign_scores; None for NumPy
    checksums_crc32: int | None = None  # of the file whose table it is; see Contents

    @property
    def nbytes(self) -> int:
        """Bytes of the signs and norms."""
        return self.signs.nbytes + self.norms.nbytes

    def candidates(
        self, table: Table, queries: np.ndarray, num: int, parts: Callable | None = None
    ) -> np.ndarray:
        """Returns the rows with the largest estimated products with each query.

        Args:
          table: the table of the sketch.
          queries: float32 [Q, D].
          num: rows for each query.
          parts: divides ranges of rows over threads, as Reader.parts does; None: one thread.

        Returns:
          int32 [Q, num] in ascending order. If fewer rows have a score that is not NaN, the last
          entries are NO_ID.

        Raises:
          ValueError: if the sketch is of another table.
        """
        own = self.table, len(self.signs), self.planes.shape[1]
        if own != (table.name, table.num_rows, table.embedding_dim):
            raise ValueError(
                f"the sketch is of table {own[0]!r} of {own[1]} rows of dim {own[2]}, not of "
                f"{table.name!r} of {table.num_rows} rows of dim {table.embedding_dim}"
            )
        num_bits = len(self.planes)
        cosines = np.cos(np.pi * np.arange(num_bits + 1) / num_bits).astype(np.float32)
        signs = _signs_of(queries, self.planes)
        step = top_k.BLOCK

        def part(begin: int, end: int) -> top_k.Best:
            best = top_k.Best(len(queries), num)
            for first in range(begin, end, step):
                last = min(first + step, end)
                scores = np.empty((len(queries), last - first), np.float32)
                for query, out in zip(signs, scores, strict=True):
                    self._score(query, cosines, first, last, out)
                best.add(scores, np.arange(first, last))
            return best

        if parts is None:
            best = part(0, table.num_rows)
        else:
            best, *others = parts(part, table.num_rows, step)
            for other in others:
                best.merge(other)
        return np.sort(best.result()[1], axis=1)

    def __reduce__(self) -> Any:
        """Pickles the arrays. The process that unpickles them compiles the function again."""
        arrays = self.table, self.signs, self.norms, self.planes
        return _made, (*arrays, self.score is not None, self.checksums_crc32)

    def _score(
        self, query: np.ndarray, cosines: np.ndarray, first: int, last: int, out: np.ndarray
    ) -> None:
        if self.score is not None:
            self.score(self.signs, self.norms, query, cosines, first, last, out)
            return
        differing = np.bitwise_count(self.signs[first:last] ^ query).sum(1, dtype=np.intp)
        out[:] = self.norms[first:last] * cosines[differing]


def _made(
    table: str,
    signs: np.ndarray,
    norms: np.ndarray,
    planes: np.ndarray,
    is_compiled: bool,
    checksums_crc32: int | None,
) -> SignSketch:
    """Returns a sketch of these arrays, with the compiled function if `is_compiled`."""
    score = None
    if is_compiled:
        # Imported here, because numba is optional.
        from mpembed_jax.serving import compiled

        score = compiled.sign_scores(signs.shape[1])
    return SignSketch(table, signs, norms, planes, score, checksums_crc32)


def _signs_of(rows: np.ndarray, planes: np.ndarray) -> np.ndarray:
    packed = np.packbits(rows @ planes.T > 0, axis=1, bitorder="little")
    return packed.view(np.uint64)


def sketch(
    tables: ServingTable, table: str | None = None, *, bits: int = 256, seed: int = 0
) -> SignSketch:
    """Makes the sign sketch of a table, block by block.

    Args:
      tables: a ServingTable on the host.
      table: its name; optional if there is a single table.
      bits: hyperplanes, a multiple of 64. A row takes bits / 8 + 4 bytes.
      seed: the seed of the hyperplanes.

    Returns:
      The sketch. It serves this file alone: `top_k` refuses it for another one.

    Raises:
      TypeError: if tables is not a ServingTable on the host, or bits or seed is not an integer.
      KeyError: if the table is unknown.
      ValueError: if bits is not a multiple of 64, or seed is negative.
    """
    call = "serving.sketch(tables, table)"
    arguments.expect(call, "tables", tables, ServingTable, "from serving.load")
    bits = arguments.integer(call, "bits", bits)
    if bits < _WORD or bits % _WORD:
        raise ValueError(f"bits must be a multiple of {_WORD}, got {bits}")
    seed = arguments.integer(call, "seed", seed)
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    chosen = tables.table(table)
    dim = chosen.embedding_dim
    rng = np.random.default_rng(seed)
    groups = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(-(-bits // dim))]
    planes = np.concatenate(groups)[:bits].astype(np.float32)
    signs = np.empty((chosen.num_rows, bits // _WORD), np.uint64)
    norms = np.empty(chosen.num_rows, np.float32)
    for first in range(0, chosen.num_rows, top_k.BLOCK):
        last = min(first + top_k.BLOCK, chosen.num_rows)
        rows = tables.decode_block(chosen, first, last)
        signs[first:last] = _signs_of(rows, planes)
        norms[first:last] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    is_compiled = tables.host.implementation == "numba"
    of_file = tables.contents.checksums_crc32
    return _made(chosen.name, signs, norms, planes, is_compiled, of_file)
