"""A serving file holds the rows of training, whole and checked, or it is refused."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import shapes
import training
from cases import Refused, changed_bytes, crossed, named
from flax import nnx
from jax.sharding import PartitionSpec

import mpembed_jax as mpembed
from mpembed_jax import checkpoint, nn, serving
from mpembed_jax.serving import __main__, checkpoints, container

TX = mpembed.optim.rowwise_adagrad(0.5)
SIZES = (900, 7, 300)


def trained(spec, steps=8):
    """A state whose cache has lines that are newer than the table."""
    state = mpembed.init(jax.random.key(3), spec, TX)
    ids = shapes.skewed_ids(1, steps, 96, spec.num_rows, drift=2)
    grads = np.random.default_rng(2).standard_normal((*ids.shape, spec.embedding_dim))
    return training.train(state, ids, grads.astype(np.float32), TX).state


def trained_over(mesh, spec, placement):
    """The same over a mesh."""
    state = mpembed.init(jax.random.key(3), spec, TX, mesh=mesh, placement=placement)
    specs = mpembed.partition_specs(state)

    def step(state, ids):
        return training.step(state, ids, TX).state

    over_mesh = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, PartitionSpec("x")), out_specs=specs, check_vma=False
    )
    for ids in shapes.skewed_ids(1, 3, 96, spec.num_rows, drift=2):
        state = jax.jit(over_mesh)(state, ids)
    assert np.asarray(state.cache.dirty).any()
    return state


def arrays(path):
    """{table: packed rows} of a file."""
    opened = container.open_file(path)
    return {t.name: np.array(opened.array(t.name)) for t in opened.contents.tables}


def flushed(state):
    """{table: packed rows} of a flushed state."""
    rows = np.asarray(jax.jit(mpembed.freeze)(state).rows)
    return {
        t.name: rows[slice(first, first + size)]
        for t in state.spec.tables
        for first, size in [state.spec.table_range(t.name)]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "storage",
    named(
        shapes.FORMATS,
        fast={"int4", "int8", "float32", "bfloat16"},
        core=(),
    ),
)
def test_rows_as_trained_are_those_of_a_flush_and_any_reader_of_safetensors_sees_them(
    storage, tmp_path
):
    state = trained(shapes.stack(SIZES, 7, storage=storage, lines=64))
    assert np.asarray(state.cache.dirty).any()
    path = tmp_path / "model.safetensors"
    contents = serving.save(path, state)
    assert serving.verify(path) == contents == container.open_file(path).contents
    expected, read = flushed(state), safetensors.numpy.load_file(path)
    for name, rows in arrays(path).items():
        np.testing.assert_array_equal(rows, expected[name])
        np.testing.assert_array_equal(rows, read[name])
    everything = training.all_rows(state)
    for table in contents.tables:
        first, size = state.spec.table_range(table.name)
        values = np.asarray(jax.jit(mpembed.decode, static_argnums=(1, 2))(
            read[table.name], table.format, table.embedding_dim
        ))  # fmt: skip
        difference = np.abs(values - everything[first : first + size])
        assert table.errors.largest == difference.max()
        assert table.errors.mean == pytest.approx(difference.mean(dtype=np.float64), rel=1e-5)


@pytest.mark.parametrize("storage", named(["int8", "int4", "int2", "float16"], fast={"int4"}))
def test_rows_of_another_format_are_those_of_read_rounded_to_nearest(storage, tmp_path):
    state = trained(shapes.stack(SIZES, 33, storage="bfloat16", lines=64))
    contents = serving.save(tmp_path / "a", {"items": state}, storage=storage)
    rows = training.all_rows(state)
    fmt = mpembed.RowFormat(storage)
    packed = np.asarray(jax.jit(mpembed.encode, static_argnums=1)(rows, fmt))
    values = np.asarray(jax.jit(mpembed.decode, static_argnums=(1, 2))(packed, fmt, 33))
    for table in contents.tables:
        first, size = state.spec.table_range(table.name)
        here = slice(first, first + size)
        np.testing.assert_array_equal(arrays(tmp_path / "a")[table.name], packed[here])
        assert table.errors.largest == np.abs(values - rows)[here].max()
        assert table.stack == "items"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_hides_no_errors_of_the_others(value, tmp_path, capsys):
    rows = np.array(shapes.rows(1, 40, 16))
    rows[3, 5] = value
    spec = shapes.stack(40, 16, storage="float32")
    state = mpembed.from_dense(jax.random.key(0), spec, TX, {"table0": rows})
    (table,) = serving.save(tmp_path / "a", state, storage="int8").tables
    rest = np.delete(rows, 3, axis=0)
    packed = jax.jit(mpembed.encode, static_argnums=1)(rest, mpembed.RowFormat("int8"))
    decoded = jax.jit(mpembed.decode, static_argnums=(1, 2))(packed, table.format, 16)
    difference = np.abs(np.asarray(decoded) - rest)
    assert np.isnan(serving.load(tmp_path / "a").lookup([3])).all()
    assert table.errors.num_nonfinite == 16
    assert table.errors.largest == difference.max() > 0
    assert table.errors.mean == pytest.approx(difference.mean(dtype=np.float64), rel=1e-5)
    assert __main__.main(["inspect", str(tmp_path / "a")]) == 0
    assert "(16 not finite)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_format_that_the_rows_have_already_keeps_their_bits(tmp_path):
    state = trained(shapes.stack(SIZES, 16, storage="int4", lines=64))
    serving.save(tmp_path / "a", state, storage="int4")
    dirty = np.asarray(state.cache.dirty)
    changed = np.asarray(state.cache.tags)[dirty]
    kept = np.setdiff1d(np.arange(sum(SIZES)), changed)
    both = [np.concatenate(list(found.values())) for found in (arrays(tmp_path / "a"),)]
    np.testing.assert_array_equal(both[0][kept], np.asarray(state.table.rows)[kept])
    lines = np.asarray(state.cache.rows)[dirty.reshape(-1)]
    nearest = jax.jit(mpembed.encode, static_argnums=1)(lines, mpembed.RowFormat("int4"))
    np.testing.assert_array_equal(both[0][changed], np.asarray(nearest))


class Division(NamedTuple):
    """A mesh and a placement; its name is the placement's kind."""

    placement: mpembed.Placement
    devices: int = 4

    @property
    def name(self):
        return self.placement.kind


