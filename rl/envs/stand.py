"""One copy of an environment, and its row in a batch of observations."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
from gymnasium import Space

from .answers import Env
from .batches import leaves, numbers


class Spaces(NamedTuple):
    """What an environment says of itself."""

    observations: Space[Any]
    actions: Space[Any]
    metadata: dict[str, Any]
    render_mode: str | None


class Stand:
    """A copy of an environment; the commands that it may be given are its methods.

    Args:
        factory: makes the environment.

    """

    env: Env
    _open = False
    _write: Callable[[Any], None]

    def __init__(self, factory: Callable[[], Env]) -> None:
        self._factory = factory

    def make(self) -> Spaces:
        """Make the environment."""
        env = self.env = self._factory()
        self._open = True
        return Spaces(env.observation_space, env.action_space, env.metadata, env.render_mode)

    def put(self, space: Space[Any], batch: Any, index: int) -> None:
        """Have observations written to row ``index`` of a batch."""
        parts = [(path, reduce(getitem, path, batch)) for path, _ in leaves(space)]

        def write(observation: Any) -> None:
            fitting = [_fitting(observation, path, array) for path, array in parts]
            for (_, array), value in zip(parts, fitting, strict=True):
                array[index] = value

        def write_one(observation: Any) -> None:
            fits = type(observation) is np.ndarray and observation.dtype is dtype
            if not (fits and observation.shape == shape):  # nearly never
                observation = _fitting(observation, (), array)
            array[index] = observation

        array = parts[0][1]
        dtype, shape = array.dtype, array.shape[1:]
        self._write = write_one if parts[0][0] == () else write

    def reset(self, seed: int | None, options: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        """Start an episode; return a reward of 0, that nothing ended, and the infos."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._write(observation)
        return 0.0, False, False, info

    def step(self, action: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Step the environment; return the reward, whether the episode ended, and the infos."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._write(observation)
        return reward, terminated, truncated, info

    def call(self, name: str, args: Any, kwargs: Any) -> Any:
        """Return an attribute, or what it returns if it is a method."""
        attribute = self.env.get_wrapper_attr(name)
        return attribute(*args, **kwargs) if callable(attribute) else attribute

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns for the environment."""
        return function(self.env, *arguments)

    def close(self) -> None:
        """Close the environment, if it is open."""
        if self._open:
            self._open = False
            self.env.close()


def _fitting(observation: Any, path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
    """Return a part of an observation as a row of an array; a ValueError if it is none."""
    try:
        value = reduce(getitem, path, observation) if path else observation
    except (LookupError, TypeError):
        raise ValueError(f"{_name(path)} is missing from {observation!r:.200}") from None
    if type(value) is not np.ndarray or value.dtype != array.dtype:
        value = _cast(value, path, array)
    if value.shape != array.shape[1:]:
        expected = f"must have shape {array.shape[1:]}, as its space says"
        raise ValueError(f"{_name(path)} {expected}, got {value.shape}")
    return value


def _cast(value: Any, path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
    given = numbers(value)
    if given is None:
        expected = f"must be numbers of shape {array.shape[1:]}"
        raise ValueError(f"{_name(path)} {expected}, got {value!r:.200}")
    with np.errstate(invalid="ignore", over="ignore"):  # both are seen in what comes out
        cast = given.astype(array.dtype)
    if array.dtype.kind != "f" and not np.array_equal(cast, given):
        expected = f"must be of type {array.dtype}, as its space says"
        raise ValueError(f"{_name(path)} {expected}, got {given.dtype}: {value!r:.200}")
    return cast


def _name(path: tuple[Any, ...]) -> str:
    return "observation" + "".join(f"[{key!r}]" for key in path)
