"""Vector environments from ids, factories and objects, stepped alike in every autoreset mode."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from .pool import PoolVectorEnv
from .spaces import MASK

EnvSource: TypeAlias = (
    "str | VectorEnv | gymnasium.Env[Any, Any] | Callable[[], gymnasium.Env[Any, Any]]"
)
Vectorization: TypeAlias = Literal["auto", "sync", "async", "vector_entry_point", "envpool"]


def make_envs(env: EnvSource, n_envs: int, vectorization: Vectorization = "auto") -> VectorEnv:
    """Return a vector environment.

    Args:
        env: an environment id; a function that makes one environment; one environment, which is
            used alone, and stays open when what is returned is closed; or a vector environment,
            which is used as it is.
        n_envs: number of copies of an id's or a function's environment.
        vectorization: how copies are stepped: ``"sync"``: in turn in this process; ``"async"``: in
            one process each; ``"vector_entry_point"``: by the environment's own vectorised form;
            ``"envpool"``: by the package envpool, in threads (:class:`rl.pool.PoolVectorEnv`).
            ``"auto"`` takes the environment's own form where there is one that can be imported, and
            ``"sync"`` otherwise; never envpool, whose environments and ids are not gymnasium's.

    Raises:
        ValueError: an unknown id or vectorization, or one that the environment does not have.
        TypeError: none of the above.

    """
    if isinstance(env, VectorEnv):
        return env
    if isinstance(env, gymnasium.Env):
        return SyncVectorEnv([lambda: _Borrowed(env)], copy=False)
    if not isinstance(env, str) and not callable(env):
        raise TypeError(
            "env must be an id such as 'CartPole-v1', a function that makes an environment, an"
            f" environment, or a gymnasium VectorEnv, got {type(env).__name__}"
        )
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, got {n_envs}")
    if vectorization not in get_args(Vectorization):
        choices = ", ".join(get_args(Vectorization))
        raise ValueError(f"vectorization must be one of {choices}, got {vectorization!r}")
    if callable(env):
        return _from_factories([env] * n_envs, vectorization)
    if vectorization == "envpool":
        return PoolVectorEnv(env, n_envs)
    try:
        if vectorization in ("auto", "vector_entry_point"):
            own = _own_vectorised(env, n_envs, vectorization == "vector_entry_point")
            if own is not None:
                return own
        mode = "sync" if vectorization == "auto" else vectorization
        # what a step returns is copied into the rollout anyway
        return gymnasium.make_vec(env, n_envs, mode, vector_kwargs={"copy": False})
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot make environment {env!r}: {reason}") from error


class _Borrowed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that stays open when the vector environment around it is closed."""

    def close(self) -> None:
        """Leave that to whoever made it."""


def _own_vectorised(env_id: str, n_envs: int, required: bool) -> VectorEnv | None:
    """Return an environment's own vectorised form, or None where there is none to be had."""
    try:
        module, _, name = env_id.rpartition(":")
        if module:
            importlib.import_module(module)  # which registers the id
        if not required and gymnasium.spec(name).vector_entry_point is None:
            return None
        return gymnasium.make_vec(env_id, n_envs, "vector_entry_point")
    except ImportError:
        if required:
            raise
        return None


def _from_factories(
    factories: Sequence[Callable[[], gymnasium.Env[Any, Any]]], vectorization: Vectorization
) -> VectorEnv:
    if vectorization in ("vector_entry_point", "envpool"):
        raise ValueError(
            f"vectorization={vectorization!r} is for ids: a function makes single environments"
        )
    if vectorization == "async":
        return AsyncVectorEnv(factories, copy=False)
    envs = SyncVectorEnv(factories, copy=False)
    if len({id(env.unwrapped) for env in envs.envs}) < len(envs.envs):
        raise ValueError(
            "the function returned the same environment twice: it must make a new one each time"
        )
    return envs


def describe(envs: VectorEnv) -> str:
    """Say in words what is stepped, and how."""
    kinds = {
        SyncVectorEnv: "stepped in turn in this process",
        AsyncVectorEnv: "each in a process of its own",
        PoolVectorEnv: "by envpool",
    }
    name = env_id(envs) or "environments of your own"
    how = kinds.get(type(envs), f"by the vectorised {type(envs).__name__}")
    return f"{envs.num_envs} x {name}, {how}"


def env_id(envs: VectorEnv) -> str | None:
    """Return the id an environment was made from, or None."""
    return envs.spec.id if envs.spec is not None else None


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
