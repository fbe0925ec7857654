"""Admission of raw ids on a CPU, by loops that numba compiles.

The rules are those of `xla.admit.admit`. There is no sort: the newcomers of a set wait in a list in
their order, of which no more than the set has ways can enter. All arithmetic is on integers, so the
bits are those of the reference. The arrays of the vocabulary are updated in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.ops.cpu import call_frame
from mpembed_jax.ops.cpu.call_frame import argument, compiled, result
from mpembed_jax.ops.cpu.hashes import SEEDS, fmix32, scale_to
from mpembed_jax.ops.records import Admission, Admitted
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import hashes, pool
from mpembed_jax.vocabulary.pool import VocabularyState

_NO_ID = np.int32(NO_ID)
_PADDING = np.uint32(hashes.PADDING)
_TABLES = np.uint32(hashes.MAX_TABLES - 1)
_NO_OWNER, _MAX_USE = np.uint32(pool.NO_OWNER), pool.MAX_USE
_USE_BITS, _PINNED = np.uint32(pool.USE_BITS), np.uint32(pool.PINNED)
_TAG_SHIFT = np.uint32(32 - pool.TAG_BITS)
_MANTISSA = pool.MANTISSA
_SPLIT, _NOISE = np.uint32(pool.SPLIT_SEED), np.uint32(pool.NOISE_SEED)
# The operands and results of the call, by position. Owners and sketch are results 0 and 1 and also
# operands 4 and 5: the call changes them in place.
_PAIRS, _NUMBERS, _STEP, _TIMES = range(4)
_OWNERS, _SKETCH, _ROWS, _RECYCLED, _FOUND = range(5)
# By distinct id: its set, tag, hash, occurrences, line, estimate, and the next newcomer of its set.
_ID_SET, _ID_TAG, _MIXED, _COUNT, _LINE, _ESTIMATE, _NEXT, _INDEX = range(5, 13)
_TABLE, _HEAD, _LENGTH = range(13, 16)


@compiled
def set_of(place, tag, sets, first_sets, groups):
    """Returns the set of an id; see pool.sets_of. The sizes are int64."""
    mixed = fmix32(place)
    first = np.int64(mixed % np.uint32(groups)) + groups * scale_to(
        fmix32(mixed // np.uint32(groups)), first_sets // groups
    )
    number = sets // first_sets + (1 if first < sets % first_sets else 0)
    span = 1
    while span < number:
        span *= 2
    own = np.int64(fmix32(tag ^ _SPLIT)) & (span - 1)
    if own >= number:
        own &= (span >> 1) - 1
    return first + first_sets * own


@compiled
def _mixed(home, tag, first_sets):
    return fmix32(tag ^ fmix32(np.uint32(home % first_sets)))


@compiled
def _use_of(owner):
    code = np.int64(owner & _PINNED)
    if code < 2 << _MANTISSA:
        return code
    whole = (1 << _MANTISSA) + (code & ((1 << _MANTISSA) - 1))
    return np.int64(whole << ((code >> _MANTISSA) - 1))


@compiled
def _owner_of(tag, estimate, noise):
    shift = np.int64(0)
    while estimate >> shift >= 2 << _MANTISSA:
        shift += 1
    whole = estimate >> shift
    rest = estimate - (whole << shift)
    code = (shift << _MANTISSA) + whole
    if (np.int64(noise) & ((1 << shift) - 1)) < rest:
        code += 1
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
def _counter(depth, home, mixed, groups, width, bits):
    """Returns the byte and the first bit of a counter."""
    per = 8 // bits
    column = scale_to(fmix32(mixed ^ np.uint32(SEEDS[depth])), width * per)
    return (depth * groups + home % groups) * width + column // per, (column % per) * bits


@compiled
def _count_of(sketch, home, mixed, groups, width, bits):
    count = np.int64(255)
    for depth in range(2):
        byte, shift = _counter(depth, home, mixed, groups, width, bits)
        count = min(count, (np.int64(sketch[byte]) >> shift) & ((1 << bits) - 1))
    return count


@compiled
def _remember(sketch, home, mixed, groups, width, bits, use):
    most = (1 << bits) - 1
    for depth in range(2):
        byte, shift = _counter(depth, home, mixed, groups, width, bits)
        held = np.int64(sketch[byte])
        if (held >> shift) & most < min(use, most):
            sketch[byte] = (held & ~(most << shift)) | (min(use, most) << shift)


@compiled
def _enqueue(i, id_set, id_tag, estimate, after, head, length, ways):
    """Puts a newcomer into the list of its set, which keeps the first `ways`."""
    mask = len(head) - 1
    bucket = np.int64(fmix32(np.uint32(id_set[i]))) & mask
    while head[bucket] >= 0 and id_set[head[bucket]] != id_set[i]:
        bucket = (bucket + 1) & mask
    last = np.int64(-1)
    k = np.int64(head[bucket])
    while k >= 0 and (
        estimate[k] > estimate[i] or (estimate[k] == estimate[i] and id_tag[k] < id_tag[i])
    ):
        last = k
        k = np.int64(after[k])
    after[i] = k
    if last < 0:
        head[bucket] = i
    else:
        after[last] = i
    if length[bucket] < ways:
        length[bucket] += 1
        return
    # The list was full, and its last entry leaves. The list has one entry at least.
    last = np.int64(head[bucket])
    for _ in range(ways - 1):
        last = np.int64(after[last])
    after[last] = -1


def _admit(frame):
    pairs = argument(frame, _PAIRS, np.uint32)
    numbers = argument(frame, _NUMBERS, np.int32)
    step = argument(frame, _STEP, np.uint32)[0]
    times = argument(frame, _TIMES, np.int32)
    owners = result(frame, _OWNERS, np.uint32)
    sketch = result(frame, _SKETCH, np.uint8)
    row = result(frame, _ROWS, np.int32)
    recycled = result(frame, _RECYCLED, np.int32)
    found = result(frame, _FOUND, np.int32)
    id_set = result(frame, _ID_SET, np.int32)
    id_tag = result(frame, _ID_TAG, np.uint32)
    mixed = result(frame, _MIXED, np.uint32)
    count = result(frame, _COUNT, np.int32)
    line = result(frame, _LINE, np.int32)
    estimate = result(frame, _ESTIMATE, np.int32)
    after = result(frame, _NEXT, np.int32)
    index = result(frame, _INDEX, np.int32)
    table = result(frame, _TABLE, np.int32)
    head = result(frame, _HEAD, np.int32)
    length = result(frame, _LENGTH, np.int32)
    must_halve = numbers[0]
    sets = np.int64(numbers[1])
    ways = np.int64(numbers[2])
    groups = np.int64(numbers[3])
    first_sets = np.int64(numbers[4])
    bits = np.int64(numbers[5])
    width = np.int64(numbers[6])
    half_mask = numbers[7]
    admit_after = numbers[8]
    may_recycle = numbers[9]
    per_table = np.int64(numbers[10])
    num = len(pairs) // 2
    if must_halve:
        _halve(owners, sketch, half_mask)

    table[:] = -1
    mask = len(table) - 1
    num_ids, num_requests = 0, 0
    for position in range(num):
        if pairs[2 * position] == _PADDING:
            index[position] = -1
            continue
        num_requests += 1
        tag = min(pairs[2 * position] >> _TAG_SHIFT, _NO_OWNER - np.uint32(1))
        home = set_of(pairs[2 * position + 1], tag, sets, first_sets, groups)
        hashed = _mixed(home, tag, first_sets)
        bucket = np.int64(hashed) & mask
        while table[bucket] >= 0 and (
            id_tag[table[bucket]] != tag or id_set[table[bucket]] != home
        ):
            bucket = (bucket + 1) & mask
        i = np.int64(table[bucket])
        if i < 0:
            i = num_ids
            table[bucket] = i
            id_set[i] = home
            id_tag[i] = tag
            mixed[i] = hashed
            count[i] = 0
            num_ids += 1
        count[i] += times[position] if len(times) > 0 else 1
        index[position] = i

    # Ids with rows are pinned; all others are estimated by the sketch.
    no_line = sets * ways
    for i in range(num_ids):
        first = id_set[i] * ways
        line[i] = no_line
        for way in range(ways):
            if owners[first + way] >> _USE_BITS == id_tag[i]:
                line[i] = first + way
        if line[i] < no_line:
            estimate[i] = min(_use_of(owners[line[i]]) + count[i], _MAX_USE)
            owners[line[i]] |= _PINNED
        else:
            seen = _count_of(sketch, np.int64(id_set[i]), mixed[i], groups, width, bits)
            estimate[i] = min(seen + count[i], _MAX_USE)

    head[:] = -1
    length[:] = 0
    num_newcomers = 0
    for i in range(num_ids):
        if line[i] == no_line and estimate[i] >= admit_after:
            num_newcomers += 1
            _enqueue(i, id_set, id_tag, estimate, after, head, length, ways)
    num_admitted, num_recycled = 0, 0
    for bucket in range(len(head)):
        i = np.int64(head[bucket])
        while i >= 0:
            home = np.int64(id_set[i])
            first = home * ways
            best, cost = first, np.int64(1 << 20)
            for way in range(ways):
                here = first + way
                is_empty = owners[here] >> _USE_BITS == _NO_OWNER
                paid = np.int64(0) if is_empty else _use_of(owners[here]) + 1
                if paid < cost:
                    best, cost = here, paid
            if cost > (estimate[i] if may_recycle else 0):
                break  # nor may those that follow
            if cost > 0:
                hashed = _mixed(home, owners[best] >> _USE_BITS, first_sets)
                _remember(sketch, home, hashed, groups, width, bits, cost - 1)
                recycled[num_recycled] = (best - first) * sets + home
                num_recycled += 1
            owners[best] = (id_tag[i] << _USE_BITS) | _PINNED
            line[i] = best
            num_admitted += 1
            i = np.int64(after[i])
    for k in range(num_recycled, num):
        recycled[k] = _NO_ID

    for i in range(num_ids):
        if line[i] < no_line:
            noise = fmix32(mixed[i] ^ fmix32(step ^ _NOISE))
            owners[line[i]] = _owner_of(id_tag[i], np.int64(estimate[i]), noise)
        else:
            home, use = np.int64(id_set[i]), np.int64(estimate[i])
            _remember(sketch, home, mixed[i], groups, width, bits, use)
    num_shared = 0
    for position in range(num):
        i = index[position]
        if i < 0:
            row[position] = _NO_ID
        elif line[i] < no_line:
            row[position] = (line[i] - id_set[i] * ways) * sets + id_set[i]
        else:
            num_shared += 1
            number = np.int64(pairs[2 * position + 1] & _TABLES)
            row[position] = (
                no_line + number * per_table + scale_to(fmix32(pairs[2 * position]), per_table)
            )
    found[0], found[1], found[2] = num_recycled, num_requests, num_shared
    found[3], found[4] = num_admitted, num_newcomers - num_admitted


def admit(
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    occurrences: jax.Array | None = None,
) -> tuple[VocabularyState, Admitted]:
    """Gives raw ids (uint32 [N, 2], N > 0) rows; see `xla.admit.admit`."""
    call_frame.register("mpembed_admit", _admit)
    num = pairs.shape[0]
    of = vocabulary.sizes
    held = [vocabulary.owners, vocabulary.sketch]
    num_buckets = 1 << max(4, (2 * num - 1).bit_length())
    by_id = (_ROWS, _RECYCLED, _ID_SET, _ID_TAG, _MIXED, _COUNT, _LINE, _ESTIMATE, _NEXT, _INDEX)
    sizes = dict.fromkeys(by_id, num) | {_FOUND: 5}
    sizes |= dict.fromkeys((_TABLE, _HEAD, _LENGTH), num_buckets)
    kinds = {_ID_TAG: jnp.uint32, _MIXED: jnp.uint32}
    counting = [of.first_sets, of.counter_bits, of.width, of.half_mask]
    static = np.asarray([*of.geometry, *counting, *rules], np.int32)
    results: Any = jax.ffi.ffi_call(
        "mpembed_admit",
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in held]
        + [jax.ShapeDtypeStruct((sizes[n],), kinds.get(n, jnp.int32)) for n in sorted(sizes)],
        input_output_aliases={4: _OWNERS, 5: _SKETCH},
        vmap_method="sequential",
    )(
        pairs,
        jnp.concatenate([must_halve.astype(jnp.int32)[None], static]),
        step[None],
        jnp.zeros(0, jnp.int32) if occurrences is None else occurrences,
        *held,
    )
    vocabulary = dataclasses.replace(vocabulary, owners=results[_OWNERS], sketch=results[_SKETCH])
    return vocabulary, Admitted(results[_ROWS], results[_RECYCLED], *results[_FOUND])
