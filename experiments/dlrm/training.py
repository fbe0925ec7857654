"""The training of several storages of one recommender side by side.

All have the same batches, the same seed and the same initial parameters. Every contender is the
functional step of DESIGN.md 4: prefetch, lookup, pool, gradients with respect to the gathered rows,
apply_gradients for them and optax for the dense part, in one jitted call with everything donated.
Contenders take turns on chunks of batches, so the host waits for the device once per chunk and
times them alternately. Batches are made on a background thread. One pass, no early stopping, no
learning-rate schedule. What a run reached is in `outcomes`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpembed_jax as mpembed
from experiments.data.background import in_background
from experiments.dlrm import models, stacks
from experiments.dlrm.outcomes import Outcome, measure

CHUNK = 16  # batches a contender trains on before the next one's turn
Storage = Literal[
    "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4", "int2"
]


@dataclasses.dataclass(frozen=True)
class Contender:
    """How one run stores its rows; `cache_fraction` 0 means no cache."""

    name: str
    storage: Storage = "int8"
    cache_fraction: float = 0.05
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    policy: Literal["lfu", "lru"] = "lfu"
    ways: int = 32
    hashed_to: float = (
        1.0  # below 1: large tables are capped, ids hashed, to this share of all rows
    )
    symmetric: bool | None = None  # of an integer format; None: the library's choice for the dim
    # The smallest tables, with at most this share of all rows, stay FP32 in a stack of their own.
    float32_share: float = 0.0


FP32 = Contender("FP32", "float32", 0.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all contenders share."""

    embedding_dim: int = 16
    batch_size: int = 2048
    row_learning_rate: float = 0.02  # row-wise Adagrad
    dense_learning_rate: float = 1e-3  # Adam
    max_unique_ids: int | None = None
    hidden: tuple[int, ...] = (512, 256)  # DLRM's widths; the bottom MLP adds one layer of 64


class Learner(NamedTuple):
    """Everything a step replaces; all of it is donated."""

    emb: tuple[mpembed.EmbeddingState, ...]  # one per stack, see stacks.make_specs
    params: Any
    opt_state: Any
    extra: Any = None  # what the job's View needs


class View(NamedTuple):
    """How the model sees the rows of a single stack, if not as they are.

    `refresh` runs on the host before every `period`-th step, and once at the end.
    """

    see: Callable[
        [Learner, jax.Array, jax.Array], jax.Array
    ]  # (learner, rows f32 [.., D], ids i32 [..]) -> f32 [.., D]
    refresh: Callable[[Learner], Learner]
    period: int


class Job(NamedTuple):
    """The jitted functions of one model: one compile per contender, none per seed."""

    train_step: Callable[[Learner, dict], tuple[Learner, jax.Array]]
    predict: Callable[[Learner, dict], jax.Array]
    init_params: Callable[[jax.Array], Any]
    row_tx: optax.GradientTransformation
    tx: optax.GradientTransformation
    view: View | None


class Fitted(NamedTuple):
    """One contender after its pass."""

    contender: Contender
    specs: tuple[mpembed.EmbeddingSpec, ...]
    learner: Learner
    seed: int
    num_steps: int
    losses: list[tuple[int, float]]  # (step, mean training loss of the chunk that ends there)
    step_s: list[float]  # mean seconds per step of every chunk; the first one compiles
    first_chunk_s: float


def hashed_of_equal_bytes(source: Any, contender: Contender, recipe: Recipe) -> Contender:
    """Returns the FP32 contender that takes as many bytes as another one's state.

    Its ids are hashed into fewer rows.
    """
    sizes = [
        mpembed.memory.report(spec, optax.identity())
        for spec in stacks.make_specs(source, contender, recipe)
    ]
    share = sum(size.total for size in sizes) / sum(size.float32_bytes for size in sizes)
    return Contender(f"FP32 hashed as {contender.name}", "float32", 0.0, hashed_to=share)


def state_bytes(source: Any, contenders: list[Contender], recipe: Recipe) -> int:
    """Returns the bytes that all contenders' tables, layers and optimizer states have together."""
    job = make_job(source, recipe)
    params = jax.eval_shape(job.init_params, jax.ShapeDtypeStruct((2,), jnp.uint32))
    layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    tables = [
        mpembed.memory.report(spec, job.row_tx).total
        for contender in contenders
        for spec in stacks.make_specs(source, contender, recipe)
    ]
    return sum(tables) + 3 * 4 * layers * len(contenders)  # Adam keeps two more of each parameter


