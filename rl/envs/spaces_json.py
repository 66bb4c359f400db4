"""A quick local version, not committed: another branch has the real one."""

from typing import Any

import numpy as np
from gymnasium import spaces


def space_to_json(space: Any) -> Any:
    """Return JSON."""
    if isinstance(space, spaces.Box):
        bounds = {"low": space.low.tolist(), "high": space.high.tolist()}
        return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        start = np.asarray(space.start).tolist()
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": start}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": [[k, space_to_json(v)] for k, v in space.items()]}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [space_to_json(v) for v in space]}
    raise ValueError(space)


def space_from_json(value: Any) -> Any:
    """Return the space."""
    kind = value["type"]
    if kind == "Box":
        dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
        low, high = (np.array(value[k], dtype).reshape(shape) for k in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(value["n"], start=value["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(value["nvec"], start=value["start"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(tuple(value["shape"]))
    if kind == "Dict":
        return spaces.Dict({k: space_from_json(v) for k, v in value["spaces"]})
    return spaces.Tuple([space_from_json(v) for v in value["spaces"]])
