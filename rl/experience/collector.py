"""Experience from vector environments."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from ..envs.layout import ObservationLayout
from ..envs.masks import forbidden_rows
from ..envs.stepper import Stepper
from ..networks.policy import Policy


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments.

    Under next-step autoreset the environment answers the step after a done with its reset, ignoring
    the action. That dummy transition is in the tensors, so that they stay rectangular, and
    ``valid`` masks it: it belongs in no loss, no advantage, no statistic and no step count.

    Attributes:
        observations: rows of an :class:`ObservationLayout`, ``(T + 1, N, d)``. Row ``t + 1`` is
            what step ``t`` led to, and what the next action was chosen from.
        finals: ``(K, d)``, the last observations of the K episodes that ended, in the order of the
            dones, where row ``t + 1`` is the first of the next episode instead; otherwise empty.
        actions: shape ``(T, N)`` or ``(T, N, k)``.
        rewards: shape ``(T, N)``.
        terminated: bool ``(T, N)``.
        truncated: bool ``(T, N)``.
        valid: bool ``(T, N)``; False for dummy transitions.

    """

    observations: Tensor
    finals: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor

    @property
    def done(self) -> Tensor:
        """Where an episode ended, ``(T, N)``."""
        return self.terminated | self.truncated

    def to(self, device: str) -> Rollout:
        """Return it on a device."""
        return Rollout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def values(self, critic: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the values of the states that actions were taken in and of those they led to.

        Both ``(T, N)``; the second are those of the true last observations where episodes ended.
        """
        values = critic(self.observations)
        following = values[1:]
        if len(self.finals):
            following = following.clone()
            following[self.done] = critic(self.finals)
        return values[:-1], following


class Collector:
    """Steps a vector environment with a policy and keeps the episodes' returns.

    A rollout that was interrupted leaves the environments in an unknown state: the next one starts
    new episodes.

    Args:
        stepper: the environments.
        layout: of their observations.
        seed: environment ``i`` starts its first episode from ``seed + i``.
        generator: source of the actions' noise.

    """

    def __init__(
        self, stepper: Stepper, layout: ObservationLayout, *, seed: int, generator: torch.Generator
    ) -> None:
        self.stepper, self.layout = stepper, layout
        self.generator = generator
        self._seed: int | None = seed
        self.returns: deque[float] = deque(maxlen=100)  # of the last finished episodes
        self.lengths: deque[int] = deque(maxlen=100)
        self._row: np.ndarray | None = None  # None: reset before the next step

    def _reset(self) -> np.ndarray:
        n = self.stepper.envs.num_envs
        self._return, self._length = np.zeros(n), np.zeros(n, dtype=np.int64)
        observations, infos = self.stepper.reset(self._seed)  # None after the first time
        self._seed = None
        return self.layout.flat(observations, infos)

    def collect(self, policy: Policy, steps: int) -> Rollout:
        """Step every environment ``steps`` times, from where the last call stopped.

        Raises:
            ValueError: an observation or reward is NaN or infinite.

        """
        n, layout = self.stepper.envs.num_envs, self.layout
        rows = np.empty((steps + 1, n, layout.width), layout.dtype)
        rewards = np.empty((steps, n))
        terminated, truncated, valid = (np.empty((steps, n), np.bool_) for _ in range(3))
        actions: list[np.ndarray] = []
        finals: list[np.ndarray] = []
        rows[0] = self._reset() if self._row is None else self._row
        self._row = None  # until the rollout is whole
        act = policy.actor(policy.noise(steps, n, self.generator))
        for t in range(steps):
            action = act(t, rows[t])
            try:
                step = self.stepper.step(policy.to_env(action))
            except Exception as error:
                error.add_note(
                    f"an environment raised this at step {t} of a rollout: nothing was updated,"
                    " and the next rollout starts new episodes, if the environments still can"
                )
                raise
            actions.append(action)
            layout.write(step.observations, rows[t + 1], step.infos, step.ended)
            rewards[t], valid[t] = step.rewards, step.valid
            terminated[t], truncated[t] = step.terminated, step.truncated
            if step.finals is not None:
                finals.append(layout.flat(step.finals, ended=True))
        rollout = Rollout(
            torch.from_numpy(rows),
            torch.from_numpy(np.concatenate([np.empty((0, layout.width), layout.dtype), *finals])),
            torch.from_numpy(np.stack(actions)),
            torch.from_numpy(rewards.astype(np.float32)),
            *(torch.from_numpy(x) for x in (terminated, truncated, valid)),
        )
        _check(rollout, layout, self.stepper.envs.single_action_space)
        self._record(np.where(valid, rewards, 0.0), terminated | truncated, valid)
        self._row = rows[steps].copy()
        return rollout

    def _record(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray) -> None:
        """Keep returns and lengths of the episodes that ended, in the order they did."""
        totals, steps = rewards.cumsum(0) + self._return, valid.cumsum(0) + self._length
        spent, counted = np.zeros_like(self._return), np.zeros_like(self._length)
        for t, i in np.argwhere(done):
            self.returns.append(float(totals[t, i] - spent[i]))
            self.lengths.append(int(steps[t, i] - counted[i]))
            spent[i], counted[i] = totals[t, i], steps[t, i]
        self._return, self._length = totals[-1] - spent, steps[-1] - counted


def _check(rollout: Rollout, layout: ObservationLayout, action_space: Space[Any]) -> None:
    """Raise a ValueError where the environments gave what nothing can be learnt from."""
    # row t + 1 of the observations is what step t led to; row 0 was checked unless it is a reset's
    for name, x, first in (
        ("observation", rollout.observations, -1),
        ("reward", rollout.rewards, 0),
    ):
        if bool(x.isfinite().all()):
            continue
        finite = x.isfinite().reshape(*x.shape[:2], -1).all(-1)
        t, i = (~finite).nonzero()[0].tolist()
        t += first
        action = rollout.actions[t, i].tolist() if t >= 0 else None
        when = "at its reset, before" if t < 0 else f"at step {t}, on action {action}, of"
        raise ValueError(
            f"environment {i} gave a {name} that is NaN, infinite or too large for float32 {when}"
            " this rollout: nothing was updated"
        )
    if not bool(rollout.finals.isfinite().all()):
        raise ValueError(
            "the last observation of an episode is NaN, infinite or too large for float32:"
            " nothing was updated"
        )
    for part in layout.of_kind("mask"):
        masks = rollout.observations[:-1, :, part.columns].numpy()
        stuck = forbidden_rows(masks, action_space) & rollout.valid.numpy()[..., None]
        if stuck.any():
            t, i, component = np.argwhere(stuck)[0].tolist()
            where = f" in component {component}" if stuck.shape[-1] > 1 else ""
            raise ValueError(
                f"environment {i} allowed no action at step {t} of this rollout{where}: its action"
                " mask is all zeros there. Nothing was updated"
            )
