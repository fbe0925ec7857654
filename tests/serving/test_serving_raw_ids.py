"""A serving file maps raw ids to the rows of training: on host and device, from any state."""

import dataclasses
import json
import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from cases import Refused, changed_bytes, named
from jax.sharding import PartitionSpec
from test_saving import Lie, rewritten

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, checkpoint, serving, vocabularies
from mpembed_jax.embedding import admission
from mpembed_jax.serving import __main__, checkpoints, container

TX = mpembed.optim.rowwise_adagrad(0.5)
HOSTS = ("numba", "numpy")
RULES = mpembed.VocabularySpec(280, admit_after=2, ways=4, shared_rows=3, sketch_bytes=2)
SPEC = mpembed.EmbeddingSpec(
    (mpembed.TableSpec("user"), mpembed.TableSpec("item")),
    8,
    "int8",
    mpembed.CacheSpec(num_rows=128, ways=4),
    features={"user": "user", "seen": "item", "liked": "item"},
    vocabulary=RULES,
)
WIDE = dataclasses.replace(
    SPEC,
    tables=mpembed.TableSpec("word"),
    embedding_dim=33,
    storage="int4",
    cache=None,
    features=None,
    vocabulary=mpembed.VocabularySpec(97, admit_after=1, ways=7),
)


