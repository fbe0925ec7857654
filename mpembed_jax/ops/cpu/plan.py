"""The plan of a batch on a CPU, by loops that numba compiles.

The rules are those of `xla.plan.make_plan` and `xla.rounds.enter`. Each decision depends on earlier
ones, so plain loops take at most half the time of XLA's passes over arrays. All arithmetic is on
integers, so the bits are those of the reference. The arrays of the cache are updated in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache.residency import CacheState
from mpembed_jax.cache.spec import MAX_WAYS, POLICIES
from mpembed_jax.ops.cpu import call_frame, policy
from mpembed_jax.ops.cpu.call_frame import argument, ask_for, compiled, result
from mpembed_jax.ops.cpu.hashes import cell, fmix32, scale_to
from mpembed_jax.ops.records import Moves, Unique
from mpembed_jax.row_ids import NO_ID

_NO_ID = np.int32(NO_ID)
# The operands and results of the call, by position. Tags, priority and sketch are results 0 to 2
# and also operands 5 to 7: the call changes them in place.
_IDS, _INVERSE, _COUNTS, _NUMBERS, _SHAPE = range(5)
_TAGS, _PRIORITY, _SKETCH, _PLACED_IDS, _PLACED_LINE, _VICTIM_IDS, _PLACED_INVERSE, _FOUND = range(
    8
)
_LINE, _ESTIMATE, _SET_OF, _ORDER, _QUEUE, _BUCKET_OF, _VICTIM, _VICTIM_USE = range(8, 16)
_BEST, _WINNER, _FULL = range(16, 19)
_AHEAD = 16  # ids between a prefetch and its use
# An unsigned index needs no wrapping of negative values. The wrapping would keep loops over ways
# from being vectorized.
_ONE = np.uint64(1)
_MAX_WAYS = np.uint64(MAX_WAYS)


def _find_half(frame, half):
    """Finds the lines of one half of the ids, pins those lines, and queues the misses.

    It also estimates the use of every id. Hits are written to `order` and misses to `queue`. Both
    lists start at the index of the half's first id. found[half] becomes the number of hits, and
    found[2 + half] the number of misses. Memory is prefetched some ids ahead: first the tags of an
    id's set, then the priority of its line.
    """
    ids = argument(frame, _IDS, np.int32)
    counts = argument(frame, _COUNTS, np.int32)
    shape = argument(frame, _SHAPE, np.int32)
    numbers = argument(frame, _NUMBERS, np.int32)
    num_ids = np.int64(numbers[0])
    step = numbers[1]
    tags = result(frame, _TAGS, np.int32)
    priority = result(frame, _PRIORITY, np.int32)
    sketch = result(frame, _SKETCH, np.uint16)
    found = result(frame, _FOUND, np.int32)
    line = result(frame, _LINE, np.int32)
    estimate = result(frame, _ESTIMATE, np.int32)
    set_of = result(frame, _SET_OF, np.int32)
    order = result(frame, _ORDER, np.int32)
    queue = result(frame, _QUEUE, np.int32)
    sets = np.int64(shape[0])
    ways = np.int64(shape[1])
    groups = np.int64(shape[2])
    width = np.int64(shape[3])
    by = shape[4]
    begin = num_ids * half // 2
    end = num_ids * (half + 1) // 2
    num_hits, num_misses = 0, 0
    for ahead in range(begin, end + 2 * _AHEAD):
        if ahead < end:
            x = np.uint32(ids[ahead])
            home = np.int64(x % np.uint32(groups)) + groups * scale_to(
                fmix32(x // np.uint32(groups)), sets // groups
            )
            set_of[ahead] = home
            ask_for(tags, home * ways, ways)
        i = ahead - _AHEAD
        if begin <= i < end:
            # The search has no branch on a match. A mispredicted branch would stop the overlap of
            # memory accesses.
            first = np.uint64(np.int64(set_of[i]) * ways)
            place = np.uint64(0)
            for way in range(np.uint64(ways)):
                place += np.uint64(way + _ONE) if tags[first + way] == ids[i] else np.uint64(0)
            here = np.int64(first + place - _ONE if place > 0 else first)
            ask_for(priority, here, 1)
            line[i] = here if place > 0 else sets * ways
        i -= _AHEAD
        if i < begin:
            continue
        here = line[i]
        if here < sets * ways:
            estimate[i] = policy.estimate(by, priority[here], counts[i])
            priority[here] = policy.pinned(by, step)
            order[begin + num_hits] = i
            num_hits += 1
        else:
            estimate[i] = 0
            queue[begin + num_misses] = i
            num_misses += 1
            ask_for(priority, np.int64(set_of[i]) * ways, ways)
            if policy.counts_use(by):
                ask_for(sketch, cell(0, ids[i], groups, width), 1)
                ask_for(sketch, cell(1, ids[i], groups, width), 1)
    if policy.counts_use(by):
        for k in range(begin, begin + num_misses):
            i = queue[k]
            seen = min(
                sketch[cell(0, ids[i], groups, width)], sketch[cell(1, ids[i], groups, width)]
            )
            estimate[i] = policy.estimate(by, np.int32(seen), counts[i])
    found[half], found[2 + half] = num_hits, num_misses


_find = call_frame.halves(_find_half)


@compiled
def _join(values, begin, num_first, num_second):
    """Moves num_second entries from index `begin` to index num_first; returns where they end."""
    for k in range(num_second):
        values[num_first + k] = values[begin + k]
    return num_first + num_second


@compiled
def _enter(
    ids, step, ways, by, tags, priority, line, estimate, set_of, bucket_of, victim, victim_use,
    order, num_cached, queue, num_waiting, best, winner, full,
):  # fmt: skip
    """Runs the rounds of xla.rounds.enter.

    A bucket is a set, or several sets that share one (see cache.spec.Geometry.election_buckets).
    A miss that gets a line is appended to the front part of `order`. A bypassed id is written to
    the back part, which grows from the end.

    Returns the number of ids that are in lines.
    """
    last = len(ids)
    best[:], winner[:], full[:] = -1, _NO_ID, -1
    while num_waiting > 0:
        for k in range(num_waiting):
            # Elects the first miss of each bucket.
            i = queue[k]
            b = bucket_of[i]
            if policy.comes_first(estimate[i], ids[i], best[b], winner[b]):
                best[b], winner[b] = estimate[i], ids[i]
        for k in range(num_waiting):
            # The elected miss meets the cheapest way of its set.
            i = queue[k]
            if winner[bucket_of[i]] != ids[i]:
                continue
            first = np.uint64(set_of[i] * ways)
            cheapest = np.uint64(1) << np.uint64(40)
            for way in range(np.uint64(ways)):
                cost = policy.rank(by, tags[first + way], priority[first + way], step)
                cheapest = min(cheapest, cost * _MAX_WAYS + way)
            here = np.int64(first + cheapest % _MAX_WAYS)
            rank = np.int64(cheapest // _MAX_WAYS)
            if policy.may_enter(by, rank, estimate[i]):
                # Evicts: the tag of the victim's line becomes that of the miss.
                victim[i], victim_use[i] = tags[here], policy.use_of(rank)
                tags[here] = ids[i]
                priority[here] = policy.pinned(by, step)
                line[i] = here
                order[num_cached] = i
                num_cached += 1
            else:
                full[bucket_of[i]] = set_of[i]
        num_left = 0
        for k in range(num_waiting):
            # If the best miss of a set could not enter, the set is closed to all its misses. In
            # other sets, misses that were not elected wait for the next round.
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


def _place_half(frame, half):
    """Puts one part of the ids into the order of the plan, and stores their estimates.

    An estimate is stored at the id's line, or in the sketch if the id has no line. The use of each
    victim is stored in the sketch, too.
    """
    ids = argument(frame, _IDS, np.int32)
    counts = argument(frame, _COUNTS, np.int32)
    shape = argument(frame, _SHAPE, np.int32)
    priority = result(frame, _PRIORITY, np.int32)
    sketch = result(frame, _SKETCH, np.uint16)
    placed_ids = result(frame, _PLACED_IDS, np.int32)
    placed_line = result(frame, _PLACED_LINE, np.int32)
    victim_ids = result(frame, _VICTIM_IDS, np.int32)
    found = result(frame, _FOUND, np.int32)
    line = result(frame, _LINE, np.int32)
    estimate = result(frame, _ESTIMATE, np.int32)
    order = result(frame, _ORDER, np.int32)
    moved = result(frame, _QUEUE, np.int32)
    victim = result(frame, _VICTIM, np.int32)
    victim_use = result(frame, _VICTIM_USE, np.int32)
    groups = np.int64(shape[2])
    width = np.int64(shape[3])
    num_ids = np.int64(argument(frame, _NUMBERS, np.int32)[0])
    num_hits, num_cached = np.int64(found[0]), np.int64(found[1])
    by = shape[4]
    hit_requests = 0
    # Only the second half writes to the sketch, because ids of both halves may share a cell. The
    # first half has hits only, which write no cell.
    middle = min(num_ids // 2, num_hits)
    for k in range(middle * half, num_ids if half else middle):
        i = order[k]
        placed_ids[k] = ids[i]
        placed_line[k] = line[i]
        victim_ids[k] = _NO_ID
        moved[i] = k
        if k < num_hits:
            hit_requests += counts[i]
        else:
            victim_ids[k] = victim[i]
        if policy.counts_use(by):
            # The lines of this batch take the estimates of their ids. The sketch takes those of
            # bypassed ids, and the uses of victims.
            if k < num_cached:
                priority[line[i]] = estimate[i]
            if k >= num_hits and (k >= num_cached or victim[i] != _NO_ID):
                left, use = (ids[i], estimate[i]) if k >= num_cached else (victim[i], victim_use[i])
                for depth in range(2):
                    place = cell(depth, left, groups, width)
                    sketch[place] = max(sketch[place], np.uint16(use))
    found[2 + half] = hit_requests


_place = call_frame.halves(_place_half)


def _plan(frame):
    ids = argument(frame, _IDS, np.int32)
    inverse = argument(frame, _INVERSE, np.int32)
    numbers = argument(frame, _NUMBERS, np.int32)
    shape = argument(frame, _SHAPE, np.int32)
    tags = result(frame, _TAGS, np.int32)
    priority = result(frame, _PRIORITY, np.int32)
    sketch = result(frame, _SKETCH, np.uint16)
    placed_ids = result(frame, _PLACED_IDS, np.int32)
    placed_line = result(frame, _PLACED_LINE, np.int32)
    victim_ids = result(frame, _VICTIM_IDS, np.int32)
    placed_inverse = result(frame, _PLACED_INVERSE, np.int32)
    found = result(frame, _FOUND, np.int32)
    line = result(frame, _LINE, np.int32)
    estimate = result(frame, _ESTIMATE, np.int32)
    set_of = result(frame, _SET_OF, np.int32)
    order = result(frame, _ORDER, np.int32)
    queue = result(frame, _QUEUE, np.int32)
    bucket_of = result(frame, _BUCKET_OF, np.int32)
    victim = result(frame, _VICTIM, np.int32)
    victim_use = result(frame, _VICTIM_USE, np.int32)
    best = result(frame, _BEST, np.int32)
    winner = result(frame, _WINNER, np.int32)
    full = result(frame, _FULL, np.int32)
    num_ids = numbers[0]
    step = numbers[1]
    must_halve = numbers[2]
    sets = np.int64(shape[0])
    ways = np.int64(shape[1])
    by = shape[4]

    if must_halve:
        policy.age(priority, sketch)
    _find(frame)
    num_hits = _join(order, num_ids // 2, found[0], found[1])
    num_misses = _join(queue, num_ids // 2, found[2], found[3])
    for k in range(num_misses):
        i = queue[k]
        victim[i] = _NO_ID
        bucket_of[i] = set_of[i] if len(best) == sets else scale_to(fmix32(set_of[i]), len(best))
    num_cached = num_hits
    if num_misses > 0:
        num_cached = _enter(
            ids[:num_ids], step, ways, by, tags, priority, line, estimate, set_of, bucket_of,
            victim, victim_use, order, num_hits, queue, num_misses, best, winner, full,
        )  # fmt: skip
    found[0], found[1] = num_hits, num_cached
    _place(frame)
    found[2] += found[3]
    moved = queue  # the queue is empty; its array now holds the new index of each id
    for k in range(num_ids, len(ids)):
        placed_ids[k] = _NO_ID
        placed_line[k] = sets * ways
        victim_ids[k] = _NO_ID
        moved[k] = len(ids) - 1
    for position in range(len(inverse)):
        placed_inverse[position] = moved[inverse[position]]


def plan(
    cache: CacheState, unique: Unique, step: jax.Array, must_halve: jax.Array
) -> tuple[CacheState, Moves, jax.Array, jax.Array]:
    """Plans a batch; see `ops.plan`.

    Args:
      cache: the state before the step.
      unique: the distinct ids of the batch.
      step: int32 scalar, the number of this prefetch.
      must_halve: bool scalar, whether all LFU estimates are halved first.
    """
    ids, inverse, counts, num_ids, *_ = unique
    call_frame.register("mpembed_plan", _plan)
    sets, ways, groups = cache.geometry
    width = ids.shape[0]
    sketch: Any = cache.sketch if cache.sketch is not None else jnp.zeros((0,), jnp.uint16)
    held = [cache.tags, cache.priority, sketch]
    num_buckets = cache.geometry.election_buckets(width)
    sizes = dict.fromkeys(
        (_PLACED_IDS, _PLACED_LINE, _VICTIM_IDS, _LINE, _ESTIMATE, _SET_OF, _ORDER, _QUEUE), width
    )
    sizes |= dict.fromkeys((_BUCKET_OF, _VICTIM, _VICTIM_USE), width)
    sizes |= dict.fromkeys((_BEST, _WINNER, _FULL), num_buckets)
    sizes |= {_PLACED_INVERSE: inverse.shape[0], _FOUND: 4}
    results: Any = jax.ffi.ffi_call(
        "mpembed_plan",
        call_frame.shapes_of(held)
        + [jax.ShapeDtypeStruct((sizes[number],), jnp.int32) for number in sorted(sizes)],
        input_output_aliases={_SHAPE + 1: _TAGS, _SHAPE + 2: _PRIORITY, _SHAPE + 3: _SKETCH},
        vmap_method="sequential",
    )(
        ids,
        inverse,
        counts,
        jnp.stack([num_ids, step, must_halve.astype(jnp.int32)]),
        np.asarray([sets, ways, groups, sketch.shape[-1], POLICIES.index(cache.policy)], np.int32),
        *held,
    )
    tags, priority, sketch = results[_TAGS], results[_PRIORITY], results[_SKETCH]
    sketch = None if cache.sketch is None else sketch
    cache = dataclasses.replace(cache, tags=tags, priority=priority, sketch=sketch)
    num_hits, num_cached, hit_requests = results[_FOUND][:3]
    moves = Moves(
        results[_PLACED_IDS],
        results[_PLACED_LINE],
        results[_VICTIM_IDS],
        num_hits,
        num_cached,
        num_ids,
    )
    return cache, moves, results[_PLACED_INVERSE], hit_requests
