"""Solvers beside one peer each, of another package or the plain way: time and products.

Both sides get the same product, which counts its calls; the peers' arrays share memory with the
tensors. Before anything is timed, the results must agree.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.optimize._trlib import get_trlib_quadratic_subproblem
from scipy.optimize._trustregion_exact import IterativeSubproblem
from scipy.optimize._trustregion_ncg import CGSteihaugSubproblem
from scipy.sparse import linalg as scipy_linalg
from torch import Tensor

from benchmarks.allocator import keep_freed_memory
from benchmarks.report import cells, row
from benchmarks.solver_peers import Counted
from benchmarks.solvers import one_thread
from benchmarks.systems import dense
from trustregion import cg, gltr, multishift_cg, steihaug
from trustregion.operators import FunctionMap
from trustregion.solvers import (
    constrained_kl_ball_step,
    dual_solve,
    fixed_cg,
    lsqr,
    trust_region_dense,
)

WARMUP = 2


@dataclass(frozen=True)
class Outcome:
    """What a run returned, and the products it took: None where it works on the matrix."""

    x: Tensor
    products: int | None = None


Run = Callable[[], Outcome]


@dataclass(frozen=True)
class Pair:
    """One task done in two ways, whose results must agree."""

    ours: Run
    peer: Run
    judge: Callable[[Tensor], Tensor]
    """What is compared: the result itself, or its value where the minimisers may differ."""
    within: float
    """The difference allowed, relative."""

    def check(self) -> tuple[Outcome, Outcome]:
        """Assert that both agree, and return them."""
        ours, peer = self.ours(), self.peer()
        a, b = self.judge(ours.x), self.judge(peer.x)
        assert b.norm() > 0
        assert (a - b).norm() <= self.within * b.norm()
        return ours, peer


def _same(x: Tensor) -> Tensor:
    return x


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def least_squares() -> Pair:
    """2,000 x 500, condition 1e2, damping 1e-6: 50 iterations each."""
    m, n, iterations, damping = 2000, 500, 50, 1e-6
    Q, _ = torch.linalg.qr(_normal(m, n))
    J = Q @ dense(n, 1e2, torch.float64).exact(torch.eye(n, dtype=torch.float64))
    b = _normal(m)

    def ours() -> Outcome:
        forward, back = Counted(lambda v: J @ v), Counted(lambda u: J.T @ u)
        x = lsqr(
            FunctionMap(forward, back, (m, n), torch.float64),
            b,
            damping=damping,
            rtol=0.0,
            max_iter=iterations,
        ).x
        return Outcome(x, forward.calls + back.calls)

    def peer() -> Outcome:
        forward, back = Counted(lambda v: J @ v), Counted(lambda u: J.T @ u)
        products = {"matvec": forward.on_array, "rmatvec": back.on_array, "dtype": float}
        A = scipy_linalg.LinearOperator((m, n), **products)  # type: ignore[arg-type]
        x = scipy_linalg.lsqr(
            A, b.numpy(), damping**0.5, atol=0.0, btol=0.0, conlim=0.0, iter_lim=iterations
        )[0]
        return Outcome(torch.from_numpy(x), forward.calls + back.calls)

    return Pair(ours, peer, _same, 1e-6)


@dataclass(frozen=True)
class Region:
    """Minimise ``g's + s'As / 2`` over the ball."""

    A: Tensor
    g: Tensor
    radius: float

    def value(self, s: Tensor) -> Tensor:
        return self.g @ s + 0.5 * s @ (self.A @ s)

    def solve(self, make: Callable[..., object]) -> Outcome:
        """Call a subproblem solver of scipy."""
        g, counted = self.g.numpy(), Counted(lambda v: self.A @ v)
        problem = make(
            x=0,
            fun=lambda _: 0.0,
            jac=lambda _: g,
            hess=lambda _: self.A.numpy(),
            hessp=lambda _, v: counted.on_array(v),
        )
        s = problem.solve(self.radius)[0]  # type: ignore[attr-defined]
        matrix = isinstance(problem, IterativeSubproblem)
        return Outcome(torch.from_numpy(np.array(s)), None if matrix else counted.calls)


def _region(n: int, shift: float, radius: float) -> Region:
    """A full matrix with eigenvalues from ``1e-2 - shift`` to ``1 - shift``."""
    matrix = dense(n, 1e2, torch.float64).exact(torch.eye(n, dtype=torch.float64))
    g = _normal(n)
    return Region(matrix - shift * torch.eye(n, dtype=torch.float64), g / g.norm(), radius)


def krylov_region(n: int = 1000) -> Pair:
    """An indefinite matrix, the step on the boundary, 1e-8 asked of the peer.

    It ends well before that; ours gets as many products, and so the same Krylov space.
    """
    region = _region(n, 0.1, 10.0)
    make = get_trlib_quadratic_subproblem(tol_rel_i=1e-8, tol_rel_b=1e-8)
    limit = region.solve(make).products

    def ours() -> Outcome:
        counted = Counted(lambda v: region.A @ v)
        s = gltr(counted, region.g, region.radius, rtol=0.0, max_iter=limit).s
        return Outcome(s, counted.calls)

    return Pair(ours, lambda: region.solve(make), _same, 1e-6)


def truncated_region() -> Pair:
    """A definite matrix of 1,000 unknowns, to the tolerance that scipy's has."""
    region = _region(1000, 0.0, 1e3)
    rtol = min(0.5, region.g.norm().item() ** 0.5)

    def ours() -> Outcome:
        counted = Counted(lambda v: region.A @ v)
        return Outcome(steihaug(counted, region.g, region.radius, rtol=rtol).s, counted.calls)

    return Pair(ours, lambda: region.solve(CGSteihaugSubproblem), _same, 1e-10)


