"""Vector environments from ids, functions and objects; copies are stepped here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from gymnasium.vector import VectorEnv

from ..options import check_positive, convert
from .answers import Env, PlainAnswers
from .copies import Copies, OnError
from .faults import EnvironmentFault
from .here import in_turn
from .pool import PoolVectorEnv
from .state import Replayed
from .workers import in_processes

EnvSource: TypeAlias = "str | VectorEnv | Env | Callable[[], Env]"
Vectorization: TypeAlias = Literal["auto", "sync", "async", "vector_entry_point", "envpool"]


def make_envs(
    env: EnvSource,
    n_envs: int,
    vectorization: Vectorization = "auto",
    keep: Sequence[str] = (),
    *,
    env_timeout: float | None = 60.0,
    on_env_error: OnError = "raise",
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
        env_timeout: seconds after which a copy in a process of its own is ended that gives no
            answer when it is made, reset, stepped or closed. None for no limit. Nothing can end one
            that hangs in this process.
        on_env_error: what to do where a copy raises, gives an answer that is not of its spaces or
            not finite, or, in a process of its own, dies or hangs. ``"raise"`` raises an
            :class:`EnvironmentFault`, and the next reset recreates that copy. ``"restart"``
            recreates it at once, with a warning; its episode ends as truncated where it was before.
            The fourth fault of a copy without a good step in between is raised.

    Raises:
        ValueError: there is no such environment.
        EnvironmentFault: one could not be made.

    """
    check_positive(env_timeout=env_timeout)
    on_env_error = convert("on_env_error", OnError, on_env_error)
    faults: dict[str, Any] = {"limit": env_timeout, "on_error": on_env_error}
    if isinstance(env, VectorEnv):
        return env
    if isinstance(env, gymnasium.Env):
        return in_turn([lambda: PlainAnswers(env, keep, owned=False)], **faults)
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
        return _from_id(env, n_envs, vectorization, keep, **faults)
    if vectorization in ("vector_entry_point", "envpool"):
        given = f"vectorization={vectorization!r}"
        raise ValueError(f"{given} is for ids: a function makes single environments")
    return _copies(env, n_envs, vectorization, keep, **faults)


def _from_id(
    env_id: str, n_envs: int, how: Vectorization, keep: Sequence[str], **faults: Any
) -> VectorEnv:
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
        envs = _copies(partial(gymnasium.make, spec), n_envs, how, keep, **faults)
    except (gymnasium.error.Error, ImportError, EnvironmentFault) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot make environment {env_id!r}: {reason}") from error
    envs.spec = spec
    return envs


def _copies(
    make: Callable[[], Env], n_envs: int, how: Vectorization, keep: Sequence[str], **faults: Any
) -> Copies:
    factories = [lambda: PlainAnswers(Replayed.where_needed(make()), keep)] * n_envs
    if how == "async":
        return in_processes(factories, **faults)
    envs = in_turn(factories, **faults)
    if len({id(env.unwrapped) for env in envs.envs}) < n_envs:
        raise ValueError(
            "the function returned the same environment twice: make a new one each time"
        )
    return envs


def describe(envs: VectorEnv) -> str:
    """Say in words what is stepped, and how."""
    ways = {
        "sync": "stepped in turn in this process",
        "async": "each in a process of its own",
        "envpool": "by envpool",
    }
    name = envs.spec.id if envs.spec is not None else "environments of your own"
    how = ways.get(getattr(envs, "how", ""), f"by the vectorised {type(envs).__name__}")
    return f"{envs.num_envs} x {name}, {how}"
