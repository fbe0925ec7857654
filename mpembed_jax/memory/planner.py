"""The planner: from tables and a budget to stacks that fit, with the reason of each choice.

Formats are tried in the order of the accuracy that was measured with them. First, all stacks but
those of small tables get the best format that all of them can have within the budget. Then single
stacks go up to better formats while the budget allows it, the smallest stack first. Bytes are those
of `report`: they count every array of the state on a device.

A stack of raw ids gets a pool with a row for each id that occurs k times in a sample, and a tenth
more. Its levels are pairs of a format and k. k is 2 where that fits, else 3. It is never 1: in no
measured format did a row for every id give a higher AUC, and it took more than twice the rows.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType

from mpembed_jax import row_ids, sharding
from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.embedding import arguments
from mpembed_jax.memory import reports
from mpembed_jax.memory.reports import report
from mpembed_jax.mesh.layout import Layout, undivided
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, TableSpec, size_of
from mpembed_jax.vocabulary import hashes
from mpembed_jax.vocabulary.spec import VocabularySpec, groups_of

# Tables of at most _TINY_ROWS rows may share a stack in float32, separate from larger tables.
# Together, they may take 1 / _TINY_PART of the budget of all devices.
_TINY_ROWS, _TINY_PART = 10_000, 50
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}
SOURCE = "experiments/accuracy/README.md, Reddit"
RAW_SOURCE = "experiments/accuracy/details.md, Reddit, raw ids"


class Level(NamedTuple):
    """A format, with or without a cache, and its measured AUC minus that of float32."""

    storage: str
    fraction: float | None  # share of the rows that the cache has lines for; None: no cache
    # {dim: AUC minus that of float32 with a row for every id}, as measured in SOURCE or RAW_SOURCE
    accuracy: dict[int, str]
    admit_after: int | None = None  # of a pool; None: ids are row numbers

    @property
    def name(self) -> str:
        """The level in words."""
        cache = "" if self.fraction is None else f" + {self.fraction:.0%}"
        admitted = "" if self.admit_after is None else f", k = {self.admit_after}"
        return f"{self.storage}{cache}{admitted}"

    def cache(self) -> CacheSpec | None:
        """The cache of a stack."""
        return None if self.fraction is None else CacheSpec(self.fraction)

    def accuracy_at(self, dim: int) -> str:
        """Returns the AUC difference at the measured dim that is nearest to `dim`."""
        if not self.accuracy:
            return "the reference"
        nearest = min(self.accuracy, key=lambda known: abs(np.log(known / dim)))
        return f"AUC difference {self.accuracy[nearest]} at D = {nearest}"


LEVELS = (
    Level("float32", None, {}),
    Level("int8", 0.05, {16: "+.0000 ± .0000", 64: "-.0000 ± .0001", 128: "+.0001 ± .0001"}),
    Level("int4", 0.05, {16: "-.0000 ± .0001"}),
    Level("int4", 0.01, {16: "-.0004 ± .0002", 64: "-.0003 ± .0003", 128: "-.0002 ± .0002"}),
    Level("int2", 0.05, {16: "-.0006 ± .0002", 64: "-.0004 ± .0002", 128: "-.0003 ± .0002"}),
)
RAW_LEVELS = (
    Level("float32", None, {16: "+.0003 ± .0011", 64: "+.0001 ± .0020"}, 2),
    Level("int8", 0.05, {16: "+.0003 ± .0011", 64: "+.0000 ± .0019"}, 2),
    Level("int4", 0.05, {16: "+.0001 ± .0015", 64: "-.0001 ± .0021"}, 2),
    Level("int4", 0.01, {16: "-.0002 ± .0014", 64: "-.0003 ± .0021"}, 2),
    Level("int4", 0.05, {16: "-.0013 ± .0024", 64: "-.0011 ± .0033"}, 3),
    Level("int4", 0.01, {16: "-.0017 ± .0021", 64: "-.0015 ± .0032"}, 3),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One stack of a plan."""

    name: str
    spec: EmbeddingSpec
    placement: Placement | None  # over the devices; None for one device
    device_bytes: int  # of the state, on each device
    host_bytes: int  # of the state, in host memory
    temporary_bytes: int  # of a step of this stack alone, beside the state; 0 without batch_shape
    accuracy: str
    reason: str

    @property
    def step_bytes(self) -> int:
        """Bytes on each device in a step: the state and the temporaries."""
        return self.device_bytes + self.temporary_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stacks that fit a budget; str() gives a readable table."""

    choices: tuple[Choice, ...]
    budget: int  # bytes per device
    devices: int
    temporary_bytes: int = 0  # of one step of all stacks, beside the states; 0 without batch_shape

    @property
    def specs(self) -> dict[str, EmbeddingSpec]:
        """The spec of each stack by its name."""
        return {choice.name: choice.spec for choice in self.choices}

    @property
    def device_bytes(self) -> int:
        """Bytes on each device: all states, and the temporaries of one step if they are known."""
        return sum(choice.device_bytes for choice in self.choices) + self.temporary_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(choice.host_bytes for choice in self.choices)

    def __str__(self) -> str:
        lines = [("stack", "rows", "dim", "format", "device bytes", "host bytes", "accuracy")]
        for choice in self.choices:
            spec = choice.spec
            cache = "" if spec.cache is None else f" + {spec.cache.fraction:.0%}"
            pool = spec.vocabulary
            admitted = "" if pool is None else f", k = {pool.admit_after}"
            lines.append(
                (
                    choice.name,
                    f"{spec.num_rows:,}",
                    str(spec.embedding_dim),
                    spec.storage.name + cache + admitted,
                    f"{choice.device_bytes:,}",
                    f"{choice.host_bytes:,}",
                    choice.accuracy,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in lines]
        text = [line.rstrip() for line in text]
        text += [f"{choice.name}: {choice.reason}" for choice in self.choices]
        if self.temporary_bytes:
            text.append(f"temporaries of one step: {self.temporary_bytes:,} bytes")
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        text.append(f"{self.device_bytes:,} of {self.budget:,} bytes{each}")
        raw = [choice for choice in self.choices if choice.spec.vocabulary is not None]
        if len(raw) < len(self.choices):
            text.append(f"accuracy: measured, {SOURCE}")
        if raw:
            text.append(f"accuracy with k, against a row for every id: measured, {RAW_SOURCE}")
            text.append("k: from its k-th occurrence on, a raw id has a row of its own")
        return "\n".join(text)


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Returns a size in bytes: "16GB" and "16e9" are 16 * 10^9, "16GiB" is 16 * 2^30.

    Args:
      size: a number of bytes, or a text of a number and a unit.
      name: the name of the argument, for messages.

    Raises:
      ValueError: if size is neither, or is below one byte.
    """
    found = re.fullmatch(r"\s*([\d_.]+(?:e[+-]?\d+)?)\s*([kmgtp]?i?)b?\s*", str(size).lower())
    try:
        bytes_ = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (ValueError, KeyError, OverflowError):
        bytes_ = 0
    if bytes_ < 1:
        raise ValueError(f'{name} must be a number of bytes or a text such as "16GB", got {size!r}')
    return bytes_


