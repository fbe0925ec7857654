"""The paper's grid: which storages, caches and baselines are compared, and what each is called.

A `Case` is one line of the table and depends on nothing but itself, so that its name and its
settings say what was run.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from experiments.dlrm.training import Contender, Storage

Method = Literal["trained", "hashed", "narrow", "pruned", "post-training", "quantization-aware"]
STORAGES: tuple[Storage, ...] = (
    "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4", "int2",
)  # fmt: skip
CACHES = (0.0, 0.005, 0.01, 0.05, 0.1, 0.2)
POLICIES: tuple[Literal["lfu", "lru"], ...] = ("lfu", "lru")
ROUNDINGS: tuple[Literal["stochastic", "nearest"], ...] = ("stochastic", "nearest")
WAYS = (32, 1)
SHORT = {
    "float32": "FP32",
    "bfloat16": "BF16",
    "float16": "FP16",
    "float8_e4m3fn": "FP8",
    "float8_e5m2": "FP8 e5m2",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
      method: "trained": rows are trained as they are stored, the system itself. The others are
        baselines: "hashed": FP32 tables into which ids are hashed; "narrow": FP32 of a smaller dim;
        "pruned": FP32 rows of the most frequent ids, the others share one row per table;
        "post-training": trained in FP32, quantized at the end; "quantization-aware": an FP32 master
        seen through INT4 with one scale per table, as DQRM does.
      storage: of the rows, for "trained" and "post-training".
      cache: share of rows held in FP32 lines; 0: no cache.
      policy: of the cache.
      rounding: of every write to the table.
      ways: lines per set.
      symmetric: of an integer format; None: the library's choice for the dim.
      share: of FP32's bytes, for "hashed" and "pruned"; of the dim, for "narrow".
      small: the smallest tables, as many as have this share of all rows together, stay in FP32.
      admit_after: the occurrences from which on an id has a row of its own in a pool; all others
        share one row per table. 0: ids are numbered, and each has a row.
      pool: rows of that pool, as a share of all ids. 0: one for each id that occurs `admit_after`
        times in training, and a tenth more.
      shared_rows: of each table, for the ids without a row of their own.
      sketch_bytes: that count the ids without a row, for each row of the pool.
      window: ids per row of the pool after which counts of ids are halved.
      by_table: raw ids' rows start from values as large as those of numbered ids, ±1/√(ids of the
        table). Otherwise, all rows of the pool start from ±1/√(rows of the pool).
    """

    storage: Storage = "float32"
    cache: float = 0.0
    policy: Literal["lfu", "lru"] = "lfu"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    ways: int = 32
    symmetric: bool | None = None
    method: Method = "trained"
    share: float = 1.0
    small: float = 0.0
    admit_after: int = 0
    pool: float = 0.0
    shared_rows: int = 1
    sketch_bytes: int = 3
    window: int = 30
    by_table: bool = False

    @property
    def name(self) -> str:
        """What tables and pictures call it."""
        stored = SHORT.get(self.storage, self.storage.upper())
        match self.method:
            case "hashed" | "narrow" | "pruned":
                return f"FP32 {self.method} to {self.share:.3g}"
            case "post-training":
                return f"{stored} post-training"
            case "quantization-aware":
                return f"{stored} quantization-aware"
        if self.symmetric is not None:
            stored += " symmetric" if self.symmetric else " asymmetric"
        if self == Case(admit_after=self.admit_after, pool=self.pool):
            return ", ".join([stored, *self._admitted])
        words = [f"{stored} + {100 * self.cache:.3g} %" if self.cache else f"{stored} no cache"]
        words += ["LRU"] if self.cache and self.policy == "lru" else []
        words += (
            [f"{self.ways} way{'s' * (self.ways > 1)}"] if self.cache and self.ways != 32 else []
        )
        words += [self.rounding] if self.rounding != "stochastic" else []
        words += [f"{100 * self.small:.3g} % in small FP32 tables"] if self.small else []
        return ", ".join(words + self._admitted)

    @property
    def _admitted(self) -> list[str]:
        """The words about raw ids."""
        words = [f"a row from {self.admit_after} on"] if self.admit_after else []
        words += [f"pool of {100 * self.pool:.3g} %"] if self.pool else []
        words += [f"{self.shared_rows} shared rows"] if self.shared_rows > 1 else []
        if self.sketch_bytes != 3:
            words.append(f"sketch of {self.sketch_bytes} byte{'s' * (self.sketch_bytes > 1)}")
        words += [f"window of {self.window}"] if self.window != 30 else []
        words += ["initial values by table"] * self.by_table
        return words

    @property
    def family(self) -> str | None:
        """The method on whose curve this case is a point.

        None for variants (nearest, LRU, other ways, symmetric).
        """
        if self.method != "trained":
            return self.name.split(" to ")[0]
        stored = SHORT.get(self.storage, self.storage.upper())
        if self == Case(self.storage, self.cache):
            return stored
        if self == Case(self.storage, self.cache, admit_after=self.admit_after, pool=self.pool):
            # Pools of several sizes are points of one curve.
            return ", ".join([stored, *self._admitted[:1], *["small pools"] * bool(self.pool)])
        return (
            f"{stored} + small FP32 tables"
            if self == Case(self.storage, self.cache, small=self.small)
            else None
        )

    def contender(self) -> Contender:
        """Returns how training stores the rows.

        For "post-training" and the FP32 baselines, this is the form before any later change.
        """
        if self.method != "trained":
            hashed_to = self.share if self.method == "hashed" else 1.0
            return Contender(self.name, "float32", 0.0, hashed_to=hashed_to)
        return Contender(
            self.name, self.storage, self.cache, self.rounding, self.policy, self.ways,
            symmetric=self.symmetric,
            float32_share=self.small,
        )  # fmt: skip


