"""Specs refuse what they cannot mean, compare by value, and map ids.

No id ever names a row of the next table.
"""

import collections
import types

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Refused, named
from hypothesis import given
from hypothesis import strategies as st

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, EmbeddingSpec, RowFormat, TableSpec, nn, row_ids
from mpembed_jax.nn import routing

USERS, ITEMS, TAGS = TableSpec("users", 100), TableSpec("items", 3), TableSpec("tags", 40)
SIZES = {"users": (0, 100), "items": (100, 3), "tags": (103, 40)}
TOTAL = 143
KEY = jax.random.key(0)


def stack(**options):
    return EmbeddingSpec((USERS, ITEMS, TAGS), 8, **options)


# --- what a spec refuses


@pytest.mark.parametrize(
    "case",
    named(
        [
            Refused(
                lambda: TableSpec("t", 0),
                r"'t': vocabulary_size must be an integer in \[1, 2\*\*31 - 2\]",
            ),
            Refused(lambda: TableSpec("t", 2**31 - 1), "vocabulary_size"),
            Refused(lambda: TableSpec("t", 2.5), "vocabulary_size"),
            Refused(lambda: TableSpec("t", True), "vocabulary_size"),
            Refused(lambda: CacheSpec(fraction=0.0), "cache=None for no cache"),
            Refused(lambda: CacheSpec(fraction=1.5), r"fraction must be in \(0, 1\]"),
            Refused(lambda: CacheSpec(num_rows=0), "cache=None for no cache"),
            Refused(lambda: CacheSpec(ways=0), r"ways must be in \[1, 64\]"),
            Refused(lambda: CacheSpec(ways=65), r"ways must be in \[1, 64\]"),
            Refused(lambda: CacheSpec(ways=8.5), "ways must be"),
            Refused(lambda: CacheSpec(num_rows=2.5), "num_rows must be"),
            Refused(lambda: stack(max_unique_ids=2.5), "max_unique_ids must be"),
            Refused(lambda: CacheSpec(policy="fifo"), '"lru" or "lfu"'),
            Refused(lambda: RowFormat("int7"), "unknown row format .int7.; choose one of"),
            Refused(lambda: RowFormat("int8", rounding="up"), '"stochastic" or "nearest"'),
            Refused(lambda: RowFormat("bfloat16", symmetric=True), "int8, int4 and int2 only"),
            Refused(lambda: RowFormat("int8", scale_dtype="float64"), "scale_dtype must be one of"),
            Refused(lambda: RowFormat("float16", scale_dtype="float32"), "leave scale_dtype out"),
            Refused(lambda: EmbeddingSpec((), 8), "non-empty sequence of TableSpec", TypeError),
            Refused(
                lambda: EmbeddingSpec(("users",), 8), "non-empty sequence of TableSpec", TypeError
            ),
            Refused(
                lambda: EmbeddingSpec((USERS, TableSpec("users", 7)), 8), "names must be distinct"
            ),
            Refused(
                lambda: mpembed.init(
                    KEY,
                    EmbeddingSpec((TableSpec("a", 2**30), TableSpec("b", 2**30)), 8),
                    optax.sgd(0.1),
                ),
                "one device holds at most .* over a mesh, or make two stacks",
            ),
            Refused(
                lambda: EmbeddingSpec(USERS, 0), "embedding_dim must be an integer of at least 1"
            ),
            Refused(lambda: EmbeddingSpec(USERS, 8.0), "embedding_dim"),
            Refused(lambda: stack(storage="fp8"), "unknown row format 'fp8'; choose one of"),
            Refused(lambda: stack(storage=8), 'a RowFormat or a name such as "int8"', TypeError),
            Refused(lambda: stack(cache=0.05), "cache must be a CacheSpec or None", TypeError),
            Refused(
                lambda: stack(max_unique_ids=0), "max_unique_ids must be an integer of at least 1"
            ),
            Refused(lambda: stack(out_of_range="wrap"), '"drop", "clip" or "raise"'),
            Refused(lambda: stack(row_state_dtype="float16"), '"float32" or "bfloat16"'),
            Refused(lambda: stack(features={"author": "person"}), "'author' -> 'person'"),
            Refused(lambda: stack(features={}), "features must map feature names to tables"),
            Refused(lambda: stack(features=(("author", "users"), ("author", "items"))), "distinct"),
            Refused(lambda: stack(ngrams=3), "ngrams must be an nn.NGramHash or None", TypeError),
            Refused(
                lambda: stack(ngrams=nn.NGramHash(9, (2,), 1, 30)),
                r"tables of this hash, \{'2-gram_0': 31\}, got \{'users': 100,",
            ),
        ]
    ),
)
def test_a_value_that_means_nothing_is_refused_with_its_fix(case):
    with pytest.raises(case.error, match=case.message):
        case.call()


