"""One hash for every place that needs one: Murmur3's finalizer, for numpy and for jax arrays."""

from typing import Any

import numpy as np


def fmix32(x: Any) -> Any:
    """Mixes u32 of any shape, one to one.

    Every input bit changes half of the output bits on average.
    """
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
