"""A randomized approximation of the largest eigenvalues as a preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_damping, check_positive_count, finite
from ..operators.base import FunctionOperator, Identity, LinearOperator
from ..vector import exponent, ldexp
from .base import Preconditioner, product_work


class Nystrom(Preconditioner):
    r"""The preconditioner of a randomized Nyström approximation :math:`A \approx U \Lambda U'`.

    .. math:: M = U \frac{\lambda_r + \mu}{\Lambda + \mu} U' + (I - UU')

    with the damping :math:`\mu` and the smallest eigenvalue :math:`\lambda_r` of the approximation.
    It is effective where few eigenvalues are far above the others and above the damping, and where
    many solves share a sketch. If the rank is the number of eigenvalues above the damping, a few
    iterations solve the system. Fisher matrices of networks have more such eigenvalues: for the
    work of 10 products at a damping of 1e-3, the fraction of the best decrease rose from 0.65 to
    0.67 with rank 10 and to 0.70 with rank 30 over 30 steps of a classifier with embeddings. Over
    seven updates of a policy 64-64 on Hopper it rose from 0.53 to 0.76 with rank 30, and did not
    change with rank 10. A new sketch every 5 solves was worse than every 20 solves in both cases.

    Only positive curvature is used. If there is none, or the products are not finite, ``M`` is the
    identity.

    A sketch costs ``rank`` products with ``A`` and about ``10 n rank^2`` operations in float64; a
    product with ``M`` costs ``4 n rank`` operations. The memory is ``n rank``.

    Args:
        rank: the rank of the approximation, at most ``n``.
        every: the number of solves that share a sketch; each uses its own damping.
        seed: the seed of the sketch, which has a separate generator.

    Raises:
        ValueError: ``rank`` or ``every`` is not a positive integer.

    Example:
        >>> from trustregion import Identity, cg
        >>> from trustregion.operators import DenseOperator
        >>> A, b = DenseOperator(torch.diag(torch.tensor([9.0, 4.0, 0.0]))), torch.ones(3)
        >>> M = Nystrom(2).build(A, damping=0.1)
        >>> cg(A + 0.1 * Identity(3), b, M=M).iterations
        2

    References:
        Frangella, Tropp and Udell, Randomized Nyström Preconditioning, 2023, algorithm 2.1 and
        eq. 1.3.

    """

    def __init__(self, rank: int, *, every: int = 20, seed: int = 0) -> None:
        super().__init__()
        check_positive_count("rank", rank)
        check_positive_count("every", every)
        self.rank, self.every, self.seed = rank, every, seed

    @torch.no_grad()
    def build(self, A: LinearOperator, damping: float) -> LinearOperator:
        """Return ``M``. Cost: ``rank`` products, or none if the sketch is reused."""
        check_damping(damping)
        self.products, self.overhead = 0, 0.0
        solves, U = self.state.get("solves", 0), self.state.get("vectors")
        self.state["solves"] = solves + 1
        if solves % self.every == 0 or U is None or len(U) != A.shape[0]:
            self._sketch(A, solves)
        if self.state["vectors"] is None or not len(self.state["values"]):
            return Identity(A.shape[0], A.dtype, A.device)
        U, values = self.state["vectors"].to(A.dtype), self.state["values"]
        weights = ((values[-1] + damping) / (values + damping) - 1).to(A.dtype)

        def multiply(v: Tensor) -> Tensor:
            return torch.addmv(v, U, weights * (U.T @ v))

        return FunctionOperator(multiply, A.shape[0], A.dtype, A.device)

    def work(self, A: LinearOperator) -> float:
        """Return the cost of one product with ``M``, in units of one product with ``A``."""
        return 4 * A.shape[0] * min(self.rank, A.shape[0]) / product_work(A)

    def _sketch(self, A: LinearOperator, solves: int) -> None:
        """Keep the eigenvectors and values of ``A Q (Q'AQ)^-1 (AQ)'`` for a random basis ``Q``."""
        n, rank = A.shape[0], min(self.rank, A.shape[0])
        generator = torch.Generator().manual_seed(self.seed + 7919 * solves)
        draw = torch.randn(n, rank, generator=generator, dtype=torch.float64, device="cpu").to(
            A.device
        )
        Q = torch.linalg.qr(draw).Q.to(A.dtype)
        Y = A.mm(Q).double()
        self.products, self.overhead = rank, 10.0 * n * rank**2 / product_work(A)
        if not finite(Y):
            self.state["vectors"] = None  # the next solve tries again
            return
        e = exponent(Y) or 0
        Y = ldexp(Y, -e)  # so that the result does not depend on the scale of A
        inner = Q.double().T @ Y
        theta, W = torch.linalg.eigh((inner + inner.T) / 2)
        # Below this threshold an eigenvalue of Q'AQ is a rounding error of the products in the
        # dtype of A. It also keeps the weights of M above the rounding errors of I - UU'.
        floor = n**0.5 * torch.finfo(A.dtype).eps * theta.abs().max()
        kept = theta > floor
        U, sizes, _ = torch.linalg.svd(Y @ (W[:, kept] / theta[kept].sqrt()), full_matrices=False)
        self.state["vectors"], self.state["values"] = U.to(A.dtype), ldexp(sizes.square(), e)
