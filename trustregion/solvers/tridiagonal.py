"""The Lanczos process with a stored orthonormal basis, in which ``A`` is tridiagonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import finite
from ..operators.base import LinearOperator, product
from ..status import Status
from ..vector import dot, exponent, ldexp, norm
from .basis import Basis, orthogonalize
from .stopping import why_no_direction


class Tridiagonalization:
    r"""Rows ``Q``, ``W`` with :math:`QW' = I` and :math:`AQ' = W'T + \beta_k w_{k+1} e_k'`.

    ``W`` is :math:`M^{-1}Q`; without a preconditioner it is ``Q`` itself. Every new vector is
    orthogonalized twice against all others in float64, so that the basis behaves as in exact
    arithmetic, also for a float32 operator.
    """

    def __init__(
        self, A: LinearOperator, b: Tensor, M: LinearOperator | None, dtype: torch.dtype
    ) -> None:
        self.A, self.M, self.dtype = A, M, dtype
        self.eps = torch.finfo(dtype).eps
        self.status: Status | None = None
        self.exhausted = False
        self.products = 0
        self.alphas: list[float] = []
        self.betas: list[float] = []  # betas[j] couples the vectors j and j + 1
        # What T does not contain: rounding, and any asymmetry of A and M.
        self.removed: list[float] = []
        self.norm_A = 0.0  # largest |Aq|/|q|
        self._spectra: dict[int, tuple[Tensor, Tensor]] = {}
        self.Q = Basis(b)
        self.W = self.Q if M is None else Basis(b)
        self.start = self._append(b, norm(b))

    @property
    def size(self) -> int:
        """The number of vectors that ``A`` has been applied to."""
        return len(self.alphas)

    def matrix(self, k: int) -> Tensor:
        """Return ``T`` of the first ``k`` vectors."""
        T = torch.diag(torch.tensor(self.alphas[:k], dtype=torch.float64, device="cpu"))
        if k > 1:
            off = torch.tensor(self.betas[: k - 1], dtype=torch.float64, device="cpu")
            T += torch.diag(off, 1) + torch.diag(off, -1)
        return T.to(self.Q.rows.device)

    def spectrum(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues and eigenvectors of ``T``, computed at unit scale and cached."""
        if k not in self._spectra:
            T = self.matrix(k)
            e = exponent(T) or 0
            theta, U = torch.linalg.eigh(ldexp(T, -e))
            self._spectra[k] = ldexp(theta, e), U
        return self._spectra[k]

    def eliminate(self, k: int, damping: float) -> tuple[int, float]:
        r"""Eliminate in :math:`(T + \lambda I) h = |b| e_1` from the top, as ``cg`` does.

        Returns the number of pivots that are positive to working precision (they are the curvatures
        that ``cg`` would meet), and the last entry of the ``h`` of that size. Cost: O(k).
        """
        floor = self.eps * max(map(abs, [*self.alphas, *self.betas, damping]))
        pivot, before, right, last = math.inf, 0.0, self.start, 0.0
        for j in range(k):
            right *= before / pivot if j else 1.0
            pivot = self.alphas[j] + damping - before * before / pivot
            if pivot <= floor:
                return j, last
            last, before = right / pivot, self.betas[j]
        return k, last

    def onward(self, k: int, last: float) -> float:
        """Return the residual of a point of the first ``k`` vectors with last coefficient ``last``.

        It is the norm of the part of ``A x`` outside of their span.
        """
        if k == 0:
            return self.start * norm(self.W.rows[0]) if self.start else 0.0
        beta = self.betas[k - 1]
        return beta * abs(last) * norm(self.W.rows[k]) if beta else 0.0

    def grow(self) -> bool:
        """Add a vector, at one product, and return whether one was added."""
        if self.exhausted or self.status is not None:
            return False
        k = self.size
        q = self.Q.rows[k]
        Aq = product(self.A, q.to(self.dtype)).double()
        self.products += 1
        alpha = dot(q, Aq)
        if not (math.isfinite(alpha) and finite(Aq)):
            self.status = Status.NONFINITE_OPERATOR
            return False
        self.norm_A = max(self.norm_A, norm(Aq) / norm(q))
        r = torch.add(Aq, self.W.rows[k], alpha=-alpha)
        if k > 0:
            r = torch.add(r, self.W.rows[k - 1], alpha=-self.betas[k - 1])
        kept = orthogonalize(r, self.W.rows, self.Q.rows)
        beta = self._append(kept, norm(Aq))
        if self.status is not None:
            return False
        self.alphas.append(alpha)
        self.betas.append(beta)
        self.removed.append(norm(r - kept))
        return True

    def restart(self, generator: torch.Generator) -> None:
        """Continue in a new Krylov space, from a random vector orthogonal to the exhausted one."""
        rows = self.W.rows
        if len(rows) == rows.shape[1]:
            return
        n, wide = rows.shape[1], torch.float64
        r = torch.randn(n, generator=generator, dtype=wide, device="cpu").to(rows.device)
        self.exhausted = False
        self._append(orthogonalize(r, rows, self.Q.rows), norm(r))  # its coupling stays 0

    def _append(self, r: Tensor, before: float) -> float:
        """Add ``Mr`` over its length, and return the length; return 0 if ``r`` is only rounding.

        ``before`` is the norm of the vector that ``r`` is the remainder of. A remainder below
        ``eps`` times that norm is rounding.
        """
        size = norm(r)
        if len(self.Q) == r.numel() or size <= self.eps * before * (len(self.Q) > 0):
            self.exhausted = True
            return 0.0
        z = r if self.M is None else product(self.M, r.to(self.dtype)).double()
        rz = size * size if self.M is None else dot(r, z)
        if not 0 < rz < math.inf:
            self.status = why_no_direction(rz)
            return 0.0
        length = math.sqrt(rz)
        self.Q.append(z / length)
        if self.M is not None:
            self.W.append(r / length)
        return length
