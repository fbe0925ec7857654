"""Routing of a user's features to stacks of tables, and of their vectors back to the same nesting.

This module does not use flax. Ids are a mapping {feature: ids [.., L]}, or one array [.., T] with a
column per feature, in the order of the stacks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import row_ids
from mpembed_jax.embedding.pooling import COMBINERS, pool
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, TablesOfIds
from mpembed_jax.vocabulary import hashes

Combiners = tuple[tuple[str, str | None], ...]


class Part(NamedTuple):
    """The contribution of one stack to a call of a module."""

    rows: jax.Array  # f32 [U, D] for each device; in evaluation f32 [N + 1, D]
    inverse: Any  # i32 [..], in the nesting of the stack's ids: the index of each id's row in rows
    pool: Callable = pool  # pooling.pool, or the same function over a mesh


class Own(NamedTuple):
    """An array of ids as the user passed it, and the table to which the ids belong."""

    table: str
    ids: Any


class Vectors(NamedTuple):
    """The contribution of one stack to a call of a module, if its step is fused."""

    vectors: Any  # f32 [.., D] in the nesting of the stack's ids


def as_specs(specs: EmbeddingSpec | Sequence[EmbeddingSpec]) -> tuple[EmbeddingSpec, ...]:
    """Returns specs as a tuple.

    Raises:
      TypeError: if they are not EmbeddingSpecs.
      ValueError: if there are none, or if two stacks have a feature of the same name.
    """
    result = (specs,) if isinstance(specs, EmbeddingSpec) else tuple(specs)
    if not all(isinstance(s, EmbeddingSpec) for s in result):
        raise TypeError(f"specs must be one EmbeddingSpec or several, got {specs!r}")
    if not result:
        raise ValueError("specs must be one EmbeddingSpec or several, got none")
    names = [f for s in result for f, _ in s.feature_tables]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(
            f"features {repeated} are in several specs; give each feature one stack "
            "(EmbeddingSpec(features=..))"
        )
    return result


def as_transformations(
    tx: Any, specs: tuple[EmbeddingSpec, ...]
) -> tuple[optax.GradientTransformation, ...]:
    """Returns one row optimizer per spec.

    Raises:
      ValueError: if tx is a sequence whose length differs from that of specs.
    """
    # An optax transformation is itself a tuple, so it is recognized by its update.
    if callable(getattr(tx, "update", None)) or not isinstance(tx, Sequence):
        return (tx,) * len(specs)
    if len(tx) != len(specs):
        raise ValueError(
            f"tx must be one transformation or one per spec, got {len(tx)} for {len(specs)} specs"
        )
    return tuple(tx)


def as_combiners(combiner: Any, specs: tuple[EmbeddingSpec, ...]) -> Combiners:
    """Returns one (feature, combiner) pair for each feature.

    Raises:
      ValueError: if a combiner is unknown, or if a mapping does not name exactly the features.
    """
    features = [f for s in specs for f, _ in s.feature_tables]
    chosen = dict(combiner) if isinstance(combiner, Mapping) else dict.fromkeys(features, combiner)
    if set(chosen) != set(features):
        raise ValueError(f"combiner must name exactly the features {features}, got {list(chosen)}")
    for feature, name in chosen.items():
        if name is not None and name not in COMBINERS:
            raise ValueError(
                f"combiner of feature {feature!r} must be one of {', '.join(COMBINERS)} or None, "
                f"got {name!r}"
            )
    return tuple((f, chosen[f]) for f in features)


def as_arrays(ids: Any) -> Any:
    """Returns a list or tuple of integers, nested or not, as a NumPy array.

    Everything else, and an empty list or tuple, is returned as it is.

    Raises:
      ValueError: if lists have different lengths.
    """
    if not isinstance(ids, list | tuple) or not ids:
        return ids
    leaves = jax.tree.leaves(ids)
    if not all(isinstance(leaf, int | np.integer) for leaf in leaves):
        return ids
    try:
        return np.asarray(ids)
    except ValueError:
        raise ValueError(
            "ids are lists of different lengths; pad them with NO_ID to one length"
        ) from None


def table_ids(spec: EmbeddingSpec, ids: Any) -> Any:
    """Maps any nest of a single table's ids to global ids, and checks them against its size."""
    ids = as_arrays(ids)
    ((feature, _),) = spec.feature_tables
    return jax.tree.map(lambda leaf: mapped(spec, {feature: leaf})[feature], ids)


