"""The training of several storages of one recommender side by side.

Every contender is the functional step of DESIGN.md 4: embed, gradients with respect to the vectors,
apply_pooled_gradients for them and optax for the dense part, in one jitted call with everything
donated. A step by gradients of rows makes the same updates: prefetch, lookup, pool,
apply_gradients. It is taken where a View changes the rows, and where `make_job` is told so.
Contenders take turns on chunks of batches, so the host waits for the device once per chunk and
times them alternately. Batches are made on a background thread. One pass, no early stopping, no
learning-rate schedule. What a run reached is in `outcomes`, how it is saved and gone on with in
`unfinished`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import metrics

import mpembed_jax as mpembed
from experiments.data.background import in_background
from experiments.dlrm import models, stacks
from experiments.dlrm.curves import Point
from experiments.dlrm.outcomes import Outcome, measure

if TYPE_CHECKING:
    from experiments.dlrm.unfinished import Keeper

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
    # Above 0: ids are raw, and compete for this many rows, which those earn that were seen
    # `admit_after` times.
    pool_rows: int = 0
    admit_after: int = 2
    recycle: bool = True  # whether an id can take the row of one that is used less
    shared_rows: int = 1  # of a table, for the ids without a row
    sketch_bytes: int = 3  # counters of ids without a row, for each row of the pool
    window: int = 30  # ids per row of the pool after which counts are halved
    by_table: bool = False  # whether raw ids' rows start from values as large as numbered ids' rows


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
    chunk: int = 16  # batches a contender trains on before the next one's turn


class Learner(NamedTuple):
    """Everything a step replaces; all of it is donated."""

    emb: tuple[mpembed.EmbeddingState, ...]  # one per stack, see stacks.make_specs
    params: Any
    opt_state: Any
    extra: Any = None  # what the job's View needs
    trackers: Any = None  # one checkpoint.RowTracker per stack, of runs that are saved


class Log(NamedTuple):
    """What a step tells of itself."""

    counts: jax.Array  # f32 [4]: loss, requests found in the cache, requests, distinct rows
    scores: jax.Array  # f32 [B]: logits of the model before the step


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

    train_step: Callable[[Learner, dict], tuple[Learner, Log]]
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
    curve: list[Point]  # a point per chunk
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
    full = 4 * recipe.embedding_dim * sum(source.tables.values())
    share = sum(size.total for size in sizes) / full
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


def make_job(
    source: Any, recipe: Recipe, view: View | None = None, *, row_gradients: bool = False
) -> Job:
    """Builds the step, the prediction and the optimizers.

    The model is DLRM if there are dense inputs, otherwise the small MLP. With a `view` the model
    sees its result instead of the rows, in training (gradients flow through it) and prediction.
    With `row_gradients`, the loss is differentiated with respect to unique rows, not to vectors.
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
    def train_step(learner: Learner, batch: dict) -> tuple[Learner, Log]:
        ids = [stacks.global_ids(batch, source.tables, emb.spec) for emb in learner.emb]
        # What the loss is differentiated with respect to, per stack: rows, or vectors.
        leaves: list[Any]
        by_rows = row_gradients or view is not None
        if by_rows:
            embs, plans = zip(*map(mpembed.prefetch, learner.emb, ids), strict=True)
            leaves = list(map(mpembed.lookup, embs, plans))
        else:
            embed = partial(stacks.embed, bags=bags, tx=row_tx)
            embs, plans, leaves = map(list, zip(*map(embed, learner.emb, ids), strict=True))

        def vectors_of(leaf: Any, plan: Any, emb: mpembed.EmbeddingState) -> jax.Array:
            if not by_rows:
                return stacks.joined(leaf)
            seen = see(learner, leaf, plan.unique_ids)
            return stacks.pooled(seen, plan.inverse, bags, emb.implementation)

        def loss_fn(params: Any, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            parts = list(map(vectors_of, leaves, plans, learner.emb))
            vectors = stacks.merged(parts, learner.emb, source, isinstance(batch["ids"], dict))
            logits = model(params, batch["dense"], vectors)
            return models.bce(logits, batch["label"]), logits

        (loss, logits), (grads, leaf_grads) = jax.value_and_grad(
            loss_fn, argnums=(0, 1), has_aux=True
        )(learner.params, leaves)
        if by_rows:
            apply = partial(mpembed.apply_gradients, tx=row_tx)
            embs = tuple(map(apply, embs, plans, leaves, leaf_grads))
        else:
            apply = partial(mpembed.apply_pooled_gradients, tx=row_tx)
            embs = tuple(map(apply, embs, plans, leaf_grads))
        updates, opt_state = tx.update(grads, learner.opt_state, learner.params)
        trackers = learner.trackers
        if trackers is not None:
            from mpembed_jax import checkpoint  # needs an extra that not every user of this has

            trackers = tuple(map(checkpoint.mark, trackers, plans))
        counts, unique = plans[0].counts, sum(plan.counts.unique for plan in plans)
        numbers = (loss, counts.hit_requests, counts.requests, unique)
        log = Log(jnp.stack([x.astype(jnp.float32) for x in numbers]), logits)
        params = optax.apply_updates(learner.params, updates)
        return Learner(embs, params, opt_state, learner.extra, trackers), log

    @jax.jit
    def predict(learner: Learner, batch: dict) -> jax.Array:
        parts = []
        for emb in learner.emb:
            if emb.vocabulary is not None:
                parts.append(stacks.read_raw(emb, batch, bags))
                continue
            ids = stacks.global_ids(batch, source.tables, emb.spec)
            parts.append(
                stacks.read(
                    lambda ids, emb=emb: see(learner, mpembed.read(emb, ids), ids), ids, bags
                )
            )
        vectors = stacks.merged(parts, learner.emb, source, isinstance(batch["ids"], dict))
        return jax.nn.sigmoid(model(learner.params, batch["dense"], vectors))

    return Job(train_step, predict, init_params, row_tx, tx, view)


def _chunks(batches: Iterable[dict], size: int) -> Iterator[list[dict]]:
    chunk: list[dict] = []
    for batch in batches:
        chunk.append(batch)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclasses.dataclass
class Run:
    """The training of several contenders with one seed, as far as it has come.

    The lists have an entry per contender.
    """

    seed: int
    contenders: list[Contender]
    specs: list[tuple[mpembed.EmbeddingSpec, ...]]
    batch_size: int
    learners: list[Learner | None]  # None: evaluated, and let go
    steps: list[int]
    logs: list[list[Log]]  # of the chunk under way
    curves: list[list[Point]]
    step_s: list[list[float]]
    first_chunk_s: list[float]
    outcomes: list[Outcome]  # of the contenders that are evaluated
    seconds: float = 0.0  # of training, before this process

    @property
    def place(self) -> str:
        """Says how far it is."""
        if self.outcomes or len(set(self.steps)) == 1:
            return f"step {max(self.steps)} of seed {self.seed}"
        return f"steps {min(self.steps)} to {max(self.steps)} of seed {self.seed}"

    def about(self) -> dict[str, Any]:
        """Returns everything but the arrays, as JSON has it."""
        return {
            "seed": self.seed, "batch_size": self.batch_size, "steps": self.steps,
            "num_logs": [len(logs) for logs in self.logs],
            "curves": self.curves, "step_s": self.step_s,
            "first_chunk_s": self.first_chunk_s, "seconds": self.seconds,
            "outcomes": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }  # fmt: skip

    def take(self, about: dict[str, Any]) -> None:
        """Takes over what `about` returned, with zeros for the logs."""
        for name in ("steps", "step_s", "first_chunk_s", "seconds"):
            setattr(self, name, about[name])
        self.curves = [[Point(*point) for point in curve] for curve in about["curves"]]
        self.outcomes = [outcome_of(values) for values in about["outcomes"]]
        for i, count in enumerate(about["num_logs"]):
            self.set_logs(i, np.zeros((count, 4)), np.zeros((count, self.batch_size)))

    def counts_of(self, i: int) -> np.ndarray:
        """Returns f32 [k, 4], the counts of a contender's steps in the chunk under way."""
        found = jax.device_get([log.counts for log in self.logs[i]])
        return np.asarray(found, np.float32).reshape(-1, 4)

    def scores_of(self, i: int) -> np.ndarray:
        """Returns f32 [k, B], their scores."""
        found = jax.device_get([log.scores for log in self.logs[i]])
        return np.asarray(found, np.float32).reshape(-1, self.batch_size)

    def set_logs(self, i: int, counts: np.ndarray, scores: np.ndarray) -> None:
        """Puts back what counts_of and scores_of returned."""
        self.logs[i] = [Log(*pair) for pair in zip(counts, scores, strict=True)]


def outcome_of(values: dict[str, Any]) -> Outcome:
    """Returns an outcome from its dictionary, as dataclasses.asdict and JSON leave it."""
    return Outcome(
        **values
        | {
            "contender": Contender(**values["contender"]),
            "losses": [(step, loss) for step, loss in values["losses"]],
            "curve": [Point(*point) for point in values["curve"]],
        }
    )


def begin(source: Any, contenders: list[Contender], recipe: Recipe, job: Job, *, seed: int) -> Run:
    """Makes the learners of a run that has not taken a step.

    Args:
      source: see experiments/data.
      contenders: the runs; the seed gives all of them the same initial values and the same batches.
      recipe: what they share.
      job: from make_job.
      seed: of parameters, rows and batch order.
    """
    specs = [stacks.make_specs(source, c, recipe) for c in contenders]
    row_key, dense_key = jax.random.split(jax.random.key(seed))
    learners: list[Learner | None] = []
    for several in specs:
        params = job.init_params(dense_key)
        learners.append(
            Learner(stacks.init(row_key, source, several, job.row_tx), params, job.tx.init(params))
        )
    empty: list[list] = [[] for _ in contenders]
    return Run(
        seed, contenders, specs, recipe.batch_size, learners, [0] * len(contenders), empty,
        [[] for _ in contenders], [[] for _ in contenders], [0.0] * len(contenders), [],
    )  # fmt: skip


def fit(
    source: Any,
    contenders: list[Contender],
    recipe: Recipe,
    job: Job,
    *,
    seed: int,
    on_chunk: Callable[..., None],
    run: Run | None = None,
    keeper: "Keeper | None" = None,
) -> list[Fitted]:
    """Trains every contender for one pass.

    Args:
      source: see experiments/data.
      contenders: the runs; the seed gives all of them the same initial values and the same batches.
      recipe: what they share.
      job: from make_job.
      seed: of parameters, rows and batch order.
      on_chunk: called after each chunk of each contender as (name, num_rows, seconds, point).
      run: to go on with; None: from the beginning.
      keeper: saves the run.

    Returns:
      One Fitted per contender, in order.

    Raises:
      Stopped: by the keeper, if the process was told to stop.
    """
    run = begin(source, contenders, recipe, job, seed=seed) if run is None else run
    if keeper is not None:
        keeper.begin(run)
    if not run.outcomes:
        _train(source, run, recipe, job, on_chunk, keeper)
    if not max(run.steps):
        raise ValueError(
            f"{source.num_train} training rows make no batch of {recipe.batch_size}; lower "
            "batch_size"
        )
    return [
        Fitted(
            contender, run.specs[i], run.learners[i], seed, run.steps[i], run.curves[i],
            run.step_s[i], run.first_chunk_s[i],
        )
        for i, contender in enumerate(contenders)
        if run.learners[i] is not None
    ]  # fmt: skip


def _train(
    source: Any,
    run: Run,
    recipe: Recipe,
    job: Job,
    on_chunk: Callable[..., None],
    keeper: "Keeper | None",
) -> None:
    """Does what `fit` says."""
    begun, before = time.perf_counter(), run.seconds
    # The chunk under way, from its beginning: some contenders may have taken more of it.
    first = min(run.steps) // recipe.chunk * recipe.chunk
    is_warm = [False] * len(run.contenders)
    batches = source.train(recipe.batch_size, run.seed, first)
    for chunk in _chunks(in_background(map(jax.device_put, batches)), recipe.chunk):
        for i, contender in enumerate(run.contenders):
            start, done = time.perf_counter(), run.steps[i] - first
            if done >= len(chunk):
                continue
            for batch in chunk[done:]:
                learner = run.learners[i]
                if job.view is not None and run.steps[i] % job.view.period == 0:
                    learner = job.view.refresh(learner)
                run.learners[i], log = job.train_step(learner, batch)
                run.logs[i].append(log)
                run.steps[i] += 1
                run.seconds = before + time.perf_counter() - begun
                if keeper is not None and run.steps[i] < first + len(chunk):
                    keeper.after_step(run)
            point = _point(run, i, [batch["label"] for batch in chunk])
            seconds = time.perf_counter() - start
            if is_warm[i] or not run.step_s[i]:  # what goes on compiles again
                run.step_s[i].append(seconds / (len(chunk) - done))
            is_warm[i] = True
            run.first_chunk_s[i] = run.first_chunk_s[i] or seconds
            run.curves[i].append(point)
            run.logs[i] = []
            on_chunk(contender.name, (len(chunk) - done) * recipe.batch_size, seconds, point)
            if keeper is not None:
                keeper.after_step(run)
        first += len(chunk)
        if keeper is not None:
            keeper.after_chunk(run)
    if job.view is not None:
        run.learners = [x if x is None else job.view.refresh(x) for x in run.learners]


def _point(run: Run, i: int, labels: list[jax.Array]) -> Point:
    """Returns the means of a contender's chunk."""
    loss, hits, requests, unique = np.mean(run.counts_of(i), axis=0).tolist()
    label = np.concatenate(jax.device_get(labels))
    score = run.scores_of(i).reshape(-1)
    is_told = np.isfinite(score).all() and label.min() < label.max()
    auc = float(metrics.roc_auc_score(label, score)) if is_told else math.nan
    return Point(run.steps[i], run.seconds, loss, auc, hits / max(requests, 1), unique)


def train(
    source: Any,
    contenders: list[Contender],
    recipe: Recipe,
    job: Job,
    *,
    seed: int,
    on_chunk: Callable[..., None],
    on_measure: Callable[[str], None] = lambda name: None,
    run: Run | None = None,
    keeper: "Keeper | None" = None,
) -> list[Outcome]:
    """Trains every contender for one pass (see `fit`) and evaluates it.

    Ratios of bytes relate to the float32 rows of the first contender, which has one stack.
    `on_measure` is called with the name of each contender before its evaluation.
    """
    run = begin(source, contenders, recipe, job, seed=seed) if run is None else run
    fitted = fit(
        source, contenders, recipe, job, seed=seed, on_chunk=on_chunk, run=run, keeper=keeper
    )
    [plain] = run.specs[0]

    def on_batch() -> None:
        if keeper is not None:
            keeper.after_step(run)

    while fitted:  # a learner evaluated is let go: the next evaluation has its memory
        on_measure(fitted[0].contender.name)
        run.outcomes.append(
            measure(job, fitted.pop(0), source, plain, recipe.batch_size, on_batch=on_batch)
        )
        run.learners[len(run.outcomes) - 1] = None
    return run.outcomes
