"""Reading of packed rows on a CPU, compiled by numba; see `host_rows` for the reference.

Functions are compiled for each row format and dim. A row is decoded in vectors of 16 values. Where
the processor permutes 16 floats in one instruction (AVX-512), codes of 2 and 4 bits index a table
of the row's own values: no code is converted or scaled. A bag is summed in registers, while rows of
later positions are prefetched. Sums are made in the order of the reference and have the same bits.

The functions are called through ctypes, which releases Python's lock. A large batch is divided over
threads of this module's own.
"""

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from mpembed_jax.numerics.formats import RowFormat
from mpembed_jax.ops.cpu import machine_code
from mpembed_jax.ops.cpu.admit import set_of
from mpembed_jax.ops.cpu.hashes import fmix32, scale_to
from mpembed_jax.ops.cpu.partitions import bits_of
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.serving import host_rows
from mpembed_jax.serving.container import Pool
from mpembed_jax.vocabulary import hashes, pool

_WIDTH = 16  # values in a vector
_GROUP = 8  # vectors of a bag's sum that are in registers at once
_AHEAD = 64  # positions between a prefetch and its use; 16 are too few for the memory's latency
_PIECE = 1024  # positions whose addresses are found at once
_MIN_SPLIT = 1 << 16  # vectors of values; less work is not worth waking a thread for
_QUICK = _WIDTH * _MIN_SPLIT  # numbers; fewer are read on one thread
_COMBINERS = {"sum": 0, "mean": 1, "sqrtn": 2}
_WIDE = 4  # added to the combiner in the mode of a bag's call, if ids are int64
_INT32, _INT64, _FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()


