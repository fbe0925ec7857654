"""Incremental checkpoints: the rows and cache lines that changed since an earlier checkpoint.

`track` starts a tracker from a state that was just saved or restored. The tracker's bitmap marks
the rows that steps have touched since then. apply_gradients updates rows of the batch, which the
step's plan names. prefetch writes back the dirty lines of victims, and `flush` writes back all
dirty lines. A dirty line was dirty at the start, or a plan since then names its row. A row in the
table therefore changed only if a plan since the start names it, or if it had a dirty line at the
start and has none now. A line changed only if a plan since the start names its row.

`write_rows`, `restack` and the functions of `vocabularies` have no plan, so the rows that they
change are not marked. The state counts such changes. `save` refuses a tracker that started before
one.

A tracker counts what the state counts, so that a step without `mark` is noticed. A digest of all
rows at the start tells from which checkpoint the tracker started. Over a mesh, every shard has a
bitmap of its own rows. A checkpoint holds arrays shard after shard, as in memory. The indices in an
increment count in this order.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mpembed_jax import ops
from mpembed_jax.arrays import indexing
from mpembed_jax.cache.plan import CachePlan, Counts
from mpembed_jax.checkpoint import digests, host_memory, leaves, manifest
from mpembed_jax.checkpoint.errors import CheckpointError, UnreadableError
from mpembed_jax.embedding import arguments
from mpembed_jax.embedding.counters import count_step, num_changes
from mpembed_jax.embedding.state import EmbeddingState, over_mesh
from mpembed_jax.embedding.vectors import VectorPlan
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.row_ids import NO_ID

# The first counters of a state are those that a plan's counts are added to.
_NUM_STEP_COUNTERS = len(dataclasses.fields(Counts))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "bits",
        "was_dirty",
        "step",
        "has_gap",
        "counters",
        "key",
        "fingerprint",
        "started",
        "digest",
    ],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class RowTracker:
    """The rows of one EmbeddingState that steps have touched since the start, which is `track`.

    In a bitmap, bit i mod 32 of word i div 32 is row i (over a mesh, row i of its shard).
    """

    # u32 [ceil(V / 32)]: the bitmap of the rows that a plan since the start names. Over a mesh, the
    # bitmaps of all shards follow one another.
    bits: jax.Array
    was_dirty: jax.Array  # u32, same shape: the bitmap of rows in a dirty line at the start
    step: jax.Array  # i32 []: the number of the next prefetch
    has_gap: jax.Array  # bool []: whether a plan was left out or marked twice
    # u32 [len(COUNTERS), 2]: the counts of steps that the state should have. Counts of updates, and
    # of changes outside of steps, stay as they were at the start.
    counters: jax.Array
    key: jax.Array  # u32 [2]: the state's
    fingerprint: jax.Array  # u32 [2]: the state's
    started: jax.Array  # i32 []: the state's step at the start
    digest: jax.Array  # u32 [2]: the digest of all rows and cache lines at the start
    layout: Layout | None  # the state's


# --- tracking


def track(state: EmbeddingState) -> RowTracker:
    """Starts to track which rows the steps touch, from a state that was just saved or restored.

    An increment builds on the checkpoint of that state. The call reads all rows once, for a digest.
    Steps alone are tracked. After write_rows, and after each function of `vocabularies` that
    changed rows, `save` refuses the tracker: save a full checkpoint, and track again.

    Args:
      state: concrete; not consumed. No prefetch may be waiting for its apply_gradients.

    Returns:
      A tracker of V / 4 bytes, for `mark` in every step and for `save`.

    Raises:
      TypeError: if state has another type, or is traced.
      ValueError: if the state was donated, made for another spec, or averaged; or if a prefetch
        waits for its apply_gradients, because the tracker has not seen its plan. Also if the state
        has a vocabulary and max_unique_ids, was made inside jax.pmap, or has shards of 2**31 - 1
        rows or more in total: such states need full checkpoints.
    """
    arguments.check_state("track(state)", state)
    state.check_spec()
    layout = state.layout
    if state.vocabulary is not None and state.spec.max_unique_ids is not None:
        raise ValueError(
            "rows of a state with a vocabulary and max_unique_ids cannot be tracked, because a row "
            "that changes its owner may be over the budget, and then no plan names it; leave out "
            "max_unique_ids, or save full checkpoints"
        )
    if bool(state.pending):
        raise ValueError(
            "this state has a prefetch without its apply_gradients; start tracking after "
            "apply_gradients"
        )
    begin = _begin
    everywhere = None
    if layout is not None:
        if layout.shards * layout.num_rows >= NO_ID:
            raise ValueError(
                f"rows of a stack of {state.spec.num_rows} rows cannot be tracked; save full "
                "checkpoints of it"
            )
        begin = over_mesh(_begin, state, result=PartitionSpec(layout.axes or None))
        everywhere = NamedSharding(layout.mesh, PartitionSpec())
    bits, was_dirty = jax.jit(begin)(state)
    return RowTracker(
        bits=bits,
        was_dirty=was_dirty,
        step=jnp.copy(state.step),
        has_gap=jnp.copy(state.pending),
        counters=jnp.copy(state.counters),
        key=jnp.copy(state.key),
        fingerprint=jnp.copy(state.fingerprint),
        started=jnp.copy(state.step),
        digest=jax.device_put(digests.digest_of(state), everywhere),
        layout=layout,
    )


def partition_specs(tracker: RowTracker) -> RowTracker:
    """Returns the PartitionSpecs of a tracker, for jax.shard_map's in_specs and out_specs.

    Args:
      tracker: the tracker of a state over a mesh.

    Returns:
      A tree like tracker. Bitmaps are divided like the state's rows. All other arrays are
      replicated.

    Raises:
      TypeError: if tracker has another type.
    """
    arguments.expect("partition_specs(tracker)", "tracker", tracker, RowTracker, "from track")
    axes = () if tracker.layout is None else tracker.layout.axes
    everywhere = jax.tree.map(lambda _: PartitionSpec(), tracker)
    return dataclasses.replace(
        everywhere, bits=PartitionSpec(axes or None), was_dirty=PartitionSpec(axes or None)
    )


def _begin(state: EmbeddingState) -> tuple[jax.Array, jax.Array]:
    """Returns the first `bits` (no row) and `was_dirty` of one device."""
    none = jnp.zeros(-(-state.table.num_rows // 32), jnp.uint32)
    if state.cache is None:
        return none, none
    return none, _set_bits(none, jnp.where(state.cache.dirty, state.cache.tags, -1).reshape(-1))


@jax.jit
def _set_bits(bits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the bitmap with the bits of ids (int32 [n]) set; ids outside it are dropped.

    A bit is set by addition. Ids inside the bitmap must therefore be distinct, and a bit that is
    set already is left out.
    """
    num_words = bits.shape[0]
    word = jnp.where(ids >= 0, ids >> 5, num_words)
    bit = jnp.uint32(1) << (ids & 31).astype(jnp.uint32)
    is_set = (indexing.take(bits, word) & bit) != 0
    return indexing.add(bits, jnp.where(is_set, num_words, word), bit)


