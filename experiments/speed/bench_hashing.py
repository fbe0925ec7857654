"""How many raw ids per second does a core hash to what `prefetch` and `read` take?

`spec.raw_ids` of one column: integers of 64 bits, and strings of 12 bytes in each container that it
takes; also integers in a jitted function. Each case hashes the same ids in every round, and the
cases alternate. Rates are per second of a core's time (process time), so that other programs on the
machine do not count. Targets: 20 M integers and 5 M strings. From the repository root:

    python -m experiments.speed.bench_hashing
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mpembed_jax as mpembed
from experiments import command_line, provenance
from experiments.command_line import setting

TARGETS = {"integers": 20e6, "strings": 5e6}  # ids per second and core
SPEC = mpembed.EmbeddingSpec(
    mpembed.TableSpec("id"), 8, vocabulary=mpembed.VocabularySpec(num_rows=1000)
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    ids: int = setting(1_000_000, "Ids in a column.", "IDS", at_least=1000, at_most=100_000_000)
    rounds: int = setting(15, "Turns of each case.", "ROUNDS", at_least=3, at_most=10_000)
    out: Path = setting(Path("experiments/results/bench_hashing.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses an unwritable file, and columns that do not fit the memory.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out)
    # Integers, and 12 characters as bytes, as UTF-32, as objects and in Arrow; then the results.
    command_line.check_memory("--ids", settings.ids, 250 * settings.ids, "the columns")


def columns(settings: Settings) -> dict[str, Any]:
    """Returns {case: column}; a case begins with its kind of ids."""
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2**63), 2**63 - 1, settings.ids)
    texts = np.array([f"{word:012x}" for word in rng.integers(0, 2**48, settings.ids)])
    found: dict[str, Any] = {
        "integers, int64": integers,
        "integers, int32": integers.astype(np.int32),
        "strings, NumPy bytes": texts.astype("S12"),
        "strings, NumPy text": texts,
        "strings, objects": texts.astype(object),
    }
    try:
        import pyarrow
    except ImportError:
        print("pyarrow is not installed: its column is left out")
        return found
    return found | {"strings, Arrow": pyarrow.array(texts.tolist())}


def calls(settings: Settings) -> dict[str, Callable[[], Any]]:
    """Returns {case: a function that hashes its column}."""

    def on_host(column: Any) -> Callable[[], Any]:
        return lambda: SPEC.raw_ids({"id": column})

    found = columns(settings)
    made = {case: on_host(column) for case, column in found.items()}
    device = jax.device_put(found["integers, int32"])
    hash_ = jax.jit(lambda ids: SPEC.raw_ids({"id": ids}))
    made["integers, int32, jitted"] = lambda: jax.block_until_ready(hash_(device))
    return made


def run(settings: Settings) -> int:
    """Measures, prints and writes; returns the exit status."""
    made = calls(settings)
    rates: dict[str, list[float]] = {case: [] for case in made}
    for call in made.values():
        call()
    for _ in range(settings.rounds):
        for case, call in made.items():
            begin = time.process_time()
            call()
            rates[case].append(settings.ids / (time.process_time() - begin))
    results = []
    for case, own in rates.items():
        target = TARGETS[case.split(",")[0]]
        middle = statistics.median(own)
        ends = [float(end) for end in np.percentile(own, (10, 90))]
        results.append({"case": case, "ids_per_second": middle, "10_90": ends, "target": target})
        print(
            f"{case:<26}{middle / 1e6:7.1f} M/s [{ends[0] / 1e6:.1f}, {ends[1] / 1e6:.1f}], "
            f"target {target / 1e6:.0f}"
        )
    versions = provenance.versions((*provenance.PACKAGES, "pyarrow"))
    provenance.write_results(settings, results, versions=versions)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