@pytest.mark.slow
@crossed(
    is_checkpoint=named({"state": False, "checkpoint": True}),
    division=named(
        [Division(mpembed.Placement(kind)) for kind in ("rows", "tables", "replicated")],
        fast={"rows"},
    ),
    core=(),
)
def test_a_divided_state_and_its_checkpoint_make_the_file_of_one_device(
    division, is_checkpoint, tmp_path
):
    mesh = jax.make_mesh((division.devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = shapes.stack((900, 70, 300, 800), 16, storage="int4", lines=512, ways=8)
    state = trained_over(mesh, spec, division.placement)
    if is_checkpoint:
        checkpoint.save(tmp_path / "steps", 3, {"emb": state, "other": jnp.ones(3)})
        checkpoints.export(tmp_path / "steps", tmp_path / "a")
    else:
        serving.save(tmp_path / "a", {"emb": state})
    expected = flushed(state)
    for name, rows in arrays(tmp_path / "a").items():
        np.testing.assert_array_equal(rows, expected[name])


@pytest.mark.slow
def test_the_file_of_a_checkpoint_has_its_features_and_its_rounding(tmp_path):
    storage = mpembed.RowFormat("int4", rounding="nearest")
    features = {"liked": "table0", "seen": "table0", "kind": "table1"}
    spec = shapes.stack(SIZES, 16, storage=storage, lines=64)
    state = trained(dataclasses.replace(spec, features=features))
    steps, out, other = tmp_path / "steps", tmp_path / "a", tmp_path / "b"
    checkpoint.save(steps, 1, {"emb": state})
    assert checkpoints.export(steps, out).features == tuple(features.items())
    serving.save(other, {"emb": state})
    assert out.read_bytes() == other.read_bytes()

    def export_changed(**fields):
        path = steps / "step_1" / "manifest.json"
        body = json.loads(json.loads(path.read_text())["body"])
        entry = body["embeddings"]["emb"] | fields
        body["embeddings"]["emb"] = {n: v for n, v in entry.items() if v != "left out"}
        text = json.dumps(body, sort_keys=True)
        path.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "body": text}))
        return checkpoints.export(steps, out)

    for fields in ({"features": [["liked", "nowhere"]]}, {"features": "liked"}, {"rounding": "up"}):
        with pytest.raises(checkpoint.CheckpointError, match=r"features|rounding"):
            export_changed(**{"features": None, "rounding": None} | fields)
    # An earlier version wrote neither: each table is a feature.
    older = export_changed(features="left out", rounding="left out")
    assert older.features == tuple((f"table{i}", f"table{i}") for i in range(3))
    assert out.read_bytes() != other.read_bytes()
    # Many rows are no damage: such a stack can be trained over a mesh.
    tables = [["table0", 2**31 - 2], *([f"table{i}", SIZES[i]] for i in (1, 2))]
    with pytest.raises(ValueError, match="'emb' has 2147483953 rows; a serving file holds fewer"):
        export_changed(tables=tables)


