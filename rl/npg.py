"""Natural policy gradient (Kakade, 2001), with a step of given length or given KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trustregion import FisherOperator, Identity, cg, kl_ball_step, mean_kl
from trustregion.operators import ParameterVector

from .agent import Agent
from .config import NaturalConfig
from .experience.path import Path
from .experience.surrogate import distribution_now, normalise
from .options import check_positive
from .reports import Log


@dataclass(frozen=True, kw_only=True)
class NPGConfig(NaturalConfig):
    """Options of the natural policy gradient."""

    delta: float = 0.01
    """KL(old || new) of a step to second order, in nats. The KL is not measured before the step."""

    step_size: float | None = None
    """Factor on the natural gradient, instead of delta."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_positive(self, "delta", "step_size")


class NPG(Agent):
    r"""The natural policy gradient.

    For each path one step :math:`s = \alpha\, (F + \lambda I)^{-1} g` along the gradient ``g``
    of the expected advantage, with :math:`\alpha` fixed (Kakade, 2001) or such that
    :math:`\frac12 s'Fs = \delta` (Rajeswaran et al., Towards Generalization and Simplicity in
    Continuous Control, 2017, eq. 5). Unlike :class:`TRPO` it has no line search
    and no measured bound. A step that is not finite is not taken.

    Args:
        env: as for every :class:`Agent`.
        options: fields of :class:`NPGConfig`, by name.

    """

    config: NPGConfig
    config_class = NPGConfig
    name = "npg"

    def update(self, path: Path) -> Log:
        """Estimate advantages, take the step, fit the critic."""
        c = self.config
        estimates = self.estimate(path)
        objective = self.objective(path, normalise(estimates.advantages, path.mask))
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        vector, old = ParameterVector(parameters), distribution_now(self.policy, path.rows)
        before, now = objective()
        g = vector.ravel(torch.autograd.grad(before, parameters, retain_graph=True))
        F = FisherOperator(now, parameters)
        solve = cg(F + c.damping * Identity(F.shape[0]), g, rtol=1e-3, max_iter=c.cg_max_iter)
        if c.step_size is None:
            step = kl_ball_step(
                solve.x, -g, c.delta, damped_curvature=solve.curvature, damping=c.damping
            ).s
        else:
            step = c.step_size * solve.x
        if bool(step.isfinite().all()):
            vector.assign(vector.values() + step)
        with torch.no_grad():
            after, new = objective()
        return {
            "train/policy_objective": after.item(),
            "train/kl_divergence_loss": mean_kl(old, new).item(),
            "trust/delta": c.delta,
            "trust/status": solve.status.value,
            "trust/actual_reduction": (after - before).item(),
            "trust/predicted_reduction": (g @ step).item(),
            "trust/cg_iterations": solve.iterations,
        } | self.fit_critic(path, estimates)
