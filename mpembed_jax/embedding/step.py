"""The training step in which one differentiates with respect to rows.

One `EmbeddingState` holds a stack of tables that share dim, format and cache.
- `prefetch` plans a batch and brings its rows into the cache.
- `lookup` gathers the unique rows, from which the user computes gradients.
- `apply_gradients` updates each unique row once. A cached row is updated in its float32 line. Any
  other row is rounded into the table by the rule of its format.
- `gradient_norm` is the norm of the gradients of all rows.

In `vectors`, one differentiates with respect to vectors instead. The verbs are pure; jit them with
the state donated. `devices` has what is different over a mesh.

The system follows Yang et al., "Mixed-Precision Embedding Using a Cache" (arXiv 2010.11305).
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpembed_jax import ops, row_ids
from mpembed_jax.cache import residency
from mpembed_jax.cache.plan import CachePlan, Counts
from mpembed_jax.embedding import admission, arguments, devices, update
from mpembed_jax.embedding.counters import count_step, count_updates
from mpembed_jax.embedding.state import EmbeddingState, clock_of
from mpembed_jax.ops import Draw, Moves, Positions, Request
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import TablesOfIds


def prefetch(state: EmbeddingState, ids: Any) -> tuple[EmbeddingState, CachePlan]:
    """Plans a batch and brings its rows into the cache.

    It finds the unique ids and the cache hits. It writes dirty victims back to the table. Then it
    fills lines with the rows that enter the cache. In training, exactly one apply_gradients must
    follow each prefetch. Donate the state; otherwise, each step copies the table.

    Args:
      state: consumed if donated.
      ids: any nest of int32 arrays of global ids (see spec.global_ids); NO_ID is padding. On a
        mesh, this device's share of the batch. For a stack of 2**31 - 1 rows or more, pairs [.., 2]
        (see sharding.pairs). For a stack with a vocabulary, pairs uint32 [.., 2] of raw ids (see
        spec.raw_ids). Raw ids may earn rows of their own here. The plan then holds row numbers.

    Returns:
      The state, advanced by one step, and the plan of this step.

    Raises:
      TypeError: if state has another type, or if ids are not integers of at most 32 bits. With a
        vocabulary: if ids are not pairs.
      ValueError: if host ids do not fit int32; or if the state was donated, made for another spec,
        or averaged.
    """
    return prefetch_of_tables(state, ids, None)


def prefetch_of_tables(
    state: EmbeddingState, ids: Any, tables: TablesOfIds | None
) -> tuple[EmbeddingState, CachePlan]:
    """Runs prefetch, with narrower arrays if the ids are of few small tables.

    If `tables` is given, `unique_ids` of the plan has at most one entry for each row of these
    tables, and one entry of padding. The errors are those of prefetch.

    Args:
      state: consumed if donated.
      ids: as for prefetch.
      tables: the tables of the ids in each array; None if they are not known.
    """
    state, plan, _ = _prefetch(*_admitted(state, ids, tables), looks_up=False)
    return state, plan


def prefetch_held(
    state: EmbeddingState, ids: Any, tables: TablesOfIds | None
) -> tuple[EmbeddingState, CachePlan, jax.Array]:
    """Does what prefetch_of_tables and then lookup_held do, with one kernel for the rows of both.

    Returns:
      The state, the plan, and float32 [Q, D]: the planned rows that this device holds. They are
      NaN if the state is not sound.
    """
    state, plan, rows = _prefetch(*_admitted(state, ids, tables), looks_up=True)
    assert rows is not None
    return state, plan, rows


def prefetch_and_lookup(
    state: EmbeddingState, ids: Any, tables: TablesOfIds | None
) -> tuple[EmbeddingState, CachePlan, jax.Array]:
    """Does what prefetch_of_tables and then lookup do, with one kernel for the rows of both.

    Ids are row numbers, even if the state has a vocabulary.
    """
    state, plan, held = _prefetch(state, ids, tables, looks_up=True)
    assert held is not None
    return state, plan, devices.delivered(state, plan, held, is_latest(state, plan))


def _admitted(
    state: EmbeddingState, ids: Any, tables: TablesOfIds | None
) -> tuple[EmbeddingState, Any, TablesOfIds | None]:
    """Checks the state, and gives rows to raw ids. Returns the state, row numbers and tables."""
    arguments.check_state("prefetch(state, ids)", state)
    state.check_spec()
    if state.vocabulary is None:
        return state, ids, tables
    return *admission.admit(state, ids), None  # all tables share one pool


def _prefetch(
    state: EmbeddingState, ids: Any, tables: TablesOfIds | None, *, looks_up: bool
) -> tuple[EmbeddingState, CachePlan, jax.Array | None]:
    """Plans a batch of row numbers. If looks_up, the third result is the planned rows [Q, D].

    These rows are NaN if the state is not sound.
    """
    leaves, treedef = row_ids.checked(ids)
    request = devices.ask(state, leaves, tables)
    state, moves, inverse, counts, rows = _place(state, request, looks_up)
    unique_ids, inverses, counts, route = devices.answer(
        state, leaves, request, moves, inverse, counts
    )
    state = after_prefetch(state, counts)
    plan = CachePlan(
        unique_ids=unique_ids,
        inverse=treedef.unflatten(inverses),
        line=moves.line,
        is_hit=jnp.arange(moves.ids.shape[0], dtype=jnp.int32) < moves.num_hits,
        victim_ids=moves.victim_ids,
        counts=counts,
        step=planned_step(state),
        signature=state.signature,
        route=route,
        segments=moves.segments,
    )
    return state, plan, rows


def after_prefetch(state: EmbeddingState, counts: Counts) -> EmbeddingState:
    """Returns the state after a prefetch: advanced by one step, pending, with `counts` added."""
    step = state.step + 1
    counters = count_step(state.counters, counts)
    return dataclasses.replace(
        state,
        step=step,
        clock=clock_of(state.key, step, counters),
        fingerprint=jnp.where(state.is_of_one_history, state.fingerprint, np.uint32(0)),
        # The value is concrete, so that a second apply_gradients in the same trace raises an error.
        pending=np.True_,
        counters=counters,
    )


def planned_step(state: EmbeddingState) -> jax.Array:
    """Returns the step (int32 []) for the plan that prefetch returns together with `state`.

    Within a trace, it is the object `state.step` itself: `is_planned` recognizes the plan by it.
    Outside, state and plan share no buffer, because the state may be donated.
    """
    return state.step if isinstance(state.step, jax.core.Tracer) else jnp.copy(state.step)


def _place(
    state: EmbeddingState, request: Request, looks_up: bool
) -> tuple[EmbeddingState, Moves, jax.Array, Counts, jax.Array | None]:
    """Plans the requested rows, brings them into their cache lines, and looks them up if told to.

    Returns:
      The state with its cache and table changed.
      The moves.
      For each entry of the request, the index (int32) of its row among the moves.
      The counts.
      The rows of the moves (float32 [Q, D]), or None. They are NaN if the state is not sound.
    """
    found = request.rows
    cache = state.cache
    zero = jnp.int32(0)
    rows = None
    is_valid = state.is_sound if looks_up else None
    by: Any = {"implementation": state.implementation}
    if cache is None:
        width = found.ids.shape[0]
        no_line = jnp.zeros(width, jnp.int32)
        no_victim = jnp.full(width, NO_ID, jnp.int32)
        moves = Moves(found.ids, no_line, no_victim, zero, zero, found.num_ids, found.segments)
        inverse = found.inverse
        evictions = write_backs = hit_requests = zero
        if looks_up:
            rows = ops.lookup(state.store, moves, is_valid, **by)
    else:
        cache, moves, inverse, hit_requests, evictions = ops.plan(
            cache, found, state.step, request.num_positions, **by
        )
        draw = Draw(state.row_key, state.step)
        store = state.store._replace(dirty=cache.dirty.reshape(-1))
        if looks_up:
            store, write_backs, rows = ops.bring(store, moves, draw, is_valid, **by)
        else:
            store, write_backs = ops.swap(store, moves, draw, **by)
        state = dataclasses.replace(
            state, table=store.table, cache=residency.refilled(cache, store.lines, store.dirty)
        )
    counts = Counts(
        requests=request.num_requests,
        unique=found.num_ids,
        hits=moves.num_hits,
        hit_requests=hit_requests,
        misses=found.num_ids - moves.num_hits,
        bypasses=found.num_ids - moves.num_cached,
        evictions=evictions,
        write_backs=write_backs,
        out_of_range=request.num_out_of_range,
        dropped=request.num_dropped,
        wide_exchanges=zero,
    )
    return state, moves, inverse, counts, rows


def lookup(state: EmbeddingState, plan: CachePlan, *, dtype: Any = jnp.float32) -> jax.Array:
    """Gathers the unique rows of a plan.

    A cached row is read from its float32 line, any other row from the table. Padding rows are zero.

    A later prefetch gives lines to other rows. The rows of a plan that is not the state's latest,
    or is of another state, are therefore NaN. If state and plan are concrete, the call raises
    ValueError instead.

    Args:
      state: the state that prefetch returned with the plan.
      plan: from that prefetch.
      dtype: dtype of the result; apply_gradients needs float32 rows.

    Returns:
      [U, D] in dtype.

    Raises:
      TypeError: if state or plan has another type.
      ValueError: if the state was donated, or if the plan is concrete and not of the state's latest
        prefetch.
    """
    arguments.check_state("lookup(state, plan)", state)
    arguments.check_plan("lookup(state, plan)", plan)
    _check_latest("lookup", state, plan)
    is_valid = is_latest(state, plan)
    held = ops.lookup(state.store, _moves(plan), is_valid, implementation=state.implementation)
    return devices.delivered(state, plan, held, is_valid).astype(dtype)


def lookup_held(state: EmbeddingState, plan: CachePlan) -> jax.Array:
    """Gathers the planned rows that this device holds.

    On a mesh, these are the rows of its shard that any device requests. Each row of the batch is on
    exactly one shard. `exchange.fetch`, which is differentiable, brings the rows to the devices
    that request them.

    Returns:
      float32 [Q, D]. On one device, these are the rows of `lookup`, without its check of the plan.
    """
    return ops.lookup(state.store, _moves(plan), implementation=state.implementation)


def _moves(plan: CachePlan) -> Moves:
    ids, num_cached, num_ids = plan.placed
    return Moves(
        ids, plan.line, plan.victim_ids, jnp.sum(plan.is_hit, dtype=jnp.int32), num_cached, num_ids
    )


def apply_gradients(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Applies exactly one optimizer update to each unique row of the plan and stores the row.

    A cached row is written to its line in float32. A bypassed row is rounded into the table by the
    rule of its format. A row that its update does not move keeps its stored bits. Donate the state.
    A plan that is not the state's latest, is of another state, or was already applied, changes
    nothing and is counted in `stats`. If state and plan are concrete, the call raises ValueError
    instead.

    Args:
      state: from prefetch; consumed if donated.
      plan: from the same prefetch.
      rows: float32 [U, D], from lookup.
      row_grads: float32 [U, D], the gradient with respect to rows.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      TypeError: if state or plan has another type.
      ValueError: if a shape or dtype is wrong, if tx is not the one given to init, if the state was
        donated, or on a second call for one prefetch.
    """
    _check_kinds("apply_gradients", state, plan)
    if state.layout is not None:  # this device updates the rows of its shard
        width = plan.unique_ids.shape[0]
        _check("apply_gradients", state, plan, width, rows=rows, row_grads=row_grads)
        row_grads = devices.collected("apply_gradients", state, plan, row_grads)
        rows = lookup_held(state, plan)
    return apply_held_gradients(state, plan, rows, row_grads, tx=tx)