def plan(
    tables: Any,
    budget: int | str,
    *,
    tx: optax.GradientTransformation,
    devices: int = 1,
    ids: Mapping[str, Any] | None = None,
    batch_shape: tuple[int, ...] | None = None,
    host_budget: int | str | None = None,
) -> Plan:
    """Chooses stacks, formats, caches and placements for tables, within a budget of memory.

    Tables of one dim share a stack. A stack has fewer than 2**31 - 1 rows: a table for which it has
    no room begins another one. Small tables of one dim share another stack, in float32, if together
    they take little of the budget, and all stacks then fit. Tables of raw ids of one dim share a
    stack with a pool of rows. Nothing is allocated.

    A pool has a row for each id that occurs at least k times in the sample, and a tenth more,
    because sets of rows do not fill evenly. It is rounded up to whole sets. A sample of a stream
    sees only a part of all ids: the pool is for the ids of the sample. If the stream has more ids,
    those that are used less share rows. Give a sample that is as long as what you train on, or
    see `vocabularies.grow`. A table with n ids in the sample gets the initial_bound 1/sqrt(n).

    Args:
      tables: {name: (rows, dim)}, or a sequence of (rows, dim). (None, dim) is a table of raw ids,
        as TableSpec(name) without a size. The tables of a sequence are named table0, table1, ...
      budget: bytes per device, a number or a text such as "16GB".
      tx: optax transformation for the rows.
      devices: the number of devices. They divide the rows of a stack, or each holds a copy. Only a
        power of two, up to its groups, can divide a cache or a pool of raw ids.
      ids: {table: sample of its ids}. It shows which share of the ids the most used rows get. INT4
        with a 5 % cache is left out if a 1 % cache gets nearly as many of the ids. A table of
        raw ids needs a sample, of what `spec.raw_ids` takes: integers, bytes or strings; None and
        nulls are padding. All other samples are row numbers in their table; NO_ID is padding.
      batch_shape: (B,), or (B, L) for bags: the ids of one table in a batch of all devices. If
        given, the temporaries of one step count, as XLA plans them on each device; see `report`. In
        one program for all stacks, XLA uses the memory of one stack again for another. So steps are
        compiled for single stacks, and for all stacks together where the sum of their temporaries
        would not fit. As many devices as `devices` must exist.
      host_budget: bytes of host memory that tables may take if they do not fit on the device. For
        one device only. None: no host memory is used.

    Returns:
      A Plan.

    Raises:
      TypeError: if tables are neither a mapping nor a sequence, if devices is not an integer, if tx
        or ids have another type, if raw ids of a sample are neither integers nor bytes nor strings,
        or if other ids of a sample are not integers.
      ValueError: if a table or an argument is wrong; if a sampled row number is outside its table;
        if a table of raw ids has no sample, or no id of a stack of raw ids occurs twice; if a
        batch_shape is given for more devices than there are, or does not divide over them; or if
        nothing fits. The message then names the smallest budget that works.
    """
    sizes = _sizes(tables)
    limit = parse_bytes(budget, "budget")
    host_limit = 0 if host_budget is None else parse_bytes(host_budget, "host_budget")
    call = "memory.plan(tables, budget, *, tx)"
    if arguments.integer(call, "devices", devices) < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if devices > 1 and host_budget is not None:
        raise ValueError(
            f"a stack over {devices} devices has its tables in device memory, got "
            f"host_budget={host_budget!r}; leave it out"
        )
    if batch_shape is not None and not (
        isinstance(batch_shape, tuple | list)
        and len(batch_shape) in (1, 2)
        and all(_is_whole(size) and size >= 1 for size in batch_shape)
    ):
        raise ValueError(
            f"batch_shape must be (B,), or (B, L) for bags of L ids, got {batch_shape!r}"
        )
    if batch_shape is not None:
        batch_shape = tuple(int(size) for size in batch_shape)
    if not isinstance(ids, Mapping | None):
        raise TypeError(f"{call}: ids must be {{table: sample}}, got {type(ids).__name__}")
    samples = dict(ids or {})
    if unknown := sorted(set(samples) - set(sizes)):
        raise ValueError(f"ids name tables {unknown}, which are not among {list(sizes)}")
    small = _small(sizes)
    # Small tables have a stack of their own if the budget per device is at least this.
    least_for_small = -(-_TINY_PART * sum(small.values()) // devices)
    mesh = None if devices == 1 else _mesh(devices, batch_shape)

    @functools.cache
    def search_of(is_small_apart: bool) -> _Search:
        stacks = _stacks(sizes, samples, small if is_small_apart else ())
        return _Search(stacks, _Bytes(stacks, tx, mesh, batch_shape), host_limit)

    chosen = None
    if small and limit >= least_for_small:
        search = search_of(True)
        chosen = search.choose(limit)
    if chosen is None:
        search = search_of(False)
        chosen = search.choose(limit)
    if chosen is None:
        needed = search.needed()
        if small and least_for_small < needed:
            needed = min(needed, max(least_for_small, search_of(True).needed()))
        can_use_host = not host_limit and search.by_size and mesh is None
        raise ValueError(
            f"nothing fits {limit:,} bytes per device; the smallest budget that works is "
            f"{needed:,} bytes"
            + (
                " (or give host_budget=, so that packed rows may be in host memory)"
                if can_use_host
                else ""
            )
            + (
                f" (with {devices} devices, a cache or pool cannot be divided, because its groups "
                "are a power of two; with 2, 4, 8 .. devices, less may do)"
                if devices & (devices - 1)
                else ""
            )
        )
    choices = []
    for name, (level, is_host) in chosen.items():
        choice = search.bytes_of(name, level, is_host)
        reason = _reason(search.stacks[name], level, is_host, choice, devices)
        choices.append(dataclasses.replace(choice, reason=reason))
    return Plan(tuple(choices), limit, devices, search.bytes_of.temporaries(chosen))


def _mesh(devices: int, batch_shape: tuple[int, ...] | None) -> Any:
    """Returns a mesh of so many devices. They need not exist if no step is compiled for them."""
    if batch_shape is None:
        return AbstractMesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    if jax.device_count() < devices:
        raise ValueError(
            f"a step with batch_shape={batch_shape!r} is compiled for {devices} devices, and there "
            f"are {jax.device_count()}; leave batch_shape out, or try it on a CPU: set "
            f"JAX_PLATFORMS=cpu and XLA_FLAGS=--xla_force_host_platform_device_count={devices} "
            "before Python starts"
        )
    return jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,))


