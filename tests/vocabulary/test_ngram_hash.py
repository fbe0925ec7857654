"""Rows of n-grams: frozen values, and the same ids on the device, on the host, and token by token.

The oracle is the definition in Python's own integers, one position at a time.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Refused, named
from hypothesis import given, settings
from hypothesis import strategies as st

from mpembed_jax import NO_ID
from mpembed_jax.nn import NGramHash
from mpembed_jax.vocabulary.ngram_hash import prime_sizes


def fmix32(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def mixed_of(spec, tokens, at, order, head, canonical=None):
    """x of the n-gram that ends at a position of one sequence (list of ints)."""
    words = [tokens[at]]
    while len(words) < order:
        before = at - len(words)
        is_end = before < 0 or words[-1] == spec.boundary
        if is_end or tokens[before] in (NO_ID, spec.padding):
            break
        words.append(tokens[before])
    if canonical is not None:
        words = [int(canonical[word]) for word in words]
    words += [NO_ID] * (order - len(words))
    start = fmix32((spec.seed * 2654435761 + 1024 * order + head) % 2**32)
    mixed = start
    for k, word in enumerate(words):
        multiplier = fmix32((start + k) % 2**32) | 1
        mixed = fmix32(mixed ^ word * multiplier % 2**32)
    return mixed


def oracle(spec, tokens, canonical=None):
    """The ids of one sequence (list of ints), [T, tables]."""
    result = []
    for at, newest in enumerate(tokens):
        row = []
        for (order, head), rows in zip(spec.tables, spec.table_sizes, strict=True):
            is_padding = newest in (NO_ID, spec.padding)
            mixed = 0 if is_padding else mixed_of(spec, tokens, at, order, head, canonical)
            row.append(NO_ID if is_padding else mixed % rows)
        result.append(row)
    return np.array(result, np.int64).reshape(len(tokens), len(spec.tables))


def oracle_keys(spec, tokens, canonical=None):
    """The keys of one sequence, uint64 [T, orders]; 0 for padding."""
    result = []
    for at, newest in enumerate(tokens):
        if newest in (NO_ID, spec.padding):
            result.append([0] * len(spec.orders))
            continue
        of = partial(mixed_of, spec, tokens, at, canonical=canonical)
        result.append([of(n, 0) << 32 | of(n, 1) for n in spec.orders])
    return np.array(result, np.uint64).reshape(len(tokens), len(spec.orders))


def joined(keys):
    """Keys as uint64 [.., T, orders]; 0 for padding."""
    words, is_ngram = map(np.asarray, keys)
    whole = words[..., 0].astype(np.uint64) << np.uint64(32) | words[..., 1]
    return np.where(is_ngram, whole, np.uint64(0))


FROZEN = [
    [19, 37, 600, 383],
    [44, 35, 173, 493],
    [17, 57, 273, 155],
    [37, 36, 67, 918],
    [NO_ID, NO_ID, NO_ID, NO_ID],
    [17, 35, 945, 86],
    [17, 57, 742, 682],
    [19, 37, 600, 383],
    [37, 9, 758, 378],
]
FROZEN_SEED = [26, 16, 731, 862]


def test_the_rows_of_n_grams_never_change():
    """A trained table depends on them."""
    spec = NGramHash(100, (2, 3), 2, (50, 1000), boundary=0, padding=1)
    assert spec.table_sizes == (53, 59, 1009, 1013)
    assert spec.tables == ((2, 0), (2, 1), (3, 0), (3, 1))
    ids = spec.ids(np.array([0, 7, 8, 99, 1, 7, 8, 0, 99]))
    np.testing.assert_array_equal(ids, FROZEN)
    other = NGramHash(100, (2, 3), 2, (50, 1000), boundary=0, padding=1, seed=2**31 - 1)
    np.testing.assert_array_equal(other.ids(np.array([7, 8]))[1], FROZEN_SEED)


FROZEN_KEYS = [
    [0xBB922660F8ECDD99, 0xDEC3C11A1C7076D4],
    [0x5CC8051886AEE5E1, 0x8065544B59B2EC32],
    [0, 0],
]


def test_the_keys_of_n_grams_never_change():
    """The rows of raw ids depend on them."""
    spec = NGramHash(40, (2, 3), 1, None, boundary=0, padding=1)
    keys = joined(spec.keys(np.array([0, 7, 1])))
    np.testing.assert_array_equal(keys, np.array(FROZEN_KEYS, np.uint64))
    assert spec.table_sizes == () and spec.tables == ((2, 0), (3, 0))


def test_n_grams_have_keys_of_their_own():
    """All 2-grams of 300 tokens. Of 90,000 keys, 2 are equal with a chance of 2e-10."""
    spec = NGramHash(300, (2,), 1, None)
    tokens = np.stack(np.divmod(np.arange(90_000), 300), axis=-1)
    keys = joined(spec.keys(tokens))[:, 1, 0]
    assert len(np.unique(keys)) == 90_000
    for bits in (keys & np.uint64(1023), keys >> np.uint64(54)):
        counts = np.bincount(bits.astype(int), minlength=1024)
        expected = 90_000 / 1024
        # Chi-square over its degrees of freedom, as below.
        assert abs(((counts - expected) ** 2).sum() / expected / 1024 - 1) < 5 * (2 / 1024) ** 0.5


def test_table_sizes_are_the_smallest_free_primes():
    def is_prime(n):
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    assert prime_sizes([1, 1, 4, 4, 2**31 - 2]) == (2, 3, 5, 7, 2**31 - 1)
    primes = [n for n in range(20_000) if is_prime(n)]
    assert prime_sizes([1] * 2048) == tuple(primes[:2048])  # as of two orders of 1,024 heads
    assert prime_sizes([90, 7, 90, 7, 7] * 3)[:9] == (97, 7, 101, 11, 13, 103, 17, 107, 19)
    for wanted in (2, 561, 41_041, 500_000):
        (size,) = prime_sizes([wanted])
        assert is_prime(size) and not any(map(is_prime, range(wanted, size)))


@st.composite
def hashed(draw):
    size = draw(st.sampled_from([3, 50, 2**16 + 1, 2**31 - 1]))
    tokens = st.integers(0, size - 1)
    pool = draw(st.lists(tokens, min_size=1, max_size=4))  # so that n-grams repeat
    boundary, padding = draw(st.sampled_from([(None, None), (0, None), (None, 1), (1, 2)]))
    orders = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True))
    rows = draw(
        st.one_of(
            st.integers(1, 100_000_000),
            st.lists(st.integers(1, 1000), min_size=len(orders), max_size=len(orders)),
        )
    )
    spec = NGramHash(
        size, orders, draw(st.integers(1, 3)), rows, boundary=boundary, padding=padding,
        seed=draw(st.integers(0, 2**31 - 1)),
    )  # fmt: skip
    length = draw(st.sampled_from([1, 2, 7]))
    choice = st.sampled_from([*pool, *(t for t in (boundary, padding) if t is not None), NO_ID])
    sequences = st.lists(choice, min_size=length, max_size=length)
    batch = draw(st.lists(sequences, min_size=1, max_size=2))
    cut = draw(st.integers(0, length))
    return spec, np.array(batch, np.int64), cut


def definition(spec, tokens):
    """A map of tokens or None, the ids of the definition, and the keys if they are raw ids."""
    canonical = None
    if spec.vocabulary_size < 2**20:
        canonical = np.arange(spec.vocabulary_size) // 2
    ids = np.stack([oracle(spec, sequence.tolist(), canonical) for sequence in tokens])
    raw = dataclasses.replace(spec, heads=1, rows=None)
    keys = np.stack([oracle_keys(raw, sequence.tolist(), canonical) for sequence in tokens])
    return canonical, ids, raw, keys


@pytest.mark.slow
@settings(max_examples=8)
@given(hashed())
def test_the_device_gives_the_ids_of_the_definition(case):
    spec, tokens, cut = case
    canonical, wanted, raw, keys = definition(spec, tokens)
    # A part of each text, then one token at a time.
    context_after, ids = jax.jit(spec.context_after), jax.jit(spec.ids)
    context = context_after(jnp.asarray(tokens[:, :cut], jnp.int32))
    for at in range(cut, tokens.shape[1]):
        token = jnp.asarray(tokens[:, at : at + 1], jnp.int32)
        np.testing.assert_array_equal(ids(token, canonical, context), wanted[:, at : at + 1])
        context = context_after(token, context)
    traced = jax.jit(spec.ids)(jnp.asarray(tokens, jnp.int32), canonical)
    np.testing.assert_array_equal(traced, wanted)
    np.testing.assert_array_equal(spec.ids(jnp.asarray(tokens, jnp.int32), canonical), wanted)
    traced = jax.jit(raw.keys)(jnp.asarray(tokens, jnp.int32), canonical)
    np.testing.assert_array_equal(joined(traced), keys)
    traced = jax.jit(raw.pairs)(jnp.asarray(tokens, jnp.int32), canonical)
    np.testing.assert_array_equal(traced, raw.pairs(tokens, canonical))


@given(hashed())
def test_host_parts_and_single_tokens_give_the_ids_of_the_definition(case):
    spec, tokens, cut = case
    canonical, wanted, raw, keys = definition(spec, tokens)
    host = spec.ids(tokens, canonical)
    assert isinstance(host, np.ndarray) and host.dtype == np.int32
    np.testing.assert_array_equal(host, wanted)
    np.testing.assert_array_equal(joined(raw.keys(tokens, canonical)), keys)
    pairs = raw.pairs(tokens, canonical)
    assert isinstance(pairs, np.ndarray) and pairs.dtype == np.uint32
    # The last part, with what was before it.
    context = spec.context_after(tokens[:, :cut])
    np.testing.assert_array_equal(spec.ids(tokens[:, cut:], canonical, context), wanted[:, cut:])
    context = None
    for at in range(tokens.shape[1]):
        token = tokens[:, at : at + 1]
        got = spec.ids(token, canonical, context)
        np.testing.assert_array_equal(got, wanted[:, at : at + 1])
        got = joined(raw.keys(token, canonical, context))
        np.testing.assert_array_equal(got, keys[:, at : at + 1])
        context = spec.context_after(token, context)


TEXTS = np.random.default_rng(0).integers(0, 40, (3, 6))


@pytest.mark.parametrize("canonical", named({"as they are": None, "mapped": np.arange(40) // 2}))
def test_the_device_hashes_parts_and_single_tokens_as_the_host_does_whole_texts(canonical):
    spec = NGramHash(40, (2, 4), 2, (30, 50), boundary=0, padding=1)
    ids = jax.jit(spec.ids)
    after = jax.jit(spec.context_after)
    whole = spec.ids(TEXTS, canonical)
    context = np.full((3, 3), NO_ID, np.int32)
    for at in range(TEXTS.shape[1]):
        token = TEXTS[:, at : at + 1].astype(np.int32)
        np.testing.assert_array_equal(ids(token, canonical, context), whole[:, at : at + 1])
        context = after(token, context)
        np.testing.assert_array_equal(context, spec.context_after(TEXTS[:, : at + 1]))
    context = after(TEXTS[:, :4].astype(np.int32))
    found = ids(TEXTS[:, 4:].astype(np.int32), canonical, context)
    np.testing.assert_array_equal(found, whole[:, 4:])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_traced_tokens_may_have_any_integer_dtype(dtype):
    """The vocabulary, its padding and NO_ID are larger than what the narrow dtypes hold."""
    spec = NGramHash(2**17, (2, 3), 1, (30, 50), boundary=0, padding=70_000)
    tokens = np.arange(12).reshape(2, 6) * (np.iinfo(dtype).max // 64) % 100_000
    tokens = tokens.astype(dtype)
    np.testing.assert_array_equal(jax.jit(spec.ids)(tokens), spec.ids(tokens))


def test_padding_behind_a_text_counts_as_the_tokens_before_the_next_one():
    """Padding in front keeps the context of a shorter text."""
    spec = NGramHash(40, (2, 3), 2, (30, 50), padding=1)
    text, new = np.array([[5, 6, 7]]), np.array([[8]])
    wanted = spec.ids(np.array([[5, 6, 7, 8]]))[:, 3:]
    for pad in (1, NO_ID):
        context = spec.context_after(np.array([[pad, pad, *text[0]]]))
        np.testing.assert_array_equal(context, spec.context_after(text))
        np.testing.assert_array_equal(spec.ids(new, None, context), wanted)
        context = spec.context_after(np.array([[*text[0], pad, pad]]))
        np.testing.assert_array_equal(context, [[NO_ID, NO_ID]])
        np.testing.assert_array_equal(spec.ids(new, None, context), spec.ids(new))
        context = spec.context_after(np.array([[*text[0], pad]]))
        np.testing.assert_array_equal(spec.ids(new, None, context), spec.ids(new))
    assert (spec.ids(new) != wanted).any()


@pytest.mark.parametrize("tokens", [np.array([1, 2]), jnp.array([1, 2])], ids=["host", "device"])
def test_a_map_of_tokens_with_a_mask_is_refused(tokens):
    spec = NGramHash(4, (2,), 1, 11)
    with pytest.raises(TypeError, match="canonical: got a masked array"):
        spec.ids(tokens, np.ma.array([0, 1, 2, 3], mask=[0, 1, 0, 0]))


def test_masked_tokens_stand_for_no_token():
    tokens = np.ma.array([5, 6, 7, 8], mask=[0, 1, 0, 0])
    np.testing.assert_array_equal(SPEC.ids(tokens), SPEC.ids(tokens.filled(NO_ID)))


def test_no_n_gram_crosses_a_boundary_and_padding_stands_for_no_token():
    spec = NGramHash(100, (2, 3, 4), 2, 1000, boundary=0, padding=1)
    text, other = np.array([5, 6, 7, 8]), np.array([9, 9, 0, 5, 6, 7, 8])
    alone = spec.ids(np.concatenate([[0], text]))
    np.testing.assert_array_equal(spec.ids(other)[2:], alone)
    padded = spec.ids(np.array([1, NO_ID, *text, 1, 1]))
    np.testing.assert_array_equal(padded[2:6], spec.ids(text))
    assert (padded[[0, 1, 6, 7]] == NO_ID).all()
    # A first token has another row after a boundary than after nothing, and after another token.
    assert len({tuple(ids) for ids in (alone[1], spec.ids(text)[0], spec.ids(other[:2])[1])}) == 3


def test_tokens_of_one_canonical_number_are_the_same_in_n_grams():
    spec = NGramHash(10, (2,), 1, 1000)
    canonical = np.array([0, 1, 2, 2, 4, 5, 6, 7, 8, 9])
    one, other = (spec.ids(np.array(t), canonical) for t in ([1, 2, 4], [1, 3, 4]))
    np.testing.assert_array_equal(one, other)
    assert (spec.ids(np.array([1, 2])) != spec.ids(np.array([1, 3])))[1].all()


def test_rows_are_used_evenly_and_heads_collide_apart():
    """n = 40,000 distinct 3-grams, each head of 10,007 rows or so."""
    spec = NGramHash(50, (3,), 2, 10_000)
    tokens = np.stack(np.unravel_index(np.arange(40_000), (50, 50, 50)), axis=-1)
    ids = spec.ids(tokens)[:, 2]
    for head, size in enumerate(spec.table_sizes):
        counts = np.bincount(ids[:, head], minlength=size)
        expected = 40_000 / size
        # Chi-square over its degrees of freedom: mean 1, deviation sqrt(2 / size). 5 deviations.
        assert abs(((counts - expected) ** 2).sum() / expected / size - 1) < 5 * (2 / size) ** 0.5
    # Pairs that share both rows: 40,000^2 / 2 / 10^8 = 8 expected; 8 + 5 sqrt(8).
    assert len(np.unique(ids, axis=0)) > 40_000 - 23


def test_traced_tokens_outside_the_vocabulary_have_no_row():
    spec = NGramHash(10, (2, 3), 1, 100)
    ids = jax.jit(spec.ids)(jnp.array([1, 10, 2, 3, 4, -5], jnp.int32))
    whole = spec.ids(np.array([1, 9, 2, 3, 4, 5]))
    np.testing.assert_array_equal(ids[:, 0] == -1, [False, True, True, False, False, True])
    np.testing.assert_array_equal(ids[:, 1] == -1, [False, True, True, True, False, True])
    np.testing.assert_array_equal(ids[4], whole[4])
    raw = NGramHash(10, (2, 3), 1, None)
    is_ngram = jax.jit(raw.keys)(jnp.array([1, 10, 2, 3, 4, -5], jnp.int32))[1]
    np.testing.assert_array_equal(is_ngram, ids != -1)


SPEC = NGramHash(10, (2, 3), 1, 100)


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(lambda: SPEC.ids(np.array([1, 10])), r"in \[0, 10\).*got 10 at \[1\] \(1 such"),
            Refused(lambda: SPEC.ids(jnp.array([[-1, 3]])), r"the vocabulary, got -1 at \[0, 0\]"),
            Refused(lambda: SPEC.ids(np.array([2**40])), "got 1099511627776 at"),
            Refused(lambda: SPEC.ids(np.array([2**63], np.uint64)), "got 9223372036854775808 at"),
            Refused(lambda: SPEC.ids(np.ones(3)), "tokens must be integers.*float64", TypeError),
            Refused(
                lambda: jax.jit(SPEC.ids)(jnp.ones(3)), "integers .*float32 .3.; cast", TypeError
            ),
            Refused(lambda: SPEC.ids(3), "got a scalar"),
            Refused(
                lambda: SPEC.ids(np.array([[1, 2]]), None, np.array([[1]])),
                r"context must be the 2 tokens.*\[1, 2\], got \[1, 1\]",
            ),
            Refused(lambda: SPEC.ids(np.array([1]), None, np.ones(2)), "context.*float", TypeError),
            Refused(lambda: SPEC.ids(np.array([1]), np.arange(9)), r"each token, \[10\], got \[9"),
            Refused(lambda: SPEC.ids(np.array([1]), np.ones(10)), "canonical.*float64", TypeError),
            Refused(
                lambda: jax.jit(SPEC.ids)(np.array([1]), np.arange(9)),
                r"each token, \[10\], got \[9",
            ),
            Refused(
                lambda: jax.jit(SPEC.ids)(np.array([1]), np.ones(10, np.float32)),
                r"canonical must be integers \[10\], got float32",
                TypeError,
            ),
            Refused(lambda: SPEC.ids(np.array([0, 9]), np.arange(10) - 1), "from -1 to 8"),
            Refused(lambda: SPEC.ids(jnp.array([5]), np.arange(10) - 1), "from -1 to 8"),
            Refused(lambda: NGramHash(10, (1, 2), 1, 9), r"each of orders must be in \[2, 64\]"),
            Refused(lambda: NGramHash(10, (2, 2), 1, 9), "orders must be distinct"),
            Refused(lambda: NGramHash(10, (), 1, 9), "orders must be distinct and at least one"),
            Refused(lambda: NGramHash(10, 2, 1, 9), "orders must be a sequence", TypeError),
            Refused(lambda: NGramHash(10, (2.0,), 1, 9), "orders must be an integer", TypeError),
            Refused(lambda: NGramHash(10, (2,), 0, 9), r"heads must be in \[1, 1024\], got 0"),
            Refused(lambda: NGramHash(10, (2,), 1, 0), "rows must be in .*got 0"),
            Refused(lambda: NGramHash(10, (2,), 1, True), "rows must be an integer", TypeError),
            Refused(lambda: NGramHash(10, (2,), 1, (9, 9)), r"one for each of orders \[2\]"),
            Refused(lambda: NGramHash(10, (2,), 2, None), "heads must be 1, got 2; take more feat"),
            Refused(
                lambda: NGramHash(10, (2,), 1, None).ids(np.array([1])), "no row numbers; see keys"
            ),
            Refused(lambda: SPEC.pairs(np.array([1])), "have row numbers and no pairs; see ids"),
            Refused(lambda: NGramHash(10, (2,), 9, 2**30), "fewer than .* rows in all, got 9,663"),
            Refused(lambda: NGramHash(10, (2,), 1, 2**31 - 2), "rows in all, got 2,147,483,647;"),
            Refused(lambda: NGramHash(0, (2,), 1, 9), r"vocabulary_size must be in .*got 0"),
            Refused(lambda: NGramHash(2**31, (2,), 1, 9), r"vocabulary_size must be in"),
            Refused(lambda: NGramHash(10, (2,), 1, 9, boundary=10), r"boundary must be in \[0, 9"),
            Refused(lambda: NGramHash(10, (2,), 1, 9, boundary=1, padding=1), "different tokens"),
            Refused(lambda: NGramHash(10, (2,), 1, 9, seed=-1), "seed must be in"),
        ]
    ),
)
def test_wrong_tokens_and_settings_are_refused(case):
    with pytest.raises(case.error, match=case.message):
        case.call()


@pytest.mark.parametrize("canonical", named({"as they are": None, "mapped": np.arange(97) // 3}))
def test_a_long_batch_has_the_ids_of_its_parts(canonical):
    """More positions than are hashed at once on the host."""
    spec = NGramHash(97, (2, 4), 3, 1000, boundary=0)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 9000))
    whole = spec.ids(tokens, canonical)
    assert whole.shape == (2, 9000, 6) and whole.flags.c_contiguous
    parts = [
        spec.ids(tokens[:, start : start + 100], canonical, spec.context_after(tokens[:, :start]))
        for start in range(0, 9000, 900)
    ]
    for start, part in zip(range(0, 9000, 900), parts, strict=True):
        np.testing.assert_array_equal(whole[:, start : start + 100], part)
    keys, _ = dataclasses.replace(spec, heads=1, rows=None).keys(tokens, canonical)
    assert keys.shape == (2, 9000, 2, 2)