def mark(tracker: RowTracker, plan: CachePlan | VectorPlan) -> RowTracker:
    """Marks the rows that a step touches: its unique ids, and the victims that its plan names.

    Call it exactly once per prefetch or embed, inside the jitted step.

    Args:
      tracker: consumed if donated. For a state over a mesh, call mark inside jax.shard_map with
        `partition_specs(tracker)`.
      plan: from the step's prefetch or embed.

    Returns:
      The tracker after this step.

    Raises:
      TypeError: if tracker or plan has another type.
      ValueError: for a state over a mesh, outside jax.shard_map.
    """
    call = "mark(tracker, plan)"
    arguments.expect(call, "tracker", tracker, RowTracker, "from track")
    if tracker.layout is not None:
        tracker.layout.check_bound("mark")
    if isinstance(plan, VectorPlan) and plan.plan is not None:
        plan = plan.plan
    if isinstance(plan, VectorPlan):
        # This plan names no victims. They need no marks: a dirty line became dirty in a step that
        # was marked, or was dirty at the start.
        assert plan.places is not None
        ids = ops.distinct_ids(plan.places)
    else:
        arguments.check_plan(call, plan)
        # No victim is in the batch, so all of these ids are distinct, as _set_bits requires.
        ids = jnp.concatenate([plan.placed[0], plan.victim_ids])
    return dataclasses.replace(
        tracker,
        bits=_set_bits(tracker.bits, ids),
        step=plan.step,
        has_gap=tracker.has_gap | (plan.number != tracker.step),
        counters=count_step(tracker.counters, plan.counts),
    )