def dense_region(n: int) -> Pair:
    """A matrix, indefinite; 1e-10 asked of both."""
    region = _region(n, 0.1, 10.0)
    make = partial(IterativeSubproblem, k_easy=1e-10, k_hard=1e-10)
    return Pair(
        lambda: Outcome(trust_region_dense(region.A, region.g, region.radius, rtol=1e-10).s),
        lambda: region.solve(make),
        region.value,
        1e-8,
    )


def dual(spread: float, m: int = 64, n: int = 20_000) -> Pair:
    """The space of 64 outputs against that of 20,000 parameters, 1e-8 asked of both.

    The rows of ``J`` differ in length by the spread: the more, the more iterations the primal
    method takes.
    """
    J = _normal(m, n) / n**0.5 * torch.logspace(0, -math.log10(spread), m).double().unsqueeze(1)
    u = _normal(m)

    def solve(method: str) -> Outcome:
        solution = dual_solve(J, u, damping=1e-6, method=method, rtol=1e-8)  # type: ignore[arg-type]
        return Outcome(solution.x, solution.products)

    return Pair(lambda: solve("dual"), lambda: solve("primal"), _same, 1e-6)


def mapped(count: int = 64, n: int = 100, iterations: int = 10) -> Pair:
    """64 systems of 100 unknowns, 10 iterations: one vmap against a loop of ``cg``."""
    matrix = dense(n, 1e1, torch.float64).exact(torch.eye(n, dtype=torch.float64))
    A = torch.stack([matrix * (1 + k / count) for k in range(count)])
    b = _normal(count, n)
    solve = torch.func.vmap(lambda A, b: fixed_cg(A, b, iterations).x)

    def ours() -> Outcome:
        with torch.no_grad():
            return Outcome(solve(A, b), count * iterations)

    def loop() -> Outcome:
        solutions = [cg(a, c, rtol=0.0, max_iter=iterations) for a, c in zip(A, b, strict=True)]
        x = torch.stack([solution.x for solution in solutions])
        return Outcome(x, sum(solution.products for solution in solutions))

    return Pair(ours, loop, _same, 1e-10)


