"""The bytes of a stack before it is made: its arrays, and the peak memory of a training step.

No table is made. The shapes come from tracing `state.assemble`, and the peak comes from compiling
one training step.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mpembed_jax import ops
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.embedding import arguments, dense, vectors
from mpembed_jax.embedding.state import (
    EmbeddingState,
    assemble,
    check_memory_kind,
    check_spec,
    make,
    partition_specs,
)
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.optim.row_state import init_rows
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec

_KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)


def nbytes(tree: Any) -> int:
    """Returns the total bytes of the arrays (or shapes) of a pytree.

    Args:
      tree: of arrays or jax.ShapeDtypeStructs.
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Report:
    """The bytes of a stack by component; str() gives a readable table.

    Over a mesh, all numbers are those of each device.
    """

    # {component: bytes}. The components are: table, cache rows, cache metadata, sketch, row state,
    # counters, and vocabulary if there is one.
    components: dict[str, int]
    geometry: Geometry | None  # sets, ways and groups of the cache; None without a cache
    num_rows: int  # V; over a mesh, the rows of a shard
    embedding_dim: int  # D
    float32_bytes: int  # bytes of a plain float32 table
    float32_row_state_bytes: int  # bytes of the same optimizer's state in float32
    # Bytes of state, batch and temporaries of one compiled step; None without batch_shape.
    step_peak_bytes: int | None
    # The part of the total that is in host memory (EmbeddingSpec.memory_kind).
    host_bytes: int = 0

    @property
    def total(self) -> int:
        """Bytes of the whole state."""
        return sum(self.components.values())

    @property
    def bytes_per_row(self) -> float:
        """Bytes of the state per table row, without optimizer state."""
        return (self.total - self.components["row state"]) / self.num_rows

    @property
    def ratio(self) -> float:
        """The size of a float32 table over the size of the state, both without optimizer state."""
        return self.float32_bytes / (self.total - self.components["row state"])

    @property
    def ratio_with_row_state(self) -> float:
        """The size of a float32 table over the size of the state, both with optimizer state."""
        return (self.float32_bytes + self.float32_row_state_bytes) / self.total

    def __str__(self) -> str:
        lines = [f"{self.num_rows:,} rows of dim {self.embedding_dim}"]
        if self.geometry is not None:
            g = self.geometry
            share = g.lines / self.num_rows
            lines.append(
                f"cache: {g.sets:,} sets of {g.ways} ways = {g.lines:,} lines ({share:.2%} of the "
                "rows)"
            )
        width = max(len(name) for name in self.components)
        lines += [f"  {name:<{width}} {size:>18,} B" for name, size in self.components.items()]
        lines.append(
            f"  {'total':<{width}} {self.total:>18,} B  ({self.bytes_per_row:.2f} B per row "
            "without row state)"
        )
        if self.host_bytes:
            lines.append(
                f"in host memory: {self.host_bytes:,} B, on the device: "
                f"{self.total - self.host_bytes:,} B"
            )
        lines.append(
            f"float32: {self.float32_bytes:,} B, with row state "
            f"{self.float32_bytes + self.float32_row_state_bytes:,} B"
        )
        lines.append(
            f"ratio: {self.ratio:.2f}x without, {self.ratio_with_row_state:.2f}x with row state"
        )
        if self.step_peak_bytes is not None:
            lines.append(f"peak of one compiled step: {self.step_peak_bytes:,} B")
        return "\n".join(lines)


def state_shapes(
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    layout: Layout | None = None,
    implementation: ops.Named | None = None,
) -> EmbeddingState:
    """Returns the abstract state (jax.ShapeDtypeStructs) of a stack, or of one shard of it.

    The table is traced as zeros. So no initializer is called, and the time does not depend on the
    number of tables.

    Args:
      spec: the stack.
      tx: optax transformation for the rows.
      layout: the layout whose shard is described; None for a stack on one device.
      implementation: as in init.

    Raises:
      TypeError: if tx is not an optax transformation.
      ValueError: if tx cannot work on gathered rows.
    """
    chosen = ops.choose(implementation, is_abstract=True)

    def made(key: jax.Array) -> EmbeddingState:
        shard = None if layout is None else layout.shard(0)
        return assemble(key, spec, tx, chosen, dense.zeros(key, spec, shard), layout)

    return jax.eval_shape(made, _KEY)


