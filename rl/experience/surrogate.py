"""What a policy update maximises, and what it reports of its step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from trustregion import StepInfo

from ..networks.policy import Policy
from .path import Batch


def normalise(advantages: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1, at any scale.

    All zero where they do not vary: a spread below the rounding of the largest is no variation.
    """
    centred = advantages - advantages.mean()
    largest = centred.abs().max()
    if largest <= 8 * torch.finfo(advantages.dtype).eps * advantages.abs().max():
        return torch.zeros_like(advantages)
    centred = centred / largest  # so that no square under- or overflows
    return centred / centred.square().mean().sqrt()


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    r"""Return the importance-weighted advantage :math:`E[\pi(a|s) / \pi_{old}(a|s)\; A]`.

    Schulman et al., Trust Region Policy Optimization, 2015, eq. 14. All arguments ``(B,)``.
    """
    return ((log_prob - old_log_prob).exp() * advantages).mean()


@torch.no_grad()
def old_distribution(policy: Policy, batch: Batch) -> Distribution:
    """Return the distribution before an update, which writing to the policy does not change.

    It is that of a copy: a distribution may hold parameters of its policy, and not only what was
    computed from them.
    """
    return copy.deepcopy(policy)(batch.observations)


def surrogate_closure(policy: Policy, batch: Batch) -> Callable[[], tuple[Tensor, Distribution]]:
    """Return the closure of :func:`surrogate` with normalised advantages, for an optimizer."""
    advantages = normalise(batch.advantages)

    def closure() -> tuple[Tensor, Distribution]:
        distribution = policy(batch.observations)
        log_prob = distribution.log_prob(batch.actions)
        return surrogate(log_prob, batch.old_log_prob, advantages), distribution

    return closure


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    r"""Return the clipped objective, and the share of the ratios that are beyond the clip.

    With the ratio :math:`r = \pi(a|s) / \pi_{old}(a|s)` it is
    :math:`E[\min(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A)]`: Schulman et al., Proximal
    Policy Optimization Algorithms, 2017, eq. 7. All arguments ``(B,)``.
    """
    ratio = (log_prob - old_log_prob).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    beyond = ((ratio - 1).abs() > clip).to(ratio.dtype).mean()
    return torch.minimum(ratio * advantages, bounded * advantages).mean(), beyond


def step_log(info: StepInfo, delta: float) -> dict[str, float | str]:
    """Return what to log of an optimizer's step, under stable-baselines3's keys and ``trust/*``."""
    return {
        "train/policy_objective": info.new_loss,
        "train/kl_divergence_loss": info.kl,
        "train/is_line_search_success": float(info.accepted),
        "trust/delta": delta,
        "trust/status": info.status.value,
        "trust/rho": info.rho,
        "trust/predicted_reduction": info.predicted_reduction,
        "trust/actual_reduction": info.actual_reduction,
        "trust/cg_iterations": info.cg_iterations,
        "trust/cg_residual": info.cg_residual,
        "trust/backtracks": info.backtracks,
    }