def constrained(n: int) -> Pair:
    """A KL ball with two linear constraints, one of them violated, against a general solver."""
    H = dense(n, 1e2, torch.float64).exact(torch.eye(n, dtype=torch.float64))
    g, a = _normal(3, n)[0], _normal(3, n)[1:]
    b, delta = torch.tensor([0.05, -0.1], dtype=torch.float64), 0.01

    def ours() -> Outcome:
        step = constrained_kl_ball_step(H, g, delta, a, b, rtol=1e-10)
        return Outcome(step.s, step.products)

    def peer() -> Outcome:
        h, c, rows, values = H.numpy(), g.numpy(), a.numpy(), b.numpy()
        ball = {
            "type": "ineq",
            "fun": lambda s: delta - 0.5 * s @ h @ s,
            "jac": lambda s: -(h @ s),
        }
        linear = {"type": "ineq", "fun": lambda s: -(values + rows @ s), "jac": lambda _: -rows}
        options = {"ftol": 1e-12, "maxiter": 1000}
        found = minimize(
            lambda s: c @ s,
            np.zeros(n),
            jac=lambda _: c,
            method="SLSQP",
            constraints=[ball, linear],
            options=options,
        )
        return Outcome(torch.from_numpy(found.x))

    return Pair(ours, peer, lambda s: g @ s, 1e-6)


def shifted(n: int = 1000) -> Pair:
    """Eight shifts of one system, 1e-8 asked for: one space against eight solves."""
    matrix = dense(n, 1e3, torch.float64).exact(torch.eye(n, dtype=torch.float64))
    b, shifts = _normal(n), [10.0**-k for k in range(8)]

    def ours() -> Outcome:
        counted = Counted(lambda v: matrix @ v)
        x = multishift_cg(counted, b, shifts, rtol=1e-8).x
        return Outcome(x, counted.calls)

    def peer() -> Outcome:
        counted = Counted(lambda v: matrix @ v)
        each = []
        for shift in shifts:
            product = partial(lambda v, shift: counted(v) + shift * v, shift=shift)
            each.append(cg(product, b, rtol=1e-8).x)
        return Outcome(torch.stack(each, dim=1), counted.calls)

    return Pair(ours, peer, _same, 1e-4)  # residuals of 1e-8 at a condition of 1e3


PAIRS: dict[str, Callable[[], Pair]] = {
    "lsqr, scipy lsqr": least_squares,
    "gltr, scipy trust-krylov": krylov_region,
    "steihaug, scipy trust-ncg": truncated_region,
    "trust_region_dense n = 20, scipy trust-exact": partial(dense_region, 20),
    "trust_region_dense n = 300, scipy trust-exact": partial(dense_region, 300),
    "dual_solve, rows of one length: dual, primal": partial(dual, 1.0),
    "dual_solve, rows of 1 to 1e-2: dual, primal": partial(dual, 1e2),
    "vmap of fixed_cg, a loop of cg": mapped,
    "constrained_kl_ball_step n = 20, scipy SLSQP": partial(constrained, 20),
    "constrained_kl_ball_step n = 200, scipy SLSQP": partial(constrained, 200),
    "multishift_cg, cg for each shift": shifted,
}


def milliseconds(run: Run) -> float:
    """Processor time of one run."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="turns of the timings")
    args = parser.parse_args()
    keep_freed_memory()
    one_thread()
    print(row("ours, peer", "products", "theirs", "ms", "theirs", "peer / ours"))
    print(row("---", *["---:"] * 5))
    for name, make in PAIRS.items():
        pair = make()
        counts = ("-" if o.products is None else str(o.products) for o in pair.check())
        turns = [
            (milliseconds(pair.ours), milliseconds(pair.peer)) for _ in range(WARMUP + args.repeats)
        ][WARMUP:]
        ours, peer = map(list, zip(*turns, strict=True))
        print(row(name, *counts, f"{median(ours):.2f}", *cells(peer, ours)), flush=True)


if __name__ == "__main__":
    main()
