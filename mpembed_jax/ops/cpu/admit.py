"""Admission of raw ids on a CPU, by loops that numba compiles.

The rules are those of `xla.admit.admit`. Positions are dealt to partitions, as in `bag_step`. A
partition owns the groups of sets of its ids, and their part of the sketch. No partition reads or
writes what belongs to another. So the number of threads does not change a result. There is no sort:
the newcomers of a set wait in a queue. All arithmetic is on integers, so the bits are those of the
reference. The arrays of the vocabulary are updated in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.ops.cpu import call_frame, partitions
from mpembed_jax.ops.cpu.call_frame import argument, ask_for, compiled, result
from mpembed_jax.ops.cpu.hashes import SEEDS, fmix32, scale_to
from mpembed_jax.ops.cpu.partitions import CHUNKS, MAX_PARTS, bits_of
from mpembed_jax.ops.records import Admission, Admitted, Dealt
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes, pool
from mpembed_jax.vocabulary.pool import VocabularyState

_NO_ID = np.int32(NO_ID)
_AHEAD = 16  # ids between a prefetch and its use
_ZERO, _ONE, _TWO = np.uint64(0), np.uint64(1), np.uint64(2)
_PADDING = np.uint32(hashes.PADDING)
_TABLES = hashes.NUMBER
_NO_OWNER, _MAX_USE = np.uint32(pool.NO_OWNER), pool.MAX_USE
_USE_BITS, _PINNED = np.uint32(pool.USE_BITS), np.uint32(pool.PINNED)
_NO_KEY = np.uint64(2**64 - 1)
_TAG_SHIFT = np.uint32(32 - pool.TAG_BITS)
_MANTISSA = pool.MANTISSA
_SPLIT, _NOISE = np.uint32(pool.SPLIT_SEED), np.uint32(pool.NOISE_SEED)
# Numbers of the call's operands, then of its results. Owners and sketch are results 0 and 1, and
# also operands 4 and 5: the call changes them in place.
_PAIRS, _NUMBERS, _STEP, _TIMES = range(4)
_OWNERS, _SKETCH, _ROWS, _STARTED, _TABLES_STARTED, _FOUND = range(6)
# The other results are scratch. In this file, the number of an id is its index among the distinct
# ids of its partition. The scratch results hold:
#   _KEY: for each position, its key of 64 bits (see `_key_of`)
#   _DEALT, _POSITIONS, _ID_OF: for each position in the order of partitions, its key, the position
#     itself, and the number of its id
#   _ID_KEY to _NEXT: for each id, its key, set, tag, hash, occurrences, line, estimate, and the
#     next newcomer of its set
#   _QUEUE, _OPEN, _TAKEN, _TAKERS: for each partition, its newcomers, the buckets of their sets,
#     the rows that start again, and their new owners, then the tables of these
#   _BUCKET, _DEALS, _FACTS: hash tables of partitions, counts of chunks, counts of partitions
(
    _KEY, _DEALT, _POSITIONS, _ID_OF, _ID_KEY, _ID_SET, _ID_TAG, _MIXED, _COUNT, _LINE,
    _ESTIMATE, _NEXT, _QUEUE, _OPEN, _TAKEN, _TAKERS, _BUCKET, _DEALS, _FACTS,
) = range(6, 25)  # fmt: skip
# Entries of `_NUMBERS`, int32.
(
    _MUST_HALVE, _TASKS, _SETS, _WAYS, _GROUPS, _FIRST_SETS, _BITS, _WIDTH, _HALF_MASK,
    _TAG_MASK, _DEAL_GROUPS, _ADMIT_AFTER, _MAY_RECYCLE, _PER_TABLE, _STARTS_ALL,
) = range(15)  # fmt: skip
# Words of `_FACTS`: the number of partitions, the number of groups by which positions are dealt,
# and the first shared row; then where the positions of each partition begin, and where those of
# padding begin and end; then seven counts of each partition. The last two of them count the rows
# that its ids own, and the positions of these rows. A fused step reads the words whose names are
# public.
PARTS, GROUPS, FIRST_SHARED, BEGIN = range(4)
(
    _NUM_STARTED, _NUM_RECYCLED, _NUM_SHARED, _NUM_ADMITTED, _NUM_REFUSED, NUM_OWN,
    NUM_OWN_POSITIONS,
) = tuple(BEGIN + MAX_PARTS + 2 + k * MAX_PARTS for k in range(7))  # fmt: skip
_NUM_FACTS = NUM_OWN_POSITIONS + MAX_PARTS
_DEAL = MAX_PARTS + 1  # counts of a chunk: positions per partition, then padding


@compiled
def set_of(place, tag, sets, first_sets, group_bits):
    """Returns the set of an id (int64), from its place and tag; see pool.sets_of.

    place (uint32) is that of the pair, xor the bits of its tag that help to choose the set. tag
    (uint32) has 24 bits. sets and first_sets are int64. group_bits (uint32) is the base-2 logarithm
    of the number of groups.
    """
    mixed, shift = fmix32(place), np.int64(group_bits)
    group = np.int64(mixed & ((np.uint32(1) << group_bits) - np.uint32(1)))
    first = group + (scale_to(fmix32(mixed >> group_bits), first_sets >> shift) << shift)
    if sets == first_sets:
        return first
    number = sets // first_sets + (1 if first < sets % first_sets else 0)
    span = 1
    while span < number:
        span *= 2
    own = np.int64(fmix32(tag ^ _SPLIT)) & (span - 1)
    if own >= number:
        own &= (span >> 1) - 1
    return first + first_sets * own


@compiled
def _mixed(home, tag, sets, first_sets):
    """Returns the hash (uint32) of an id, from its set and tag; see pool.mixed."""
    first = home if sets == first_sets else home % first_sets
    return fmix32(tag ^ fmix32(np.uint32(first)))


@compiled
def _use_of(owner):
    code = np.int64(owner & _PINNED)
    if code < 2 << _MANTISSA:
        return code
    whole = (1 << _MANTISSA) + (code & ((1 << _MANTISSA) - 1))
    return np.int64(whole << ((code >> _MANTISSA) - 1))


@compiled
def _owner_of(tag, estimate, mixed, step):
    """Returns the owner of a row, with the estimate as its use, rounded; see pool.owners_of."""
    shift = np.int64(0)
    while estimate >> shift >= 2 << _MANTISSA:
        shift += 1
    whole = estimate >> shift
    rest = estimate - (whole << shift)
    code = (shift << _MANTISSA) + whole
    if rest > 0:
        noise = np.int64(fmix32(mixed ^ fmix32(step ^ _NOISE)))
        code += 1 if noise & ((1 << shift) - 1) < rest else 0
    return (tag << _USE_BITS) | np.uint32(code)


@compiled
def _halve(owners, sketch, half_mask):
    for k in range(len(owners)):
        code = owners[k] & _PINNED
        is_small = code < np.uint32(2 << _MANTISSA)
        half = code >> np.uint32(1) if is_small else code - np.uint32(1 << _MANTISSA)
        owners[k] = (owners[k] - code) | half
    for k in range(len(sketch)):
        sketch[k] = (sketch[k] >> 1) & half_mask


@compiled
def _shape(numbers):
    """Returns the four sizes (int64) on which the place of a counter depends.

    They are the number of groups, the bytes of a group in one row of the sketch, the bits of a
    counter, and the base-2 logarithm of the number of counters in a byte.
    """
    bits = np.int64(numbers[_BITS])
    per_bits = np.int64(3) - np.int64(bits_of(bits))
    return np.int64(numbers[_GROUPS]), np.int64(numbers[_WIDTH]), bits, per_bits


@compiled
def _counter(depth, home, mixed, shape):
    """Returns the index of a counter's byte in the flattened sketch, and its first bit there."""
    groups, width, bits, per_bits = shape
    column = scale_to(fmix32(mixed ^ np.uint32(SEEDS[depth])), width << per_bits)
    first = (depth * groups + (home & (groups - 1))) * width
    return first + (column >> per_bits), (column & ((1 << per_bits) - 1)) * bits


