"""Gives the raw ids of a step their rows, and resets a row that gets a new owner."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import ops, row_ids
from mpembed_jax.arrays import indexing
from mpembed_jax.embedding import devices
from mpembed_jax.embedding.counters import add, count_change
from mpembed_jax.embedding.state import EmbeddingState, over_batch
from mpembed_jax.mesh import raw_ids
from mpembed_jax.spec import initial_bounds
from mpembed_jax.vocabulary import hashes, pool
from mpembed_jax.vocabulary.hashes import PADDING


def admit(state: EmbeddingState, ids: Any) -> tuple[EmbeddingState, Any]:
    """Gives the raw ids of a batch their rows.

    An id that was seen often enough gets a row of its own. A row that had another owner starts from
    its initial value, with fresh optimizer state, and without a cache line.

    Args:
      state: a state with a vocabulary.
      ids: nest of pairs uint32 [.., 2]; see spec.raw_ids. On a mesh, this device's share.

    Returns:
      The state, and the rows (int32 [..]) in the nest of ids; NO_ID for padding.

    Raises:
      TypeError: if ids are not pairs.
    """
    return admit_and_deal(state, ids)[:2]


def admit_and_deal(state: EmbeddingState, ids: Any) -> tuple[EmbeddingState, Any, ops.Dealt | None]:
    """Does what admit does. Also returns the positions by partition, from a native admission."""
    vocabulary = state.vocabulary
    assert vocabulary is not None
    leaves, treedef = checked(ids)
    pairs = row_ids.joined(leaves, (2,), jnp.uint32)
    num = pairs.shape[0]
    if num == 0:
        rows = [jnp.zeros(leaf.shape[:-1], jnp.int32) for leaf in leaves]
        return state, treedef.unflatten(rows), None
    layout = state.layout
    shards, num_devices = (1, 1) if layout is None else (layout.shards, layout.batch_shards)
    pool_rows = vocabulary.geometry.lines * shards
    # Estimates are halved every window R / N steps, with R rows in the pool and N positions in a
    # batch. policy.is_time_to_halve does the same for cache lines.
    rules = state.spec.vocabulary
    assert rules is not None
    period = min(max(1, int(rules.window) * pool_rows // (num * num_devices)), 2**32 - 1)
    step = state.step.astype(jnp.uint32)
    must_halve = (step != 0) & (step % jnp.uint32(period) == 0)
    how = must_halve, rules_of(state)
    if layout is None:
        vocabulary, admitted = ops.admit(
            vocabulary, pairs, step, *how, cache=state.cache, implementation=state.implementation
        )
    else:
        layout.check_bound("prefetch")
        vocabulary, admitted = raw_ids.admit(
            layout, vocabulary, pairs, step, *how, state.implementation
        )
    state = dataclasses.replace(state, vocabulary=vocabulary)
    state = _settled(state, admitted)
    shapes = [leaf.shape[:-1] for leaf in leaves]
    rows = treedef.unflatten(row_ids.divided(admitted.rows, shapes))
    return state, rows, admitted.dealt


def count(state: EmbeddingState, pairs: jax.Array, occurrences: jax.Array) -> EmbeddingState:
    """Counts ids as if they had occurred, and gives rows to those that earn them.

    Args:
      state: a state with a vocabulary.
      pairs: uint32 [N, 2], N > 0.
      occurrences: int32 [N], how often each id occurred.

    Returns:
      The state. No request is counted.
    """
    vocabulary = state.vocabulary
    assert vocabulary is not None
    vocabulary, admitted = ops.admit(
        vocabulary,
        pairs,
        state.step.astype(jnp.uint32),
        jnp.bool_(False),
        rules_of(state),
        occurrences,
        cache=None,
        implementation=state.implementation,
    )
    # No plan names the rows that start again.
    counters = count_change(state.counters, admitted.num_started > 0)
    state = dataclasses.replace(state, vocabulary=vocabulary, counters=counters)
    # `stats` judges a pool by what its requests did, and these are none.
    counted = ("num_requests", "num_shared", "num_recycled", "num_refused")
    return _settled(state, admitted._replace(**dict.fromkeys(counted, jnp.int32(0))))


def rules_of(state: EmbeddingState) -> ops.Admission:
    """Returns the rules by which a state admits."""
    rules = state.spec.vocabulary
    assert rules is not None
    # A row without an owner has the values of tables without a bound.
    starts_all = any(table.initial_bound is not None for table in state.spec.tables)
    return ops.Admission(rules.admit_after, rules.recycle, rules.shared_rows, starts_all)


def _settled(state: EmbeddingState, admitted: ops.Admitted) -> EmbeddingState:
    """Adds an admission to the counters, and starts rows of new owners again."""
    vocabulary = state.vocabulary
    assert vocabulary is not None
    amounts = [
        admitted.num_requests,
        admitted.num_shared,
        admitted.num_admitted,
        devices.total(state, admitted.num_recycled),
        admitted.num_refused,
    ]
    vocabulary = dataclasses.replace(vocabulary, counters=add(vocabulary.counters, amounts))
    state = dataclasses.replace(state, vocabulary=vocabulary)
    return start_again(state, admitted.started, admitted.num_started, admitted.tables)


def rows_of(state: EmbeddingState, ids: Any) -> Any:
    """Returns the row (int32 [..]) of each raw id: its own, or the one that it shares.

    Nothing is admitted. Like `read`, this function can be called inside jax.shard_map and outside.

    Args:
      state: a state with a vocabulary.
      ids: nest of pairs uint32 [.., 2]; see spec.raw_ids.

    Raises:
      TypeError: if ids are not pairs.
    """
    vocabulary = state.vocabulary
    rules = state.spec.vocabulary
    assert vocabulary is not None and rules is not None
    leaves, treedef = checked(ids)
    pairs = row_ids.joined(leaves, (2,), jnp.uint32)
    layout = state.layout
    per_table = rules.shared_rows

    def of_shards(state: EmbeddingState, pairs: jax.Array) -> jax.Array:
        assert layout is not None and state.vocabulary is not None
        return raw_ids.locate(layout, state.vocabulary, pairs, per_table, state.implementation)

    if layout is None:
        rows = pool.locate(vocabulary, pairs, per_table)
    else:
        rows = over_batch(of_shards, state, pairs, np.uint32(PADDING))
    return treedef.unflatten(row_ids.divided(rows, [leaf.shape[:-1] for leaf in leaves]))


def checked(ids: Any) -> tuple[list[jax.Array], Any]:
    """Returns the leaves of a nest of raw ids, and its structure.

    Raises:
      TypeError: if a leaf is not uint32 [.., 2].
    """
    leaves, treedef = jax.tree.flatten(ids)
    for leaf in leaves:
        shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
        if dtype != jnp.uint32 or shape[-1:] != (2,):
            what = type(leaf).__name__ if dtype is None else f"{dtype} {list(shape)}"
            raise TypeError(
                f"this stack has a vocabulary, so ids must be pairs uint32 [.., 2], got {what}; "
                "hash raw ids with spec.raw_ids"
            )
    # A masked pair is padding.
    plain = [hashes.unmasked(p) if isinstance(p, np.ma.MaskedArray) else p for p in leaves]
    return [jnp.asarray(leaf) for leaf in plain], treedef


def start_again(
    state: EmbeddingState, rows: jax.Array, num_rows: jax.Array, tables: jax.Array | None = None
) -> EmbeddingState:
    """Gives rows their initial values and fresh optimizer state, and takes them out of the cache.

    Args:
      state: consumed if donated.
      rows: int32 [n], distinct; the first num_rows are rows, the others NO_ID.
      num_rows: int32 scalar.
      tables: int32 [n], the tables of the rows' owners. None: the rows start as those without an
        owner.

    Returns:
      The state.
    """
    vocabulary = state.vocabulary
    assert vocabulary is not None
    of_pool, *of_tables = initial_bounds(state.spec.row_tables)
    if tables is None:
        bounds = jnp.full(rows.shape, of_pool, jnp.float32)
    else:
        bounds = indexing.take(jnp.asarray(of_tables, jnp.float32), tables)
    new = ops.start_again(
        ops.Rows(state.table, state.row_state, state.cache),
        vocabulary.fresh_row_state,
        rows,
        num_rows,
        key=state.row_key,
        bounds=bounds,
        implementation=state.implementation,
    )
    return dataclasses.replace(state, **new._asdict())
