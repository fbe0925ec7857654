"""Into another format or cache: rows encoded anew, the cache carried over or flushed, optimizer rows in another dtype."""

from typing import Any

import numpy as np

from mpembed_jax.state import EmbeddingState


def is_needed(prefix: str, entry: dict[str, Any], state: EmbeddingState) -> bool:
    """Whether the target's state was made for another spec than the saved one."""
    return entry["fingerprint"] != np.asarray(state.spec.fingerprint).tolist()


def convert(prefix: str, entry: dict[str, Any], arrays: dict[str, Any], target: EmbeddingState) -> dict[str, Any]:
    """Refuses: states of another spec are not converted yet."""
    raise ValueError(f"embedding state {prefix!r} was saved with another spec")
