"""The exchange between shards in one step: ids to their owners, rows back, gradients to the owners.

A device deduplicates its ids first. Each row that the device requests then travels once in each
direction. With `Placement.summation_blocks`, it travels once for each block that uses it.
all_to_all moves arrays of a fixed size, which have the same room for each owner. If a device has
more ids for one owner than fit, all devices use full-width arrays in that step, and the step is
counted. No id is lost. Owners deduplicate the ids that they receive. Each row is therefore planned,
gathered and updated once. The occurrences and gradients of a row are summed over devices. If
several devices hold the same shard, they are its replicas. All replicas of a shard gather the same
requests and compute the same results.

The scheme follows the row-wise sharding of embeddings in FBGEMM and TorchRec. It does not use
ragged_all_to_all, because some back ends cannot run that operation.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.cache.plan import CachePlan, Counts, Route
from mpembed_jax.mesh import requests
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.numerics import random_bits
from mpembed_jax.ops import Moves, Request, Unique
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import TablesOfIds


def route_of(plan: CachePlan) -> Route:
    """Returns the route of a plan.

    Raises:
      ValueError: if the plan was made on one device.
    """
    if plan.route is None:
        raise ValueError(
            "this plan was made by a state of one device: pass the plan of the state's own prefetch"
        )
    return plan.route


def plan_specs(layout: Layout) -> CachePlan:
    """Returns the PartitionSpecs of a plan, as a prefix of its tree.

    Use them as out_specs of a jax.shard_map that returns a plan, and as in_specs of a jax.shard_map
    that takes a plan.
    """
    specs: Any = [PartitionSpec(axes or None) for axes in (layout.batch_axes, layout.axes)]
    batch, shard = specs
    everywhere: Any = PartitionSpec()
    route: Any = route_specs(layout)
    whole = (everywhere,) * 3  # counts, step, signature
    return CachePlan(batch, batch, shard, shard, shard, *whole, route)


def route_specs(layout: Layout) -> Route:
    """Returns the PartitionSpecs of a route."""
    specs: Any = [PartitionSpec(axes or None) for axes in (layout.axes, layout.all_axes)]
    shard, both = specs
    everywhere: Any = PartitionSpec()
    return Route(shard, shard, shard, shard, both, both, everywhere)


def _width(layout: Layout, num_entries: int, is_wide: bool) -> int:
    """Returns how many entries a device sends to each owner: all if is_wide, else the room."""
    # If the batch is not divided over the sharding axes, all devices along these axes have the same
    # ids. Each device then requests its own part of the ids.
    if not layout.is_batch_divided:
        num_entries = -(-num_entries // layout.shards)
    return max(1, num_entries) if is_wide else layout.room(max(1, num_entries))


def _either(layout: Layout, is_wide: jax.Array, num_entries: int, run: Callable) -> Any:
    """Returns run(width), where width is that of `_width`. `is_wide` may be traced."""
    narrow, wide = _width(layout, num_entries, False), _width(layout, num_entries, True)
    if narrow == wide:
        return run(wide)
    return lax.cond(is_wide, lambda: run(wide), lambda: run(narrow))


def _assign(
    layout: Layout, ids: jax.Array, implementation: ops.Named
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the owner, the local row and the rank of each entry (int32 [U] each).

    The rank is the entry's position among the entries with the same owner.
    """
    owner, row = layout.home_of(ids)
    owner, rank = _ranked(layout, owner, implementation)
    return owner, row, rank


def _ranked(
    layout: Layout, owner: jax.Array, implementation: ops.Named
) -> tuple[jax.Array, jax.Array]:
    """Returns the owner and the rank of each entry (int32 [U] each).

    If the batch is not divided over the sharding axes, this device sends only a part of the
    entries. The others get the owner P.
    """
    if not layout.is_batch_divided:
        is_mine = jnp.arange(owner.shape[0], dtype=jnp.int32) % layout.shards == layout.index()
        owner = jnp.where(is_mine, owner, layout.shards)
    if ops.has_kernels(implementation):
        return owner, _ranks(owner, layout.shards)
    rank = jnp.zeros_like(owner)
    # One machine has few shards. For so few, one pass per shard is faster than a sort on a CPU.
    for shard in range(layout.shards):
        is_here = owner == shard
        rank = jnp.where(is_here, jnp.cumsum(is_here.astype(jnp.int32)) - 1, rank)
    return owner, rank


