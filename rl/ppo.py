"""Proximal Policy Optimization (Schulman et al., 2017), with the clipped objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.distributions import Distribution

from trustregion import mean_kl

from .agent import Agent, Log
from .config import Config
from .experience.path import Batch
from .experience.surrogate import clipped_surrogate, normalise, old_distribution
from .undo import Undo


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Config):
    """Options of PPO."""

    clip: float = 0.2
    """Ratios beyond 1 - clip and 1 + clip gain nothing more."""

    epochs: int = 10
    """Passes over a rollout."""

    batch_size: int = 64
    """Minibatch size; the last one of a pass may be smaller."""

    lr: float = 3e-4
    """Learning rate of Adam, over policy and critic."""

    final_lr: float | None = None
    """Learning rate at the end of learn(), reached linearly; None to keep it."""

    value_coef: float = 0.5
    """Weight of the value loss."""

    entropy_coef: float = 0.0
    """Weight of the entropy."""

    final_entropy_coef: float | None = None
    """Weight of the entropy at the end of learn(), reached linearly; None to keep it."""

    max_grad_norm: float = 0.5
    """Gradients are shortened to this norm."""

    kl_limit: float | None = None
    """Passes end where KL(old || new) is beyond this; None to make them all."""

    gae_lambda: float = 0.95
    """Trace decay of gae."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check_positive("clip", "lr", "max_grad_norm", "kl_limit")
        self.check_not_negative("final_lr", "value_coef", "entropy_coef", "final_entropy_coef")
        self.check_counts("epochs", "batch_size")


class PPO(Agent):
    """Proximal Policy Optimization.

    For each rollout several passes of minibatches over the clipped objective (eq. 7), the squared
    error of the critic and the entropy of the policy, summed with their weights (eq. 9), by one
    Adam over all parameters; with ``shared_encoder`` the encoder learns from all three.

    Args:
        env: as for every :class:`Agent`.
        options: fields of :class:`PPOConfig`, by name.

    """

    config: PPOConfig
    config_class = PPOConfig
    name = "ppo"

    def setup(self) -> None:
        """Make the one optimizer."""
        both = chain(self.policy.parameters(), self.critic.parameters())
        parameters = {id(p): p for p in both}  # those of a shared encoder once
        self.optimizer = torch.optim.Adam(
            list(parameters.values()), lr=self.config.lr, eps=1e-5, fused=True
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizer."""
        return {"optimizer": self.optimizer}

    def improve(self, batch: Batch) -> Log:
        """Make the passes."""
        undo = Undo(self.optimizer.param_groups[0]["params"], self.optimizer)
        try:
            return self._passes(batch)
        except FloatingPointError as error:
            undo()
            raise ValueError(f"{error}: PPO diverged. Lower lr, or scale the rewards") from error

    def _passes(self, batch: Batch) -> Log:
        c = self.config
        entropy_coef = self.scheduled(c.entropy_coef, c.final_entropy_coef)
        for group in self.optimizer.param_groups:
            group["lr"] = self.scheduled(c.lr, c.final_lr)
        parameters = self.optimizer.param_groups[0]["params"]
        old = old_distribution(self.policy, batch)
        # of objective, value loss, entropy and share of clipped ratios
        sums = torch.zeros(4, device=c.device)
        kl, passes = 0.0, 0
        for _ in range(c.epochs):
            sums.zero_()
            for rows in torch.randperm(len(batch), generator=self.generator).split(c.batch_size):
                distribution = self.policy(batch.observations[rows])
                log_prob = distribution.log_prob(batch.actions[rows])
                objective, clipped = clipped_surrogate(
                    log_prob, batch.old_log_prob[rows], normalise(batch.advantages[rows]), c.clip
                )
                values = self.critic(batch.observations[rows])
                value_loss = (values - batch.returns[rows]).square().mean()
                entropy = _entropy(distribution, entropy_coef)
                loss = -objective + c.value_coef * value_loss - entropy_coef * entropy
                self.optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
                if not (loss + norm).isfinite():
                    raise FloatingPointError(
                        f"loss {loss.item()}, norm of its gradient {norm.item()}"
                    )
                self.optimizer.step()
                with torch.no_grad():
                    sums += len(rows) * torch.stack([objective, value_loss, entropy, clipped])
            passes += 1
            with torch.no_grad():
                kl = mean_kl(old, self.policy(batch.observations)).item()
            if math.isnan(kl):
                raise FloatingPointError("the KL of the policy is not a number")
            if c.kl_limit is not None and kl > c.kl_limit:
                break
        objective, value_loss, entropy, clipped = (sums / len(batch)).tolist()
        return {
            "train/policy_objective": objective,
            "train/kl_divergence_loss": kl,
            "train/value_loss": value_loss,
            "train/entropy_loss": -entropy,
            "train/clip_fraction": clipped,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/n_updates": passes,
        }

    def fit_critic(self, batch: Batch) -> Log:  # noqa: ARG002 # the passes have done it
        """Do nothing more."""
        return {}


def _entropy(distribution: Distribution, coefficient: float) -> Tensor:
    """Return the mean entropy; zero of a family that has none, where it does not count."""
    try:
        return distribution.entropy().mean()
    except NotImplementedError as error:
        if coefficient:
            raise ValueError(
                f"{type(distribution).__name__} has no entropy: set entropy_coef to 0"
            ) from error
        return torch.zeros(())
