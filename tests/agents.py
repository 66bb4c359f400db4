"""Agents and paths that are made in a moment, and what is compared of agents."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from rl import NPG, PPO, TRPO, VPG, KLPenalty, Path, Policy

ALGORITHMS = (TRPO, NPG, KLPenalty, PPO, VPG)
SMALL = {"n_envs": 4, "steps_per_update": 64, "hidden": (8,)}
MEDIUM = {"n_envs": 4, "steps_per_update": 256, "hidden": (16,)}  # enough to learn something


def every_algorithm(test):
    return pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)(test)


def weights(agent):
    """Return a copy of all parameters of policy and critic."""
    return [p.detach().clone() for m in (agent.policy, agent.critic) for p in m.parameters()]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def logs_of(agent, steps):
    """Train, and return the log of each update."""
    logs = []
    agent.learn(steps, progress=False, callback=lambda _, log: logs.append(log))
    return logs


class TwoNumbers(Policy):
    """Its distribution holds its parameters themselves, or copies of them."""

    def __init__(self, copies):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.copies = copies

    def forward(self, rows):
        mean, std = (self.mean * 1, self.std * 1) if self.copies else (self.mean, self.std)
        return Independent(Normal(mean.expand(len(rows), 1), std, validate_args=False), 1)


def path_of(*, terminated, truncated, mask=None, starts=None, **tensors):
    """Return a path of ``(T, N)`` tensors; everything that is not given is zero or empty."""
    shape = tuple(terminated.shape)
    no = torch.zeros(shape, dtype=torch.bool)
    given = {
        "observations": torch.zeros(shape[0] + 1, shape[1], 1),
        "actions": torch.zeros(shape, dtype=torch.long),
        "log_prob": torch.zeros(shape),
        "signals": {"reward": torch.zeros(shape)},
        "starts": no if starts is None else starts,
        "mask": ~no if mask is None else mask,
        "finals": torch.zeros(0, 1),
        "final_at": torch.zeros(0, 2, dtype=torch.long),
    }
    return Path(terminated=terminated, truncated=truncated, **given | tensors)
