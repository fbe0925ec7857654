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
_MAX_USE, _PINNED, _MAX_COUNT = pool.MAX_USE, pool.PINNED, pool.MAX_COUNT
# The operands and results of the call, by position. Tags, use and sketch are results 0 to 2 and
# also operands 2 to 4: the call changes them in place.
_PAIRS, _NUMBERS = range(2)
_TAGS, _USE, _SKETCH, _ROWS, _RECYCLED, _FOUND = range(6)
# By distinct id: its set, tag, occurrences, line, estimate, and the next newcomer of its set.
_ID_SET, _ID_TAG, _COUNT, _LINE, _ESTIMATE, _NEXT, _INDEX = range(6, 13)
_TABLE, _HEAD, _LENGTH = range(13, 16)


@compiled
def _set_of(place, sets, groups):
    mixed = fmix32(place)
    return np.int64(mixed % np.uint32(groups)) + groups * scale_to(
        fmix32(mixed // np.uint32(groups)), sets // groups
    )


@compiled
def _cell(depth, home, tag, groups, width):
    mixed = fmix32(tag ^ fmix32(np.uint32(home)))
    column = scale_to(fmix32(mixed ^ np.uint32(SEEDS[depth])), width)
    return (depth * groups + home % groups) * width + column


@compiled
def _remember(sketch, home, tag, groups, width, use):
    for depth in range(2):
        cell = _cell(depth, home, tag, groups, width)
        sketch[cell] = max(np.int64(sketch[cell]), min(use, _MAX_COUNT))


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
    tags = result(frame, _TAGS, np.uint32)
    use = result(frame, _USE, np.uint16)
    sketch = result(frame, _SKETCH, np.uint8)
    row = result(frame, _ROWS, np.int32)
    recycled = result(frame, _RECYCLED, np.int32)
    found = result(frame, _FOUND, np.int32)
    id_set = result(frame, _ID_SET, np.int32)
    id_tag = result(frame, _ID_TAG, np.uint32)
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
    width = np.int64(numbers[4])
    admit_after = numbers[5]
    may_recycle = numbers[6]
    per_table = np.int64(numbers[7])
    num = len(pairs) // 2
    if must_halve:
        for k in range(len(use)):
            use[k] >>= 1
        for k in range(len(sketch)):
            sketch[k] >>= 1

    table[:] = -1
    mask = len(table) - 1
    num_ids, num_requests = 0, 0
    for position in range(num):
        tag = pairs[2 * position]
        if tag == _PADDING:
            index[position] = -1
            continue
        num_requests += 1
        home = _set_of(pairs[2 * position + 1], sets, groups)
        bucket = np.int64(fmix32(tag ^ fmix32(np.uint32(home)))) & mask
        while table[bucket] >= 0 and (
            id_tag[table[bucket]] != tag or id_set[table[bucket]] != home
        ):
            bucket = (bucket + 1) & mask
        i = np.int64(table[bucket])
        if i < 0:
            i = num_ids
            table[bucket], id_set[i], id_tag[i], count[i] = i, home, tag, 0
            num_ids += 1
        count[i] += 1
        index[position] = i

    # Ids with rows are pinned; all others are estimated by the sketch.
    no_line = sets * ways
    for i in range(num_ids):
        first = id_set[i] * ways
        line[i] = no_line
        for way in range(ways):
            if tags[first + way] == id_tag[i]:
                line[i] = first + way
        if line[i] < no_line:
            estimate[i] = min(np.int64(use[line[i]]) + count[i], _MAX_USE)
            use[line[i]] = _PINNED
        else:
            one = sketch[_cell(0, np.int64(id_set[i]), id_tag[i], groups, width)]
            other = sketch[_cell(1, np.int64(id_set[i]), id_tag[i], groups, width)]
            estimate[i] = min(np.int64(min(one, other)) + count[i], _MAX_USE)

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
            first = id_set[i] * ways
            best, cost = first, np.int64(1 << 20)
            for way in range(ways):
                here = first + way
                paid = np.int64(0) if tags[here] == _PADDING else np.int64(use[here]) + 1
                if paid < cost:
                    best, cost = here, paid
            if cost > (estimate[i] if may_recycle else 0):
                break  # nor may those that follow
            if cost > 0:
                _remember(sketch, np.int64(id_set[i]), tags[best], groups, width, cost - 1)
                recycled[num_recycled] = (best - first) * sets + id_set[i]
                num_recycled += 1
            tags[best], use[best], line[i] = id_tag[i], _PINNED, best
            num_admitted += 1
            i = np.int64(after[i])
    for k in range(num_recycled, num):
        recycled[k] = _NO_ID

    for i in range(num_ids):
        if line[i] < no_line:
            use[line[i]] = estimate[i]
        else:
            home = np.int64(id_set[i])
            _remember(sketch, home, id_tag[i], groups, width, np.int64(estimate[i]))
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
            row[position] = no_line + number * per_table + scale_to(fmix32(id_tag[i]), per_table)
    found[0], found[1], found[2] = num_recycled, num_requests, num_shared
    found[3], found[4] = num_admitted, num_newcomers - num_admitted


def admit(
    vocabulary: VocabularyState, pairs: jax.Array, must_halve: jax.Array, rules: Admission
) -> tuple[VocabularyState, Admitted]:
    """Gives raw ids (uint32 [N, 2], N > 0) rows; see `xla.admit.admit`."""
    call_frame.register("mpembed_admit", _admit)
    num = pairs.shape[0]
    sets, ways, groups = vocabulary.geometry
    held = [vocabulary.tags, vocabulary.use, vocabulary.sketch]
    num_buckets = 1 << max(4, (2 * num - 1).bit_length())
    sizes = dict.fromkeys((_ROWS, _RECYCLED, _ID_SET, _ID_TAG, _COUNT, _LINE, _ESTIMATE), num)
    sizes |= {_NEXT: num, _INDEX: num, _FOUND: 5}
    sizes |= dict.fromkeys((_TABLE, _HEAD, _LENGTH), num_buckets)
    kinds = {_ID_TAG: jnp.uint32}
    static = np.asarray([sets, ways, groups, vocabulary.sketch.shape[-1], *rules], np.int32)
    results: Any = jax.ffi.ffi_call(
        "mpembed_admit",
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in held]
        + [jax.ShapeDtypeStruct((sizes[n],), kinds.get(n, jnp.int32)) for n in sorted(sizes)],
        input_output_aliases={2: _TAGS, 3: _USE, 4: _SKETCH},
        vmap_method="sequential",
    )(pairs, jnp.concatenate([must_halve.astype(jnp.int32)[None], static]), *held)
    vocabulary = dataclasses.replace(
        vocabulary, tags=results[_TAGS], use=results[_USE], sketch=results[_SKETCH]
    )
    return vocabulary, Admitted(results[_ROWS], results[_RECYCLED], *results[_FOUND])
