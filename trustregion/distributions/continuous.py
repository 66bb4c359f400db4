"""Continuous families except the normal ones: KL without cancellation, Fisher in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .family import Metric, Tensors, positive
from .gaps import entropy_gap, exp_gap, log_gap, stirling_curvature, stirling_gap

_EULER = 0.5772156649015329


def exponential_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of exponentials, parameter rate."""
    valid = positive(old[0], new[0])
    r0, r1 = old[0], new[0]
    return torch.where(valid, log_gap((r1 - r0) / r0, r1 / r0), torch.inf)


def exponential_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of exponentials in their rate."""
    inverse = params[0].square().reciprocal()
    return lambda d: (inverse * d[0],)


def gamma_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of gammas, parameters concentration and rate.

    It is the gap of ``lgamma(a) - a log a`` plus a term for the difference of the means ``a / b``.
    """
    valid = positive(*old, *new)
    (a0, b0), (a1, b1) = old, new
    d = a1 - a0
    t = ((b1 - b0) / b0 - d / a0) * (a0 / a1)
    kl = stirling_gap(a0, a1, d) + a1 * log_gap(t, (a0 / a1) * (b1 / b0))
    return torch.where(valid, kl, torch.inf)


def gamma_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of gammas, parameters concentration and rate."""
    a, b = params
    curvature = stirling_curvature(a)

    def fisher(d: Tensors) -> Tensors:
        mean = d[0] / a - d[1] / b  # the relative change of the mean
        return mean + curvature * d[0], -(a / b) * mean

    return fisher


def shape_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of gammas of one rate, parameter concentration."""
    valid = positive(old[0], new[0])
    a0, a1 = old[0], new[0]
    d = a1 - a0
    return torch.where(valid, stirling_gap(a0, a1, d) + entropy_gap(a0, a1, d), torch.inf)


def shape_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of gammas in their concentration."""
    trigamma = stirling_curvature(params[0]) + params[0].reciprocal()
    return lambda d: (trigamma * d[0],)


def dirichlet_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of Dirichlets, parameter concentration.

    It is the sum of the concentrations times a categorical KL of the means, new to old, plus the
    gaps of ``lgamma(a) - a log a`` of the concentrations, minus the gap of their sum, which is
    always smaller.
    """
    valid = positive(old[0], new[0])
    possible = valid.all(-1)
    a0, a1 = old[0], new[0]
    d = a1 - a0
    s0, s1, ds = a0.sum(-1, keepdim=True), a1.sum(-1, keepdim=True), d.sum(-1, keepdim=True)
    t = (ds / s0 - d / a0) * (a0 / a1)
    means = a1 * log_gap(t, (a0 / a1) * (s1 / s0))
    parts = (means + stirling_gap(a0, a1, d)).sum(-1)
    return torch.where(possible, parts - stirling_gap(s0, s1, ds).squeeze(-1), torch.inf)


def dirichlet_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of Dirichlets in their concentration."""
    a = params[0]
    s = a.sum(-1, keepdim=True)
    own, shared = stirling_curvature(a), stirling_curvature(s)

    def fisher(d: Tensors) -> Tensors:
        ds = d[0].sum(-1, keepdim=True)
        return (own * d[0] - shared * ds + (d[0] / a - ds / s),)

    return fisher


def beta_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of betas, parameters concentration1 and concentration0."""
    return dirichlet_kl((torch.stack(old, -1),), (torch.stack(new, -1),))


def beta_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of betas, parameters concentration1 and concentration0."""
    metric = dirichlet_fisher((torch.stack(params, -1),))
    return lambda d: metric((torch.stack(d, -1),))[0].unbind(-1)


def cauchy_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of Cauchys, parameters loc and scale (Chyzak and Nielsen 2019)."""
    (mu0, s0), (mu1, s1) = old, new
    valid = positive(s0, s1)
    d, e = mu1 - mu0, s1 - s0
    return torch.where(valid, ((d / s0 * (d / s1) + e / s0 * (e / s1)) / 4).log1p(), torch.inf)


def cauchy_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of Cauchys, parameters loc and scale."""
    half = params[1].square().reciprocal() / 2
    return lambda d: (half * d[0], half * d[1])


def half_cauchy_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of half-Cauchys, parameter scale."""
    zero = torch.zeros_like(old[0])
    return cauchy_kl((zero, old[0]), (zero, new[0]))


def half_cauchy_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of half-Cauchys in their scale."""
    half = params[0].square().reciprocal() / 2
    return lambda d: (half * d[0],)


def _gumbel_gap(m: Tensor, e: Tensor, c: Tensor) -> Tensor:
    """Return the KL of Gumbels for the ratio ``c = 1 + e`` of scales, and ``m`` new scales apart.

    With ``w = m + lgamma(1 + c)`` it is ``exp_gap(w)`` plus the gap of lgamma between 1 and ``c``,
    which is the gap between 2 and ``1 + c`` plus the gap of a logarithm.
    """
    two = torch.full_like(c, 2.0)
    above = stirling_gap(two, 1 + c, e) + entropy_gap(two, 1 + c, e)
    w = m + (1 - _EULER) * e + above  # the slope of lgamma at 2 is 1 - 0.577...
    return exp_gap(w) + log_gap(e, c) + above


def gumbel_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of Gumbels, parameters loc and scale."""
    (mu0, s0), (mu1, s1) = old, new
    kl = _gumbel_gap((mu1 - mu0) / s1, (s0 - s1) / s1, s0 / s1)
    return torch.where(positive(s0, s1), kl, torch.inf)


def gumbel_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of Gumbels, parameters loc and scale."""
    precision = params[1].square().reciprocal()

    def fisher(d: Tensors) -> Tensors:
        u = precision * (d[0] - (1 - _EULER) * d[1])
        return u, math.pi**2 / 6 * precision * d[1] - (1 - _EULER) * u

    return fisher


def weibull_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of Weibulls, parameters scale and concentration.

    Minus the logarithm of a Weibull variable is a Gumbel variable with loc ``-log(scale)`` and
    scale ``1 / concentration``, and the KL is invariant under this map.
    """
    (s0, k0), (s1, k1) = old, new
    t = (s0 - s1) / s1
    log = torch.where(t.abs() < 0.5, t.clamp(-0.5, 0.5).log1p(), (s0 / s1).log())
    kl = _gumbel_gap(k1 * log, (k1 - k0) / k0, k1 / k0)
    return torch.where(positive(s0, k0, s1, k1), kl, torch.inf)


def weibull_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of Weibulls, parameters scale and concentration."""
    s, k = params
    metric = gumbel_fisher((s, k.reciprocal()))

    def fisher(d: Tensors) -> Tensors:
        loc, scale = metric((-d[0] / s, -d[1] / k.square()))
        return -loc / s, -scale / k.square()

    return fisher
