"""Trains one case of the grid for one seed, baselines included, and says what a run depends on.

Cases that differ only in what happens after training (FP32 and its post-training quantizations)
share one training.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.accuracy import baselines
from experiments.accuracy.grid import FP32, Case
from experiments.dlrm import outcomes, stacks, training, unfinished
from experiments.dlrm.outcomes import Outcome


class Result(NamedTuple):
    """The outcome of a case.

    The bytes while training are larger than the outcome's if only serving is compressed.
    """

    case: Case
    outcome: Outcome
    training_bytes_per_row: float


def _changed(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that differ from their defaults.

    A field that is added later therefore does not change the keys of older runs.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    return {name: v for name, v in dataclasses.asdict(value).items() if v != defaults[name]}


def depends_on(
    data: dict[str, Any], recipe: training.Recipe, case: Case, seed: int
) -> dict[str, Any]:
    """Returns everything a run depends on except the code, ready for JSON.

    records.key_of makes its key.
    """
    shared = {k: list(v) if isinstance(v, tuple) else v for k, v in _changed(recipe).items()}
    return {"data": data, "recipe": shared, "case": _changed(case), "seed": seed}


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Splits cases into those that share one training, in the order of their first."""
    after = [c for c in cases if c == FP32 or c.method == "post-training"]
    return ([after] if after else []) + [[c] for c in cases if c not in after]


class Workbench:
    """Runs cases on one source with one recipe.

    Compiled steps and the counts of ids are kept for the next seeds.

    Args:
      source: see experiments/data.
      recipe: of FP32; "narrow" cases change its dim.
    """

    def __init__(self, source: Any, recipe: training.Recipe):
        self.source, self.recipe = source, recipe
        [self.plain] = stacks.make_specs(source, training.FP32, recipe)
        self.plain_bytes = 4 * self.plain.num_rows * recipe.embedding_dim
        self.jobs: dict[Any, tuple[Any, training.Recipe, training.Job]] = {}
        self.counts: dict[str, Any] | None = None

    def _setup(self, case: Case) -> tuple[Any, training.Recipe, training.Job]:
        """Returns source, recipe and compiled functions of a case."""
        own = (
            (case.method, case.share)
            if case.method in ("narrow", "pruned", "quantization-aware")
            else None
        )
        if own not in self.jobs:
            source, recipe, view = self.source, self.recipe, None
            match case.method:
                case "narrow":
                    recipe = dataclasses.replace(
                        recipe, embedding_dim=max(1, round(case.share * recipe.embedding_dim))
                    )
                case "pruned":
                    self.counts = self.counts or baselines.count_ids(source, recipe.batch_size)
                    num_kept = baselines.rows_to_keep(
                        self.plain.num_rows, len(source.tables), recipe.embedding_dim, case.share
                    )
                    source = baselines.Pruned(source, self.counts, num_kept)
                case "quantization-aware":
                    view = baselines.quantization_aware(source.tables)
            # By gradients of rows, whose plans incremental saves need: with and without saves, the
            # steps are one program.
            job = training.make_job(source, recipe, view, row_gradients=True)
            self.jobs[own] = source, recipe, job
        return self.jobs[own]

    def contender_of(self, case: Case) -> training.Contender:
        """Returns how training stores the rows of a case.

        A pool of no given size has a row for each id that occurs `admit_after` times in training,
        and a tenth more: sets of rows do not fill evenly.
        """
        contender = case.contender()
        if not case.admit_after:
            return contender
        if case.pool:
            num_rows = max(1, round(case.pool * self.plain.num_rows))
        else:
            self.counts = self.counts or baselines.count_ids(self.source, self.recipe.batch_size)
            num = sum(int((of >= case.admit_after).sum()) for of in self.counts.values())
            num_rows = max(1, -(-11 * num // 10))
        return dataclasses.replace(
            contender,
            pool_rows=num_rows,
            admit_after=case.admit_after,
            shared_rows=case.shared_rows,
            sketch_bytes=case.sketch_bytes,
            window=case.window,
            by_table=case.by_table,
        )

    def _with_bytes(self, outcome: Outcome, embedding_bytes: int) -> Outcome:
        """Replaces the bytes of an outcome.

        The optimizer's bytes stay, and so do the bytes that FP32 takes with them.
        """
        with_row_state = outcome.ratio_with_row_state * (
            outcome.embedding_bytes + outcome.row_state_bytes
        )
        return dataclasses.replace(
            outcome, embedding_bytes=embedding_bytes,
            bytes_per_row=embedding_bytes / self.plain.num_rows,
            ratio=self.plain_bytes / embedding_bytes,
            ratio_with_row_state=with_row_state / (embedding_bytes + outcome.row_state_bytes),
        )  # fmt: skip

    def training_of(self, group: Sequence[Case], data: dict[str, Any], seed: int) -> dict[str, Any]:
        """Returns what the training of a group depends on, ready for JSON.

        Cases after it do not matter.
        """
        own = group[0].method in ("narrow", "pruned", "quantization-aware")
        case = (
            dataclasses.replace(FP32, method=group[0].method, share=group[0].share) if own else FP32
        )
        contender = dataclasses.asdict(self.contender_of(group[0])) | {"name": ""}
        return depends_on(data, self.recipe, case, seed) | {"contender": contender}

    def run(
        self,
        group: Sequence[Case],
        seed: int,
        on_chunk: Callable[..., None],
        keeper: unfinished.Keeper | None = None,
    ) -> Iterator[Result]:
        """Trains the cases of one of `groups` once and yields a Result for each.

        Args:
          group: cases that share a training.
          seed: of parameters, rows and batch order; the same for all cases, which is what makes
            them paired.
          on_chunk: see training.fit.
          keeper: saves the training, and goes on with one that it has saved.

        Raises:
          Stopped: by the keeper, if the process was told to stop.
        """
        source, recipe, job = self._setup(group[0])
        contenders = [self.contender_of(group[0])]
        run = training.begin(source, contenders, recipe, job, seed=seed)
        if keeper is not None and (saved := unfinished.read(keeper.folder)) is not None:
            unfinished.restore(keeper.folder, saved, run, job)
        [fitted] = training.fit(
            source, contenders, recipe, job, seed=seed, on_chunk=on_chunk, run=run, keeper=keeper
        )

        def on_batch() -> None:
            if keeper is not None:
                keeper.after_step(run)

        for case in group:
            now = fitted
            if case.method == "post-training":
                emb = baselines.quantize_after(fitted.learner.emb[0], case.storage, job.row_tx)
                now = fitted._replace(
                    specs=(emb.spec,), learner=fitted.learner._replace(emb=(emb,))
                )
            outcome = outcomes.measure(
                job,
                now._replace(contender=self.contender_of(case)),
                source,
                self.plain,
                recipe.batch_size,
                on_batch=on_batch,
            )
            fp32 = self.plain_bytes / self.plain.num_rows
            match case.method:
                case "pruned":
                    index = baselines.index_bytes(self.plain.num_rows)
                    outcome = self._with_bytes(outcome, outcome.embedding_bytes + index)
                case "quantization-aware":
                    served = baselines.int4_served_bytes(source.tables, recipe.embedding_dim)
                    outcome = self._with_bytes(outcome, served)
            needs_master = case.method in ("post-training", "quantization-aware")
            if needs_master:  # nothing is saved while it trains
                outcome = dataclasses.replace(outcome, ratio_with_row_state=1.0)
            while_training = fp32 if needs_master else outcome.bytes_per_row
            yield Result(case, outcome, while_training)
