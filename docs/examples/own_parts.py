"""Train your own environment, policy and critic by TRPO.

The task is to name a direction. The environment shows an angle with noise, and the reward is the
cosine of the error of the answer. On a circle, 359 degrees and 1 degree are neighbors, so the
policy draws a point in the plane, and the action is the direction of the point. ``rl`` needs from a
policy only a torch distribution for each row of observations, and ``trustregion`` must have the KL
and the Fisher matrix of that distribution; add a family of your own with ``register_distribution``.

Run ``python docs/examples/own_parts.py``; it takes about ten seconds.
"""

import argparse
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from rl import TRPO, Evaluation, Policy, evaluate

STEPS = 16  # per episode


class Compass(gymnasium.Env[np.ndarray, np.ndarray]):
    """An environment that shows an angle and rewards the cosine of the error."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-np.pi, np.pi, (1,), np.float32)

    def _show(self) -> np.ndarray:
        self.angle = self.np_random.uniform(-np.pi, np.pi)
        blur = 0.1 * self.np_random.normal(size=2)
        return (np.array([np.cos(self.angle), np.sin(self.angle)]) + blur).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed, options=options)
        self.time = 0
        return self._show(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Return the reward of the answer and show another angle."""
        reward = float(np.cos(self.angle - action[0]))
        self.time += 1
        return self._show(), reward, False, self.time == STEPS, {}


class Pointer(Policy):
    """A policy that draws a point in the plane, whose direction is the action.

    The distribution is over the point, and :meth:`to_env` turns the point into an angle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, rows: Tensor) -> Independent:
        """Return the distribution of one point per row."""
        return Independent(Normal(self.net(rows), self.log_std.exp()), 1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Return the angles of the points."""
        return np.arctan2(actions[:, 1:], actions[:, :1])


class LinearCritic(nn.Module):
    """A critic; any module from rows to values can be one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the values."""
        return self.linear(rows).squeeze(-1)


def main(*, steps: int = 40_000, seed: int = 0, quiet: bool = False) -> Evaluation:
    """Train, and return the evaluation afterwards; perfect answers give 16 per episode."""
    torch.manual_seed(seed)  # for the networks; the agent has its own generators
    agent = TRPO(Compass, policy=Pointer(), critic=LinearCritic(), seed=seed, gamma=0.0)
    before = evaluate(agent, Compass, 20)
    agent.learn(steps, progress=not quiet)
    after = evaluate(agent, Compass, 20)
    print(
        f"mean return {before.mean:.2f} before, {after.mean:.2f} after {steps:,} steps, of {STEPS}"
    )
    return after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of networks and agent")
    main(**vars(parser.parse_args()))
