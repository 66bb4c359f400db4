"""Spaces as JSON, so that networks can be rebuilt without their environment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import Space, spaces

_NUMBERS = {
    spaces.Box: ("shape", "low", "high"),
    spaces.Discrete: ("n", "start"),
    spaces.MultiDiscrete: ("nvec", "start"),
    spaces.MultiBinary: ("n",),
}


def space_to_json(space: Space[Any]) -> dict[str, Any]:
    """Return a space as a dict that any JSON library can write, exact to the last bit.

    A ValueError names a space that is no Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple,
    or a Dict whose keys are neither strings nor integers.

    Example:
        >>> space_to_json(spaces.Box(0, np.inf, (3,)))
        {'kind': 'Box', 'dtype': 'float32', 'shape': [3], 'low': [0.0], 'high': ['inf']}

    """
    if isinstance(space, spaces.Dict) and all(isinstance(key, str | int) for key in space):
        pairs = [[key, space_to_json(inner)] for key, inner in space.items()]
        return {"kind": "Dict", "spaces": pairs}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [space_to_json(inner) for inner in space]}
    dtype = np.dtype(space.dtype)
    for kind, names in _NUMBERS.items():
        if isinstance(space, kind) and dtype.itemsize <= 8:  # JSON has no wider numbers
            fields = {name: _plain(name, getattr(space, name)) for name in names}
            return {"kind": kind.__name__, "dtype": dtype.name} | fields
    raise ValueError(f"this space cannot be written as JSON: {space}")


def space_from_json(fields: Any) -> Space[Any]:
    """Return the space that :func:`space_to_json` was given; raise a ValueError if it was none."""
    try:
        return _space(**fields)
    except (ArithmeticError, AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not the JSON of a space: {fields!r:.200} ({error!r})") from error


def _space(kind: str, dtype: Any = np.int64, **fields: Any) -> Space[Any]:
    dtype = np.dtype(dtype).type
    match kind:
        case "Box":
            shape = tuple(fields["shape"])
            low, high = (_array(fields[key], shape, dtype) for key in ("low", "high"))
            return spaces.Box(low, high, shape, dtype)
        case "Discrete":
            more = {} if dtype is np.int64 else {"dtype": dtype}  # not in old gymnasiums
            return spaces.Discrete(**fields, **more)
        case "MultiDiscrete":
            return spaces.MultiDiscrete(**fields, dtype=dtype)
        case "MultiBinary":
            return spaces.MultiBinary(**fields)
        case "Dict":  # a list of pairs keeps its order, which is that of the columns of a row
            return spaces.Dict([(key, _space(**inner)) for key, inner in fields["spaces"]])
        case "Tuple":
            return spaces.Tuple([_space(**inner) for inner in fields["spaces"]])
    raise ValueError(f"unknown kind of space {kind!r}")


def _plain(name: str, value: Any) -> Any:
    """Return a number or an array as JSON has it; bounds that are the same to the bit just once."""
    array = np.asarray(value)
    if name not in ("low", "high"):
        return array.tolist()
    same = array.size and array.tobytes() == array.flat[0].tobytes() * array.size
    entries = array.ravel()[: 1 if same else None].tolist()
    return [x if math.isfinite(x) else str(x) for x in entries]


def _array(entries: list[Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    numbers = [float(x) if isinstance(x, str) else x for x in entries]
    return np.array(numbers * (math.prod(shape) if len(numbers) == 1 else 1), dtype).reshape(shape)
