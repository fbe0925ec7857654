"""The bytes floor of a step: what must pass through memory at least once, by verb, from a spec and a step's own counts.

Counted is each row of the batch once per verb that must read or write it (positions share the cache), every vector and
gradient of the batch, and the words of integer bookkeeping per id; not counted is anything that an implementation adds.
Divide by the measured copy bandwidth, bytes read plus bytes written per second.
"""

import dataclasses
from collections.abc import Mapping

import mpembed_jax as mpembed


@dataclasses.dataclass(frozen=True)
class Work:
    """How much one step has to do; all fields are numbers of rows, positions or bytes per row."""

    positions: int  # ids of the batch, N
    unique: int
    cached: int  # unique rows that sit in a line
    filled: int  # newcomers
    write_backs: int  # dirty victims
    row_bytes: int  # of a packed row
    vector_bytes: int  # of a float32 row
    ways: int  # 0: no cache

    @classmethod
    def of(cls, spec: mpembed.EmbeddingSpec, positions: int, counts: Mapping[str, int]) -> "Work":
        """Takes the counts of a step's plan."""
        has_cache = spec.cache is not None
        cached = counts["unique"] - counts["bypasses"] if has_cache else 0
        return cls(
            positions=positions,
            unique=counts["unique"],
            cached=cached,
            filled=max(0, cached - counts["hits"]) if has_cache else 0,
            write_backs=counts["write_backs"],
            row_bytes=spec.storage.row_bytes(spec.embedding_dim),
            vector_bytes=4 * spec.embedding_dim,
            ways=spec.cache.geometry(spec.num_rows).ways if has_cache else 0,  # type: ignore[union-attr]
        )

    @property
    def bookkeeping(self) -> int:
        """Ids in, inverse out; per unique id the tags of its set, two words of priority, four 16-bit counters."""
        return 8 * self.positions + self.unique * (4 * self.ways + (16 if self.ways else 0) + 8)

    @property
    def swap(self) -> int:
        """A victim's line is read and packed; a newcomer's packed row is read and its line written."""
        return (self.write_backs + self.filled) * (self.vector_bytes + self.row_bytes)

    @property
    def lookup(self) -> int:
        """Lines and packed rows are read, the unique rows written."""
        bypassed = self.unique - self.cached
        return self.cached * self.vector_bytes + bypassed * self.row_bytes + self.unique * self.vector_bytes

    @property
    def pool(self) -> int:
        """Unique rows are read, one vector per position written."""
        return (self.unique + self.positions) * self.vector_bytes + 4 * self.positions

    @property
    def row_gradients(self) -> int:
        """One gradient per position is read, one per unique row written."""
        return (self.positions + self.unique) * self.vector_bytes + 4 * self.positions

    @property
    def update(self) -> int:
        """Rows, gradients and one float of row state are read; lines or packed rows and the state written."""
        stored = self.cached * self.vector_bytes + (self.unique - self.cached) * self.row_bytes
        return self.unique * (2 * self.vector_bytes + 8 + 8) + stored

    @property
    def step(self) -> int:
        """All of it."""
        return sum(self.by_verb().values())

    def by_verb(self) -> dict[str, int]:
        """Bytes of each verb."""
        return {
            "prefetch": self.bookkeeping + self.swap,
            "lookup": self.lookup,
            "pool": self.pool,
            "row gradients": self.row_gradients,
            "apply_gradients": self.update,
        }
