"""Mutated files of a stranger: each is refused or right.

They are a checkpoint, a Criteo cache, a parquet file and a file for serving.

    python -m experiments.faults.run --only mutations

A worker reads one mutated file after another and says so. If it dies or hangs, the mutation that it
was reading is named, and another worker goes on behind it. Checksums that would hide a mutation
from the code behind them are computed anew in most of the mutations.
"""

import copy
import dataclasses
import functools
import json
import logging
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import tensorflow_datasets as tfds

import mpembed_jax as mpembed
from experiments import provenance, running
from experiments.data import criteo, prepared, reddit
from experiments.faults.training import bits_of, marked_step
from mpembed_jax import checkpoint, serving
from mpembed_jax.serving import container

PATIENCE_S = 120  # for one mutated file, before it counts as a hang
MAX_GROWTH_MB = 256  # of a worker's memory, over all of its files; the largest array has 0.2 MB

# What a field of JSON is replaced by.
_ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 2**31, 2**53, 2**63, 10**11, 10**30, 1.5, float("nan"), float("inf"),
    "", ".", "..", "../../outside", "/etc/passwd", "a/b", "x" * 300, "\x00", "float64", "O", "str",
    [], [[]], [10**11], [0], [-1], [1, 2, 3], {}, {"id": "blosc"}, {"id": "zstd", "level": 10**9},
)  # fmt: skip


# --- mutations


def flip(content: bytes, rng: random.Random) -> bytes:
    """Changes, inserts, removes or repeats some bytes."""
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(changed))
        match rng.randrange(7):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 1, 127, 128, 255))
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                del changed[at : at + rng.randint(1, 8)]
            case 4:
                changed = changed[:at]
            case 5:
                changed[at : at + 8] = rng.randbytes(8)
            case _:
                changed += changed[at : at + 64]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) of a JSON document."""
    found: list[tuple[Any, Any]] = []
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        found.append((document, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


def twist(document: Any, rng: random.Random) -> Any:
    """Replaces, removes, renames or swaps fields of a JSON document; returns a new one."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(document)
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(rng.choice(_ODD))] = holder.pop(key)
            case 2 | 3:
                other, other_key = rng.choice(places)
                holder[key] = json.loads(json.dumps(other[other_key]))
            case 4 if type(holder[key]) is int:
                holder[key] += rng.choice((-1, 1, 255, 2**32))
            case _:
                holder[key] = copy.deepcopy(rng.choice(_ODD))  # a list could get into itself
    return document


# --- a checkpoint


_SPEC = mpembed.EmbeddingSpec(
    [mpembed.TableSpec("a", 300), mpembed.TableSpec("b", 7)],
    4,
    "int8",
    mpembed.CacheSpec(num_rows=32, ways=2),
)
_OTHER_SPEC = dataclasses.replace(
    _SPEC, storage="int4", cache=mpembed.CacheSpec(num_rows=16, ways=2)
)
_TX = mpembed.optim.rowwise_adagrad(0.5)


_train_step = jax.jit(functools.partial(marked_step, tx=_TX))


def _ids(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, _SPEC.num_rows, 16).astype(np.int32)


def _tree(state: Any, position: int) -> dict[str, Any]:
    plain = {"position": position, "name": "run", "state": b"\x00\xff", "loss": 0.5, "on": True}
    return {"emb": state, "key": jax.random.key(1), "w": np.arange(25_000.0), "plain": plain}


