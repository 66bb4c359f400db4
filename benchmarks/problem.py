"""The one problem that everybody is timed on: a TRPO update of a Gaussian policy."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

OBSERVATIONS, ACTIONS, HIDDEN, BATCH = 17, 6, 64, 2048
DELTA, DAMPING, CG_ITERATIONS, BACKTRACK_FACTOR, MAX_BACKTRACKS = 0.01, 0.1, 10, 0.8, 9


class Policy(nn.Module):
    """Independent normals around a tanh network, with scales that do not depend on the state."""

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(ACTIONS))
        self.mean = nn.Sequential(
            nn.Linear(OBSERVATIONS, HIDDEN),
            nn.Tanh(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Tanh(),
            nn.Linear(HIDDEN, ACTIONS),
        )

    def forward(self, observations: Tensor) -> Independent:
        return Independent(Normal(self.mean(observations), self.log_std.exp()), 1)


@dataclass(frozen=True)
class Problem:
    """A policy and a batch drawn from it."""

    policy: Policy
    observations: Tensor
    actions: Tensor
    advantages: Tensor
    old_log_prob: Tensor
    vector: Tensor
    """What the Fisher products are taken of, in the order of ``policy.parameters()``."""

    def own_policy(self) -> Policy:
        """Return a copy: an update must not write into parameters that another graph keeps."""
        return copy.deepcopy(self.policy)

    def surrogate(self, distribution: Independent) -> Tensor:
        """Return the objective that the update maximises."""
        ratio = (distribution.log_prob(self.actions) - self.old_log_prob).exp()
        return (ratio * self.advantages).mean()


def make_problem(seed: int = 0) -> Problem:
    """Draw the problem; advantages depend on the actions, so that there is something to learn."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        policy = Policy()
        observations = torch.randn(BATCH, OBSERVATIONS)
        distribution = policy(observations)
        actions = distribution.sample()
        target = torch.tanh(observations @ torch.randn(OBSERVATIONS, ACTIONS) / OBSERVATIONS**0.5)
        returns = -(actions - target).square().sum(-1) + torch.randn(BATCH)
        return Problem(
            policy=policy,
            observations=observations,
            actions=actions,
            advantages=(returns - returns.mean()) / returns.std(),
            old_log_prob=distribution.log_prob(actions),
            vector=torch.randn(sum(p.numel() for p in policy.parameters())),
        )
