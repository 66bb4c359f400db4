"""Advantage estimates from rollouts."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation, backwards over time.

    .. math::
        \delta_t &= r_t + \gamma\,(1 - \mathrm{terminated}_t)\,V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma\lambda\,(1 - \mathrm{done}_t)\,A_{t+1}

    A terminated step has no future value. A truncated one keeps the value of the state it was cut
    at, its true final observation, but no advantage flows back over the cut.

    Args:
        rewards: shape ``(T, N)``: T steps of N environments.
        values: ``V(s_t)``, shape ``(T, N)``.
        next_values: ``V`` of the observation each step really led to, before any reset; ``(T, N)``.
        terminated: bool ``(T, N)``: the episode ended in a terminal state.
        truncated: bool ``(T, N)``: the episode was cut off.
        gamma: discount, in [0, 1].
        gae_lambda: trace decay, in [0, 1].

    Returns:
        ``(advantages, returns)``, each ``(T, N)``; returns are ``advantages + values``, the
        lambda-returns a critic is fitted to.

    Raises:
        ValueError: shapes differ, or a factor lies outside [0, 1].

    Example:
        >>> zeros, no = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
        >>> gae(torch.ones(2, 1), zeros, zeros, no, no, gamma=0.5, gae_lambda=1.0)[0].flatten()
        tensor([1.5000, 1.0000])

    References:
        Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage
        Estimation, 2016, eq. 16.

    """
    shapes = {tuple(t.shape) for t in (rewards, values, next_values, terminated, truncated)}
    if len(shapes) != 1 or rewards.ndim != 2:
        raise ValueError(f"all five tensors must have one shape (T, N), got {sorted(shapes)}")
    for name, factor in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {factor}")
    bootstrap = torch.where(terminated, 0.0, next_values)
    deltas = rewards + gamma * bootstrap - values
    decay = gamma * gae_lambda * (~(terminated | truncated)).to(values.dtype)
    advantages = deltas.clone()
    for t in range(len(advantages) - 2, -1, -1):
        advantages[t].addcmul_(decay[t], advantages[t + 1])
    return advantages, advantages + values