class Checkpoint:
    """A checkpoint in full (step 1) and an increment (step 2), in a folder that is mutated."""

    def __init__(self, folder: Path) -> None:
        """Saves both."""
        self.directory = folder / "run"
        state = mpembed.init(jax.random.key(0), _SPEC, _TX)
        self.trees = {}
        for step in (1, 2):
            before = state
            state, tracker = _train_step(state, checkpoint.track(state), _ids(step))
            self.trees[step] = _tree(state, step)
            is_first = step == 1
            checkpoint.save(
                self.directory, step, self.trees[step], tracker=None if is_first else tracker
            )
            del before
        self.bits = {step: bits_of(_plain(tree)) for step, tree in self.trees.items()}
        targets = [mpembed.init(jax.random.key(9), spec, _TX) for spec in (_SPEC, _OTHER_SPEC)]
        self.targets = [_tree(target, 0) for target in targets]
        self.files = sorted(p for p in self.directory.rglob("*/*") if p.is_file())
        self.kept = {path: path.read_bytes() for path in self.files}

    def mutate(self, rng: random.Random) -> bool:
        """Mutates a file or a name; returns whether its bytes alone may still be called good."""
        path = rng.choice(self.files)
        folder = self.directory / path.relative_to(self.directory).parts[0]
        match rng.randrange(8):
            case 0 | 1:
                path.write_bytes(flip(self.kept[path], rng))
                return False
            case 2 | 3:
                self._with_sums(folder, {path: flip(self.kept[path], rng)}, rng)
            case 4 | 5:
                self._with_sums(folder, {}, rng, is_twisted=True)
            case 6:
                layouts = [p for p in self.files if p.name == ".zarray" and folder in p.parents]
                path = rng.choice(layouts)
                text = json.dumps(twist(json.loads(self.kept[path]), rng)).encode()
                self._with_sums(folder, {path: text}, rng)
            case _:
                path.unlink()
                match rng.randrange(4):
                    case 0:
                        path.symlink_to("/dev/zero")
                    case 1:
                        path.symlink_to(rng.choice(self.files))
                    case 2:
                        os.mkfifo(path)
                    case _:
                        path.mkdir()
        return True

    def _with_sums(
        self, folder: Path, changed: dict[Path, bytes], rng: random.Random, is_twisted: bool = False
    ) -> None:
        """Writes files, and a manifest with their checksums."""
        place = folder / "manifest.json"
        if place in changed:
            place.write_bytes(changed[place])
            return
        body = json.loads(json.loads(self.kept[place])["body"])
        for path, content in changed.items():
            path.write_bytes(content)
            name = str(path.relative_to(folder))
            if name in body["files"]:
                body["files"][name] = [len(content), zlib.crc32(content)]
        if is_twisted:
            body = twist(body, rng)
        text = json.dumps(body, sort_keys=True)
        place.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "body": text}))

    def restore_files(self) -> None:
        """Undoes the mutation."""
        for path, content in self.kept.items():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or not path.is_file():
                path.unlink(missing_ok=True)
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)

    def read(self, rng: random.Random, may_differ: bool) -> str:
        """Restores; returns "refused" or "right".

        Raises:
          AssertionError: if it is neither.
        """
        step = rng.choice((1, 2, 2))
        is_same = rng.random() < 0.6
        target = self.targets[0 if is_same else 1]
        try:
            tree = checkpoint.restore(self.directory, target, step=step)
        except (checkpoint.CheckpointError, ValueError) as error:
            assert str(error), "an error without words"
            return f"refused ({type(error).__name__})"
        if not may_differ and is_same:
            assert bits_of(_plain(tree)) == self.bits[step], "other bits, without a word"
        assert jax.tree.structure(tree) == jax.tree.structure(target)
        for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(target), strict=True):
            assert type(leaf) is type(like)
            if hasattr(like, "dtype"):
                assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        if not bool(tree["emb"].pending):
            tracker = checkpoint.track(tree["emb"])
            jax.block_until_ready(_train_step(tree["emb"], tracker, _ids(3)))
        return "right"


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "key": jax.random.key_data(tree["key"]), "plain": 0}


# --- a Criteo cache and a parquet file


class Files:
    """Files whose bytes, and fields where they are JSON, are mutated."""

    def __init__(self, files: list[Path]) -> None:
        """Keeps their contents."""
        self.kept = {path: path.read_bytes() for path in files}

    def mutate(self, rng: random.Random) -> bool:
        """Mutates one file."""
        path = rng.choice(sorted(self.kept))
        content = self.kept[path]
        if path.suffix == ".json" and rng.random() < 0.7:
            content = json.dumps(twist(json.loads(content), rng)).encode()
        else:
            content = flip(content, rng)
        path.write_bytes(content)
        return True

    def restore_files(self) -> None:
        """Undoes the mutation."""
        for path, content in self.kept.items():
            path.write_bytes(content)


class CriteoCache(Files):
    """The two datasets that are prepared from a text of Criteo's format."""

    def __init__(self, folder: Path) -> None:
        """Prepares them."""
        rng = np.random.default_rng(0)
        lines = [
            "\t".join([str(rng.integers(2)), *["3"] * 13, *[f"{n:08x}" for n in row]])
            for row in rng.integers(0, 40, (280, 26))
        ]
        self.text = folder / "train.txt"
        self.text.write_text("\n".join(lines))
        self._source()
        super().__init__([p for p in (folder / "mpembed_cache").rglob("*") if p.is_file()])

    def _source(self) -> criteo.CriteoLog:
        return criteo.CriteoLog(self.text, log=lambda _: None)

    def read(self, rng: random.Random, may_differ: bool) -> str:
        """Reads everything; returns "refused" or "right"."""
        del rng, may_differ
        # tensorflow-datasets keeps every builder for ever, 10 KB each, for the sake of this
        # property. They would be counted as memory that a mutated file takes.
        tfds.core.DatasetBuilder.info.fget.cache_clear()
        try:
            source = self._source()
            sizes = list(source.tables.values())
            taken = [*source.train(16), *source.test(16)]
        except (ValueError, OSError, prepared.DamagedError) as error:
            assert str(error), "an error without words"
            return f"refused ({type(error).__name__})"
        for batch in taken:
            assert batch["ids"].dtype == np.int32 and batch["ids"].shape[1:] == (26,)
            assert batch["dense"].dtype == np.float32 and batch["dense"].shape[1:] == (13,)
            assert len(batch["label"]) == len(batch["ids"]) == len(batch["dense"]) <= 16
            assert (batch["ids"] >= 0).all() and (batch["ids"] < sizes).all(), "ids out of range"
        return "right"


