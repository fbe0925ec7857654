"""The state of a stack in training, how it is made, and its counters: 64-bit counts without jax's x64 mode."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import access, ops, optim
from mpembed_jax import cache as caching
from mpembed_jax import row_state as row_states
from mpembed_jax import table as tables_
from mpembed_jax.cache import CacheState, Counts
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.table import QuantizedTable

# The events a state counts since init: those of a step's Counts, then those of updates.
COUNTERS = (*(f.name for f in dataclasses.fields(Counts)), "nonfinite_rows", "refused_updates")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "cache", "row_state", "key", "step", "pending", "counters", "fingerprint"],
    meta_fields=["spec", "implementation"],
)
@dataclasses.dataclass(frozen=True)
class EmbeddingState:
    """A stack of tables in training: everything a checkpoint needs, nothing else."""

    table: QuantizedTable
    cache: CacheState | None
    row_state: Any  # optimizer state; row leaves [V, ..] float32, or uint16 bit patterns of bfloat16
    key: jax.Array  # u32 [2]
    step: jax.Array  # i32 []  number of prefetches so far
    pending: Any  # bool []  a prefetch waits for its apply_gradients
    counters: jax.Array  # u32 [len(COUNTERS), 2]  low and high words of 64-bit counts
    fingerprint: jax.Array  # u32 [2]  of the spec the arrays were made for: a checkpoint of another spec is noticed
    spec: EmbeddingSpec
    implementation: str

    def check_spec(self) -> None:
        """Raises ValueError if the arrays are concrete and were made for another spec."""
        if not isinstance(self.fingerprint, jax.ShapeDtypeStruct | jax.core.Tracer):
            held = np.asarray(self.fingerprint)
            if held.shape != (2,) or (held != self.spec.fingerprint).any():
                raise ValueError(
                    f"the arrays of this state were made for another spec than its own {self.spec}: tables, embedding_dim, "
                    f"storage, cache, row_state_dtype must be those of the saved state; restore with the saved spec, then "
                    f"move the rows with to_dense and from_dense"
                )


def init(
    key: jax.Array, spec: EmbeddingSpec, tx: optax.GradientTransformation, *, implementation: str | None = None
) -> EmbeddingState:
    """Makes a state: tables initialized block by block, an empty cache, zero counters.

    Args:
      key: jax.random.key(..) or uint32 [2]; all randomness of the embedding derives from it.
      spec: the stack.
      tx: optax transformation for the rows; the same one goes to apply_gradients.
      implementation: a name from ops.IMPLEMENTATIONS; None picks the best for the default device.

    Returns:
      The state, on the default device.

    Raises:
      TypeError: if key or tx is something else.
      ValueError: if tx cannot work on gathered rows; the message names the state leaf.
    """
    chosen = ops.choose(implementation, is_abstract=isinstance(key, jax.core.Tracer | jax.ShapeDtypeStruct))

    def build(key: jax.Array) -> EmbeddingState:
        table = tables_.init(key, spec.tables, spec.storage, spec.embedding_dim, spec.memory_kind)
        return assemble(key, spec, tx, chosen, table)

    return jax.jit(build)(optim.key_words(key))


def assemble(
    key: jax.Array, spec: EmbeddingSpec, tx: optax.GradientTransformation, implementation: str, table: QuantizedTable
) -> EmbeddingState:
    """Returns the state that starts from a table: an empty cache, initial row state, zero counters."""
    cache = None
    if spec.cache is not None:
        cache = caching.init(spec.cache.geometry(spec.num_rows), spec.cache.policy, spec.embedding_dim)
    row_state = row_states.init_rows(tx, spec.num_rows, spec.embedding_dim, spec.row_state_dtype)
    # A few numbers a row stay on the device: every row of a batch needs its own, cached or not.
    row_state = jax.tree.map(lambda leaf: access.to_host(leaf, spec.memory_kind) if leaf.ndim > 1 else leaf, row_state)
    table = dataclasses.replace(table, rows=access.to_host(table.rows, spec.memory_kind))
    return EmbeddingState(
        table=table,
        cache=cache,
        row_state=row_state,
        key=key,
        step=jnp.zeros((), jnp.int32),
        pending=jnp.zeros((), bool),
        counters=jnp.zeros((len(COUNTERS), 2), jnp.uint32),
        fingerprint=jnp.asarray(spec.fingerprint),
        spec=spec,
        implementation=implementation,
    )


def _add(counters: jax.Array, amounts: list[jax.Array]) -> jax.Array:
    """Adds i32 amounts to 64-bit counters kept as two words: no x64 mode needed."""
    low = counters[:, 0] + jnp.stack(amounts).astype(jnp.uint32)
    carry = (low < counters[:, 0]).astype(jnp.uint32)
    return jnp.stack([low, counters[:, 1] + carry], axis=1)


def count_step(counters: jax.Array, counts: Counts) -> jax.Array:
    """Returns the counters with one step's counts added."""
    amounts = jax.tree.leaves(counts)
    return _add(counters, amounts + [jnp.int32(0)] * (len(COUNTERS) - len(amounts)))


def count_updates(counters: jax.Array, num_nonfinite: jax.Array, is_refused: jax.Array) -> jax.Array:
    """Returns the counters with one update's skipped rows and refusal added."""
    tail = [num_nonfinite, is_refused.astype(jnp.int32)]
    return _add(counters, [jnp.int32(0)] * (len(COUNTERS) - len(tail)) + tail)
