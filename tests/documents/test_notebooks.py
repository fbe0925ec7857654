"""Notebooks are valid and run from top to bottom on a CPU.

They install a jax that fits, and do not replace a good one.
"""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
import yaml
from cases import named

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@names
def test_a_notebook_is_valid_and_its_outputs_are_small(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 200_000
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    if path.stem != "quickstart":  # the one without a cell that may read a user's data
        assert not outputs


@names
def test_relative_links_lead_to_files(path):
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


@names
def test_a_notebook_calls_what_exists_with_arguments_it_has(path):
    """What it imports, attributes of modules, and the names of arguments of their functions."""
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells(path, "code")))
    nodes, held = list(ast.walk(tree)), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                module = importlib.import_module(name.name)
                held[name.asname or name.name.split(".")[0]] = (
                    module if name.asname else sys.modules[name.name.split(".")[0]]
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                held[name.asname or name.name] = getattr(module, name.name)

    def found(node):
        """What an expression names, if it is of a module."""
        if isinstance(node, ast.Name):
            return held.get(node.id)
        if isinstance(node, ast.Attribute) and inspect.ismodule(module := found(node.value)):
            return getattr(module, node.attr)
        return None

    num_calls = 0
    for node in nodes:
        found(node)  # every attribute of a module exists
        if isinstance(node, ast.Call) and callable(function := found(node.func)):
            name = getattr(function, "__module__", None) or ""
            if name.startswith(("mpembed_jax", "experiments")):
                # nnx hides what the __init__ of a module takes.
                made = function.__init__ if inspect.isclass(function) else function
                arguments = inspect.signature(made).parameters.values()
                takes_any = any(argument.kind == argument.VAR_KEYWORD for argument in arguments)
                given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                assert takes_any or given <= {argument.name for argument in arguments}, name
                num_calls += 1
    assert num_calls > 1


# --- running them: the whole command runs the first two


def run(name, **environment):
    """Runs a notebook in small, with a pip that reaches no index; returns what it printed."""
    quiet = {key: value for key, value in os.environ.items() if key != "CRITEO_FOLDER"}
    # On one device, compiled as quickly as the tests.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    settings = {"MPEMBED_SMALL": "1", "PIP_NO_INDEX": "1", "JAX_PLATFORMS": "cpu"}
    settings |= {"XLA_FLAGS": flags, **environment}
    command = [sys.executable, str(ROOT / "tests/run_notebook.py"), f"{name}.ipynb"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT / "colab", env={**quiet, **settings}
    )
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    return done.stdout


def number(pattern, text):
    return float(re.search(pattern, text)[1].replace(",", ""))


@pytest.mark.slow
def test_the_quickstart_finds_items_in_less_time_and_memory():
    printed = run("quickstart")
    assert "figures: 1" in printed
    recall = number(r"recall@100 among 50,000 items: ([\d.]+)%", printed)
    assert recall > 1.5 * number(r"popular items: ([\d.]+)%", printed)
    plain, cached = (
        number(rf"{name}: .* take ([\d.]+) GB", printed) for name in ("nnx.Embed", "nn.CachedEmbed")
    )
    assert cached < plain / 4


def criteo_line(rng):
    integers = [str(rng.integers(20)) if rng.random() < 0.8 else "" for _ in range(13)]
    categories = [f"{min(rng.zipf(1.3), 500):08x}" for _ in range(26)]
    return "\t".join([str(rng.integers(2)), *integers, *categories])


@pytest.mark.exhaustive
def test_the_dlrm_notebook_compares_runs_and_reads_a_train_txt(tmp_path):
    """The whole command runs the quickstart, and checks the names and arguments of all calls.

    Its programs run in tests/experiments/test_experiments_data.py and test_criteo_kaggle.py.
    """
    rng = np.random.default_rng(0)
    (tmp_path / "train.txt").write_text("".join(criteo_line(rng) + "\n" for _ in range(2800)))
    printed = run("criteo_dlrm", CRITEO_FOLDER=str(tmp_path))
    assert "figures: 2" in printed
    for table in printed.split("training and")[1:]:
        rows = dict(re.findall(r"^((?:FP32|INT)[\w %+]*?) {2,}(0\.\d{4}) ", table, re.MULTILINE))
        assert list(rows) == ["FP32", "INT8 + 5 %", "FP32 hashed as INT8 + 5 %"]
        assert all(0.3 < float(auc) < 0.9 for auc in rows.values())
    assert (
        "12,000 training and 2,000 test rows" in printed
        and "2,400 training and 200 test rows" in printed
    )


@pytest.mark.exhaustive
def test_the_memory_notebook_gives_the_bytes_of_its_workloads():
    printed = run("memory")
    assert "figures: 1" in printed
    assert "33,762,577 rows" in printed and "204,184,588 rows" in printed
    int8 = re.search(r"^int8 .*$", printed, re.MULTILINE)[0].split()
    assert float(int8[1]) == pytest.approx(
        33_762_577 * (68 + 4) / 1e9, abs=0.06
    )  # row of D = 64, optimizer's number
    assert re.search(r"^int4 \+ 5% cache .* fits in 12.0 GB", printed, re.MULTILINE)
    assert re.search(r"^float32, no cache .* does not fit", printed, re.MULTILINE)
    assert re.search(
        r"^\| DeepSeek-V4\.1 \| 768 M \| 256 \| 196\.6 B \| 2,753 ", printed, re.MULTILINE
    )


@pytest.mark.exhaustive
def test_the_ngram_notebook_compares_memories_by_how_often_n_grams_were_seen():
    printed = run("ngram_memory")
    assert "figures: 2" in printed
    losses = dict(re.findall(r"^(none|FP32|INT4 \+ 5 %) +validation loss ([\d.]+) ", printed, re.M))
    assert len(losses) == 3 and all(5 < float(loss) < 9 for loss in losses.values())
    shares = re.findall(r"^\d[\d -]*(?:and more)? +([\d.]+)% ", printed, re.MULTILINE)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)


