"""Finished runs as JSON lines, so that a killed grid continues.

A run has one line. It is found again by the settings that it depends on. A line is written in one
call when its run has ended. A process killed in the middle of that leaves a line without an end,
which `load` cuts off; any other line that does not parse is an error, not skipped.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def key_of(depends_on: Any) -> str:
    """Returns 16 hex digits that identify a JSON-able value.

    The order of dictionary keys does not matter.
    """
    text = json.dumps(depends_on, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Returns {key: record} of a file, in its order; empty if there is none.

    A line that was cut short at the end of the file is removed.

    Raises:
      ValueError: on any other line that is not a record, with file and line number.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    records = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not a record of a run ({error}); delete or mend the line"
            ) from error
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a record, which has its "key", as one line, and waits until it is on the disk."""
    line = (json.dumps(record, allow_nan=True) + "\n").encode()
    with path.open("ab") as file:
        file.write(line)  # all of it, or an error
        file.flush()
        os.fsync(file.fileno())
