"""Imports point one way (CONTRIBUTING.md has the map)."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions

import pytest

from training_runs import ROOT

# From the top; an import may only point down.
ROOMS = (
    "cli api app study training analysis scoring sampling pipelines latents models objectives data attention options "
    "process bottom"
).split()
# This package, and the trackers that a user may name and installs.
NOT_DECLARED = {"dia_diffusion", "trackio", "wandb"}
FOLDERS = {"dia_diffusion": ROOT / "dia_diffusion", "dia_diffusion.pipelines": ROOT / "pipelines"}


def find_modules():
    """Each module's path by its name; a package is named without `__init__`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = find_modules()


def room_of(module):
    name = module.split(".")[1] if "." in module else "bottom"
    # Both are command lines.
    name = "cli" if name == "train" else name
    return name if name in ROOMS else "bottom"


def imports_of(module):
    """What a module imports of this package, at its top or later: pairs of a module and a name (`None` for all)."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "dia_diffusion")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names if source.split(".")[0] == "dia_diffusion" else ():
                whole = f"{source}.{alias.name}"
                yield (whole, None) if whole in MODULES else (source, alias.name)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    room = room_of(module)
    for target, _ in imports_of(module):
        other = room_of(target)
        if other == room or module == "dia_diffusion":
            continue
        assert ROOMS.index(other) > ROOMS.index(room), f"{module} imports {target}, which stands above it"


def test_no_modules_import_each_other():
    graph = {module: {target for target, _ in imports_of(module)} - {module} for module in MODULES}
    # The package imports its public names when they are first used.
    del graph["dia_diffusion"]
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


@pytest.mark.parametrize("room", [name for name in ROOMS if (ROOT / "dia_diffusion" / name).is_dir()])
def test_a_room_is_a_sentence(room):
    """Rooms import modules, so that a type checker sees every name and a misspelled import fails."""
    tree = ast.parse((ROOT / "dia_diffusion" / room / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


def test_all_that_is_imported_is_declared():
    """Of packages that are installed for others, an installation may come without."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in declared}
    distributions = packages_distributions()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for root in {name.split(".")[0] for name in roots} - sys.stdlib_module_names - NOT_DECLARED:
                known = {name.lower().replace("_", "-") for name in distributions.get(root, [root])}
                assert known & names, f"{module} imports {root}, which pyproject.toml does not name"


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == packages
