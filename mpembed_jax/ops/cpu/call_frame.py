"""XLA's foreign functions on a CPU, written in Python and compiled by numba.

This module reads call frames and registers handlers. XLA calls a handler with one pointer, to an
`XLA_FFI_CallFrame`. The offsets in this module are those of xla/ffi/api/c_api.h (API 0.x). jaxlib
carries that header in `jax.ffi.include_dir()`, and its structs grow only at their ends. XLA first
asks each handler for the version of the interface that the handler uses. A handler answers with the
version that XLA uses.

    def add_one(frame):
        values = call_frame.argument(frame, 0, np.int32)
        result = call_frame.result(frame, 0, np.int32)
        ..

    call_frame.register("add_one", add_one)
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import jax
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from mpembed_jax.ops.cpu import machine_code

_METADATA = 1  # XLA_FFI_Extension_Metadata
_MAJOR = 0  # XLA_FFI_API_MAJOR
# Indices of XLA_FFI_ThreadPool_Schedule and .._NumThreads among the words of XLA_FFI_Api.
_SCHEDULE, _NUM_THREADS = 17, 18
_NEXT, _DONE, _HOLDERS = 0, 8, 16  # offsets in bytes in the block of `_run_parts`
_LINE = 16  # 32-bit words in a cache line of the processor
_handlers: dict[str, Any] = {}  # keeps compiled code alive as long as the process
_lock = threading.Lock()
_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_yield = types.ExternalFunction("sched_yield", types.int32())


# Python never calls these functions. Without wrappers for Python, compilation takes half the time.
# Division by zero follows NumPy's rules. With Python's, every division would have a branch that
# raises an error.
compiled = numba.njit(  # type: ignore[call-overload]
    no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy"
)


@intrinsic
def _pointer(context, address):
    """Converts an address (int64) to a pointer."""

    def codegen(target, builder, signature, arguments):
        return builder.inttoptr(arguments[0], target.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def _address_of(context, function):
    """Returns the address of a C function that calls a compiled function of int64 arguments.

    The C function is compiled into the code that uses its address, so that this code can be kept on
    disk.
    """
    made = function.dispatcher
    count = len(made.py_func.__code__.co_varnames[: made.py_func.__code__.co_argcount])

    def codegen(target, builder, signature, arguments):
        kinds = (types.int64,) * count
        compiled_ = made.get_compile_result(types.void(*kinds))
        target.active_code_library.add_linking_library(compiled_.library)
        word = ir.IntType(64)
        name = f"c.{compiled_.fndesc.mangled_name}"
        outer = builder.module.globals.get(name)
        if outer is None:
            kind = ir.FunctionType(ir.VoidType(), [word] * count)
            outer = ir.Function(builder.module, kind, name)
            outer.linkage = "internal"
            inside = ir.IRBuilder(outer.append_basic_block())
            callee = target.declare_function(builder.module, compiled_.fndesc)
            target.call_conv.call_function(inside, callee, types.void, kinds, outer.args)
            inside.ret_void()
        return builder.ptrtoint(outer, word)

    return types.int64(function), codegen


@intrinsic
def _call(context, function, argument):
    """Calls the C function at an address with one 64-bit argument; returns its 64-bit result."""

    def codegen(target, builder, signature, arguments):
        word = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(word, [word]).as_pointer())
        return builder.call(pointer, [arguments[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _call_part(context, function, frame, part):
    """Calls the function at an address with a frame and the number of a part."""

    def codegen(target, builder, signature, arguments):
        word = ir.IntType(64)
        pointer = builder.inttoptr(
            arguments[0], ir.FunctionType(ir.VoidType(), [word, word]).as_pointer()
        )
        builder.call(pointer, arguments[1:])
        return target.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _add(context, address, number):
    """Adds to the 64-bit number at an address, atomically and in order; returns the old number."""

    def codegen(target, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _prefetch(context, array, index):
    """Prefetches the processor's cache line of an element of a contiguous array.

    It does not wait for the line. Any int64 index is safe.
    """

    def codegen(target, builder, signature, arguments):
        data = target.make_array(signature.args[0])(target, builder, arguments[0]).data
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        types_ = [byte, number, number, number]
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), types_)
        )
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        # The constants select reading, all levels of the cache, and data.
        builder.call(fetch, [place, number(0), number(3), number(1)])
        return target.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def stream(context, array, index, source, source_index):
    """Copies 8 words of 32 bits without going through the processor's caches.

    The address of `array` at `index` must be a multiple of 32 bytes. The written cache line is not
    read from memory first, and it displaces no line from the caches. This is for results larger
    than the caches.
    """

    def codegen(target, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(32), 8).as_pointer()

        def place(kind, value, index):
            data = target.make_array(kind)(target, builder, value).data
            return builder.bitcast(builder.gep(data, [index]), vector)

        here = place(array, arguments[0], arguments[1])
        there = place(source, arguments[2], arguments[3])
        store = builder.store(builder.load(there, align=4), here, align=32)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return target.get_dummy_value()

    return types.void(array, types.int64, source, types.int64), codegen


@intrinsic
def fence(context):
    """Makes the words that `stream` wrote visible before anything that follows."""

    def codegen(target, builder, signature, arguments):
        builder.fence("seq_cst")
        return target.get_dummy_value()

    return types.void(), codegen


@compiled
def ask_for(array, first, num):
    """Prefetches the cache lines of `num` 32-bit words from `first` on, without waiting."""
    for word in range(0, num, _LINE):
        _prefetch(array, first + word)


@compiled
def _word(address, index):
    """Returns the index-th 64-bit word at an address."""
    return numba.carray(_pointer(address + 8 * index), 1, np.int64)[0]


@compiled
def _is_query(frame):
    """Returns whether a frame asks for the version of the interface, and answers it if so.

    Any other frame asks for an execution. The answer is XLA's own version, if its major number is
    that of the layouts in this file. XLA refuses every other answer.
    """
    is_query = False
    extension = _word(frame, 1)
    while extension != 0:
        if numba.carray(_pointer(extension + 8), 1, np.int32)[0] == _METADATA:
            metadata = _word(extension, 3)
            api = _word(frame, 2)
            version = _word(api, 4)  # two numbers of 32 bits: major, minor
            is_known = np.int32(version & 0xFFFFFFFF) == _MAJOR
            numba.carray(_pointer(metadata), 4, np.int64)[3] = version if is_known else _MAJOR
            is_query = True
        extension = _word(extension, 2)
    return is_query


@compiled
def _flat(buffer, dtype):
    size = 1
    dims = _word(buffer, 5)
    for axis in range(_word(buffer, 4)):
        size *= _word(dims, axis)
    return numba.carray(_pointer(_word(buffer, 3)), size, dtype)


@compiled
def argument_address(frame, index):
    """Returns the address of the index-th operand."""
    return _word(_word(_word(frame, 9), index), 3)


@compiled
def result_address(frame, index):
    """Returns the address of the index-th result."""
    return _word(_word(_word(frame, 14), index), 3)


@compiled
def argument(frame, index, dtype):
    """Returns the index-th operand as a flat array of `dtype`, which is not checked."""
    return _flat(_word(_word(frame, 9), index), dtype)


@compiled
def result(frame, index, dtype):
    """Returns the index-th result as a flat array of `dtype`, which is not checked.

    If an operand is aliased to the result, both are the same memory.
    """
    return _flat(_word(_word(frame, 14), index), dtype)


@compiled
def _release(block):
    if _add(block + _HOLDERS, -1) == 1:
        _free(block)


@compiled
def _take_parts(block):
    """Runs parts that no thread has begun, one after another, until there are none."""
    frame, function, num = _word(block, 3), _word(block, 4), _word(block, 5)
    part = _add(block + _NEXT, 1)
    while part < num:
        _call_part(function, frame, part)
        _add(block + _DONE, 1)
        part = _add(block + _NEXT, 1)


@compiled
def _task(block):
    _take_parts(block)
    _release(block)


@compiled
def num_threads(frame):
    """Returns the number of threads of XLA's pool, or 1 if it does not answer."""
    # Four words are the arguments of XLA_FFI_ThreadPool_NumThreads (size, extension, context, where
    # the answer goes). The fifth is the answer.
    words = np.empty(5, np.int64)
    words[0], words[1], words[2], words[4] = 32, 0, _word(frame, 3), 1
    words[3] = words.ctypes.data + 32
    is_refused = _call(_word(_word(frame, 2), _NUM_THREADS), words.ctypes.data) != 0
    return 1 if is_refused else max(words[4], 1)


