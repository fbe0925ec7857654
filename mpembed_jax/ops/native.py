"""Deduplication and planning of a batch on a CPU: the rules of `xla.unique` and `planning`, in loops compiled by numba.

A batch's integers are a few hundred kilobytes and its decisions depend on each other, so plain loops cost half of XLA's
passes over arrays, or less. Everything here is integer arithmetic: the same bits as the reference. Each function for jax
becomes one foreign call, which updates the cache's arrays in place.
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

_NO_ID, _SEEDS = np.int32(NO_ID), caching.SKETCH_SEEDS
_MAX_ESTIMATE, _PINNED, _MAX_AGE = caching.MAX_ESTIMATE, caching.PINNED, caching.MAX_AGE
# An index known to be at least 0 needs no wrapping, which would keep loops over ways from being vectorized.
_ONE, _MAX_WAYS = np.uint64(1), np.uint64(caching.MAX_WAYS)


@numba.njit(inline="always")
def _fmix32(x):
    """See numerics.fmix32."""
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(inline="always")
def _scale_to(mixed, size):
    """See numerics.scale_to."""
    return np.int64((np.uint64(mixed) * np.uint64(size)) >> np.uint64(32))


@numba.njit(inline="always")
def _cell(depth, x, groups, width):
    """See cache.sketch_cells."""
    quotient, group = np.uint32(x) // np.uint32(groups), np.int64(np.uint32(x) % np.uint32(groups))
    return (depth * groups + group) * width + _scale_to(_fmix32(quotient ^ np.uint32(_SEEDS[depth])), width)


# --- put


@numba.njit
def _put_half(frame, half):
    index, values, array = argument(frame, 0, np.int32), argument(frame, 1, np.uint32), result(frame, 0, np.uint32)
    num = len(index)
    if num == 0:
        return
    words = np.uint64(len(values) // num)
    num_rows = np.uint64(len(array)) // words
    for i in range(num * half // 2, num * (half + 1) // 2):
        here, row = np.uint64(np.uint32(index[i])), np.uint64(i)  # negative indices, too, are beyond the rows
        if here < num_rows:
            for word in range(words):
                array[here * words + word] = values[row * words + word]


_put = call_frame.halves(_put_half)


def put(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """See `access.put`, for rows of float32 or uint32."""
    call_frame.register("mpembed_put", _put)
    out = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.ffi.ffi_call("mpembed_put", out, input_output_aliases={2: 0})(index, values, array)


# --- unique


@numba.njit
def _unique(frame):
    ids, step = argument(frame, 0, np.int32), argument(frame, 1, np.int32)[0]
    unique_ids, inverse, counts = result(frame, 0, np.int32), result(frame, 1, np.int32), result(frame, 2, np.int32)
    numbers, table = result(frame, 3, np.int32), result(frame, 4, np.int32)
    seen, times = result(frame, 5, np.int32), result(frame, 6, np.int32)  # of all distinct ids, over the budget or not
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
    if num_ids < num_found:
        _keep_smallest(ids, step, seen, times, inverse, num_found, num_ids, size - 1)
    for index in range(num_ids):
        unique_ids[index], counts[index] = seen[index], times[index]
    for index in range(num_ids, size):
        unique_ids[index], counts[index] = _NO_ID, 0
    numbers[0], numbers[1] = num_ids, num_found - num_ids


@numba.njit
def _keep_smallest(ids, step, seen, times, inverse, num_found, num_kept, padding):
    """Over the budget: the ids smallest by fmix32(id xor step) stay, in their order."""
    mixed, moved = np.empty(num_found, np.uint32), np.empty(num_found, np.int32)
    for index in range(num_found):
        mixed[index] = _fmix32(np.uint32(seen[index]) ^ np.uint32(step))
    limit = np.sort(mixed)[max(num_kept - 1, 0)]
    kept = 0
    for index in range(num_found):
        moved[index] = padding
        if num_kept > 0 and mixed[index] <= limit:
            moved[index], seen[kept], times[kept] = kept, seen[index], times[index]
            kept += 1
    for position in range(len(ids)):
        if ids[position] != _NO_ID:
            inverse[position] = moved[inverse[position]]


def unique(ids: jax.Array, size: int, step: jax.Array) -> tuple[jax.Array, ...]:
    """See `xla.unique`, whose fields are returned; for at least one position."""
    call_frame.register("mpembed_unique", _unique)
    (num_positions,) = ids.shape
    num_buckets = 1 << max(4, (2 * num_positions - 1).bit_length())
    shapes = [size, num_positions, size, 2, num_buckets, num_positions, num_positions]
    call = jax.ffi.ffi_call("mpembed_unique", [jax.ShapeDtypeStruct((n,), jnp.int32) for n in shapes])
    unique_ids, inverse, counts, numbers, *_ = call(ids, step.reshape(1))
    return unique_ids, inverse, counts, numbers[0], numbers[1]


# --- plan


@numba.njit
def _find_half(frame, half):
    """Finds the sets of one half of the ids, and their lines if they have one.

    Without a branch on what is found: a wrong guess would end the overlap of one id's cache misses with the next's.
    """
    ids, shape, tags = argument(frame, 0, np.int32), argument(frame, 4, np.int32), result(frame, 0, np.int32)
    line, set_of, num_ids = (
        result(frame, 8, np.int32),
        result(frame, 10, np.int32),
        np.int64(argument(frame, 3, np.int32)[0]),
    )
    sets, ways, groups = np.int64(shape[0]), np.int64(shape[1]), np.int64(shape[2])
    for i in range(num_ids * half // 2, num_ids * (half + 1) // 2):
        x = np.uint32(ids[i])
        home = np.int64(x % np.uint32(groups)) + groups * _scale_to(_fmix32(x // np.uint32(groups)), sets // groups)
        first, place = np.uint64(home * ways), np.uint64(0)
        for way in range(np.uint64(ways)):
            place += np.uint64(way + _ONE) if tags[first + way] == ids[i] else np.uint64(0)
        set_of[i], line[i] = home, first + place - _ONE if place > 0 else sets * ways


_find_lines = call_frame.halves(_find_half)


@numba.njit
def _pin(ids, counts, step, geometry, priority, sketch, line, estimate, order, queue):
    """Pins the lines that were found; queues the misses. Returns how many of each."""
    sets, ways, groups, width = geometry
    num_hits, num_misses, is_lfu = 0, 0, width > 0
    for i in range(len(ids)):
        here = line[i]
        if here < sets * ways:
            estimate[i] = min(priority[here] + counts[i], _MAX_ESTIMATE) if is_lfu else 0
            priority[here] = _PINNED if is_lfu else step
            order[num_hits] = i
            num_hits += 1
        else:
            estimate[i] = 0
            queue[num_misses] = i
            num_misses += 1
    if is_lfu:
        for k in range(num_misses):
            i = queue[k]
            seen = min(sketch[_cell(0, ids[i], groups, width)], sketch[_cell(1, ids[i], groups, width)])
            estimate[i] = min(np.int32(seen) + counts[i], _MAX_ESTIMATE)
    return num_hits, num_misses


@numba.njit
def _enter(
    ids, step, geometry, tags, priority, line, estimate, set_of, bucket_of, victim, victim_use, order, num_cached, queue,
    num_waiting, best, winner, full,
):  # fmt: skip
    """Lets misses enter in the rounds of rounds.enter, and appends them to `order`. Returns the number of cached ids."""
    _, ways, _, width = geometry
    is_lfu, last = width > 0, len(ids)
    best[:], winner[:], full[:] = -1, _NO_ID, -1
    while num_waiting > 0:
        for k in range(num_waiting):  # a bucket's best miss: the largest estimate, then the smallest id
            i = queue[k]
            b = bucket_of[i]
            if estimate[i] > best[b] or (estimate[i] == best[b] and ids[i] < winner[b]):
                best[b], winner[b] = estimate[i], ids[i]
        for k in range(num_waiting):  # meets the cheapest way of its set
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
            here, use = np.int64(first + cheapest % _MAX_WAYS), np.int64(cheapest // _MAX_WAYS)
            if use <= (estimate[i] if is_lfu else _MAX_AGE):
                victim[i], victim_use[i] = tags[here], use - 1
                tags[here], priority[here], line[i] = ids[i], _PINNED if is_lfu else step, here
                order[num_cached] = i
                num_cached += 1
            else:
                full[bucket_of[i]] = set_of[i]
        num_left = 0
        for k in range(num_waiting):  # a set that its best miss could not enter is closed; other losers wait
            i = queue[k]
            if full[bucket_of[i]] == set_of[i]:
                last -= 1
                order[last] = i
            elif winner[bucket_of[i]] != ids[i]:
                queue[num_left] = i
                num_left += 1
        for k in range(num_left):
            b = bucket_of[queue[k]]
            best[b], winner[b], full[b] = -1, _NO_ID, -1
        num_waiting = num_left
    return num_cached


@numba.njit
def _plan(frame):
    ids, inverse, counts = argument(frame, 0, np.int32), argument(frame, 1, np.int32), argument(frame, 2, np.int32)
    numbers, shape = argument(frame, 3, np.int32), argument(frame, 4, np.int32)
    tags, priority, sketch = result(frame, 0, np.int32), result(frame, 1, np.int32), result(frame, 2, np.uint16)
    placed_ids, placed_line, victim_ids = result(frame, 3, np.int32), result(frame, 4, np.int32), result(frame, 5, np.int32)
    placed_inverse, found = result(frame, 6, np.int32), result(frame, 7, np.int32)
    line, estimate, set_of = result(frame, 8, np.int32), result(frame, 9, np.int32), result(frame, 10, np.int32)
    order, queue, bucket_of = result(frame, 11, np.int32), result(frame, 12, np.int32), result(frame, 13, np.int32)
    victim, victim_use = result(frame, 14, np.int32), result(frame, 15, np.int32)
    best, winner, full = result(frame, 16, np.int32), result(frame, 17, np.int32), result(frame, 18, np.int32)
    num_ids, step, must_halve = numbers[0], numbers[1], numbers[2]
    geometry = (np.int64(shape[0]), np.int64(shape[1]), np.int64(shape[2]), np.int64(shape[3]))
    sets, ways, groups, width = geometry
    is_lfu, real = width > 0, ids[:num_ids]

    if must_halve:
        for k in range(len(priority)):
            priority[k] >>= 1
        for k in range(len(sketch)):
            sketch[k] >>= 1
    _find_lines(frame)
    num_hits, num_misses = _pin(real, counts, step, geometry, priority, sketch, line, estimate, order, queue)
    for k in range(num_misses):
        i = queue[k]
        victim[i] = _NO_ID
        bucket_of[i] = set_of[i] if len(best) == sets else _scale_to(_fmix32(set_of[i]), len(best))
    num_cached = num_hits
    if num_misses > 0:
        num_cached = _enter(
            real, step, geometry, tags, priority, line, estimate, set_of, bucket_of, victim, victim_use, order, num_hits,
            queue, num_misses, best, winner, full,
        )  # fmt: skip

    hit_requests, moved = 0, queue
    for k in range(num_ids):
        i = order[k]
        placed_ids[k], placed_line[k], victim_ids[k], moved[i] = ids[i], line[i], _NO_ID, k
        if k < num_hits:
            hit_requests += counts[i]
        else:
            victim_ids[k] = victim[i]
        if is_lfu:  # lines of this batch take their estimates; the sketch keeps those of ids without a line
            if k < num_cached:
                priority[line[i]] = estimate[i]
            if k >= num_hits and (k >= num_cached or victim[i] != _NO_ID):
                left, use = (ids[i], estimate[i]) if k >= num_cached else (victim[i], victim_use[i])
                for depth in range(2):
                    cell = _cell(depth, left, groups, width)
                    sketch[cell] = max(sketch[cell], np.uint16(use))
    for k in range(num_ids, len(ids)):
        placed_ids[k], placed_line[k], victim_ids[k], moved[k] = _NO_ID, sets * ways, _NO_ID, len(ids) - 1
    for position in range(len(inverse)):
        placed_inverse[position] = moved[inverse[position]]
    found[0], found[1], found[2] = num_hits, num_cached, hit_requests


def plan(
    cache: CacheState,
    ids: jax.Array,
    inverse: jax.Array,
    counts: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
) -> tuple[CacheState, tuple[jax.Array, ...]]:
    """See `planning.place`, whose Placed has the fields of the second result."""
    call_frame.register("mpembed_plan", _plan)
    sets, ways, groups = cache.geometry
    width = ids.shape[0]
    sketch: Any = cache.sketch if cache.policy == "lfu" else jnp.zeros((0,), jnp.uint16)
    held = [cache.tags, cache.priority, sketch]
    num_buckets = min(sets, 1 << max(4, (2 * width - 1).bit_length()))  # as rounds.enter has
    sizes = [width] * 3 + [inverse.shape[0], 3] + [width] * 8 + [num_buckets] * 3
    results: Any = jax.ffi.ffi_call(
        "mpembed_plan",
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in held] + [jax.ShapeDtypeStruct((n,), jnp.int32) for n in sizes],
        input_output_aliases={5: 0, 6: 1, 7: 2},
    )(
        ids, inverse, counts, jnp.stack([num_ids, step, must_halve.astype(jnp.int32)]),
        np.asarray([sets, ways, groups, sketch.shape[-1]], np.int32), *held,
    )  # fmt: skip
    tags, priority, sketch, unique_ids, line, victim_ids, inverse, found, *_ = results
    sketch = sketch if cache.policy == "lfu" else None
    cache = dataclasses.replace(cache, tags=tags, priority=priority, sketch=sketch)
    return cache, (unique_ids, inverse, line, victim_ids, *found)
