"""The parts that the launchers of `run` and `killed_worker` share.

They are a worker's environment, its messages, and the remains of a kill. A worker says on stdout
"resume N", "step N", "save N" (one begins), "end N" and "bits HASH", so that its launcher can aim.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from experiments import provenance

SAID = re.compile(r"^(resume|step|save|end|bits) (\w+)$", re.MULTILINE)


def environment(directory: Path) -> dict[str, str]:
    """Returns the environment of a worker that saves in `directory`.

    The first worker there compiles for all.
    """
    path = os.pathsep.join([str(provenance.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **cached, "PYTHONPATH": path}


def listen(lines: Iterable[str], aim: str, until: int) -> tuple[int, bool]:
    """Listens to a worker until it says `aim` ("step" or "save") of step `until` or later.

    It also stops at the end of the worker. Returns the step it resumed at, -1 if it did not say,
    and whether the moment came before its stdout closed.
    """
    resume = -1
    for line in lines:
        for word, number in SAID.findall(line):
            resume = int(number) if word == "resume" else resume
            if word == "end" or (word == aim and int(number) >= until):
                return resume, True
    return resume, False


def has_unfinished(directory: Path) -> bool:
    """Returns whether there is anything but finished checkpoints."""
    return directory.exists() and any(
        p.name != ".writer" and not p.name.removeprefix("step_").isdigit()
        for p in directory.iterdir()
    )
