"""A file of n-gram memories turns tokens into the vectors of the modules, without flax."""

import dataclasses
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Refused, changed_bytes, named
from flax import nnx
from test_saving import Lie, rewritten

import mpembed_jax as mpembed
from mpembed_jax import NO_ID, CacheSpec, VocabularySpec, checkpoint, nn, serving
from mpembed_jax.nn.linen import TrainState
from mpembed_jax.serving import __main__, checkpoints, container

VOCABULARY, DIM = 40, 4
TX = optax.sgd(0.5)
HOSTS = ("numba", "numpy")
CANONICAL = np.arange(VOCABULARY) // 2 * 2
OPTIONS = {"boundary": 0, "padding": 1, "tx": TX, "cache": None}
HASHED = {"rows": (30, 50), "heads": 2}
# With several shared rows, also n-grams without a row of their own show their hash.
RAW = {"rows": VocabularySpec(64, admit_after=2, ways=4, shared_rows=8), "heads": 1}
# Frequent tokens, padding and the boundary among them.
TOKENS = np.minimum(np.random.default_rng(0).zipf(1.3, (6, 9)) - 1, VOCABULARY - 1).astype(np.int32)


class Memory(NamedTuple):
    """The options of a memory."""

    name: str
    options: dict


MEMORIES = [
    Memory("hashed", HASHED),
    Memory("mapped", {**HASHED, "canonical": CANONICAL, "orders": (2, 4)}),
    Memory("int4", {"rows": 30, "heads": 1, "storage": "int4", "orders": (3,)}),
    Memory("raw", RAW),
    Memory("mapped raw", {**RAW, "canonical": CANONICAL, "orders": (3, 2)}),
]


def memory_of(seed=0, **options):
    given = {**OPTIONS, **options}
    return nn.NGramMemory(VOCABULARY, DIM, rngs=nnx.Rngs(seed), seed=seed, **given)


@nnx.jit(donate_argnums=0)
def train_step(model, tokens):
    model.prefetch(tokens)
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(tokens))))(model)
    nn.apply_gradients(model, grads)


def trained(model):
    """The model after some steps, in evaluation mode."""
    for shift in (0, 0, 1):
        train_step(model, np.roll(TOKENS, shift, axis=0))
    model.eval()
    return model


def vectors_of(module, tokens=TOKENS):
    """float32 [.., T, tables x D] of a module in evaluation."""
    return np.asarray(nnx.jit(lambda module, tokens: module(tokens))(module, tokens))


@pytest.mark.parametrize("memory", named(MEMORIES, core={"int4", "mapped raw", "hashed"}))
def test_tokens_read_the_vectors_of_the_module_bit_for_bit(memory, tmp_path):
    module = trained(memory_of(**memory.options))
    wanted = vectors_of(module)
    assert (wanted[TOKENS == 1] == 0).all() and wanted.any(axis=(0, 1)).all()
    contents = serving.save(tmp_path / "a", module)
    assert contents == serving.verify(tmp_path / "a")
    assert contents.version == (5 if "raw" in memory.name else 3)
    for host in HOSTS:
        table = serving.load(tmp_path / "a", implementation=host)
        for tokens in (TOKENS, jnp.asarray(TOKENS), TOKENS.astype(np.int64).tolist()):
            found = table.ngram_vectors(tokens)
            assert isinstance(found, np.ndarray) and found.tobytes() == wanted.tobytes()
    device = table.to_device()
    for call in (
        jax.jit(lambda table, tokens: table.ngram_vectors(tokens)),
        type(table).ngram_vectors,
    ):
        found = call(device, TOKENS)
        assert isinstance(found, jax.Array) and np.asarray(found).tobytes() == wanted.tobytes()
    assert pickle.loads(pickle.dumps(table)).ngram_vectors(TOKENS).tobytes() == wanted.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("memory", named([MEMORIES[1], MEMORIES[4]]))
def test_decoding_token_by_token_gives_the_vectors_of_the_whole_sequence(memory, tmp_path):
    module = trained(memory_of(**memory.options))
    serving.save(tmp_path / "a", module)
    table, whole = serving.load(tmp_path / "a"), vectors_of(module)

    def decode(table, token, context):
        return table.ngram_vectors(token, context), table.context_after(token, context)

    for table_, call in ((table, decode), (table.to_device(), jax.jit(decode))):
        context = np.full((len(TOKENS), max(module.ngrams.orders) - 1), NO_ID, np.int32)
        for at in range(TOKENS.shape[1]):
            vectors, context = call(table_, TOKENS[:, at : at + 1], context)
            np.testing.assert_array_equal(vectors, whole[:, at : at + 1])
            np.testing.assert_array_equal(context, module.context_after(TOKENS[:, : at + 1]))


