"""Who may import whom: each file imports from lower levels only."""

import ast
import importlib
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a file imports from the levels below and from its own room. CONTRIBUTING.md
# lists the same levels with their jobs.
LEVELS = {
    "trustregion": [
        [
            "arguments",
            "autodiff",
            "interrupts",
            "recorded",
            "replay",
            "settings",
            "status",
            "subsample",
            "vector",
            "_clash",
        ],
        ["distributions", "linearise"],
        ["operators"],
        ["solvers"],
        ["preconditioners"],
        ["optim"],
        ["check", "fit"],
    ],
    "rl": [
        [
            "interrupts",
            "options",
            "threads",
            "undo",
            "files",
            "json_tree",
            "matching",
            "checkpoint",
            "reports",
        ],
        ["envs"],
        ["networks"],
        ["experience"],
        ["fits"],
        ["config"],
        ["build"],
        ["saving", "training"],
        ["agent", "export"],
        ["trpo", "npg", "kl_penalty", "ppo", "vpg"],
        ["algorithms"],
        ["presets"],
        ["run"],
        ["__main__"],
    ],
}
LEVEL = {
    package: {room: i for i, rooms in enumerate(levels) for room in rooms}
    for package, levels in LEVELS.items()
}
PUBLIC = {
    "trustregion",
    *(f"trustregion.{room}" for room in ("operators", "solvers", "preconditioners")),
    *(f"trustregion.{room}" for room in ("distributions", "check", "optim", "fit")),
}
OPTIONAL = {"operators.scipy": ["scipy"]}  # imported where it is asked for


def imports(path):
    """Yield (dotted module, names) of each import, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [alias.name for alias in node.names]
            if node.level and node.module is None:  # from . import a_module
                yield from ((".".join([*base, name]), []) for name in names)
            else:
                yield ".".join([*base, *filter(None, [node.module])]), names


def modules(package):
    return sorted(p for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py")


def package_of(path):
    return path.relative_to(ROOT).parts[0]


def name_of(path):
    """Return a file's dotted name within its package."""
    return ".".join(path.relative_to(ROOT / package_of(path)).with_suffix("").parts)


def id_of(path):
    return f"{package_of(path)}.{name_of(path)}"


FILES = [path for package in LEVELS for path in modules(package)]


def within(path):
    """Yield the files of the package that a file imports, without the package's own name."""
    package = package_of(path)
    for module, names in imports(path):
        if module.split(".")[0] == package:
            inner = module.removeprefix(package).removeprefix(".")
            files = [f"{inner}.{name}".lstrip(".") for name in names]
            known = [
                file for file in files if (ROOT / package / f"{file.replace('.', '/')}.py").exists()
            ]
            yield from known or [inner]


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_files_import_downwards_only(path):
    level, room = LEVEL[package_of(path)], name_of(path).split(".")[0]
    assert room in level, "give the new file a level"
    for other in within(path):
        below = other.split(".")[0]
        assert below == room or level[below] < level[room] or level[room] == 0, other


@pytest.mark.parametrize("path", modules("trustregion"), ids=name_of)
def test_trustregion_needs_torch_alone(path):
    own = name_of(path)
    for module, _ in imports(path):
        if not module.startswith("trustregion"):
            known = {"torch", "__future__", *OPTIONAL.get(own, ()), *_standard_library()}
            assert module.split(".")[0] in known


@pytest.mark.parametrize("path", modules("trustregion/solvers"), ids=name_of)
def test_a_kernel_knows_no_concrete_operator(path):
    operators = {other for other in within(path) if other.split(".")[0] == "operators"}
    assert operators <= {"operators.base", "operators.map"}


@pytest.mark.parametrize("package", LEVELS)
def test_no_file_imports_itself_through_others(package):
    graph = {name_of(path): {*within(path)} for path in modules(package)}
    graph |= {
        room: {*within(ROOT / package / room / "__init__.py")} - {room}
        for room in {name.split(".")[0] for name in graph if "." in name}
    }
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the files


def test_the_lists_of_levels_are_those_of_the_guide_for_contributors():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tables = re.findall(r"^\| level \| rooms \| job \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) == len(LEVELS)
    for table, levels in zip(tables, LEVELS.values(), strict=True):
        rows = re.findall(r"^\| (\d+) \| (.+?) \|", table, re.MULTILINE)
        assert [int(number) for number, _ in rows] == list(range(len(levels)))
        listed = [re.findall(r"`(\w+)", rooms) for _, rooms in rows]
        assert listed == [[room for room in rooms if room != "_clash"] for rooms in levels]


def _standard_library():
    import sys

    return sys.stdlib_module_names


@pytest.mark.parametrize("folder", ["rl", "docs/examples", "benchmarks"])
def test_the_rest_uses_public_names_only(folder):
    for path in modules(folder):
        for module, names in imports(path):
            if module.split(".")[0] == "trustregion":
                assert module in PUBLIC, path
                assert set(names) <= set(importlib.import_module(module).__all__), path


def test_only_optimizers_write_parameters():
    for path in modules("trustregion"):
        if not name_of(path).startswith(("optim.", "vector")):
            assert ".assign(" not in path.read_text(), path


@pytest.mark.parametrize("package", ["trustregion", "rl"])
def test_files_and_functions_stay_small(package):
    for path in modules(package):
        text = path.read_text()
        assert len(text.splitlines()) <= 360, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                assert node.end_lineno - first.lineno < 50, f"{path}: {node.name}"
