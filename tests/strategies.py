"""Hypothesis strategies that draw the structure of a problem, not its raw numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64]

# For laws whose examples are runs of an optimizer: a third of the examples of the profile.
costly = settings(max_examples=settings.default.max_examples // 3)


@dataclass(frozen=True)
class System:
    """A symmetric system with a known spectrum: ``A`` in ``dtype``, ``exact`` in float64."""

    A: Tensor
    exact: Tensor
    b: Tensor
    condition: float
    scale: float

    @property
    def eps(self) -> float:
        return torch.finfo(self.b.dtype).eps


def _spectrum(kind: str, n: int, condition: float, generator: torch.Generator) -> Tensor:
    if kind == "log-uniform":
        exponents = torch.rand(n, generator=generator, dtype=torch.float64)
        exponents[0], exponents[-1] = 0.0, 1.0
        values = condition**-exponents
    elif kind == "clustered":
        values = torch.tensor([1.0, condition**-0.5, condition**-1.0], dtype=torch.float64)
        values = values.repeat(n // 3 + 1)[:n]
    elif kind == "one-tiny":
        values = torch.ones(n, dtype=torch.float64)
        values[-1] = 1 / condition
    elif kind == "rank-deficient":
        values = torch.linspace(1, 1 / condition, n, dtype=torch.float64)
        values[n // 2 :] = 0.0
    else:  # sign-mixed
        values = torch.linspace(1, 1 / condition, n, dtype=torch.float64)
        values[::2] *= -1
    return values


POSITIVE = ["log-uniform", "clustered", "one-tiny"]


@st.composite
def systems(draw, kinds=tuple(POSITIVE), dtypes=tuple(DTYPES), max_log_condition=6.0, max_n=40):
    """Draw ``A = Q diag(spectrum) Q'`` with a right-hand side."""
    n = draw(st.integers(1, max_n))
    kind = draw(st.sampled_from(kinds))
    condition = 10 ** draw(st.floats(0, max_log_condition))
    scale = 10 ** draw(st.floats(-8, 8))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = scale * _spectrum(kind, n, condition, generator)
    exact = (Q * values) @ Q.T
    exact = (exact + exact.T) / 2
    b_kind = draw(st.sampled_from(["random", "in-range", "eigenvector", "unit"]))
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    if b_kind == "in-range" or kind == "rank-deficient":
        b = exact @ b
    elif b_kind == "eigenvector":
        b = Q[:, 0]
    elif b_kind == "unit":
        b = torch.eye(n, dtype=torch.float64)[0]
    A = exact.to(dtype)
    return System(A, A.double(), b.to(dtype), condition, scale)
