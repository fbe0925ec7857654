"""Between quantized stacks and plain float32 tables, block by block, so that no float32 copy of a stack is ever made."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import access, embedding, numerics, ops, optim
from mpembed_jax import state as states
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.state import EmbeddingState
from mpembed_jax.table import QuantizedTable, encode_rows

_BLOCK = 65536  # rows moved at once


def to_dense(state: EmbeddingState, tables: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Returns float32 tables on the host, equal to `read` of all their ids.

    Args:
      state: not consumed.
      tables: names; None for all.

    Returns:
      {name: float32 [vocabulary_size, D]}.

    Raises:
      KeyError: on an unknown name.
    """
    known = [t.name for t in state.spec.tables]
    names = known if tables is None else list(tables)
    unknown = [n for n in names if n not in known]
    if unknown:
        raise KeyError(f"unknown tables {unknown}; this spec has {known}")
    read = jax.jit(embedding.read)
    result = {}
    for name in names:
        start, size = state.spec.table_range(name)
        dense = np.empty((size, state.spec.embedding_dim), np.float32)
        block = min(_BLOCK, size)
        for first in range(0, size, block):
            begin = min(first, size - block)
            dense[begin : begin + block] = read(state, np.arange(start + begin, start + begin + block, dtype=np.int32))
        result[name] = dense
    return result


@partial(jax.jit, donate_argnums=0)
def _store(table: QuantizedTable, key: jax.Array, first: jax.Array, block: jax.Array) -> QuantizedTable:
    ids = first + jnp.arange(block.shape[0], dtype=jnp.int32)
    packed = encode_rows(block, ids, table, key, numerics.INITIAL_ROUNDING, jnp.int32(0))
    rows = access.put_block(table.rows, first, packed)
    return QuantizedTable(rows, table.format, table.embedding_dim)


def from_dense(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    tables: Mapping[str, Any],
    *,
    implementation: str | None = None,
) -> EmbeddingState:
    """Makes a state from float32 tables, rounded by the format's rule; memory-mapped arrays are read in blocks.

    Args:
      key: jax.random.key(..) or uint32 [2].
      spec: the stack.
      tx: optax transformation for the rows.
      tables: {name: [vocabulary_size, D]}, one for every table of the spec; any float dtype.
      implementation: as in init.

    Returns:
      The state; its cache is empty.

    Raises:
      KeyError: if names are missing or unknown.
      ValueError: if an array has another shape.
    """
    names = [t.name for t in spec.tables]
    if set(tables) != set(names):
        raise KeyError(f"tables must name exactly {names}, got {list(tables)}")
    for t in spec.tables:
        if np.shape(tables[t.name]) != (t.vocabulary_size, spec.embedding_dim):
            raise ValueError(
                f"table {t.name!r} must be [{t.vocabulary_size}, {spec.embedding_dim}], got {list(np.shape(tables[t.name]))}"
            )
    words = optim.key_words(key)
    shape = (spec.num_rows, spec.storage.row_words(spec.embedding_dim))
    packed = jax.jit(
        lambda: access.to_host(jnp.zeros(shape, spec.storage.word_dtype(spec.embedding_dim)), spec.memory_kind)
    )()
    table = QuantizedTable(packed, spec.storage, spec.embedding_dim)
    for name in names:
        start, size = spec.table_range(name)
        block = min(_BLOCK, size)
        for first in range(0, size, block):
            begin = min(first, size - block)
            rows = np.asarray(tables[name][begin : begin + block], dtype=np.float32)
            table = _store(table, words, np.int32(start + begin), rows)
    assemble = jax.jit(
        lambda key, table: states.assemble(key, spec, tx, ops.choose(implementation), table), donate_argnums=1
    )
    return assemble(words, table)
