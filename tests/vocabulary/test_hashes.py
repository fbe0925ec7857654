"""Hashes of raw ids: published values, the same for every container, on the host and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import polars
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax.vocabulary import hashes

MASK = 2**64 - 1
P = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)


def rotl(x, r):
    return ((x << r) | (x >> (64 - r))) & MASK


def xxh64(data):
    """XXH64 with seed 0, from its specification, one string at a time."""

    def turn(acc, lane):
        return rotl((acc + lane * P[1]) & MASK, 31) * P[0] & MASK

    left = data
    if len(data) >= 32:
        v = [(P[0] + P[1]) & MASK, P[1], 0, -P[0] & MASK]
        while len(left) >= 32:
            for i in range(4):
                v[i] = turn(v[i], int.from_bytes(left[8 * i : 8 * i + 8], "little"))
            left = left[32:]
        acc = sum(rotl(x, r) for x, r in zip(v, (1, 7, 12, 18), strict=True)) & MASK
        for x in v:
            acc = ((acc ^ turn(0, x)) * P[0] + P[3]) & MASK
    else:
        acc = P[4]
    acc = (acc + len(data)) & MASK
    while len(left) >= 8:
        acc ^= turn(0, int.from_bytes(left[:8], "little"))
        acc = (rotl(acc, 27) * P[0] + P[3]) & MASK
        left = left[8:]
    if len(left) >= 4:
        acc ^= int.from_bytes(left[:4], "little") * P[0] & MASK
        acc = (rotl(acc, 23) * P[1] + P[2]) & MASK
        left = left[4:]
    for byte in left:
        acc = rotl(acc ^ (byte * P[4] & MASK), 11) * P[0] & MASK
    acc = (acc ^ acc >> 33) * P[1] & MASK
    acc = (acc ^ acc >> 29) * P[2] & MASK
    return acc ^ acc >> 32


def pair(value, table, number):
    """The pair of one raw id, from the definition."""
    word = value if isinstance(value, int) else None
    if word is None:
        word = xxh64(value.encode() if isinstance(value, str) else value)
    z = (word + xxh64(table.encode())) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    z ^= z >> 31
    return [min(z >> 32, 2**32 - 2), (z & 0xFFFFFC00) | number]


def expected(values, table="user", number=3):
    return np.asarray([pair(v, table, number) for v in values], np.uint32).reshape(-1, 2)


def test_the_oracle_gives_the_published_values_of_xxh64():
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"a") == 0xD24EC4F1A98C6E5B
    assert xxh64(b"abc") == 0x44BC2CF5AD770999


def test_a_pair_never_changes():
    """Saved vocabularies hold these tags, so a change of the hash would lose every row."""
    got = hashes.of_column(np.asarray([0, 1, -1]), "user", 0)
    assert got.tolist() == expected([0, 1, -1], number=0).tolist()
    assert got.tolist() == [
        [1848324883, 2342787072], [1262193816, 1450729472], [1112528464, 1031383040],
    ]  # fmt: skip
    assert hashes.of_column(["Ulm", "", "ü"], "city", 1).tolist() == [
        [36595040, 4009658369], [4279878537, 620006401], [3311848289, 65126401],
    ]  # fmt: skip
    assert hashes.salt("user") == xxh64(b"user")


@pytest.mark.slow
@settings(max_examples=12)
@given(st.lists(st.text(max_size=70), min_size=1), st.integers(0, 1023))
def test_strings_of_any_container_have_the_same_pairs(strings, number):
    strings = [s.rstrip("\0") for s in strings]
    want = expected(strings, "item", number)
    objects = np.asarray([*strings, None], object)[:-1]
    encoded = [s.encode() for s in strings]
    columns = [
        np.asarray(strings),
        objects,
        np.asarray(encoded),
        np.asarray([*encoded, None], object)[:-1],
        pyarrow.array(strings),
        pyarrow.chunked_array([strings, strings])[len(strings) :],
        pyarrow.array(strings).dictionary_encode(),
        pyarrow.array(encoded, pyarrow.large_binary()),
        polars.Series(strings),
    ]
    for column in columns:
        np.testing.assert_array_equal(hashes.of_column(column, "item", number), want)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1))
def test_integers_of_any_dtype_have_the_pairs_of_their_values_modulo_2_64(values):
    want = expected(values)
    np.testing.assert_array_equal(
        hashes.of_column(np.asarray([*values, None], object)[:-1], "user", 3), want
    )
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        info = np.iinfo(dtype)
        fitting = [v for v in values if info.min <= v <= info.max] or [0, int(info.max)]
        array = np.asarray(fitting, dtype)
        want = expected(fitting)
        np.testing.assert_array_equal(hashes.of_column(array, "user", 3), want)
        np.testing.assert_array_equal(hashes.of_column(pyarrow.array(array), "user", 3), want)
        if array.dtype.itemsize < 8:
            traced = jax.jit(lambda ids: hashes.of_traced(ids, "user", 3))(array)
            np.testing.assert_array_equal(traced, want)


def test_64_bit_ids_on_a_device_have_the_same_pairs():
    with jax.enable_x64(True):
        for array in (np.asarray([2**40, -3, -(2**63)]), np.asarray([2**64 - 1, 5], np.uint64)):
            got = jax.jit(lambda ids: hashes.of_traced(ids, "t", 1))(jnp.asarray(array))
            np.testing.assert_array_equal(got, hashes.of_column(array, "t", 1))


def test_missing_values_are_padding():
    padding = [hashes.PADDING] * 2
    columns = [
        [None, "a"],
        np.ma.masked_array([1, 7], [True, False]),
        pyarrow.array([None, 7]),
        pyarrow.array([None, "a"]),
        polars.Series([None, "a"]),
    ]
    for column in columns:
        got = hashes.of_column(column, "user", 3).tolist()
        assert got[0] == padding and got[1] != padding
    for column in ([None, None], pyarrow.nulls(2), polars.Series([None, None])):
        assert hashes.of_column(column, "user", 3).tolist() == [padding] * 2


def test_lists_of_text_need_no_common_width_and_no_utf8():
    """A million short strings and a long one must not take the memory of a million long ones."""
    words = [b"\xc3\xa9", "x", "y" * 100_000]
    assert hashes.as_array(words).dtype == object
    got = hashes.of_column(words, "user", 0).tolist()
    assert got == [hashes.of_column([word], "user", 0).tolist()[0] for word in words]
    assert got[0] == hashes.of_column(["\u00e9"], "user", 0).tolist()[0]


@pytest.mark.parametrize("ids", [[["a"], ["b", "c"]], [[1], [2, 3]], [[None], ["b", "c"]]], ids=str)
def test_lists_of_different_lengths_are_told_to_pad(ids):
    with pytest.raises(ValueError, match="different lengths; pad the shorter ones with None"):
        hashes.of_column(ids, "user", 0)


def test_other_values_are_refused():
    for column in (
        [1.5],
        [True],
        np.asarray([1, "a"], object),
        [1, "a"],
        [["a"], [1]],
        [2**64],
        pyarrow.array([1.5]),
    ):
        with pytest.raises(TypeError, match="raw ids must"):
            hashes.of_column(column, "user", 0)
    with pytest.raises(TypeError, match="raw ids on a device"):
        hashes.of_traced(jnp.zeros(2), "user", 0)


@pytest.mark.parametrize("library", [np, jnp])
def test_a_mask_of_another_shape_is_refused(library):
    ids = library.zeros((3, 2), np.int32)
    spec = mpembed.EmbeddingSpec(
        [mpembed.TableSpec("a"), mpembed.TableSpec("b")],
        4,
        vocabulary=mpembed.VocabularySpec(num_rows=8),
    )
    for where in (np.ones((3, 1), bool), [True] * 3, True):
        with pytest.raises(ValueError, match=r"where must have the shape of the ids \[3, 2\], got"):
            spec.raw_ids(ids, where)
    np.testing.assert_array_equal(
        spec.raw_ids(ids, np.ones((3, 2), bool).tolist()), spec.raw_ids(ids)
    )


@pytest.mark.parametrize("is_mapping", [False, True], ids=["columns", "mapping"])
def test_masked_entries_of_a_mask_are_padding(is_mapping):
    where = np.ma.array([[True, True], [False, True]], mask=[[False, True], [False, False]])
    ids, filled = np.arange(4).reshape(2, 2), where.filled(False)
    if is_mapping:
        ids, where, filled = ({"a": x[:, 0], "b": x[:, 1]} for x in (ids, where, filled))
    tables = [mpembed.TableSpec("a"), mpembed.TableSpec("b")]
    spec = mpembed.EmbeddingSpec(tables, 4, vocabulary=mpembed.VocabularySpec(num_rows=8))
    want = spec.raw_ids(ids, filled)
    for each in (ids, jax.tree.map(jnp.asarray, ids)):
        jax.tree.map(np.testing.assert_array_equal, spec.raw_ids(each, where), want)


@pytest.mark.parametrize("is_mapping", [False, True], ids=["columns", "mapping"])
def test_a_traced_mask_of_host_ids_is_a_mask(is_mapping):
    """Ids of the host are hashed there, also in a jitted function that computes the mask."""
    ids = np.array([["x", "y"], ["z", "x"], ["u", "v"]])
    where = np.array([[True, False], [False, True], [True, True]])
    if is_mapping:
        ids, where = ({"a": part[:, 0], "b": part[:, 1]} for part in (ids, where))
    tables = [mpembed.TableSpec("a"), mpembed.TableSpec("b")]
    spec = mpembed.EmbeddingSpec(tables, 4, vocabulary=mpembed.VocabularySpec(num_rows=8))
    want = spec.raw_ids(ids, where)
    got = jax.jit(lambda where: spec.raw_ids(ids, where))(where)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    masks = jax.tree.map(jnp.asarray, where)
    jax.tree.map(np.testing.assert_array_equal, spec.raw_ids(ids, masks), want)


def test_shapes_are_kept():
    assert hashes.of_column(np.zeros((2, 0, 3), np.int64), "t", 0).shape == (2, 0, 3, 2)
    assert hashes.of_column([], "t", 0).shape == (0, 2)
    got = hashes.of_column(np.asarray([["a", "bc"]]), "t", 0)
    np.testing.assert_array_equal(got[0], expected(["a", "bc"], "t", 0))