def rows_of(table, module, tokens):
    """float32 [.., T, tables x D]: rows [V, D] of all tables, at the ids of the module's hash."""
    ids = module.ngrams.ids(tokens)
    starts = np.concatenate([[0], np.cumsum(module.ngrams.table_sizes)[:-1]])
    rows = np.where((ids == NO_ID)[..., None], 0, table[np.where(ids == NO_ID, 0, ids) + starts])
    return rows.reshape(*tokens.shape, -1)


def decoded(packed, fmt):
    return np.asarray(jax.jit(mpembed.decode, static_argnums=(1, 2))(packed, fmt, DIM))


@pytest.mark.slow
def test_newer_lines_and_another_format_are_saved_as_those_of_any_state(tmp_path):
    module = trained(memory_of(**HASHED, storage="float16", cache=CacheSpec(num_rows=64, ways=4)))
    assert np.asarray(module.state.cache.dirty).any()
    frozen = jax.jit(mpembed.freeze)(module.state)
    serving.save(tmp_path / "a", module)
    found = serving.load(tmp_path / "a").ngram_vectors(TOKENS)
    np.testing.assert_array_equal(
        found, rows_of(decoded(frozen.rows, frozen.format), module, TOKENS)
    )
    dense = np.concatenate(list(mpembed.to_dense(module.state).values()))
    fmt = mpembed.RowFormat("int4")
    packed = jax.jit(mpembed.encode, static_argnums=1)(dense, fmt)
    contents = serving.save(tmp_path / "a", module, storage="int4")
    assert all(t.format.name == "int4" and t.errors.largest > 0 for t in contents.tables)
    found = serving.load(tmp_path / "a").ngram_vectors(TOKENS)
    np.testing.assert_array_equal(found, rows_of(decoded(packed, fmt), module, TOKENS))


# --- several memories


class Model(nnx.Module):
    """Two layers with memories, one of raw ids, and other tables."""

    def __init__(self):
        self.layers = nnx.List([memory_of(n, **HASHED) for n in range(2)])
        self.raw = memory_of(2, **RAW, orders=(2,), canonical=CANONICAL)
        self.more = memory_of(3, **RAW, orders=(2,))
        self.items = nn.CachedEmbed(30, DIM, tx=TX, cache=None, rngs=nnx.Rngs(4))

    def memories(self):
        layers = {f"layers.{n}": layer for n, layer in enumerate(self.layers)}
        return {**layers, "raw": self.raw, "more": self.more}


@pytest.fixture(scope="module")
def model():
    model = Model()
    model.eval()
    return model


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    serving.save(path, model)
    return path


@pytest.mark.slow
def test_the_memories_of_a_whole_model_lie_in_one_file(model, path, tmp_path, capsys):
    table = serving.load(path)
    memories = model.memories()
    assert {ngrams.stack for ngrams in table.contents.ngrams} == set(memories)
    found = {stack: table.ngram_vectors(TOKENS, stack=stack) for stack in memories}
    for stack, memory in memories.items():
        assert found[stack].tobytes() == vectors_of(memory).tobytes()
        context = table.context_after(TOKENS, stack=stack)
        np.testing.assert_array_equal(context, memory.context_after(TOKENS))
    assert len({vectors.tobytes() for vectors in found.values()}) == len(memories)
    # Its tables are tables as any other.
    ids = {"embedding": np.arange(30), "layers.1.3-gram_0": np.arange(53)}
    rows = table.lookup(ids)
    assert rows["embedding"].tobytes() == vectors_of(model.items, np.arange(30)).tobytes()
    dense = mpembed.to_dense(model.layers[1].state)["3-gram_0"]
    np.testing.assert_array_equal(rows["layers.1.3-gram_0"], dense)
    # Raw ids are hashed by the names in training, which have no prefix.
    keys, is_ngram = model.raw.ngrams.keys(TOKENS, CANONICAL)
    whole = keys[..., 0, 0].astype(np.uint64) << np.uint64(32) | keys[..., 0, 1]
    rows = table.lookup({"raw.2-gram": np.ma.masked_array(whole, ~is_ngram[..., 0])})["raw.2-gram"]
    assert rows.tobytes() == found["raw"].tobytes()
    serving.write_npy(table, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "layers.1.3-gram_0.npy"), dense)
    assert table.nbytes == sum(array.nbytes for array in table.rows.values())
    # A path of names is the user's choice.
    named_ = {"first": model.layers[0], "second": model.layers[1]}
    serving.save(tmp_path / "b", named_)
    two = serving.load(tmp_path / "b")
    np.testing.assert_array_equal(two.ngram_vectors(TOKENS, stack="second"), found["layers.1"])
    assert __main__.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^layers\.0\.2-gram_0 +31 +4 +int8 ", printed, re.MULTILINE)
    assert (
        "raw: 2-grams of 40 tokens, heads 1, boundary 0, padding 1, seed 2, map of tokens of 160 "
        "bytes, hash fmix32(x xor token * multiplier)" in printed
    )


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        options = {**OPTIONS, **HASHED}
        first = nn.linen.NGramMemory(VOCABULARY, DIM, **options, name="first")
        mapped = {**OPTIONS, **RAW, "canonical": tuple(CANONICAL.tolist()), "seed": 5}
        second = nn.linen.NGramMemory(VOCABULARY, DIM, **mapped, name="second")
        return {"first": first(tokens), "second": second(tokens)}


