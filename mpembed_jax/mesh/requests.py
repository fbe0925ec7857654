"""The requests of one device of a mesh: the distinct ids of its share of a batch.

Ids of a stack of fewer than 2^31 - 1 rows are int32. Ids of a larger stack are pairs (shard, local
row), which `sharding.pairs` computes on the host in 64 bits. With summation blocks, ids are
distinct only within a block.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpembed_jax import ops, row_ids
from mpembed_jax.arrays import indexing
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.ops import Unique
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import TablesOfIds, most_distinct


def masked(layout: Layout, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Replaces ids [N] (or pairs [N, 2]) outside the stack by padding, and counts them.

    Returns:
      The ids, the number of requests, and the number of ids outside the stack. Padding is in
      neither number.
    """
    if not layout.is_paired:
        is_row = row_ids.in_range(ids, layout.spec.num_rows)
        is_padding = ids == NO_ID
        masked = jnp.where(is_row, ids, NO_ID)
    else:
        shard, row = ids[:, 0], ids[:, 1]
        rows = jnp.asarray(layout.first_rows[:, -1])[jnp.clip(shard, 0, layout.shards - 1)]
        is_row = (shard >= 0) & (shard < layout.shards) & (row >= 0) & (row < rows)
        is_padding = row == NO_ID
        masked = jnp.where(is_row[:, None], ids, jnp.asarray([layout.shards, NO_ID], jnp.int32))
    return masked, jnp.sum(is_row, dtype=jnp.int32), jnp.sum(~is_row & ~is_padding, dtype=jnp.int32)


def distinct(
    layout: Layout, ids: jax.Array, size: int, step: jax.Array, implementation: ops.Named
) -> Unique:
    """Returns ops.unique of ids [N] or of pairs [N, 2]; its ids are [size] or [size, 2].

    Raises:
      ValueError: if there are too many pairs: (N + 1) * P must be below 2**31 - 1.
    """
    find = partial(ops.unique, implementation=implementation)
    if not layout.is_paired:
        return find(ids, size, step)
    # Local rows are deduplicated first. The pair (number of the distinct row, shard) then fits in
    # 32 bits.
    num_ids = ids.shape[0]
    if (num_ids + 1) * layout.shards >= NO_ID:
        raise ValueError(
            f"{num_ids} ids per device are too many for one batch over {layout.shards} shards; "
            "use smaller batches"
        )
    rows = find(ids[:, 1], num_ids + 1, step)
    is_real = ids[:, 1] != NO_ID
    found = find(
        jnp.where(is_real, rows.inverse * layout.shards + ids[:, 0], NO_ID), num_ids + 1, step
    )
    is_id = found.ids != NO_ID
    shard = jnp.where(is_id, found.ids % layout.shards, layout.shards)
    row = indexing.take(rows.ids, jnp.where(is_id, found.ids // layout.shards, num_ids))
    return found._replace(ids=jnp.stack([shard, row], axis=1))


def deduplicate(
    layout: Layout,
    leaves: list[jax.Array],
    step: jax.Array,
    tables: TablesOfIds | None,
    implementation: ops.Named,
) -> tuple[Unique, jax.Array, jax.Array]:
    """Returns the distinct ids of a device, the number of requests and of ids outside the stack.

    Args:
      layout: the layout of the stack.
      leaves: int32 arrays [..], or pairs [.., 2].
      step: int32 scalar.
      tables: the tables that the ids belong to, or None.
      implementation: see ops.IMPLEMENTATIONS.

    Raises:
      ValueError: if summation blocks do not divide the leading axis of a leaf.
    """
    width = (2,) if layout.is_paired else ()
    ids, num_requests, num_out_of_range = masked(layout, row_ids.joined(leaves, width))
    num_ids = ids.shape[0]
    budget = layout.spec.max_unique_ids
    blocks = (
        1
        if layout.placement.summation_blocks is None
        else layout.placement.summation_blocks // layout.batch_shards
    )

    def find(ids: jax.Array) -> Unique:
        # The budget is for the whole batch. The ids that stay within it are the smallest (by hash),
        # so each of them is among the `budget` smallest of its device.
        most = ids.shape[0]
        if not layout.is_paired:
            sizes = [leaf.size // blocks for leaf in leaves]
            most = most_distinct(layout.spec.tables, tables, sizes)
            most = most if budget is None else min(budget, most)
        return distinct(layout, ids, most + 1, step, implementation)

    if blocks == 1:
        return find(ids), num_requests, num_out_of_range
    bad = [leaf.shape for leaf in leaves if not leaf.ndim or leaf.shape[0] % blocks]
    if bad:
        raise ValueError(
            f"{blocks} summation blocks per device must divide the leading axis of all ids, got "
            f"{bad[0]}"
        )
    sizes = [leaf.size // math.prod(width) for leaf in leaves]
    ends = np.cumsum(sizes)
    members = [
        np.arange(end - size, end).reshape(blocks, -1)
        for size, end in zip(sizes, ends, strict=True)
    ]
    position = np.concatenate(members, axis=1)  # one row of positions per block
    parts = [find(ids[position[block]]) for block in range(blocks)]
    size = parts[0].ids.shape[0] - 1  # of each part, not counting its padding entry
    last = blocks * size
    inverse = jnp.stack(
        [
            jnp.where(part.inverse == size, last, part.inverse + n * size)
            for n, part in enumerate(parts)
        ]
    )
    back = np.argsort(position.reshape(-1))
    found = Unique(
        jnp.concatenate([*[part.ids[:-1] for part in parts], parts[-1].ids[-1:]]),
        inverse.reshape(num_ids)[back],
        jnp.concatenate([*[part.counts[:-1] for part in parts], parts[-1].counts[-1:]]),
        sum((part.num_ids for part in parts), jnp.int32(0)),
        sum((part.num_dropped for part in parts), jnp.int32(0)),
    )
    return found, num_requests, num_out_of_range
