"""Rewards in units of the spread of their discounted sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..networks.moments import RunningMoments
from .advantages import discounted_sums
from .path import Path


class RewardScale(nn.Module):
    r"""Rewards divided by the standard deviation of their discounted sums.

    The sums :math:`R_t = r_t + \gamma R_{t-1}` run forwards and start at zero in each episode. The
    mean is left alone: taking it off would change which policy is best.

    Args:
        n_envs: number of environments.
        gamma: discount.

    """

    running: Tensor

    def __init__(self, n_envs: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = RunningMoments(())
        running = torch.zeros(n_envs, dtype=torch.float64)
        self.register_buffer("running", running, persistent=False)  # loaded agents start episodes

    @torch.no_grad()
    def update(self, path: Path) -> None:
        """Add the rewards of a path."""
        terms = torch.where(path.mask, path.rewards, 0.0).double()
        terms[0] += self.gamma * self.running
        decay = self.gamma * (~path.done.roll(1, 0)).double()  # of the sum before
        sums = discounted_sums(terms.flip(0), decay.flip(0), len(terms)).flip(0)
        self.moments.update(sums[path.mask])
        self.running.copy_(torch.where(path.done[-1], 0.0, sums[-1]))

    def forward(self, path: Path) -> Path:
        """Return the path with rewards in units of the spread of their sums."""
        variance = self.moments.variance.item()
        return path.with_reward(path.rewards / variance**0.5) if variance > 0 else path
