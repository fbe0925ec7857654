"""Named cases shared by the tests.

Every row format, the odd dims, cache geometries and skewed streams of ids.
"""

from typing import NamedTuple

import numpy as np
import oracles
import row_oracle

import mpembed_jax as mpembed

FORMATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4", "int2")
DIMS = (1, 7, 16, 33, 100)
SCALES = ("bfloat16", "float16", "float32")
WAYS = (1, 2, 8, 32)
POLICIES = ("lru", "lfu")

# Every codec a RowFormat can name: 18 integer, 6 float8, 3 unscaled.
CODECS = {
    f"{name}-{'symmetric' if symmetric else 'asymmetric'}-{scale}": row_oracle.Codec(
        name, symmetric, scale
    )
    for name in ("int8", "int4", "int2")
    for symmetric in (True, False)
    for scale in SCALES
}
CODECS |= {
    f"{name}-{s}": row_oracle.Codec(name, True, s)
    for name in ("float8_e4m3fn", "float8_e5m2")
    for s in SCALES
}
CODECS |= {name: row_oracle.Codec(name) for name in ("float32", "bfloat16", "float16")}


class Sizes(NamedTuple):
    """The sizes of a stack and its cache."""

    num_ids: int
    lines: int  # that are asked for
    ways: int


# `groups` truncates: 550 sets become 512 in 64 groups.
GEOMETRIES = {
    "one-line": Sizes(50, 1, 4),
    "larger-than-table": Sizes(40, 64, 8),
    "groups": Sizes(5000, 1100, 2),
}


def default_codec(name, dim):
    """What a bare format name means at a dim."""
    return row_oracle.Codec(name, symmetric=(dim < 32 and name != "int2"), scale="bfloat16")


def skewed_ids(seed, steps, num, num_ids, *, exponent=1.05, drift=0, ragged=False):
    """i32 [steps, num] ids of a Zipf law over shuffled rows.

    Every `drift` steps the popular rows move.

    With `ragged`, each batch holds a random number of ids, from none to `num`, among padding.
    """
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, num_ids + 1) ** exponent
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random((steps, num)))
    ranks = np.minimum(ranks, num_ids - 1)
    if drift:
        ranks = (ranks + (np.arange(steps) // drift)[:, None] * max(1, num_ids // 7)) % num_ids
    ids = rng.permutation(num_ids)[ranks]
    if ragged:
        ids = np.where(rng.random(ids.shape) < rng.random((steps, 1)), ids, oracles.NO_ID)
    return ids.astype(np.int32)


def dyadic(seed, shape, *, bits=4, scale=2.0**-6):
    """Small multiples of a power of two: their sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-(2**bits), 2**bits + 1, shape) * scale).astype(np.float32)


def rows(seed, num, dim):
    """f32 [num, dim] rows that a format must survive.

    Ordinary ones of many sizes, then awkward ones.
    """
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-5, 2, (num, 1))
    out = (rng.standard_normal((num, dim)) * sizes).astype(np.float32)
    out[0] = 0.0
    out[1] = 0.3  # constant, on no grid
    out[2] = -1.5  # constant, on every grid
    out[3, 0] = 1e4  # one extreme element
    out[4] = np.abs(out[4]) + 3.0  # away from zero: the bias matters
    out[5] = -np.abs(out[5]) - 3.0
    out[6] *= np.float32(1e-6)
    out[7, -1] = -1e30
    out[8] = 1e-6
    return out


def stack(
    num_ids, dim=4, *, storage="float32", lines=None, ways=8, policy="lfu", max_unique_ids=None
):
    """A spec of one or more tables.

    `num_ids` is a vocabulary or a tuple of them. `lines=None` means no cache.
    """
    sizes = num_ids if isinstance(num_ids, tuple) else (num_ids,)
    return mpembed.EmbeddingSpec(
        tuple(mpembed.TableSpec(f"table{k}", size) for k, size in enumerate(sizes)),
        dim,
        storage=storage,
        cache=None
        if lines is None
        else mpembed.CacheSpec(num_rows=lines, ways=ways, policy=policy),
        max_unique_ids=max_unique_ids,
    )
