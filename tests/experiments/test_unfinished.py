"""Runs that are interrupted go on with the bits they would have had.

No unfinished run is lost or mixed up.
"""

import contextlib
import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from cases import named
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

pytest.importorskip("orbax.checkpoint", reason="the [checkpoint] extra is not installed")

from experiments import command_line, running, train_dlrm
from experiments.accuracy import paper_table, served
from experiments.accuracy.grid import FP32, Case
from experiments.data import movielens, reddit
from experiments.dlrm import curves, reporting, training, unfinished
from mpembed_jax import checkpoint, memory

pytestmark = OPTAX_ADAM
ROOT = Path(__file__).resolve().parents[2]
DATA = ["--num-rows", "3500", "--scale", "0.001"]
MODEL = [*DATA, "--batch-size", "128", "--hidden", "16", "8"]
# Of an outcome; everything else must be the same. The library advises once in a process.
TIMES = ("step_ms", "first_chunk_s", "advice")


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Runs of the same model share their compiled functions and their counts of bytes."""
    make, made = training.make_job, {}

    def cached(source, recipe, view=None, *, row_gradients=False):
        key = (source.name, recipe, tuple(source.tables.items()), view, row_gradients)
        return made.setdefault(key, make(source, recipe, view, row_gradients=row_gradients))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_job", cached)
        patch.setattr(memory, "report", functools.cache(memory.report))
        yield


class Told(running.Stop):
    """A Stop that is set when it is asked for the n-th time, as a signal would at that moment."""

    def __init__(self, after):
        self.left = after

    def __bool__(self):
        self.left -= 1
        if self.left < 0:
            self.number = int(signal.SIGINT)
        return self.number != 0


def tell(monkeypatch, after):
    stop = Told(after)
    monkeypatch.setattr(running, "stoppable", lambda: contextlib.nullcontext(stop))
    return stop


# --- data


def write_criteo(folder):
    rng = np.random.default_rng(0)
    lines = [
        "\t".join(
            [
                str(label),
                *map(str, rng.integers(0, 50, 13)),
                *(f"{x:08x}" for x in 0x5555555 * rng.integers(1, 40, 26)),
            ]
        )
        for label in rng.integers(0, 2, 1400)
    ]  # fmt: skip
    (folder / "train.txt").write_text("\n".join(lines) + "\n")


def write_posts(folder, count=1500):
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(60)])
    pl.DataFrame(
        {
            "created_utc": reddit.TEST_FROM + rng.integers(-1000, 300, count),
            "subreddit": [f"s{i}" for i in rng.integers(0, 20, count)],
            "domain": [f"d{i}" for i in rng.integers(0, 50, count)],
            "is_self": rng.random(count) < 0.5,
            "title": [" ".join(rng.choice(words, rng.integers(0, 20))) for _ in range(count)],
            "num_comments": rng.integers(0, 25, count),
        }
    ).write_parquet(folder / "posts.parquet")


def write_ratings(folder):
    rng, count = np.random.default_rng(0), 1500
    ratings = {
        column: [str(i) for i in rng.integers(0, 40, count)]
        for column in movielens.SINGLES.values()
    }
    ratings["user_rating"] = rng.integers(1, 6, count)
    ratings["movie_genres"] = [list(rng.integers(0, 8, rng.integers(1, 7))) for _ in range(count)]
    path = movielens.ratings_file(folder)
    path.parent.mkdir(parents=True)
    pl.DataFrame(ratings).write_parquet(path)


def words_for(data, folder):
    source = "criteo" if data == "raw ids" else data
    shared = ["--data", source, "--cache-fraction", "0.3", "--seeds", "0", "1", "--chunk", "4"]
    match data:
        case "synthetic":
            return [*shared, *MODEL]
        case "criteo" | "raw ids":
            write_criteo(folder)
            raw = ["--ids", "raw", "--pool-rows", "500"] if data == "raw ids" else []
            words = ["--path", str(folder), "--batch-size", "96", "--hidden", "16", "8"]
            return [*shared, *words, *raw]
        case "reddit":
            write_posts(folder)
            return [*shared, "--path", str(folder / "posts.parquet"), "--batch-size", "96"]
        case _:
            write_ratings(folder)
            words = ["--cache-dir", str(folder), "--batch-size", "96", "--storage", "int4"]
            return [*shared, *words]


def results(folder, data):
    """What a run leaves, without times."""
    data = "criteo" if data == "raw ids" else data
    record = json.loads((folder / f"{data}.json").read_text())
    outcomes = [{k: v for k, v in o.items() if k not in TIMES} for o in record["outcomes"]]
    with (folder / f"{data}_curve.csv").open() as file:
        curve = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    # Contenders that an interruption found further on write their points later.
    curve.sort(key=lambda row: (row["seed"], row["run"], int(row["step"])))
    return outcomes, curve


NUM_STOPS = {"synthetic": 7, "raw ids": 5, "criteo": 5, "reddit": 5, "movielens": 5}


@pytest.mark.exhaustive
@pytest.mark.parametrize("data", list(NUM_STOPS))
def test_a_run_interrupted_again_and_again_ends_with_the_same_bits(
    data, tmp_path, monkeypatch, capsys
):
    """Three contenders, two seeds; told to stop in chunks, between them, and while it evaluates.

    Files of data are read in the same way in each chunk: they are told to stop less often. The
    whole command stops synthetic data once in test_settings_that_are_not_of_the_run_may_change,
    and posts when files are scored; it kills a run in the next test.
    """
    words = words_for(data, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stop = tell(monkeypatch, 10**9)
    assert train_dlrm.main([*words, "--out", str(whole)]) == 0
    num_asked = 10**9 - stop.left
    rng, places = np.random.default_rng(1), []
    num_later = NUM_STOPS[data] - 2
    moments = [1, 6, *rng.integers(2, 2 * num_asked // num_later, num_later)]
    for after in moments:
        tell(monkeypatch, after)
        resume = ["--resume"] if places else []
        status = train_dlrm.main([*words, "--out", str(parts), *resume])
        said = capsys.readouterr().err
        if status == 0:
            break
        assert status == 130
        assert "python -m experiments.train_dlrm" in said
        assert said.strip().endswith("--resume")
        places.append(said.split(" at ")[1].split(";")[0])
    assert len(set(places)) > NUM_STOPS[data] // 2 and any("seed 1" in place for place in places)
    if status:
        tell(monkeypatch, 10**9)
        assert train_dlrm.main([*words, "--out", str(parts), "--resume"]) == 0
    assert results(parts, data) == results(whole, data)
    assert not list(parts.glob("*unfinished*"))


SMALL = [*MODEL, "--cache-fraction", "0.3", "--chunk", "4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole")
    assert train_dlrm.main([*SMALL, "--out", str(out)]) == 0
    return results(out, "synthetic")


@pytest.mark.parametrize(
    "options", named({"vectors": (), "rows": ("--row-gradients",)}, core={"vectors"})
)
def test_a_killed_run_goes_on_from_the_last_save(options, whole, tmp_path, monkeypatch):
    """Saved in the background after each chunk, in full, or then by touched rows; killed twice."""
    if options:
        assert train_dlrm.main([*SMALL, *options, "--out", str(tmp_path / "whole")]) == 0
        whole = results(tmp_path / "whole", "synthetic")
    saves, save = [], checkpoint.save

    def counted(*args, tracker=None, **options):
        saving = save(*args, tracker=tracker, **options)
        saves.append((tracker is not None, saving.nbytes))
        return saving

    monkeypatch.setattr(checkpoint, "save", counted)
    words, calls = [*SMALL, *options, "--out", str(tmp_path / "parts")], []
    words += ["--save-every", "0.000001"]

    def killed(self, seed, name, points, at):
        calls.append(points)
        if len(calls) == at:
            raise KeyboardInterrupt

    for at, resume in ((11, []), (23, ["--resume"])):
        monkeypatch.setattr(curves.Curves, "add", functools.partialmethod(killed, at=at))
        assert train_dlrm.main([*words, *resume]) == 130
    monkeypatch.undo()
    assert train_dlrm.main([*words, "--resume"]) == 0
    assert results(tmp_path / "parts", "synthetic") == whole
    assert {is_increment for is_increment, _ in saves} == {False, True}


@pytest.mark.slow
def test_what_cannot_be_saved_is_said_and_training_goes_on(whole, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise checkpoint.CheckpointError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    words = [*SMALL, "--out", str(tmp_path / "out"), "--save-every", "0.000001"]
    assert train_dlrm.main(words) == 0
    assert "warning: not saved, training goes on: No space left" in capsys.readouterr().err
    assert results(tmp_path / "out", "synthetic") == whole
    tell(monkeypatch, 20)
    assert train_dlrm.main([*SMALL, "--out", str(tmp_path / "other")]) == 130
    said = capsys.readouterr().err
    assert "could not be saved: No space left on device" in said and "--resume" not in said


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """The folder of a run that was told to stop."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        tell(patch, 17)
        assert train_dlrm.main([*SMALL, "--out", str(out)]) == 130
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path, monkeypatch, capsys):
    """A copy of that folder."""
    capsys.readouterr()
    tell(monkeypatch, 10**9)
    return Path(shutil.copytree(stopped_once, tmp_path / "out"))


