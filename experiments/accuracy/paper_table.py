"""The paper's experiment as one grid: what a row costs in bytes, and what that costs in AUC.

Storages x caches x policies x roundings x ways, and baselines of equal bytes (FP32 hashed, of a
smaller dim, pruned by frequency; INT8 / INT4 / INT2 after training; INT4 quantization-aware
training), with paired seeds: every case of a seed sees the same batches in the same order and
starts from the same values (a smaller dim excepted, whose layers have other shapes). A finished run
is one line of the results file with its settings, commit and environment; what is there already is
not run again, so a killed grid continues. Tables and pictures are made from all lines of the file.

    # The synthetic twin of Criteo, without a file or a network:
    python -m experiments.accuracy.paper_table
    # Reddit posts:
    python -m experiments.accuracy.paper_table --data reddit --dims 16 64
    python -m experiments.accuracy.paper_table --data criteo --path ~/criteo --grid targets
    python -m experiments.accuracy.paper_table --data reddit --grid full --storage int4 \
        --cache 0.01 0.05 --ways 1 32
    # Only tables and pictures:
    python -m experiments.accuracy.paper_table --report
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # so that `python PATH/paper_table.py` works too

from experiments import provenance, train_dlrm
from experiments.accuracy import grid, paper_report, paper_runs, records
from experiments.accuracy.grid import Case, Method
from experiments.dlrm import reporting, training


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the grid depends on."""

    data: Literal["synthetic", "reddit", "criteo"] = "synthetic"
    path: Path | None = None
    """Folder (or file) of the data, for criteo and reddit."""
    dims: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    grid: Literal["headline", "targets", "full"] = "headline"
    """headline: some forty cases; targets: a dozen for the paper's claim; full: all, some 300."""
    storage: tuple[training.Storage, ...] | None = None
    """Only these storages, and FP32 for the differences; likewise the five below. None: all."""
    cache: tuple[float, ...] | None = None
    policy: tuple[Literal["lfu", "lru"], ...] | None = None
    rounding: tuple[Literal["stochastic", "nearest"], ...] | None = None
    ways: tuple[int, ...] | None = None
    method: tuple[Method, ...] | None = None
    num_rows: int | None = None
    """Rows in all. None: 2,100,000 synthetic ones; all rows of a file. Reddit: per split."""
    in_time_order: bool = False
    """Reddit: train on the posts in time order (ids drift); seeds change initial values only."""
    scale: float = 0.03
    """Synthetic: vocabulary sizes as a share of Criteo-Kaggle's; 0.03 is a million ids."""
    data_seed: int = 0
    """Synthetic: which data."""
    min_count: int = 10
    """Criteo: values seen fewer times in training share one id."""
    cache_dir: Path | None = None
    """Criteo: where the text is kept in binary form; None: mpembed_cache beside it."""
    batch_size: int | None = None
    """None: 2,048, or 1,024 for reddit. The learning rates are those of train_dlrm."""
    hidden: tuple[int, int] = (512, 256)
    """Hidden widths of DLRM's two MLPs; the bottom one adds a layer of 64."""
    report: bool = False
    """Run nothing; make tables and pictures of what is there."""
    out: Path = Path("experiments/results")
    """Folder of paper_table.jsonl, .md and the pictures."""


def task_of(settings: Settings, embedding_dim: int) -> train_dlrm.Settings:
    """Returns the settings of the main job with the same data and model."""
    rows = (
        2_100_000
        if settings.num_rows is None and settings.data == "synthetic"
        else settings.num_rows
    )
    return train_dlrm.Settings(
        data=settings.data, path=settings.path, embedding_dim=embedding_dim,
        batch_size=settings.batch_size,
        hidden=settings.hidden, scale=settings.scale, num_rows=rows, data_seed=settings.data_seed,
        min_count=settings.min_count, cache_dir=settings.cache_dir,
        in_time_order=settings.in_time_order,
    )  # fmt: skip


def data_of(task: train_dlrm.Settings, source: Any) -> dict[str, Any]:
    """Returns what identifies the data: its sizes, and the settings that change them."""
    sizes = {"train": source.num_train, "test": source.num_test, "ids": sum(source.tables.values())}
    match task.data:
        case "synthetic":
            return {"name": task.data, **sizes, "seed": task.data_seed}
        case "criteo":
            return {
                "name": task.data,
                **sizes,
                "min_count": task.min_count,
                "holdout": task.holdout,
            }
    return {"name": task.data, **sizes} | ({"order": "time"} if task.in_time_order else {})


