"""Other programs read the same values: NumPy, FBGEMM's operators, a process that has only jax."""

import struct
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from cases import Refused, named

import mpembed_jax as mpembed
from mpembed_jax import serving

TX = mpembed.optim.rowwise_adagrad(0.5)


class Case(NamedTuple):
    """A format and a dim."""

    storage: mpembed.RowFormat
    dim: int

    @property
    def name(self):
        kind = "symmetric" if self.storage.resolve(self.dim).symmetric else "bias"
        return f"{self.storage.name}-{kind}-{self.storage.scale_dtype}-{self.dim}"


CASES = [
    Case(mpembed.RowFormat(name, symmetric=symmetric, scale_dtype=scale), dim)
    for name, symmetric in (("int8", True), ("int8", False), ("int4", True), ("int4", False))
    for scale, dim in (("float16", 16), ("bfloat16", 64), ("float16", 33))
]
CASES += [Case(mpembed.RowFormat("int2", scale_dtype="float16"), dim) for dim in (16, 33)]


def served(storage, dim, folder, num_rows=400):
    """A table of rows whose scales have a float16."""
    spec = shapes.stack((num_rows, 9), dim, storage=storage)
    rng = np.random.default_rng(0)
    dense = {
        t.name: rng.standard_normal((t.vocabulary_size, dim)) * rng.uniform(0.1, 9)
        for t in spec.tables
    }
    state = mpembed.from_dense(jax.random.key(0), spec, TX, dense)
    serving.save(folder / "file", state)
    return serving.load(folder / "file"), mpembed.to_dense(state)


def unpacked(row, dim, bits, layout):
    """The values of one row of FBGEMM's layouts, byte by byte."""
    size = -(-dim * bits // 8)
    kind = "<ff" if bits == 8 and layout == "fbgemm" else "<ee"
    width = struct.calcsize(kind)
    codes, parameters = row[:size], row[size:]
    if layout == "fbgemm_tbe":
        parameters, codes = row[:width], row[width:]
    assert len(codes) == size and len(parameters) == width
    scale, bias = struct.unpack(kind, parameters.tobytes())
    stream = int.from_bytes(codes.tobytes(), "little")
    values = [(stream >> i * bits & (1 << bits) - 1) * scale + bias for i in range(dim)]
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    "case",
    named(
        CASES,
        fast={"int8-symmetric-float16-16", "int4-bias-bfloat16-64"},
        core={"int8-bias-float16-33", "int4-symmetric-float16-33", "int2-bias-float16-16"},
    ),
)
@pytest.mark.parametrize("layout", ["fbgemm", "fbgemm_tbe"])
def test_rows_in_fbgemms_layouts_have_the_same_values(case, layout, tmp_path):
    table, dense = served(case.storage, case.dim, tmp_path)
    bits = case.storage.code_bits
    for path in serving.write_npy(table, tmp_path / "npy", layout):
        rows = np.load(path)
        assert rows.dtype == np.uint8
        for row, values in zip(rows[::7], dense[path.stem][::7], strict=True):
            assert unpacked(row, case.dim, bits, layout).tobytes() == values.tobytes()


@pytest.mark.parametrize("case", named(CASES))
def test_fbgemms_own_operators_read_the_same_bits(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs mpembed_jax[peers]")
    pytest.importorskip("fbgemm_gpu", reason="needs mpembed_jax[peers]")
    table, dense = served(case.storage, case.dim, tmp_path)
    (path, _) = serving.write_npy(table, tmp_path / "npy", "fbgemm")
    rows = torch.from_numpy(np.load(path))
    bits = case.storage.code_bits
    if bits == 8:
        values = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows)
    else:
        values = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, bits)
    assert values.numpy()[:, : case.dim].tobytes() == dense["table0"].tobytes()


@pytest.mark.parametrize("case", named([c for c in CASES if c.dim % 4 == 0]))
def test_fbgemms_table_batched_embeddings_read_the_same_bits(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs mpembed_jax[peers]")
    pytest.importorskip("fbgemm_gpu", reason="needs mpembed_jax[peers]")
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )

    table, dense = served(case.storage, case.dim, tmp_path)
    (path, _) = serving.write_npy(table, tmp_path / "npy", "fbgemm_tbe")
    rows = np.load(path)
    kind = {8: "INT8", 4: "INT4", 2: "INT2"}[case.storage.code_bits]
    from fbgemm_gpu.split_embedding_configs import SparseType

    spec = ("t", len(rows), case.dim, SparseType[kind], EmbeddingLocation.HOST)
    embedding = IntNBitTableBatchedEmbeddingBagsCodegen(
        [spec], device="cpu", output_dtype=SparseType.FP32, row_alignment=1
    )
    embedding.fill_random_weights()
    weights, _ = embedding.split_embedding_weights(split_scale_shifts=False)[0]
    assert weights.shape == rows.shape
    weights.copy_(torch.from_numpy(rows))
    ids = torch.arange(len(rows), dtype=torch.int32)
    found = embedding(ids, torch.arange(len(rows) + 1, dtype=torch.int32))
    assert found.numpy().tobytes() == dense["table0"].tobytes()


