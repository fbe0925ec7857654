"""The row movements and the deduplication: the contract of each op and the choice of its implementation.

This is the only place that knows about hardware. Implementations are named: "xla" makes full-width passes (accelerators),
"xla_chunked" loops over chunks with a dynamic trip count (CPU), "numba" is that with deduplication, planning and the
gathers and scatters of large rows compiled by numba, "pallas_triton" runs the row movements as GPU kernels, and
"pallas_interpret" traces those kernels into plain jax operations, on any device, to test them. All give the same bits.
A table in host memory is always moved by XLA, in chunks that cover the rows wanted of it: no others cross the bus.

Ops (U unique ids, D embedding dim, V table rows, C cache lines):
  unique(ids [N], size, step)              -> distinct ids, where each position's id went, occurrences
  swap(table, rows, dirty, ...)            -> dirty victims quantized into the table, newcomers dequantized into their lines
  lookup(table, rows, ids, line, ...)      -> f32 [U, D], from the line where there is one, else from the table
  read(table, cache, ids)                  -> f32 [.., D], from the line whose tag is the id, else from the table
  write(table, rows, new_rows, ...)        -> new values to lines, or stochastically rounded into the table
  update(table, rows, sums, ...)           -> SGD or row-wise Adagrad on each row, then write
  update_summed(table, rows, sums, ...)    -> the same from the gradients of positions or bags, summed on the way
  write_back(table, rows, tags, dirty ...) -> every dirty line quantized into the table
  take(rows, index)                        -> f32 [N, D], rows[index]
  sum_duplicates(values, index, size)      -> f32 [size, D], values of equal index summed
  bag(rows, index, factors)                -> f32 [.., D], sum over the last axis of factors * rows[index]
"""

import importlib.util
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from mpembed_jax.arrays import indexing
from mpembed_jax.cache import policy
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.ops import xla
from mpembed_jax.ops.xla.rows import write_back
from mpembed_jax.ops.xla.sums import add_duplicates
from mpembed_jax.ops.xla.unique import Unique
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable

IMPLEMENTATIONS = ("xla", "xla_chunked", "numba", "pallas_triton", "pallas_interpret")
_CHUNK = 2048  # rows: a few hundred kilobytes, inside a core's cache at every usual embedding dim
_HOST_CHUNK = 16384  # rows of a table in host memory: a third of a megabyte at INT8 and D = 16, some microseconds of the bus
_TRITON_CAPABILITY = 8.0  # what Pallas' Triton back end needs

__all__ = [
    "IMPLEMENTATIONS",
    "Unique",
    "add_duplicates",
    "bag",
    "choose",
    "chunk_of",
    "compiled",
    "has_kernels",
    "lookup",
    "plan",
    "read",
    "sum_duplicates",
    "swap",
    "take",
    "unique",
    "update",
    "update_summed",
    "write",
    "write_back",
]


def choose(implementation: str | None, *, is_abstract: bool = False) -> str:
    """Returns the named implementation, or for None the best one for the default device.

    None never picks a kernel that was not measured to win on hardware: until experiments/bench_gpu.py has run on a GPU, that
    is "xla" on every accelerator, and kernels are used where they are named.

    Args:
      implementation: a name from IMPLEMENTATIONS, or None.
      is_abstract: True where only shapes are made, perhaps for another device than this machine's.

    Raises:
      ValueError: on an unknown name, or one that the default device cannot run.
    """
    if implementation is None:
        if jax.default_backend() != "cpu":
            return "xla"
        return "xla_chunked" if importlib.util.find_spec("numba") is None else "numba"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "numba" and importlib.util.find_spec("numba") is None:
        raise ValueError('implementation "numba" needs the package numba: pip install numba, or leave implementation out')
    if implementation == "pallas_triton" and not is_abstract:
        device = jax.local_devices()[0]
        # Not an attribute of CPU and TPU devices, "8.0" or "gfx90a" elsewhere.
        capability = str(getattr(device, "compute_capability", ""))
        is_able = capability.replace(".", "").isdigit() and float(capability) >= _TRITON_CAPABILITY
        if device.platform not in ("gpu", "cuda") or not is_able:
            raise ValueError(
                f"pallas_triton needs an NVIDIA GPU of compute capability {_TRITON_CAPABILITY} or more, this device is "
                f"{device.device_kind} ({device.platform} {capability}); leave implementation out"
            )
    return implementation


def chunk_of(implementation: str) -> int | None:
    """Returns the chunk length that an implementation loops with, None for full-width passes."""
    return _CHUNK if implementation in ("xla_chunked", "numba") else None


