"""Vector environments from ids, functions and objects."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from .copies import PlainAnswers, make_copies
from .pool import PoolVectorEnv

EnvSource: TypeAlias = (
    "str | VectorEnv | gymnasium.Env[Any, Any] | Callable[[], gymnasium.Env[Any, Any]]"
)
Vectorization: TypeAlias = Literal["auto", "sync", "async", "vector_entry_point", "envpool"]


def make_envs(
    env: EnvSource, n_envs: int, vectorization: Vectorization = "auto", keep: Sequence[str] = ()
) -> VectorEnv:
    """Return a vector environment.

    Args:
        env: an environment id; a function that makes one environment; one environment, which is
            used alone, and stays open when what is returned is closed; or a vector environment,
            which is used as it is.
        n_envs: number of copies, if ``env`` is an id or a function.
        vectorization: how copies are stepped. ``"sync"``: in turn in this process; ``"async"``:
            each in a process of its own; ``"vector_entry_point"``: by the environment's own
            vectorised form; ``"envpool"``: by the package envpool, in threads (see
            :class:`rl.envs.pool.PoolVectorEnv`). ``"auto"`` takes the environment's own vectorised
            form if it has one that can be imported, and ``"sync"`` otherwise. It never takes
            envpool, whose environments and ids are not gymnasium's.
        keep: keys of numbers to keep in the infos of environments that are copied here. Of these
            infos only the action mask is kept otherwise.

    Raises:
        ValueError: an unknown id or vectorization, or one that the environment does not have.
        TypeError: ``env`` is none of the above.

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
        raise ValueError(
            f"vectorization={vectorization!r} is for ids: a function makes single environments"
        )
    return make_copies(env, n_envs, keep, processes=vectorization == "async")


def _from_id(
    env_id: str, n_envs: int, vectorization: Vectorization, keep: Sequence[str]
) -> VectorEnv:
    if vectorization == "envpool":
        return PoolVectorEnv(env_id, n_envs)
    try:
        spec = _find(env_id)
        if vectorization == "vector_entry_point" or (
            vectorization == "auto" and spec.vector_entry_point is not None
        ):
            try:
                return gymnasium.make_vec(spec, n_envs, "vector_entry_point")
            except ImportError:  # it needs a package that is not installed
                if vectorization != "auto":
                    raise
        make = partial(gymnasium.make, spec)
        envs = make_copies(make, n_envs, keep, processes=vectorization == "async")
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot make environment {env_id!r}: {reason}") from error
    envs.spec = spec
    return envs


def _find(env_id: str) -> EnvSpec:
    """Return what is registered under an id, by the module that it names if it names one."""
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gymnasium.spec(name)


def describe(envs: VectorEnv) -> str:
    """Say in words what is stepped, and how."""
    ways = {
        SyncVectorEnv: "stepped in turn in this process",
        AsyncVectorEnv: "each in a process of its own",
        PoolVectorEnv: "by envpool",
    }
    name = env_id(envs) or "environments of your own"
    other = f"by the vectorised {type(envs).__name__}"
    how = next((how for kind, how in ways.items() if isinstance(envs, kind)), other)
    return f"{envs.num_envs} x {name}, {how}"


def env_id(envs: VectorEnv) -> str | None:
    """Return the id an environment was made from, or None."""
    return envs.spec.id if envs.spec is not None else None