# --- contents of an increment


class Patch(NamedTuple):
    """The new values of some entries of an array."""

    # The name under which `where` is saved. Patches with the same indices share it.
    index_name: str
    where: np.ndarray  # i32 [n], ascending: the indices of these entries
    values: np.ndarray  # [n, ..], in the dtype of the array


def collect(
    directory: Path,
    step: int,
    members: dict[str, leaves.Member],
    trackers: RowTracker | Mapping[str, RowTracker],
) -> tuple[dict[str, int], dict[str, Patch]]:
    """Finds the checkpoint to build on, and the rows and lines that changed since then.

    Args:
      directory: the folder of the checkpoints.
      step: the step that is being saved.
      members: the tree's embedding states, {name: member}.
      trackers: one tracker, if the tree has one embedding state, or {name: tracker}.

    Returns:
      {"step": .., "identity": ..} of the checkpoint to build on, and {name of an array in the tree:
      patch}.

    Raises:
      ValueError: if a tracker does not fit its state, or has no state; or if the directory does
        not hold the checkpoint from which the trackers started.
      UnreadableError: if that checkpoint is not found, and the system cannot read one of the
        directory's checkpoints now.
      OSError: if the system cannot read the directory.
    """
    if isinstance(trackers, RowTracker):
        if len(members) != 1:
            raise ValueError(
                f"the tree has {len(members)} embedding states {list(members)}: pass {{name: "
                f"tracker}}"
            )
        trackers = dict.fromkeys(members, trackers)
    if unknown := [name for name in trackers if name not in members]:
        raise ValueError(
            f"no embedding state is called {unknown[0]!r}; the tree has {list(members)}"
        )
    patches: dict[str, Patch] = {}
    for name, tracker in trackers.items():
        _check_tracker(name, members[name].state, tracker)
        patches |= _patches(name, members[name], tracker)
    return _base(directory, step, trackers), patches


def _check_tracker(name: str, state: EmbeddingState, tracker: RowTracker) -> None:
    what = _of(name)
    if any(
        (np.asarray(getattr(tracker, f)) != np.asarray(getattr(state, f))).any()
        for f in ("key", "fingerprint")
    ):
        raise ValueError(f"{what} belongs to another embedding state (another key or spec)")
    seen = int(tracker.step)
    now = int(state.step)
    told, held = (np.asarray(x)[:_NUM_STEP_COUNTERS] for x in (tracker.counters, state.counters))
    if bool(tracker.has_gap) or seen != now or not np.array_equal(told, held):
        fault = (
            "a plan was left out or marked twice"
            if bool(tracker.has_gap)
            else "their counts differ"
        )
        raise ValueError(
            f"{what} did not see every step: it saw prefetches up to step {seen}, the state is at "
            f"step {now}, and {fault}; an incremental checkpoint could lose rows. Call "
            "mark(tracker, plan) exactly once per prefetch, with its plan; save a full "
            "checkpoint now, without tracker="
        )
    if num_changes(np.asarray(tracker.counters)) != num_changes(np.asarray(state.counters)):
        raise ValueError(_changed(what))


def _of(name: str) -> str:
    return f"the tracker of {name!r}" if name else "the tracker"


def _changed(what: str) -> str:
    return (
        f"rows were changed outside of steps after {what} was started, and no plan names them, as "
        "after write_rows, restack, and vocabularies.forget, from_counts, grow and shrink; an "
        "increment would lose them. Save a full checkpoint now, without tracker=, and call track "
        "again; next time, make such a change before track"
    )