def report(
    spec: EmbeddingSpec,
    tx: optax.GradientTransformation,
    batch_shape: tuple[int, ...] | None = None,
    *,
    mesh: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    placement: Placement | None = None,
    implementation: ops.Named | None = None,
) -> Report:
    """Counts the bytes of a stack on one device, or on each device of a mesh, before it is made.

    The peak is XLA's estimate for one jitted step of `embed` and `apply_pooled_gradients` that
    donates the state. It counts the state, the ids, the vectors, their gradients and what the two
    verbs need beside them. It does not count the arrays of your model. A step of `prefetch`,
    `lookup` and `apply_gradients`, also that of a module without fused=True, can have a higher
    peak. Where the two verbs run natively (see `embedding.vectors`), such a step holds two more
    arrays, the rows and their gradients, float32 [U, D] each.

    Args:
      spec: the stack.
      tx: optax transformation for the rows.
      batch_shape: shape of the ids of one batch, over a mesh those of all devices; for raw ids,
        without the axis of the pairs. (B, T): there is a vector for each id. (B, T, L): there is a
        vector for each bag of L ids; for a vector of each of the L ids, give (B * L, T). If given,
        one training step is compiled for the default device or for the mesh, to find its peak
        memory.
      mesh: as in init. Without a batch_shape, it may be a jax.sharding.AbstractMesh, whose devices
        need not exist.
      axis_name: as in init.
      placement: as in init.
      implementation: as in init.

    Returns:
      A Report. On one device, its total is `nbytes` of the state that init makes. Over a mesh, it
      is the bytes of this state on each device.

    Raises:
      TypeError: if spec, tx, batch_shape or mesh has another type.
      ValueError: if tx cannot work on gathered rows; if implementation is unknown; if batch_shape
        is empty or a size is negative; if the stack cannot be divided over the mesh in this way; if
        B does not divide over its devices; or if a batch_shape is given with an abstract mesh,
        without a mesh but with an axis_name, or for a stack of 2**31 - 1 rows or more.
    """
    check_spec("memory.report(spec, tx, batch_shape)", spec)
    if batch_shape is not None:
        call = "memory.report(spec, tx, batch_shape)"
        if not isinstance(batch_shape, tuple | list):
            raise TypeError(
                "batch_shape must be the shape of a batch's ids, such as (2048, 26), got "
                f"{batch_shape!r}"
            )
        batch_shape = tuple(arguments.integer(call, "each of batch_shape", n) for n in batch_shape)
        if not batch_shape or min(batch_shape) < 0:
            raise ValueError(f"batch_shape must be (B, T) or (B, T, L), got {batch_shape}")
    layout = Layout.of(spec, mesh, axis_name, placement)
    check_memory_kind(spec, layout)
    if batch_shape is not None and isinstance(mesh, jax.sharding.AbstractMesh):
        raise ValueError(
            f"a step with batch_shape={batch_shape!r} is compiled for the devices of its mesh, but "
            f"this one is abstract: {mesh}; give jax.make_mesh(..), or leave batch_shape out"
        )
    state = state_shapes(spec, tx, layout, implementation)
    cache = state.cache
    components = {
        "table": nbytes(state.table),
        "cache rows": nbytes(cache.rows) if cache is not None else 0,
        "cache metadata": nbytes((cache.tags, cache.priority, cache.dirty))
        if cache is not None
        else 0,
        "sketch": nbytes(cache.sketch) if cache is not None else 0,
        "row state": nbytes(state.row_state),
        "counters": nbytes(
            (state.key, state.step, state.clock, state.pending, state.counters, state.fingerprint)
        ),
    }
    if state.vocabulary is not None:
        components["vocabulary"] = nbytes(state.vocabulary)
    wide_row_state = [leaf for leaf in jax.tree.leaves(state.row_state) if leaf.ndim > 1]
    num_rows = state.table.num_rows
    plain = jax.eval_shape(partial(init_rows, tx, num_rows, spec.embedding_dim, "float32"))
    step_peak_bytes = None
    if batch_shape is not None:
        step_peak_bytes = step_peak([spec], tx, [batch_shape], [layout], implementation)
    return Report(
        components=components,
        geometry=None if cache is None else cache.geometry,
        num_rows=num_rows,
        embedding_dim=spec.embedding_dim,
        float32_bytes=4 * num_rows * spec.embedding_dim,
        float32_row_state_bytes=nbytes(plain),
        step_peak_bytes=step_peak_bytes,
        host_bytes=0 if spec.memory_kind is None else nbytes((state.table, wide_row_state)),
    )


