"""Random bits depend on their five coordinates alone and look random.

Rounding is exact, unbiased and bounded.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import row_oracle
from hypothesis import given
from hypothesis import strategies as st

from mpembed_jax.numerics import random_bits, rounding

KEY = jnp.array([1, 2], jnp.uint32)
STREAMS = (
    random_bits.INITIAL_VALUE,
    random_bits.INITIAL_ROUNDING,
    random_bits.WRITE_BACK,
    random_bits.BYPASS,
    random_bits.FLUSH,
    random_bits.ROW_STATE,
    random_bits.ROW_STATE + 1,
)
FLOATS = tuple(row_oracle.FLOATS)
row_bits = jax.jit(random_bits.row_bits, static_argnames=("stream", "num_columns"))
stochastic_round = jax.jit(rounding.stochastic_round, static_argnames="dtype")
IDS = jnp.arange(4096, dtype=jnp.int32)


def bits(key=KEY, stream=random_bits.WRITE_BACK, step=0, ids=IDS, num_columns=16):
    return np.asarray(row_bits(key, stream, step, ids, num_columns=num_columns))


def test_fmix32_is_murmur3s_finalizer():
    x = np.concatenate(
        [[0, 1, 2, 2**31, 2**32 - 1], np.random.default_rng(0).integers(0, 2**32, 100)]
    ).astype(np.uint32)
    np.testing.assert_array_equal(
        random_bits.fmix32(jnp.asarray(x)), [oracles.fmix32(int(v)) for v in x]
    )


def test_bits_do_not_depend_on_the_company_or_place_of_a_row():
    whole = bits()
    order = np.random.default_rng(0).permutation(4096)
    np.testing.assert_array_equal(bits(ids=IDS[order]), whole[order])
    np.testing.assert_array_equal(bits(ids=IDS[7:8])[0], whole[7])
    np.testing.assert_array_equal(bits(ids=IDS.reshape(64, 64)).reshape(4096, 16), whole)
    np.testing.assert_array_equal(bits(num_columns=5), whole[:, :5])


def test_bits_change_with_every_coordinate():
    """n = 65,536 words: equal by chance 2^-16 times; 5 allowed."""
    base = bits()
    others = [bits(key=k) for k in (KEY.at[0].add(1), KEY.at[1].add(1), KEY[::-1])]
    others += [bits(stream=s) for s in STREAMS if s != random_bits.WRITE_BACK]
    others += [bits(step=s) for s in (1, 2, 1 << 20)] + [bits(ids=IDS + 1), np.roll(base, 1, 1)]
    for other in others:
        assert (base == other).sum() <= 5


def correlation(a, b):
    """Correlation of two sets of words as numbers, in standard deviations of its own sampling
    error.
    """
    a, b = a.ravel() / 2.0**32 - 0.5, b.ravel() / 2.0**32 - 0.5
    return 12 * np.mean(a * b) * np.sqrt(a.size)


def test_streams_steps_rows_and_columns_are_uncorrelated():
    """Two uniform variables correlate by 1/sqrt(n).

    About 60 pairs of n = 61,440 or more, so 5 sigma.
    """
    by_stream = [bits(stream=s) for s in STREAMS]
    pairs = [(a, b) for i, a in enumerate(by_stream) for b in by_stream[:i]]
    pairs += pairwise([bits(step=s) for s in range(12)])
    pairs += pairwise([bits(key=KEY.at[0].add(s)) for s in range(12)])
    base = by_stream[0]
    pairs += [(base[lag:], base[:-lag]) for lag in (1, 2, 16, 32)]
    pairs += [(base[:, lag:], base[:, :-lag]) for lag in (1,)]
    worst = max(abs(correlation(a, b)) for a, b in pairs)
    assert worst < 5


def test_every_bit_is_balanced_and_values_are_uniform():
    """n = 65,536 words.

    Each bit's mean within 5 sigma of 1/2. chi-square of 256 bins within 5 sigma of 255.
    """
    words = bits().ravel()
    means = ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(0)
    assert np.abs(means - 0.5).max() < 5 * 0.5 / np.sqrt(words.size)
    for shift in (24, 16, 8, 0):
        counts = np.bincount((words >> np.uint32(shift)) & 255, minlength=256)
        chi2 = ((counts - words.size / 256) ** 2).sum() / (words.size / 256)
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


def test_row_means_scatter_as_independent_draws_do():
    """4,096 rows of 16 draws.

    The variance of row means is 1/(12 * 16) within 5 sigma (relative sqrt(2/n) = 2.2 %).
    """
    means = (bits() / 2.0**32).mean(1)
    assert abs(means.var() * 12 * 16 - 1) < 5 * np.sqrt(2 / means.size)


def patterns(name):
    """f32 values that matter to a format.

    Normals, subnormals, both sides of every border, and out of range.
    """
    mantissa, least, limit = row_oracle.FLOATS[name]
    rng = np.random.default_rng(0)
    exponents = np.concatenate(
        [
            rng.uniform(least - mantissa - 3, least + 2, 2000),
            rng.uniform(least, np.log2(limit), 2000),
        ]
    )
    sizes = 2.0 ** np.clip(exponents, -125.5, 127)
    borders = np.array([2.0**least, 2.0 ** (least - 1), limit, limit * 0.999, 1.0, 1.5, 0.0])
    borders = np.concatenate([borders, borders * (1 + 2.0**-20), borders * (1 - 2.0**-20), [3e38]])
    x = np.concatenate([sizes, np.where(borders < 2.0**-126, 0, borders)]).astype(np.float32)
    return np.concatenate([x, -x])


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_equals_the_oracle(name):
    x = patterns(name)
    noise = np.random.default_rng(1).integers(0, 2**32, x.size, dtype=np.uint32)
    np.testing.assert_array_equal(
        stochastic_round(x, name, noise), row_oracle.round_float(x, name, noise)
    )
    np.testing.assert_array_equal(stochastic_round(x, name, None), row_oracle.round_float(x, name))


@pytest.mark.parametrize("name", FLOATS)
def test_values_of_the_format_never_move(name):
    """Every finite value of the format, whatever the bits.

    Subnormal float32 is the platform's to flush.
    """
    bits_of = np.arange(
        2 ** row_oracle.CODE_BITS[name], dtype=f"u{row_oracle.DTYPES[name].itemsize}"
    )
    x = bits_of.view(row_oracle.DTYPES[name]).astype(np.float32)
    x = x[np.isfinite(x) & ((np.abs(x) >= 2.0**-126) | (x == 0))]
    for word in (0, 1, 2**31, 2**32 - 1):
        np.testing.assert_array_equal(
            stochastic_round(x, name, np.full(x.size, word, np.uint32)), x
        )
    np.testing.assert_array_equal(stochastic_round(x, name, None), x)


@pytest.mark.parametrize("name", FLOATS)
@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    word=st.integers(0, 2**32 - 1),
)
def test_rounding_picks_a_neighbour_and_never_overflows(name, value, word):
    x = np.full(1, value, np.float32)
    got = float(np.asarray(stochastic_round(x, name, np.full(1, word, np.uint32)))[0])
    limit = row_oracle.FLOATS[name][2]
    dtype = row_oracle.DTYPES[name]
    low, high = (
        float(row_oracle.towards(np.clip(value, -limit, limit), dtype, s)) for s in (-1, 1)
    )
    assert got in (low, high)


# An f32 value inside each part of each format's range, as a multiple of the gap there.
CASES = [
    (name, exponent)
    for name in FLOATS
    for exponent in ("subnormal", "normal", "large")
    if (name, exponent) != ("bfloat16", "subnormal")
]


@pytest.mark.parametrize(("name", "part"), CASES)
def test_rounding_is_unbiased(name, part):
    """16 values x 65,536 draws from row_bits.

    Each mean within 5 sigma, sigma = gap sqrt(p (1 - p) / n).
    """
    mantissa, least, limit = row_oracle.FLOATS[name]
    gap = 2.0 ** (least - mantissa)
    first = {
        "subnormal": gap,
        "normal": 2.0**least * 2,
        "large": 2.0 ** np.floor(np.log2(limit) - 1),
    }[part]
    gap = gap if part == "subnormal" else first * 2.0**-mantissa
    fraction = np.array([0.01, 0.1, 0.25, 0.4, 0.5, 0.6, 0.77, 0.99])
    x = np.concatenate([first + fraction * gap, -(first + fraction * gap)]).astype(np.float32)
    p = np.abs(x.astype(np.float64)) / gap % 1
    n = 65536
    noise = row_bits(KEY, random_bits.WRITE_BACK, 3, jnp.arange(n, dtype=jnp.int32), num_columns=16)
    mean = np.asarray(stochastic_round(np.broadcast_to(x, (n, 16)), name, noise), np.float64).mean(
        0
    )
    assert (np.abs(mean - x) <= 5 * gap * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
def test_a_thousand_small_updates_of_bfloat16(mode):
    """-1e-5 a thousand times from 1.0, 4,096 elements.

    Stochastic rounding ends at 0.99 within 0.1 %. Nearest rounding stays, as an update is below
    half a gap.
    """

    @jax.jit
    def train(x):
        def step(t, x):
            noise = (
                random_bits.row_bits(KEY, random_bits.BYPASS, t, IDS, 1)[:, 0]
                if mode == "stochastic"
                else None
            )
            return rounding.stochastic_round(x - jnp.float32(1e-5), "bfloat16", noise)

        return jax.lax.fori_loop(0, 1000, step, x)

    mean = float(train(jnp.ones(4096)).mean())
    if mode == "stochastic":
        assert abs(mean - 0.99) < 0.00099
    else:
        assert mean == 1.0


def test_uniform_reaches_zero_and_not_one():
    u = random_bits.uniform(jnp.array([0, 255, 256, 2**32 - 1], jnp.uint32))
    np.testing.assert_array_equal(u, np.float32([0, 0, 2.0**-24, 1 - 2.0**-24]))
