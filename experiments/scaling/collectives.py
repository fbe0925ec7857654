"""The collectives of a compiled program, read from its HLO text.

Each has the number of bytes that a device sends in one run. A conditional counts the branch that is
taken: the cheaper one ordinarily, the dearer one where `is_wide` (the exchange of mpembed_jax has
one branch of ordinary room and one of full width). A loop's body counts once.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEMSIZE = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}
KINDS = (
    "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all|"
    "collective-broadcast"
)


class Collective(NamedTuple):
    """One collective operation."""

    kind: str
    shape: str  # of its result, as HLO writes it
    devices: int  # that take part in one group
    sent_bytes: int  # by one device, as a ring sends them


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation, and the name of the entry."""
    blocks: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if (start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            name = start[2]
            blocks[name] = []
            entry = name if start[1] else entry
        elif name:
            blocks[name].append(line)
    return blocks, entry


def _nbytes(shape: str) -> int:
    sizes = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        ITEMSIZE[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in sizes
    )


def _group_size(line: str, devices: int) -> int:
    if (iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line)) is not None:
        return int(iota[2])
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return len(listed[1].split(","))
    return devices


def _parse(line: str, devices: int) -> Collective | None:
    found = re.search(rf"= (.*?) ({KINDS})(-start)?\(", line)
    if found is None:
        return None
    shape, kind, is_start = found[1], found[2], found[3]
    if is_start and shape.startswith("("):  # (operands, results): the second half is what arrives
        parts = re.findall(r"\w+\[[\d,]*\]", shape)
        shape = " ".join(parts[len(parts) // 2 :])
    group = _group_size(line, devices)
    size = _nbytes(shape)
    others = group - 1
    sent = {
        "all-reduce": 2 * others * size // group,
        "reduce-scatter": others * size,
        "collective-permute": size,
        "collective-broadcast": size,
    }.get(kind, others * size // group)
    return Collective(kind, shape, group, sent)


def collectives(text: str, devices: int, *, is_wide: bool = False) -> list[Collective]:
    """Returns the collectives that one run of a compiled program executes.

    Args:
      text: `compiled.as_text()`.
      devices: number of devices the program runs on.
      is_wide: which branch of conditionals with collectives is taken: the one that sends most
        bytes, or the least.
    """
    blocks, entry = _computations(text)

    def called(line: str) -> Iterator[list[str]]:
        """Alternatives: the lists of computations one of which the line runs."""
        if " conditional(" in line:
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            yield names
        else:
            for name in re.findall(
                r"(?:body|calls|to_apply|called_computation)=%?([\w.\-]+)", line
            ):
                yield [name]

    def run(name: str) -> list[Collective]:
        result = []
        for line in blocks.get(name, []):
            if (found := _parse(line, devices)) is not None:
                result.append(found)
                continue
            for alternatives in called(line):
                runs = [run(other) for other in alternatives]
                result += (max if is_wide else min)(
                    runs, key=lambda r: sum(c.sent_bytes for c in r), default=[]
                )
        return result

    return run(entry)
