"""The provenance of a run: command, commit, device, versions. Every results file holds it."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mpembed_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


def commit() -> str | None:
    """Returns the commit this runs from; None outside a git checkout.

    The commit is marked if files differ from it.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Results of earlier runs may lie there uncommitted; anything else makes this another tree.
        changes = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results"
        )
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device() -> str:
    """Returns platform and kind of the first device."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind}"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Returns the version of each package."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _module() -> str:
    """Returns the module that runs, as `python -m` takes it, also where a file was run."""
    path = Path(sys.argv[0]).resolve()
    if path.is_relative_to(ROOT / "experiments"):
        return ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return f"experiments.{path.stem}"


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a results file as JSON, and makes its folder.

    What the file held before is replaced in one step, and stays if anything fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text, path = json.dumps(record, indent=1) + "\n", path.resolve()
    if path.exists() and not path.is_file():  # /dev/stdout, say
        path.write_text(text)
        return
    new = path.with_name(f".{path.name[:200]}.new")
    new.write_text(text)
    new.replace(path)


def write_results(settings: Any, results: Any, **more: Any) -> None:
    """Writes the results file of a program: its settings, its environment, and its results.

    Args:
      settings: see settings_of.
      results: for JSON.
      **more: for JSON, before the results; a name of `environment` replaces its value.
    """
    record = {"settings": settings_of(settings), **environment(), **more, "results": results}
    write(settings.out, record)


def settings_of(settings: Any) -> dict[str, Any]:
    """Returns a program's settings as its results file holds them.

    Args:
      settings: a dataclass whose field `out` is the path of the file.
    """
    return {**dataclasses.asdict(settings), "out": str(settings.out)}


def environment() -> dict[str, Any]:
    """Says where and with what a run took place: device, cores, versions, commit, command."""
    return {
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "device": device(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