def has_kernels(implementation: str | None, table: QuantizedTable | None = None) -> bool:
    """Whether an implementation runs the row movements (of a table, if given) as Pallas kernels."""
    is_named = implementation in ("pallas_triton", "pallas_interpret")
    return is_named and (table is None or not indexing.is_on_host(table.rows))


def _chunk_for(implementation: str, table: QuantizedTable) -> int | None:
    chunk = chunk_of(implementation)
    return _HOST_CHUNK if chunk is None and indexing.is_on_host(table.rows) else chunk


def compiled(implementation: str | None) -> Any:
    """Returns the module of what numba compiles, None for implementations without it and over a mesh.

    In the body of a shard_map values carry types (over which axes they vary) that foreign calls do not know: XLA alone.
    """
    if implementation != "numba" or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    from mpembed_jax.ops import cpu

    return cpu


def _gather_of(implementation: str, table: QuantizedTable) -> xla.rows.Gather | None:
    native = compiled(implementation)
    return None if native is None or indexing.is_on_host(table.rows) else native.rows.take


def _kernels(implementation: str | None) -> tuple[Any, bool]:
    """Returns the folder of the kernels, imported only where they are used, and whether they are interpreted."""
    from mpembed_jax.ops import gpu

    return gpu, implementation == "pallas_interpret"


@jax.named_scope("unique")
def unique(ids: jax.Array, size: int, step: jax.Array, *, implementation: str | None = None) -> Unique:
    """See `xla.unique`."""
    native = compiled(implementation)
    if native is None or ids.shape[0] == 0:
        return xla.unique.unique(ids, size, step)
    return Unique(*native.unique.unique(ids, size, step))


def plan(
    cache: CacheState, found: Unique, step: jax.Array, num_positions: Fraction, implementation: str
) -> tuple[CacheState, xla.plan.Placed]:
    """Plans a batch (rules: `xla.plan.make_plan`) and brings its unique ids into the order of the plan.

    Args:
      cache: state before the step; its `rows` are passed through.
      found: the distinct ids of the batch.
      step: int32 scalar, number of this prefetch.
      num_positions: see make_plan.
      implementation: a name from ops.IMPLEMENTATIONS.

    Returns:
      The cache with newcomers entered (their rows not yet filled, `dirty` still the victims'), and where everything went.
    """
    native = compiled(implementation)
    if native is not None:
        halve = policy.is_time_to_halve(cache, step, num_positions)
        cache, placed = native.plan.plan(cache, found.ids, found.inverse, found.counts, found.num_ids, step, halve)
        return cache, xla.plan.Placed(*placed)
    chunk, width = chunk_of(implementation), found.ids.shape[0]
    cache, placed = xla.plan.make_plan(cache, found.ids, found.counts, found.num_ids, step, num_positions, chunk)
    position = jnp.arange(width, dtype=jnp.int32)
    is_live = position < found.num_ids
    order = jnp.where(is_live, placed.order, width - 1)
    moved = indexing.put(jnp.full(width, width - 1, jnp.int32), jnp.where(is_live, order, width), position)
    is_hit = position < placed.num_hits
    return cache, xla.plan.Placed(
        unique_ids=indexing.take(found.ids, order),
        inverse=indexing.take(moved, found.inverse),
        line=jnp.where(is_live, indexing.take(placed.line, order), cache.geometry.lines),
        victim_ids=jnp.where(is_live, indexing.take(placed.victim_ids, order), NO_ID),
        num_hits=placed.num_hits,
        num_cached=placed.num_cached,
        hit_requests=jnp.sum(jnp.where(is_hit, indexing.take(found.counts, order), 0), dtype=jnp.int32),
    )


