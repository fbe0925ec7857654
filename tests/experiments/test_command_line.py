"""Wrong calls of every program end at once, with one sentence and status 2.

Nothing is written.
"""

import dataclasses
import gzip
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import polars as pl
import pytest
from cases import named
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments import command_line, provenance, running, train_dlrm
from experiments.data import reddit
from experiments.dlrm import curves, reporting
from experiments.speed import bench_step

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    "train_dlrm", "accuracy.paper_table", "accuracy.served", "accuracy.drift", "speed.serving",
    "speed.bench_step",
    "speed.bench_peers", "speed.bench_data", "speed.bench_checkpoint", "speed.first_screen",
    "speed.bench_ahead", "speed.bench_hashing", "speed.bench_raw_ids", "speed.bench_threads",
    "speed.bench_top_k",
    "gpu.bench_gpu", "gpu.compile_gpu", "gpu.roofline", "gpu.aot_8gpu", "scaling.bench_scaling",
    "scaling.multiprocess", "faults.run", "ngram.memory_table", "ngram.step_time",
    "ngram.known_models", "ngram.occurrences", "faults.killed_worker",
)  # fmt: skip


# Processes that a program starts, and which one.
PARTS = {
    "speed.peers": "speed.bench_peers", "faults.calls": "faults.run",
    "faults.mutations": "faults.run", "faults.sequences": "faults.run",
}  # fmt: skip


