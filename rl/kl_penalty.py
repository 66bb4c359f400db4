"""KL-penalised policy iteration: a penalty on the KL instead of a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trustregion import NaturalTrustRegion
from trustregion.optim import Adapt

from .agent import Agent
from .config import NaturalConfig
from .experience.path import Path
from .experience.surrogate import normalise
from .options import check_positive
from .reports import Log, step_log


@dataclass(frozen=True, kw_only=True)
class KLPenaltyConfig(NaturalConfig):
    """Options of KL-penalised policy iteration."""

    penalty: float = 5.0
    """C, the coefficient of the KL, in normalised advantages per nat; if it adapts, the first."""

    kl_target: float | None = 0.01
    """KL(old || new) that C is adapted to reach; None to keep C."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_positive(self, "penalty", "kl_target")


class KLPenalty(Agent):
    r"""Policy iteration with a penalty.

    For each path one step that increases :math:`E[\pi(a|s)/\pi_{old}(a|s)\,A] - C\,
    \mathrm{KL}(\pi_{old} \| \pi)`. C is fixed, or it is doubled after a KL above 1.5 times the
    target and halved after one below the target over 1.5 (Schulman et al., Proximal Policy
    Optimization Algorithms, 2017, section 4).

    The C for which improvement is guaranteed (Schulman et al., Trust Region Policy Optimization,
    2015, theorem 1) is :math:`4 \epsilon \gamma / (1 - \gamma)^2` with the largest advantage
    :math:`\epsilon`. It is logged as ``trust/penalty_bound``, in the same units. It is in the
    thousands: the steps that it allows are too small to learn anything.

    Args:
        env: as for every :class:`Agent`.
        options: fields of :class:`KLPenaltyConfig`, by name.

    """

    config: KLPenaltyConfig
    config_class = KLPenaltyConfig
    name = "kl_penalty"

    def setup(self) -> None:
        """Make the optimizers of policy and critic."""
        super().setup()
        c = self.config
        self.policy_optimizer = NaturalTrustRegion(
            self.policy.parameters(),
            math.inf,
            damping=c.damping,
            cg_max_iter=c.cg_max_iter,
            penalty=c.penalty,
            maximize=True,
            adapt=Adapt(kl_target=c.kl_target),
            process_group=False,
        )

    def update(self, path: Path) -> Log:
        """Estimate advantages, take the step, fit the critic."""
        estimates = self.estimate(path)
        advantages = normalise(estimates.advantages, path.mask)
        self.policy_optimizer.step(self.objective(path, advantages))
        info = self.policy_optimizer.info
        assert info is not None  # after a step
        gamma, largest = self.config.gamma, advantages.abs().max().item()
        bound = 4 * largest * gamma / (1 - gamma) ** 2 if gamma < 1 else math.inf
        return (
            step_log(self.policy_optimizer)
            | {
                "trust/delta": self.config.kl_target or math.inf,
                "trust/penalty": info.penalty or self.config.penalty,
                "trust/penalty_bound": bound,
            }
            | self.fit_critic(path, estimates)
        )
