"""Trains a recommender with cached low-precision embeddings, and the same one in FP32 beside it.

DLRM on a synthetic twin of Criteo-Kaggle (the default; no file, no network), DLRM on Criteo's own
train.txt from a folder, or a small model on Reddit posts or MovieLens ratings. A third run, FP32
with ids hashed into as many bytes as ours, is the baseline that any compression has to beat. All
runs see the same batches, seeds and initial dense parameters. At the end: a table, a picture and a
JSON file in the output folder, and a projection of one full Criteo-Kaggle epoch. From the
repository root:

    python -m experiments.train_dlrm
    python -m experiments.train_dlrm --storage int4 --cache-fraction 0.01 --embedding-dim 64
    python -m experiments.train_dlrm --data criteo --path ~/criteo --min-count 10
    python -m experiments.train_dlrm --data reddit --seeds 0 1 2
    python -m experiments.train_dlrm --data movielens --seeds 0 1 2
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # so that `python experiments/train_dlrm.py` works too

from experiments.data import reddit, synthetic
from experiments.dlrm import reporting, training


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run depends on."""

    data: Literal["synthetic", "criteo", "reddit", "movielens"] = "synthetic"
    path: Path | None = None
    """Folder (or file) of the data, for criteo and reddit."""
    storage: training.Storage = "int8"
    cache_fraction: float = 0.05
    """Rows that the FP32 cache holds, as a share of all; 0: no cache."""
    policy: Literal["lfu", "lru"] = "lfu"
    ways: int = 32
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    embedding_dim: int = 16
    batch_size: int | None = None
    """None: 2,048, or 1,024 for reddit and movielens."""
    row_learning_rate: float | None = None
    """Of row-wise Adagrad on the embedding rows. None: 0.02, or 0.05 for reddit and movielens."""
    dense_learning_rate: float | None = None
    """Of Adam on the rest. None: 1e-3, or 2e-3 for reddit and movielens."""
    hidden: tuple[int, int] = (512, 256)
    """Hidden widths of DLRM's two MLPs; the bottom one adds a layer of 64."""
    max_unique_ids: int | None = None
    """Budget of distinct ids in a batch; None: as many as ids."""
    hashed_baseline: bool = True
    """Also train FP32 tables of the same bytes as ours, into which ids are hashed."""
    seeds: tuple[int, ...] = (0,)
    scale: float = 0.02
    """Synthetic: vocabulary sizes as a share of Criteo-Kaggle's."""
    num_rows: int | None = None
    """Rows in all. None: 800,000 synthetic ones; a whole file. Criteo: lines. Reddit: per split."""
    in_time_order: bool = False
    """Reddit: train on the posts as they came, so that ids drift."""
    data_seed: int = 0
    """Synthetic: which data. Movielens: which rows train and which test."""
    mapping: Literal["dictionary", "hash"] = "dictionary"
    """Criteo: how categories become ids."""
    min_count: int = 1
    """Criteo, dictionary: values seen fewer times in training share one id."""
    hash_size: int = 1_000_000
    """Criteo, hash: ids per feature."""
    max_bad_lines: int = 100
    """Criteo: bad lines skipped before giving up."""
    holdout: Literal["test", "validation", "day"] = "test"
    """Criteo: which part of the last day to evaluate on."""
    cache_dir: Path | None = None
    """Where datasets go. None: mpembed_cache beside Criteo's text, or ~/tensorflow_datasets."""
    out: Path = Path("results/train_dlrm")
    """Folder for the table, the picture and the JSON file."""


def make_source(settings: Settings, log: Any = print) -> Any:
    """Opens the input that the settings name; see experiments/data.

    Raises:
      ValueError: if criteo has no path.
    """
    match settings.data:
        case "synthetic":
            rows = 800_000 if settings.num_rows is None else settings.num_rows
            return synthetic.CriteoTwin(rows, settings.scale, settings.data_seed)
        case "reddit":
            return reddit.RedditPosts(
                settings.path, settings.num_rows, in_time_order=settings.in_time_order
            )
        case "movielens":
            from experiments.data import (
                movielens,  # tensorflow-datasets is needed for these two only
            )

            return movielens.MovielensRatings(
                settings.cache_dir, settings.num_rows, settings.data_seed, log
            )
        case "criteo":
            from experiments.data import criteo

            if settings.path is None:
                raise ValueError(
                    "data=criteo needs path: the folder that holds train.txt or train.txt.gz"
                )
            return criteo.CriteoLog(
                settings.path, cache_dir=settings.cache_dir, mapping=settings.mapping,
                min_count=settings.min_count,
                hash_size=settings.hash_size, max_bad_lines=settings.max_bad_lines,
                max_rows=settings.num_rows,
                holdout=settings.holdout, log=log,
            )  # fmt: skip


