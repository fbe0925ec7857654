"""A ServingTable reads what training reads: rows, bags and the best rows, on host and device."""

import pickle
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from cases import Refused, named
from test_saving import SIZES, trained

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, serving
from mpembed_jax.numerics.packing import encode
from mpembed_jax.serving import compiled, host_rows, top_k

read = jax.jit(mpembed.read)
HOSTS = ("numba", "numpy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The states of two stacks, and their file."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    wide = trained(shapes.stack(SIZES, 33, storage="int4", lines=64))
    items = mpembed.EmbeddingSpec(
        mpembed.TableSpec("items", 5000), 16, "int8", features={"liked": "items", "seen": "items"}
    )
    states = {"wide": wide, "items": trained(items)}
    serving.save(path, states)
    return states, path


def ids_of(num_rows, shape, dtype, seed=0):
    """Ids among which some are padding and some outside, and how many are outside."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_rows, shape).astype(dtype)
    kind = rng.random(shape)
    ids[kind < 0.1] = NO_ID
    ids[kind > 0.9] = rng.choice([-1, num_rows, NO_ID - 1, -(2**31)], shape)[kind > 0.9]
    if dtype == np.int64:
        ids.flat[0] = 2**32 + 3
        ids.flat[1] = -(2**63)
    return ids, int(((ids != NO_ID) & ((ids < 0) | (ids >= num_rows))).sum())


def reference(state, table, ids):
    """float32 [.., D]: what training reads; zeros for ids outside."""
    first, size = state.spec.table_range(table)
    inside = (ids >= 0) & (ids < size)
    asked = np.where(inside, ids + first, NO_ID).astype(np.int32)
    rows = np.array(read(jax.jit(mpembed.freeze)(state), asked))
    # A line in the cache is more exact than its row in the table; all other rows are the same.
    is_cached = np.isin(asked, np.asarray(state.cache.tags))
    assert rows[~is_cached].tobytes() == np.asarray(read(state, asked))[~is_cached].tobytes()
    return rows


@pytest.mark.slow
@pytest.mark.optimized("serving reads the bits of users' programs")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_lookups_are_those_of_read_bit_for_bit_and_ids_outside_are_counted_zeros(
    model, host, dtype
):
    states, path = model
    table = serving.load(path, implementation=host, threads=3)
    features = {"table0": ("wide", "table0"), "table2": ("wide", "table2")}
    features |= {"liked": ("items", "items"), "seen": ("items", "items")}
    ids, counts, expected = {}, 0, {}
    for seed, (feature, (stack, name)) in enumerate(features.items()):
        size = states[stack].spec.table_range(name)[1]
        ids[feature], count = ids_of(size, (5, 1700), dtype, seed)
        counts += count
        expected[feature] = reference(states[stack], name, ids[feature])
    rows = table.lookup(ids)
    assert list(rows) == list(ids)
    for feature in ids:
        assert rows[feature].tobytes() == expected[feature].tobytes()
        assert not rows[feature][ids[feature] < 0].any()
    assert table.num_out_of_range == counts > 0
    masked = {f: np.ma.array(array, mask=array % 3 == 0) for f, array in ids.items()}
    for feature, vectors in table.lookup(masked).items():
        is_out = masked[feature].mask[..., None]
        np.testing.assert_array_equal(vectors, np.where(is_out, 0, expected[feature]))
    assert table.lookup({"liked": 7}).items() and table.lookup({"liked": []})["liked"].shape == (
        0,
        16,
    )


class Foreign:
    """Numbers of another library, whose dtype is not NumPy's."""

    dtype = "foreign.float32"

    def __init__(self, values):
        self.values = np.asarray(values, np.float32)

    def __array__(self, dtype=None, copy=None):
        return self.values


def test_weights_and_queries_of_other_libraries_are_taken(model):
    table = serving.load(model[1])
    ids = {"liked": [[1, 2], [3, 1]]}
    bags = [table.bag(ids, weights={"liked": of([[1, 2], [3, 4]])}) for of in (np.array, Foreign)]
    np.testing.assert_array_equal(bags[0]["liked"], bags[1]["liked"])
    found = [table.top_k(of(np.ones(16)), 3, "items") for of in (np.array, Foreign)]
    jax.tree.map(np.testing.assert_array_equal, *found)


CODECS = {
    name: mpembed.RowFormat(
        codec.name,
        symmetric=codec.symmetric if codec.is_int else None,
        scale_dtype=codec.scale if codec.metadata_bytes else None,
    )
    for name, codec in shapes.CODECS.items()
}


# Every codec once, and every format of rows at every dim: machine code is made for each case.
DECODED = {
    f"{name}-{dim}": (fmt, dim)
    for number, (name, fmt) in enumerate(CODECS.items())
    for dim in ((1, 33, 200) if fmt.scale_dtype is None else ((1, 33, 200)[number % 3],))
}


@pytest.mark.parametrize(
    "case",
    named(
        DECODED,
        fast={
            "int8-symmetric-float16-33",
            "int4-asymmetric-float16-33",
            "int2-asymmetric-float16-33",
        },
        # Every format, every kind of scale and every dim.
        core={
            "float8_e4m3fn-bfloat16-1",
            "float8_e5m2-float32-200",
            "float32-1",
            "bfloat16-33",
            "float16-200",
        },
    ),
)
def test_every_format_is_decoded_to_the_bits_of_the_package(case):
    fmt, dim = case
    fmt = fmt.resolve(dim)
    rows = shapes.rows(1, 300, dim)
    packed = np.asarray(jax.jit(encode, static_argnums=1)(rows, fmt))
    expected = np.asarray(jax.jit(mpembed.decode, static_argnums=(1, 2))(packed, fmt, dim))
    assert host_rows.decode(packed, fmt, dim).tobytes() == expected.tobytes()
    reader = compiled.Reader(packed, fmt, dim, 2)
    ids, num_outside = ids_of(300, 4000, np.int64)
    for found, count in (reader.take(ids), host_rows.take(packed, fmt, dim, ids)):
        assert count == num_outside
        inside = (ids >= 0) & (ids < 300)
        assert found[inside].tobytes() == expected[ids[inside]].tobytes()
        assert not found[~inside].any()
    query = np.random.default_rng(0).standard_normal(dim).astype(np.float32)
    scores = np.empty(250, np.float32)
    reader.score(10, 260, query, scores)
    terms = expected[10:260].astype(np.float64) * query
    assert (np.abs(scores - terms.sum(1)) <= dim * 2.0**-22 * np.abs(terms).sum(1)).all()


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["", "weighted"])
def test_bags_of_all_readers_agree_and_skip_padding_and_ids_outside(model, combiner, is_weighted):
    states, path = model
    ids, _ = ids_of(SIZES[0], (300, 21), np.int32)
    ids[3] = NO_ID
    num_outside = int(((ids != NO_ID) & ((ids < 0) | (ids >= SIZES[0]))).sum())
    weights = None
    if is_weighted:
        weights = np.random.default_rng(1).standard_normal(ids.shape).astype(np.float32)
        weights[7] = 0
    found = {}
    for host in HOSTS:
        table = serving.load(path, implementation=host, threads=2)
        given = None if weights is None else {"table0": weights}
        found[host] = table.bag({"table0": ids}, combiner, given)["table0"]
        assert table.num_out_of_range == num_outside
        ragged = table.bag(
            {"table0": ids.reshape(-1)},
            combiner,
            None if weights is None else {"table0": weights.reshape(-1)},
            {"table0": np.arange(0, ids.size + 1, 21)},
        )["table0"]
        assert ragged.tobytes() == found[host].tobytes()
    assert found["numba"].tobytes() == found["numpy"].tobytes()
    assert not found["numpy"][3].any()

    def bag(table, ids, weights):
        given = None if weights is None else {"table0": weights}
        return table.bag({"table0": ids}, combiner, given)["table0"]

    on_device = jax.jit(bag)(serving.load(path).to_device(), ids, weights)
    rows = reference(states["wide"], "table0", ids).astype(np.float64)
    inside = (ids >= 0) & (ids < SIZES[0])
    w = np.where(inside, 1.0 if weights is None else weights, 0).astype(np.float64)
    total = {"sum": np.ones(300), "mean": w.sum(1), "sqrtn": np.sqrt((w * w).sum(1))}[combiner]
    factor = np.where(total[:, None] != 0, w / np.where(total, total, 1)[:, None], 0)
    terms = factor[..., None] * rows
    # Each of 21 terms and sums is rounded, and the divisor, which may cancel.
    loss = np.abs(w).sum(1) / np.where(total, np.abs(total), 1)
    bound = 2.0**-24 * (50 + 25 * loss)[:, None] * np.abs(terms).sum(1)
    for vectors in (found["numpy"], np.asarray(on_device)):
        assert (np.abs(vectors - terms.sum(1)) <= bound).all()


