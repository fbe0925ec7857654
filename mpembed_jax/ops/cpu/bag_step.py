"""A fused step on a CPU: one call turns ids into vectors, another turns gradients into stored rows.

Bags take a third call, between the two. It sums the rows of each bag.

Positions are dealt to partitions: each goes to the partition that owns its id (see `partitions`).
In the forward call, a partition deduplicates its ids and finds their lines. It lets misses enter,
writes dirty victims back and fills the lines of newcomers. It writes each row to its positions; for
bags, it writes only the row's index. In the backward call, a partition sums the gradients of each
row over its positions, updates the row and stores it.

No array [U, D] exists. Vectors and bags are computed from lines and packed rows. The bits are those
of `xla.unique`, `xla.plan`, `xla.rows` and `xla.update.update_summed`, run one after another.
`codec` decodes and encodes packed rows. Products and sums are rounded one by one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache import policy
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.cache.spec import POLICIES
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.ops.cpu import admit, call_frame, codec, lanes, partitions
from mpembed_jax.ops.cpu.call_frame import (
    argument,
    argument_address,
    compiled,
    fence,
    result,
    result_address,
)
from mpembed_jax.ops.cpu.hashes import fmix32
from mpembed_jax.ops.cpu.lanes import LANES, bits_of, float_of
from mpembed_jax.ops.cpu.partitions import CHUNKS, FEW_TASKS, MAX_PARTS
from mpembed_jax.ops.cpu.policy import age, counts_use
from mpembed_jax.ops.cpu.unique import smallest
from mpembed_jax.ops.records import Dealt, Draw, Places, Store
from mpembed_jax.optim import RowRule
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable

_NO_ID = np.int32(NO_ID)
_AHEAD = 8  # rows between a prefetch and its use
_BUFFERS = 3  # rows of scratch for each partition
F32, U32 = np.float32, np.uint32

# Entries of `_GIVEN`, an int32 array that the forward call takes.
(
    _NUM_ROWS, _DIM, _SETS, _WAYS, _GROUPS, _WIDTH, _BY, _BUDGET, _TASKS,
    _STEP, _MUST_HALVE, _SEED0, _SEED1,
) = range(13)  # fmt: skip
# Numbers of the forward call's operands, then of its results. The first six results are operands,
# too, from _HELD on: the call changes them in place. The results from _DEALT on are scratch.
_IDS, _GIVEN, _OWN_FACTS, _OWN_ROWS, _OWN_COUNTS, _OWN_POSITIONS, _OWN_ROW_OF, _HELD = range(8)
_TABLE, _LINES, _TAGS, _PRIORITY, _DIRTY, _SKETCH = range(6)
_VECTORS, _FACTS, _ROW_IDS, _LINE, _STOP, _ORDER, _ROW_OF_POSITION = range(6, 13)
(
    _DEALT, _POSITIONS, _ROW_OF, _COUNT, _HOME, _ESTIMATE, _QUEUE, _VICTIM, _FOLLOWING,
    _BUCKET, _DEALS, _BUFFER,
) = range(13, 25)  # fmt: skip
# Words of `_FACTS`, which the forward call returns:
# 0 to 2: the number of partitions, the number of distinct ids over the budget, and the largest hash
#   within the budget.
# 3 to 9: seven totals of the batch.
# 15: the number of groups by which positions are dealt.
# From 16 on: where each partition begins, then six numbers of each partition.
_PARTS, _OVER, _LIMIT = range(3)
_COUNTS = 3  # the first of the totals: six sums of _OF_PARTS, then the positions out of range
_DEAL_GROUPS = 15
_BEGIN = 16  # where each partition begins; then where positions without a row begin and end
_ROWS = _BEGIN + MAX_PARTS + 2
_OF_PARTS = (  # numbers of each partition
    _NUM_UNIQUE, _HITS, _HIT_REQUESTS, _NEW, _EVICTIONS, _WRITE_BACKS,
) = tuple(_ROWS + k * MAX_PARTS for k in range(6))  # fmt: skip
_NUM_FACTS = _ROWS + len(_OF_PARTS) * MAX_PARTS
_DEAL = MAX_PARTS + 2  # counts of a chunk: positions per partition, without a row, out of range
# Entries of an int32 array that the call for bags takes, then of one that it fills.
_BAG_DIM, _NUM_BAGS, _BAG_TASKS = range(3)
_BAG_PARTS, _IS_ASCENDING = range(2)
_BAG_FACTS = 4  # the number of the latter among the results
# Numbers of the backward call's operands, then of its results. The first four results are operands,
# too, from _STORED on. Then the entries of `_UPDATE`, an int32 array that the call takes.
_GRADS, _FACTORS, _SOURCE, _UPDATE, _RATES, _PLAN = range(6)  # the plan has five arrays
_STORED = _PLAN + 5
_NEW_TABLE, _NEW_LINES, _NEW_DIRTY, _ACCUMULATOR, _NONFINITE, _UPDATE_BUFFER = range(6)
(
    _UPDATE_DIM, _PER_GRAD, _UPDATE_TASKS, _SKIPS, _HAS_SUMS, _IS_NARROW, _IS_APPLIED,
    _BYPASS_SEED0, _BYPASS_SEED1, _STATE_SEED,
) = range(10)  # fmt: skip


# --- forward


@compiled
def _first_dealt(frame):
    """Returns the smallest id that this call deals. An admission dealt all smaller ones."""
    own = argument(frame, _OWN_FACTS, np.int32)
    return own[admit.FIRST_SHARED] if len(own) > 0 else np.int32(-(2**31))


def _count_chunk(frame, chunk):
    """Counts how many positions of a chunk go to each partition, and how many are out of range."""
    ids, given = argument(frame, _IDS, np.int32), argument(frame, _GIVEN, np.int32)
    facts = result(frame, _FACTS, np.int32)
    num_parts, groups = np.int64(facts[_PARTS]), np.int64(facts[_DEAL_GROUPS])
    deals = result(frame, _DEALS, np.int32)[chunk * _DEAL : (chunk + 1) * _DEAL]
    num_rows, first = given[_NUM_ROWS], _first_dealt(frame)
    deals[:] = 0
    shift = partitions.bits_of(groups // num_parts)
    begin, end = partitions.chunk_range(len(ids), chunk)
    for position in range(begin, end):
        x = ids[position]
        if x < first:
            continue
        part = partitions.part_of(x, num_rows, groups, num_parts, shift)
        deals[part] += 1
        deals[_DEAL - 1] += part == num_parts and x != _NO_ID


_count_chunks = call_frame.parts(_count_chunk)


def _deal_chunk(frame, chunk):
    """Copies the ids and positions of a chunk to the places of their partitions, in order."""
    ids, given = argument(frame, _IDS, np.int32), argument(frame, _GIVEN, np.int32)
    facts = result(frame, _FACTS, np.int32)
    num_parts, groups = np.int64(facts[_PARTS]), np.int64(facts[_DEAL_GROUPS])
    deals = result(frame, _DEALS, np.int32)[chunk * _DEAL : (chunk + 1) * _DEAL]
    dealt, positions = result(frame, _DEALT, np.int32), result(frame, _POSITIONS, np.int32)
    num_rows, first = given[_NUM_ROWS], _first_dealt(frame)
    shift = partitions.bits_of(groups // num_parts)
    begin, end = partitions.chunk_range(len(ids), chunk)
    for position in range(begin, end):
        x = ids[position]
        if x < first:
            continue
        part = partitions.part_of(x, num_rows, groups, num_parts, shift)
        at = deals[part]
        deals[part] += 1
        dealt[at], positions[at] = x, position


_deal_chunks = call_frame.parts(_deal_chunk)


@compiled
def _deal(frame, num_tasks):
    """Groups the positions by partition; those of a partition ascend.

    The first places of a partition are left for the positions that an admission dealt to it.
    Positions without a row are last.
    """
    facts, deals = result(frame, _FACTS, np.int32), result(frame, _DEALS, np.int32)
    num_parts = facts[_PARTS]
    _count_chunks(frame, CHUNKS, num_tasks)
    own = argument(frame, _OWN_FACTS, np.int32)
    if len(own) > 0:
        own = own[admit.NUM_OWN_POSITIONS : admit.NUM_OWN_POSITIONS + num_parts]
    # They are counted as positions of the first chunk, so that their places come first.
    for part in range(len(own)):
        deals[part] += own[part]
    partitions.begin_parts(deals, _DEAL, num_parts, facts[_BEGIN:])
    for part in range(len(own)):
        deals[part] += own[part]
    _deal_chunks(frame, CHUNKS, num_tasks)


@compiled
def _bounds(facts, part):
    return np.int64(facts[_BEGIN + part]), np.int64(facts[_BEGIN + part + 1])


@compiled
def _part_of(frame, index, begin, end):
    return result(frame, index, np.int32)[begin:end]


@compiled
def _buckets_of(frame, facts, part):
    return partitions.buckets_of(result(frame, _BUCKET, np.int32), *_bounds(facts, part), part)


@compiled
def _copy(frame, to, begin, source, first, num):
    target, given = result(frame, to, np.int32), argument(frame, source, np.int32)
    for k in range(np.uint64(num)):
        target[np.uint64(begin) + k] = given[np.uint64(first) + k]


@compiled
def _deduplicate(frame, part):
    """Finds the distinct ids of a partition. Those that an admission dealt come first."""
    facts, own = result(frame, _FACTS, np.int32), argument(frame, _OWN_FACTS, np.int32)
    begin, end = _bounds(facts, part)
    num_own, num_listed = 0, 0
    if len(own) > 0:
        first = own[admit.BEGIN + part]
        num_own, num_listed = own[admit.NUM_OWN + part], own[admit.NUM_OWN_POSITIONS + part]
        _copy(frame, _ROW_IDS, begin, _OWN_ROWS, first, num_own)
        _copy(frame, _COUNT, begin, _OWN_COUNTS, first, num_own)
        _copy(frame, _POSITIONS, begin, _OWN_POSITIONS, first, num_listed)
        _copy(frame, _ROW_OF, begin, _OWN_ROW_OF, first, num_listed)
    row_of = _part_of(frame, _ROW_OF, begin + num_listed, end)
    facts[_NUM_UNIQUE + part] = num_own + partitions.deduplicate(
        _part_of(frame, _DEALT, begin + num_listed, end),
        _part_of(frame, _ROW_IDS, begin + num_own, end),
        _part_of(frame, _COUNT, begin + num_own, end), row_of,
        partitions.buckets_of(
            result(frame, _BUCKET, np.int32), begin + num_listed, end, part
        ),
    )  # fmt: skip
    for k in range(len(row_of)):
        row_of[k] += num_own


_deduplicate_parts = call_frame.parts(_deduplicate)


@compiled
def _find_limit(frame):
    """If there are more distinct ids than the budget, finds the largest hash that is kept.

    The hash is fmix32(id xor step). The ids with the smallest hashes are kept.
    """
    facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
    ids = result(frame, _ROW_IDS, np.int32)
    num_found = 0
    for part in range(facts[_PARTS]):
        num_found += facts[_NUM_UNIQUE + part]
    facts[_OVER] = max(num_found - given[_BUDGET], 0)
    if facts[_OVER] == 0:
        return
    mixed = np.empty(num_found, np.uint32)
    at = 0
    for part in range(facts[_PARTS]):
        begin = np.int64(facts[_BEGIN + part])
        for row in range(begin, begin + facts[_NUM_UNIQUE + part]):
            mixed[at] = fmix32(U32(ids[row]) ^ U32(given[_STEP]))
            at += 1
    facts[_LIMIT] = np.int32(smallest(mixed, given[_BUDGET]))


@compiled
def _place(frame, part):
    """Plans the rows of a partition.

    It drops ids over the budget. Then it finds the hits, and gives the lines of victims to misses.
    """
    facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
    begin, end = _bounds(facts, part)
    ids, count = _part_of(frame, _ROW_IDS, begin, end), _part_of(frame, _COUNT, begin, end)
    row_of, line = _part_of(frame, _ROW_OF, begin, end), _part_of(frame, _LINE, begin, end)
    queue = _part_of(frame, _QUEUE, begin, end)
    num_rows = np.int64(facts[_NUM_UNIQUE + part])
    if facts[_OVER] > 0:
        num_rows = partitions.drop(
            U32(facts[_LIMIT]), given[_STEP], ids, count, row_of, num_rows, queue
        )
        facts[_NUM_UNIQUE + part] = num_rows
    shape = (
        np.int64(given[_SETS]), np.int64(given[_WAYS]), np.int64(given[_GROUPS]),
        np.int64(given[_WIDTH]), np.int64(given[_BY]),
    )  # fmt: skip
    if shape[0] == 0:
        line[:num_rows] = -1
        return
    tags, priority = result(frame, _TAGS, np.int32), result(frame, _PRIORITY, np.int32)
    sketch = result(frame, _SKETCH, np.uint16)
    home, estimate = _part_of(frame, _HOME, begin, end), _part_of(frame, _ESTIMATE, begin, end)
    num_misses, hit_requests = partitions.find(
        ids[:num_rows], count, given[_STEP], shape, tags, priority, sketch, home, line, estimate,
        queue,
    )  # fmt: skip
    num_new, num_evicted = partitions.enter(
        ids, given[_STEP], shape, tags, priority, sketch, home, line, estimate, queue[:num_misses],
        _part_of(frame, _VICTIM, begin, end), _buckets_of(frame, facts, part),
        _part_of(frame, _FOLLOWING, begin, end), _part_of(frame, _ORDER, begin, end),
    )  # fmt: skip
    facts[_HITS + part], facts[_HIT_REQUESTS + part] = num_rows - num_misses, hit_requests
    facts[_NEW + part], facts[_EVICTIONS + part] = num_new, num_evicted


@compiled
def _blank(frame, position):
    """Writes the result of a position without a row: zeros, or -1 if the call returns indices."""
    row_of_position = result(frame, _ROW_OF_POSITION, np.int32)
    if len(row_of_position) > 0:
        row_of_position[position] = -1
        return
    dim = np.int64(argument(frame, _GIVEN, np.int32)[_DIM])
    out = result(frame, _VECTORS, np.float32)
    for at in range(position * dim, (position + 1) * dim):
        out[at] = F32(0)


@compiled
def _buffer_of(frame, index, part, number, dim):
    """Returns the address of one of a partition's _BUFFERS buffers of `dim` elements."""
    return lanes.buffer_of(frame, index, part * _BUFFERS + number, dim)


