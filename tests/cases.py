"""Cases of parametrized tests: records with names.

All cases of a test run in the quick loop, or only chosen ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


def named(records, *, fast=None, marks=None):
    """Returns records as cases for pytest.mark.parametrize, with names.

    Args:
      records: {name: record}, or records; those have a `name`, or their fields make it.
      fast: names of the cases that run in the quick loop; the others are marked slow. None: all.
      marks: {name: pytest mark} of single cases.
    """
    marks = marks or {}
    cases = records.items() if isinstance(records, dict) else [(name_of(r), r) for r in records]
    unknown = {*(fast or ()), *marks} - {name for name, _ in cases}
    assert not unknown, f"no such cases: {unknown}"

    def marks_of(name):
        found = [marks[name]] if name in marks else []
        return found if fast is None or name in fast else [*found, pytest.mark.slow]

    return [pytest.param(record, id=name, marks=marks_of(name)) for name, record in cases]


def name_of(record):
    if hasattr(record, "name"):
        return record.name
    return "-".join(map(str, record)) if isinstance(record, tuple) else str(record)


def changed_bytes(path, copy):
    """Yields once for each byte of a file, when `copy` is the file with only this byte changed."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        yield


class Refused(NamedTuple):
    """A mistake, and what is said about it; its name is the message."""

    call: Callable[..., Any]
    message: str  # a regular expression
    error: type[Exception] = ValueError

    @property
    def name(self):
        return self.message