def test_ragged_bags_of_any_length_agree(model):
    _, path = model
    ids, _ = ids_of(5000, 9000, np.int64)
    ends = np.sort(np.random.default_rng(0).integers(0, 9000, 60))
    offsets = np.r_[0, ends[:20], ends[20], ends[20], 7000, 9000]
    offsets = np.sort(offsets)
    bags = [
        serving.load(path, implementation=host, threads=2).bag(
            {"seen": ids}, "mean", offsets={"seen": offsets}
        )["seen"]
        for host in HOSTS
    ]
    assert bags[0].shape == (len(offsets) - 1, 16)
    assert bags[0].tobytes() == bags[1].tobytes()


@pytest.mark.parametrize("place", [*HOSTS, "device"])
def test_no_ids_give_no_rows_and_empty_bags_zeros(model, place):
    _, path = model
    if place == "device":
        table = serving.load(path).to_device()
    else:
        table = serving.load(path, implementation=place)
    for shape in ((0,), (4, 0), (0, 3)):
        ids = {"table0": np.zeros(shape, np.int32)}
        dim = table.lookup(ids)["table0"].shape[-1]
        assert table.lookup(ids)["table0"].shape == (*shape, dim)
        weights = {"table0": np.zeros(shape, np.float32)}
        for combiner, given in (("sum", None), ("mean", weights), ("sqrtn", None)):
            vectors = table.bag(ids, combiner, given)["table0"]
            np.testing.assert_array_equal(vectors, np.zeros((*shape[:-1], dim), np.float32))


