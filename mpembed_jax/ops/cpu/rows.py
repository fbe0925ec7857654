"""Gathers and scatters of rows on a CPU, on two threads and with prefetching.

A row of a large table is not in the processor's caches. To read it takes a few hundred nanoseconds,
and XLA's loops wait for a few such reads at a time. The loops here prefetch later rows while they
copy the current one. Large results bypass the processor's caches. Rows are moved without
arithmetic, so the bits are those of the reference.
"""

import jax
import numpy as np

from mpembed_jax.ops.cpu import call_frame
from mpembed_jax.ops.cpu.call_frame import argument, ask_for, compiled, fence, result, stream

_AHEAD = 8  # rows between a prefetch and its use
# Results of at least this many 32-bit words (12 MiB) bypass the processor's caches. A core's share
# of the last-level cache is unlikely to hold them until they are read.
_STREAMED = 3 << 20


@compiled
def _row_at(index, i, end, array, words, num_rows):
    """Returns index[i] as uint64, and prefetches the row of a later index before `end`.

    A negative index becomes a number beyond all rows.
    """
    ahead = np.uint64(np.uint32(index[min(i + _AHEAD, end - 1)]))
    if ahead < num_rows:
        ask_for(array, np.int64(ahead * words), np.int64(words))
    return np.uint64(np.uint32(index[i]))


def _put_half(frame, half):
    index = argument(frame, 0, np.int32)
    values = argument(frame, 1, np.uint32)
    array = result(frame, 0, np.uint32)
    num = len(index)
    if num == 0:
        return
    words = np.uint64(len(values) // num)
    num_rows = np.uint64(len(array)) // words
    end = num * (half + 1) // 2
    for i in range(num * half // 2, end):
        here = _row_at(index, i, end, array, words, num_rows)
        row = np.uint64(i)
        if here < num_rows:
            for word in range(words):
                array[here * words + word] = values[row * words + word]


_put = call_frame.halves(_put_half)


def put(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `array` [n, m] with rows `index` (int32 [k], distinct) set to `values` [k, m].

    Array and values are both float32 or both uint32. Rows with an index outside the array are
    dropped; see `indexing.put`.
    """
    call_frame.register("mpembed_put", _put)
    out = jax.ShapeDtypeStruct(array.shape, array.dtype)
    call = jax.ffi.ffi_call(
        "mpembed_put", out, input_output_aliases={2: 0}, vmap_method="sequential"
    )
    return call(index, values, array)


def _take_half(frame, half):
    array = argument(frame, 0, np.uint32)
    index = argument(frame, 1, np.int32)
    out = result(frame, 0, np.uint32)
    num = len(index)
    if num == 0:
        return
    words = np.uint64(len(out) // num)
    if words == 0:
        return
    num_rows = np.uint64(len(array)) // words
    end = num * (half + 1) // 2
    is_streamed = len(out) >= _STREAMED and words % np.uint64(8) == 0 and out.ctypes.data % 32 == 0
    for i in range(num * half // 2, end):
        here = _row_at(index, i, end, array, words, num_rows)
        row = np.uint64(i)
        if here >= num_rows:
            for word in range(words):
                out[row * words + word] = np.uint32(0)
        elif is_streamed:
            for word in range(np.uint64(0), words, np.uint64(8)):
                stream(out, np.int64(row * words + word), array, np.int64(here * words + word))
        else:
            for word in range(words):
                out[row * words + word] = array[here * words + word]
    if is_streamed:
        fence()


_take = call_frame.halves(_take_half)


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """Returns array[index] [k, m] for array [n, m], float32 or uint32, and index int32 [k].

    An index outside the array, also a negative one, gives zeros.
    """
    call_frame.register("mpembed_take", _take)
    out = jax.ShapeDtypeStruct((*index.shape, *array.shape[1:]), array.dtype)
    return jax.ffi.ffi_call("mpembed_take", out, vmap_method="sequential")(array, index)
