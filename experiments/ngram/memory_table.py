"""A small language model with an n-gram memory: what its rows cost in bytes, and in loss.

Contenders: no memory; FP32; INT8, INT4 and INT2 with a small FP32 cache; FP32 in as few bytes as
INT4 + 5 %; FP32 with Adam; and memories whose n-grams are raw ids, which get a row of their own
once they were seen often enough ("rows from 2 on"). Every contender of a seed has the same weights
beside its memory and sees the same batches. The text is the standard library of the running Python,
or a folder of Python files. A finished run is one line of the results file with its settings,
commit and environment; what is there already is not run again. A run is saved every ten minutes and
when the process is told to stop; the same command goes on with it. Table and picture are made from
all lines of the file.

    python -m experiments.ngram.memory_table
    python -m experiments.ngram.memory_table --features 128 --rows 100000
    python -m experiments.ngram.memory_table --text ~/projects --seeds 0
    # Only table and picture:
    python -m experiments.ngram.memory_table --report
"""

import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from experiments import command_line, provenance, running
from experiments.accuracy import records
from experiments.command_line import setting
from experiments.ngram import report, text, training

UNFINISHED = "ngram_memory_unfinished"  # folder in --out


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the runs depend on."""

    text: Path | None = setting(
        None, "Folder with Python files.", shown="the standard library of this Python"
    )
    tokens: int = setting(
        10_000_000, "Pieces of text to read.", "PIECES", at_least=1_000, at_most=1_000_000_000
    )
    vocabulary: int = setting(
        8192, "Tokens: 256 bytes, and pieces.", "TOKENS", at_least=300, at_most=1_000_000
    )
    features: tuple[int, ...] = setting(
        (32,), "Numbers in a row of a table.", "NUMBERS", at_least=1, at_most=4096
    )
    rows: int = setting(
        500_000,
        "Rows of each of four tables; the next primes.",
        "ROWS",
        at_least=1_000,
        at_most=100_000_000,
    )
    seeds: tuple[int, ...] = setting(
        (0, 1, 2), "Seeds of every contender.", "SEED", at_least=0, at_most=2**31 - 1
    )
    contenders: tuple[training.Name, ...] = setting(
        tuple(training.CONTENDERS), "Which memories, in this order."
    )
    steps: int = setting(800, "Training steps.", "STEPS", at_least=1, at_most=10_000_000)
    batch: int = setting(16, "Sequences in a step.", "SEQUENCES", at_least=1, at_most=65_536)
    length: int = setting(128, "Tokens in a sequence.", "TOKENS", at_least=2, at_most=65_536)
    width: int = setting(
        96, "Width of the transformer; 4 heads divide it.", "UNITS", at_least=8, at_most=65_536
    )
    report: bool = setting(False, "Run nothing; make table and picture of what is there.")
    out: Path = setting(
        Path("experiments/results"), "Folder of ngram_memory.jsonl, .md and the picture."
    )


def recipe_of(settings: Settings, features: int) -> training.Recipe:
    """Returns what all contenders of a width of rows share."""
    return training.Recipe(
        steps=settings.steps,
        batch=settings.batch,
        length=settings.length,
        width=settings.width,
        rows=settings.rows,
        features=features,
    )


def depends_on(
    data: text.Text, recipe: training.Recipe, contender: training.Contender, seed: int
) -> dict[str, Any]:
    """Returns everything a run depends on except the code, ready for JSON."""
    return {
        "text": data.identity,
        "recipe": {**dataclasses.asdict(recipe), "orders": list(recipe.orders)},
        "contender": contender.settings,
        "seed": seed,
    }


def train(settings: Settings) -> None:
    """Runs what is missing, seed by seed, so that an unfinished table has few seeds of all.

    Raises:
      Stopped: if the process was told to stop; the run at that time is saved.
    """
    command = command_line.command_of(command_line.name_of(train), command_line.words_of(settings))
    path, environment = settings.out / report.RECORDS, provenance.environment()
    done = records.load(path)
    texts = settings.text or text.standard_library()
    try:
        with running.working("reading the text"), command_line.reading("--text", texts):
            data = text.read(texts, settings.vocabulary, settings.tokens)
    except text.TooShortError as error:
        given = f"--tokens is {settings.tokens:,} and --text is {texts}"
        raise command_line.Refused(f"{given}, but {error}") from None
    if min(len(data.train), len(data.validation)) <= settings.length:
        raise command_line.Refused(
            f"--length is {settings.length:,}, but must be less than the {len(data.train):,} tokens"
            f" to train and the {len(data.validation):,} to validate, of --text {texts}"
        )
    print(
        f"{len(data.train):,} tokens to train, {len(data.validation):,} to validate, of "
        f"{data.vocabulary_size:,}",
        flush=True,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = [
        (recipe_of(settings, features), training.CONTENDERS[name], seed)
        for features in settings.features
        for seed in settings.seeds
        for name in settings.contenders
    ]
    keys = [records.key_of(depends_on(data, *run)) for run in runs]
    missing = [(run, key) for run, key in zip(runs, keys, strict=True) if key not in done]
    print(f"{len(missing)} of {len(runs)} runs to do", flush=True)
    with running.stoppable() as stop:
        for number, ((recipe, contender, seed), key) in enumerate(missing, 1):
            folder = settings.out / UNFINISHED / key
            saves = training.Saves(folder, stop, command)
            outcome = run_one(data, recipe, contender, seed, saves)
            record = {
                "key": key,
                **depends_on(data, recipe, contender, seed),
                "outcome": outcome._asdict(),
                "environment": environment,
            }
            records.append(path, record)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not there, or others are unfinished
                folder.parent.rmdir()
            print(
                f"D = {recipe.features}, seed {seed}  {contender.name:<28} loss "
                f"{outcome.loss:.4f}  {outcome.state_bytes / 1e6:6.1f} MB  "
                f"{outcome.seconds:.0f} s, {len(missing) - number} left",
                flush=True,
            )


def run_one(
    data: text.Text,
    recipe: training.Recipe,
    contender: training.Contender,
    seed: int,
    saves: training.Saves,
) -> training.Outcome:
    """Trains one contender and says every ten seconds where it is.

    Raises:
      Stopped: after a step, if the process was told to stop; the run is saved.
    """
    place = {"step": 0, "loss": float("nan")}

    def on_step(step: int, loss: float) -> None:
        place.update(step=step + 1, loss=loss)

    def say() -> str:
        return f".. {contender.name}: step {place['step']} of {recipe.steps}, {place['loss']:.3f}"

    with running.progress(say):
        return training.train(data, recipe, contender, seed, on_step, saves).outcome


def check_memory(settings: Settings) -> None:
    """Refuses tables and batches that do not fit the memory of this machine.

    Raises:
      Refused: in one sentence.
    """
    recipe = recipe_of(settings, max(settings.features))
    needed = training.step_bytes(recipe, settings.vocabulary)
    what = f"a step with sequences of {settings.length:,} tokens"
    command_line.check_memory("--batch", settings.batch, needed, what)
    chosen = [training.CONTENDERS[name] for name in settings.contenders if name != "none"]
    sizes = [training.planned_bytes(recipe, each, settings.vocabulary) for each in chosen]
    needed += max(sizes, default=0)
    what = f"tables of {recipe.features} numbers a row and a step"
    command_line.check_memory("--rows", settings.rows, needed, what)


def check(settings: Settings) -> None:
    """Refuses a width without whole heads, too much memory, wrong folders.

    Raises:
      Refused: in one sentence.
    """
    with command_line.reading("--out", settings.out, ValueError):
        found = records.load(settings.out / report.RECORDS)
    if settings.report:
        if not found:
            path = settings.out / report.RECORDS
            raise command_line.Refused(f"no results in {path}; run without --report first")
    else:
        if settings.width % 8:
            command_line.refuse("--width", settings.width, "a multiple of 8")
        with command_line.reading("--text", settings.text):
            if settings.text is not None and not text.files_of(settings.text):
                command_line.refuse("--text", settings.text, "a folder with Python files")
        check_memory(settings)
    command_line.check_out(settings.out, is_file=False)


def run(settings: Settings) -> None:
    """Runs what is missing and reports on everything in the results file."""
    if not settings.report:
        train(settings)
    found = list(records.load(settings.out / report.RECORDS).values())
    print(report.write(found, settings.out))
    print(f"{report.RECORDS}, .md and the picture are in {settings.out}")


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
