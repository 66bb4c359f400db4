"""What a policy update maximises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..networks.numpy_twin import distribution_function
from ..networks.policy import Policy
from .path import Path

Objective: TypeAlias = Callable[[], tuple[Tensor, Distribution]]
"""A closure for an optimizer: what is maximised, and the policy's distribution."""


def normalise(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1, at any scale.

    All zero where they do not vary: a spread below the rounding of the largest is no variation.

    Args:
        advantages: of any shape.
        mask: bool, of that shape: those that count. The others become zero.

    """
    if mask is not None and not bool(mask.all()):
        normal = torch.zeros_like(advantages)
        normal[mask] = normalise(advantages[mask])
        return normal
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


def surrogate_closure(policy: Policy, path: Path, advantages: Tensor) -> Objective:
    """Return the closure of :func:`surrogate` over the steps of a path that count.

    Trials of a line search, which need no gradient, are computed by the network that acts: the same
    up to rounding, and in a third of the time where it is small.

    Args:
        policy: the policy that is improved.
        path: T steps of N environments.
        advantages: ``(T, N)``.

    """
    rows, weights = path.rows, path.flat(advantages)
    actions, old_log_prob = path.flat(path.actions), path.flat(path.log_prob)

    tried = distribution_function(policy)

    def closure() -> tuple[Tensor, Distribution]:
        distribution = policy(rows) if torch.is_grad_enabled() else tried(rows)
        return surrogate(distribution.log_prob(actions), old_log_prob, weights), distribution

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


@torch.no_grad()
def distribution_now(policy: Policy, rows: Tensor) -> Distribution:
    """Return the policy's present distribution, which writing to the policy does not change.

    It is that of a copy: a distribution may hold parameters of its policy, and not only what was
    computed from them.
    """
    return copy.deepcopy(policy)(rows)
