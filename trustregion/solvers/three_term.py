"""The preconditioned three-term recurrence of Lanczos, which stores two vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators.base import LinearOperator, product
from ..status import Status
from ..vector import dot, exponent, ldexp, norm, scalar_ldexp


class ThreeTerm:
    r"""The process ``A v_k = beta_k u_{k-1} + alfa_k u_k + beta_{k+1} u_{k+1}``, ``v = M u``.

    ``u`` lies in the space of the residuals and ``v`` in the space of ``x``; ``u_i'v_j`` is 1 if
    ``i = j`` and 0 otherwise. Powers of two bring products with ``A`` and ``M`` to unit scale.
    """

    def __init__(self, b: Tensor, dtype: torch.dtype, M: LinearOperator | None) -> None:
        self.dtype, self.M, self.eps = dtype, M, torch.finfo(dtype).eps
        self.A_unit: int | None = None  # exponents of the units of A and M, once known
        self.M_unit: int | None = None
        self.u = self.v = self.u_old = torch.zeros_like(b)
        self.beta, self.size_v = 0.0, 1.0
        self.norm_T = self.norm_A = 0.0
        self.next = b, b, 0.0  # beta u, beta v and beta of the next vectors

    def start(self, b: Tensor) -> float | Status:
        """Make the first vectors, and return the length of ``b``."""
        found = self._length(b)
        if isinstance(found, Status):
            return found
        self.next = b, *found
        self.turn()
        self.beta = 0.0
        return found[1]

    def grow(self, Av: Tensor) -> tuple[float, float, Tensor] | Status:
        """Return ``alfa``, ``beta`` and ``beta u`` of the next vector."""
        if self.A_unit is None:
            self.A_unit = exponent(Av) or 0
        z = ldexp(Av, -self.A_unit)
        size, self.size_v = norm(z), 1.0 if self.M is None else norm(self.v)
        if not math.isfinite(size):
            return Status.NONFINITE_OPERATOR
        self.norm_A = max(self.norm_A, size / self.size_v)
        z.sub_(self.u_old, alpha=self.beta)
        alfa = dot(self.v, z)
        z.sub_(self.u, alpha=alfa)
        invariant = norm(z) <= self.eps * size  # the Krylov space holds A v
        found = (z.zero_(), 0.0) if invariant else self._length(z)
        if isinstance(found, Status):
            return found
        self.next = z, *found
        self.norm_T = max(self.norm_T, math.hypot(self.beta, alfa, found[1]))
        return alfa, found[1], z

    def turn(self) -> None:
        """Advance to the next vectors if there are any."""
        z, Mz, beta = self.next
        if beta > 0:
            self.u_old, self.u, self.beta = self.u, z / beta, beta
            self.v = self.u if self.M is None else Mz / beta

    def _length(self, z: Tensor) -> tuple[Tensor, float] | Status:
        """Return ``M z`` and ``sqrt(z'Mz)``, or a status if ``M`` fails."""
        if self.M is None:
            size = norm(z)
            return (z, size) if math.isfinite(size) else Status.NONFINITE_OPERATOR
        Mz = self.times_M(z)
        if self.M_unit is None:
            self.M_unit = (exponent(Mz) or 0) - (exponent(z) or 0)
        Mz = ldexp(Mz, -self.M_unit)
        zMz, rounding = dot(z, Mz), self.eps * norm(z) * norm(Mz)
        if not math.isfinite(zMz + rounding):
            return Status.NONFINITE_OPERATOR
        if zMz < -rounding:
            return Status.INDEFINITE_PRECONDITIONER
        return (Mz, math.sqrt(zMz)) if zMz > rounding else Status.BREAKDOWN

    def times_M(self, r: Tensor) -> Tensor:
        """Return ``M r``, in the space of ``x``."""
        return r if self.M is None else product(self.M, r.to(self.dtype)).double()

    def metric_norm(self, phibar: float) -> float | None:
        """Return ``sqrt(r'Mr)`` from its value in the unit of ``M``; None without ``M``."""
        if self.M_unit is None:
            return None
        half, odd = divmod(self.M_unit, 2)
        return scalar_ldexp(phibar * math.sqrt(1 + odd), half)
