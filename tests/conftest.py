"""Several forced CPU devices, deterministic hypothesis, strict dtype promotion, bounded memory.

Compiled programs are kept in a folder of this checkout: a second run takes them from there.
"""

import ctypes
import functools
import gc
import itertools
import os
from pathlib import Path

# Before jax is imported: the flags are read once. On a busy machine one of eight devices may be
# late by more than the 40 seconds after which XLA ends the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=3600"
)

# Two thirds of a first run's time is XLA's. Programs of tests, and of processes that they start,
# are small: all of them are kept. Nobody reads where in Python an operation of them was made.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}

import jax
import pytest
from hypothesis import HealthCheck, settings
from jax._src import compiler  # options of a compilation are not public
from jax._src.interpreters import mlir

# Deterministic, and without deadlines: the first example compiles.
settings.register_profile(
    "tests",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


# Most tests, and processes that they start, compile in a third of the time: without LLVM's
# optimizations, and with XLA's older code for fusions. They are those of these folders and files,
# which compare no bits of two programs, or only of rows that serving reads, as a test of
# test_serving_table.py does with optimized programs. And they are those that are marked as `slow`,
# except for some.
# All others compile as users do, with --exhaustive. The whole command compiles as users do the
# tests of the invariants, of golden bits, of shards and of random numbers, and what is marked as
# `optimized`. The fast loop does so only for the latter.
_QUICKLY_COMPILED = {
    "cache", "checkpoint", "documents", "experiments", "memory", "nn", "vocabulary",
    "test_errors.py", "test_interchange.py", "test_restacking.py", "test_saving.py",
    "test_serving_ngrams.py", "test_serving_raw_ids.py", "test_sharding_gradients.py",
    "test_sharding_nn.py", "test_spec.py", "test_stats.py", "test_vocabularies.py",
    # Nobody compiles interpreted kernels but these tests.
    "test_gpu_admit.py", "test_gpu_kernels.py", "test_gpu_lowering.py", "test_gpu_plan.py",
    "test_kernels_over_a_mesh.py",
}  # fmt: skip
_OPTIMIZED_IN_COMMAND = {"arrays", "invariants", "numerics", "test_sharding.py"}
_ALWAYS_OPTIMIZED = {"invariants"}  # slow or not
_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_FLAGS = os.environ["XLA_FLAGS"]
_get_compile_options = compiler.get_compile_options


@functools.cache
def _quick():
    """Returns those of `_OPTIONS` that this version of XLA has."""

    def is_known(option):
        try:
            jax.jit(lambda x: -x).lower(1.0).compile(dict([option]))
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return [option for option in _OPTIONS.items() if is_known(option)]


def _quick_options(*args, **kwargs):
    options = _get_compile_options(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *_quick()]
    return options


def _compile_quickly(is_quick):
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != str(is_quick):
        flags = _quick()
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(is_quick)
        # This process has read its flags: these are for processes that it starts.
        quick = "".join(f" --{name}={int(value)}" for name, value in flags)
        os.environ["XLA_FLAGS"] = _FLAGS + is_quick * quick
        jax.config.update("jax_disable_most_optimizations", is_quick)
        compiler.get_compile_options = _quick_options if is_quick else _get_compile_options
        jax.clear_caches()


# jax makes an MLIR context for each program, a third of the time that a small one takes. Here a
# hundred programs share one. It keeps what is made in it, so it cannot serve them all.
_make_context = mlir.make_ir_context
_contexts = itertools.count()


@functools.lru_cache(maxsize=1)
def _context(number):
    return _make_context()


mlir.make_ir_context = lambda: _context(next(_contexts) // 100)


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive", action="store_true", help="also run the cases that are marked exhaustive"
    )


def _is_quick(item):
    """Returns whether a test compiles quickly."""
    of = {item.path.parent.name, item.path.name}
    is_quick = not _QUICKLY_COMPILED.isdisjoint(of)
    is_extra = item.get_closest_marker("slow") is not None and _ALWAYS_OPTIMIZED.isdisjoint(of)
    is_loop = item.config.getoption("markexpr") == "not slow"
    is_command = not item.config.getoption("exhaustive") and _OPTIMIZED_IN_COMMAND.isdisjoint(of)
    is_optimized = item.get_closest_marker("optimized") is not None
    return (is_quick or is_extra or is_loop or is_command) and not is_optimized


@pytest.hookimpl(tryfirst=True)  # before -m: what is exhaustive is slow
def pytest_collection_modifyitems(config, items):
    """Leaves exhaustive cases out, unless they are asked for.

    The tests of a file that compile quickly come after the others: between the two, all that was
    traced is dropped.
    """
    exhaustive = [item for item in items if item.get_closest_marker("exhaustive") is not None]
    for item in exhaustive:
        item.add_marker("slow")
    if exhaustive and not config.getoption("exhaustive"):
        config.hook.pytest_deselected(items=exhaustive)
        items[:] = [item for item in items if item.get_closest_marker("exhaustive") is None]
    places = {path: number for number, path in enumerate(dict.fromkeys(i.path for i in items))}
    items.sort(key=lambda item: (places[item.path], _is_quick(item)))


def pytest_collection_finish():
    """Spares the garbage collector what was imported: each pass over it takes a quarter second.

    Tracing makes many small objects, few of them garbage: the collector also looks less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Runs a test, and the fixtures it sets up, without implicit casts.

    A test whose dependencies cast opts out by a marker that says why:
    `@pytest.mark.standard_promotion("optax.adam raises a float to an int32 power")`. A test that
    must see optimized programs in the fast loop says so: `@pytest.mark.optimized("counts them")`.
    """
    optimized = item.get_closest_marker("optimized")
    for marker in (optimized, item.get_closest_marker("standard_promotion")):
        if marker is not None and not marker.args:
            raise pytest.UsageError(f"{item.nodeid}: {marker.name} needs a reason")
    _compile_quickly(_is_quick(item))
    opt_out = item.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("strict" if opt_out is None else "standard"):
        return (yield)


_MAPS, _SIZES = Path("/proc/self/maps"), Path("/proc/self/statm")
_num_tests = itertools.count(1)


def _is_full():
    """Returns whether this process nears Linux's limit of 65,530 memory maps, or holds 4 GB.

    Beyond the limit, LLVM ends the process. A compiled program holds some ten maps.
    """
    if not _MAPS.exists():
        return False
    resident = int(_SIZES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident > 4 << 30 or _MAPS.read_bytes().count(b"\n") > 25_000


def pytest_runtest_teardown(item):
    """Drops compiled programs before there are too many; looking takes milliseconds."""
    if next(_num_tests) % 20 == 0 and _is_full():
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
            trim(0)  # half of a worker's memory


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Each worker begins with a part of the files in one piece, which share compiled programs.

    Who is done first helps.
    """
    from xdist.scheduler import WorkStealingScheduling

    return (
        WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None
    )  # load: what -n asks for
