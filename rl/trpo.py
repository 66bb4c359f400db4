"""Trust Region Policy Optimization (Schulman et al., 2015) with GAE (Schulman et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.distributions import Distribution

from trustregion import NaturalTrustRegion, subsample

from .agent import Agent
from .config import NaturalConfig
from .experience.path import Path
from .experience.surrogate import normalise
from .options import check_positive
from .reports import Log, step_log


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(NaturalConfig):
    """Options of TRPO."""

    delta: float = 0.01
    """Bound on KL(old || new) in nats: joint over action dimensions, mean over states."""

    final_delta: float | None = None
    """The bound at the end of learn(), reached linearly; None to keep it."""

    curvature_fraction: float = 0.25
    """Share of the states whose mean is the Fisher matrix; each update draws other ones."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_positive(self, "delta", "final_delta")
        if not 0 < self.curvature_fraction <= 1:
            raise ValueError(
                f"curvature_fraction must lie in (0, 1], got {self.curvature_fraction}"
            )


class TRPO(Agent):
    """Trust Region Policy Optimization.

    Algorithm 1 of Schulman et al. (2015) as section 6 makes it practical. For each path:

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
        """Make the optimizers of policy and critic."""
        super().setup()
        c = self.config
        self.policy_optimizer = NaturalTrustRegion(
            self.policy.parameters(),
            c.delta,
            damping=c.damping,
            cg_max_iter=c.cg_max_iter,
            maximize=True,
            process_group=False,
        )

    def update(self, path: Path) -> Log:
        """Run the three steps."""
        estimates = self.estimate(path)  # 1
        objective = self.objective(path, normalise(estimates.advantages, path.mask))
        for group in self.policy_optimizer.param_groups:
            group["delta"] = self.scheduled(self.config.delta, self.config.final_delta)
        self.policy_optimizer.step(objective, curvature=self.curvature(path))  # 2
        return step_log(self.policy_optimizer) | self.fit_critic(path, estimates)  # 3

    def curvature(self, path: Path) -> Callable[[], Distribution] | None:
        """Return the closure of the states whose Fisher matrix is used; None for all."""
        fraction = self.config.curvature_fraction
        if fraction == 1:
            return None
        rows = path.rows[subsample(path.steps, fraction, seed=self.iterations)]
        return lambda: self.policy(rows)
