"""Dense derivatives, measured steps, and a loss that rises in every trial."""

import torch
from torch import distributions as td

from problems import theta
from trustregion import (
    FisherOperator,
    to_dense,
)


def derivatives(model, closure):
    """The gradient and the Fisher matrix, dense."""
    params = list(model.parameters())
    loss, distribution = closure()
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, params, retain_graph=True)])
    return g, to_dense(FisherOperator(distribution, params))


def moved(model, optimizer, closure, **given):
    before = theta(model)
    optimizer.step(closure, **given)
    return theta(model) - before


EXACT = {"cg_max_iter": 300, "cg_rtol": 1e-13}


def rising(constraint=None):
    """A closure whose loss, or constraint, is worse in every trial."""
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def closure():
        worse = float(p.any())
        loss, prediction = (p - 1).square().sum(), td.Normal(p, 1.0)
        if constraint is None:
            return loss + 100 * worse, prediction
        return loss, prediction, p[:1] - 100 + 200 * worse

    return p, closure