@pytest.fixture(autouse=True)
def same_environment():
    """bench_scaling asks jax for eight devices in the environment, where it is imported."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def program(name):
    return importlib.import_module(f"experiments.{name}")


def test_every_program_is_here():
    found = [
        ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
        for path in (ROOT / "experiments").rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    ]
    assert sorted(found) == sorted([*PROGRAMS, *PARTS])


class Wrong(NamedTuple):
    """A call that is refused, and what its sentence must say."""

    name: str
    program: str
    words: str
    says: tuple[str, ...]


CALLS = {
    "train_dlrm": [
        ("negative batch", "--batch-size -3", "--batch-size is -3", "at least 1"),
        ("no batch", "--batch-size 0", "--batch-size is 0", "at least 1"),
        ("batch of text", "--batch-size many", "--batch-size is many", "a whole number"),
        ("half a batch", "--batch-size 2.5", "--batch-size is 2.5", "a whole number"),
        ("large cache", "--cache-fraction 2", "--cache-fraction is 2", "at most 1"),
        ("no ways", "--ways 0", "--ways is 0", "at least 1 and at most 64"),
        ("no dim", "--embedding-dim 0", "--embedding-dim is 0", "at least 1"),
        ("no scale", "--scale 0", "--scale is 0", "above 0 and at most 1"),
        ("few rows", "--num-rows 5", "--num-rows is 5", "at least 7"),
        ("one test row", "--num-rows 8 --batch-size 2", "--num-rows", "labels are all the same"),
        ("rows below a batch", "--num-rows 700", "--batch-size is 2,048", "training rows, 600"),
        ("no hidden units", "--hidden 0 0", "--hidden is 0", "2 whole numbers", "at least 1"),
        ("one hidden width", "--hidden 8", "--hidden", "2 whole numbers"),
        ("no seed", "--seeds", "--seeds", "a whole number or several"),
        ("seed twice", "--seeds 1 0 1", "--seeds has 1 twice"),
        ("negative seed", "--seeds -1", "--seeds is -1", "at least 0"),
        ("unwritable", "--out /proc/x", "--out is /proc/x", "a folder that can be written"),
        (
            "an unwritable cache",
            "--data movielens --cache-dir /proc/x",
            "--cache-dir is /proc/x, but must be a folder",
        ),
        ("a file for a cache", "--data movielens --cache-dir FILE", "--cache-dir is FILE"),
        ("an empty path", "--out=", "--out is empty", "a path"),
        ("two values", "--seeds 0 --ways 8 16", "--ways has 16 too much", "one value"),
        ("three values", "--hidden 8 16 32", "--hidden has 32 too much", "2 values"),
        ("a value for a switch", "--resume yes", "--resume has yes too much", "no value"),
        ("a file for a folder", "--out FILE", "--out is", "a folder that can be written"),
        ("negative rate", "--row-learning-rate -1", "--row-learning-rate is -1", "above 0"),
        ("small negative rate", "--row-learning-rate -1e-3", "--row-learning-rate is -1e-3"),
        ("rate that is no number", "--row-learning-rate nan", "--row-learning-rate is nan"),
        ("infinite rate", "--dense-learning-rate inf", "--dense-learning-rate is inf"),
        ("no rate", "--dense-learning-rate 0", "--dense-learning-rate is 0", "above 0"),
        ("unknown data", "--data kaggle", "--data is kaggle", "synthetic, criteo, reddit"),
        ("unknown storage", "--storage int3", "--storage is int3", "int8, int4, int2"),
        ("unknown flag", "--cache-fracton 1", "--cache-fracton", "did you mean --cache-fraction?"),
        ("a word too many", "cache", "cache", "no such setting"),
        ("criteo without path", "--data criteo", "--path is missing", "train.txt"),
        ("criteo, missing", "--data criteo --path gone", "--path is gone", "neither a file nor"),
        ("criteo, empty folder", "--data criteo --path FOLDER", "--path is", "train.txt"),
        ("criteo, empty", "--data criteo --path EMPTY", "--path is", "is empty"),
        ("criteo, not it", "--data criteo --path FILE", "--path is", "1 columns instead of 40"),
        ("criteo, cut gzip", "--data criteo --path GZIP", "--path is", "cut short or damaged"),
        ("reddit, missing", "--data reddit --path gone", "--path is gone", "no posts_before"),
        ("reddit, no parquet", "--data reddit --path FILE", "--path is", "not a parquet file"),
        ("reddit, empty", "--data reddit --path EMPTY", "--path is", "not a parquet file"),
        ("reddit, others", "--data reddit --path PARQUET", "--path is", "no column subreddit"),
        ("reddit, no posts", "--data reddit --path NO_POSTS", "--path is", "has no posts"),
        ("path of no data", "--path FOLDER", "--path", "with --data criteo or --data reddit only"),
        ("scale of posts", "--data reddit --scale 0.1", "--scale is 0.1", "--data synthetic only"),
        ("ways without cache", "--cache-fraction 0 --ways 8", "--ways is 8", "a cache only"),
        ("rounding of FP32", "--storage float32 --rounding nearest", "--rounding is nearest"),
        (
            "dictionary's setting",
            "--data criteo --mapping hash --min-count 2",
            "--min-count is 2",
            "with --mapping dictionary only",
        ),
        (
            "hash's setting",
            "--data criteo --hash-size 9",
            "--hash-size is 9",
            "--mapping hash only",
        ),
        (
            "too much memory",
            "--embedding-dim 4096 --scale 1 --num-rows 7000",
            "--embedding-dim is 4096",
            "GB are free",
        ),
        (
            "large pool",
            "--ids raw --pool-rows 700000000 --embedding-dim 4096 --num-rows 7000",
            "--pool-rows",
            "GB are free",
        ),
        ("pool of rows", "--pool-rows 9", "--pool-rows is 9", "with --ids raw only"),
        (
            "uncounted ids",
            "--data criteo --path FOLDER --ids raw",
            "--pool-rows is missing",
            "not counted",
        ),
        (
            "raw ids mapped",
            "--data criteo --ids raw --mapping hash",
            "--mapping is hash",
            "with --ids dense only",
        ),
        ("late rows", "--ids raw --admit-after 256", "--admit-after is 256", "at most 255"),
    ],
    "accuracy.paper_table": [
        ("grid without a case", "--cache 0.33", "--grid is headline", "no case of the grid"),
        ("ways of no case", "--ways 3 --policy lru", "has --policy lru, --ways 3"),
        ("report of nothing", "--report --out FOLDER", "run without --report first"),
        ("damaged results", "--out RESULTS", "--out is", "paper_table.jsonl:1"),
        ("grid on criteo", "--data criteo", "--path is missing"),
    ],
    "accuracy.served": [
        ("no posts", "--path gone", "--path is gone", "no posts_before_2012-07.parquet"),
        ("no posts at all", "", "--path is not given", "pass its folder"),
        ("few posts", "--path FEW_POSTS", "--num-rows leaves 30", "a batch has 1,024"),
        ("seeds", "--path FEW_POSTS --seeds 0 0", "--seeds has 0 twice"),
    ],
    "accuracy.drift": [
        ("no posts", "--path gone", "--path is gone", "no posts_before_2012-07.parquet"),
        ("few posts", "--path FEW_POSTS", "no month has 10,000", "lower --month-posts"),
        ("no pool", "--path FEW_POSTS --pools 0", "--pools is 0", "above 0"),
    ],
    "speed.serving": [
        ("no rounds", "--rounds 1", "--rounds is 1", "at least 3"),
        ("wide rows", "--rows 1000000000 --dims 64 4096", "--rows is 1,000,000,000", "GB are free"),
    ],
    "speed.bench_step": [
        ("no such case", "--only batch=7", "--only is batch=7", "its names are dim, batch"),
        ("other results", "--only dim=16 --out FILE", "--out is", "cannot be used"),
        ("steps without end", "--steps 99999999999", "--steps is 99999999999", "at most 10,000"),
        ("no steps", "--steps 0", "--steps is 0", "at least 3"),
    ],
    "speed.bench_peers": [
        ("one peer", "--peers ours-int8-w8", "--peers", "two of them"),
        ("unknown peer", "--peers tensorflow", "--peers is tensorflow", "fbgemm-fp32"),
        (
            "peer of another task",
            "--task dlrm --peers ours-int8-w32 fbgemm-fp32",
            "--peers is fbgemm-fp32",
        ),
        ("no interpreter", "--peers-python gone", "--peers-python is gone"),
    ],
    "speed.bench_data": [
        ("large batches", "--num-rows 70 --batch-sizes 64", "--batch-sizes is 64", "at most 60"),
    ],
    "speed.bench_checkpoint": [
        ("too many rows", "--dim 4096 --rows 1000000000", "--rows is 1,000,000,000", "GB are free"),
        ("no folder", "--directory gone", "--directory is gone", "a folder that is there"),
        ("unknown format", "--storage int9", "--storage is int9", "one of float32"),
    ],
    "speed.bench_ahead": [
        ("one round", "--rounds 1", "--rounds is 1", "at least 2"),
        ("large batch", "--batch 1048576 --widths 65536", "--batch is 1,048,576", "GB are free"),
    ],
    "speed.bench_hashing": [
        ("two rounds", "--rounds 2", "--rounds is 2", "at least 3"),
    ],
    "speed.bench_raw_ids": [
        ("two rounds", "--rounds 2", "--rounds is 2", "at least 3"),
        ("wide rows", "--rows 1000000000 --dims 4096", "--rows is 1,000,000,000", "GB are free"),
    ],
    "speed.bench_threads": [
        ("one round", "--rounds 1", "--rounds is 1", "at least 2"),
        ("wide rows", "--rows 1000000000 --dims 4096", "--rows is 1,000,000,000", "GB are free"),
    ],
    "speed.bench_top_k": [
        ("odd bits", "--bits 64 100", "--bits is 100", "a multiple of 64"),
        ("wide rows", "--items 100000000 --dims 4096", "--items is 100,000,000", "GB are free"),
    ],
    "speed.first_screen": [
        (
            "tables too large",
            "--dim 4096 --rows 1000000000",
            "--rows is 1,000,000,000",
            "GB are free",
        ),
        (
            "dense tables too large",
            "--dense-rows 100000 1000000000",
            "--dense-rows is 1,000,000,000",
            "GB are free",
        ),
        ("one dense size", "--dense-rows 100000", "--dense-rows is 100000", "two sizes"),
        ("nothing to report", "--report --out FOLDER", "run without --report first"),
    ],
    "gpu.bench_gpu": [
        ("no such part", "--parts nothing", "--parts is nothing", "'copy bandwidth'"),
        ("negative budget", "--budget -1", "--budget is -1", "at least 0"),
    ],
    "gpu.compile_gpu": [
        ("no such GPU", "--targets v100", "--targets is v100", "h200, a100, l4, t4"),
    ],
    "gpu.roofline": [
        ("no bandwidth", "--bandwidth 0", "--bandwidth is 0", "above 0"),
    ],
    "gpu.aot_8gpu": [
        ("three GPUs", "--devices 3", "--devices is 3", "a power of two"),
    ],
    "scaling.bench_scaling": [
        ("three devices", "--devices 3", "--devices is 3", "powers of two"),
        ("odd batch", "--batch 9 --devices 2", "--batch is 9", "a multiple of --devices 2"),
    ],
    "scaling.multiprocess": [
        ("processes", "--processes 3", "--processes is 3", "divisors of --devices 4"),
        ("wide rows", "--rows 100000000 --dim 4096", "--rows is 100,000,000", "GB are free"),
        (
            "large batch",
            "--batch 1048576 --dim 4096 --features 64 --rows 2000",
            "--batch is 1,048,576",
        ),
    ],
    "ngram.memory_table": [
        ("no features", "--features 0", "--features is 0", "at least 1"),
        ("odd width", "--width 20", "--width is 20", "a multiple of 8"),
        ("no text", "--text gone", "--text is gone", "a folder with Python files"),
        ("text of no files", "--text FILE", "--text is", "a folder with Python files"),
        ("a contender of no kind", "--contenders INT3", "--contenders is INT3", "INT4 + 5 %"),
        ("nothing to report", "--report --out FOLDER", "run without --report first"),
        ("few tokens", "--text TEXT --tokens 1000", "--tokens is 1,000", "are too few"),
        (
            "long sequences",
            "--text TEXT --vocabulary 300 --length 9000 --batch 1",
            "--length is 9,000",
            "must be less than",
        ),
        ("wide rows", "--rows 100000000 --features 4096", "--rows is 100,000,000", "GB are free"),
        ("large batch", "--batch 65536 --length 65536", "--batch is 65,536", "GB are free"),
    ],
    "ngram.step_time": [
        ("one round", "--rounds 1", "--rounds is 1", "at least 2"),
        ("large batch", "--batch 65536 --length 65536", "--batch is 65,536", "GB are free"),
    ],
    "ngram.known_models": [("unwritable", "--out /proc/x", "--out is /proc/x", "a folder")],
    "ngram.occurrences": [("a seed below 0", "--seeds -1", "--seeds is -1", "at least 0")],
    "faults.run": [
        ("unknown part", "--only nothing", "--only is nothing", "'killed worker'"),
        ("other results", "--only kills --out FILE", "--out is"),
    ],
    "faults.killed_worker": [
        ("a worker by hand", "", "experiments.faults.run"),
    ],
}
WRONG = [
    *(
        Wrong(name, program, words, tuple(says))
        for program, calls in CALLS.items()
        for name, words, *says in calls
    ),
    *(
        Wrong(f"unwritable, {name}", name, "--out /proc/x/y", ("--out is /proc/x/y",))
        for name in PROGRAMS[1:-1]
    ),
    *(
        Wrong(f"{flag} of a long name, {name}", name, f"{flag} {'x' * 300}", (f"{flag} is xxx",))
        for name, flag in [
            *((name, "--out") for name in PROGRAMS[:-1]),
            ("accuracy.served", "--path"),
            ("accuracy.drift", "--path"),
            ("ngram.memory_table", "--text"),
            ("speed.bench_checkpoint", "--directory"),
        ]
    ),
    *(
        Wrong(f"a long name of {data}", "train_dlrm", f"--data {data} {flag} {'x' * 300}", (flag,))
        for data, flag in [("reddit", "--path"), ("criteo", "--path"), ("movielens", "--cache-dir")]
    ),
]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with the wrong files that the calls name."""
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "RESULTS", "TEXT"):
        (tmp_path / name).mkdir()
    for number in range(60):
        (tmp_path / "TEXT" / f"{number}.py").write_text(30 * f"x = {number}\n")
    (tmp_path / "FILE").write_text("hello\n")
    (tmp_path / "EMPTY").touch()
    (tmp_path / "GZIP").write_bytes(gzip.compress(os.urandom(9000))[:4000])
    (tmp_path / "RESULTS" / "paper_table.jsonl").write_text("{}\n")
    pl.DataFrame({"created_utc": [1, 2]}).write_parquet(tmp_path / "PARQUET")
    texts = {name: pl.Series(name, [], pl.String) for name in ("subreddit", "domain", "title")}
    numbers = {n: pl.Series(n, [], pl.Int64) for n in ("created_utc", "is_self", "num_comments")}
    pl.DataFrame(texts | numbers).write_parquet(tmp_path / "NO_POSTS")
    numbers = {"created_utc": range(reddit.TEST_FROM - 30, reddit.TEST_FROM + 9)}
    posts = {name: ["a"] * 39 for name in texts} | {"is_self": [0] * 39, "num_comments": [1] * 39}
    pl.DataFrame(posts | numbers).write_parquet(tmp_path / "FEW_POSTS")
    return tmp_path


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@OPTAX_ADAM
@pytest.mark.parametrize("call", WRONG, ids=lambda call: call.name)
def test_a_wrong_call_is_refused_in_one_sentence(call, places, capsys, monkeypatch):
    module, before = program(call.program), listing(places)
    for function in ("experiments.dlrm.training.fit", "experiments.ngram.training.train"):
        monkeypatch.setattr(function, lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setenv("MPEMBED_DATA", str(places / "NOWHERE"))  # whatever this machine has
    start = time.perf_counter()
    assert module.main(call.words.split()) == 2
    assert time.perf_counter() - start < 15
    said = capsys.readouterr()
    [line] = said.err.strip().splitlines()
    assert line.startswith(f"experiments.{call.program}: ")
    for part in call.says:
        assert part in line
    assert not re.search(r"[a-z]_(size|rows|fraction|dim|rate|count)\b", line)  # a Python argument
    assert listing(places) == before


def test_debug_shows_where_it_was_refused(capsys):
    assert train_dlrm.main(["--ways", "0", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.strip().endswith("of at least 1 and at most 64")


@pytest.mark.slow
def test_a_module_shows_no_traceback_and_ends_with_2(tmp_path):
    """As a user calls it: the process, not the function."""
    command = [sys.executable, "-m", "experiments.train_dlrm", "--ways", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "experiments.train_dlrm: --ways is 0, but must be a whole number of at least 1 and at most "
        "64\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", named(list(PARTS), fast={"faults.calls"}, core=()))
def test_a_part_of_a_program_is_not_started_by_hand(name):
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"experiments.{name}: is started by python -m experiments.{PARTS[name]}, not by hand\n"
    assert done.stderr == said


# --- help


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_setting(name, capsys):
    module = program(name)
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert text.startswith(f"usage: python -m experiments.{name} [")
    assert module.__doc__.strip().splitlines()[0][:60] in text
    flat = " ".join(text.split())
    fields = command_line.fields_of(module.Settings).values()
    for flag, default, kind, _, _, limits in fields:
        if limits.is_hidden:
            assert not re.search(rf"{flag}(?![\w-])", text)
            continue
        assert re.search(rf"^  {flag}\b", text, re.MULTILINE)
        assert re.fullmatch(r"[A-Z].*\.", limits.help), f"{flag}: {limits.help!r} is no sentence"
        assert default not in (None, ()) or limits.shown
        assert kind not in (int, float) or re.search(rf"{flag} {limits.unit}\b", flat)
    assert flat.count("Default: ") >= sum(not field.limits.is_hidden for field in fields)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_number_has_a_unit_and_limits(name):
    for flag, _, kind, choices, _, limits in command_line.fields_of(
        program(name).Settings
    ).values():
        if kind not in (int, float) or choices or limits.is_hidden:
            continue
        assert limits.unit, flag
        assert limits.at_least is not None or limits.above is not None, flag
        assert kind is not int or limits.at_most is not None, flag


@pytest.mark.parametrize("name", PROGRAMS[:-1])
def test_settings_come_back_from_the_words_that_give_them(name):
    module = program(name)
    assert command_line.words_of(module.Settings()) == []
    assert command_line.parse(module.Settings, "", name, []) == module.Settings()


def test_words_give_all_kinds_of_settings():
    chosen = train_dlrm.Settings(
        data="criteo", path=Path("~/x y"), hidden=(3, 4), seeds=(2, 1), hashed_baseline=False
    )
    words = command_line.words_of(chosen)
    read = command_line.parse(train_dlrm.Settings, "", "x", words)
    assert read == train_dlrm.Settings(**{**vars(chosen), "path": Path("~/x y").expanduser()})
    assert command_line.command_of("experiments.x", ["--path", "x y"]).endswith("--path 'x y'")


# --- while a program runs


def test_without_a_terminal_progress_is_a_line_every_few_seconds(capsys):
    with running.progress(iter(["one", None, "three", *["more"] * 99]).__next__, 0.05):
        time.sleep(0.22)
    assert capsys.readouterr().out.splitlines()[:2] == ["one", "three"]


def test_advice_names_flags(capsys):
    """Of the program: --num-rows is another setting than the rows of a vocabulary."""
    advice = ["too small: raise VocabularySpec(num_rows=..) or admit_after"]
    outcome = SimpleNamespace(contender=SimpleNamespace(name="INT8"), advice=advice)
    reporting.print_advice(reporting.make_console(), [outcome], train_dlrm.Settings)
    assert capsys.readouterr().out == "INT8: too small: raise --pool-rows or --admit-after\n"


def test_lines_of_progress_say_what_happens(capsys):
    console = reporting.make_console()
    with reporting.bars(console, ["FP32", "ours"], 200, period_s=0.05) as bars:
        time.sleep(0.12)
        bars("FP32", 100, 1.0, curves.Point(4, 1.0, 0.5, 0.7, 0.0, 9.0))
        bars("ours", 100, 1.0, curves.Point(4, 1.0, 0.4, 0.7, 0.9, 9.0))
        time.sleep(0.12)
        bars.measuring("ours")
        time.sleep(0.12)
    text = capsys.readouterr().out
    assert re.search(r"\d s  making tables and compiling", text)
    assert "50% trained  FP32 loss 0.5000, ours loss 0.4000 hits 90.0%" in text
    assert "evaluating ours" in text


def test_warnings_of_this_project_reach_the_user_and_others_do_not(capsys):
    def run(settings):
        logging.getLogger("orbax").warning("theirs")
        logging.getLogger("absl").warning("theirs")
        theirs = SimpleNamespace(exc_type=RuntimeError, exc_traceback=None)
        sys.unraisablehook(theirs)  # of a callback in C++
        warnings.warn_explicit("theirs", DeprecationWarning, "/lib/jax/x.py", 1)
        warnings.warn_explicit("ours", UserWarning, str(ROOT / "mpembed_jax" / "x.py"), 1)
        logging.getLogger("mpembed_jax.checkpoint").warning("also ours")

    run.__code__ = run.__code__.replace(co_filename=train_dlrm.__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command_line.main(run, train_dlrm.Settings, "", []) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["warning: ours", "WARNING: also ours"]


def test_a_second_signal_ends_the_process_at_once():
    """Even while it computes outside Python, where a handler of Python would wait."""
    code = """
import hashlib, time
from experiments import running
with running.stoppable() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    print("told", stop.number, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
            try:
                assert process.stdout.readline() == "ready\n"
                process.send_signal(number)
                assert process.stdout.readline() == f"told {int(number)}\n"
                time.sleep(0.1)
                process.send_signal(number)
                _, said = process.communicate(timeout=10)
            finally:
                process.kill()
        assert process.returncode == 128 + number
        assert "stopping after this step" in said


def ended(code, *, after=None, number=signal.SIGINT):
    """Runs code as a process of its own; sends it a signal after it has said `after`."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        try:
            if after is not None:
                assert process.stdout.readline() == f"{after}\n"
                time.sleep(0.1)
                process.send_signal(number)
            out, said = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, out, said


PROGRAM = """
import signal, sys, time
from experiments import command_line, train_dlrm
def run(settings):
    {}
run.__code__ = run.__code__.replace(co_filename=train_dlrm.__file__)
sys.argv[1:] = []
sys.exit(command_line.main(run, train_dlrm.Settings, ""))
"""


@pytest.mark.slow
def test_a_signal_that_the_garbage_collector_drops_comes_again():
    """As jax's callbacks of the collector drop it."""
    lines = [
        "import gc",
        "once = [1]",
        "told = lambda *_: once and once.pop() and signal.raise_signal(signal.SIGTERM)",
        "gc.callbacks.append(told)",
        "gc.collect()",
        "time.sleep(20)",
    ]
    status, _, said = ended(PROGRAM.format("\n    ".join(lines)))
    assert (status, said) == (143, "experiments.train_dlrm: stopped\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", named([signal.SIGINT, signal.SIGTERM], fast={"SIGINT"}, core=()))
def test_a_signal_after_the_end_of_a_program_changes_nothing(number):
    """While Python and jax are taken down, which takes a second."""
    slow = "__import__('atexit').register(lambda: (print('ends', flush=True), time.sleep(20)))"
    assert ended(PROGRAM.format(slow), after="ends", number=number) == (0, "", "")


@pytest.mark.slow
def test_a_program_that_is_stopped_does_not_wait_for_what_runs_in_the_background():
    """But generators, which the traceback holds, clear away what they made."""
    lines = [
        "import atexit",
        "atexit.register(time.sleep, 20)",
        "def made():",
        "    try:",
        "        yield",
        "    finally:",
        "        print('cleared')",
        "held = made()",
        "next(held)",
        "raise KeyboardInterrupt",
    ]
    status, out, said = ended(PROGRAM.format("\n    ".join(lines)))
    assert (status, out, said) == (130, "cleared\n", "experiments.train_dlrm: stopped\n")


def test_a_process_that_a_program_starts_ends_with_it():
    with (
        pytest.raises(KeyboardInterrupt),
        running.started([sys.executable, "-c", "import time; time.sleep(60)"]) as process,
    ):
        raise KeyboardInterrupt
    assert process.wait(10) == -signal.SIGKILL


def test_programs_start_processes_that_end_with_them():
    """`calls` keeps one that ends when its pipe does."""
    found = [
        path.name
        for path in (ROOT / "experiments").rglob("*.py")
        if "subprocess.Popen(" in path.read_text()
    ]
    assert sorted(found) == ["calls.py", "running.py"]


def test_a_failure_on_the_way_is_one_line_and_status_1(capsys):
    def run(settings):
        raise OSError(28, "No space left on device", "results.json")

    run.__code__ = run.__code__.replace(co_filename=train_dlrm.__file__)
    assert command_line.main(run, train_dlrm.Settings, "", []) == 1
    assert capsys.readouterr().err == (
        "experiments.train_dlrm: [Errno 28] No space left on device: 'results.json'\n"
    )


def test_interrupted_before_anything_is_saved_it_says_so(capsys):
    def run(settings):
        raise KeyboardInterrupt

    run.__code__ = run.__code__.replace(co_filename=train_dlrm.__file__)
    assert command_line.main(run, train_dlrm.Settings, "", []) == 130
    assert capsys.readouterr().err == "experiments.train_dlrm: stopped\n"


# --- results files


def test_a_results_file_is_replaced_in_one_step(tmp_path):
    """Whoever reads it while another is written has the old one, whole."""
    path = tmp_path / "results.json"
    provenance.write(path, {"number": 1})
    with path.open() as held:
        provenance.write(path, {"number": 2})
        assert json.load(held) == {"number": 1}
    assert json.loads(path.read_text()) == {"number": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_link_to_a_results_file_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "results.json")
    for number in (1, 2):
        provenance.write(tmp_path / "link", {"number": number})
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "results.json").read_text()) == {"number": number}


def test_a_benchmark_that_is_cut_keeps_the_results_of_the_run_before(tmp_path, monkeypatch):
    words, measured = ["--quick", "--out", str(tmp_path / "steps.json")], []

    def measure(case, *_):
        if len(measured) == cut_at:
            raise KeyboardInterrupt
        measured.append(case)
        numbers = dict.fromkeys(("ms", "ms_p10", "ms_p90", "num_rows", "floor_ms"), float(cut_at))
        return dataclasses.asdict(case) | numbers

    def held():
        return [r["ms"] for r in json.loads((tmp_path / "steps.json").read_text())["results"]]

    monkeypatch.setattr(bench_step, "measure", measure)
    monkeypatch.setattr(bench_step, "draw", lambda *_: None)
    monkeypatch.setattr(bench_step, "copy_bandwidth", lambda: 1e9)
    cut_at = 1000
    assert bench_step.main(words) == 0
    num = len(measured)
    assert held() == [1000] * num
    measured, cut_at = [], 1
    assert bench_step.main(words) == 130
    assert held() == [1] + [1000] * (num - 1)
