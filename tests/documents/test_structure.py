"""Imports point one way, and public names are documented.

Importing the package is cheap and leaves jax as it was.
"""

import ast
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import mpembed_jax as mpembed

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mpembed_jax"

ADAPTERS = {
    "sharding",
    "restacking",
    "vocabularies",
    "nn",
    "checkpoint",
    "serving",
}  # the public rooms that the core does not import
HEAVY = (
    "flax",
    "numba",
    "orbax",
    "polars",
    "matplotlib",
    "sklearn",
    "torch",
    "tensorflow",
    "pandas",
)
PUBLIC_MODULES = {"memory", "optim"} | ADAPTERS


def room_of(path):
    """The first name under the package: `ops/xla.py` is in room ops."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def package_files():
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def parse(path):
    """The syntax tree of a module, or of a notebook's code cells without shell lines."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [
            "".join(cell["source"])
            for cell in json.loads(text)["cells"]
            if cell["cell_type"] == "code"
        ]
        text = "\n".join(
            line if line.lstrip()[:1] not in ("%", "!") else ""
            for line in "\n".join(cells).splitlines()
        )
    return ast.parse(text, str(path))


def package_modules():
    return {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")
    }


def package_imports(tree, package="mpembed_jax"):
    """Rooms of the package that a file imports.

    `from mpembed_jax import name` counts where name is a room.
    """
    rooms = package_modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == package:
                    yield parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            parts = (node.module or "").split(".")
            if parts[0] != package:
                continue
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (
                    alias.name if alias.name in rooms else "__init__" for alias in node.names
                )


def levels(line):
    """[{rooms}] of one line of DESIGN.md's import direction, from left to right."""
    return [{room.strip() for room in level.split(",")} for level in line.split("<-")]


def direction():
    """The two lines of DESIGN.md: rooms of the package, back ends inside ops."""
    block = (
        (PACKAGE / "DESIGN.md").read_text().split("<!-- import direction -->")[1].split("```")[1]
    )
    rooms, backends = block.strip().splitlines()
    return levels(rooms), levels(backends)