@compiled
def _list(frame, part):
    facts = result(frame, _FACTS, np.int32)
    begin, end = _bounds(facts, part)
    positions, row_of = (
        _part_of(frame, _POSITIONS, begin, end),
        _part_of(frame, _ROW_OF, begin, end),
    )
    partitions.list_positions(
        positions, row_of, _part_of(frame, _COUNT, begin, end), facts[_NUM_UNIQUE + part],
        _part_of(frame, _STOP, begin, end), _part_of(frame, _ORDER, begin, end),
    )  # fmt: skip
    if facts[_OVER] > 0:
        for k in range(len(positions)):
            if row_of[k] < 0:
                _blank(frame, positions[k])


@compiled
def _blank_part(frame, part):
    facts, positions = result(frame, _FACTS, np.int32), result(frame, _POSITIONS, np.int32)
    begin, end = _bounds(facts, part)
    for k in range(begin, end):
        _blank(frame, positions[k])


@compiled
def _total(facts, first, num_parts):
    total = 0
    for part in range(num_parts):
        total += facts[first + part]
    return total


@functools.cache
def _forward_of(fmt: RowFormat) -> str:
    """Registers the forward call of a resolved format; returns its name."""
    rows, bytes_of = codec.of(fmt), codec.row_bytes(fmt)
    decode, encode = rows.decode, rows.encode

    @compiled
    def swap(frame, part):
        """Writes dirty victims back, and dequantizes newcomers into their lines."""
        facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
        begin, end = _bounds(facts, part)
        ids, line = _part_of(frame, _ROW_IDS, begin, end), _part_of(frame, _LINE, begin, end)
        queue, victim = _part_of(frame, _QUEUE, begin, end), _part_of(frame, _VICTIM, begin, end)
        table, cached = result_address(frame, _TABLE), result_address(frame, _LINES)
        dirty = result(frame, _DIRTY, np.uint8)
        dim = np.int64(given[_DIM])
        row_bytes = bytes_of(dim)
        buffer = _buffer_of(frame, _BUFFER, part, 0, dim)
        seed0, seed1 = U32(given[_SEED0]), U32(given[_SEED1])
        num_misses = facts[_NUM_UNIQUE + part] - facts[_HITS + part]
        num_written = 0
        for k in range(num_misses + _AHEAD):
            if k < num_misses:
                row = queue[k]
                here = np.int64(line[row])
                lanes.ask_for(table + ids[row] * row_bytes, row_bytes)
                if here >= 0 and victim[row] != _NO_ID:
                    lanes.ask_for(cached + here * 4 * dim, 4 * dim)
                    lanes.ask_for(table + victim[row] * row_bytes, row_bytes)
            if k < _AHEAD:
                continue
            row = queue[k - _AHEAD]
            here = np.int64(line[row])
            if here < 0:
                continue
            if victim[row] != _NO_ID and dirty[here] != 0:
                # Writes the victim back.
                lanes.load(buffer, cached + here * 4 * dim, dim)
                to = table + victim[row] * row_bytes
                encode(buffer, to, dim, victim[row], seed0, seed1)
                num_written += 1
            decode(table + ids[row] * row_bytes, buffer, dim)
            lanes.copy(cached + here * 4 * dim, buffer, dim)
            dirty[here] = 0
        facts[_WRITE_BACKS + part] = num_written

    @compiled
    def write_vectors(frame, part):
        """Writes each row to its positions, or the index of the row if the call returns indices.

        For LFU, it also writes the estimate of each cached row to the priority of the row's line.
        """
        facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
        begin, end = _bounds(facts, part)
        ids, line = _part_of(frame, _ROW_IDS, begin, end), _part_of(frame, _LINE, begin, end)
        stop, order = _part_of(frame, _STOP, begin, end), _part_of(frame, _ORDER, begin, end)
        estimate = _part_of(frame, _ESTIMATE, begin, end)
        row_of_position = result(frame, _ROW_OF_POSITION, np.int32)
        table, cached = result_address(frame, _TABLE), result_address(frame, _LINES)
        priority = result(frame, _PRIORITY, np.int32)
        out = result_address(frame, _VECTORS)
        dim = np.int64(given[_DIM])
        row_bytes = bytes_of(dim)
        buffer = _buffer_of(frame, _BUFFER, part, 0, dim)
        has_estimates = counts_use(given[_BY])
        is_listed = len(row_of_position) > 0
        is_streamed = dim % LANES == 0 and out % 32 == 0
        num_rows = facts[_NUM_UNIQUE + part]
        at = 0
        for row in range(num_rows):
            if has_estimates and line[row] >= 0:
                priority[line[row]] = estimate[row]
            if is_listed:
                while at < stop[row]:
                    row_of_position[order[at]] = begin + row
                    at += 1
                continue
            if row + _AHEAD < num_rows:
                ahead = np.int64(line[row + _AHEAD])
                if ahead >= 0:
                    lanes.ask_for(cached + ahead * 4 * dim, 4 * dim)
                else:
                    lanes.ask_for(table + ids[row + _AHEAD] * row_bytes, row_bytes)
            source = cached + np.int64(line[row]) * 4 * dim
            if line[row] < 0:
                decode(table + ids[row] * row_bytes, buffer, dim)
                source = buffer
            while at < stop[row]:
                to = out + np.int64(order[at]) * 4 * dim
                if is_streamed:
                    lanes.stream(to, source, dim)
                else:
                    lanes.copy(to, source, dim)
                at += 1
        if is_streamed:
            fence()

    def settle(frame, part):
        facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
        if part == facts[_PARTS]:
            _blank_part(frame, part)
            return
        if given[_BUDGET] < 0:
            _deduplicate(frame, part)
        _place(frame, part)
        if facts[_NEW + part] > 0:
            swap(frame, part)
        _list(frame, part)
        write_vectors(frame, part)

    settle_parts = call_frame.parts(settle)

    def forward(frame):
        facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
        facts[:] = 0
        num_tasks = min(call_frame.num_threads(frame), np.int64(given[_TASKS]))
        own = argument(frame, _OWN_FACTS, np.int32)
        groups = np.int64(given[_GROUPS])
        num_parts = partitions.num_parts(groups, num_tasks)
        if len(own) > 0:
            groups, num_parts = np.int64(own[admit.GROUPS]), np.int64(own[admit.PARTS])
        facts[_PARTS], facts[_DEAL_GROUPS] = num_parts, groups
        if given[_MUST_HALVE]:
            age(result(frame, _PRIORITY, np.int32), result(frame, _SKETCH, np.uint16))
        _deal(frame, num_tasks)
        if given[_BUDGET] >= 0:
            _deduplicate_parts(frame, num_parts, num_tasks)
            _find_limit(frame)
        settle_parts(frame, num_parts + 1, num_tasks)
        for k in range(len(_OF_PARTS)):
            facts[_COUNTS + k] = _total(facts, _OF_PARTS[k], num_parts)
        deals = result(frame, _DEALS, np.int32)
        out_of_range = 0
        for chunk in range(CHUNKS):
            out_of_range += deals[chunk * _DEAL + _DEAL - 1]
        facts[_COUNTS + len(_OF_PARTS)] = out_of_range

    name = f"mpembed_bag_forward_{codec.name_of(fmt)}"
    call_frame.register(name, forward)
    return name


