"""Two processes joined by jax.distributed train to the numbers of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Counts of every step, vectors and rows, in every bit, of numbered ids and of raw ones.

    The whole command has several devices of one process in this folder, and two processes that
    save together in tests/checkpoint/test_checkpoint_faults.py.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.scaling.multiprocess",
        "--processes",
        "2",
        "--devices",
        "2",
    ]
    command += ["--rows", "3000", "--dim", "4", "--batch", "32", "--features", "2", "--steps", "4"]
    command += ["--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert (one.pop("mesh"), two.pop("mesh")) == (False, True)
    assert one == two
    assert min(one["counts"][name] for name in ("hits", "misses")) > 0
    assert min(one["raw_ids"]["vocabulary"].values()) > 0
