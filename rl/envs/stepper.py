"""The one loop that steps a vector environment, alike in every autoreset mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from .batches import as_numpy, flags, reals, take
from .masks import flat_mask, mask_of_each, whole_masks, with_masks
from .snapshot import restore, snapshot


@dataclass(frozen=True)
class Transition:
    """What one step of ``N`` environments led to; the arrays are bool, or float64, ``(N,)``."""

    observations: Any  # a batch, to choose the next actions from; the next step may overwrite it
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray  # False where the environment ignored the action and reset itself
    ended: np.ndarray  # True where the observation is its episode's last, and no action follows
    infos: dict[str, Any]  # masks, if the reset gave some, are complete: ones where ended
    finals: Any = None  # a batch of the last observations that are not in observations, if any


class Stepper:
    """Steps a vector environment in its own autoreset mode; one that has none is reset here.

    It may answer with torch tensors on any device, and with rewards and dones of any numeric type.
    A ValueError names what is missing or has another shape or kind.
    """

    choices: int | None = None  # entries of a mask in the infos; None if the last reset gave none

    def __init__(self, envs: VectorEnv) -> None:
        self.envs, mode = envs, envs.metadata.get("autoreset_mode")
        try:
            self.mode = AutoresetMode(mode)
        except ValueError as error:
            raise ValueError(
                f"{envs} does not say how it resets: metadata['autoreset_mode'] must be a"
                f" gymnasium.vector.AutoresetMode, got {mode!r}"
            ) from error
        self._ended = self._nowhere = np.zeros(envs.num_envs, np.bool_)

    def reset(self, seed: int | None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere; return observations and infos."""
        self._ended = self._nowhere
        observations, infos = self.envs.reset(seed=seed)
        masks = mask_of_each(infos, self.envs.num_envs)
        self.choices = next((flat_mask(mask).size for mask in masks if mask is not None), None)
        return as_numpy(observations), self._complete(infos)

    def step(self, actions: Any) -> Transition:
        """Step every environment once; actions go to it as they are given."""
        shape = (self.envs.num_envs,)
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        observations, rewards = as_numpy(observations), reals("rewards", rewards, shape)
        terminated = flags("terminated", terminated, shape)
        truncated = flags("truncated", truncated, shape)
        valid, done, finals = ~self._ended, terminated | truncated, None
        # under next-step autoreset, the next step resets what is done now, and ignores the action
        self._ended = ended = done if self.mode is AutoresetMode.NEXT_STEP else self._nowhere
        if ended is self._nowhere and done.any():
            observations, finals, infos = self._renewed(observations, infos, done)
        infos = self._complete(infos)
        return Transition(observations, rewards, terminated, truncated, valid, ended, infos, finals)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the environments' state and what is known of their episodes; None if hidden."""
        states = snapshot(self.envs)
        if states is None:
            return None
        return {
            "states": states,
            "ended": torch.from_numpy(self._ended.copy()),
            "choices": self.choices,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stepper of environments like these stopped.

        Raises:
            ValueError: they are other environments.

        """
        ended = state["ended"].numpy().copy()
        if ended.shape != self._nowhere.shape:
            raise ValueError(f"the state is that of {len(ended)} environments")
        restore(self.envs, state["states"], ended)
        self._ended = ended if self.mode is AutoresetMode.NEXT_STEP else self._nowhere
        self.choices = state["choices"]

    def _complete(self, infos: dict[str, Any]) -> dict[str, Any]:
        if self.choices is None:
            return infos
        return with_masks(infos, whole_masks(infos, self._ended, self.choices))

    def _renewed(self, observations: Any, infos: dict[str, Any], done: np.ndarray) -> Any:
        """Return observations after the resets, the last ones before them, and infos."""
        space, n, ends = self.envs.single_observation_space, len(done), np.flatnonzero(done)
        if self.mode is AutoresetMode.SAME_STEP:
            if "final_obs" not in infos:
                reason = "at the end of an episode, which same-step autoreset must give"
                raise ValueError(f"{self.envs} gave no infos['final_obs'] {reason}")
            return observations, take(space, infos["final_obs"], ends), infos
        finals = take(space, observations, ends)  # a copy: the reset may write there
        observations, fresh = self.envs.reset(options={"reset_mask": done})
        if self.choices is not None:  # the masks of those that go on came with the step
            both = zip(done, mask_of_each(fresh, n), mask_of_each(infos, n), strict=True)
            infos = with_masks(infos, [new if over else old for over, new, old in both])
        return as_numpy(observations), finals, infos


def play(stepper: Stepper, seed: int | None, choose: Callable[..., Any]) -> Iterator[Transition]:
    """Yield transitions for ever, from new episodes on, of actions chosen from ``(obs, infos)``."""
    observations, infos = stepper.reset(seed)
    while True:
        step = stepper.step(choose(observations, infos))
        yield step
        observations, infos = step.observations, step.infos
