"""Made-up text in Criteo's format, with what it should be read as."""

import gzip

import numpy as np


def line(label="1", integers=("3",) * 13, categories=("0000000a",) * 26):
    return "\t".join([str(label), *integers, *categories])


def random_lines(num_lines, seed=0, vocabulary=50):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num_lines)
    integers = rng.integers(-2, 100_000, (num_lines, 13))
    categories = rng.integers(1, vocabulary, (num_lines, 26)) * 0x1234567
    missing = rng.random((num_lines, 39)) < 0.2
    text = [
        line(
            label[i],
            ["" if missing[i, j] else str(integers[i, j]) for j in range(13)],
            ["" if missing[i, 13 + j] else f"{categories[i, j]:08x}" for j in range(26)],
        )
        for i in range(num_lines)
    ]
    dense = np.log1p(np.where(missing[:, :13], 0, np.maximum(integers, 0)).astype(np.float32))
    return text, label, dense, np.where(missing[:, 13:], 0, categories).astype(np.uint32)


def write(folder, lines, newline="\n", name="train.txt", end=True):
    data = (newline.join(lines) + (newline if end else "")).encode()
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path
