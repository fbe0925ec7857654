"""Does training in low precision cost accuracy, and does the cache give it back? Reddit posts, paired seeds.

Every contender trains on the same batches with the same initial values as the FP32 run of its seed, one epoch in random
order, and is tested on later months. With few bits and no cache, nearest rounding should lose visibly and stochastic
rounding a little; a cache of one to five per cent should bring AUC back to FP32's. Run from the repository root:

    python -m experiments.reddit_quality
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python experiments/reddit_quality.py` works too

from experiments import reporting, training
from experiments.data import reddit
from experiments.training import Contender


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the experiment depends on."""

    path: Path | None = None
    """Folder of the parquet file; None: MPEMBED_DATA, then ../shared/data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    embedding_dim: int = 16
    batch_size: int = 1024
    row_learning_rate: float = 0.05
    dense_learning_rate: float = 2e-3
    num_rows: int | None = None
    """Rows per split; None: all."""
    out: Path = Path("experiments/results")


CONTENDERS = (
    training.FP32,
    Contender("INT8 + 5 %", "int8", 0.05),
    Contender("INT8 no cache", "int8", 0.0),
    Contender("INT4 + 5 %", "int4", 0.05),
    Contender("INT4 + 5 % LRU", "int4", 0.05, policy="lru"),
    Contender("INT4 + 1 %", "int4", 0.01),
    Contender("INT4 no cache", "int4", 0.0),
    Contender("INT4 no cache, nearest", "int4", 0.0, rounding="nearest"),
    Contender("INT2 + 5 %", "int2", 0.05),
    Contender("INT2 no cache", "int2", 0.0),
)
HASHED = ("INT8 + 5 %", "INT4 + 5 %")  # an FP32 run of the same bytes, ids hashed, is trained beside these


def main(settings: Settings, contenders: tuple[Contender, ...] = CONTENDERS) -> dict[str, Any]:
    """Trains all contenders for all seeds, prints the table, saves JSON and picture; returns the JSON's contents."""
    start = time.perf_counter()
    console = reporting.make_console()
    source = reddit.RedditPosts(settings.path, settings.num_rows)
    recipe = training.Recipe(
        settings.embedding_dim, settings.batch_size, settings.row_learning_rate, settings.dense_learning_rate
    )
    hashed = [training.hashed_of_equal_bytes(source, c, recipe) for c in contenders if c.name in HASHED]
    contenders = (*contenders, *hashed)
    job, outcomes = training.make_job(source, recipe), []
    for seed in settings.seeds:
        console.print(f"seed {seed}")
        with reporting.make_progress(console) as progress:
            rows = source.num_train // recipe.batch_size * recipe.batch_size
            bars = reporting.Bars(progress, [c.name for c in contenders], rows)
            outcomes += training.train(source, list(contenders), recipe, job, seed=seed, on_chunk=bars)
    console.print(reporting.make_table(outcomes, f"Reddit, {len(settings.seeds)} paired seeds, one epoch"))
    reporting.print_advice(console, outcomes)
    settings.out.mkdir(parents=True, exist_ok=True)
    reporting.save_picture(outcomes, settings.out / "reddit_quality.png")
    for outcome in outcomes:
        outcome.losses = outcome.losses[-1:]  # keeps the file small; the picture has the curves
    seconds = time.perf_counter() - start
    record = reporting.save_json(
        settings.out / "reddit_quality.json", settings, outcomes, seconds=seconds,
        data={"train": source.num_train, "test": source.num_test, "tables": source.tables},
    )  # fmt: skip
    console.print(f"{seconds:.0f} s in all; reddit_quality.json and .png are in {settings.out}")
    return record


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
