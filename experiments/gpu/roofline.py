"""The bytes floor of a step: what must pass through memory at least once.

It is given by verb, from a spec and the counts of a step. Counted is each row of the batch once per
verb that must read or write it (positions share the cache), every vector and gradient of the batch,
and the words of integer bookkeeping per id; not counted is anything that an implementation adds.
Divide by the measured copy bandwidth, bytes read plus bytes written per second.

    # The Kaggle step on paper, for an H200's bandwidth. It writes results/roofline.json:
    python -m experiments.gpu.roofline

The counts come from training the same batches on this machine, in rows of one element: the cache's
decisions do not depend on the width.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.speed import workload
from experiments.speed.step import embedding_step


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
            ways=spec.cache.geometry(spec.num_rows).ways if has_cache else 0,
        )

    @property
    def bookkeeping(self) -> int:
        """The bytes of prefetch without the swap: ids in, inverse out, and metadata.

        Per unique id, the metadata are the tags of its set, two words of priority and four 16-bit
        counters.
        """
        return 8 * self.positions + self.unique * (4 * self.ways + (16 if self.ways else 0) + 8)

    @property
    def swap(self) -> int:
        """The bytes of the swap.

        A victim's line is read and packed. A newcomer's packed row is read and its line written.
        """
        return (self.write_backs + self.filled) * (self.vector_bytes + self.row_bytes)

    @property
    def lookup(self) -> int:
        """Lines and packed rows are read, the unique rows written."""
        bypassed = self.unique - self.cached
        return (
            self.cached * self.vector_bytes
            + bypassed * self.row_bytes
            + self.unique * self.vector_bytes
        )

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
        """The bytes of apply_gradients.

        Rows, gradients and one float of row state are read. Lines or packed rows and the state are
        written.
        """
        stored = self.cached * self.vector_bytes + (self.unique - self.cached) * self.row_bytes
        return self.unique * (2 * self.vector_bytes + 8 + 8) + stored

    @property
    def pooled_update(self) -> int:
        """The bytes of row gradients and update in one pass.

        No gradient of a row is written or read again.
        """
        return self.row_gradients + self.update - 2 * self.unique * self.vector_bytes

    @property
    def step(self) -> int:
        """All of it."""
        return sum(self.by_verb().values())

    def by_verb(self, *, is_pooled: bool = False) -> dict[str, int]:
        """Returns the bytes of each verb of a step.

        The step runs by gradients of rows, or by embed and apply_pooled_gradients.
        """
        verbs = {"prefetch": self.bookkeeping + self.swap, "lookup": self.lookup, "pool": self.pool}
        if is_pooled:
            return {"embed": sum(verbs.values()), "apply_pooled_gradients": self.pooled_update}
        return verbs | {"row gradients": self.row_gradients, "apply_gradients": self.update}


def counts_of(batch: int, skew: float, warm: int) -> dict[str, int]:
    """Trains on Kaggle's 26 tables (INT8, 5 % cache) until warm.

    Returns the counts of the last step.
    """
    tx, sizes = mpembed.optim.sgd(0.25), workload.sizes_for(None)
    tables = [mpembed.TableSpec(f"table{k}", size) for k, size in enumerate(sizes)]
    state = mpembed.init(jax.random.key(0), mpembed.EmbeddingSpec(tables, 1), tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: jax.Array) -> Any:
        state, plan, _, _ = embedding_step(state, ids, jnp.ones((*ids.shape, 1)), tx=tx)
        return state, plan.counts

    for turn in range(
        warm
    ):  # all different: of repeated batches the cache would soon hold every row
        ids = workload.to_global(workload.batches(turn, 1, batch, sizes, skew)[0], sizes)
        state, counts = step(state, ids)
    return {name: int(value) for name, value in dataclasses.asdict(jax.device_get(counts)).items()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to count for."""

    bandwidth: float = setting(
        4.3e12, "Bytes a second that a copy moves; an H200's is about 4.3e12.", "BYTES", above=0
    )
    skew: float = setting(1.05, "Exponent of the ids' Zipf law.", "EXPONENT", above=0, at_most=4)
    warm: int = setting(
        60,
        "Steps before the counted one, of 65,536 rows of data each.",
        "STEPS",
        at_least=1,
        at_most=100_000,
    )
    out: Path = setting(Path("experiments/results/roofline.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)


def run(settings: Settings) -> None:
    """Writes the floors of each verb for three dims and two batch sizes."""
    found, runs = provenance.environment(), []
    for batch in (65536, 16384):
        with running.working(f"training with batches of {batch}"):
            # The cache is filled by ids, not by steps.
            counts = counts_of(batch, settings.skew, settings.warm * 65536 // batch)
        for dim in (16, 64, 128):
            tables = [mpembed.TableSpec("ids", sum(workload.KAGGLE_SIZES))]
            work = Work.of(mpembed.EmbeddingSpec(tables, dim), batch * 26, counts)
            verbs = work.by_verb() | work.by_verb(is_pooled=True)
            micros = {
                verb: round(size / settings.bandwidth * 1e6, 1) for verb, size in verbs.items()
            }
            line = {
                "batch": batch,
                "dim": dim,
                "megabytes": round(work.step / 1e6, 1),
                "counts": counts,
            }
            runs.append(
                line
                | {
                    "microseconds": micros
                    | {"step": round(work.step / settings.bandwidth * 1e6, 1)}
                }
            )
            print(json.dumps(runs[-1]), flush=True)
    chosen = {
        "bytes_per_second": settings.bandwidth,
        "skew": settings.skew,
        "warm_steps": settings.warm,
    }
    found |= {"settings": chosen, "storage": "int8, 5 % cache", "runs": runs}
    provenance.write(settings.out, found)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