@pytest.mark.exhaustive
def test_the_serving_notebook_compares_the_formats():
    printed = run("serving")
    assert "figures: 1" in printed
    assert re.search(r"loaded in \d+\.\d ms", printed) and "ids outside so far: 1" in printed
    trained = number(r"read in training +AUC (0\.\d+)", printed)
    assert trained > 0.6
    assert number(r"recall@100 by the sketch: ([\d.]+)", printed) >= 0.95
    lost = dict(re.findall(r"^([\w ]+?) +AUC 0\.\d+ \(([+-]0\.\d+)\)", printed, re.MULTILINE))
    assert list(lost) == ["as trained", "int2", "int4", "int8", "float16", "float32"]
    assert abs(float(lost["float32"])) <= 0.0001 >= abs(float(lost["float16"]))
    assert float(lost["int2"]) < float(lost["int8"]) + 0.0005


@pytest.mark.exhaustive
def test_the_notebook_of_raw_ids_shows_what_recycling_is_worth():
    printed = run("raw_ids")
    assert "figures: 2" in printed
    found = dict(
        re.findall(r"^([\w ]+): AUC of the last month 0\.\d+, of all (0\.\d+)", printed, re.M)
    )
    assert list(found) == ["recycled", "first come", "hashed", "room for all"]
    recycled, first, hashed, everything = map(float, found.values())
    assert first < hashed < recycled < everything
    assert number(r"ids have a row: ([\d.]+)%", printed) > 60
    assert number(r"rows that forgetting one id changed: (\d+)", printed) == 1


# --- the install cell: it stands alone, so its functions are taken from the notebook


def install_cell(path):
    return "".join(cells(path, "code")[0]["source"])


def test_all_notebooks_install_in_the_same_way():
    assert len(NOTEBOOKS) == 6
    assert len({install_cell(path) for path in NOTEBOOKS}) == 1


@pytest.fixture(scope="module")
def cell():
    """The names of the install cell, without its last line, which installs."""
    tree = ast.parse(install_cell(NOTEBOOKS[0]))
    assert ast.unparse(tree.body.pop()) == "install()"
    defined = {}
    exec(compile(tree, "install cell", "exec"), defined)
    return defined


