"""Prints the requirements of the core, each at its lower bound, and the tools of its tests."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["cpu"], *extras["checkpoint"]]:
    print(line.replace(">=", "=="))
for line in extras["test"]:
    if line.startswith(("pytest", "hypothesis")):
        print(line)
