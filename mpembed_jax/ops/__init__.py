"""The ops on rows: the contract of each op, and the choice of its implementation.

Only this room has code for particular hardware. The implementations have names:
  xla               passes over whole arrays; for accelerators
  xla_chunked       loops over chunks, whose trip count is known at run time; for CPUs
  numba             like xla_chunked, but numba compiles unique, find, admit, start_again, plan, the
                    gathers and scatters of rows, and the fused step
  pallas_triton     Pallas kernels for NVIDIA GPUs
  pallas_interpret  the same kernels, traced into plain jax operations; for tests on any device.
                    jax interprets kernels inside jax.shard_map only with check_vma=False

On a CPU, xla, xla_chunked and numba give the same bits. Kernels give these bits, too, except that
the last bits of row-wise Adagrad and of sums over many positions can differ. Of a table in host
memory, only the rows that are needed cross the bus. XLA moves them in chunks. Kernels read them
from there, in `read` and in `lookup`; interpreted kernels copy the table first.

These are the ops. U is the number of unique ids, D the embedding dim, V the number of table rows, C
the number of cache lines. `records` defines the records.
  unique(ids [N], size, step)               -> Unique: the distinct ids of a batch
  find(known [U], ids [N])                  -> i32 [N], bool [N]: the index of each id among known
                                               ids, and whether it is among them
  admit(vocabulary, pairs, step, halve, ..) -> the vocabulary, Admitted: the rows of raw ids
  start_again(of, fresh, rows, num_rows)    -> Rows: initial values and fresh optimizer state for
                                               rows, and no lines
  plan(cache, unique, step, num_positions)  -> the cache, Moves, i32 [N]: the index in the moves of
                                               each position's id, the number of positions that hit,
                                               the number of victims
  swap(store, moves, draw)                  -> Store, i32 []: dirty victims quantized into the
                                               table, newcomers dequantized into lines; how many
                                               victims were dirty
  lookup(store, moves, is_valid)            -> f32 [U, D]: each row from its line or the table
  bring(store, moves, draw, is_valid)       -> swap, then lookup: Store, i32 [], f32 [U, D]
  only_if(is_valid, rows)                   -> f32 [U, D]: the rows, or NaN if they are not valid
  read(table, cache, ids)                   -> f32 [.., D]: as lookup, for ids without a plan
  write(store, moves, old, new, draw)       -> Store, bool [U]: rows that moved, copied to lines or
                                               rounded into the table; which ones
  update(store, accumulator, moves, ..)     -> SGD or row-wise Adagrad on each row, then write
  update_summed(store, accumulator, ..)     -> update, with gradients of positions or bags, which
                                               are summed for each row
  write_back(store, tags, draw)             -> the table, with every dirty line quantized into it
  take(rows, index)                         -> f32 [N, D]: rows[index]
  sum_duplicates(values, index, size)       -> f32 [size, D]: sums of values with equal index
  bag(rows, index, factors)                 -> f32 [.., D]: sums of factors * rows[index] over the
                                               last axis
"""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from mpembed_jax.arrays import indexing
from mpembed_jax.cache import policy
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.numerics.random_bits import Key
from mpembed_jax.ops import numba_package, xla
from mpembed_jax.ops.records import (
    Admission,
    Admitted,
    Dealt,
    Draw,
    Implementation,
    Moves,
    Places,
    Positions,
    Request,
    Rows,
    Store,
    Unique,
)
from mpembed_jax.ops.xla.rows import write_back
from mpembed_jax.ops.xla.sums import add_duplicates
from mpembed_jax.optim import RowRule
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable
from mpembed_jax.vocabulary.pool import WHOLE, Part, VocabularyState

# Rows per chunk. They take a few hundred kilobytes, which fit a core's cache at every usual
# embedding dim.
_CHUNK = 2048
IMPLEMENTATIONS = {
    of.name: of
    for of in (
        Implementation("xla"),
        Implementation("xla_chunked", chunk=_CHUNK),
        Implementation("numba", chunk=_CHUNK, is_native=True),
        Implementation("pallas_triton", is_kernel=True),
        Implementation("pallas_interpret", is_kernel=True, is_interpreted=True),
    )
}
_TRITON_CAPABILITY = 8.0  # the compute capability that Pallas' Triton back end needs

