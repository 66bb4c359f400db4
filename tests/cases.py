"""Small models with a distribution at the end, as functions of a list of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

N = 7


@dataclass(frozen=True)
class Case:
    name: str
    params: list[Tensor]
    predict: Callable[[list[Tensor]], Any]
    discrete: bool = False


def _hidden(params):
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.tanh(x.to(params[0].dtype) @ params[0].T + params[1])


def _layers(*shapes, dtype):
    g = torch.Generator().manual_seed(2)
    draw = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    return [0.7 * t for t in draw]


def cases(dtype=torch.float64) -> list[Case]:
    def layers(*shapes):
        params = _layers((4, 3), (4,), *shapes, dtype=dtype)
        return [p.requires_grad_() for p in params]

    def tril(raw):
        return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())

    return [
        Case(
            "categorical",
            layers((5, 4), (5,)),
            lambda p: td.Categorical(logits=_hidden(p) @ p[2].T + p[3]),
            discrete=True,
        ),
        Case(
            "categorical from probs",
            layers((5, 4)),
            lambda p: td.Categorical(probs=torch.softmax(_hidden(p) @ p[2].T, -1)),
            discrete=True,
        ),
        Case(
            "bernoulli",
            layers((2, 4)),
            lambda p: td.Bernoulli(logits=_hidden(p) @ p[2].T),
            discrete=True,
        ),
        Case(
            "normal, learned scale from the input",
            layers((2, 4)),
            lambda p: td.Normal((_hidden(p) @ p[2].T)[:, 0], torch.exp(_hidden(p) @ p[2].T)[:, 1]),
        ),
        Case(
            "normal over two dimensions, shared scale",
            layers((2, 4), (2,)),
            lambda p: td.Independent(td.Normal(_hidden(p) @ p[2].T, p[3].exp()), 1),
        ),
        Case(
            "normal, fixed scale",
            layers((2, 4)),
            lambda p: td.Normal(_hidden(p) @ p[2].T, torch.full((2,), 0.5, dtype=p[0].dtype)),
        ),
        Case(
            "multivariate normal",
            layers((3, 4), (3, 3)),
            lambda p: td.MultivariateNormal(_hidden(p) @ p[2].T, scale_tril=tril(p[3])),
        ),
        Case(
            "multivariate normal from a covariance",
            layers((2, 4), (2, 2)),
            lambda p: td.MultivariateNormal(
                _hidden(p) @ p[2].T, covariance_matrix=tril(p[3]) @ tril(p[3]).mT
            ),
        ),
        Case(
            "joint of a dict and a tuple",
            layers((3, 4), (2, 4)),
            lambda p: {
                "a": td.Categorical(logits=_hidden(p) @ p[2].T),
                "b": (
                    td.Bernoulli(logits=_hidden(p) @ p[3].T),
                    td.Categorical(logits=_hidden(p) @ p[3].T),
                ),
            },
            discrete=True,
        ),
        Case(
            "tied layers",
            layers((4, 4)),
            lambda p: td.Categorical(logits=torch.tanh(_hidden(p) @ p[2].T) @ p[2]),
            discrete=True,
        ),
        Case(
            "parameters without a network",
            [
                torch.zeros(3, dtype=dtype).requires_grad_(),
                torch.ones(3, dtype=dtype).requires_grad_(),
            ],
            lambda p: td.Normal(p[0], p[1].exp()),
        ),
    ]