@pytest.mark.slow
def test_numpy_arrays_have_the_values(tmp_path):
    table, dense = served(mpembed.RowFormat("int8"), 33, tmp_path)
    for layout, dtype in (("float32", np.float32), ("float16", np.float16)):
        for path in serving.write_npy(table, tmp_path / "npy", layout):
            values = np.load(path)
            assert values.dtype == dtype
            np.testing.assert_array_equal(values, dense[path.stem].astype(dtype))
    assert sorted(p.name for p in (tmp_path / "npy").iterdir()) == ["table0.npy", "table1.npy"]


def test_float16_keeps_finite_numbers_finite(tmp_path):
    rows = np.float32([[1e6, -1e6, 1, np.inf], [65504, 1e-9, -np.inf, 0]])
    state = mpembed.from_dense(
        jax.random.key(0), shapes.stack(2, 4, storage="float32"), TX, {"table0": rows}
    )
    serving.save(tmp_path / "a", state)
    (path,) = serving.write_npy(serving.load(tmp_path / "a"), tmp_path / "npy", "float16")
    wanted = np.float16([[65504, -65504, 1, np.inf], [65504, 0, -np.inf, 0]])
    np.testing.assert_array_equal(np.load(path), wanted)


def with_small_scale(folder):
    spec = shapes.stack(3, 64, storage="int4")
    rows = {"table0": np.full((3, 64), 1e-9) * np.arange(64)}
    serving.save(folder / "a", mpembed.from_dense(jax.random.key(0), spec, TX, rows))
    return serving.load(folder / "a")


@pytest.mark.parametrize(
    "mistake",
    named([
        Refused(
            lambda f: serving.write_npy(with_small_scale(f), f / "npy", "fbgemm"),
            r"table 'table0': the scale .* of row 0 has no float16; .*scale_dtype='float16'",
        ),
        Refused(
            lambda f: serving.write_npy(served("bfloat16", 16, f)[0], f / "npy", "fbgemm"),
            "is bfloat16; FBGEMM's row layouts hold int8",
        ),
        Refused(
            lambda f: serving.write_npy(served("int8", 16, f)[0], f / "npy", "int8"),
            "layout must be one of",
        ),
    ]),
)  # fmt: skip
def test_what_a_layout_cannot_hold_is_an_error(mistake, tmp_path):
    with pytest.raises(mistake.error, match=mistake.message):
        mistake.call(tmp_path)
    assert not list((tmp_path).glob("npy/*"))


ONLY_JAX = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mpembed_jax", "flax", "optax", "numba", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import jax
import numpy as np
from jax import export

tables, program, ids, out = sys.argv[1:]
with open(tables, "rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
del header["__metadata__"]
rows = {}
for name, entry in header.items():
    begin = 8 + size + entry["data_offsets"][0]
    dtype = {"U16": "<u2", "U32": "<u4"}[entry["dtype"]]
    rows[name] = np.memmap(tables, dtype, "r", begin, tuple(entry["shape"]))
del rows["mpembed_jax.checksums"]
program = export.deserialize(bytearray(open(program, "rb").read()))
np.save(out, program.call(jax.device_put(rows), np.load(ids)))
"""


@pytest.mark.slow
def test_a_process_that_has_only_jax_runs_a_model_with_its_tables(tmp_path):
    table, _ = served("int4", 16, tmp_path)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((32, 1)).astype(np.float32)

    def model(tables, ids):
        one = tables.lookup({"table0": ids[:, 0]})["table0"]
        bags = tables.bag({"table1": ids[:, 1:]}, "mean")["table1"]
        return jax.nn.sigmoid(jnp.concatenate([one, bags], 1) @ weights)[:, 0]

    ids = rng.integers(0, 9, (20, 4)).astype(np.int32)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 4), jnp.int32)
    (tmp_path / "program").write_bytes(serving.export_program(model, table, shape))
    np.save(tmp_path / "ids.npy", ids)
    names = ["file", "program", "ids.npy", "out.npy"]
    done = subprocess.run(
        [sys.executable, "-c", ONLY_JAX, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = np.asarray(jax.jit(model)(table.to_device(), ids))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-6)
