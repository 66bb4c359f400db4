"""One step of a vector environment, alike in every autoreset mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from .layout import MASK


@dataclass(frozen=True)
class Transition:
    """What one step of a vector environment led to.

    Attributes:
        observations: a batch, from which the next actions are chosen.
        rewards: shape ``(N,)``.
        terminated: bool ``(N,)``.
        truncated: bool ``(N,)``.
        valid: bool ``(N,)``; False where the environment ignored the action and reset itself.
        infos: as the environment gave them.
        finals: a batch of the last observations of the episodes that ended, in the order of the
            environments; None where ``observations`` has them, and where none ended.

    """

    observations: Any
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    infos: dict[str, Any]
    finals: Any = None


class Stepper:
    """Steps a vector environment in its own autoreset mode.

    Under next-step autoreset the environment answers the step after a done with its reset, ignoring
    the action; under same-step autoreset the step of the done does, with the last observation in
    its infos; with autoreset disabled this class resets.

    Args:
        envs: the vector environment.

    Raises:
        ValueError: it does not say which mode it has.

    """

    def __init__(self, envs: VectorEnv) -> None:
        self.envs = envs
        try:
            self.mode = AutoresetMode(envs.metadata.get("autoreset_mode"))
        except ValueError as error:
            raise ValueError(
                f"{envs} does not say how it resets: metadata['autoreset_mode'] must be a"
                f" gymnasium.vector.AutoresetMode, got {envs.metadata.get('autoreset_mode')!r}"
            ) from error
        self._everywhere = np.ones(envs.num_envs, np.bool_)
        self._valid = self._everywhere

    def reset(self, seed: int | None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere."""
        self._valid = self._everywhere
        return self.envs.reset(seed=seed)

    def step(self, actions: np.ndarray) -> Transition:
        """Step every environment once."""
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        valid, done = self._valid, terminated | truncated
        finals = None
        if self.mode is AutoresetMode.NEXT_STEP:
            self._valid = ~done
        elif done.any():
            ended = np.flatnonzero(done)
            space = self.envs.single_observation_space
            if self.mode is AutoresetMode.SAME_STEP:
                finals = take(space, infos["final_obs"], ended)
            else:
                finals = take(space, observations, ended)  # a copy: the reset may write to it
                observations, fresh = self.envs.reset(options={"reset_mask": done})
                if MASK in infos and MASK in fresh:  # those that go on have theirs in the step's
                    both = zip(done, fresh[MASK], infos[MASK], strict=True)
                    fresh = fresh | {MASK: [new if ended else old for ended, new, old in both]}
                infos = fresh
        return Transition(observations, rewards, terminated, truncated, valid, infos, finals)


def play(
    stepper: Stepper, seed: int | None, choose: Callable[[Any, dict[str, Any]], Any]
) -> Iterator[Transition]:
    """Reset, and step for as long as the caller goes on.

    Args:
        stepper: what is played in.
        seed: of the reset.
        choose: returns the actions for a batch of observations and their infos.

    """
    observations, infos = stepper.reset(seed)
    while True:
        step = stepper.step(choose(observations, infos))
        yield step
        observations, infos = step.observations, step.infos


def take(space: gymnasium.Space[Any], batch: Any, rows: np.ndarray) -> Any:
    """Return some rows of a batch of observations, as a batch of its own."""
    if isinstance(batch, np.ndarray) and batch.dtype == object:  # of whole observations
        chosen = [batch[i] for i in rows]
        return concatenate(space, chosen, create_empty_array(space, len(chosen)))
    if isinstance(space, spaces.Dict):
        return {key: take(inner, batch[key], rows) for key, inner in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(take(inner, part, rows) for inner, part in zip(space, batch, strict=True))
    return np.asarray(batch)[rows]
