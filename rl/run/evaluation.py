"""Running a trained agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from torch import nn

from ..envs.layout import MASK
from ..envs.make import EnvSource, Vectorization, make_envs
from ..envs.pool import PoolVectorEnv
from ..envs.stepper import Stepper
from ..threads import few_threads


class Predictor(Protocol):
    """Whatever chooses actions for a batch of observations."""

    def predict(self, obs: Any, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """Return one action an observation. With masks in infos, ``action_masks`` are passed."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of whole episodes.

    Attributes:
        returns: undiscounted return of each episode.
        lengths: steps of each episode.

    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns."""
        return float(np.std(self.returns))


def evaluate(
    agent: Predictor,
    env: EnvSource,
    episodes: int = 20,
    *,
    seed: int = 0,
    deterministic: bool = True,
) -> Evaluation:
    """Run whole episodes and return what they earned.

    Each environment plays a fixed share of the episodes, so that short ones are not favoured.

    Args:
        agent: anything with ``predict(obs, deterministic=...) -> (actions, None)``.
        env: as for an agent; of an id or a function up to 32 copies run at once. The id of an
            agent that learns in envpool's environment is envpool's. An environment that is passed
            in stays open.
        episodes: number of episodes.
        seed: of the environments' first reset.
        deterministic: take the most likely action instead of drawing one.

    Raises:
        ValueError: fewer than one episode, an environment that cannot be made, or the one the
            agent trains in.

    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    training = _training_envs(agent)
    inner = {id(each.unwrapped) for each in getattr(training, "envs", ())}
    if env is training or (isinstance(env, gymnasium.Env) and id(env.unwrapped) in inner):
        raise ValueError(
            "these are the environments the agent trains in, and stepping them would spoil its next"
            " rollout: evaluate in others, for example by id"
        )
    envs = make_envs(env, min(episodes, 32), _vectorization(agent, env))
    networks = [policy] if isinstance(policy := getattr(agent, "policy", None), nn.Module) else []
    try:
        with few_threads(*networks):
            return _play(agent, envs, episodes, seed, deterministic)
    finally:
        if envs is not env:
            envs.close()


def _play(
    agent: Predictor, envs: VectorEnv, episodes: int, seed: int, deterministic: bool
) -> Evaluation:
    n, stepper = envs.num_envs, Stepper(envs)
    share = np.array([len(range(i, episodes, n)) for i in range(n)])
    returns: list[float] = []
    lengths: list[int] = []
    total, length = np.zeros(n), np.zeros(n, dtype=np.int64)
    layout = getattr(agent, "layout", None)
    masked = layout is not None and layout.info_mask is not None
    obs, infos = stepper.reset(seed)
    while share.any():
        masks = {"action_masks": infos.get(MASK)} if masked else {}
        actions, _ = agent.predict(obs, deterministic=deterministic, **masks)
        step = stepper.step(actions)
        obs, infos = step.observations, step.infos
        total += np.where(step.valid, step.rewards, 0.0)
        length += step.valid
        for i in np.flatnonzero(step.terminated | step.truncated):
            if share[i]:
                share[i] -= 1
                returns.append(float(total[i]))
                lengths.append(int(length[i]))
            total[i], length[i] = 0.0, 0
    return Evaluation(tuple(returns), tuple(lengths))


def _training_envs(agent: Predictor) -> Any:
    """Return the environments an agent trains in, without making those of one that was loaded."""
    return getattr(agent, "envs", None) if getattr(agent, "has_envs", True) else None


def _vectorization(agent: Predictor, env: EnvSource) -> Vectorization:
    """Return how copies are stepped: an id means what it means to the agent."""
    own = _training_envs(agent)
    same = isinstance(own, PoolVectorEnv) and own.spec is not None and own.spec.id == env
    return "envpool" if same else "auto"
