"""The workload "Kaggle step": id batches in plain NumPy.

They have Criteo-Kaggle's 26 vocabularies and bounded Zipf popularity. The exponents bracket the
skew of real samples: with 137,139 draws, exponent 1.00 gives the top 1 / 5 / 10 % of C3's distinct
ids .40 / .51 / .57 of the accesses (real: .42 / .52 / .58), 1.05 is the middle of the six largest
tables, 1.15 is C24's. Imports neither jax nor torch, so that every peer in a benchmark reads the
same ids.
"""

import math

import numpy as np

KAGGLE_SIZES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4,
    7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
SKEWS = (1.0, 1.05, 1.15)


def sizes_for(num_rows: int | None) -> tuple[int, ...]:
    """Returns Kaggle's vocabulary sizes.

    The large ones are shrunk in proportion, so that about num_rows rows remain.
    """
    if num_rows is None:
        return KAGGLE_SIZES
    factor = num_rows / sum(KAGGLE_SIZES)
    return tuple(v if v < 20_000 else max(1000, int(v * factor)) for v in KAGGLE_SIZES)


def zipf_ids(
    rng: np.random.Generator, vocabulary_size: int, shape: tuple[int, ...], exponent: float
) -> np.ndarray:
    """Draws int64 ids by bounded Zipf popularity.

    A multiplicative permutation spreads popular ids over the table.
    """
    v = vocabulary_size
    if v == 1:
        return np.zeros(shape, np.int64)
    u = rng.random(shape)
    if abs(exponent - 1) < 1e-9:
        rank = np.power(float(v), u)
    else:
        rank = ((v ** (1 - exponent) - 1) * u + 1) ** (1 / (1 - exponent))
    multiplier = 2654435761
    while math.gcd(multiplier, v) != 1:
        multiplier += 2
    return (np.minimum(rank.astype(np.int64) - 1, v - 1) * multiplier) % v


def batches(
    seed: int, count: int, batch_size: int, sizes: tuple[int, ...], exponent: float, bag: int = 1
) -> list[np.ndarray]:
    """Returns `count` batches of local ids, int64 [B, T] for bag 1, else [B, T, bag]."""
    rng = np.random.default_rng(seed)
    shape = (batch_size,) if bag == 1 else (batch_size, bag)
    return [
        np.stack([zipf_ids(rng, v, shape, exponent) for v in sizes], axis=1) for _ in range(count)
    ]


def to_global(local: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Returns int32 rows in one stack of the tables."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return (local + starts.reshape(1, -1, *[1] * (local.ndim - 2))).astype(np.int32)


def resident_bytes() -> int:
    """Returns the resident memory of this process (Linux), 0 where it cannot be told."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0


def peak_bytes() -> int:
    """Returns the peak resident memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep freed blocks up to 1 GB for reuse; does nothing elsewhere.

    By default a block above 32 MB is returned to the kernel when it is freed, so a step whose
    temporaries are larger pays for zeroed pages again and again: seen to take 3 to 10 ms a step at
    D = 128.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX
