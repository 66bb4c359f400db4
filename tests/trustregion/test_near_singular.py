"""Systems at the edge of singularity: a solution has the residual that it claims to have.

The smallest eigenvalue is a few rounding units of the largest, of either sign. The exact solution
is then so long that the rounding of ``A x`` is all that its residual shows.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from strategies import DTYPES
from trustregion import (
    HessianOperator,
    NewtonTrustRegion,
    Status,
    cg,
    gltr,
    minres,
    steihaug,
    to_dense,
)
from trustregion.operators import DenseOperator
from trustregion.solvers import dual_solve, fixed_cg, lsqr, multishift_cg


@st.composite
def near_singular(draw):
    """``A`` with the eigenvalues 1 to 2 and one of up to 1e4 eps, and ``b`` of ones."""
    dtype = draw(st.sampled_from(DTYPES))
    n, log_size = draw(st.integers(3, 50)), draw(st.floats(-1, 4))
    smallest = draw(st.sampled_from([1.0, -1.0])) * 10**log_size * torch.finfo(dtype).eps
    return system(dtype, n, smallest, draw(st.integers(0, 1000)))


def system(dtype, n, smallest, seed):
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.linspace(1, 2, n, dtype=torch.float64)
    values[-1] = smallest
    A = (U * values) @ U.T
    return ((A + A.T) / 2).to(dtype), torch.ones(n, dtype=dtype)


def honest(solution, residual):
    """Whether the residual's norm is what was said, up to the rounding of ``A x``."""
    rounding = 400 * torch.finfo(solution.x.dtype).eps * solution.x.double().norm().item()
    return residual.norm().item() <= 3 * solution.residual_norm + rounding


@given(near_singular(), st.sampled_from(["plain", "M", "x0", "early", "late", "verify"]))
@example(system(torch.float64, 50, 1e-13, 2), "plain")
def test_minres_returns_an_iterate_with_the_residual_of_that_iterate(near, how):
    A, b = near
    n = len(b)
    options = {
        "plain": {},
        "M": {"M": torch.diag(torch.linspace(1, 1.5, n, dtype=b.dtype))},
        "x0": {"x0": torch.linspace(0, 1, n, dtype=b.dtype)},
        "early": {"max_iter": n // 2},
        "late": {"max_iter": 2 * n},
        "verify": {"verify": True},
    }[how]
    solution = minres(A, b, **options)
    assert honest(solution, b.double() - A.double() @ solution.x.double())


@given(near_singular())
@example(system(torch.float64, 20, 1e-14, 0))
def test_minres_returns_nothing_much_worse_than_an_iterate_on_the_way(near):
    A, b = near
    seen = []
    x = minres(A, b, callback=lambda x: seen.append(size(A, b, x))).x
    rounding = 400 * torch.finfo(b.dtype).eps * x.double().norm().item()
    # the one kept is known to a factor of 4, by an estimate that holds within a factor of 3
    assert size(A, b, x) <= 12 * min(seen) + rounding
    assert x.any()


def size(A, b, x):
    return (b.double() - A.double() @ x.double()).norm().item()


@given(near_singular(), st.sampled_from([1.0, 1e3, 1e30]))
def test_the_other_kernels_say_what_they_return(near, radius):
    A, b = near
    exact, right = A.double(), b.double()
    solution = cg(A, b)
    assert honest(solution, right - exact @ solution.x.double())
    for shift, column in zip((0.0, 1e-3), multishift_cg(A, b, [0.0, 1e-3]).columns, strict=True):
        x = column.x.double()
        assert honest(column, right - exact @ x - shift * x)
    x = fixed_cg(A, b, 2 * len(b), rtol=1e-5)
    assert honest(x, right - exact @ x.x.double())
    for solution in (lsqr(A, b), dual_solve(A, b, damping=0.0)):
        assert honest(solution, exact @ (right - exact @ solution.x.double()))
    for solver in (gltr, steihaug):
        step = solver(A, -b, radius)
        pull = 0.0 if math.isnan(step.multiplier) else step.multiplier
        residual = right - exact @ step.s.double() - pull * step.s.double()
        rounding = 400 * torch.finfo(b.dtype).eps * step.s.double().norm()
        assert residual.norm() <= 3 * step.residual_norm + rounding


def test_on_the_hessian_of_a_network_in_float32():
    """Its units without effect make it singular but for rounding, and its gradient grows small."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 6, dtype=torch.float64).float(), torch.randint(3, (200,))
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    params = list(model.parameters())
    optimizer = NewtonTrustRegion(params)
    for _ in range(8):
        for _ in range(4):
            optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
        H = HessianOperator(nn.functional.cross_entropy(model(x), y), params)
        b, exact = -H.gradient, to_dense(H).double()
        solution = minres(H, b, max_iter=1000)
        assert honest(solution, b.double() - exact @ solution.x.double())


def test_where_the_solution_overflows_the_residual_is_that_of_the_start():
    A = torch.diag(torch.tensor([1.0, 1e-30]))
    for solver in (cg, minres):
        solution = solver(A, torch.tensor([0.0, 1e30]))
        assert solution.status is Status.NONFINITE_OPERATOR
        assert not solution.x.any()
        assert solution.residual_norm == pytest.approx(1e30)
        start = torch.tensor([2.0, 0.0])
        solution = solver(DenseOperator(A), torch.tensor([0.0, 1e30]), start)
        assert torch.equal(solution.x, start)
        assert solution.residual_norm == pytest.approx(1e30)
