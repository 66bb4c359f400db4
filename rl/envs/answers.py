"""What a single environment answers, in the form in which the answers of copies are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces

from .batches import flags, reals
from .masks import MASK, flat_mask
from .state import made_of

Env: TypeAlias = "gymnasium.Env[Any, Any]"
_NUMBER, _FLAG = (float, int, np.floating, np.integer), (bool, np.bool_)


class PlainAnswers(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose answers can be merged with those of its copies.

    Rewards become numbers and dones truth values, whether they come as arrays, tensors or lists of
    one entry. Infos keep the action mask and the numbers under ``keep``: gymnasium cannot merge
    infos whose kind or shape varies. An environment that is not ``owned`` stays open.
    """

    def __init__(self, env: Env, keep: Sequence[str] = (), *, owned: bool = True) -> None:
        super().__init__(env)
        self._keep, self._owned = keep, owned
        self.made = made_of(env)
        counted = isinstance(env.action_space, spaces.Discrete | spaces.MultiDiscrete)
        self._choices = spaces.flatdim(env.action_space) if counted else None  # entries of a mask

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start a new episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._kept(info)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environment; a ValueError names an answer that is not of its kind."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not isinstance(reward, _NUMBER):
            reward = float(reals("reward", reward, ()))
        if not isinstance(terminated, _FLAG):
            terminated = bool(flags("terminated", terminated, ()))
        if not isinstance(truncated, _FLAG):
            truncated = bool(flags("truncated", truncated, ()))
        return observation, reward, terminated, truncated, self._kept(info)

    def _kept(self, info: dict[str, Any]) -> dict[str, Any]:
        if not self._keep and MASK not in info:
            return {}
        kept = {k: float(reals(f"infos[{k!r}]", info[k], ())) for k in self._keep if k in info}
        mask = info.get(MASK)
        return kept if mask is None else kept | {MASK: flat_mask(mask, self._choices)}

    def close(self) -> None:
        """Close the environment, unless somebody else will."""
        if self._owned:
            super().close()
