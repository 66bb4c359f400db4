"""Damped systems with a metric, which the tests of dual and primal solves share."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies import DTYPES
from trustregion.operators import FunctionMap
from trustregion.solvers import dual_solve

METHODS = ["dual", "primal"]
each_method = pytest.mark.parametrize("method", METHODS)


@dataclass(frozen=True)
class Damped:
    """A system ``(scale J'HJ + damping I) x = J'u``; the matrix ``A`` and ``g`` in float64."""

    J: Tensor
    H: Tensor | None
    u: Tensor
    scale: float
    damping: float

    @property
    def A(self):
        J = self.J.double()
        H = torch.eye(len(J)).double() if self.H is None else self.H.double()
        return self.scale * J.T @ H @ J + self.damping * torch.eye(J.shape[1]).double()

    @property
    def g(self):
        return self.J.double().T @ self.u.double()

    @property
    def eps(self):
        return torch.finfo(self.u.dtype).eps

    @property
    def kappa(self):
        """The condition of the system."""
        return torch.linalg.matrix_norm(self.A, 2).item() / self.damping

    def solve(self, method="dual", u=None, **options):
        arguments = {"metric": self.H, "damping": self.damping, "scale": self.scale}
        u = self.u if u is None else u
        return dual_solve(self.J, u, method=method, **{**arguments, **options})

    def residual(self, x):
        return (self.g - self.A @ x.double()).norm().item()


def metric_matrix(kind, m, generator):
    """A positive semi-definite metric: softmax blocks are singular, as is one of half the rank."""
    if kind == "none":
        return None
    if kind == "softmax":
        p = torch.softmax(torch.randn(m // 3 + 1, 3, generator=generator).double(), -1)
        blocks = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p))
        return blocks[:m, :m].contiguous()  # BLAS rounds by the layout, and 2 H would have another
    root = torch.randn(m, m if kind == "full" else (m + 1) // 2, generator=generator).double()
    return root @ root.T / m


@st.composite
def damped(
    draw,
    metrics=("none", "softmax", "full", "half"),
    ranks=(1.0, 0.5),
    dtypes=tuple(DTYPES),
    max_log_condition=4.0,
    dampings=(-8.0, 0.0),
):
    """Draw ``J = U diag(s) V'`` with known singular values, and a damping relative to ``J'HJ``."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator).double())
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator).double())
    s = torch.logspace(0, -draw(st.floats(0, max_log_condition)), k, dtype=torch.float64)
    rank = max(1, round(k * draw(st.sampled_from(ranks))))
    s[rank:] = 0.0
    dtype = draw(st.sampled_from(dtypes))
    J = ((U * s) @ V.T * 10 ** draw(st.floats(-5, 5))).to(dtype)
    H = metric_matrix(draw(st.sampled_from(metrics)), m, generator)
    H = None if H is None else H.to(dtype)
    scale = draw(st.sampled_from([1.0, 0.125, 1 / 7]))
    u = torch.randn(m, generator=generator).double()
    if draw(st.booleans()):  # as the derivative of a loss is
        u = u if H is None else H.double() @ u
    size = torch.linalg.matrix_norm(Damped(J, H, u.to(dtype), scale, 0.0).A, 2).item()
    damping = 10 ** draw(st.floats(*dampings)) * (size or 1.0)
    return Damped(J, H, u.to(dtype), scale, damping)


def counting(matrix):
    calls = []

    def forward(v):
        calls.append("J")
        return matrix @ v

    def adjoint(u):
        calls.append("J'")
        return matrix.T @ u

    return FunctionMap(forward, adjoint, tuple(matrix.shape), matrix.dtype), calls
