"""Checks of the types of the verbs' arguments. The error messages show the order of the arguments.

If a verb is called outside jit with a state that was donated, `check_state` says so. If a jitted
function gets such a state, jax raises its own error first.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpembed_jax.cache.plan import CachePlan
from mpembed_jax.embedding.state import EmbeddingState


def expect(call: str, name: str, value: Any, kind: type, origin: str) -> None:
    """Checks the type of an argument.

    Args:
      call: the verb with its arguments, in order.
      name: the name of the argument.
      value: the value of the argument.
      kind: the type that the value must have.
      origin: where a value of this type comes from.

    Raises:
      TypeError: if the value has another type.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{call}: {name} must be {article(kind)} ({origin}), got {type(value).__name__}"
        )


def path_of(call: str, name: str, value: Any) -> Path:
    """Returns an argument as a path.

    Raises:
      TypeError: if it is not a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{call}: {name} must be a path, got {type(value).__name__}")
    return Path(value)


def integer(call: str, name: str, value: Any) -> int:
    """Returns an argument as an int.

    Raises:
      TypeError: if it is not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{call}: {name} must be an integer, got {value!r}")
    return int(value)


def article(kind: type) -> str:
    """Returns the name of a type with its article."""
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def check_state(call: str, state: Any) -> None:
    """Checks that the state of a verb is an EmbeddingState that was not donated.

    Raises:
      TypeError: if it is not an EmbeddingState.
      ValueError: if it was donated.
    """
    expect(call, "state", state, EmbeddingState, "from init, or from the previous verb")
    held = state.fingerprint
    is_array = isinstance(held, jax.Array) and not isinstance(held, jax.core.Tracer)
    if is_array and held.is_deleted():
        raise ValueError(
            f"{call}: this state was donated to an earlier call, which has reused its memory; go "
            "on with the state that this call returned: state, .. = step(state, ..)"
        )


def check_plan(call: str, plan: Any) -> None:
    """Checks that the plan of a verb is a CachePlan.

    Raises:
      TypeError: if it is not a CachePlan.
    """
    expect(call, "plan", plan, CachePlan, "the second result of prefetch")
