"""Cases of parametrized tests: records with names.

All cases of a test run in the quick loop, or only chosen ones. Those that only repeat a property
for another combination are exhaustive: they run with `--exhaustive`.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


def named(records, *, fast=None, core=None, marks=None):
    """Returns records as cases for pytest.mark.parametrize, with names.

    Args:
      records: {name: record}, or records; those have a `name`, or their fields make it.
      fast: names of the cases that run in the quick loop; the others are marked slow. None: all,
        or with `core` none.
      core: names of the slow cases that the whole command runs; the others are marked
        exhaustive. None: all.
      marks: {name: pytest mark} of single cases.
    """
    marks = marks or {}
    cases = records.items() if isinstance(records, dict) else [(name_of(r), r) for r in records]
    fast = () if core is not None and fast is None else fast
    unknown = {*(fast or ()), *(core or ()), *marks} - {name for name, _ in cases}
    assert not unknown, f"no such cases: {unknown}"

    def marks_of(name):
        return ([marks[name]] if name in marks else []) + tier_of(name, fast, core)

    return [pytest.param(record, id=name, marks=marks_of(name)) for name, record in cases]


def crossed(*, core=None, **dimensions):
    """Returns the decorator that parametrizes a test by every combination of some values.

    The whole command runs the combinations of the quick loop, and few others: together they have
    every value of every dimension. All other combinations are exhaustive.

    Args:
      core: names of the slow combinations that the whole command runs, where other tests have the
        values that these lack. None: chosen as above.
      dimensions: the values of each argument of the test, or its cases as `named` makes them. If
        none of them is marked slow, all combinations are.
    """
    case = type(pytest.param())
    axes = [
        [x if isinstance(x, case) else pytest.param(x, id=name_of(x)) for x in values]
        for values in dimensions.values()
    ]
    combinations = {
        "-".join(x.id for x in values): (values, [mark for x in values for mark in x.marks])
        for values in itertools.product(*axes)
    }
    fast = [
        name
        for name, (_, marks) in combinations.items()
        if not any(mark.name == "slow" for mark in marks)
    ]
    fast = fast if len(fast) < len(combinations) else []
    if core is None:
        core = covering({name: [x.id for x in xs] for name, (xs, _) in combinations.items()}, fast)
    unknown = set(core) - set(combinations)
    assert not unknown, f"no such combinations: {unknown}"

    def marks_of(name):
        found = [mark for mark in combinations[name][1] if mark.name != "slow"]
        return found + tier_of(name, fast, core)

    return pytest.mark.parametrize(
        list(dimensions),
        [
            pytest.param(*(x.values[0] for x in values), id=name, marks=marks_of(name))
            for name, (values, _) in combinations.items()
        ],
    )


def covering(records, names=()):
    """Returns names of a few records that together have every value of every field.

    Args:
      records: {name: values of the fields}.
      names: records that are among them in any case.
    """
    chosen, used = set(), Counter()
    fields = {name: list(enumerate(map(str, values))) for name, values in records.items()}

    def choose(name):
        chosen.add(name)
        used.update(fields[name])

    for name in names:
        choose(name)
    # The record with the most new values; of several, the one whose values were used least.
    while not all(used[value] for values in fields.values() for value in values):
        num_new = {name: sum(not used[value] for value in fields[name]) for name in fields}
        num_used = {name: sum(used[value] for value in fields[name]) for name in fields}
        choose(max(fields, key=lambda name: (num_new[name], -num_used[name])))
    return chosen


def tier_of(name, fast, core):
    """The marks of a case: none, slow, or slow and exhaustive."""
    if fast is None or name in fast:
        return []
    if core is None or name in core:
        return [pytest.mark.slow]
    return [pytest.mark.slow, pytest.mark.exhaustive]


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
