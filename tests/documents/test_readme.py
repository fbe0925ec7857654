"""README says what is true.

Its snippets run in order. Its diff is that of two working scripts. Its bytes add up.
"""

import difflib
import re
from pathlib import Path

import pytest
from training import OPTAX_ADAM

from mpembed_jax import RowFormat

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@OPTAX_ADAM
@pytest.mark.slow
def test_every_python_snippet_runs(tmp_path, capsys):
    code = "\n".join(blocks("python"))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "hit rate" in printed
    assert "ratio:" in printed
    # What README says beside the plan of 10 M x 64, 100 M x 64 and 500 k x 16 rows for 16 GB.
    assert re.search(r"^dim64 +110,000,000 +64 +int8 \+ 5% ", printed, re.MULTILINE)
    assert re.search(r"^dim16 +500,000 +16 +float32 ", printed, re.MULTILINE)
    assert re.search(r"^9,[45]\d\d,\d{3},\d{3} of 16,000,000,000 bytes$", printed, re.MULTILINE)


def test_the_five_lines_are_the_difference_of_two_working_scripts():
    plain = (ROOT / "tests/snippets/nnx_plain.py").read_text().splitlines()
    cached = (ROOT / "tests/snippets/nnx_cached.py").read_text().splitlines()
    changed = [
        line
        for line in difflib.ndiff(plain, cached)
        if line[:2] in ("+ ", "- ") and line[2:].strip()
    ]
    (diff,) = blocks("diff")
    assert [block.rstrip() for block in blocks("py")] == ["\n".join(plain), "\n".join(cached)]
    shown = [line for line in diff.splitlines() if line[:1] in "+-" and line[1:].strip()]
    assert sorted(line[0] + line[2:] for line in changed) == sorted(shown)
    assert len([line for line in shown if line[0] == "+"]) == 5
    for line in diff.splitlines():
        if line[:1] == " " and line.strip():
            assert line[1:] in plain


@pytest.mark.parametrize(
    "line", re.findall(r"^\| ((?:float32|bfloat16|int|float8).*?) \|$", README, re.MULTILINE)
)
def test_bytes_per_row_are_the_formats_own(line):
    names, *sizes = line.split(" | ")
    for name in names.split(", "):
        for dim, size in zip((16, 64, 128), sizes, strict=True):
            assert RowFormat(name).row_bytes(dim) == int(size)


def test_the_linen_lines_are_the_difference_of_two_working_scripts():
    plain = (ROOT / "tests/snippets/linen_plain.py").read_text().splitlines()
    cached = (ROOT / "tests/snippets/linen_cached.py").read_text().splitlines()
    changed = [
        line
        for line in difflib.ndiff(plain, cached)
        if line[:2] in ("+ ", "- ") and line[2:].strip()
    ]
    (diff,) = blocks("diff linen")
    assert [line[0] + line[2:] for line in changed] == diff.splitlines()
    assert len([line for line in changed if line[0] == "+"]) == 5


def test_the_two_commands_install_what_they_need():
    commands = blocks("sh")
    assert len(commands) == 2
    assert all(
        command.startswith("pip install") and " && python -m " in command for command in commands
    )