def held(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_unfinished_run_is_not_begun_anew(stopped, capsys):
    before = held(stopped)
    assert train_dlrm.main([*SMALL, "--out", str(stopped)]) == 2
    assert "holds an unfinished run: go on with --resume" in capsys.readouterr().err
    assert held(stopped) == before


@pytest.mark.slow
def test_other_settings_are_refused_with_the_differences(stopped, capsys):
    before = held(stopped)
    words = [*SMALL, "--out", str(stopped), "--resume", "--storage", "int4", "--seeds", "0", "3"]
    assert train_dlrm.main([*words, "--max-unique-ids", "9000"]) == 2
    said = capsys.readouterr().err
    assert "--storage int8 there, int4 here; --max-unique-ids its default there, 9000 here" in said
    assert "--seeds 0 there, 0 3 here" in said and "--scale" not in said
    assert held(stopped) == before


@pytest.mark.slow
def test_settings_that_are_not_of_the_run_may_change(stopped, whole):
    moved = stopped.with_name("moved")
    shutil.move(stopped, moved)
    words = [*SMALL, "--out", str(moved), "--resume", "--save-every", "7"]
    assert train_dlrm.main(words) == 0
    assert results(moved, "synthetic") == whole


def test_there_must_be_something_to_go_on_with(tmp_path, capsys):
    assert train_dlrm.main([*SMALL, "--out", str(tmp_path), "--resume"]) == 2
    assert "no unfinished run of --data synthetic is saved in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_save_is_told(stopped, capsys):
    for path in stopped.rglob("manifest.json"):
        path.write_text("{")
    assert train_dlrm.main([*SMALL, "--out", str(stopped), "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_other_data_are_refused(tmp_path, monkeypatch, capsys):
    words = [*words_for("criteo", tmp_path), "--out", str(tmp_path / "out")]
    tell(monkeypatch, 9)
    assert train_dlrm.main(words) == 130
    lines = (tmp_path / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines[:1000]) + "\n")
    assert train_dlrm.main([*words, "--resume"]) == 2
    assert "the data have changed: train 1200 there, 858 here" in capsys.readouterr().err


@pytest.mark.slow
def test_another_environment_is_told(stopped, monkeypatch, capsys):
    monkeypatch.setattr(unfinished.provenance, "commit", lambda: "another")
    assert train_dlrm.main([*SMALL, "--out", str(stopped), "--resume"]) == 0
    assert "warning: another environment than the save's: commit" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_process_in_order(number, tmp_path):
    """The whole command stops runs inside of this process, above and below.

    It sends a signal to a process that prepares data, below.
    """
    command = [sys.executable, "-m", "experiments.train_dlrm", *SMALL, "--num-rows", "700000"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=ROOT, stdout=-1, stderr=-1, text=True
    ) as process:
        try:
            curve, deadline = tmp_path / "synthetic_curve.csv", time.monotonic() + 200
            while not (curve.exists() and curve.read_text().count("\n") > 3):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(number)
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in said and said.strip().endswith(f"--out {tmp_path} --resume")
    assert checkpoint.steps(tmp_path / "synthetic_unfinished") == [1]


@pytest.fixture(params=[False, True], ids=["in front", "in the background"])
def place(request):
    """Where it is started: a shell lets the background jobs of a script ignore SIGINT."""
    handler = signal.SIG_IGN if request.param else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", [train_dlrm, paper_table], ids=["train_dlrm", "paper_table"])
def test_a_signal_before_training_ends_in_one_line(program, number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dlrm, "make_source", lambda *_: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    assert program.main(["--out", str(tmp_path / "out")]) == 128 + number
    assert capsys.readouterr().err == (
        f"{program.__name__}: stopped before training began; nothing is lost, start the same "
        "command again\n"
    )
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_signal_that_comes_too_late_for_training_loses_no_results(tmp_path, monkeypatch, capsys):
    make_table = reporting.make_table
    numbers = [signal.SIGTERM]

    def told(*words):
        if numbers:
            signal.raise_signal(numbers.pop())
        return make_table(*words)

    monkeypatch.setattr(reporting, "make_table", told)
    assert train_dlrm.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert not numbers
    assert "stopping" in capsys.readouterr().err
    assert len(results(tmp_path, "synthetic")[0]) == 3


@pytest.mark.slow
def test_a_signal_while_criteo_is_prepared_leaves_nothing_half_written(tmp_path):
    write_criteo(tmp_path)
    text = tmp_path / "train.txt"
    text.write_text(text.read_text() * 400)
    command = [sys.executable, "-m", "experiments.train_dlrm", "--data", "criteo"]
    with subprocess.Popen(
        [*command, "--path", str(tmp_path), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        stdout=-1,
        stderr=-1,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 200
            while not list(tmp_path.glob("mpembed_cache/**/incomplete.*")):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 143
    assert "Traceback" not in said and "stopped before training began" in said
    assert not list(tmp_path.glob("mpembed_cache/**/incomplete.*"))
    assert not list(tmp_path.glob("mpembed_cache/**/dataset_info.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("place")
def test_ctrl_c_while_jax_is_imported_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train_dlrm"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "stopped before it began\n"
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


# --- curves


@pytest.mark.slow
def test_the_curve_is_a_table_of_what_happened(whole):
    outcomes, curve = whole
    assert list(curve[0]) == [name for name in curves.HEAD if name != "seconds"]
    for outcome in outcomes:
        points = [row for row in curve if row["run"] == outcome["contender"]["name"]]
        assert [int(row["step"]) for row in points] == [4, 8, 12, 16, 20, 23]
        losses = [float(row["loss"]) for row in points]
        assert losses == pytest.approx([loss for _, loss in outcome["losses"]], rel=1e-5)
        assert all(0.4 < float(row["auc"]) < 1 for row in points)
        assert all(0 < float(row["rows_touched"]) <= 128 * 26 for row in points)
        is_cached = outcome["contender"]["cache_fraction"] > 0
        assert (float(points[-1]["hit_rate"]) > 0) == is_cached


def test_events_are_written_where_tensorboard_is(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing import event_accumulator

    point = curves.Point(4, 1.0, 0.5, float("nan"), 0.9, 100.0)
    with curves.curves(tmp_path / "c.csv", tmp_path / "events") as written:
        written.add(3, "INT8 + 5 %", [point])
    found = event_accumulator.EventAccumulator(str(tmp_path / "events" / "INT8_5" / "seed_3"))
    found.Reload()
    assert set(found.Tags()["tensors"]) == {"seconds", "loss", "hit_rate", "rows_touched"}


def test_an_auc_that_is_not_defined_is_an_empty_cell(tmp_path):
    with curves.curves(tmp_path / "c.csv", tmp_path / "events") as written:
        written.add(0, "FP32", [curves.Point(4, 1.0, 0.5, float("nan"), 0.0, 100.0)])
    assert (tmp_path / "c.csv").read_text().splitlines()[1] == "0,FP32,4,1,0.5,,0,100"


# --- the grid


@pytest.mark.exhaustive
def test_a_grid_goes_on_inside_a_case(tmp_path, monkeypatch, capsys):
    """Cases of every method; told to stop in training, between the cases of one, in evaluation.

    The whole command has stops inside of a run above, and a grid that is killed in
    test_paper_table.py.
    """
    cases = (
        FP32, Case("int4", 0.05), Case("int4", small=0.05), Case(method="pruned", share=0.5),
        Case("int4", method="post-training"), Case("int4", method="quantization-aware"),
    )  # fmt: skip

    @functools.wraps(paper_table.run)  # messages name its module
    def run(settings):
        paper_table.run(settings, lambda *_: cases)

    def grid(out):
        return command_line.main(
            run, paper_table.Settings, "", [*words, "--out", str(out)], check=paper_table.check
        )

    words = [*MODEL, "--dims", "4", "--seeds", "0", "--grid", "targets"]

    def lines(out):
        found = [json.loads(x) for x in (out / "paper_table.jsonl").read_text().splitlines()]
        for record in found:
            del record["environment"]
            for name in TIMES:
                record["outcome"].pop(name, None)
        return found

    stop = tell(monkeypatch, 10**9)
    assert grid(tmp_path / "whole") == 0
    num_asked = 10**9 - stop.left
    out, statuses = tmp_path / "parts", []
    for after in [1, 30, *np.random.default_rng(0).integers(3, num_asked // 4, 30)]:
        tell(monkeypatch, after)
        statuses.append(grid(out))
        if statuses[-1] == 0:
            break
        assert "go on with:" in capsys.readouterr().err
        assert len(list((out / "paper_table_unfinished").iterdir())) == 1
    assert statuses[-1] == 0 and statuses.count(130) >= 5
    assert lines(out) == lines(tmp_path / "whole")
    assert not (out / "paper_table_unfinished").exists()


@pytest.mark.exhaustive
def test_scores_of_serving_files_go_on_inside_a_seed(tmp_path, monkeypatch, capsys):
    """Two seeds; told to stop while it trains, while it scores, and between the seeds.

    The whole command has test_a_killed_run_goes_on_from_the_last_save and
    test_a_killed_grid_continues_where_it_was.
    """
    write_posts(tmp_path, 9000)
    words = ["--path", str(tmp_path / "posts.parquet"), "--seeds", "0", "1"]
    stop = tell(monkeypatch, 10**9)
    assert served.main([*words, "--out", str(tmp_path / "new" / "whole.json")]) == 0
    num_asked = 10**9 - stop.left
    out, statuses = tmp_path / "parts" / "served.json", []
    for after in [1, 4, *np.random.default_rng(0).integers(5, num_asked - 9, 9), 10**9]:
        tell(monkeypatch, after)
        statuses.append(served.main([*words, "--out", str(out)]))
        if statuses[-1] == 0:
            break
        said = capsys.readouterr().err
        assert "stopped at step" in said and said.strip().endswith(f"--out {out}")
        assert not out.exists()
    assert statuses[-1] == 0 and statuses.count(130) >= 3
    whole, parts = (json.loads(path.read_text()) for path in (tmp_path / "new" / "whole.json", out))
    for name in ("scores", "files", "differences"):
        assert parts[name] == whole[name]
    assert [path.name for path in out.parent.iterdir()] == ["served.json"]
