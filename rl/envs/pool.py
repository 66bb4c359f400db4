"""Environments of the package envpool, which steps them in its own threads."""

from __future__ import annotations

import difflib
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

_SEEDS = 2**31  # envpool keeps a seed in a signed integer of 32 bits


class PoolVectorEnv(VectorEnv):
    """Copies of one of envpool's environments.

    These are envpool's own environments. One whose id gymnasium has too may differ from it in
    physics, in precision and in the numbers drawn from a seed. An episode that terminates at the
    very step of its time limit is reported as truncated only.

    Args:
        env_id: one of ``envpool.list_all_envs()``.
        n_envs: number of copies.
        threads: number of threads that step them; None for the number of cores that this process
            may use, at most ``n_envs``.

    Raises:
        ValueError: envpool is not installed or does not have the id, the environment has several
            players, or there is not at least one thread.

    """

    def __init__(self, env_id: str, n_envs: int, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._envpool = _package()
        _check_id(self._envpool, env_id)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.spec = EnvSpec(env_id)
        self.num_envs, self.threads = n_envs, threads or min(n_envs, _available_cores())
        self._pool: Any = None  # made by the first reset
        with _quiet():
            try:
                spec = self._envpool.make_spec(env_id)
                single = spec.gymnasium_observation_space, spec.gymnasium_action_space
            except ImportError as error:  # of a library that only some tasks need
                reason = " ".join(str(error).split())
                raise ValueError(f"cannot make environment {env_id!r}: {reason}") from error
        if spec.config.max_num_players > 1:
            raise ValueError(f"cannot make environment {env_id!r}: it has several players")
        self.single_observation_space, self.single_action_space = map(_with_true_bounds, single)
        self.observation_space = batch_space(self.single_observation_space, n_envs)
        self.action_space = batch_space(self.single_action_space, n_envs)

    def _make_pool(self, seed: int) -> Any:
        assert self.spec is not None  # set by the constructor
        self._pool = None  # never twice the threads
        with _quiet():
            pool = self._envpool.make(
                self.spec.id,
                env_type="gymnasium",
                num_envs=self.num_envs,
                num_threads=self.threads,
                seed=seed % (_SEEDS - self.num_envs),
            )
            _ = pool.observation_space, pool.action_space  # made here and kept
        return pool

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes everywhere.

        Args:
            seed: environment ``i`` starts from ``seed + i``; None to continue its random numbers.
            options: must be empty.

        Raises:
            ValueError: options were given.

        """
        if options:
            raise ValueError(f"environments by envpool have no options of reset, got {options}")
        super().reset(seed=seed)
        if seed is not None:  # envpool takes a seed only when it makes environments
            self._pool = self._make_pool(seed)
        elif self._pool is None:
            self._pool = self._make_pool(int(self.np_random.integers(_SEEDS)))
        return self._pool.reset()

    def step(
        self, actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment once; all arrays are new ones."""
        return self._pool.step(actions)

    def close_extras(self, **kwargs: Any) -> None:  # noqa: ARG002 # the base class's
        """End the threads."""
        self._pool = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence gymnasium's warning that it rounds envpool's bounds, which have more digits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting")
        yield


def _package() -> ModuleType:
    try:
        return importlib.import_module("envpool")
    except ImportError as error:
        raise ValueError(
            "vectorization='envpool' needs the package envpool, which exists for Linux:"
            " pip install 'torch-trustregion[envpool]'"
        ) from error


def _check_id(envpool: ModuleType, env_id: str) -> None:
    known = envpool.list_all_envs()
    if env_id in known:
        return
    near = difflib.get_close_matches(env_id, known, 4)
    hint = f"the nearest are {', '.join(near)}" if near else "see envpool.list_all_envs()"
    raise ValueError(f"cannot make environment {env_id!r}: envpool has no such id, {hint}")


def _available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _with_true_bounds(space: Space[Any]) -> Space[Any]:
    """Return a space whose boxes are unbounded where envpool means them to be.

    It writes the smallest positive and the largest number there. Clipped to these, no action would
    ever be negative.
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _with_true_bounds(inner) for key, inner in space.items()})
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return space
    limits = np.finfo(space.dtype)
    unbounded = (space.low == limits.tiny) & (space.high == limits.max)
    low, high = np.where(unbounded, -np.inf, space.low), np.where(unbounded, np.inf, space.high)
    kind: Any = space.dtype.type
    return spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)
