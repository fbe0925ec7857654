"""How good and how fast is `top_k` by a sign sketch, on trained vectors of items?

Ratings like MovieLens' are drawn: users and items have planted tastes of 16 numbers, an item also
has a quality, and few items are rated often. A recommender (the logit of "above 3 stars" is the
product of a user's row and an item's) is trained on them in INT8 with a 5 % cache, and exported as
trained. Queries are trained rows of users. `top_k` finds the best 100 items of each, of all items
and by sketches that choose 10 times as many candidates. Recall is the share of the exact answer
that is found. The two then take turns, with one query in a call and with 16. A ratio is the median
over turns of the exact time to the sketch's. With one thread, times are those of the process.
Target: a recall of .95. From the repository root:

    python -m experiments.speed.bench_top_k
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpembed_jax as mpembed
from experiments import command_line, provenance
from experiments.command_line import setting
from mpembed_jax import serving

K = 100  # results of a query
MANY = 16  # queries in a call
TARGET = 0.95  # recall
TASTES = 16
TX = mpembed.optim.rowwise_adagrad(0.05)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained and measured."""

    items: int = setting(
        62_423, "Items; the default is MovieLens-25M's.", "ITEMS", at_least=1000,
        at_most=100_000_000,
    )  # fmt: skip
    users: int = setting(
        162_541, "Users; the default is MovieLens-25M's.", "USERS", at_least=1000,
        at_most=100_000_000,
    )  # fmt: skip
    ratings: int = setting(
        25_000_000, "Ratings that are trained on.", "RATINGS", at_least=1000, at_most=10**10
    )
    dims: tuple[int, ...] = setting(
        (64, 128), "Numbers in a row.", "NUMBERS", at_least=1, at_most=4096
    )
    bits: tuple[int, ...] = setting(
        (128, 256, 512), "Bits of a sketch, multiples of 64.", "BITS", at_least=64,
        at_most=65_536,
    )  # fmt: skip
    queries: int = setting(
        200, "Users whose recall is measured.", "USERS", at_least=1, at_most=100_000
    )
    rounds: int = setting(9, "Turns of each.", "ROUNDS", at_least=3, at_most=10_000)
    batch: int = setting(16_384, "Ratings in a step.", "RATINGS", at_least=1, at_most=1_000_000)
    threads: int = setting(
        os.cpu_count() or 1, "Threads of the searches.", "THREADS", at_least=1, at_most=1024,
        shown="all cores",
    )  # fmt: skip
    out: Path = setting(Path("experiments/results/bench_top_k.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file, other numbers of bits, and tables that do not fit the memory.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    for bits in settings.bits:
        if bits % 64:
            command_line.refuse("--bits", bits, "a multiple of 64")
    rows, dim = settings.items + settings.users, max(settings.dims)
    # The state, the file of it in memory, and the sketch; then the decoded rows of queries.
    needed = rows * (2 * (dim + 8) + dim // 4 + max(settings.bits) // 8) + 4 * dim * settings.users
    command_line.check_memory("--items", settings.items, needed, "the tables")


class Ratings:
    """Draws ratings: (user, item) and whether it is above 3 stars."""

    def __init__(self, users: int, items: int) -> None:
        """Plants tastes and qualities. The most popular item gets .3 % of the ratings or more."""
        self._rng = rng = np.random.default_rng(0)
        self._user = rng.standard_normal((users, TASTES), np.float32)
        self._item = rng.standard_normal((items, TASTES), np.float32)
        self._quality = rng.standard_normal(items, np.float32)
        chances = np.cumsum((np.arange(items) + 100.0) ** -1.3)
        self._chances = chances / chances[-1]
        self._of_rank = rng.permutation(items).astype(np.int32)

    def draw(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [num, 2] and labels float32 [num]."""
        users = self._rng.integers(0, len(self._user), num, dtype=np.int32)
        rank = np.searchsorted(self._chances, self._rng.random(num))
        items = self._of_rank[np.minimum(rank, len(self._of_rank) - 1)]
        liking = np.einsum("nd,nd->n", self._user[users], self._item[items]) / TASTES**0.5
        logits = 2 * liking + self._quality[items]
        labels = self._rng.random(num, np.float32) < 1 / (1 + np.exp(-logits))
        return np.stack([users, items], 1), labels.astype(np.float32)


def trained(dim: int, settings: Settings) -> tuple[mpembed.EmbeddingState, float]:
    """Returns the state after one pass over the ratings, and the AUC of fresh ones."""
    tables = [mpembed.TableSpec("user", settings.users), mpembed.TableSpec("item", settings.items)]
    spec = mpembed.EmbeddingSpec(tables, dim, "int8", mpembed.CacheSpec(0.05))
    state = mpembed.init(jax.random.key(0), spec, TX)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: Any, labels: Any) -> Any:
        state, plan, vectors = mpembed.embed(state, ids, tx=TX)

        def loss(vectors: Any) -> Any:
            logits = jnp.sum(vectors[:, 0] * vectors[:, 1], axis=1)
            return jnp.sum(jnp.logaddexp(0.0, logits) - labels * logits)

        # A sum over the batch: each row sees the gradient of its own ratings.
        grads = jax.grad(loss)(vectors)
        return mpembed.apply_pooled_gradients(state, plan, grads, tx=TX)

    source = Ratings(settings.users, settings.items)
    for _ in range(-(-settings.ratings // settings.batch)):
        ids, labels = source.draw(settings.batch)
        state = step(state, spec.global_ids(ids), labels)
    ids, labels = source.draw(100_000)
    rows = np.asarray(jax.jit(mpembed.read)(state, spec.global_ids(ids)))
    scores = np.einsum("nd,nd->n", rows[:, 0], rows[:, 1])
    order = np.argsort(np.argsort(scores)) + 1.0
    above = labels.sum()
    area = order[labels == 1].sum() - above * (above + 1) / 2
    return state, float(area / (above * (len(labels) - above)))


def milliseconds(
    table: serving.ServingTable, queries: np.ndarray, made: Any, rounds: int, threads: int
) -> Any:
    """Returns {"exact", "sketch": median time of a call} and "speed_up"; the two take turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    found: dict[str, list[float]] = {"exact": [], "sketch": []}
    for turn in range(-1, rounds):
        for name, own in found.items():
            begin = clock()
            table.top_k(queries, K, "item", sketch=made if name == "sketch" else None)
            if turn >= 0:  # the first turn compiles and maps pages
                own.append((clock() - begin) * 1e3)
    ratios = [a / b for a, b in zip(found["exact"], found["sketch"], strict=True)]
    return {name: statistics.median(own) for name, own in found.items()} | {
        "speed_up": statistics.median(ratios),
        "speed_up_10_90": [float(end) for end in np.percentile(ratios, (10, 90))],
    }


def measure(dim: int, settings: Settings) -> list[dict[str, Any]]:
    """Trains, exports, and measures every sketch."""
    state, auc = trained(dim, settings)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        serving.save(path, state)
        table = serving.load(path, threads=settings.threads)
        users = np.random.default_rng(1).integers(0, settings.users, settings.queries)
        queries = table.lookup({"user": users})["user"]
        exact = table.top_k(queries, K, "item")[1]
        row_bytes = table.table("item").format.row_bytes(dim)
        for bits in settings.bits:
            begin = time.perf_counter()
            made = serving.sketch(table, "item", bits=bits)
            made_s = time.perf_counter() - begin
            by_sketch = table.top_k(queries, K, "item", sketch=made)[1]
            recalls = [np.isin(a, b).mean() for a, b in zip(exact, by_sketch, strict=True)]
            result: dict[str, Any] = {
                "dim": dim,
                "auc": auc,
                "bits": bits,
                "recall": float(np.mean(recalls)),
                "recall_10": float(np.percentile(recalls, 10)),
                "bytes_per_row": made.nbytes / settings.items,
                "packed_bytes_per_row": row_bytes,
                "made_s": made_s,
            }
            for num in (1, MANY):
                few = np.resize(queries, (num, dim))
                result[f"ms_of_{num}"] = milliseconds(
                    table, few, made, settings.rounds, settings.threads
                )
            print(line_of(result), flush=True)
            results.append(result)
    return results


def line_of(result: dict[str, Any]) -> str:
    """Returns a result as text."""
    text = (
        f"D {result['dim']} AUC {result['auc']:.3f}  {result['bits']} bits: recall "
        f"{result['recall']:.3f}, of a tenth of the queries below {result['recall_10']:.2f}  bytes "
        f"{result['bytes_per_row']:.0f} beside {result['packed_bytes_per_row']}"
    )
    for num in (1, MANY):
        own = result[f"ms_of_{num}"]
        text += f"  {num}: {own['exact']:.2f} / {own['sketch']:.2f} ms = {own['speed_up']:.2f}"
    return text


def run(settings: Settings) -> int:
    """Trains, measures, prints and writes; returns the exit status."""
    results = [result for dim in settings.dims for result in measure(dim, settings)]
    versions = provenance.versions((*provenance.PACKAGES, "numba"))
    provenance.write_results(settings, results, versions=versions, target=TARGET)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__ or "", arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