def test_names_that_several_stacks_have_begin_with_the_name_of_the_stack(tmp_path):
    wide, deep = shapes.stack((8, 5), 4), shapes.stack((9,), 8)
    last = dataclasses.replace(deep, tables=(mpembed.TableSpec("last", 9),))
    specs = {
        "deep": dataclasses.replace(deep, features={"user": "table0", "seen": "table0"}),
        "last": dataclasses.replace(last, features={"table0": "last"}),
        "wide": dataclasses.replace(wide, features={"user": "table0", "item": "table1"}),
    }
    states = {name: mpembed.init(jax.random.key(0), spec, TX) for name, spec in specs.items()}
    contents = serving.save(tmp_path / "a", states)
    assert contents.version == 1
    assert contents.features == (
        ("deep.user", "deep.table0"),
        ("seen", "deep.table0"),
        ("table0", "last"),
        ("wide.user", "wide.table0"),
        ("item", "table1"),
    )
    table = serving.load(tmp_path / "a")
    rows = table.lookup({feature: np.arange(5) for feature, _ in contents.features})
    stacks = ("deep", "deep", "last", "wide", "wide")
    for (feature, own), stack in zip(rows.items(), stacks, strict=True):
        name = dict(specs[stack].feature_tables)[feature.removeprefix(f"{stack}.")]
        assert own.tobytes() == mpembed.to_dense(states[stack])[name][:5].tobytes()
    checkpoint.save(tmp_path / "steps", 1, states)
    assert checkpoints.export(tmp_path / "steps", tmp_path / "b") == contents
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_the_command_line_exports_an_increment_shows_it_and_finds_damage(tmp_path, capsys):
    spec = shapes.stack(SIZES, 16, storage="int8", lines=64)
    state = trained(spec)
    folder, out = tmp_path / "steps", tmp_path / "model.safetensors"
    checkpoint.save(folder, 1, {"emb": state})
    tracker = checkpoint.track(state)
    state, plan, _ = training.step(state, np.arange(40, dtype=np.int32), TX)
    tracker = checkpoint.mark(tracker, plan)
    checkpoint.save(folder, 2, {"emb": state}, tracker=tracker)
    assert __main__.main(["export", str(folder), str(out), "--storage", "int4"]) == 0
    printed = capsys.readouterr()
    assert "1,207 of 1,207 rows" in printed.err
    assert f"{sum(SIZES) * 10:,} bytes of packed rows" in printed.out
    other = tmp_path / "other"
    serving.save(other, {"emb": state}, storage="int4")
    assert out.read_bytes() == other.read_bytes()
    assert __main__.main(["inspect", str(out)]) == 0
    assert __main__.main(["verify", str(out)]) == 0
    assert "every byte is right" in capsys.readouterr().out
    damaged = bytearray(out.read_bytes())
    damaged[-1] ^= 1
    out.write_bytes(damaged)
    assert __main__.main(["verify", str(out)]) == 1
    assert "table 'table2' has changed bytes in rows 0 to 299" in capsys.readouterr().err
    assert __main__.main(["export", str(tmp_path / "none"), str(out)]) == 1
    assert "no checkpoint in" in capsys.readouterr().err


