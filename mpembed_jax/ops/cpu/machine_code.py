"""Machine code of foreign functions: compiled by numba once, and kept on disk for later processes.

Compilation takes seconds, loading takes milliseconds. A file's name is the function's name and a
digest of everything that its code depends on:
- the sources of this folder, of `serving`, and of the rooms whose constants they use
- the versions of numba, llvmlite, jaxlib and Python, and numba's settings OPT and BOUNDSCHECK
- the processor with its features

The digest is that of the files when this module is imported. If they have changed since, for
example by an upgrade of the package under a running process, nothing is read or kept. A change
between the import of the package and that of this module is not noticed.

If a file is missing, broken or owned by another user, the function is compiled again. If no folder
can be written, every process compiles for itself.

The environment variable MPEMBED_JAX_CACHE_DIR names the folder. If it is set but empty, nothing is
kept. By default it is `mpembed_jax` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import llvmlite
import numba
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

_LOG = logging.getLogger("mpembed_jax")
_MAGIC = b"mpembed_jax machine code 1\n"
_PACKAGE = pathlib.Path(__file__).parents[2]


def load(
    name: str, function: Callable, signature: Any, parts: Sequence[tuple[Any, Any]] = ()
) -> tuple[Any, int]:
    """Returns the compiled form of a function and its address.

    Args:
      name: the name of the file. Functions with different code need different names.
      function: a Python function that numba can compile as a C callback. Its `__qualname__` must
        differ from those of all other functions. The same holds for every function of this
        package that it calls.
      signature: numba's signature of the C callback.
      parts: numba functions that the function calls, and the types of their arguments. They are
        optimized only as parts of the function.

    Returns:
      An object that owns the code, and the address (valid while the object lives).
    """
    path = _path(name)
    if path is not None and digest(_PACKAGE) != _AT_IMPORT:
        _LOG.debug("machine code is not kept: the sources have changed since they were imported")
        path = None
    found = None if path is None else _read(path)
    if found is not None:
        return found
    for part, kinds in parts:
        with _kept_as_written():
            part.compile(kinds)
    made: Any = numba.cfunc(signature)(function)
    if path is not None:
        _write(path, made)
    return made, made.address


class _Written(JITCodeLibrary):
    """Code of a function as numba wrote it, to be linked: not optimized, and not executable.

    numba would optimize a function again in each function that calls it.
    """

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Returns 0: the function has no address."""
        return 0

    @property
    def codegen(self) -> Any:
        """Ignores numba's request to set a global variable of the code, which nothing reads."""
        return types.SimpleNamespace(set_env=lambda name, environment: None)


@contextlib.contextmanager
def _kept_as_written() -> Iterator[None]:
    """Functions that numba compiles inside this context are not optimized, see _Written."""
    codegen = _codegen()
    with global_compiler_lock:
        codegen._library_class = _Written
        try:
            yield
        finally:
            del codegen._library_class


def _folder() -> pathlib.Path | None:
    chosen = os.environ.get("MPEMBED_JAX_CACHE_DIR")
    if chosen is not None:
        return pathlib.Path(chosen) if chosen else None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # no home folder
        return None
    return pathlib.Path(base) / "mpembed_jax"


def digest(package: pathlib.Path) -> str:
    """Returns the digest of everything that the machine code of a package depends on.

    Args:
      package: the folder of mpembed_jax, or of a copy.
    """
    parts = [numba.__version__, llvmlite.__version__, importlib.metadata.version("jaxlib")]
    parts += [platform.python_version(), *map(str, _codegen().magic_tuple())]
    settings: Any = numba.config
    parts += [str(settings.OPT), str(settings.BOUNDSCHECK)]
    made = hashlib.sha256("\n".join(parts).encode())
    # The constants of compiled functions come from these rooms too.
    rooms = ("ops/cpu", "serving", "cache", "numerics", "vocabulary")
    sources = [source for room in rooms for source in (package / room).glob("*.py")]
    for source in sorted([*sources, package / "row_ids.py"]):
        made.update(source.read_bytes())
    return made.hexdigest()[:32]


def _codegen() -> Any:
    return cpu_target.target_context.codegen()


_AT_IMPORT = digest(_PACKAGE)


def _path(name: str) -> pathlib.Path | None:
    folder = _folder()
    return None if folder is None else folder / f"{name}-{_AT_IMPORT}.bin"


def _read(path: pathlib.Path) -> tuple[Any, int] | None:
    """Loads a file; None if it is missing, broken or owned by another user."""
    try:
        with path.open("rb") as file:
            if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            whole = file.read()
    except OSError:
        return None
    start = len(_MAGIC)
    rest = whole[start + 32 :]
    if whole[:start] != _MAGIC or whole[start : start + 32] != hashlib.sha256(rest).digest():
        _LOG.debug("%s is no machine code of this library; compiling", path)
        return None
    header, _, body = rest.partition(b"\n")
    entry = json.loads(header)
    # Each file gets a linker of its own, because files of several processes may have symbols of the
    # same name.
    codegen = JITCPUCodegen("mpembed_jax")
    rtsys.initialize(cpu_target.target_context)  # the allocator of numba's arrays
    code, shared = body[: entry["size"]], body[entry["size"] :]
    library = codegen.unserialize_library((entry["library"], "object", (code, shared)))
    return library, library.get_pointer_to_function(entry["symbol"])


def _write(path: pathlib.Path, made: Any) -> None:
    """Stores compiled code: a complete file or none."""
    library, _, (code, shared) = made._library.serialize_using_object_code()
    entry = {"library": library, "symbol": made._wrapper_name, "size": len(code)}
    rest = json.dumps(entry).encode() + b"\n" + code + shared
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(rest).digest() + rest)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        _LOG.debug("machine code is not kept: %s", error)