def mapped(spec: EmbeddingSpec, ids: Any) -> Any:
    """Maps a user's ids to global ids or, in a stack with a vocabulary, to pairs of raw ids.

    uint32 ids of a stack with a vocabulary are pairs [.., 2] already.
    """
    if spec.vocabulary is None:
        return spec.global_ids(ids)
    if not isinstance(ids, Mapping):
        return spec.raw_ids(ids)
    return row_ids.in_mapping_of(ids, {f: _pairs_of(spec, f, v) for f, v in ids.items()})


def _pairs_of(spec: EmbeddingSpec, feature: str, ids: Any) -> Any:
    table = dict(spec.feature_tables)[feature]
    number = [t.name for t in spec.tables].index(table)
    return hashes.pairs_of(feature, ids, table, number)


def _route_pairs(specs: tuple[EmbeddingSpec, ...], array: Any, names: list[str]) -> list[Any]:
    """Splits pairs (uint32 [.., T, 2]) into one part per stack, after the checks of `_pairs_of`."""
    if any(s.vocabulary is None for s in specs) or array.shape[-2:] != (len(names), 2):
        raise TypeError(
            f"uint32 array ids must be the pairs [.., {len(names)}, 2] that raw_ids() returns, of "
            f"stacks that all have a vocabulary, got {list(array.shape)}; cast other ids to int64"
        )
    pairs = array if isinstance(array, jax.Array) else hashes.unmasked(array)
    parts = [pairs[..., columns, :] for columns in _columns(specs)]
    xp: Any = jnp if isinstance(array, jax.Array) else np
    return [
        xp.stack(
            [_pairs_of(s, f, part[..., n, :]) for n, (f, _) in enumerate(s.feature_tables)], -2
        )
        for s, part in zip(specs, parts, strict=True)
    ]


def _check_widths(specs: tuple[EmbeddingSpec, ...]) -> None:
    widths = [s.embedding_dim for s in specs]
    if len(set(widths)) > 1:
        raise ValueError(
            f"array ids need one embedding_dim for all features, but the specs have {widths}; "
            "pass a dict of features"
        )


def _columns(specs: tuple[EmbeddingSpec, ...]) -> list[slice]:
    """Returns the columns of each stack in an array with one column per feature."""
    ends = np.cumsum([len(s.feature_tables) for s in specs])
    return [slice(e - len(s.feature_tables), e) for s, e in zip(specs, ends, strict=True)]


def route(specs: tuple[EmbeddingSpec, ...], ids: Any) -> list[Any]:
    """Divides a user's ids among the stacks and maps each part for its stack; see `mapped`.

    The user's ids are local to their tables, or raw ids.

    Args:
      specs: the stacks.
      ids: {feature: ids [..]} of some or all features, or integers [.., T]. For stacks with a
        vocabulary, pairs are possible: uint32 [.., 2] instead of [..].

    Returns:
      For each stack a dict {feature: int32 [..]}, or int32 [.., T of the stack]. For a stack with
      a vocabulary, pairs: uint32 [.., 2] instead of int32 [..].

    Raises:
      KeyError: if a feature is unknown.
      TypeError: if ids of a stack with a vocabulary are uint32, but not pairs. Also as
        EmbeddingSpec.global_ids and raw_ids.
      ValueError: if array ids have another number of columns, or are of stacks of several widths.
        Also if concrete pairs are of another table, or as global_ids and raw_ids.
    """
    if isinstance(ids, Mapping):
        known = {f for s in specs for f, _ in s.feature_tables}
        unknown = [f for f in ids if f not in known]
        if unknown:
            raise KeyError(f"unknown features {unknown}; the specs have {sorted(known)}")
        return [mapped(s, {f: ids[f] for f, _ in s.feature_tables if f in ids}) for s in specs]
    has_raw_ids = any(s.vocabulary is not None for s in specs)
    as_array = hashes.as_array if has_raw_ids else row_ids.on_host
    # A masked array stays one, until `mapped` knows what padding is.
    array = ids if isinstance(ids, jax.Array | np.ndarray) else as_array(ids)
    names = [f for s in specs for f, _ in s.feature_tables]
    if array.dtype == np.uint32 and has_raw_ids:
        _check_widths(specs)
        return _route_pairs(specs, array, names)
    if array.ndim < 1 or array.shape[-1] != len(names):
        raise ValueError(
            f"array ids must be [.., {len(names)}], one column per feature {names}, got "
            f"{list(array.shape)}; for bags pass a dict of features"
        )
    _check_widths(specs)
    return [mapped(s, array[..., c]) for s, c in zip(specs, _columns(specs), strict=True)]