def test_a_table_on_the_device_reads_the_same_rows_in_a_jitted_function(model):
    states, path = model
    table = serving.load(path).to_device()
    ids, num_outside = ids_of(5000, (40, 3), np.int32)
    count = jax.jit(lambda table, ids: table.count_outside({"liked": ids, "seen": ids}))
    assert int(count(table, ids)) == 2 * num_outside > 0
    assert serving.load(path).count_outside({"liked": ids, "seen": ids}) == 2 * num_outside
    model_of = jax.jit(lambda table, ids: table.lookup({"liked": ids})["liked"])
    rows = np.asarray(model_of(table, ids))
    assert rows.tobytes() == reference(states["items"], "items", ids).tobytes()
    model_of(table, ids + 1)
    assert model_of._cache_size() == 1
    with pytest.raises(TypeError, match=r"pass table\.to_device"):
        jax.jit(lambda ids: serving.load(path).lookup({"liked": ids}))(ids)


def test_a_table_on_the_device_takes_lists_as_one_on_the_host_does(model):
    host = serving.load(model[1])
    device = host.to_device()
    for ids in ([7, 8], [7], [[1, 2], [3, 4]], [[5], [NO_ID]], [], [[], []], (3, 9), 4, [-1, 5000]):
        vectors = np.asarray(device.lookup({"liked": ids})["liked"])
        wanted = host.lookup({"liked": ids})["liked"]
        assert (vectors.shape, vectors.tobytes()) == (wanted.shape, wanted.tobytes())
        assert device.count_outside({"liked": ids}) == host.count_outside({"liked": ids})
        if np.ndim(ids):
            vectors = np.asarray(device.bag({"liked": ids})["liked"])
            wanted = host.bag({"liked": ids})["liked"]
            assert vectors.shape == wanted.shape
            np.testing.assert_allclose(vectors, wanted, rtol=1e-6, atol=1e-6)
    masked = np.ma.array([3, 4], mask=[True, False])
    assert not np.asarray(device.lookup({"liked": masked})["liked"])[0].any()


