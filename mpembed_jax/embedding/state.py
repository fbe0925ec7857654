"""The state of a stack in training, how it is made, and its counters: 64-bit counts without jax's x64 mode."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.cache import residency
from mpembed_jax.cache.residency import CacheState
from mpembed_jax.embedding.counters import COUNTERS
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.mesh.shard import Shard
from mpembed_jax.numerics import random_bits
from mpembed_jax.numerics.random_bits import Key
from mpembed_jax.ops import Store
from mpembed_jax.optim.row_state import init_rows
from mpembed_jax.spec import EmbeddingSpec
from mpembed_jax.table import QuantizedTable, init_table


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "table",
        "cache",
        "row_state",
        "key",
        "step",
        "pending",
        "counters",
        "fingerprint",
    ],
    meta_fields=["spec", "implementation", "layout"],
)
@dataclasses.dataclass(frozen=True)
class EmbeddingState:
    """A stack of tables in training: everything a checkpoint needs, nothing else."""

    table: QuantizedTable
    cache: CacheState | None
    row_state: (
        Any  # optimizer state; row leaves [V, ..] float32, or uint16 bit patterns of bfloat16
    )
    key: jax.Array  # u32 [2]
    step: jax.Array  # i32 []  number of prefetches so far
    pending: Any  # bool []  a prefetch waits for its apply_gradients
    counters: jax.Array  # u32 [len(COUNTERS), 2]  low and high words of 64-bit counts
    fingerprint: (
        jax.Array
    )  # u32 [2]  of the spec the arrays were made for: a checkpoint of another spec is noticed
    spec: EmbeddingSpec
    implementation: str | ops.Implementation
    layout: Layout | None = (
        None  # None: one device; else every array holds the shards' rows one after another
    )

    @property
    def store(self) -> Store:
        """What the ops change in place, without the dirty bits."""
        return Store(self.table, None if self.cache is None else self.cache.rows, None)

    @property
    def row_key(self) -> Key:
        """The key with which rows draw their random bits: `key`, on a shard bound to its local rows."""
        return (
            self.key
            if self.layout is None
            else self.layout.shard(self.layout.index()).key(self.key)
        )

    @property
    def expected_fingerprint(self) -> np.ndarray:
        """uint32 [2]: what `fingerprint` holds if the arrays were made for this spec and layout."""
        if self.layout is None:
            return self.spec.fingerprint
        return self.spec.fingerprint ^ self.layout.fingerprint

    def check_spec(self) -> None:
        """Raises ValueError if the arrays are concrete and were made for another spec."""
        if not isinstance(self.fingerprint, jax.ShapeDtypeStruct | jax.core.Tracer):
            held = np.asarray(self.fingerprint)
            if held.shape != (2,) or (held != self.expected_fingerprint).any():
                raise ValueError(
                    f"the arrays of this state were made for another spec than its own {self.spec}: tables, embedding_dim, "
                    f"storage, cache, row_state_dtype (of a sharded state also its placement and number of shards) must be "
                    f"those of the saved state; restore with those, then move the rows with to_dense and from_dense "
                    f"(or the state with sharding.relayout)"
                )


def check_spec(call: str, spec: Any) -> None:
    """Checks that an argument is a spec.

    Raises:
      TypeError: if it is something else; the message has `call`, which says the order of arguments.
    """
    if not isinstance(spec, EmbeddingSpec):
        raise TypeError(f"{call}: spec must be an EmbeddingSpec, got {type(spec).__name__}")


def init(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    *,
    mesh: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    placement: Placement | None = None,
    implementation: str | None = None,
) -> EmbeddingState:
    """Makes a state: tables initialized block by block, an empty cache, zero counters.

    With a mesh the stack is divided over it (see Placement) and the verbs run inside jax.shard_map, with
    `partition_specs(state)` for the state. The initial rows are the same on any mesh.

    Args:
      key: jax.random.key(..) or uint32 [2]; all randomness of the embedding derives from it.
      spec: the stack.
      tx: optax transformation for the rows; the same one goes to apply_gradients.
      mesh: jax.sharding.Mesh to divide the stack over, None for one device.
      axis_name: the mesh axis (or axes) that divides rows, may be left out where the mesh has one. Without mesh: the axis
        of the jax.pmap that init is called in.
      placement: how rows are divided; None: Placement(), rows by MOD.
      implementation: a name from ops.IMPLEMENTATIONS; None picks the best for the default device. Name one to lower or
        compile for another device than this machine's: "numba", a CPU's choice, compiles for CPUs alone.

    Returns:
      The state, on the default device or over the mesh.

    Raises:
      TypeError: if key, spec or tx is something else.
      ValueError: if tx cannot work on gathered rows, the message names the state leaf; or if the stack cannot be divided
        over the mesh so.
    """
    check_spec("init(key, spec, tx)", spec)
    chosen = ops.choose(
        implementation, is_abstract=isinstance(key, jax.core.Tracer | jax.ShapeDtypeStruct)
    )
    layout = Layout.of(spec, mesh, axis_name, placement)

    def table_of(key: jax.Array, shard: Shard | None) -> QuantizedTable:
        return init_table(
            key, spec.tables, spec.storage, spec.embedding_dim, shard, spec.memory_kind
        )

    return make(random_bits.key_words(key), spec, tx, chosen, layout, table_of)


def make(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    implementation: str | ops.Implementation,
    layout: Layout | None,
    table_of: Callable[[jax.Array, Shard | None], QuantizedTable],
) -> EmbeddingState:
    """Makes the state that starts from the table `table_of(key, shard)`, of one device or, shard by shard, over a mesh."""
    if layout is not None and (ops.has_kernels(implementation) or spec.memory_kind is not None):
        raise ValueError(
            f"a stack over a mesh runs on plain XLA with its tables on the devices (kernels could not be tested there: "
            f"interpreted, they refuse the replication check of jax.shard_map, which row gradients need); got "
            f"implementation={implementation!r} and memory_kind={spec.memory_kind!r}"
        )

    def build(key: jax.Array, index: Any = None) -> EmbeddingState:
        shard = None if layout is None else layout.shard(layout.index() if index is None else index)
        return assemble(key, spec, tx, implementation, table_of(key, shard), layout)

    if layout is None:
        return jax.jit(build)(key)
    if layout.mesh is None:
        return build(key)
    # A host value is the same on every process; an array is one device's.
    words = key if isinstance(key, jax.core.Tracer) else np.asarray(key)
    specs = partition_specs(jax.eval_shape(partial(build, index=0), key))
    return jax.jit(
        jax.shard_map(
            build, mesh=layout.mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False
        )
    )(words)


def partition_specs(state: EmbeddingState) -> EmbeddingState:
    """Returns the tree of PartitionSpecs of a sharded state, for jax.shard_map's in_specs and out_specs.

    Args:
      state: concrete, traced or abstract.

    Returns:
      A tree like state; arrays by row and by set are divided over the sharding axes, everything else is on all devices.

    Raises:
      TypeError: if state is something else.
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
    return dataclasses.replace(
        everywhere,
        table=jax.tree.map(lambda _: rows, state.table),
        cache=cache,
        row_state=jax.tree.map(
            lambda leaf: rows if leaf.ndim else PartitionSpec(), state.row_state
        ),
    )


