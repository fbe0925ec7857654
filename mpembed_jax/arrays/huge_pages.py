"""Huge pages for large arrays of a CPU on Linux.

A step reads rows at random from gigabytes of table. On pages of 4 KiB nearly every row misses the
processor's address cache (TLB). A page of 2 MiB covers 512 times as much.

The environment variable MPEMBED_JAX_HUGE_PAGES=0 turns this off. On other systems, on other devices
and where the kernel refuses, nothing happens.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")

_HUGE = 1 << 21  # bytes of a page
_SMALLEST = 4 * _HUGE  # bytes; for smaller arrays, the calls are not worth their time
_MADV_HUGEPAGE = 14  # asks for huge pages where the memory is touched for the first time
_MADV_COLLAPSE = 25  # moves touched memory to huge pages now; Linux 6.1


def place(tree: Tree) -> Tree:
    """Moves the large CPU arrays of a pytree to huge pages, in place; returns the pytree.

    Traced and abstract leaves are left alone. Values and addresses do not change.
    """
    for array in candidates(tree):
        _advise(array)
    return tree


def candidates(tree: Any) -> Iterator[jax.Array]:
    """Yields the arrays that `place` moves, one for each device; none where it does nothing."""
    if sys.platform != "linux" or os.environ.get("MPEMBED_JAX_HUGE_PAGES") == "0":
        return
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            continue
        for shard in leaf.addressable_shards:
            if shard.device.platform == "cpu" and shard.data.nbytes >= _SMALLEST:
                yield shard.data


def _advise(array: jax.Array) -> None:
    # If the array could not be made, waiting for it raises an error. Asking it for its address
    # without waiting would end the process.
    begin = array.block_until_ready().unsafe_buffer_pointer()
    first = -(-begin // _HUGE) * _HUGE
    size = (begin + array.nbytes) // _HUGE * _HUGE - first
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        _madvise()(first, size, advice)  # a refusal is no error: the array stays as it is


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
