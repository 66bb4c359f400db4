"""What can be done after each update of :meth:`Agent.learn`.

A callback is called with the agent and the log of the update, a dict that it may add to. False ends
the training; anything else lets it go on. If there are several, all are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from numbers import Real
from pathlib import Path

import gymnasium
from gymnasium.vector import VectorEnv

from .. import checkpoint
from ..agent import Agent
from ..envs.make import EnvSource, make_envs
from ..options import check_counts
from ..reports import Callback, Log, as_callbacks, stops
from .evaluation import evaluate
from .logs import writable

_MEAN = "eval/mean_reward"


class Every:
    """Calls other callbacks once every so many environment steps, whatever the size of an update.

    >>> from rl import TRPO
    >>> report = Every(1000, lambda agent, log: print(agent.iterations))
    >>> _ = TRPO("CartPole-v1", steps_per_update=512).learn(2000, False, report)
    3
    5
    """

    def __init__(self, steps: float, callback: Callback | Iterable[Callback | None]) -> None:
        if not isinstance(steps, Real) or not steps >= 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        self.steps, self.callbacks = steps, as_callbacks(callback)
        self._agent: Agent | None = None
        self._next = 0.0

    def __call__(self, agent: Agent, log: Log) -> bool:
        """Call them if that is due."""
        done = agent.num_timesteps
        if agent is not self._agent:  # agents go on counting where they were
            self._agent, self._next = agent, done - log["time/steps"] + self.steps
        if done < self._next:
            return True
        self._next += self.steps * ((done - self._next) // self.steps + 1)  # an update may be long
        return not stops([call(agent, log) for call in self.callbacks])


class SaveCheckpoint:
    """Saves the agent as ``folder/STEPS.zip``; the folder is made."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Save it."""
        agent.save(self.folder / f"{agent.num_timesteps}.zip")


class EvaluateBest:
    """Evaluates the agent, adds ``eval/*`` to the log, and keeps the best agent so far.

    Args:
        env: the environment to evaluate in, as for :func:`evaluate`.
        best: file of the best agent; None to keep none. If it exists, as when a training is
            resumed, only a better agent replaces it: the file says what its agent reached.
        episodes, seed, max_episode_steps: as for :func:`evaluate`, the same every time.

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
        max_episode_steps: int | None = None,
    ) -> None:
        check_counts(episodes=episodes, max_episode_steps=max_episode_steps)
        pooled = isinstance(env, str) and find_spec("envpool") is not None  # whose ids are others
        if not (pooled or callable(env) or isinstance(env, gymnasium.Env | VectorEnv)):
            make_envs(env, 1).close()  # a wrong one is named now, not after the first update
        play = partial(evaluate, env=env, episodes=episodes, seed=seed)
        self._evaluate = partial(play, max_episode_steps=max_episode_steps)
        self.best = None if best is None else writable(best)
        self.best_mean = -math.inf
        if self.best is not None and self.best.exists():
            notes = checkpoint.read(self.best)["notes"]
            if _MEAN not in notes:
                what = f"{self.best} exists and does not say what its agent reached"
                raise ValueError(f"{what}: name another file, or a worse agent could replace it")
            self.best_mean = notes[_MEAN]

    def __call__(self, agent: Agent, log: Log) -> None:
        """Evaluate it."""
        result = self._evaluate(agent)
        length = sum(result.lengths) / len(result.lengths)
        log |= {_MEAN: result.mean, "eval/mean_ep_length": length, "eval/cut_off": result.cut_off}
        if result.mean > self.best_mean:
            self.best_mean = result.mean
            if self.best is not None:
                agent.save(self.best, notes={_MEAN: result.mean})


class StopOnReward:
    """Ends the training where an entry of the log, a mean return, reaches a threshold.

    The key ``"eval/mean_reward"`` is for what an :class:`EvaluateBest` before this callback found.
    Updates without the key do not stop.
    """

    def __init__(self, threshold: float, key: str = "rollout/ep_rew_mean") -> None:
        if not isinstance(threshold, Real) or math.isnan(threshold):
            raise ValueError(f"threshold must be a number, got {threshold!r}")
        self.threshold, self.key = threshold, key

    def __call__(self, agent: Agent, log: Log) -> bool:  # noqa: ARG002 # the protocol's
        """Say whether to go on."""
        return not log.get(self.key, -math.inf) >= self.threshold
