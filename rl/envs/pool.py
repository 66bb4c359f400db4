"""Environments of the package envpool, which steps them in its own threads."""

from __future__ import annotations

import difflib
import importlib
import os
import warnings
from functools import partial
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

_SEEDS = 2**31  # envpool keeps a seed in a signed integer of 32 bits


class PoolVectorEnv(VectorEnv):
    """Copies of one of envpool's environments.

    One whose id gymnasium has too may differ from it in physics, in precision and in the numbers
    drawn from a seed. An episode that terminates at the very step of its time limit is reported as
    truncated only. ``threads`` step the copies; None stands for one per core, at most ``n_envs``.
    A ValueError says what is missing.
    """

    how = "envpool"

    def __init__(self, env_id: str, n_envs: int, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._pool: Any = None  # made by the first reset
        envpool = _package(env_id)
        # gymnasium warns, here and in reset, that it rounds envpool's bounds to fewer digits
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            spec = envpool.make_spec(env_id)
            single = spec.gymnasium_observation_space, spec.gymnasium_action_space
        if spec.config.max_num_players > 1:
            raise ValueError(f"cannot make environment {env_id!r}: it has several players")
        cores = len(getattr(os, "sched_getaffinity", range)(0))  # other systems have no envpool
        self.num_envs, self.threads = n_envs, threads or min(n_envs, cores)
        counts = {"num_envs": n_envs, "num_threads": self.threads}
        self._make = partial(envpool.make, env_id, env_type="gymnasium", **counts)
        self.spec, self.metadata = EnvSpec(env_id), {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space, self.single_action_space = map(_with_true_bounds, single)
        self.observation_space = batch_space(self.single_observation_space, n_envs)
        self.action_space = batch_space(self.single_action_space, n_envs)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere, with environment ``i`` from ``seed + i``; no options."""
        if options:
            raise ValueError(f"environments by envpool have no options of reset, got {options}")
        super().reset(seed=seed)
        if seed is not None or self._pool is None:  # envpool takes one only when it makes them
            start = int(self.np_random.integers(_SEEDS)) if seed is None else seed
            self._pool = None  # never twice the threads
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                pool = self._make(seed=start % (_SEEDS - self.num_envs))
                _ = pool.observation_space, pool.action_space  # made here and kept
            self._pool = pool
        return self._pool.reset()

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every environment once; all arrays are new ones."""
        return self._pool.step(actions)

    def close_extras(self, **kwargs: Any) -> None:  # noqa: ARG002 # the base class's
        """End the threads."""
        self._pool = None


def _package(env_id: str) -> Any:
    """Return the package, if it is there and has an id."""
    try:
        envpool = importlib.import_module("envpool")
    except ImportError as error:
        raise ValueError(
            "vectorization='envpool' needs the package envpool, which exists for Linux:"
            " pip install 'torch-trustregion[envpool]'"
        ) from error
    known = envpool.list_all_envs()
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, 4)
        hint = f"the nearest are {', '.join(near)}" if near else "see envpool.list_all_envs()"
        raise ValueError(f"cannot make environment {env_id!r}: envpool has no such id, {hint}")
    return envpool


def _with_true_bounds(space: Space[Any]) -> Space[Any]:
    """Return a space whose boxes are unbounded where envpool means them to be.

    It writes the smallest positive number as the lower bound there: no action would be negative.
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _with_true_bounds(inner) for key, inner in space.items()})
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return space
    limits = np.finfo(space.dtype)
    unbounded = (space.low == limits.tiny) & (space.high == limits.max)
    low, high = np.where(unbounded, -np.inf, space.low), np.where(unbounded, np.inf, space.high)
    return spaces.Box(low, high, dtype=space.dtype.type)
