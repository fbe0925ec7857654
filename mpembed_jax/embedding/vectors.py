"""The fused pair of verbs: ids to vectors, and gradients of vectors to stored rows.

`embed` does what prefetch, lookup and pool do. `apply_pooled_gradients` turns gradients of vectors
into gradients of rows, and does what apply_gradients does. Differentiate the loss with respect to
the vectors.

    emb, plan, vectors = mpembed.embed(emb, ids, tx=row_tx)
    loss, (grads, vector_grads) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, vectors)
    emb = mpembed.apply_pooled_gradients(emb, plan, vector_grads, tx=row_tx)

The verbs run natively if numba runs the ops on a CPU, if the stack is on one device with its table
in device memory, and if the transformation has a rule (`optim.sgd` or `optim.rowwise_adagrad`, with
a fixed rate and without weight decay). `embed` is then one foreign call, or two for bags, and
`apply_pooled_gradients` is one. No array [U, D] of unique rows or of their gradients exists.

Elsewhere, the two verbs run the separate ones. The results are the same. Call the separate verbs if
you need the gradients of rows, for example to clip them by their global norm.
"""

import dataclasses
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import ops, optim, row_ids
from mpembed_jax.arrays import carries
from mpembed_jax.cache import policy
from mpembed_jax.cache.plan import CachePlan, Counts
from mpembed_jax.embedding import admission, arguments, pooling, step, update
from mpembed_jax.embedding.state import EmbeddingState
from mpembed_jax.ops import Draw, Places
from mpembed_jax.spec import TablesOfIds


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a batch's rows become vectors; static."""

    combiner: str | None
    num_segments: int | None  # the number of ragged bags
    shapes: tuple[tuple[int, ...], ...]  # the shape of each array of ids
    tree: Any  # the structure of the nest of ids

    @property
    def lead(self) -> list[tuple[int, ...]]:
        """Shapes of the vectors without their last axis."""
        if self.num_segments is not None:
            return [(self.num_segments,)]
        return [shape if self.combiner is None else shape[:-1] for shape in self.shapes]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "counts",
        "step",
        "signature",
        "places",
        "factors",
        "source",
        "plan",
        "rows",
        "weights",
        "segment_ids",
    ],
    meta_fields=["pooling"],
)
@dataclasses.dataclass(frozen=True)
class VectorPlan:
    """The decisions of `embed` about one batch, for the apply_pooled_gradients of the same batch.

    If the verbs run natively (see is_fused), `places` describes the batch's rows, and `factors` and
    `source` describe its positions. If not, `plan`, `rows`, `weights` and `segment_ids` are those
    of the separate verbs.
    """

    counts: Counts
    step: jax.Array  # i32 []  the step of the state that embed returned with this plan
    signature: jax.Array  # u32 []  the signature of that state
    pooling: Pooling
    places: Places | None = None
    factors: jax.Array | None = None  # f32 [N]  None: all are 1
    # i32 [N]  the index of each position's gradient among those of the M vectors; -1 for a position
    # without a gradient. If source is None, position n of N takes gradient n // (N / M).
    source: Any = None
    plan: CachePlan | None = None
    rows: jax.Array | None = None  # f32 [U, D]
    weights: Any = None
    segment_ids: jax.Array | None = None

    @property
    def number(self) -> jax.Array:
        """The number of the embed that made the plan (int32 [])."""
        return self.step - 1


def embed(
    state: EmbeddingState,
    ids: Any,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    tx: optax.GradientTransformation,
) -> tuple[EmbeddingState, VectorPlan, Any]:
    """Plans a batch, brings its rows into the cache, and returns one vector per id or per bag.

    In training, exactly one apply_pooled_gradients must follow each embed. Donate the state;
    otherwise, each step copies the table. Gradients of rows, for example to clip them by their
    global norm, and gradients with respect to weights need the separate verbs.

    Args:
      state: consumed if donated.
      ids: any nest of int32 arrays of global ids, as for prefetch; NO_ID is padding. Pairs of raw
        ids (uint32 [.., 2]) for a stack with a vocabulary.
      weights: None, or like ids: float32 factor of each position; see pool.
      combiner: None for one vector per id; "sum", "mean" or "sqrtn" reduces the last axis of each
        array of ids; see pool.
      segment_ids: int32 [N], the bag of each position of flat ids [N], instead of the last axis.
      num_segments: number of bags; needed with segment_ids.
      tx: the transformation given to init.

    Returns:
      The state, advanced by one step; the plan of this step; and the vectors: float32 [.., D] in
      the nesting of ids, without the last axis of ids if there is a combiner; or
      [num_segments, D].

    Raises:
      TypeError: if state has the wrong type, or ids are not what prefetch takes.
      ValueError: as `prefetch` and `pool`.
    """
    options: dict[str, Any] = {"segment_ids": segment_ids, "num_segments": num_segments}
    return embed_of_tables(state, ids, None, weights, combiner, **options, tx=tx)


