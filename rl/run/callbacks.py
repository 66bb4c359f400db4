"""What can be done after each update of :meth:`Agent.learn`.

A callback is called with the agent and the log of the update, a dict that it may add to. False ends
the training; anything else lets it go on. Of several, all are called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ..agent import Agent, Callback, Log
from ..envs.make import EnvSource
from .evaluation import evaluate

Callbacks: TypeAlias = "Callback | Sequence[Callback]"


class Every:
    """Calls another callback once in so many environment steps.

    Args:
        steps: environment steps between two calls; counted, so that updates of any size fit.
        callback: what to call.

    Example:
        >>> from rl import TRPO
        >>> report = Every(1000, lambda agent, log: print(agent.iterations))
        >>> _ = TRPO("CartPole-v1", steps_per_update=512).learn(2000, False, report)
        3
        5

    """

    def __init__(self, steps: int, callback: Callback) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps, self.callback = steps, callback
        self._agent: Agent | None = None
        self._next = 0

    def __call__(self, agent: Agent, log: Log) -> bool | None:
        """Call it if it is due."""
        done = agent.num_timesteps
        if agent is not self._agent:  # agents go on counting where they were
            self._agent, self._next = agent, done - log["time/steps"] + self.steps
        due = self._next
        late = (done - due) // self.steps + 1  # calls that are due: an update may have many steps
        self._next = due + self.steps * max(late, 0)
        if done < due:
            return None
        return self.callback(agent, log)


class SaveCheckpoint:
    """Saves the agent as ``folder/STEPS.zip``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Save it."""
        agent.save(self.folder / f"{agent.num_timesteps}.zip")


class EvaluateBest:
    """Evaluates the agent, adds ``eval/*`` to the log, and keeps the best agent so far.

    Args:
        env: the environment to evaluate in, as for :func:`evaluate`.
        best: file of the best agent; None to keep none.
        episodes: of each evaluation.
        seed: of the environments' first reset, the same every time.

    Attributes:
        best_mean: the highest mean return so far.

    """

    def __init__(
        self,
        env: EnvSource,
        best: str | Path | None = None,
        *,
        episodes: int = 20,
        seed: int = 0,
    ) -> None:
        self.env, self.episodes, self.seed = env, episodes, seed
        self.best = None if best is None else Path(best)
        self.best_mean = -math.inf

    def __call__(self, agent: Agent, log: Log) -> None:
        """Evaluate it."""
        result = evaluate(agent, self.env, self.episodes, seed=self.seed)
        log["eval/mean_reward"] = result.mean
        log["eval/mean_ep_length"] = sum(result.lengths) / len(result.lengths)
        if result.mean > self.best_mean:
            self.best_mean = result.mean
            if self.best is not None:
                agent.save(self.best)


class StopOnReward:
    """Ends the training at a mean return.

    Args:
        threshold: the mean return at which to stop.
        key: of the log; ``"eval/mean_reward"`` for what an :class:`EvaluateBest` before this one
            found. Updates that have no such key do not stop.

    """

    def __init__(self, threshold: float, key: str = "rollout/ep_rew_mean") -> None:
        self.threshold, self.key = threshold, key

    def __call__(self, agent: Agent, log: Log) -> bool:  # noqa: ARG002 # the protocol's
        """Say whether to go on."""
        return not log.get(self.key, -math.inf) >= self.threshold