# --- tables and stacks


def _sizes(tables: Any) -> dict[str, tuple[int | None, int]]:
    if isinstance(tables, Mapping):
        found = dict(tables)
    elif isinstance(tables, Sequence) and not isinstance(tables, str):
        found = {f"table{index}": size for index, size in enumerate(tables)}
    else:
        raise TypeError(
            f"tables must be {{name: (rows, dim)}} or a sequence of (rows, dim), got {tables!r}"
        )
    sizes: dict[str, tuple[int | None, int]] = {}
    for name, size in found.items():
        if (
            not isinstance(size, Sequence)
            or len(size) != 2
            or not (size[0] is None or _is_whole(size[0]))
            or not _is_whole(size[1])
        ):
            raise ValueError(
                f"table {name!r} must be (rows, dim), or (None, dim) for raw ids, got {size!r}"
            )
        rows, dim = None if size[0] is None else int(size[0]), int(size[1])
        if not (rows is None or 1 <= rows < NO_ID) or dim < 1:
            raise ValueError(
                f"table {name!r} must have 1 to {NO_ID - 1} rows and a dim of at least 1, got "
                f"{rows} rows of dim {dim}"
            )
        sizes[name] = rows, dim
    if not sizes:
        raise ValueError("tables must name at least one table, got none")
    return sizes


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | float | np.number) and float(number).is_integer()


