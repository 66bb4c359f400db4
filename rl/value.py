"""The critic and its regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .networks import Encoder, mlp


class Critic(nn.Module):
    """A state value ``V(s)``: rows of observations ``(..., d)`` to values ``(...)``."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = mlp([encoder.width, 1], output_gain=1.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the values."""
        return self.linear(self.encoder(rows)).squeeze(-1)


def fit(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    observations: Tensor,
    returns: Tensor,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """Regress the critic on returns by epochs of shuffled minibatches.

    Args:
        critic: the module to fit.
        optimizer: over the critic's parameters.
        observations: shape ``(B, d)``.
        returns: targets, shape ``(B,)``.
        epochs: passes over the data.
        batch_size: samples a minibatch; the last one of a pass may be smaller.
        generator: source of the shuffles.

    Returns:
        The mean squared error over the last pass, as it went.

    Raises:
        ValueError: the error became NaN or infinite; the weights are those before that minibatch.

    """
    squared_error = 0.0
    for epoch in range(epochs):
        order = torch.randperm(len(returns), generator=generator)
        for rows in order.split(batch_size):
            error = (critic(observations[rows]) - returns[rows]).square().mean()
            if not error.isfinite():
                raise ValueError(
                    f"the critic's loss is {error.item()} in pass {epoch}: it diverged. Lower"
                    " critic_lr, or scale the rewards"
                )
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            if epoch == epochs - 1:
                squared_error += error.item() * len(rows)
    return squared_error / len(returns)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    total = returns.var(correction=0)
    if total == 0:
        return math.nan
    return (1 - (returns - values).var(correction=0) / total).item()
