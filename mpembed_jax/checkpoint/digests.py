"""Digests and manifest records that identify the rows of an embedding state."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.checkpoint import host_memory, leaves, placements
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.numerics import random_bits
from mpembed_jax.spec import EmbeddingSpec

_BLOCK = 1 << 20  # rows of a host array digested at once


def row_names(state: EmbeddingState) -> tuple[list[str], list[str]]:
    """Returns the inner names of a state's arrays by row, and of its arrays by cache line.

    An inner name is the path of an array inside the state. An array by row has one entry per table
    row. An array by line has one entry per cache line.
    """
    rows, lines = [], []
    for name, leaf in leaves.named(state).items():
        if name.startswith("table.rows") or (name.startswith("row_state") and leaf.ndim):
            rows.append(name)
        elif name.startswith("cache.rows"):
            lines.append(name)
    return rows, lines


@partial(jax.jit, static_argnames="salt")
def _digest_rows(array: jax.Array, first: jax.Array, salt: int) -> jax.Array:
    """Returns u32 [2]: two sums over all words. Each word is first mixed with its row and column.

    The order of the additions does not matter.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    # Elements of 8 bytes become two words.
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = (
        jax.lax.bitcast_convert_type(array, unsigned).reshape(array.shape[0], -1).astype(jnp.uint32)
    )
    row = first.astype(jnp.uint32) + jnp.arange(words.shape[0], dtype=jnp.uint32)[:, None]
    row = random_bits.fmix32(row + jnp.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF))
    column = jnp.arange(words.shape[1], dtype=jnp.uint32)[None, :] * jnp.uint32(0x85EBCA6B)
    mixed = random_bits.fmix32(words ^ (row + column))
    return jnp.stack(
        [jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (row | jnp.uint32(1)), dtype=jnp.uint32)]
    )


def digest(state_rows: Mapping[str, Any], block_bytes: int = host_memory.BLOCK_BYTES) -> np.ndarray:
    """Returns a u32 [2] digest of the rows of a state, given as {inner name: array}.

    Two states with different rows have different digests, except by chance. Host arrays are
    digested in blocks: NumPy arrays a million rows at once, arrays in an accelerator's host memory
    `block_bytes` at once.
    """
    total = np.zeros(2, np.uint32)
    for salt, name in enumerate(sorted(state_rows)):
        array = state_rows[name]
        if array.size == 0:
            continue
        if host_memory.is_kept(array):
            for first, rows in host_memory.blocks(array, block_bytes):
                total = total + np.asarray(_digest_rows(rows, np.int32(first), salt))
            continue
        size = _BLOCK if isinstance(array, np.ndarray) else array.shape[0]
        for first in range(0, array.shape[0], size):
            block = array if size >= array.shape[0] else array[first : first + size]
            total = total + np.asarray(_digest_rows(block, np.int32(first), salt))
    return total


def digest_of(state: EmbeddingState) -> np.ndarray:
    """Returns the digest of a state's rows and cache lines."""
    rows, lines = row_names(state)
    named = leaves.named(state)
    return digest({name: named[name] for name in rows + lines})


def describe(spec: EmbeddingSpec) -> dict[str, Any]:
    """Returns JSON that describes the arrays of a state with this spec."""
    storage = spec.storage
    cache = None
    if spec.cache is not None:
        cache = {**spec.cache.geometry(spec.num_rows)._asdict(), "policy": spec.cache.policy}
    result = {
        "tables": table_sizes(spec),
        "embedding_dim": spec.embedding_dim,
        "storage": [storage.name, storage.symmetric, storage.scale_dtype],
        "cache": cache,
        "row_state_dtype": spec.row_state_dtype,
    }
    if spec.vocabulary is not None:
        result["vocabulary"] = spec.vocabulary.arrays
    if spec.ngrams is not None:
        result["ngrams"] = spec.ngrams.settings
    return result


def table_sizes(spec: EmbeddingSpec) -> list[list[Any]]:
    """Returns names and sizes of the tables; None is the size of a table of raw ids."""
    return [[t.name, t.vocabulary_size and int(t.vocabulary_size)] for t in spec.tables]


def record(member: leaves.Member) -> dict[str, Any]:
    """Returns the manifest's record of an EmbeddingState.

    Restoring does not need features and rounding. A serving file that is made from the checkpoint
    does. Checkpoints of earlier versions do not have them. Features whose names are not strings are
    left out.
    """
    state = member.state
    pairs = [list(pair) for pair in state.spec.feature_tables]
    is_text = all(type(name) is str for name, _ in pairs)
    features = pairs if state.spec.features and is_text else None
    return {
        **describe(state.spec),
        "features": features,
        "rounding": state.spec.storage.rounding,
        "names": member.names,
        **placements.Division.of(state).record(),
        "fingerprint": numbers(state.fingerprint),
        "key": numbers(state.key),
        "step": numbers(state.step),
        "is_pending": bool(state.pending),
        "digest": numbers(digest_of(state)),
    }


def numbers(array: Any) -> Any:
    """Returns an array as JSON."""
    return np.asarray(array).tolist()