class _Stack(NamedTuple):
    """The tables of a stack, and what a sample says of them."""

    tables: tuple[TableSpec, ...]
    dim: int
    levels: tuple[Level, ...]  # that the stack may have, the most accurate first
    is_tiny: bool
    use: np.ndarray  # i64 [ids of the samples]  occurrences of each, descending
    num_sampled_rows: int  # rows of the tables that have samples; 0 for raw ids

    @property
    def is_raw(self) -> bool:
        """Whether the ids are raw, and the rows those of a pool."""
        return self.tables[0].vocabulary_size is None

    def num_ids(self, admit_after: int) -> int:
        """Returns how many ids of the samples occur at least `admit_after` times."""
        return int(np.sum(self.use >= admit_after))

    def vocabulary(self, level: Level) -> VocabularySpec | None:
        """Returns the pool of a stack of raw ids at a level, of whole sets."""
        if level.admit_after is None:
            return None
        num_rows = -(-11 * self.num_ids(level.admit_after) // 10)
        ways = min(VocabularySpec.ways, num_rows)
        sets = -(-num_rows // ways)
        sets += -sets % groups_of(sets)
        return VocabularySpec(sets * ways, level.admit_after)

    def hits(self, level: Level) -> float | None:
        """Returns the share of the sampled ids that hit, if the lines hold the most used rows.

        It is None without a cache or a sample.
        """
        if level.fraction is None or not self.use.size:
            return None
        pool = self.vocabulary(level)
        num_rows = self.num_sampled_rows if pool is None else pool.num_rows
        num_lines = max(1, int(level.fraction * num_rows))
        return float(self.use[:num_lines].sum() / self.use.sum())

    def is_idle(self, level: Level) -> bool:
        """Returns whether a level is INT4 + 5 %, and INT4 + 1 % would have nearly as many hits."""
        few, many = (self.hits(level._replace(fraction=share)) for share in (0.01, 0.05))
        is_large = level[:2] == ("int4", 0.05)
        return is_large and few is not None and many is not None and many - few < 0.02


def _small(sizes: dict[str, tuple[int | None, int]]) -> dict[str, int]:
    """Returns the small tables, and the bytes of each in float32."""
    return {
        name: 4 * rows * dim
        for name, (rows, dim) in sizes.items()
        if rows is not None and rows <= _TINY_ROWS
    }


def _stacks(
    sizes: dict[str, tuple[int | None, int]], samples: dict[str, Any], small: Collection[str]
) -> dict[str, _Stack]:
    """Divides the tables into stacks by dim, and separates tables of raw ids and those of `small`.

    A table for whose rows a stack has no room, as a stack has fewer than 2**31 - 1 rows, begins
    another stack.
    """
    tables: dict[str, list[TableSpec]] = {}
    newest: dict[str, tuple[str, int]] = {}  # of each kind, the name of the last stack and its rows
    for name, (rows, dim) in sizes.items():
        kind = f"{'raw' if rows is None else 'small' if name in small else 'dim'}{dim}"
        stack, total = newest.get(kind, (kind, 0))
        total += rows or 0
        if total >= NO_ID:
            number = 1 + sum(known.split("_")[0] == kind for known in tables)
            stack, total = f"{kind}_{number}", rows or 0
        newest[kind] = stack, total
        tables.setdefault(stack, []).append(TableSpec(name, rows))
    return {
        name: _stack(tuple(held), sizes[held[0].name][1], name.startswith("small"), samples)
        for name, held in tables.items()
    }


def _stack(
    tables: tuple[TableSpec, ...], dim: int, is_tiny: bool, samples: dict[str, Any]
) -> _Stack:
    """Counts the sampled ids of a stack, and returns it with the levels that it may have."""
    names = [table.name for table in tables]
    is_raw = tables[0].vocabulary_size is None
    num_sampled_rows = 0
    if is_raw:
        counts = [_raw_counts(name, number, samples) for number, name in enumerate(names)]
        tables = tuple(
            dataclasses.replace(table, initial_bound=of.size**-0.5) if of.size else table
            for table, of in zip(tables, counts, strict=True)
        )
    else:
        known = [table for table in tables if np.size(samples.get(table.name, ()))]
        counts = [_row_counts(table, samples[table.name]) for table in known]
        num_sampled_rows = sum(map(size_of, known))
    use = np.sort(np.concatenate([np.zeros(0, np.int64), *counts]))[::-1]
    levels = RAW_LEVELS if is_raw else LEVELS[:1] if is_tiny else LEVELS
    stack = _Stack(tables, dim, (), is_tiny, use, num_sampled_rows)
    if is_raw and not stack.num_ids(2):
        raise ValueError(
            f"no id occurs twice in the samples of {names}, so they do not show which ids earn a "
            "row; give longer samples in ids"
        )
    # A k that no sampled id reaches would make a pool without rows.
    possible = [n for n in levels if n.admit_after is None or stack.num_ids(n.admit_after)]
    return stack._replace(levels=tuple(n for n in possible if not stack.is_idle(n)))


def _row_counts(table: TableSpec, sample: Any) -> np.ndarray:
    """Returns how often each row number of a table's sample occurs.

    NO_ID and masked entries are padding.
    """
    array = row_ids.on_host(sample)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"table {table.name!r} has rows, so its sample must be row numbers, integers, got "
            f"{array.dtype}; for raw ids, give the table as (None, dim)"
        )
    rows, counts = np.unique(array[array != NO_ID], return_counts=True)
    if rows.size and not 0 <= rows[0] <= rows[-1] < size_of(table):
        raise ValueError(
            f"the sample of table {table.name!r} must be in [0, {size_of(table)}), got {rows[0]} "
            f"to {rows[-1]}; for raw ids, give the table as (None, dim)"
        )
    return counts


def _raw_counts(table: str, number: int, samples: dict[str, Any]) -> np.ndarray:
    """Returns how often each raw id of a table's sample occurs. Ids of equal hashes are one id."""
    if table not in samples:
        raise ValueError(
            f"table {table!r} has no rows, so its ids are raw: give a sample of them, "
            f"ids={{{table!r}: integers, bytes or strings}}"
        )
    pairs = hashes.of_column(samples[table], table, number).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != hashes.PADDING].astype(np.uint64)
    return np.unique(pairs[:, 0] << np.uint64(32) | pairs[:, 1], return_counts=True)[1]


