"""The experiment with n-gram memories pairs, counts bytes and resumes; its text loses nothing."""

import collections
import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import named
from flax import nnx
from matplotlib.figure import Figure
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments import command_line, running
from experiments.ngram import (
    known_models,
    memory_table,
    occurrences,
    report,
    step_time,
    text,
    training,
)
from experiments.ngram.training import CONTENDERS
from mpembed_jax import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = training.Recipe(
    steps=2, batch=2, length=8, width=16, rows=2000, features=8, validation_batches=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty files of made-up code."""
    path = tmp_path_factory.mktemp("code")
    rng = np.random.default_rng(0)
    for number in range(40):
        words = rng.choice(
            ["alpha", "Beta", "gamma", "π", "x1", "if", "\n    ", " ", "(", "))"], 80
        )
        (path / f"file{number}.py").write_text("".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(folder):
    return text.read(folder, 263, 10**6)


# --- the text


def test_tokens_spell_the_files_and_validation_has_others(folder, data):
    def files(tokens):
        ends = np.flatnonzero(tokens == text.BOUNDARY)[1:]
        return {b"".join(map(data.spelled, part)).decode() for part in np.split(tokens, ends)}

    train, validation = files(data.train), files(data.validation)
    assert train | validation == {path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert train.isdisjoint(validation) and len(validation) < len(train)
    assert data.vocabulary_size == 263 and data.train.max() < 263
    assert (data.train >= 257).mean() > 0.2, "frequent pieces are tokens of their own"


def test_the_same_files_give_the_same_text_and_others_another(folder, data, tmp_path):
    assert text.read(folder, 263, 10**6).identity == data.identity
    assert text.read(folder, 263, 1000).identity != data.identity
    with pytest.raises(ValueError, match="0 Python files are too few"):
        text.read(tmp_path, 263, 10**6)
    assert text.files_of(text.standard_library())


# --- the contenders


@pytest.mark.slow
def test_contenders_of_a_seed_differ_in_their_memory_only(data):
    models = [
        training.build(TINY, CONTENDERS[name], data.vocabulary_size, seed)
        for name, seed in (("none", 0), ("INT4 + 5 %", 0), ("FP32", 0), ("none", 1))
    ]
    none, int4, fp32, other = (
        {k: v.get_value() for k, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        for model in models
    )
    assert none.keys() < int4.keys() == fp32.keys()
    for name, value in int4.items():
        np.testing.assert_array_equal(value, fp32[name])
        np.testing.assert_array_equal(value, none.get(name, value))
    assert any((none[name] != other[name]).any() for name in none)
    initial = jax.tree.leaves(models[2].gated.memory.state.table)[0]
    assert np.ptp(np.asarray(initial)) > 0


@pytest.mark.parametrize(
    "name",
    named(
        [name for name in CONTENDERS if name not in ("none", "FP32, Adam")],
        core={
            "INT4 + 5 %",
            "FP32 in INT4 + 5 %'s bytes",
            "INT4, no cache",
            "rows from 2 on, FP32",
            "rows from 3 on, INT4 + 5 %",
        },
    ),
)
def test_bytes_are_known_before_a_memory_is_made(data, name):
    model = training.build(TINY, CONTENDERS[name], data.vocabulary_size, 0)
    planned = training.planned_bytes(TINY, CONTENDERS[name], data.vocabulary_size)
    assert training.state_bytes(model) == planned


def test_fp32_in_as_few_bytes_has_as_few_bytes(data):
    small, int4 = (
        training.planned_bytes(training.Recipe(), CONTENDERS[name], data.vocabulary_size)
        for name in ("FP32 in INT4 + 5 %'s bytes", "INT4 + 5 %")
    )
    assert small == pytest.approx(int4, rel=1e-3)


# --- the command


def arguments(folder, out, *more):
    return [
        *("--text", str(folder), "--out", str(out), "--vocabulary", "300", "--rows", "1000"),
        *("--steps", "2", "--batch", "2", "--length", "8", "--width", "16", "--features", "8"),
        *more,
    ]


@OPTAX_ADAM
@pytest.mark.slow
def test_a_table_goes_on_where_it_was_and_pairs_seeds(folder, tmp_path, capsys):
    raw = "rows from 2 on, INT4 + 5 %"
    chosen = ("--contenders", "FP32", raw)
    assert memory_table.main(arguments(folder, tmp_path, *chosen, "--seeds", "0")) == 0
    timed = {"settings": {"batch": 2, "length": 8, "width": 16, "features": 8}}
    timed["sizes"] = [{"rows": 4000, "tokens_per_second": {"FP32": 1234}}]
    (tmp_path / report.STEP_TIME).write_text(json.dumps(timed))
    assert memory_table.main(arguments(folder, tmp_path, *chosen, "--seeds", "0", "1")) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 runs to do" in printed and "2 of 4 runs to do" in printed
    lines = [json.loads(line) for line in (tmp_path / report.RECORDS).read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 4
    assert [line["contender"].get("admit_after") for line in lines] == [None, 2] * 2
    assert (tmp_path / "ngram_memory.png").stat().st_size > 1000
    (group,) = report.group(lines)
    wanted = [
        group.runs[raw][seed]["outcome"]["loss"] - group.runs["FP32"][seed]["outcome"]["loss"]
        for seed in (0, 1)
    ]
    assert group.difference(raw).mean == pytest.approx(np.mean(wanted))
    page = (tmp_path / "ngram_memory.md").read_text()
    size = group.mean("FP32", "state_bytes") / group.mean(raw, "state_bytes")
    assert f"| {size:.2f}x |" in page and page.count("| 1,234 |") == 1
    # 360 rows of two heads' 8 numbers, and two shared rows.
    size = group.mean(raw, "state_bytes") / ((352 + 2) * 16)
    assert group.mean(raw, "num_rows") == 354 and f"| {size:.2f} |" in page
    assert memory_table.main(["--report", "--out", str(tmp_path)]) == 0


def test_a_loss_is_a_mean_over_seeds_that_all_contenders_have():
    """Another seed of FP32, with a larger loss, does not lift FP32 above the others."""
    losses = {"FP32": {0: 2.0, 1: 3.0, 2: 9.0}, "INT4 + 5 %": {0: 2.1, 1: 3.1}}
    runs = {
        name: {seed: {"outcome": {"loss": loss}} for seed, loss in of_seeds.items()}
        for name, of_seeds in losses.items()
    }
    group = report.Group({}, {}, runs)
    assert group.loss("FP32") == pytest.approx(2.5)
    assert group.loss("INT4 + 5 %") == pytest.approx(2.6)
    assert group.difference("INT4 + 5 %").mean == pytest.approx(0.1)
    alone = report.Group({}, {}, {"FP32": runs["FP32"], "none": {7: runs["FP32"][0]}})
    assert alone.loss("FP32") == pytest.approx(14 / 3)  # no seed in common


@pytest.mark.parametrize("page", named(["README.md", "experiments/ngram/details.md"]))
def test_the_bytes_of_known_models_are_those_counted(page):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / page).read_text().splitlines()
    ]
    models = json.loads((ROOT / "experiments/results/ngram_models.json").read_text())["models"]
    for model in models:
        (row,) = [row for row in rows if row[0] == model["model"]]
        wanted = [f"{size / 1e9:,.0f}" for size in model["bytes"].values()]
        assert [cell.split(" (")[0] for cell in row[-len(wanted) :]] == wanted
        assert f"{model['parameters'] / 1e9:.1f} B" in row


def test_n_grams_of_a_run_are_counted_as_a_reader_counts_them(data):
    recipe = dataclasses.replace(TINY, steps=30)
    rng, seen = np.random.default_rng(7), collections.Counter()
    for window in (w for _ in range(30) for w in training.batch_of(data.train, recipe, rng)):
        for end, order in itertools.product(range(recipe.length), recipe.orders):
            ngram = window[max(0, end - order + 1) : end + 1].tolist()
            while text.BOUNDARY in ngram[1:]:  # no n-gram crosses the start of a file
                ngram = ngram[1:]
            seen[order, *ngram] += 1
    counts = occurrences.occurrences(data, recipe, 7)
    assert sorted(counts) == sorted(seen.values())
    result = occurrences.measure(data, recipe, (7,))
    assert result["at_least"][1]["ngrams"] == [sum(n >= 2 for n in seen.values())]
    assert "n-grams, by seed" in occurrences.table(result)


def test_the_page_says_how_often_n_grams_occur():
    result = json.loads((ROOT / "experiments/results/ngram_occurrences.json").read_text())
    page = " ".join((ROOT / "experiments/ngram/README.md").read_text().split())
    for row, said in zip(
        result["at_least"],
        (
            "{ngrams:,} occur, for {pool:,} rows",
            '{ngrams:,} n-grams occur at least twice, and the pool of "rows from 2 on" has '
            "{pool:,}",
            "{ngrams:,} occur at least three times, for {pool:,} rows",
        ),
        strict=True,
    ):
        ngrams = round(np.mean(row["ngrams"]), -3)
        assert said.format(ngrams=int(ngrams), pool=round(row["rows"], -3)) in page
    twice = result["at_least"][1]["roomy_times_smaller"]
    assert f"would be {twice:.0f} times smaller than FP32" in page
    train, validation = result["byte_share"].values()
    assert f"{train:.0%} of the tokens".replace("%", " %") in page
    assert f"{validation:.0%} of those for validation".replace("%", " %") in page


def test_no_label_of_the_picture_covers_another():
    """Points of about equal bytes and loss, as contenders with few rows have."""
    megabytes = {"INT8 + 5 %": 94, "INT4 + 5 %": 62, "rows from 2 on, FP32": 48, "INT4 + 1 %": 51}
    losses = {"INT8 + 5 %": 2.8923, "INT4 + 5 %": 2.8929, "INT4 + 1 %": 2.8961}
    runs = {
        name: {0: {"outcome": {"loss": losses.get(name, 2.8937), "state_bytes": size * 10**6}}}
        for name, size in {**megabytes, "rows from 2 on, INT4 + 5 %": 10.6, "FP32": 264}.items()
    }
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    report.picture(axis, report.Group({}, {"features": 32}, runs))
    figure.draw_without_rendering()
    assert [label.get_text() for label in axis.texts] == list(runs)
    boxes = [label.get_window_extent() for label in axis.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axis.get_window_extent()
    assert all(frame.xmin <= box.xmin and box.xmax <= frame.xmax for box in boxes)


@OPTAX_ADAM
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["none", "INT4 + 5 %"])
def test_a_run_that_is_told_to_stop_goes_on_with_the_same_bits(data, tmp_path, name):
    """test_a_table_goes_on_where_it_was_and_pairs_seeds and test_unfinished.py have its parts."""
    recipe, stop = dataclasses.replace(TINY, steps=5), running.Stop()
    whole = training.train(data, recipe, CONTENDERS[name], 0)

    def signal_at(step, loss):
        stop.number = 2 if step in (0, 2) else 0

    saves = training.Saves(tmp_path / "run", stop, "python -m that")
    for after in (1, 3):
        wanted = rf"stopped in .*, seed 0, after step {after}; go on with:\n  python -m that"
        with pytest.raises(running.Stopped, match=wanted):
            training.train(data, recipe, CONTENDERS[name], 0, signal_at, saves)
    stop.number = 0
    again = training.train(data, recipe, CONTENDERS[name], 0, saves=saves)
    assert again.outcome._replace(seconds=0) == whole.outcome._replace(seconds=0)
    np.testing.assert_array_equal(again.token_losses, whole.token_losses)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(again.model)),
        jax.tree.leaves(nnx.state(whole.model)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@OPTAX_ADAM
@pytest.mark.slow
def test_a_run_that_cannot_be_saved_says_so_and_goes_on(data, tmp_path, monkeypatch, capsys):
    recipe, stop = dataclasses.replace(TINY, steps=3), running.Stop()
    whole = training.train(data, recipe, CONTENDERS["none"], 0)

    def full(*_, **__):
        raise checkpoint.CheckpointError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    saves = training.Saves(tmp_path / "run", stop, "python -m that", every_s=0.0)
    again = training.train(data, recipe, CONTENDERS["none"], 0, saves=saves)
    assert again.outcome._replace(seconds=0) == whole.outcome._replace(seconds=0)
    assert "warning: not saved, training goes on: No space left" in capsys.readouterr().err
    stop.number = 2
    wanted = "after step 1, which could not be saved: No space left on device$"
    with pytest.raises(running.Stopped, match=wanted):
        training.train(data, recipe, CONTENDERS["none"], 0, saves=saves)


@OPTAX_ADAM
@pytest.mark.slow
def test_a_damaged_save_is_refused(data, tmp_path):
    stop = running.Stop()
    saves = training.Saves(tmp_path / "run", stop, "python -m that")
    stop.number = 2
    with pytest.raises(running.Stopped):
        training.train(data, TINY, CONTENDERS["none"], 0, saves=saves)
    for path in (tmp_path / "run" / "step_1").rglob("0*"):  # the pieces of arrays
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(command_line.Refused, match=r"cannot be read: .*step 1"):
        training.train(data, TINY, CONTENDERS["none"], 0, saves=saves)


@OPTAX_ADAM
@pytest.mark.slow
def test_a_table_that_is_told_to_stop_goes_on_in_its_run(folder, tmp_path, capsys, monkeypatch):
    stop = running.Stop()
    monkeypatch.setattr(running, "stoppable", lambda: contextlib.nullcontext(stop))
    stop.number = 15
    words = arguments(folder, tmp_path, "--contenders", "none", "--seeds", "0")
    assert memory_table.main(words) == 143
    said = capsys.readouterr().err
    assert "after step 1; go on with:\n  python -m experiments.ngram.memory_table" in said
    assert list((tmp_path / memory_table.UNFINISHED).iterdir())
    stop.number = 0
    assert memory_table.main(words) == 0
    assert not (tmp_path / memory_table.UNFINISHED).exists()


def test_the_command_knows_every_contender():
    assert memory_table.Settings().contenders == tuple(CONTENDERS)


@OPTAX_ADAM
@pytest.mark.exhaustive
def test_step_times_of_all_contenders_are_measured(tmp_path):
    """The training steps that it times run in the other tests of this file."""
    words = "--rows 4000 --rounds 2 --steps 1 --batch 2 --length 8 --width 16"
    chosen = ("INT4 + 5 %",)
    more = ("--contenders", *chosen, "--out", str(tmp_path))
    assert step_time.main([*words.split(), *more]) == 0
    (size,) = json.loads((tmp_path / "ngram_step_time.json").read_text())["sizes"]
    assert set(size["ms"]) == {"none", *chosen, step_time.DENSE}
    assert min(size["ms"].values()) > 0


# --- the tables of known models


@pytest.mark.slow
@OPTAX_ADAM
def test_tables_of_known_models_have_their_published_sizes_and_our_bytes():
    published = {
        "Engram-27B": 5.7e9,
        "LongCat-Flash-Lite": 31.4e9,
        "Qwen3.8-Flash-Next": 51e9,
        "DeepSeek-V4.1": 196e9,
    }
    results = {result["model"]: result for result in known_models.measure()}
    assert results.keys() == published.keys()
    for name, wanted in published.items():
        result = results[name]
        assert result["parameters"] == pytest.approx(wanted, rel=0.02)
        each = {way: size / result["parameters"] for way, size in result["bytes"].items()}
        assert each["Megatron"] == 14
        assert each["FP32 + Adam"] == pytest.approx(12, rel=1e-3)
        assert each["BF16 + FP32 Adam"] == pytest.approx(10, rel=1e-3)
        assert each["ours, INT4 + 1 %"] < 0.65
        assert 14 / each["ours, INT4 + 5 %"] > 17
    assert "DeepSeek-V4.1" in known_models.table(list(results.values()))