@pytest.mark.slow
def test_the_memories_of_a_linen_model_are_those_of_its_variables(tmp_path):
    model = LinenModel()
    variables = model.init(jax.random.key(0), TOKENS)
    state = TrainState.create(apply_fn=model.apply, variables=variables, tx=TX)

    @jax.jit
    def step(state, tokens):
        state = state.prefetch({"first": tokens, "second": tokens})

        def loss(params):
            vectors = state.apply_fn({"params": params}, tokens)
            return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(vectors))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state, TOKENS)
    serving.save(tmp_path / "a", state.variables["embedding"])
    table = serving.load(tmp_path / "a")
    wanted = jax.jit(model.apply)(state.variables, TOKENS)
    for name, vectors in wanted.items():
        found = table.ngram_vectors(TOKENS, stack=f"{name}.table")
        assert vectors.any() and found.tobytes() == np.asarray(vectors).tobytes()


@pytest.mark.slow
def test_a_memory_over_a_mesh_makes_the_file_of_one_device(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    @nnx.jit(donate_argnums=0)
    def step(memory):
        memory.prefetch(TOKENS)
        # Sums of eighths are exact in any order.
        grads = nnx.grad(lambda memory: jnp.sum(memory(TOKENS)) / 8)(memory)
        nn.apply_gradients(memory, grads)

    made = []
    for options in ({}, {"mesh": mesh}):
        memory = memory_of(**HASHED, canonical=CANONICAL, storage="int4", **options)
        step(memory)
        serving.save(tmp_path / "a", memory)
        made.append((tmp_path / "a").read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_state_without_a_module_is_saved_with_its_hash(model, tmp_path):
    module = model.layers[0]
    serving.save(tmp_path / "a", {"x": serving.NGramState(module.state, module.ngrams)})
    found = serving.load(tmp_path / "a").ngram_vectors(TOKENS)
    assert found.tobytes() == vectors_of(module).tobytes()
    # The state of a model and a checkpoint do not have the hash: their tables are plain ones.
    for states in (nnx.state(module), module.state):
        contents = serving.save(tmp_path / "b", states)
        assert contents.ngrams == () and contents.version == 1
        assert [table.name for table in contents.tables] == list(module.ngrams.table_names)
    checkpoint.save(tmp_path / "steps", 1, nnx.state(module))
    contents = checkpoints.export(tmp_path / "steps", tmp_path / "c")
    assert contents.ngrams == () and contents.tables[0].name == "2-gram_0"


WITHOUT_FLAX = """
import sys
import numpy as np
from mpembed_jax import serving
table = serving.load(sys.argv[1])
assert table.ngram_vectors(np.ones((2, 3), int), stack="raw").shape == (2, 3, 4)
assert "flax" not in sys.modules
"""


@pytest.mark.slow
def test_a_process_that_serves_needs_no_flax(path):
    command = [sys.executable, "-c", WITHOUT_FLAX, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_exported_program_takes_tokens(model, path):
    table = serving.load(path)
    data = serving.export_program(
        lambda table, tokens: table.ngram_vectors(tokens, stack="raw"),
        table,
        jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32),
    )
    rows = {name: np.array(array) for name, array in table.rows.items()}
    found = jax.export.deserialize(bytearray(data)).call(rows, TOKENS)
    assert np.asarray(found).tobytes() == vectors_of(model.raw).tobytes()


# --- files


def test_files_of_older_versions_are_read(request, tmp_path):
    sums = {"user": 4005606091, "item": 900449664, "word": 3240098286}
    ids = {"user": np.arange(5), "item": np.arange(7), "word": np.arange(9)}
    with zipfile.ZipFile(request.path.parent / "older_files.zip") as archive:
        archive.extractall(tmp_path)
    for version, features in ((1, ("user", "item")), (2, ("user", "item", "word"))):
        path = tmp_path / f"version_{version}"
        assert serving.verify(path).version == version
        table = serving.load(path)
        found = table.lookup({feature: ids[feature] for feature in features})
        assert {f: zlib.crc32(rows.tobytes()) for f, rows in found.items()} == {
            feature: sums[feature] for feature in features
        }
        with pytest.raises(KeyError, match=r"no n-gram memory; save the module.*save\(path, memo"):
            table.ngram_vectors(TOKENS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    memory = nn.NGramMemory(
        5,
        2,
        orders=(2,),
        heads=1,
        rows=3,
        cache=None,
        canonical=np.arange(5),
        seed=3,
        rngs=nnx.Rngs(0),
    )
    serving.save(path, {"m": memory})
    return path


def test_every_changed_byte_is_found(small, tmp_path):
    path = tmp_path / "changed"
    for _ in changed_bytes(small, path):
        with pytest.raises(serving.ServingError, match="changed"):  # the name of the file
            serving.verify(path)
    whole = bytearray(small.read_bytes())
    place = container.open_file(small).contents.tensors()["m.canonical"]["data_offsets"][0]
    whole[8 + int.from_bytes(whole[:8], "little") + place] ^= 1
    path.write_bytes(whole)
    with pytest.raises(serving.ServingError, match=r"'m\.canonical' has changed bytes in rows 0"):
        serving.verify(path)


def of_hash(**fields):
    """A change of the parameters of the hash."""
    return lambda body: body["ngrams"][0].update(fields)


@pytest.mark.parametrize(
    "lie",
    named([
        Lie("future", "is of version 6, this library reads 5", lambda b: b.update(version=6)),
        Lie("past", "not what its description says", lambda b: b.update(version=2)),
        Lie("none", "not what its description says", lambda b: b.update(ngrams=[])),
        Lie("no list", "is damaged", lambda b: b.update(ngrams=3)),
        Lie("no record", "is damaged", lambda b: b.update(ngrams=["m"])),
        Lie("hash", "stack 'm' have the hash 'md5', which this", of_hash(hash="md5")),
        Lie("stack", "stack 'n' has no table where its NGramHash has", of_hash(stack="n")),
        Lie("number", "n-grams of stack 3 have the map", of_hash(stack=3)),
        Lie("map", "n-grams of stack 'm' have the map of tokens 1", of_hash(map=1)),
        Lie("no map", "not what its description says", of_hash(map=False)),
        Lie("tokens", "not what its description says", of_hash(vocabulary_size=6)),
        Lie("float", "stack 'm': vocabulary_size must be an integer", of_hash(vocabulary_size=5.0)),
        Lie("seed", "stack 'm': seed must be in", of_hash(seed=-1)),
        Lie("boundary", r"stack 'm': boundary must be in \[0, 4\]", of_hash(boundary=5)),
        Lie("orders", "stack 'm': orders must be a sequence", of_hash(orders=2)),
        Lie("rows", r"table 'm\.2-gram_0' of 3 rows where .* of 5 rows", of_hash(rows=4)),
        Lie("heads", "stack 'm' have 1 orders x 2 heads, the file has 1 tables", of_hash(heads=2)),
        Lie("orders and heads", "stack 'm' have 63 orders x 1024 heads, the file has 1 tables",
            of_hash(heads=1024, orders=list(range(2, 65)), rows=1)),
        Lie("raw", "'m.2-gram_0' of 3 rows where its NGramHash has .*raw ids", of_hash(rows=None)),
        Lie("twice", r"the map of tokens 'm\.canonical' is taken",
            lambda b: b["ngrams"].append(b["ngrams"][0])),
        Lie("nothing", "is damaged", lambda b: b["ngrams"][0].clear()),
        Lie("no seed", "n-grams of stack 'm': 'seed'", lambda b: b["ngrams"][0].pop("seed")),
    ]),
)  # fmt: skip
def test_a_description_of_n_grams_that_is_wrong_is_refused(lie, small, tmp_path):
    with pytest.raises(serving.ServingError, match=f"broken.*{lie.message}"):
        container.open_file(rewritten(small, tmp_path / "broken", lie.change))


# --- what is refused


def saving(**fields):
    """A save of the state of a memory, with another hash or map."""

    def save(model, path):
        made = serving.NGramState(model.layers[0].state, model.layers[0].ngrams)
        canonical = fields.get("canonical")
        hash_ = {k: v for k, v in fields.items() if k != "canonical"}
        ngrams = dataclasses.replace(made.ngrams, **hash_)
        serving.save(path, {"a": made._replace(ngrams=ngrams, canonical=canonical)})

    return save


@pytest.mark.parametrize(
    "mistake",
    named([
        Refused(saving(rows=31), r"stack 'a' has .*3-gram_0' of 53 rows where .* of 41 rows"),
        Refused(saving(heads=1), r"2-gram_1' of 37 rows where its NGramHash has .*3-gram_0' of 53"),
        Refused(saving(heads=3, rows=30), r"3-gram_0' of 53 rows where .*_2' of 41 rows"),
        Refused(saving(orders=(3, 2), rows=(50, 30)), r"'a\.2-gram_0' of 31 rows where .*3-gram_0"),
        Refused(saving(heads=1, rows=None), r"2-gram_0' of 31 rows where .*2-gram' of raw ids"),
        Refused(saving(seed=7), r"trained with the NGramHash \{'boundary': 0.*: 0\}, got .*: 7\}"),
        Refused(saving(canonical=np.arange(9)), r"one number for each token, \[40\], got \[9\]"),
        Refused(saving(canonical=np.ones(40)), "canonical must be integers", TypeError),
        Refused(
            lambda model, path: serving.save(
                path, {"a": model.raw.state, "b": serving.NGramState(model.raw.state, HASH)}
            ),
            r"stack 'b' has table 'b\.2-gram' of raw ids where .*'b\.2-gram_0' of 31 rows",
        ),
    ]),
)  # fmt: skip
def test_a_hash_of_other_tables_is_not_saved(mistake, model, tmp_path):
    with pytest.raises(mistake.error, match=mistake.message):
        mistake.call(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Of the tables of no memory here, with the settings of `raw`.
HASH = nn.NGramHash(VOCABULARY, (2,), 1, 30, boundary=0, padding=1, seed=2)


def asking(tokens, context=None, stack="raw"):
    return lambda table: table.ngram_vectors(tokens, context, stack)


REFUSED = [
    Refused(asking([[3, 40]]), r"in \[0, 40\), the vocabulary, got 40 at \[0, 1\] \(1 such"),
    Refused(
        asking(np.ones((1, 2))), r"tokens must be integers \[\.\., T\], got float64", TypeError
    ),
    Refused(asking(3), r"must be \[\.\., T\], got a scalar"),
    Refused(asking([[3]], [[1, 2]]), r"context must be the 1 tokens .*\[1, 1\], got \[1, 2\]"),
    Refused(asking([[3]], stack=None), r"several .*\['layers\.0', 'layers\.1', 'more', 'raw'\]"),
    Refused(asking([[3]], stack="items"), "unknown n-gram memory 'items'; this file", KeyError),
    Refused(lambda table: table.context_after([[3]]), "several n-gram memories"),
    Refused(
        lambda table: jax.jit(lambda tokens: table.ngram_vectors(tokens, stack="raw"))(TOKENS),
        r"pass table\.to_device",
        TypeError,
    ),
    Refused(
        lambda table: jax.jit(lambda tokens: table.ngram_vectors(tokens, stack="layers.0"))(TOKENS),
        r"a table on the host cannot be read in a jitted function",
        TypeError,
    ),
]


@pytest.mark.parametrize("refused", named(REFUSED))
def test_what_cannot_be_asked_is_refused_as_by_the_module(refused: Any, model, path):
    table = serving.load(path, out_of_range="raise")
    with pytest.raises(refused.error, match=refused.message):
        refused.call(table)


def test_traced_tokens_outside_the_vocabulary_read_as_zeros(model, path):
    table = serving.load(path)
    tokens = TOKENS.copy()
    tokens[2, 4] = VOCABULARY
    for stack, memory in model.memories().items():
        found = jax.jit(
            lambda table, tokens, stack=stack: table.ngram_vectors(tokens, stack=stack)
        )(table.to_device(), tokens)
        wanted = vectors_of(memory, tokens)
        assert not wanted[2, 4].any() and np.asarray(found).tobytes() == wanted.tobytes()
        with pytest.raises(ValueError, match=r"got 40 at \[2, 4\]"):
            memory(tokens)
        for shape in ((0, 9), (4, 0)):
            nothing = table.ngram_vectors(np.zeros(shape, np.int32), stack=stack)
            assert nothing.shape == (*shape, wanted.shape[-1])
