"""Running a trained agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from .environments import make_envs


class Predictor(Protocol):
    """Whatever chooses actions for a batch of observations."""

    def predict(self, obs: np.ndarray, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """Return one action an observation."""
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
    env: str | VectorEnv,
    episodes: int = 20,
    *,
    seed: int = 0,
    deterministic: bool = True,
) -> Evaluation:
    """Run whole episodes and return what they earned.

    Each environment plays a fixed share of the episodes, so that short ones are not favoured.

    Args:
        agent: anything with ``predict(obs, deterministic=...) -> (actions, None)``.
        env: an id, of which up to 32 copies run at once, or a vector environment.
        episodes: number of episodes.
        seed: environment ``i`` starts from ``seed + i``.
        deterministic: take the most likely action instead of drawing one.

    Raises:
        ValueError: fewer than one episode, an environment that cannot be made, or the one the
            agent trains in.

    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if env is getattr(agent, "envs", None):
        raise ValueError(
            "these are the environments the agent trains in, and stepping them would spoil its next"
            " rollout: evaluate in others, for example by id"
        )
    envs = make_envs(env, min(episodes, 32))
    n = envs.num_envs
    share = np.array([len(range(i, episodes, n)) for i in range(n)])
    returns: list[float] = []
    lengths: list[int] = []
    total, length = np.zeros(n), np.zeros(n, dtype=np.int64)
    done = np.zeros(n, dtype=np.bool_)
    obs, _ = envs.reset(seed=seed)
    while share.any():
        actions, _ = agent.predict(obs, deterministic=deterministic)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        total += np.where(done, 0.0, reward)  # the step after a done is the reset
        length += ~done
        done = terminated | truncated
        for i in np.flatnonzero(done):
            if share[i]:
                share[i] -= 1
                returns.append(float(total[i]))
                lengths.append(int(length[i]))
            total[i], length[i] = 0.0, 0
    if isinstance(env, str):
        envs.close()
    return Evaluation(tuple(returns), tuple(lengths))
