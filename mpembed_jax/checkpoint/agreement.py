"""Agreement of several processes: the first one looks at the disk, and all act on what it found.

Processes that looked by themselves could find different things. One of them would then raise an
error, and the others would wait for it until a timeout.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpembed_jax.checkpoint.errors import CheckpointError


def from_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in the first process and returns its result, which must be JSON, in all.

    Raises:
      CheckpointError: in every process, if `work` raised it in the first one. FileNotFoundError
        likewise.
    """
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            outcome = {"result": work()}
        except (CheckpointError, FileNotFoundError) as error:
            failure, is_missing = error, isinstance(error, FileNotFoundError)
            outcome = {"error": str(error), "is_missing": is_missing}
    message = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.frombuffer(message[:size].ljust(size, b" "), np.uint8)
    outcome = json.loads(
        np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
    )
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise (FileNotFoundError if outcome["is_missing"] else CheckpointError)(outcome["error"])
    return outcome["result"]