def given(specs: tuple[EmbeddingSpec, ...], ids: Any) -> list[Any]:
    """Returns the user's own arrays, nested like the result of `route`.

    The arguments are those of `route`, which checks them. This function checks nothing. Each stack
    gets an array [.., T] as a whole, and not only its own columns. The same array may be passed for
    features of different tables. Each array of a mapping is therefore an Own, which names its
    table.
    """
    if isinstance(ids, Mapping):
        return [{f: Own(t, ids[f]) for f, t in s.feature_tables if f in ids} for s in specs]
    return [ids] * len(specs)


def tables_of(spec: EmbeddingSpec, ids: Any, by_feature: bool) -> TablesOfIds | None:
    """Returns the tables of global ids, for prefetch_of_tables.

    Args:
      spec: the spec of the stack; its global_ids made the ids.
      ids: {feature: int32 [..]}, or a nest of int32 [.., T]. For a spec with one feature, any nest
        of int32 [..].
      by_feature: whether the keys of a mapping are features.
    """
    if spec.num_rows >= NO_ID or spec.vocabulary is not None:
        return None
    if not by_feature or not isinstance(ids, Mapping):
        return (tuple(table for _, table in spec.feature_tables),) * len(jax.tree.leaves(ids))
    of_feature = dict(spec.feature_tables)
    paths = jax.tree_util.tree_flatten_with_path(ids)[0]
    keys: list[Any] = [getattr(path[0], "key", None) if path else None for path, _ in paths]
    if not all(key in of_feature for key in keys):
        return None  # a mapping that jax does not flatten by its keys
    return tuple((of_feature[key],) for key in keys)


def fusible(combiners: Combiners, ids: Any) -> tuple[Any, str | None] | None:
    """Returns the ids of a stack with the one combiner that makes all their vectors.

    Args:
      combiners: see as_combiners.
      ids: the ids of the stack, as `route` returned them.

    Returns:
      The nest of ids and its combiner. None if bags of several ids have different combiners, or if
      ids have no bag axis. If a feature has bags of several ids, each feature without a combiner
      gets a bag axis of length 1. If all bags have one id, the bag axes are removed, and the
      combiner is None.
    """
    if not isinstance(ids, Mapping):
        return ids, None
    by_feature = {feature: name for feature, name in combiners if feature in ids}
    bags = {f for f, name in by_feature.items() if name is not None}
    if any(np.ndim(ids[f]) < 2 for f in bags):
        return None
    several = {by_feature[f] for f in bags if ids[f].shape[-1] != 1}
    if len(several) > 1:
        return None
    if several:
        nest = {f: index if f in bags else index[..., None] for f, index in ids.items()}
        return nest, several.pop()
    return {f: index[..., 0] if f in bags else index for f, index in ids.items()}, None


def check_no_weights(weights: Any) -> None:
    """Checks that a call of a fused step has no weights.

    Raises:
      ValueError: if there are weights.
    """
    if weights is not None:
        raise ValueError(
            "a call of a module with fused=True takes no weights, because prefetch made its "
            "vectors; leave them out, or make the module with fused=False"
        )


def _as_float(weights: Any) -> jax.Array:
    return jnp.asarray(weights).astype(jnp.float32)


