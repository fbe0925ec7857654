"""Set-associative bookkeeping of the FP32 cache: which id sits in which line, who enters, who must leave.

Integers only; no row is ever touched here. Policies are LRU and LFU with admission, the latter estimated by a count-min
sketch sized by the cache. The structure follows FBGEMM's table-batched embedding cache (32-way sets, LRU / LFU); the exact
rules (order inside a set, admission, halving, conservative sketch update) are ours and are stated at `make_plan`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpembed_jax import chunks, numerics
from mpembed_jax.table import NO_ID

MAX_WAYS = 64
MAX_AGE = 2**25 - 1  # LRU ages saturate here, so that (age, way) fits 32 bits
MAX_ESTIMATE = 2**16 - 1
_PINNED = 2**24  # an LFU priority no estimate reaches: the line belongs to this batch
_SKETCH_SEEDS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)


class Geometry(NamedTuple):
    """Decided sizes of a cache; `groups` is G: ids congruent modulo G share their sets, so MOD sharding keeps sets whole."""

    sets: int
    ways: int
    groups: int

    @property
    def lines(self) -> int:
        """Number of lines C."""
        return self.sets * self.ways


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """How large the FP32 cache is and who may stay in it.

    Attributes:
      fraction: lines as a fraction of the stack's rows, in (0, 1]; ignored where num_rows is given.
      num_rows: lines asked for, instead of a fraction.
      ways: lines per set, 1 to 64.
      policy: "lfu" (a newcomer must be used more than the line it takes) or "lru".

    Raises:
      ValueError: on a value outside these ranges.
    """

    fraction: float = 0.05
    num_rows: int | None = None
    ways: int = 32
    policy: str = "lfu"

    def __post_init__(self) -> None:
        if self.num_rows is None and not 0 < self.fraction <= 1:
            raise ValueError(f"cache fraction must be in (0, 1], got {self.fraction}; use cache=None for no cache")
        if self.num_rows is not None and self.num_rows < 1:
            raise ValueError(f"cache num_rows must be at least 1, got {self.num_rows}; use cache=None for no cache")
        if not 1 <= self.ways <= MAX_WAYS:
            raise ValueError(f"cache ways must be in [1, {MAX_WAYS}], got {self.ways}")
        if self.policy not in ("lru", "lfu"):
            raise ValueError(f'cache policy must be "lru" or "lfu", got {self.policy!r}')

    def geometry(self, num_table_rows: int) -> Geometry:
        """Returns the geometry for a stack of `num_table_rows` rows; lines are rounded down to whole sets."""
        lines = max(1, int(self.num_rows if self.num_rows is not None else self.fraction * num_table_rows))
        ways = min(self.ways, lines)
        sets = lines // ways
        groups = 64
        while groups > 1 and sets // groups < 8:
            groups //= 2
        return Geometry(sets - sets % groups, ways, groups)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tags", "priority", "dirty", "rows", "sketch"],
    meta_fields=["policy", "groups"],
)
@dataclasses.dataclass(frozen=True)
class CacheState:
    """The cache of one stack. Each id is in at most one line, and only in a line of its own set."""

    tags: jax.Array  # i32 [S, W]  id held, NO_ID if empty
    priority: jax.Array  # i32 [S, W]  lru: step of last use; lfu: estimated use at last touch, halved with the sketch
    dirty: jax.Array  # bool [S, W]  newer than the table
    rows: jax.Array  # f32 [C, D]
    sketch: jax.Array | None  # u16 [4, G, C // G]  None for lru
    policy: str
    groups: int

    @property
    def geometry(self) -> Geometry:
        """Sizes, read off the arrays."""
        return Geometry(*self.tags.shape, self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["unique_ids", "inverse", "line", "is_hit", "victim_ids", "counts", "step"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class CachePlan:
    """One step's decisions; it lives until the next prefetch.

    Unique ids stand in the order hits, newcomers, bypassed rows, padding; the last entry is always padding with a zero
    row. `ids == unique_ids[inverse]`, except that padding, out-of-range and over-budget positions hold U - 1.
    """

    unique_ids: jax.Array  # i32 [U]
    inverse: Any  # nest of i32 [..], like the ids
    line: jax.Array  # i32 [U]  where the row is during this step; C = bypass or padding
    is_hit: jax.Array  # bool [U]
    victim_ids: jax.Array  # i32 [U]  id displaced from `line`, NO_ID if none
    counts: "Counts"
    step: jax.Array  # i32 []  which prefetch made it


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "requests",
        "unique",
        "hits",
        "hit_requests",
        "misses",
        "bypasses",
        "evictions",
        "write_backs",
        "out_of_range",
        "dropped",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Counts:
    """One step's counts, i32 scalars on the device, so that logging works inside jit and scan."""

    requests: jax.Array  # id positions that name a row of the table
    unique: jax.Array  # distinct ids among them, after the budget
    hits: jax.Array  # unique ids found in the cache
    hit_requests: jax.Array  # positions whose id was found in the cache
    misses: jax.Array  # unique - hits
    bypasses: jax.Array  # misses that found no way, trained in the table
    evictions: jax.Array  # residents displaced
    write_backs: jax.Array  # of these, dirty ones, quantized and written
    out_of_range: jax.Array  # positions outside the table
    dropped: jax.Array  # unique ids over the budget

    @property
    def num_cached(self) -> jax.Array:
        """Unique ids that sit in a line during this step; they come first in the plan."""
        return self.unique - self.bypasses


