"""The order of batches: every row once an epoch, fixed by the seed, resumed anywhere.

The sources keep to it.
"""

import functools
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments.data import batches, synthetic
from experiments.data.background import in_background
from experiments.data.in_memory import InMemory
from mpembed_jax import NO_ID


class Counted:
    """Rows 0 .. n - 1 in blocks; remembers which blocks were read."""

    def __init__(self, num_rows, block_rows=10):
        self.num_rows, self.block_rows, self.was_read = num_rows, block_rows, []

    def read(self, numbers):
        self.was_read += numbers
        ends = [
            (n * self.block_rows, min((n + 1) * self.block_rows, self.num_rows)) for n in numbers
        ]
        return [{"row": np.arange(*end), "twice": 2 * np.arange(*end)} for end in ends]


shuffled = functools.partial(batches.shuffled, blocks_together=4)


def together(lists):
    return list(itertools.chain.from_iterable(lists))


def rows(taken):
    taken = list(taken)
    assert all(np.array_equal(2 * b["row"], b["twice"]) for b in taken)
    return [b["row"].tolist() for b in taken]


@pytest.mark.parametrize("num_rows", [1, 9, 10, 11, 39, 40, 41, 203, 400])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_an_epoch_has_every_row_once_but_for_less_than_a_batch(num_rows, batch_size):
    taken = rows(shuffled(Counted(num_rows), batch_size, seed=3))
    assert [len(b) for b in taken] == [batch_size] * (num_rows // batch_size)
    seen = together(taken)
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(num_rows))
    assert together(rows(batches.in_order(Counted(num_rows), batch_size))) == list(range(num_rows))


def test_a_run_resumes_anywhere_with_the_same_batches_and_reads_little_for_it():
    whole = rows(shuffled(Counted(203), 7, seed=3, num_epochs=3))
    assert len(whole) == 3 * 29
    for start in range(len(whole) + 2):
        blocks = Counted(203)
        resumed = shuffled(blocks, 7, seed=3, start=start, num_epochs=3)
        if start < len(whole):
            assert next(resumed)["row"].tolist() == whole[start]
            assert len(blocks.was_read) <= 8  # at most two groups of four
        assert rows(resumed) == whole[start + 1 :]


def test_the_order_depends_on_seed_and_epoch_and_mixes_blocks():
    def order(seed):
        return rows(shuffled(Counted(400), 20, seed=seed, num_epochs=2))

    one = order(1)
    assert one == order(1) != order(2)
    assert one[:20] != one[20:] and sorted(together(one[:20])) == sorted(together(one[20:]))
    assert all(len({row // 10 for row in batch}) > 2 for batch in one)


def test_rows_left_over_are_others_in_each_epoch():
    taken = rows(shuffled(Counted(203), 50, seed=3, num_epochs=3))
    left = [set(range(203)) - set(together(taken[e * 4 : e * 4 + 4])) for e in range(3)]
    assert all(len(rest) == 3 for rest in left) and len(set.union(*left)) > 3


@pytest.mark.parametrize("wrong", [{"start": -1}, {"num_epochs": 0}, {"batch_size": 0}])
def test_positions_that_make_no_sense_are_refused(wrong):
    settings = {"batch_size": 5, "seed": 0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        next(shuffled(Counted(20), **settings))


def test_fewer_rows_than_a_batch_make_none():
    assert list(shuffled(Counted(5), 6, seed=0, start=3)) == []


def in_memory():
    ids = {"a": np.arange(100, dtype=np.int32), "bag": np.full((100, 2), NO_ID, np.int32)}
    return InMemory(np.arange(100, dtype=np.float32), ids, num_train=90)


@pytest.mark.parametrize(
    "make", [in_memory, lambda: synthetic.CriteoTwin(40_000, 0.001)], ids=["in memory", "twin"]
)
def test_sources_resume_in_any_epoch(make):
    def labels(start=0):
        return [
            (b["label"], b["ids"]["a"] if isinstance(b["ids"], dict) else b["ids"])
            for b in take(start)
        ]

    def take(start):
        return source.train(size, seed=5, start=start, num_epochs=2)

    source = make()
    size = 8 if source.num_train < 1000 else 3000
    whole, per_epoch = labels(), source.num_train // size
    assert len(whole) == 2 * per_epoch
    assert not np.array_equal(whole[0][1], whole[per_epoch][1])
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        resumed = labels(start)
        assert len(resumed) == len(whole) - start
        for got, want in zip(resumed, whole[start:], strict=True):
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])


def test_test_rows_come_in_order_and_are_not_trained():
    source = in_memory()
    assert [b["label"].tolist() for b in source.test(6)] == [
        list(range(90, 96)),
        list(range(96, 100)),
    ]
    assert max(b["label"].max() for b in source.train(9)) < 90


def test_batches_reach_the_device_in_order_and_unchanged():
    host = list(shuffled(Counted(203), 7, seed=3))
    sent = list(in_background(map(jax.device_put, shuffled(Counted(203), 7, seed=3)), depth=2))
    assert len(sent) == len(host)
    for there, here in zip(sent, host, strict=True):
        assert isinstance(there["row"], jax.Array)
        np.testing.assert_array_equal(there["row"], here["row"])
