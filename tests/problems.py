"""Small classifiers, their data and their closures: the problems that many tests train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

Closure = Callable[[], tuple[Tensor, td.Categorical]]


def closure_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Closure:
    """The mean negative log-likelihood of the labels, and the prediction."""

    def closure() -> tuple[Tensor, td.Categorical]:
        distribution = td.Categorical(logits=model(x))
        return -distribution.log_prob(y).mean(), distribution

    return closure


def network(features: int, hidden: int, classes: int, *extra: nn.Module) -> nn.Sequential:
    """One hidden layer; ``extra`` modules follow its activation."""
    layers = nn.Linear(features, hidden), nn.Tanh(), *extra, nn.Linear(hidden, classes)
    return nn.Sequential(*layers)


def data(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, n: int = 48, extra: Any = ()
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network, its inputs, and random labels."""
    torch.manual_seed(seed)
    model = network(5, 8, 3, *extra).to(dtype)
    return model, torch.randn(n, 5, dtype=dtype), torch.randint(3, (n,))


def problem(
    dtype: torch.dtype = torch.float32, seed: int = 0, n: int = 64
) -> tuple[nn.Sequential, Closure]:
    """A network with a closure over random labels."""
    model, x, y = data(dtype, seed=seed, n=n)
    return model, closure_of(model, x, y)


def learnable_problem(
    dtype: torch.dtype = torch.float64, seed: int = 0, n: int = 64
) -> tuple[nn.Sequential, Closure, Tensor]:
    """A network, a closure whose labels can be learned (its loss has far to fall), the inputs."""
    torch.manual_seed(seed)
    model = network(5, 8, 3).to(dtype)
    x = torch.randn(n, 5, dtype=dtype)
    y = (2 * x @ torch.randn(5, 3, dtype=dtype)).argmax(1)
    return model, closure_of(model, x, y), x


def badly_scaled_problem(
    dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[nn.Sequential, Closure]:
    """A network whose inputs differ in scale, so that preconditioning helps."""
    torch.manual_seed(seed)
    model = network(6, 8, 4).to(dtype)
    x = torch.randn(300, 6, dtype=dtype) * torch.logspace(-1, 1, 6, dtype=dtype)
    return model, closure_of(model, x, x.sum(1).sign().long() + 1)


def bits(model: nn.Module) -> list[Tensor]:
    """A copy of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: nn.Module, kept: list[Tensor]) -> bool:
    """Whether the parameters equal the copy bit for bit."""
    return all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))


def theta(model: nn.Module) -> Tensor:
    """The parameters as one flat vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
