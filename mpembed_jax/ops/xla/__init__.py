"""Every op in plain jax.numpy: the reference.

With a chunk length, the row movements are also the fast path on a CPU.
"""

from mpembed_jax.ops.xla import admit, bag, plan, restart, rounds, rows, sums, unique, update

__all__ = ["admit", "bag", "plan", "restart", "rounds", "rows", "sums", "unique", "update"]