class Search(NamedTuple):
    """Queries and a number of rows."""

    num_queries: int
    k: int


@pytest.mark.parametrize(
    "search", named([Search(1, 10), Search(3, 700), Search(40, 100), Search(2, 5000)])
)
def test_the_best_rows_are_those_of_a_brute_force(model, search):
    states, path = model
    rows = reference(states["items"], "items", np.arange(5000))
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((search.num_queries, 16)).astype(np.float32)
    exact = queries.astype(np.float64) @ rows.T.astype(np.float64)
    rounded = 16 * 2.0**-23 * (np.abs(queries) @ np.abs(rows).T).max()
    host = [serving.load(path, implementation=h, threads=3) for h in HOSTS]
    best_of = jax.jit(lambda table, q: table.top_k(q, search.k, "items"))
    results = [t.top_k(queries, search.k, "items") for t in host]
    results.append(best_of(host[0].to_device(), queries))
    for scores, ids in map(lambda pair: (np.asarray(pair[0]), np.asarray(pair[1])), results):
        assert scores.shape == ids.shape == search
        assert (np.diff(scores) <= 0).all()
        assert all(len(set(row)) == search.k for row in ids.tolist())
        own = np.take_along_axis(exact, ids, 1)
        assert (np.abs(own - scores) <= rounded).all()
        least = np.sort(exact, axis=1)[:, -search.k]
        assert (own >= least[:, None] - 2 * rounded).all()
    one = host[0].top_k(queries[0], search.k, "items")
    assert one[0].shape == one[1].shape == (search.k,)


@pytest.mark.parametrize("queries", named([(0, 1, 2, 3, 4), (0, 3), (2,)]))
def test_of_equal_rows_the_lowest_ids_win_and_rows_without_a_score_are_last(queries):
    rng = np.random.default_rng(0)
    kinds = np.array([[4], [4], [400], [4000], [4]])  # few distinct scores, or many
    scores = rng.integers(0, kinds, (5, 3000)).astype(np.float32)
    scores[:, ::7] = np.nan
    scores[4, 3:] = np.nan
    scores = scores[list(queries)]
    best = top_k.Best(len(queries), 50)
    for first in range(0, 3000, 256):
        best.add(scores[:, first : first + 256], np.arange(first, min(first + 256, 3000)))
    found, ids = best.result()
    for row, own, own_ids in zip(scores, found, ids, strict=True):
        order = np.lexsort((np.arange(3000), np.where(np.isnan(row), np.inf, -row)))[:50]
        order = order[~np.isnan(row[order])]
        assert own_ids[: len(order)].tolist() == order.tolist()
        assert (own_ids[len(order) :] == NO_ID).all() and np.isneginf(own[len(order) :]).all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", named([128, 256], fast={"128"}, core=()))
