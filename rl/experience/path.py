"""From a rollout to what an update learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Config
from ..networks.policy import Policy
from .advantages import gae, n_step, td_lambda
from .collector import Rollout


@dataclass(frozen=True)
class Batch:
    """The transitions of a rollout, without the dummies, in rows.

    Attributes:
        observations: shape ``(B, d)``.
        actions: shape ``(B,)`` or ``(B, k)``.
        old_log_prob: of the actions, under the policy that took them, ``(B,)``.
        values: by the critic before its update, ``(B,)``.
        advantages: not normalised, ``(B,)``.
        returns: what the critic is to predict, ``(B,)``.

    """

    observations: Tensor
    actions: Tensor
    old_log_prob: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        """Return B."""
        return len(self.returns)


@torch.no_grad()
def make_batch(
    rollout: Rollout, policy: Policy, critic: Callable[[Tensor], Tensor], config: Config
) -> Batch:
    """Estimate advantages and returns, and keep the transitions that count."""
    values, following = rollout.values(critic)
    if values.shape != rollout.rewards.shape:
        raise ValueError(
            f"the critic must return one value a row: {rollout.rewards.shape} of"
            f" {rollout.observations[:-1].shape}, got {values.shape}"
        )
    arguments = rollout.rewards, values, following, rollout.terminated, rollout.truncated
    match config.advantages:
        case "gae":
            advantages, returns = gae(*arguments, gamma=config.gamma, gae_lambda=config.gae_lambda)
        case "n_step":
            advantages, returns = n_step(*arguments, n=config.n_step, gamma=config.gamma)
        case _:
            advantages, returns = gae(*arguments, gamma=config.gamma, gae_lambda=1.0)
    if config.td_lambda is not None:
        returns = td_lambda(
            rollout.rewards,
            following,
            rollout.terminated,
            rollout.truncated,
            gamma=config.gamma,
            trace=config.td_lambda,
        )
    if not bool(advantages.isfinite().all() & returns.isfinite().all()):
        raise ValueError(
            "advantages or returns are not finite, as the critic's values are: nothing was updated"
        )
    valid = rollout.valid
    observations, actions = rollout.observations[:-1][valid], rollout.actions[valid]
    return Batch(
        observations,
        actions,
        policy(observations).log_prob(actions),
        values[valid],
        advantages[valid],
        returns[valid],
    )
