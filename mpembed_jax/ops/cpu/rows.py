"""Gathers and scatters of rows on a CPU: two threads, cache lines asked for ahead, large results past the caches.

A row of a large table is a cache miss of some hundred nanoseconds. XLA's loops wait for a few at a time; these ask for the
rows to come while they copy the present one. Only movements: no arithmetic, so the bits are the reference's.
"""

import jax
import numpy as np

from mpembed_jax.ops.cpu import call_frame
from mpembed_jax.ops.cpu.call_frame import argument, ask_for, compiled, fence, result, stream

_AHEAD = 8  # rows
_STREAMED = (
    3 << 20
)  # words: 12 MiB, more than a core's share of the last cache is likely to hold until it is read


@compiled
def _row_at(index, i, end, array, words, num_rows):
    """Returns index[i], beyond the rows where negative, and asks for the row of an index some turns ahead."""
    ahead = np.uint64(np.uint32(index[min(i + _AHEAD, end - 1)]))
    if ahead < num_rows:
        ask_for(array, np.int64(ahead * words), np.int64(words))
    return np.uint64(np.uint32(index[i]))


def _put_half(frame, half):
    index, values, array = (
        argument(frame, 0, np.int32),
        argument(frame, 1, np.uint32),
        result(frame, 0, np.uint32),
    )
    num = len(index)
    if num == 0:
        return
    words = np.uint64(len(values) // num)
    num_rows, end = np.uint64(len(array)) // words, num * (half + 1) // 2
    for i in range(num * half // 2, end):
        here, row = _row_at(index, i, end, array, words, num_rows), np.uint64(i)
        if here < num_rows:
            for word in range(words):
                array[here * words + word] = values[row * words + word]


_put = call_frame.halves(_put_half)


def put(array: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """See `indexing.put`, for rows of float32 or uint32."""
    call_frame.register("mpembed_put", _put)
    out = jax.ShapeDtypeStruct(array.shape, array.dtype)
    call = jax.ffi.ffi_call(
        "mpembed_put", out, input_output_aliases={2: 0}, vmap_method="sequential"
    )
    return call(index, values, array)


def _take_half(frame, half):
    array, index, out = (
        argument(frame, 0, np.uint32),
        argument(frame, 1, np.int32),
        result(frame, 0, np.uint32),
    )
    num = len(index)
    if num == 0:
        return
    words = np.uint64(len(out) // num)
    if words == 0:
        return
    num_rows, end = np.uint64(len(array)) // words, num * (half + 1) // 2
    is_streamed = len(out) >= _STREAMED and words % np.uint64(8) == 0 and out.ctypes.data % 32 == 0
    for i in range(num * half // 2, end):
        here, row = _row_at(index, i, end, array, words, num_rows), np.uint64(i)
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
    """Returns rows array[index] (float32 or uint32 [n, m], int32 [k]), zeros outside."""
    call_frame.register("mpembed_take", _take)
    out = jax.ShapeDtypeStruct((*index.shape, *array.shape[1:]), array.dtype)
    return jax.ffi.ffi_call("mpembed_take", out, vmap_method="sequential")(array, index)
