"""Ops compiled by numba for a CPU and called through XLA's foreign function interface.

They give the same bits as the reference, `ops.xla`.
"""

from mpembed_jax.ops.cpu import (
    admit,
    bag_step,
    call_frame,
    hashes,
    partitions,
    plan,
    policy,
    restart,
    rows,
    unique,
)

__all__ = [
    "admit",
    "bag_step",
    "call_frame",
    "hashes",
    "partitions",
    "plan",
    "policy",
    "restart",
    "rows",
    "unique",
]
