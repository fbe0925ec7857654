"""GPU kernels by Pallas' Triton back end.

Each op takes the arguments of its reference and gives the same bits.
"""

from mpembed_jax.ops.gpu import admit, kernel, plan, restart, rows, sums, unique, update

__all__ = ["admit", "kernel", "plan", "restart", "rows", "sums", "unique", "update"]
