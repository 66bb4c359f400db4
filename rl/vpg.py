"""The vanilla policy gradient, as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trustregion import mean_kl

from .agent import Agent
from .config import Config
from .experience.path import Path
from .experience.surrogate import distribution_now, normalise
from .options import check_positive
from .reports import Log


@dataclass(frozen=True, kw_only=True)
class VPGConfig(Config):
    """Options of the vanilla policy gradient."""

    policy_lr: float = 1e-2
    """Learning rate of the policy's Adam."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_positive(self, "policy_lr")


class VPG(Agent):
    """The policy gradient with GAE, one step of Adam per path.

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

    def update(self, path: Path) -> Log:
        """Estimate advantages, take the step, fit the critic."""
        estimates = self.estimate(path)
        old = distribution_now(self.policy, path.rows)
        objective, _ = self.objective(path, normalise(estimates.advantages, path.mask))()
        self.policy_optimizer.zero_grad()
        (-objective).backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.policy.parameters() if p.grad is not None]
        )
        if not bool((objective + norm).isfinite()):
            raise ValueError(
                f"the objective is {objective.item()} and the norm of its gradient {norm.item()}:"
                " no step was taken. Scale the rewards, or look at what the policy returns"
            )
        for group in self.policy_optimizer.param_groups:
            group["lr"] = self.config.policy_lr
        self.policy_optimizer.step()
        with torch.no_grad():
            kl = mean_kl(old, self.policy(path.rows)).item()
        return {
            "train/policy_objective": objective.item(),
            "train/kl_divergence_loss": kl,
        } | self.fit_critic(path, estimates)
