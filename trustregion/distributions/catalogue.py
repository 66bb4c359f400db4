"""The families of torch.distributions: the supported ones, and the refused ones with a reason."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from . import continuous as c
from . import discrete as k
from . import gaussian as g
from .family import Family, Tensors, in_float64


class _Counted(Protocol):
    total_count: Tensor | int

    @property
    def logits(self) -> Tensor: ...


def _logits_and_count(distribution: _Counted) -> Tensors:
    logits, count = distribution.logits, distribution.total_count
    if isinstance(count, Tensor) and count.requires_grad:
        raise TypeError(
            f"a {type(distribution).__name__} whose total_count requires a gradient is refused as a"
            " trust-region metric: its KL has a closed form for a fixed count only. Detach it, or"
            " use MonteCarloFisherOperator or EmpiricalFisherOperator"
        )
    if not isinstance(count, Tensor):  # a Multinomial, whose logits have an event dimension
        return logits, torch.full_like(logits[..., 0], count, requires_grad=False)
    return logits, count


_CATEGORICAL = Family(lambda d: (d.logits,), k.categorical_kl, k.categorical_fisher)
_NORMAL = Family(lambda d: (d.loc, d.scale), g.normal_kl, g.normal_fisher)
_GAMMA = Family(lambda d: (d.concentration, d.rate), c.gamma_kl, in_float64(c.gamma_fisher))

FAMILIES: dict[type[Distribution], Family] = {
    td.Categorical: _CATEGORICAL,
    td.OneHotCategorical: _CATEGORICAL,
    td.OneHotCategoricalStraightThrough: _CATEGORICAL,
    td.Multinomial: Family(
        _logits_and_count, k.counted(k.categorical_kl), k.counted_fisher(k.categorical_fisher, 1)
    ),
    td.Bernoulli: Family(lambda d: (d.logits,), k.bernoulli_kl, k.bernoulli_fisher),
    td.Binomial: Family(
        _logits_and_count, k.counted(k.bernoulli_kl), k.counted_fisher(k.bernoulli_fisher)
    ),
    td.Geometric: Family(lambda d: (d.logits,), k.geometric_kl, k.geometric_fisher),
    td.NegativeBinomial: Family(
        _logits_and_count, k.counted(k.failures_kl), k.counted_fisher(k.failures_fisher)
    ),
    td.Poisson: Family(lambda d: (d.rate,), k.poisson_kl, k.poisson_fisher),
    td.Normal: _NORMAL,
    td.LogNormal: _NORMAL,
    td.LogisticNormal: _NORMAL,
    td.HalfNormal: Family(
        lambda d: (d.scale,), lambda p, q: g.scale_kl(p[0], q[0]), g.scale_fisher
    ),
    td.MultivariateNormal: Family(lambda d: (d.loc, d.scale_tril), g.mvn_kl, g.mvn_fisher),
    td.LowRankMultivariateNormal: Family(
        lambda d: (d.loc, d.cov_factor, d.cov_diag), g.low_rank_kl, in_float64(g.low_rank_fisher)
    ),
    td.Exponential: Family(lambda d: (d.rate,), c.exponential_kl, c.exponential_fisher),
    td.Gamma: _GAMMA,
    td.InverseGamma: _GAMMA,
    td.Chi2: Family(lambda d: (d.concentration,), c.shape_kl, in_float64(c.shape_fisher)),
    td.Dirichlet: Family(
        lambda d: (d.concentration,), c.dirichlet_kl, in_float64(c.dirichlet_fisher)
    ),
    td.Beta: Family(
        lambda d: (d.concentration1, d.concentration0), c.beta_kl, in_float64(c.beta_fisher)
    ),
    td.Cauchy: Family(lambda d: (d.loc, d.scale), c.cauchy_kl, c.cauchy_fisher),
    td.HalfCauchy: Family(lambda d: (d.scale,), c.half_cauchy_kl, c.half_cauchy_fisher),
    td.Gumbel: Family(lambda d: (d.loc, d.scale), c.gumbel_kl, c.gumbel_fisher),
    td.Weibull: Family(lambda d: (d.scale, d.concentration), c.weibull_kl, c.weibull_fisher),
}

_SUPPORT = "its support moves with its parameters, so the Fisher matrix does not exist"
_NO_KL = (
    "no closed form of its KL that is exact for small changes is implemented."
    " MonteCarloFisherOperator and EmpiricalFisherOperator do not need one"
)
REFUSED: dict[type[Distribution], str] = {
    td.Laplace: (
        "its KL is not smooth at equal parameters, where automatic differentiation returns a"
        " curvature of zero for |x|, so the Hessian of the KL is not the Fisher matrix."
        " MonteCarloFisherOperator and EmpiricalFisherOperator do not need a KL"
    ),
    td.Uniform: _SUPPORT,
    td.Pareto: _SUPPORT,
    td.GeneralizedPareto: _SUPPORT,
    td.ContinuousBernoulli: _NO_KL,
    td.FisherSnedecor: _NO_KL,
    td.Kumaraswamy: _NO_KL,
    td.LKJCholesky: _NO_KL,
    td.MixtureSameFamily: _NO_KL,
    td.RelaxedBernoulli: _NO_KL,
    td.RelaxedOneHotCategorical: _NO_KL,
    td.StudentT: _NO_KL,
    td.VonMises: _NO_KL,
    td.Wishart: _NO_KL,
    td.TransformedDistribution: "parameters inside its transforms would be invisible to the KL",
}
