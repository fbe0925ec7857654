"""The distinct ids of a batch on a CPU, by a hash table in a loop that numba compiles.

The ids of a batch take a few hundred kilobytes. A plain loop over them takes half the time of XLA's
passes over arrays, or less. The bits are those of the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax.arrays import indexing
from mpembed_jax.ops.cpu import call_frame
from mpembed_jax.ops.cpu.call_frame import argument, compiled, result
from mpembed_jax.ops.cpu.hashes import fmix32
from mpembed_jax.ops.records import Unique
from mpembed_jax.row_ids import NO_ID

_NO_ID = np.int32(NO_ID)


def _unique(frame):
    ids = argument(frame, 0, np.int32)
    step = argument(frame, 1, np.int32)[0]
    unique_ids = result(frame, 0, np.int32)
    inverse = result(frame, 1, np.int32)
    counts = result(frame, 2, np.int32)
    numbers = result(frame, 3, np.int32)
    table = result(frame, 4, np.int32)
    # All distinct ids, also those over the budget, and how often each occurs.
    seen = result(frame, 5, np.int32)
    times = result(frame, 6, np.int32)
    size = len(unique_ids)
    mask = len(table) - 1

    table[:] = -1
    num_found = 0
    for position in range(len(ids)):
        x = ids[position]
        if x == _NO_ID:
            inverse[position] = size - 1
            continue
        bucket = np.int64(fmix32(x)) & mask
        while table[bucket] >= 0 and seen[table[bucket]] != x:
            bucket = (bucket + 1) & mask
        index = table[bucket]
        if index < 0:
            index = num_found
            table[bucket] = index
            seen[index] = x
            times[index] = 0
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
    numbers[0] = num_ids
    numbers[1] = num_found - num_ids


@compiled
def smallest(values, num):
    """Returns the num-th smallest of `values` (uint32), counted from 1; 0 is taken as 1.

    It first finds the upper 16 bits of the result, by counting how often each upper half occurs.
    Then it finds the lower 16 bits in the same way, among the values with this upper half. So numba
    need not compile a sort.
    """
    found = np.uint32(0)
    rest = max(num, 1)
    for shift in (np.uint32(16), np.uint32(0)):
        counts = np.zeros(1 << 16, np.int64)
        for value in values:
            if shift or value >> np.uint32(16) == found:
                counts[np.int64((value >> shift) & np.uint32(0xFFFF))] += 1
        digit = 0
        while counts[digit] < rest:
            rest -= counts[digit]
            digit += 1
        found = np.uint32((found << np.uint32(16)) | np.uint32(digit))
    return found


@compiled
def _keep_smallest(ids, step, seen, times, inverse, num_found, num_kept, padding):
    """Keeps the num_kept ids that are smallest by fmix32(id xor step), in their order.

    It is called if there are more distinct ids than the budget allows. It changes seen, times and
    inverse in place.
    """
    mixed = np.empty(num_found, np.uint32)
    moved = np.empty(num_found, np.int32)
    for index in range(num_found):
        mixed[index] = fmix32(np.uint32(seen[index]) ^ np.uint32(step))
    limit = smallest(mixed, num_kept)
    kept = 0
    for index in range(num_found):
        moved[index] = padding
        if num_kept > 0 and mixed[index] <= limit:
            moved[index], seen[kept], times[kept] = kept, seen[index], times[index]
            kept += 1
    for position in range(len(ids)):
        if ids[position] != _NO_ID:
            inverse[position] = moved[inverse[position]]


def find(known: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds ids (int32 [N]) among known ones (int32 [n], n > 0); see `xla.unique.find`.

    It lists the distinct ids of `known` and `ids` together, in order of first occurrence. The list
    begins with the known ids. So the index of an id in it is the index in `known`, or is beyond the
    known ids.
    """
    num_known = known.shape[0]
    both = jnp.concatenate([known, ids])
    index = unique(both, both.shape[0] + 1, jnp.int32(0)).inverse[num_known:]
    is_known = index < jnp.sum(known != NO_ID, dtype=jnp.int32)
    return jnp.where(is_known, index, num_known - 1), is_known


def unique(ids: jax.Array, size: int, step: jax.Array) -> Unique:
    """Returns the distinct ids of a batch, in order of first occurrence; see `xla.unique.unique`.

    Args:
      ids: int32 [N], N > 0; NO_ID is padding.
      size: U; the last of the returned ids is always NO_ID.
      step: int32 scalar, the number of this prefetch.
    """
    call_frame.register("mpembed_unique", _unique)
    (num_positions,) = ids.shape
    num_buckets = max(16, indexing.ceil_power(2 * num_positions))
    shapes = [size, num_positions, size, 2, num_buckets, num_positions, num_positions]
    call = jax.ffi.ffi_call(
        "mpembed_unique",
        [jax.ShapeDtypeStruct((n,), jnp.int32) for n in shapes],
        vmap_method="sequential",
    )
    unique_ids, inverse, counts, numbers, *_ = call(ids, step.reshape(1))
    return Unique(unique_ids, inverse, counts, numbers[0], numbers[1])
