"""Vector environments from ids, factories and objects, stepped alike in every autoreset mode."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from .pool import PoolVectorEnv

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
