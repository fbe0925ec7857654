"""The paper's experiment as one grid: what a row costs in bytes, and what that costs in AUC.

Storages x caches x policies x roundings x ways, and baselines of equal bytes (FP32 hashed, of a
smaller dim, pruned by frequency; INT8 / INT4 / INT2 after training; INT4 quantization-aware
training), with paired seeds: every case of a seed sees the same batches in the same order and
starts from the same values (a smaller dim excepted, whose layers have other shapes). A finished run
is one line of the results file with its settings, commit and environment; what is there already is
not run again. A case that was interrupted is saved, and the same command goes on inside it. Tables
and pictures are made from all lines of the file.

    # The synthetic twin of Criteo, without a file or a network:
    python -m experiments.accuracy.paper_table
    # Reddit posts:
    python -m experiments.accuracy.paper_table --data reddit --dims 16 64
    # Raw ids, which have a row from their k-th occurrence on:
    python -m experiments.accuracy.paper_table --data reddit --dims 16 64 --grid raw --seeds 0 1 2
    python -m experiments.accuracy.paper_table --data criteo --path ~/criteo --grid targets
    python -m experiments.accuracy.paper_table --data reddit --grid full --storage int4 \
        --cache 0.01 0.05 --ways 1 32
    # Only tables and pictures:
    python -m experiments.accuracy.paper_table --report
"""

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # so that `python PATH/paper_table.py` works too

from experiments import command_line, provenance, running, train_dlrm
from experiments.accuracy import grid, paper_report, paper_runs, records
from experiments.accuracy.grid import FP32, Case, Method
from experiments.command_line import setting
from experiments.dlrm import reporting, training, unfinished

