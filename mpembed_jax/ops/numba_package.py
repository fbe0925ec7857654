"""Whether the package numba can be used: it is installed, recent enough, and not too new.

Nothing here imports numba, which takes a second.
"""

import importlib.metadata
import importlib.util
import pathlib
import re
import sys
import warnings

_NEEDED = (
    *("JITCodeLibrary", "_optimize_functions", "_optimize_final_module", "_finalize_final_module"),
    *("serialize_using_object_code", "JITCPUCodegen", "_library_class", "magic_tuple"),
    "unserialize_library",
)
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
    """Returns a name that `ops.cpu.machine_code` needs and numba's sources lack, or None.

    These names are not of numba's public interface, so a new version may change them.
    """
    text = source_of_codegen()
    return next((name for name in _NEEDED if not re.search(rf"\b{name}\b", text)), None)


def source_of_codegen() -> str:
    """Returns the text of numba's module that makes machine code; "" if there is no such file."""
    found = importlib.util.find_spec("numba")
    if found is None or found.origin is None:
        return ""
    path = pathlib.Path(found.origin).parent / "core" / "codegen.py"
    return path.read_text() if path.is_file() else ""


def _numbers(version: str) -> list[int]:
    """Returns the major and minor numbers of a version."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]
