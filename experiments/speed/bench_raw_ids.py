"""What does a step on raw ids cost, beside the same step on ids that are numbered?

The workload is "Kaggle step" (see workload.py), INT8 with a 5 % cache, `embed` and
`apply_pooled_gradients` with row-wise Adagrad. One stack has a row for each of Kaggle's 33.76 M
ids. The others have pools of rows, and ids earn a row at their second occurrence. All see the same
batches, and take turns of ten steps. Ids are hashed before, as a data pipeline does. A step ends
when its vectors and its state are there. A small pool is full after a few steps, so that most
newcomers take the row of another id; a large one still has room. A small pool has a small cache,
too, in which fewer rows of a batch find a place. So each pool also stands beside numbered ids in as
many rows, which several ids share (their number modulo the rows of their table). Target: at most
1.25 times the time of numbered ids. From the repository root:

    python -m experiments.speed.bench_raw_ids
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import mpembed_jax as mpembed
from experiments import command_line, provenance
from experiments.command_line import setting
from experiments.speed import workload
from experiments.speed.step import check_memory, embedding_step

TURN = 10  # steps
TARGET = 1.25  # times the step on numbered ids
TX = mpembed.optim.rowwise_adagrad(0.05)
NAMES = [f"C{i}" for i in range(len(workload.KAGGLE_SIZES))]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    dims: tuple[int, ...] = setting(
        (16, 64), "Numbers in a row.", "NUMBERS", at_least=1, at_most=4096
    )
    pools: tuple[int, ...] = setting(
        (3_000_000, 100_000), "Rows of the pools.", "ROWS", at_least=30_000, at_most=1_000_000_000
    )
    rows: int = setting(
        sum(workload.KAGGLE_SIZES),
        "Ids of all tables.",
        "ROWS",
        at_least=30_000,
        at_most=1_000_000_000,
    )
    batch: int = setting(2048, "Examples in a batch.", "EXAMPLES", at_least=1, at_most=1_000_000)
    warm: int = setting(
        10, f"Turns of {TURN} steps before the timed ones.", "TURNS", at_least=1, at_most=10_000
    )
    rounds: int = setting(10, f"Timed turns of {TURN} steps.", "TURNS", at_least=3, at_most=10_000)
    out: Path = setting(Path("experiments/results/bench_raw_ids.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file, and tables that do not fit the memory.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    check_memory(settings.rows, max(settings.dims))


class Stack(NamedTuple):
    """The rows of a contender, and whether raw ids earn them."""

    rows: int
    is_raw: bool

    def spec(self, dim: int) -> mpembed.EmbeddingSpec:
        """Returns the stack."""
        cache = mpembed.CacheSpec(0.05)
        sizes = dict(zip(NAMES, workload.sizes_for(self.rows), strict=True))
        if not self.is_raw:
            tables = [mpembed.TableSpec(*pair) for pair in sizes.items()]
            return mpembed.EmbeddingSpec(tables, dim, "int8", cache)
        vocabulary = mpembed.VocabularySpec(self.rows, admit_after=2)
        # So each new owner's row is written.
        tables = [mpembed.TableSpec(n, initial_bound=size**-0.5) for n, size in sizes.items()]
        return mpembed.EmbeddingSpec(tables, dim, "int8", cache, vocabulary=vocabulary)

    def __str__(self) -> str:
        return f"{'raw' if self.is_raw else 'numbered'}, {self.rows:,} rows"


class Contender:
    """A state in training, and how its batches are made."""

    def __init__(self, stack: Stack, dim: int) -> None:
        """Initializes the stack."""
        self.stack, self.spec = stack, stack.spec(dim)
        self.times: list[float] = []
        self._state = mpembed.init(jax.random.key(0), self.spec, TX)
        self._step = jax.jit(
            lambda state, ids, upstream: embedding_step(
                state, ids, upstream, tx=TX, is_pooled=True
            )[::3],
            donate_argnums=0,
        )

    def ids_of(self, local: np.ndarray) -> jax.Array:
        """Returns what a step takes, on the device."""
        if self.stack.is_raw:
            return jax.numpy.asarray(self.spec.raw_ids(local))
        sizes = np.asarray([table.vocabulary_size for table in self.spec.tables])
        return jax.numpy.asarray(self.spec.global_ids(local % sizes))

    def turn(self, batches: list[jax.Array], upstream: jax.Array) -> None:
        """Runs a step on each batch, and keeps the median of their times."""
        times = []
        for ids in batches:
            begin = time.perf_counter()
            self._state, vectors = self._step(self._state, ids, upstream)
            jax.block_until_ready((self._state, vectors))
            times.append(time.perf_counter() - begin)
            del vectors
        self.times.append(statistics.median(times))

    def stats(self) -> Any:
        """Returns the counts so far."""
        return mpembed.stats(self._state)


def measure(settings: Settings, dim: int) -> list[dict[str, Any]]:
    """Times all contenders of a dim, in turns."""
    stacks = [Stack(settings.rows, False)]
    for rows in settings.pools:
        stacks += [Stack(rows, False), Stack(rows, True)]
    contenders = [Contender(stack, dim) for stack in stacks]
    shape = (settings.batch, len(NAMES), dim)
    upstream = jax.numpy.asarray(np.random.default_rng(2).normal(size=shape).astype(np.float32))
    sizes = workload.sizes_for(settings.rows)
    before: list[Any] = []
    for number in range(settings.warm + settings.rounds):
        batches = workload.batches(number, TURN, settings.batch, sizes, 1.05)
        if number == settings.warm:
            before = [contender.stats() for contender in contenders]
        for contender in contenders:
            contender.turn([contender.ids_of(local) for local in batches], upstream)
    times = {c.stack: np.asarray(c.times[settings.warm :]) for c in contenders}
    results, num_steps = [], settings.rounds * TURN
    for contender, then in zip(contenders, before, strict=True):
        stack, now = contender.stack, contender.stats()
        own = times[stack]
        ratios = own / times[stacks[0]]
        same = own / times[stack._replace(is_raw=False)]
        result: dict[str, Any] = {
            "dim": dim,
            "rows": stack.rows,
            "is_raw": stack.is_raw,
            "ms": 1e3 * float(np.median(own)),
            "ratio": float(np.median(ratios)),
            "ratio_10_90": [float(end) for end in np.percentile(ratios, (10, 90))],
            "ratio_in_as_many_rows": float(np.median(same)),
            "ratio_in_as_many_rows_10_90": [float(end) for end in np.percentile(same, (10, 90))],
            "unique": (now.unique - then.unique) / num_steps,
            "hit_rate": (now.hits - then.hits) / (now.unique - then.unique),
        }
        line = (
            f"D = {dim:<4}{stack!s:<28}{result['ms']:7.2f} ms  {result['ratio']:5.2f}  "
            f"{result['ratio_in_as_many_rows']:5.2f}  {result['unique']:,.0f} distinct, "
            f"{result['hit_rate']:.0%} in the cache"
        )
        if stack.is_raw:
            for count in ("requests", "shared_requests", "admissions", "recyclings"):
                new = getattr(now.vocabulary, count) - getattr(then.vocabulary, count)
                result[count] = new / num_steps
            line += (
                f"; a step: {result['shared_requests']:,.0f} shared, {result['admissions']:,.0f} "
                f"admissions, {result['recyclings']:,.0f} recyclings"
            )
        print(line, flush=True)
        results.append(result)
    return results


def run(settings: Settings) -> int:
    """Measures, prints and writes; returns the exit status."""
    workload.keep_freed_memory()
    results = [result for dim in settings.dims for result in measure(settings, dim)]
    provenance.write_results(settings, results, target=TARGET)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
