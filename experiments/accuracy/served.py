"""What does serving cost in AUC? Rows trained in INT4 are exported, loaded and evaluated.

A recommender is trained with INT4 rows and a cache, as in `paper_table`. Its state is saved as a
serving file as trained and as INT8, INT4 and FP16 to nearest. Test rows are scored with `read` of
the state in training, and with the rows of each file. Differences are taken within a seed.

    python -m experiments.accuracy.served

Reddit's posts are used; see experiments/data/reddit.py for the file.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mpembed_jax as mpembed
from experiments import command_line, provenance, train_dlrm
from experiments.accuracy import intervals
from experiments.command_line import setting
from experiments.data import reddit
from experiments.dlrm import outcomes, training
from mpembed_jax import serving

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
    try:
        reddit.check(settings.path)
    except (FileNotFoundError, ValueError) as error:
        raise command_line.Refused(str(error)) from None


def served(state: mpembed.EmbeddingState, path: Path) -> mpembed.EmbeddingState:
    """Returns a float32 state with the rows of a serving file."""
    table = serving.load(path)
    features = {t.name: np.arange(t.vocabulary_size) for t in state.spec.tables}
    spec = dataclasses.replace(state.spec, storage=mpembed.RowFormat("float32"), cache=None)
    tx = mpembed.optim.rowwise_adagrad(0.1)
    return mpembed.from_dense(jax.random.key(0), spec, tx, table.lookup(features))


def run(settings: Settings) -> dict[str, Any]:
    """Trains, exports, scores and saves; returns what the JSON file holds."""
    task = train_dlrm.Settings(
        data="reddit", path=settings.path, embedding_dim=settings.embedding_dim,
        num_rows=settings.num_rows,
    )  # fmt: skip
    source, recipe = train_dlrm.make_source(task), train_dlrm.make_recipe(task)
    job = training.make_job(source, recipe)
    contender = training.Contender("INT4", "int4", settings.cache)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ("read", *EXPORTS)}
    errors: dict[str, Any] = {}
    for seed in settings.seeds:
        (fitted,) = training.fit(
            source, [contender], recipe, job, seed=seed, on_chunk=lambda *_: None
        )
        learner = fitted.learner
        (state,) = learner.emb
        scores = outcomes.evaluate(job, learner, source, recipe.batch_size)
        found["read"][seed] = scores
        with tempfile.TemporaryDirectory() as folder:
            for name, storage in EXPORTS.items():
                path = Path(folder) / "model.safetensors"
                contents = serving.save(path, state, storage=storage)
                errors[name] = {
                    "largest": max(t.errors.largest for t in contents.tables),
                    "bytes": path.stat().st_size,
                }
                exported = learner._replace(emb=(served(state, path),))
                found[name][seed] = outcomes.evaluate(job, exported, source, recipe.batch_size)
        print(seed, {name: round(own[seed]["auc"], 5) for name, own in found.items()}, flush=True)
    record: dict[str, Any] = {**provenance.environment(), "scores": found, "files": errors}
    record["settings"] = {
        **dataclasses.asdict(settings),
        "out": str(settings.out),
        "path": None,  # a place on one machine
    }
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
    settings.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and runs."""
    return command_line.main(run, Settings, __doc__ or "", arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
