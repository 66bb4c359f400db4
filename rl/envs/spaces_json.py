"""Spaces as JSON, so that networks can be rebuilt without their environment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import Space, spaces


def space_to_json(space: Space[Any]) -> dict[str, Any]:
    """Return a space as a dict that any JSON library can write, exact to the last bit.

    Raises:
        ValueError: it is not a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of
            them; or a Dict has keys that are neither strings nor integers.

    Example:
        >>> space_to_json(spaces.Box(0, np.inf, (3,)))
        {'kind': 'Box', 'dtype': 'float32', 'shape': [3], 'low': [0.0], 'high': ['inf']}

    """
    match space:
        case spaces.Box() if space.dtype.itemsize <= 8:  # JSON has no wider numbers
            bounds = {"low": _entries(space.low), "high": _entries(space.high)}
            shape = list(space.shape)
            return {"kind": "Box", "dtype": space.dtype.name, "shape": shape, **bounds}
        case spaces.Discrete():
            counts = {"n": int(space.n), "start": int(space.start)}
            return {"kind": "Discrete", "dtype": space.dtype.name, **counts}
        case spaces.MultiDiscrete():
            counts = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
            return {"kind": "MultiDiscrete", "dtype": space.dtype.name, **counts}
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "n": space.n}
        case spaces.Dict() if all(isinstance(key, str | int) for key in space):
            pairs = [[key, space_to_json(inner)] for key, inner in space.items()]
            return {"kind": "Dict", "spaces": pairs}
        case spaces.Tuple():
            return {"kind": "Tuple", "spaces": [space_to_json(inner) for inner in space]}
    raise ValueError(f"this space cannot be written as JSON: {space}")


def space_from_json(fields: Any) -> Space[Any]:
    """Return the space that :func:`space_to_json` was given.

    Raises:
        ValueError: an unknown kind of space, or fields that are missing or wrong.

    """
    try:
        return _space(fields)
    except (ArithmeticError, AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not the JSON of a space: {fields!r:.200} ({error!r})") from error


def _space(fields: Any) -> Space[Any]:
    kind, inner = fields["kind"], fields.get("spaces")
    dtype: Any = np.dtype(fields.get("dtype", "int64")).type
    match kind:
        case "Box":
            shape = tuple(fields["shape"])
            low, high = (_array(fields[key], shape, dtype) for key in ("low", "high"))
            return spaces.Box(low, high, shape, dtype)
        case "Discrete":
            more: Any = {} if dtype is np.int64 else {"dtype": dtype}  # not in old gymnasiums
            return spaces.Discrete(fields["n"], start=fields["start"], **more)
        case "MultiDiscrete":
            return spaces.MultiDiscrete(fields["nvec"], dtype, start=fields["start"])
        case "MultiBinary":
            return spaces.MultiBinary(fields["n"])
        case "Dict":  # a list of pairs keeps its order, which is that of the columns of a row
            return spaces.Dict([(key, _space(space)) for key, space in inner])
        case "Tuple":
            return spaces.Tuple([_space(space) for space in inner])
    raise ValueError(f"unknown kind of space {kind!r}")


def _entries(bounds: np.ndarray) -> list[Any]:
    """Return the entries in one list, or a single one if they are the same bit for bit."""
    same = bounds.size and bounds.tobytes() == bounds.flat[0].tobytes() * bounds.size
    entries = bounds.ravel()[: 1 if same else None].tolist()
    return [x if math.isfinite(x) else str(x) for x in entries]


def _array(entries: list[Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    numbers = [float(x) if isinstance(x, str) else x for x in entries]
    return np.array(numbers * (math.prod(shape) if len(numbers) == 1 else 1), dtype).reshape(shape)
