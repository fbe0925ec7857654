"""The state of a stack in training, and the functions that make it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from mpembed_jax import ops, optim
from mpembed_jax.arrays import huge_pages, indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.embedding.counters import COUNTERS, OF_REQUESTS
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.mesh.shard import Shard
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.random_bits import Key
from mpembed_jax.ops import Store
from mpembed_jax.optim.row_state import init_rows
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.table import QuantizedTable, init_table
from mpembed_jax.vocabulary import pool
from mpembed_jax.vocabulary.pool import VocabularyState

_AVERAGED = (
    "packed rows and cache lines cannot be averaged: average the other parameters alone "
    "(nnx.state(model, nnx.Param)) and copy the embedding, or train an embedding of averages "
    "(mpembed_jax/RECIPES.md)"
)


def _mixed(words: list[Any]) -> Any:
    """Returns a hash (uint32 [..]) of uint32 arrays [.., n]. NumPy arrays stay on the host."""
    if all(isinstance(array, np.ndarray) for array in words):
        return _mixed_by(np, words)
    return _mixed_on_device(words)


def _mixed_by(numpy: Any, words: list[Any]) -> Any:
    joined = numpy.concatenate(words, axis=-1)
    place = np.arange(1, joined.shape[-1] + 1, dtype=np.uint32) * np.uint32(0x9E3779B9)
    mixed = random_bits.fmix32(joined ^ random_bits.fmix32(place))
    return numpy.sum(mixed, axis=-1, dtype=np.uint32)


# Outside jit, the hash is one compiled call and not one call per operation.
_mixed_on_device = jax.jit(partial(_mixed_by, jnp), inline=True)


def _of_requests(counters: Any) -> Any:
    """Returns the counts of requests (uint32 [.., n]) from counters [.., len(COUNTERS), 2]."""
    counts = counters[..., : len(OF_REQUESTS), :]
    return counts.reshape(*counts.shape[:-2], -1)


def clock_of(key: Any, step: Any, counters: Any) -> Any:
    """Returns the clock of a state: a hash of its history in 22 bits, as a whole number.

    If two states with different histories are averaged, the averaged clock differs from the clock
    that this function computes for the averaged state.

    Args:
      key: uint32 [.., 2], the state's key.
      step: int32 [..], the number of its prefetches.
      counters: uint32 [.., len(COUNTERS), 2]. Counts of dropped ids, exchanges and updates do not
        matter.

    Returns:
      float32 [..]. For NumPy arrays, a NumPy array.
    """
    hashed = _mixed([key, step[..., None].astype(np.uint32), _of_requests(counters)])
    return (hashed & np.uint32(2**22 - 1)).astype(np.float32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "table",
        "cache",
        "row_state",
        "key",
        "step",
        "clock",
        "pending",
        "counters",
        "fingerprint",
        "vocabulary",
    ],
    meta_fields=["spec", "implementation", "layout"],
)
@dataclasses.dataclass(frozen=True)
class EmbeddingState:
    """A stack of tables in training. It holds what a checkpoint needs, and a clock."""

    table: QuantizedTable
    cache: CacheState | None
    # The optimizer state. Row leaves are float32 [V, ..], or uint16 bit patterns of bfloat16.
    row_state: Any
    key: jax.Array  # u32 [2]
    step: jax.Array  # i32 []: the number of prefetches so far
    # f32 []: clock_of(key, step, counters). In an average of two states, the clock does not match
    # key, step and counters. In a checkpoint, the clock is None.
    clock: jax.Array | None
    pending: Any  # bool []: whether a prefetch waits for its apply_gradients
    counters: jax.Array  # u32 [len(COUNTERS), 2]: low and high words of counts; see counters.py
    # u32 [2]: identifies the spec that the arrays were made for. It reveals a checkpoint of another
    # spec. If states were averaged, the next prefetch sets it to zero.
    fingerprint: jax.Array
    spec: EmbeddingSpec
    implementation: str | ops.Implementation
    # None for one device. With a layout, a divided array holds the parts of the shards one after
    # another.
    layout: Layout | None = None
    vocabulary: VocabularyState | None = None  # None if ids are row numbers

    @property
    def store(self) -> Store:
        """The arrays that the ops change in place, without the dirty bits."""
        return Store(self.table, None if self.cache is None else self.cache.rows, None)

    @property
    def row_key(self) -> Key:
        """The key for the random bits of rows.

        On a shard, it converts ids of local rows to global ids before it draws.
        """
        return (
            self.key
            if self.layout is None
            else self.layout.shard(self.layout.index()).key(self.key)
        )

    @property
    def expected_fingerprint(self) -> np.ndarray:
        """The fingerprint (uint32 [2]) of arrays made for this spec and layout."""
        if self.layout is None:
            return self.spec.fingerprint
        return self.spec.fingerprint ^ self.layout.fingerprint

    @property
    def signature(self) -> jax.Array:
        """A hash of the key, the fingerprint and the counts of requests so far (uint32 []).

        Updates do not change the signature, so it stays the same until the next prefetch.
        """
        return _mixed([self.key, self.fingerprint, _of_requests(self.counters)])

    @property
    def history(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The arguments of clock_of."""
        return self.key, self.step, self.counters

    @property
    def is_sound(self) -> jax.Array:
        """Whether the arrays are of this spec and layout, and of one history (bool [])."""
        return self.is_own & self.is_of_one_history

    @property
    def is_own(self) -> jax.Array:
        """Whether the arrays are of this spec and layout (bool [])."""
        return jnp.all(self.fingerprint == self.expected_fingerprint)

    @property
    def is_of_one_history(self) -> jax.Array:
        """Whether the clock matches the history; in an average of states, it does not (bool [])."""
        return self.clock == clock_of(*self.history)

    @property
    def is_concrete(self) -> bool:
        """Whether is_sound can be evaluated: none of the arrays that it reads is traced."""
        told = (self.fingerprint, self.clock, *self.history)
        return not any(isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer) for x in told)

    def check_spec(self) -> None:
        """Checks that the arrays were made for this spec and belong to one state.

        Traced arrays are checked when the compiled function runs, by is_sound.

        Raises:
          ValueError: if the arrays were made for another spec, if states were averaged, or if
            several states are stacked.
        """
        if self.step.ndim:
            raise ValueError(
                f"these are {list(self.step.shape)} states, stacked along a new axis of each "
                "array, as jax.vmap, nnx.vmap and scans over layers make them; call the verbs and "
                "modules inside jax.vmap or nnx.vmap, or take one of the states: "
                "jax.tree.map(lambda array: array[0], state)"
            )
        lines = None if self.cache is None else self.cache.rows.dtype
        is_packed = jnp.issubdtype(self.table.rows.dtype, jnp.unsignedinteger)
        if not is_packed or lines not in (None, np.float32) or self.step.dtype != np.int32:
            raise ValueError(
                f"arithmetic was done on the arrays of this state: its packed rows are "
                f"{self.table.rows.dtype}, its cache lines {lines}, its step is "
                f"{self.step.dtype}; {_AVERAGED}"
            )
        is_average = False
        if not isinstance(self.fingerprint, jax.ShapeDtypeStruct | jax.core.Tracer):
            held = np.asarray(jax.device_get(self.fingerprint))
            is_average = held.shape == (2,) and not held.any()
            if not is_average and (held.shape != (2,) or (held != self.expected_fingerprint).any()):
                raise ValueError(
                    "the arrays of this state were made for another spec than the state's own "
                    f"{self.spec}; restore with the tables, embedding_dim, storage, cache and "
                    "row_state_dtype of the saved state (if it is sharded, also with its placement "
                    "and number of shards), then move the rows with to_dense and from_dense, or "
                    "the state with sharding.relayout"
                )
        if self.is_concrete:
            clock, *history = map(np.asarray, jax.device_get((self.clock, *self.history)))
            is_average = is_average or not np.array_equal(clock, clock_of(*history))
        if is_average:
            raise ValueError(
                "the arrays of this state belong to several states, as if states had been "
                f"averaged; {_AVERAGED}"
            )


