"""Copies of a single environment, stepped in turn or in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from .answers import as_numpy, flags, reals
from .layout import ObservationLayout
from .masks import MASK, flat_mask

Env: TypeAlias = "gymnasium.Env[Any, Any]"


class PlainAnswers(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose answers can be merged with those of its copies.

    Rewards become numbers and dones truth values, whether they come as arrays, tensors or lists of
    one entry. Infos keep the action mask and what is asked for: gymnasium cannot merge infos whose
    kind or shape varies, and nobody reads the others.

    Args:
        env: the environment.
        keep: keys of numbers to keep in the infos.
        owned: close the environment with this wrapper.

    """

    def __init__(self, env: Env, keep: Sequence[str] = (), *, owned: bool = True) -> None:
        super().__init__(env)
        self._keep, self._owned = keep, owned
        counted = isinstance(env.action_space, spaces.Discrete | spaces.MultiDiscrete)
        self._choices = spaces.flatdim(env.action_space) if counted else None  # entries of a mask

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start a new episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return as_numpy(observation), self._kept(info)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environment.

        Raises:
            ValueError: the reward is not a number, a done is not a truth value, or a mask is not
                one of the actions.

        """
        answer = observation, reward, terminated, truncated, info = self.env.step(action)
        if (  # spare the most common answer all further calls
            not info
            and type(reward) is float
            and type(terminated) is bool
            and type(truncated) is bool
            and type(observation) is np.ndarray
        ):
            return answer
        if not isinstance(reward, float | int | np.floating | np.integer):
            reward = float(reals("reward", reward, ()))
        if not isinstance(terminated, bool | np.bool_):
            terminated = bool(flags("terminated", terminated, ()))
        if not isinstance(truncated, bool | np.bool_):
            truncated = bool(flags("truncated", truncated, ()))
        return as_numpy(observation), reward, terminated, truncated, self._kept(info)

    def _kept(self, info: dict[str, Any]) -> dict[str, Any]:
        if not info:
            return {}
        kept: dict[str, Any] = {
            key: float(reals(f"infos[{key!r}]", info[key], ())) for key in self._keep if key in info
        }
        if info.get(MASK) is not None:
            kept[MASK] = flat_mask(info[MASK], self._choices)
        return kept

    def close(self) -> None:
        """Close the environment, unless somebody else will."""
        if self._owned:
            super().close()


class Processes(AsyncVectorEnv):
    """Copies in processes of their own, which can be used again after an interrupt or an error.

    These may leave answers of the processes unread. Then closing ends the processes at once, and a
    reset starts new ones.
    """

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """End the processes, at once where they still owe an answer."""
        if self._state is not AsyncState.DEFAULT:
            terminate, self._state = True, AsyncState.DEFAULT
        super().close_extras(timeout, terminate)

    def reset_async(
        self,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Have all processes start a new episode."""
        lost = None in self.parent_pipes  # gymnasium drops a process whose environment raised
        if not self.closed and (lost or self._state is not AsyncState.DEFAULT):
            self.close_extras(terminate=True)
            super().__init__(self.env_fns, copy=False)
        super().reset_async(seed, options)


class _Factory:
    """Makes one copy, in this process or in a worker."""

    def __init__(self, make: Callable[[], Env], keep: Sequence[str], *, processes: bool) -> None:
        self.make, self.keep, self.processes = make, keep, processes
        self.parent = os.getpid()

    def __call__(self) -> Env:
        if os.getpid() != self.parent:
            # Ctrl-C reaches all processes, and it is for the parent to act on it. This is not
            # SIG_IGN, which a simulator that the environment starts would inherit.
            signal.signal(signal.SIGINT, lambda *_: None)
        env = PlainAnswers(self.make(), self.keep)
        if self.processes:  # refuse here what could not be shared between them
            ObservationLayout(env.observation_space)
        return env


def make_copies(
    make: Callable[[], Env], n_envs: int, keep: Sequence[str] = (), *, processes: bool = False
) -> VectorEnv:
    """Return copies of an environment as a vector environment.

    What a step returns is overwritten by the next one.

    Args:
        make: makes one copy.
        n_envs: number of copies.
        keep: keys of numbers to keep in the infos, besides the action mask.
        processes: step each copy in a process of its own instead of in turn in this one.

    Raises:
        ValueError: ``make`` returned the same environment twice, or observations that cannot be
            shared between processes.

    """
    factories = [_Factory(make, keep, processes=processes)] * n_envs
    if processes:
        return Processes(factories, copy=False)
    envs = SyncVectorEnv(factories, copy=False)
    if len({id(env.unwrapped) for env in envs.envs}) < n_envs:
        raise ValueError(
            "the function returned the same environment twice: it must make a new one each time"
        )
    return envs
