"""A fused step on a CPU: ids to vectors in one call, gradients of vectors to stored rows in another.

Positions are dealt to partitions (`partitions`). Each one deduplicates, finds its rows, lets
misses enter, swaps, lists the positions of each row and writes each row to its positions; later it
sums a row's gradients over its positions, updates and stores. No array [U, D] exists, a row is read
once forward and once backward, and the bits are the reference's: `xla.unique`, `xla.plan`,
`xla.rows` and `xla.update.update_summed`, of which this is the composition. How a row is rounded is
in `codec`; what contracts into a multiply-add is in `lanes`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.cache.residency import CacheState
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.ops.cpu import call_frame, codec, lanes, partitions
from mpembed_jax.ops.cpu.call_frame import argument, argument_address, compiled, fence, result, result_address
from mpembed_jax.ops.cpu.hashes import fmix32
from mpembed_jax.ops.cpu.lanes import LANES, bits_of, float_of
from mpembed_jax.ops.cpu.partitions import MAX_PARTS
from mpembed_jax.ops.cpu.unique import smallest
from mpembed_jax.ops.records import Draw, Places, Store
from mpembed_jax.optim import RowRule
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.table import QuantizedTable

MAX_TASKS = 64  # how many threads a step asks for, at most; read when a step is traced

_NO_ID = np.int32(NO_ID)
_AHEAD = 8  # rows
_FEW_PARTS, _FEW_TASKS = 16, 4  # larger partitions cost less where few threads share them
_CHUNKS = 16  # of positions, dealt at once
_BUFFERS = 3  # rows of scratch for each partition
F32, U32 = np.float32, np.uint32

# What the forward call is given besides ids and arrays.
(
    _NUM_ROWS, _DIM, _SETS, _WAYS, _GROUPS, _WIDTH, _BUDGET, _TASKS,
    _STEP, _MUST_HALVE, _SEED0, _SEED1, _NUMBERS,
) = range(13)  # fmt: skip
# Its arguments and results, by position. The first results are arguments, too, changed in place.
_IDS, _GIVEN, _HELD = range(3)
_TABLE, _LINES, _TAGS, _PRIORITY, _DIRTY, _SKETCH = range(6)
_VECTORS, _FACTS, _ROW_IDS, _LINE, _STOP, _ORDER, _ROW_OF_POSITION = range(6, 13)
(
    _DEALT, _POSITIONS, _ROW_OF, _COUNT, _HOME, _ESTIMATE, _QUEUE, _VICTIM, _FOLLOWING,
    _BUCKET, _DEALS, _BUFFER,
) = range(13, 25)  # fmt: skip
# Words of the facts: counts of the batch, then for each partition.
_PARTS, _OVER, _LIMIT = range(3)
_COUNTS = 3  # the first of the sums below
_BEGIN = 16  # where its rows begin, MAX_PARTS + 2 numbers: positions without a row come last
_ROWS = _BEGIN + MAX_PARTS + 2
_OF_PARTS = (  # numbers of each partition
    _NUM_UNIQUE, _HITS, _HIT_REQUESTS, _NEW, _EVICTIONS, _WRITE_BACKS,
) = tuple(_ROWS + k * MAX_PARTS for k in range(6))  # fmt: skip
_NUM_FACTS = _ROWS + len(_OF_PARTS) * MAX_PARTS
_DEAL = MAX_PARTS + 2  # numbers of a chunk: for each partition, for no row, and out of range


# --- forward


@compiled
def _chunk_range(num, chunk):
    return num * chunk // _CHUNKS, num * (chunk + 1) // _CHUNKS


def _count_chunk(frame, chunk):
    """Counts how many positions of a chunk go to each partition."""
    ids, given = argument(frame, _IDS, np.int32), argument(frame, _GIVEN, np.int32)
    num_parts = np.int64(result(frame, _FACTS, np.int32)[_PARTS])
    deals = result(frame, _DEALS, np.int32)[chunk * _DEAL : (chunk + 1) * _DEAL]
    num_rows, groups = given[_NUM_ROWS], np.int64(given[_GROUPS])
    deals[:] = 0
    begin, end = _chunk_range(len(ids), chunk)
    for position in range(begin, end):
        x = ids[position]
        part = partitions.part_of(x, num_rows, groups, num_parts)
        deals[part] += 1
        deals[_DEAL - 1] += part == num_parts and x != _NO_ID


_count_chunks = call_frame.parts(_count_chunk)


def _deal_chunk(frame, chunk):
    """Deals the positions of a chunk, in order."""
    ids, given = argument(frame, _IDS, np.int32), argument(frame, _GIVEN, np.int32)
    num_parts = np.int64(result(frame, _FACTS, np.int32)[_PARTS])
    deals = result(frame, _DEALS, np.int32)[chunk * _DEAL : (chunk + 1) * _DEAL]
    dealt, positions = result(frame, _DEALT, np.int32), result(frame, _POSITIONS, np.int32)
    num_rows, groups = given[_NUM_ROWS], np.int64(given[_GROUPS])
    begin, end = _chunk_range(len(ids), chunk)
    for position in range(begin, end):
        x = ids[position]
        part = partitions.part_of(x, num_rows, groups, num_parts)
        at = deals[part]
        deals[part] += 1
        dealt[at], positions[at] = x, position


_deal_chunks = call_frame.parts(_deal_chunk)


@compiled
def _deal(frame, num_tasks):
    """Brings the positions of a partition together, ascending; those without a row come last."""
    facts, deals = result(frame, _FACTS, np.int32), result(frame, _DEALS, np.int32)
    num_parts = facts[_PARTS]
    _count_chunks(frame, _CHUNKS, num_tasks)
    begin = 0
    for part in range(num_parts + 1):
        facts[_BEGIN + part] = begin
        for chunk in range(_CHUNKS):
            num = deals[chunk * _DEAL + part]
            deals[chunk * _DEAL + part] = begin
            begin += num
    facts[_BEGIN + num_parts + 1] = begin
    _deal_chunks(frame, _CHUNKS, num_tasks)


@compiled
def _bounds(facts, part):
    return np.int64(facts[_BEGIN + part]), np.int64(facts[_BEGIN + part + 1])


@compiled
def _part_of(frame, index, begin, end):
    return result(frame, index, np.int32)[begin:end]


@compiled
def _buckets(frame, begin, num):
    """Returns a partition's buckets, a power of two: at least two for each of its positions."""
    num_buckets = 16
    while num_buckets < 2 * num:
        num_buckets *= 2
    # Each partition has room for 4 a position and 16.
    return result(frame, _BUCKET, np.int32)[4 * begin : 4 * begin + num_buckets]


