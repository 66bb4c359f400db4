"""Vector environments from ids, functions and objects; copies are stepped here."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from .batches import as_numpy, flags, reals
from .layout import ObservationLayout
from .masks import MASK, flat_mask
from .pool import PoolVectorEnv
from .state import Replayed, made_of

Env: TypeAlias = "gymnasium.Env[Any, Any]"
EnvSource: TypeAlias = "str | VectorEnv | Env | Callable[[], Env]"
Vectorization: TypeAlias = Literal["auto", "sync", "async", "vector_entry_point", "envpool"]
_NUMBER, _FLAG = (float, int, np.floating, np.integer), (bool, np.bool_)


def make_envs(
    env: EnvSource, n_envs: int, vectorization: Vectorization = "auto", keep: Sequence[str] = ()
) -> VectorEnv:
    """Return a vector environment; what a step returns may be overwritten by the next one.

    Args:
        env: an id; a function that makes one environment; one environment, which is
            used alone, and stays open when what is returned is closed; or a vector environment,
            which is used as it is.
        n_envs: number of copies, if ``env`` is an id or a function.
        vectorization: how copies are stepped. ``"sync"``: in turn in this process; ``"async"``:
            each in a process of its own; ``"vector_entry_point"``: by the environment's own
            vectorised form; ``"envpool"``: by the threads of envpool, whose environments and ids
            are its own. ``"auto"`` takes the vectorised form if there is one that can be imported,
            and ``"sync"`` otherwise.
        keep: keys of numbers to keep in the infos of copies, besides the action mask.

    """
    if isinstance(env, VectorEnv):
        return env
    if isinstance(env, gymnasium.Env):
        return SyncVectorEnv([lambda: PlainAnswers(env, keep, owned=False)], copy=False)
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
    if isinstance(env, str):
        return _from_id(env, n_envs, vectorization, keep)
    if vectorization in ("vector_entry_point", "envpool"):
        given = f"vectorization={vectorization!r}"
        raise ValueError(f"{given} is for ids: a function makes single environments")
    return _copies(env, n_envs, vectorization, keep)


def _from_id(env_id: str, n_envs: int, how: Vectorization, keep: Sequence[str]) -> VectorEnv:
    try:
        if how == "envpool":
            return PoolVectorEnv(env_id, n_envs)
        module, _, name = env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        namespace, stem, version = parse_env_id(name)
        if version is None:  # gymnasium.make takes the latest, and gymnasium.spec none
            name = get_env_id(namespace, stem, find_highest_version(namespace, stem))
        spec = gymnasium.spec(name)
        if how == "vector_entry_point" or (how == "auto" and spec.vector_entry_point is not None):
            try:
                return gymnasium.make_vec(spec, n_envs, "vector_entry_point")
            except ImportError:  # it needs a package that is not installed
                if how != "auto":
                    raise
        envs = _copies(partial(gymnasium.make, spec), n_envs, how, keep)
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot make environment {env_id!r}: {reason}") from error
    envs.spec = spec
    return envs


def _copies(make: Callable[[], Env], n_envs: int, how: str, keep: Sequence[str]) -> VectorEnv:
    parent, processes = os.getpid(), how == "async"

    def copy() -> Env:
        if os.getpid() != parent:
            # Ctrl-C reaches all processes, and it is for the parent to act on it. This is not
            # SIG_IGN, which a simulator that the environment starts would inherit.
            signal.signal(signal.SIGINT, lambda *_: None)
        env = PlainAnswers(Replayed.where_needed(make()), keep)
        if processes:
            ObservationLayout(env.observation_space)  # refuses what they could not share
        return env

    if processes:
        return Processes([copy] * n_envs)
    envs = SyncVectorEnv([copy] * n_envs, copy=False)
    if len({id(env.unwrapped) for env in envs.envs}) < n_envs:
        raise ValueError(
            "the function returned the same environment twice: make a new one each time"
        )
    return envs


class PlainAnswers(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose answers can be merged with those of its copies.

    Rewards become numbers and dones truth values, whether they come as arrays, tensors or lists of
    one entry. Infos keep the action mask and the numbers under ``keep``: gymnasium cannot merge
    infos whose kind or shape varies. An environment that is not ``owned`` stays open.
    """

    def __init__(self, env: Env, keep: Sequence[str] = (), *, owned: bool = True) -> None:
        super().__init__(env)
        self._keep, self._owned = keep, owned
        self.made = made_of(env)
        counted = isinstance(env.action_space, spaces.Discrete | spaces.MultiDiscrete)
        self._choices = spaces.flatdim(env.action_space) if counted else None  # entries of a mask

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start a new episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return as_numpy(observation), self._kept(info)

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environment; a ValueError names an answer that is not of its kind."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not isinstance(reward, _NUMBER):
            reward = float(reals("reward", reward, ()))
        if not isinstance(terminated, _FLAG):
            terminated = bool(flags("terminated", terminated, ()))
        if not isinstance(truncated, _FLAG):
            truncated = bool(flags("truncated", truncated, ()))
        return as_numpy(observation), reward, terminated, truncated, self._kept(info)

    def _kept(self, info: dict[str, Any]) -> dict[str, Any]:
        if not self._keep and MASK not in info:
            return {}
        kept = {k: float(reals(f"infos[{k!r}]", info[k], ())) for k in self._keep if k in info}
        mask = info.get(MASK)
        return kept if mask is None else kept | {MASK: flat_mask(mask, self._choices)}

    def close(self) -> None:
        """Close the environment, unless somebody else will."""
        if self._owned:
            super().close()


class Processes(AsyncVectorEnv):
    """Copies in processes of their own, which can be used again after an interrupt or an error.

    Where that left answers unread, closing ends the processes at once, and a reset starts new ones.
    """

    def __init__(self, env_fns: Sequence[Callable[[], Env]]) -> None:
        super().__init__(env_fns, copy=False, worker=_work)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """End the processes, at once where they still owe an answer."""
        if self._state is not AsyncState.DEFAULT:
            terminate, self._state = True, AsyncState.DEFAULT
        super().close_extras(timeout, terminate)

    def reset_async(self, seed: Any = None, options: Any = None) -> None:
        """Have all processes start a new episode."""
        lost = None in self.parent_pipes  # gymnasium drops a process whose environment raised
        if not self.closed and (lost or self._state is not AsyncState.DEFAULT):
            self.close_extras(terminate=True)
            self.__init__(self.env_fns)
        super().reset_async(seed, options)


def _work(*arguments: Any) -> None:
    with suppress(BrokenPipeError):  # the parent was killed, and gymnasium's worker reports to it
        _async_worker(*arguments)


def describe(envs: VectorEnv) -> str:
    """Say in words what is stepped, and how."""
    ways = {
        SyncVectorEnv: "stepped in turn in this process",
        Processes: "each in a process of its own",
        PoolVectorEnv: "by envpool",
    }
    name = envs.spec.id if envs.spec is not None else "environments of your own"
    how = ways.get(type(envs), f"by the vectorised {type(envs).__name__}")
    return f"{envs.num_envs} x {name}, {how}"