def check_spec(call: str, spec: Any) -> None:
    """Checks that an argument is a spec.

    Raises:
      TypeError: if it is not. The message begins with `call`, which shows the order of arguments.
    """
    if not isinstance(spec, EmbeddingSpec):
        raise TypeError(f"{call}: spec must be an EmbeddingSpec, got {type(spec).__name__}")


def check_memory_kind(spec: EmbeddingSpec, layout: Layout | None) -> None:
    """Raises ValueError if a stack over a mesh has a memory kind."""
    if layout is not None and spec.memory_kind is not None:
        raise ValueError(
            "a stack over a mesh has its tables in device memory; got "
            f"memory_kind={spec.memory_kind!r}; leave it out"
        )


def init(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    *,
    mesh: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    placement: Placement | None = None,
    implementation: str | ops.Implementation | None = None,
) -> EmbeddingState:
    """Makes a state with initialized tables, an empty cache and zero counters.

    Tables are initialized block by block. With a mesh, the stack is divided over it (see
    Placement). The verbs then run inside jax.shard_map, and `partition_specs(state)` gives the
    specs of the state. The initial rows are the same on any mesh.

    Args:
      key: jax.random.key(..) or uint32 [2]; all randomness of the embedding derives from it.
      spec: the stack.
      tx: optax transformation for the rows; apply_gradients must be given the same one.
      mesh: jax.sharding.Mesh over which the stack is divided. Its axes are of the type Auto. None
        for one device.
      axis_name: the mesh axis (or axes) that divides rows; optional if the mesh has a single axis.
        Without mesh: the axis of the jax.pmap in which init is called.
      placement: how rows are divided. None: Placement(), which divides rows by MOD.
      implementation: a name from ops.IMPLEMENTATIONS, or an implementation with other settings.
        None: the best one for the default device. To lower or compile for a device that this
        machine does not have, name one: on a CPU, None may choose "numba", which compiles only for
        CPUs.

    Returns:
      The state, on the default device or over the mesh.

    Raises:
      TypeError: if key, spec or tx has another type.
      ValueError: if tx cannot work on gathered rows (the message names the state leaf), or if the
        stack cannot be divided over the mesh in this way.
    """
    check_spec("init(key, spec, tx)", spec)
    chosen = ops.choose(
        implementation, is_abstract=isinstance(key, jax.core.Tracer | jax.ShapeDtypeStruct)
    )
    layout = Layout.of(spec, mesh, axis_name, placement)
    return make(random_bits.key_words(key), spec, tx, chosen, layout, init_table)