@compiled
def _buckets_of(frame, facts, part):
    begin, end = _bounds(facts, part)
    num_buckets = 16
    while num_buckets < 2 * (end - begin):
        num_buckets *= 2
    first = 4 * begin + 16 * part
    return result(frame, _BUCKET, np.int32)[first : first + num_buckets]


@compiled
def _deduplicate(frame, part):
    facts = result(frame, _FACTS, np.int32)
    begin, end = _bounds(facts, part)
    facts[_NUM_UNIQUE + part] = partitions.deduplicate(
        _part_of(frame, _DEALT, begin, end), _part_of(frame, _ROW_IDS, begin, end),
        _part_of(frame, _COUNT, begin, end), _part_of(frame, _ROW_OF, begin, end),
        _buckets_of(frame, facts, part),
    )  # fmt: skip


_deduplicate_parts = call_frame.parts(lambda frame, part: _deduplicate(frame, part))


@compiled
def _find_limit(frame):
    """Over the budget: finds the largest fmix32(id xor step) that stays."""
    facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
    ids, num_found = result(frame, _ROW_IDS, np.int32), 0
    for part in range(facts[_PARTS]):
        num_found += facts[_NUM_UNIQUE + part]
    facts[_OVER] = max(num_found - given[_BUDGET], 0)
    if facts[_OVER] == 0:
        return
    mixed, at = np.empty(num_found, np.uint32), 0
    for part in range(facts[_PARTS]):
        begin = np.int64(facts[_BEGIN + part])
        for row in range(begin, begin + facts[_NUM_UNIQUE + part]):
            mixed[at] = fmix32(U32(ids[row]) ^ U32(given[_STEP]))
            at += 1
    facts[_LIMIT] = np.int32(smallest(mixed, given[_BUDGET]))


