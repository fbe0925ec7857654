"""What a CPU does natively, compiled by numba and called through XLA's foreign function interface; the reference's bits."""

from mpembed_jax.ops.cpu import call_frame, hashes, plan, policy, rows, unique

__all__ = ["call_frame", "hashes", "plan", "policy", "rows", "unique"]
