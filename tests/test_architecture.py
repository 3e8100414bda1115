"""Imports run one way, as read from the code: those for types and those in functions count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. What stands on one line may not import each other.
FLOORS = [
    {"csulora_kernels", "csulora.errors", "csulora.text", "csulora.version"},
    {"csulora.strengths"},
    {"csulora.settings", "csulora.files"},
    {"csulora.method"},
    {"csulora.report"},
    {"csulora.output"},
    {"csulora.adapter", "csulora.subspace", "csulora.outcome", "csulora.plots"},
    {"csulora.pipeline"},
    {"csulora.correction", "csulora.estimation", "csulora.baselines", "csulora.geometry"},
    {"csulora.folder", "csulora.verification", "csulora.sweep"},
    {"csulora.batch"},
    {"csulora.serving"},
    {"csulora"},  # the public names
    {"csulora.demo", "csulora.integrations"},
    {"csulora.cli"},
    {"csulora.__main__"},
]


def modules():
    """Every module by name, with its file."""
    files = [*(ROOT / "csulora").rglob("*.py"), *(ROOT / "csulora_kernels").rglob("*.py")]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def imports(name):
    """The modules of this project that a module imports, at any place in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            # A name may be a module of the package that it is imported from.
            found = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in MODULES
                else node.module
                for alias in node.names
            ]
        else:
            continue
        yield from (module for module in found if module in MODULES)


def room(name):
    """The entry of FLOORS that a module belongs to: the longest name that begins its own."""
    rooms = [r for floor in FLOORS for r in floor if name == r or name.startswith(r + ".")]
    return max(rooms, key=len)


def level(name):
    return next(i for i, floor in enumerate(FLOORS) if room(name) in floor)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_its_own_room_and_what_is_below(name):
    assert room(name) != "csulora" or name == "csulora", f"{name} stands in no room of FLOORS"
    for other in imports(name):
        assert room(other) == room(name) or level(other) < level(name), f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imports(name)) - {name} for name in MODULES}
    while free := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert not graph, f"in or behind a circle: {sorted(graph)}"


def test_the_batch_package_holds_names_only():
    tree = ast.parse(MODULES["csulora.batch"].read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}


def packages(name):
    """Everything that a module imports, by the first part of its name; of csulora by its room."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = node.module.startswith("csulora.")
            yield ".".join(node.module.split(".")[: 2 if inside else 1])


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("csulora.method")])
def test_the_mathematics_knows_no_file(name):
    language = {"__future__", "collections", "dataclasses", "math", "typing", "torch"}
    own = {"csulora.method", "csulora.settings", "csulora_kernels"}
    assert set(packages(name)) <= language | own


def test_files_stay_readable():
    for name, file in MODULES.items():
        assert len(file.read_text().splitlines()) <= 400, name
