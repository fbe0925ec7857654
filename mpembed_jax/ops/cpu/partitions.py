"""The integer arithmetic of a fused step on a CPU: each partition of a batch finds its own rows.

A partition of ids owns its sets, because the set of an id is a function of the id. No partition
reads or writes what belongs to another. So the number of threads does not change a result. The
rules are those of `xla.plan.make_plan` and `xla.unique`. In this file, `row` is the index of a
distinct id within its partition.
"""

import numpy as np

from mpembed_jax.cache.spec import MAX_WAYS
from mpembed_jax.ops.cpu import policy
from mpembed_jax.ops.cpu.call_frame import ask_for, compiled
from mpembed_jax.ops.cpu.hashes import cell_of, fmix32, scale_to
from mpembed_jax.row_ids import NO_ID

MAX_PARTS = 64
# With at most FEW_TASKS threads, a call is faster with at most FEW_PARTS partitions.
FEW_PARTS, FEW_TASKS = 16, 4
CHUNKS = 16  # parts of the positions; a thread counts or deals the positions of one part at a time
_NO_ID = np.int32(NO_ID)
_AHEAD = 16  # rows between a prefetch and its use
# Unsigned, so that numba does not check for negative indices. It then vectorizes loops over ways.
_ZERO, _ONE, _MAX_WAYS = np.uint64(0), np.uint64(1), np.uint64(MAX_WAYS)


@compiled
def bits_of(number):
    """Returns the base-2 logarithm (uint32) of a power of two."""
    bits = np.uint32(0)
    while 1 << bits < number:
        bits += np.uint32(1)
    return bits


@compiled
def num_parts(groups, num_tasks):
    """Returns the number of partitions of a call that num_tasks threads share."""
    return min(groups, FEW_PARTS if num_tasks <= FEW_TASKS else MAX_PARTS)


@compiled
def chunk_range(num, chunk):
    """Returns where a chunk of num positions begins and ends."""
    return num * chunk // CHUNKS, num * (chunk + 1) // CHUNKS


@compiled
def begin_parts(deals, width, num_parts, begins):
    """Turns the counts of chunks into the places of their positions, grouped by partition.

    The positions of a partition keep their order. Positions that no partition owns are last.

    Args:
      deals: i32 [CHUNKS * width], for each chunk the number of positions of each partition, and the
        number of positions without one. Each number is replaced by the place of the first of these
        positions.
      width: entries of a chunk in `deals`, at least num_parts + 1.
      num_parts: number of partitions.
      begins: i32 [num_parts + 2 or more], filled with where each partition begins, where the
        positions without one begin, and where they end.
    """
    begin = 0
    for part in range(num_parts + 1):
        begins[part] = begin
        for chunk in range(CHUNKS):
            num = deals[chunk * width + part]
            deals[chunk * width + part] = begin
            begin += num
    begins[num_parts + 1] = begin


@compiled
def buckets_of(buckets, begin, end, part):
    """Returns the part of `buckets` that a partition uses as the scratch of `deduplicate`.

    `buckets` is i32 [4 num_positions + 16 MAX_PARTS].
    """
    num_buckets = 16  # a power of two, at least twice the number of positions
    while num_buckets < 2 * (end - begin):
        num_buckets *= 2
    first = 4 * begin + 16 * part
    return buckets[first : first + num_buckets]


@compiled
def part_of(x, num_rows, groups, num_parts, shift):
    """Returns the partition that owns an id, num_parts if the id names no row.

    shift: bits_of(groups // num_parts).
    """
    part = np.int64((np.uint32(x) & np.uint32(groups - 1)) >> shift)
    return part if np.uint32(x) < np.uint32(num_rows) else num_parts


@compiled
def _divided(x, groups, bits):
    """Returns x // groups (uint32) and x % groups (int64). groups is 1 << bits."""
    return np.uint32(x) >> bits, np.int64(np.uint32(x) & np.uint32(groups - 1))


@compiled
def set_of(x, sets, groups):
    """Returns the set of id x; see residency.set_of. groups is a power of two."""
    bits = bits_of(groups)
    quotient, group = _divided(x, groups, bits)
    return group + groups * scale_to(fmix32(quotient), sets >> bits)


@compiled
def _cell(depth, x, groups, bits, width):
    """Does what hashes.cell does. groups is 1 << bits."""
    quotient, group = _divided(x, groups, bits)
    return cell_of(depth, quotient, group, groups, width)