def _reason(stack: _Stack, level: Level, is_host: bool, choice: Choice, devices: int) -> str:
    if stack.is_tiny:
        return f"{len(stack.tables)} small tables, whose float32 rows cost little"
    above = stack.levels[: stack.levels.index(level)]
    reason = f"{level.name} fits" + (f", {above[-1].name} does not" if above else "")
    if is_host:
        reason += " on the device" if above == stack.levels[:1] else ""
        reason += "; its packed rows are in host memory, its cache is on the device"
    if level.admit_after is not None:
        pool = choice.spec.vocabulary
        assert pool is not None
        seen = " / ".join(f"{stack.num_ids(times):,}" for times in (1, 2, 3))
        reason += (
            f"; {seen} ids of the sample occur at least 1 / 2 / 3 times; the pool has "
            f"{pool.num_rows:,} rows: one for each id that occurs at least k = "
            f"{level.admit_after} times, and a tenth more, rounded up to whole sets; rows start "
            "within initial_bound = 1/sqrt(ids of their table in the sample)"
        )
    if choice.placement is not None:
        kind = choice.placement.kind
        reason += "; a copy on each device" if kind == "replicated" else f"; divided by {kind}"
        if kind == "replicated" and (part := undivided(choice.spec, devices)):
            reason += f", because {devices} devices cannot divide its {part}"
    hits = stack.hits(level)
    reason += "" if hits is None else f"; the rows that fit the cache get {hits:.0%} of the ids"
    return reason