class Posts(Files):
    """A parquet file of posts."""

    def __init__(self, folder: Path) -> None:
        """Writes it."""
        rng = np.random.default_rng(0)
        times = rng.integers(reddit.TEST_FROM - 10**6, reddit.TEST_FROM + 10**6, 300)
        words = np.array(["a", "jax", "table", "row", "cache", "the", "of"])
        self.path = folder / reddit.FILE.name
        pl.DataFrame(
            {
                "created_utc": times,
                "subreddit": words[rng.integers(0, 7, 300)],
                "domain": words[rng.integers(0, 7, 300)],
                "is_self": rng.random(300) < 0.5,
                "num_comments": rng.integers(0, 30, 300),
                "title": [" ".join(words[row]) for row in rng.integers(0, 7, (300, 4))],
            }
        ).write_parquet(self.path)
        super().__init__([self.path])

    def read(self, rng: random.Random, may_differ: bool) -> str:
        """Reads it; returns "refused" or "right"."""
        del rng, may_differ
        try:
            source = reddit.RedditPosts(self.path)
            taken = [*source.train(16), *source.test(16)]
        except (ValueError, OSError) as error:
            assert str(error), "an error without words"
            return f"refused ({type(error).__name__})"
        for batch in taken:
            assert batch["label"].dtype == np.float32
        return "right"


# --- a file for serving


class Serving:
    """A file for serving with two tables, one of 32-bit and one of 16-bit words."""

    _DIM = 5

    def __init__(self, folder: Path) -> None:
        """Writes it."""
        self.path = folder / "tables.serving"
        states = {
            storage: mpembed.init(
                jax.random.key(number),
                mpembed.EmbeddingSpec([mpembed.TableSpec(storage, 40)], self._DIM, storage),
                _TX,
            )
            for number, storage in enumerate(("int8", "bfloat16"))
        }
        serving.save(self.path, states)
        self.kept = self.path.read_bytes()
        opened = container.open_file(self.path)
        self.contents, self.arrays = opened.contents, len(self.kept) - len(opened.data)
        self.ids = {name: np.arange(-2, 45) for name in states}
        self.rows = serving.load(self.path).lookup(self.ids)

    def mutate(self, rng: random.Random) -> bool:
        """Mutates the file; returns whether other rows than those that were saved may be right."""
        head, data = self.kept[: self.arrays], self.kept[self.arrays :]
        match rng.randrange(4):
            case 0:
                content = flip(self.kept, rng)
            case 1:  # a description with its checksum
                header = json.loads(head[8:])
                text = json.dumps(twist(json.loads(header["__metadata__"][container.OURS]), rng))
                metadata = {container.OURS: text, "crc32": str(zlib.crc32(text.encode()))}
                content = self._with_header(header | {"__metadata__": metadata}) + data
            case 2:  # places of arrays
                content = self._with_header(twist(json.loads(head[8:]), rng)) + data
            case _:  # other tables, said in every place, and not those of the arrays
                table = rng.choice(self.contents.tables)
                number = rng.choice((-1, 0, 1, 3, 39, 41, 2**20, 2**20 + 1, 2**31 - 2, 2**62))
                changed = [
                    table._replace(num_rows=number),
                    table._replace(embedding_dim=max(1, number)),
                    table._replace(name=str(rng.choice(_ODD))),
                    table._replace(format=rng.choice(self.contents.tables).format),
                ]
                tables = tuple(
                    rng.choice(changed) if other is table else other
                    for other in self.contents.tables
                )
                contents = dataclasses.replace(self.contents, tables=tables)
                content = container.padded_header(contents, container.header_room(contents)) + data
        self.path.write_bytes(content)
        self.is_changed = self._unpadded(content) != self._unpadded(self.kept)
        return False

    def _unpadded(self, content: bytes) -> tuple[bytes, bytes]:
        """Returns the header without its padding, which may have any length, and the arrays."""
        end = 8 + int.from_bytes(content[:8], "little")
        return content[8:end].rstrip(b" "), content[end:]

    def _with_header(self, header: Any) -> bytes:
        text = json.dumps(header).encode()
        room = -(-(8 + len(text)) // 64) * 64
        return (room - 8).to_bytes(8, "little") + text.ljust(room - 8)

    def restore_files(self) -> None:
        """Undoes the mutation."""
        self.path.write_bytes(self.kept)

    def read(self, rng: random.Random, may_differ: bool) -> str:
        """Checks every byte, loads and looks up; returns "refused" or "right".

        A file that only `verify` refuses is loaded and read all the same.

        Raises:
          AssertionError: if it is neither.
        """
        del rng, may_differ
        refusal = None
        try:
            contents = serving.verify(self.path)
        except serving.ServingError as error:
            assert str(error), "an error without words"
            refusal = "refused (ServingError)"
        try:
            tables = serving.load(self.path, implementation="numpy")
        except serving.ServingError:
            assert refusal, "verified, and refused when loaded"
            return refusal
        for feature, owner in tables.contents.features:
            table = tables.table(owner)
            rows = tables.lookup({feature: np.array([0, table.num_rows - 1, -5])})[feature]
            assert rows.shape == (3, table.embedding_dim) and rows.dtype == np.float32
        if refusal:
            return f"{refusal}, by verify only"
        if contents == self.contents:
            found = tables.lookup(self.ids)
            for name, rows in self.rows.items():
                assert np.array_equal(found[name], rows), "other rows, without a word"
        assert not self.is_changed or contents != self.contents, "a change that nothing noticed"
        return "right"


# --- a worker and its launcher

KINDS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": Checkpoint,
    "criteo cache": CriteoCache,
    "parquet": Posts,
    "serving": Serving,
}