@compiled
def deduplicate(dealt, ids, count, row_of, bucket):
    """Fills the distinct ids of a partition, their occurrences, and the row of each dealt id.

    Args:
      dealt: i32 or u64 [n], the ids dealt to this partition, in the order of positions.
      ids: of the same dtype, [n], filled with the distinct ones in order of first occurrence.
      count: i32 [n], filled with how often each occurs.
      row_of: i32 [n], filled with each dealt id's row.
      bucket: i32 [2 n or more, a power of two], scratch.

    Returns:
      The number of rows.
    """
    bucket[:] = 0
    mask = np.uint64(len(bucket) - 1)
    num_rows = np.uint64(0)
    for k in range(np.uint64(len(dealt))):
        x = dealt[k]
        b = np.uint64(fmix32(x) >> np.uint32(6)) & mask
        row = np.uint64(bucket[b])
        # Whether an id is new cannot be predicted, so no branch depends on it alone.
        while (row != _ZERO) & (ids[row - (_ONE if row != _ZERO else _ZERO)] != x):
            b = (b + _ONE) & mask
            row = np.uint64(bucket[b])
        is_new = row == _ZERO
        ids[num_rows] = x
        count[num_rows] = 0
        num_rows += _ONE if is_new else _ZERO
        row = num_rows if is_new else row
        bucket[b] = row
        count[row - _ONE] += 1
        row_of[k] = row - _ONE
    return np.int64(num_rows)


@compiled
def drop(limit, step, ids, count, row_of, num_rows, moved):
    """Keeps the rows whose fmix32(id xor step) is at most `limit`.

    The dealt ids of all other rows get row -1.

    Returns:
      The number of rows left.
    """
    num_kept = 0
    for row in range(num_rows):
        moved[row] = -1
        if fmix32(np.uint32(ids[row]) ^ np.uint32(step)) <= limit:
            moved[row] = num_kept
            ids[num_kept], count[num_kept] = ids[row], count[row]
            num_kept += 1
    for k in range(len(row_of)):
        row_of[k] = moved[row_of[k]]
    return num_kept


@compiled
def find(ids, count, step, shape, tags, priority, sketch, home, line, estimate, queue):
    """Finds and pins the lines of a partition's rows, estimates the use of all rows, queues misses.

    Memory is prefetched some rows ahead: tags first, then the priority of a line that is found, or
    the sketch's cells.

    Args:
      ids: i32 [U], distinct.
      count: i32 [U].
      step: number of this prefetch.
      shape: sets, ways, groups, the width of a row of the sketch, and the policy's number.
      tags: the cache's tags, flat.
      priority: the cache's priorities, flat.
      sketch: the cache's sketch, flat.
      home: i32 [U], filled with each row's set.
      line: i32 [U], filled with its line, -1 for a miss.
      estimate: i32 [U], filled; zeros for LRU.
      queue: i32 [U], filled with the misses.

    Returns:
      The number of misses, and the occurrences of the hits.
    """
    sets, ways, groups, width, by = shape
    has_estimates = policy.counts_use(by)
    per_group = sets // groups
    num_rows = len(ids)
    bits = bits_of(groups)
    num_misses, hit_requests = 0, 0
    for ahead in range(num_rows + 2 * _AHEAD):
        if ahead < num_rows:
            quotient, group = _divided(ids[ahead], groups, bits)
            home[ahead] = group + groups * scale_to(fmix32(quotient), per_group)
            ask_for(tags, np.int64(home[ahead]) * ways, ways)
        i = ahead - _AHEAD
        if 0 <= i < num_rows:
            first = np.uint64(np.int64(home[i]) * ways)
            place = np.uint64(0)
            for way in range(np.uint64(ways)):
                place += way + _ONE if tags[first + way] == ids[i] else np.uint64(0)
            here = np.int64(first + place) - 1 if place > np.uint64(0) else -1
            line[i] = here
            if here >= 0:
                ask_for(priority, here, 1)
            else:
                ask_for(priority, np.int64(first), ways)
                if has_estimates:
                    ask_for(sketch, _cell(0, ids[i], groups, bits, width), 1)
                    ask_for(sketch, _cell(1, ids[i], groups, bits, width), 1)
        i -= _AHEAD
        if 0 <= i < num_rows:
            here = line[i]
            estimate[i] = 0
            if here >= 0:
                if has_estimates:
                    estimate[i] = policy.estimate(by, priority[here], count[i])
                priority[here] = policy.pinned(by, step)
                hit_requests += count[i]
            else:
                if has_estimates:
                    first_cell = _cell(0, ids[i], groups, bits, width)
                    second_cell = _cell(1, ids[i], groups, bits, width)
                    seen = min(sketch[first_cell], sketch[second_cell])
                    estimate[i] = policy.estimate(by, np.int32(seen), count[i])
                queue[num_misses] = i
                num_misses += 1
    return num_misses, hit_requests