# --- bytes


# {stack: (its level, whether its rows are in host memory)}
_Chosen = dict[str, tuple[Level, bool]]


class _Bytes:
    """Makes the Choice of a stack at a level when it is first asked for, and keeps it."""

    def __init__(
        self,
        stacks: dict[str, _Stack],
        tx: optax.GradientTransformation,
        mesh: Any,
        batch_shape: tuple[int, ...] | None,
    ):
        self._stacks, self._tx = stacks, tx
        self.mesh, self._batch_shape = mesh, batch_shape
        self._known: dict[tuple[str, str, bool], Choice] = {}
        self._peaks: dict[tuple[tuple[str, str, bool], ...], int] = {}

    def __call__(self, name: str, level: Level, is_host: bool) -> Choice:
        """Returns a stack at a level, without a reason."""
        key = name, level.name, is_host
        if key not in self._known:
            self._known[key] = self._made(name, level, is_host)
        return self._known[key]

    def _made(self, name: str, level: Level, is_host: bool) -> Choice:
        stack = self._stacks[name]
        spec = EmbeddingSpec(
            stack.tables,
            stack.dim,
            level.storage,  # type: ignore[arg-type]  # a name is converted to a RowFormat
            level.cache(),
            memory_kind="pinned_host" if is_host else None,
            vocabulary=stack.vocabulary(level),
        )
        placement = None if self.mesh is None else sharding.plan(spec, self.mesh.size)
        found = report(spec, self._tx, self._shape(spec), mesh=self.mesh, placement=placement)
        temporary_bytes = 0
        if found.step_peak_bytes is not None:
            temporary_bytes = max(0, found.step_peak_bytes - found.total)
        return Choice(
            name=name,
            spec=spec,
            placement=placement,
            device_bytes=found.total - found.host_bytes,
            host_bytes=found.host_bytes,
            temporary_bytes=temporary_bytes,
            accuracy=level.accuracy_at(stack.dim),
            reason="",
        )

    def _shape(self, spec: EmbeddingSpec) -> tuple[int, ...] | None:
        """Returns the shape of a stack's ids in a batch; None if no batch was given."""
        if self._batch_shape is None:
            return None
        first, *rest = self._batch_shape
        return (first, len(spec.tables), *rest)

    def temporaries(self, chosen: _Chosen) -> int:
        """Returns the bytes that one step of all stacks needs beside their states."""
        least, most = self.bounds(chosen)
        if least == most:
            return most
        key = tuple((name, level.name, is_host) for name, (level, is_host) in chosen.items())
        if key not in self._peaks:
            choices = [self(name, *choice) for name, choice in chosen.items()]
            specs = [choice.spec for choice in choices]
            shapes = [shape for spec in specs if (shape := self._shape(spec)) is not None]
            layouts = [Layout.of(c.spec, self.mesh, None, c.placement) for c in choices]
            peak = reports.step_peak(specs, self._tx, shapes, layouts)
            states = sum(choice.device_bytes + choice.host_bytes for choice in choices)
            self._peaks[key] = peak - states
        return min(most, max(least, self._peaks[key]))

    def bounds(self, chosen: _Chosen) -> tuple[int, int]:
        """Returns the least and the most temporaries of one step: the largest, and their sum."""
        each = [self(name, *choice).temporary_bytes for name, choice in chosen.items()]
        return max(each), sum(each)


