"""Serving tables for other programs: NumPy arrays, FBGEMM's row layouts, and StableHLO.

FBGEMM has two layouts. Its fused row-wise operators read the codes, then the scale and the bias,
which are float32 for INT8 and float16 for INT4 and INT2. Its table-batched embeddings read a
float16 scale and bias, then the codes. Values are `code * scale + bias` with unsigned codes; a
symmetric row gets the bias -2^(bits - 1) * scale. FBGEMM's layouts are written without rounding: a
row that the layout cannot hold is an error.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mpembed_jax.embedding.arguments import expect, path_of
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.serving import container, host_rows
from mpembed_jax.serving.container import Table
from mpembed_jax.serving.table import ServingTable

LAYOUTS = ("float32", "float16", "fbgemm", "fbgemm_tbe")


def write_npy(tables: ServingTable, folder: Any, layout: str = "float32") -> list[Path]:
    """Writes each table to `<table name>.npy`, block by block.

    Row i of a pool's array is row i of the pool. ServingTable.rows_of returns the rows of raw ids.

    Args:
      tables: on the host.
      folder: made if it does not exist. Files in it are replaced, each as a whole.
      layout: "float32" or "float16": values [V, D], float16 rounded to nearest. "fbgemm": uint8
        [V, bytes], as FBGEMM's fused row-wise operators read them. "fbgemm_tbe": as its
        table-batched embeddings read them, with a row alignment of 1.

    Returns:
      The paths, in the order of the tables.

    Raises:
      OSError: if a file cannot be written.
      TypeError: if tables is not a ServingTable on the host.
      ValueError: if the layout is unknown or does not fit a table's format; if a row's scale or
        bias has no float16; or if the name of a table cannot be the name of a file.
    """
    call = "serving.write_npy(tables, folder, layout)"
    expect(call, "tables", tables, ServingTable, "from serving.load")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    folder = path_of(call, "folder", folder)
    if tables.host is None:
        raise TypeError(f"{call}: tables must be what serving.load returned, on the host")
    for table in tables.tables:
        if Path(table.name).name != table.name or table.name in (".", ".."):
            raise ValueError(f"table {table.name!r} cannot be the name of a file")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables.tables:
        block_of: Callable[[int, int], np.ndarray]
        if layout.startswith("float"):

            def block_of(first: int, last: int, table: Table = table) -> np.ndarray:
                rows = tables.decode_block(table, first, last)
                if layout == "float16":  # finite numbers stay finite, as in rows of this format
                    largest = np.float32(np.finfo(np.float16).max)
                    rows = np.where(np.isinf(rows), rows, np.clip(rows, -largest, largest))
                return rows.astype(layout)

        else:

            def block_of(first: int, last: int, table: Table = table) -> np.ndarray:
                packed = tables.rows[table.name][first:last]
                return fbgemm_rows(packed, table, is_batched=layout == "fbgemm_tbe", first=first)

        paths.append(folder / f"{table.name}.npy")
        _write(paths[-1], table, block_of)
    return paths


def _write(path: Path, table: Table, block_of: Callable[[int, int], np.ndarray]) -> None:
    with container.replacing(path) as file:
        for first in range(0, table.num_rows, table.block_rows):
            block = block_of(first, min(first + table.block_rows, table.num_rows))
            if first == 0:
                shape = (table.num_rows, block.shape[1])
                kind = {"descr": block.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, kind)
            file.write(np.ascontiguousarray(block).data)


def fbgemm_rows(
    packed: np.ndarray, table: Table, *, is_batched: bool = False, first: int = 0
) -> np.ndarray:
    """Returns packed rows in one of FBGEMM's layouts, with the same values.

    Args:
      packed: rows [n, words] of the table.
      table: gives format and dim.
      is_batched: whether the layout is that of the table-batched embeddings.
      first: the number of the first row, for messages.

    Returns:
      uint8 [n, bytes].

    Raises:
      ValueError: if the format is not an integer format, or a row's scale or bias has no float16.
    """
    fmt, dim = table.format, table.embedding_dim
    if not fmt.is_integer:
        raise ValueError(
            f"table {table.name!r} is {fmt.name}; FBGEMM's row layouts hold int8, int4 and int2: "
            "save it with that storage first"
        )
    row = np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), fmt.row_bytes(dim))
    codes = row[:, : -(-dim * fmt.code_bits // 8)]
    scale, bias = host_rows.parameters(row, fmt, dim)
    if fmt.symmetric:
        bias = scale * np.float32(-(2 ** (fmt.code_bits - 1)))
    if fmt.name == "int8" and not is_batched:
        return np.concatenate([codes, scale.view(np.uint8), bias.view(np.uint8)], axis=1)
    halves = []
    for name, value in (("scale", scale), ("bias", bias)):
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if (wrong := np.flatnonzero(half.astype(np.float32) != value)).size:
            better = RowFormat(fmt.name, symmetric=False, scale_dtype="float16")
            raise ValueError(
                f"table {table.name!r}: the {name} {float(value[wrong[0], 0])!r} of row "
                f"{first + int(wrong[0])} has no float16; save the table with storage="
                f"{better} first, which rounds the rows to such scales"
            )
        halves.append(half.view(np.uint8))
    return np.concatenate([*halves, codes] if is_batched else [codes, *halves], axis=1)


# --- StableHLO


def export_program(
    function: Callable, tables: ServingTable, *arguments: Any, platforms: Any = None
) -> bytes:
    """Compiles a model with its tables to StableHLO that jax can run without this library.

    The first argument of the program is {name: array}, the arrays of a serving file by their names:
    the packed words of tables, the owners of pools, and maps of tokens. The other arguments follow.
    With the returned bytes `data`, a call is:

        jax.export.deserialize(data).call(rows, *arguments)

    Args:
      function: `function(tables, *arguments)`; its constants, such as the weights of a model,
        become part of the program.
      tables: the tables whose arrays the program takes. This call uses only shapes and dtypes.
      arguments: arrays, jax.ShapeDtypeStructs, or dicts, lists and tuples of them. Their shapes may
        be symbolic (jax.export.symbolic_shape).
      platforms: as in jax.export.export, such as ("cpu", "cuda"); None: that of this process.

    Returns:
      The serialized program.

    Raises:
      TypeError: if tables is not a ServingTable, function is not callable, or platforms is a text.
      ImportError: if flatbuffers is not installed, with which jax.export serializes programs.
    """
    call = "serving.export_program(function, tables, *arguments)"
    expect(call, "tables", tables, ServingTable, "from serving.load")
    if not callable(function):
        raise TypeError(f"{call}: function must be callable, got {function!r}")
    if isinstance(platforms, str):
        raise TypeError(f"{call}: platforms must be a list of names, got {platforms!r}")
    contents = tables.contents
    rows = {
        name: jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))
        for name, array in tables.rows.items()
    }

    def program(rows: dict[str, jax.Array], *arguments: Any) -> Any:
        return function(ServingTable(rows, contents), *arguments)

    exported = export.export(jax.jit(program), platforms=platforms)(rows, *arguments)
    return bytes(exported.serialize())