def work(kind: str, first: int, last: int) -> None:
    """Reads mutated files, and says on stdout what became of each."""
    for name in ("absl", "mpembed_jax.checkpoint"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    say = functools.partial(print, file=os.fdopen(os.dup(1), "w"), flush=True)
    os.dup2(2, 1)  # libraries write to stdout, too
    with tempfile.TemporaryDirectory() as folder:
        subject = KINDS[kind](Path(folder))
        before = 0
        for number in range(first, last):
            rng = random.Random(number)
            say(json.dumps({"reads": number}))
            may_differ = subject.mutate(rng)
            try:
                found = subject.read(rng, may_differ)
            except Exception as error:
                found = f"WRONG {type(error).__name__}: {error}"[:500]
            subject.restore_files()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            before = peak if number < first + 200 else before  # programs are compiled at first
            say(json.dumps({"found": found, "growth_mb": peak - before}))


def many(kind: str, files: int, first: int = 0) -> dict[str, Any]:
    """Reads mutated files in workers; returns counts.

    Raises:
      AssertionError: naming the first mutations that ended otherwise than refused or right, and
      how.
    """
    counts: dict[str, int] = {}
    wrong, growth, number, last = [], 0, first, first + files
    while number < last:
        command = [
            sys.executable,
            "-m",
            "experiments.faults.mutations",
            kind,
            str(number),
            str(last),
        ]
        with (
            tempfile.TemporaryFile("w+") as errors,
            running.started(
                command,
                cwd=provenance.ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as worker,
        ):
            assert worker.stdout is not None
            reading, why = number - 1, "died"
            while True:
                if not select.select([worker.stdout], [], [], PATIENCE_S)[0]:
                    worker.kill()
                    why = f"read for {PATIENCE_S} s"
                    break
                if not (line := worker.stdout.readline()):
                    break
                said = json.loads(line)
                if "reads" in said:
                    reading = said["reads"]
                    continue
                found, growth = said["found"], max(growth, said["growth_mb"])
                number = reading + 1
                if found.startswith("WRONG"):
                    wrong.append(f"{reading}: {found}")
                counts[found.split(":")[0]] = counts.get(found.split(":")[0], 0) + 1
            worker.wait()
            if number < last:
                errors.seek(0)
                assert reading >= number, errors.read()[-3000:]
                wrong.append(f"{reading}: the worker {why} ({worker.returncode})")
                number = reading + 1
    assert not wrong, f"{len(wrong)} of {files} mutated files of kind {kind}: {wrong[:20]}"
    assert growth <= MAX_GROWTH_MB, f"memory grew by {growth} MB while reading mutated files"
    return {"files": files, **counts, "memory grew by MB": growth}


if __name__ == "__main__":
    kind, first, last = running.words_from("faults.run", str, int, int)
    work(kind, first, last)