def over_mesh(
    function: Callable, state: EmbeddingState, *specs: Any, result: Any = None
) -> Callable:
    """Returns function(state, *args) as jax.shard_map runs it over the state's mesh; result None: another state.

    Raises:
      ValueError: if the state has no mesh, being one device's part inside jax.pmap.
    """
    mesh = state.layout.mesh  # type: ignore[union-attr]
    if mesh is None:
        raise ValueError(
            "this state was made inside jax.pmap and has no mesh: call the verbs inside jax.pmap, too"
        )
    of_state = partition_specs(state)
    result = of_state if result is None else result
    return jax.shard_map(
        function, mesh=mesh, in_specs=(of_state, *specs), out_specs=result, check_vma=False
    )


def assemble(
    key: jax.Array,
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    implementation: str | ops.Implementation,
    table: QuantizedTable,
    layout: Layout | None = None,
) -> EmbeddingState:
    """Returns the state that starts from a table (on a mesh: from one shard's): an empty cache, initial row state, zeros."""
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
    state = EmbeddingState(
        table=dataclasses.replace(table, rows=indexing.to_host(table.rows, spec.memory_kind)),
        cache=cache,
        row_state=row_state,
        key=key,
        step=jnp.zeros((), jnp.int32),
        pending=jnp.zeros((), bool),
        counters=jnp.zeros((len(COUNTERS), 2), jnp.uint32),
        fingerprint=jnp.zeros(2, jnp.uint32),
        spec=spec,
        implementation=implementation,
        layout=layout,
    )
    return dataclasses.replace(state, fingerprint=jnp.asarray(state.expected_fingerprint))
