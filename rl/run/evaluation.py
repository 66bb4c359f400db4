"""Running a trained agent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch import nn

from ..envs.layout import MASK
from ..envs.make import EnvSource, Vectorization, make_envs
from ..envs.pool import PoolVectorEnv
from ..envs.stepper import Stepper, Transition, play
from ..options import check_counts
from ..threads import few_threads
from .logs import number

_COPIES = 8  # for a predictor that does not say how many environments it was trained in
_STEPS = 10_000  # after which an episode is cut off


class Predictor(Protocol):
    """Anything that chooses actions for a batch of observations, as stable-baselines3's models do.

    ``state`` and ``episode_start`` are passed, too, where ``predict`` has both parameters.
    """

    def predict(self, obs: Any, deterministic: bool = False) -> tuple[Any, Any]:
        """Return one action per observation, and the recurrent state or None."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of episodes, and how many were cut off before their end.

    >>> print(Evaluation(returns=(9.0, 10.0), lengths=(9, 10)))
    mean return 9.500 (standard deviation 0.5000) over 2 episodes
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    cut_off: int = 0

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns."""
        return float(np.std(self.returns))

    def __str__(self) -> str:
        n = len(self.returns)
        words = f"mean return {number(self.mean)} (standard deviation {number(self.std)})"
        words += f" over {n} episode{'s' * (n > 1)}"
        if self.cut_off:
            words += f", {self.cut_off} of them cut off after {max(self.lengths):,} steps"
        return words


def evaluate(
    agent: Predictor,
    env: EnvSource,
    episodes: int = 20,
    *,
    seed: int = 0,
    deterministic: bool = True,
    max_episode_steps: int | None = None,
) -> Evaluation:
    """Run episodes, a fixed share in each copy so that short ones are not favoured.

    Args:
        agent: anything with ``predict(obs, deterministic=...) -> (actions, state)``.
        env: an environment, as for an agent. Given an id or a function, as many copies are made as
            the agent was trained in, at most ``episodes``, and stepped in the same way: envpool,
            for example, steps those of the id of the training. An environment object stays open; it
            cannot be the one that the agent is trained in.
        episodes: number of episodes.
        seed: seed of the first reset.
        deterministic: take the most likely action instead of drawing one.
        max_episode_steps: steps after which an episode is cut off; by default 10,000, or the time
            limit of the environment where that is longer. A copy whose episode was cut off begins
            no other one unless that one ends, so there may be fewer than ``episodes``.

    """
    check_counts(episodes=episodes, max_episode_steps=max_episode_steps)
    training = getattr(agent, "envs", None) if getattr(agent, "has_envs", True) else None
    own = [training, *getattr(training, "envs", ())]
    if id(getattr(env, "unwrapped", env)) in {id(getattr(e, "unwrapped", None)) for e in own}:
        raise ValueError(
            "these are the environments the agent trains in, and stepping them would spoil its next"
            " path: evaluate in others, for example by id"
        )
    copies, how = _as_in_training(agent, training, env)
    config = getattr(agent, "config", None)
    faults = {k: getattr(config, k) for k in ("env_timeout", "on_env_error") if hasattr(config, k)}
    envs = make_envs(env, min(episodes, copies), how, **faults)
    networks = [policy] if isinstance(policy := getattr(agent, "policy", None), nn.Module) else []
    specs = [getattr(each, "spec", None) for each in (envs, *getattr(envs, "envs", ()))]
    limit = max_episode_steps or max([_STEPS, *(s.max_episode_steps or 0 for s in specs if s)])
    try:
        with few_threads(*networks):
            return _play(agent, Stepper(envs), episodes, seed, deterministic, limit)
    finally:
        if envs is not env:
            envs.close()


def _as_in_training(agent: Predictor, training: Any, env: EnvSource) -> tuple[int, Vectorization]:
    """Return how many copies to make, and how to step them where that can be done here."""
    config = getattr(agent, "config", agent)  # stable-baselines3's models have n_envs, too
    how: Vectorization = getattr(config, "vectorization", "auto")
    ids = [getattr(agent, "env_id", None)]
    how = "async" if isinstance(training, AsyncVectorEnv) else getattr(training, "how", how)
    if isinstance(training, PoolVectorEnv) and training.spec is not None:
        how, ids = "envpool", [*ids, training.spec.id]
    kept = how in ("sync", "async") or (isinstance(env, str) and env in ids)
    return getattr(config, "n_envs", None) or _COPIES, how if kept else "auto"


def _play(
    agent: Predictor, stepper: Stepper, episodes: int, seed: int, deterministic: bool, limit: int
) -> Evaluation:
    n = stepper.envs.num_envs
    left = np.array([len(range(i, episodes, n)) for i in range(n)])
    total, length = np.zeros(n), np.zeros(n, np.int64)
    stuck = np.zeros(n, np.bool_)  # in an episode that was cut off and goes on
    played: list[tuple[float, int, bool]] = []
    for step in transitions(agent, stepper, seed, deterministic):
        total += np.where(step.valid, step.rewards, 0.0)
        length += step.valid
        done = step.terminated | step.truncated
        cut = ~done & (length == limit)
        over = done | cut
        if over.any():
            counts = over & ~stuck & (left > 0)
            columns = (x[counts].tolist() for x in (total, length, cut))
            played += zip(*columns, strict=True)
            left -= counts
            stuck[over], total[over], length[over] = cut[over], 0.0, 0
            if (stuck | (left == 0)).all():
                break
    returns, lengths, cuts = zip(*played, strict=True)
    return Evaluation(returns, lengths, sum(cuts))


def transitions(
    agent: Predictor,
    stepper: Stepper,
    seed: int | None,
    deterministic: bool,
    before: Callable[[], object] = lambda: None,
) -> Iterator[Transition]:
    """Let a predictor play for as long as the caller goes on; ``before`` is called before it acts.

    A recurrent predictor gets its state back, and is told where episodes start.
    """
    layout, parameters = getattr(agent, "layout", None), inspect.signature(agent.predict).parameters
    masked = layout is not None and layout.info_mask is not None
    recurrent = {"state", "episode_start"} <= parameters.keys()
    state, starts = None, np.ones(stepper.envs.num_envs, np.bool_)

    def choose(observations: Any, infos: dict[str, Any]) -> Any:
        nonlocal state
        before()
        options: dict[str, Any] = {"action_masks": infos.get(MASK)} if masked else {}
        if recurrent:
            options |= {"state": state, "episode_start": starts}
        actions, state = agent.predict(observations, deterministic=deterministic, **options)
        return actions

    for step in play(stepper, seed, choose):
        next_step = stepper.mode is AutoresetMode.NEXT_STEP
        starts = ~step.valid if next_step else step.terminated | step.truncated
        yield step