def raw_batch(seed):
    """Skewed ids of three features, some of which are padding."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.2, (3, 128)), 900).astype(np.int64) + 40 * seed
    return dict(zip(("user", "seen", "liked"), ids, strict=True))


def gradient(rows, plan):
    # Sums of eighths are exact in any order.
    return jax.grad(lambda rows: jnp.sum(mpembed.pool(rows, plan.inverse["user"])) / 8)(rows)


@partial(jax.jit, donate_argnums=0)
def step(state, pairs):
    return training.step(state, pairs, TX, gradient).state


def trained(num=6):
    """A state whose rows have owners, of which some were recycled and some are in dirty lines."""
    state = mpembed.init(jax.random.key(0), SPEC, TX)
    for seed in range(num):
        state = step(state, SPEC.raw_ids(raw_batch(seed)))
    return state


def trained_words():
    """A trained state of words."""
    state = mpembed.init(jax.random.key(1), WIDE, TX)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pairs = {"user": WIDE.raw_ids({"word": texts(rng.integers(0, 150, 64))})["word"]}
        state = step(state, pairs)
    return state


def texts(numbers):
    """Words of several lengths, with other letters than ASCII."""
    return np.array([f"w{n:0{n % 9}d}" + "ö" * (n % 3) for n in numbers], object)


@pytest.fixture(scope="module")
def states():
    return {"emb": trained(), "words": trained_words()}


@pytest.fixture(scope="module")
def path(states, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    serving.save(path, states)
    return path


def expected(state, pairs):
    """float32 [.., D]: what read returns after a flush from the table alone."""
    table = jax.jit(mpembed.flush)(state).table
    rows = jax.jit(admission.rows_of)(state, pairs)
    return rows, jax.jit(mpembed.read)(dataclasses.replace(table), rows)


def asked(seed=3):
    """Known and unknown ids, with padding."""
    rng = np.random.default_rng(seed)
    ids = np.ma.masked_array(rng.integers(0, 2000, (500, 3)), rng.random((500, 3)) < 0.1)
    return {"user": ids, "liked": ids[:, :1] * -7}


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_raw_ids_and_their_pairs_read_the_rows_of_training_bit_for_bit(states, path, host):
    state, table = states["emb"], serving.load(path, implementation=host, threads=2)
    assert np.asarray(state.cache.dirty).any() and int(mpembed.stats(state).vocabulary.recyclings)
    ids = asked()
    pairs = SPEC.raw_ids(ids)
    places, vectors = expected(state, pairs)
    for given in (ids, pairs, table.raw_ids(ids)):
        found, rows = table.lookup(given), table.rows_of(given)
        for feature, own in vectors.items():
            np.testing.assert_array_equal(rows[feature], places[feature])
            assert found[feature].tobytes() == np.asarray(own).tobytes()
    is_shared = places["user"] >= RULES.geometry.lines
    assert is_shared.any() and (~is_shared & (places["user"] != NO_ID)).any()
    assert (rows["user"][ids["user"].mask] == NO_ID).all()
    # What the cache does not hold is read from a line nowhere: these are the bits of read itself.
    is_cached = np.isin(places["user"], np.asarray(state.cache.tags))
    read = np.asarray(jax.jit(mpembed.read)(state, pairs)["user"])
    assert found["user"][~is_cached].tobytes() == read[~is_cached].tobytes()
    texts_ = texts(range(400))
    own = expected(states["words"], WIDE.raw_ids({"word": texts_}))[1]["word"]
    for given in (texts_, texts_.tolist(), texts_.astype(str)):
        assert table.lookup({"word": given})["word"].tobytes() == np.asarray(own).tobytes()
    assert table.num_out_of_range == table.count_outside(ids) == 0


@pytest.mark.parametrize("host", HOSTS)
def test_bags_of_raw_ids_are_those_of_their_rows(states, path, host):
    table = serving.load(path, implementation=host)
    ids = asked()
    rows = table.rows_of(ids)
    weights = {"user": np.random.default_rng(0).random((500, 3), np.float32)}
    bags = table.bag(ids, "mean", weights)
    dense = _as_dense(table)
    for feature, own in bags.items():
        given = weights.get(feature)
        assert own.tobytes() == dense.bag(rows[feature], "mean", given).tobytes()
    flat = {"user": ids["user"].reshape(-1)}
    ragged = table.bag(flat, "mean", None, {"user": np.arange(0, 1501, 3)})["user"]
    assert ragged.tobytes() == table.bag({"user": ids["user"]}, "mean")["user"].tobytes()


def _as_dense(table):
    """The pool "emb.pool" as a table of row numbers."""
    pool = table.table("emb.pool")._replace(pool=None)
    contents = container.Contents((pool,), (("pool", "emb.pool"),))
    return serving.ServingTable({"emb.pool": table.rows["emb.pool"]}, contents, table.host)


def test_a_jitted_function_maps_integers_and_pairs_to_the_same_rows(states, path):
    table = serving.load(path)
    device = table.to_device()
    assert sorted(device.rows) == ["emb.pool", "emb.pool.owners", "words.pool", "words.pool.owners"]
    ids = np.arange(-700, 700, dtype=np.int32).reshape(70, 20)
    rows_of = jax.jit(lambda table, ids: table.lookup({"user": ids})["user"])
    host = table.lookup({"user": ids})["user"]
    for given in (jnp.asarray(ids), jnp.asarray(table.raw_ids({"user": ids})["user"])):
        assert np.asarray(rows_of(device, given)).tobytes() == host.tobytes()
        # A table on the host reads arrays of a device, too.
        assert table.lookup({"user": given})["user"].tobytes() == host.tobytes()
    assert np.asarray(device.lookup({"word": ["w1", "x"]})["word"]).tobytes() == (
        table.lookup({"word": ["w1", "x"]})["word"].tobytes()
    )
    foreign = rows_of(device, jnp.asarray(table.raw_ids({"liked": ids})["liked"]))
    assert not np.asarray(foreign).any()
    bags = jax.jit(lambda table, ids: table.bag({"user": ids})["user"])(device, ids)
    np.testing.assert_allclose(np.asarray(bags), host.sum(1), rtol=1e-5, atol=1e-6)
    again = pickle.loads(pickle.dumps(table))
    assert again.lookup({"user": ids})["user"].tobytes() == host.tobytes()


def test_the_best_rows_of_a_pool_are_rows_of_the_ids_that_one_knows(states, path):
    items = np.arange(0, 900)
    for host in HOSTS:
        table = serving.load(path, implementation=host)
        rows = table.rows_of({"liked": items})["liked"]
        query = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
        scores, found = table.top_k(query, 5, "emb.pool", among=rows)
        known = np.unique(rows)
        own = query @ _as_dense(table).lookup(known).T
        order = np.argsort(-own, axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(found, known[order])
        np.testing.assert_allclose(scores, np.take_along_axis(own, order, 1), rtol=1e-5)
        everything = table.top_k(query, 3, "emb.pool")
        np.testing.assert_array_equal(everything[1], _as_dense(table).top_k(query, 3)[1])
        few = table.top_k(query, 5, "emb.pool", among=rows[:2])[1]
        assert (few[:, len(set(rows[:2])) :] == NO_ID).all()
        # Rows of masked ids and of None are padding.
        masked = np.ma.array(items, mask=items % 2 == 1)
        padded, plain = (table.rows_of({"liked": own})["liked"] for own in (masked, items[::2]))
        assert (padded == NO_ID).any()
        both = [table.top_k(query, 5, "emb.pool", among=own) for own in (padded, plain)]
        jax.tree.map(np.testing.assert_array_equal, *both)
        nothing = table.top_k(query, 2, "emb.pool", among=[NO_ID, NO_ID])
        assert np.isneginf(nothing[0]).all() and (nothing[1] == NO_ID).all()
    with pytest.raises(KeyError, match=r"name the pool 'emb\.pool'.*'user', 'item'"):
        table.top_k(query, 5, "item")
    with pytest.raises(ValueError, match=r"in \[0, 262\), got 3 to 262"):
        table.top_k(query, 5, "emb.pool", among=[3, 262])


# --- where a state comes from


def save_of(kind, state, folder):
    """The file of a state, of its checkpoint, or of a mesh."""
    path = folder / kind
    if "mesh" in kind:
        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        made = mpembed.init(jax.random.key(0), SPEC, TX, mesh=mesh)
        specs = mpembed.partition_specs(made)
        batch = PartitionSpec("x")
        shape = dict(mesh=mesh, in_specs=(specs, batch), out_specs=specs, check_vma=False)
        over = jax.jit(jax.shard_map(step.__wrapped__, **shape))
        for seed in range(6):
            made = over(made, SPEC.raw_ids(raw_batch(seed)))
        state = made
    if "checkpoint" in kind:
        checkpoint.save(folder / "steps", 2, {"emb": state})
        checkpoints.export(folder / "steps", path)
    else:
        serving.save(path, {"emb": state})
    return path


@pytest.mark.parametrize(
    "kind", named(["mesh", "checkpoint", "mesh checkpoint"], core={"mesh", "checkpoint"})
)
def test_a_mesh_and_a_checkpoint_have_the_owners_of_one_device(kind, states, tmp_path):
    one = serving.load(save_of("one", states["emb"], tmp_path))
    other = serving.load(save_of(kind, states["emb"], tmp_path))
    ids = asked()
    found = other.rows_of(ids)
    for feature, own in one.rows_of(ids).items():
        np.testing.assert_array_equal(found[feature], own)
    for name in ("emb.pool", "emb.pool.owners"):
        np.testing.assert_array_equal(one.rows[name], other.rows[name])
    assert serving.verify(tmp_path / kind).tables == one.contents.tables
    assert other.lookup(SPEC.raw_ids(ids))["user"].shape == (500, 3, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", named(["grow", "shrink", "add_tables"], fast={"grow", "add_tables"}, core=())
)
def test_a_pool_that_was_changed_is_served_with_its_new_sets(change, tmp_path):
    state = trained(3)
    match change:
        case "grow":
            state = vocabularies.grow(state, 700)
        case "shrink":
            state = vocabularies.shrink(state, 150)
        case _:
            city = mpembed.TableSpec("city")
            features = (*SPEC.features, ("city", "city"))
            state = vocabularies.add_tables(state, city, features=features)
    ids = asked()
    rows = jax.jit(admission.rows_of)(state, state.spec.raw_ids(ids))
    for kind in ("one", "checkpoint"):
        path = save_of(kind, state, tmp_path)
        for host in HOSTS:
            table = serving.load(path, implementation=host)
            own = table.rows_of({"user": ids["user"]})["user"]
            np.testing.assert_array_equal(own, rows["user"])
        on_device = jax.jit(lambda table, pairs: table.rows_of(pairs))(
            table.to_device(), table.raw_ids({"user": ids["user"]})
        )
        np.testing.assert_array_equal(on_device["user"], rows["user"])


@pytest.mark.slow
def test_another_format_and_the_command_line(states, path, tmp_path, capsys):
    serving.save(tmp_path / "a", states, storage="int2")
    table = serving.load(tmp_path / "a")
    ids = asked()
    np.testing.assert_array_equal(
        table.rows_of(ids)["user"], serving.load(path).rows_of(ids)["user"]
    )
    assert table.tables[0].format.name == "int2" and table.tables[0].errors.largest > 0
    assert __main__.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "emb.pool: rows of raw ids of user, item; 64 sets of 4 ways, 3 shared rows" in printed
    assert "1,024 bytes of owners" in printed
    assert __main__.main(["verify", str(path)]) == 0
    programs = serving.export_program(
        lambda table, pairs: table.lookup(pairs)["user"],
        table,
        {"user": jax.ShapeDtypeStruct((500, 3, 2), jnp.uint32)},
    )
    pairs = table.raw_ids({"user": ids["user"]})
    found = jax.export.deserialize(bytearray(programs)).call(
        {n: np.array(a) for n, a in table.rows.items()}, pairs
    )
    assert np.asarray(found).tobytes() == table.lookup(ids)["user"].tobytes()
    (emb, _) = serving.write_npy(table, tmp_path / "npy")
    np.testing.assert_array_equal(
        np.load(emb)[table.rows_of(pairs)["user"][0]], table.lookup(pairs)["user"][0]
    )


def owning(spec, ids, seed):
    """A state in which ids of the first table have rows of their own."""
    pairs = spec.raw_ids({spec.tables[0].name: ids})
    counts = jax.tree.map(lambda p: np.full(len(p), 9), pairs)
    return vocabularies.from_counts(mpembed.init(jax.random.key(seed), spec, TX), pairs, counts)


@pytest.mark.parametrize("kind", ["two stacks", "a name like a prefix"])
def test_a_prefix_in_the_file_changes_no_hash_of_raw_ids(kind, tmp_path):
    word = dataclasses.replace(SPEC, tables=mpembed.TableSpec("word"), features=None)
    other = dataclasses.replace(word, tables=(mpembed.TableSpec("a.word"), mpembed.TableSpec("x")))
    specs = {"a": word, "b": word} if kind == "two stacks" else {"a": other}
    ids = np.arange(300)
    states = {name: owning(spec, ids, seed) for seed, (name, spec) in enumerate(specs.items())}
    contents = serving.save(tmp_path / "a", states)
    assert contents == serving.verify(tmp_path / "a")
    assert contents.version == 5
    checkpoint.save(tmp_path / "steps", 1, states)
    checkpoints.export(tmp_path / "steps", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for stack, state in states.items():
        pairs = state.spec.raw_ids({state.spec.tables[0].name: ids})
        ((rows,), (vectors,)) = ([*map(np.asarray, d.values())] for d in expected(state, pairs))
        assert (rows < RULES.geometry.lines).any()
        feature = f"{stack}.word"
        for host in HOSTS:
            table = serving.load(tmp_path / "a", implementation=host)
            for given in (ids, *pairs.values(), table.raw_ids({feature: ids})[feature]):
                assert table.lookup({feature: given})[feature].tobytes() == vectors.tobytes()
            np.testing.assert_array_equal(table.rows_of({feature: ids})[feature], rows)
        on_device = table.to_device().lookup({feature: jnp.asarray(ids)})[feature]
        assert np.asarray(on_device).tobytes() == vectors.tobytes()


# --- what is refused


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    rules = mpembed.VocabularySpec(12, ways=4)
    spec = dataclasses.replace(SPEC, vocabulary=rules, features=None, cache=None)
    serving.save(path, mpembed.init(jax.random.key(0), spec, TX))
    return path


def test_every_changed_byte_and_every_other_length_is_found(small, tmp_path):
    whole = small.read_bytes()
    path = tmp_path / "changed"
    for _ in changed_bytes(small, path):
        with pytest.raises(serving.ServingError, match="changed"):  # the name of the file
            serving.verify(path)
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        with pytest.raises(serving.ServingError):
            container.open_file(path)


def of_pool(**fields):
    """A change of the pool's fields."""
    return lambda body: body["tables"][0]["vocabulary"].update(fields)


