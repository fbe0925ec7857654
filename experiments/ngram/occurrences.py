"""Counts how often the n-grams of a run occur, beside the rows of the pools; nothing is trained.

A run of `memory_table` reads random windows of the text. This command reads the same windows, and
counts the distinct n-grams of all orders that occur in them at least once, twice, and three times.
An n-gram is what the memory sees: none crosses the start of a file. It also says what share of the
tokens are single bytes, of pieces that are not in the vocabulary.

    python -m experiments.ngram.occurrences

Prints the counts, and writes experiments/results/ngram_occurrences.json.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

import mpembed_jax as mpembed
from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.ngram import memory_table, text, training
from mpembed_jax import nn

SPARE = 1.1  # rows of a pool that has room, as a multiple of the n-grams that qualify


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which runs are counted, and where the counts go."""

    seeds: tuple[int, ...] = setting(
        (0, 1, 2), "Seeds of the runs.", "SEED", at_least=0, at_most=2**31 - 1
    )
    out: Path = setting(Path("experiments/results"), "Folder of ngram_occurrences.json.")


def occurrences(data: text.Text, recipe: training.Recipe, seed: int) -> np.ndarray:
    """Returns how often each distinct n-gram occurs in the windows of a run (int64 [n-grams])."""
    ngrams = nn.NGramHash(data.vocabulary_size, recipe.orders, 1, None, boundary=text.BOUNDARY)
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(recipe.steps):
        words, is_ngram = ngrams.keys(training.batch_of(data.train, recipe, rng)[:, :-1])
        seen.append((words[..., 0].astype(np.uint64) << np.uint64(32) | words[..., 1])[is_ngram])
    return np.unique(np.concatenate(seen), return_counts=True)[1]


def measure(data: text.Text, recipe: training.Recipe, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Counts the n-grams of each seed, and compares their mean with the pools."""
    counts = [occurrences(data, recipe, seed) for seed in seeds]
    size = data.vocabulary_size
    fp32 = training.planned_bytes(recipe, training.CONTENDERS["FP32"], size)
    least = []
    for k in training.POOLS:
        found = [int((count >= k).sum()) for count in counts]
        contender = training.Contender(f"rows from {k} on, INT4 + 5 %", "int4", 0.05, admit_after=k)
        pool = training.planned_spec(recipe, contender, size)
        rows = mpembed.VocabularySpec(round(SPARE * float(np.mean(found))), admit_after=k)
        roomy = training.planned_spec(recipe, contender, size, rows)
        roomy_bytes = mpembed.memory.report(roomy, training.row_tx(recipe, contender)).total
        least.append(
            {
                "occurs": k,
                "ngrams": found,
                "rows": pool.num_rows,
                "roomy_rows": roomy.num_rows,
                "roomy_times_smaller": fp32 / roomy_bytes,
            }
        )
    return {
        "text": data.identity,
        "recipe": dataclasses.asdict(recipe),
        "tokens_of_run": recipe.steps * recipe.batch * recipe.length,
        "at_least": least,
        "byte_share": {
            "train": float(text.is_byte(data.train).mean()),
            "validation": float(text.is_byte(data.validation).mean()),
        },
    }


def table(result: dict[str, Any]) -> str:
    """Returns the counts as a Markdown table, then the shares of bytes."""
    lines = ["| occur at least | n-grams, by seed | rows of pool | roomy pool | times smaller |"]
    lines.append("|---" * 5 + "|")
    for row in result["at_least"]:
        lines.append(
            f"| {row['occurs']} | {', '.join(f'{n:,}' for n in row['ngrams'])} "
            f"| {row['rows']:,} | {row['roomy_rows']:,} "
            f"| {row['roomy_times_smaller']:.1f}x |"
        )
    shares = ", ".join(f"{share:.1%} of {name}" for name, share in result["byte_share"].items())
    return "\n".join([*lines, "", f"tokens that are bytes: {shares}"])


def check(settings: Settings) -> None:
    """Refuses an unwritable folder.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out, is_file=False)


def run(settings: Settings) -> None:
    """Counts, prints and writes."""
    read = memory_table.Settings()
    with running.working("reading the text"):
        data = text.read(text.standard_library(), read.vocabulary, read.tokens)
    with running.working("counting n-grams"):
        result = measure(data, training.Recipe(), settings.seeds)
    written = {"environment": provenance.environment(), **result}
    provenance.write(settings.out / "ngram_occurrences.json", written)
    print(table(result))


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