# --- bags


def _sum_parts(fmt: RowFormat) -> Any:
    rows, bytes_of = codec.of(fmt), codec.row_bytes(fmt)
    decode = rows.decode

    def sum_part(frame, part):
        """Sums the rows of a range of bags. Positions are added in ascending order.

        Each position adds its factor times its row.
        """
        row_of_position = argument(frame, 0, np.int32)
        factors, bag = argument(frame, 1, np.float32), argument(frame, 2, np.int32)
        given = argument(frame, 3, np.int32)
        ids, line = argument(frame, 4, np.int32), argument(frame, 5, np.int32)
        table, cached = argument_address(frame, 6), argument_address(frame, 7)
        out = result_address(frame, 0)
        dim = np.int64(given[_BAG_DIM])
        facts = result(frame, _BAG_FACTS, np.int32)
        num_bags, num_parts = np.int64(given[_NUM_BAGS]), np.int64(facts[_BAG_PARTS])
        is_ascending = facts[_IS_ASCENDING] != 0  # the positions of a bag are then neighbours
        begin, end = num_bags * part // num_parts, num_bags * (part + 1) // num_parts
        row_bytes = bytes_of(dim)
        buffer = _buffer_of(frame, 1, part, 0, dim)
        num_positions = len(bag)
        for number in range(begin, end):
            lanes.erase(out + number * 4 * dim, dim)
        position = 0
        if is_ascending:
            low, high = 0, num_positions
            while low < high:
                middle = (low + high) // 2
                if bag[middle] < begin:
                    low = middle + 1
                else:
                    high = middle
            position = low
        while position < num_positions:
            number, row = np.int64(bag[position]), np.int64(row_of_position[position])
            if number >= end and is_ascending:
                break
            if begin <= number < end and row >= 0:
                ahead = np.int64(row_of_position[min(position + _AHEAD, num_positions - 1)])
                if ahead >= 0:
                    if line[ahead] >= 0:
                        lanes.ask_for(cached + np.int64(line[ahead]) * 4 * dim, 4 * dim)
                    else:
                        lanes.ask_for(table + ids[ahead] * row_bytes, row_bytes)
                source = cached + np.int64(line[row]) * 4 * dim
                if line[row] < 0:
                    decode(table + ids[row] * row_bytes, buffer, dim)
                    source = buffer
                lanes.accumulate(out + number * 4 * dim, factors[position], source, dim)
            position += 1

    return call_frame.parts(sum_part)


