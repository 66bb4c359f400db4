"""Vector environments from ids, and the spaces this package handles."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv


def make_envs(env: str | VectorEnv, n_envs: int) -> VectorEnv:
    """Return a vector environment with next-step autoreset.

    Args:
        env: an environment id, of which ``n_envs`` copies are stepped in turn in this process, or
            a vector environment, which is used as it is.
        n_envs: number of copies.

    Raises:
        ValueError: an unknown id, an unsupported space, or another autoreset mode.
        TypeError: neither an id nor a vector environment.

    """
    if isinstance(env, str):
        if n_envs < 1:
            raise ValueError(f"n_envs must be at least 1, got {n_envs}")
        try:
            envs = gymnasium.make_vec(env, num_envs=n_envs, vectorization_mode="sync")
        except (gymnasium.error.Error, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot make environment {env!r}: {reason}") from error
    elif isinstance(env, VectorEnv):
        envs = env
    else:
        raise TypeError(
            f"env must be an id such as 'CartPole-v1' or a gymnasium VectorEnv, got"
            f" {type(env).__name__}: wrap a single environment as"
            " gymnasium.vector.SyncVectorEnv([lambda: env])"
        )
    try:
        _check(envs)
    except ValueError:
        if isinstance(env, str):
            envs.close()
        raise
    return envs


def _check(envs: VectorEnv) -> None:
    mode = envs.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"the vector environment has autoreset_mode {mode}: rollouts need"
            " AutoresetMode.NEXT_STEP, gymnasium's default"
        )
    observation, action = envs.single_observation_space, envs.single_action_space
    for name, space in (("observation", observation), ("action", action)):
        if isinstance(space, Box) and 0 in space.shape:
            raise ValueError(f"unsupported {name} space {space}: it has no entries")
    if not (isinstance(observation, Box) and np.issubdtype(observation.dtype, np.number)):
        raise ValueError(
            f"unsupported observation space {observation}: Box is supported. Wrap the environment,"
            " for example with gymnasium.wrappers.FlattenObservation"
        )
    if not (
        isinstance(action, Discrete)
        or (isinstance(action, Box) and np.issubdtype(action.dtype, np.floating))
    ):
        raise ValueError(
            f"unsupported action space {action}: Discrete and real-valued Box are supported"
        )


def observation_dim(envs: VectorEnv) -> int:
    """Return the number of entries of one observation."""
    shape = envs.single_observation_space.shape
    assert shape is not None  # a Box has one
    return int(np.prod(shape))


def env_id(envs: VectorEnv) -> str | None:
    """Return the id an environment was made from, or None."""
    return envs.spec.id if envs.spec is not None else None