@pytest.mark.parametrize(
    "lie",
    named([
        Lie("future", "is of version 6, this library reads 5", lambda b: b.update(version=6)),
        Lie("past", "not what its description says", lambda b: b.update(version=1)),
        Lie("hash", "have the hash 'md5', which this library", of_pool(hash="md5")),
        Lie("sets", "'pool' of 14 rows has the sizes", of_pool(sets=2)),
        Lie("no ways", "'pool' of 14 rows has the sizes", of_pool(ways=0)),
        Lie("a float", "'pool' of 14 rows has the sizes", of_pool(ways=4.0)),
        Lie("groups", "'pool' of 14 rows has the sizes", of_pool(groups=2)),
        Lie("first sets", "'pool' of 14 rows has the sizes", of_pool(first_sets=4)),
        Lie("one table", "'pool' of 14 rows has the sizes", of_pool(tables=["user"])),
        Lie("other tables", "or its table 'item' is unknown", of_pool(tables=["user", "x"])),
        Lie("equal tables", "name of table 'user' is taken", of_pool(tables=["user", "user"])),
        Lie("its own", "name of table 'pool' is taken", of_pool(tables=["user", "pool"])),
        Lie("numbers", "is no text", of_pool(tables=["user", 3])),
        Lie("nothing", "damaged", lambda b: b["tables"][0]["vocabulary"].clear()),
        Lie("no pool", "or its table 'user' is unknown",
            lambda b: b["tables"][0].update(vocabulary=None)),
    ]),
)  # fmt: skip
def test_a_description_of_a_pool_that_is_wrong_is_refused(lie, small, tmp_path):
    with pytest.raises(serving.ServingError, match=lie.message):
        container.open_file(rewritten(small, tmp_path / "a", lie.change))


