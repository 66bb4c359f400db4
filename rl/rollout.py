"""Experience from vector environments."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from .environments import observation_dim
from .policies import Policy


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments under next-step autoreset.

    After a done the environment answers the next step with its reset, ignoring the action. That
    dummy transition is in the tensors, so that they stay rectangular, and ``valid`` masks it: it
    belongs in no loss, no advantage, no statistic and no step count.

    Attributes:
        observations: shape ``(T + 1, N, d)``. Row ``t + 1`` is what step ``t`` led to; where that
            step ended an episode it is the true final observation.
        actions: shape ``(T, N)`` or ``(T, N, k)``.
        rewards: shape ``(T, N)``.
        terminated: bool ``(T, N)``.
        truncated: bool ``(T, N)``.
        valid: bool ``(T, N)``; False for dummy transitions.

    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor


class Collector:
    """Steps a vector environment with a policy and keeps the episodes' returns.

    A rollout that was interrupted leaves the environments in an unknown state: the next one starts
    new episodes.

    Args:
        envs: environments with next-step autoreset.
        seed: environment ``i`` starts its first episode from ``seed + i``.
        generator: source of the actions' noise.

    """

    def __init__(self, envs: VectorEnv, *, seed: int, generator: torch.Generator) -> None:
        self.envs = envs
        self.generator = generator
        self._seed: int | None = seed
        self.returns: deque[float] = deque(maxlen=100)  # of the last finished episodes
        self.lengths: deque[int] = deque(maxlen=100)
        self._observation: Tensor | None = None  # None: reset before the next step

    def _reset(self) -> Tensor:
        n = self.envs.num_envs
        self._return, self._length = np.zeros(n), np.zeros(n, dtype=np.int64)
        self._done = np.zeros(n, dtype=np.bool_)
        observation, _ = self.envs.reset(seed=self._seed)  # None after the first time
        self._seed = None
        return self._flat(observation)

    def _flat(self, observation: np.ndarray) -> Tensor:
        flat = np.asarray(observation, dtype=np.float32).reshape(self.envs.num_envs, -1)
        return torch.from_numpy(flat.copy())

    @torch.no_grad()
    def collect(self, policy: Policy, steps: int) -> Rollout:
        """Step every environment ``steps`` times, from where the last call stopped.

        Raises:
            ValueError: an observation or reward is NaN or infinite.

        """
        n = self.envs.num_envs
        observations = torch.empty(steps + 1, n, observation_dim(self.envs))
        rewards = np.empty((steps, n), dtype=np.float32)
        terminated, truncated, valid = (np.empty((steps, n), dtype=np.bool_) for _ in range(3))
        actions: list[Tensor] = []
        observations[0] = self._reset() if self._observation is None else self._observation
        self._observation = None  # until the rollout is whole
        for t in range(steps):
            valid[t] = ~self._done
            actions.append(policy.sample(observations[t], self.generator))
            observation, rewards[t], terminated[t], truncated[t], _ = self.envs.step(
                policy.to_env(actions[t])
            )
            observations[t + 1] = self._flat(observation)
            self._record(rewards[t], terminated[t] | truncated[t], valid[t])
        rollout = Rollout(
            observations,
            torch.stack(actions),
            *(torch.from_numpy(x) for x in (rewards, terminated, truncated, valid)),
        )
        _check_finite(rollout)
        self._observation = observations[steps].clone()
        return rollout

    def _record(self, reward: np.ndarray, done: np.ndarray, valid: np.ndarray) -> None:
        self._return += np.where(valid, reward, 0.0)
        self._length += valid
        self._done = done
        for i in np.flatnonzero(done):
            self.returns.append(float(self._return[i]))
            self.lengths.append(int(self._length[i]))
            self._return[i], self._length[i] = 0.0, 0


def _check_finite(rollout: Rollout) -> None:
    for name, x in (("observation", rollout.observations), ("reward", rollout.rewards)):
        finite = x.isfinite().reshape(*x.shape[:2], -1).all(-1)
        if not bool(finite.all()):
            t, i = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"environment {i} gave a {name} that is NaN, infinite or too large for float32 at"
                f" step {t} of this rollout: nothing was updated"
            )