@functools.cache
def _sums_of(fmt: RowFormat) -> str:
    """Registers the sums of bags of a resolved format; returns the call's name."""
    sum_parts = _sum_parts(fmt)

    def sums(frame):
        bag, given = argument(frame, 2, np.int32), argument(frame, 3, np.int32)
        facts = result(frame, _BAG_FACTS, np.int32)
        num_falls = 0
        for position in range(1, len(bag)):
            num_falls += bag[position] < bag[position - 1]
        num_parts = min(MAX_PARTS, max(1, np.int64(given[_NUM_BAGS])))
        if num_falls > 0:
            num_parts = min(num_parts, 2 * FEW_TASKS)  # each part visits every position
        facts[_BAG_PARTS], facts[_IS_ASCENDING] = num_parts, num_falls == 0
        num_tasks = min(call_frame.num_threads(frame), np.int64(given[_BAG_TASKS]))
        sum_parts(frame, num_parts, num_tasks)

    name = f"mpembed_bag_sums_{codec.name_of(fmt)}"
    call_frame.register(name, sums)
    return name


# --- backward


# For rows of 2, 4, 8 and 16 blocks, such as D = 16, 32, 64, 128: the squares stay in registers.
_SQUARES_2, _SQUARES_4, _SQUARES_8, _SQUARES_16 = map(lanes.sum_of_squares, (2, 4, 8, 16))