def _base(directory: Path, step: int, trackers: Mapping[str, RowTracker]) -> dict[str, int]:
    wanted = {
        name: (digests.numbers(t.digest), int(t.started), digests.numbers(t.fingerprint))
        for name, t in trackers.items()
    }
    unreadable: UnreadableError | None = None
    for candidate in reversed(manifest.steps(directory)):
        try:
            # To read all files would take too long here. `restore` reads and checks them.
            body = manifest.chain(directory, candidate, contents=False)[0]
        except UnreadableError as error:
            unreadable = unreadable or error
            continue
        except CheckpointError:
            continue
        held = {
            n: (e["digest"], e["step"], e["fingerprint"])
            for n, e in body["embeddings"].items()
            if n in wanted
        }
        if held == wanted and candidate != step:
            return {"step": candidate, "identity": manifest.identity(body)}
    if unreadable is not None:
        raise unreadable
    started = sorted({start for _, start, _ in wanted.values()})
    raise ValueError(
        f"no checkpoint in {directory} holds the rows that the tracker started from (state step "
        f"{', '.join(map(str, started))}); call track on a state right after saving it here, or "
        "save without tracker="
    )


def _patches(name: str, member: leaves.Member, tracker: RowTracker) -> dict[str, Patch]:
    state = member.state
    shards = 1 if state.layout is None else state.layout.shards
    num_rows = state.table.num_rows // shards  # rows of one shard
    cache = state.cache
    is_touched, was_dirty = (
        _unpack(x, shards, num_rows) for x in (tracker.bits, tracker.was_dirty)
    )
    lines = np.zeros(0, np.int32)
    if cache is not None:
        ways = cache.tags.shape[-1]
        tags, dirty = (_on_host(x).reshape(-1) for x in (cache.tags, cache.dirty))
        is_held = (tags >= 0) & (tags < num_rows)
        # The first row of each line's shard.
        first = np.repeat(np.arange(shards, dtype=np.int32) * num_rows, len(tags) // shards)
        held = np.where(is_held, tags + first, 0)
        # A line that is still dirty was not written back. The table has not changed there.
        was_dirty[held[is_held & dirty]] = False
        has_changed = is_held & is_touched[held]
        if state.vocabulary is not None:
            # If the row of a raw id starts again, its line becomes empty. The row then takes the
            # first empty line of the same set. That is another line if `forget` had emptied one
            # before. So a line that is empty now may have changed, if its set has a changed line.
            is_active = has_changed.reshape(-1, ways).any(axis=1)
            has_changed |= ~is_held & np.repeat(is_active, ways)
        lines = np.flatnonzero(has_changed).astype(np.int32)
    rows = np.flatnonzero(is_touched | was_dirty).astype(np.int32)
    if not rows.size and not lines.size:
        now = digests.digest_of(state)
        if digests.numbers(tracker.digest) != digests.numbers(now):
            raise ValueError(_changed(_of(name)))
    prefix = f"{name}." if name else ""
    named = leaves.named(state)
    patches = {}
    for inner_names, kind, index in zip(
        digests.row_names(state), ("rows", "lines"), (rows, lines), strict=True
    ):
        for inner in inner_names:
            values = gather(named[inner], index)
            patches[member.names[inner]] = Patch(f"{prefix}touched_{kind}", index, values)
    return patches


def _unpack(bits: jax.Array, shards: int, num_rows: int) -> np.ndarray:
    """Returns the bitmaps of all shards as bool [shards * num_rows]."""
    words = _on_host(bits).astype("<u4").reshape(shards, -1)
    return (
        np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :num_rows]
        .astype(bool)
        .reshape(-1)
    )


def _on_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array, even if other devices or processes hold parts of it."""
    if (everywhere := _everywhere(array)) is None:
        return np.asarray(jnp.copy(array))
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(array))


def _everywhere(array: jax.Array) -> NamedSharding | None:
    sharding = getattr(array, "sharding", None)
    return (
        NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, NamedSharding)
        else None
    )


def gather(array: jax.Array, index: np.ndarray) -> np.ndarray:
    """Returns array[index] as a NumPy array [n, ..], for int32 indices [n] inside the array.

    Indices are padded to one of few lengths, so that few programs are compiled.
    """
    if index.size == 0:
        return np.zeros((0, *array.shape[1:]), array.dtype)
    if host_memory.is_kept(array):
        return host_memory.gather(array, index)
    take = jax.jit(indexing.take, out_shardings=_everywhere(array))
    return np.asarray(take(array, np.pad(index, (0, padded(index.size) - index.size))))[
        : index.size
    ]


def padded(size: int) -> int:
    """Returns the least length of at least `size` > 0 that is 2^k or 3 * 2^k for a whole k."""
    step = 1 << max(0, math.ceil(math.log2(max(1, size))) - 2)
    return -(-size // step) * step
