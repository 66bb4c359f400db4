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


def space_from_json(fields: Any, most: int = 2**26) -> Space[Any]:
    """Return the space that :func:`space_to_json` was given; raise a ValueError if it was none.

    Args:
        fields: what it returned.
        most: bytes that the space's observations or actions may take; a few numbers stand for a
            space of any size. Bytes of images count as such, and all else as eight of them.

    """
    try:
        if (size := _size(**fields)) > most:
            raise ValueError(f"a space of {size:,} bytes, and {most:,} are read")
        return _space(**fields)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"not the JSON of a space: {error!r}, of {_start(fields)}") from error
    except RecursionError as error:
        raise ValueError("not the JSON of a space: it is nested too deeply") from error


def _start(fields: Any) -> str:
    """Return the start of what was given; all of it may be long."""
    return f"{list(fields)[:9] if isinstance(fields, dict) else fields!r:.200}"


def _size(kind: str, dtype: str = "int64", spaces: Any = (), **fields: Any) -> int:
    """Return the bytes of one observation, as above, before anything is made."""
    match kind:
        case "Dict":
            return sum(_size(**inner) for _, inner in spaces)
        case "Tuple":
            return sum(_size(**inner) for inner in spaces)
        case "Box":
            image = dtype == "uint8" and len(fields["shape"]) in (2, 3)
            return math.prod(fields["shape"]) * (1 if image else 8)
        case "Discrete":
            return 8 * fields["n"]
        case "MultiDiscrete":
            return 8 * int(np.sum(fields["nvec"], dtype=np.float64))
        case "MultiBinary":
            return 8 * int(np.prod(fields["n"], dtype=np.float64))
    return 0  # and refused


def _space(kind: str, dtype: Any = np.int64, **fields: Any) -> Space[Any]:
    if (dtype := np.dtype(dtype)).kind not in "biuf" or dtype.itemsize > 8:
        raise TypeError(f"a dtype of {dtype}")
    dtype = dtype.type
    match kind:
        case "Box":
            shape = tuple(fields["shape"])
            low, high = (_array(fields[key], shape, dtype) for key in ("low", "high"))
            if not (low <= high).all():  # a bound that is not a number is never within another
                raise TypeError("bounds that hold nothing")
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
    numbers = np.array([float(x) if isinstance(x, str) else x for x in entries], dtype)
    return np.full(shape, numbers[0]) if len(numbers) == 1 else numbers.reshape(shape)