@compiled
def _ask_for_counters(sketch, home, mixed, shape):
    for depth in range(2):
        byte, _ = _counter(depth, home, mixed, shape)
        ask_for(sketch, byte, 1)


@compiled
def _count_of(sketch, home, mixed, shape):
    count = np.int64(255)
    for depth in range(2):
        byte, shift = _counter(depth, home, mixed, shape)
        count = min(count, (np.int64(sketch[byte]) >> shift) & ((1 << shape[2]) - 1))
    return count


@compiled
def _remember(sketch, home, mixed, shape, use):
    most = (1 << shape[2]) - 1
    for depth in range(2):
        byte, shift = _counter(depth, home, mixed, shape)
        held = np.int64(sketch[byte])
        if (held >> shift) & most < min(use, most):
            sketch[byte] = (held & ~(most << shift)) | (min(use, most) << shift)


# --- positions are dealt to partitions


@compiled
def _key_of(home, tag):
    """Returns the key of an id: its set (below 2^31) in the high bits, its tag in the low 24.

    Padding has the key _NO_KEY.
    """
    return (np.uint64(home) << np.uint64(pool.TAG_BITS)) | np.uint64(tag)


@compiled
def _keys(frame, index):
    """Returns a result that holds 64-bit keys.

    For XLA, the result has two words of 32 bits for each key, so its length in the frame is twice
    the number of keys.
    """
    whole = result(frame, index, np.uint64)
    return whole[: len(whole) // 2]


@compiled
def _part_of(key, groups, num_parts, shift):
    """Returns the partition of a key; num_parts for padding. groups and num_parts are uint64."""
    group = (key >> np.uint64(pool.TAG_BITS)) & (groups - _ONE)
    return num_parts if key == _NO_KEY else group >> shift


@compiled
def _deal_of(frame, chunk):
    return result(frame, _DEALS, np.int32)[chunk * _DEAL : (chunk + 1) * _DEAL]


@compiled
def _grouping(frame):
    """Returns the number of groups, the number of partitions, and a shift (uint64 each).

    The call may use fewer groups than the pool has. The partition of a group is the group's number,
    shifted right by `shift` bits.
    """
    facts = result(frame, _FACTS, np.int32)
    groups, num_parts = np.uint64(facts[GROUPS]), np.uint64(facts[PARTS])
    return groups, num_parts, np.uint64(bits_of(groups) - bits_of(num_parts))


def _count_chunk(frame, chunk):
    """Computes the keys of a chunk's positions, and counts the positions of each partition."""
    pairs, numbers = argument(frame, _PAIRS, np.uint32), argument(frame, _NUMBERS, np.int32)
    keys, deals = _keys(frame, _KEY), _deal_of(frame, chunk)
    sets, first_sets = np.int64(numbers[_SETS]), np.int64(numbers[_FIRST_SETS])
    groups, num_parts, shift = _grouping(frame)
    group_bits, last = bits_of(numbers[_GROUPS]), _NO_OWNER - np.uint32(1)
    mask = np.uint32(numbers[_TAG_MASK])
    begin, end = partitions.chunk_range(len(keys), chunk)
    for position in range(np.uint64(begin), np.uint64(end)):
        first = _TWO * position
        tag = min(pairs[first] >> _TAG_SHIFT, last)
        place = pairs[first + _ONE] ^ (pairs[first] & mask)
        home = set_of(place, tag, sets, first_sets, group_bits)
        keys[position] = _NO_KEY if pairs[first] == _PADDING else _key_of(home, tag)
    deals[:] = 0
    for position in range(np.uint64(begin), np.uint64(end)):
        deals[_part_of(keys[position], groups, num_parts, shift)] += 1


def _deal_chunk(frame, chunk):
    """Copies the keys and positions of a chunk to the places of their partitions, in order."""
    keys, dealt = _keys(frame, _KEY), _keys(frame, _DEALT)
    deals = _deal_of(frame, chunk)
    positions = result(frame, _POSITIONS, np.int32)
    groups, num_parts, shift = _grouping(frame)
    begin, end = partitions.chunk_range(len(keys), chunk)
    for position in range(np.uint64(begin), np.uint64(end)):
        part = _part_of(keys[position], groups, num_parts, shift)
        at = np.uint64(deals[part])
        deals[part] += 1
        dealt[at], positions[at] = keys[position], position


_count_chunks = call_frame.parts(_count_chunk)
_deal_chunks = call_frame.parts(_deal_chunk)


@compiled
def _deal(frame, num_tasks):
    """Groups the positions by partition; those of a partition ascend. Padding is last."""
    facts, deals = result(frame, _FACTS, np.int32), result(frame, _DEALS, np.int32)
    num_parts = facts[PARTS]
    _count_chunks(frame, CHUNKS, num_tasks)
    partitions.begin_parts(deals, _DEAL, num_parts, facts[BEGIN:])
    _deal_chunks(frame, CHUNKS, num_tasks)


# --- a partition


@compiled
def _find(frame, id_key, id_set, id_tag, mixed, count, line, estimate, queue):
    """Finds and pins the rows of a partition's ids, estimates the use of all ids, queues newcomers.

    Memory is prefetched some ids ahead: the owners of the set first, then the counters of an id
    without a row.

    Returns:
      The number of newcomers.
    """
    numbers = argument(frame, _NUMBERS, np.int32)
    owners, sketch = result(frame, _OWNERS, np.uint32), result(frame, _SKETCH, np.uint8)
    ways, shape = np.uint64(numbers[_WAYS]), _shape(numbers)
    sets, first_sets = np.int64(numbers[_SETS]), np.int64(numbers[_FIRST_SETS])
    num_ids = np.uint64(len(id_key))
    num_newcomers = _ZERO
    early = np.uint64(_AHEAD)
    for ahead in range(num_ids + early + early):
        if ahead < num_ids:
            home = id_key[ahead] >> np.uint64(pool.TAG_BITS)
            id_set[ahead], id_tag[ahead] = home, np.uint32(id_key[ahead]) & _NO_OWNER
            ask_for(owners, np.int64(home * ways), np.int64(ways))
        i = ahead - early  # it is unsigned: before the first id, it is larger than num_ids
        if i < num_ids:
            tag, first, place = id_tag[i], np.uint64(id_set[i]) * ways, _ZERO
            for way in range(ways):
                place += way + _ONE if owners[first + way] >> _USE_BITS == tag else _ZERO
            mixed[i] = _mixed(np.int64(id_set[i]), tag, sets, first_sets)
            line[i] = np.int64(first + place) - 1 if place > _ZERO else -1
            if place == _ZERO:
                _ask_for_counters(sketch, np.int64(id_set[i]), mixed[i], shape)
        i -= early
        if i < num_ids:
            if line[i] >= 0:
                here = np.uint64(line[i])
                estimate[i] = min(_use_of(owners[here]) + count[i], _MAX_USE)
                owners[here] |= _PINNED
            else:
                seen = _count_of(sketch, np.int64(id_set[i]), mixed[i], shape)
                estimate[i] = min(seen + count[i], _MAX_USE)
                queue[num_newcomers] = i
                num_newcomers += _ONE if estimate[i] >= numbers[_ADMIT_AFTER] else _ZERO
    return np.int64(num_newcomers)


@compiled
def _enter(
    frame, id_set, id_tag, line, estimate, queue, bucket, following, open_buckets, taken, takers
):
    """Gives newcomers rows. Fills `taken` with the rows that start again, `takers` with their ids.

    Returns:
      How many newcomers got a row, how many of these rows had another owner, and how many start
      again.
    """
    numbers = argument(frame, _NUMBERS, np.int32)
    owners, sketch = result(frame, _OWNERS, np.uint32), result(frame, _SKETCH, np.uint8)
    ways, shape = np.int64(numbers[_WAYS]), _shape(numbers)
    sets, first_sets = np.int64(numbers[_SETS]), np.int64(numbers[_FIRST_SETS])
    num_open, num_admitted, num_recycled, num_taken = 0, 0, 0, 0
    bucket[:] = 0
    for k in range(len(queue)):
        b = partitions.line_up(queue[k], ways, id_tag, estimate, id_set, bucket, following)
        if b >= 0:
            open_buckets[num_open] = b
            num_open += 1
    for k in range(num_open):
        i = np.int64(bucket[open_buckets[k]]) - 1
        home = np.int64(id_set[i])
        first = home * ways
        while i >= 0:
            best, cost = first, np.int64(1 << 20)
            for way in range(ways):
                owner = owners[np.uint64(first + way)]
                is_empty = owner >> _USE_BITS == _NO_OWNER
                paid = np.int64(0) if is_empty else _use_of(owner) + 1
                if paid < cost:
                    best, cost = first + way, paid
            if cost > (estimate[i] if numbers[_MAY_RECYCLE] else 0):
                break  # the newcomers that follow may not take a row either
            if cost > 0:
                hashed = _mixed(home, owners[best] >> _USE_BITS, sets, first_sets)
                _remember(sketch, home, hashed, shape, cost - 1)
                num_recycled += 1
            if cost > 0 or numbers[_STARTS_ALL]:
                taken[num_taken], takers[num_taken] = (best - first) * sets + home, i
                num_taken += 1
            # Recycles: the tag of the row's owner becomes that of the newcomer.
            owners[best], line[i] = (id_tag[i] << _USE_BITS) | _PINNED, best
            num_admitted += 1
            i = np.int64(following[i])
    return num_admitted, num_recycled, num_taken


@compiled
def _name_tables(frame, positions, id_of, table, takers):
    """Replaces ids in `takers` by their tables. `table` is scratch; see pool.tables_of."""
    pairs = argument(frame, _PAIRS, np.uint32)
    table[:] = -1
    for k in range(len(takers)):
        table[takers[k]] = hashes.MAX_TABLES
    for k in range(np.uint64(len(positions))):
        here = np.uint64(id_of[k])
        if table[here] >= 0:
            number = np.int32(pairs[_TWO * np.uint64(positions[k]) + _ONE] & _TABLES)
            table[here] = min(table[here], number)
    for k in range(len(takers)):
        takers[k] = table[takers[k]]


def _settle(frame, part):
    """Admits the ids of a partition, and writes the rows of its positions.

    At the end, `line`, `count`, `positions` and `id_of` hold what `Dealt` says.
    """
    facts, numbers = result(frame, _FACTS, np.int32), argument(frame, _NUMBERS, np.int32)
    begin, end = np.int64(facts[BEGIN + part]), np.int64(facts[BEGIN + part + 1])
    positions = result(frame, _POSITIONS, np.int32)[begin:end]
    row = result(frame, _ROWS, np.int32)
    if part == facts[PARTS]:
        for k in range(len(positions)):
            row[positions[k]] = _NO_ID
        return
    bucket = partitions.buckets_of(result(frame, _BUCKET, np.int32), begin, end, part)
    id_key = _keys(frame, _ID_KEY)[begin:end]
    id_set = result(frame, _ID_SET, np.int32)[begin:end]
    id_tag = result(frame, _ID_TAG, np.uint32)[begin:end]
    count = result(frame, _COUNT, np.int32)[begin:end]
    id_of = result(frame, _ID_OF, np.int32)[begin:end]
    mixed = result(frame, _MIXED, np.uint32)[begin:end]
    line = result(frame, _LINE, np.int32)[begin:end]
    estimate = result(frame, _ESTIMATE, np.int32)[begin:end]
    queue = result(frame, _QUEUE, np.int32)[begin:end]
    num_ids = partitions.deduplicate(_keys(frame, _DEALT)[begin:end], id_key, count, id_of, bucket)
    times = argument(frame, _TIMES, np.int32)
    if len(times) > 0:
        count[:num_ids] = 0
        for k in range(len(positions)):
            count[id_of[k]] += times[positions[k]]
    num_newcomers = _find(
        frame, id_key[:num_ids], id_set, id_tag, mixed, count, line, estimate, queue
    )
    num_admitted, num_recycled, num_taken = 0, 0, 0
    if num_newcomers > 0:
        following = result(frame, _NEXT, np.int32)[begin:end]
        takers = result(frame, _TAKERS, np.int32)[begin:end]
        num_admitted, num_recycled, num_taken = _enter(
            frame, id_set, id_tag, line, estimate, queue[:num_newcomers], bucket, following,
            result(frame, _OPEN, np.int32)[begin:end], result(frame, _TAKEN, np.int32)[begin:end],
            takers,
        )  # fmt: skip
        if num_taken > 0 and numbers[_STARTS_ALL]:
            _name_tables(frame, positions, id_of, following[:num_ids], takers[:num_taken])
    facts[_NUM_STARTED + part], facts[_NUM_RECYCLED + part] = num_taken, num_recycled
    facts[_NUM_ADMITTED + part] = num_admitted
    facts[_NUM_REFUSED + part] = num_newcomers - num_admitted

    owners, sketch = result(frame, _OWNERS, np.uint32), result(frame, _SKETCH, np.uint8)
    step, shape = argument(frame, _STEP, np.uint32)[0], _shape(numbers)
    sets, ways = np.int64(numbers[_SETS]), np.int64(numbers[_WAYS])
    index, num_own = queue, _ZERO  # the queue of newcomers is not needed any more
    for i in range(np.uint64(num_ids)):
        here, home = np.int64(line[i]), np.int64(id_set[i])
        if here >= 0:
            owner = _owner_of(id_tag[i], np.int64(estimate[i]), mixed[i], step)
            owners[np.uint64(here)] = owner
            line[num_own], count[num_own] = (here - home * ways) * sets + home, count[i]
            index[i] = num_own
            num_own += _ONE
        else:
            index[i] = -1
            _remember(sketch, home, mixed[i], shape, np.int64(estimate[i]))

    pairs = argument(frame, _PAIRS, np.uint32)
    per_table = np.int64(numbers[_PER_TABLE])
    num_listed = _ZERO
    for k in range(np.uint64(len(positions))):
        position = np.uint64(positions[k])
        own = np.int64(index[np.uint64(id_of[k])])
        positions[num_listed], id_of[num_listed] = position, own
        if own >= 0:
            num_listed += _ONE
            row[position] = line[np.uint64(own)]
        else:
            tag, place = pairs[_TWO * position], pairs[_TWO * position + _ONE]
            number = np.int64(place & _TABLES)
            shared = number * per_table + scale_to(fmix32(tag), per_table)
            row[position] = facts[FIRST_SHARED] + shared
    facts[NUM_OWN + part], facts[NUM_OWN_POSITIONS + part] = num_own, num_listed
    facts[_NUM_SHARED + part] = end - begin - np.int64(num_listed)


_settle_parts = call_frame.parts(_settle)


def _admit(frame):
    numbers, facts = argument(frame, _NUMBERS, np.int32), result(frame, _FACTS, np.int32)
    owners, sketch = result(frame, _OWNERS, np.uint32), result(frame, _SKETCH, np.uint8)
    started, found = result(frame, _STARTED, np.int32), result(frame, _FOUND, np.int32)
    tables = result(frame, _TABLES_STARTED, np.int32)
    taken, takers = result(frame, _TAKEN, np.int32), result(frame, _TAKERS, np.int32)
    num_tasks = min(call_frame.num_threads(frame), np.int64(numbers[_TASKS]))
    groups = np.int64(numbers[_DEAL_GROUPS])
    num_parts = partitions.num_parts(groups, num_tasks)
    facts[:] = 0
    facts[PARTS], facts[GROUPS] = num_parts, groups
    facts[FIRST_SHARED] = numbers[_SETS] * numbers[_WAYS]
    if numbers[_MUST_HALVE]:
        _halve(owners, sketch, numbers[_HALF_MASK])
    _deal(frame, num_tasks)
    _settle_parts(frame, num_parts + 1, num_tasks)
    found[:] = 0
    num_started = 0
    for part in range(num_parts):
        begin = np.int64(facts[BEGIN + part])
        for k in range(begin, begin + facts[_NUM_STARTED + part]):
            started[num_started], tables[num_started] = taken[k], takers[k]
            num_started += 1
        found[1] += facts[_NUM_RECYCLED + part]
        found[3] += facts[_NUM_SHARED + part]
        found[4] += facts[_NUM_ADMITTED + part]
        found[5] += facts[_NUM_REFUSED + part]
    for k in range(num_started, len(started)):
        started[k], tables[k] = _NO_ID, 0
    found[0], found[2] = num_started, facts[BEGIN + num_parts]


def admit(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    occurrences: jax.Array | None,
    *,
    groups: int,
    max_threads: int,
) -> tuple[VocabularyState, Admitted]:
    """Gives raw ids (uint32 [N, 2], N > 0) rows; see `xla.admit.admit`.

    The vocabulary is the whole pool, on one device. Positions are dealt by group. The number of
    groups is that of the pool, but at most `groups`, a power of two. At most `max_threads` threads
    of XLA's pool share the work.
    """
    call_frame.register("mpembed_admit", _admit)
    num = pairs.shape[0]
    of = vocabulary.sizes
    assert of.geometry.groups & (of.geometry.groups - 1) == 0  # for set_of
    held = [vocabulary.owners, vocabulary.sketch]
    sizes = dict.fromkeys(range(_ROWS, _FACTS), num)
    sizes |= {_FOUND: 6, _BUCKET: 4 * num + 16 * MAX_PARTS}
    sizes |= {_DEALS: CHUNKS * _DEAL, _FACTS: _NUM_FACTS}
    sizes |= dict.fromkeys((_KEY, _DEALT, _ID_KEY), 2 * num)
    kinds = dict.fromkeys((_ID_TAG, _MIXED), jnp.uint32)
    static = [*of.geometry, of.first_sets, of.counter_bits, of.width, of.half_mask]
    static += [pool.tag_mask(of.place_bits), min(groups, of.geometry.groups), *rules]
    numbers = jnp.asarray([max_threads, *static], jnp.int32)
    results: Any = jax.ffi.ffi_call(
        "mpembed_admit",
        call_frame.shapes_of(held)
        + [jax.ShapeDtypeStruct((sizes[n],), kinds.get(n, jnp.int32)) for n in sorted(sizes)],
        input_output_aliases={4: _OWNERS, 5: _SKETCH},
        vmap_method="sequential",
    )(
        pairs,
        jnp.concatenate([must_halve.astype(jnp.int32)[None], numbers]),
        step[None],
        jnp.zeros(0, jnp.int32) if occurrences is None else occurrences,
        *held,
    )
    vocabulary = dataclasses.replace(vocabulary, owners=results[_OWNERS], sketch=results[_SKETCH])
    dealt = Dealt(*(results[n] for n in (_FACTS, _LINE, _COUNT, _POSITIONS, _ID_OF)))
    tables = results[_TABLES_STARTED] if rules.starts_all else None
    found = Admitted(results[_ROWS], results[_STARTED], tables, *results[_FOUND])
    return vocabulary, found._replace(dealt=dealt)
