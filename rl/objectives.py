"""What a policy update maximises."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(advantages: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1; all zero where they do not vary.

    A spread below the rounding of the largest one is no variation.
    """
    centred = advantages - advantages.mean()
    scale = centred.square().mean().sqrt()
    rounding = 8 * torch.finfo(advantages.dtype).eps * advantages.abs().max()
    return centred / scale if scale > rounding else torch.zeros_like(advantages)


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    r"""Return the importance-weighted advantage :math:`E[\pi(a|s) / \pi_{old}(a|s)\; A]`.

    Schulman et al., Trust Region Policy Optimization, 2015, eq. 14. All arguments ``(B,)``.
    """
    return ((log_prob - old_log_prob).exp() * advantages).mean()