def test_a_sign_sketch_finds_the_best_rows_of_skewed_norms(bits, tmp_path):
    """Rows of low rank with norms of many sizes, as training makes them; recall@100 of 1,000."""
    rng = np.random.default_rng(0)
    tastes = rng.standard_normal((8, 32)) / 8**0.5
    rows = rng.standard_normal((20_000, 8)) @ tastes + 0.1 * rng.standard_normal((20_000, 32))
    rows *= rng.gamma(2.0, 0.5, (20_000, 1))
    spec = shapes.stack(20_000, 32, storage="int8")
    state = mpembed.from_dense(
        jax.random.key(0), spec, mpembed.optim.rowwise_adagrad(0.1), {"table0": rows}
    )
    serving.save(tmp_path / "a", state)
    queries = (rng.standard_normal((60, 8)) @ tastes).astype(np.float32)
    found = []
    for host in HOSTS:
        table = serving.load(tmp_path / "a", implementation=host)
        made = serving.sketch(table, bits=bits)
        assert made.nbytes == 20_000 * (bits // 8 + 4)
        exact = table.top_k(queries, 100)
        scores, ids = table.top_k(queries, 100, sketch=made)
        found.append((scores, ids))
        hits = [np.isin(own, best).mean() for own, best in zip(ids, exact[1], strict=True)]
        assert np.mean(hits) >= 0.95
        # What it finds has the exact scores, in their order.
        rows_of = table.lookup(ids)
        own = np.einsum("qkd,qd->qk", rows_of, queries)
        np.testing.assert_allclose(scores, own, rtol=1e-4, atol=1e-4)
        everything = table.top_k(queries, 100, sketch=made, oversample=200)
        np.testing.assert_array_equal(everything[1], exact[1])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    with pytest.raises(ValueError, match="multiple of 64"):
        serving.sketch(table, bits=100)


@pytest.mark.parametrize("host", HOSTS)
def test_a_sketch_is_pickled_and_serves_the_file_that_it_was_made_for(host, tmp_path):
    spec, tx = shapes.stack((70, 70), 16, storage="int8"), mpembed.optim.sgd(0.1)
    wider = shapes.stack(70, 33, storage="int8")
    for name, own in (("0", spec), ("1", spec), ("2", wider)):
        serving.save(tmp_path / name, mpembed.init(jax.random.key(int(name)), own, tx))
    tables = [serving.load(tmp_path / name, implementation=host) for name in "012"]
    made = serving.sketch(tables[0], "table0", bits=np.int8(64))
    queries = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    # 10 * 13 candidates are more than an int8 holds.
    options = {"oversample": np.int8(10)}
    wanted = tables[0].top_k(queries, 13, "table0", sketch=made, **options)
    exact = tables[0].top_k(queries, 13, "table0")
    jax.tree.map(np.testing.assert_array_equal, wanted[1], exact[1])
    again = pickle.loads(pickle.dumps(made))
    found = tables[0].top_k(queries, 13, "table0", sketch=again, **options)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for sketch in (made, again):
        with pytest.raises(ValueError, match=r"'table0' was made for another file; .*'table0'\)$"):
            tables[1].top_k(queries, 3, "table0", sketch=sketch)
        with pytest.raises(ValueError, match="was made for another file"):
            tables[2].top_k(np.ones(33), 3, "table0", sketch=sketch)
        with pytest.raises(
            ValueError, match=r"'table0' of 70 rows of dim 16, not of 'table1' of 70"
        ):
            tables[0].top_k(queries, 3, "table1", sketch=sketch)
        with pytest.raises(
            ValueError, match=r"rows of dim 16, not of 'table0' of 70 rows of dim 33"
        ):
            sketch.candidates(tables[2].table("table0"), np.ones((1, 33), np.float32), 3)


def test_many_threads_read_one_table_and_a_process_that_gets_it_maps_it_again(model):
    states, path = model
    table = serving.load(path, threads=3)
    ids, num_outside = ids_of(5000, 30_000, np.int32)
    expected = reference(states["items"], "items", ids).tobytes()
    results = []

    def work():
        results.append(table.lookup({"liked": ids})["liked"].tobytes() == expected)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert table.num_out_of_range == 8 * num_outside
    again = pickle.loads(pickle.dumps(table))
    assert again.lookup({"liked": ids})["liked"].tobytes() == expected
    assert again.num_out_of_range == num_outside
    assert len(pickle.dumps(table)) < 2000
    with pytest.raises(ValueError, match="read-only"):
        table.rows["items"][0, 0] = 1


def test_a_pickled_table_does_not_become_that_of_another_file(tmp_path):
    spec, tx = shapes.stack(70, 16, storage="int8"), mpembed.optim.sgd(0.1)
    for seed in range(2):
        serving.save(tmp_path / f"{seed}", mpembed.init(jax.random.key(seed), spec, tx))
    data = pickle.dumps(serving.load(tmp_path / "0"))
    assert pickle.loads(data).lookup([1]).shape == (1, 16)
    (tmp_path / "1").replace(tmp_path / "0")
    with pytest.raises(serving.ServingError, match="0 is another file than the one whose table"):
        pickle.loads(data)


@pytest.mark.slow
def test_loading_takes_milliseconds_whatever_the_size(tmp_path):
    """The file is sparse: 8 GB of zeros, of which nothing is read."""
    code = """
import sys, time, resource
from mpembed_jax import serving
serving.load(sys.argv[1])
begin = time.perf_counter()
table = serving.load(sys.argv[1])
print(time.perf_counter() - begin, table.nbytes)
"""
    from mpembed_jax.serving.container import Contents, Errors, Table, header_room, padded_header

    fmt = mpembed.RowFormat("int8").resolve(64)
    contents = Contents((Table("a", "", 120_000_000, 64, fmt, Errors(0.0, 0.0, 0)),), (("a", "a"),))
    room = header_room(contents)
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.write(padded_header(contents, room))
        file.truncate(room + max(e["data_offsets"][1] for e in contents.tensors().values()))
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    seconds, nbytes = done.stdout.split()
    assert int(nbytes) == 120_000_000 * 68
    assert float(seconds) < 0.1


# --- what is refused


@pytest.mark.parametrize(
    "mistake",
    named([
        Refused(lambda t: t.lookup({"liked": [1.5]}), "ids must be integers", TypeError),
        Refused(lambda t: t.lookup({"hated": [1]}), r"unknown features \['hated'\]", KeyError),
        Refused(lambda t: t.lookup(np.ones(3, int)), "ids must be a mapping"),
        Refused(lambda t: t.lookup({"liked": [1, 5000, -1]}), r"id 5000 at position 1 .* \(2 such"),
        Refused(
            lambda t: t.lookup({"liked": np.array([[1, 2**64 - 2]], np.uint64)}),
            "id 18446744073709551614 at position 1 is outside",
        ),
        Refused(lambda t: t.bag({"liked": [1]}, "max"), "combiner must be"),
        Refused(lambda t: t.bag({"liked": 1}), "a bag is the last axis"),
        Refused(lambda t: t.bag({"liked": [1]}, "sum", {"liked": [1.0, 2.0]}), "weights must have"),
        Refused(lambda t: t.bag({"liked": [1]}, "sum", {"seen": [1.0]}), "weights must be a"),
        Refused(lambda t: t.bag({"liked": [1]}, "sum", np.zeros(1)), "weights must be a mapping"),
        Refused(lambda t: t.bag({"liked": [1, 2]}, "sum", np.ones(2)), "weights must be a mapping"),
        Refused(
            lambda t: t.bag({"liked": [1, 2]}, offsets=np.array([0, 2])), "offsets must be a map"
        ),
        Refused(lambda t: t.bag({"liked": []}, offsets=np.zeros(1)), "offsets must be a mapping"),
        Refused(
            lambda t: t.bag({"liked": [1]}, "sum", {"liked": np.ma.array([1.0], mask=[True])}),
            "'liked': weights: got a masked array",
            TypeError,
        ),
        Refused(lambda t: t.bag({"liked": [1]}, offsets={"liked": [0, 2]}), "never falls"),
        Refused(lambda t: t.bag({"liked": [1]}, offsets={"liked": [0, -1, 1]}), "offsets must"),
        Refused(
            lambda t: t.bag({"liked": [1, 2]}, offsets={"liked": [0, 1.5, 2]}),
            "offsets must be integers, got float64",
            TypeError,
        ),
        Refused(
            lambda t: t.top_k(np.ones(16), 2.5, "items"), "k must be an integer, got 2.5", TypeError
        ),
        Refused(lambda t: t.top_k(np.ones(16), 3), "unknown table None", KeyError),
        Refused(lambda t: t.top_k(np.ones(16), 3, ["items"]), "the name of a table", TypeError),
        Refused(
            lambda t: t.top_k(np.full(16, "a"), 3, "items"),
            "query must be float32, got <U1",
            TypeError,
        ),
        Refused(
            lambda t: t.top_k(np.ma.ones(16), 3, "items"), "query: got a masked array", TypeError
        ),
        Refused(
            lambda t: t.top_k(np.ones(16), 3, "items", sketch="x"),
            "sketch must be a SignSketch .*, got str",
            TypeError,
        ),
        Refused(
            lambda t: t.top_k(
                np.ones(16), 3, "items", sketch=serving.sketch(t, "items", bits=64), oversample="x"
            ),
            "oversample must be an integer, got 'x'",
            TypeError,
        ),
        Refused(
            lambda t: t.bag({"liked": [1]}, "sum", {"liked": ["a"]}),
            "'liked': weights must be float32, got <U1",
            TypeError,
        ),
        Refused(
            lambda t: t.bag({"liked": [1]}, offsets={"liked": np.ma.array([0, 1])}),
            "'liked': offsets: got a masked array",
            TypeError,
        ),
        Refused(
            lambda t: serving.sketch(t, "items", bits="x"), "bits must be an integer", TypeError
        ),
        Refused(
            lambda t: serving.sketch(t, "items", seed=None), "seed must be an integer", TypeError
        ),
        Refused(lambda t: serving.sketch(t.to_device(), "items"), "is on the device", TypeError),
        Refused(
            lambda t: t.to_device().lookup({"liked": [1, 2**31]}),
            "'liked': a table on the device takes ids that fit int32, got 2147483648",
        ),
        Refused(
            lambda t: t.to_device().lookup({"liked": np.array([1, 2**32 + 1])}),
            "fit int32, got 4294967297",
        ),
        Refused(
            lambda t: t.to_device().lookup({"liked": [1.5]}),
            "'liked': ids must be integers, got float64; cast them first",
            TypeError,
        ),
        Refused(
            lambda t: t.to_device().bag({"liked": jnp.ones((1, 2))}),
            "'liked': ids must be integers that int32 holds, got float32; cast them$",
            TypeError,
        ),
        Refused(
            lambda t: serving.write_npy(t.to_device(), "x"), "returned, on the host", TypeError
        ),
        Refused(
            lambda t: serving.export_program(5, t), "function must be callable, got 5", TypeError
        ),
        Refused(
            lambda t: jax.tree.map(lambda rows: rows, t).lookup({"liked": [1]}),
            "lost its settings",
            TypeError,
        ),
        Refused(lambda t: t.top_k(np.ones(16), 5001, "items"), r"k must be in \[1, 5000\]"),
        Refused(lambda t: t.top_k(np.ones(15), 3, "items"), r"query must be float32 \[\.\., 16\]"),
    ]),
)  # fmt: skip
def test_what_is_wrong_is_said(mistake, model):
    table = serving.load(model[1], out_of_range="raise")
    with pytest.raises(mistake.error, match=mistake.message):
        mistake.call(table)


@pytest.mark.parametrize(
    "mistake",
    named([
        Refused(lambda p: serving.load(p, out_of_range="clip"), "out_of_range must be"),
        Refused(lambda p: serving.load(p, implementation="xla"), "implementation must be"),
        Refused(lambda p: serving.load(p, threads=0), "threads must be at least 1"),
    ]),
)  # fmt: skip
def test_settings_that_do_not_exist_are_refused(mistake, model):
    with pytest.raises(mistake.error, match=mistake.message):
        mistake.call(model[1])


@pytest.mark.slow
def test_reading_needs_no_step_and_no_device(model):
    """Looking rows up on the host starts no back end of jax."""
    code = """
import sys, jax
from mpembed_jax import serving
table = serving.load(sys.argv[1])
rows = table.lookup({"liked": [1, 2]})["liked"]
table.bag({"liked": [[1, 2]]}, "mean")
table.top_k(rows[0], 5, "items")
assert not jax._src.xla_bridge._backends
"""
    done: Any = subprocess.run(
        [sys.executable, "-c", code, str(model[1])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_file_with_one_feature_takes_plain_arrays(tmp_path):
    state = trained(shapes.stack(70, 16, storage="int8", lines=16))
    serving.save(tmp_path / "a", state)
    table = serving.load(tmp_path / "a")
    assert table.lookup([[1, 2], [3, 4]]).shape == (2, 2, 16)
    assert table.bag([[1, 2, 3]], "sum").shape == (1, 16)
    scores, ids = table.top_k(np.ones(16, np.float32), 3)
    assert scores.shape == ids.shape == (3,)
    assert jnp.asarray(ids).dtype == jnp.int32


QUICK = {
    "one id": (np.asarray([3]), None),
    "int32": (np.asarray([[1, 2], [3, NO_ID]], np.int32), "mean"),
    "three axes": (np.arange(24).reshape(2, 3, 4) % 10, "sqrtn"),
    "read-only": (np.broadcast_to(np.arange(4)[None, :1], (1, 1)), "sum"),
    "not contiguous": (np.arange(20).reshape(4, 5).T % 10, "sum"),
    "other order of bytes": (np.arange(8).astype(">i8").reshape(2, 4), "sum"),
    "int16": (np.arange(8, dtype=np.int16).reshape(2, 4), "mean"),
    "empty bags": (np.zeros((3, 0), np.int64), "sum"),
    "no bags": (np.zeros((0, 4), np.int64), "mean"),
    "outside": (np.asarray([[0, -1, 10, 5]]), "sum"),
    "many": (np.arange(160_000).reshape(-1, 8) % 10, "mean"),
}


@pytest.mark.parametrize("case", named(QUICK))
def test_plain_arrays_are_read_as_mappings_are(case, tmp_path):
    """A plain array of a file with a single table has a shorter way."""
    ids, combiner = case
    spec = mpembed.EmbeddingSpec([mpembed.TableSpec("t", 10)], 7, "int8")
    state = mpembed.init(jax.random.key(0), spec, mpembed.optim.sgd(0.1))
    serving.save(tmp_path / "file", state)
    plain, mapped = (serving.load(tmp_path / "file") for _ in range(2))
    found, want = plain.lookup(ids), mapped.lookup({"t": ids})["t"]
    assert (found.shape, found.tobytes()) == (want.shape, want.tobytes())
    if combiner is not None:
        found, want = plain.bag(ids, combiner), mapped.bag({"t": ids}, combiner)["t"]
        assert (found.shape, found.tobytes()) == (want.shape, want.tobytes())
    assert plain.num_out_of_range == mapped.num_out_of_range
    assert plain._only_reader is not None
    strict = serving.load(tmp_path / "file", out_of_range="raise")
    if mapped.num_out_of_range:
        with pytest.raises(ValueError, match="id -1 at position 1 is outside table 't' of 10 rows"):
            strict.lookup(ids)
