"""Bytes of the n-gram tables of known language models, by way of training them; nothing is made.

Rows and widths give each model's published number of parameters within 2 %. Not every size was
found in a source, and where the division into tables was not published, it is a guess, which hardly
changes the bytes. Megatron's way is 14 bytes a parameter: BF16, an FP32 master copy, and two
moments. The other ways are counted by mpembed_jax.memory.report, optimizer state included. "ours"
has row-wise Adagrad.

    python -m experiments.ngram.known_models

Prints the table, and writes experiments/results/ngram_models.json.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import optax

import mpembed_jax as mpembed
from experiments import command_line, provenance
from experiments.command_line import setting
from mpembed_jax import nn

MEGATRON_BYTES = 14  # of a parameter


class Model(NamedTuple):
    """The n-gram tables of a model."""

    name: str
    layers: int  # memories, each with tables of its own
    orders: tuple[int, ...]
    heads: int
    rows: int  # of a table
    features: int
    vocabulary_size: int


MODELS = (
    Model("Engram-27B", 2, (2, 3), 8, 2_262_400, 80, 129_280),
    Model("LongCat-Flash-Lite", 1, (2, 3, 4), 4, 78 * 131_072, 256, 131_072),
    # 320 M keys of 160 numbers; how they are divided into tables does not change the bytes.
    Model("Qwen3.8-Flash-Next", 1, (2, 3), 8, 20_000_000, 160, 151_936),
    Model("DeepSeek-V4.1", 2, (2, 3, 4), 8, 16_000_000, 256, 129_280),
)

ADAGRAD, ADAM = mpembed.optim.rowwise_adagrad(0.1), optax.adam(1e-3)
# {name: (storage, share of rows in the cache, optimizer)}
WAYS: dict[str, tuple[str, float, Any]] = {
    "FP32 + Adam": ("float32", 0, ADAM),
    "BF16 + FP32 Adam": ("bfloat16", 0, ADAM),
    "ours, INT8 + 5 %": ("int8", 0.05, ADAGRAD),
    "ours, INT4 + 5 %": ("int4", 0.05, ADAGRAD),
    "ours, INT4 + 1 %": ("int4", 0.01, ADAGRAD),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where to write."""

    out: Path = setting(Path("experiments/results"), "Folder of ngram_models.json.")


def num_parameters(model: Model) -> int:
    """Returns the numbers in all tables of a model."""
    return model.layers * sum(hash_of(model).table_sizes) * model.features


def hash_of(model: Model) -> nn.NGramHash:
    """Returns the hash of one memory of a model."""
    return nn.NGramHash(model.vocabulary_size, model.orders, model.heads, model.rows)


def num_bytes(model: Model, way: str) -> int:
    """Returns the bytes of all tables of a model, with their optimizer's state."""
    storage, share, tx = WAYS[way]
    cache = mpembed.CacheSpec(share) if share else None
    spec = nn.ngram_spec(hash_of(model), model.features, storage=storage, cache=cache)
    return model.layers * mpembed.memory.report(spec, tx).total


def measure() -> list[dict[str, Any]]:
    """Returns parameters and bytes of each model."""
    return [
        {
            "model": model.name,
            "rows": model.layers * sum(hash_of(model).table_sizes),
            "features": model.features,
            "parameters": num_parameters(model),
            "bytes": {
                "Megatron": MEGATRON_BYTES * num_parameters(model),
                **{way: num_bytes(model, way) for way in WAYS},
            },
        }
        for model in MODELS
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Returns the Markdown table, in GB; our ways also with the bytes of a parameter."""
    ways = list(results[0]["bytes"])
    lines = [
        f"| GB | rows | D | parameters | {' | '.join(ways)} |",
        "|---" * (4 + len(ways)) + "|",
    ]
    for result in results:
        cells = [
            result["model"],
            f"{result['rows'] / 1e6:.0f} M",
            str(result["features"]),
            f"{result['parameters'] / 1e9:.1f} B",
        ]
        for way, size in result["bytes"].items():
            each = f" ({size / result['parameters']:.2f} each)" if way.startswith("ours") else ""
            cells.append(f"{size / 1e9:,.0f}{each}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(settings: Settings) -> None:
    """Refuses an unwritable folder.

    Raises:
      Refused: in one sentence.
    """
    command_line.check_out(settings.out, is_file=False)


def run(settings: Settings) -> None:
    """Counts, prints and writes."""
    results = measure()
    written = {"environment": provenance.environment(), "models": results}
    provenance.write(settings.out / "ngram_models.json", written)
    print(table(results))


def main(arguments: list[str] | None = None) -> int:
    """Is the command; returns its exit status."""
    return command_line.main(run, Settings, __doc__, arguments, check=check)


if __name__ == "__main__":
    sys.exit(main())
