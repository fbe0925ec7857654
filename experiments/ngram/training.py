"""Trains the language model with one memory, and says what a run depends on."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mpembed_jax as mpembed
from experiments.dlrm import unfinished
from experiments.ngram import text
from experiments.ngram.model import LanguageModel
from experiments.ngram.text import BOUNDARY, Text
from experiments.running import Stop, Stopped
from mpembed_jax import checkpoint, nn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all contenders share."""

    steps: int = 800
    batch: int = 16
    length: int = 128
    width: int = 96
    num_blocks: int = 2
    heads: int = 4
    rate: float = 3e-3  # of Adam for the model: warmed up, then a cosine to a tenth
    row_rate: float = 0.1  # of row-wise Adagrad
    row_init: float = 0.02  # standard deviation of initial rows
    orders: tuple[int, ...] = (2, 3)
    ngram_heads: int = 2
    rows: int = 500_000
    features: int = 32
    validation_batches: int = 100

    @property
    def schedule(self) -> optax.Schedule:
        """The rate of the model by step."""
        warm = min(50, self.steps // 4)
        return optax.warmup_cosine_decay_schedule(0, self.rate, warm, self.steps, self.rate / 10)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A memory: storage of its rows, share of them in the cache, optimizer, size."""

    name: str
    storage: str | None  # None: no memory
    cache: float = 0
    optimizer: str = "adagrad"  # row-wise, or "adam" at five times the model's rate
    bytes_of: str | None = None  # only as many rows as fit in the bytes of this contender
    # n-grams are raw ids: they get a row at this occurrence. A row is as wide as all heads.
    admit_after: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Returns what a run depends on.

        A setting that came after the first runs is left out if it is unset.
        """
        held = dataclasses.asdict(self)
        if self.admit_after is None:
            del held["admit_after"]
        return held


Name = Literal[
    "none",
    "FP32",
    "INT4 + 5 %",
    "INT8 + 5 %",
    "INT4 + 1 %",
    "FP32 in INT4 + 5 %'s bytes",
    "INT4, no cache",
    "FP32, Adam",
    "INT2 + 5 %",
    "rows from 2 on, INT4 + 5 %",
    "rows from 2 on, FP32",
    "rows from 2 on, INT4 + 1 %",
    "rows from 3 on, INT4 + 5 %",
    "rows from 1 on, FP32",
]

# In the order in which they are run: those that answer the question first.
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("none", None),
        Contender("FP32", "float32"),
        Contender("INT4 + 5 %", "int4", 0.05),
        Contender("INT8 + 5 %", "int8", 0.05),
        Contender("INT4 + 1 %", "int4", 0.01),
        Contender("FP32 in INT4 + 5 %'s bytes", "float32", bytes_of="INT4 + 5 %"),
        Contender("INT4, no cache", "int4"),
        Contender("FP32, Adam", "float32", optimizer="adam"),
        Contender("INT2 + 5 %", "int2", 0.05),
        Contender("rows from 2 on, INT4 + 5 %", "int4", 0.05, admit_after=2),
        Contender("rows from 2 on, FP32", "float32", admit_after=2),
        Contender("rows from 2 on, INT4 + 1 %", "int4", 0.01, admit_after=2),
        Contender("rows from 3 on, INT4 + 5 %", "int4", 0.05, admit_after=3),
        Contender("rows from 1 on, FP32", "float32", admit_after=1),
    )
}


def row_tx(recipe: Recipe, contender: Contender) -> optax.GradientTransformation:
    """Returns the optimizer of a contender's rows."""
    if contender.optimizer == "adam":
        schedule = recipe.schedule
        return optax.adam(lambda count: 5 * schedule(count))
    return mpembed.optim.rowwise_adagrad(recipe.row_rate)


PIECE = 512  # tokens whose logits are made at a time

# Rows of the pool by `admit_after`, as shares of the rows of all hashed tables.
POOLS = {1: 0.2, 2: 0.09, 3: 0.05}


def rows_of(
    recipe: Recipe, contender: Contender, vocabulary_size: int
) -> int | mpembed.VocabularySpec:
    """Returns the rows of a hashed table, as many as a contender's bytes allow, or a pool."""
    num_tables = len(recipe.orders) * recipe.ngram_heads
    if contender.admit_after is not None:
        num_rows = round(POOLS[contender.admit_after] * recipe.rows * num_tables)
        return mpembed.VocabularySpec(num_rows, admit_after=contender.admit_after)
    if contender.bytes_of is None:
        return recipe.rows
    most = planned_bytes(recipe, CONTENDERS[contender.bytes_of], vocabulary_size)
    return most // ((4 * recipe.features + 4) * num_tables)