def asking(**ids):
    return lambda table: table.lookup(ids)


REFUSED = [
    Refused(
        lambda t: t.lookup({"liked": t.raw_ids({"user": [7]})["user"]}),
        r"pair at \[0\] is not of table 'item' \(1 such pairs\)",
    ),
    Refused(
        lambda t: t.to_device().lookup({"liked": jnp.asarray(t.raw_ids({"user": [7]})["user"])}),
        r"pair at \[0\] is not of table 'item' \(1 such pairs\)",
    ),
    Refused(
        asking(user=np.arange(3, dtype=np.uint32)),
        r"must be the pairs \[.., 2\] that raw_ids\(\) returns, got \[3\]",
        TypeError,
    ),
    Refused(asking(user=np.ones(3)), "integers, bytes or strings", TypeError),
    Refused(asking(city=["Ulm"]), "unknown features", KeyError),
    Refused(
        lambda t: t.to_device().lookup({"user": jnp.ones(3)}), "on a device must be int", TypeError
    ),
    Refused(
        lambda t: t.to_device().lookup({"user": jnp.ones(3, jnp.uint32)}),
        "uint32 ids must be the pairs",
        TypeError,
    ),
    Refused(
        lambda t: jax.jit(lambda ids: t.lookup({"user": ids}))(np.arange(3)),
        r"pass table\.to_device",
        TypeError,
    ),
    Refused(lambda t: serving.sketch(t, "item"), r"name the pool 'emb\.pool'", KeyError),
    Refused(
        lambda t: t.top_k(np.ones(8), 2, "emb.pool", among=[1], sketch=3),
        "either `among` or a sketch",
    ),
    Refused(lambda t: t.bag({"user": 7}), "a bag is the last axis"),
]


@pytest.mark.parametrize("refused", named(REFUSED))
def test_what_cannot_be_asked_is_refused(refused: Any, path):
    with pytest.raises(refused.error, match=refused.message):
        refused.call(serving.load(path))


def test_names_that_clash_and_raw_ids_of_tables_of_rows_are_refused(states, tmp_path):
    state = mpembed.init(
        jax.random.key(0), mpembed.EmbeddingSpec(mpembed.TableSpec("user", 9), 8), TX
    )
    spec = dataclasses.replace(WIDE, tables=mpembed.TableSpec("pool"))
    with pytest.raises(ValueError, match="name of table 'pool' is taken"):
        serving.save(tmp_path / "a", mpembed.init(jax.random.key(0), spec, TX))
    assert not list(tmp_path.iterdir())
    serving.save(tmp_path / "a", state)
    with pytest.raises(ValueError, match="the ids of table 'user' are row numbers"):
        serving.load(tmp_path / "a").raw_ids([1])
    assert json.loads(json.dumps(serving.load(tmp_path / "a").rows_of([1]))) == [1]
