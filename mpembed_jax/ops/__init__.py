"""The row movements and the deduplication: the contract of each op and the choice of its implementation.

This is the only place that knows about hardware. Implementations are named: "xla" makes full-width passes (accelerators),
"xla_chunked" loops over chunks with a dynamic trip count (CPU); both trace the same reference code and give the same bits.

Ops (U unique ids, D embedding dim, V table rows, C cache lines):
  unique(ids [N], size, step)              -> distinct ids, where each position's id went, occurrences
  swap(table, rows, dirty, ...)            -> dirty victims quantized into the table, newcomers dequantized into their lines
  lookup(table, rows, ids, line, ...)      -> f32 [U, D], from the line where there is one, else from the table
  write(table, rows, new_rows, ...)        -> new values to lines, or stochastically rounded into the table
  write_back(table, rows, tags, dirty ...) -> every dirty line quantized into the table
"""

import jax

from mpembed_jax.ops.xla import Unique, add_duplicates, lookup, swap, unique, write, write_back

IMPLEMENTATIONS = ("xla", "xla_chunked")
_CHUNK = 2048  # rows: a few hundred kilobytes, inside a core's cache at every usual embedding dim

__all__ = [
    "IMPLEMENTATIONS",
    "Unique",
    "add_duplicates",
    "choose",
    "chunk_of",
    "lookup",
    "swap",
    "unique",
    "write",
    "write_back",
]


def choose(implementation: str | None) -> str:
    """Returns the named implementation, or for None the best one for the default device.

    Raises:
      ValueError: on an unknown name.
    """
    if implementation is None:
        return "xla_chunked" if jax.default_backend() == "cpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def chunk_of(implementation: str) -> int | None:
    """Returns the chunk length that an implementation loops with, None for full-width passes."""
    return _CHUNK if implementation == "xla_chunked" else None