def cases_of(settings: Settings, embedding_dim: int) -> tuple[Case, ...]:
    """Returns the cases that the settings ask for, FP32 first."""
    cases = {"headline": grid.headline, "targets": grid.targets, "full": grid.full}[settings.grid](
        embedding_dim
    )
    return grid.choose(
        cases, storage=settings.storage, cache=settings.cache, policy=settings.policy,
        rounding=settings.rounding,
        ways=settings.ways, method=settings.method,
    )  # fmt: skip


def thinned(losses: list[tuple[int, float]], most: int = 40) -> list[tuple[int, float]]:
    """Averages a loss curve over stretches, so that at most `most` points are kept."""
    width = -(-len(losses) // most)
    parts = [losses[at : at + width] for at in range(0, len(losses), width)]
    return [(part[-1][0], round(sum(loss for _, loss in part) / len(part), 5)) for part in parts]


def record_of(
    depends: dict[str, Any], result: paper_runs.Result, environment: dict[str, Any]
) -> dict[str, Any]:
    """Returns the line of a finished run."""
    outcome = dataclasses.asdict(result.outcome)
    outcome["losses"] = thinned(outcome["losses"])
    del outcome["contender"], outcome["seed"], outcome["advice"]
    return {
        "key": records.key_of(depends), "name": result.case.name, **depends, "outcome": outcome,
        "training_bytes_per_row": result.training_bytes_per_row, "environment": environment,
    }  # fmt: skip


def run(
    settings: Settings,
    console: Any,
    cases_at: Callable[[Settings, int], Sequence[Case]] = cases_of,
) -> None:
    """Runs what is missing, seed by seed, so that an unfinished grid has few seeds of all cases."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path, environment = settings.out / "paper_table.jsonl", provenance.environment()
    done, source = records.load(path), None
    for dim in settings.dims:
        task = task_of(settings, dim)
        source = source or train_dlrm.make_source(task, console.print)
        data, recipe = data_of(task, source), train_dlrm.make_recipe(task)
        bench, cases = paper_runs.Workbench(source, recipe), cases_at(settings, dim)
        keys = {
            (case, seed): records.key_of(paper_runs.depends_on(data, recipe, case, seed))
            for case in cases
            for seed in settings.seeds
        }
        missing = sum(key not in done for key in keys.values())
        console.print(
            f"{source.name}, D = {dim}: {len(cases)} cases x {len(settings.seeds)} seeds, "
            f"{missing} of {len(keys)} to run; "
            f"{source.num_train:,} training and {source.num_test:,} test rows, {data['ids']:,} ids"
        )
        for seed in settings.seeds:
            for group in paper_runs.groups([c for c in cases if keys[c, seed] not in done]):
                start = time.perf_counter()
                rows = source.num_train // recipe.batch_size * recipe.batch_size
                with reporting.make_progress(console) as progress:
                    bars = reporting.Bars(progress, [group[0].contender().name], rows)
                    for result in bench.run(group, seed, bars):
                        depends = paper_runs.depends_on(data, recipe, result.case, seed)
                        records.append(path, record_of(depends, result, environment))
                        missing -= 1
                        console.print(
                            f"seed {seed}  {result.case.name:<28} AUC {result.outcome.auc:.4f}  "
                            "log loss "
                            f"{result.outcome.log_loss:.4f}  {result.outcome.bytes_per_row:6.1f} "
                            "B/row  "
                            f"{time.perf_counter() - start:5.1f} s, {missing} left"
                        )


def main(
    settings: Settings, cases_at: Callable[[Settings, int], Sequence[Case]] = cases_of
) -> None:
    """Runs what is missing and reports on everything in the results file.

    Args:
      settings: of the command line.
      cases_at: gives the cases for an embedding dim, FP32 first.
    """
    console = reporting.make_console()
    if not settings.report:
        run(settings, console, cases_at)
    found = list(records.load(settings.out / "paper_table.jsonl").values())
    if not found:
        raise SystemExit(
            f"no results in {settings.out / 'paper_table.jsonl'}; run without --report first"
        )
    paper_report.write(found, settings.out)
    console.print((settings.out / "paper_table.md").read_text(), soft_wrap=True, highlight=False)
    console.print(f"paper_table.jsonl, .md and pictures are in {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