def shape_of(recipe: Recipe, contender: Contender) -> tuple[int, int]:
    """Returns the heads and the features of a contender's rows."""
    if contender.admit_after is None:
        return recipe.ngram_heads, recipe.features
    return 1, recipe.ngram_heads * recipe.features


def planned_spec(
    recipe: Recipe,
    contender: Contender,
    vocabulary_size: int,
    rows: int | mpembed.VocabularySpec | None = None,
) -> mpembed.EmbeddingSpec:
    """Returns the tables of a contender; `rows` instead of those that `rows_of` gives it."""
    if rows is None:
        rows = rows_of(recipe, contender, vocabulary_size)
    heads, features = shape_of(recipe, contender)
    vocabulary = rows if isinstance(rows, mpembed.VocabularySpec) else None
    hashed = None if vocabulary is not None else rows
    return nn.ngram_spec(
        nn.NGramHash(vocabulary_size, recipe.orders, heads, hashed, boundary=BOUNDARY),
        features,
        vocabulary=vocabulary,
        storage=contender.storage,
        cache=_cache(contender),
    )


def planned_bytes(recipe: Recipe, contender: Contender, vocabulary_size: int) -> int:
    """Returns the bytes of a contender's whole embedding state, before it is made."""
    spec = planned_spec(recipe, contender, vocabulary_size)
    return mpembed.memory.report(spec, row_tx(recipe, contender)).total


def step_bytes(recipe: Recipe, vocabulary_size: int) -> int:
    """Returns about as many bytes as a step holds beside the tables.

    These are the logits of a piece, their softmax and their gradients, and what the blocks keep of
    each token for the backward pass: 16 vectors and the attention to all tokens.
    """
    tokens = recipe.batch * recipe.length
    kept = recipe.num_blocks * (16 * recipe.width + recipe.heads * recipe.length)
    return 4 * (3 * min(PIECE, tokens) * vocabulary_size + tokens * kept)


def _cache(contender: Contender) -> mpembed.CacheSpec | None:
    return mpembed.CacheSpec(contender.cache) if contender.cache else None


def build(recipe: Recipe, contender: Contender, vocabulary_size: int, seed: int) -> LanguageModel:
    """Returns the untrained model; without its memory, it is that of every contender."""

    def memory(rngs: nnx.Rngs) -> nn.NGramMemory:
        is_raw = contender.admit_after is not None
        heads, features = shape_of(recipe, contender)
        return nn.NGramMemory(
            vocabulary_size,
            features,
            orders=recipe.orders,
            heads=heads,
            rows=rows_of(recipe, contender, vocabulary_size),
            boundary=BOUNDARY,
            tx=row_tx(recipe, contender),
            storage=contender.storage,
            cache=_cache(contender),
            embedding_init=None if is_raw else jax.nn.initializers.normal(recipe.row_init),
            rngs=rngs,
        )

    return LanguageModel(
        vocabulary_size,
        length=recipe.length,
        width=recipe.width,
        num_blocks=recipe.num_blocks,
        heads=recipe.heads,
        memory=None if contender.storage is None else memory,
        seed=seed,
    )


def batch_of(tokens: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Returns random windows of a text (int32 [B, T + 1])."""
    starts = rng.integers(0, len(tokens) - recipe.length, recipe.batch)
    return text.windows(tokens, starts, recipe.length + 1)


def losses_of(model: LanguageModel, window: jax.Array) -> jax.Array:
    """Returns the loss of each token but the first, in nats (float32 [B, T]).

    The logits of PIECE tokens are made at a time, forward and backward: on a CPU, arrays of all
    logits would take a third of the step's time.
    """

    @jax.checkpoint
    def loss_of(x: jax.Array, label: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.head(x), label)

    stream, labels = model.stream(window[:, :-1]), window[:, 1:]
    flat = (stream.reshape(-1, stream.shape[-1]), labels.reshape(-1))
    losses = jax.lax.map(lambda pair: loss_of(*pair), flat, batch_size=PIECE)
    return losses.reshape(labels.shape)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, window: jax.Array) -> jax.Array:
    """Takes one step and returns its mean loss."""
    model.prefetch(window[:, :-1])
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(losses_of(model, window)))(model)
    if model.gated is not None:
        grads = nn.apply_gradients(model, grads)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluation_step(model: LanguageModel, window: jax.Array) -> jax.Array:
    """Returns the loss of each token but the first (float32 [B, T])."""
    return losses_of(model, window)


class Outcome(NamedTuple):
    """What a run gave."""

    loss: float  # of validation, nats a token
    state_bytes: int  # all arrays of the embedding state, the optimizer's included
    num_rows: int
    hit_rate: float | None  # requests of training that found their row in the cache
    losses: list[tuple[int, float]]  # of training, (step, mean of the steps since the last)
    seconds: float  # of training since the last interruption; other users make it longer


class Trained(NamedTuple):
    """A trained model and what its run gave."""

    model: LanguageModel
    outcome: Outcome
    validation: np.ndarray  # i32 [M, T + 1]: the windows
    token_losses: np.ndarray  # f32 [M, T]


def state_bytes(model: LanguageModel) -> int:
    """Returns the bytes of the memory's whole state, 0 without a memory."""
    if model.gated is None:
        return 0
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.gated.memory.state))