@compiled
def _run_parts(frame, function, num, num_tasks):
    # The block has eleven words: 0 the next part; 1 how many parts are done; 2 how many tasks still
    # use the block; 3 the frame; 4 the function; 5 the number of parts; 6 to 10 the arguments of
    # XLA_FFI_ThreadPool_Schedule (size, extension, context, task, data).
    block = _malloc(88)
    words = numba.carray(_pointer(block), 11, np.int64)
    words[0], words[1], words[2] = 0, 0, num_tasks
    words[3], words[4], words[5] = frame, function, num
    words[6], words[7], words[8] = 40, 0, _word(frame, 3)
    words[9], words[10] = _address_of(_task), block
    schedule = _word(_word(frame, 2), _SCHEDULE)
    for _ in range(num_tasks - 1):
        # If the pool refuses a task, nobody else releases the task's share of the block.
        if _call(schedule, block + 48) != 0:
            _release(block)
    _take_parts(block)
    while _add(block + _DONE, 0) < num:
        _yield()
    _release(block)


def parts(part: Callable[[int, int], None]) -> Callable:
    """Returns a numba function run(frame, num, num_tasks), which runs part(frame, k) for k < num.

    Up to num_tasks threads, the caller among them, take the next part until none is left. XLA's
    thread pool may be busy, or may itself wait for the caller. The caller therefore runs every part
    that no other thread has begun, and never waits for work that has not begun.

    Args:
      part: a Python or numba function. It must not raise. No part may write anything that another
        one reads or writes, but for an aligned number all of whose values have one effect there.
    """
    whole = compiled(getattr(part, "py_func", part))

    @compiled
    def run(frame, num, num_tasks):
        _run_parts(frame, _address_of(whole), num, num_tasks)

    return run


