"""What the verbs ask of their arguments' types, in messages that say what goes where.

A state that was donated is found here, where a verb is called by itself. In a jitted step, jax
finds it first, with a message of its own.
"""

import os
from pathlib import Path
from typing import Any

import jax

from mpembed_jax.cache.plan import CachePlan
from mpembed_jax.embedding.state import EmbeddingState


def expect(call: str, name: str, value: Any, kind: type, origin: str) -> None:
    """Checks the type of an argument.

    Args:
      call: the verb with its arguments, in order.
      name: of the argument.
      value: of it.
      kind: the type that it must have.
      origin: where a value of this type comes from.

    Raises:
      TypeError: if it is another one.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{call}: {name} must be {article(kind)} ({origin}), got {type(value).__name__}"
        )


def path_of(call: str, name: str, value: Any) -> Path:
    """Returns an argument as a path.

    Raises:
      TypeError: if it is none.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{call}: {name} must be a path, got {type(value).__name__}")
    return Path(value)


def article(kind: type) -> str:
    """Returns the name of a type with its article."""
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def check_state(call: str, state: Any) -> None:
    """Checks that a verb's state is one, and still there.

    Raises:
      TypeError: if it is something else.
      ValueError: if it was donated.
    """
    expect(call, "state", state, EmbeddingState, "from init, or from the verb before")
    held = state.fingerprint
    is_array = isinstance(held, jax.Array) and not isinstance(held, jax.core.Tracer)
    if is_array and held.is_deleted():
        raise ValueError(
            f"{call}: this state was donated to an earlier call, which has reused its memory; go "
            "on with the state that this call returned: state, .. = step(state, ..)"
        )


def check_plan(call: str, plan: Any) -> None:
    """Checks that a verb's plan is one.

    Raises:
      TypeError: if it is something else.
    """
    expect(call, "plan", plan, CachePlan, "the second result of prefetch")
