"""Slow, obvious models of what the package must do, in NumPy and plain Python.

They are written from DESIGN.md alone. Nothing here imports the package or jax. `DictCache` is a
brute-force set-associative LRU / LFU cache, one Python object per line. `ExactLfuCache` replaces
its sketch by true counts. `DictEmbedding` adds rows to it, so a whole training step has one right
answer. `dense_training` trains every row. Row formats are in row_oracle.py.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

NO_ID = 2**31 - 1
SKETCH_SEEDS = (0x9E3779B9, 0x85EBCA6B)
F32 = np.float32


def fmix32(x):
    """Murmur3's finalizer."""
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


@dataclass(frozen=True)
class Geometry:
    """How many lines a cache gets and which set an id belongs to."""

    num_sets: int
    ways: int
    groups: int

    @property
    def lines(self):
        return self.num_sets * self.ways

    def set_of(self, row_id):
        group, rest = row_id % self.groups, row_id // self.groups
        return group + self.groups * (fmix32(rest) * (self.num_sets // self.groups) >> 32)

    def columns(self, row_id):
        """The two counters (sketch row, group, column) of an id."""
        group, rest = row_id % self.groups, row_id // self.groups
        width = 2 * self.lines // self.groups
        return [
            (d, group, fmix32(rest ^ seed) * width >> 32) for d, seed in enumerate(SKETCH_SEEDS)
        ]


NO_CACHE = Geometry(num_sets=1, ways=0, groups=1)


def geometry(num_ids, *, fraction=0.05, num_rows=None, ways=32):
    lines = max(1, num_rows if num_rows is not None else math.floor(fraction * num_ids))
    ways = min(ways, lines)
    sets = lines // ways
    groups = max([g for g in (2, 4, 8, 16, 32, 64) if sets / g >= 8], default=1)
    return Geometry(max(1, sets - sets % groups), ways, groups)


@dataclass
class Line:
    row_id: int
    priority: int
    dirty: bool = False
    row: object = None


COUNTS = (
    "requests",
    "unique",
    "hits",
    "hit_requests",
    "misses",
    "bypasses",
    "evictions",
    "write_backs",
)
COUNTS += ("out_of_range", "dropped")


@dataclass
class Plan:
    """What one prefetch decided, by id; `counts` as in CachePlan.counts."""

    line: dict  # id -> line number, or the number of lines for a bypass
    hits: set
    victims: dict  # newcomer id -> the Line it displaced
    dropped: set
    counts: dict
    occurrences: Counter = field(default_factory=Counter)


class DictCache:
    """Residency of a set-associative cache, one step at a time (DESIGN.md 7)."""

    def __init__(self, num_ids, geo, policy, *, max_unique_ids=None, step=0):
        self.num_ids, self.geo, self.policy, self.max_unique_ids, self.step = (
            num_ids,
            geo,
            policy,
            max_unique_ids,
            step,
        )
        self.sets = [[None] * geo.ways for _ in range(geo.num_sets)]
        self.sketch = {}  # (sketch row, group, column) -> count
        self.halvings = 0

    def prefetch(self, ids):
        t, geo = self.step, self.geo
        ids = [int(i) for i in np.asarray(ids).reshape(-1)]
        occurrences = Counter(i for i in ids if 0 <= i < self.num_ids)
        kept = sorted(occurrences, key=lambda i: fmix32(i ^ t))
        kept = (
            sorted(kept[: self.max_unique_ids]) if self.max_unique_ids is not None else sorted(kept)
        )
        dropped = set(occurrences) - set(kept)

        estimate = {}
        if self.policy == "lfu":
            period = max(1, 30 * geo.lines // len(ids)) if ids else 0
            if period and t > 0 and t % period == 0:
                self.halve()
            estimate = self.count({i: occurrences[i] for i in kept})
        use = (lambda i: estimate[i]) if self.policy == "lfu" else (lambda i: t)

        plan = Plan({}, set(), {}, dropped, {}, Counter({i: occurrences[i] for i in kept}))
        misses = {}
        for i in kept:
            ways = self.sets[geo.set_of(i)]
            for way, line in enumerate(ways):
                if line is not None and line.row_id == i:
                    plan.hits.add(i)
                    plan.line[i] = geo.set_of(i) * geo.ways + way
            if i not in plan.hits:
                misses.setdefault(geo.set_of(i), []).append(i)

        for s, wanted in misses.items():
            wanted.sort(key=lambda i: (-estimate[i], i) if self.policy == "lfu" else i)
            free = [
                w
                for w, line in enumerate(self.sets[s])
                if line is None or line.row_id not in plan.hits
            ]
            free.sort(key=lambda w: self.cost(self.sets[s][w], w, t))
            for rank, i in enumerate(wanted):
                plan.line[i] = geo.lines
                if rank >= len(free):
                    continue
                way = free[rank]
                resident = self.sets[s][way]
                if resident is not None:
                    if not resident.priority < use(i):
                        continue
                    plan.victims[i] = resident
                self.sets[s][way] = Line(i, use(i))
                plan.line[i] = s * geo.ways + way
        for i in plan.hits:
            self.line_of(i).priority = use(i)
        if self.policy == "lfu":
            self.remember({i: estimate[i] for i in kept if plan.line[i] == geo.lines})
            self.remember({line.row_id: line.priority for line in plan.victims.values()})

        self.step += 1
        plan.counts = {
            "requests": sum(occurrences.values()),
            "unique": len(kept),
            "hits": len(plan.hits),
            "hit_requests": sum(occurrences[i] for i in plan.hits),
            "misses": len(kept) - len(plan.hits),
            "bypasses": sum(line == geo.lines for line in plan.line.values()),
            "evictions": len(plan.victims),
            "write_backs": sum(line.dirty for line in plan.victims.values()),
            "out_of_range": sum(i != NO_ID and not 0 <= i < self.num_ids for i in ids),
            "dropped": len(dropped),
        }
        return plan

    def cost(self, line, way, t):
        """The order in which ways are given away."""
        if line is None:
            return (0, 0, way)
        age = min(t - line.priority, 2**25 - 1)
        return (1, {"lru": -age, "lfu": line.priority}[self.policy], way)

    def line_of(self, row_id):
        return next(
            (x for x in self.sets[self.geo.set_of(row_id)] if x is not None and x.row_id == row_id),
            None,
        )

    def mark_dirty(self, plan):
        for i, line in plan.line.items():
            if line < self.geo.lines:
                self.line_of(i).dirty = True

    def halve(self):
        self.halvings += 1
        self.sketch = {k: v >> 1 for k, v in self.sketch.items()}
        for line in (line for ways in self.sets for line in ways if line is not None):
            line.priority >>= 1

    def count(self, occurrences):
        """Estimates after this batch.

        A resident's use is counted at its line, everybody else's in the sketch.
        """
        lines = {i: self.line_of(i) for i in occurrences}
        used = {
            i: min(self.sketch.get(k, 0) for k in self.geo.columns(i))
            if line is None
            else line.priority
            for i, line in lines.items()
        }
        return {i: min(65535, used[i] + c) for i, c in occurrences.items()}

    def remember(self, uses):
        """Conservative update of the count-min sketch.

        It takes the estimates of ids that have no line.
        """
        for i, use in uses.items():
            for k in self.geo.columns(i):
                self.sketch[k] = max(self.sketch.get(k, 0), use)

    def arrays(self):
        """tags, priority, dirty as [S, W]; priority and dirty of empty ways are zero."""
        lines = [[line or Line(NO_ID, 0) for line in ways] for ways in self.sets]
        return tuple(
            np.array([[getattr(x, name) for x in ways] for ways in lines])
            for name in ("row_id", "priority", "dirty")
        )


class ExactLfuCache(DictCache):
    """LFU by true counts of every id ever seen, halved when the sketch would be."""

    def count(self, occurrences):
        for i, c in occurrences.items():
            self.sketch[i] = min(65535, self.sketch.get(i, 0) + c)
        return {i: self.sketch[i] for i in occurrences}

    def remember(self, uses):
        """True counts need no reminder."""


class DictEmbedding(DictCache):
    """The whole mixed-precision embedding trained by SGD, row by row.

    `store(row, stream, step, row_id)` is what one trip through the table does to a row. The streams
    are "WRITE_BACK", "BYPASS" and "FLUSH".
    """

    def __init__(self, table, geo, policy, store, **options):
        super().__init__(len(table), geo, policy, **options)
        self.table, self.store = {i: row.copy() for i, row in enumerate(table)}, store

    def train(self, ids, grads, learning_rate):
        """grads: f32 [N, D], one for each id position.

        Returns the plan and {id: row before the update}.
        """
        t = self.step
        plan = self.prefetch(ids)
        for line in plan.victims.values():
            if line.dirty:
                self.table[line.row_id] = self.store(line.row, "WRITE_BACK", t, line.row_id)
        for i, line in plan.line.items():
            if i not in plan.hits and line < self.geo.lines:
                self.line_of(i).row = self.table[i]
        rows = {i: self.read(i) for i in plan.line}
        for i, row in rows.items():
            new = row - F32(learning_rate) * grads[np.asarray(ids) == i].sum(0, dtype=F32)
            if (new == row).all():  # a row that its update does not move keeps its bits
                continue
            if plan.line[i] < self.geo.lines:
                self.line_of(i).row, self.line_of(i).dirty = new, True
            else:
                self.table[i] = self.store(new, "BYPASS", t, i)
        return plan, rows

    def read(self, row_id):
        line = self.line_of(row_id)
        return self.table[row_id] if line is None else line.row

    def flush(self):
        for line in (
            line for ways in self.sets for line in ways if line is not None and line.dirty
        ):
            self.table[line.row_id] = self.store(line.row, "FLUSH", self.step, line.row_id)
            line.dirty = False


def dense_training(table, batches, grads, learning_rate, *, feedback, adagrad=None):
    """Every row trained in float64, by SGD or Adagrad.

    The gradient of a position is `grads` there plus `feedback` times its row. Duplicates add up.
    `adagrad` is None, or (eps, initial accumulator, whether rows share one accumulator): G += g^2
    or its row mean, w -= lr g / (sqrt(G) + eps).
    """
    table = table.astype(np.float64)
    eps, initial, is_rowwise = adagrad or (0, 0, False)
    accumulator = np.full((len(table), 1 if is_rowwise else table.shape[1]), float(initial))
    for ids, g in zip(batches, grads, strict=True):
        total = np.zeros_like(table)
        for i, row in zip(ids, g, strict=True):
            if 0 <= i < len(table):
                total[i] += row + feedback * table[i]
        if adagrad:
            squares = total**2
            accumulator += squares.mean(1, keepdims=True) if is_rowwise else squares
            root = np.sqrt(accumulator) + eps
            total = np.divide(total, root, out=np.zeros_like(total), where=total != 0)
        table -= learning_rate * total
    return table


def code_of(use, noise):
    """The code of a use: up to 31 itself, then 16 steps for each doubling, rounded by noise."""
    if use < 32:
        return use
    exponent = use.bit_length() - 5
    code, rest = divmod(use, 1 << exponent)
    return 16 * exponent + code + (noise % (1 << exponent) < rest)


def use_of_code(code):
    return code if code < 32 else (16 + code % 16) << code // 16 - 1


class DictVocabulary:
    """Which raw id owns which row of a pool, one Python object per row (DESIGN.md 9)."""

    NO_TAG = 2**24 - 1
    MAX_USE = 491520  # what the code 254 means

    def __init__(
        self,
        num_rows,
        *,
        admit_after,
        ways,
        recycle=True,
        shared_rows=1,
        sketch_bytes=3,
        first_sets=None,
        place_bits=30,
        window=30,
    ):
        if first_sets is None:
            self.geo = geometry(num_rows, num_rows=num_rows, ways=ways)
        else:
            groups = geometry(first_sets, num_rows=first_sets, ways=1).groups
            sets = num_rows // ways
            self.geo = Geometry(sets - sets % groups, ways, groups)
        self.first = Geometry(first_sets or self.geo.num_sets, ways, self.geo.groups)
        self.place_bits, self.window = place_bits, window
        self.admit_after, self.recycle, self.shared = admit_after, recycle, shared_rows
        self.max_count = 15 if admit_after <= 16 else 255
        if not recycle and admit_after <= 4:
            self.max_count = 3
        counters = {3: 4, 15: 2, 255: 1}[self.max_count]  # in a byte
        self.width = counters * max(1, self.geo.lines * sketch_bytes // (2 * self.geo.groups))
        self.sets = [[None] * self.geo.ways for _ in range(self.geo.num_sets)]
        self.sketch = {}  # (sketch row, group, column) -> count, at most max_count
        self.step = 0
        self.totals = Counter()

    def identity(self, pair):
        """The set and tag of a pair; None of padding."""
        tag, place = (int(x) for x in pair)
        if tag == 2**32 - 1:
            return None
        if self.place_bits == 30:
            place ^= tag % 256
        tag = min(tag >> 8, self.NO_TAG - 1)
        return self.split(self.first.set_of(fmix32(place)), tag), tag

    def split(self, first, tag):
        """The set of a tag among those that a first set was split into."""
        parts = list(range(first, self.geo.num_sets, self.first.num_sets))
        span = 1
        while span < len(parts):
            span *= 2
        number = fmix32(tag ^ 0x6A09E667) % span
        return parts[number if number < len(parts) else number % (span // 2)]

    def mixed(self, home, tag):
        return fmix32(tag ^ fmix32(home % self.first.num_sets))

    def cells(self, home, tag):
        mixed = self.mixed(home, tag)
        return [
            (d, home % self.geo.groups, fmix32(mixed ^ seed) * self.width >> 32)
            for d, seed in enumerate(SKETCH_SEEDS)
        ]

    def remember(self, home, tag, use):
        for cell in self.cells(home, tag):
            self.sketch[cell] = max(self.sketch.get(cell, 0), min(self.max_count, use))

    def row_of(self, pair):
        """The row that a pair reads: its own or a shared one."""
        if (identity := self.identity(pair)) is None:
            return NO_ID
        home, short = identity
        for way, line in enumerate(self.sets[home]):
            if line is not None and line.row_id == short:
                return way * self.geo.num_sets + home
        tag, place = (int(x) for x in pair)
        return self.geo.lines + (place & 1023) * self.shared + (fmix32(tag) * self.shared >> 32)

    @classmethod
    def of_arrays(cls, tags, use, sketch, **options):
        """The model whose owners are tags and use [S, W], and whose counters are [2, G, width]."""
        model = cls(tags.size, **options)
        for home, way in np.argwhere(tags != cls.NO_TAG):
            model.sets[home][way] = Line(int(tags[home, way]), int(use[home, way]))
        model.sketch = {tuple(map(int, k)): int(sketch[tuple(k)]) for k in np.argwhere(sketch)}
        return model

    def prefetch(self, pairs):
        """Returns the rows of a batch's pairs [N, 2], and the rows that changed their owner."""
        pairs = [tuple(int(x) for x in pair) for pair in pairs]
        real = [identity for identity in map(self.identity, pairs) if identity is not None]
        if pairs:
            period = max(1, self.window * self.geo.lines // len(pairs))
            if self.step > 0 and self.step % period == 0:
                self.sketch = {k: v >> 1 for k, v in self.sketch.items()}
                for line in (x for ways in self.sets for x in ways if x is not None):
                    code = code_of(line.priority, 0)
                    line.priority = use_of_code(code >> 1 if code < 32 else code - 16)
        recycled = self.admit(Counter(real))
        rows = [self.row_of(pair) for pair in pairs]
        self.step += 1
        self.totals["requests"] += len(real)
        self.totals["shared_requests"] += sum(self.geo.lines <= row < NO_ID for row in rows)
        return rows, recycled

    def admit(self, occurrences):
        """Counts ids {(set, tag): occurrences}; returns the rows that changed their owner."""
        hits, newcomers, left, recycled = set(), {}, {}, set()
        for (home, tag), count in occurrences.items():
            line = next((x for x in self.sets[home] if x is not None and x.row_id == tag), None)
            if line is not None:
                line.priority = min(self.MAX_USE, line.priority + count)
                hits.add((home, tag))
                continue
            seen = min(self.sketch.get(cell, 0) for cell in self.cells(home, tag))
            estimate = min(self.MAX_USE, seen + count)
            if estimate >= self.admit_after:
                newcomers.setdefault(home, []).append((-estimate, tag))
            else:
                left[home, tag] = estimate
        victims = []
        for home, waiting in newcomers.items():
            ways = self.sets[home]
            free = [w for w, x in enumerate(ways) if x is None or (home, x.row_id) not in hits]
            free.sort(key=lambda w: (ways[w] is not None, ways[w].priority if ways[w] else 0, w))
            for rank, (negative, tag) in enumerate(sorted(waiting)):
                estimate = -negative
                way = free[rank] if rank < len(free) else None
                owner = ways[way] if way is not None else None
                if way is None or (
                    owner is not None and not (self.recycle and owner.priority < estimate)
                ):
                    self.totals["refusals"] += 1
                    left[home, tag] = estimate
                    continue
                if owner is not None:
                    victims.append((home, owner.row_id, owner.priority))
                    recycled.add(way * self.geo.num_sets + home)
                ways[way] = Line(tag, estimate)
                self.totals["admissions"] += 1
        for (home, tag), estimate in left.items():
            self.remember(home, tag, estimate)
        for victim in victims:
            self.remember(*victim)
        for home, tag in occurrences:
            for line in self.sets[home]:
                if line is not None and line.row_id == tag:
                    noise = fmix32(self.mixed(home, tag) ^ fmix32(self.step ^ 0xBB67AE85))
                    line.priority = use_of_code(code_of(line.priority, noise))
        self.totals["recyclings"] += len(recycled)
        return recycled

    def forget(self, pairs):
        """Deletes ids; returns their rows."""
        rows = set()
        for identity in filter(None, map(self.identity, pairs)):
            home, tag = identity
            for cell in self.cells(home, tag):
                self.sketch.pop(cell, None)
            for way, line in enumerate(self.sets[home]):
                if line is not None and line.row_id == tag:
                    self.sets[home][way] = None
                    rows.add(way * self.geo.num_sets + home)
        return rows

    def arrays(self):
        """tags and use as [S, W]."""
        lines = [[line or Line(self.NO_TAG, 0) for line in ways] for ways in self.sets]
        return tuple(
            np.array([[getattr(x, name) for x in ways] for ways in lines])
            for name in ("row_id", "priority")
        )
