"""Trains a recommender with cached low-precision embeddings, and the same one in FP32 beside it.

The data are a synthetic twin of Criteo-Kaggle (the default; no file, no network), Criteo's own
train.txt from a folder, Reddit posts, or MovieLens ratings. A third run, FP32 with ids hashed into
as many bytes as ours, is the baseline that any compression has to beat. All runs see the same
batches, seeds and initial dense parameters. At the end: a table, a picture and a JSON file in the
output folder, and a projection of one full Criteo-Kaggle epoch. From the repository root:

    python -m experiments.train_dlrm
    python -m experiments.train_dlrm --storage int4 --cache-fraction 0.01 --embedding-dim 64
    python -m experiments.train_dlrm --data criteo --path ~/criteo --min-count 10
    python -m experiments.train_dlrm --data reddit --path FILE --seeds 0 1 2
    python -m experiments.train_dlrm --data movielens --seeds 0 1 2
    python -m experiments.train_dlrm --ids raw --admit-after 2 --pool-rows 200000
    python -m experiments.train_dlrm --data criteo --path ~/criteo --ids raw --pool-rows 4000000

With `--ids raw`, our run does not use the ids as row numbers: they are hashed, and earn rows of a
pool while training. They are what the data have: the words of Criteo's text, the names and integers
of posts and ratings; the twin has numbers only. FP32 has a row for every id, as before, and
therefore posts and ratings are numbered for it. The words of Criteo's text are neither counted nor
numbered: FP32 then has the rows of the same pool.
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # so that `python experiments/train_dlrm.py` works too

from experiments import command_line, running
from experiments.command_line import setting
from experiments.data import reddit, synthetic
from experiments.dlrm import curves, reporting, training, unfinished

MAX_SEED = 2**31 - 1
SMALL = ("reddit", "movielens")  # data of the small model
WITH_DENSE = ("synthetic", "criteo")  # data of DLRM


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run depends on."""

    data: Literal["synthetic", "criteo", "reddit", "movielens"] = setting(
        "synthetic", "What to train on."
    )
    path: Path | None = setting(
        None,
        "Folder or file of the data.",
        shown="none; for reddit the folder that MPEMBED_DATA names",
        only={"data": ("criteo", "reddit")},
    )
    storage: training.Storage = setting("int8", "Format of the rows in the table.")
    cache_fraction: float = setting(
        0.05,
        "Rows in the FP32 cache, as a share of all; 0: no cache.",
        "SHARE",
        at_least=0,
        at_most=1,
    )
    policy: Literal["lfu", "lru"] = setting("lfu", "Which row leaves a full cache set.")
    ways: int = setting(32, "Rows that one cache set holds.", "ROWS", at_least=1, at_most=64)
    rounding: Literal["stochastic", "nearest"] = setting(
        "stochastic", "How a trained row is rounded to its format."
    )
    embedding_dim: int = setting(
        16, "Numbers in a row of an embedding table.", "NUMBERS", at_least=1, at_most=4096
    )
    batch_size: int | None = setting(
        None,
        "Rows of data in a step.",
        "ROWS",
        at_least=1,
        at_most=MAX_SEED,
        shown="2048, or 1024 for reddit and movielens",
    )
    row_learning_rate: float | None = setting(
        None,
        "Learning rate of row-wise Adagrad on the embedding rows.",
        "RATE",
        above=0,
        shown="0.02, or 0.05 for reddit and movielens",
    )
    dense_learning_rate: float | None = setting(
        None,
        "Learning rate of Adam on the dense layers.",
        "RATE",
        above=0,
        shown="0.001, or 0.002 for reddit and movielens",
    )
    hidden: tuple[int, int] = setting(
        (512, 256),
        "Hidden widths of DLRM's two MLPs; the bottom one adds a layer of 64.",
        "UNITS",
        at_least=1,
        at_most=65_536,
        only={"data": WITH_DENSE},
    )
    ids: Literal["dense", "raw"] = setting(
        "dense",
        "Whether ids are row numbers, or raw: as the data have them, they earn rows of one pool "
        "while training.",
    )
    admit_after: int = setting(
        2,
        "Occurrences from which on a raw id has a row of its own.",
        "TIMES",
        at_least=1,
        at_most=255,
        only={"ids": ("raw",)},
    )
    pool_rows: int | None = setting(
        None,
        "Rows that the raw ids of all tables compete for.",
        "ROWS",
        at_least=1,
        at_most=(2**31 - 1) // 3,  # a sketch of 3 bytes for each row
        shown="a third of all ids; none for criteo, whose raw ids are not counted",
        only={"ids": ("raw",)},
    )
    max_unique_ids: int | None = setting(
        None,
        "Room for distinct ids in a batch; ids beyond it are not trained.",
        "IDS",
        at_least=1,
        at_most=MAX_SEED,
        shown="as many as a batch has ids",
    )
    row_gradients: bool = setting(
        False,
        "Train by gradients of unique rows, not of the vectors. The updates are the same; steps "
        "are slower.",
    )
    chunk: int = setting(
        training.Recipe.chunk,
        "Steps that a run takes before the next run's turn; a point of its curve.",
        "STEPS",
        at_least=1,
        at_most=MAX_SEED,
    )
    hashed_baseline: bool = setting(
        True, "Also train FP32 tables of the same bytes as ours, into which ids are hashed."
    )
    seeds: tuple[int, ...] = setting(
        (0,), "Seeds; each trains every run once.", "SEED", at_least=0, at_most=MAX_SEED
    )
    scale: float = setting(
        0.02,
        "Vocabulary sizes as a share of Criteo-Kaggle's.",
        "SHARE",
        above=0,
        at_most=1,
        only={"data": ("synthetic",)},
    )
    num_rows: int | None = setting(
        None,
        "Rows of data to use. Criteo: lines of the file. Reddit: per split.",
        "ROWS",
        at_least=1,
        at_most=10**12,
        shown="800000 synthetic ones, or all rows of a file",
    )
    in_time_order: bool = setting(
        False, "Train on the posts as they came, so that ids drift.", only={"data": ("reddit",)}
    )
    data_seed: int = setting(
        0,
        "Synthetic: which data. Movielens: which rows train and which test.",
        "SEED",
        at_least=0,
        at_most=MAX_SEED,
        only={"data": ("synthetic", "movielens")},
    )
    mapping: Literal["dictionary", "hash"] = setting(
        "dictionary",
        "How categories become ids.",
        only={"data": ("criteo",), "ids": ("dense",)},
    )
    min_count: int = setting(
        1,
        "Values seen fewer times in training share one id.",
        "TIMES",
        at_least=1,
        at_most=MAX_SEED,
        only={"data": ("criteo",), "ids": ("dense",), "mapping": ("dictionary",)},
    )
    hash_size: int = setting(
        1_000_000,
        "Ids of each of the 26 features.",
        "IDS",
        at_least=3,
        at_most=MAX_SEED // 26,
        only={"data": ("criteo",), "ids": ("dense",), "mapping": ("hash",)},
    )
    max_bad_lines: int = setting(
        100,
        "Bad lines skipped before giving up.",
        "LINES",
        at_least=0,
        at_most=MAX_SEED,
        only={"data": ("criteo",)},
    )
    holdout: Literal["test", "validation", "day"] = setting(
        "test", "Which part of the last day to evaluate on.", only={"data": ("criteo",)}
    )
    cache_dir: Path | None = setting(
        None,
        "Folder in which datasets are kept.",
        shown="mpembed_cache beside Criteo's text, ~/tensorflow_datasets for movielens",
        only={"data": ("criteo", "movielens")},
    )
    out: Path = setting(
        Path("results/train_dlrm"),
        "Folder for the table, the picture, the curves and the JSON file.",
    )
    save_every: float = setting(
        10,
        "Time between two saves of the unfinished run in --out; 0: only when told to stop.",
        "MINUTES",
        at_least=0,
        at_most=10_000,
    )
    resume: bool = setting(False, "Go on with the unfinished run of these settings in --out.")