# --- the choice


class _Search:
    """The search for levels of all stacks that fit a budget together."""

    def __init__(self, stacks: dict[str, _Stack], bytes_of: _Bytes, host_limit: int):
        self.stacks, self.bytes_of, self._host_limit = stacks, bytes_of, host_limit
        self._levels = {name: stack.levels for name, stack in stacks.items()}
        self._num_levels = max(len(own) for own in self._levels.values())
        # The largest stacks go to the host first.
        least = self._all_at(self._num_levels - 1, set())
        by_size = sorted(stacks, key=lambda name: -bytes_of(name, *least[name]).device_bytes)
        self.by_size = [name for name in by_size if len(self._levels[name]) > 1]

    def choose(self, limit: int) -> _Chosen | None:
        """Returns the level of each stack, and whether its rows are in host memory.

        Returns None if nothing fits `limit` bytes per device.
        """

        def fits(chosen: _Chosen) -> bool:
            on_device, on_host = self._total(chosen)
            least, most = self.bytes_of.bounds(chosen)
            if on_host > self._host_limit or on_device + least > limit:
                return False
            return (
                on_device + most <= limit or on_device + self.bytes_of.temporaries(chosen) <= limit
            )

        found = next((chosen for chosen in self._tried() if fits(chosen)), None)
        return None if found is None else _improved(found, self._levels, self.by_size, fits)

    def needed(self) -> int:
        """Returns the smallest number of bytes per device that something fits."""
        possible = [
            chosen for chosen in self._tried() if self._total(chosen)[1] <= self._host_limit
        ]
        # What cannot be the smallest is not compiled.
        least = [self._total(chosen)[0] + self.bytes_of.bounds(chosen)[0] for chosen in possible]
        order = sorted(range(len(possible)), key=least.__getitem__)
        needed: int | None = None
        for index in order:
            if needed is None or least[index] < needed:
                chosen = possible[index]
                own = self._total(chosen)[0] + self.bytes_of.temporaries(chosen)
                needed = own if needed is None else min(needed, own)
        assert needed is not None  # what has no rows on the host is possible
        return needed

    def _tried(self) -> Iterator[_Chosen]:
        """Yields all stacks at each level in turn, then each stack at its smallest level.

        First no stack has its rows in host memory, then the largest one, and so on.
        """
        for num_hosted in range(len(self.by_size) + 1 if self._host_limit else 1):
            hosted = set(self.by_size[:num_hosted])
            for number in range(1 if hosted else 0, self._num_levels):
                yield self._all_at(number, hosted)
            yield {
                name: (self._smallest(name, name in hosted), name in hosted)
                for name in self._levels
            }

    def _all_at(self, number: int, hosted: set[str]) -> _Chosen:
        return {
            name: (own[min(number, len(own) - 1)], name in hosted)
            for name, own in self._levels.items()
        }

    def _smallest(self, name: str, is_host: bool) -> Level:
        own = _possible(self._levels[name], is_host)
        return min(own, key=lambda level: self.bytes_of(name, level, is_host).step_bytes)

    def _total(self, chosen: _Chosen) -> tuple[int, int]:
        """Returns the bytes on each device and those in host memory."""
        held = [self.bytes_of(name, *choice) for name, choice in chosen.items()]
        on_device = sum(choice.device_bytes for choice in held)
        return on_device, sum(choice.host_bytes for choice in held)


def _possible(levels: tuple[Level, ...], is_host: bool) -> tuple[Level, ...]:
    """Returns the levels of a stack on the device or on the host. Host rows are never float32."""
    return levels[1:] if is_host else levels


def _improved(
    chosen: _Chosen, levels: dict[str, tuple[Level, ...]], by_size: list[str], fits: Any
) -> _Chosen:
    """Gives stacks better levels as long as all stacks fit, the smallest stack first."""
    for name in reversed(by_size):
        level, is_host = chosen[name]
        own = _possible(levels[name], is_host)
        for better in own[: own.index(level)]:
            raised = chosen | {name: (better, is_host)}
            if fits(raised):
                chosen = raised
                break
    return chosen
