"""The discrete families: KL without cancellation, Fisher matrix in closed form.

Counts are a constant parameter tensor: its entries of the Fisher matrix are zero, and the KL of two
distributions with different counts is infinite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from ..autodiff import under_transform
from .family import Metric, Tensors
from .gaps import exp_gap, log_gap

_OVERFLOW = 300.0  # its exp, and a sum of many such terms, does not overflow in float64


def categorical_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of categoricals, parameter logits; a logit of -inf is a masked action."""
    l0, l1 = old[0], new[0]
    # Logits from float32 are normalized to 1e-7 only, which would affect a KL of 1e-8.
    log_p = log_softmax(l0, -1)
    p = log_p.exp()
    # Without the mean of l1 - l0 under p, KL = log(sum p exp(c)) = log1p(sum p exp_gap(c)).
    here, there = l0 > -torch.inf, l1 > -torch.inf
    c = torch.where(here & there, l1 - l0, 0.0)
    c = c - (p * c).sum(-1, keepdim=True)
    near = (c.amax(-1) < _OVERFLOW) & (here == there).all(-1)
    gap = (p * exp_gap(c.clamp(max=_OVERFLOW))).sum(-1).log1p()
    if not under_transform() and bool(near.all()):  # vmap has no branches
        return gap
    far = _expected_difference(p, log_p, log_softmax(l1, -1)).sum(-1)
    return torch.where(near, gap, far)


def _expected_difference(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q): 0 for p = 0, a masked action, and inf for p > 0 = q."""
    possible = p > 0  # masked inside, since a derivative would contain inf - inf
    return p * (torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0))


def categorical_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of categoricals in their logits."""
    p = torch.softmax(params[0], -1)

    def fisher(d: Tensors) -> Tensors:
        pd = p * d[0]
        return (torch.addcmul(pd, p, pd.sum(-1, keepdim=True), value=-1),)

    return fisher


def bernoulli_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of Bernoullis, parameter logits."""
    l0, l1 = old[0], new[0]
    change = l1 - l0
    near = change.abs() <= 1  # False for two infinite logits
    sign = torch.where(l0 > 0, -1.0, 1.0).to(
        l0
    )  # p is for the rarer outcome, so that 1 - p is not small
    d, p = torch.where(near, sign * change, 0.0), torch.sigmoid(sign * l0)
    u = p * d.expm1()
    gap = p * exp_gap(d) - log_gap(u, 1 + u)

    def half(sign: int) -> Tensor:
        log_p, log_q = logsigmoid(sign * l0), logsigmoid(sign * l1)
        return _expected_difference(log_p.exp(), log_p, log_q)

    return torch.where(near, gap, half(1) + half(-1))


def bernoulli_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of Bernoullis in their logits."""
    variance = torch.sigmoid(params[0]) * torch.sigmoid(-params[0])
    return lambda d: (variance * d[0],)


def _for_each(old: Tensor, new: Tensor) -> Tensor:
    """Return the KL of Bernoullis per expected success, ``KL / p``."""
    p = torch.sigmoid(old)
    rare = p < torch.finfo(p.dtype).tiny * 2.0**52  # the quotient has lost digits, or is 0/0
    kl = torch.where(rare, 0.0, bernoulli_kl((old,), (new,))) / torch.where(rare, 1.0, p)
    return torch.where(rare, exp_gap(torch.where(rare, new - old, 0.0)), kl)


def geometric_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of geometrics, parameter logits of the success that ends the trials."""
    return _for_each(old[0], new[0])


def geometric_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of geometrics in their logits."""
    failure = torch.sigmoid(-params[0])
    return lambda d: (failure * d[0],)


def counted(kl: Callable[[Tensors, Tensors], Tensor]) -> Callable[[Tensors, Tensors], Tensor]:
    """Return the KL of a sum of n equal variables, with n as the second parameter."""

    def of_sum(old: Tensors, new: Tensors) -> Tensor:
        possible = (old[1] == new[1]) & (old[1] >= 0)
        # zero trials have a KL of zero, even if the KL of one trial is infinite
        value = torch.where(old[1] > 0, kl(old[:1], new[:1]), 0.0)
        return torch.where(possible, torch.where(possible, old[1], 1.0) * value, torch.inf)

    return of_sum


def counted_fisher(
    fisher: Callable[[Tensors], Metric], event_dims: int = 0
) -> Callable[[Tensors], Metric]:
    """Return the Fisher matrix of a sum of n equal variables, with n as the second parameter."""

    def of_sum(params: Tensors) -> Metric:
        metric = fisher(params[:1])
        count = params[1][(..., *(None,) * event_dims)]

        def apply(d: Tensors) -> Tensors:
            return count * metric(d[:1])[0], torch.zeros_like(d[1])

        return apply

    return of_sum


def failures_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of the successes before one failure, parameter logits of a success."""
    return _for_each(-old[0], -new[0])


def failures_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of the successes before one failure in their logits."""
    success = torch.sigmoid(params[0])
    return lambda d: (success * d[0],)


def poisson_kl(old: Tensors, new: Tensors) -> Tensor:
    """Return the KL of Poissons, parameter rate; a rate of 0 gives 0 with certainty."""
    r0, r1 = old[0], new[0]
    valid = (r0 >= 0) & (r1 >= 0) & r0.isfinite() & r1.isfinite()
    some = valid & (r0 > 0)
    s0, s1 = torch.where(some, r0, 1.0), torch.where(some, r1, 1.0)  # so that no derivative is NaN
    kl = s0 * log_gap((s1 - s0) / s0, s1 / s0)
    return torch.where(valid, torch.where(some, kl, r1), torch.inf)


def poisson_fisher(params: Tensors) -> Metric:
    """Return the Fisher matrix of Poissons in their rate, infinite at a rate of 0."""
    inverse = params[0].reciprocal()
    return lambda d: (inverse * d[0],)