@compiled
def _place(frame, part):
    """Decides about the rows of a partition: hits, newcomers, victims and bypasses."""
    facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
    begin, end = _bounds(facts, part)
    ids, count = _part_of(frame, _ROW_IDS, begin, end), _part_of(frame, _COUNT, begin, end)
    row_of, line = _part_of(frame, _ROW_OF, begin, end), _part_of(frame, _LINE, begin, end)
    queue, num_rows = _part_of(frame, _QUEUE, begin, end), np.int64(facts[_NUM_UNIQUE + part])
    if facts[_OVER] > 0:
        num_rows = partitions.drop(
            U32(facts[_LIMIT]), given[_STEP], ids, count, row_of, num_rows, queue
        )
        facts[_NUM_UNIQUE + part] = num_rows
    shape = (
        np.int64(given[_SETS]), np.int64(given[_WAYS]), np.int64(given[_GROUPS]),
        np.int64(given[_WIDTH]),
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
    """Writes what a position without a row takes."""
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
    """Returns the address of one of a partition's buffers."""
    width = (dim + LANES - 1) // LANES * LANES
    return result_address(frame, index) + 4 * width * (part * _BUFFERS + number)


@compiled
def _list(frame, part):
    facts = result(frame, _FACTS, np.int32)
    begin, end = _bounds(facts, part)
    positions, row_of = _part_of(frame, _POSITIONS, begin, end), _part_of(frame, _ROW_OF, begin, end)
    partitions.list_positions(
        positions, row_of, _part_of(frame, _COUNT, begin, end), facts[_NUM_UNIQUE + part],
        _part_of(frame, _STOP, begin, end), _part_of(frame, _ORDER, begin, end),
    )  # fmt: skip
    if facts[_OVER] > 0:
        for k in range(len(positions)):
            if row_of[k] < 0:
                _blank(frame, positions[k])


def _blank_part(frame, part):
    facts, positions = result(frame, _FACTS, np.int32), result(frame, _POSITIONS, np.int32)
    begin, end = _bounds(facts, part)
    for k in range(begin, end):
        _blank(frame, positions[k])


@compiled
def _halve(frame):
    priority, sketch = result(frame, _PRIORITY, np.int32), result(frame, _SKETCH, np.uint16)
    for k in range(len(priority)):
        priority[k] >>= 1
    for k in range(len(sketch)):
        sketch[k] >>= 1


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
        """Writes dirty victims back, and brings newcomers into their lines."""
        facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
        begin, end = _bounds(facts, part)
        ids, line = _part_of(frame, _ROW_IDS, begin, end), _part_of(frame, _LINE, begin, end)
        queue, victim = _part_of(frame, _QUEUE, begin, end), _part_of(frame, _VICTIM, begin, end)
        table, cached = result_address(frame, _TABLE), result_address(frame, _LINES)
        dirty, dim = result(frame, _DIRTY, np.uint8), np.int64(given[_DIM])
        row_bytes, buffer = bytes_of(dim), _buffer_of(frame, _BUFFER, part, 0, dim)
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
        """Writes each row to its positions; lines of this batch take their estimates."""
        facts, given = result(frame, _FACTS, np.int32), argument(frame, _GIVEN, np.int32)
        begin, end = _bounds(facts, part)
        ids, line = _part_of(frame, _ROW_IDS, begin, end), _part_of(frame, _LINE, begin, end)
        stop, order = _part_of(frame, _STOP, begin, end), _part_of(frame, _ORDER, begin, end)
        estimate = _part_of(frame, _ESTIMATE, begin, end)
        row_of_position = result(frame, _ROW_OF_POSITION, np.int32)
        table, cached = result_address(frame, _TABLE), result_address(frame, _LINES)
        priority, out = result(frame, _PRIORITY, np.int32), result_address(frame, _VECTORS)
        dim = np.int64(given[_DIM])
        row_bytes, buffer = bytes_of(dim), _buffer_of(frame, _BUFFER, part, 0, dim)
        is_lfu, is_listed = given[_WIDTH] > 0, len(row_of_position) > 0
        is_streamed = dim % LANES == 0 and out % 32 == 0
        num_rows, at = facts[_NUM_UNIQUE + part], 0
        for row in range(num_rows):
            if is_lfu and line[row] >= 0:
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
        groups = np.int64(given[_GROUPS])
        num_parts = min(groups, _FEW_PARTS if num_tasks <= _FEW_TASKS else MAX_PARTS)
        facts[_PARTS] = num_parts
        if given[_MUST_HALVE]:
            _halve(frame)
        _deal(frame, num_tasks)
        if given[_BUDGET] >= 0:
            _deduplicate_parts(frame, num_parts, num_tasks)
            _find_limit(frame)
        settle_parts(frame, num_parts + 1, num_tasks)
        for k in range(len(_OF_PARTS)):
            facts[_COUNTS + k] = _total(facts, _OF_PARTS[k], num_parts)
        deals, out_of_range = result(frame, _DEALS, np.int32), 0
        for chunk in range(_CHUNKS):
            out_of_range += deals[chunk * _DEAL + _DEAL - 1]
        facts[_COUNTS + len(_OF_PARTS)] = out_of_range

    name = f"mpembed_bag_forward_{_key(fmt)}"
    call_frame.register(name, forward)
    return name


def _key(fmt: RowFormat) -> str:
    kind = {None: "", True: "_symmetric", False: "_asymmetric"}[fmt.symmetric]
    return f"{fmt.name}{kind}_{fmt.scale_dtype}_{fmt.rounding}"
