"""GPU kernels by Pallas' Triton back end.

Each op takes the arguments of its reference and gives the same bits.
"""

from mpembed_jax.ops.gpu import kernel, plan, rows, sums, unique, update

__all__ = ["kernel", "plan", "rows", "sums", "unique", "update"]