__all__ = [
    "IMPLEMENTATIONS",
    "Admission",
    "Admitted",
    "Dealt",
    "Draw",
    "Implementation",
    "Moves",
    "Named",
    "Places",
    "Positions",
    "Request",
    "Rows",
    "Store",
    "Unique",
    "add_duplicates",
    "admit",
    "bag",
    "bag_step",
    "bring",
    "choose",
    "chunk_of",
    "compile_ahead",
    "compiled",
    "distinct_ids",
    "find",
    "has_kernels",
    "lookup",
    "max_threads",
    "only_if",
    "plan",
    "read",
    "start_again",
    "sum_duplicates",
    "swap",
    "take",
    "unique",
    "update",
    "update_summed",
    "write",
    "write_back",
]

Named = str | Implementation  # a name from IMPLEMENTATIONS, or an Implementation of the caller's


def choose(implementation: Named | None, *, is_abstract: bool = False) -> Named:
    """Returns the named implementation, or for None the best one for the default device.

    None never selects a kernel that was not measured to be faster on hardware. Until
    experiments/gpu/bench_gpu.py has run on a GPU, None means "xla" on every accelerator, and
    kernels are used only if they are named.

    Args:
      implementation: a name from IMPLEMENTATIONS, an Implementation, or None.
      is_abstract: True if only shapes are made, perhaps for a device that this machine does not
        have. The device is then not checked.

    Raises:
      ValueError: if the name is unknown, or the default device cannot run the implementation.
    """
    if implementation is None:
        if jax.default_backend() != "cpu":
            return "xla"
        return "numba" if numba_package.is_default() else "xla_chunked"
    if isinstance(implementation, Implementation):
        return implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "numba" and (reason := numba_package.why_not()):
        raise ValueError(
            f'implementation "numba" cannot be used: {reason}; leave implementation out for '
            "other code"
        )
    if implementation == "pallas_triton" and not is_abstract:
        device = jax.local_devices()[0]
        # CPU and TPU devices lack this attribute. Other devices have "8.0" or "gfx90a", for
        # example.
        capability = str(getattr(device, "compute_capability", ""))
        is_able = capability.replace(".", "").isdigit() and float(capability) >= _TRITON_CAPABILITY
        if device.platform not in ("gpu", "cuda") or not is_able:
            raise ValueError(
                f"pallas_triton needs an NVIDIA GPU of compute capability {_TRITON_CAPABILITY} or "
                f"more, this device is {device.device_kind} ({device.platform} {capability}); "
                "leave implementation out"
            )
    return implementation


def _of(implementation: Named | None) -> Implementation:
    """Returns the Implementation of a name; None means the reference."""
    if isinstance(implementation, Implementation):
        return implementation
    return IMPLEMENTATIONS["xla" if implementation is None else implementation]


def chunk_of(implementation: Named) -> int | None:
    """Returns the chunk length of an implementation's loops, or None if it has no such loops."""
    return _of(implementation).chunk


def has_kernels(implementation: Named | None, table: QuantizedTable | None = None) -> bool:
    """Returns whether Pallas kernels run the row movements of an implementation.

    If a table is given, the answer is about its rows. Kernels do not change rows in host memory.
    """
    return _of(implementation).is_kernel and (table is None or not indexing.is_on_host(table.rows))


def _chunk_for(implementation: Named, table: QuantizedTable) -> int | None:
    by = _of(implementation)
    return by.host_chunk if by.chunk is None and indexing.is_on_host(table.rows) else by.chunk


def compiled(implementation: Named | None) -> Any:
    """Returns the package `ops.cpu`, or None if an implementation cannot use it here.

    It is also None inside the body of a shard_map. There, the type of a value says over which mesh
    axes it varies. Foreign calls do not support such types, so XLA runs alone.
    """
    if not _of(implementation).is_native or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    from mpembed_jax.ops import cpu

    return cpu


def bag_step(implementation: Named, table: QuantizedTable) -> Any:
    """Returns `cpu.bag_step`, the fused step by foreign calls, or None if it cannot run."""
    native = compiled(implementation)
    return None if native is None or indexing.is_on_host(table.rows) else native.bag_step


def compile_ahead(implementation: Named, table: QuantizedTable, least_bytes: int = 1 << 28) -> bool:
    """Compiles the fused step of a large table, if it runs natively and was not compiled before.

    Compilation takes seconds in the first process and milliseconds in later ones. To fill a table
    of `least_bytes` takes seconds as well, and it leaves this thread idle.

    Returns:
      Whether the step of the table is compiled.
    """
    if isinstance(table.rows, jax.core.Tracer) or table.nbytes < least_bytes:
        return False
    native = bag_step(implementation, table)
    if native is None:
        return False
    native.compile_calls(table.format)
    return True


