"""Who may import whom: each file imports from lower levels only."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {
    "vector": 0,
    "status": 0,
    "recorded": 0,
    "_clash": 0,
    "autodiff": 0,
    "subsample": 0,
    "replay": 0,
    "distributions": 1,
    "distributions.family": 0,
    "distributions.gaps": 0,
    "distributions.gaussian": 1,
    "distributions.discrete": 1,
    "distributions.continuous": 1,
    "distributions.transforms": 1,
    "distributions.catalogue": 1,
    "distributions.registry": 1,
    "distributions.joint": 1,
    "distributions.prediction": 1,
    "linearise": 1,
    "linearise.base": 1,
    "linearise.graph": 1,
    "linearise.rules": 1,
    "linearise.shapes": 1,
    "linearise.arithmetic": 1,
    "linearise.layers": 1,
    "linearise.onednn": 1,
    "linearise.catalogue": 1,
    "linearise.buffers": 1,
    "linearise.tape": 1,
    "linearise.choose": 1,
    "operators.base": 1,
    "operators.map": 1,
    "operators.scipy": 2,
    "operators.root": 1,
    "operators.gauss_newton": 2,
    "operators.fisher": 2,
    "operators.hessian": 2,
    "arguments": 0,
    "solvers.basis": 1,
    "solvers.solution": 1,
    "solvers.stopping": 1,
    "solvers.products": 2,
    "solvers.refinement": 2,
    "solvers.three_term": 2,
    "solvers.fixed": 2,
    "solvers.region": 2,
    "solvers.secular": 1,
    "solvers.dense": 2,
    "solvers.tridiagonal": 2,
    "solvers.point": 1,
    "solvers.krylov": 2,
    "solvers.lanczos": 2,
    "solvers.multishift": 2,
    "solvers.gltr": 2,
    "solvers.steihaug": 2,
    "solvers.minres": 2,
    "solvers.least_squares": 2,
    "solvers.nnls": 1,
    "solvers.dual": 2,
    "solvers.radius": 0,
    "solvers.cg": 2,
    "operators.ggn": 2,
    "operators.output_hessian": 2,
    "operators.sampled": 2,
    "operators.batches": 2,
    "linearise.functional": 1,
    "solvers.spectrum": 3,
    "preconditioners": 4,
    "preconditioners.base": 4,
    "preconditioners.gate": 4,
    "preconditioners.jacobi": 4,
    "preconditioners.nystrom": 4,
    "preconditioners.recycled": 4,
    "preconditioners.kfac": 4,
    "preconditioners.kfac_layers": 4,
    "preconditioners.output_noise": 4,
    "preconditioners.kfac_factors": 4,
    "preconditioners.kronecker": 4,
    "solvers.constrained": 3,
    "solvers.kl_ball": 1,
    "solvers.line_search": 0,
    "optim.info": 1,
    "optim.options": 0,
    "optim.processes": 2,
    "optim.closure": 2,
    "optim.calls": 1,
    "optim.units": 2,
    "optim.objective": 3,
    "optim.derivatives": 5,
    "optim.candidates": 5,
    "optim.search": 6,
    "optim.quadratic": 3,
    "optim.trials": 6,
    "optim.optimizer": 5,
    "optim.natural": 7,
    "optim.newton": 7,
    "optim.point": 2,
    "optim.result": 3,
    "optim.functional": 8,
    "check.slopes": 3,
    "check.report": 0,
    "check.restore": 1,
    "check.subject": 8,
    "check.derivatives": 8,
    "check.closure": 8,
}


PUBLIC = {
    "trustregion",
    *(f"trustregion.{room}" for room in ("operators", "solvers", "preconditioners")),
    *(f"trustregion.{room}" for room in ("distributions", "check", "optim")),
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


def name_of(path):
    return ".".join(path.relative_to(ROOT / "trustregion").with_suffix("").parts)


@pytest.mark.parametrize("path", modules("trustregion"), ids=name_of)
def test_trustregion_imports_downwards_only(path):
    own = name_of(path)
    assert own in LEVELS, "give the new file a level"
    for module, _ in imports(path):
        if not module.startswith("trustregion"):
            known = {"torch", "__future__", *OPTIONAL.get(own, ()), *_standard_library()}
            assert module.split(".")[0] in known
            continue
        other = module.removeprefix("trustregion.")
        assert LEVELS[other] <= LEVELS[own]
        if LEVELS[other] == LEVELS[own]:
            assert other.split(".")[0] == own.split(".")[0] or LEVELS[own] <= 1
        siblings = {own.split(".")[0], other.split(".")[0]}
        if siblings == {"operators", "solvers"}:
            assert other in {"operators.base", "operators.map"}


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