def make(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    implementation: str | ops.Implementation,
    layout: Layout | None,
    table_of: Callable[[jax.Array, EmbeddingSpec, Shard | None], QuantizedTable],
) -> EmbeddingState:
    """Makes the state that starts from the table `table_of(key, spec, shard)`.

    On one device, the shard is None. Over a mesh, each device makes the table of its shard. A
    second state of the same spec, transformation and `table_of` needs no compilation if no table
    has an initializer. With an initializer, the program is compiled again, because equal specs may
    have initializers that differ, and an initializer may return an array that has changed.

    Raises:
      ValueError: as init. Also if a layout is given with a memory kind.
    """
    check_memory_kind(spec, layout)
    # A NumPy key counts as the same value in every process. A jax key would belong to one device.
    is_traced = isinstance(key, jax.core.Tracer)
    words = key if is_traced or layout is None or layout.mesh is None else np.asarray(key)
    fixed = {"spec": spec, "tx": tx, "layout": layout, "table_of": table_of}
    is_kept = _is_hashable(tx) and all(table.initializer is None for table in spec.tables)
    state = _build_jitted(words, **fixed) if is_kept else jax.jit(partial(_build, **fixed))(words)
    # The arrays do not depend on the implementation. So all implementations share the program.
    state = dataclasses.replace(state, implementation=implementation)
    if layout is None and optim.rule_of(tx) is not None:
        # The step is compiled while XLA fills the table. `place` waits for the table.
        ops.compile_ahead(implementation, state.table)
    return huge_pages.place(state)


def _build(
    key: jax.Array,
    *,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    layout: Layout | None,
    table_of: Callable[[jax.Array, EmbeddingSpec, Shard | None], QuantizedTable],
) -> EmbeddingState:
    def build(key: jax.Array, index: Any = None) -> EmbeddingState:
        shard = None if layout is None else layout.shard(layout.index() if index is None else index)
        return assemble(key, spec, tx, "xla", table_of(key, spec, shard), layout)

    if layout is None or layout.mesh is None:
        return build(key)
    specs = partition_specs(jax.eval_shape(partial(build, index=0), key))
    return jax.shard_map(
        build, mesh=layout.mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False
    )(key)


_build_jitted = jax.jit(_build, static_argnames=("spec", "tx", "layout", "table_of"))


def _is_hashable(tx: optax.GradientTransformation) -> bool:
    """Returns whether a transformation has a hash. Functions have one, callable objects may not."""
    try:
        hash(tx)
    except TypeError:
        return False
    return True