def distinct_ids(places: Places) -> jax.Array:
    """Returns the ids of the rows of a fused step; see `cpu.bag_step`."""
    from mpembed_jax.ops import cpu

    return cpu.bag_step.distinct_ids(places)


def max_threads(implementation: Named) -> int:
    """Returns the largest number of threads that an implementation asks for."""
    return _of(implementation).max_threads


def _gather_of(implementation: Named, table: QuantizedTable) -> xla.rows.Gather | None:
    native = compiled(implementation)
    return None if native is None or indexing.is_on_host(table.rows) else native.rows.take


def _kernels(implementation: Named | None) -> tuple[Any, bool]:
    """Returns the package `ops.gpu` and whether its kernels are interpreted.

    The package is imported only if it is used.
    """
    from mpembed_jax.ops import gpu

    return gpu, _of(implementation).is_interpreted


@jax.named_scope("unique")
def unique(
    ids: jax.Array, size: int, step: jax.Array, *, implementation: Named | None = None
) -> Unique:
    """Returns the distinct ids of a batch; see `xla.unique.unique`."""
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.unique.unique(ids, size, step, is_interpreted=is_interpreted)
    native = compiled(implementation)
    if native is None or ids.shape[0] == 0:
        return xla.unique.unique(ids, size, step)
    return native.unique.unique(ids, size, step)