def test_the_command_line_exports_scales_of_another_dtype(tmp_path, capsys):
    state = trained(shapes.stack(SIZES, 16, storage="int8", lines=64))
    checkpoint.save(tmp_path / "steps", 1, {"emb": state})
    words = ["export", str(tmp_path / "steps"), str(tmp_path / "a"), "--storage"]
    assert __main__.main([*words, "int4:float16"]) == 0
    assert "int4 symmetric float16" in capsys.readouterr().out
    storage = mpembed.RowFormat("int4", scale_dtype="float16")
    serving.save(tmp_path / "b", {"emb": state}, storage=storage)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for text, message in (
        ("int4:int8", "scale_dtype must be one of"),
        ("int4:", "scale_dtype must be one of"),
        ("float16:float16", "float16 rows have no scale"),
        ("int3", "unknown row format"),
    ):
        with pytest.raises(SystemExit):
            __main__.main([*words, text])
        assert message in capsys.readouterr().err


def test_the_command_line_says_which_package_an_export_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(serving, "checkpoints")
    monkeypatch.setitem(sys.modules, "mpembed_jax.serving.checkpoints", None)
    assert __main__.main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "export needs mpembed_jax[checkpoint]" in capsys.readouterr().err


def test_the_tables_of_a_flax_model_are_saved_from_its_state(tmp_path):
    model = nn.CachedEmbed(300, 16, rngs=nnx.Rngs(0))
    serving.save(tmp_path / "a", nnx.state(model))
    ids = np.arange(300, dtype=np.int32)
    model.eval()
    rows = serving.load(tmp_path / "a").lookup(ids)
    assert rows.tobytes() == np.asarray(model(ids)).tobytes()


