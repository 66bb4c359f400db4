"""What a policy lived through: T steps of N environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Values(NamedTuple):
    """Values of states by a critic, each of shape ``(T, N)``.

    Attributes:
        now: ``V(s_t)``.
        following: ``V(s_{t+1})``, of the state that step ``t`` really led to, before any reset.

    """

    now: Tensor
    following: Tensor


@dataclass(frozen=True, kw_only=True)
class Path:
    """A time-major record of T steps of N environments, on any device.

    Under next-step autoreset an environment answers the step after the end of an episode with its
    reset and ignores the action. That dummy transition is in the tensors, so that they stay
    rectangular, and ``mask`` excludes it: it belongs in no loss, no advantage, no statistic and no
    step count.

    Attributes:
        observations: rows of an :class:`rl.ObservationLayout`, ``(T + 1, N, d)``. Row ``t + 1`` is
            what step ``t`` led to, and what the next action was chosen from.
        actions: ``(T, N)`` or ``(T, N, k)``.
        log_prob: log-probabilities of the actions when taken, ``(T, N)``; zero outside the mask.
        signals: what the environments gave for each step, by name, each ``(T, N)``: ``"reward"``.
        terminated: bool ``(T, N)``: the episode ended in a terminal state.
        truncated: bool ``(T, N)``: the episode was cut off.
        starts: bool ``(T, N)``: the action is the first of an episode.
        mask: bool ``(T, N)``; False for dummy transitions.
        finals: the last observations of episodes, ``(K, d)``, where row ``t + 1`` is the first of
            the next episode instead; otherwise empty.
        final_at: their places ``(t, i)``, ``(K, 2)``.
        version: how many updates the policy that acted had seen.

    """

    observations: Tensor
    actions: Tensor
    log_prob: Tensor
    signals: Mapping[str, Tensor]
    terminated: Tensor
    truncated: Tensor
    starts: Tensor
    mask: Tensor
    finals: Tensor
    final_at: Tensor
    version: int = 0

    @property
    def rewards(self) -> Tensor:
        """The signal to be maximised, ``(T, N)``."""
        return self.signals["reward"]

    @property
    def done(self) -> Tensor:
        """Where an episode ended, ``(T, N)``."""
        return self.terminated | self.truncated

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """``terminated`` and ``truncated``."""
        return self.terminated, self.truncated

    @cached_property
    def steps(self) -> int:
        """Number of transitions that count."""
        return int(self.mask.sum())

    def flat(self, x: Tensor) -> Tensor:
        """Return the transitions that count as rows: ``(T, N, ...)`` to ``(B, ...)``."""
        return x.flatten(0, 1) if self.steps == self.mask.numel() else x[self.mask]

    @cached_property
    def rows(self) -> Tensor:
        """The observations that actions were chosen from, ``(B, d)``."""
        return self.flat(self.observations[:-1])

    def values(self, critic: Callable[[Tensor], Tensor]) -> Values:
        """Return the values of the states that actions were taken in and of those they led to.

        Args:
            critic: rows ``(..., d)`` to values ``(...)``.

        Raises:
            ValueError: the critic does not return one value per row.

        """
        values = critic(self.observations)
        if values.shape != self.observations.shape[:2]:
            raise ValueError(
                "the critic must return one value per row, shape"
                f" {tuple(self.observations.shape[:2])} for rows"
                f" {tuple(self.observations.shape)}, got {tuple(values.shape)}"
            )
        following = values[1:]
        if len(self.finals):
            following = following.clone()
            following[self.final_at[:, 0], self.final_at[:, 1]] = critic(self.finals)
        return Values(values[:-1], following)

    def with_reward(self, reward: Tensor) -> Path:
        """Return the same path with other rewards ``(T, N)``, for example scaled ones."""
        return replace(self, signals={**self.signals, "reward": reward})

    def to(self, device: torch.device | str) -> Path:
        """Return the path on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        signals = {name: x.to(device) for name, x in self.signals.items()}
        names = self.__dataclass_fields__
        return replace(self, signals=signals, **{k: v for k, v in moved.items() if k in names})