def make_job(source: Any, recipe: Recipe, view: View | None = None) -> Job:
    """Builds the step, the prediction and the optimizers.

    The model is DLRM if there are dense inputs, otherwise the small MLP. With a `view` the model
    sees its result instead of the rows, in training (gradients flow through it) and prediction.
    """
    num_vectors, bags = len(source.tables), source.bags
    row_tx = mpembed.optim.rowwise_adagrad(recipe.row_learning_rate)
    tx = optax.adam(recipe.dense_learning_rate)
    if source.num_dense:
        model = models.dlrm
        init_params = partial(
            models.init_dlrm, num_dense=source.num_dense, num_vectors=num_vectors,
            embedding_dim=recipe.embedding_dim,
            bottom=(*recipe.hidden, 64), top=recipe.hidden,
        )  # fmt: skip
    else:
        model = models.small
        init_params = partial(
            models.init_small, num_vectors=num_vectors, embedding_dim=recipe.embedding_dim
        )

    def see(learner: Learner, rows: jax.Array, ids: jax.Array) -> jax.Array:
        return rows if view is None else view.see(learner, rows, ids)

    @partial(jax.jit, donate_argnames="learner")
    def train_step(learner: Learner, batch: dict) -> tuple[Learner, jax.Array]:
        ids = [stacks.global_ids(batch["ids"], source.tables, emb.spec) for emb in learner.emb]
        embs, plans = zip(*map(mpembed.prefetch, learner.emb, ids), strict=True)
        rows = list(map(mpembed.lookup, embs, plans))

        def loss_fn(params: Any, rows: list[jax.Array]) -> jax.Array:
            seen = [see(learner, r, plan.unique_ids) for r, plan in zip(rows, plans, strict=True)]
            parts = [
                stacks.pooled(r, plan.inverse, bags, emb.implementation)
                for r, plan, emb in zip(seen, plans, learner.emb, strict=True)
            ]
            vectors = stacks.merged(parts, learner.emb, source, isinstance(batch["ids"], dict))
            return models.bce(model(params, batch["dense"], vectors), batch["label"])

        loss, (grads, row_grads) = jax.value_and_grad(loss_fn, argnums=(0, 1))(learner.params, rows)
        embs = tuple(map(partial(mpembed.apply_gradients, tx=row_tx), embs, plans, rows, row_grads))
        updates, opt_state = tx.update(grads, learner.opt_state, learner.params)
        counts = plans[0].counts
        log = jnp.stack(
            [loss, counts.hit_requests.astype(jnp.float32), counts.requests.astype(jnp.float32)]
        )
        return Learner(
            embs, optax.apply_updates(learner.params, updates), opt_state, learner.extra
        ), log

    @jax.jit
    def predict(learner: Learner, batch: dict) -> jax.Array:
        parts = []
        for emb in learner.emb:
            ids = stacks.global_ids(batch["ids"], source.tables, emb.spec)
            parts.append(
                stacks.read(
                    lambda ids, emb=emb: see(learner, mpembed.read(emb, ids), ids), ids, bags
                )
            )
        vectors = stacks.merged(parts, learner.emb, source, isinstance(batch["ids"], dict))
        return jax.nn.sigmoid(model(learner.params, batch["dense"], vectors))

    return Job(train_step, predict, init_params, row_tx, tx, view)


def _chunks(batches: Iterable[dict]) -> Iterator[list[dict]]:
    chunk: list[dict] = []
    for batch in batches:
        chunk.append(batch)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def fit(
    source: Any,
    contenders: list[Contender],
    recipe: Recipe,
    job: Job,
    *,
    seed: int,
    on_chunk: Callable[..., None],
) -> list[Fitted]:
    """Trains every contender for one pass.

    Args:
      source: see experiments/data.
      contenders: the runs; the seed gives all of them the same initial values and the same batches.
      recipe: what they share.
      job: from make_job.
      seed: of parameters, rows and batch order.
      on_chunk: called after each chunk of each contender as (name, num_rows, loss, hit_rate,
        seconds).

    Returns:
      One Fitted per contender, in order.
    """
    specs = [stacks.make_specs(source, c, recipe) for c in contenders]
    row_key, dense_key = jax.random.split(jax.random.key(seed))
    learners, times, curves = [], [[] for _ in contenders], [[] for _ in contenders]
    for several in specs:
        params = job.init_params(dense_key)
        learners.append(
            Learner(stacks.init(row_key, source, several, job.row_tx), params, job.tx.init(params))
        )
    num_steps, first_chunks = 0, [0.0] * len(contenders)
    for chunk in _chunks(in_background(map(jax.device_put, source.train(recipe.batch_size, seed)))):
        for i, contender in enumerate(contenders):
            start, logs = time.perf_counter(), []
            for step, batch in enumerate(chunk, num_steps):
                if job.view is not None and step % job.view.period == 0:
                    learners[i] = job.view.refresh(learners[i])
                learners[i], log = job.train_step(learners[i], batch)
                logs.append(log)
            loss, hits, requests = np.mean(np.stack(jax.device_get(logs)), axis=0)
            seconds = time.perf_counter() - start
            times[i].append(seconds / len(chunk))
            first_chunks[i] = first_chunks[i] or seconds
            curves[i].append((num_steps + len(chunk), float(loss)))
            on_chunk(
                contender.name,
                len(chunk) * recipe.batch_size,
                float(loss),
                float(hits / max(requests, 1)),
                seconds,
            )
        num_steps += len(chunk)
    if not num_steps:
        raise ValueError(
            f"{source.num_train} training rows make no batch of {recipe.batch_size}; lower "
            "batch_size"
        )
    if job.view is not None:
        learners = [job.view.refresh(learner) for learner in learners]
    return [
        Fitted(*parts, seed, num_steps, curve, seconds, first)
        for *parts, curve, seconds, first in zip(
            contenders, specs, learners, curves, times, first_chunks, strict=True
        )
    ]


def train(
    source: Any,
    contenders: list[Contender],
    recipe: Recipe,
    job: Job,
    *,
    seed: int,
    on_chunk: Callable[..., None],
    on_measure: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Trains every contender for one pass (see `fit`) and evaluates it.

    `on_measure` is called with the name of each contender before its evaluation.
    """
    fitted = fit(source, contenders, recipe, job, seed=seed, on_chunk=on_chunk)
    [plain] = stacks.make_specs(source, FP32, recipe)
    outcomes = []
    while fitted:  # a learner evaluated is let go: the next evaluation has its memory
        on_measure(fitted[0].contender.name)
        outcomes.append(measure(job, fitted.pop(0), source, plain, recipe.batch_size))
    return outcomes