def embed_of_tables(
    state: EmbeddingState,
    ids: Any,
    tables: TablesOfIds | None,
    weights: Any = None,
    combiner: str | None = None,
    *,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    tx: optax.GradientTransformation,
) -> tuple[EmbeddingState, VectorPlan, Any]:
    """Does what embed does, with the same errors; for `tables`, see step.prefetch_of_tables."""
    arguments.check_state("embed(state, ids, weights, combiner, *, tx)", state)
    if state.vocabulary is None:
        leaves, treedef = row_ids.checked(ids)
        positions: list[Any] = leaves
        dealt = None
    else:
        state.check_spec()
        pairs, treedef = admission.checked(ids)
        positions = [jax.ShapeDtypeStruct(leaf.shape[:-1], jnp.int32) for leaf in pairs]
    options: dict[str, Any] = {
        "segment_ids": segment_ids,
        "num_segments": num_segments,
        "implementation": state.implementation,
    }
    flat_weights = pooling.check(treedef.unflatten(positions), weights, combiner, **options)[1]
    weights = None if weights is None else treedef.unflatten(flat_weights)
    if state.vocabulary is not None:
        # Ids are admitted after all checks, so that a call that raises admits nothing.
        state, ids, dealt = admission.admit_and_deal(state, ids)
        leaves = jax.tree.leaves(ids)
    shapes = tuple(leaf.shape for leaf in leaves)
    how = Pooling(combiner, num_segments if segment_ids is not None else None, shapes, treedef)
    if is_fused(tx, state) and any(leaf.size for leaf in leaves):
        return _embed_natively(state, leaves, dealt, flat_weights, segment_ids, how)
    state.check_spec()
    tables = None if state.vocabulary is not None else tables
    state, plan, rows = step.prefetch_and_lookup(state, treedef.unflatten(leaves), tables)
    vectors = pooling.pool(rows, plan.inverse, weights, combiner, **options)
    held = {"plan": plan, "rows": rows, "weights": weights, "segment_ids": segment_ids}
    return state, VectorPlan(plan.counts, plan.step, plan.signature, how, **held), vectors


def is_fused(tx: optax.GradientTransformation, state: EmbeddingState) -> bool:
    """Returns whether the two verbs run natively, without an array of unique rows."""
    return (
        state.layout is None
        and optim.rule_of(tx) is not None
        and ops.bag_step(state.implementation, state.table) is not None
    )


def _embed_natively(
    state: EmbeddingState,
    leaves: list[jax.Array],
    dealt: ops.Dealt | None,
    weights: list[jax.Array | None],
    segment_ids: jax.Array | None,
    how: Pooling,
) -> tuple[EmbeddingState, VectorPlan, Any]:
    state.check_spec()
    native = ops.bag_step(state.implementation, state.table)
    cache = state.cache
    max_threads = ops.max_threads(state.implementation)
    ids = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    halve = jnp.bool_(False)
    if cache is not None:
        halve = policy.is_time_to_halve(cache, state.step, Fraction(ids.shape[0]))
    table, cache, found, places = native.forward(
        state.table,
        cache,
        ids,
        dealt,
        budget=state.spec.max_unique_ids,
        step=state.step,
        must_halve=halve,
        draw=Draw(state.key, state.step),
        is_listed=how.combiner is not None,
        max_threads=max_threads,
    )
    counts = Counts(**native.counts(places), wide_exchanges=jnp.int32(0))
    factors = source = None
    vectors = found
    if how.combiner is not None:
        bag, factors, source = _bags(found >= 0, weights, segment_ids, how, state.implementation)
        num_bags = sum(int(np.prod(lead)) for lead in how.lead)
        table, lines, vectors = native.bags(
            table,
            None if cache is None else cache.rows,
            places,
            found,
            (found >= 0).astype(jnp.float32) if factors is None else factors,
            bag,
            num_bags,
            max_threads=max_threads,
        )
        if cache is not None:
            cache = dataclasses.replace(cache, rows=lines)
    is_sound = state.is_sound
    # A loop of at most one iteration: a select would read and write all vectors in every step.
    vectors = carries.at_most_once(
        lambda vectors: jnp.full_like(vectors, jnp.nan), (~is_sound).astype(jnp.int32), vectors
    )
    state = step.after_prefetch(dataclasses.replace(state, table=table, cache=cache), counts)
    named = (step.planned_step(state), state.signature)
    plan = VectorPlan(counts, *named, how, places, factors, source)
    return state, plan, _parted(vectors, how)