FP32 = Case()
SHARES = (
    0.5,
    0.34,
    0.22,
    0.16,
    0.1,
)  # about the bytes of INT8 + 5 %, INT4 + 5 %, INT4 + 1 %, INT2 + 2 %
CORE = (
    FP32,
    Case("int8", 0.05), Case("int8"), Case("int8", rounding="nearest"),
    Case("int4", 0.1), Case("int4", 0.05), Case("int4", 0.01), Case("int4", 0.005), Case("int4"),
    Case("int4", rounding="nearest"), Case("int4", 0.01, rounding="nearest"),
    Case("int4", 0.05, "lru"), Case("int4", 0.01, "lru"), Case("int4", 0.01, ways=1),
    Case("int2", 0.1), Case("int2", 0.05), Case("int2", 0.02), Case("int2", 0.01), Case("int2"),
    Case("int2", 0.05, "lru"), Case("int2", 0.05, ways=1),
    *(Case("int4", cache, small=0.01) for cache in (0.0, 0.01)),
    *(Case("int2", cache, small=0.01) for cache in (0.0, 0.01, 0.02)),
    *(Case(method="hashed", share=share) for share in SHARES),
    *(Case(method="pruned", share=share) for share in SHARES),
    *(Case(method="narrow", share=share) for share in (0.5, 0.25)),
    Case("int8", method="post-training"), Case("int4", method="post-training"),
    Case("int2", method="post-training"),
    Case("int4", method="quantization-aware"),
)  # fmt: skip
FLOATS = (
    Case("bfloat16"),
    Case("float16"),
    Case("float8_e4m3fn"),
    Case("float8_e4m3fn", rounding="nearest"),
)
TARGETS = (
    FP32, Case("int8", 0.05), Case("int4", 0.01), Case("int4"), Case("int4", rounding="nearest"),
    Case("int2", 0.05), Case("int2", 0.02), Case("int2", 0.01, small=0.01),
    Case("int4", small=0.01), Case(method="hashed", share=0.34), Case(method="hashed", share=0.16),
)  # fmt: skip


# Wide rows: the symmetric format saves two bytes, and INT2's metadata weigh little enough for a
# ratio above ten.
WIDE = (
    Case("int4", 0.01, symmetric=True),
    Case("int2", 0.02, small=0.01),
    Case("int2", 0.015, small=0.01),
)