def halves(half: Callable[[int, int], None]) -> Callable:
    """Returns a numba function of a call frame that runs half(frame, 0) and half(frame, 1).

    The two halves run at the same time if a thread of XLA's pool is free.

    Args:
      half: see `parts`.
    """
    run_parts = parts(half)

    def run(frame):
        run_parts(frame, 2, 2)

    run.__qualname__ = f"halves.{half.__qualname__}"  # see _register
    return compiled(run)


def shapes_of(arrays: list[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of the results of a call that changes these arrays in place."""
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]


def register(name: str, body: Callable[[int], None]) -> None:
    """Compiles `body` with numba and registers it as a foreign function for CPUs, once per name.

    Args:
      name: the target's name for `jax.ffi.ffi_call`. If it is registered already, nothing happens.
      body: a Python or numba function of the address of a call frame. It reads and writes the
        buffers of the frame. It must not raise.
    """
    with _lock:  # two threads may trace a step for the first time at the same moment
        if name not in _handlers:
            _handlers[name] = _register(name, body)


def _register(name: str, body: Callable[[int], None]) -> Any:
    """Registers a target and returns what owns its code."""
    run = compiled(getattr(body, "py_func", body))

    def handler(frame):
        if not _is_query(frame):
            run(frame)
        return 0  # no error

    # numba makes the symbol of a function from this name and a counter, which starts again in each
    # process. A process may load code from disk that two other processes compiled. If two functions
    # had the same symbol, one of them would be called in place of the other. So each function gets
    # a name of its own.
    handler.__qualname__ = f"handler.{name}"
    one = (types.int64,)
    parts = [(_is_query, one), (run, one)]
    code, address = machine_code.load(name, handler, types.int64(types.int64), parts)
    make_capsule = ctypes.pythonapi.PyCapsule_New
    make_capsule.restype = ctypes.py_object
    make_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = make_capsule(address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return code