class Reader:
    """Reads the rows of one table, by functions compiled for its format and dim, on threads."""

    def __init__(self, packed: np.ndarray, fmt: RowFormat, dim: int, threads: int):
        self.packed, self.fmt, self.dim, self.threads = packed, fmt, dim, threads
        self._take, self._bag, self._score = _functions(fmt, dim)
        self._table = host_rows.byte_table(fmt) if fmt.code_bits == 8 else np.zeros(1, np.float32)
        # Every call gets these in one argument: ctypes takes a tenth of a microsecond for each.
        self._facts = np.asarray([_address(packed), len(packed), _address(self._table)], np.int64)
        self._given = _address(self._facts)

    def quick_take(self, ids: np.ndarray) -> np.ndarray | None:
        """Returns the rows (float32 [.., D]) of a small array of ids, with few steps in Python.

        Returns None if there are many ids or none, if they are not contiguous int32 or int64, or if
        one of them is outside the table. The caller then uses `take`.
        """
        if not self._is_quick(ids):
            return None
        out = np.empty((*ids.shape, self.dim), _FLOAT32)
        given = _addressof(_from_buffer(out)), _address(ids), ids.dtype is _INT64
        return None if self._take(*given, 0, ids.size, self._given) else out

    def quick_bag(self, ids: np.ndarray, combiner: str) -> np.ndarray | None:
        """Returns the vectors (float32 [.., D]) of bags without weights; see quick_take."""
        if not (self._is_quick(ids) and ids.ndim):
            return None
        *lead, length = ids.shape
        out = np.empty((*lead, self.dim), _FLOAT32)
        mode = _COMBINERS[combiner] + _WIDE * (ids.dtype is _INT64)
        given = _addressof(_from_buffer(out)), _address(ids), mode, 0, length, 0
        return None if self._bag(*given, 0, ids.size // length, self._given) else out

    def _is_quick(self, ids: np.ndarray) -> bool:
        is_native = ids.dtype is _INT64 or ids.dtype is _INT32
        return is_native and 0 < ids.size * self.dim < _QUICK and ids.flags.c_contiguous

    def take(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """See host_rows.take; ids are contiguous int32 or int64 [N]."""
        num = len(ids)
        out = np.empty((num, self.dim), np.float32)
        given = _address(out), _address(ids), ids.itemsize == 8
        if num * self.dim < _QUICK:
            return out, self._take(*given, 0, num, self._given)

        def part(first: int, last: int) -> int:
            return self._take(*given, first, last, self._given)

        return out, self._divided(part, num, 1)

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        """Writes rows [first, last) to out, float32 [last - first, D]."""
        base = _address(out) - first * 4 * self.dim
        self._take(base, 0, 0, first, last, self._given)

    def score(self, first: int, last: int, query: np.ndarray, out: np.ndarray) -> None:
        """Writes the products of rows [first, last) with a query (float32 [D]) to out."""
        self._score(_address(out), _address(query), first, last, self._given)

    def bag(
        self,
        ids: np.ndarray,
        offsets: np.ndarray | None,
        length: int,
        weights: np.ndarray | None,
        combiner: str,
    ) -> tuple[np.ndarray, int]:
        """See host_rows.bag. Without offsets, every bag has `length` positions."""
        num_bags = len(ids) // length if offsets is None else len(offsets) - 1
        out = np.empty((num_bags, self.dim), np.float32)
        ends = 0 if offsets is None else _address(offsets)
        factors = 0 if weights is None else _address(weights)
        mode = _COMBINERS[combiner] + _WIDE * (ids.itemsize == 8)
        given = _address(out), _address(ids), mode, ends, length, factors

        def part(first: int, last: int) -> int:
            return self._bag(*given, first, last, self._given)

        return out, self._divided(part, num_bags, max(1, len(ids) // max(1, num_bags)))

    def _divided(self, part: Callable[[int, int], int], num: int, weight: int) -> int:
        """Runs part(first, last) over [0, num) on several threads; returns the sum of the results.

        `weight` is the number of positions of each item.
        """
        work = num * weight * -(-self.dim // _WIDTH)
        if self.threads == 1 or work < _MIN_SPLIT:
            return part(0, num)
        return sum(self.parts(part, num, -(-num * _MIN_SPLIT // work)))

    def parts(self, part: Callable[[int, int], Any], num: int, least: int) -> list[Any]:
        """Returns the results of part(first, last) over [0, num), divided over the threads.

        A part has at least `least` items, if there are that many.
        """
        pieces = max(1, min(self.threads, num // max(1, least)))
        bounds = [num * piece // pieces for piece in range(pieces + 1)]
        first, *later = itertools.pairwise(bounds)
        waiting = [_pool(os.getpid()).submit(part, *bound) for bound in later]
        return [part(*first), *(future.result() for future in waiting)]


_addressof = ctypes.addressof
_from_buffer: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer


def _address(array: np.ndarray) -> int:
    """Returns the address of an array, in a fifth of the time that `array.ctypes` takes."""
    try:
        return _addressof(_from_buffer(array))
    except (TypeError, ValueError):  # it is read-only, or empty
        return array.__array_interface__["data"][0]


_LOCK = threading.Lock()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Returns the threads of this process; a forked one gets its own."""
    return ThreadPoolExecutor(max(1, os.cpu_count() or 1), "mpembed_serving")


def _functions(fmt: RowFormat, dim: int) -> tuple[Callable, Callable, Callable]:
    with _LOCK:  # two threads may load a file at the same moment
        return _made(fmt, dim)


@functools.cache
def _made(fmt: RowFormat, dim: int) -> tuple[Callable, Callable, Callable]:
    name = f"serving-{fmt.name}-{fmt.symmetric}-{fmt.scale_dtype}-{dim}"
    kernels = _kernels(fmt, dim)
    kinds = ("take", "bag", "score")
    take, bag, score = (_callable(f"{name}-{kind}", *kernels[kind]) for kind in kinds)
    return take, bag, score


def _callable(name: str, function: Callable, count: int) -> Callable:
    """Returns a compiled function of int64 arguments, which runs without Python's lock."""
    owner, address = machine_code.load(name, function, types.int64(*[types.int64] * count))
    made = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(address)
    made.owner = owner  # type: ignore[attr-defined]  # the code lives as long as the function
    return made


# --- one row in vectors


class _Row:
    """The values of one packed row, as LLVM instructions."""

    def __init__(self, builder: Any, address: Any, lut: Any, fmt: RowFormat, dim: int):
        self.builder, self.fmt, self.dim = builder, fmt, dim
        self.bytes = builder.inttoptr(address, _I8.as_pointer())
        self.lut = builder.inttoptr(lut, _F32.as_pointer())
        self.scale = self.bias = None
        if fmt.scale_dtype is not None:
            width = 4 if fmt.scale_dtype == "float32" else 2
            start = fmt.row_bytes(dim) - 2 * fmt.metadata_halves(dim)
            self.scale = self._parameter(start)
            if fmt.symmetric is False:
                self.bias = self._parameter(start + width)
        self.values = None
        if fmt.is_integer and fmt.code_bits < 8 and _has_avx512():
            # The permutation reads the 4 lowest bits of an index. For codes of 2 bits, two of these
            # bits belong to the next code. So entry i holds the value of code i, or of code i
            # modulo 4 for codes of 2 bits.
            codes = [i % (1 << fmt.code_bits) - self._offset for i in range(_WIDTH)]
            self.values = self._scaled(ir.Constant(ir.VectorType(_F32, _WIDTH), codes))

    @property
    def _offset(self) -> int:
        return 1 << (self.fmt.code_bits - 1) if self.fmt.symmetric else 0

    def _load(self, kind: Any, start: int) -> Any:
        place = self.builder.gep(self.bytes, [_I64(start)])
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()), align=1)

    def _parameter(self, start: int) -> Any:
        match self.fmt.scale_dtype:
            case "float32":
                return self._load(_F32, start)
            case "float16":
                return self.builder.fpext(self._load(_F16, start), _F32)
            case _:
                half = self.builder.zext(self._load(_I16, start), _I32)
                return self.builder.bitcast(self.builder.shl(half, _I32(16)), _F32)

    def _scaled(self, codes: Any) -> Any:
        """Returns codes * scale + bias. The product is exact, so it may be fused with the sum."""
        width = codes.type.count
        flags = ("contract",)
        values = self.builder.fmul(codes, splat(self.builder, self.scale, width), flags=flags)
        if self.bias is None:
            return values
        return self.builder.fadd(values, splat(self.builder, self.bias, width), flags=flags)

    def chunk(self, column: int, width: int) -> Any:
        """Returns the values of columns [column, column + width), a power of two of at most 16."""
        builder, bits = self.builder, self.fmt.code_bits
        floats = ir.VectorType(_F32, width)
        start = column * bits // 8
        match self.fmt.name:
            case "float32":
                return self._load(floats, start)
            case "float16":
                return builder.fpext(self._load(ir.VectorType(_F16, width), start), floats)
            case "bfloat16":
                words = ir.VectorType(_I32, width)
                halves = builder.zext(self._load(ir.VectorType(_I16, width), start), words)
                shift = ir.Constant(words, [16] * width)
                return builder.bitcast(builder.shl(halves, shift), floats)
            case name if name.startswith("float8"):
                values = ir.Constant(floats, ir.Undefined)
                for lane in range(width):
                    code = builder.zext(self._load(_I8, start + lane), _I64)
                    value = builder.load(builder.gep(self.lut, [code]))
                    values = builder.insert_element(values, value, _I32(lane))
                return self._scaled(values)
            case "int8":
                words = ir.VectorType(_I32, width)
                codes = builder.zext(self._load(ir.VectorType(_I8, width), start), words)
                codes = builder.sub(codes, ir.Constant(words, [self._offset] * width))
                return self._scaled(builder.sitofp(codes, floats))
        return self._narrow(column, width)

    def _narrow(self, column: int, width: int) -> Any:
        """Returns values of codes of 2 or 4 bits: each lane shifts its code down."""
        builder, bits = self.builder, self.fmt.code_bits
        per_word = 32 // bits
        first = column * bits
        words = ir.VectorType(_I32, width)
        if width > per_word:
            pair = self._load(ir.VectorType(_I32, width // per_word), first // 8)
            lanes = ir.Constant(words, [lane // per_word for lane in range(width)])
            spread = builder.shuffle_vector(pair, ir.Constant(pair.type, ir.Undefined), lanes)
        else:
            size = max(8, width * bits)
            word = self._load(ir.IntType(size), first // 8)
            word = word if size == 32 else builder.zext(word, _I32)
            spread = splat(builder, word, width)
        shifts = [(first % 8 if width * bits < 8 else 0) + lane * bits for lane in range(width)]
        shifted = builder.lshr(spread, ir.Constant(words, [shift % 32 for shift in shifts]))
        if self.values is not None and width == _WIDTH:
            name = "llvm.x86.avx512.permvar.sf.512"
            kind = ir.FunctionType(self.values.type, [self.values.type, words])
            permute = builder.module.declare_intrinsic(name, (), kind)
            return builder.call(permute, [self.values, shifted])
        codes = builder.and_(shifted, ir.Constant(words, [(1 << bits) - 1] * width))
        codes = builder.sub(codes, ir.Constant(words, [self._offset] * width))
        return self._scaled(builder.sitofp(codes, ir.VectorType(_F32, width)))


@functools.cache
def _has_avx512() -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


def splat(builder: Any, value: Any, width: int) -> Any:
    """Returns a vector that holds a scalar in each lane."""
    kind = ir.VectorType(value.type, width)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, width), [0] * width)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _chunks(dim: int) -> list[tuple[int, int]]:
    """Returns (column, width) of the vectors of a row: of 16 values, then smaller ones."""
    found = []
    column = 0
    width = _WIDTH
    while column < dim:
        if column + width <= dim:
            found.append((column, width))
            column += width
        else:
            width //= 2
    return found


def _float_place(builder: Any, address: Any, column: int, width: int) -> Any:
    base = builder.inttoptr(address, _F32.as_pointer())
    place = builder.gep(base, [_I64(column)])
    return builder.bitcast(place, ir.VectorType(_F32, width).as_pointer())


# --- the functions of one format and dim


def _kernels(fmt: RowFormat, dim: int) -> dict[str, tuple[Callable, int]]:
    """Returns {name: (function for numba, number of its arguments)}."""
    row_bytes = fmt.row_bytes(dim)
    chunks = _chunks(dim)
    lines = range(0, row_bytes + 63, 64)  # one offset per cache line that a row may touch

    def ask_for(builder: Any, address: Any) -> None:
        byte = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        base = builder.inttoptr(address, byte)
        for line in lines:
            place = builder.gep(base, [_I64(min(line, row_bytes - 1))])
            builder.call(fetch, [place, _I32(0), _I32(3), _I32(1)])

    @intrinsic
    def prefetch(context, address):
        """Prefetches a row, without waiting."""

        def codegen(target, builder, signature, arguments):
            ask_for(builder, arguments[0])
            return target.get_dummy_value()

        return types.void(types.int64), codegen

    @intrinsic
    def decode_row(context, address, out, lut):
        """Writes the values of the row at an address."""

        def codegen(target, builder, signature, arguments):
            address, out, lut = arguments
            row = _Row(builder, address, lut, fmt, dim)
            for column, width in chunks:
                place = _float_place(builder, out, column, width)
                builder.store(row.chunk(column, width), place, align=4)
            return target.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def zero_row(context, out):
        """Writes zeros."""

        def codegen(target, builder, signature, arguments):
            for column, width in chunks:
                zeros = ir.Constant(ir.VectorType(_F32, width), [0.0] * width)
                builder.store(zeros, _float_place(builder, arguments[0], column, width), align=4)
            return target.get_dummy_value()

        return types.void(types.int64), codegen

    def adder(is_weighted: bool) -> Callable:
        @intrinsic
        def add_rows(context, addresses, factors, num, out, lut):
            """Writes the sum of factors[i] * row at addresses[i], in order, from zero.

            Entries up to `_AHEAD` after the last are read, too. Without weights, factors are 1.
            """

            def codegen(target, builder, signature, arguments):
                addresses, factors, num, out, lut = arguments
                address_at = builder.inttoptr(addresses, _I64.as_pointer())
                factor_at = builder.inttoptr(factors, _F32.as_pointer())
                for begin in range(0, len(chunks), _GROUP):
                    group = chunks[begin : begin + _GROUP]
                    sums = []
                    for _, width in group:
                        kind = ir.VectorType(_F32, width)
                        total = cgutils.alloca_once(builder, kind)
                        builder.store(ir.Constant(kind, [0.0] * width), total)
                        sums.append(total)
                    with cgutils.for_range(builder, num) as loop:
                        if begin == 0:
                            later = builder.add(loop.index, _I64(_AHEAD))
                            ask_for(builder, builder.load(builder.gep(address_at, [later])))
                        address = builder.load(builder.gep(address_at, [loop.index]))
                        row = _Row(builder, address, lut, fmt, dim)
                        if is_weighted:
                            factor = builder.load(builder.gep(factor_at, [loop.index]))
                        for (column, width), total in zip(group, sums, strict=True):
                            term = row.chunk(column, width)
                            if is_weighted:
                                # Not fused with the sum: the reference rounds the product.
                                term = builder.fmul(splat(builder, factor, width), term)
                            builder.store(builder.fadd(builder.load(total), term), total)
                    for (column, width), total in zip(group, sums, strict=True):
                        place = _float_place(builder, out, column, width)
                        builder.store(builder.load(total), place, align=4)
                return target.get_dummy_value()

            kinds = [types.int64] * 5
            return types.void(*kinds), codegen

        return add_rows

    add_rows, sum_rows = adder(True), adder(False)

    @intrinsic
    def product(context, address, query, lut):
        """Returns the sum of the products of a row and a query."""

        def codegen(target, builder, signature, arguments):
            address, query, lut = arguments
            row = _Row(builder, address, lut, fmt, dim)
            flags = ("contract", "reassoc")
            sums: dict[int, Any] = {}
            for column, width in chunks:
                vector = builder.load(_float_place(builder, query, column, width), align=4)
                term = builder.fmul(row.chunk(column, width), vector, flags=flags)
                before = sums.get(width)
                sums[width] = term if before is None else builder.fadd(before, term, flags=flags)
            total = _F32(0.0)
            for width, vector in sums.items():
                kind = ir.FunctionType(_F32, [_F32, vector.type])
                name = f"llvm.vector.reduce.fadd.v{width}f32"
                add = cgutils.get_or_insert_function(builder.module, kind, name)
                total = builder.call(add, [total, vector], fastmath=("reassoc",))
            return total

        return types.float32(types.int64, types.int64, types.int64), codegen

    array = _array

    @numba.njit(inline="always", no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]
    def table_of(given):
        facts = array(given, 3, np.int64)
        return facts[0], facts[1], facts[2]

    def take(out, ids, is_wide, first, last, given):
        rows, num_rows, lut = table_of(given)
        num_outside = 0
        for i in range(first, last):
            if ids == 0:
                decode_row(rows + i * row_bytes, out + i * 4 * dim, lut)
                continue
            later = _id(ids, is_wide, min(i + _AHEAD, last - 1))
            if np.uint64(later) < np.uint64(num_rows):
                prefetch(rows + later * row_bytes)
            here = _id(ids, is_wide, i)
            if np.uint64(here) < np.uint64(num_rows):
                decode_row(rows + here * row_bytes, out + i * 4 * dim, lut)
            else:
                zero_row(out + i * 4 * dim)
                num_outside += here != NO_ID
        return num_outside

    def bag(out, ids, mode, ends, length, weights, first, last, given):
        rows, num_rows, lut = table_of(given)
        kind, is_wide = mode % _WIDE, mode >= _WIDE
        num_outside = 0
        longest = length
        if ends != 0:
            longest = 0
            end_of = array(ends, last + 1, np.int64)
            for b in range(first, last):
                longest = max(longest, end_of[b + 1] - end_of[b])
        room = max(_PIECE, longest) + _AHEAD
        block = _malloc(12 * room + 8 * _PIECE)
        address = array(block, room, np.int64)
        factor = array(block + 8 * room, room, np.float32)
        size = array(block + 12 * room, _PIECE, np.int64)
        b = first
        while b < last:
            begin = b
            num = 0
            while b < last:  # takes at least one bag, and as many as there is room for
                start = b * length
                end = start + length
                if ends != 0:
                    start, end = end_of[b], end_of[b + 1]
                is_full = num + end - start > room - _AHEAD or b - begin == _PIECE
                if b > begin and is_full:
                    break
                own = num
                total = np.float32(0)
                for i in range(start, end):
                    here = _id(ids, is_wide, i)
                    if np.uint64(here) >= np.uint64(num_rows):
                        num_outside += here != NO_ID
                        continue
                    address[num] = rows + here * row_bytes
                    if num < _AHEAD:
                        prefetch(address[num])
                    weight = np.float32(1)
                    if weights != 0:
                        weight = array(weights, i + 1, np.float32)[i]
                    factor[num] = weight
                    total += weight * weight if kind == 2 else weight
                    num += 1
                if kind == 2:
                    total = np.sqrt(total)
                if kind != 0:
                    for i in range(own, num):
                        factor[i] = factor[i] / total if total != 0 else np.float32(0)
                size[b - begin] = num - own
                b += 1
            for i in range(num, num + _AHEAD):
                address[i] = rows
            own = 0
            for c in range(begin, b):
                here = size[c - begin]
                place = out + c * 4 * dim
                if weights == 0 and kind == 0:
                    sum_rows(block + 8 * own, 0, here, place, lut)
                else:
                    add_rows(block + 8 * own, block + 8 * room + 4 * own, here, place, lut)
                own += here
        _free(block)
        return num_outside

    def score(out, query, first, last, given):
        rows, _, lut = table_of(given)
        found = array(out, last - first, np.float32)
        for i in range(first, last):
            found[i - first] = product(rows + i * row_bytes, query, lut)
        return 0

    return {"take": (take, 6), "bag": (bag, 9), "score": (score, 5)}


# --- raw ids


def locate(owners: np.ndarray, pairs: np.ndarray, sizes: Pool) -> np.ndarray:
    """See pools.locate."""
    pairs = np.ascontiguousarray(pairs)
    rows = np.empty(len(pairs), np.int32)
    with _LOCK:
        find = _locate()
    given = sizes.sets, sizes.ways, sizes.groups, sizes.first_sets, sizes.shared_rows
    mask = pool.tag_mask(sizes.place_bits)
    find(_address(rows), _address(pairs), len(pairs), _address(owners), *given, mask)
    return rows


@functools.cache
def _locate() -> Callable:
    array = _array
    padding, last = np.uint32(hashes.PADDING), np.uint32(pool.NO_OWNER - 1)
    number, shift = np.uint32(hashes.MAX_TABLES - 1), np.uint32(pool.USE_BITS)

    def rows_of(out, pairs, num, owners, sets, ways, groups, first_sets, per_table, mask):
        row = array(out, num, np.int32)
        pair = array(pairs, 2 * num, np.uint32)
        owner = array(owners, sets * ways, np.uint32)
        group_bits = bits_of(groups)
        for i in range(num):
            hashed, place = pair[2 * i], pair[2 * i + 1]
            if hashed == padding:
                row[i] = NO_ID
                continue
            tag = min(hashed >> shift, last)
            mixed = place ^ (hashed & np.uint32(mask))
            home = set_of(mixed, tag, sets, first_sets, group_bits)
            own = sets * ways + np.int64(place & number) * per_table
            own += scale_to(fmix32(hashed), per_table)
            for way in range(ways):
                if owner[home * ways + way] >> shift == tag:
                    own = way * sets + home
                    break
            row[i] = own
        return 0

    return _callable("serving-raw-ids", rows_of, 10)


# --- signs


@functools.cache
def sign_scores(num_words: int) -> Callable:
    """Returns the function that scores rows of a sign sketch with `num_words` words per row.

    It is score(signs, norms, query, cosines, first, last, out). It writes norms[i] * cosines[n] to
    out[i - first], where n is the number of bits in which row i and the query differ.
    """

    @intrinsic
    def differing(context, one, other):
        """Returns the number of bits that differ in `num_words` words at two addresses."""

        def codegen(target, builder, signature, arguments):
            kind = ir.VectorType(_I64, num_words)
            words = [builder.inttoptr(place, kind.as_pointer()) for place in arguments]
            bits = builder.xor(*(builder.load(word, align=8) for word in words))
            total = _I64(0)
            for word in range(num_words):
                total = builder.add(total, builder.ctpop(builder.extract_element(bits, _I32(word))))
            return total

        return types.int64(types.int64, types.int64), codegen

    array = _array

    def scores(out, signs, norms, query, cosines, first, last):
        result = array(out, last - first, np.float32)
        norm = array(norms, last, np.float32)
        cosine = array(cosines, 64 * num_words + 1, np.float32)
        for i in range(first, last):
            result[i - first] = norm[i] * cosine[differing(signs + 8 * num_words * i, query)]
        return 0

    with _LOCK:
        made = _callable(f"serving-signs-{num_words}", scores, 7)

    def score(
        signs: np.ndarray,
        norms: np.ndarray,
        query: np.ndarray,
        cosines: np.ndarray,
        first: int,
        last: int,
        out: np.ndarray,
    ) -> None:
        made(*(_address(a) for a in (out, signs, norms, query, cosines)), first, last)

    return score


_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))


@intrinsic
def _pointer(context, address):
    """Converts an address (int64) to a pointer."""

    def codegen(target, builder, signature, arguments):
        return builder.inttoptr(arguments[0], target.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]
def _array(address, size, dtype):
    return numba.carray(_pointer(address), size, dtype)


@numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]
def _id(ids, is_wide, i):
    if is_wide:
        return _array(ids + 8 * i, 1, np.int64)[0]
    return np.int64(_array(ids + 4 * i, 1, np.int32)[0])
