"""The one loop that steps a vector environment, alike in every autoreset mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from .answers import as_numpy, flags, reals
from .batches import take
from .masks import flat_mask, mask_of_each, whole_masks, with_masks


@dataclass(frozen=True)
class Transition:
    """What one step of a vector environment led to.

    Attributes:
        observations: a batch, from which the next actions are chosen. The environments may
            overwrite it at the next step.
        rewards: float64 ``(N,)``.
        terminated: bool ``(N,)``.
        truncated: bool ``(N,)``.
        valid: bool ``(N,)``; False where the environment ignored the action and reset itself.
        ended: bool ``(N,)``; True where ``observations`` holds the last one of an episode, from
            which no action will be chosen.
        infos: as the environment gave them. If it gave action masks at its reset, they are
            complete: all ones where an episode ended.
        finals: a batch of the last observations of the episodes that ended, in the order of the
            environments; None where ``observations`` has them, and where none ended.

    """

    observations: Any
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    ended: np.ndarray
    infos: dict[str, Any]
    finals: Any = None


class Stepper:
    """Steps a vector environment in its own autoreset mode.

    Under next-step autoreset the environment answers the step after a done with its reset, ignoring
    the action. Under same-step autoreset it resets in the step of the done, with the last
    observation in its infos. With autoreset disabled, this class resets it.

    The environment may answer with torch tensors on any device, and with rewards and dones of any
    numeric type. Actions go to it as they are given.

    Args:
        envs: the vector environment.

    Attributes:
        choices: number of entries of a mask in the infos; None if the last reset gave none.

    Raises:
        ValueError: it does not say which mode it has.

    """

    choices: int | None = None

    def __init__(self, envs: VectorEnv) -> None:
        self.envs = envs
        try:
            self.mode = AutoresetMode(envs.metadata.get("autoreset_mode"))
        except ValueError as error:
            raise ValueError(
                f"{envs} does not say how it resets: metadata['autoreset_mode'] must be a"
                f" gymnasium.vector.AutoresetMode, got {envs.metadata.get('autoreset_mode')!r}"
            ) from error
        self._nowhere = np.zeros(envs.num_envs, np.bool_)
        self._ended = self._nowhere

    def reset(self, seed: int | None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere; return observations and infos.

        Raises:
            ValueError: some environments gave an action mask, and others none.

        """
        self._ended = self._nowhere
        observations, infos = self.envs.reset(seed=seed)
        masks = mask_of_each(infos, self.envs.num_envs)
        self.choices = next((flat_mask(mask).size for mask in masks if mask is not None), None)
        if self.choices is not None:
            infos = with_masks(infos, whole_masks(infos, self._nowhere, self.choices))
        return as_numpy(observations), infos

    def step(self, actions: Any) -> Transition:
        """Step every environment once.

        Raises:
            ValueError: rewards or dones of another shape or kind, or an action mask that is missing
                or does not fit.

        """
        shape = (self.envs.num_envs,)
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        observations, rewards = as_numpy(observations), reals("rewards", rewards, shape)
        terminated = flags("terminated", terminated, shape)
        truncated = flags("truncated", truncated, shape)
        valid, done, finals = ~self._ended, terminated | truncated, None
        self._ended = done if self.mode is AutoresetMode.NEXT_STEP else self._nowhere
        if self.mode is not AutoresetMode.NEXT_STEP and done.any():
            observations, finals, infos = self._renewed(observations, infos, done)
        if self.choices is not None:
            infos = with_masks(infos, whole_masks(infos, self._ended, self.choices))
        return Transition(
            observations, rewards, terminated, truncated, valid, self._ended, infos, finals
        )

    def _renewed(
        self, observations: Any, infos: dict[str, Any], done: np.ndarray
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Return observations after the resets, the last ones before them, and infos."""
        space, n, ends = self.envs.single_observation_space, len(done), np.flatnonzero(done)
        if self.mode is AutoresetMode.SAME_STEP:
            if "final_obs" not in infos:
                raise ValueError(
                    f"{self.envs} gave no infos['final_obs'] at the end of an episode, which"
                    " same-step autoreset must give"
                )
            return observations, take(space, infos["final_obs"], ends), infos
        finals = take(space, observations, ends)  # a copy: the reset may write there
        observations, fresh = self.envs.reset(options={"reset_mask": done})
        if self.choices is not None:  # the masks of those that go on came with the step
            both = zip(done, mask_of_each(fresh, n), mask_of_each(infos, n), strict=True)
            infos = with_masks(infos, [new if over else old for over, new, old in both])
        return as_numpy(observations), finals, infos


def play(
    stepper: Stepper, seed: int | None, choose: Callable[[Any, dict[str, Any]], Any]
) -> Iterator[Transition]:
    """Yield transitions for ever, from new episodes on.

    Args:
        stepper: the environments.
        seed: of the reset.
        choose: returns actions for a batch of observations and its infos.

    """
    observations, infos = stepper.reset(seed)
    while True:
        step = stepper.step(choose(observations, infos))
        yield step
        observations, infos = step.observations, step.infos