def step_peak(
    specs: Sequence[EmbeddingSpec],
    tx: optax.GradientTransformation,
    batch_shapes: Sequence[tuple[int, ...]],
    layouts: Sequence[Layout | None],
    implementation: ops.Named | None = None,
) -> int:
    """Returns the peak bytes of one compiled step that trains all stacks and donates their states.

    Over a mesh, they are the bytes on each device.

    Args:
      specs: the stacks.
      tx: optax transformation for the rows.
      batch_shapes: the shape of each stack's ids, as in `report`.
      layouts: the layout of each stack, all over one mesh of devices; None for one device.
      implementation: as in init.

    Raises:
      ValueError: if a batch does not divide over the devices of the mesh, if there is no mesh but
        the name of an axis, or if a stack has 2**31 - 1 rows or more.
    """
    large = next((spec for spec in specs if spec.num_rows >= NO_ID), None)
    if large is not None:
        raise ValueError(
            f"a step of a stack of {large.num_rows} rows takes pairs of ids, of which no "
            "temporaries are predicted; leave batch_shape out, or make smaller stacks"
        )
    layout = layouts[0]
    if layout is not None and layout.mesh is None:
        raise ValueError("batch_shape needs mesh=, not an axis of jax.pmap alone")
    divided = () if layout is None else layout.batch_axes
    for shape in batch_shapes:
        if layout is not None and shape[0] % layout.batch_shards:
            raise ValueError(
                f"the first number of batch_shape must be a multiple of {layout.batch_shards}, the "
                f"devices that divide a batch, got {shape[0]}"
            )
    combiners = ["sum" if len(shape) > 2 else None for shape in batch_shapes]

    def train_step(states: Any, weights: Any, ids: Any) -> Any:
        made = [
            vectors.embed(state, here, combiner=combiner, tx=tx)
            for state, here, combiner in zip(states, ids, combiners, strict=True)
        ]

        def loss(weights: Any, found: Any) -> jax.Array:
            each = zip(found, weights, strict=True)
            hidden = [own.reshape(len(own), len(weight)) @ weight for own, weight in each]
            total = jnp.sum(jnp.square(sum(hidden)))
            return jax.lax.pmean(total, divided) if divided else total

        # The vectors must stay until the gradient of the weights is made, as in a model.
        grads, vector_grads = jax.grad(loss, argnums=(0, 1))(weights, [f for *_, f in made])
        states = [
            vectors.apply_pooled_gradients(state, plan, own, tx=tx)
            for (state, plan, _), own in zip(made, vector_grads, strict=True)
        ]
        return states, grads

    chosen = ops.choose(implementation, is_abstract=True)
    fixed: dict[str, Any] = {"tx": tx, "implementation": chosen, "table_of": dense.zeros}
    states, ids, weights = [], [], []
    for spec, shape, own in zip(specs, batch_shapes, layouts, strict=True):
        states.append(jax.eval_shape(partial(make, spec=spec, layout=own, **fixed), _KEY))
        is_raw = spec.vocabulary is not None
        ids.append(
            jax.ShapeDtypeStruct((*shape, 2), jnp.uint32)
            if is_raw
            else jax.ShapeDtypeStruct(shape, jnp.int32)
        )
        lead = shape if len(shape) <= 2 else shape[:-1]
        width = math.prod(lead[1:]) * spec.embedding_dim
        weights.append(jax.ShapeDtypeStruct((width, 1), jnp.float32))
    run: Any = train_step
    if layout is not None:
        of_states = [partition_specs(state) for state in states]
        run = jax.shard_map(
            train_step,
            mesh=layout.mesh,
            in_specs=(of_states, PartitionSpec(), PartitionSpec(divided)),
            out_specs=(of_states, PartitionSpec()),
        )
    step = jax.jit(run, donate_argnums=0)
    sizes: Any = step.lower(states, weights, ids).compile().memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