def _bags(
    part: Part | Vectors, combiners: dict[str, str | None], weights: Mapping[str, Any]
) -> dict[str, jax.Array]:
    if isinstance(part, Vectors):
        return dict(part.vectors)
    rows, inverse, pool = part
    # The features in `single` are pooled in one call: one gather, one array of gradients.
    single = {}
    bags = {}
    for feature, index in inverse.items():
        combiner = combiners[feature]
        weight = weights.get(feature)
        if combiner is None:
            if weight is not None:
                raise ValueError(
                    f"weights of feature {feature!r} need a combiner, but its combiner is None; "
                    "leave the weights out"
                )
            single[feature] = index
        elif index.ndim < 2:
            raise ValueError(
                f"feature {feature!r} has ids {list(index.shape)}, but combiner {combiner!r} "
                "reduces the last axis of [.., L], the bag; pass ids[..., None] for bags of one "
                f"id, or combiner={{{feature!r}: None, ..}}"
            )
        elif index.shape[-1] == 1 and weight is None:
            single[feature] = index[..., 0]
        else:
            bags[feature] = index
    vectors = pool(rows, single)
    for feature, index in bags.items():
        weight = weights.get(feature)
        vectors[feature] = pool(
            rows, index, None if weight is None else _as_float(weight), combiners[feature]
        )
    return vectors


def combine(
    specs: tuple[EmbeddingSpec, ...],
    combiners: Combiners,
    parts: Sequence[Part | Vectors],
    ids: Any,
    weights: Any,
    dtype: Any,
) -> Any:
    """Pools each stack's rows and returns the vectors in the nesting of ids.

    Args:
      specs: the stacks.
      combiners: see as_combiners.
      parts: each stack's Part, whose inverse has the nesting that `route` returned, or its Vectors.
      ids: the ids that the user passed.
      weights: None, or factors in the nesting and shapes of ids; a mapping may leave features out.
      dtype: dtype of the result.

    Returns:
      {feature: [.., D]}, reduced over the last axis of ids if there is a combiner; or [.., T, D]
      for array ids.

    Raises:
      TypeError: if weights have another nesting.
      KeyError: if weights name a feature that ids do not name.
      ValueError: if weights have another shape, if there are weights without a combiner, or if ids
        have no bag axis.
    """
    by_feature = dict(combiners)
    if isinstance(ids, Mapping):
        if weights is not None and not isinstance(weights, Mapping):
            raise TypeError(
                f"weights must be a mapping like ids, {{feature: weights}}, got "
                f"{type(weights).__name__}"
            )
        stray = [f for f in weights or {} if f not in ids]
        if stray:
            raise KeyError(
                f"weights name features {stray} that ids do not name; ids have {list(ids)}"
            )
        vectors: dict[str, jax.Array] = {}
        for part in parts:
            vectors.update(_bags(part, by_feature, weights or {}))
        ordered = {f: vectors[f].astype(dtype) for f in ids}
        return row_ids.in_mapping_of(ids, ordered)
    if weights is None:
        # A column is a bag of one id, so every combiner gives its vector.
        return jnp.concatenate(
            [
                part.vectors if isinstance(part, Vectors) else part.pool(part.rows, part.inverse)
                for part in parts
            ],
            axis=-2,
        ).astype(dtype)
    held = [part for part in parts if isinstance(part, Part)]
    assert len(held) == len(parts)  # a fused step has no weights
    # The inverse has the shape of the ids. Pairs have one axis more.
    shape = (*held[0].inverse.shape[:-1], sum(part.inverse.shape[-1] for part in held))
    if np.shape(weights) != shape:
        raise ValueError(
            f"weights must have the shape of ids {list(shape)}, got {list(np.shape(weights))}"
        )
    factors_of = _as_float(weights)
    stacked: list[jax.Array] = []
    for spec, part, columns in zip(specs, held, _columns(specs), strict=True):
        factors = factors_of[..., columns]
        names = [f for f, _ in spec.feature_tables]
        index = {f: part.inverse[..., i, None] for i, f in enumerate(names)}
        bags = _bags(
            part._replace(inverse=index),
            by_feature,
            {f: factors[..., i, None] for i, f in enumerate(names)},
        )
        stacked.extend(bags[f] for f in names)
    return jnp.stack(stacked, axis=-2).astype(dtype)
