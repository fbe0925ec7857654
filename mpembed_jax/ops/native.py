"""Deduplication and planning of a batch on a CPU: the rules of `xla.unique` and `planning`, in loops compiled by numba.

A batch's integers are some hundred kilobytes and its decisions depend on each other, so plain loops beat XLA's passes over
arrays two to four times. Everything here is integer arithmetic, so the results are the same bits. The functions under a
`jax.jit` become one foreign call each; the cache's arrays are updated in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np

from mpembed_jax import cache as caching
from mpembed_jax.cache import CacheState
from mpembed_jax.ops import call_frame
from mpembed_jax.ops.call_frame import argument, result
from mpembed_jax.table import NO_ID

_NO_ID = np.int32(NO_ID)
_MAX_ESTIMATE, _PINNED, _MAX_AGE = caching.MAX_ESTIMATE, caching.PINNED, caching.MAX_AGE
_MAX_WAYS, _ONE = np.uint64(caching.MAX_WAYS), np.uint64(1)  # unsigned: an index that cannot be negative is vectorized
_SEEDS = caching.SKETCH_SEEDS


@numba.njit(inline="always")
def _fmix32(x: Any) -> Any:
    """See numerics.fmix32."""
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(inline="always")
def _scale_to(mixed: Any, size: Any) -> Any:
    """See numerics.scale_to."""
    return np.int64((np.uint64(mixed) * np.uint64(size)) >> np.uint64(32))


@numba.njit(inline="always")
def _cell(sketch_row: Any, x: Any, groups: Any, width: Any) -> Any:
    """See cache.sketch_cells."""
    quotient, group = np.uint32(x) // np.uint32(groups), np.int64(np.uint32(x) % np.uint32(groups))
    column = _scale_to(_fmix32(np.uint32(quotient) ^ np.uint32(_SEEDS[sketch_row])), width)
    return (sketch_row * groups + group) * width + column


# --- unique


@numba.njit
def _unique(frame: int) -> None:
    ids, step = argument(frame, 0, np.int32), argument(frame, 1, np.int32)[0]
    unique_ids, inverse, counts = result(frame, 0, np.int32), result(frame, 1, np.int32), result(frame, 2, np.int32)
    numbers = result(frame, 3, np.int32)
    table, seen, times = result(frame, 4, np.int32), result(frame, 5, np.int32), result(frame, 6, np.int32)
    size, mask = len(unique_ids), len(table) - 1

    table[:] = -1
    num_found = 0
    for position in range(len(ids)):
        x = ids[position]
        if x == _NO_ID:
            inverse[position] = size - 1
            continue
        bucket = np.int64(_fmix32(x)) & mask
        while table[bucket] >= 0 and seen[table[bucket]] != x:
            bucket = (bucket + 1) & mask
        index = table[bucket]
        if index < 0:
            index = num_found
            table[bucket], seen[index], times[index] = index, x, 0
            num_found += 1
        times[index] += 1
        inverse[position] = index

    num_ids = min(num_found, size - 1)
    if num_found > num_ids:  # over the budget: the smallest by hash stay, in their order
        mixed = np.empty(num_found, np.uint32)
        for index in range(num_found):
            mixed[index] = _fmix32(np.uint32(seen[index]) ^ np.uint32(step))
        limit = np.sort(mixed)[max(num_ids - 1, 0)]
        kept = 0
        moved = np.empty(num_found, np.int32)
        for index in range(num_found):
            is_kept = num_ids > 0 and mixed[index] <= limit
            moved[index] = kept if is_kept else size - 1
            if is_kept:
                seen[kept], times[kept] = seen[index], times[index]
                kept += 1
        for position in range(len(ids)):
            if ids[position] != _NO_ID:
                inverse[position] = moved[inverse[position]]
    for index in range(num_ids):
        unique_ids[index], counts[index] = seen[index], times[index]
    for index in range(num_ids, size):
        unique_ids[index], counts[index] = _NO_ID, 0
    numbers[0], numbers[1] = num_ids, num_found - num_ids


def unique(ids: jax.Array, size: int, step: jax.Array) -> tuple[jax.Array, ...]:
    """See `xla.unique`, for at least one position; returns the fields of its result."""
    call_frame.register("mpembed_unique", _unique)
    (num_positions,) = ids.shape
    num_buckets = 1 << max(4, (2 * num_positions - 1).bit_length())
    shapes = [size, num_positions, size, 2, num_buckets, num_positions, num_positions]
    call = jax.ffi.ffi_call("mpembed_unique", [jax.ShapeDtypeStruct((n,), jnp.int32) for n in shapes])
    unique_ids, inverse, counts, numbers, *_ = call(ids, step.reshape(1))
    return unique_ids, inverse, counts, numbers[0], numbers[1]


# --- plan


@numba.njit
def _find(
    ids: Any, counts: Any, step: Any, is_lfu: Any, sets: Any, ways: Any, groups: Any, width: Any, tags: Any, priority: Any,
    sketch: Any, line: Any, estimate: Any, set_of: Any, order: Any, queue: Any,
) -> tuple[int, int]:  # fmt: skip
    """Finds the lines of ids and pins them; queues the misses. Returns how many of each."""
    num_hits, num_misses, lines = 0, 0, sets * ways
    # First without a branch on what is found: a wrong guess would end the overlap of one id's cache misses with the next's.
    for i in range(len(ids)):
        x = np.uint32(ids[i])
        home = np.int64(x % np.uint32(groups)) + groups * _scale_to(_fmix32(x // np.uint32(groups)), sets // groups)
        first, place = np.uint64(home * ways), np.uint64(0)
        for way in range(np.uint64(ways)):
            place += np.uint64(way + _ONE) if tags[first + way] == ids[i] else np.uint64(0)
        set_of[i], line[i] = home, first + place - _ONE if place > 0 else lines
    for i in range(len(ids)):
        here = line[i]
        if here < lines:
            estimate[i] = min(priority[here] + counts[i], _MAX_ESTIMATE) if is_lfu else 0
            priority[here] = _PINNED if is_lfu else step
            order[num_hits] = i
            num_hits += 1
        else:
            queue[num_misses] = i
            num_misses += 1
            estimate[i] = 0
    if is_lfu:
        for k in range(num_misses):
            i = queue[k]
            seen = min(sketch[_cell(0, ids[i], groups, width)], sketch[_cell(1, ids[i], groups, width)])
            estimate[i] = min(np.int32(seen) + counts[i], _MAX_ESTIMATE)
    return num_hits, num_misses


@numba.njit
def _enter(
    ids: Any, step: Any, is_lfu: Any, ways: Any, tags: Any, priority: Any, line: Any, estimate: Any, bucket_of: Any,
    set_of: Any, victim: Any, victim_use: Any, order: Any, num_cached: int, num_ids: int, queue: Any, num_waiting: int,
    best: Any, winner: Any, is_full: Any,
) -> int:  # fmt: skip
    """The rounds of planning._enter: every set's best waiting miss meets its cheapest way. Returns the number of cached."""
    last = num_ids
    best[:], winner[:], is_full[:] = -1, _NO_ID, 0
    while num_waiting > 0:
        for k in range(num_waiting):
            i = queue[k]
            b = bucket_of[i]
            # the largest estimate, then the smallest id
            if estimate[i] > best[b] or (estimate[i] == best[b] and ids[i] < winner[b]):
                best[b], winner[b] = estimate[i], ids[i]
        for k in range(num_waiting):
            i = queue[k]
            if winner[bucket_of[i]] != ids[i]:
                continue
            first, cheapest = np.uint64(set_of[i] * ways), np.uint64(1) << np.uint64(40)
            for way in range(np.uint64(ways)):
                if is_lfu:
                    rank = np.uint64(priority[first + way] + 1)
                else:
                    rank = np.uint64(_MAX_AGE + 1 - min(np.int64(np.int32(step - priority[first + way])), _MAX_AGE))
                rank = np.uint64(0) if tags[first + way] == _NO_ID else rank
                cheapest = min(cheapest, rank * _MAX_WAYS + way)
            here, rank = np.int64(first + cheapest % _MAX_WAYS), np.int64(cheapest // _MAX_WAYS)
            if rank <= (estimate[i] if is_lfu else _MAX_AGE):
                victim[i], victim_use[i] = tags[here], rank - 1
                tags[here], priority[here], line[i] = ids[i], _PINNED if is_lfu else step, here
                order[num_cached] = i
                num_cached += 1
            else:
                is_full[bucket_of[i]] = set_of[i] + 1
        num_left = 0
        for k in range(num_waiting):
            i = queue[k]
            if is_full[bucket_of[i]] == set_of[i] + 1:
                last -= 1
                order[last] = i
            elif winner[bucket_of[i]] != ids[i]:
                queue[num_left] = i
                num_left += 1
        for k in range(num_left):
            b = bucket_of[queue[k]]
            best[b], winner[b], is_full[b] = -1, _NO_ID, 0
        num_waiting = num_left
    return num_cached


@numba.njit
def _plan(frame: int) -> None:
    ids, inverse, counts = argument(frame, 0, np.int32), argument(frame, 1, np.int32), argument(frame, 2, np.int32)
    numbers, shape = argument(frame, 3, np.int32), argument(frame, 4, np.int32)
    tags, priority, sketch = result(frame, 0, np.int32), result(frame, 1, np.int32), result(frame, 2, np.uint16)
    placed_ids, placed_line, placed_victim = (
        result(frame, 3, np.int32),
        result(frame, 4, np.int32),
        result(frame, 5, np.int32),
    )
    moved_inverse, found = result(frame, 6, np.int32), result(frame, 7, np.int32)
    line, estimate, set_of = result(frame, 8, np.int32), result(frame, 9, np.int32), result(frame, 10, np.int32)
    bucket_of, order, queue = result(frame, 11, np.int32), result(frame, 12, np.int32), result(frame, 13, np.int32)
    victim, victim_use = result(frame, 14, np.int32), result(frame, 15, np.int32)
    best, winner, is_full = result(frame, 16, np.int32), result(frame, 17, np.int32), result(frame, 18, np.int32)
    num_ids, step, must_halve = numbers[0], numbers[1], numbers[2]
    sets, ways, groups, width = np.int64(shape[0]), np.int64(shape[1]), np.int64(shape[2]), np.int64(shape[3])
    is_lfu, size, lines, num_buckets = width > 0, len(ids), sets * ways, len(best)
    real = ids[:num_ids]

    if must_halve:
        for k in range(len(priority)):
            priority[k] >>= 1
        for k in range(len(sketch)):
            sketch[k] >>= 1
    num_hits, num_misses = _find(
        real, counts, step, is_lfu, sets, ways, groups, width, tags, priority, sketch, line, estimate, set_of, order, queue
    )
    for k in range(num_misses):
        i = queue[k]
        victim[i] = _NO_ID
        bucket_of[i] = set_of[i] if num_buckets == sets else _scale_to(_fmix32(set_of[i]), num_buckets)
    num_cached = num_hits
    if num_misses:
        num_cached = _enter(
            real, step, is_lfu, ways, tags, priority, line, estimate, bucket_of, set_of, victim, victim_use, order,
            num_hits, num_ids, queue, num_misses, best, winner, is_full,
        )  # fmt: skip
    hit_requests, moved = 0, queue
    for k in range(num_ids):
        i = order[k]
        placed_ids[k], placed_line[k], moved[i] = ids[i], line[i], k
        if k < num_hits:
            hit_requests += counts[i]
            placed_victim[k] = _NO_ID
        else:
            placed_victim[k] = victim[i]
        if is_lfu:
            if k < num_cached:  # lines of this batch take their estimates
                priority[line[i]] = estimate[i]
            if k >= num_hits and (k >= num_cached or victim[i] != _NO_ID):  # the sketch keeps those of ids without a line
                left, use = (ids[i], estimate[i]) if k >= num_cached else (victim[i], victim_use[i])
                for depth in range(2):
                    cell = _cell(depth, left, groups, width)
                    sketch[cell] = max(sketch[cell], np.uint16(use))
    for k in range(num_ids, size):
        placed_ids[k], placed_line[k], placed_victim[k], moved[k] = _NO_ID, lines, _NO_ID, size - 1
    for position in range(len(inverse)):
        moved_inverse[position] = moved[inverse[position]]
    found[0], found[1], found[2] = num_hits, num_cached, hit_requests


def plan(
    cache: CacheState,
    ids: jax.Array,
    inverse: jax.Array,
    counts: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    halve: jax.Array,
) -> tuple[CacheState, tuple[jax.Array, ...]]:
    """See `planning.place`, whose Placed has the fields of the second result."""
    call_frame.register("mpembed_plan", _plan)
    sets, ways, groups = cache.geometry
    width, num_positions = ids.shape[0], inverse.shape[0]
    is_lfu = cache.policy == "lfu"
    sketch = cache.sketch if is_lfu else jnp.zeros((0,), jnp.uint16)
    shape = np.asarray([sets, ways, groups, sketch.shape[-1]], np.int32)
    num_buckets = min(sets, 1 << max(4, (2 * width - 1).bit_length()))
    held = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (cache.tags, cache.priority, sketch)]
    sizes = [width] * 3 + [num_positions, 3] + [width] * 8 + [num_buckets] * 3
    call = jax.ffi.ffi_call(
        "mpembed_plan",
        [*held, *(jax.ShapeDtypeStruct((n,), jnp.int32) for n in sizes)],
        input_output_aliases={5: 0, 6: 1, 7: 2},
    )
    numbers = jnp.stack([num_ids, step, halve.astype(jnp.int32)])
    results = call(ids, inverse, counts, numbers, shape, cache.tags, cache.priority, sketch)
    tags, priority, sketch, placed_ids, line, victim_ids, inverse, found = results[:8]
    cache = dataclasses.replace(cache, tags=tags, priority=priority, sketch=sketch if is_lfu else None)
    return cache, (placed_ids, inverse, line, victim_ids, found[0], found[1], found[2])