def _ranks(owner: jax.Array, shards: int) -> jax.Array:
    """Returns the rank of each entry (int32 [U]) among those with its owner, by one sort.

    A cumulative sum per shard, as in `_ranked`, would take several launches each on a GPU.
    """
    position = jnp.arange(owner.shape[0], dtype=jnp.int32)
    by_owner, order = lax.sort_key_val(owner, position)  # stable
    first = jnp.where(indexing.starts(by_owner), by_owner, shards + 1)
    first = indexing.put(jnp.zeros(shards + 1, jnp.int32), first, position)
    return indexing.put(jnp.zeros_like(owner), order, position - indexing.take(first, by_owner))


def _place(layout: Layout, owner: jax.Array, rank: jax.Array, width: int) -> jax.Array:
    """Returns the position of each entry in the array that this device sends.

    An entry that is not sent gets a position past the end of the array.
    """
    is_sent = (owner < layout.shards) & (rank < width)
    return jnp.where(is_sent, owner * width + rank, layout.shards * width)


def _swap(layout: Layout, values: jax.Array) -> jax.Array:
    """Exchanges blocks of [P * width, ..] between the shards.

    Block p goes to shard p. Block p of the result comes from shard p.
    """
    if layout.shards == 1:
        return values
    return lax.all_to_all(values, layout.axes, 0, 0, tiled=True)


def _gather_replicas(layout: Layout, values: jax.Array) -> jax.Array:
    """Returns [replicas * n, ..], the concatenation of [n, ..] over the replicas of a shard.

    All replicas of a shard get the same result.
    """
    if not layout.replica_axes:
        return values
    return lax.all_gather(values, layout.replica_axes, tiled=True, to="invarying")


def _replica_part(layout: Layout, values: jax.Array) -> jax.Array:
    """Returns this replica's part [n, ..] of [replicas * n, ..]."""
    if not layout.replica_axes:
        return values
    size = values.shape[0] // layout.replicas
    return lax.dynamic_slice_in_dim(
        values, lax.axis_index(layout.replica_axes).astype(jnp.int32) * size, size
    )


def _is_wide(
    layout: Layout, owner: jax.Array, rank: jax.Array, num_entries: int, axes: tuple[str, ...]
) -> jax.Array:
    """Returns whether any device along `axes` has more entries for an owner than the room."""
    room = _width(layout, num_entries, False)
    is_over = jnp.any((owner < layout.shards) & (rank >= room))
    return _sum(is_over.astype(jnp.int32), axes) > 0


