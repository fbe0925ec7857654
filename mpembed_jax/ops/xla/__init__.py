"""Every op in plain jax.numpy: the reference, and with a chunk length the fast path on a CPU."""

from mpembed_jax.ops.xla import bag, plan, rounds, rows, sums, unique, update

__all__ = ["bag", "plan", "rounds", "rows", "sums", "unique", "update"]