UNFINISHED = "paper_table_unfinished"  # folder in --out


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the grid depends on."""

    data: Literal["synthetic", "reddit", "criteo"] = setting("synthetic", "What to train on.")
    path: Path | None = setting(
        None,
        "Folder or file of the data.",
        shown="none; for reddit the folder that MPEMBED_DATA names",
        only={"data": ("criteo", "reddit")},
    )
    dims: tuple[int, ...] = setting(
        (16,), "Numbers in a row of an embedding table.", "NUMBERS", at_least=1, at_most=4096
    )
    seeds: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4), "Seeds of every case.", "SEED", at_least=0, at_most=train_dlrm.MAX_SEED
    )
    grid: Literal["headline", "targets", "raw", "full"] = setting(
        "headline",
        "Cases: some forty; a dozen for the paper's claim (targets); raw ids that earn rows (raw); "
        "all, some 300 (full).",
    )
    storage: tuple[training.Storage, ...] | None = setting(
        None, "Only cases of these formats, and FP32.", shown="all"
    )
    cache: tuple[float, ...] | None = setting(
        None,
        "Only cases of these caches, as a share of all rows, and FP32.",
        "SHARE",
        at_least=0,
        at_most=1,
        shown="all",
    )
    policy: tuple[Literal["lfu", "lru"], ...] | None = setting(
        None, "Only cases of these policies, and FP32.", shown="all"
    )
    rounding: tuple[Literal["stochastic", "nearest"], ...] | None = setting(
        None, "Only cases of these roundings, and FP32.", shown="all"
    )
    ways: tuple[int, ...] | None = setting(
        None,
        "Only cases with so many rows in a cache set, and FP32.",
        "ROWS",
        at_least=1,
        at_most=64,
        shown="all",
    )
    method: tuple[Method, ...] | None = setting(
        None, "Only cases of these methods, and FP32.", shown="all"
    )
    admit_after: tuple[int, ...] | None = setting(
        None,
        "Only cases in which raw ids have rows from so many occurrences on (0: numbered ids), and "
        "FP32.",
        "TIMES",
        at_least=0,
        at_most=100,
        shown="all",
    )
    num_rows: int | None = setting(
        None,
        "Rows of data to use. Criteo: lines of the file. Reddit: per split.",
        "ROWS",
        at_least=1,
        at_most=10**12,
        shown="2100000 synthetic ones, or all rows of a file",
    )
    in_time_order: bool = setting(
        False,
        "Train on the posts as they came, so that ids drift; seeds then differ in initial values.",
        only={"data": ("reddit",)},
    )
    scale: float = setting(
        0.03,
        "Vocabulary sizes as a share of Criteo-Kaggle's; 0.03 is a million ids.",
        "SHARE",
        above=0,
        at_most=1,
        only={"data": ("synthetic",)},
    )
    data_seed: int = setting(
        0,
        "Which data.",
        "SEED",
        at_least=0,
        at_most=train_dlrm.MAX_SEED,
        only={"data": ("synthetic",)},
    )
    min_count: int = setting(
        10,
        "Values seen fewer times in training share one id.",
        "TIMES",
        at_least=1,
        at_most=2**31 - 1,
        only={"data": ("criteo",)},
    )
    cache_dir: Path | None = setting(
        None,
        "Folder in which the text is kept in binary form.",
        shown="mpembed_cache beside the text",
        only={"data": ("criteo",)},
    )
    batch_size: int | None = setting(
        None,
        "Rows of data in a step.",
        "ROWS",
        at_least=1,
        at_most=2**31 - 1,
        shown="2048, or 1024 for reddit",
    )
    hidden: tuple[int, int] = setting(
        (512, 256),
        "Hidden widths of DLRM's two MLPs; the bottom one adds a layer of 64.",
        "UNITS",
        at_least=1,
        at_most=65_536,
        only={"data": train_dlrm.WITH_DENSE},
    )
    save_every: float = setting(
        10,
        "Time between two saves of the case that trains; 0: only when told to stop.",
        "MINUTES",
        at_least=0,
        at_most=10_000,
    )
    report: bool = setting(False, "Run nothing; make tables and pictures of what is there.")
    out: Path = setting(
        Path("experiments/results"), "Folder of paper_table.jsonl, .md and the pictures."
    )


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
    grids = {
        "headline": grid.headline, "targets": grid.targets, "raw": grid.raw, "full": grid.full,
    }  # fmt: skip
    cases = grids[settings.grid](embedding_dim)
    return grid.choose(
        cases, storage=settings.storage, cache=settings.cache, policy=settings.policy,
        rounding=settings.rounding,
        ways=settings.ways, method=settings.method, admit_after=settings.admit_after,
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
    outcome = reporting.without_curve(result.outcome)
    outcome["losses"] = thinned(outcome["losses"])
    del outcome["contender"], outcome["seed"], outcome["advice"]
    return {
        "key": records.key_of(depends), "name": result.case.name, **depends, "outcome": outcome,
        "training_bytes_per_row": result.training_bytes_per_row, "environment": environment,
    }  # fmt: skip


def train(
    settings: Settings,
    source: Any,
    console: Any,
    stop: running.Stop,
    cases_at: Callable[[Settings, int], Sequence[Case]] = cases_of,
) -> None:
    """Runs what is missing, seed by seed, so that an unfinished grid has few seeds of all cases.

    Raises:
      Stopped: if the process was told to stop; the case that trained is saved.
    """
    command = command_line.command_of(command_line.name_of(train), command_line.words_of(settings))
    settings.out.mkdir(parents=True, exist_ok=True)
    path, environment = settings.out / "paper_table.jsonl", provenance.environment()
    done = records.load(path)
    for dim in settings.dims:
        task = task_of(settings, dim)
        data, recipe = data_of(task, source), train_dlrm.make_recipe(task)
        train_dlrm.check_rows(source, recipe)
        train_dlrm.check_memory(source, [FP32.contender()], recipe)
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
                start, what = time.perf_counter(), bench.training_of(group, data, seed)
                folder = settings.out / UNFINISHED / records.key_of(what)
                rows = source.num_train // recipe.batch_size * recipe.batch_size
                keeper = unfinished.Keeper(
                    folder,
                    60 * settings.save_every,
                    stop,
                    {"training": what},
                    command,
                )
                with reporting.bars(console, [group[0].contender().name], rows) as bars:
                    for result in bench.run(group, seed, bars, keeper):
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
                keeper.finish()
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: other cases are unfinished
                    folder.parent.rmdir()


def check(settings: Settings) -> None:
    """Refuses a choice that leaves no case, wrong files, and an unwritable folder.

    Raises:
      Refused: in one sentence.
    """
    path = settings.out / "paper_table.jsonl"
    with command_line.reading("--out", settings.out, ValueError):
        found = records.load(path)
    if settings.report:
        if not found:
            raise command_line.Refused(f"no results in {path}; run without --report first")
    else:
        for dim in settings.dims:
            try:
                cases_of(settings, dim)
            except ValueError as error:
                raise command_line.Refused(f"--grid is {settings.grid}, but {error}") from error
        train_dlrm.check_data(settings)
    command_line.check_out(settings.out, is_file=False)


def run(settings: Settings, cases_at: Callable[[Settings, int], Sequence[Case]] = cases_of) -> None:
    """Runs what is missing and reports on everything in the results file.

    Args:
      settings: of the command line.
      cases_at: gives the cases for an embedding dim, FP32 first.
    """
    console = reporting.make_console()
    if not settings.report:
        with running.preparing(), running.working(f"opening the data {settings.data}"):
            source = train_dlrm.make_source(task_of(settings, settings.dims[0]), console.print)
        with running.stoppable() as stop:
            train(settings, source, console, stop, cases_at)
    found = list(records.load(settings.out / "paper_table.jsonl").values())
    paper_report.write(found, settings.out)
    console.print((settings.out / "paper_table.md").read_text(), soft_wrap=True, highlight=False)
    console.print(f"paper_table.jsonl, .md and pictures are in {settings.out}")


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