@jax.custom_batching.custom_vmap  # foreign calls have no batched form
def _find_natively(known: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return compiled("numba").unique.find(known, ids)


@_find_natively.def_vmap
def _find_batches(
    size: int, is_batched: tuple[bool, bool], known: jax.Array, ids: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[bool, bool]]:
    axes = tuple(0 if batched else None for batched in is_batched)
    return jax.vmap(xla.unique.find, axes, axis_size=size)(known, ids), (True, True)


def find(
    known: jax.Array, ids: jax.Array, *, implementation: Named | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `xla.unique.find`."""
    is_native = compiled(implementation) is not None
    return _find_natively(known, ids) if is_native else xla.unique.find(known, ids)


def admit(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    occurrences: jax.Array | None = None,
    part: Part = WHOLE,
    *,
    cache: CacheState | None,
    implementation: Named,
) -> tuple[VocabularyState, Admitted]:
    """Gives raw ids rows of their own, where they earned them; see `xla.admit.admit`.

    On a mesh, each shard passes the counts that the devices sent, and its part of the pool. The
    native admission is for one device. Only it uses `cache`: it deals positions to partitions that
    own sets of the pool and sets of the cache.
    """
    native = compiled(implementation)
    if native is not None:
        groups = native.partitions.MAX_PARTS if cache is None else cache.geometry.groups
        return native.admit.admit(
            vocabulary, pairs, step, must_halve, rules, occurrences,
            groups=groups, max_threads=max_threads(implementation),
        )  # fmt: skip
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        given = vocabulary, pairs, step, must_halve, rules, occurrences, part
        return kernels.admit.admit(*given, is_interpreted=is_interpreted)
    return xla.admit.admit(vocabulary, pairs, step, must_halve, rules, occurrences, part)


def plan(
    cache: CacheState,
    unique: Unique,
    step: jax.Array,
    num_positions: Fraction,
    *,
    implementation: Named,
) -> tuple[CacheState, Moves, jax.Array, jax.Array, jax.Array]:
    """Plans a batch by the rules of `xla.plan.make_plan`, and orders its unique ids by the plan.

    Args:
      cache: the state before the step; its `rows` are passed through.
      unique: the distinct ids of the batch.
      step: int32 scalar, the number of this prefetch.
      num_positions: see make_plan.
      implementation: a name from IMPLEMENTATIONS, or an Implementation.

    Returns:
      The cache, the moves, the inverse, the number of positions that hit and the number of victims
      (int32 scalars). In the cache, newcomers have their lines, but their rows are not yet filled,
      and `dirty` still describes the victims. The inverse (int32 [N]) is the index in the moves of
      each position's id. A position hits if its id was in the cache before the step.
    """
    native = compiled(implementation)
    if native is not None:
        halve = policy.is_time_to_halve(cache, step, num_positions)
        made = native.plan.plan(cache, unique, step, halve)
        return *made, _num_evictions(made[1])
    width = unique.ids.shape[0]
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        if kernels.plan.has_short_sets(cache.geometry, width):
            halve = policy.is_time_to_halve(cache, step, num_positions)
            return kernels.plan.plan(cache, unique, step, halve, is_interpreted=is_interpreted)
    chunk = chunk_of(implementation)
    cache, made = xla.plan.make_plan(
        cache, unique.ids, unique.counts, unique.num_ids, step, num_positions, chunk
    )
    position = jnp.arange(width, dtype=jnp.int32)
    is_live = position < unique.num_ids
    order = jnp.where(is_live, made.order, width - 1)
    moved = indexing.put(
        jnp.full(width, width - 1, jnp.int32), jnp.where(is_live, order, width), position
    )
    is_hit = position < made.num_hits
    moves = Moves(
        ids=indexing.take(unique.ids, order),
        line=jnp.where(is_live, indexing.take(made.line, order), cache.geometry.lines),
        victim_ids=jnp.where(is_live, indexing.take(made.victim_ids, order), NO_ID),
        num_hits=made.num_hits,
        num_cached=made.num_cached,
        num_ids=unique.num_ids,
        segments=unique.segments and unique.segments.of_rows(order),
    )
    inverse = indexing.take(moved, unique.inverse)
    hit_requests = jnp.sum(
        jnp.where(is_hit, indexing.take(unique.counts, order), 0), dtype=jnp.int32
    )
    return cache, moves, inverse, hit_requests, _num_evictions(moves)


def _num_evictions(moves: Moves) -> jax.Array:
    return jnp.sum(moves.victim_ids != NO_ID, dtype=jnp.int32)


def start_again(
    of: Rows,
    fresh: Any,
    rows: jax.Array,
    num_rows: jax.Array,
    *,
    key: Key,
    bounds: jax.Array,
    implementation: Named,
) -> Rows:
    """Gives rows their initial values and fresh optimizer state; see `xla.restart.start_again`."""
    native = compiled(implementation)
    given = (of, fresh, rows, num_rows)
    if native is not None and not indexing.is_on_host(of.table.rows) and rows.shape[0]:
        threads = max_threads(implementation)
        return native.restart.start_again(*given, key=key, bounds=bounds, max_threads=threads)
    if has_kernels(implementation, of.table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.restart.start_again(
            *given, key=key, bounds=bounds, is_interpreted=is_interpreted
        )
    chunk = _chunk_for(implementation, of.table)
    return xla.restart.start_again(*given, key=key, bounds=bounds, chunk=chunk)


@jax.named_scope("swap")
def swap(
    store: Store, moves: Moves, draw: Draw, *, implementation: Named
) -> tuple[Store, jax.Array]:
    """Evicts victims and fills newcomers; see `xla.rows.swap`."""
    if has_kernels(implementation, store.table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.rows.swap(store, moves, draw, is_interpreted=is_interpreted)
    chunk = _chunk_for(implementation, store.table)
    gather = _gather_of(implementation, store.table)
    return xla.rows.swap(store, moves, draw, chunk=chunk, gather=gather)


@jax.named_scope("lookup")
def lookup(
    store: Store, moves: Moves, is_valid: jax.Array | None = None, *, implementation: Named
) -> jax.Array:
    """Gathers the unique rows (float32 [U, D]); see `xla.rows.lookup`.

    If is_valid (bool scalar) is given and is False, all rows are NaN.
    """
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.rows.lookup(store, moves, is_valid, is_interpreted=is_interpreted)
    chunk = _chunk_for(implementation, store.table)
    gather = _gather_of(implementation, store.table)
    rows = xla.rows.lookup(store, moves, chunk=chunk, gather=gather)
    return rows if is_valid is None else only_if(is_valid, rows, implementation=implementation)


def bring(
    store: Store,
    moves: Moves,
    draw: Draw,
    is_valid: jax.Array | None = None,
    *,
    implementation: Named,
) -> tuple[Store, jax.Array, jax.Array]:
    """Does what `swap` and then `lookup` do, and returns the results of both.

    One kernel does both, if there are kernels.
    """
    if has_kernels(implementation, store.table):
        kernels, is_interpreted = _kernels(implementation)
        with jax.named_scope("bring"):
            return kernels.rows.bring(store, moves, draw, is_valid, is_interpreted=is_interpreted)
    store, num_written = swap(store, moves, draw, implementation=implementation)
    return store, num_written, lookup(store, moves, is_valid, implementation=implementation)


def only_if(is_valid: jax.Array, rows: jax.Array, *, implementation: Named) -> jax.Array:
    """Returns rows (float32 [U, D]) if they are valid, else NaN; see `xla.rows.only_if`."""
    return xla.rows.only_if(is_valid, rows, chunk_of(implementation))


@jax.named_scope("read")
def read(
    table: QuantizedTable, cache: CacheState | None, ids: jax.Array, *, implementation: Named
) -> jax.Array:
    """Reads rows (float32 [.., D]) for evaluation; see `xla.rows.read`."""
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.rows.read(table, cache, ids, is_interpreted)
    return xla.rows.read(table, cache, ids, _chunk_for(implementation, table))


@jax.named_scope("write")
def write(
    store: Store,
    moves: Moves,
    old_rows: jax.Array,
    new_rows: jax.Array,
    draw: Draw,
    *,
    implementation: Named,
) -> tuple[Store, jax.Array]:
    """Stores the updated rows that moved; see `xla.rows.write`."""
    given = (store, moves, old_rows, new_rows, draw)
    if has_kernels(implementation, store.table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.update.write(*given, is_interpreted=is_interpreted)
    return xla.rows.write(*given, chunk=_chunk_for(implementation, store.table))


@jax.named_scope("update")
def update(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    old_rows: jax.Array,
    row_grads: jax.Array,
    *,
    rule: RowRule,
    draw: Draw,
    implementation: Named,
) -> tuple[Store, jax.Array | None, jax.Array]:
    """Updates each row once and stores it; see `xla.update.update`."""
    given = (store, accumulator, moves, old_rows, row_grads)
    if has_kernels(implementation, store.table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.update.update(*given, rule=rule, draw=draw, is_interpreted=is_interpreted)
    return xla.update.update(
        *given, rule=rule, draw=draw, chunk=_chunk_for(implementation, store.table)
    )


@jax.named_scope("update")
def update_summed(
    store: Store,
    accumulator: jax.Array | None,
    moves: Moves,
    old_rows: jax.Array,
    positions: Positions,
    *,
    rule: RowRule,
    draw: Draw,
    skip_nonfinite: bool,
    implementation: Named,
) -> tuple[Store, jax.Array | None, jax.Array, jax.Array]:
    """See `xla.update.update_summed`."""
    given = (store, accumulator, moves, old_rows, positions)
    if has_kernels(implementation, store.table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.update.update_summed(
            *given,
            rule=rule,
            draw=draw,
            skip_nonfinite=skip_nonfinite,
            is_interpreted=is_interpreted,
        )
    chunk = _chunk_for(implementation, store.table)
    return xla.update.update_summed(
        *given, rule=rule, draw=draw, skip_nonfinite=skip_nonfinite, chunk=chunk
    )


# vmap would run foreign calls one after another. A gather does all at once.
@jax.custom_batching.custom_vmap
def _take_natively(rows: jax.Array, index: jax.Array) -> jax.Array:
    return compiled("numba").rows.take(rows, jnp.clip(index, 0, rows.shape[0] - 1))


@_take_natively.def_vmap
def _take_batches(
    size: int, is_batched: tuple[bool, bool], rows: jax.Array, index: jax.Array
) -> tuple[jax.Array, bool]:
    axes = tuple(0 if batched else None for batched in is_batched)
    return jax.vmap(indexing.take, axes, axis_size=size)(rows, index), True


def take(rows: jax.Array, index: jax.Array, *, implementation: Named | None = None) -> jax.Array:
    """Returns rows[index] (float32 [N, D]) for rows [U, D] and int32 index [N]."""
    # A foreign call does not check the types of its operands.
    is_native = compiled(implementation) is not None and (rows.dtype, index.dtype) == (
        jnp.float32,
        jnp.int32,
    )
    return _take_natively(rows, index) if is_native else indexing.take(rows, index)


def sum_duplicates(
    values: jax.Array,
    index: jax.Array,
    size: int,
    *,
    implementation: Named | None = None,
    factors: jax.Array | None = None,
    source: jax.Array | None = None,
) -> jax.Array:
    """Sums values that share an index (float32 [size, ..]); see `xla.sums.sum_duplicates`."""
    if has_kernels(implementation) and values.ndim == 2:
        kernels, is_interpreted = _kernels(implementation)
        wide = values.astype(jnp.float32)
        return kernels.sums.sum_duplicates(
            wide, index, size, is_interpreted, factors, source
        ).astype(values.dtype)
    return xla.sums.sum_duplicates(values, index, size, factors, source)


def bag(
    rows: jax.Array, index: jax.Array, factors: jax.Array, *, implementation: Named | None = None
) -> jax.Array:
    """Returns weighted sums of rows (float32 [.., D]); see `xla.bag.bag`."""
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.sums.bag(rows, index, factors, is_interpreted)
    return xla.bag.bag(rows, index, factors)
