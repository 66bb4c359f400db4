"""The vanilla policy gradient, as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trustregion import mean_kl

from .agent import Agent, Log
from .config import Config
from .experience.path import Batch
from .experience.surrogate import normalise, old_distribution, surrogate


@dataclass(frozen=True, kw_only=True)
class VPGConfig(Config):
    """Options of the vanilla policy gradient."""

    policy_lr: float = 1e-2
    """Learning rate of the policy's Adam."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check_positive("policy_lr")


class VPG(Agent):
    """The policy gradient with GAE, one step of Adam a rollout.

    Args:
        env: as for every :class:`Agent`.
        options: fields of :class:`VPGConfig`, by name.

    """

    config: VPGConfig
    config_class = VPGConfig
    name = "vpg"

    def setup(self) -> None:
        """Make the optimizers of policy and critic."""
        super().setup()
        self.policy_optimizer = torch.optim.Adam(
            self.policy.parameters(), lr=self.config.policy_lr, fused=True
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return both optimizers."""
        return super().optimizers() | {"policy_optimizer": self.policy_optimizer}

    def improve(self, batch: Batch) -> Log:
        """Take the step."""
        old = old_distribution(self.policy, batch)
        log_prob = self.policy(batch.observations).log_prob(batch.actions)
        objective = surrogate(log_prob, batch.old_log_prob, normalise(batch.advantages))
        self.policy_optimizer.zero_grad()
        (-objective).backward()
        self.policy_optimizer.step()
        with torch.no_grad():
            kl = mean_kl(old, self.policy(batch.observations)).item()
        return {"train/policy_objective": objective.item(), "train/kl_divergence_loss": kl}
