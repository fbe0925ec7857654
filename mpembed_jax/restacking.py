"""Moves a state to a spec with larger, more, fewer or renamed tables.

The ids of these tables are row numbers. `vocabularies` is for tables of raw ids.
"""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import sharding
from mpembed_jax.arrays import indexing
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.embedding import arguments
from mpembed_jax.embedding.counters import count_change
from mpembed_jax.embedding.lines import Lines, write_back
from mpembed_jax.embedding.state import EmbeddingState, init
from mpembed_jax.optim import row_state
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec

_BLOCK = 65536  # rows copied at once


def restack(
    state: EmbeddingState,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    *,
    renamed: Mapping[str, str] | None = None,
    removed: Collection[str] = (),
) -> EmbeddingState:
    """Moves a state to a stack with larger, more, fewer or renamed tables.

    A table keeps the rows, cache lines and optimizer state of the old table of its name (see
    `renamed`). All other rows are as init makes them. The counts of `stats`, the step and the key
    stay as they are. Lines of removed tables are dropped.

    Lines and sketch stay where they are if two conditions hold: sizes and policy of the cache stay
    the same, and each kept table begins at the same row of the stack. A cache given by
    CacheSpec(num_rows=..) has the same sizes in stacks of any size.

    Otherwise, each line moves to the set of its new id. The most used lines move first. The sketch
    starts empty. A dirty line that finds no room is written back to the table, rounded as by flush.
    If the policy changes, or the new spec has no cache, all dirty lines are written back.

    Args:
      state: concrete and between steps; not consumed. A state over a mesh is brought to one device,
        moved there, and brought back (see sharding.relayout).
      spec: the spec of the new state. It has the dim, storage and row_state_dtype of the old one.
      tx: the transformation given to init.
      renamed: {new name: old name} of tables; other tables keep their names.
      removed: names of the old tables that the new spec leaves out.

    Returns:
      The new state, on the same device or mesh.

    Raises:
      TypeError: if state is not an EmbeddingState.
      KeyError: if a name in `renamed` or `removed` is unknown.
      ValueError: if an old table is neither in the new spec nor in `removed`, or is in both; if two
        tables take the rows of one; if a table would lose rows; if dim, storage or row_state_dtype
        differs; if a table of n-grams would get another hash, size or name; if a stack has a
        vocabulary; if a prefetch waits for its update; if tx differs from init's; if the state was
        donated, made for another spec, or averaged; if it was made inside jax.pmap, or several
        processes hold parts of it.
    """
    arguments.check_state("restack(state, spec, tx)", state)
    state.check_spec()
    if bool(jax.device_get(state.pending)):
        raise ValueError(
            "restack was called between prefetch and apply_gradients; call it between steps"
        )
    if state.vocabulary is not None or spec.vocabulary is not None:
        raise ValueError(
            "restack needs stacks without a vocabulary; use vocabularies.grow, shrink or "
            "add_tables for a stack with a vocabulary"
        )
    kept = _kept(state.spec, spec, dict(renamed or {}), removed)
    return sharding.on_one_device(
        "restack(state, spec, tx)", state, lambda state: _restacked(state, spec, tx, kept)
    )


def _kept(
    old: EmbeddingSpec, new: EmbeddingSpec, renamed: dict[str, str], removed: Collection[str]
) -> list[tuple[int, int, int]]:
    """Returns (first old row, first new row, number of old rows) of each table that is kept.

    Raises:
      KeyError: see restack.
      ValueError: see restack.
    """
    for field in ("embedding_dim", "storage", "row_state_dtype"):
        ours, theirs = getattr(old, field), getattr(new, field)
        if ours != theirs:
            raise ValueError(
                f"restack cannot change {field} from {ours} to {theirs}; use to_dense and "
                "from_dense for that"
            )
    held, wanted = (of.ngrams and of.ngrams.settings for of in (old, new))
    if held != wanted:
        raise ValueError(
            f"restack cannot give n-grams the hash {wanted} instead of {held}; they have other "
            "rows in another hash"
        )
    names, new_names = ([t.name for t in of.tables] for of in (old, new))
    for to, name in renamed.items():
        if to not in new_names or name not in names:
            raise KeyError(
                f"renamed={{{to!r}: {name!r}}} must map a table of {new_names} to one of {names}"
            )
    if new.ngrams is not None and any(to != name for to, name in renamed.items()):
        raise ValueError(f"restack cannot rename tables of n-grams, got renamed={renamed}")
    source = {to: renamed.get(to, to) for to in new_names}
    taken = [name for name in source.values() if name in names]
    if len(set(taken)) != len(taken):
        raise ValueError(f"two tables of {new_names} would take the rows of one of {names}")
    if unknown := [name for name in removed if name not in names]:
        raise KeyError(f"removed={unknown} names unknown tables; the old tables are {names}")
    if lost := [name for name in names if (name in taken) == (name in removed)]:
        raise ValueError(
            f"each of the old tables {names} must be in the new spec {new_names} or in "
            f"removed=[..], not in both; {lost} break this rule (renamed={{new: old}} gives an old "
            "table a new name)"
        )
    kept = []
    for to, name in source.items():
        if name not in names:
            continue
        (first, size), (begin, room) = old.table_range(name), new.table_range(to)
        if room != size and new.ngrams is not None:
            raise ValueError(
                f"table {name!r} of an n-gram memory has {size} rows, the new table {to!r} has "
                f"{room}; n-grams have other rows in a table of another size"
            )
        if room < size:
            raise ValueError(
                f"table {to!r} would lose rows: {name!r} has {size} rows, the new table has {room}"
            )
        kept.append((first, begin, size))
    return kept


