"""What can be done after each update of :meth:`Agent.learn`.

A callback is called with the agent and the log of the update, a dict that it may add to. False ends
the training; anything else lets it go on. If there are several, all are called. One that has a
``state_dict`` and a ``load_state_dict`` goes on where it was when a run is resumed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.vector import VectorEnv

from .. import checkpoint
from ..agent import Agent
from ..envs.make import EnvSource, make_envs
from ..envs.snapshot import snapshot
from ..files import replace_file
from ..options import check_counts
from ..reports import Callback, Log, as_callbacks, give_state, state_of, stops
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
        self._next: float | None = None

    def __call__(self, agent: Agent, log: Log) -> bool:
        """Call them if that is due."""
        done = agent.num_timesteps
        if agent is not self._agent or self._next is None:
            resumed = self._agent is None and self._next is not None
            first = done - log["time/steps"]  # agents go on counting where they were
            self._agent, self._next = agent, self._next if resumed else first + self.steps
        assert self._next is not None
        if done < self._next:
            return True
        self._next += self.steps * ((done - self._next) // self.steps + 1)  # an update may be long
        return not stops([call(agent, log) for call in self.callbacks])

    def state_dict(self) -> dict[str, Any]:
        """Return when the next call is due, and the states of the callbacks."""
        return {"next": self._next, "callbacks": [state_of(call) for call in self.callbacks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        self._agent, self._next = None, state["next"]
        for call, its in zip(self.callbacks, state["callbacks"], strict=False):
            give_state(call, its)


class SaveCheckpoint:
    """Saves the agent as ``folder/STEPS.zip``; the folder is made.

    A file holds the run as it is at this call: as the last of the loggers, also what the callbacks
    and the loggers before it did.

    Args:
        folder: where.
        keep: how many of its files to keep, the last ones; None for all.

    """

    def __init__(self, folder: str | Path, keep: int | None = None) -> None:
        check_counts(keep=keep)
        self.folder, self.keep = Path(folder), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._names: list[str] = []

    def __call__(self, agent: Agent, log: Log) -> None:  # noqa: ARG002 # the protocol's
        """Save it."""
        name, before = f"{agent.num_timesteps}.zip", self._names
        self._names = [*(n for n in before if n != name), name]  # the file holds its own name
        try:
            agent.save(self.folder / name)
        except BaseException:
            self._names = before
            raise
        while self.keep is not None and len(self._names) > self.keep:
            (self.folder / self._names.pop(0)).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, list[str]]:
        """Return the names of the files that are kept."""
        return {"names": list(self._names)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Go on where another one was."""
        self._names = list(state["names"])


class KeepCheckpoint:
    """Saves the agent to one file every so many seconds, and keeps the file before it.

    Where the state of the environments is hidden, a checkpoint starts new episodes. It is then due
    after each twentieth of the training, so that the clock does not decide what is learnt. On a
    full disk or the like the training goes on, with a warning, and the last file stays.

    Args:
        path: the file, of suffix ``.zip``.
        before: the file before it.
        seconds: between two files.

    """

    def __init__(self, path: Path, before: Path, seconds: float) -> None:
        self.path, self.before, self.seconds = path, before, seconds
        self._last = time.monotonic()
        self._hidden: bool | None = None
        self._part = 0  # of twenty
        self._saved: int | None = None  # after how many steps

    def __call__(self, agent: Agent, log: Log) -> None:
        """Save it if that is due."""
        if self._hidden is None:
            self._hidden = snapshot(agent.envs) is None
        part, now = math.floor(20 * log["time/progress"]), time.monotonic()
        due = part > self._part if self._hidden else now >= self._last + self.seconds
        self._part = part
        if due:
            self._last = now
            try:
                self.save(agent)
            except (OSError, TypeError, ValueError) as error:
                what = f"no checkpoint was written, the training goes on: {error}"
                warnings.warn(what, stacklevel=2)

    def save(self, agent: Agent) -> None:
        """Save it now, if it has learnt something since the last time."""
        if agent.num_timesteps == self._saved:
            return
        if self.path.exists():
            old = self.path.read_bytes()
            replace_file(self.before, lambda file: file.write(old))
        agent.save(self.path)
        self._saved = agent.num_timesteps

    def state_dict(self) -> dict[str, int]:
        """Return which twentieth was saved."""
        return {"part": self._part}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another one was."""
        self._part = state["part"]


class SaveBest:
    """Keeps the agent with the highest value of an entry of the log so far in one file.

    Args:
        path: the file. If it exists, as when a training is resumed, only a better agent replaces
            it: the file says what its agent reached.
        key: the entry; by default the mean return of the last hundred episodes of training.

    Attributes:
        best: the highest value so far.

    """

    def __init__(self, path: str | Path, key: str = "rollout/ep_rew_mean") -> None:
        self.path, self.key, self.best = writable(path), key, -math.inf
        if self.path.exists():
            notes = checkpoint.read(self.path)["notes"]
            if key not in notes:
                what = f"{self.path} exists and does not say what its agent reached"
                raise ValueError(f"{what}: name another file, or a worse agent could replace it")
            self.best = notes[key]

    def __call__(self, agent: Agent, log: Log) -> None:
        """Save it if it is the best so far."""
        value = log.get(self.key, math.nan)
        if value > self.best:
            self.best = value
            agent.save(self.path, notes={self.key: value}, run=False)


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
        self._save = None if best is None else SaveBest(best, _MEAN)
        self.best_mean = -math.inf if self._save is None else self._save.best

    def __call__(self, agent: Agent, log: Log) -> None:
        """Evaluate it."""
        result = self._evaluate(agent)
        length = sum(result.lengths) / len(result.lengths)
        log |= {_MEAN: result.mean, "eval/mean_ep_length": length, "eval/cut_off": result.cut_off}
        self.best_mean = max(self.best_mean, result.mean)
        if self._save is not None:
            self._save(agent, log)


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
