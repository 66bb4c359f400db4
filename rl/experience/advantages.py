"""Advantages and returns: functions of ``(T, N)`` tensors, and estimators of a path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..options import check_counts, check_fractions, convert_fields
from .path import Path, Values


class Advantages(Protocol):
    """An estimator: any function of a path, the critic's values, and the discount."""

    def __call__(self, path: Path, values: Values, gamma: float) -> tuple[Tensor, Tensor]:
        """Return advantages and returns, each ``(T, N)``."""
        ...


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation with trace decay ``gae_lambda``: see :func:`gae`."""

    gae_lambda: float = 0.98

    def __post_init__(self) -> None:
        """Check the range."""
        convert_fields(self)
        check_fractions(self, "gae_lambda")

    def __call__(
        self, path: Path, values: Values, gamma: float, signal: str = "reward"
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns of a signal of the path."""
        return gae(
            path.signals[signal], *values, *path.ends, gamma=gamma, gae_lambda=self.gae_lambda
        )


@dataclass(frozen=True)
class NStep:
    """``n`` rewards and the critic's value after them: see :func:`n_step`."""

    n: int = 5

    def __post_init__(self) -> None:
        """Check the range."""
        convert_fields(self)
        check_counts(self, "n")

    def __call__(
        self, path: Path, values: Values, gamma: float, signal: str = "reward"
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns of a signal of the path."""
        return n_step(path.signals[signal], *values, *path.ends, gamma=gamma, n=self.n)


@dataclass(frozen=True)
class MonteCarlo:
    """All rewards to the end of the episode, or the critic's value where a rollout cuts it off."""

    def __call__(
        self, path: Path, values: Values, gamma: float, signal: str = "reward"
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns of a signal of the path."""
        return GAE(1.0)(path, values, gamma, signal)


ADVANTAGES: dict[str, type[GAE | NStep | MonteCarlo]] = {
    "gae": GAE,
    "n_step": NStep,
    "monte_carlo": MonteCarlo,
}


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
    r"""Generalised advantage estimation.

    .. math::
        \delta_t &= r_t + \gamma\,(1 - \mathrm{terminated}_t)\,V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma\lambda\,(1 - \mathrm{done}_t)\,A_{t+1}

    A terminated step has no future value. A truncated one keeps the value of the state it was cut
    at, its true final observation, but no advantage flows back over the cut. With
    ``gae_lambda=1`` the returns are Monte Carlo's, with the critic's value where a rollout ends.

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
    _check(rewards, values, next_values, terminated, truncated)
    check_fractions(gamma=gamma, gae_lambda=gae_lambda)
    deltas = _errors(rewards, values, next_values, terminated, gamma)
    going_on = (~(terminated | truncated)).to(values.dtype)
    advantages = discounted_sums(deltas, gamma * gae_lambda * going_on, len(deltas))
    return advantages, advantages + values


def n_step(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    n: int,
) -> tuple[Tensor, Tensor]:
    r"""Advantages of n rewards and the critic's value after them.

    .. math::
        A_t = \sum_{l=0}^{n-1} \gamma^l r_{t+l} + \gamma^n V(s_{t+n}) - V(s_t),

    fewer than ``n`` where the episode or the rollout ends, as :func:`gae` treats these.

    Arguments and results are those of :func:`gae`, with ``n`` instead of ``gae_lambda``.

    Example:
        >>> zeros, no = torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.bool)
        >>> n_step(torch.ones(3, 1), zeros, zeros, no, no, gamma=0.5, n=2)[0].flatten()
        tensor([1.5000, 1.5000, 1.0000])

    References:
        Sutton and Barto, Reinforcement Learning, 2018, eq. 7.1.

    """
    _check(rewards, values, next_values, terminated, truncated)
    check_fractions(gamma=gamma)
    check_counts(n=n)
    deltas = _errors(rewards, values, next_values, terminated, gamma)
    going_on = (~(terminated | truncated)).to(values.dtype)
    advantages = discounted_sums(deltas, gamma * going_on, min(n, len(deltas)))
    return advantages, advantages + values


def td_lambda(
    rewards: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    trace: float,
) -> Tensor:
    r"""Lambda-returns: mixtures of the n-step returns, a target for a critic.

    .. math::
        G_t = r_t + \gamma \left((1 - \lambda)\, V(s_{t+1}) + \lambda\, G_{t+1}\right)

    where the episode goes on; ``V`` takes the place of :math:`G_{t+1}` at a truncation and at the
    end of the rollout, and zero that of both at a terminal state. With the values of one critic
    these are the returns of :func:`gae`.

    Arguments are those of :func:`gae`, with ``trace`` for lambda.

    Example:
        >>> ones, no = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool)
        >>> td_lambda(ones, 4 * ones, no, no, gamma=0.5, trace=0.5).flatten()
        tensor([2.7500, 3.0000])

    References:
        Sutton and Barto, Reinforcement Learning, 2018, eq. 12.2.

    """
    _check(rewards, next_values, terminated, truncated)
    check_fractions(gamma=gamma, trace=trace)
    weight = trace * (~(terminated | truncated)).to(next_values.dtype)
    weight[-1] = 0.0
    future = torch.where(terminated, 0.0, next_values)
    return discounted_sums(rewards + gamma * (1 - weight) * future, gamma * weight, len(rewards))


def _errors(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, gamma: float
) -> Tensor:
    return rewards + gamma * torch.where(terminated, 0.0, next_values) - values


def discounted_sums(terms: Tensor, decay: Tensor, length: int) -> Tensor:
    """Return ``sum_{l < length} decay_t ... decay_{t+l-1} terms_{t+l}`` for each ``t``.

    By sums over windows of 1, 2, 4, ... steps: some 4 log2(length) operations on whole tensors. A
    loop over the 256 steps of 8 environments takes eight times as long.
    """
    total: Tensor | None = None
    window, factor, size = terms, decay, 1
    while True:
        if length & size:
            total = window if total is None else _then(window, factor, total, size)
        size *= 2
        if size > length:
            assert total is not None  # the leading bit is set
            return total
        half = size // 2
        window, factor = _then(window, factor, window, half), _shifted(factor, half)


def _then(window: Tensor, factor: Tensor, rest: Tensor, size: int) -> Tensor:
    """Return the sums over ``size`` steps and what follows them."""
    out = window.clone()
    if size < len(out):
        out[:-size].addcmul_(factor[:-size], rest[size:])
    return out


def _shifted(factor: Tensor, size: int) -> Tensor:
    """Return the product of the factors of a window and of the one after it."""
    out = torch.zeros_like(factor)
    torch.mul(factor[:-size], factor[size:], out=out[:-size])
    return out


def _check(*tensors: Tensor) -> None:
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1 or tensors[0].ndim != 2 or len(tensors[0]) == 0:
        raise ValueError(f"all tensors must have one shape (T, N), T >= 1, got {sorted(shapes)}")
