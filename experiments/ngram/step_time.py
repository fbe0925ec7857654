"""Times of a training step: without memory, with ours, and with a dense table and optax.adam.

The dense way is one nnx.Embed over all heads, found by the same hash, in the same donated step. All
contenders take turns, so that a change of the machine's speed meets all of them. A ratio is taken
within a round. Let nothing else compute meanwhile.

    python -m experiments.ngram.step_time
    python -m experiments.ngram.step_time --rows 2000000 --rounds 10

Writes experiments/results/ngram_step_time.json and .png. Sizes measured before are kept, if they
have the same settings and commit.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.ngram import report, training
from experiments.ngram.model import GatedMemory, LanguageModel
from experiments.ngram.text import BOUNDARY
from mpembed_jax import nn

DENSE = "dense nnx.Embed, optax.adam"
VOCABULARY = 8192


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed, and how often."""

    rows: tuple[int, ...] = setting(
        (500_000, 1_000_000, 2_000_000),
        "Rows of the four tables together.",
        "ROWS",
        at_least=1000,
        at_most=100_000_000,
    )
    contenders: tuple[training.Name, ...] = setting(
        (
            "FP32",
            "INT8 + 5 %",
            "INT4 + 5 %",
            "INT4 + 1 %",
            "INT2 + 5 %",
            "rows from 2 on, INT4 + 5 %",
        ),
        "Memories to time beside none and the dense way.",
    )
    rounds: int = setting(5, "Turns of each contender.", "TURNS", at_least=2, at_most=10_000)
    steps: int = setting(6, "Steps of a turn.", "STEPS", at_least=1, at_most=10_000)
    batch: int = setting(16, "Sequences in a step.", "SEQUENCES", at_least=1, at_most=65_536)
    length: int = setting(128, "Tokens in a sequence.", "TOKENS", at_least=2, at_most=65_536)
    width: int = setting(96, "Width of the transformer.", "UNITS", at_least=8, at_most=65_536)
    out: Path = setting(
        Path("experiments/results"), "Folder of ngram_step_time.json and the picture."
    )


