"""The diagonal of an operator as a preconditioner."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from ..arguments import check_damping, check_positive_count, finite, is_number, shown
from ..operators.base import FunctionOperator, Identity, LinearOperator
from ..operators.gauss_newton import GaussNewtonOperator
from ..solvers.spectrum import diagonal
from ..vector import exponent, ldexp
from .base import Preconditioner
from .output_noise import CoupledSamples, Samples, cotangents


class Jacobi(Preconditioner):
    r"""The preconditioner :math:`M = \mathrm{diag}(d + \lambda)^{-\alpha}`, ``d`` the diagonal.

    The diagonal is estimated. For a Fisher or Gauss-Newton matrix :math:`J'MJ / N` whose metric
    ``M`` acts sample by sample, the estimate is :math:`(J'u)^2 / N` for random changes ``u`` of the
    outputs with the covariance ``M``, which is never negative and costs half a product. For any
    other operator it is Hutchinson's, with negative values taken as zero, at one product. The
    estimates of successive solves are averaged, since the noise of few probes costs more than a
    stale diagonal.

    Entries where the damped diagonal is zero are replaced by the largest entry. If the diagonal is
    not finite, ``M`` is the identity.

    It is effective where parameters differ in scale. For the work of 10 products including builds,
    over 30 steps of small classifiers at a damping of 1e-3, the fraction of the best decrease rose
    from 0.28 to 0.76 with inputs in units from 0.03 to 30, from 0.50 to 0.80 on minibatches of 128
    of these inputs, and from 0.65 to 0.80 with embeddings of frequent and rare words. Over seven
    updates of policies 64-64 it rose from 0.48 to 0.70 on HalfCheetah and from 0.53 to 0.56 on
    Hopper. With inputs of one scale it did not change, on CartPole it fell from 1.00 to 0.97, and
    at a damping of 0.1 it fell by 0.02 on policies. With one probe, the first of these figures is
    0.57 without the running average and 0.75 with it. More than two probes cost more than they
    gain.

    Args:
        exponent: the exponent :math:`\alpha`; below one, a noisy diagonal has less influence.
        probes: the number of estimates that a build averages, or ``"exact"`` for n products.
        every: the number of solves that use one estimate.
        decay: the weight of earlier estimates in the running average.
        seed: the seed of the noise, which has a separate generator.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trustregion import Identity, cg
        >>> from trustregion.operators import DenseOperator
        >>> A, b = DenseOperator(torch.diag(torch.arange(1.0, 6.0))), torch.ones(5)
        >>> M = Jacobi(1.0, probes="exact").build(A, damping=0.5)
        >>> cg(A + 0.5 * Identity(5), b, M=M).iterations
        1

    References:
        Martens, Deep learning via Hessian-free optimization, 2010, section 4.7, which takes the
        exponent 0.75.

    """

    def __init__(
        self,
        exponent: float = 0.75,
        *,
        probes: Samples = 2,
        every: int = 1,
        decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (is_number(exponent) and 0 < exponent <= 1):
            raise ValueError(f"exponent must lie in (0, 1], got {shown(exponent)}")
        if not (is_number(decay) and 0 <= decay < 1):
            raise ValueError(f"decay must lie in [0, 1), got {shown(decay)}")
        if probes != "exact":
            check_positive_count("probes", probes)
        check_positive_count("every", every)
        self.exponent, self.every = exponent, every
        self.probes: Samples = probes
        self.decay, self.seed = decay, seed

    @torch.no_grad()
    def build(self, A: LinearOperator, damping: float) -> LinearOperator:
        """Return ``M``. Cost: per probe, half a product for a Gauss-Newton matrix, or one."""
        check_damping(damping)
        self.products, self.overhead = 0, 0.0
        solves = self.state.get("solves", 0)
        d: Tensor | None = self.state.get("diagonal")
        d = None if d is None or d.shape != A.shape[:1] else d  # it belongs to another model
        if solves % self.every == 0 or d is None:
            new = self._estimate(A, solves).double()
            if not finite(new):
                return Identity(A.shape[0], A.dtype, A.device)
            d = new if d is None else torch.lerp(new, d, self.decay)
            self.state["diagonal"] = d
        self.state["solves"] = solves + 1
        d = d.clamp(min=0.0) + damping
        e = exponent(d)
        if e is None or not finite(d):
            return Identity(A.shape[0], A.dtype, A.device)
        d = ldexp(d, -e)  # so that M does not depend on the scale
        m = torch.where(d > 0, d, d.max()).pow(-self.exponent).to(A.dtype)
        m = m.clamp(max=torch.finfo(A.dtype).max ** 0.5)
        return FunctionOperator(lambda v: m * v, A.shape[0], A.dtype, A.device)

    def _estimate(self, A: LinearOperator, solves: int) -> Tensor:
        if self.probes == "exact":
            self.products = A.shape[0]
            return diagonal(A)
        seed = self.seed + 7919 * solves  # a different draw for each estimate
        if isinstance(A, GaussNewtonOperator):
            with suppress(CoupledSamples):
                estimate = _from_noise(A, self.probes, seed)
                self.overhead = 0.5 * self.probes
                return estimate
        self.products = self.probes
        return diagonal(A, probes=self.probes, seed=seed)


def _from_noise(A: GaussNewtonOperator, probes: int, seed: int) -> Tensor:
    """Return the estimate from random changes of the outputs."""
    total = torch.zeros(A.shape[0], dtype=torch.float64, device=A.device)
    for u in cotangents(A, probes, torch.Generator().manual_seed(seed)):
        total += A.vjp(u).double().square()
    return total / A.total
