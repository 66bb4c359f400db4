"""Newton methods on the problems of More, Garbow and Hillstrom: ours, scipy's and torchmin's.

Run ``make mgh``. torchmin is optional: without it its columns are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.mgh_problems import Problem, problems
from trustregion import NewtonTrustRegion

MAX_ITER = 1000
LARGEST = 1e10  # radius of scipy and torchmin, whose default of 1000 is far from some minima
VALUE_RTOL, VALUE_ATOL = 1e-4, 1e-8  # how near a value is to one of the paper, of six digits


@dataclass
class Counted:
    """A problem, and what was asked of it.

    Attributes:
        values: evaluations of the loss.
        products: Products with the Hessian; a dense Hessian counts as ``n``.

    """

    problem: Problem
    values: int = 0
    products: int = 0
    _graph: tuple[bytes, Tensor, Tensor] | None = field(default=None, repr=False)

    def value(self, x: Tensor) -> Tensor:
        self.values += 1
        return self.problem.value(x)

    def numpy_value(self, x: np.ndarray) -> float:
        return self.value(torch.from_numpy(x)).item()

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return gradient(self.problem, torch.from_numpy(x)).numpy()

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.products += 1
        point, g = self._slope(x)
        (out,) = torch.autograd.grad(g, point, torch.from_numpy(v), retain_graph=True)
        return out.numpy()

    def hessian(self, x: np.ndarray) -> np.ndarray:
        return np.stack([self.product(x, v) for v in np.eye(len(x))])

    def _slope(self, x: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the point and the gradient with its graph, kept for the products of one point."""
        key = x.tobytes()
        if self._graph is None or self._graph[0] != key:
            point = torch.from_numpy(x.copy()).requires_grad_()
            (g,) = torch.autograd.grad(self.problem.value(point), point, create_graph=True)
            self._graph = key, point, g
        return self._graph[1:]


@dataclass(frozen=True)
class Run:
    """How a minimisation ended, and what it cost."""

    problem: Problem
    x: Tensor
    iterations: int
    products: int
    values: int

    @property
    def solved(self) -> bool:
        return gradient(self.problem, self.x).norm().item() <= self.problem.tolerance

    @property
    def lowest(self) -> bool:
        return self._is_at(self.problem.minima[0])

    def _is_at(self, f: float) -> bool:
        loss = self.problem.value(self.x).item()
        return math.isclose(loss, f, rel_tol=VALUE_RTOL, abs_tol=0.0 if f else VALUE_ATOL)

    def __str__(self) -> str:
        """Return iterations / products / evaluations, and what is to be said of the end."""
        cost = f"{self.iterations} / {self.products} / {self.values}"
        if not self.solved:
            return f"{cost} **no**"
        known = any(map(self._is_at, self.problem.minima))
        return cost + ("" if self.lowest else " (local)" if known else " (other)")


Method = Callable[[Problem], Run]