def partition_specs(state: EmbeddingState) -> EmbeddingState:
    """Returns the PartitionSpecs of a sharded state, for in_specs and out_specs of jax.shard_map.

    Args:
      state: concrete, traced or abstract.

    Returns:
      A tree like state. Arrays by row and arrays by cache set are divided over the sharding axes.
      All other arrays are replicated.

    Raises:
      TypeError: if state has another type.
    """
    if not isinstance(state, EmbeddingState):
        raise TypeError(
            f"partition_specs(state): state must be an EmbeddingState, got {type(state).__name__}"
        )
    axes = () if state.layout is None else state.layout.axes
    rows, sketch = PartitionSpec(axes or None), PartitionSpec(None, axes or None)
    cache = state.cache
    if cache is not None:
        by_set = jax.tree.map(lambda _: rows, dataclasses.replace(cache, sketch=None))
        cache = dataclasses.replace(by_set, sketch=None if cache.sketch is None else sketch)
    everywhere = jax.tree.map(lambda _: PartitionSpec(), state)
    vocabulary = everywhere.vocabulary
    if vocabulary is not None:
        vocabulary = dataclasses.replace(vocabulary, owners=rows, sketch=sketch)
    return dataclasses.replace(
        everywhere,
        vocabulary=vocabulary,
        table=jax.tree.map(lambda _: rows, state.table),
        cache=cache,
        row_state=jax.tree.map(
            lambda leaf: rows if leaf.ndim else PartitionSpec(), state.row_state
        ),
    )


def over_mesh(
    function: Callable, state: EmbeddingState, *specs: Any, result: Any = None
) -> Callable:
    """Wraps `function(state, *args)` in jax.shard_map over the state's mesh.

    Args:
      function: takes the state and one argument for each of `specs`.
      state: has a layout.
      *specs: PartitionSpecs of the arguments after the state.
      result: PartitionSpecs of the result; None if the result is a state like this one.

    Returns:
      The wrapped function.

    Raises:
      ValueError: if the state was made inside jax.pmap and therefore has no mesh.
    """
    assert state.layout is not None
    mesh = state.layout.mesh
    if mesh is None:
        raise ValueError(
            "this state was made inside jax.pmap and has no mesh; call the verbs inside jax.pmap, "
            "too"
        )
    of_state = partition_specs(state)
    result = of_state if result is None else result
    return jax.shard_map(
        function, mesh=mesh, in_specs=(of_state, *specs), out_specs=result, check_vma=False
    )


def over_batch(
    function: Callable, state: EmbeddingState, ids: jax.Array, padding: Any
) -> jax.Array:
    """Returns function(state, ids), with the ids divided over the devices that share the batch.

    Inside jax.shard_map, each device has its own ids already.

    Args:
      function: per device; takes the state and ids [n, ..], and returns an array [n, ..].
      state: has a layout.
      ids: [N, ..].
      padding: the number that fills up the ids if the devices do not divide them evenly.

    Returns:
      An array [N, ..].
    """
    layout = state.layout
    assert layout is not None
    if layout.is_bound:
        return function(state, ids)
    num = ids.shape[0]
    widths = [(0, -num % layout.batch_shards), *[(0, 0)] * (ids.ndim - 1)]
    divided = PartitionSpec(layout.batch_axes)
    run = over_mesh(function, state, divided, result=divided)
    return run(state, jnp.pad(ids, widths, constant_values=padding))[:num]


def assemble(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    implementation: str | ops.Implementation,
    table: QuantizedTable,
    layout: Layout | None = None,
) -> EmbeddingState:
    """Returns the state that starts from a table, or from one shard's table on a mesh.

    The cache is empty, the row state has its initial values, and all counts are zero.
    """
    cache = None
    if spec.cache is not None:
        geometry = spec.cache.geometry(spec.num_rows)
        cache = residency.init(
            geometry if layout is None else layout.share(geometry),
            spec.cache.policy,
            spec.embedding_dim,
        )
    row_state = init_rows(
        tx, table.num_rows, spec.embedding_dim, spec.row_state_dtype, spec.memory_kind
    )
    step = jnp.zeros((), jnp.int32)
    counters = jnp.zeros((len(COUNTERS), 2), jnp.uint32)
    state = EmbeddingState(
        table=dataclasses.replace(table, rows=indexing.to_host(table.rows, spec.memory_kind)),
        cache=cache,
        row_state=row_state,
        key=key,
        step=step,
        clock=clock_of(key, step, counters),
        pending=jnp.zeros((), bool),
        counters=counters,
        fingerprint=jnp.zeros(2, jnp.uint32),
        spec=spec,
        implementation=implementation,
        layout=layout,
        vocabulary=None
        if spec.vocabulary is None
        else pool.init(
            spec.vocabulary,
            init_rows(tx, 1, spec.embedding_dim, spec.row_state_dtype),
            1 if layout is None else layout.shards,
        ),
    )
    return dataclasses.replace(state, fingerprint=jnp.asarray(state.expected_fingerprint))
