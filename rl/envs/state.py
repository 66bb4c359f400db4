"""The state of environments, so that a run that is resumed goes on where it stopped.

An environment is a stack of wrappers. Where every attribute of every layer is plain (a number, a
string, an array, a generator, or a container of them), their values are the state; MuJoCo's data
are arrays too. A lunar lander's world cannot be read: it is made again by repeating the episode.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

Env: TypeAlias = "gymnasium.Env[Any, Any]"
# what the constructor makes, and nothing changes
_FIXED = {"metadata", "spec", "_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs", "_cached_spec"}
_FIXED_KINDS = {"MjModel", "MujocoRenderer"}
_KEEP_NOTHING = (TimeLimit, OrderEnforcing, PassiveEnvChecker)  # beyond an episode


class HiddenStateError(TypeError):
    """An environment keeps something that cannot be read."""


def state_of(env: Env) -> dict[str, Any]:
    """Return the state of one environment.

    Raises:
        HiddenStateError: part of it cannot be read.

    """
    layers = list(_layers(env))
    for layer in layers:
        if isinstance(layer, Replayed):
            return layer.episode()
    held: list[Any] = []
    return {"layers": [values_of(layer, held) for layer in layers]}


def give(env: Env, state: Mapping[str, Any]) -> None:
    """Give one environment the state of another like it.

    Raises:
        ValueError: the state is that of another environment.

    """
    layers = list(_layers(env))
    if "actions" in state:
        (replayed,) = (layer for layer in layers if isinstance(layer, Replayed))
        replayed.replay(state)
    else:
        for layer, values in zip(layers, state["layers"], strict=True):
            assign(layer, values)
        _pass_checks(env)


class Replayed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A lunar lander, which remembers the actions of its episode and can repeat them.

    A reset makes a new world, so that only the random numbers are left of the episode before. The
    other environments of Box2D go on with the old one.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self._episode: dict[str, Any] = {}
        self._actions: list[Any] = []
        self._seen: Any = None

    @staticmethod
    def where_needed(env: Env) -> Env:
        """Return the environment, wrapped if it is a lunar lander without wrappers of its own."""
        hidden = type(env.unwrapped).__module__ == "gymnasium.envs.box2d.lunar_lander"
        *wrappers, _ = _layers(env)
        repeats = all(isinstance(layer, _KEEP_NOTHING) for layer in wrappers)
        return Replayed(env) if hidden and repeats else env

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start a new episode."""
        before = copy.deepcopy(self.np_random) if seed is None else None
        self._seen, info = self.env.reset(seed=seed, options=options)
        self._episode, self._actions = {"seed": seed, "random": before, "options": options}, []
        return self._seen, info

    def step(self, action: Any) -> Any:
        """Step the environment."""
        answer = self.env.step(action)
        self._actions.append(np.array(action))
        self._seen = answer[0]
        return answer

    def episode(self) -> dict[str, Any]:
        """Return how the episode began, its actions and its last observation."""
        if not self._episode:
            raise HiddenStateError("there is no episode yet")
        actions = np.array(self._actions)  # one array: a tensor each would be a long list
        parts = {**self._episode, "actions": actions, "seen": self._seen}
        return {name: _encode(part, []) for name, part in parts.items()}

    def replay(self, episode: Mapping[str, Any]) -> None:
        """Repeat an episode.

        Raises:
            ValueError: it ends in another observation, as with another release of Box2D.

        """
        seed, random, options, actions, seen = (
            _decode(episode[key]) for key in ("seed", "random", "options", "actions", "seen")
        )
        if random is not None:
            self.np_random = copy.deepcopy(random)
        self.reset(seed=seed, options=options)
        for action in actions:
            self.step(action)
        if not np.array_equal(self._seen, seen):
            raise ValueError(f"{self.env} does not repeat its episode")
        self._episode["random"] = random


def _layers(env: Env) -> Iterator[Env]:
    """Yield the wrappers from the outermost, and the environment; not gymnasium's checks."""
    while isinstance(env, gymnasium.Wrapper):
        if not isinstance(env, PassiveEnvChecker):
            yield env
        env = env.env
    yield env