def _parted(vectors: jax.Array, how: Pooling) -> Any:
    """Splits consecutive vectors [M, D] into the nest of the ids."""
    sizes = np.cumsum([int(np.prod(lead)) for lead in how.lead])[:-1]
    parts = jnp.split(vectors, sizes) if sizes.size else [vectors]
    shaped = [
        part.reshape(*lead, vectors.shape[-1]) for part, lead in zip(parts, how.lead, strict=True)
    ]
    return how.tree.unflatten(shaped)


def _bags(
    is_real: jax.Array,
    weights: list[jax.Array | None],
    segment_ids: jax.Array | None,
    how: Pooling,
    implementation: ops.Named,
) -> tuple[Any, jax.Array | None, Any]:
    """Returns three arrays by position: its bag, its factor, and the index of its gradient.

    Positions are those of all arrays of ids, one after another. Factors are None if all are 1.
    Indices are None if each position n of N takes gradient n // (N / M), where M is the number of
    bags.
    """
    combiner, num_segments = how.combiner, how.num_segments
    assert combiner is not None
    if segment_ids is not None and num_segments is not None:
        # `segments` takes the last row for padding. Row 0 stands for an id, row 1 for padding.
        row = jnp.where(is_real, 0, 1).astype(jnp.int32)
        segment, factors = pooling.segments(
            2, row, weights[0], combiner, segment_ids, num_segments, implementation
        )
        # Positions that do not count keep their bags here, so that bags in order stay in order. The
        # native sums leave out a position without a row.
        given = jnp.asarray(segment_ids)
        given = given.astype(jnp.int32) if given.dtype.itemsize < 4 else given
        is_above = given >= jnp.asarray(num_segments, given.dtype)
        ordered = jnp.where(is_above, num_segments, given.astype(jnp.int32))
        ordered = jnp.where(given < 0, -1, ordered).astype(jnp.int32)
        return ordered, factors, jnp.where(segment < num_segments, segment, -1)
    lengths = [shape[-1] for shape in how.shapes]
    num_bags = [int(np.prod(lead)) for lead in how.lead]
    firsts = np.cumsum([0, *num_bags[:-1]])
    bag = np.concatenate(
        [
            np.repeat(np.arange(first, first + num), length)
            for first, num, length in zip(firsts, num_bags, lengths, strict=True)
        ]
    ).astype(np.int32)
    every: jax.Array | None = None
    if combiner != "sum" or any(w is not None for w in weights):
        ends = np.cumsum([int(np.prod(shape)) for shape in how.shapes])[:-1]
        parts = [
            pooling.coefficients(w, part.reshape(shape), combiner).reshape(-1)
            for w, part, shape in zip(weights, jnp.split(is_real, ends), how.shapes, strict=True)
        ]
        every = jnp.concatenate(parts)
    return bag, every, bag if len(set(lengths)) > 1 else None


