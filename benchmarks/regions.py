"""Certify what trust-region solvers return on published problems: ours and those of scipy.

Only the step is judged, by a dense spectrum. Its multiplier is the one that makes the residual
smallest, not the solver's own, and none inside the ball.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize._trlib import get_trlib_quadratic_subproblem
from scipy.optimize._trustregion_exact import IterativeSubproblem
from scipy.optimize._trustregion_ncg import CGSteihaugSubproblem
from torch import Tensor

from tests.trustregion.test_region_cases import (
    CASES,
    HARD,
    RADII,
    RANGES,
    RTOL,
    SINGULAR,
    SMALL,
    numbers,
    random_entry,
)
from trustregion import SubproblemSolution, gltr, steihaug
from trustregion.solvers import trust_region_dense

SOLVED = 1e-6
NEAR = {"3d near hard", "gradient of 1e-6", "gradient of 1e-15", "minus identity"}


@dataclass(frozen=True)
class Problem:
    """Minimise ``g's + s'As / 2`` over the ball."""

    group: str
    A: Tensor
    g: Tensor
    radius: float


@dataclass(frozen=True)
class Found:
    """A step, and the products spent on it; None where the solver works on the matrix."""

    s: Tensor
    products: int | None


@dataclass(frozen=True)
class Verdict:
    """How far a step is from the global minimiser; infinite where it is not finite."""

    residual: float
    """``|(A + lambda I) s + g| / (|g| + |A| radius)``."""
    length: float
    """``| |s| - radius | / radius``; inside the ball, by how much it is too long."""
    indefinite: float
    """How far the lowest eigenvalue of ``A + lambda I`` is below zero, relative to ``|A|``."""
    gap: float
    """The value, of the step pulled back to the ball, above the lowest found, relative to it."""
    products: int | None

    @property
    def errors(self) -> tuple[float, ...]:
        return self.residual, self.length, self.indefinite, self.gap


Solver = Callable[[Problem], Found]


def ours(solve: Callable[..., SubproblemSolution], problem: Problem) -> Found:
    step = solve(problem.A, problem.g, problem.radius)
    return Found(step.s, None if solve is exact else step.products)


def theirs(make: Callable[..., object], problem: Problem) -> Found:
    A, g, calls = problem.A.numpy(), problem.g.numpy(), []

    def product(_: object, v: np.ndarray) -> np.ndarray:
        calls.append(v)
        return A @ v

    subproblem = make(x=0, fun=lambda _: 0.0, jac=lambda _: g, hess=lambda _: A, hessp=product)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it divides by zero
            s = subproblem.solve(problem.radius)[0]  # type: ignore[attr-defined]
    except (ArithmeticError, ValueError):
        s = np.full_like(g, math.nan)
    matrix = isinstance(subproblem, IterativeSubproblem)
    return Found(torch.from_numpy(np.array(s)), None if matrix else len(calls))


exact = partial(trust_region_dense, rtol=RTOL)
SOLVERS: dict[str, Solver] = {
    "gltr": partial(ours, partial(gltr, rtol=RTOL)),
    "trust_region_dense": partial(ours, exact),
    "steihaug": partial(ours, partial(steihaug, rtol=RTOL)),
    "gltr, defaults": partial(ours, gltr),
    "scipy trust-krylov": partial(
        theirs, get_trlib_quadratic_subproblem(tol_rel_i=RTOL, tol_rel_b=RTOL)
    ),
    "scipy trust-exact": partial(
        theirs, partial(IterativeSubproblem, k_easy=1e-10, k_hard=1e-10, maxiter=2000)
    ),
    "scipy trust-ncg": partial(theirs, CGSteihaugSubproblem),
    "scipy trust-krylov, defaults": partial(theirs, get_trlib_quadratic_subproblem()),
    "scipy trust-exact, defaults": partial(theirs, IterativeSubproblem),
}


def group(name: str, radius: float) -> str:
    if name in HARD:
        return f"{name}, radius {radius:g}"
    if name in NEAR:
        return "near hard, tiny gradient"
    if name.startswith("n = "):
        return "n = 300"
    return name if name in {"zero hessian", "rosenbrock", "interior"} else "easy, n = 2 to 4"


def published() -> list[Problem]:
    problems = []
    for name, case in CASES.items():
        A, g = case.tensors()
        problems += [Problem(group(name, radius), A, g, radius) for radius in case.radii]
    upper = torch.zeros(19, 19, dtype=torch.float64)
    upper[tuple(torch.triu_indices(19, 19))] = numbers(SINGULAR)
    A = upper + upper.triu(1).T
    return [*problems, Problem("n = 19, condition 1e16", A, numbers(SMALL), 1.0)]


def random() -> list[Problem]:
    """The random 5 x 5 problems that scipy's tests of its exact solver draw, with other seeds."""
    return [
        Problem(f"random, {kind}", *random_entry(limits, kind), radius)
        for kind in ("easy", "near hard", "hard", "zero")
        for limits in RANGES
        for radius in RADII
    ]


