"""Criteo-Kaggle from text to batches.

The builder, its splits, what it refuses, and the order of batches.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from cases import named
from criteo_text import line, random_lines, write
from etils import epath
from training import OPTAX_ADAM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments import train_dlrm
from experiments.data import criteo, criteo_format, criteo_kaggle, numbering, prepared

ROOT = Path(__file__).resolve().parents[2]


# So small that a few hundred rows make several of each.
SMALL = prepared.Sizes(text_bytes=12_000, block_rows=16, blocks_per_file=4, blocks_together=5)
log_of = functools.partial(criteo.CriteoLog, sizes=SMALL)


def joined(taken):
    taken = list(taken)
    return {k: np.concatenate([batch[k] for batch in taken]) for k in taken[0]}


def same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for k in a:
            np.testing.assert_array_equal(a[k], b[k])


# --- from text to batches


class Text(NamedTuple):
    """A file, and how its lines end."""

    file: str
    newline: str = "\n"
    has_last_newline: bool = True


TEXTS = {
    "plain": Text("train.txt"),
    "windows": Text("train.txt", "\r\n", has_last_newline=False),
    "gzip": Text("train.txt.gz"),
}


@pytest.mark.parametrize("form", named(TEXTS))
def test_a_folder_becomes_batches(tmp_path, form):
    text, label, dense, categories = random_lines(700)
    write(tmp_path, text, form.newline, form.file, form.has_last_newline)
    source = log_of(tmp_path, holdout="day")
    assert (source.num_train, source.num_test) == (600, 100)
    train = list(source.train(64, seed=3))
    assert [len(b["label"]) for b in train] == [64] * 9
    test = joined(source.test(64))
    np.testing.assert_array_equal(test["label"], label[600:])
    np.testing.assert_array_equal(test["dense"], dense[600:])
    for t in range(26):
        sizes, column = list(source.tables.values()), categories[:, t]
        known = np.unique(column[:600][column[:600] != 0])
        assert sizes[t] == len(known) + 2
        expected = np.where(
            column == 0, 0, np.where(np.isin(column, known), np.searchsorted(known, column) + 2, 1)
        )
        np.testing.assert_array_equal(test["ids"][:, t], expected[600:])
    seen = joined(train)
    assert (
        seen["dense"].dtype == seen["label"].dtype == np.float32 and seen["ids"].dtype == np.int32
    )
    rows = [r.tobytes() for r in seen["dense"]]
    assert len(set(rows)) == len(rows) and set(rows) <= {r.tobytes() for r in dense[:600]}


def test_halves_of_the_last_day(tmp_path):
    text, label, *_ = random_lines(77)
    write(tmp_path, text)
    halves = [log_of(tmp_path, holdout=h) for h in ("validation", "test")]
    assert [h.num_test for h in halves] == [6, 5]
    np.testing.assert_array_equal(
        np.concatenate([next(h.test(100))["label"] for h in halves]), label[66:]
    )


@pytest.mark.parametrize("num_lines", [14, 15, 20, 21, 700, 701])
def test_splits_are_the_days_of_every_file_however_short(num_lines):
    bounds = criteo_kaggle.split_lines(num_lines)
    firsts, ends = zip(*bounds.values(), strict=True)
    assert list(bounds) == ["train", "validation", "test"]
    assert firsts == (0, *ends[:-1]) and ends[-1] == num_lines
    assert ends[0] == sum(1 + 7 * line // num_lines < 7 for line in range(num_lines))
    lengths = [end - first for first, end in bounds.values()]
    assert min(lengths) > 0 and lengths[1] - lengths[2] in (0, 1)


def test_day_7_of_the_real_file_is_as_long_as_in_dlrm():
    # Its reader makes days of 6,548,659 lines and gives the four left over to the first four.
    assert criteo_kaggle.split_lines(45_840_617)["train"] == (0, 6 * 6_548_659 + 4)


@pytest.mark.parametrize("num_lines", [1, 13])
def test_a_file_too_short_for_its_splits_is_refused(tmp_path, num_lines):
    path = write(tmp_path, random_lines(num_lines)[0])
    with pytest.raises(
        criteo.BadLinesError, match=rf"{path}: {num_lines} lines are too few.*14 in all"
    ):
        log_of(tmp_path)


def test_a_split_of_bad_lines_only_is_refused(tmp_path):
    write(tmp_path, [*random_lines(13)[0], "bad"])
    with pytest.raises(criteo.BadLinesError, match="test has no good line"):
        log_of(tmp_path)


def test_bad_lines_are_skipped_within_their_split(tmp_path):
    text, label, *_ = random_lines(70)
    write(tmp_path, [*text[:60], "bad", *text[60:]])  # 71 lines: the bad one is the last of day 6
    source = log_of(tmp_path, holdout="day", log=lambda text: None)
    assert (source.num_train, source.num_test) == (60, 10)
    np.testing.assert_array_equal(joined(source.test(100))["label"], label[60:])


def test_only_the_first_lines_can_be_taken(tmp_path):
    text, label, *_ = random_lines(70)
    write(tmp_path, text)
    source = log_of(tmp_path, max_rows=14, holdout="day")
    assert (source.num_train, source.num_test) == (12, 2)
    np.testing.assert_array_equal(joined(source.test(2))["label"], label[12:14])
    assert log_of(tmp_path).num_train == 60


def test_bad_lines_are_tolerated_up_to_the_limit_with_file_and_line(tmp_path):
    text, *_ = random_lines(70)
    path = write(tmp_path, [*text[:10], line(2), *text[10:20], "", *text[20:]])
    said = []
    source = log_of(tmp_path, max_bad_lines=2, log=said.append)
    assert [b.number for b in source.bad_lines] == [11, 22]
    report = "\n".join(said)
    assert (
        f"{path}:11: label is '2'; expected 0 or 1" in report
        and f"{path}:22: the line is empty" in report
    )
    for cache_dir in (None, tmp_path / "elsewhere"):  # what was prepared before, and a fresh one
        with pytest.raises(criteo.BadLinesError, match=r"more than 1 .*max_bad_lines") as error:
            log_of(tmp_path, max_bad_lines=1, cache_dir=cache_dir)
        assert f"{path}:22: the line is empty" in str(error.value)


def test_files_that_are_not_criteo(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"train\.txt or train\.txt\.gz"):
        log_of(tmp_path)
    text, *_ = random_lines(700)
    cut = write(tmp_path, text, name="train.txt.gz")
    cut.write_bytes(cut.read_bytes()[:-5000])
    with pytest.raises(
        criteo.BadLinesError, match=r"train\.txt\.gz:\d+: the gzip file is cut short"
    ):
        log_of(tmp_path)
    for content, message in (
        (b"", "0 lines are too few"),
        (b"x" * 40_000, "longer than"),
        (b"\n" * 200, "bad lines"),
    ):
        (tmp_path / "train.txt").write_bytes(content)
        with pytest.raises(criteo.BadLinesError, match=message):
            log_of(tmp_path)
    with pytest.raises(ValueError, match="mapping must be"):
        log_of(tmp_path, min_count=0)


# --- prepared once, whole or not at all


def test_a_second_run_does_not_read_the_text_and_a_changed_file_is_another(tmp_path, monkeypatch):
    text, *_ = random_lines(70)
    path = write(tmp_path, text)
    first = log_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(criteo_format, "parse", lambda *a, **k: pytest.fail("read the text again"))
        again = log_of(path)
        hashed = log_of(path, mapping="hash", hash_size=100)
    same(list(again.train(8)), list(first.train(8)))
    assert hashed.num_train == 60 and set(hashed.tables.values()) == {100}
    ids = joined(hashed.test(8))["ids"]
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < 100
    write(tmp_path, text * 2)
    assert log_of(tmp_path).num_train == 120


def test_an_interrupted_preparation_leaves_nothing_that_counts(tmp_path, monkeypatch):
    text, *_ = random_lines(700)
    write(tmp_path, text)
    parse = criteo_format.parse

    def killed(block, first_line):
        if first_line > 300:
            raise KeyboardInterrupt
        return parse(block, first_line)

    with monkeypatch.context() as patch:
        patch.setattr(criteo_format, "parse", killed)
        # A killed process does not tidy up either.
        patch.setattr("etils.epath.gpath._GPath.rmtree", lambda *a, **k: None)
        patch.setattr(prepared, "delete_unfinished", lambda place: None)
        with pytest.raises(KeyboardInterrupt):
            log_of(tmp_path)
    left_over = list(tmp_path.rglob("incomplete.*"))
    assert any(list(folder.glob("*array_record*")) for folder in left_over)
    source = log_of(tmp_path)
    assert source.num_train == 600 and not list(tmp_path.rglob("incomplete.*"))


def test_a_signal_while_the_folder_is_made_leaves_no_folder(tmp_path, monkeypatch):
    write(tmp_path, random_lines(700)[0])
    mkdir, made = epath.gpath._GPath.mkdir, []

    def interrupted(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        if path.name.startswith("incomplete."):
            made.append(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epath.gpath._GPath, "mkdir", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log_of(tmp_path)
    assert made and not list(tmp_path.rglob("incomplete.*"))
    assert log_of(tmp_path).num_train == 600


def test_a_file_that_changes_while_it_is_read_is_not_prepared(tmp_path, monkeypatch):
    text, *_ = random_lines(700)
    path = write(tmp_path, text)
    parse = criteo_format.parse

    def slow(block, first_line):
        os.utime(path, ns=(1, 1))
        return parse(block, first_line)

    monkeypatch.setattr(criteo_format, "parse", slow)
    with pytest.raises(criteo.BadLinesError, match="changed while it was read"):
        log_of(tmp_path)
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_a_folder_without_its_description_and_missing_files_are_refused(tmp_path):
    write(tmp_path, random_lines(700)[0])
    log_of(tmp_path)
    (folder,) = tmp_path.rglob("min_count_1/1.0.0")
    (folder / "dataset_info.json").rename(folder / "away")
    with pytest.raises(FileExistsError, match="holds no whole dataset"):
        log_of(tmp_path)
    (folder / "away").rename(folder / "dataset_info.json")
    builder = criteo_kaggle.CriteoKaggle(
        config="min_count_1", data_dir=folder.parents[2], sizes=SMALL
    )
    builder.info.metadata["num_rows"]["train"] = 10_000
    with pytest.raises(prepared.DamagedError, match="38 blocks of 16 for train's 10000 rows"):
        prepared.BlockSplit(builder, "train")


@pytest.mark.parametrize("damage", ["cut", "emptied", "a bit flipped", "deleted"])
def test_a_damaged_file_is_noticed_when_it_is_read(tmp_path, damage):
    write(tmp_path, random_lines(700)[0])
    log_of(tmp_path)
    file = next(tmp_path.rglob("min_count_1/1.0.0/*train.array_record-00000*"))
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.unlink()
    if damage != "deleted":
        file.write_bytes(
            {"cut": data[: len(data) // 2], "emptied": b"", "a bit flipped": data}[damage]
        )
    with pytest.raises(prepared.DamagedError, match=r"min_count_1.* is damaged \(.*\); delete it"):
        list(log_of(tmp_path).train(8))


def test_who_comes_second_waits_and_uses_what_the_first_prepared(tmp_path, monkeypatch):
    write(tmp_path, random_lines(700)[0])
    parses, parse, started = [], criteo_format.parse, threading.Event()

    def counted(block, first_line):
        parses.append(first_line)
        started.set()
        return parse(block, first_line)

    monkeypatch.setattr(criteo_format, "parse", counted)
    sources = []
    first = threading.Thread(target=lambda: sources.append(log_of(tmp_path)))
    first.start()
    assert started.wait(30)
    # Another process has another lock of its own, and so has another open file of the same process.
    second = threading.Thread(target=lambda: sources.append(log_of(tmp_path)))
    second.start()
    first.join(60)
    second.join(60)
    assert len(parses) == len(set(parses))
    same(*(list(source.train(64)) for source in sources))


def test_preparing_leaves_no_temporary_folder_and_asks_no_network(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("temporary", "data")]
    for place in places:
        place.mkdir()
    write(places[1], random_lines(1400)[0])
    monkeypatch.setattr(tempfile, "tempdir", str(places[0]))
    criteo.CriteoLog(places[1], log=lambda text: None)
    assert not list(places[0].iterdir())


PREPARE = """
import sys
from experiments.data import criteo
source = criteo.CriteoLog(sys.argv[1], log=lambda text: None)
assert "tensorflow" not in sys.modules
print(source.num_train, next(source.train(64))["ids"].sum())
"""


@pytest.mark.slow
def test_two_processes_prepare_at_once_without_tensorflow(tmp_path):
    write(tmp_path, random_lines(1400)[0])
    command = [sys.executable, "-W", "error", "-c", PREPARE, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in running]
    assert (
        [process.returncode for process in running] == [0, 0]
        and said[0] == said[1]
        and said[0].startswith("1200 ")
    )


# --- as tensorflow-datasets' own users would


def test_the_builder_reads_the_manual_folder(tmp_path):
    text, _, dense, categories = random_lines(700)
    (tmp_path / "manual").mkdir()
    manual = tfds.download.DownloadConfig(manual_dir=tmp_path / "manual")
    builder = criteo_kaggle.CriteoKaggle(data_dir=tmp_path, log=lambda text: None, sizes=SMALL)
    with pytest.raises(AssertionError, match=r"Put train.txt or train\.txt\.gz"):
        builder.download_and_prepare(download_config=manual)
    write(tmp_path / "manual", text, name="train.txt.gz")
    builder.download_and_prepare(download_config=manual)
    assert builder.info.metadata["num_rows"] == {"train": 600, "validation": 50, "test": 50}
    assert (
        builder.info.metadata["source"][0] == "train.txt.gz"
        and builder.info.splits["train"].num_shards == 9
    )
    records = list(builder.as_data_source("train"))
    assert [len(r["label"]) for r in records] == [16] * 37 + [8]
    np.testing.assert_array_equal(joined(records)["categories"], categories[:600])
    numbered = criteo_kaggle.CriteoKaggle(
        config=criteo_kaggle.by_dictionary(3), data_dir=tmp_path, sizes=SMALL
    )
    numbered.download_and_prepare(download_config=manual)
    assert numbered.info.metadata["tables"]["C1"] <= 52
    np.testing.assert_array_equal(joined(numbered.as_data_source("test"))["dense"], dense[650:])


# --- numbering


def number(raw, num_train, min_count, rows_together):
    counts = numbering.Counts(1, rows_together)
    for at in range(0, num_train, 2):
        counts.add(raw[at : min(at + 2, num_train), None])
    (dictionary,) = counts.dictionaries(min_count)
    return numbering.number_by_dictionary(raw, dictionary).tolist(), numbering.vocabulary_size(
        dictionary
    )


@pytest.mark.parametrize("rows_together", [1, 3, 1000])
def test_rare_values_share_one_id_and_the_last_day_does_not_count(rows_together):
    raw = np.array([7, 7, 7, 5, 5, 0, 9, 9, 9, 9], np.uint32)
    assert number(raw, 7, 2, rows_together) == ([3, 3, 3, 2, 2, 0, 1, 1, 1, 1], 4)
    assert number(raw, 7, 100, rows_together) == ([1, 1, 1, 1, 1, 0, 1, 1, 1, 1], 2)


def test_hashed_ids_fill_their_table_and_keep_missing_apart():
    raw = np.stack([np.arange(100_000, dtype=np.uint32)] * 2, axis=1)
    ids = numbering.number_by_hash(raw, 1001)
    assert not ids[0].any() and ids[1:].min() == 1 and ids.max() == 1000
    counts = np.bincount(ids[1:, 0], minlength=1001)[1:]
    assert (
        0.8 < counts.var() / counts.mean() < 1.2
    )  # Poisson: variance equals mean, up to 5 sigma of n = 1000
    assert np.mean(ids[:, 0] == ids[:, 1]) < 0.01


# --- the words of the text as they are


def test_raw_words_are_those_of_the_text_and_are_not_counted(tmp_path, monkeypatch):
    text, _, dense, categories = random_lines(700, vocabulary=220)
    assert categories.max() > 2**31
    write(tmp_path, text)
    monkeypatch.setattr(numbering, "Counts", lambda *_: pytest.fail("it counts"))
    source, again = (log_of(tmp_path, mapping="raw", holdout="day") for _ in range(2))
    test, seen = joined(source.test(64)), joined(source.train(64, seed=3))
    np.testing.assert_array_equal(test["ids"], categories[600:])
    assert test["ids"].dtype == seen["ids"].dtype == np.uint32
    words = {row.tobytes(): ids for row, ids in zip(dense, categories, strict=True)}
    assert len(words) == 700
    want = [words[row.tobytes()] for row in seen["dense"]]
    np.testing.assert_array_equal(seen["ids"], want)
    same(list(again.train(64, seed=3)), list(source.train(64, seed=3)))
    assert [path.parent.name for path in tmp_path.rglob("1.0.0")] == ["raw"]


# --- the main job


@OPTAX_ADAM
@pytest.mark.exhaustive
def test_the_main_job_reads_criteo(tmp_path, monkeypatch):
    """The whole run trains on other data, and reads Criteo's text in other tests of this file."""
    write(tmp_path, random_lines(1400)[0], name="train.txt.gz")
    settings = train_dlrm.Settings(
        data="criteo", path=tmp_path, mapping="hash", hash_size=200, hashed_baseline=False,
        batch_size=128, hidden=(32, 16), cache_fraction=0.3, out=tmp_path / "out",
    )  # fmt: skip
    record = train_dlrm.run(settings)
    assert record["outcomes"][0]["num_steps"] == 1200 // 128