def _deliver(
    layout: Layout, owner: jax.Array, rank: jax.Array, values: jax.Array, empty: jax.Array
) -> jax.Array:
    """Sends values [U, ..] to their owners; returns the values that this shard receives.

    All replicas of a shard receive the same values. `empty` [P * width, ..] fills the places for
    which this device has no value.
    """
    place = _place(layout, owner, rank, empty.shape[0] // layout.shards)
    return _gather_replicas(layout, _swap(layout, indexing.put(empty, place, values)))


def _sum(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(value, axes) if axes else value


# --- ids to owners


def ask(
    layout: Layout,
    leaves: list[jax.Array],
    step: jax.Array,
    tables: TablesOfIds | None,
    implementation: ops.Named,
) -> Request:
    """Sends this device's distinct ids to their owners; returns the requests for this shard's rows.

    Args:
      layout: the stack's layout.
      leaves: the ids of this device, int32 [..] or pairs [.., 2].
      step: int32 scalar.
      tables: for each of `leaves`, the names of the tables to which its ids belong (see
        `spec.TablesOfIds`). None if they are not known.
      implementation: see ops.IMPLEMENTATIONS.
    """
    layout.check_bound("prefetch")
    own, num_requests, num_out_of_range = requests.deduplicate(
        layout, leaves, step, tables, implementation
    )
    num_dropped = own.num_dropped
    num_positions = own.inverse.shape[0]
    rows, own, route = request(layout, own, step, implementation)
    num_dropped = total_over_batch(layout, num_dropped) + total_over_shards(
        layout, rows.num_dropped
    )
    return Request(
        rows,
        own,
        num_requests,
        num_out_of_range,
        num_dropped,
        layout.positions(num_positions),
        route,
    )


def settle(
    layout: Layout, asked: Request, moves: Moves, inverse: jax.Array, counts: Counts
) -> tuple[Route, Counts]:
    """Returns the route to the planned rows, and the counts of the whole batch.

    Args:
      layout: the stack's layout.
      asked: the result of `ask`.
      moves: the rows of this shard, in the plan's order.
      inverse: int32 [received], for each received id, the index of its row in `moves`.
      counts: the counts of this device's requests and of this shard's rows.
    """
    assert asked.route is not None
    route = dataclasses.replace(
        asked.route,
        rows=moves.ids,
        num_cached=moves.num_cached[None],
        num_rows=moves.num_ids[None],
        asked=inverse,
    )
    return route, total_counts(layout, counts, route)


@jax.named_scope("exchange_ids")
def request(
    layout: Layout, wanted: Unique, step: jax.Array, implementation: ops.Named
) -> tuple[Unique, Unique, Route]:
    """Sends a device's unique ids to their owners, which deduplicate the ids that they receive.

    The budget is `max_unique_ids` of the stack. If the whole batch has more distinct ids, the ids
    with the smallest fmix32(id xor step) stay. On one device, the same ids would stay.

    Args:
      layout: the stack's layout.
      wanted: the distinct ids of this device's share of the batch. NO_ID may appear anywhere among
        them.
      step: int32 scalar.
      implementation: see ops.IMPLEMENTATIONS.

    Returns:
      Three results:
      - The distinct local rows that any device requests from this shard. The `inverse` of this
        result has one element per received entry.
      - `wanted`, with padding in place of ids over the budget, in `ids` and in `inverse`.
      - The route. `settle` replaces its `rows`, `num_cached`, `num_rows` and `asked`.
    """
    num_entries = wanted.ids.shape[0] - 1
    budget = layout.spec.max_unique_ids
    owner, row, rank = _assign(layout, wanted.ids, implementation)
    is_wide = _is_wide(layout, owner, rank, num_entries, layout.all_axes)
    num_received = layout.replicas * layout.shards * _width(layout, num_entries, True)
    size = min(num_received, layout.num_rows) + 1
    entries = jnp.stack([row, wanted.counts], axis=1)

    def send(width: int) -> Unique:
        empty = jnp.broadcast_to(jnp.asarray([NO_ID, 0], jnp.int32), (layout.shards * width, 2))
        received = _deliver(layout, owner, rank, entries, empty)
        found = ops.unique(
            received[:, 0], received.shape[0] + 1, step, implementation=implementation
        )
        counts = indexing.add(jnp.zeros_like(found.ids), found.inverse, received[:, 1])
        # There are at most `size - 1` distinct rows, so the cuts to `size` remove only padding.
        padding = max(0, size - found.ids.shape[0])
        return Unique(
            jnp.pad(found.ids, (0, padding), constant_values=NO_ID)[:size],
            jnp.pad(
                jnp.minimum(jnp.where(received[:, 0] == NO_ID, size - 1, found.inverse), size - 1),
                (0, num_received - received.shape[0]),
                constant_values=size - 1,
            ),
            jnp.pad(counts, (0, padding))[:size],
            found.num_ids,
            jnp.int32(0) * found.num_ids,
        )

    found = Unique(*_either(layout, is_wide, num_entries, lambda width: tuple(send(width))))
    num_rows = found.num_ids[None]
    route = Route(found.ids, num_rows, num_rows, found.inverse, owner, rank, is_wide)
    if budget is not None and budget < min(layout.batch_shards * num_entries, layout.spec.num_rows):
        found, wanted, route = _keep_budget(layout, found, wanted, route, budget, step)
    return found, wanted, route


def _keep_budget(
    layout: Layout, found: Unique, wanted: Unique, route: Route, budget: int, step: jax.Array
) -> tuple[Unique, Unique, Route]:
    size = found.ids.shape[0]
    shard = layout.shard(layout.index())
    is_real = found.ids != NO_ID
    mixed = random_bits.fmix32(shard.ids_of(found.ids)[0] ^ step.astype(jnp.uint32))

    def drop() -> tuple:
        # The loop finds, one bit at a time, the largest limit with at most `budget` ids below the
        # limit on all shards together.
        def try_bit(turn: jax.Array, limit: jax.Array) -> jax.Array:
            candidate = limit | (jnp.uint32(1) << jnp.asarray(31 - turn, jnp.uint32))
            below = jnp.sum(is_real & (mixed < candidate), dtype=jnp.int32)
            return jnp.where(_sum(below, layout.axes) <= budget, candidate, limit)

        kept = is_real & (mixed < lax.fori_loop(0, 32, try_bit, jnp.uint32(0)))
        rank = jnp.cumsum(kept.astype(jnp.int32)) - 1
        place = jnp.where(kept, rank, size)
        moved = jnp.where(kept, rank, size - 1)
        inverse = indexing.take(moved, found.inverse)
        ids = indexing.put(jnp.full_like(found.ids, NO_ID), place, found.ids)
        counts = indexing.put(jnp.zeros_like(found.counts), place, found.counts)
        num_ids = jnp.sum(kept, dtype=jnp.int32)
        answers = (inverse != size - 1).astype(jnp.int32)
        answer = _return(
            layout,
            dataclasses.replace(route, asked=jnp.arange(len(answers), dtype=jnp.int32)),
            answers[:, None],
        )
        has_row = answer[:, 0] > 0
        wanted_inverse = jnp.where(
            indexing.take(has_row, wanted.inverse), wanted.inverse, wanted.ids.shape[0] - 1
        )
        wanted_ids = jnp.where(has_row.reshape(-1, *[1] * (wanted.ids.ndim - 1)), wanted.ids, NO_ID)
        return ids, inverse, counts, num_ids, found.num_ids - num_ids, wanted_ids, wanted_inverse

    def keep() -> tuple:
        return (
            found.ids,
            found.inverse,
            found.counts,
            found.num_ids,
            found.num_dropped,
            wanted.ids,
            wanted.inverse,
        )

    result = lax.cond(_sum(found.num_ids, layout.axes) > budget, drop, keep)
    most = min(size, budget + 1)  # From here on, no shard has more rows than the budget.
    ids, inverse, counts, num_ids, num_dropped, wanted_ids, wanted_inverse = result
    ids, counts = ids[:most], counts[:most]
    inverse = jnp.minimum(inverse, most - 1)
    found = Unique(ids, inverse, counts, num_ids, num_dropped)
    wanted = wanted._replace(ids=wanted_ids, inverse=wanted_inverse)
    return found, wanted, dataclasses.replace(route, rows=ids, asked=inverse)


def ask_owners(
    layout: Layout,
    owner: jax.Array,
    entries: jax.Array,
    padding: jax.Array,
    implementation: ops.Named,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Sends entries to their owners; an owner can answer each entry with a number.

    Args:
      layout: the stack's layout.
      owner: int32 [U]: the owner of each entry; P for no owner. The last entry has no owner.
      entries: [U, k].
      padding: [k]: the entry that fills empty places.
      implementation: see ops.IMPLEMENTATIONS.

    Returns:
      Two results:
      - The entries [R, k] that this shard received, with padding among them.
      - A function that sends the answers to the devices that asked. It takes the answers of this
        shard to the R entries (int32 [R], the same on all replicas). It returns the answers to
        this device's own entries (int32 [U], 0 for an entry without an owner).
    """
    num_entries = owner.shape[0] - 1
    owner, rank = _ranked(layout, owner, implementation)
    is_wide = _is_wide(layout, owner, rank, num_entries, layout.all_axes)
    num_received = layout.replicas * layout.shards * _width(layout, num_entries, True)

    def send(width: int) -> jax.Array:
        empty = jnp.broadcast_to(padding, (layout.shards * width, padding.shape[0]))
        received = _deliver(layout, owner, rank, entries, empty)
        missing = jnp.broadcast_to(padding, (num_received - received.shape[0], padding.shape[0]))
        return jnp.concatenate([received, missing])

    def bring(answers: jax.Array) -> jax.Array:
        here = jnp.arange(num_received, dtype=jnp.int32)
        none = jnp.zeros(1, jnp.int32)
        route = Route(none, none, none, here, owner, rank, is_wide)
        return _return(layout, route, answers[:, None])[:, 0]

    return _either(layout, is_wide, num_entries, send), bring


# --- rows to the devices, gradients to the owners


def _return(layout: Layout, route: Route, rows: jax.Array) -> jax.Array:
    """Returns the rows [U, ..] of this device's entries; `rows` [Q, ..] belong to its own shard.

    An entry without an owner gets zeros.
    """

    def send(width: int) -> jax.Array:
        asked = _replica_part(layout, route.asked[: layout.replicas * layout.shards * width])
        answers = _swap(layout, indexing.take(rows, asked))
        return indexing.take(answers, _place(layout, route.owner, route.rank, width), 0)

    received = _either(layout, route.is_wide, route.owner.shape[0] - 1, send)
    return received if layout.is_batch_divided else _sum(received, layout.axes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("exchange_rows")
def fetch(layout: Layout, implementation: ops.Named, route: Route, rows: jax.Array) -> jax.Array:
    """Returns the rows [U, D] of this device's unique ids, taken from the owners' rows [Q, D].

    The last row of each owner must be zero, because ids without a row get the last row. `collect`
    computes the gradient with respect to the owners' rows.
    """
    return _return(layout, route, rows)


@jax.named_scope("exchange_gradients")
def collect(
    layout: Layout, implementation: ops.Named, route: Route, row_grads: jax.Array
) -> jax.Array:
    """Returns the summed gradients [Q, D] of a shard's rows, from all devices' gradients [U, D].

    The gradients of one row are added in the order of the devices. With more than 32 devices, a
    kernel uses another fixed order.
    """

    def send(width: int) -> jax.Array:
        empty = jnp.zeros((layout.shards * width, row_grads.shape[1]), row_grads.dtype)
        received = _deliver(layout, route.owner, route.rank, row_grads, empty)
        return ops.sum_duplicates(
            received,
            route.asked[: received.shape[0]],
            route.rows.shape[0],
            implementation=implementation,
        )

    return _either(layout, route.is_wide, route.owner.shape[0] - 1, send)


def _fetch_fwd(
    layout: Layout, implementation: ops.Named, route: Route, rows: jax.Array
) -> tuple[jax.Array, Route]:
    return fetch(layout, implementation, route, rows), route


def _fetch_bwd(
    layout: Layout, implementation: ops.Named, route: Route, row_grads: jax.Array
) -> tuple[None, jax.Array]:
    return None, collect(layout, implementation, route, row_grads)


fetch.defvjp(_fetch_fwd, _fetch_bwd)


def find(
    layout: Layout,
    planned: Route,
    leaves: list[jax.Array],
    step: jax.Array,
    implementation: ops.Named,
) -> tuple[jax.Array, jax.Array, Route]:
    """Finds ids among the planned rows of all shards.

    Args:
      layout: the stack's layout.
      planned: the plan's route.
      leaves: ids of this device, int32 [..] or pairs [.., 2]. They may differ from the prefetched
        ids.
      step: int32 scalar: the step of the plan.
      implementation: see ops.IMPLEMENTATIONS.

    Returns:
      Three results:
      - For each position, the index of its entry on this device (int32 [N]). Padding has the last
        index.
      - For each position, whether the plan lacks its row (bool [N]).
      - The route with which `fetch` brings the rows of the entries.
    """
    wanted, _, _ = requests.deduplicate(layout, leaves, step, None, implementation)
    asked, own, route = request(layout, wanted, step, implementation)
    index, _ = ops.find(planned.rows, asked.ids)
    route = dataclasses.replace(
        planned,
        asked=indexing.take(index, route.asked),
        owner=route.owner,
        rank=route.rank,
        is_wide=route.is_wide,
    )
    is_row = (planned.rows != NO_ID).astype(jnp.int32)
    has_row = _return(layout, route, is_row[:, None])[:, 0] > 0
    is_padding = wanted.inverse == wanted.ids.shape[0] - 1
    return own.inverse, ~is_padding & ~indexing.take(has_row, wanted.inverse), route


@jax.named_scope("exchange_update")
def over_shards(
    layout: Layout, update: Callable, row_grads: jax.Array, row_state: Any, rows: jax.Array
) -> tuple[jax.Array, Any]:
    """Runs an optimizer's update on the rows of all shards; returns this shard's part.

    Every shard gathers the rows of all shards and computes the same update. Only optimizers that
    mix rows need this.

    Args:
      layout: the stack's layout.
      update: an optax update.
      row_grads: float32 [Q, D].
      row_state: a tree of arrays [Q, ..] and scalars.
      rows: float32 [Q, D].
    """
    if not layout.axes:
        return update(row_grads, row_state, rows)

    def of_all(values: jax.Array) -> jax.Array:
        values = jnp.asarray(values)
        if not values.ndim:
            return values
        return lax.all_gather(values, layout.axes, tiled=True, to="invarying")

    def own(values: jax.Array) -> jax.Array:
        values = jnp.asarray(values)
        size = rows.shape[0]
        if not values.ndim:
            return values
        return lax.dynamic_slice_in_dim(values, layout.index() * size, size)

    return jax.tree.map(own, update(*jax.tree.map(of_all, (row_grads, row_state, rows))))


def read(
    layout: Layout,
    ids: jax.Array,
    read_rows: Callable[[jax.Array], jax.Array],
    implementation: ops.Named,
) -> jax.Array:
    """Returns the rows [N, D] of ids [N] (or pairs [N, 2]).

    The owner of an id reads the id's row. `read_rows` takes local rows [n] and returns their values
    [n, D].
    """
    wanted = requests.distinct(layout, ids, ids.shape[0] + 1, jnp.int32(0), implementation)
    owner, row, rank = _assign(layout, wanted.ids, implementation)
    num_entries = ids.shape[0]
    is_wide = _is_wide(layout, owner, rank, num_entries, layout.axes)

    def send(width: int) -> jax.Array:
        place = _place(layout, owner, rank, width)
        asked = _swap(
            layout, indexing.put(jnp.full(layout.shards * width, NO_ID, jnp.int32), place, row)
        )
        return indexing.take(_swap(layout, read_rows(asked)), place, 0)

    rows = _either(layout, is_wide, num_entries, send)
    rows = rows if layout.is_batch_divided else _sum(rows, layout.axes)
    return indexing.take(rows, wanted.inverse)


# --- counts


def total_counts(layout: Layout, counts: Counts, route: Route) -> Counts:
    """Returns the counts of the whole batch, which are the same on every device.

    Each device counts `requests` and `out_of_range`. These are summed over the devices of the
    batch. Each shard counts its rows (for example `hits`). These counts are summed over shards.
    """
    by_device = {
        name: total_over_batch(layout, getattr(counts, name))
        for name in ("requests", "out_of_range")
    }
    by_shard = {
        name: total_over_shards(layout, getattr(counts, name))
        for name in (
            "unique",
            "hits",
            "hit_requests",
            "misses",
            "bypasses",
            "evictions",
            "write_backs",
        )
    }
    return dataclasses.replace(
        counts, **by_device, **by_shard, wide_exchanges=route.is_wide.astype(jnp.int32)
    )


def total_over_batch(layout: Layout, value: jax.Array) -> jax.Array:
    """Sums a per-device scalar over all devices that share a batch."""
    return _sum(value, layout.batch_axes)


def total_over_shards(layout: Layout, value: jax.Array) -> jax.Array:
    """Sums a per-shard scalar over all shards."""
    return _sum(value, layout.axes)
