"""Rewards in units of the spread of their discounted sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..networks.moments import RunningMoments
from .advantages import discounted_sums


class RewardScale(nn.Module):
    r"""Rewards divided by the standard deviation of their discounted sums.

    The sums :math:`R_t = r_t + \gamma R_{t-1}` run forwards and start anew with each episode. The
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
    def update(self, rewards: Tensor, done: Tensor, valid: Tensor) -> None:
        """Add the rewards of a rollout.

        Args:
            rewards: shape ``(T, N)``.
            done: bool ``(T, N)``: the episode ended.
            valid: bool ``(T, N)``: False for dummy transitions.

        """
        terms = torch.where(valid, rewards, 0.0).double()
        terms[0] += self.gamma * self.running
        decay = self.gamma * (~done.roll(1, 0)).double()  # of the sum before; the first has none
        sums = discounted_sums(terms.flip(0), decay.flip(0), len(terms)).flip(0)
        self.moments.update(sums[valid])
        self.running.copy_(torch.where(done[-1], 0.0, sums[-1]))

    def forward(self, rewards: Tensor) -> Tensor:
        """Return the rewards in units of the spread of their sums."""
        variance = self.moments.variance.item()
        return rewards / variance**0.5 if variance > 0 else rewards