def test_the_largest_stack_is_accepted():
    assert EmbeddingSpec(TableSpec("a", 2**31 - 2), 8).num_rows == 2**31 - 2


# --- equality


def test_specs_compare_and_hash_by_value_and_ignore_initializers():
    same = EmbeddingSpec(
        [TableSpec("users", np.int64(100), jax.nn.initializers.zeros), ITEMS, TAGS], np.int32(8)
    )
    assert same == stack()
    assert hash(same) == hash(stack())
    assert stack(features={"a": "users"}) == stack(features=(("a", "users"),))
    assert len({stack(), same, stack(storage=RowFormat("int8"))}) == 1
    others = [
        stack(storage="int4"),
        stack(storage=RowFormat("int8", rounding="nearest")),
        stack(cache=None),
        stack(cache=CacheSpec(policy="lru")),
        stack(max_unique_ids=10),
        stack(out_of_range="clip"),
        stack(features={"a": "users"}),
        stack(row_state_dtype="bfloat16"),
        stack(skip_nonfinite=True),
        nn.ngram_spec(nn.NGramHash(9, (2,), 1, 30), 8),
        nn.ngram_spec(nn.NGramHash(9, (2,), 1, 30, seed=1), 8),
        EmbeddingSpec((USERS, ITEMS, TAGS), 16),
        EmbeddingSpec((ITEMS, USERS, TAGS), 8),
    ]
    assert len({stack(), *others}) == 1 + len(others)


def test_an_equal_spec_built_anew_does_not_retrace():
    traces = []

    @jax.jit
    def num_rows(state):
        traces.append(state.spec)
        return state.table.rows[0]

    for _ in range(2):
        spec = EmbeddingSpec(
            (TableSpec("t", 5, lambda key, shape, dtype: jnp.zeros(shape, dtype)),), 2, cache=None
        )
        num_rows(mpembed.init(jax.random.key(0), spec, mpembed.optim.clip_by_row_norm(1.0)))
    assert len(traces) == 1


def test_defaults_are_filled_in_from_the_embedding_dim():
    """Symmetric codes where metadata decides the ratio: D < 32 and not int2."""
    assert stack().storage == RowFormat("int8", symmetric=True, scale_dtype="bfloat16")
    assert EmbeddingSpec(USERS, 32, storage="int4").storage == RowFormat(
        "int4", symmetric=False, scale_dtype="bfloat16"
    )
    assert stack(storage="int2").storage.symmetric is False
    assert EmbeddingSpec(USERS, 8).tables == (USERS,)
    assert stack().table_range("items") == SIZES["items"]
    assert stack().feature_tables == (("users", "users"), ("items", "items"), ("tags", "tags"))
    assert stack().num_rows == TOTAL


# --- ids


def expected_ids(ids, start, size, out_of_range):
    """One id at a time, in Python integers."""
    out = np.empty(np.shape(ids), np.int32)
    for place in np.ndindex(out.shape):
        i = int(np.asarray(ids)[place])
        if i == NO_ID:
            out[place] = NO_ID
        elif 0 <= i < size:
            out[place] = start + i
        else:
            out[place] = start + min(max(i, 0), size - 1) if out_of_range == "clip" else TOTAL
    return out


INTERESTING = [
    0,
    1,
    2,
    3,
    39,
    40,
    99,
    100,
    142,
    143,
    -1,
    -(2**31),
    NO_ID,
    NO_ID - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**32 + 5,
]
INTERESTING += [2**63 - 1, -(2**63), 2**63, 2**64 - 1]
DTYPES = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)


def fitting(dtype):
    """The interesting ids that a dtype holds."""
    info = np.iinfo(dtype)
    return np.array([i for i in INTERESTING if info.min <= i <= info.max], dtype)


