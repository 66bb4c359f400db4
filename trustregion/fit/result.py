"""The result of minimizing a function, with the field names of ``scipy.optimize``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..status import Status
from .point import leaves

SHOWN = 10  # entries of x that are printed


@dataclass(frozen=True, kw_only=True)
class OptimizeResult:
    r"""The point that was found, and how the search ended.

    Attributes:
        x: The last point, which has the least value of all, with the structure of ``x0``.
        fun: The value at ``x`` after :func:`minimize`; the residuals :math:`r` at ``x`` after
            :func:`least_squares`. Like ``x`` and all derivatives, it is detached from its graph.
        cost: :math:`\frac12 \|r\|^2`; None after :func:`minimize`.
        grad: The gradient of the value or of the cost, with the structure of ``x``.
        jac: As in scipy. After :func:`minimize` it is the gradient again. After
            :func:`least_squares` it is the Jacobian of the residuals, shape ``(m, n)``, or None if
            that would have more than 1,000 columns or 10 million entries.
        optimality: The largest absolute entry of ``grad``.
        success: True if the search has converged.
        status: How the search ended, ``CONVERGED`` or ``STATIONARY`` after a success.
        message: The same in a sentence, with the tolerance that was met or the cause of a failure.
        nit: The number of steps that moved ``x``.
        nfev: The number of calls of ``fun``.
        products: The number of curvature products in the steps. After :func:`least_squares`, the
            first damping has cost one more and the Jacobian ``n`` halves.

    """

    x: Any
    fun: Tensor
    cost: float | None = None
    grad: Any
    jac: Any
    optimality: float
    success: bool
    status: Status
    message: str
    nit: int
    nfev: int
    products: int

    @property
    def covariance(self) -> Tensor:
        r"""The covariance of the fitted parameters, shape ``(n, n)``, in float64.

        .. math:: C = s^2 (J'J)^+, \qquad s^2 = \|r\|^2 / (m - n)

        Rows and columns follow the entries of ``x`` in their order. The pseudo-inverse is computed
        from the singular values of ``J`` after each column has been divided by its largest absolute
        entry, so that the units of the parameters do not affect its rank. Singular values of at
        most :math:`\max(m, n)\,\varepsilon` times the largest one count as zero. If there are any,
        :attr:`rank` is less than ``n``, and ``C`` assigns no variance to the combinations of
        parameters that the residuals do not determine.

        Raises:
            ValueError: There are at most as many residuals as parameters, or the Jacobian was not
                computed or is not finite.

        """
        J = self._jacobian()
        m, n = J.shape
        if m <= n:
            raise ValueError(
                "the covariance needs more residuals than parameters, from which the variance of a"
                f" residual is estimated: here m = {m} and n = {n}"
            )
        units, values, V = _spectrum(J)
        root = V / values / units[:, None]
        return 2 * (self.cost or 0.0) / (m - n) * (root @ root.T)

    @property
    def rank(self) -> int:
        """The number of independent combinations of parameters that the residuals determine.

        Raises:
            ValueError: The Jacobian was not computed or is not finite.

        """
        return len(_spectrum(self._jacobian())[1])

    def _jacobian(self) -> Tensor:
        """Return the Jacobian of the residuals, or raise if there is none to compute with."""
        if self.cost is None:
            raise ValueError("minimize has no residuals to estimate from: call least_squares")
        if self.jac is None:
            raise ValueError(
                "the Jacobian was not computed, because it would have more than 1,000 columns or"
                " 10 million entries"
            )
        if not (math.isfinite(self.cost) and bool(self.jac.isfinite().all())):
            raise ValueError(
                "the residuals or their Jacobian contain a NaN or an infinity at x. The search"
                f" ended with: {self.message}"
            )
        return self.jac

    def __str__(self) -> str:
        """Return the fields that matter, one per line, and standard errors after a fit."""
        value = (
            {"fun": f"{self.fun.item():.10g}"}
            if self.cost is None
            else {"cost": f"{self.cost:.10g}"}
        )
        fields = {
            "message": self.message,
            "success": self.success,
            "status": self.status.value,
            **value,
            "x": ("\n" + 12 * " ").join(self._entries()),
            "optimality": f"{self.optimality:.3g}",
            "nit": self.nit,
            "nfev": self.nfev,
            "products": self.products,
        }
        return "\n".join(f"{name:>10}: {field}" for name, field in fields.items())

    def _entries(self) -> Iterator[str]:
        """Yield the lines for ``x``."""
        x = torch.cat([leaf.reshape(-1) for leaf in leaves(self.x)])
        try:
            errors = self.covariance.diagonal().sqrt().tolist()
        except ValueError:
            errors = []
        for i, entry in enumerate(x[:SHOWN].tolist()):
            yield f"{entry:.10g}" + (f" +- {errors[i]:.2g}" if errors else "")
        if len(x) > SHOWN:
            yield f"... and {len(x) - SHOWN:,} more"
        if errors and self.rank < len(x):
            yield f"(the residuals determine {self.rank} of {len(x)} combinations of them)"


def _spectrum(J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the units ``u``, and the singular values and right vectors of ``J / u``.

    Only the singular values above rounding are returned, shape ``(k,)``, and their vectors,
    ``(n, k)``.
    """
    largest = J.abs().amax(0).double()
    units = torch.where(largest > 0, largest, 1.0)
    _, values, Vh = torch.linalg.svd(J.double() / units, full_matrices=False)
    above = values > max(J.shape) * torch.finfo(J.dtype).eps * values[0]
    return units, values[above], Vh[above].T


def gauss_newton_reduction(J: Tensor, g: Tensor) -> float:
    r"""Return the reduction :math:`\frac12 g'(J'J)^+ g` of the cost by a Gauss-Newton step."""
    units, values, V = _spectrum(J)
    return 0.5 * ((g.double() / units) @ V / values).square().sum().item()