UNCOUNTED = (
    " Raw ids of Criteo's text are not counted, so no run can have a row for each. The FP32 run "
    "has the rows of the same pool, and ratios relate to these rows."
)
NOT_OF_THE_RUN = ("out", "save_every", "resume", "cache_dir")  # may change when a run goes on


def unfinished_in(settings: Settings) -> Path:
    """Returns the folder in which a run is saved until it is finished."""
    return settings.out / f"{settings.data}_unfinished"


def is_uncounted(settings: Settings) -> bool:
    """Says whether the sizes of the tables are not known: raw words of Criteo's text."""
    return settings.data == "criteo" and settings.ids == "raw"


def make_source(settings: Settings, log: Any = print) -> Any:
    """Opens the input that the settings name; see experiments/data.

    Raises:
      Refused: if a file is missing or is not what it should be, or leaves nothing to train on.
    """
    check_data(settings)
    rows, raw = settings.num_rows, settings.ids == "raw"
    match settings.data:
        case "synthetic":
            rows = 800_000 if rows is None else rows
            if rows < synthetic.CriteoTwin.num_days:
                wanted = f"at least {synthetic.CriteoTwin.num_days}, one row per day"
                command_line.refuse("--num-rows", rows, wanted)
            return synthetic.CriteoTwin(rows, settings.scale, settings.data_seed)
        case "reddit":
            with command_line.reading("--path", settings.path, ValueError):
                return reddit.RedditPosts(
                    settings.path, rows, in_time_order=settings.in_time_order, raw=raw
                )
        case "movielens":
            # tensorflow-datasets is needed for these two only
            from experiments.data import movielens

            with command_line.reading("--data", "movielens", ValueError, RuntimeError):
                return movielens.MovielensRatings(
                    settings.cache_dir, rows, settings.data_seed, log, raw=raw
                )
        case "criteo":
            from experiments.data import criteo

            with command_line.reading("--path", settings.path, ValueError, RuntimeError):
                return criteo.CriteoLog(
                    settings.path,
                    cache_dir=settings.cache_dir,
                    mapping="raw" if raw else settings.mapping,
                    min_count=settings.min_count,
                    hash_size=settings.hash_size,
                    max_bad_lines=settings.max_bad_lines,
                    max_rows=rows,
                    holdout=settings.holdout,
                    log=log,
                )


