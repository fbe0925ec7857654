"""The tables on serving say what the recorded runs say, on the pages and in the notebook."""

import itertools
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
FILES = {
    "as trained": "as trained", "INT4": "int4", "INT8": "int8", "FP16": "float16", "INT2": "int2"
}  # fmt: skip


def rows_of(text, header):
    """Returns the cells of each row of the table whose header begins so."""
    lines = text.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith(header)]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table]


def page(name):
    return (ROOT / "experiments" / name).read_text()


def notebook():
    cells = json.loads((ROOT / "colab" / "serving.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("place", ["page", "notebook"])
def test_the_tables_of_what_serving_costs_are_of_the_recorded_run(place):
    text = notebook() if place == "notebook" else page("accuracy/details.md")
    record = json.loads((RESULTS / "served.json").read_text())
    found = set()
    for file, *cells in rows_of(text, "| file | AUC | log loss |"):
        name = FILES[re.split(r"[:,(]", file)[0].strip()]
        expected = [record["differences"][name][s].replace("0.", ".") for s in ("auc", "log_loss")]
        if place == "page":
            expected.append(f"{record['files'][name]['bytes'] / 1e6:.2f}")
        assert cells == expected, file
        found.add(name)
    assert found == set(record["differences"])


def microseconds(values):
    middle = statistics.median(values)
    return f"{middle:.1f}" if middle < 100 else f"{middle:,.0f}"


def test_the_table_of_look_ups_and_bags_is_of_the_recorded_runs():
    expected = []
    for dim in (64, 128):
        record = json.loads((RESULTS / f"serving_d{dim}.json").read_text())
        for case in record["cases"]:
            us = {name: microseconds(values) for name, values in case["us"].items()}
            cells = [f"{dim}, {case['bags']:,} x {case['length']}"]
            for storage in ("int8", "int4"):
                ours, peer = f"ours-{storage}", f"fbgemm-{storage}"
                cells += [us[ours], us[peer], f"{case['ratios'][f'{ours} / {peer}']:.2f}"]
            expected.append([*cells, us["torch-fp32"]])
    assert rows_of(page("speed/details.md"), "| D, bags x ids |") == expected


def test_the_table_of_sign_sketches_is_of_the_recorded_runs():
    expected = []
    record = json.loads((RESULTS / "bench_top_k.json").read_text())
    for result in record["results"]:
        cells = [str(result["bits"]), f"{result['recall']:.3f}", f"{result['recall_10']:.2f}"]
        cells += [f"{result['bytes_per_row']:.0f}"]
        for num in (1, 16):
            own = result[f"ms_of_{num}"]
            cells += [f"{own['exact']:.1f} / {own['sketch']:.1f}", f"{own['speed_up']:.2f}"]
        expected.append(cells)
    assert rows_of(page("speed/details.md"), "| bits | recall@100 |") == expected