class DenseMemory(nnx.Module):
    """One nnx.Embed over all heads, in the place of an NGramMemory."""

    def __init__(self, ngrams: nn.NGramHash, features: int, rngs: nnx.Rngs):
        self.ngrams = ngrams
        self.features = features
        starts = np.concatenate([[0], np.cumsum(ngrams.table_sizes)[:-1]])
        self.starts = tuple(int(start) for start in starts)
        self.table = nnx.Embed(sum(ngrams.table_sizes), features, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Takes int32 [B, T]; returns float32 [B, T, tables x features]."""
        ids = self.ngrams.ids(tokens) + jnp.array(self.starts, jnp.int32)
        return self.table(ids).reshape(*tokens.shape, -1)


class DenseModel(LanguageModel):
    """The language model with a dense memory, which has nothing to prefetch."""

    def __init__(self, vocabulary_size: int, ngrams: nn.NGramHash, features: int, **options: Any):
        super().__init__(vocabulary_size, memory=None, **options)
        rngs = nnx.Rngs(0)
        memory: Any = DenseMemory(ngrams, features, rngs)
        self.gated = nnx.data(GatedMemory(options["width"], memory, rngs))

    def prefetch(self, tokens: jax.Array) -> None:
        """Does nothing."""


@nnx.jit(donate_argnums=(0, 1))
def dense_step(model: DenseModel, optimizer: nnx.Optimizer, window: jax.Array) -> jax.Array:
    """Takes one step with a gradient of the whole table, and returns its mean loss."""
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(training.losses_of(model, window)))(
        model
    )
    optimizer.update(model, grads)
    return loss


def recipe_of(settings: Settings, rows: int) -> training.Recipe:
    """Returns what all contenders of a size share."""
    return training.Recipe(
        batch=settings.batch,
        length=settings.length,
        width=settings.width,
        rows=max(2, rows // 4),
    )


def contenders(settings: Settings, rows: int) -> dict[str, Any]:
    """Returns {name: function that takes one step}, each with a model of its own."""
    recipe = recipe_of(settings, rows)
    names = dict.fromkeys(("none", *settings.contenders, DENSE))
    return {name: _stepper(recipe, name) for name in names}


def _stepper(recipe: training.Recipe, name: str) -> Any:
    if name == DENSE:
        hashed = nn.NGramHash(
            VOCABULARY, recipe.orders, recipe.ngram_heads, recipe.rows, boundary=BOUNDARY
        )
        model: Any = DenseModel(
            VOCABULARY,
            hashed,
            recipe.features,
            length=recipe.length,
            width=recipe.width,
            num_blocks=recipe.num_blocks,
            heads=recipe.heads,
            seed=0,
        )
    else:
        model = training.build(recipe, training.CONTENDERS[name], VOCABULARY, 0)
    step = dense_step if name == DENSE else training.train_step
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)

    def one() -> None:
        # Words of a text are about as skewed as this.
        window = np.minimum(rng.zipf(1.2, (recipe.batch, recipe.length + 1)), VOCABULARY) - 1
        step(model, optimizer, jnp.asarray(window, jnp.int32)).block_until_ready()

    return one


def measure(settings: Settings, rows: int) -> dict[str, Any]:
    """Returns milliseconds of a step for each contender, and ratios to no memory and to FP32."""
    steppers = contenders(settings, rows)
    for name, step in steppers.items():
        with running.working(f"compiling {name}, {rows:,} rows"):
            step()
            step()
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(settings.rounds):
        for name, step in steppers.items():
            turn = []
            for _ in range(settings.steps):
                start = time.perf_counter()
                step()
                turn.append(1e3 * (time.perf_counter() - start))
            times[name].append(statistics.median(turn))

    def ratio(name: str, other: str) -> list[float]:
        ratios = sorted(a / b for a, b in zip(times[name], times[other], strict=True))
        return [round(v, 3) for v in (statistics.median(ratios), ratios[0], ratios[-1])]

    return {
        "rows": rows,
        "ms": {name: round(statistics.median(turns), 2) for name, turns in times.items()},
        "tokens_per_second": {
            name: round(1e3 * settings.batch * settings.length / statistics.median(turns))
            for name, turns in times.items()
        },
        # Median, least and largest over the rounds.
        "to_none": {name: ratio(name, "none") for name in times if name != "none"},
        "to_fp32": {
            name: ratio(name, "FP32")
            for name in settings.contenders
            if "FP32" in times and name not in ("none", "FP32")
        },
    }


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Draws milliseconds of a step over rows."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    results = sorted(results, key=lambda result: result["rows"])
    for name in dict.fromkeys(name for result in results for name in result["ms"]):
        timed = [(r["rows"] / 1e6, r["ms"][name]) for r in results if name in r["ms"]]
        axis.plot(*zip(*timed, strict=True), "o-", label=name)
    axis.set_xlabel("rows of the tables together, millions")
    axis.set_ylabel("ms of a training step")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend()
    figure.savefig(path, dpi=110)


def check(settings: Settings) -> None:
    """Refuses a width without whole heads, too much memory, and an unwritable folder.

    Raises:
      Refused: in one sentence.
    """
    if settings.width % 8:
        command_line.refuse("--width", settings.width, "a multiple of 8")
    command_line.check_out(settings.out, is_file=False)
    recipe = recipe_of(settings, max(settings.rows))
    needed = training.step_bytes(recipe, VOCABULARY)
    what = f"a step with sequences of {settings.length:,} tokens"
    command_line.check_memory("--batch", settings.batch, needed, what)
    chosen = [training.CONTENDERS[name] for name in settings.contenders if name != "none"]
    ours = [training.planned_bytes(recipe, each, VOCABULARY) for each in chosen]
    dense = 4 * 4 * max(settings.rows) * recipe.features  # rows, gradient, Adam's two moments
    what = "the tables of all contenders and a step"
    command_line.check_memory("--rows", max(settings.rows), needed + sum(ours) + dense, what)


def run(settings: Settings) -> None:
    """Measures every size, and writes after each."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / report.STEP_TIME
    environment = provenance.environment()
    what = {
        "batch": settings.batch,
        "length": settings.length,
        "width": settings.width,
        "features": training.Recipe.features,
    }
    kept: list[dict[str, Any]] = []
    if path.exists():
        with command_line.reading("--out", settings.out, ValueError, KeyError, TypeError):
            before = json.loads(path.read_text())
            same = before["environment"]["commit"] == environment["commit"]
            kept = before["sizes"] if before["settings"] == what and same else []
    for rows in settings.rows:
        result = measure(settings, rows)
        kept = [other for other in kept if other["rows"] != rows] + [result]
        written = {"environment": environment, "settings": what, "sizes": kept}
        provenance.write(path, written)
        picture(kept, settings.out / "ngram_step_time.png")
        print(f"{rows:,} rows: {result['ms']} ms; to none {result['to_none']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