HEADER = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {}   |"
RENAMED = "| NVIDIA-SMI 610.43.02    KMD Version: 610.43.02    CUDA UMD Version: {}   |"
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make .."


class Driver(NamedTuple):
    """What nvidia-smi prints; None: it is not there."""

    printed: str | None
    cuda: int | None  # that the driver runs; None: there is no GPU


DRIVERS = {
    "no nvidia-smi": Driver(None, None),
    "no driver": Driver(NO_DRIVER, None),
    "no device": Driver("No devices were found", None),
    "12.4": Driver(HEADER.format("12.4"), 12),
    "13.0": Driver(HEADER.format("13.0"), 13),
    "13.3, renamed": Driver(RENAMED.format("13.3"), 13),
    "14.1, renamed": Driver(RENAMED.format("14.1"), 14),
}


@pytest.mark.parametrize("driver", named(DRIVERS))
def test_the_driver_says_which_cuda_it_runs(cell, driver):
    assert cell["cuda_of_driver"](driver.printed) == driver.cuda


class Unusable(NamedTuple):
    """What nvidia-smi prints for a GPU that jax cannot use, and what the notebook says."""

    printed: str
    message: str


UNUSABLE = {
    "an old driver": Unusable(HEADER.format("11.8"), "runs CUDA 11, jax needs 12"),
    "no version": Unusable(HEADER.format("N/A"), "names no CUDA version"),
    "nothing": Unusable("", "names no CUDA version"),
    "two versions": Unusable(
        "Failed to initialize NVML: Driver/library version mismatch", "version mismatch"
    ),
}


@pytest.mark.parametrize("unusable", named(UNUSABLE))
def test_a_gpu_that_jax_cannot_use_is_an_error_that_says_how_to_go_on(cell, unusable):
    with pytest.raises(RuntimeError, match=unusable.message) as error:
        cell["cuda_of_driver"](unusable.printed)
    assert "JAX_PLATFORMS=cpu" in str(error.value)