@pytest.mark.parametrize("out_of_range", ["drop", "clip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_host_ids_of_every_integer_dtype_are_checked_in_64_bits(dtype, out_of_range):
    """2**32 + 5 is not row 5, -1 is not the last row, and the id after a table's last is not the
    next table's first.
    """
    ids = fitting(dtype)
    spec = stack(out_of_range=out_of_range)
    mapped = spec.global_ids({name: ids for name in SIZES})
    for name, (start, size) in SIZES.items():
        assert mapped[name].dtype == np.int32
        assert isinstance(mapped[name], np.ndarray)
        np.testing.assert_array_equal(mapped[name], expected_ids(ids, start, size, out_of_range))


@pytest.mark.parametrize("out_of_range", ["drop", "clip", "raise"])
@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ("device", np.int32),
        ("device", np.uint32),
        *(("traced", d) for d in (np.int32, np.int8, np.uint16, np.uint32)),
    ],
)
def test_device_and_traced_ids_are_mapped_as_host_ids_are(dtype, out_of_range, where):
    """ "raise" cannot raise on traced ids: it drops them, prefetch counts them and stats raises."""
    ids = fitting(dtype)
    spec = stack(out_of_range=out_of_range)
    if where == "device" and out_of_range == "raise":
        with pytest.raises(ValueError, match="outside its table of 3 rows"):
            spec.global_ids({"items": jnp.asarray(ids)})
        inside = spec.global_ids({"items": jnp.asarray([2, 0, NO_ID], jnp.int32)})["items"]
        np.testing.assert_array_equal(inside, [102, 100, NO_ID])
        return
    call = spec.global_ids if where == "device" else jax.jit(spec.global_ids)
    mapped = call({name: jnp.asarray(ids) for name in SIZES})
    for name, (start, size) in SIZES.items():
        assert mapped[name].dtype == jnp.int32
        np.testing.assert_array_equal(mapped[name], expected_ids(ids, start, size, out_of_range))


@pytest.mark.parametrize("where", ["device", "traced"])
def test_64_bit_device_ids_are_not_truncated_under_x64(where):
    """A user's own x64 mode makes int64 ids on the device: 2**32 + 5 must not become row 5."""
    with jax.enable_x64(True):
        for dtype in (jnp.int64, jnp.uint64):
            ids = jnp.asarray(fitting(np.dtype(dtype)))
            assert ids.dtype == dtype
            call = stack().global_ids if where == "device" else jax.jit(stack().global_ids)
            mapped = call({"users": ids})["users"]
            assert mapped.dtype == jnp.int32
            np.testing.assert_array_equal(mapped, expected_ids(ids, *SIZES["users"], "drop"))


@given(
    ids=st.lists(
        st.tuples(*[st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 150) | st.just(NO_ID)] * 3),
        min_size=1,
        max_size=8,
    ),
    out_of_range=st.sampled_from(["drop", "clip"]),
)
def test_array_columns_follow_the_order_of_the_features(ids, out_of_range):
    """[.., T]: column t is checked against the table of feature t.

    A dict of the columns says the same.
    """
    features = {"likes": "items", "reads": "users", "buys": "items"}
    spec = stack(features=features, out_of_range=out_of_range)
    array = np.array(ids, np.int64)
    mapped = spec.global_ids(array)
    assert mapped.dtype == np.int32
    by_name = spec.global_ids({feature: array[:, t] for t, feature in enumerate(features)})
    for t, (feature, name) in enumerate(features.items()):
        np.testing.assert_array_equal(
            mapped[:, t], expected_ids(array[:, t], *SIZES[name], out_of_range)
        )
        np.testing.assert_array_equal(mapped[:, t], by_name[feature])
    np.testing.assert_array_equal(spec.global_ids(array[None]), mapped[None])
    np.testing.assert_array_equal(spec.global_ids(array.tolist()), mapped)


