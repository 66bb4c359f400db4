"""Count what trust-region Newton methods ask of Rosenbrock's function: ours and those of scipy."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch
from scipy.optimize import minimize, rosen, rosen_der, rosen_hess_prod
from torch import Tensor

from trustregion import SubproblemSolution, gltr, lanczos, steihaug
from trustregion.solvers import classic_radius, forcing_sequence, gould_radius, reduction_ratio

TOLERANCE, MAX_ITER, STARTS = 1e-8, 5000, 20

Product = Callable[[Tensor], Tensor]
Solve = Callable[[float], SubproblemSolution]
Forcing = Callable[[float], float]
Update = Callable[..., float]
"""``(radius, rho, step)`` -> the next radius; keywords change its constants."""


@dataclass
class Rosenbrock:
    """The sum of ``100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2``, and what was asked of it."""

    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("products", "gradients", "values"), 0)
    )

    def value(self, x: np.ndarray) -> float:
        self.counts["values"] += 1
        return rosen(x)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        self.counts["gradients"] += 1
        return rosen_der(x)

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.counts["products"] += 1
        return rosen_hess_prod(x, v)

    def at(self, x: Tensor) -> tuple[Tensor, Product]:
        """Return the gradient, and the products with the Hessian."""
        return (
            torch.from_numpy(self.gradient(x.numpy())),
            lambda v: torch.from_numpy(self.product(x.numpy(), v.numpy())),
        )


@dataclass(frozen=True)
class Run:
    """How a minimisation ended, and what it cost."""

    x: np.ndarray
    iterations: int
    counts: dict[str, int]

    @property
    def solved(self) -> bool:
        return bool(np.linalg.norm(rosen_der(self.x)) <= TOLERANCE)


def by_gltr(A: Product, g: Tensor, rtol: Forcing) -> Solve:
    """Keep the Krylov space of a point: after a rejection its steps cost no product."""
    space = lanczos(A, -g, max_iter=0)
    return lambda radius: gltr(A, g, radius, rtol=rtol, space=space)


def by_steihaug(A: Product, g: Tensor, rtol: Forcing) -> Solve:
    return lambda radius: steihaug(A, g, radius, rtol=rtol)


def gould(radius: float, rho: float, step: SubproblemSolution, **factors: float) -> float:
    return gould_radius(radius, rho, length=step.norm, **factors)


def classic(radius: float, rho: float, step: SubproblemSolution, **factors: float) -> float:
    return classic_radius(radius, rho, on_boundary=step.on_boundary, **factors)


def newton(
    start: np.ndarray,
    *,
    subproblem: Callable[[Product, Tensor, Forcing], Solve] = by_gltr,
    update: Update = gould,
    rtol: Forcing = forcing_sequence(),  # noqa: B008  a pure function
    radius: float = 1.0,
    accept_above: float = 0.01,
) -> Run:
    """Minimise from a starting point by a trust-region Newton method."""
    problem, x, iterations = Rosenbrock(), torch.from_numpy(start), 0
    value = problem.value(start)
    g, A = problem.at(x)
    solve = subproblem(A, g, rtol)
    while g.norm() > TOLERANCE and iterations < MAX_ITER:
        iterations += 1
        step = solve(radius)
        trial = problem.value((x + step.s).numpy())
        rho = reduction_ratio(value, trial, step.predicted_reduction)
        radius = update(radius, rho, step)
        if rho > accept_above:
            x, value = x + step.s, trial
            g, A = problem.at(x)
            solve = subproblem(A, g, rtol)
    return Run(x.numpy(), iterations, problem.counts)


def scipy_newton(start: np.ndarray, *, method: str, **options: bool) -> Run:
    """Minimise by a method of scipy, counted in the same way."""
    problem = Rosenbrock()
    with warnings.catch_warnings():
        # trust-krylov divides by the norm of a gradient that is exactly zero
        warnings.simplefilter("ignore", RuntimeWarning)
        result = minimize(
            problem.value,
            start,
            jac=problem.gradient,
            hessp=problem.product,
            method=method,
            options={"gtol": TOLERANCE, "maxiter": MAX_ITER, **options},
        )
    return Run(result.x, result.nit, problem.counts)


METHODS: dict[str, Callable[[np.ndarray], Run]] = {
    "gltr, gould_radius": newton,
    "gltr, classic_radius": partial(newton, update=classic),
    "steihaug, classic_radius": partial(newton, subproblem=by_steihaug, update=classic),
    "steihaug, gould_radius": partial(newton, subproblem=by_steihaug),
    "scipy trust-ncg": partial(scipy_newton, method="trust-ncg"),
    "scipy trust-krylov, inexact": partial(scipy_newton, method="trust-krylov", inexact=True),
    "scipy trust-krylov, exact": partial(scipy_newton, method="trust-krylov", inexact=False),
}
RULES = {
    "as above": forcing_sequence(),
    "kappa 0.1": forcing_sequence(0.1),
    "kappa 0.25": forcing_sequence(0.25),
    "kappa 0.75": forcing_sequence(0.75),
    "theta 1": forcing_sequence(0.5, 1.0),
    "1e-2 throughout": lambda _: 1e-2,
    "1e-4 throughout": lambda _: 1e-4,
}
FACTORS = {
    "shrink 0.5": {"shrink": 0.5},
    "grow 1.5": {"grow": 1.5},
    "grow 2.5": {"grow": 2.5},
    "grow 5": {"grow": 5.0},
    "grow above 0.6": {"grow_above": 0.6},
    "grow above 0.9": {"grow_above": 0.9},
    "shrink below 0.1": {"shrink_below": 0.1},
}
POLICIES: dict[str, Update] = {"gould_radius": gould, "classic_radius": classic}


def starting_points(n: int) -> list[np.ndarray]:
    """Return points drawn uniformly from ``[-2, 2]^n``."""
    generator = np.random.default_rng(0)
    return [generator.uniform(-2, 2, n) for _ in range(STARTS)]


def neighbours(update: Update) -> dict[str, Callable[[np.ndarray], Run]]:
    """Return the method with one setting changed at a time."""
    method = partial(newton, update=update)
    methods = {name: partial(method, rtol=rule) for name, rule in RULES.items()}
    for radius in (0.1, 0.3, 3.0, 10.0, 100.0):
        methods[f"starting radius {radius:g}"] = partial(method, radius=radius)
    for name, factors in FACTORS.items():
        methods[name] = partial(newton, update=partial(update, **factors))
    for threshold in (1e-4, 0.1):
        # nothing between the two thresholds: a rejected step must shrink the radius
        factors = {"shrink_below": max(threshold, 0.01)} if update is gould else {}
        other = partial(update, **factors)
        methods[f"accept above {threshold:g}"] = partial(
            newton, update=other, accept_above=threshold
        )
    return methods


def row(*values: object) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def spread(runs: list[Run]) -> str:
    """Return the median and the range of the products, and how many runs did not end."""
    products = [run.counts["products"] for run in runs]
    failed = sum(not run.solved for run in runs)
    note = f", {failed} not solved" if failed else ""
    return f"{median(products):g} ({min(products)} to {max(products)}{note})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 10, 100])
    args = parser.parse_args()
    torch.set_num_threads(1)

    print(row("from the origin", "n", "products", "gradients", "values", "iterations", "solved"))
    print(row("---", *["---:"] * 6))
    for n in args.sizes:
        for name, method in METHODS.items():
            run = method(np.zeros(n))
            solved = "yes" if run.solved else "no"
            print(row(name, n, *run.counts.values(), run.iterations, solved), flush=True)

    print(f"\nProducts, median (range) over {STARTS} random starts:\n")
    print(row("", *(f"n = {n}" for n in args.sizes)))
    print(row("---", *["---:"] * len(args.sizes)))
    for name, method in METHODS.items():
        cells = [spread([method(x) for x in starting_points(n)]) for n in args.sizes]
        print(row(name, *cells), flush=True)

    print("\nProducts from the origin by gltr, one setting changed at a time:\n")
    print(row("", *(f"{policy}, n = {n}" for policy in POLICIES for n in args.sizes)))
    print(row("---", *["---:"] * len(args.sizes) * len(POLICIES)))
    tables = [neighbours(update) for update in POLICIES.values()]
    for name in tables[0]:
        runs = [table[name](np.zeros(n)) for table in tables for n in args.sizes]
        cells = [str(r.counts["products"]) if r.solved else "not solved" for r in runs]
        print(row(name, *cells), flush=True)


if __name__ == "__main__":
    main()
