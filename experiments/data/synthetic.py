"""A synthetic twin of Criteo-Kaggle: 13 integers, 26 categories and clicks, from a seed.

The vocabulary sizes are the real ones times a scale (sizes up to 1,000 stay as they are). Ids
follow Zipf-Mandelbrot laws `p(rank) ~ (rank + q)^-s` whose parameters were fitted so that 137,139
draws at scale 1 show the published number of distinct ids and top 1 / 5 / 10 % shares of C3, C4,
C12, C16, C21 and C24; the other features have round parameters of ours. Ranks are spread over the
ids, so hot ids are not neighbours. Each day about 3.5 % of the ranks of a large feature move to
another id. Labels come from a planted logistic model: dense terms, one effect per id, and products
of hidden per-id factors of eight pairs of features, which a dot interaction can learn; the bias is
set so that the click rate is .2562. Effects are hashes of (feature, id): no array is as long as a
vocabulary. Missing rates of I1, I12 and C22 are the published ones, the others are round figures.
It is not a model of Criteo's labels: only skew, sizes, rates and the rough difficulty are alike.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.data import batches
from experiments.data.hashing import fmix32

CLICK_RATE = 0.2562
NUM_DENSE = 13
BLOCK = 16_384  # rows made at once; part of what a seed means


class FeatureLaw(NamedTuple):
    """How the ids of one categorical feature are distributed at scale 1."""

    vocabulary_size: int
    exponent: float  # s
    offset: float  # q
    missing: float  # share of rows without a value; such rows have id 0


FEATURES: dict[str, FeatureLaw] = {
    "C1": FeatureLaw(1460, 1.3, 2.0, 0.0),
    "C2": FeatureLaw(583, 1.2, 2.0, 0.0),
    "C3": FeatureLaw(10131227, 1.0, 0.0, 0.0),
    "C4": FeatureLaw(2202608, 1.22, 20.0, 0.0),
    "C5": FeatureLaw(305, 1.5, 0.0, 0.0),
    "C6": FeatureLaw(24, 1.2, 0.0, 0.12),
    "C7": FeatureLaw(12517, 1.3, 10.0, 0.0),
    "C8": FeatureLaw(633, 1.5, 0.0, 0.0),
    "C9": FeatureLaw(3, 1.0, 0.0, 0.0),
    "C10": FeatureLaw(93145, 1.2, 5.0, 0.0),
    "C11": FeatureLaw(5683, 1.2, 10.0, 0.0),
    "C12": FeatureLaw(8351593, 1.04, 2.0, 0.0),
    "C13": FeatureLaw(3194, 1.2, 10.0, 0.0),
    "C14": FeatureLaw(27, 1.2, 0.0, 0.0),
    "C15": FeatureLaw(14992, 1.3, 10.0, 0.0),
    "C16": FeatureLaw(5461306, 1.08, 3.0, 0.0),
    "C17": FeatureLaw(10, 1.0, 0.0, 0.0),
    "C18": FeatureLaw(5652, 1.2, 5.0, 0.0),
    "C19": FeatureLaw(2173, 1.2, 2.0, 0.44),
    "C20": FeatureLaw(4, 1.0, 0.0, 0.44),
    "C21": FeatureLaw(7046547, 1.05, 2.0, 0.0),
    "C22": FeatureLaw(18, 1.0, 0.0, 0.761),
    "C23": FeatureLaw(15, 1.2, 0.0, 0.0),
    "C24": FeatureLaw(286181, 1.42, 20.0, 0.0),
    "C25": FeatureLaw(105, 1.3, 0.0, 0.44),
    "C26": FeatureLaw(142572, 1.35, 15.0, 0.44),
}
DENSE_MISSING = np.array(
    [0.451, 0, 0.21, 0.22, 0.03, 0.22, 0.04, 0, 0.04, 0.45, 0.04, 0.765, 0.22], np.float32
)
DENSE_MEAN = np.array(
    [0.9, 2.0, 1.8, 1.6, 8.0, 3.5, 1.6, 2.0, 3.9, 0.4, 0.9, 0.3, 1.7], np.float32
)  # of log counts
DENSE_SPREAD = np.array(
    [1.0, 1.5, 1.2, 0.9, 1.9, 1.4, 1.2, 1.1, 1.3, 0.5, 0.8, 0.6, 1.0], np.float32
)
DENSE_WEIGHT = np.array(
    [0.7, 0.15, 0.3, -0.15, -0.35, -0.3, 0.5, 0, -0.15, 0.3, 0.4, 0.3, -0.3], np.float32
)
# Pairs whose hidden factors multiply: large with small and large with large, so that rows must be
# trained to see them.
PAIRS = (
    ("C3", "C14"), ("C4", "C17"), ("C12", "C9"), ("C16", "C23"),
    ("C21", "C6"), ("C24", "C10"), ("C7", "C15"), ("C18", "C26"),
)  # fmt: skip
ID_STRENGTH = 0.28  # standard deviation of one feature's effect on the logit
PAIR_STRENGTH = 0.30
DRIFT_PER_DAY = 9  # of 256 ranks of a large feature
STEADY_RANKS = 16  # the hottest ranks stay: they alone could move the click rate of a day


def scaled_sizes(scale: float) -> dict[str, int]:
    """Returns {feature: vocabulary size} at a scale.

    Sizes up to 1,000 are kept, and larger ones stay at least at 1,000.
    """
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must be in (0, 1], got {scale}; 1 is Criteo-Kaggle's 33.76 M ids")
    sizes = {name: law.vocabulary_size for name, law in FEATURES.items()}
    return {
        name: size if size <= 1000 else max(1000, round(size * scale))
        for name, size in sizes.items()
    }


class FeatureIds:
    """Draws ids of one feature, with what they add to the logit.

    Args:
      law: the distribution at scale 1.
      vocabulary_size: number of ids after scaling.
      salt: u32 number that makes the effects of this feature its own.
    """

    def __init__(self, law: FeatureLaw, vocabulary_size: int, salt: int):
        self.missing = law.missing
        self.first = 1 if law.missing else 0  # id 0 is kept for "missing"
        self.size = vocabulary_size - self.first
        self.salt = np.uint32(salt)
        # The inverse distribution at 2^16 + 1 equal steps, straight lines between; exact masses for
        # the first million ranks, the integral of the law beyond.
        exact = min(self.size, 1 << 20)
        mass = np.cumsum((np.arange(exact) + 1.0 + law.offset) ** -law.exponent)
        knots, total = np.arange(exact + 1.0), np.concatenate([[0.0], mass])
        if exact < self.size:
            tail = np.geomspace(exact, self.size, 4096)[1:]
            s, shift = law.exponent - 1.0, law.offset + 0.5
            start = exact + shift
            area = (
                np.log((tail + shift) / start) if s == 0 else (start**-s - (tail + shift) ** -s) / s
            )
            knots, total = np.concatenate([knots, tail]), np.concatenate([total, total[-1] + area])
        grid = np.interp(np.linspace(0.0, total[-1], (1 << 16) + 1), total, knots)
        self.left = grid[:-1].astype(np.float32)  # f32 [65536]
        self.width = (np.diff(grid) / 65536).astype(np.float32)
        stride = int(self.size * 0.6180339887) | 1
        while np.gcd(stride, self.size) != 1:
            stride += 2
        self.stride = stride % max(self.size, 1) or 1

    def draw(
        self, rng: np.random.Generator, num_rows: int, day: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids i32 [n], effects f32 [n] and hidden factors f32 [n].

        Effects and factors have mean 0 and variance 1 over ids.
        """
        bits = rng.integers(0, 1 << 32, num_rows, dtype=np.uint32)
        cell = (bits >> np.uint32(16)).astype(np.intp)
        index = (
            self.left[cell] + self.width[cell] * (bits & np.uint32(0xFFFF)).astype(np.float32)
        ).astype(np.uint32)
        np.minimum(index, np.uint32(self.size - 1), out=index)  # f32 can round the last rank up
        if day and self.size > 1000:
            moved = (index * np.uint32(2654435761)) >> np.uint32(24) < DRIFT_PER_DAY * day
            moved &= index >= STEADY_RANKS
            index += moved * np.uint32(self.size // 2)
            index -= (index >= self.size) * np.uint32(self.size)
        ids = ((index.astype(np.uint64) * np.uint64(self.stride)) % np.uint64(self.size)).astype(
            np.int32
        )
        if self.first:
            is_missing = rng.random(num_rows, dtype=np.float32) < self.missing
            ids = np.where(is_missing, 0, ids + 1).astype(np.int32)
            index[is_missing] = self.size
        # Two sums of two bytes of one hash: triangular laws, independent of each other.
        bits = fmix32(index * np.uint32(0x9E3779B1) ^ self.salt)
        halves = [
            (bits >> np.uint32(k) & np.uint32(255)).astype(np.float32) for k in (0, 8, 16, 24)
        ]
        return ids, (halves[0] + halves[1] - 255) / 104.5, (halves[2] + halves[3] - 255) / 104.5


class CriteoTwin:
    """The source: `num_rows` rows over seven days, the last of which is the test set.

    Args:
      num_rows: rows of all days together.
      scale: vocabulary sizes as a share of Criteo-Kaggle's, in (0, 1].
      seed: fixes every row and the planted model; the same seed gives the same data whatever the
        batch size.
    """

    name = "synthetic"
    num_dense = NUM_DENSE
    num_days = 7
    bags: tuple[str, ...] = ()

    def __init__(self, num_rows: int = 800_000, scale: float = 0.02, seed: int = 0):
        if num_rows < self.num_days:
            raise ValueError(
                f"num_rows must be at least {self.num_days}, one per day, got {num_rows}"
            )
        self.seed = seed
        self.tables = scaled_sizes(scale)
        salts = np.random.default_rng([seed, 1]).integers(
            0, 1 << 32, len(FEATURES), dtype=np.uint32
        )
        self.features = {
            name: FeatureIds(law, self.tables[name], int(salt))
            for (name, law), salt in zip(FEATURES.items(), salts, strict=True)
        }
        self.num_test = num_rows // self.num_days
        self.num_train = num_rows - self.num_test
        self.bias = 0.0
        logits = np.sort(self._rows(BLOCK * 4, day=3, key=2, block=0)[3].astype(np.float64))
        low, high = -20.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (
                (middle, high)
                if np.mean(1 / (1 + np.exp(-logits - middle))) < CLICK_RATE
                else (low, middle)
            )
        self.bias = middle

    def _rows(self, num_rows: int, *, day: int, key: int, block: int) -> tuple[np.ndarray, ...]:
        """Makes one block: dense f32 [n, 13], ids i32 [n, 26], labels f32 [n], logits f32 [n]."""
        rng = np.random.Generator(np.random.SFC64([self.seed, key, day, block]))
        z = rng.standard_normal((num_rows, NUM_DENSE), dtype=np.float32)
        is_missing = rng.random((num_rows, NUM_DENSE), dtype=np.float32) < DENSE_MISSING
        counts = np.floor(np.exp(DENSE_MEAN + DENSE_SPREAD * z))
        z[is_missing] = 0.0
        dense = np.where(
            is_missing, np.float32(0), np.log1p(counts)
        )  # DLRM reads log(x + 1), missing as 0
        logits = self.bias + z @ DENSE_WEIGHT + 0.25 * z[:, 6] * z[:, 10] + 0.1 * is_missing[:, 0]
        ids = np.empty((len(self.features), num_rows), np.int32)
        factors = {}
        for t, (name, feature) in enumerate(self.features.items()):
            ids[t], effect, factors[name] = feature.draw(rng, num_rows, day)
            logits += ID_STRENGTH * effect
        for one, other in PAIRS:
            logits += PAIR_STRENGTH * factors[one] * factors[other]
        logits = logits.astype(np.float32)
        label = rng.random(num_rows, dtype=np.float32) < 1 / (1 + np.exp(-logits))
        return dense, np.ascontiguousarray(ids.T), label.astype(np.float32), logits

    def _blocks(self, days: range, num_rows: int) -> list[tuple[int, int, int]]:
        """Lists (day, block, rows) of the blocks that hold `num_rows` rows.

        The lengths of the days differ by at most one row.
        """
        blocks = []
        for i, day in enumerate(days):
            left = num_rows * (i + 1) // len(days) - num_rows * i // len(days)
            blocks += [(day, b, min(BLOCK, left - b * BLOCK)) for b in range(-(-left // BLOCK))]
        return blocks

    def train(
        self, batch_size: int, seed: int = 0, start: int = 0, num_epochs: int = 1
    ) -> Iterator[batches.Arrays]:
        """Yields the full training batches, from blocks in an order given by the seed.

        Rows are shuffled within a block. Rows of a day are exchangeable, so this is as good as a
        shuffle of all rows. From batch `start` on, counted through all epochs; only blocks with
        rows of later batches are made.
        """
        for epoch, taken in batches.epochs(self.num_train, batch_size, start, num_epochs):
            yield from batches.rebatched(
                self._epoch([self.seed, seed, 3, epoch], taken * batch_size), batch_size
            )

    def _epoch(self, key: list[int], skip: int) -> Iterator[batches.Arrays]:
        """Yields the blocks of one epoch without its first `skip` rows."""
        rng = np.random.default_rng(key)
        blocks = self._blocks(range(self.num_days - 1), self.num_train)
        rng.shuffle(blocks)
        for day, block, num_rows in blocks:
            order = rng.permutation(num_rows)[skip:]
            skip -= num_rows - len(order)
            if len(order):
                dense, ids, label, _ = self._rows(num_rows, day=day, key=0, block=block)
                yield {"dense": dense[order], "ids": ids[order], "label": label[order]}

    def test(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields the last day in batches, some of them short."""
        for day, block, num_rows in self._blocks(
            range(self.num_days - 1, self.num_days), self.num_test
        ):
            dense, ids, label, _ = self._rows(num_rows, day=day, key=0, block=block)
            for at in range(0, num_rows, batch_size):
                piece = slice(at, at + batch_size)
                yield {"dense": dense[piece], "ids": ids[piece], "label": label[piece]}