def _pass_checks(env: Env) -> None:
    """Say that gymnasium has checked the environment: it compares with a reset that it saw."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, PassiveEnvChecker):
            env.checked_reset = env.checked_step = env.checked_data_reuse = True
        env = env.env


def values_of(layer: Any, held: list[Any]) -> dict[str, Any]:
    """Return the attributes of an environment or wrapper that may change.

    Args:
        layer: the environment or wrapper.
        held: what may be shared with the layers above, and is added to.

    Raises:
        HiddenStateError: one of them cannot be read.

    """
    fixed = {*_FIXED, "env"} if isinstance(layer, gymnasium.Wrapper) else _FIXED
    values = {
        name: _encode(value, held)
        for name, value in vars(layer).items()
        if name not in fixed
        and not isinstance(value, Space | EnvSpec)
        and type(value).__name__ not in _FIXED_KINDS
    }
    return {"class": type(layer).__qualname__, "values": values}


def made_of(env: Env) -> str:
    """Return a digest of a new environment's plain attributes, which its arguments decide."""
    plain = (bool, int, float, str, tuple, np.ndarray, np.generic)
    values = [
        (name, repr(value))
        for layer in _layers(env)
        for name, value in vars(layer).items()
        if isinstance(value, plain) and name not in _FIXED
    ]
    return hashlib.sha256(repr(values).encode()).hexdigest()


def assign(layer: Any, saved: Mapping[str, Any]) -> None:
    """Give an environment or wrapper the attributes that :func:`values_of` returned.

    Raises:
        ValueError: they are those of another one.

    """
    if saved["class"] != type(layer).__qualname__:
        raise ValueError(f"the state is that of a {saved['class']}, not of {layer}")
    if saved["values"].get("made") != vars(layer).get("made"):
        raise ValueError(f"{layer} was made with other arguments")
    for name, value in saved["values"].items():
        if isinstance(value, dict) and "mujoco" in value:
            _fill(getattr(layer, name), value["mujoco"], value["sizes"])
        else:
            setattr(layer, name, _decode(value))


def _fits(dtype: np.dtype[Any]) -> bool:
    """Say whether a file holds such numbers."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative


def _encode(value: Any, held: list[Any]) -> Any:
    """Return a value as a file can hold it; what could be shared must be met only once."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is tuple:  # nothing of it changes but what it holds
        return {"tuple": [_encode(item, held) for item in value]}
    if isinstance(value, np.generic) and _fits(value.dtype):
        return {"scalar": torch.from_numpy(np.array(value))}
    if any(value is other or _share_memory(value, other) for other in held):
        raise HiddenStateError(f"{value!r:.100} is held twice")
    held.append(value)
    if isinstance(value, np.ndarray) and _fits(value.dtype):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.random.Generator) and type(value.bit_generator) is np.random.PCG64:
        return {"pcg64": value.bit_generator.state}
    return _encode_parts(value, held)


def _encode_parts(value: Any, held: list[Any]) -> dict[str, Any]:
    if type(value) in (list, deque):
        items = [_encode(item, held) for item in value]
        return {type(value).__name__: items, "maxlen": getattr(value, "maxlen", None)}
    if type(value) is dict:
        return {"dict": {key: _encode(item, held) for key, item in value.items()}}
    if type(value).__name__ == "MjData":
        arrays = _fixed_arrays(value)
        flat = [np.array([value.time]), *(array.ravel() for _, array in arrays)]
        sizes = {name: array.size for name, array in arrays}
        return {"mujoco": torch.from_numpy(np.concatenate(flat).astype(np.float64)), "sizes": sizes}
    raise HiddenStateError(f"{type(value).__qualname__} cannot be read")


def _share_memory(one: Any, other: Any) -> bool:
    arrays = isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
    return arrays and np.may_share_memory(one, other)


def _decode(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "scalar":
        return content.numpy()[()]
    if kind == "pcg64":
        bits = np.random.PCG64()
        bits.state = content
        return np.random.Generator(bits)
    if kind == "dict":
        return {key: _decode(item) for key, item in content.items()}
    items = map(_decode, content)
    if kind == "deque":
        return deque(items, value["maxlen"])
    return tuple(items) if kind == "tuple" else list(items)


def _fixed_arrays(data: Any) -> list[tuple[str, np.ndarray]]:
    """Return the arrays of MuJoCo's data whose sizes are the model's.

    The others, of contacts and constraints, are computed by each step before it uses them.
    """
    fresh: Any = sys.modules["mujoco"].MjData(data.model)
    names = [name for name in dir(fresh) if not name.startswith("_")]
    both = ((name, getattr(fresh, name), getattr(data, name)) for name in names)
    return [
        (name, now)
        for name, before, now in both
        if isinstance(now, np.ndarray) and _fits(now.dtype) and now.shape == before.shape
    ]


def _fill(data: Any, flat: torch.Tensor, sizes: Mapping[str, int]) -> None:
    parts = np.split(flat.numpy(), np.cumsum([1, *sizes.values()])[:-1])
    data.time = parts[0].item()
    for name, part in zip(sizes, parts[1:], strict=True):
        array = getattr(data, name)
        array[...] = part.reshape(array.shape)
