"""Two processes joined by jax.distributed train to the numbers of one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_two_processes_give_the_numbers_of_one():
    """Counts of every step, vectors and rows, in every bit."""
    command = [sys.executable, "-m", "experiments.multiprocess", "--processes", "2", "--devices", "2"]
    command += ["--rows", "3000", "--dim", "4", "--batch", "32", "--features", "2", "--steps", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes: " in done.stdout and "same" in done.stdout
