"""Networks, families and Fisher operators that the tests of KFAC share."""

import pytest
import torch
from torch import distributions as td
from torch import nn

from strategies import DTYPES
from trustregion import FisherOperator, to_dense

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(y, scale=0.5):
    return td.Normal(y, torch.full_like(y, scale))


def fisher(model, x, family=normal):
    return FisherOperator(family(model(x)), model.parameters())


def solve_dense(F, damping):
    n = F.shape[0]
    return torch.linalg.inv(to_dense(F).double() + damping * torch.eye(n, dtype=torch.float64))


def factors_of(kfac):
    blocks = kfac.state["blocks"]
    return [(blocks[weight]["A"], blocks[weight]["G"]) for weight in sorted(blocks)]


class Gaussian(nn.Module):
    """A policy with scales that do not depend on the state."""

    def __init__(self, *sizes):
        super().__init__()
        self.log_std = nn.Parameter(torch.linspace(-1, 1, sizes[-1]))
        self.net = mlp(*sizes)

    def forward(self, x):
        return td.Independent(td.Normal(self.net(x), self.log_std.exp()), 1)


def mlp(*sizes, activation=nn.Tanh):
    layers = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return nn.Sequential(*layers[:-1])


FAMILIES = {
    "normal": normal,
    "normal with a learned scale": lambda y: td.Normal(y[..., :2], y[..., 2:].exp()),
    "categorical": lambda y: td.Categorical(logits=y),
    "bernoulli": lambda y: td.Bernoulli(logits=y),
    "multivariate normal": lambda y: td.MultivariateNormal(
        y[..., :2], scale_tril=torch.diag_embed(y[..., 2:].exp()) + torch.ones(2, 2).tril(-1).to(y)
    ),
}