@compiled
def _sum_of_squares(scratch, grads, dim):
    """Sums the squares of a buffer in the order of `optim.rowwise`.

    Let h be the largest power of two below the number of blocks. The blocks from h on are added to
    the blocks from 0 on, until one block is left. Its lanes are summed in the same way. The squares
    are in `scratch`, a second buffer.
    """
    num_blocks = (dim + LANES - 1) // LANES
    half = 1
    if num_blocks == 2:
        return _SQUARES_2(grads)
    if num_blocks == 4:
        return _SQUARES_4(grads)
    if num_blocks == 8:
        return _SQUARES_8(grads)
    if num_blocks == 16:
        return _SQUARES_16(grads)
    lanes.square(scratch, grads, dim)
    while 2 * half < num_blocks:
        half *= 2
    while num_blocks > 1:
        for block in range(num_blocks - half):
            lanes.add_block(scratch, block, block + half)
        num_blocks = half
        half = half // 2
    return lanes.fold(scratch)


@compiled
def _bfloat16_code(x, bits):
    """Rounds float32 x to bfloat16 by random bits; returns uint16. See rounding.encode_float."""
    raw = bits_of(x)
    magnitude = raw & U32(0x7FFFFFFF)
    code = min(U32(magnitude + (bits >> U32(16))) >> U32(16), U32(0x7F7F))
    code = U32(0x7FC0) if magnitude > U32(0x7F800000) else code
    return np.uint16(code | ((raw >> U32(31)) << U32(15)))


@compiled
def _add_to_sum(frame, x, mean, given):
    """Adds the mean square of a row's gradient to the sum G of row x.

    A sum that is kept in bfloat16 is rounded stochastically. Returns the float32 sum before this
    rounding.
    """
    if given[_IS_NARROW]:
        sums = result(frame, _ACCUMULATOR, np.uint16)
        total = float_of(U32(U32(sums[x]) << U32(16))) + mean
        bits = fmix32(fmix32(U32(x) ^ U32(given[_STATE_SEED])))
        sums[x] = _bfloat16_code(total, bits)
        return total
    wide = result(frame, _ACCUMULATOR, np.float32)
    wide[x] += mean
    return wide[x]