def value(problem: Problem, s: Tensor) -> float:
    return (problem.g @ s + 0.5 * s @ (problem.A @ s)).item()


def judge(problem: Problem) -> dict[str, Verdict]:
    """Run every solver on a problem, each against the lowest value found."""
    found = {name: solve(problem) for name, solve in SOLVERS.items()}
    values = {}
    for name, f in found.items():
        excess = max(1.0, f.s.norm().item() / problem.radius)
        values[name] = value(problem, f.s / excess)
    best = min(v for v in values.values() if math.isfinite(v))
    scale = abs(best) or problem.radius**2 * torch.linalg.matrix_norm(problem.A, 2).item()
    inside = not trust_region_dense(problem.A, problem.g, problem.radius, rtol=RTOL).on_boundary
    return {
        name: verdict(problem, f, (values[name] - best) / scale, inside)
        for name, f in found.items()
    }


def verdict(problem: Problem, found: Found, gap: float, inside: bool) -> Verdict:
    A, g, radius, s = problem.A, problem.g, problem.radius, found.s
    if not s.isfinite().all():
        return Verdict(math.inf, math.inf, math.inf, math.inf, found.products)
    gradient, ss = A @ s + g, (s @ s).item()
    multiplier = 0.0 if inside or ss == 0 else max(0.0, -(s @ gradient).item() / ss)
    spectrum = torch.linalg.eigvalsh(A)
    size = spectrum.abs().max().item()
    residual = (gradient + multiplier * s).norm().item() / (g.norm().item() + size * radius)
    length = (math.sqrt(ss) - radius) / radius
    below = max(0.0, -spectrum[0].item() - multiplier)
    return Verdict(
        residual,
        max(0.0, length) if inside else abs(length),
        below / size if size else 0.0,
        gap,
        found.products,
    )


def number(x: float) -> str:
    return f"{x:.0e}" if x else "0"


def row(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def cell(verdicts: list[Verdict]) -> str:
    """The worst of each number, and the sum of the products."""
    worst = [max(column) for column in zip(*(v.errors for v in verdicts), strict=True)]
    errors = "not finite" if math.inf in worst else " ".join(map(number, worst))
    counts = [v.products for v in verdicts if v.products is not None]
    return f"{errors} ({sum(counts)})" if counts else errors


def main() -> None:
    """Print the table: groups by their worst case, the hard cases one by one."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    groups: dict[str, list[dict[str, Verdict]]] = {}
    for problem in (*published(), *random()):
        groups.setdefault(problem.group, []).append(judge(problem))
    print(row("problems", *SOLVERS))
    print(row("---", *["---"] * len(SOLVERS)))
    for label, verdicts in sorted(groups.items(), key=lambda item: item[0].startswith("random")):
        count = f" ({len(verdicts)})" if len(verdicts) > 1 else ""
        print(row(label + count, *(cell([v[name] for v in verdicts]) for name in SOLVERS)))
    everything = [v for verdicts in groups.values() for v in verdicts]
    solved = (sum(max(v[name].errors) <= SOLVED for v in everything) for name in SOLVERS)
    print(row(f"all four within {SOLVED:g}, of {len(everything)}", *map(str, solved)))


if __name__ == "__main__":
    main()
