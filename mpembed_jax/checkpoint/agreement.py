"""Agreement of several processes: the first one looks at the disk, and all act on what it found.

If each process looked at the disk by itself, one might find a file that another does not find. One
process would then raise an error, and the others would wait for it until a timeout.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpembed_jax.checkpoint.errors import CheckpointError, DamagedError, UnreadableError

_KINDS = {
    kind.__name__: kind
    for kind in (CheckpointError, DamagedError, UnreadableError, FileNotFoundError)
}


def from_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in the first process, and returns its result in every process.

    Args:
      work: its result can be written as JSON. With several processes, a tuple becomes a list.

    Returns:
      The result.

    Raises:
      CheckpointError: in every process, if `work` raised it in the first one. If `work` raised
        another error, the first process raises that one, and all others raise CheckpointError.
      FileNotFoundError: in every process, if `work` raised it in the first one.
    """
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            outcome = {"result": work()}
        except Exception as error:  # the other processes wait for a message
            failure = error
            kind = type(error).__name__
            said = str(error) if kind in _KINDS else f"the first process failed: {kind}: {error}"
            outcome = {"error": said, "kind": kind if kind in _KINDS else "CheckpointError"}
    message = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.frombuffer(message[:size].ljust(size, b" "), np.uint8)
    outcome = json.loads(
        np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
    )
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise _KINDS[outcome["kind"]](outcome["error"])
    return outcome["result"]
