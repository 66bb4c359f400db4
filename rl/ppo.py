"""Proximal Policy Optimization (Schulman et al., 2017), with the clipped objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.distributions import Distribution

from trustregion import mean_kl

from .agent import Agent
from .config import Config
from .experience.estimates import Estimates
from .experience.path import Path
from .experience.surrogate import clipped_surrogate, distribution_now, normalise
from .fits import explained_variance
from .options import check_counts, check_not_negative, check_positive
from .reports import Log
from .undo import undone_on_error


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Config):
    """Options of PPO."""

    clip: float = 0.2
    """Probability ratios outside 1 - clip to 1 + clip do not increase the objective."""

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
    """Gradients are clipped to this norm."""

    kl_limit: float | None = None
    """The passes end early where KL(old || new) exceeds this; None to make them all."""

    gae_lambda: float = 0.95
    """Trace decay of gae."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_positive(self, "clip", "lr", "max_grad_norm", "kl_limit")
        check_not_negative(self, "final_lr", "value_coef", "entropy_coef", "final_entropy_coef")
        check_counts(self, "epochs", "batch_size")


class PPO(Agent):
    """Proximal Policy Optimization.

    For each path several passes of minibatches over the clipped objective (eq. 7), the squared
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

    def update(self, path: Path) -> Log:
        """Estimate advantages and make the passes."""
        estimates = self.estimate(path)
        with undone_on_error(self.policy, self.critic, optimizers=[self.optimizer]):
            try:
                return self._passes(path, estimates)
            except FloatingPointError as error:
                raise ValueError(
                    f"{error}: PPO diverged. Lower lr, or scale the rewards"
                ) from error

    def _passes(self, path: Path, estimates: Estimates) -> Log:
        c = self.config
        entropy_coef = self.scheduled(c.entropy_coef, c.final_entropy_coef)
        for group in self.optimizer.param_groups:
            group["lr"] = self.scheduled(c.lr, c.final_lr)
        observations, actions, log_prob, advantages, returns = (
            path.rows,
            *map(path.flat, (path.actions, path.log_prob, *estimates[:2])),
        )
        old = distribution_now(self.policy, observations)
        # of objective, value loss, entropy and share of clipped ratios
        sums = torch.zeros(4, device=c.device)
        kl, passes = 0.0, 0
        for _ in range(c.epochs):
            sums.zero_()
            for rows in torch.randperm(path.steps, generator=self.generator).split(c.batch_size):
                distribution = self.policy(observations[rows])
                objective, clipped = clipped_surrogate(
                    distribution.log_prob(actions[rows]),
                    log_prob[rows],
                    normalise(advantages[rows]),
                    c.clip,
                )
                value_loss = (self.critic(observations[rows]) - returns[rows]).square().mean()
                entropy = _entropy(distribution, entropy_coef, objective)
                loss = -objective + c.value_coef * value_loss - entropy_coef * entropy
                self._descend(loss)
                with torch.no_grad():
                    sums += len(rows) * torch.stack([objective, value_loss, entropy, clipped])
            passes += 1
            with torch.no_grad():
                kl = mean_kl(old, self.policy(observations)).item()
            if math.isnan(kl):
                raise FloatingPointError("the KL of the policy is not a number")
            if c.kl_limit is not None and kl > c.kl_limit:
                break
        objective, value_loss, entropy, clipped = (sums / path.steps).tolist()
        return {
            "train/policy_objective": objective,
            "train/kl_divergence_loss": kl,
            "train/value_loss": value_loss,
            "train/explained_variance": explained_variance(path.flat(estimates.values), returns),
            "train/entropy_loss": -entropy,
            "train/clip_fraction": clipped,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/n_updates": passes,
        }

    def _descend(self, loss: Tensor) -> None:
        """Take one step of Adam along the clipped gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not (loss + norm).isfinite():
            raise FloatingPointError(f"loss {loss.item()}, norm of its gradient {norm.item()}")
        self.optimizer.step()


def _entropy(distribution: Distribution, coefficient: float, like: Tensor) -> Tensor:
    """Return the mean entropy; zero of a family that has none, where it does not count."""
    try:
        return distribution.entropy().mean()
    except NotImplementedError as error:
        if coefficient:
            raise ValueError(
                f"{type(distribution).__name__} has no entropy: set entropy_coef to 0"
            ) from error
        return torch.zeros_like(like)
