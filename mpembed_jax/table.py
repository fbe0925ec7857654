"""Quantized tables: packed rows, which are initialized block by block and read by id.

This module has no caches and no optimizers. `numerics.formats` defines the formats of a row.
"""

import dataclasses
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax import initial_values
from mpembed_jax.arrays import carries, indexing
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.formats import RowFormat, quantize, row_parameters
from mpembed_jax.numerics.packing import decode, encode, pack
from mpembed_jax.spec import EmbeddingSpec, initial_bounds, offsets, size_of


@partial(
    jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["format", "embedding_dim"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedTable:
    """The packed rows of a stack, `row = codes * scale + bias`.

    `format` and `embedding_dim` are static.
    """

    rows: jax.Array  # u16 | u32 [V, row_words]
    format: RowFormat  # resolved (see RowFormat.resolve)
    embedding_dim: int  # D

    @property
    def num_rows(self) -> int:
        """Number of rows, V."""
        return self.rows.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed rows."""
        return self.rows.size * self.rows.dtype.itemsize


def encode_rows(
    rows: jax.Array,
    ids: jax.Array,
    table: QuantizedTable,
    key: random_bits.Key,
    stream: int,
    step: jax.Array,
    once: jax.Array | None = None,
) -> jax.Array:
    """Packs rows in the format of a table, rounded by the rule of the format.

    Args:
      rows: float32 [n, D].
      ids: int32 [n]. Stochastic rounding draws the random bits of these ids.
      table: the table that defines the format; its rows are not read.
      key: uint32 [2], or a key bound to a shard.
      stream: the stream of the random bits, a constant of numerics.random_bits.
      step: int32 scalar, for the random bits.
      once: None, or an int32 scalar whose value, 1, the compiler cannot see. If it is given, rows
        of integer formats are quantized in a loop of one iteration. XLA:CPU then does not fuse
        quantization with packing; fused, they are six times slower. The bits are the same.

    Returns:
      uint16 or uint32 [n, row_words].
    """
    fmt = table.format
    dim = table.embedding_dim
    if once is None or not fmt.is_integer:
        return encode(rows, fmt, _bits_for(fmt, key, stream, step, ids, dim))
    scale, bias = row_parameters(rows, fmt)

    def make_codes(_: jax.Array) -> jax.Array:
        return quantize(rows, scale, bias, fmt, _bits_for(fmt, key, stream, step, ids, dim))

    codes = carries.at_most_once(make_codes, once, jnp.zeros(rows.shape, jnp.uint32))
    return pack(codes, scale, bias, fmt)


def _bits_for(
    fmt: RowFormat,
    key: random_bits.Key,
    stream: int,
    step: jax.Array | int,
    ids: jax.Array,
    dim: int,
) -> jax.Array | None:
    if fmt.rounding == "nearest" or fmt.name == "float32":
        return None
    return random_bits.row_bits(key, stream, jnp.asarray(step, jnp.int32), ids, dim)


# --- whole tables


def read_rows(table: QuantizedTable, ids: jax.Array) -> jax.Array:
    """Returns the float32 rows [.., D] of int32 ids [..].

    Ids outside the table, NO_ID included, read as zeros.
    """
    is_valid = (ids >= 0) & (ids < table.num_rows)
    packed = indexing.take(table.rows, jnp.where(is_valid, ids, 0))
    rows = decode(packed, table.format, table.embedding_dim)
    return jnp.where(is_valid[..., None], rows, jnp.float32(0))


def initial_rows(
    table: QuantizedTable, key: random_bits.Key, rows: jax.Array, bounds: jax.Array
) -> jax.Array:
    """Returns the packed initial values of rows: uniform in +-bounds, rounded by the format's rule.

    Args:
      table: the table that defines the format; its rows are not read.
      key: uint32 [2], or a key bound to a shard.
      rows: int32 [n], the numbers of the rows; local ones if the key is bound to a shard.
      bounds: float32 [n, 1] or a scalar.

    Returns:
      uint16 or uint32 [n, row_words].
    """
    dim = table.embedding_dim
    unit = random_bits.uniform(
        random_bits.row_bits(key, random_bits.INITIAL_VALUE, jnp.int32(0), rows, dim)
    )
    values = (unit * 2 - 1) * bounds
    bits = _bits_for(table.format, key, random_bits.INITIAL_ROUNDING, 0, rows, dim)
    return encode(values, table.format, bits)


class Shard(Protocol):
    """The view of one shard that `init_table` needs; see mesh.shard.Shard."""

    @property
    def num_rows(self) -> int:
        """Rows of the shard's arrays, padding included."""

    @property
    def first_rows(self) -> jax.Array:
        """i32 [T + 1]: the first local row of each table."""

    def key(self, words: jax.Array) -> random_bits.RowKey:
        """Returns the key with which local rows draw the bits of their global ids."""

    def rows_of(self, ids: jax.Array) -> jax.Array:
        """Returns the local rows (int32) of global ids, and NO_ID for ids of other shards."""


def init_table(key: jax.Array, spec: EmbeddingSpec, shard: Shard | None = None) -> QuantizedTable:
    """Makes the rows of a stack block by block. Call it under jit.

    There is no float32 table, except for an initializer that must be called for a whole table (see
    `initial_values`).

    Args:
      key: uint32 [2].
      spec: the stack. Its tables' rows follow one another.
      shard: the shard whose rows are made, with the same values as in the whole stack. None: all
        rows are made.

    Returns:
      The table. Its initial values are rounded by the rule of the format.

    Raises:
      TypeError: if an initializer returns something other than an array.
      ValueError: if an initializer returns an array of another shape.
    """
    tables, fmt, embedding_dim = spec.row_tables, spec.storage, spec.embedding_dim
    starts = offsets(tables)
    total = int(starts[-1]) if shard is None else shard.num_rows
    first_rows = jnp.asarray(starts, jnp.int32) if shard is None else shard.first_rows
    row_key = key if shard is None else shard.key(key)
    packed = indexing.filled(
        (total, fmt.row_words(embedding_dim)),
        jnp.zeros((), fmt.word_dtype(embedding_dim)),
        spec.memory_kind,
    )

    if any(t.initializer is None for t in tables):
        # One loop fills all rows of the stack, and finds the bound of a row from its table. Tables
        # with an initializer are overwritten below. All blocks have the same size, so the last one
        # may begin earlier. Padding at the end of a shard belongs to no table, and its bound is 0.
        bounds = jnp.asarray([*initial_bounds(tables), 0.0], jnp.float32)
        size = min(initial_values.BLOCK, total)

        def uniform_block(block: jax.Array, packed: jax.Array) -> jax.Array:
            # A loop counter is 64 bits wide in x64 mode, and a Python int under jax.disable_jit.
            first = jnp.minimum(jnp.asarray(block, jnp.int32) * size, total - size)
            rows = first + jnp.arange(size, dtype=jnp.int32)
            bound = bounds[
                jnp.sum((rows[:, None] >= first_rows[None, 1:]).astype(jnp.int32), axis=1)
            ][:, None]
            table = QuantizedTable(packed, fmt, embedding_dim)
            return indexing.put_block(packed, first, initial_rows(table, row_key, rows, bound))

        packed = lax.fori_loop(0, -(-total // size), uniform_block, packed)

    for index, table in enumerate(tables):
        if table.initializer is None:
            continue
        table_key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), index)
        values_of = initial_values.of_blocks(table, table_key, embedding_dim)
        start = int(starts[index])
        num_rows = size_of(table)
        num_full, tail = divmod(num_rows, initial_values.BLOCK)

        def put_block(
            block: jax.Array | int,
            packed: jax.Array,
            size: int,
            values_of=values_of,
            start=start,
        ) -> jax.Array:
            # As above: a loop counter has 64 bits in x64 mode.
            first = jnp.asarray(block, jnp.int32) * initial_values.BLOCK + start
            ids = first + jnp.arange(size, dtype=jnp.int32)
            rows = ids if shard is None else shard.rows_of(ids)
            bits = _bits_for(fmt, row_key, random_bits.INITIAL_ROUNDING, 0, rows, embedding_dim)
            encoded = encode(values_of(block, size), fmt, bits)
            # Every shard computes whole blocks and keeps its own rows.
            if shard is not None:
                return indexing.put(packed, rows, encoded)
            return indexing.put_block(packed, first, encoded)

        if num_full:
            put_full = partial(put_block, size=initial_values.BLOCK)
            packed = lax.fori_loop(0, num_full, put_full, packed)
        if tail:
            packed = put_block(num_full, packed, tail)
    return QuantizedTable(packed, fmt, embedding_dim)
