"""Raw ids over a mesh: pairs go to the shards that hold their sets, and rows come back.

A device sends each distinct pair of its share of a batch once, with its number of occurrences. The
shard that holds the set decides about the pairs of all devices. Its decisions are those of one
device with the whole batch, so an id has the same row for any number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.cache.spec import Geometry
from mpembed_jax.mesh import exchange
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.ops import Admission, Admitted
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.vocabulary import pool
from mpembed_jax.vocabulary.hashes import PADDING
from mpembed_jax.vocabulary.pool import VocabularyState


@jax.named_scope("exchange_raw_ids")
def admit(
    layout: Layout,
    vocabulary: VocabularyState,
    pairs: jax.Array,
    step: jax.Array,
    must_halve: jax.Array,
    rules: Admission,
    implementation: ops.Named,
) -> tuple[VocabularyState, Admitted]:
    """Gives rows of their own to the raw ids that earned them; see `ops.xla.admit.admit`.

    Args:
      layout: the stack's layout.
      vocabulary: this shard's part.
      pairs: uint32 [N, 2]: the raw ids of this device's share of the batch.
      step: uint32 scalar.
      must_halve: bool scalar: whether all uses and counters are halved first.
      rules: the rules of admission.
      implementation: see ops.IMPLEMENTATIONS.

    Returns:
      This shard's part, changed, and what was decided. `rows` are the global row numbers of this
      device's positions. `started` are local row numbers of this shard, and `num_started` and
      `num_recycled` count rows of this shard. All other counts are those of the whole batch.
    """
    asked, counts, back = _ask(layout, vocabulary.place_bits, pairs, implementation)
    part = pool.Part(layout.shards, layout.index())
    given = vocabulary, asked, step, must_halve, rules, counts, part
    vocabulary, made = ops.admit(*given, cache=None, implementation=implementation)
    lines = vocabulary.geometry.lines
    own = jnp.where(made.rows < lines, made.rows, lines)
    totals: Any = {
        name: exchange.total_over_shards(layout, getattr(made, name))
        for name in ("num_requests", "num_shared", "num_admitted", "num_refused")
    }
    rows = _global_rows(layout, vocabulary, pairs, back(own), rules.shared_rows)
    return vocabulary, made._replace(rows=rows, **totals)


@jax.named_scope("exchange_raw_ids")
def locate(
    layout: Layout,
    vocabulary: VocabularyState,
    pairs: jax.Array,
    per_table: int,
    implementation: ops.Named,
) -> jax.Array:
    """Returns the global row number of each id; see `pool.locate`.

    Args:
      layout: the stack's layout.
      vocabulary: this shard's part; not changed.
      pairs: uint32 [N, 2]: the raw ids of this device's share of the batch.
      per_table: shared rows per table.
      implementation: see ops.IMPLEMENTATIONS.

    Returns:
      int32 [N]; NO_ID for padding.
    """
    asked, _, back = _ask(layout, vocabulary.place_bits, pairs, implementation)
    geometry = vocabulary.geometry
    sets = pool.sets_of(asked, vocabulary.sizes, layout.shards)
    way = pool.ways_of(vocabulary, sets, pool.tags_of(asked))
    own = jnp.where(way < geometry.ways, pool.row_of(sets, way, geometry), geometry.lines)
    return _global_rows(layout, vocabulary, pairs, back(own), per_table)


def _ask(
    layout: Layout, place_bits: int, pairs: jax.Array, implementation: ops.Named
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Sends this device's distinct pairs to the shards that hold their sets.

    Args:
      layout: the stack's layout.
      place_bits: see VocabularySpec.
      pairs: uint32 [N, 2].
      implementation: see ops.IMPLEMENTATIONS.

    Returns:
      The pairs (uint32 [R, 2]) that this shard received from all devices, padding among them.
      The number of occurrences of each of them (int32 [R]).
      A function from one answer for each received pair (int32 [R]) to one answer for each position
      of this device (int32 [N]): that of the shard that holds the set of the position's pair.
    """
    num_given = pairs.shape[0]
    if num_given == 0:  # `indexing.starts` needs an entry: one pair of padding
        pairs = jnp.pad(pairs, ((0, 1), (0, 0)), constant_values=np.uint32(PADDING))
    num = pairs.shape[0]
    position = jnp.arange(num, dtype=jnp.int32)
    tags, places, at = lax.sort((pairs[:, 0], pairs[:, 1], position), num_keys=2)
    is_first = indexing.starts(tags, places)
    group = jnp.cumsum(is_first.astype(jnp.int32)) - 1
    first = jnp.where(is_first, group, num + 1)
    counts = indexing.add(jnp.zeros(num + 1, jnp.int32), group, 1).astype(jnp.uint32)
    entries = jnp.stack(
        [
            indexing.put(jnp.full(num + 1, PADDING, jnp.uint32), first, tags),
            indexing.put(jnp.zeros(num + 1, jnp.uint32), first, places),
            counts,
        ],
        axis=1,
    )
    is_pair = entries[:, 0] != jnp.uint32(PADDING)
    owner = jnp.where(is_pair, pool.shard_of(entries, place_bits, layout.shards), layout.shards)
    padding = jnp.asarray([PADDING, 0, 0], jnp.uint32)
    received, bring = exchange.ask_owners(layout, owner, entries, padding, implementation)
    group_of = indexing.put(jnp.zeros(num, jnp.int32), at, group)

    def back(rows: jax.Array) -> jax.Array:
        return indexing.take(bring(rows), group_of)[:num_given]

    return received[:, :2], received[:, 2].astype(jnp.int32), back


def _global_rows(
    layout: Layout, vocabulary: VocabularyState, pairs: jax.Array, own: jax.Array, per_table: int
) -> jax.Array:
    """Returns the global row number of each of this device's positions (int32 [N]).

    Args:
      layout: the stack's layout.
      vocabulary: this shard's part.
      pairs: uint32 [N, 2].
      own: int32 [N]: the local number of the id's own row on its shard; sets * ways if it has none.
      per_table: shared rows per table.
    """
    sets, ways, groups = vocabulary.geometry
    part = pool.Part(layout.shards, pool.shard_of(pairs, vocabulary.place_bits, layout.shards))
    whole = Geometry(sets * layout.shards, ways, groups * layout.shards)
    shared = pool.shared_rows(pairs, whole, per_table)
    rows = jnp.where(own < sets * ways, part.numbers_of(own), shared)
    return jnp.where(pairs[:, 0] == jnp.uint32(PADDING), NO_ID, rows)
