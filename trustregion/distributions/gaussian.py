"""The normal families: KL without cancellation, Fisher matrix in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import Metric, Tensors, positive
from .gaps import log_gap


def scale_kl(s0: Tensor, s1: Tensor) -> Tensor:
    """Return the KL of two normals with the same mean; infinite for an invalid scale."""
    ratio = s0 / s1
    gap = log_gap((s0 - s1) / s1 * (ratio + 1), ratio.square())
    return torch.where(positive(s0, s1), gap / 2, torch.inf)


def scale_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of a normal in its scale."""
    twice = 2 * params[0].square().reciprocal()
    return lambda d: (twice * d[0],)


def normal_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of normals, parameters loc and scale."""
    (mu0, s0), (mu1, s1) = old, new
    spread = scale_kl(s0, s1)
    both = spread + ((mu0 - mu1) / s1).square() / 2
    return torch.where(spread < torch.inf, both, spread)  # 0/0 for an invalid scale


def normal_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of normals, parameters loc and scale."""
    precision = params[1].square().reciprocal()
    twice = 2 * precision
    return lambda d: (precision * d[0], twice * d[1])


def mvn_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of multivariate normals, parameters loc and scale_tril."""
    (mu0, l0), (mu1, l1) = old, new
    d0, d1 = l0.diagonal(dim1=-2, dim2=-1), l1.diagonal(dim1=-2, dim2=-1)
    possible = positive(d0, d1).all(-1)
    # L1^-1 L0 - 1, computed from the difference so that close factors lose no digits
    a = torch.linalg.solve_triangular(l1, (l0 - l1).tril(), upper=False)
    z = torch.linalg.solve_triangular(l1, (mu0 - mu1).unsqueeze(-1), upper=False)
    below = a.tril(-1).square().sum((-2, -1))
    kl = scale_kl(d0, d1).sum(-1) + 0.5 * (below + z.square().sum((-2, -1)))
    return torch.where(possible, kl, torch.inf)


def mvn_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of multivariate normals, parameters loc and scale_tril."""
    scale_tril = params[1]
    inverse = torch.linalg.solve_triangular(
        scale_tril,
        torch.eye(scale_tril.shape[-1], device=scale_tril.device).to(scale_tril),
        upper=False,
    )
    inverse_t = inverse.mT

    def fisher(d: Tensors) -> Tensors:
        mean = inverse_t @ (inverse @ d[0].unsqueeze(-1))
        # With A = L^-1 dL the metric is |A + A'|^2 / 2, hence M dL = tril(L^-T (A + A')).
        a = inverse @ d[1].tril()
        return mean.squeeze(-1), (inverse_t @ (a + a.mT)).tril()

    return fisher


def low_rank_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of low-rank normals, parameters loc, cov_factor and cov_diag.

    With ``E = L1^-1 (S0 - S1) L1^-T`` it is ``(tr E - log det(I + E)) / 2`` plus the term of the
    means. Cost: n^3 operations per sample.
    """
    (mu0, w0, v0), (mu1, w1, v1) = old, new
    valid = positive(v0, v1)
    possible = valid.all(-1)
    v0, v1 = torch.where(valid, v0, 1.0), torch.where(valid, v1, 1.0)
    eye = torch.eye(v0.shape[-1], device=v0.device).to(v0)
    # S = D (I + U U') D with D^2 = cov_diag, which normalizes the scale of the variances
    scale = v1.rsqrt().unsqueeze(-1)
    u0, u1, du = scale * w0, scale * w1, scale * (w0 - w1)
    change = du @ u0.mT + u1 @ du.mT + torch.diag_embed((v0 - v1) / v1)
    l1, info1 = torch.linalg.cholesky_ex(eye + u1 @ u1.mT)
    left = torch.linalg.solve_triangular(l1, (change + change.mT) / 2, upper=False)
    e = torch.linalg.solve_triangular(l1, left.mT, upper=False)
    e = (e + e.mT) / 2
    c, info0 = torch.linalg.cholesky_ex(eye + e)
    below = c.tril(-1).square()
    # The squared pivots minus one, from the entries of E and not of 1 + E
    pivots = e.diagonal(dim1=-2, dim2=-1) - below.sum(-1)
    ratio = c.diagonal(dim1=-2, dim2=-1).square()
    z = torch.linalg.solve_triangular(l1, scale * (mu0 - mu1).unsqueeze(-1), upper=False)
    kl = (log_gap(pivots, ratio).sum(-1) + below.sum((-2, -1)) + z.square().sum((-2, -1))) / 2
    return torch.where(possible & (info0 == 0) & (info1 == 0), kl, torch.inf)


def low_rank_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of low-rank normals, parameters loc, cov_factor and cov_diag."""
    _, factor, variance = params
    scale = variance.rsqrt().unsqueeze(-1)
    u = scale * factor
    eye = torch.eye(variance.shape[-1], device=variance.device).to(variance)
    root, _ = torch.linalg.cholesky_ex(eye + u @ u.mT)
    whiten = torch.linalg.solve_triangular(root, torch.diag_embed(scale.squeeze(-1)), upper=False)
    white_factor = whiten @ factor

    def fisher(d: Tensors) -> Tensors:
        mean = whiten.mT @ (whiten @ d[0].unsqueeze(-1))
        # The metric is tr(A A) / 2 with A = W dS W', W the inverse root of S.
        half = (whiten @ d[1]) @ white_factor.mT
        a = half + half.mT + (whiten * d[2].unsqueeze(-2)) @ whiten.mT
        aw = a @ whiten
        return mean.squeeze(-1), whiten.mT @ (a @ white_factor), (whiten * aw).sum(-2) / 2

    return fisher
