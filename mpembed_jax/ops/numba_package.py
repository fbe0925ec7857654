"""Whether the package numba can be used: it is installed and recent enough."""

import importlib.metadata
import importlib.util
import re
import warnings

OLDEST = "0.62"  # numba 0.61 has LLVM 15, which aborts when it compiles the minimum of eight floats


def why_not() -> str | None:
    """Returns the reason why numba cannot be used, or None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    found = importlib.metadata.version("numba")
    if _numbers(found) < _numbers(OLDEST):
        return f"numba {found} is installed, but {OLDEST} is the oldest version that works here"
    return None


def is_default() -> bool:
    """Returns whether numba is the default. Warns if the installed numba is too old."""
    reason = why_not()
    if reason and importlib.util.find_spec("numba") is not None:
        warnings.warn(
            f'{reason}; slower code is used. pip install --upgrade "numba>={OLDEST}"', stacklevel=4
        )
    return reason is None


def _numbers(version: str) -> list[int]:
    """Returns the major and minor numbers of a version."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]