@jax.named_scope("swap")
def swap(
    table: QuantizedTable, cache_rows: jax.Array, dirty: jax.Array, *plan: jax.Array, implementation: str
) -> tuple[QuantizedTable, jax.Array, jax.Array, jax.Array]:
    """See `xla.swap`; `plan` is its arguments from ids to step."""
    if has_kernels(implementation, table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.rows.swap(table, cache_rows, dirty, *plan, is_interpreted)
    gather = _gather_of(implementation, table)
    return xla.rows.swap(table, cache_rows, dirty, *plan, _chunk_for(implementation, table), gather)  # type: ignore[call-arg,arg-type]


@jax.named_scope("lookup")
def lookup(table: QuantizedTable, cache_rows: jax.Array | None, *plan: jax.Array, implementation: str) -> jax.Array:
    """See `xla.lookup`; `plan` is its arguments from ids to num_ids."""
    if has_kernels(implementation, table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.rows.lookup(table, cache_rows, *plan, is_interpreted)
    gather = _gather_of(implementation, table)
    return xla.rows.lookup(table, cache_rows, *plan, _chunk_for(implementation, table), gather)  # type: ignore[call-arg,arg-type]


@jax.named_scope("read")
def read(table: QuantizedTable, cache: CacheState | None, ids: jax.Array, *, implementation: str) -> jax.Array:
    """See `xla.read`."""
    if has_kernels(implementation, table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.rows.read(table, cache, ids, is_interpreted)
    return xla.rows.read(table, cache, ids, _chunk_for(implementation, table))


@jax.named_scope("write")
def write(
    table: QuantizedTable, cache_rows: jax.Array | None, *plan: jax.Array, implementation: str
) -> tuple[QuantizedTable, jax.Array | None]:
    """See `xla.write`; `plan` is its arguments from ids to step."""
    if has_kernels(implementation, table):
        kernels, is_interpreted = _kernels(implementation)
        ids, line, new_rows, *rest = plan
        return kernels.update.update(table, cache_rows, None, ids, line, new_rows, None, *rest, is_interpreted)[:2]
    return xla.rows.write(table, cache_rows, *plan, _chunk_for(implementation, table))  # type: ignore[call-arg,arg-type]


@jax.named_scope("update")
def update(
    table: QuantizedTable,
    cache_rows: jax.Array | None,
    sums: jax.Array | None,
    *plan: jax.Array,
    implementation: str,
    learning_rate: float,
    eps: float,
) -> tuple[QuantizedTable, jax.Array | None, jax.Array | None]:
    """See `xla_update.update`; `plan` is its arguments from ids to step."""
    rule = {"learning_rate": learning_rate, "eps": eps}
    if has_kernels(implementation, table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.update.update(table, cache_rows, sums, *plan, is_interpreted, **rule)
    return xla.update.update(table, cache_rows, sums, *plan, _chunk_for(implementation, table), **rule)  # type: ignore[call-arg,arg-type]


@jax.named_scope("update")
def update_summed(
    table: QuantizedTable,
    cache_rows: jax.Array | None,
    sums: jax.Array | None,
    *plan: jax.Array | None,
    implementation: str,
    learning_rate: float,
    eps: float,
    skip_nonfinite: bool,
) -> tuple[QuantizedTable, jax.Array | None, jax.Array | None, jax.Array]:
    """See `xla_update.update_summed`; `plan` is its arguments from ids to step."""
    rule = {"learning_rate": learning_rate, "eps": eps, "skip_nonfinite": skip_nonfinite}
    if has_kernels(implementation, table):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.update.update_summed(table, cache_rows, sums, *plan, is_interpreted, **rule)
    return xla.update.update_summed(table, cache_rows, sums, *plan, _chunk_for(implementation, table), **rule)  # type: ignore[call-arg,arg-type]


@jax.custom_batching.custom_vmap  # foreign calls have no batched form
def _take_natively(rows: jax.Array, index: jax.Array) -> jax.Array:
    return compiled("numba").rows.take(rows, jnp.clip(index, 0, rows.shape[0] - 1))


@_take_natively.def_vmap
def _take_batches(size: int, is_batched: tuple[bool, bool], rows: jax.Array, index: jax.Array) -> tuple[jax.Array, bool]:
    axes = tuple(0 if batched else None for batched in is_batched)
    return jax.vmap(indexing.take, axes, axis_size=size)(rows, index), True


def take(rows: jax.Array, index: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """See `access.take`, for rows [U, D] and index [N]."""
    # A foreign call takes the types of its operands on trust.
    is_native = compiled(implementation) is not None and (rows.dtype, index.dtype) == (jnp.float32, jnp.int32)
    return _take_natively(rows, index) if is_native else indexing.take(rows, index)


def sum_duplicates(
    values: jax.Array,
    index: jax.Array,
    size: int,
    *,
    implementation: str | None = None,
    factors: jax.Array | None = None,
    source: jax.Array | None = None,
) -> jax.Array:
    """See `xla_sums.sum_duplicates`."""
    if has_kernels(implementation) and values.ndim == 2:
        kernels, is_interpreted = _kernels(implementation)
        wide = values.astype(jnp.float32)
        return kernels.sums.sum_duplicates(wide, index, size, is_interpreted, factors, source).astype(values.dtype)
    return xla.sums.sum_duplicates(values, index, size, factors, source)


def bag(rows: jax.Array, index: jax.Array, factors: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """See `xla_sums.bag`."""
    if has_kernels(implementation):
        kernels, is_interpreted = _kernels(implementation)
        return kernels.sums.bag(rows, index, factors, is_interpreted)
    return xla.bag.bag(rows, index, factors)
