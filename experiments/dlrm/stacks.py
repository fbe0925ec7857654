"""A source's tables as one or two stacks of mpembed_jax.

This file makes their specs, their ids, and the vectors that a model sees. Usually one stack holds
everything. A contender may keep its smallest tables in FP32; they are then a second stack, and the
model sees its vectors in the same order as before.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments.data.hashing import fmix32

if TYPE_CHECKING:
    from experiments.dlrm.training import Contender, Recipe


def table_sizes(tables: dict[str, int], share: float) -> dict[str, int]:
    """Caps the tables at one size, so that all together have `share` of the rows.

    DLRM calls this size max-ind-range.
    """
    low, high = 1, max(tables.values())
    while low < high:
        cap = (low + high + 1) // 2
        fits = sum(min(size, cap) for size in tables.values()) <= share * sum(tables.values())
        low, high = (cap, high) if fits else (low, cap - 1)
    return {name: min(size, low) for name, size in tables.items()}


def smallest(tables: dict[str, int], share: float) -> set[str]:
    """Returns the names of the smallest tables that together have at most `share` of all rows."""
    room, names = share * sum(tables.values()), set()
    for name, size in sorted(tables.items(), key=lambda item: item[1]):
        room -= size
        if room < 0:
            break
        names.add(name)
    return names


def make_specs(
    source: Any, contender: "Contender", recipe: "Recipe"
) -> tuple[mpembed.EmbeddingSpec, ...]:
    """Returns the source's tables as the contender stores them.

    There is one stack, or a second one of the smallest tables. The cache's fraction is of the first
    stack's rows.
    """
    fraction = contender.cache_fraction
    sizes = table_sizes(source.tables, contender.hashed_to)
    kept = smallest(sizes, contender.float32_share)
    rows = mpembed.RowFormat(contender.storage, contender.symmetric, rounding=contender.rounding)
    cache = (
        mpembed.CacheSpec(fraction, ways=contender.ways, policy=contender.policy)
        if fraction
        else None
    )
    if contender.pool_rows:
        vocabulary = mpembed.VocabularySpec(
            contender.pool_rows, admit_after=contender.admit_after, ways=contender.ways,
            recycle=contender.recycle, shared_rows=contender.shared_rows,
            sketch_bytes=contender.sketch_bytes, window=contender.window,
        )  # fmt: skip
        bounds = {n: 1 / np.sqrt(v) for n, v in source.tables.items()} if contender.by_table else {}
        tables = tuple(
            mpembed.TableSpec(name, initial_bound=bounds.get(name)) for name in source.tables
        )
        raw = mpembed.EmbeddingSpec(
            tables, recipe.embedding_dim, storage=rows, cache=cache,
            max_unique_ids=recipe.max_unique_ids, vocabulary=vocabulary,
        )  # fmt: skip
        return (raw,)
    stacks = [({n: v for n, v in sizes.items() if n not in kept}, rows, cache)]
    stacks.append(
        ({n: v for n, v in sizes.items() if n in kept}, mpembed.RowFormat("float32"), None)
    )
    return tuple(
        mpembed.EmbeddingSpec(
            tables=tuple(mpembed.TableSpec(name, size) for name, size in tables.items()),
            embedding_dim=recipe.embedding_dim, storage=storage, cache=lines,
            max_unique_ids=recipe.max_unique_ids,
        )
        for tables, storage, lines in stacks if tables
    )  # fmt: skip


def init(
    key: jax.Array,
    source: Any,
    specs: Sequence[mpembed.EmbeddingSpec],
    tx: optax.GradientTransformation,
) -> tuple[mpembed.EmbeddingState, ...]:
    """Makes one state per stack.

    The initial value of a row does not depend on how the tables are divided over stacks.
    """
    if len(specs) == 1:
        return (mpembed.init(key, specs[0], tx),)
    # Initial values are drawn by the row's number in its stack: draw them in one FP32 stack of all
    # tables.
    by_name = {table.name: table for spec in specs for table in spec.tables}
    tables = tuple(by_name[name] for name in source.tables)
    dense = mpembed.to_dense(
        mpembed.init(
            key, mpembed.EmbeddingSpec(tables, specs[0].embedding_dim, "float32", None), tx
        )
    )
    return tuple(
        mpembed.from_dense(key, spec, tx, {t.name: dense[t.name] for t in spec.tables})
        for spec in specs
    )


def global_ids(batch: dict, tables: dict[str, int], spec: mpembed.EmbeddingSpec) -> Any:
    """Maps a batch's ids (i32 [B, T] or {feature: i32 [..]}) to rows of a stack.

    Ids are hashed where the stack's tables are smaller. Words (u32 [B, T]) always are.

    Args:
      batch: of a source; has the ids of all tables.
      tables: the source's sizes; their order is that of the columns of [B, T].
      spec: of a stack of some of these tables.

    Returns:
      i32 [B, T of the stack] or {feature of the stack: i32 [..]}. For a stack with a vocabulary,
      pairs: u32 [.., 2] instead of i32 [..]. They are those of the batch, if it has some.
    """
    ids = batch["ids"]
    if spec.vocabulary is not None:
        if "pairs" in batch:
            return batch["pairs"]
        if not isinstance(ids, dict) and ids.dtype == jnp.uint32:
            return spec.raw_ids(ids)  # the number of the padding is a word like any other
        return spec.raw_ids(ids, jax.tree.map(lambda leaf: leaf != mpembed.NO_ID, ids))
    names = [t.name for t in spec.tables]
    full = np.array([tables[name] for name in names], np.int64)
    size = np.array([t.vocabulary_size for t in spec.tables], np.int32)

    def shrink(ids: jax.Array, full: Any, size: Any) -> jax.Array:
        hashed = (fmix32(ids.astype(jnp.uint32)) % size.astype(np.uint32)).astype(jnp.int32)
        if ids.dtype == jnp.uint32:
            return hashed
        return jnp.where((size < full) & (ids != mpembed.NO_ID), hashed, ids)

    if isinstance(ids, dict):
        return spec.global_ids(
            {name: shrink(ids[name], full[at], size[at]) for at, name in enumerate(names)}
        )
    if len(names) < len(tables):
        at = {name: number for number, name in enumerate(tables)}
        ids = ids[:, np.array([at[name] for name in names])]
    return spec.global_ids(shrink(ids, full, size))


def _axis(ids: jax.Array) -> int:
    """Returns the last axis of ids. Pairs, u32 [.., 2], have the axis of their words behind it."""
    return -2 if ids.dtype == jnp.uint32 else -1


def _split(ids: Any, bags: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Separates features with one id, as one [B, T] array or none, from bags [B, L].

    Dicts are taken in sorted order. Ids may be pairs.
    """
    if not isinstance(ids, dict):
        return [ids], []
    singles = [ids[name] for name in sorted(ids) if name not in bags]
    return [jnp.stack(singles, axis=_axis(singles[0]))] if singles else [], [
        ids[name] for name in sorted(bags) if name in ids
    ]


