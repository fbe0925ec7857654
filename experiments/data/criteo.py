"""Criteo-Kaggle from the raw `train.txt` of the Display Advertising Challenge, plain or gzipped, from a user's folder.

The text (11 GB) is read once, in blocks, into one binary file per column beside it (7 GB, some minutes); later runs with
the same file start from those. Ids are then numbered, by a dictionary of the training days or by hashing, into another
5 GB that depends on the mapping. As in DLRM's own reader the seven days are seven equal parts by row position,
the last one is held out and its halves are validation and test, and integers become log(x + 1). Criteo's terms forbid
passing the data on, so nothing here downloads it. Bad lines are reported by file and line number.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data import criteo_format
from experiments.data.hashing import fmix32

NAMES = ("train.txt", "train.txt.gz")
NUM_DAYS = 7
CHUNK = 4096  # rows read together
CHUNKS_SHUFFLED = 64  # chunks from random places whose rows are shuffled together
SHOWN = 10  # bad lines quoted in a report
CATEGORIES = criteo_format.COLUMNS[1 + criteo_format.NUM_DENSE :]


class BadLinesError(ValueError):
    """More lines are bad than the limit tolerates, or the file as a whole is not in Criteo's format."""


def find(path: Path | str) -> Path:
    """Returns the file: `path` itself, or train.txt or train.txt.gz in it.

    Raises:
      FileNotFoundError: saying what was looked for.
    """
    path = Path(path).expanduser()
    for place in (path, *(path / name for name in NAMES)):
        if place.is_file():
            return place
    raise FileNotFoundError(f"{path} is neither a file nor a folder with {' or '.join(NAMES)}")


def _quote(file: Path, bad: list) -> str:
    return "\n".join(f"  {file}:{number}: {reason}" for number, reason in bad[:SHOWN])