def init(geometry: Geometry, policy: str, embedding_dim: int) -> CacheState:
    """Makes an empty cache."""
    shape = (geometry.sets, geometry.ways)
    sketch = None
    if policy == "lfu":
        sketch = jnp.zeros((len(_SKETCH_SEEDS), geometry.groups, geometry.lines // geometry.groups), jnp.uint16)
    return CacheState(
        tags=jnp.full(shape, NO_ID, jnp.int32),
        priority=jnp.zeros(shape, jnp.int32),
        dirty=jnp.zeros(shape, bool),
        rows=jnp.zeros((geometry.lines, embedding_dim), jnp.float32),
        sketch=sketch,
        policy=policy,
        groups=geometry.groups,
    )


def set_of(ids: jax.Array, geometry: Geometry) -> jax.Array:
    """Returns the set (int32 [..]) of each id: (id mod G) + G * (fmix32(id div G) mod (S / G))."""
    ids = ids.astype(jnp.uint32)
    groups = jnp.uint32(geometry.groups)
    mixed = numerics.fmix32(ids // groups) % jnp.uint32(geometry.sets // geometry.groups)
    return (ids % groups + groups * mixed).astype(jnp.int32)


def locate(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the line (int32, shape of ids) that holds each id, C where none does; NO_ID is nowhere."""
    sets = set_of(ids, cache.geometry)
    place = jnp.arange(1, cache.geometry.ways + 1, dtype=jnp.int32)
    way = jnp.sum(jnp.where(cache.tags[sets] == ids[..., None], place, 0), axis=-1, dtype=jnp.int32)
    is_there = (way > 0) & (ids != NO_ID)
    return jnp.where(is_there, sets * cache.geometry.ways + way - 1, cache.geometry.lines)


def _sketch_cells(cache: CacheState, ids: jax.Array) -> jax.Array:
    """Returns the flat sketch cells (int32 [4, n]) that count each id."""
    depth, groups, width = cache.sketch.shape  # type: ignore[union-attr]
    ids = ids.astype(jnp.uint32)
    quotient, group = ids // jnp.uint32(groups), ids % jnp.uint32(groups)
    seeds = jnp.asarray(_SKETCH_SEEDS, jnp.uint32)[:, None]
    column = (numerics.fmix32(quotient ^ seeds) % jnp.uint32(width)).astype(jnp.int32)
    depth_index = jnp.arange(depth, dtype=jnp.int32)[:, None]
    return (depth_index * groups + group.astype(jnp.int32)) * width + column


def _age(cache: CacheState, halve: jax.Array) -> CacheState:
    """Halves every estimate, in the sketch and at the lines, where `halve` holds: a loop of one turn or none, in place."""

    def halve_both(_: jax.Array, both: tuple) -> tuple:
        return both[0] >> 1, both[1] >> 1

    sketch, priority = lax.fori_loop(0, halve.astype(jnp.int32), halve_both, (cache.sketch, cache.priority))
    return dataclasses.replace(cache, sketch=sketch, priority=priority)


class Placement(NamedTuple):
    """What `make_plan` decides about the unique ids of a batch."""

    order: jax.Array  # i32 [U]  positions of the given unique ids: hits, newcomers, bypassed
    line: jax.Array  # i32 [U]  by given position
    victim_ids: jax.Array  # i32 [U]  by given position
    num_hits: jax.Array
    num_cached: jax.Array


def make_plan(
    cache: CacheState,
    ids: jax.Array,
    counts: jax.Array,
    num_ids: jax.Array,
    step: jax.Array,
    num_positions: int,
    chunk: int | None,
) -> tuple[CacheState, Placement]:
    """Decides hits, newcomers, victims and bypasses of one batch and updates tags, priorities and the sketch.

    Rules. Hits keep their lines and are pinned. The misses of a set, in order (LRU: ascending id; LFU: descending
    estimate, then ascending id), meet its unpinned ways in order (empty first; LRU: oldest; LFU: least used; ties: lowest
    way); a miss enters if the way is empty, or LRU: if it was not used this step, LFU: if its estimate is below the
    newcomer's. All others bypass. LFU estimates: every 10 C / N steps all estimates are halved; then
    `estimate = min(65535, min over the sketch's rows + occurrences)`, and the id's cells are raised to it.

    Args:
      cache: state before the step; its `rows` are passed through.
      ids: int32 [U], distinct, the first num_ids of them real.
      counts: int32 [U], occurrences in the batch.
      num_ids: int32 scalar.
      step: int32 scalar, number of this prefetch.
      num_positions: N, ids in the batch, padding included.
      chunk: see chunks.each.

    Returns:
      The cache with newcomers entered (their rows not yet filled, `dirty` still the victims'), and the placement.
    """
    geometry, width = cache.geometry, ids.shape[0]
    is_lfu = cache.policy == "lfu"
    if is_lfu and num_positions:
        period = max(1, 10 * geometry.lines // num_positions)
        cache = _age(cache, (step > 0) & (step % period == 0))
    tags, priority = cache.tags, cache.priority
    estimates = jnp.zeros(width, jnp.int32)
    positions = jnp.zeros(width, jnp.int32)

    # Hits, and the queue of misses. The sketch is only read here: estimates come from before the step.
    def find(window: chunks.Window, carry: tuple) -> tuple:
        line, estimates, order, num_hits, queue, num_misses = carry
        chunk_ids = jnp.where(window.is_live, window.take(ids), NO_ID)
        found = locate(cache, chunk_ids)
        is_hit = found < geometry.lines
        line = window.put(line, found)
        if is_lfu:
            seen = jnp.min(cache.sketch.reshape(-1)[_sketch_cells(cache, chunk_ids)], axis=0).astype(jnp.int32)
            estimates = window.put(estimates, jnp.minimum(seen + window.take(counts), MAX_ESTIMATE))
        order, num_hits = chunks.append(order, num_hits, window.index, is_hit)
        queue, num_misses = chunks.append(queue, num_misses, window.index, window.is_live & ~is_hit)
        return line, estimates, order, num_hits, queue, num_misses

    line = jnp.full(width, geometry.lines, jnp.int32)
    zero = jnp.int32(0)
    line, estimates, order, num_hits, queue, num_misses = chunks.each(
        0, num_ids, width, chunk, find, (line, estimates, positions, zero, positions, zero)
    )

    def pin_hits(window: chunks.Window, carry: tuple) -> tuple:
        priority, sketch = carry
        here = jnp.where(window.is_live, window.take(line), geometry.lines)
        marks = jnp.full(here.shape, _PINNED, jnp.int32) if is_lfu else jnp.broadcast_to(step, here.shape)
        priority = priority.at[here].set(marks, mode="drop")
        if is_lfu:
            cells = _sketch_cells(cache, window.take(ids))
            cells = jnp.where(window.is_live, cells, sketch.size)
            raised = jnp.broadcast_to(window.take(estimates).astype(jnp.uint16), cells.shape)
            sketch = sketch.at[cells].max(raised, mode="drop")
        return priority, sketch

    sketch = cache.sketch.reshape(-1) if is_lfu else None
    priority, sketch = chunks.each(0, num_ids, width, chunk, pin_hits, (priority.reshape(-1), sketch))

    entry = _enter(tags.reshape(-1), priority, geometry, is_lfu, ids, estimates, step, chunk)
    tags, priority, line, victim_ids, order, num_cached = entry(line, order, num_hits, num_ids, queue, num_misses)

    if is_lfu:  # unpin: the lines of this batch take their estimates

        def unpin(window: chunks.Window, priority: jax.Array) -> jax.Array:
            here = jnp.where(window.is_live, window.take(line), geometry.lines)
            return priority.at[here].set(window.take(estimates), mode="drop")

        priority = chunks.each(0, num_ids, width, chunk, unpin, priority)
        sketch = sketch.reshape(cache.sketch.shape)
    cache = dataclasses.replace(
        cache, tags=tags.reshape(cache.tags.shape), priority=priority.reshape(cache.tags.shape), sketch=sketch
    )
    return cache, Placement(order, line, victim_ids, num_hits, num_cached)


def _enter(
    tags: jax.Array,
    priority: jax.Array,
    geometry: Geometry,
    is_lfu: bool,
    ids: jax.Array,
    estimates: jax.Array,
    step: jax.Array,
    chunk: int | None,
):
    """Returns the function that lets misses enter, in rounds: every set's best waiting miss meets its cheapest way.

    Sets share election buckets where there are more sets than a batch could use; that only delays a set's turn.
    """
    width, ways, lines = ids.shape[0], geometry.ways, geometry.lines
    num_buckets = min(geometry.sets, 1 << max(4, (2 * width - 1).bit_length()))
    is_direct = num_buckets == geometry.sets

    def bucket_of(sets: jax.Array) -> jax.Array:
        if is_direct:
            return sets
        return (numerics.fmix32(sets.astype(jnp.uint32)) % jnp.uint32(num_buckets)).astype(jnp.int32)

    def waiting(window: chunks.Window, queue: jax.Array) -> tuple[jax.Array, ...]:
        position = window.take(queue)
        miss = jnp.where(window.is_live, ids[position], NO_ID)
        sets = set_of(miss, geometry)
        return position, miss, sets, bucket_of(sets), estimates[position]

    def meet(sets: jax.Array, wins: jax.Array, estimate: jax.Array, tags: jax.Array, priority: jax.Array) -> tuple:
        """Returns each winner's cheapest way and whether it may enter."""
        way = jnp.arange(ways, dtype=jnp.uint32)
        rows_tags, rows_priority = tags.reshape(-1, ways)[sets], priority.reshape(-1, ways)[sets]
        if is_lfu:
            rank = rows_priority.astype(jnp.uint32) + jnp.uint32(1)
        else:
            rank = (MAX_AGE + 1 - jnp.minimum(step - rows_priority, MAX_AGE)).astype(jnp.uint32)
        cost = jnp.where(rows_tags == NO_ID, jnp.uint32(0), rank) * jnp.uint32(MAX_WAYS) + way
        cheapest = jnp.min(cost, axis=-1)
        rank = (cheapest // jnp.uint32(MAX_WAYS)).astype(jnp.int32)
        may = rank <= estimate if is_lfu else rank <= MAX_AGE
        line = sets * ways + (cheapest % jnp.uint32(MAX_WAYS)).astype(jnp.int32)
        return line, wins & may

    def one_round(carry: tuple) -> tuple:
        tags, priority, line, victims, order, num_cached, last, queue, num_waiting = carry

        best = jnp.full(num_buckets if is_lfu else 0, -1, jnp.int32)
        if is_lfu:

            def raise_best(window: chunks.Window, best: jax.Array) -> jax.Array:
                _, miss, _, bucket, estimate = waiting(window, queue)
                return best.at[jnp.where(miss != NO_ID, bucket, num_buckets)].max(estimate, mode="drop")

            best = chunks.each(0, num_waiting, width, chunk, raise_best, best)

        def elect(window: chunks.Window, winner: jax.Array) -> jax.Array:
            _, miss, _, bucket, estimate = waiting(window, queue)
            stands = (estimate == best[bucket]) if is_lfu else True
            return winner.at[jnp.where(stands, bucket, num_buckets)].min(miss, mode="drop")

        winner = chunks.each(0, num_waiting, width, chunk, elect, jnp.full(num_buckets, NO_ID, jnp.int32))

        def settle(window: chunks.Window, carry: tuple) -> tuple:
            tags, priority, line, victims, order, num_cached, is_full = carry
            position, miss, sets, bucket, estimate = waiting(window, queue)
            wins = (winner[bucket] == miss) & (miss != NO_ID)
            place, enters = meet(sets, wins, estimate, tags, priority)
            victim = tags[place]
            target, here = jnp.where(enters, place, lines), jnp.where(enters, position, width)
            tags = tags.at[target].set(miss, mode="drop")
            mark = jnp.full(target.shape, _PINNED, jnp.int32) if is_lfu else jnp.broadcast_to(step, target.shape)
            priority = priority.at[target].set(mark, mode="drop")
            line = line.at[here].set(place, mode="drop")
            victims = victims.at[here].set(victim, mode="drop")
            order, num_cached = chunks.append(order, num_cached, position, enters)
            is_full = is_full.at[jnp.where(wins & ~enters, bucket, num_buckets)].set(True, mode="drop")
            return tags, priority, line, victims, order, num_cached, is_full

        is_full = jnp.zeros(num_buckets, bool)
        tags, priority, line, victims, order, num_cached, is_full = chunks.each(
            0, num_waiting, width, chunk, settle, (tags, priority, line, victims, order, num_cached, is_full)
        )

        # A set whose best miss could not enter is closed for all others; the rest of the losers wait for the next round.
        def requeue(window: chunks.Window, carry: tuple) -> tuple:
            order, last, queue, num_left = carry
            position, miss, sets, bucket, _ = waiting(window, queue)
            best_id = winner[bucket]
            is_closed = is_full[bucket] & (set_of(best_id, geometry) == sets)
            order, last = chunks.append(order, last, position, window.is_live & is_closed, backwards=True)
            queue, num_left = chunks.append(queue, num_left, position, window.is_live & ~is_closed & (best_id != miss))
            return order, last, queue, num_left

        order, last, queue, num_waiting = chunks.each(
            0, num_waiting, width, chunk, requeue, (order, last, queue, jnp.int32(0))
        )
        return tags, priority, line, victims, order, num_cached, last, queue, num_waiting

    def enter(line, order, num_hits, num_ids, queue, num_misses):
        victims = jnp.full(width, NO_ID, jnp.int32)
        carry = (tags, priority, line, victims, order, num_hits, num_ids, queue, num_misses)
        carry = lax.while_loop(lambda carry: carry[-1] > 0, one_round, carry)
        return carry[:6]

    return enter


def commit(cache: CacheState, line: jax.Array) -> CacheState:
    """Marks the given lines (int32 [n], C = none) as newer than the table."""
    dirty = cache.dirty.reshape(-1).at[line].set(True, mode="drop")
    return dataclasses.replace(cache, dirty=dirty.reshape(cache.dirty.shape))