def make_recipe(settings: Any) -> training.Recipe:
    """Returns what all contenders share, with the defaults of the data where settings say None."""
    is_small = settings.data in SMALL

    def chosen(name: str, large: Any, small: Any) -> Any:
        value = getattr(settings, name)
        return (small if is_small else large) if value is None else value

    return training.Recipe(
        embedding_dim=settings.embedding_dim,
        batch_size=chosen("batch_size", 2048, 1024),
        row_learning_rate=chosen("row_learning_rate", 0.02, 0.05),
        dense_learning_rate=chosen("dense_learning_rate", 1e-3, 2e-3),
        max_unique_ids=settings.max_unique_ids,
        hidden=settings.hidden,
        chunk=settings.chunk,
    )


def make_contenders(
    settings: Settings, source: Any, recipe: training.Recipe
) -> list[training.Contender]:
    """Returns FP32, ours, and FP32 of as many bytes.

    FP32 has a row for every id. If ids are not counted, it has the pool of ours.
    """
    cached = (
        f" + {100 * settings.cache_fraction:.3g} %" if settings.cache_fraction else ", no cache"
    )
    pool_rows = 0
    raw = ""
    if settings.ids == "raw":
        pool_rows = settings.pool_rows or -(-sum(source.tables.values()) // 3)
        raw = f", raw ids from {settings.admit_after} on"
    ours = training.Contender(
        f"{settings.storage.upper()}{cached}{raw}", settings.storage, settings.cache_fraction,
        settings.rounding,
        settings.policy, settings.ways, pool_rows=pool_rows, admit_after=settings.admit_after,
        by_table=bool(raw) and not is_uncounted(settings),
    )  # fmt: skip
    plain = training.FP32
    if is_uncounted(settings):
        plain = training.Contender(
            f"FP32{raw}", "float32", 0.0, ways=settings.ways, pool_rows=pool_rows,
            admit_after=settings.admit_after,
        )  # fmt: skip
    contenders = [plain, ours]
    if settings.hashed_baseline:
        contenders.append(training.hashed_of_equal_bytes(source, ours, recipe))
    return contenders


def check(settings: Settings) -> None:
    """Refuses what does not go together, files that are not there, and an unwritable folder.

    Raises:
      Refused: in one sentence.
    """
    for name in ("policy", "ways"):
        if not settings.cache_fraction and getattr(settings, name) != getattr(Settings(), name):
            raise command_line.Refused(
                f"{command_line.flag_of(name)} is {getattr(settings, name)}, but is used with a "
                f"cache only, and this run has --cache-fraction 0"
            )
    if settings.storage == "float32" and settings.rounding != "stochastic":
        raise command_line.Refused(
            f"--rounding is {settings.rounding}, but FP32 rows are not rounded, and this run has "
            f"--storage float32"
        )
    if is_uncounted(settings) and settings.pool_rows is None:
        raise command_line.Refused(
            "--pool-rows is missing: it has no default with --data criteo, whose raw ids are not "
            "counted"
        )
    check_data(settings)
    command_line.check_out(settings.out, is_file=False)
    check_unfinished(settings)


def check_unfinished(settings: Settings) -> None:
    """Refuses to lose an unfinished run, and to go on with another one, or with none.

    Raises:
      Refused: naming the folder, and the settings that differ.
    """
    folder = unfinished_in(settings)
    about = unfinished.read(folder) if folder.is_dir() else None
    if about is None:
        if settings.resume:
            raise command_line.Refused(
                f"--resume: no unfinished run of --data {settings.data} is saved in {settings.out}"
            )
        return
    if not settings.resume:
        raise command_line.Refused(
            f"{folder} holds an unfinished run: go on with --resume, delete the folder, or name "
            f"another --out"
        )
    wanted = unfinished.record(settings, without=NOT_OF_THE_RUN)
    if found := unfinished.differences(about["settings"], wanted):
        flags = (text.split(" ", 1) for text in found)
        listed = "; ".join(f"{command_line.flag_of(name)} {rest}" for name, rest in flags)
        raise command_line.Refused(f"--resume: the run in {folder} has other settings: {listed}")


def check_data(settings: Any) -> None:
    """Looks at the file that the settings name, as far as that takes no time.

    Raises:
      Refused: naming what is wrong with it.
    """
    if settings.cache_dir is not None:
        with command_line.reading("--cache-dir", settings.cache_dir):
            if not settings.cache_dir.is_dir():  # one that is there may be for reading only
                command_line.check_out(settings.cache_dir, is_file=False, flag="--cache-dir")
    if settings.data == "reddit":
        with command_line.reading("--path", settings.path, ValueError):
            reddit.check(settings.path)
    if settings.data == "criteo":
        if settings.path is None:
            raise command_line.Refused(
                "--path is missing: --data criteo needs the folder that holds train.txt or "
                "train.txt.gz"
            )
        from experiments.data import criteo_kaggle

        with command_line.reading("--path", settings.path, ValueError, EOFError):
            criteo_kaggle.check(settings.path)


def check_rows(source: Any, recipe: training.Recipe) -> None:
    """Refuses rows that make no batch, or of whose labels no AUC can be told.

    Raises:
      Refused: naming the setting to change.
    """
    if source.num_train < recipe.batch_size:
        command_line.refuse(
            "--batch-size",
            f"{recipe.batch_size:,}",
            f"at most the number of training rows, {source.num_train:,}",
        )
    seen: set[float] = set()
    for batch in source.test(recipe.batch_size):
        seen |= set(batch["label"].tolist())
        if len(seen) > 1:
            return
    raise command_line.Refused(
        f"--num-rows leaves {source.num_test:,} test rows whose labels are all the same, and "
        f"their AUC is not defined: use more rows"
    )


def check_memory(
    source: Any,
    contenders: list[training.Contender],
    recipe: training.Recipe,
    others: str = "--scale, --hidden, --num-rows or --batch-size",
) -> None:
    """Refuses tables and layers that do not fit the memory of this machine.

    `others` are the flags that also change the memory.

    Raises:
      Refused: with the gigabytes that are needed and there.
    """
    needed = training.state_bytes(source, contenders, recipe)
    # A step's rows, vectors and their gradients.
    needed += 8 * 4 * recipe.batch_size * len(source.tables) * recipe.embedding_dim
    there = running.free_memory()
    if needed > there:
        raise command_line.Refused(
            f"--embedding-dim is {recipe.embedding_dim}, and tables, layers and a batch then take "
            f"{needed / 1e9:,.1f} GB, but {there / 1e9:,.1f} GB are free: lower it, or "
            f"{others}"
        )


def run(settings: Settings) -> dict[str, Any]:
    """Trains, evaluates, prints and saves; returns what the JSON file holds.

    Raises:
      Refused: before training, if the settings do not fit the data.
    """
    start = time.perf_counter()
    console = reporting.make_console()
    with running.preparing():
        with running.working(f"opening the data {settings.data}"):
            source = make_source(settings, console.print)
        recipe = make_recipe(settings)
        check_rows(source, recipe)
        contenders = make_contenders(settings, source, recipe)
        others = "--pool-rows, " if settings.ids == "raw" else ""
        others += "--scale, --hidden, --num-rows or --batch-size"
        check_memory(source, contenders, recipe, others)
    ids = f"with {sum(source.tables.values()):,} ids"
    ids = "of raw ids" if is_uncounted(settings) else ids
    console.print(
        f"{source.name}: {source.num_train:,} training and {source.num_test:,} test rows, "
        f"{len(source.tables)} tables {ids}, "
        f"D = {recipe.embedding_dim}, batches of {recipe.batch_size:,}"
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    # Also while the results are written: a signal that comes too late for training ends nothing.
    with running.stoppable() as stop:
        outcomes = train(settings, source, contenders, recipe, console, stop)
        return report(settings, source, contenders, recipe, console, outcomes, start)


def report(
    settings: Settings,
    source: Any,
    contenders: list[training.Contender],
    recipe: training.Recipe,
    console: Console,
    outcomes: list[training.Outcome],
    start: float,
) -> dict[str, Any]:
    """Prints and writes the results of a run that is finished, and deletes its saves.

    Returns what the JSON file holds. `start` is when the run began, of time.perf_counter.
    """
    has_kaggle_day = (
        source.num_dense > 0
    )  # reddit and movielens: no epoch of Criteo's to project to
    table = reporting.make_table(
        outcomes,
        f"{source.name}, {len(settings.seeds)} seed(s), one pass",
        UNCOUNTED if is_uncounted(settings) else "",
    )
    console.print(table)
    reporting.print_advice(console, outcomes, Settings)
    seconds = {
        o.contender.name: reporting.projection(o, recipe.batch_size)
        for o in outcomes[-len(contenders) :]
    }
    projected = ", ".join(f"{name} {s / 60:.0f} min" for name, s in seconds.items())
    reporting.save_picture(outcomes, recipe.batch_size, settings.out / f"{source.name}.png")
    with (settings.out / f"{source.name}.txt").open("w") as file:
        Console(file=file, width=160).print(table)
    total = time.perf_counter() - start
    record = reporting.save_json(
        settings.out / f"{source.name}.json", settings, outcomes, seconds=total,
        projected_kaggle_epoch_seconds=seconds if has_kaggle_day else None,
    )  # fmt: skip
    if has_kaggle_day:
        console.print(
            f"PROJECTION, not a measurement: one pass over Criteo-Kaggle's 45.8 M rows at these "
            f"steps: {projected} (evaluation, and reading the text once, not included)"
        )
    shutil.rmtree(unfinished_in(settings), ignore_errors=True)
    console.print(
        f"{total:.0f} s in all; {source.name}.json, .txt, .png and _curve.csv are in {settings.out}"
    )
    return record


def train(
    settings: Settings,
    source: Any,
    contenders: list[training.Contender],
    recipe: training.Recipe,
    console: Console,
    stop: running.Stop,
) -> list[training.Outcome]:
    """Trains and evaluates all contenders with all seeds, from where a save left them.

    Raises:
      Stopped: if the process was told to stop; everything is saved.
      Refused: if the data are no longer those of the unfinished run.
    """
    job = training.make_job(source, recipe, row_gradients=settings.row_gradients)
    folder, name = unfinished_in(settings), source.name
    about: dict[str, Any] = {
        "settings": unfinished.record(settings, without=NOT_OF_THE_RUN),
        "data": {"train": source.num_train, "test": source.num_test, "ids": source.tables},
        "finished": [],
    }
    saved, resumed = unfinished.read(folder) if settings.resume else None, None
    if saved is not None:
        if found := unfinished.differences(saved["data"], about["data"]):
            raise command_line.Refused(f"--resume: the data have changed: {'; '.join(found)}")
        about["finished"] = saved["finished"]
        # Before anything is written: it may be refused.
        with running.preparing():
            resumed = training.begin(source, contenders, recipe, job, seed=saved["run"]["seed"])
            unfinished.restore(folder, saved, resumed, job)
    again = command_line.words_of(dataclasses.replace(settings, resume=True))
    command = command_line.command_of(command_line.name_of(run), again)
    outcomes = [training.outcome_of(values) for values in about["finished"]]
    done = {outcome.seed for outcome in outcomes}
    rows = source.num_train // recipe.batch_size * recipe.batch_size
    with curves.curves(
        settings.out / f"{name}_curve.csv", settings.out / "tensorboard" / name
    ) as written:
        keeper = unfinished.Keeper(
            folder, 60 * settings.save_every, stop, about, command,
        )  # fmt: skip
        if saved is not None:
            keeper.tell_changes(saved)
        for outcome in outcomes:
            written.add(outcome.seed, outcome.contender.name, outcome.curve)
        for seed in settings.seeds:
            if seed in done:
                continue
            console.print(f"seed {seed}")
            if resumed is not None and resumed.seed == seed:
                going, resumed = resumed, None
                console.print(f"going on at {going.place}")
            else:
                going = training.begin(source, contenders, recipe, job, seed=seed)
            before = {}
            for contender, curve, steps in zip(contenders, going.curves, going.steps, strict=True):
                written.add(seed, contender.name, curve)
                before[contender.name] = steps * recipe.batch_size
            with reporting.bars(console, list(before), rows, before) as bars:

                def on_chunk(
                    name: str,
                    num_rows: int,
                    seconds: float,
                    point: curves.Point,
                    seed: int = seed,
                    bars: reporting.Bars = bars,
                ) -> None:
                    bars(name, num_rows, seconds, point)
                    written.add(seed, name, [point])

                outcomes += training.train(
                    source, contenders, recipe, job, seed=seed, on_chunk=on_chunk,
                    on_measure=bars.measuring, run=going, keeper=keeper,
                )  # fmt: skip
            about["finished"] = [dataclasses.asdict(outcome) for outcome in outcomes]
        keeper.finish()
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