def gradient(problem: Problem, x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    with torch.enable_grad():  # torchmin calls back without
        (g,) = torch.autograd.grad(problem.value(point), point)
    return g


def ours(problem: Problem, **options: Any) -> Run:
    """Minimise by NewtonTrustRegion; an iteration is a trial, rejected ones included."""
    x = problem.start.clone().requires_grad_()
    optimizer = NewtonTrustRegion([x], **options)
    iterations = products = values = 0
    while iterations < MAX_ITER and gradient(problem, x).norm() > problem.tolerance:
        optimizer.step(lambda: problem.value(x))
        info = optimizer.info
        assert info is not None
        iterations += info.evaluations - 1
        products += info.products
        values += info.evaluations
        if not info.accepted:
            break
    return Run(problem, x.detach(), iterations, products, values)


def scipys(problem: Problem, *, method: str) -> Run:
    counted = Counted(problem)
    exact = method == "trust-exact"
    curvature = {"hess": counted.hessian} if exact else {"hessp": counted.product}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of divisions by a zero gradient, and of bad predictions
        result = minimize(
            counted.numpy_value,
            problem.start.numpy(),
            jac=counted.gradient,
            method=method,
            options={"gtol": problem.tolerance, "maxiter": MAX_ITER, "max_trust_radius": LARGEST},
            **curvature,
        )
    return Run(problem, torch.from_numpy(result.x), result.nit, counted.products, counted.values)


def torchmins(problem: Problem, *, method: str) -> Run:
    import torchmin  # pyright: ignore[reportMissingImports] # optional
    from torchmin import function  # pyright: ignore[reportMissingImports]

    counted, make = Counted(problem), function.jacobian_linear_operator

    class Products:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = make(*args, **kwargs)

        def mv(self, v: Tensor) -> Tensor:
            counted.products += 1
            return self.inner.mv(v)

    options: dict[str, Any] = {"gtol": problem.tolerance, "max_trust_radius": LARGEST}
    if method == "newton-cg":  # it has a rule on the step only: stopped by the same as the others

        def stop(x: Tensor) -> bool:
            return gradient(problem, x).norm().item() <= problem.tolerance

        options = {"xtol": 0.0, "callback": stop}
    with mock.patch.object(function, "jacobian_linear_operator", Products):
        result = torchmin.minimize(
            counted.value, problem.start, method, max_iter=MAX_ITER, options=options
        )
    if method == "trust-exact":  # a dense Hessian at every point
        counted.products = counted.values * len(problem.start)
    return Run(problem, result.x, result.nit, counted.products, counted.values)


def methods() -> dict[str, Method]:
    """Return the methods by the heads of their columns."""
    found: dict[str, Method] = {"ours": ours}
    names = ("trust-ncg", "trust-krylov", "trust-exact")
    found |= {f"scipy {name}": partial(scipys, method=name) for name in names}
    if importlib.util.find_spec("torchmin") is not None:
        names = (*names, "newton-cg")
        found |= {f"torchmin {name}": partial(torchmins, method=name) for name in names}
    return found


def attempt(method: Method, problem: Problem) -> Run | str:
    """Return the run, or the name of the error that ended it."""
    try:
        return method(problem)
    except Exception as error:  # a peer that fails is a result
        return type(error).__name__


def row(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"


def main() -> None:
    """Print the table, and what it says of all problems together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="a part of the names of the problems to run", default="")
    parser.add_argument("--absolute", help="1e-8 whatever the loss", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, rows = methods(), []
    print(row("problem", *table))
    print(row("---", *("---:" for _ in table)))
    for problem in problems(absolute=given.absolute):
        if given.only in problem.name:
            rows.append([attempt(method, problem) for method in table.values()])
            print(row(problem.name, *rows[-1]), flush=True)
    columns = list(zip(*rows, strict=True))
    print(row(f"solved, of {len(rows)}", *(sum(map(solved, column)) for column in columns)))
    print(row("at the lowest value known", *(sum(map(lowest, column)) for column in columns)))
    usable = [i for i, column in enumerate(columns) if 2 * sum(map(solved, column)) > len(rows)]
    shared = [r for r in rows if all(lowest(r[i]) for i in usable)]
    sums = [total([r[i] for r in shared]) if i in usable else "" for i in range(len(columns))]
    print(row(f"sum over the {len(shared)} that all solve so", *sums))


def solved(run: Run | str) -> bool:
    return isinstance(run, Run) and run.solved


def lowest(run: Run | str) -> bool:
    return isinstance(run, Run) and run.solved and run.lowest


def total(runs: list[Run | str]) -> str:
    """Return the sums of iterations, products and evaluations."""
    ended = [run for run in runs if isinstance(run, Run)]
    counts = [[run.iterations, run.products, run.values] for run in ended]
    return " / ".join(str(sum(column)) for column in zip(*counts, strict=True))


if __name__ == "__main__":
    main()
