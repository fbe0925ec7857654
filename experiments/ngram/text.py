"""Source code as text for a small language model: Python's own standard library, or any folder.

A text is split into parts of names, digits, signs and indented line ends. The most frequent pieces
are tokens; any other piece is spelled in UTF-8 bytes, so that nothing is lost. Files are in the
order of a hash of their names, and a sixteenth of them, by another hash, is for validation.
"""

import collections
import hashlib
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

BOUNDARY = 0  # the token before each file
_FIRST_WORD = 1 + 256  # tokens 1 .. 256 are bytes
# Parts of names with the space before them, digits, ends of lines with the indentation after them.
_PIECE = re.compile(r" ?(?:[A-Z]?[a-z]+|[A-Z]+(?![a-z]))|\d|\n *| +|.", re.DOTALL)
_VALIDATION_SHARE = 16


class TooShortError(ValueError):
    """Raised if there is too little text to train and to validate."""


class Text(NamedTuple):
    """Tokens of all files one after another, each after a BOUNDARY."""

    train: np.ndarray  # i32 [N]
    validation: np.ndarray  # i32 [M]
    words: tuple[str, ...]  # the pieces that are tokens, from token 257 on

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return _FIRST_WORD + len(self.words)

    @property
    def identity(self) -> dict[str, int | str]:
        """What a result depends on, ready for JSON."""
        digest = hashlib.blake2b(self.train.tobytes() + self.validation.tobytes(), digest_size=8)
        sizes = {"train": len(self.train), "validation": len(self.validation)}
        return {**sizes, "vocabulary": self.vocabulary_size, "digest": digest.hexdigest()}

    def spelled(self, token: int) -> bytes:
        """Returns a token as UTF-8: a whole piece, one byte of a piece, or nothing."""
        if token >= _FIRST_WORD:
            return self.words[token - _FIRST_WORD].encode()
        return b"" if token == BOUNDARY else bytes([token - 1])


def standard_library() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _place(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def files_of(folder: Path) -> list[Path]:
    """Returns the Python files of a folder, without installed packages, in the order of a hash."""
    found = {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*.py")
        if "site-packages" not in path.relative_to(folder).parts
    }
    return [found[name] for name in sorted(found, key=lambda name: (_place(name), name))]


def _pieces(folder: Path, paths: Iterable[Path], most: int) -> tuple[list[list[str]], list[bool]]:
    """Returns the pieces of files until there are `most`, and which files are for validation."""
    texts, is_validation, number = [], [], 0
    for path in paths:
        if number >= most:
            break
        try:
            pieces = _PIECE.findall(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a test of other encodings
        texts.append(pieces)
        place = _place("split:" + str(path.relative_to(folder)))
        is_validation.append(place % _VALIDATION_SHARE == 0)
        number += len(pieces)
    return texts, is_validation


def read(folder: Path, vocabulary_size: int, most: int) -> Text:
    """Reads the Python files of a folder.

    Args:
      folder: of the files.
      vocabulary_size: number of tokens, at least 257 (bytes alone).
      most: pieces to read; files after that are left out.

    Returns:
      The text; the same files give the same text.

    Raises:
      TooShortError: if there is too little text to train and to validate.
    """
    texts, is_validation = _pieces(folder, files_of(folder), most)
    counts: collections.Counter[str] = collections.Counter()
    for pieces, is_held_out in zip(texts, is_validation, strict=True):
        if not is_held_out:
            counts.update(pieces)
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    words = tuple(ranked[: vocabulary_size - _FIRST_WORD])
    numbers = {word: number for number, word in enumerate(words, _FIRST_WORD)}
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for pieces, is_held_out in zip(texts, is_validation, strict=True):
        tokens = [BOUNDARY]
        for piece in pieces:
            number = numbers.get(piece)
            if number is None:
                tokens += [1 + byte for byte in piece.encode()]
            else:
                tokens.append(number)
        parts[is_held_out].append(np.array(tokens, np.int32))
    if not parts[False] or not parts[True]:
        raise TooShortError(f"{len(texts)} Python files are too few to train and to validate on")
    return Text(np.concatenate(parts[False]), np.concatenate(parts[True]), words)


def is_byte(tokens: np.ndarray) -> np.ndarray:
    """Says which tokens are single bytes, of pieces that are no tokens (bool, as tokens)."""
    return (tokens > BOUNDARY) & (tokens < _FIRST_WORD)


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Returns the tokens from each start on (int32 [len(starts), length])."""
    return tokens[starts[:, None] + np.arange(length)]
