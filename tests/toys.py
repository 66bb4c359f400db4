"""Environments whose every number is known."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Clock(gymnasium.Env):
    """Observes (number of the episode, step in it); pays 1 a step; ends after ``length`` steps."""

    def __init__(self, length=3, truncate=False, action_space=None, poison=None):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = action_space or Discrete(2)
        self.length, self.truncate, self.poison = length, truncate, poison
        self.episode, self.time, self.actions = -1, 0, []

    def _observation(self):
        return np.array([self.episode, self.time], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action):
        self.actions.append(action)
        self.time += 1
        done = self.time == self.length
        reward = self.poison if self.poison is not None and self.time == 2 else 1.0
        return self._observation(), reward, done and not self.truncate, done and self.truncate, {}


class Bandit(gymnasium.Env):
    """One step; action 1 pays 1, action 0 pays nothing."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action), True, False, {}


class Paid(Clock):
    """A clock whose hands pay differently, times a factor."""

    def __init__(self, factor=1.0):
        super().__init__(length=5)
        self.factor = factor

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self.factor * (1.0 + self.time * float(action)), *rest


class Slide(Clock):
    """A clock that pays its action, a real number."""

    def __init__(self):
        super().__init__(action_space=Box(-1, 1, (1,), np.float32))

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(action[0]), *rest


def vector(make, n=1, mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([make] * n, autoreset_mode=mode)