@dataclasses.dataclass(frozen=True)
class Saves:
    """Where a run is saved, when, and what is said if it was told to stop."""

    folder: Path
    stop: Stop
    command: str  # the line that goes on
    every_s: float = 600.0

    def take(
        self, model: LanguageModel, optimizer: nnx.Optimizer, rng: np.random.Generator
    ) -> list[float]:
        """Brings what a run trains to where the newest save left it; returns the losses so far.

        Raises:
          Refused: if there are saves and none of them is good.
        """
        if (about := unfinished.read(self.folder)) is None:
            return []
        leaves, tree = jax.tree.flatten(nnx.state((model, optimizer)))
        with unfinished.restoring(self.folder):
            held = checkpoint.restore(
                self.folder, {"about": "", "leaves": leaves}, step=len(about["losses"])
            )
        nnx.update((model, optimizer), jax.tree.unflatten(tree, held["leaves"]))
        rng.bit_generator.state = about["rng"]
        return about["losses"]

    def write(
        self,
        model: LanguageModel,
        optimizer: nnx.Optimizer,
        rng: np.random.Generator,
        losses: list[float],
        place: str,
    ) -> None:
        """Saves a run after the step of the last loss, and leaves if the process was told to stop.

        Raises:
          Stopped: with the command that goes on.
        """
        about = json.dumps({"losses": losses, "rng": rng.bit_generator.state})
        leaves = jax.tree.leaves(nnx.state((model, optimizer)))
        tree = {"about": about, "leaves": leaves}
        failed: Exception | None = None
        try:
            checkpoint.save(self.folder, len(losses), tree, keep=unfinished.KEPT)
        except (checkpoint.CheckpointError, OSError) as error:
            failed = error
        if self.stop:
            text = unfinished.last_words(self.folder, place, self.command, failed)
            raise Stopped(self.stop.number, text)
        if failed is not None:
            unfinished.warn(failed)


def train(
    data: Text,
    recipe: Recipe,
    contender: Contender,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    saves: Saves | None = None,
) -> Trained:
    """Trains one contender and validates it.

    Args:
      data: the text.
      recipe: of all contenders.
      contender: the memory.
      seed: of weights, rows and batches; the same for all contenders, which makes them paired.
      on_step: is called with the number of each step and its loss; it may raise to end the run.
      saves: saves the run now and then, and goes on from the newest save; None: does not.

    Raises:
      Stopped: at the end of a step, if the process was told to stop; the run is saved.
    """
    model = build(recipe, contender, data.vocabulary_size, seed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(recipe.schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng, start = np.random.default_rng(seed), time.perf_counter()
    losses = [] if saves is None else saves.take(model, optimizer, rng)
    saved = time.monotonic()
    for step in range(len(losses), recipe.steps):
        loss = train_step(model, optimizer, jnp.asarray(batch_of(data.train, recipe, rng)))
        losses.append(float(loss))
        on_step(step, losses[-1])
        if saves is not None and (saves.stop or time.monotonic() - saved > saves.every_s):
            place = f"in {contender.name}, seed {seed}, after step {step + 1}"
            saves.write(model, optimizer, rng, losses, place)
            saved = time.monotonic()
    seconds = time.perf_counter() - start
    model.eval()
    # The same windows for every seed and contender.
    rng = np.random.default_rng(12345)
    windows = [batch_of(data.validation, recipe, rng) for _ in range(recipe.validation_batches)]
    token_losses = [np.asarray(evaluation_step(model, jnp.asarray(w))) for w in windows]
    hit_rate, num_rows = None, 0
    if model.gated is not None:
        stats, num_rows = model.gated.memory.stats(), model.gated.memory.stack.spec.num_rows
        hit_rate = stats.hit_requests / max(1, stats.requests) if contender.cache else None
    every = max(1, recipe.steps // 40)
    curve = [
        (at + every, round(float(np.mean(losses[at : at + every])), 5))
        for at in range(0, recipe.steps - every + 1, every)
    ]
    outcome = Outcome(
        loss=float(np.mean(token_losses, dtype=np.float64)),
        state_bytes=state_bytes(model),
        num_rows=num_rows,
        hit_rate=hit_rate,
        losses=curve,
        seconds=round(seconds, 2),
    )
    return Trained(model, outcome, np.concatenate(windows), np.concatenate(token_losses))