@functools.cache
def _backward_of(fmt: RowFormat) -> str:
    """Registers the backward call of a resolved format; returns its name."""
    rows, bytes_of = codec.of(fmt), codec.row_bytes(fmt)
    decode, encode = rows.decode, rows.encode

    def update_part(frame, part):
        """Sums the gradients of a partition's rows, updates each row once, and stores it."""
        given, rates = argument(frame, _UPDATE, np.int32), argument(frame, _RATES, np.float32)
        facts = argument(frame, _PLAN, np.int32)
        begin, end = _bounds(facts, part)
        ids = argument(frame, _PLAN + 1, np.int32)[begin:end]
        line = argument(frame, _PLAN + 2, np.int32)[begin:end]
        stop = argument(frame, _PLAN + 3, np.int32)[begin:end]
        order = argument(frame, _PLAN + 4, np.int32)[begin:end]
        grads = argument_address(frame, _GRADS)
        factors, source = argument(frame, _FACTORS, np.float32), argument(frame, _SOURCE, np.int32)
        has_factors, has_source = len(factors) > 0, len(source) > 0
        table, cached = result_address(frame, _NEW_TABLE), result_address(frame, _NEW_LINES)
        dirty = result(frame, _NEW_DIRTY, np.uint8)
        dim = np.int64(given[_UPDATE_DIM])
        accumulator = result_address(frame, _ACCUMULATOR)
        row_bytes = bytes_of(dim)
        per_grad = np.int64(given[_PER_GRAD])
        state_bytes = 2 if given[_IS_NARROW] else 4
        seed0, seed1 = U32(given[_BYPASS_SEED0]), U32(given[_BYPASS_SEED1])
        rate, eps, inverse_dim = rates[0], rates[1], rates[2]
        total = _buffer_of(frame, _UPDATE_BUFFER, part, 0, dim)
        old = _buffer_of(frame, _UPDATE_BUFFER, part, 1, dim)
        new = _buffer_of(frame, _UPDATE_BUFFER, part, 2, dim)
        num_rows, num_nonfinite, at = np.int64(facts[_NUM_UNIQUE + part]), 0, 0
        num_listed = np.int64(stop[num_rows - 1]) if num_rows > 0 else 0
        for row in range(num_rows):
            if row + _AHEAD < num_rows:
                x, ahead = np.int64(ids[row + _AHEAD]), np.int64(line[row + _AHEAD])
                if given[_HAS_SUMS]:
                    lanes.ask_for(accumulator + x * state_bytes, state_bytes)
                if ahead >= 0:
                    lanes.ask_for(cached + ahead * 4 * dim, 4 * dim)
                else:
                    lanes.ask_for(table + x * row_bytes, row_bytes)
            # Without factors and source, the first gradient begins the sum. So no pass clears the
            # buffer.
            is_first = not (has_factors or has_source)
            if not is_first:
                lanes.clear(total, dim)
            while at < stop[row]:
                if at + 2 * _AHEAD < num_listed:
                    ahead = np.int64(order[at + 2 * _AHEAD])
                    ahead = np.int64(source[ahead]) if has_source else ahead // per_grad
                    # If source is -1, the address is outside the array. Prefetching it is harmless.
                    lanes.ask_for(grads + ahead * 4 * dim, 4 * dim)
                position = np.int64(order[at])
                here = np.int64(source[position]) if has_source else position // per_grad
                at += 1
                if here < 0:
                    continue
                if has_factors:
                    lanes.add_product(total, factors[position], grads + here * 4 * dim, dim)
                elif is_first:
                    lanes.begin_sum(total, grads + here * 4 * dim, dim)
                    is_first = False
                else:
                    lanes.add(total, grads + here * 4 * dim, dim)
            if given[_SKIPS] and lanes.largest_exponent(total, dim) == 255:
                num_nonfinite += 1
                continue
            x = np.int64(ids[row])
            here = np.int64(line[row])
            inverse = F32(1)
            if given[_HAS_SUMS]:
                mean = _sum_of_squares(new, total, dim) * inverse_dim
                root = np.sqrt(_add_to_sum(frame, x, mean, given)) + eps
                inverse = F32(1) / (root if root > F32(0) else F32(1))
            if here >= 0:
                place = cached + here * 4 * dim
                if lanes.move(new, place, rate, total, inverse, dim):
                    lanes.copy(place, new, dim)
                    dirty[here] = 1
            else:
                place = table + x * row_bytes
                decode(place, old, dim)
                if lanes.move(new, old, rate, total, inverse, dim):
                    encode(new, place, dim, x, seed0, seed1)
        result(frame, _NONFINITE, np.int32)[part] = num_nonfinite

    update_parts = call_frame.parts(update_part)

    def backward(frame):
        given, facts = argument(frame, _UPDATE, np.int32), argument(frame, _PLAN, np.int32)
        result(frame, _NONFINITE, np.int32)[:] = 0
        if given[_IS_APPLIED]:
            num_tasks = min(call_frame.num_threads(frame), np.int64(given[_UPDATE_TASKS]))
            update_parts(frame, facts[_PARTS], num_tasks)

    name = f"mpembed_bag_backward_{codec.name_of(fmt)}"
    call_frame.register(name, backward)
    return name


# --- the calls


def compile_calls(fmt: RowFormat) -> None:
    """Compiles the forward and the backward call of a resolved format, once per process."""
    _forward_of(fmt)
    _backward_of(fmt)


