"""The rows of a stack by global id, block by block, and the cache lines newer than the table.

A source reads a state in training or the arrays of a checkpoint. It never copies a table: a block
is a slice of each shard. Rows lie in the order of their shards; see `mesh.order`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing
from mpembed_jax.embedding import arguments
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.mesh import order
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, offsets
from mpembed_jax.vocabulary import ngram_hash, pool
from mpembed_jax.vocabulary.ngram_hash import NGramHash


class NGramState(NamedTuple):
    """A stack of n-gram tables with its hash, for `save`. An NGramMemory has both by itself.

    Attributes:
      state: of the spec that nn.ngram_spec returns for the hash.
      ngrams: the hash.
      canonical: integers [vocabulary_size], the map of tokens that the stack was trained with; None
        if it was trained without one.
    """

    state: EmbeddingState
    ngrams: NGramHash
    canonical: Any = None


class Source(NamedTuple):
    """A stack whose rows can be read block by block."""

    name: str
    spec: EmbeddingSpec
    key: np.ndarray  # u32 [2]
    step: np.ndarray  # i32 []
    read: Callable[[int, int], np.ndarray]  # (first id, number) -> packed rows [number, words]
    line_ids: np.ndarray  # i32 [n], ascending: ids whose lines are newer than the table
    line_of: np.ndarray  # i64 [n]: the line of each
    lines: Callable[[np.ndarray], np.ndarray]  # lines i64 [m] -> f32 [m, D]
    # u32 [S, W]: the tags of a pool's owners, without their use; None without a vocabulary
    owners: np.ndarray | None
    ngrams: NGramHash | None = None
    canonical: np.ndarray | None = None  # i32 [vocabulary_size]: the map of the n-grams' tokens


def of_tree(tree: Any) -> list[Source]:
    """Returns the source of every embedding state of a tree, under its path.

    The path is "" if the tree itself is a state. The path of an n-gram memory is the module's.

    Raises:
      TypeError: if a map of tokens does not consist of integers.
      ValueError: if the tree has no embedding state, if a map of tokens does not fit its hash, or
        if a hash is not the one of the state's spec. Also as of_state.
    """

    def is_stack(node: Any) -> bool:
        return isinstance(node, EmbeddingState) or _is_memory(node)

    stacks = [
        (jax.tree_util.keystr(path, simple=True, separator="."), node)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stack)
        if is_stack(node)
    ]
    if not stacks:
        raise ValueError(
            "there is no embedding state to save; pass a state of mpembed_jax.init, a model, "
            "nnx.state(model), or any tree that holds states"
        )
    return [_of_memory(n, s) if _is_memory(s) else of_state(n, s) for n, s in stacks]


def _is_memory(node: Any) -> bool:
    """Returns whether a node is an NGramState, or a module that has what an NGramState has.

    Modules are recognized by their attributes, because importing their classes would import flax.
    """
    return isinstance(getattr(node, "ngrams", None), NGramHash) and (
        hasattr(node, "state") and hasattr(node, "canonical")
    )


def _of_memory(name: str, memory: Any) -> Source:
    canonical = memory.canonical
    if hasattr(canonical, "get_value"):  # of an nnx.Variable
        canonical = canonical.get_value()
    if canonical is not None:
        canonical = ngram_hash.check_canonical(memory.ngrams, canonical)
    source = of_state(name, memory.state)
    trained = source.spec.ngrams
    if trained is not None and trained.settings != memory.ngrams.settings:
        raise ValueError(
            f"stack {name!r} was trained with the NGramHash {trained.settings}, got "
            f"{memory.ngrams.settings}; pass the hash of its spec: state.spec.ngrams"
        )
    return source._replace(ngrams=memory.ngrams, canonical=canonical)


def of_state(name: str, state: EmbeddingState) -> Source:
    """Returns the source of a state.

    Args:
      name: the name of the stack.
      state: concrete; not consumed.

    Raises:
      TypeError: if state has another type.
      ValueError: if the state is traced, abstract, donated or averaged, lies over several
        processes, or if its arrays were made for another spec. Also as `of_arrays`.
    """
    arguments.check_state("serving.save(path, states)", state)
    leaves = jax.tree.leaves(state)
    if any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves):
        raise ValueError(f"stack {name!r} is traced or abstract; save concrete states")
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves):
        raise ValueError(
            f"stack {name!r} lies over several processes; save a checkpoint and export that: "
            "python -m mpembed_jax.serving export CHECKPOINT OUT"
        )
    state.check_spec()
    cache = {}
    if state.cache is not None:
        held = state.cache
        cache = {"tags": held.tags, "dirty": held.dirty, "rows": held.rows}
    owners = None if state.vocabulary is None else state.vocabulary.owners
    return of_arrays(
        name,
        state.spec,
        state.layout,
        state.table.rows,
        cache,
        key=state.key,
        step=state.step,
        owners=owners,
    )


def of_arrays(
    name: str,
    spec: EmbeddingSpec,
    layout: Layout | None,
    rows: Any,
    cache: dict[str, Any],
    *,
    key: Any,
    step: Any,
    owners: Any = None,
) -> Source:
    """Returns the source of a stack's arrays.

    Args:
      name: the name of the stack.
      spec: the stack. Its cache is not used.
      layout: how the arrays are divided; None for one device.
      rows: packed rows of all shards, a jax or NumPy array.
      cache: {"tags", "dirty", "rows": array}, or {} without a cache.
      key: uint32 [2].
      step: int32 scalar.
      owners: the owners of the vocabulary, uint32 [S, W]; None without a vocabulary.

    Raises:
      ValueError: if the stack has 2**31 - 1 rows or more.
    """
    check_rows(name, spec)
    slices = _slices(rows, layout)
    line_ids = line_of = np.zeros(0, np.int64)
    lines = np.zeros((0, spec.embedding_dim), np.float32)
    if cache:
        host = {field: np.asarray(jax.device_get(array)) for field, array in cache.items()}
        if layout is not None and layout.shards > 1:
            host = order.cache_by_id(layout, host)
        tags = host["tags"].reshape(-1)
        (line_of,) = np.nonzero(host["dirty"].reshape(-1) & (tags != NO_ID))
        line_of = line_of[np.argsort(tags[line_of], kind="stable")]
        line_ids, lines = tags[line_of], host["rows"]
    if owners is not None:
        owners = np.asarray(jax.device_get(owners))
        if layout is not None and layout.shards > 1:
            owners = order.vocabulary_by_id(layout, {"owners": owners})["owners"]
        owners = owners & np.uint32(~pool.PINNED & 0xFFFFFFFF)
    return Source(
        name=name,
        spec=spec,
        key=np.asarray(jax.device_get(key)),
        step=np.asarray(jax.device_get(step)),
        read=partial(_read, slices, layout, spec),
        line_ids=line_ids,
        line_of=line_of,
        lines=lambda index: lines[index],
        owners=owners,
    )


def check_rows(name: str, spec: EmbeddingSpec) -> None:
    """Checks that a serving file can hold a stack.

    Raises:
      ValueError: if the stack has 2**31 - 1 rows or more.
    """
    if spec.num_rows >= NO_ID:
        raise ValueError(
            f"stack {name!r} has {spec.num_rows} rows; a serving file holds fewer than 2**31 - 1 "
            "rows of one stack, so train its tables in several stacks"
        )


# --- slices of shards

Slice = Callable[[int, int], np.ndarray]  # (first local row, number) -> packed rows


def _slices(rows: Any, layout: Layout | None) -> list[Slice]:
    """Returns a function for each shard that reads a slice of its rows."""
    count = 1 if layout is None else layout.shards
    num_rows = rows.shape[0] // count
    if isinstance(rows, np.ndarray):
        parts = [rows[i * num_rows : (i + 1) * num_rows] for i in range(count)]
        return [partial(_slice_of_host, part) for part in parts]
    found: dict[int, Any] = {}
    for shard in rows.addressable_shards:
        found.setdefault((shard.index[0].start or 0) // max(1, num_rows), shard.data)
    return [_slice_of(found[i]) for i in range(count)]


def _slice_of(part: jax.Array) -> Slice:
    is_on_cpu = all(device.platform == "cpu" for device in part.devices())
    if is_on_cpu and not indexing.is_on_host(part):
        return partial(_slice_of_host, np.asarray(part))  # a view, not a copy
    return partial(_slice_of_device, part)


def _slice_of_host(part: np.ndarray, first: int, num: int) -> np.ndarray:
    return part[first : first + num]


def _slice_of_device(part: jax.Array, first: int, num: int) -> np.ndarray:
    # Slices of equal length, so that one compiled program reads them all.
    size = min(part.shape[0], indexing.ceil_power(num))
    begin = min(first, part.shape[0] - size)
    block = jax.device_get(_take(part, np.int32(begin), size))
    return block[first - begin : first - begin + num]


@partial(jax.jit, static_argnames="size")
def _take(rows: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return indexing.take(rows, first + jnp.arange(size, dtype=jnp.int32))


def _read(
    slices: list[Slice], layout: Layout | None, spec: EmbeddingSpec, first: int, num: int
) -> np.ndarray:
    """Returns the packed rows of ids [first, first + num), which belong to one table."""
    if layout is None or layout.shards == 1:
        return slices[0](first, num)
    if layout.table_shards is not None:
        starts = offsets(spec.tables)
        table = int(np.searchsorted(starts, first, side="right")) - 1
        place = int(layout.table_slices()[table][0]) + first - int(starts[table])
        shard, row = divmod(place, layout.num_rows)
        return slices[shard](row, num)
    result = None
    for shard, read in enumerate(slices):
        begin = (shard - first) % layout.shards  # the first of the ids that this shard has
        if begin >= num:
            continue
        part = read((first + begin) // layout.shards, -(-(num - begin) // layout.shards))
        if result is None:
            result = np.empty((num, part.shape[1]), part.dtype)
        result[begin :: layout.shards] = part
    assert result is not None
    return result
