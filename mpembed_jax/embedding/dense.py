"""Conversion between quantized stacks and plain float32 tables.

Rows are converted block by block, so that a device never holds a float32 copy of a stack.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mpembed_jax import ops, row_ids
from mpembed_jax.arrays import indexing
from mpembed_jax.embedding import arguments, evaluation
from mpembed_jax.embedding.state import EmbeddingState, check_spec, make, over_mesh
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.mesh.shard import Shard
from mpembed_jax.numerics import random_bits
from mpembed_jax.spec import EmbeddingSpec, size_of
from mpembed_jax.table import QuantizedTable, encode_rows

_BLOCK = 65536  # rows converted at once


def to_dense(
    state: EmbeddingState, tables: Sequence[str] | str | None = None
) -> dict[str, np.ndarray]:
    """Returns float32 tables on the host, with the rows that `read` returns for their ids.

    Args:
      state: not consumed.
      tables: a name, or several; None for all.

    Returns:
      {name: float32 [vocabulary_size, D]}.

    Raises:
      KeyError: if a name is unknown.
      TypeError: if state has another type.
      ValueError: if the stack has 2**31 - 1 rows or more, or a vocabulary; or if the state was
        donated, made for another spec, or averaged.
    """
    arguments.check_state("to_dense(state, tables)", state)
    state.check_spec()
    known = [t.name for t in state.spec.tables]
    names = known if tables is None else [tables] if isinstance(tables, str) else list(tables)
    unknown = [n for n in names if n not in known]
    if unknown:
        raise KeyError(f"unknown tables {unknown}; this spec has {known}")
    layout = state.layout
    if layout is not None and layout.is_paired:
        raise ValueError(
            f"a stack of {state.spec.num_rows} rows is too large for dense tables; call read with "
            "pairs from sharding.pairs instead"
        )
    # The result is replicated, so that each of several processes gets all rows that it asks for.
    read = jax.jit(
        evaluation.read,
        out_shardings=None if layout is None else NamedSharding(layout.mesh, PartitionSpec()),
    )
    result = {}
    for name in names:
        start, size = state.spec.table_range(name)
        dense = np.empty((size, state.spec.embedding_dim), np.float32)
        block = min(_BLOCK, size)
        for first in range(0, size, block):
            begin = min(first, size - block)
            ids = np.arange(start + begin, start + begin + block, dtype=np.int32)
            # The transfers are explicit, so a guard against implicit transfers lets them pass.
            dense[begin : begin + block] = jax.device_get(read(state, jax.device_put(ids)))
        result[name] = dense
    return result


@partial(jax.jit, donate_argnums=0)
def _store(state: EmbeddingState, first: jax.Array, block: jax.Array) -> EmbeddingState:
    table = state.table
    layout = state.layout
    if layout is not None and not layout.is_bound:
        everywhere = PartitionSpec()
        return over_mesh(_store, state, everywhere, everywhere)(state, first, block)
    ids = first + jnp.arange(block.shape[0], dtype=jnp.int32)
    here = ids if layout is None else layout.shard(layout.index()).rows_of(ids)
    packed = encode_rows(
        block, here, table, state.row_key, random_bits.INITIAL_ROUNDING, jnp.int32(0)
    )
    if layout is None:
        rows = indexing.put_block(table.rows, first, packed)
    else:
        rows = indexing.put(table.rows, here, packed)
    return dataclasses.replace(state, table=dataclasses.replace(table, rows=rows))


def from_dense(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    tables: Mapping[str, Any],
    *,
    mesh: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    placement: Placement | None = None,
    implementation: str | None = None,
) -> EmbeddingState:
    """Makes a state from float32 tables, rounded by the format's rule.

    The arrays are read block by block, so they may be memory-mapped.

    Args:
      key: jax.random.key(..) or uint32 [2].
      spec: the stack.
      tx: optax transformation for the rows.
      tables: {name: [vocabulary_size, D]} with every table of the spec, in any float dtype.
      mesh: as in init.
      axis_name: as in init.
      placement: as in init.
      implementation: as in init.

    Returns:
      The state; its cache is empty.

    Raises:
      KeyError: if a name is missing or unknown.
      TypeError: if key, spec, tx or tables has another type, or a table has a mask.
      ValueError: if an array has another shape, or if the stack has a vocabulary. Also as init.
    """
    check_spec("from_dense(key, spec, tx, tables)", spec)
    names = [t.name for t in spec.tables]
    if not isinstance(tables, Mapping):
        raise TypeError(
            f"from_dense(key, spec, tx, tables): tables must be a mapping {{name: [rows, D]}}, "
            f"got {type(tables).__name__}"
        )
    if set(tables) != set(names):
        raise KeyError(f"tables must name exactly {names}, got {list(tables)}")
    for t in spec.tables:
        row_ids.check_no_mask(f"table {t.name!r}", tables[t.name])
        if np.shape(tables[t.name]) != (size_of(t), spec.embedding_dim):
            raise ValueError(
                f"table {t.name!r} must be [{t.vocabulary_size}, {spec.embedding_dim}], got "
                f"{list(np.shape(tables[t.name]))}"
            )
    layout = Layout.of(spec, mesh, axis_name, placement)

    state = make(random_bits.key_words(key), spec, tx, ops.choose(implementation), layout, zeros)
    for name in names:
        start, size = spec.table_range(name)
        block = min(_BLOCK, size)
        for first in range(0, size, block):
            begin = min(first, size - block)
            rows = np.asarray(tables[name][begin : begin + block], dtype=np.float32)
            state = _store(state, np.int32(start + begin), rows)
    return state


def zeros(key: jax.Array, spec: EmbeddingSpec, shard: Shard | None) -> QuantizedTable:
    """Returns a table of zeros for `state.make`, whole or of one shard. The key is ignored."""
    shape = (
        spec.num_rows if shard is None else shard.num_rows,
        spec.storage.row_words(spec.embedding_dim),
    )
    packed = indexing.filled(
        shape, jnp.zeros((), spec.storage.word_dtype(spec.embedding_dim)), spec.memory_kind
    )
    return QuantizedTable(packed, spec.storage, spec.embedding_dim)
