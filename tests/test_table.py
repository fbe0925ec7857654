"""Row formats and initial tables.

Layout and codes equal row_oracle. Rows stay on their grid. Rounding is unbiased.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_oracle
import shapes
from cases import named
from hypothesis import given
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax.numerics import random_bits
from mpembed_jax.table import init_table, read_rows

encode = jax.jit(mpembed.encode, static_argnames="format")
decode = jax.jit(mpembed.decode, static_argnames=("format", "embedding_dim"))


@partial(jax.jit, static_argnames="fmt")
def pass_through(x, fmt, bits):
    """Packed words and decoded rows, to nearest and stochastically."""
    packed = [mpembed.encode(x, fmt, b) for b in (None, bits)]
    return [(words, mpembed.decode(words, fmt, x.shape[1])) for words in packed]


def row_format(codec):
    scaled = codec.metadata_bytes > 0
    return mpembed.RowFormat(
        codec.name,
        symmetric=codec.symmetric if codec.is_int else None,
        scale_dtype=codec.scale if scaled else None,
    )


class Case(NamedTuple):
    """Rows of a dim, in the oracle's words and in the package's."""

    codec: row_oracle.Codec
    format: mpembed.RowFormat | str
    dim: int


# Every codec at an odd dim, and what a bare name means at the other dims.
CASES = {f"{name}-7": Case(codec, row_format(codec), 7) for name, codec in shapes.CODECS.items()}
CASES |= {
    f"{name}-default-{dim}": Case(shapes.default_codec(name, dim), name, dim)
    for name in shapes.FORMATS
    for dim in shapes.DIMS
    if dim != 7
}


QUICK = {name for name in CASES if name.endswith(("-7", "-33"))}
# Each format once as users compile it; the others quickly.
OPTIMIZED = pytest.mark.optimized("stored bits do not depend on how a program is compiled")
AS_USERS = {name: OPTIMIZED for name in CASES if name.endswith("-default-33")}
CORE = {"float32-default-1", "int4-default-16", "int2-default-100"}


def draws(seed, shape):
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


@pytest.mark.parametrize("case", named(CASES, fast=QUICK, core=CORE, marks=AS_USERS))
def test_packed_words_equal_the_oracle(case):
    """Bias, scale, codes and zero padding, bit for bit.

    Half the rows are dyadic, so exact quotients are common.
    """
    codec, fmt, dim = case
    x = np.concatenate([shapes.rows(dim, 40, dim), shapes.dyadic(dim, (60, dim), bits=9)])
    noise = draws(dim, x.shape)
    for bits, (packed, decoded) in zip(
        (None, noise), jax.device_get(pass_through(x, fmt, noise)), strict=True
    ):
        assert packed.dtype == codec.word_dtype(dim)
        assert packed.shape == (100, codec.row_words(dim))
        assert np.isfinite(decoded).all()
        for k, row in enumerate(x):
            codes, scale, bias = codec.unpack(packed[k], dim)
            if codec.metadata_bytes:
                assert (scale, bias) == codec.grid(row)
            row_bits = None if bits is None else bits[k]
            np.testing.assert_array_equal(
                codes, codec.codes(row, row_bits, scale, bias), err_msg=f"row {k}: {row}"
            )
            np.testing.assert_array_equal(
                packed[k], codec.pack(codes, scale, bias)
            )  # zero padding included
            np.testing.assert_array_equal(decoded[k], codec.decode(packed[k], dim))


def scaled_codecs():
    return {name: codec for name, codec in shapes.CODECS.items() if codec.metadata_bytes}


SCALED_BY_BFLOAT16 = {name for name in scaled_codecs() if name.endswith("-bfloat16")}
# Every format, half of them with each of the other kinds of scale.
OTHER_SCALES = sorted(scaled_codecs().keys() - SCALED_BY_BFLOAT16)[::3]


def errors_allowed(codec, row, scale, bias):
    """Largest distance of a row from its stochastically rounded self.

    One gap, plus float32 arithmetic.
    """
    slack = 2.0**-21 * float(np.max(np.abs(row)) + abs(bias))
    if codec.is_int:
        return float(scale) + slack
    mantissa, least, _ = row_oracle.FLOATS[codec.name]
    size = np.maximum(np.abs(row) / scale if scale else np.zeros_like(row), 2.0**least)
    return 2.0 ** (np.floor(np.log2(size)) - mantissa) * float(scale) + slack


@pytest.mark.parametrize(
    "name", named(list(scaled_codecs()), fast=SCALED_BY_BFLOAT16, core=OTHER_SCALES)
)
@given(
    row=st.lists(
        st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False)
        | st.sampled_from([0.0, 1.0, -1e-3]),
        min_size=7,
        max_size=7,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_never_leaves_its_grid(name, row, seed):
    """Clamping never bites beyond float32 rounding.

    Every element, extremes too, decodes within one gap.
    """
    codec = shapes.CODECS[name]
    if codec.scale == "float16":
        row = np.clip(
            row, -60000, 60000
        )  # a float16 bias and scale have no more range than float16
    row = np.asarray(row, np.float32)
    _, (packed, decoded) = jax.device_get(
        pass_through(row[None], row_format(codec), draws(seed, (1, 7)))
    )
    decoded = decoded[0]
    _, scale, bias = codec.unpack(packed[0], 7)
    assert np.isfinite(decoded).all()
    span = np.max(np.abs(row)) if codec.symmetric else np.max(row) - bias
    if (
        scale == 0
    ):  # a constant row that is its own bias, or one whose gap would be a subnormal float32
        largest = row_oracle.FLOATS[codec.name].largest if codec.name in row_oracle.FLOATS else 1
        assert span <= 2.0**-126 * 2**codec.bits * largest
        assert (np.abs(decoded - row) <= span).all()
    else:
        assert (np.abs(decoded - row) <= errors_allowed(codec, row, scale, bias)).all()


@pytest.mark.parametrize(
    "name",
    named(
        [name for name in shapes.CODECS if name != "float32"],
        fast={*SCALED_BY_BFLOAT16, "bfloat16", "float16"},
        core=OTHER_SCALES,
    ),
)
def test_stored_rounding_is_unbiased(name):
    """6 rows x 8,192 draws of row_bits.

    Each element's mean within 5 sigma, sigma <= gap / 2 / sqrt(n).

    Rows: ordinary, DLRM's initial values (3e-4, subnormal in float16 and float8), wide, offset,
    tiny, mixed sizes.
    """
    codec, n, dim = shapes.CODECS[name], 8192, 7
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (6, dim)) * np.array([[1], [3e-4], [50], [0.1], [1e-5], [1]])
    x[3] += 4
    x[5] *= 10.0 ** -np.arange(dim)
    x = x.astype(np.float32)
    key = jnp.array([5, 6], jnp.uint32)
    ids = jnp.arange(6 * n, dtype=jnp.int32)
    noise = random_bits.row_bits(key, random_bits.BYPASS, jnp.int32(9), ids, dim).reshape(6, n, dim)
    stack = np.broadcast_to(x[:, None], (6, n, dim))
    packed = encode(stack, row_format(codec), noise)
    mean = np.asarray(decode(packed, row_format(codec), dim), np.float64).mean(1)
    for row, got, words in zip(x, mean, np.asarray(packed[:, 0]), strict=True):
        _, scale, bias = codec.unpack(words, dim)
        if codec.metadata_bytes:
            gap = errors_allowed(codec, row, scale, bias)
        else:
            mantissa, least, _ = row_oracle.FLOATS[codec.name]
            gap = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(row), 2.0**least))) - mantissa)
        assert (np.abs(got - row) <= 5 * gap / 2 / np.sqrt(n)).all(), (row, got)


def test_float8_scales_dlrm_values_away_from_zero():
    """Unscaled e4m3 would round the initial values of a ten-million-row table (3e-4) to zero."""
    x = np.random.default_rng(0).uniform(-3e-4, 3e-4, (64, 16)).astype(np.float32)
    got = np.asarray(decode(encode(x, "float8_e4m3fn"), "float8_e4m3fn", 16))
    np.testing.assert_allclose(got, x, rtol=2.0**-4, atol=2.0**-9 * 3e-4 / 448 * 1.02)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_decoded_rows_encode_to_themselves_to_nearest(name):
    """With a float32 scale a stored row whose extremes are in use is a fixed point."""
    codec = row_oracle.Codec(name, False, "float32")
    x = shapes.rows(0, 32, 16)
    once = decode(encode(x, row_format(codec)), row_format(codec), 16)
    twice = decode(encode(once, row_format(codec)), row_format(codec), 16)
    span = np.abs(np.asarray(x)).max(1, keepdims=True)
    assert (np.abs(np.asarray(once) - np.asarray(twice)) <= span * 2.0**-14).all()


def test_encode_accepts_any_leading_shape():
    x = shapes.rows(1, 24, 16)
    packed = encode(x, "int8")
    np.testing.assert_array_equal(encode(x.reshape(2, 3, 4, 16), "int8").reshape(24, -1), packed)
    np.testing.assert_array_equal(encode(x[4], "int8"), packed[4])
    assert encode(x[:0], "int4").shape == (0, 5)


@pytest.mark.optimized("a compiler may replace a quotient")
@pytest.mark.parametrize("name", named(["int4", "float8_e4m3fn"], fast=()))
def test_jitted_words_equal_eager_words(name):
    """Also where a quotient is exact.

    A compiler's multiplication by 1/7 would store the next scale up.
    """
    x = shapes.dyadic(0, (200, 5), bits=10)
    packed = encode(x, name)
    np.testing.assert_array_equal(mpembed.encode(jnp.asarray(x), name), packed)
    np.testing.assert_array_equal(mpembed.decode(packed, name, 5), decode(packed, name, 5))


def test_row_bytes_of_numerics_5():
    """INT8, D = 16, symmetric bf16 is u16[9]; INT4 u16[5]; with a bf16 pair u32[5]."""
    for fmt, dtype, words in [
        ("int8", "uint16", 9),
        ("int4", "uint16", 5),
        ("int2", "uint32", 2),
        ("float32", "uint32", 16),
    ]:
        packed = encode(np.ones((1, 16), np.float32), fmt)
        assert (packed.dtype, packed.shape[-1]) == (dtype, words)
    pair = encode(np.ones((1, 16), np.float32), mpembed.RowFormat("int8", symmetric=False))
    assert (pair.dtype, pair.shape[-1]) == ("uint32", 5)


# --- whole tables


def make(key, tables, fmt="float32", dim=4):
    spec = mpembed.EmbeddingSpec(tables, dim, fmt, cache=None)
    make_table = jax.jit(lambda key: init_table(key, spec))
    return make_table(jnp.array([key, 1], jnp.uint32))


@jax.jit
def read_all(made):
    return read_rows(made, jnp.arange(made.num_rows, dtype=jnp.int32))


def values(made):
    return np.asarray(read_all(made))


def test_default_initial_values_are_uniform_in_each_tables_bound():
    """Vocabularies 1, 3 and 20,000: bounds 1/sqrt(V).

    Mean and variance of n = 80,000 within 5 sigma.
    """
    specs = [
        mpembed.TableSpec("one", 1),
        mpembed.TableSpec("three", 3),
        mpembed.TableSpec("big", 20000),
    ]
    x = values(make(0, tuple(specs)))
    assert x.shape == (20004, 4)
    for start, spec in zip((0, 1, 4), specs, strict=True):
        bound = 1 / np.sqrt(spec.vocabulary_size)
        mine = x[start : start + spec.vocabulary_size] / bound
        assert np.abs(mine).max() <= 1
    n = mine.size
    assert abs(mine.mean()) < 5 * np.sqrt(1 / 3 / n)
    assert abs((mine**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / n)
    assert np.unique(x).size > 0.99 * x.size
    assert not np.array_equal(values(make(1, tuple(specs))), x)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_initial_rows_are_unbiased_roundings_of_the_same_values(fmt):
    """int rows of 10,000 x 4 against float32's: within a gap each.

    Mean difference within 5 sigma.
    """
    specs = (mpembed.TableSpec("a", 10000),)
    exact, rounded = values(make(0, specs)), values(make(0, specs, fmt))
    gap = 0.01 / (2 ** (8 if fmt == "int8" else 4) / 2 - 1) * 1.01
    assert np.abs(exact - rounded).max() <= gap
    assert abs((exact - rounded).mean()) <= 5 * gap / 2 / np.sqrt(exact.size)


@pytest.mark.slow
def test_callables_see_blocks_and_do_not_depend_on_other_tables_shapes():
    """8,192 rows a call, the key folded by (table, block)."""

    def normal(key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * jnp.float32(0.5)

    x = values(make(0, (mpembed.TableSpec("a", 5), mpembed.TableSpec("b", 20000, normal))))
    other = values(make(0, (mpembed.TableSpec("a", 77), mpembed.TableSpec("b", 30000, normal))))
    np.testing.assert_array_equal(x[5 : 5 + 16384], other[77 : 77 + 16384])
    assert np.unique(x[5:]).size > 0.99 * x[5:].size  # no block repeats another
    swapped = values(make(0, (mpembed.TableSpec("b", 20000, normal), mpembed.TableSpec("a", 5))))
    assert not np.array_equal(
        swapped[:20000], x[5:]
    )  # the table's place in the stack is part of the key


def test_an_initializer_is_no_part_of_a_specs_identity():
    a, b = mpembed.TableSpec("a", 5, jax.nn.initializers.zeros), mpembed.TableSpec("a", 5)
    assert a == b
    assert hash(a) == hash(b)


@pytest.mark.slow
def test_reading_outside_the_table_gives_zeros():
    made = make(0, (mpembed.TableSpec("a", 6),), "int8")
    x = np.asarray(read_rows(made, jnp.array([0, 5, 6, -1, mpembed.NO_ID], jnp.int32)))
    np.testing.assert_array_equal(x[2:], 0)
    assert (x[:2] != 0).any(axis=1).all()
    assert made.nbytes == made.rows.nbytes
