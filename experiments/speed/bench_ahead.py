"""What does it gain to plan the next batch in the step of this one?

The step of a small DLRM: 26 tables, an MLP over their vectors, row-wise Adagrad and SGD. "plain" is
prefetch, gradients, update; "ahead" ends with the prefetch of the next batch, so that the compiler
may plan it while the MLP runs (mpembed_jax/RECIPES.md). Both run the same verbs in the same order.
They alternate in rounds, on the same batches. From the repository root:

    python -m experiments.speed.bench_ahead
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments import command_line, provenance
from experiments.command_line import setting
from experiments.speed import workload

DIM = 16
NUM_BATCHES = 40  # that the loops cycle through
ROW_TX = mpembed.optim.rowwise_adagrad(0.05)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    batch: int = setting(2048, "Rows of data in a step.", "ROWS", at_least=1, at_most=1 << 20)
    rows: int = setting(
        4_000_000, "Rows of all tables together.", "ROWS", at_least=100_000, at_most=100_000_000
    )
    widths: tuple[int, ...] = setting(
        (64, 1024),
        "Widths of the MLP's two hidden layers, one case each.",
        "NUMBERS",
        at_least=1,
        at_most=65_536,
    )
    rounds: int = setting(
        15, "Rounds in which the two loops alternate.", "ROUNDS", at_least=2, at_most=10_000
    )
    steps: int = setting(10, "Steps of one loop in a round.", "STEPS", at_least=1, at_most=10_000)
    out: Path = setting(Path("experiments/results/bench_ahead.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file, and tables and batches that do not fit the memory.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    num_tables = len(workload.KAGGLE_SIZES)
    tables = 2 * settings.rows * DIM  # of one byte a number
    command_line.check_memory("--rows", settings.rows, tables, "the INT8 tables of two loops")
    # Ids, vectors and their gradients, two layers and their gradients.
    each = 4 * (NUM_BATCHES * num_tables + 2 * num_tables * DIM + 4 * max(settings.widths))
    command_line.check_memory("--batch", settings.batch, settings.batch * each, "the batches")


def mlp(params: list, vectors: jax.Array) -> jax.Array:
    """Returns the logits, float32 [B]."""
    x = vectors.reshape(len(vectors), -1)
    for weights in params[:-1]:
        x = jax.nn.relu(x @ weights)
    return (x @ params[-1])[:, 0]


def update(emb, plan, params, labels):
    """Trains on the batch of a plan; returns the state and the parameters."""
    rows = mpembed.lookup(emb, plan)

    def loss_of(params: list, rows: jax.Array) -> jax.Array:
        pool = mpembed.pool(rows, plan.inverse, implementation=emb.implementation)
        return optax.sigmoid_binary_cross_entropy(mlp(params, pool), labels).mean()

    grads, row_grads = jax.grad(loss_of, argnums=(0, 1))(params, rows)
    emb = mpembed.apply_gradients(emb, plan, rows, row_grads, tx=ROW_TX)
    return emb, jax.tree.map(lambda p, g: p - jnp.float32(0.05) * g, params, grads)


def plain_step(emb, params, ids, labels):
    """Plans a batch and trains on it."""
    emb, plan = mpembed.prefetch(emb, ids)
    return update(emb, plan, params, labels)


def ahead_step(emb, plan, params, labels, next_ids):
    """Trains on a batch that was planned, and plans the next one."""
    emb, params = update(emb, plan, params, labels)
    emb, plan = mpembed.prefetch(emb, next_ids)
    return emb, plan, params


class Loops:
    """The two loops, each with its own state, on the same batches."""

    def __init__(self, settings: Settings, width: int):
        sizes = workload.sizes_for(settings.rows)
        tables = [mpembed.TableSpec(f"t{k}", size) for k, size in enumerate(sizes)]
        spec = mpembed.EmbeddingSpec(tables, DIM, "int8", mpembed.CacheSpec(fraction=0.05))
        local = workload.batches(0, NUM_BATCHES, settings.batch, sizes, 1.05)
        self.ids = [jnp.asarray(spec.global_ids(batch)) for batch in local]
        rng = np.random.default_rng(0)
        self.labels = [
            jnp.asarray(rng.integers(0, 2, settings.batch).astype(np.float32)) for _ in self.ids
        ]
        shapes = ((len(sizes) * DIM, width), (width, width), (width, 1))

        def start():
            params = [rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes]
            params = [jnp.asarray(p, jnp.float32) for p in params]
            return mpembed.init(jax.random.key(0), spec, ROW_TX), params

        self.plain = jax.jit(plain_step, donate_argnums=(0, 1))
        self.ahead = jax.jit(ahead_step, donate_argnums=(0, 2))
        self.plain_state = start()
        emb, params = start()
        emb, plan = jax.jit(mpembed.prefetch, donate_argnums=0)(emb, self.ids[0])
        self.ahead_state = (emb, plan, params)
        self.position = {"plain": 0, "ahead": 0}

    def run(self, name: str, steps: int) -> float:
        """Runs steps of a loop; returns milliseconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            k = self.position[name]
            ids, labels = self.ids[k % NUM_BATCHES], self.labels[k % NUM_BATCHES]
            if name == "plain":
                self.plain_state = self.plain(*self.plain_state, ids, labels)
            else:
                self.ahead_state = self.ahead(
                    *self.ahead_state, labels, self.ids[(k + 1) % NUM_BATCHES]
                )
            self.position[name] = k + 1
        jax.block_until_ready((self.plain_state, self.ahead_state))
        return 1000 * (time.perf_counter() - start) / steps


def run(settings: Settings) -> int:
    """Measures, prints and writes; returns the exit status."""
    results = []
    for width in settings.widths:
        loops = Loops(settings, width)
        times: dict[str, list[float]] = {"plain": [], "ahead": []}
        for name in times:
            loops.run(name, NUM_BATCHES)
        for turn in range(settings.rounds):
            for name in list(times)[:: 1 if turn % 2 else -1]:
                times[name].append(loops.run(name, settings.steps))
        ratios = [a / p for a, p in zip(times["ahead"], times["plain"], strict=True)]
        ends = np.percentile(ratios, (10, 90))
        results.append(
            {
                "width": width,
                "plain_ms": statistics.median(times["plain"]),
                "ahead_ms": statistics.median(times["ahead"]),
                "ratio": statistics.median(ratios),
                "ratio_10_90": [float(end) for end in ends],
            }
        )
        last = results[-1]
        print(
            f"MLP of width {width}: plain {last['plain_ms']:.2f} ms, ahead "
            f"{last['ahead_ms']:.2f} ms, ratio {last['ratio']:.3f} "
            f"[{ends[0]:.3f}, {ends[1]:.3f}]"
        )
    provenance.write_results(settings, results)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