def convert(
    file: Path, target: Path, *, max_bad_lines: int, max_rows: int | None = None, log: Callable[[str], None] = print
) -> dict:
    """Reads the text into `target`: label.u8, dense.f32 [N, 13], C1.u32 .. C26.u32 and, written last, meta.json.

    Args:
      file: the text.
      target: a folder, made if missing; what it holds from an earlier, interrupted run is overwritten.
      max_bad_lines: how many bad lines are skipped; one more is an error.
      max_rows: stop after this many good lines.
      log: takes lines of progress and the report of bad lines.

    Returns:
      The contents of meta.json: num_rows, num_lines, bad (number and reason of each bad line).

    Raises:
      BadLinesError: with file and line numbers.
      PermissionError: if the folder cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot write {target} ({error}); name a writable folder with cache_dir") from error
    num_rows, num_lines, bad, told = 0, 0, [], 0
    names = ("label.u8", "dense.f32", *(f"{name}.u32" for name in CATEGORIES))
    out = {name: (target / name).open("wb") for name in names}
    try:
        with criteo_format.open_file(file) as source:
            for block in criteo_format.read_blocks(source):
                rows = criteo_format.parse(block, num_lines + 1)
                num_lines += rows.num_lines
                bad += rows.bad
                if len(bad) > max_bad_lines:
                    raise BadLinesError(
                        f"{file} has more than {max_bad_lines} bad lines (max_bad_lines) among its first {num_lines}:\n"
                        f"{_quote(file, bad)}"
                    )
                keep = len(rows.label) if max_rows is None else min(len(rows.label), max_rows - num_rows)
                rows.label[:keep].tofile(out["label.u8"])
                np.ascontiguousarray(rows.dense[:keep], np.float32).tofile(out["dense.f32"])
                for t, name in enumerate(CATEGORIES):
                    np.ascontiguousarray(rows.categories[:keep, t]).tofile(out[f"{name}.u32"])
                num_rows += keep
                if num_rows == max_rows:
                    break
                if num_rows - told >= 5_000_000:
                    told = num_rows
                    log(f"{file.name}: {num_rows:,} rows read")
    except (EOFError, gzip.BadGzipFile) as error:
        raise BadLinesError(f"{file}:{num_lines + 1}: the gzip file is cut short or damaged: {error}") from error
    except BadLinesError:
        raise
    except ValueError as error:
        raise BadLinesError(f"{file}:{num_lines + 1}: {error}") from error
    finally:
        for handle in out.values():
            handle.close()
    if num_rows < NUM_DAYS:
        raise BadLinesError(f"{file} has {num_rows} good lines, fewer than one per day\n{_quote(file, bad)}".rstrip())
    meta = {"num_rows": num_rows, "num_lines": num_lines, "bad": bad}
    (target / "meta.json").write_text(json.dumps(meta))
    return meta


def number_by_dictionary(raw: np.ndarray, num_train: int, min_count: int) -> tuple[np.ndarray, int]:
    """Numbers the values that the training rows have at least `min_count` times, in order of value, from 2 on.

    Args:
      raw: u32 [N]; 0 is missing.
      num_train: rows that may count: the dictionary never sees the held-out day.
      min_count: rarer and new values share one id.

    Returns:
      ids i32 [N], 0 for missing and 1 for rare, and the vocabulary size.
    """
    values, counts = np.unique(raw[:num_train], return_counts=True)
    kept = values[(counts >= min_count) & (values != 0)]
    ids = np.ones(len(raw), np.int32)
    for at in range(0, len(raw) if len(kept) else 0, 1 << 20):
        block = raw[at : at + (1 << 20)]
        place = np.minimum(np.searchsorted(kept, block), len(kept) - 1)
        ids[at : at + (1 << 20)] = np.where(kept[place] == block, place + 2, 1)
    ids[raw == 0] = 0
    return ids, 2 + len(kept)


def number_by_hash(raw: np.ndarray, hash_size: int, salt: int) -> tuple[np.ndarray, int]:
    """Hashes u32 [N] to ids i32 [N] in [1, hash_size), a different hash per salt, and keeps 0 for missing."""
    x = fmix32(raw ^ np.uint32(salt * 0x9E3779B1 & 0xFFFFFFFF))
    return np.where(raw == 0, 0, 1 + x % np.uint32(hash_size - 1)).astype(np.int32), hash_size


class CriteoLog:
    """The source.

    Args:
      path: train.txt, train.txt.gz, or the folder that holds one.
      cache_dir: where the binary columns go; None: `mpembed_cache` in the folder of the text.
      mapping: "dictionary" or "hash".
      min_count: dictionary: values seen fewer times in training share one id.
      hash_size: hash: vocabulary size of every table.
      max_bad_lines: bad lines skipped before giving up.
      max_rows: use only the first rows of the file; None: all.
      holdout: "test" or "validation", a half of the last day, or "day", all of it.
      log: takes lines of progress and the report of bad lines.

    Raises:
      FileNotFoundError: if there is no such file.
      BadLinesError: if too many lines are bad.
      ValueError: on a mapping that makes no sense.
    """

    name = "criteo"
    num_dense = criteo_format.NUM_DENSE
    bags: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path | str,
        *,
        cache_dir: Path | str | None = None,
        mapping: Literal["dictionary", "hash"] = "dictionary",
        min_count: int = 1,
        hash_size: int = 1_000_000,
        max_bad_lines: int = 100,
        max_rows: int | None = None,
        holdout: Literal["test", "validation", "day"] = "test",
        log: Callable[[str], None] = print,
    ):
        if mapping not in ("dictionary", "hash") or min_count < 1 or not 3 <= hash_size < 2**31 - 1:
            raise ValueError(
                f'mapping must be "dictionary" with min_count >= 1 or "hash" with 3 <= hash_size < 2**31 - 1, '
                f"got {mapping!r}, min_count={min_count}, hash_size={hash_size}"
            )
        file = find(path)
        seen = file.stat()
        name = hashlib.sha256(f"{file.name} {seen.st_size} {seen.st_mtime_ns} {max_rows}".encode()).hexdigest()[:16]
        self.folder = Path(cache_dir or file.parent / "mpembed_cache") / name
        done = self.folder / "meta.json"
        if done.is_file():
            meta = json.loads(done.read_text())
        else:
            meta = convert(file, self.folder, max_bad_lines=max_bad_lines, max_rows=max_rows, log=log)
        self.bad_lines = [criteo_format.BadLine(*line) for line in meta["bad"]]
        if len(self.bad_lines) > max_bad_lines:
            raise BadLinesError(
                f"{file} has {len(self.bad_lines)} bad lines, more than {max_bad_lines} (max_bad_lines):\n"
                f"{_quote(file, self.bad_lines)}"
            )
        if self.bad_lines:
            more = f"\n  and {len(self.bad_lines) - SHOWN} more" if len(self.bad_lines) > SHOWN else ""
            log(f"{len(self.bad_lines)} bad lines skipped:\n{_quote(file, self.bad_lines)}{more}")
        num_rows = meta["num_rows"]
        self.num_train = num_rows * (NUM_DAYS - 1) // NUM_DAYS
        half = (self.num_train + num_rows + 1) // 2
        bounds = {"validation": (self.num_train, half), "test": (half, num_rows), "day": (self.num_train, num_rows)}
        self.held_out = bounds[holdout]
        self.num_test = self.held_out[1] - self.held_out[0]
        self._number(mapping, min_count, hash_size, log)
        self.label = np.memmap(self.folder / "label.u8", np.uint8, "r")
        self.dense = np.memmap(self.folder / "dense.f32", np.float32, "r", shape=(num_rows, self.num_dense))

    def _number(self, mapping: str, min_count: int, hash_size: int, log: Callable[[str], None]) -> None:
        """Maps every category column to ids, once per file and mapping, and opens the results."""
        folder = self.folder / (f"min_count_{min_count}" if mapping == "dictionary" else f"hash_{hash_size}")
        folder.mkdir(exist_ok=True)
        done = folder / "sizes.json"
        if not done.is_file():
            log(f"numbering the ids of {len(CATEGORIES)} columns by {mapping}")
            sizes = {}
            for t, name in enumerate(CATEGORIES):
                raw = np.fromfile(self.folder / f"{name}.u32", np.uint32)
                if mapping == "dictionary":
                    ids, sizes[name] = number_by_dictionary(raw, self.num_train, min_count)
                else:
                    ids, sizes[name] = number_by_hash(raw, hash_size, t + 1)
                ids.tofile(folder / f"{name}.i32")
            done.write_text(json.dumps(sizes))
        self.tables: dict[str, int] = json.loads(done.read_text())
        self.ids = [np.memmap(folder / f"{name}.i32", np.int32, "r") for name in CATEGORIES]

    def _rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.stack([column[first:last] for column in self.ids], axis=1)
        return np.asarray(self.dense[first:last]), ids, self.label[first:last].astype(np.float32)

    def train(self, batch_size: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields the full batches of the first six days: chunks from random places, their rows shuffled together."""
        rng = np.random.default_rng([seed, 4])
        starts = rng.permutation(np.arange(0, self.num_train, CHUNK))
        rest = self._rows(0, 0)
        for at in range(0, len(starts), CHUNKS_SHUFFLED):
            parts = [self._rows(s, min(s + CHUNK, self.num_train)) for s in starts[at : at + CHUNKS_SHUFFLED]]
            merged = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
            order = rng.permutation(len(merged[2]))
            merged = [np.concatenate([old, new[order]]) for old, new in zip(rest, merged, strict=True)]
            full = len(merged[2]) // batch_size * batch_size
            for b in range(0, full, batch_size):
                dense, ids, label = (a[b : b + batch_size] for a in merged)
                yield {"dense": dense, "ids": ids, "label": label}
            rest = [a[full:] for a in merged]

    def test(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields the held-out rows in their order, the last batch possibly short."""
        first, last = self.held_out
        for at in range(first, last, batch_size):
            dense, ids, label = self._rows(at, min(at + batch_size, last))
            yield {"dense": dense, "ids": ids, "label": label}