def test_features_may_share_a_table_and_any_subset_may_come():
    spec = stack(features={"seen": "items", "bought": "items", "who": "users"})
    mapped = spec.global_ids({"bought": np.array([[0, 2], [NO_ID, 1]]), "seen": [1, 1]})
    np.testing.assert_array_equal(mapped["bought"], [[100, 102], [NO_ID, 101]])
    np.testing.assert_array_equal(mapped["seen"], [101, 101])
    assert list(mapped) == ["bought", "seen"]
    assert spec.global_ids({}) == {}
    for many in ({"who": [5], "bought": [1]}, {}):
        for ids, wanted in (
            (collections.OrderedDict(many), collections.OrderedDict),
            (collections.defaultdict(list, many), collections.defaultdict),
            (flax.core.freeze(many), flax.core.FrozenDict),
            (collections.ChainMap(many), dict),
            (collections.UserDict(many), dict),
            (types.MappingProxyType(many), dict),
        ):
            mapped = spec.global_ids(ids)
            assert type(mapped) is wanted
            assert {f: np.asarray(i).tolist() for f, i in mapped.items()} == {
                f: [i + 100 * (f == "bought") for i in local] for f, local in many.items()
            }
            jax.tree.map(np.shape, mapped)  # prefetch takes it
    assert spec.global_ids({"who": 7})["who"] == 7


@pytest.mark.parametrize(
    "ids", [[], np.zeros((0, 3), np.int64), np.zeros((4, 0), np.int32), jnp.zeros(0, jnp.int32)]
)
def test_empty_ids_of_a_feature_just_work(ids):
    mapped = stack(out_of_range="raise").global_ids({"items": ids})["items"]
    assert mapped.dtype == np.int32
    assert mapped.shape == np.shape(ids)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint64])
def test_masked_ids_are_padding(dtype):
    """In a mapping, in columns, and as global ids that no spec has mapped."""
    ids = np.ma.array([[1, 2, 0], [3, 1, 1]], dtype, mask=[[0, 1, 0], [1, 0, 0]])
    spec = stack(out_of_range="raise")
    want = spec.global_ids(ids.astype(np.int64).filled(NO_ID))
    assert (want == NO_ID).sum() == 2
    np.testing.assert_array_equal(spec.global_ids(ids), want)
    (feature, _), *_ = spec.feature_tables
    np.testing.assert_array_equal(spec.global_ids({feature: ids[:, 0]})[feature], want[:, 0])
    np.testing.assert_array_equal(routing.route((spec,), ids)[0], want)
    (got,), _ = row_ids.checked(ids)
    np.testing.assert_array_equal(got, ids.astype(np.int64).filled(NO_ID))


def test_a_list_of_masked_arrays_is_refused():
    """NumPy drops their masks."""
    row = np.ma.array([1, 2, 0], mask=[0, 1, 0])
    for ids in ([row, row], [[row], [row]]):
        with pytest.raises(TypeError, match=r"list of masked arrays.*np\.ma\.stack"):
            stack().global_ids(ids)


def test_empty_arrays_of_columns_just_work():
    assert stack().global_ids(np.zeros((0, 3), np.int64)).shape == (0, 3)


@pytest.mark.parametrize(
    "ids",
    [
        np.ones(3),
        np.ones(3, np.float32),
        np.ones(3, bool),
        jnp.ones(3),
        jnp.ones(3, bool),
        1.0,
        ["a"],
        2**70,
    ],
)
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TypeError, match="ids must be integers, got"):
        stack().global_ids({"users": ids})


def test_raise_names_feature_id_place_table_size_and_ways_out():
    spec = stack(out_of_range="raise")
    with pytest.raises(
        ValueError, match=r"'items': id 3 at \[1, 0\] is outside its table of 3 rows \(2 such ids\)"
    ) as info:
        spec.global_ids({"users": np.array([99]), "items": np.array([[0, 1], [3, -1]])})
    assert 'out_of_range="drop" or "clip"' in str(info.value)
    with pytest.raises(
        ValueError,
        match=r"'tags': id 4294967301 at \[1, 2\] is outside its table of 40 rows \(1 such",
    ):
        spec.global_ids(np.array([[0, 0, 0], [1, 1, 2**32 + 5]]))
    np.testing.assert_array_equal(spec.global_ids(np.array([99, 2, NO_ID])), [99, 102, NO_ID])


def test_unknown_features_and_wrong_column_counts_are_refused():
    with pytest.raises(KeyError, match=r"unknown features .*author.*this spec has .*users"):
        stack().global_ids({"author": [1]})
    with pytest.raises(ValueError, match=r"array ids must be \[.., 3\].*for bags pass a dict"):
        stack().global_ids(np.zeros((5, 2), np.int32))
    with pytest.raises(ValueError, match=r"array ids must be \[.., 3\]"):
        stack().global_ids(np.int32(4))