# Raw ids: a row for each id that occurs so often, in a pool sized for them. Then pools that are too
# small for the ids that occur twice, so that rows are recycled. Then smaller sketches,
# and rare ids that share more rows. Then rows that start from values as large as in tables of
# numbered ids.
RAW = (
    FP32, Case("int8", 0.05), Case("int4", 0.05), Case("int4", 0.01),
    *(
        Case(storage, cache, admit_after=times)
        for times in (1, 2, 3, 5)
        for storage, cache in (
            ("float32", 0.0), ("int8", 0.05), ("int4", 0.1), ("int4", 0.05), ("int4", 0.01),
        )
    ),
    *(
        Case("int4", cache, admit_after=2, pool=pool)
        for pool in (0.15, 0.2, 0.25, 0.3)
        for cache in (0.05, 0.01)
    ),
    *(
        Case("int4", 0.01, admit_after=2, pool=pool, sketch_bytes=size)
        for pool, size in ((0.3, 2), (0.3, 1), (0.28, 2))
    ),
    *(
        Case("int4", cache, admit_after=times, window=300)
        for times in (2, 3, 5)
        for cache in (0.05, 0.01)
    ),
    *(
        Case("int4", 0.01, admit_after=2, pool=pool, sketch_bytes=size, window=300)
        for pool, size in ((0.3, 1), (0.28, 1), (0.27, 1), (0.25, 3), (0.25, 1), (0.2, 1))
    ),
    *(
        Case("int8", 0.01, admit_after=2, pool=pool, sketch_bytes=1, window=300)
        for pool in (0.27, 0.2, 0.18, 0.15)
    ),
    Case("int4", 0.01, admit_after=2, pool=0.3, shared_rows=256),
    *(
        Case(storage, 0.05, admit_after=times, by_table=True)
        for storage, times in (
            ("int8", 2), ("int8", 3), ("int8", 5), ("int4", 2), ("int4", 3), ("int4", 5),
        )
    ),
    *(
        Case("int4", 0.01, admit_after=2, pool=pool, sketch_bytes=size, by_table=True)
        for pool, size in ((0.3, 3), (0.3, 1), (0.25, 2), (0.25, 1))
    ),
    *(Case(method="hashed", share=share) for share in (0.12, 0.06)),
    *(Case(method="pruned", share=share) for share in (0.12, 0.06)),
)  # fmt: skip


def raw(embedding_dim: int) -> tuple[Case, ...]:
    """Returns the lines about raw ids, which earn their rows, and baselines of equal bytes."""
    return RAW


def headline(embedding_dim: int) -> tuple[Case, ...]:
    """Returns the lines that answer the question, some forty."""
    return tuple(dict.fromkeys(CORE if embedding_dim < 32 else (*CORE, *WIDE)))


def targets(embedding_dim: int) -> tuple[Case, ...]:
    """Returns the few lines of the paper's own claim, for data where a run takes long."""
    return TARGETS if embedding_dim < 32 else (*TARGETS, *WIDE)


def full(embedding_dim: int) -> tuple[Case, ...]:
    """Returns every storage, cache, policy, rounding and number of ways, and the baselines.

    FP32 with a cache is the same as FP32, so it appears once.
    """
    product = (
        Case(storage, cache, policy, rounding, ways)
        for storage, cache, policy, rounding, ways in itertools.product(
            STORAGES, CACHES, POLICIES, ROUNDINGS, WAYS
        )
        if (cache or (policy, ways) == ("lfu", 32))
        and (storage != "float32" or rounding == "stochastic")
    )
    return tuple(dict.fromkeys((*headline(embedding_dim), *FLOATS, *product)))


def choose(
    cases: Sequence[Case],
    *,
    storage: Sequence[str] | None = None,
    cache: Sequence[float] | None = None,
    policy: Sequence[str] | None = None,
    rounding: Sequence[str] | None = None,
    ways: Sequence[int] | None = None,
    method: Sequence[str] | None = None,
    admit_after: Sequence[int] | None = None,
) -> tuple[Case, ...]:
    """Keeps the cases whose fields are among those named (None: all).

    FP32 is always kept, because differences are taken to it.

    Raises:
      ValueError: if nothing but FP32 is left.
    """
    wanted = {
        "storage": storage,
        "cache": cache,
        "policy": policy,
        "rounding": rounding,
        "ways": ways,
        "method": method,
        "admit_after": admit_after,
    }
    kept = [
        c for c in cases if all(v is None or getattr(c, field) in v for field, v in wanted.items())
    ]
    if not [c for c in kept if c != FP32]:
        asked = ", ".join(
            f"--{name.replace('_', '-')} {' or '.join(map(str, v))}"
            for name, v in wanted.items()
            if v is not None
        )
        raise ValueError(f"no case of the grid has {asked}")
    return tuple(dict.fromkeys((FP32, *kept)))