@compiled
def _comes_first(i, k, ids, estimate):
    """Returns whether miss i of a set takes its turn before miss k."""
    return policy.comes_first(estimate[i], ids[i], estimate[k], ids[k])


@compiled
def line_up(i, ways, ids, estimate, home, bucket, following):
    """Puts a miss into the queue of its set. The queue keeps its first `ways` misses.

    Returns:
      The set's bucket if the queue was empty before, else -1.
    """
    mask = np.int64(len(bucket) - 1)
    b = np.int64(fmix32(home[i]) >> np.uint32(6)) & mask
    while bucket[b] != 0 and home[bucket[b] - 1] != home[i]:
        b = (b + 1) & mask
    following[i] = -1
    if bucket[b] == 0:
        bucket[b] = i + 1
        return b
    before = bucket[b] - 1
    if _comes_first(i, before, ids, estimate):
        following[i], bucket[b] = before, i + 1
        return -1
    num_before = 1
    while following[before] >= 0 and not _comes_first(i, following[before], ids, estimate):
        before = following[before]
        num_before += 1
        if num_before >= ways:
            return -1  # no way is left for it
    if num_before < ways:
        following[i], following[before] = following[before], i
    return -1


@compiled
def _remember(sketch, x, use, groups, bits, width):
    """Raises the cells of an id without a line to its use."""
    for depth in range(2):
        place = _cell(depth, x, groups, bits, width)
        sketch[place] = max(sketch[place], np.uint16(use))


@compiled
def enter(
    ids, step, shape, tags, priority, sketch, home, line, estimate, queue, victim,
    bucket, following, open_buckets,
):  # fmt: skip
    """Lets the misses of a partition enter its sets, by the rules of xla.plan.make_plan.

    Args:
      ids: see `find`, also for step, shape, tags, priority, sketch, home, line and estimate.
      queue: i32 [num_misses].
      victim: i32 [U], filled for newcomers with the id whose line they take, or NO_ID.
      bucket: scratch, as in `deduplicate`.
      following: i32 [U], scratch.
      open_buckets: i32 [num_misses], scratch.

    Returns:
      The numbers of newcomers and of evictions.
    """
    _, ways, groups, width, by = shape
    bits = bits_of(groups)
    has_estimates = policy.counts_use(by)
    num_new, num_evicted, num_open = 0, 0, 0
    bucket[:] = 0
    for k in range(len(queue)):
        b = line_up(queue[k], ways, ids, estimate, home, bucket, following)
        if b >= 0:
            open_buckets[num_open] = b
            num_open += 1
    for k in range(num_open):
        i = np.int64(bucket[open_buckets[k]]) - 1
        first = np.uint64(np.int64(home[i]) * ways)
        while i >= 0:  # meets the cheapest way of its set
            cheapest = np.uint64(1) << np.uint64(40)
            for way in range(np.uint64(ways)):
                cost = policy.rank(by, tags[first + way], priority[first + way], step)
                cheapest = min(cheapest, cost * _MAX_WAYS + way)
            here, rank = np.int64(first + cheapest % _MAX_WAYS), np.int64(cheapest // _MAX_WAYS)
            if not policy.may_enter(by, rank, estimate[i]):
                break
            victim[i] = tags[here]
            if tags[here] != _NO_ID:
                num_evicted += 1
                if has_estimates:
                    _remember(sketch, tags[here], policy.use_of(rank), groups, bits, width)
            # Evicts: the tag of the victim's line becomes that of the miss.
            tags[here] = ids[i]
            priority[here] = policy.pinned(by, step)
            line[i] = here
            num_new += 1
            i = np.int64(following[i])
    if has_estimates:
        for k in range(len(queue)):
            i = queue[k]
            if line[i] < 0:
                _remember(sketch, ids[i], estimate[i], groups, bits, width)
    return num_new, num_evicted


@compiled
def list_positions(positions, row_of, count, num_rows, stop, order):
    """Lists the positions of each row, ascending: in `order`, those of row r end before stop[r]."""
    begin = 0
    for row in range(num_rows):
        stop[row] = begin
        begin += count[row]
    for k in range(len(positions)):
        row = row_of[k]
        if row >= 0:
            order[stop[row]] = positions[k]
            stop[row] += 1