@pytest.mark.slow
def test_a_model_with_several_modules_is_saved_and_exported(tmp_path):
    class Towers(nnx.Module):
        def __init__(self):
            self.user = nn.CachedEmbed(30, 16, rngs=nnx.Rngs(0))
            self.item = nn.CachedEmbed(20, 8, rngs=nnx.Rngs(1))
            self.grams = nnx.List([
                nn.NGramMemory(40, 4, orders=(2,), heads=1, rows=30 + n, rngs=nnx.Rngs(n))
                for n in range(2)
            ])  # fmt: skip

    model = Towers()
    serving.save(tmp_path / "a", nnx.state(model))
    checkpoint.save(tmp_path / "steps", 1, nnx.state(model))
    checkpoints.export(tmp_path / "steps", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    serving.save(tmp_path / "c", {"user": model.user.state, "item": model.item.state})
    model.eval()
    ids = np.arange(20, dtype=np.int32)
    grams = [mpembed.to_dense(memory.state)["2-gram_0"][:20] for memory in model.grams]
    wanted = {
        "user.embedding": np.asarray(model.user(ids)),
        "item.embedding": np.asarray(model.item(ids)),
        "grams.0.2-gram_0": grams[0],
        "grams.1.2-gram_0": grams[1],
    }
    for name in ("a", "b", "c"):
        table = serving.load(tmp_path / name)
        found = table.lookup({feature: ids for feature, _ in table.contents.features})
        assert len(found) == (2 if name == "c" else 4)
        for feature, rows in found.items():
            short = feature.replace("stack.state.value.", "")  # the path in the tree of the model
            assert rows.tobytes() == wanted[short].tobytes()


MEMORY = """
import resource, sys
import jax
import mpembed_jax as mpembed
from mpembed_jax import serving

def made(num_rows):
    spec = mpembed.EmbeddingSpec(mpembed.TableSpec("a", num_rows), 64, "int8", None)
    return mpembed.init(jax.random.key(0), spec, mpembed.optim.rowwise_adagrad(0.1))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = made(100_000), jax.block_until_ready(made(2_000_000))
for storage in (None, "int4"):
    serving.save(sys.argv[1], small, storage=storage)  # compiles
    begin = peak()
    serving.save(sys.argv[1], large, storage=storage)
    print(peak() - begin, large.table.nbytes)
"""


@pytest.mark.slow
@pytest.mark.optimized("millions of rows take a minute otherwise")
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
def test_saving_makes_no_second_copy_of_a_table(tmp_path):
    """The peak of a process may grow by some blocks, not by a table of 136 MB."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        grown, nbytes = map(int, line.split())
        assert nbytes == 2_000_000 * 68
        assert grown < nbytes / 4


def test_a_file_of_many_tables_is_opened_in_time_that_grows_as_their_number(tmp_path):
    fmt = mpembed.RowFormat("int8").resolve(4)
    nothing = container.Errors(0.0, 0.0, 0)
    names = [f"table{number}" for number in range(1000)]
    tables = tuple(container.Table(name, "", 1, 4, fmt, nothing) for name in names)
    contents = container.Contents(tables, tuple((name, name) for name in names))
    sums = np.full(len(names), zlib.crc32(bytes(tables[0].nbytes)), np.uint32)
    contents = dataclasses.replace(contents, checksums_crc32=zlib.crc32(sums))
    room = container.header_room(contents)
    rows = bytes(sum(table.nbytes for table in tables))
    (tmp_path / "a").write_bytes(container.padded_header(contents, room) + sums.tobytes() + rows)

    def seconds(call, *arguments):
        begin = time.process_time()
        call(*arguments)
        return time.process_time() - begin

    one = max(seconds(contents.tensors) for _ in range(3))
    for call in (serving.verify, serving.load):
        # Measured: 10 times. A pass over all tables for each of them takes 1,000 times.
        assert seconds(call, tmp_path / "a") < 200 * one


# --- what is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    serving.save(path, trained(shapes.stack((30, 5), 7, storage="int8", lines=16)))
    return path


@pytest.mark.slow
def test_every_changed_byte_is_found(good, tmp_path):
    path = tmp_path / "changed"
    for _ in changed_bytes(good, path):
        with pytest.raises(serving.ServingError, match="changed"):  # the name of the file
            serving.verify(path)


@pytest.mark.slow
def test_every_shorter_and_longer_file_is_refused_when_opened(good, tmp_path):
    whole = good.read_bytes()
    path = tmp_path / "cut"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(serving.ServingError):
            container.open_file(path)
    with pytest.raises(serving.ServingError, match=r"cut short.*table 'table1' is not whole"):
        container.open_file(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(serving.ServingError, match="its header says"):
        container.open_file(path)


def rewritten(good, path, change):
    """A file whose description is changed, with right checksums."""
    whole = good.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    body = json.loads(header["__metadata__"]["mpembed_jax"])
    change(body)
    text = json.dumps(body)
    header["__metadata__"] |= {"mpembed_jax": text, "crc32": str(zlib.crc32(text.encode()))}
    head = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + length :])
    return path


class Lie(NamedTuple):
    """A change of a description, and what is said about it."""

    name: str
    message: str
    change: Any


def of_first(**fields):
    """A change of the first table's fields."""
    return lambda body: body["tables"][0].update(fields)


@pytest.mark.parametrize(
    "lie",
    named([
        Lie("future", "is of version 6, this library reads 5", lambda b: b.update(version=6)),
        Lie("version", "not what its description says", lambda b: b.update(version=2)),
        Lie("vocabulary", "damaged", of_first(vocabulary=1)),
        Lie("rows", "not what its description says", of_first(rows=29)),
        Lie("many rows", "'table0' has 4611686018427387904 rows", of_first(rows=2**62)),
        Lie("format", "unknown row format", of_first(storage=["int3", None, None])),
        Lie("no list", "damaged", of_first(storage=None)),
        Lie("symmetric", "'table0' has storage", of_first(storage=["int8", {}, "bfloat16"])),
        Lie("one", "'table0' has storage", of_first(storage=["int8", 1, "bfloat16"])),
        Lie("checksum", "checksums is -1", lambda b: b.update(checksums_crc32=-1)),
        Lie("names", "name of table 'table1' is taken", of_first(name="table1")),
        Lie("feature", "or its table 'g' is unknown", lambda b: b["features"].append(["f", "g"])),
        Lie("no tables", "damaged", lambda b: b.update(tables=3)),
        Lie("nothing", "damaged", lambda b: b.clear()),
    ]),
)  # fmt: skip
def test_a_description_that_is_wrong_is_refused(lie, good, tmp_path):
    with pytest.raises(serving.ServingError, match=lie.message):
        container.open_file(rewritten(good, tmp_path / "a", lie.change))


def test_a_file_that_is_replaced_while_it_is_opened_is_read_as_it_was(good, tmp_path, monkeypatch):
    """The rows that are mapped are those of the file whose header was read."""
    path, newer = tmp_path / "a", tmp_path / "b"
    path.write_bytes(good.read_bytes())
    newer.write_bytes(good.read_bytes()[:-1] + b"?")
    read_header = container._read_header

    def and_replace(*given):
        os.replace(newer, path)
        return read_header(*given)

    monkeypatch.setattr(container, "_read_header", and_replace)
    opened = container.open_file(path)
    assert opened.data.tobytes() == good.read_bytes()[-len(opened.data) :]


def test_half_a_character_in_a_description_is_refused(tmp_path):
    header = {"__metadata__": {"mpembed_jax": "\ud800", "crc32": "1"}}
    head = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(serving.ServingError, match="checksum of its description differs"):
        container.open_file(tmp_path / "a")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(serving.ServingError, match="is a pipe or a device"):
        container.open_file(tmp_path / "a")


def test_files_of_other_programs_are_refused(tmp_path):
    path = tmp_path / "a"
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(serving.ServingError, match="mpembed_jax did not write"):
        container.open_file(path)
    for text in (b"", b"\x93NUMPY" * 40, b"[" * 4000):
        path.write_bytes(text)
        with pytest.raises(serving.ServingError, match="no serving file"):
            container.open_file(path)
    with pytest.raises(FileNotFoundError):
        container.open_file(tmp_path / "none")


SMALL = shapes.stack((30, 5), 4)


def of_names(*names, features=None):
    """A state of tables of these names."""
    tables = tuple(mpembed.TableSpec(name, 3) for name in names)
    spec = dataclasses.replace(SMALL, tables=tables, features=features)
    return mpembed.init(jax.random.key(0), spec, TX)


def donated():
    state = mpembed.init(jax.random.key(0), SMALL, TX)
    jax.jit(mpembed.prefetch, donate_argnums=0)(state, jnp.zeros(4, jnp.int32))
    return state


@pytest.mark.parametrize(
    "mistake",
    named([
        Refused(lambda path: serving.save(path, {"w": jnp.ones(3)}), "no embedding state to save"),
        Refused(
            lambda path: serving.save(
                path, {"a": of_names("x"), "b": of_names("x"), "c": of_names("b.x")}
            ),
            r"name of table 'b\.x' is taken",
        ),
        Refused(lambda path: serving.save(path, of_names(3)), "name of table 3 is no text"),
        Refused(
            lambda path: serving.save(path, of_names("x", features={3: "x"})),
            "name of feature 3 is no text",
        ),
        Refused(
            lambda path: serving.save(
                path, jax.eval_shape(lambda: mpembed.init(jax.random.key(0), SMALL, TX))
            ),
            "traced or abstract",
        ),
        Refused(
            lambda path: serving.save(path, donated()),
            r"serving\.save\(path, states\): this state was donated to an earlier call",
        ),
        Refused(lambda path: serving.save(path, trained(SMALL), storage="int3"), "unknown row"),
    ]),
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_and_leaves_the_file_alone(mistake, tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(mistake.error, match=mistake.message):
        mistake.call(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_place_that_no_file_may_have_is_said_before_rows_are_read(tmp_path):
    (tmp_path / "steps").mkdir()
    calls = [
        lambda path: serving.save(path, trained(SMALL), progress=lambda *_: pytest.fail("written")),
        lambda path: checkpoints.export(tmp_path / "steps", path),
    ]
    for call in calls:
        with pytest.raises(IsADirectoryError, match=r"cannot replace a directory: .*steps'$"):
            call(tmp_path / "steps")
        with pytest.raises(FileNotFoundError, match=r"folder of a does not exist: .*nowhere'$"):
            call(tmp_path / "nowhere" / "a")
    assert not list((tmp_path / "steps").iterdir())


def test_a_save_that_is_interrupted_leaves_the_old_file(tmp_path):
    state = trained(SMALL)
    path = tmp_path / "a"
    path.write_text("old")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serving.save(path, state, progress=stop)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
