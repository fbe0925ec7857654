"""The hashes of `numerics` and `cache`, compiled by numba. They give the same numbers."""

import numpy as np

from mpembed_jax.cache import residency
from mpembed_jax.ops.cpu.call_frame import compiled

SEEDS = residency.SKETCH_SEEDS


@compiled
def fmix32(x):
    """Returns the mixed bits (uint32) of a uint32; see random_bits.fmix32."""
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def scale_to(mixed, size):
    """Maps a mixed uint32 to [0, size), as int64; see random_bits.scale_to."""
    return np.int64((np.uint64(mixed) * np.uint64(size)) >> np.uint64(32))


@compiled
def cell_of(depth, quotient, group, groups, width):
    """Returns the cell of the id quotient * groups + group in row `depth` of the sketch.

    The cell is an index (int64) into the flattened sketch; see residency.sketch_cells. `quotient`
    is uint32, and `width` is the number of cells of a group in one row.
    """
    return (depth * groups + group) * width + scale_to(
        fmix32(quotient ^ np.uint32(SEEDS[depth])), width
    )


@compiled
def cell(depth, x, groups, width):
    """Returns the cell of id x in row `depth` of the sketch; see `cell_of`."""
    quotient = np.uint32(x) // np.uint32(groups)
    group = np.int64(np.uint32(x) % np.uint32(groups))
    return cell_of(depth, quotient, group, groups, width)
