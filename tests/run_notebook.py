"""Runs a notebook's code cells from top to bottom: python tests/run_notebook.py NOTEBOOK.

They run in this process. What a kernel adds is left out: cells are plain Python, figures are drawn
when shown and counted. A traceback names the cell.
"""

import json
import sys
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def run(path: Path) -> int:
    """Runs the cells in one namespace and returns the number of figures they showed."""
    num_figures = 0

    def show() -> None:
        nonlocal num_figures
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
            num_figures += 1
        plt.close("all")

    plt.show = show
    cells = json.loads(path.read_text())["cells"]
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert not plt.get_fignums(), "a figure was drawn and not shown"
    return num_figures


if __name__ == "__main__":
    warnings.simplefilter("error", DeprecationWarning)
    print(f"figures: {run(Path(sys.argv[1]))}")