def make_recipe(settings: Settings) -> training.Recipe:
    """Returns what all contenders share.

    If a setting is None, the data's default is taken.
    """
    is_small = settings.data in ("reddit", "movielens")  # another model
    return training.Recipe(
        embedding_dim=settings.embedding_dim,
        batch_size=settings.batch_size or (1024 if is_small else 2048),
        row_learning_rate=settings.row_learning_rate or (0.05 if is_small else 0.02),
        dense_learning_rate=settings.dense_learning_rate or (2e-3 if is_small else 1e-3),
        max_unique_ids=settings.max_unique_ids,
        hidden=settings.hidden,
    )


def main(settings: Settings) -> dict[str, Any]:
    """Trains, evaluates, prints and saves; returns what the JSON file holds."""
    start = time.perf_counter()
    console = reporting.make_console()
    source = make_source(settings, console.print)
    recipe = make_recipe(settings)
    has_kaggle_day = (
        source.num_dense > 0
    )  # reddit and movielens: no epoch of Criteo's to project to
    cached = (
        f" + {100 * settings.cache_fraction:.3g} %" if settings.cache_fraction else ", no cache"
    )
    ours = training.Contender(
        f"{settings.storage.upper()}{cached}", settings.storage, settings.cache_fraction,
        settings.rounding,
        settings.policy, settings.ways,
    )  # fmt: skip
    contenders = [training.FP32, ours]
    if settings.hashed_baseline:
        contenders.append(training.hashed_of_equal_bytes(source, ours, recipe))
    console.print(
        f"{source.name}: {source.num_train:,} training and {source.num_test:,} test rows, "
        f"{len(source.tables)} tables "
        f"with {sum(source.tables.values()):,} ids, D = {recipe.embedding_dim}, batches of "
        f"{recipe.batch_size:,}"
    )
    job, outcomes = training.make_job(source, recipe), []
    for seed in settings.seeds:
        console.print(f"seed {seed}")
        with reporting.make_progress(console) as progress:
            rows = source.num_train // recipe.batch_size * recipe.batch_size
            bars = reporting.Bars(progress, [c.name for c in contenders], rows)
            outcomes += training.train(source, contenders, recipe, job, seed=seed, on_chunk=bars)
    table = reporting.make_table(
        outcomes, f"{source.name}, {len(settings.seeds)} seed(s), one pass"
    )
    console.print(table)
    reporting.print_advice(console, outcomes)
    seconds = {
        o.contender.name: reporting.projection(o, recipe.batch_size)
        for o in outcomes[-len(contenders) :]
    }
    projected = ", ".join(f"{name} {s / 60:.0f} min" for name, s in seconds.items())
    settings.out.mkdir(parents=True, exist_ok=True)
    reporting.save_picture(outcomes, settings.out / f"{source.name}.png")
    with (settings.out / f"{source.name}.txt").open("w") as file:
        Console(file=file, width=160).print(table)
    total = time.perf_counter() - start
    record = reporting.save_json(
        settings.out / f"{source.name}.json", settings, outcomes, seconds=total,
        projected_kaggle_epoch_seconds=seconds if has_kaggle_day else None,
    )  # fmt: skip
    if has_kaggle_day:
        console.print(
            "PROJECTION, not a measurement: one pass over Criteo-Kaggle's 45.8 M rows at these "
            f"steps: {projected} "
            f"(evaluation, and reading the text once, not included)"
        )
    console.print(f"{total:.0f} s in all; {source.name}.json, .txt and .png are in {settings.out}")
    return record


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