def apply_pooled_gradients(
    state: EmbeddingState,
    plan: VectorPlan,
    pooled_grads: Any,
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Applies exactly one optimizer update to each unique row, from the gradients of vectors.

    Cached rows are written to their lines in float32. Bypassed rows are rounded into the table by
    the rule of its format. Each row's gradient is the sum over its positions, in ascending order.
    Donate the state. A plan that is not the state's latest, is of another state, or was applied
    before, changes nothing and is counted. If state and plan are concrete, the call raises
    ValueError instead.

    Args:
      state: from embed; consumed if donated.
      plan: from the same embed.
      pooled_grads: nest of float32, the gradient with respect to what embed returned. Inside
        jax.shard_map, it varies over the same mesh axes as the vectors.
      tx: the transformation given to init and embed.

    Returns:
      The state.

    Raises:
      TypeError: if state or plan has the wrong type.
      ValueError: if the tree, a shape or a dtype of pooled_grads differs from that of the vectors;
        if tx has no rule but embed's has one, or if it needs another row state; if the state was
        donated; or on a second call for one embed.
    """
    call = "apply_pooled_gradients(state, plan, pooled_grads, *, tx)"
    arguments.check_state(call, state)
    arguments.expect(call, "plan", plan, VectorPlan, "the second result of embed")
    leaves = _checked(state, plan, pooled_grads)
    if plan.places is None:
        return _apply_separately(state, plan, pooled_grads, tx)
    rule = optim.rule_of(tx)
    if rule is None:
        raise ValueError(
            "tx does not match the plan: embed was given optim.sgd or optim.rowwise_adagrad, and "
            "this tx is neither, or has a schedule or weight decay; pass the same tx to init, "
            "embed and apply_pooled_gradients"
        )
    native = ops.bag_step(state.implementation, state.table)
    cache = state.cache
    dim = state.spec.embedding_dim
    is_pending = state.pending & step.is_latest(state, plan)
    num_nonfinite = jnp.int32(0)
    if any(leaf.size for leaf in leaves):
        store, accumulator, num_nonfinite = native.backward(
            state.store if cache is None else state.store._replace(dirty=cache.dirty),
            update.accumulator_of(tx, rule, state),
            plan.places,
            jnp.concatenate([leaf.reshape(-1, dim) for leaf in leaves]),
            plan.factors,
            plan.source,
            rule=rule,
            draw=Draw(state.key, plan.number),
            skip_nonfinite=state.spec.skip_nonfinite,
            is_applied=is_pending,
            max_threads=ops.max_threads(state.implementation),
        )
        state = update.stored(state, store, update.with_accumulator(state, accumulator))
        if state.cache is not None:
            cache = dataclasses.replace(state.cache, dirty=store.dirty)
            state = dataclasses.replace(state, cache=cache)
    return step.finished(state, plan, num_nonfinite, is_pending)


def _checked(state: EmbeddingState, plan: VectorPlan, pooled_grads: Any) -> list[jax.Array]:
    """Checks gradients against the plan, and returns their leaves."""
    how = plan.pooling
    dim = state.spec.embedding_dim
    leaves, treedef = jax.tree.flatten(pooled_grads)
    wanted = [(*lead, dim) for lead in how.lead]
    is_like = treedef == how.tree and [g.shape for g in leaves] == wanted
    if not is_like or any(g.dtype != jnp.float32 for g in leaves):
        raise ValueError(
            f"pooled_grads must be like the vectors of embed: float32 {wanted} in {how.tree}, "
            f"got {[f'{g.dtype} {g.shape}' for g in leaves]} in {treedef}"
        )
    step.check_waiting("apply_pooled_gradients", "embed", state, plan)
    return leaves


def _apply_separately(
    state: EmbeddingState,
    plan: VectorPlan,
    pooled_grads: Any,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Applies gradients by the separate verbs.

    On one device, the update of a transformation with a rule sums the gradients of the positions
    itself, unless the batch is empty. In all other cases, pool is differentiated.
    """
    how = plan.pooling
    held = plan.plan
    rows = plan.rows
    assert held is not None and rows is not None
    options: dict[str, Any] = {
        "segment_ids": plan.segment_ids,
        "num_segments": how.num_segments,
        "implementation": state.implementation,
    }
    index, factors, leaves = pooling.check_gradients(
        state.spec.embedding_dim, held.inverse, pooled_grads, plan.weights, how.combiner, **options
    )
    is_empty = not sum(i.size for i in index) or not sum(g.size for g in leaves)
    if state.layout is not None or optim.rule_of(tx) is None or is_empty:

        def pool(rows: jax.Array) -> Any:
            return pooling.pool(rows, held.inverse, plan.weights, how.combiner, **options)

        _, pull_back = jax.vjp(pool, rows)
        return step.apply_gradients(state, held, rows, pull_back(pooled_grads)[0], tx=tx)
    positions = pooling.positions(rows.shape[0], index, factors, leaves, how.combiner, **options)
    positions = positions._replace(segments=held.segments)
    return step.apply_positions(state, held, rows, positions, tx=tx)