@OPTAX_ADAM
@pytest.mark.exhaustive
def test_the_main_job_trains_on_the_words_of_the_text(tmp_path, monkeypatch):
    """Without a dictionary; two runs over one text agree.

    The whole command reads a text in the test above, and trains raw ids in
    test_the_main_job_trains_on_raw_ids_of_movielens of test_movielens.py.
    """
    write(tmp_path, random_lines(1400, vocabulary=220)[0])
    monkeypatch.setattr(numbering, "Counts", lambda *_: pytest.fail("it counts"))
    words = ["--data", "criteo", "--path", str(tmp_path), "--ids", "raw", "--pool-rows", "3000"]
    words += ["--batch-size", "128", "--hidden", "32", "16", "--cache-fraction", "0.3"]
    records = []
    for out in (tmp_path / "one", tmp_path / "two"):
        assert train_dlrm.main([*words, "--out", str(out)]) == 0
        records.append(json.loads((out / "criteo.json").read_text())["outcomes"])
        assert (out / "criteo.png").stat().st_size > 10_000
        table = " ".join((out / "criteo.txt").read_text().split())
        assert "INT8 + 30 %, raw ids from 2 on" in table and "rows of the same pool" in table
    full, ours, hashed = records[0]
    assert full["contender"]["name"] == "FP32, raw ids from 2 on"
    assert [full["contender"][k] for k in ("storage", "pool_rows")] == ["float32", 3000]
    assert ours["ratio"] > 1.2 and 0.85 < full["ratio"] < 1
    assert hashed["embedding_bytes"] == pytest.approx(ours["embedding_bytes"], rel=0.01)
    for one, two in zip(*records, strict=True):
        for name in ("auc", "log_loss", "losses", "hit_rate", "embedding_bytes"):
            assert one[name] == two[name]
    assert not list(tmp_path.rglob("min_count*"))
