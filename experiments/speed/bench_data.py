"""How fast do batches of Criteo-shaped data reach a device, read from array_record?

Writes the synthetic twin as a train.txt, has the builder of Criteo-Kaggle prepare it, and measures
rows per second at each station: blocks in order, shuffled numpy batches with ids by dictionary and
by hashing, batches on the device through a background thread. What preparing costs is in the file
too. The data is small enough to stay in the system's memory: a disk is not measured. Target:
300,000 rows/s on 2 cores. From the repository root:

    python -m experiments.speed.bench_data
"""

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import command_line, provenance, running
from experiments.command_line import setting
from experiments.data import batches, criteo, synthetic
from experiments.data.background import in_background
from experiments.data.hashing import fmix32
from experiments.dlrm import reporting

TARGET = 300_000  # rows/s


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    num_rows: int = setting(
        400_000,
        "Lines of the text; six sevenths of them are training rows.",
        "LINES",
        at_least=14,
        at_most=100_000_000,
    )
    scale: float = setting(
        0.02, "Vocabulary sizes as a share of Criteo-Kaggle's.", "SHARE", above=0, at_most=1
    )
    batch_sizes: tuple[int, ...] = setting(
        (2048, 65536), "Rows of data in a batch.", "ROWS", at_least=1, at_most=100_000_000
    )
    num_epochs: int = setting(4, "Epochs of one measurement.", "EPOCHS", at_least=1, at_most=10_000)
    repeats: int = setting(
        5, "Measurements, after one that opens the files.", "TIMES", at_least=1, at_most=10_000
    )
    out: Path = setting(Path("experiments/results/bench_data.json"), "File for the results.")


def check(settings: Settings) -> None:
    """Refuses batches larger than the training rows, and an unwritable file.

    Raises:
      Refused: in one sentence.
    """
    num_train = settings.num_rows - settings.num_rows // 7
    for size in settings.batch_sizes:
        if size > num_train:
            command_line.refuse(
                "--batch-sizes", size, f"at most {num_train}, the training rows of --num-rows"
            )
    command_line.check_out(settings.out)


def write_text(path: Path, settings: Settings) -> None:
    """Writes the twin's rows in the format of train.txt, an id's hash as its category."""
    twin = synthetic.CriteoTwin(settings.num_rows, settings.scale)
    salts = np.arange(1, 27, dtype=np.uint32) * np.uint32(0x9E3779B1)
    with path.open("w") as file:
        for batch in (*twin.train(1000), *twin.test(1000)):
            integers = np.rint(np.expm1(batch["dense"])).astype(np.int64).tolist()
            categories = fmix32(batch["ids"].astype(np.uint32) ^ salts).tolist()
            for label, dense, ids in zip(
                batch["label"].tolist(), integers, categories, strict=True
            ):
                cells = [str(int(label)), *map(str, dense), *(f"{value:08x}" for value in ids)]
                file.write("\t".join(cells) + "\n")


def rate(make: Callable[[], Iterable[Any]], settings: Settings) -> dict[str, float]:
    """Measures the rows/s of going through `make()`.

    Returns the median, least and most of the repeats, and the number of busy cores.
    """
    rates, cores = [], []
    for _ in range(settings.repeats + 1):
        start, busy = time.perf_counter(), time.process_time()
        num_rows = sum(len(batch["label"]) for batch in make())
        seconds = time.perf_counter() - start
        rates.append(num_rows / seconds)
        cores.append((time.process_time() - busy) / seconds)
    rates, cores = rates[1:], cores[1:]  # the first one opens the files
    middle = statistics.median(rates)
    return {
        "rows_per_second": middle,
        "least": min(rates),
        "most": max(rates),
        "cores": statistics.median(cores),
    }


def arrived(host: Iterator[batches.Arrays]) -> Iterator[Any]:
    """Yields batches that are whole on the device.

    A thread that runs ahead makes and sends them, as in training.
    """
    return map(jax.block_until_ready, in_background(map(jax.device_put, host)))


def run(settings: Settings) -> dict[str, Any]:
    """Measures, prints and saves; returns what the JSON file holds."""
    with running.working("measuring"):
        return measure(settings)


def measure(settings: Settings) -> dict[str, Any]:
    """Does what `run` says."""
    console = reporting.make_console()
    record: dict[str, Any] = {
        **provenance.environment(),
        "target_rows_per_second": TARGET,
        "rates": {},
    }
    record["versions"] |= provenance.versions(("tensorflow-datasets", "array-record"))
    record["settings"] = provenance.settings_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "train.txt"
        write_text(text, settings)
        record["text_bytes"] = text.stat().st_size
        sources = {}
        for mapping in (
            "hash",
            "dictionary",
        ):  # the dictionary's dataset is made from what the hash reads
            start = time.perf_counter()
            sources[mapping] = criteo.CriteoLog(text, mapping=mapping, log=lambda text: None)
            record[f"prepare_{mapping}_seconds"] = time.perf_counter() - start
        records = list((Path(folder) / "mpembed_cache").rglob("raw/1.0.0/*array_record*"))
        record["raw_dataset_bytes"] = sum(path.stat().st_size for path in records)
        for mapping, source in sources.items():
            blocks = source.train_blocks
            record["rates"][f"{mapping}: blocks in order"] = rate(
                lambda b=blocks: batches.in_order(b, 4096), settings
            )
            for size in settings.batch_sizes:

                def train(source: Any = source, size: int = size) -> Iterator[batches.Arrays]:
                    return source.train(size, 0, 0, settings.num_epochs)

                name = f"{mapping}: batches of {size:,}"
                record["rates"][f"{name}, numpy"] = rate(train, settings)
                record["rates"][f"{name}, on the device"] = rate(
                    lambda t=train: arrived(t()), settings
                )
                steps = settings.num_epochs * (source.num_train // size)
                seek = time.perf_counter()
                next(source.train(size, 0, steps - 1, settings.num_epochs))
                record["rates"][f"{name}, numpy"]["resume_at_the_end_seconds"] = (
                    time.perf_counter() - seek
                )
    record["peak_resident_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    slowest = min(r["least"] for name, r in record["rates"].items() if "device" in name)
    record["slowest_on_the_device"] = slowest
    for name, measured in record["rates"].items():
        console.print(
            f"{name}: {measured['rows_per_second']:,.0f} rows/s, {measured['cores']:.1f} cores"
        )
    console.print(f"slowest on the device: {slowest:,.0f} rows/s; target {TARGET:,}")
    provenance.write(settings.out, record)
    return record


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