def pooled(rows: jax.Array, inverse: Any, bags: Sequence[str], implementation: str) -> jax.Array:
    """Returns the vectors f32 [B, T of the stack, D] of unique rows, with bags averaged.

    The features are in the order of `merged`.
    """
    singles, bagged = _split(inverse, bags)
    parts = [mpembed.pool(rows, ids, implementation=implementation) for ids in singles]
    if bagged:
        parts.append(
            jnp.stack(mpembed.pool(rows, bagged, combiner="mean", implementation=implementation), 1)
        )
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def embed(
    state: mpembed.EmbeddingState,
    ids: Any,
    bags: Sequence[str],
    tx: optax.GradientTransformation,
) -> tuple[mpembed.EmbeddingState, Any, list[jax.Array]]:
    """Runs mpembed.embed for the features of a stack, with bags averaged.

    Returns:
      The state, the plan, and the vectors for `joined`.
    """
    singles, bagged = _split(ids, bags)
    if not bagged:
        return mpembed.embed(state, singles, tx=tx)
    # A feature with one id is a bag of one id.
    singles = [jnp.expand_dims(s, _axis(s)) for s in singles]
    return mpembed.embed(state, singles + bagged, combiner="mean", tx=tx)


def joined(vectors: list[jax.Array]) -> jax.Array:
    """Returns the vectors of `embed` as `pooled` does, f32 [B, T of the stack, D]."""
    parts = [v if v.ndim == 3 else v[:, None] for v in vectors]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def read(rows_of: Callable[[jax.Array], jax.Array], ids: Any, bags: Sequence[str]) -> jax.Array:
    """Returns the same vectors from a function that reads the rows f32 [.., D] of global ids."""
    singles, bagged = _split(ids, bags)
    parts = [rows_of(ids) for ids in singles]
    for ids in bagged:
        num_ids = jnp.maximum(jnp.sum(ids != mpembed.NO_ID, axis=-1), 1).astype(jnp.float32)
        parts.append((jnp.sum(rows_of(ids), axis=1) / num_ids[:, None])[:, None])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def read_raw(emb: mpembed.EmbeddingState, batch: dict, bags: Sequence[str]) -> jax.Array:
    """Returns the same vectors of a batch from a stack of all tables with a vocabulary."""
    ids = batch["ids"]
    vectors = mpembed.read(emb, global_ids(batch, {}, emb.spec))
    if not isinstance(ids, dict):
        return vectors
    parts = [vectors[name] for name in sorted(ids) if name not in bags]
    for name in sorted(bags):
        num_ids = jnp.maximum(jnp.sum(ids[name] != mpembed.NO_ID, axis=-1), 1)
        parts.append(jnp.sum(vectors[name], axis=1) / num_ids.astype(jnp.float32)[:, None])
    return jnp.stack(parts, axis=1)


def merged(
    parts: Sequence[jax.Array], states: Sequence[mpembed.EmbeddingState], source: Any, is_dict: bool
) -> jax.Array:
    """Joins the vectors of all stacks to f32 [B, T, D].

    The order is that of a single stack.
    """
    if len(parts) == 1:
        return parts[0]

    def order(names: Sequence[str]) -> list[str]:
        if not is_dict:
            return list(names)
        return sorted(set(names) - set(source.bags)) + sorted(set(names) & set(source.bags))

    by_name = {}
    for part, state in zip(parts, states, strict=True):
        by_name |= {
            name: part[:, at] for at, name in enumerate(order([t.name for t in state.spec.tables]))
        }
    return jnp.stack([by_name[name] for name in order(list(source.tables))], axis=1)