def _restacked(
    state: EmbeddingState,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    kept: list[tuple[int, int, int]],
) -> EmbeddingState:
    (device,) = state.key.devices()
    with jax.default_device(device):
        new = init(state.key, spec, tx, implementation=state.implementation)
    treedef: Any
    old_leaves, old_def = jax.tree.flatten(state.row_state)
    leaves, treedef = jax.tree.flatten(new.row_state)
    before, after = ([(a.dtype, a.shape[1:], a.ndim) for a in x] for x in (old_leaves, leaves))
    if (old_def, before) != (treedef, after):
        raise row_state.mismatch(state.row_state, treedef)
    rows = _copied(new.table.rows, state.table.rows, kept)
    leaves = [
        _copied(array, old, kept) if array.ndim else jnp.copy(old)
        for array, old in zip(leaves, old_leaves, strict=True)
    ]
    same = {name: getattr(state, name) for name in ("key", "step", "clock")}
    new = dataclasses.replace(
        new,
        table=dataclasses.replace(new.table, rows=rows),
        row_state=treedef.unflatten(leaves),
        counters=count_change(state.counters),
        **jax.tree.map(jnp.copy, same),
    )
    return new if state.cache is None else _with_lines(new, state, state.cache, kept)


def _copied(array: jax.Array, source: jax.Array, kept: list[tuple[int, int, int]]) -> jax.Array:
    """Returns `array` [V, ..], which is consumed, with the kept rows of `source` copied into it."""
    for first, begin, size in kept:
        block = min(_BLOCK, size)
        for offset in range(0, size, block):
            offset = min(offset, size - block)
            places = np.int32(first + offset), np.int32(begin + offset)
            array = _copy_block(array, source, *places, size=block)
    return array


@partial(jax.jit, static_argnames="size", donate_argnames="array")
def _copy_block(
    array: jax.Array, source: jax.Array, first: jax.Array, begin: jax.Array, *, size: int
) -> jax.Array:
    ids = first + jnp.arange(size, dtype=jnp.int32)
    return indexing.put_block(array, begin, indexing.take(source, ids))


def _with_lines(
    new: EmbeddingState,
    state: EmbeddingState,
    old: CacheState,
    kept: list[tuple[int, int, int]],
) -> EmbeddingState:
    """Returns the new state, which is consumed, with the lines of the old cache put into it."""
    tags, priority, dirty = (
        np.asarray(jax.device_get(a)) for a in (old.tags, old.priority, old.dirty)
    )
    ids = np.full_like(tags, NO_ID)
    for first, begin, size in kept:
        ids = np.where((tags >= first) & (tags < first + size), tags - first + begin, ids)
    cache = new.cache
    is_same = cache is not None and (cache.geometry, cache.policy) == (old.geometry, old.policy)
    if cache is not None and is_same and all(first == begin for first, begin, _ in kept):
        is_line = ids != NO_ID
        return dataclasses.replace(
            new,
            cache=dataclasses.replace(
                cache,
                tags=jnp.asarray(ids),
                priority=jnp.asarray(np.where(is_line, priority, 0)),
                dirty=jnp.asarray(dirty & is_line),
                rows=jnp.copy(old.rows),
                sketch=jax.tree.map(jnp.copy, old.sketch),
            ),
        )
    held = ids.reshape(-1) != NO_ID
    rows, to = tags.reshape(-1)[held], ids.reshape(-1)[held]
    lines = Lines(old, cache)
    lines.place(rows, to[:, None])
    cache, homeless = lines.moved(rows, to)
    table = write_back(new.table, old.rows, homeless, new.key, new.step)
    return dataclasses.replace(new, table=table, cache=cache)
