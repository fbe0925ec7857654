"""Whether the package numba can be used: it is installed, and code for it is written."""

import importlib.metadata
import importlib.util
import re
import sys
import warnings

OLDEST = "0.62"  # numba 0.61 has LLVM 15, which aborts when it compiles the minimum of eight floats


def why_not() -> str | None:
    """Returns the reason why numba cannot be used, or None if it can."""
    if importlib.util.find_spec("numba") is None:
        return f'the package numba is not installed (pip install "numba>={OLDEST}")'
    if sys.platform == "win32":
        return "code for numba is not written for Windows"
    found = importlib.metadata.version("numba")
    if _numbers(found) < _numbers(OLDEST):
        return (
            f"numba {found} is installed, but {OLDEST} is the oldest version that works here "
            f'(pip install --upgrade "numba>={OLDEST}")'
        )
    if lacking := _lacking():
        return (
            f"numba {found} has no {lacking}, so this version of mpembed_jax cannot use it (pip "
            "install --upgrade mpembed_jax)"
        )
    return None


def is_default() -> bool:
    """Returns whether numba is the default. Warns if it is installed but cannot be used."""
    reason = why_not()
    if reason and importlib.util.find_spec("numba") is not None:
        warnings.warn(f"{reason}; slower code is used", stacklevel=4)
    return reason is None


def _lacking() -> str | None:
    """Returns what `ops.cpu.machine_code` needs and this numba has not, or None.

    These names are not of numba's public interface, so a new version may change them.
    """
    codegen = importlib.import_module("numba.core.codegen")
    library = ("_optimize_functions", "_optimize_final_module", "_finalize_final_module")
    needed = {
        "JITCodeLibrary": (*library, "serialize_using_object_code"),
        "JITCPUCodegen": ("_library_class", "magic_tuple", "unserialize_library"),
    }
    for name, attributes in needed.items():
        owner = getattr(codegen, name, None)
        for attribute in attributes:
            if not hasattr(owner, attribute):
                return f"{name}.{attribute}"
    return None


def _numbers(version: str) -> list[int]:
    """Returns the major and minor numbers of a version."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]