def named_in_tree():
    """The files that DESIGN.md's tree names, relative to the package, without their suffix."""
    block = (PACKAGE / "DESIGN.md").read_text().split("## 3. The tree")[1].split("```")[1]
    folders = []
    for line in block.strip().splitlines()[1:]:
        bars, text = re.fullmatch(r"([│├└─ ]*)(.*)", line).groups()
        del folders[len(bars) // 4 - 1 :]
        for name in re.match(r"[\w./]+(, [\w./]+)*", text).group().split(", "):
            if name.endswith("/"):
                folders.append(name)
            else:
                yield "".join(folders) + name.removesuffix(".py")


def test_the_tree_has_a_line_for_each_file_and_nothing_else():
    named = list(named_in_tree())
    files = {str(p.relative_to(PACKAGE).with_suffix("")) for p in package_files()}
    assert len(named) == len(set(named))
    assert set(named) <= files
    left_out = [name for name in files - set(named) if not name.endswith("__init__")]
    assert not left_out, f"give them a line in DESIGN.md's tree: {', '.join(sorted(left_out))}"


def level_of(room, order):
    found = [number for number, level in enumerate(order) if room in level]
    assert found, f"{room} is a new room: give it a place in DESIGN.md's import direction"
    return found[0]


def test_every_room_has_a_place_in_the_import_direction():
    rooms, _ = direction()
    named = set().union(*rooms)
    assert named == package_modules() - {"__init__"}
    assert rooms[-1] - {"memory"} == ADAPTERS


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    rooms, _ = direction()
    here = level_of(room, rooms)
    for imported in set(package_imports(parse(path))) - {room}:
        if imported == "__init__":
            assert room in ADAPTERS, (
                f"{path.name} imports the package itself, which only an adapter may"
            )
            continue
        there = level_of(imported, rooms)
        assert there < here or here == there == len(rooms) - 1, (
            f"{path.name} imports {imported}, which {room} may not"
        )
        assert imported != "memory", f"{path.name} imports memory, which no room may"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_back_ends_import_the_reference_and_not_each_other(path):
    _, backends = direction()
    here = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
    for node in ast.walk(parse(path)):
        module = getattr(node, "module", None) or ""
        if not isinstance(node, ast.ImportFrom) or not module.startswith("mpembed_jax.ops"):
            continue
        rest = module.split(".")[2:3] or [alias.name for alias in node.names]
        for there in rest:
            is_own = there == here
            assert is_own or level_of(f"ops/{there}", backends) < level_of(
                f"ops/{here}", backends
            ), f"{path}: {there}"


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_of_the_package_is_imported_under_another_name(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mpembed_jax":
            renamed = [f"{alias.name} as {alias.asname}" for alias in node.names if alias.asname]
            assert not renamed, f"{path.name} imports {', '.join(renamed)}"


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_imports_jax_numpy_optax_and_the_standard_library_only(path):
    if room_of(path) in ADAPTERS:
        return
    for node in ast.walk(parse(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            allowed = {"jax", "numpy", "optax", "mpembed_jax"} | sys.stdlib_module_names
            if path.parent == PACKAGE / "ops" / "cpu":  # imported only for implementation "numba"
                allowed |= {"numba", "llvmlite"}
            assert top in allowed, f"{path.name} imports {name}"


def dotted(node):
    """`a.b.c` of an attribute chain, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def outside_files():
    found = (p for folder in ("experiments", "colab") for p in (ROOT / folder).rglob("*"))
    return sorted(
        p for p in found if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts
    )


@pytest.mark.parametrize("path", outside_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_experiments_use_public_names_only(path):
    """Names of __all__ and of the public modules; nothing with an underscore, no inner room."""
    tree, aliases = parse(path), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mpembed_jax":
                    aliases[alias.asname or "mpembed_jax"] = (
                        alias.name if alias.asname else "mpembed_jax"
                    )
                    check_public(alias.name, path, node.lineno)
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mpembed_jax"
        ):
            for alias in node.names:
                check_public(f"{node.module}.{alias.name}", path, node.lineno)
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if name and name.split(".")[0] in aliases:
            first, *rest = name.split(".")
            check_public(".".join([aliases[first], *rest]), path, node.lineno)


def check_public(name, path, line):
    _, *parts = name.split(".")
    place = f"{path.name}:{line}: {name}"
    assert not any(part.startswith("_") for part in parts), f"{place} is private"
    assert not parts or parts[0] in {*mpembed.__all__, *PUBLIC_MODULES}, (
        f"{place} is not a public name"
    )


# --- documentation


def is_public(name):
    return not name.startswith("_")


def definitions(tree):
    """(qualified name, node) of every public function, class and method of a module.

    Property setters included.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_public(node.name):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.ClassDef) and is_public(inner.name):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_function_class_and_method_has_a_docstring(path):
    tree = parse(path)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    missing += [name for name, node in definitions(tree) if not ast.get_docstring(node)]
    assert not missing, f"{path.name}: no docstring for {', '.join(missing)}"


def test_every_public_name_exists_and_has_a_docstring():
    assert len(set(mpembed.__all__)) == len(mpembed.__all__)
    for name in mpembed.__all__:
        value = getattr(mpembed, name)
        if name != "NO_ID":
            assert (value.__doc__ or "").strip(), f"{name} has no docstring"
            assert not re.match(rf"{name}\(", value.__doc__), (
                f"{name} has only its signature for a docstring"
            )


def public_callables(module):
    """Every function, class and method a user may call in a module, by name."""
    for name in getattr(module, "__all__", [n for n in vars(module) if is_public(n)]):
        value = getattr(module, name)
        if not getattr(value, "__module__", "").startswith(module.__name__):
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            methods = {
                k: m for k, m in vars(value).items() if is_public(k) and inspect.isfunction(m)
            }
            yield from ((f"{name}.{k}", m) for k, m in methods.items())


@pytest.mark.parametrize("name", ["", *sorted(PUBLIC_MODULES & package_modules())])
def test_arguments_of_public_functions_are_described(name):
    """All arguments of functions, and of methods that take more than one."""
    module = importlib.import_module(f"mpembed_jax.{name}".rstrip("."))
    undescribed = []
    for qualified, function in public_callables(module):
        arguments = [a for a in inspect.signature(function).parameters if a not in ("self", "cls")]
        text = inspect.getdoc(function) or ""
        missing = [a for a in arguments if not re.search(rf"\b{re.escape(a)}\b", text)]
        if missing and ("." not in qualified or len(arguments) > 1):
            undescribed.append(f"{qualified}: {', '.join(missing)}")
    assert not undescribed, "docstrings say nothing about these arguments:\n" + "\n".join(
        undescribed
    )


@pytest.mark.parametrize("name", ["EmbeddingSpec", "CacheSpec", "TableSpec", "RowFormat"])
def test_fields_of_specs_are_described(name):
    cls = getattr(mpembed, name)
    missing = [
        f
        for f in inspect.signature(cls).parameters
        if not re.search(rf"^\s+{f}: ", cls.__doc__, re.MULTILINE)
    ]
    assert not missing, f"the docstring of {name} says nothing about {', '.join(missing)}"


# --- packaging


def test_the_package_is_marked_as_typed_and_ships_the_mark():
    assert (PACKAGE / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


def test_no_tracked_file_names_a_place_on_one_machine():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Spelled in pieces, or this file would find itself.
    roots = ("work", "home", "root", "Users", "mnt", "data", "scratch")
    places = re.compile("|".join(rf"(?<![\w.:/-])/{root}/" for root in roots))
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path.stat().st_size > 2**21:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{name}:{n}: {line.strip()[:100]}"
            for n, line in enumerate(text.splitlines(), 1)
            if places.search(line)
        ]
    assert not found, "\n".join(found)


IMPORT = """
import json, sys, time
import jax, numpy, optax
theirs = time.process_time()
before = {k: repr(v) for k, v in jax.config.values.items()}
modules = set(sys.modules)
begin = time.process_time()
import mpembed_jax
ours = time.process_time() - begin
after = {k: repr(v) for k, v in jax.config.values.items()}
print(json.dumps(dict(
  share=ours / theirs,
  changed=[k for k in after if before.get(k) != after[k]],
  third_party=sorted({m.split(".")[0] for m in set(sys.modules) - modules}),
  loaded=sorted({m.split(".")[0] for m in sys.modules}),
  backends=len(jax._src.xla_bridge._backends),
)))
"""


def test_import_is_cheap_loads_no_adapter_and_changes_no_configuration():
    """At most half of the processor's time for jax, numpy and optax (it is a fifth).

    Importing starts no back end.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["share"] < 0.5
    assert run["changed"] == []
    assert not [name for name in HEAVY if name in run["loaded"]]
    assert not [
        n for n in run["third_party"] if n not in sys.stdlib_module_names and n != "mpembed_jax"
    ]
    assert run["backends"] == 0