def _as_int32(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def forward(
    table: QuantizedTable,
    cache: CacheState | None,
    ids: jax.Array,
    dealt: Dealt | None,
    *,
    budget: int | None,
    step: jax.Array,
    must_halve: jax.Array,
    draw: Draw,
    is_listed: bool,
    max_threads: int,
) -> tuple[QuantizedTable, CacheState | None, jax.Array, Places]:
    """Plans a batch, swaps, and writes each row to its positions.

    It is `ops.unique`, `plan`, `swap`, `lookup` and `take` in one call.

    Args:
      table: the table of the stack, in device memory.
      cache: the cache of the stack, or None.
      ids: int32 [N], N > 0. NO_ID, ids outside the table and ids over the budget have no row.
      dealt: the positions of `ids` that an admission dealt to partitions; None: there are none.
      budget: the largest number of distinct ids; None: no limit. If there are more, the same ids
        stay as in xla.unique.
      step: int32 scalar, number of this prefetch.
      must_halve: bool scalar, see policy.is_time_to_halve.
      draw: the source of the random bits that round the victims.
      is_listed: whether the call returns the index of each position's row instead of its vector.
      max_threads: the largest number of threads that share the work.

    Returns:
      The table and the cache, changed in place.
      The vectors, float32 [N, D]; zeros where a position has no row. With is_listed, instead, the
      index of each position's row in the Places, int32 [N]; -1 where it has none.
      The Places.
    """
    (num,) = ids.shape
    dim = table.embedding_dim
    nothing = jnp.zeros((0,), jnp.int32)
    if cache is None:
        held: list[Any] = [table.rows, jnp.zeros((0,), jnp.float32), nothing, nothing,
                           jnp.zeros((0,), bool), jnp.zeros((0,), jnp.uint16)]  # fmt: skip
        sets, ways, groups, width, by = 0, 0, MAX_PARTS, 0, 0
    else:
        has_estimates = policy.counts_use(cache.policy)
        by = POLICIES.index(cache.policy)
        sketch = cache.sketch if has_estimates else jnp.zeros((0,), jnp.uint16)
        held = [table.rows, cache.rows, cache.tags, cache.priority, cache.dirty, sketch]
        sets, ways, groups = cache.geometry
        assert groups & (groups - 1) == 0  # for partitions.part_of
        width = sketch.shape[-1] if has_estimates else 0
    limit = -1 if budget is None or budget >= num else budget
    fixed = [table.num_rows, dim, sets, ways, groups, width, by, limit, max_threads]
    given = jnp.concatenate(
        [
            jnp.asarray(fixed, jnp.int32),
            jnp.stack([step, must_halve.astype(jnp.int32)]),
            _as_int32(draw.seed(random_bits.WRITE_BACK)),
        ]
    )
    words = dict.fromkeys(range(_ROW_IDS, _BUFFER), num)
    words |= {_FACTS: _NUM_FACTS, _ROW_OF_POSITION: num if is_listed else 0}
    words |= {_BUCKET: 4 * num + 16 * MAX_PARTS, _DEALS: CHUNKS * _DEAL}
    vectors = jax.ShapeDtypeStruct((0 if is_listed else num, dim), jnp.float32)
    others = [jax.ShapeDtypeStruct((words[k],), jnp.int32) for k in range(_FACTS, _BUFFER)]
    results: Any = jax.ffi.ffi_call(
        _forward_of(table.format),
        [*call_frame.shapes_of(held), vectors, *others, lanes.buffers(MAX_PARTS * _BUFFERS, dim)],
        input_output_aliases={_HELD + k: k for k in range(len(held))},
        vmap_method="sequential",
    )(ids, given, *([nothing] * 5 if dealt is None else dealt), *held)
    table = dataclasses.replace(table, rows=results[_TABLE])
    if cache is not None:
        cache = dataclasses.replace(
            cache, rows=results[_LINES], tags=results[_TAGS], priority=results[_PRIORITY],
            dirty=results[_DIRTY], sketch=results[_SKETCH] if has_estimates else None,
        )  # fmt: skip
    places = Places(*(results[k] for k in (_FACTS, _ROW_IDS, _LINE, _STOP, _ORDER)))
    return table, cache, results[_ROW_OF_POSITION if is_listed else _VECTORS], places


def counts(places: Places) -> dict[str, jax.Array]:
    """Returns the counts (int32 scalars) of a forward call, by their names in cache.plan.Counts.

    All counts are there except `wide_exchanges`, which only a mesh has.
    """
    names = (
        "unique",
        "hits",
        "hit_requests",
        "num_new",
        "evictions",
        "write_backs",
        "out_of_range",
    )
    found = {name: places.facts[_COUNTS + k] for k, name in enumerate(names)}
    num_parts = places.facts[_PARTS]
    found["requests"] = places.facts[_BEGIN + num_parts]
    found["dropped"] = places.facts[_OVER]
    found["misses"] = found["unique"] - found["hits"]
    found["bypasses"] = found["misses"] - found.pop("num_new")
    return found


def distinct_ids(places: Places) -> jax.Array:
    """Returns the distinct ids of a batch (int32 [N]). Entries that hold no row are NO_ID."""
    parts = slice(_BEGIN, _BEGIN + MAX_PARTS)
    first, num = places.facts[parts], places.facts[_NUM_UNIQUE : _NUM_UNIQUE + MAX_PARTS]
    # The running sum is 1 at the rows of a partition, and 0 at the unused entries after them.
    changes = jnp.zeros(places.ids.shape[0] + 1, jnp.int32).at[first].add(1).at[first + num].add(-1)
    return jnp.where(jnp.cumsum(changes)[:-1] > 0, places.ids, NO_ID)


def bags(
    table: QuantizedTable,
    lines: jax.Array | None,
    places: Places,
    row_of_position: jax.Array,
    factors: jax.Array,
    bag: jax.Array,
    num_bags: int,
    *,
    max_threads: int,
) -> tuple[QuantizedTable, jax.Array | None, jax.Array]:
    """Sums factors[n] times the row of position n over each bag, in ascending order of n.

    Positions without a row are left out. Where `bag` ascends, each thread visits the positions of
    its own bags alone.

    Args:
      table: after the forward call.
      lines: float32 [C, D], after the forward call; None without a cache.
      places: from the forward call.
      row_of_position: int32 [N], from the forward call with is_listed.
      factors: float32 [N].
      bag: int32 [N], the bag of each position; outside [0, num_bags), the position is in no bag.
      num_bags: M.
      max_threads: the largest number of threads that share the work.

    Returns:
      The table and the lines, as given, and the sums, float32 [M, D].
    """
    assert (bag.dtype, factors.dtype) == (np.int32, np.float32)  # the foreign call checks neither
    dim = table.embedding_dim
    num_parts = min(MAX_PARTS, max(1, num_bags))
    given = [dim, num_bags, max_threads]
    held = [table.rows, jnp.zeros((0,), jnp.float32) if lines is None else lines]
    out = jax.ShapeDtypeStruct((num_bags, dim), jnp.float32)
    # The call returns table and lines as they are, so that later updates in place wait for it.
    results: Any = jax.ffi.ffi_call(
        _sums_of(table.format),
        [
            out,
            lanes.buffers(num_parts * _BUFFERS, dim),
            *call_frame.shapes_of(held),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        ],
        input_output_aliases={6: 2, 7: 3},
        vmap_method="sequential",
    )(
        row_of_position, factors, bag, np.asarray(given, np.int32), places.ids, places.line,
        *held,
    )  # fmt: skip
    table = dataclasses.replace(table, rows=results[2])
    return table, None if lines is None else results[3], results[0]


def backward(
    store: Store,
    accumulator: jax.Array | None,
    places: Places,
    grads: jax.Array,
    factors: jax.Array | None,
    source: jax.Array | None,
    *,
    rule: RowRule,
    draw: Draw,
    skip_nonfinite: bool,
    is_applied: jax.Array,
    max_threads: int,
) -> tuple[Store, jax.Array | None, jax.Array]:
    """Sums the gradients of each row's positions, updates the row once and stores it.

    See xla.update.update_summed.

    Args:
      store: table, lines and dirty bits, changed in place. The lines that the call changes become
        dirty.
      accumulator: G of row-wise Adagrad, float32 [V], or bfloat16 bit patterns uint16 [V]; None for
        SGD.
      places: from the forward call of N positions.
      grads: float32 [M, D], M > 0.
      factors: float32 [N]; each position's gradient is multiplied by its factor. None: all are 1.
      source: int32 [N], the index in grads of each position; -1 if it takes no gradient. If source
        is None, position n takes grads[n // (N / M)], and N is a multiple of M.
      rule: the optimizer's rule.
      draw: the source of the random bits of all roundings.
      skip_nonfinite: whether rows whose summed gradient is not finite stay as they are.
      is_applied: bool scalar; if False, nothing changes.
      max_threads: the largest number of threads that share the work.

    Returns:
      The store, the accumulator, and the number of rows that skip_nonfinite left as they were
      (int32 scalar).
    """
    table = store.table
    dim = store.table.embedding_dim
    num = places.order.shape[0]
    nothing = jnp.zeros((0,), jnp.float32)
    sums = nothing if accumulator is None else accumulator
    lines = nothing if store.lines is None else store.lines
    dirty = jnp.zeros((0,), bool) if store.dirty is None else store.dirty
    per_grad = 1 if source is not None else num // grads.shape[0]
    fixed = [dim, per_grad, max_threads, skip_nonfinite, rule.has_sums, sums.dtype == jnp.uint16]
    given = jnp.concatenate(
        [
            jnp.asarray(fixed, jnp.int32),
            is_applied.astype(jnp.int32).reshape(1),
            _as_int32(draw.seed(random_bits.BYPASS)),
            _as_int32(draw.seed(random_bits.ROW_STATE)),
        ]
    )
    rates = np.asarray([-rule.learning_rate, rule.eps, 1 / dim], np.float32)
    held = [table.rows, lines, dirty, sums]
    results: Any = jax.ffi.ffi_call(
        _backward_of(table.format),
        [
            *call_frame.shapes_of(held),
            jax.ShapeDtypeStruct((MAX_PARTS,), jnp.int32),
            lanes.buffers(MAX_PARTS * _BUFFERS, dim),
        ],
        input_output_aliases={_STORED + k: k for k in range(len(held))},
        vmap_method="sequential",
    )(
        grads, nothing if factors is None else factors,
        jnp.zeros((0,), jnp.int32) if source is None else source, given, rates, *places, *held,
    )  # fmt: skip
    table = dataclasses.replace(table, rows=results[_NEW_TABLE])
    if store.lines is not None:
        store = store._replace(lines=results[_NEW_LINES], dirty=results[_NEW_DIRTY])
    accumulator = None if accumulator is None else results[_ACCUMULATOR]
    return store._replace(table=table), accumulator, jnp.sum(results[_NONFINITE], dtype=jnp.int32)
