"""Trust Region Policy Optimization (Schulman et al., 2015) with GAE (Schulman et al., 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from trustregion import NaturalTrustRegion

from .advantages import gae
from .agent import Agent, Log
from .config import Config
from .objectives import normalise, step_log, surrogate
from .rollout import Rollout
from .value import explained_variance, fit


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(Config):
    """Options of TRPO."""

    delta: float = 0.01
    """Bound on KL(old || new) in nats: joint over action dimensions, mean over states."""

    damping: float = 0.1
    """Tikhonov term of the natural-gradient solve."""

    cg_max_iter: int = 10
    """Limit on conjugate-gradient iterations."""


class TRPO(Agent):
    """Trust Region Policy Optimization.

    Algorithm 1 of Schulman et al. (2015) as section 6 makes it practical. For each rollout:

    1. estimate advantages ``A`` with GAE from the critic,
    2. maximise ``E[pi(a|s) / pi_old(a|s) A]`` subject to ``E[KL(pi_old || pi)] <= delta``, by one
       natural-gradient step with a backtracking line search,
    3. regress the critic on the lambda-returns.

    Args:
        env: an environment id or a gymnasium vector environment.
        options: fields of :class:`TRPOConfig`, by name.

    Example:
        >>> agent = TRPO("CartPole-v1", steps_per_update=256).learn(512, progress=False)
        >>> action, _ = agent.predict(agent.envs.single_observation_space.sample())
        >>> action in (0, 1)
        True

    """

    config: TRPOConfig
    config_class = TRPOConfig
    name = "trpo"

    def setup(self) -> None:
        """Make the policy's and the critic's optimizers."""
        c = self.config
        self.policy_optimizer = NaturalTrustRegion(
            self.policy.parameters(),
            c.delta,
            damping=c.damping,
            cg_max_iter=c.cg_max_iter,
            maximize=True,
        )
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=c.critic_lr, fused=True
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return both optimizers."""
        return {
            "policy_optimizer": self.policy_optimizer,
            "critic_optimizer": self.critic_optimizer,
        }

    def update(self, rollout: Rollout) -> Log:
        """Run steps 1 to 3 on one rollout."""
        c, valid = self.config, rollout.valid
        with torch.no_grad():
            values = self.critic(rollout.observations)
        advantages, returns = gae(
            rollout.rewards,
            values[:-1],
            values[1:],
            rollout.terminated,
            rollout.truncated,
            gamma=c.gamma,
            gae_lambda=c.gae_lambda,
        )
        observations, actions = rollout.observations[:-1][valid], rollout.actions[valid]
        targets, weights = returns[valid], normalise(advantages[valid])
        with torch.no_grad():
            old_log_prob = self.policy(observations).log_prob(actions)

        def closure() -> tuple[Tensor, Distribution]:
            distribution = self.policy(observations)
            log_prob = distribution.log_prob(actions)
            return surrogate(log_prob, old_log_prob, weights), distribution

        self.policy_optimizer.step(closure)
        value_loss = fit(
            self.critic,
            self.critic_optimizer,
            observations,
            targets,
            epochs=c.critic_epochs,
            batch_size=c.critic_batch_size,
            generator=self.generator,
        )
        assert self.policy_optimizer.info is not None  # after a step
        return step_log(self.policy_optimizer.info, c.delta) | {
            "train/value_loss": value_loss,
            "train/explained_variance": explained_variance(values[:-1][valid], targets),
        }
