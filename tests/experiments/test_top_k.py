"""`top_k` by a sketch: its benchmark trains vectors that predict ratings; more bits find more."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # experiments are no installed package

from experiments.speed import bench_top_k


@pytest.mark.slow
def test_more_bits_find_more_of_the_best_items(tmp_path):
    out = tmp_path / "found.json"
    words = (
        "--items 12000 --users 1000 --ratings 200000 --batch 2048 --dims 16 --bits 64 512 "
        f"--queries 40 --rounds 3 --threads 2 --out {out}"
    )
    assert bench_top_k.main(words.split()) == 0
    few, many = json.loads(out.read_text())["results"]
    assert few["auc"] == many["auc"] > 0.55
    assert few["recall_10"] < few["recall"] < many["recall"] and many["recall"] > 0.97
    assert (few["bytes_per_row"], many["bytes_per_row"]) == (12, 68)
    for result in (few, many):
        for own in (result["ms_of_1"], result["ms_of_16"]):
            assert own["exact"] > 0 and own["sketch"] > 0
            low, high = own["speed_up_10_90"]
            assert low <= own["speed_up"] <= high
