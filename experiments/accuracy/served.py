"""What does serving cost in AUC? Rows trained in INT4 are exported, loaded and evaluated.

A recommender is trained with INT4 rows and a cache, as in `paper_table`. Its state is saved as a
serving file as trained and as INT8, INT4, INT2 and FP16 to nearest. Test rows are scored with
`read` of the state in training, and with the rows of each file. Differences are taken within a
seed. A seed is saved every ten minutes and when the process is told to stop; the same command goes
on with it, and with the seeds that are missing.

    python -m experiments.accuracy.served

Reddit's posts are used; see experiments/data/reddit.py for the file.
"""

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mpembed_jax as mpembed
from experiments import command_line, provenance, running, train_dlrm
from experiments.accuracy import intervals, paper_runs, paper_table, records
from experiments.accuracy.grid import Case
from experiments.command_line import setting
from experiments.data import reddit
from experiments.dlrm import outcomes, reporting, training, unfinished
from mpembed_jax import serving

SAVE_EVERY_S = 600.0
EXPORTS: dict[str, str | None] = {
    "as trained": None,
    "int8": "int8",
    "int4": "int4",
    "int2": "int2",
    "float16": "float16",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained and exported."""

    path: Path | None = setting(
        None, "File of posts, or its folder.", shown="the folder that MPEMBED_DATA names"
    )
    embedding_dim: int = setting(16, "Numbers in a row.", "NUMBERS", at_least=1, at_most=4096)
    cache: float = setting(0.01, "Share of rows in the cache.", "SHARE", above=0, at_most=1)
    seeds: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4), "Seeds.", "SEEDS", at_least=0, at_most=2**31 - 1
    )
    num_rows: int | None = setting(
        None, "Posts that are read.", "ROWS", at_least=100, at_most=10**9, shown="all"
    )
    out: Path = setting(Path("experiments/results/served.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses a missing file of posts, and an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    with command_line.reading("--path", settings.path, ValueError):
        reddit.check(settings.path)


def served(state: mpembed.EmbeddingState, path: Path) -> mpembed.EmbeddingState:
    """Returns a float32 state with the rows of a serving file."""
    table = serving.load(path)
    features = {t.name: np.arange(t.vocabulary_size) for t in state.spec.tables}
    spec = dataclasses.replace(state.spec, storage=mpembed.RowFormat("float32"), cache=None)
    tx = mpembed.optim.rowwise_adagrad(0.1)
    return mpembed.from_dense(jax.random.key(0), spec, tx, table.lookup(features))


class Bench(NamedTuple):
    """What all seeds share."""

    source: Any
    recipe: training.Recipe
    contender: training.Contender
    job: training.Job

    def data(self, task: train_dlrm.Settings) -> dict[str, Any]:
        """Returns what the scores of all seeds depend on, ready for JSON."""
        data = paper_table.data_of(task, self.source)
        case = Case(self.contender.storage, self.contender.cache_fraction)
        return paper_runs.depends_on(data, self.recipe, case, 0)

    def scores(
        self, seed: int, keeper: unfinished.Keeper, console: Console
    ) -> dict[str, dict[str, Any]]:
        """Trains with a seed, from where a save left it, exports and scores.

        Returns:
          {"scores": {"read" or name of an export: scores}, "files": {name of an export: facts}}.

        Raises:
          Stopped: by the keeper, if the process was told to stop.
        """
        source, recipe, contender, job = self
        run = training.begin(source, [contender], recipe, job, seed=seed)
        if (saved := unfinished.read(keeper.folder)) is not None:
            unfinished.restore(keeper.folder, saved, run, job)
        size = recipe.batch_size
        rows, done = source.num_train // size * size, {contender.name: run.steps[0] * size}
        found: dict[str, dict[str, Any]] = {"scores": {}, "files": {}}
        with reporting.bars(console, [contender.name], rows, done) as bars:
            (fitted,) = training.fit(
                source, [contender], recipe, job, seed=seed, on_chunk=bars, run=run, keeper=keeper
            )

            def score(name: str, learner: training.Learner) -> None:
                bars.measuring(name)
                found["scores"][name] = outcomes.evaluate(
                    job, learner, source, size, on_batch=lambda: keeper.after_step(run)
                )

            (state,) = fitted.learner.emb
            score("read", fitted.learner)
            with tempfile.TemporaryDirectory() as folder:
                for name, storage in EXPORTS.items():
                    path = Path(folder) / "model.safetensors"
                    contents = serving.save(path, state, storage=storage)
                    found["files"][name] = {
                        "largest": max(t.errors.largest for t in contents.tables),
                        "bytes": path.stat().st_size,
                    }
                    score(name, fitted.learner._replace(emb=(served(state, path),)))
        keeper.finish()
        return found


def score_all(settings: Settings) -> tuple[Path, list[dict[str, Any]]]:
    """Returns a folder to delete at the end, and what `Bench.scores` gives for each seed.

    The folder has the seeds that are finished, which are not run again, and the saves of one.

    Raises:
      Stopped: if the process was told to stop; the seed that trained is saved.
    """
    console = reporting.make_console()
    task = train_dlrm.Settings(
        data="reddit", path=settings.path, embedding_dim=settings.embedding_dim,
        num_rows=settings.num_rows,
    )  # fmt: skip
    with running.preparing(), running.working("opening the data reddit"):
        source, recipe = train_dlrm.make_source(task, console.print), train_dlrm.make_recipe(task)
        if source.num_train < recipe.batch_size:
            raise command_line.Refused(
                f"--num-rows leaves {source.num_train:,} training rows, but a batch has "
                f"{recipe.batch_size:,}: use more rows"
            )
        train_dlrm.check_rows(source, recipe)
        contender = training.Contender("INT4", "int4", settings.cache)
        # An export is scored as a float32 state, beside the trained one.
        train_dlrm.check_memory(source, [training.FP32, contender], recipe, "--num-rows")
    bench = Bench(source, recipe, contender, training.make_job(source, recipe))
    what = bench.data(task)
    folder = settings.out.with_name(f"{settings.out.stem}_unfinished") / records.key_of(what)
    command = command_line.command_of(command_line.name_of(run), command_line.words_of(settings))
    finished = records.load(folder / "seeds.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    with running.stoppable() as stop:
        for seed in settings.seeds:
            if str(seed) not in finished:
                about = {"training": what | {"seed": seed}}
                saves = folder / f"seed_{seed}"
                keeper = unfinished.Keeper(saves, SAVE_EVERY_S, stop, about, command)
                finished[str(seed)] = bench.scores(seed, keeper, console) | {"key": str(seed)}
                records.append(folder / "seeds.jsonl", finished[str(seed)])
                shutil.rmtree(saves, ignore_errors=True)
            scores = finished[str(seed)]["scores"]
            print(seed, {name: round(own["auc"], 5) for name, own in scores.items()}, flush=True)
    return folder, [finished[str(seed)] for seed in settings.seeds]


def run(settings: Settings) -> dict[str, Any]:
    """Trains, exports, scores and saves; returns what the JSON file holds."""
    folder, by_seed = score_all(settings)
    found = {
        name: {s: one["scores"][name] for s, one in zip(settings.seeds, by_seed, strict=True)}
        for name in ("read", *EXPORTS)
    }
    errors = by_seed[-1]["files"]
    record: dict[str, Any] = {**provenance.environment(), "scores": found, "files": errors}
    record["settings"] = provenance.settings_of(settings) | {"path": None}  # of one machine
    record["differences"] = {}
    for name in EXPORTS:
        for score in ("auc", "log_loss"):
            values, base = (
                {seed: scores[score] for seed, scores in found[which].items()}
                for which in (name, "read")
            )
            difference = intervals.paired(values, base)
            record["differences"].setdefault(name, {})[score] = str(difference)
        print(name, record["differences"][name], errors[name], flush=True)
    provenance.write(settings.out, record)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: others are unfinished
        folder.parent.rmdir()
    return record


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and runs."""
    return command_line.main(run, Settings, __doc__ or "", arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
