"""The planner: from tables and a budget to stacks that fit, with the reason of each choice.

Formats are tried in the order of the accuracy that was measured with them. First, all stacks but
those of small tables get the best format that all of them can have within the budget. Then single
stacks go up to better formats while the budget allows it, the smallest stack first. Bytes count
every array of the state: those of `report` on one device, those of `shard_bytes` on several.

The planner does not plan stacks of raw ids: it chooses neither the size of a pool nor a rule of
admission.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from mpembed_jax import sharding
from mpembed_jax.cache.spec import CacheSpec
from mpembed_jax.memory import reports
from mpembed_jax.memory.reports import report
from mpembed_jax.mesh.layout import Layout
from mpembed_jax.mesh.placement import Placement
from mpembed_jax.row_ids import NO_ID
from mpembed_jax.spec import EmbeddingSpec, TableSpec, size_of

# Tables of at most so many rows may share a stack in float32, apart from larger tables. Together,
# they may take this share of the budget of all devices.
_TINY_ROWS, _TINY_SHARE = 10_000, 0.02
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SOURCE = "experiments/accuracy/README.md, Reddit"


class Level(NamedTuple):
    """A format, with or without a cache, and its measured AUC minus that of float32."""

    storage: str
    fraction: float | None  # share of the rows that the cache has lines for; None: no cache
    accuracy: dict[int, str]  # {dim: AUC minus that of float32}, as measured in SOURCE

    @property
    def name(self) -> str:
        """The level in words."""
        cache = "" if self.fraction is None else f" + {self.fraction:.0%}"
        return f"{self.storage}{cache}"

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


@dataclasses.dataclass(frozen=True)
class Choice:
    """One stack of a plan."""

    name: str
    spec: EmbeddingSpec
    placement: Placement | None  # over the devices; None for one device
    device_bytes: int  # of the state, on each device
    host_bytes: int  # of the state, in host memory
    temporary_bytes: int  # of one training step, beside the state; 0 without batch_shape
    accuracy: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stacks that fit a budget; str() gives a readable table."""

    choices: tuple[Choice, ...]
    budget: int  # bytes per device
    devices: int

    @property
    def specs(self) -> dict[str, EmbeddingSpec]:
        """The spec of each stack by its name."""
        return {choice.name: choice.spec for choice in self.choices}

    @property
    def device_bytes(self) -> int:
        """Bytes on each device: all states, and the temporaries of one step if they are known."""
        return sum(choice.device_bytes + choice.temporary_bytes for choice in self.choices)

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(choice.host_bytes for choice in self.choices)

    def __str__(self) -> str:
        lines = [("stack", "rows", "dim", "format", "device bytes", "host bytes", "accuracy")]
        for choice in self.choices:
            spec = choice.spec
            cache = "" if spec.cache is None else f" + {spec.cache.fraction:.0%}"
            lines.append(
                (
                    choice.name,
                    f"{spec.num_rows:,}",
                    str(spec.embedding_dim),
                    spec.storage.name + cache,
                    f"{choice.device_bytes:,}",
                    f"{choice.host_bytes:,}",
                    choice.accuracy,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in lines]
        text = [line.rstrip() for line in text]
        text += [f"{choice.name}: {choice.reason}" for choice in self.choices]
        if temporary := sum(choice.temporary_bytes for choice in self.choices):
            text.append(f"temporaries of one step: {temporary:,} bytes")
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        text.append(f"{self.device_bytes:,} of {self.budget:,} bytes{each}")
        text.append(f"accuracy: measured, {SOURCE}")
        return "\n".join(text)


def parse_bytes(size: int | str) -> int:
    """Returns a size in bytes: "16GB" is 16 * 10^9, "16GiB" is 16 * 2^30.

    Args:
      size: a number of bytes, or a text of a number and a unit.

    Raises:
      ValueError: if size is neither, or is below one byte.
    """
    found = re.fullmatch(r"\s*([\d_.]+)\s*([kmgt]?i?)b?\s*", str(size).lower())
    try:
        bytes_ = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (ValueError, KeyError, OverflowError):
        bytes_ = 0
    if bytes_ < 1:
        raise ValueError(f'a size is a number of bytes or a text such as "16GB", got {size!r}')
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

    Tables of one dim share a stack. Small tables of one dim share another stack, in float32, if
    together they take little of the budget. Nothing is allocated.

    Args:
      tables: {name: (rows, dim)}, or a sequence of (rows, dim).
      budget: bytes per device, a number or a text such as "16GB".
      tx: optax transformation for the rows.
      devices: the number of devices. They divide the rows of a stack, or each holds a copy.
      ids: {table: sample of its ids, integers}. It shows which share of the ids the most used rows
        get. INT4 with a cache of 5 % is left out where one of 1 % gets nearly as many of the ids.
      batch_shape: (B,), or (B, L) for bags: the ids of one table in a batch. If given, a step of
        each stack is compiled, as by `report`, and its temporaries count. Those of all stacks are
        added up. This is an upper bound for a program that trains all of them: in a step of bags,
        XLA uses memory of one stack again for another. For one device only.
      host_budget: bytes of host memory that tables may take if they do not fit on the device. For
        one device only. None: no host memory is used.

    Returns:
      A Plan.

    Raises:
      TypeError: if tables are neither a mapping nor a sequence.
      ValueError: if a table or an argument is wrong; or if nothing fits. The message then says the
        smallest budget that works.
    """
    sizes = _sizes(tables)
    limit = parse_bytes(budget)
    host_limit = 0 if host_budget is None else parse_bytes(host_budget)
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if devices > 1 and (batch_shape is not None or host_budget is not None):
        raise ValueError(
            "batch_shape and host_budget are for one device; leave them out, and leave room for "
            "the batch in the budget"
        )
    samples = {name: np.asarray(sample).reshape(-1) for name, sample in (ids or {}).items()}
    if unknown := sorted(set(samples) - set(sizes)):
        raise ValueError(f"ids name tables {unknown}, which are not among {list(sizes)}")
    stacks = _stacks(sizes, limit * devices)
    bytes_of = _Bytes(stacks, tx, devices, batch_shape)
    levels = {
        name: _levels(name, stack, samples) if name not in stacks.tiny else [LEVELS[0]]
        for name, stack in stacks.tables.items()
    }
    chosen = _fit(levels, bytes_of, limit, host_limit)
    choices = []
    for name, (level, is_host) in chosen.items():
        choice = bytes_of(name, level, is_host)
        reason = _reason(name, level, is_host, levels[name], name in stacks.tiny, choice)
        hits = _hits(stacks.tables[name], samples, level.fraction)
        reason += "" if hits is None else f"; the rows that fit the cache get {hits:.0%} of the ids"
        choices.append(dataclasses.replace(choice, reason=reason))
    return Plan(tuple(choices), limit, devices)


# --- tables and stacks


def _sizes(tables: Any) -> dict[str, tuple[int, int]]:
    if isinstance(tables, Mapping):
        found = dict(tables)
    elif isinstance(tables, Sequence) and not isinstance(tables, str):
        found = {f"table{index}": size for index, size in enumerate(tables)}
    else:
        raise TypeError(
            f"tables must be {{name: (rows, dim)}} or a sequence of (rows, dim), got {tables!r}"
        )
    sizes = {}
    for name, size in found.items():
        if not isinstance(size, Sequence) or len(size) != 2 or any(int(n) != n for n in size):
            raise ValueError(f"table {name!r} must be (rows, dim), got {size!r}")
        rows, dim = (int(n) for n in size)
        if not 1 <= rows < NO_ID or dim < 1:
            raise ValueError(
                f"table {name!r} must have 1 to {NO_ID - 1} rows and a dim of at least 1, got "
                f"{rows} rows of dim {dim}"
            )
        sizes[name] = rows, dim
    if not sizes:
        raise ValueError("tables must name at least one table, got none")
    return sizes


class _Stacks(NamedTuple):
    tables: dict[str, tuple[TableSpec, ...]]
    dims: dict[str, int]
    tiny: frozenset[str]  # names of stacks of small tables


def _stacks(sizes: dict[str, tuple[int, int]], limit: int) -> _Stacks:
    """Divides the tables into stacks by dim, and separates small tables from large ones."""
    small = {name for name, (rows, _) in sizes.items() if rows <= _TINY_ROWS}
    if sum(4 * sizes[n][0] * sizes[n][1] for n in small) > _TINY_SHARE * limit:
        small = set()
    tables: dict[str, list[TableSpec]] = {}
    dims = {}
    for name, (rows, dim) in sizes.items():
        stack = f"small{dim}" if name in small else f"dim{dim}"
        tables.setdefault(stack, []).append(TableSpec(name, rows))
        dims[stack] = dim
    tiny = frozenset(stack for stack in tables if stack.startswith("small"))
    return _Stacks({name: tuple(held) for name, held in tables.items()}, dims, tiny)


def _hits(
    tables: tuple[TableSpec, ...], samples: dict[str, np.ndarray], fraction: float | None
) -> float | None:
    """Returns the share of the sampled ids that the most used rows get.

    Args:
      tables: the tables of one stack.
      samples: sampled ids of tables, by name.
      fraction: which share of the rows counts as the most used; None without a cache.

    Returns:
      None without a cache or a sample.
    """
    known = [t for t in tables if t.name in samples and samples[t.name].size]
    if fraction is None or not known:
        return None
    counts = [np.unique(samples[t.name], return_counts=True)[1] for t in known]
    use = np.sort(np.concatenate(counts))[::-1]
    num_lines = max(1, int(fraction * sum(size_of(t) for t in known)))
    return float(use[:num_lines].sum() / use.sum())


def _levels(
    name: str, tables: tuple[TableSpec, ...], samples: dict[str, np.ndarray]
) -> list[Level]:
    """Returns the levels that a stack may have, the most accurate first."""
    found = list(LEVELS)
    few, many = (_hits(tables, samples, fraction) for fraction in (0.01, 0.05))
    if few is not None and many is not None and many - few < 0.02:
        found = [level for level in found if level[:2] != ("int4", 0.05)]
    return found


def _reason(
    name: str, level: Level, is_host: bool, levels: list[Level], is_tiny: bool, choice: Choice
) -> str:
    spec = choice.spec
    if is_tiny:
        return f"{len(spec.tables)} small tables, whose float32 rows cost little"
    above = levels[: levels.index(level)]
    reason = "float32 fits" if not above else f"{level.name} fits, {above[-1].name} does not"
    if is_host:
        reason += " on the device" if above == levels[:1] else ""
        reason += "; its packed rows are in host memory, its cache is on the device"
    if choice.placement is not None:
        kind = choice.placement.kind
        reason += "; a copy on each device" if kind == "replicated" else f"; divided by {kind}"
    return reason


# --- bytes


class _Bytes:
    """Makes the Choice of a stack at a level when it is first asked for, and keeps it."""

    def __init__(
        self,
        stacks: _Stacks,
        tx: optax.GradientTransformation,
        devices: int,
        batch_shape: tuple[int, ...] | None,
    ):
        self._stacks, self._tx = stacks, tx
        self._devices, self._batch_shape = devices, batch_shape
        self._known: dict[tuple[str, str, bool], Choice] = {}

    def __call__(self, name: str, level: Level, is_host: bool) -> Choice:
        """Returns a stack at a level, without a reason."""
        key = name, level.name, is_host
        if key not in self._known:
            self._known[key] = self._made(name, level, is_host)
        return self._known[key]

    def _made(self, name: str, level: Level, is_host: bool) -> Choice:
        dim = self._stacks.dims[name]
        spec = EmbeddingSpec(
            self._stacks.tables[name],
            dim,
            level.storage,  # type: ignore[arg-type]  # a name is converted to a RowFormat
            level.cache(),
            memory_kind="pinned_host" if is_host else None,
        )
        placement = None
        host_bytes = temporary_bytes = 0
        if self._devices > 1:
            placement = sharding.plan(spec, self._devices)
            device_bytes = shard_bytes(spec, self._tx, placement, self._devices)
        else:
            shape = None
            if self._batch_shape is not None:
                first, *rest = self._batch_shape
                shape = (first, len(spec.tables), *rest)
            found = report(spec, self._tx, shape)
            host_bytes = found.host_bytes
            device_bytes = found.total - host_bytes
            if found.step_peak_bytes is not None:
                temporary_bytes = max(0, found.step_peak_bytes - found.total)
        return Choice(
            name=name,
            spec=spec,
            placement=placement,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            temporary_bytes=temporary_bytes,
            accuracy=level.accuracy_at(dim),
            reason="",
        )


def shard_bytes(
    spec: EmbeddingSpec, tx: optax.GradientTransformation, placement: Placement, devices: int
) -> int:
    """Returns the bytes of a stack's state on each device of a mesh.

    Args:
      spec: the stack.
      tx: optax transformation for the rows.
      placement: how the stack is divided.
      devices: the number of devices that divide it.
    """
    is_whole = placement.kind == "replicated"
    layout = None if is_whole else Layout.bare(spec, placement, devices)
    return reports.nbytes(reports.state_shapes(spec, tx, layout))


# --- the choice

_Chosen = dict[str, tuple[Level, bool]]


def _fit(levels: dict[str, list[Level]], bytes_of: _Bytes, limit: int, host_limit: int) -> _Chosen:
    """Returns the level of each stack, and whether its rows are in host memory.

    Raises:
      ValueError: if nothing fits.
    """

    def total(chosen: _Chosen) -> tuple[int, int]:
        held = [bytes_of(name, *choice) for name, choice in chosen.items()]
        on_device = sum(choice.device_bytes + choice.temporary_bytes for choice in held)
        return on_device, sum(choice.host_bytes for choice in held)

    def fits(chosen: _Chosen) -> bool:
        on_device, on_host = total(chosen)
        return on_device <= limit and on_host <= host_limit

    def all_at(number: int, hosted: set[str]) -> _Chosen:
        return {
            name: (own[min(number, len(own) - 1)], name in hosted) for name, own in levels.items()
        }

    def smallest(name: str, is_host: bool) -> Level:
        own = _possible(levels[name], is_host)
        return min(own, key=lambda level: bytes_of(name, level, is_host).device_bytes)

    def tried_with(hosted: set[str]) -> list[_Chosen]:
        """Returns all stacks at each level in turn, then each stack at its smallest level."""
        found = [all_at(number, hosted) for number in range(1 if hosted else 0, num_levels)]
        return [*found, {name: (smallest(name, name in hosted), name in hosted) for name in levels}]

    num_levels = max(len(own) for own in levels.values())
    # The largest stacks go to the host first.
    least = all_at(num_levels - 1, set())
    by_size = sorted(levels, key=lambda n: -bytes_of(n, *least[n]).device_bytes)
    by_size = [name for name in by_size if len(levels[name]) > 1]
    counts = range(len(by_size) + 1 if host_limit else 1)
    for num_hosted in counts:
        for chosen in tried_with(set(by_size[:num_hosted])):
            if fits(chosen):
                return _improved(chosen, levels, by_size, fits)
    tried = [total(chosen) for num in counts for chosen in tried_with(set(by_size[:num]))]
    needed = min(on_device for on_device, on_host in tried if on_host <= host_limit)
    raise ValueError(
        f"nothing fits {limit:,} bytes per device; the smallest budget that works is {needed:,} "
        "bytes"
        + (
            ""
            if host_limit
            else " (or give host_budget=, so that packed rows may be in host memory)"
        )
    )


def _possible(levels: list[Level], is_host: bool) -> list[Level]:
    """Returns the levels of a stack on the device or on the host: rows there are never float32."""
    return levels[1:] if is_host else levels


def _improved(
    chosen: _Chosen, levels: dict[str, list[Level]], by_size: list[str], fits: Any
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