def apply_held_gradients(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    row_grads: jax.Array,
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Does what `apply_gradients` does, for the rows that `lookup_held` returned.

    Args:
      state: from prefetch; consumed if donated.
      plan: from the same prefetch.
      rows: float32 [Q, D], from lookup_held.
      row_grads: float32 [Q, D], summed over all devices.
      tx: the transformation given to init.

    Returns:
      The state.

    Raises:
      ValueError: as apply_gradients.
    """
    moves, is_pending = _pending(state, plan)
    _check("apply_gradients", state, plan, moves.ids.shape[0], rows=rows, row_grads=row_grads)
    is_updated = moves.is_row
    num_nonfinite = jnp.int32(0)
    if state.spec.skip_nonfinite:
        is_finite = jnp.all(jnp.isfinite(row_grads), axis=-1)
        num_nonfinite = jnp.sum(is_updated & ~is_finite, dtype=jnp.int32)
        is_updated = is_updated & is_finite
    moves = moves.only(is_updated, state.store.num_lines)
    state, is_stored = update.apply(
        tx, state, moves, rows, row_grads, step=plan.number, is_applied=is_pending
    )
    num_nonfinite = devices.total(state, num_nonfinite)
    stored = moves.only(is_stored, state.store.num_lines)
    return _finish(state, plan, stored, num_nonfinite, is_pending)


def apply_positions(
    state: EmbeddingState,
    plan: CachePlan,
    rows: jax.Array,
    positions: Positions,
    *,
    tx: optax.GradientTransformation,
) -> EmbeddingState:
    """Applies one update to each unique row, like apply_gradients, from the gradients of positions.

    The update sums the gradients of a row's positions itself. A GPU kernel sums and updates row by
    row, without an array of row gradients.

    Args:
      state: from prefetch.
      plan: from the same prefetch.
      rows: float32 [U, D], from lookup.
      positions: see pooling.positions.
      tx: the transformation given to init. It has a rule (see `optim.rule_of`).

    Returns:
      The state.

    Raises:
      ValueError: as apply_gradients.
    """
    _check("apply_pooled_gradients", state, plan, plan.unique_ids.shape[0], rows=rows)
    moves, is_pending = _pending(state, plan)
    state, is_updated, is_stored = update.apply_summed(
        tx, state, moves, rows, positions, step=plan.number
    )
    num_nonfinite = moves.num_ids - jnp.sum(is_updated, dtype=jnp.int32)
    stored = moves.only(is_stored, state.store.num_lines)
    return _finish(state, plan, stored, num_nonfinite, is_pending)


def gradient_norm(state: EmbeddingState, plan: CachePlan, row_grads: jax.Array) -> jax.Array:
    """Returns the L2 norm of the gradients of all rows of a batch.

    Use it to clip the gradients of rows and of other parameters by one norm. Over a mesh, a device
    has only its part of a row's gradient. The parts are first summed, as by apply_gradients. All
    devices therefore get the norm that one device would get for the whole batch. Padding rows do
    not count, even if their gradients are NaN (as those of rows / norm(rows) are).

    Args:
      state: from prefetch; not consumed.
      plan: from the same prefetch.
      row_grads: float32 [U, D], the gradient with respect to the rows that `lookup` returned.

    Returns:
      float32 [].

    Raises:
      TypeError: if the state or the plan has another type.
      ValueError: if the shape or dtype is wrong, if the plan is known to be old, of another state
        or applied already, or if the state was donated.
    """
    _check_kinds("gradient_norm", state, plan)
    _check("gradient_norm", state, plan, plan.unique_ids.shape[0], row_grads=row_grads)
    row_grads = devices.collected("gradient_norm", state, plan, row_grads)
    is_row = _moves(plan).is_row
    squares = jnp.square(jnp.where(is_row[:, None], row_grads, jnp.float32(0)))
    return jnp.sqrt(devices.total(state, jnp.sum(squares)))


def _check_kinds(verb: str, state: Any, plan: Any) -> None:
    """Checks the types of the state and the plan that a verb was given."""
    call = f"{verb}(state, plan, ..)"
    arguments.check_state(call, state)
    arguments.check_plan(call, plan)


def _check(
    verb: str, state: EmbeddingState, plan: CachePlan, width: int, **arrays: jax.Array
) -> None:
    """Checks shapes and dtypes of `arrays`, of `width` rows each, and that the plan may be applied.

    If state.pending is traced, `_pending` checks on the device whether the plan was applied.

    Raises:
      TypeError: if one of `arrays` is not an array.
      ValueError: if a check fails.
    """
    call = f"{verb}(state, plan, ..)"
    expected = (width, state.spec.embedding_dim)
    for name, array in arrays.items():
        if not hasattr(array, "shape"):
            raise TypeError(
                f"{call}: {name} must be an array, float32 {expected}, got {type(array).__name__}"
            )
        if array.shape != expected:
            raise ValueError(
                f"{name} must be float32 {expected}, one row per unique id of the plan, got "
                f"{array.dtype} {array.shape}; differentiate with respect to the rows that lookup "
                "returned"
            )
        if array.dtype != jnp.float32:
            raise ValueError(
                f"{name} must be float32 {expected}, got {array.dtype}; keep the rows in float32 "
                "and cast the vectors computed from them"
            )
    check_waiting(verb, "prefetch", state, plan)


class Numbered(Protocol):
    """What a CachePlan and a `vectors.VectorPlan` have in common."""

    @property
    def step(self) -> jax.Array:
        """int32 []: the step of the state that came with the plan."""

    @property
    def signature(self) -> jax.Array:
        """uint32 []: the signature of that state."""

    @property
    def number(self) -> jax.Array:
        """int32 []: the number of the prefetch or embed that made the plan."""


def check_waiting(verb: str, planner: str, state: EmbeddingState, plan: Numbered) -> None:
    """Raises ValueError if no plan of the verb `planner` is pending, or if `plan` is an old one.

    Values that are traced are not checked.
    """
    if not isinstance(state.pending, jax.core.Tracer) and not bool(state.pending):
        raise ValueError(
            f"{verb} needs its own {planner}, but this state has none waiting (it comes from "
            f"init, or its plan was already applied); call {planner} once before each {verb}"
        )
    _check_latest(verb, state, plan)


def _check_latest(verb: str, state: EmbeddingState, plan: Numbered) -> None:
    """Raises ValueError if a plan is known not to come from the state's latest prefetch."""
    told = (state.step, state.key, state.counters, plan.step, plan.signature)
    if any(isinstance(x, jax.core.Tracer) for x in told):
        return
    made, latest = int(plan.number), int(state.step) - 1
    if made != latest:
        raise ValueError(
            f"{verb} needs the plan of the state's latest prefetch, number {latest}, and got the "
            f"plan of number {made}: its rows may have left their lines since; pass the state and "
            "the plan that one prefetch returned"
        )
    if int(plan.signature) != int(state.signature):
        raise ValueError(
            f"{verb} needs the plan of the state's latest prefetch, number {latest}, and got the "
            "plan of another state; pass the state and the plan that one prefetch returned"
        )


def is_planned(state: EmbeddingState, plan: Numbered) -> bool:
    """Returns whether, within a trace, state and plan are known to come from one prefetch."""
    return isinstance(state.step, jax.core.Tracer) and plan.step is state.step


def is_latest(state: EmbeddingState, plan: Numbered) -> jax.Array:
    """Returns whether a plan comes from this state's latest prefetch (bool []).

    Plans of other states are recognized by the state's signature: a hash of its key, fingerprint
    and counts of requests. Two copies of one state with equal counts are not told apart.
    """
    if is_planned(state, plan):
        return state.is_own  # its clock was compared by after_prefetch
    return state.is_sound & (plan.step == state.step) & (plan.signature == state.signature)


def _pending(state: EmbeddingState, plan: CachePlan) -> tuple[Moves, jax.Array]:
    """Returns the rows that an update may touch, and whether the plan is pending (bool []).

    A plan is pending if it is the state's latest and was not applied yet. If it is not pending, an
    update must not touch any row.
    """
    is_pending = state.pending & is_latest(state, plan)
    moves = _moves(plan)
    num_cached = jnp.where(is_pending, moves.num_cached, 0)
    num_ids = jnp.where(is_pending, moves.num_ids, 0)
    return moves._replace(num_cached=num_cached, num_ids=num_ids), is_pending


def _finish(
    state: EmbeddingState,
    plan: CachePlan,
    moves: Moves,
    num_nonfinite: jax.Array,
    is_pending: jax.Array,
) -> EmbeddingState:
    """Returns the state after an update that stored the rows of `moves`.

    Their lines are marked dirty, and the update is counted.
    """
    cache = None if state.cache is None else residency.commit(state.cache, moves.line)
    return finished(dataclasses.replace(state, cache=cache), plan, num_nonfinite, is_pending)


def finished(
    state: EmbeddingState,
    plan: Numbered,
    num_nonfinite: jax.Array,
    is_applied: jax.Array,
) -> EmbeddingState:
    """Counts an update, and returns the state after it.

    No plan is pending any more, unless the update was refused.
    """
    is_pending = np.False_ if is_planned(state, plan) else jnp.asarray(state.pending) & ~is_applied
    return dataclasses.replace(
        state,
        pending=is_pending,
        counters=count_updates(state.counters, num_nonfinite, ~is_applied),
    )