OLD, NEW = {"jax": "0.7.2", "jaxlib": "0.7.2"}, {"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}
PINS = ["jax==0.12.0.1", "jaxlib==0.12.0.1"]


class Runtime(NamedTuple):
    """What a notebook's machine has, and what pip must be asked for."""

    cuda: int | None  # of the driver
    versions: dict[str, str]
    platform: str | None  # that jax uses
    wanted: list[str]


@pytest.mark.parametrize(
    "case",
    [
        # No GPU: a new jax stays, an old or missing or broken one is pip's to bring up to date.
        Runtime(None, NEW, "cpu", PINS),
        Runtime(
            None, {"jax": "0.10.2", "jaxlib": "0.10.2"}, "cpu", ["jax==0.10.2", "jaxlib==0.10.2"]
        ),
        Runtime(None, {"jax": "0.10.1", "jaxlib": "0.10.1"}, "cpu", ["jax"]),
        Runtime(None, {"jax": "0.10.2", "jaxlib": "0.10.1"}, "cpu", ["jax"]),
        Runtime(None, OLD, "cpu", ["jax"]),
        Runtime(None, {}, None, ["jax"]),
        Runtime(None, {"jax": "unknown", "jaxlib": "0.12.0"}, None, ["jax"]),
        # Colab's own, new enough and on its GPU or TPU: nothing of jax is installed.
        Runtime(12, NEW | {"jax-cuda12-plugin": "0.12.0.1"}, "gpu", PINS),
        Runtime(13, NEW | {"jax-cuda12-plugin": "0.12.0.1"}, "gpu", PINS),
        Runtime(None, NEW, "tpu", PINS),
        # A GPU that the installed jax does not use: the driver's CUDA, at the version of a jax that
        # is new enough.
        Runtime(12, NEW, "cpu", ["jax[cuda12]", *PINS]),
        Runtime(13, NEW, "cpu", ["jax[cuda13]", *PINS]),
        Runtime(14, {}, None, ["jax[cuda13]"]),
        Runtime(12, OLD, "cpu", ["jax[cuda12]"]),
        # An old jax on the GPU is replaced; with the plugin that is there, if the driver runs it.
        Runtime(12, OLD | {"jax-cuda12-plugin": "0.7.2"}, "gpu", ["jax[cuda12]"]),
        Runtime(13, OLD | {"jax-cuda12-plugin": "0.7.2"}, "gpu", ["jax[cuda12]"]),
        Runtime(13, OLD | {"jax-cuda13-plugin": "0.7.2"}, "gpu", ["jax[cuda13]"]),
        Runtime(12, NEW | {"jax-cuda13-plugin": "0.12.0.1"}, "cpu", ["jax[cuda12]", *PINS]),
    ],
    ids=str,
)
def test_pip_is_asked_for_a_jax_that_fits(cell, case):
    assert cell["choose_jax"](case.cuda, case.versions, case.platform) == case.wanted


def test_extras_of_the_project_itself_are_asked_for_by_what_they_need(cell):
    """The project is on no index, so pip cannot be asked for "mpembed_jax[cpu]"."""
    own = {
        "name": "p_q",
        "optional-dependencies": {
            "all": ["p_q[a,b]", "c>=1"],
            "a": ["x"],
            "b": ["p_q[a]", "p_q_more[z]"],
        },
    }
    assert cell["requirements"](own, "all") == ["x", "x", "p_q_more[z]", "c>=1"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = cell["requirements"](project, "experiments")
    assert not [requirement for requirement in wanted if requirement.startswith(project["name"])]
    assert {"numba", "tensorflow-datasets", "matplotlib"} <= {
        re.match(r"[\w-]+", requirement)[0] for requirement in wanted
    }


def test_an_old_jax_on_a_tpu_is_the_users_to_replace(cell):
    with pytest.raises(RuntimeError, match=r"jax\[tpu\]"):
        cell["choose_jax"](None, OLD, "tpu")


def test_a_gpu_without_jax_on_it_fails_loudly(cell):
    cell["check_platform"](None, "cpu")
    cell["check_platform"](12, "gpu")
    with pytest.raises(RuntimeError, match="jax shows only cpu"):
        cell["check_platform"](12, "cpu")


def test_a_session_older_than_the_installation_must_restart(cell):
    cell["check_loaded"]({}, {"jax": "0.12.0"})
    cell["check_loaded"]({"jax": "0.12.0"}, {"jax": "0.12.0", "numpy": "2.4"})
    with pytest.raises(RuntimeError, match=r"jax 0\.7\.2.*restart"):
        cell["check_loaded"]({"jax": "0.7.2"}, {"jax": "0.12.0"})


def test_the_cpu_can_be_asked_for_and_a_missing_nvidia_smi_is_no_gpu(cell, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'CUDA Version: 12.4'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delitem(os.environ, "JAX_PLATFORMS", raising=False)
    assert cell["cuda_of_driver"](cell["ask_nvidia_smi"]()) == 12
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cell["ask_nvidia_smi"]() is None
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("PATH", "")
    assert cell["ask_nvidia_smi"]() is None


def test_outside_a_clone_the_cell_asks_for_an_address(cell, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        cell["find_checkout"]()
    monkeypatch.chdir(ROOT / "colab")
    assert cell["find_checkout"]() == ROOT


# --- how to cite


def test_the_citation_names_the_software_and_the_paper():
    """The keys that CFF 1.2.0 requires, and what they say of this package and its paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    (paper,) = citation["references"]
    assert (
        paper["title"] == "Mixed-Precision Embedding Using a Cache" and paper["type"] == "article"
    )
    assert [author["family-names"] for author in paper["authors"]] == [
        "Yang",
        "Huang",
        "Park",
        "Tang",
        "Tulloch",
    ]
    assert (
        paper["url"] == "https://arxiv.org/abs/2010.11305"
        and "arXiv 2010.11305" in (ROOT / "README.md").read_text()
    )
