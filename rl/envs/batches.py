"""What environments answer: numbers and flags of known shape, and batches of observations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from gymnasium.vector.utils import concatenate, create_empty_array


def as_numpy(values: Any) -> Any:
    """Return values with all torch tensors, also those in dicts and tuples, as numpy arrays."""
    if type(values) is np.ndarray:  # nearly always
        return values
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(values, dict):
        return {key: as_numpy(value) for key, value in values.items()}
    return tuple(map(as_numpy, values)) if isinstance(values, tuple) else values


def numbers(values: Any) -> np.ndarray | None:
    """Return real numbers or truth values as an array, or None if they are neither, or ragged."""
    try:
        array = np.asarray(as_numpy(values))
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "biuf" else None


def reals(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers as a new float64 array; they may have one more axis at the end, of length 1.

    A ValueError names what is not real numbers, or has another shape.
    """
    return _shaped(name, values, shape).astype(np.float64)


def flags(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return truth values, which may be 0 or 1, as a new bool array, as :func:`reals` does."""
    given = _shaped(name, values, shape)
    true = given.astype(np.bool_)
    if given.dtype != np.bool_ and (given != true).any():
        raise ValueError(f"{name} must be True or False, or 1 or 0, got {values!r:.200}")
    return true


def _shaped(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    if type(values) is np.ndarray and values.shape == shape and values.dtype.kind in "biuf":
        return values  # nearly always
    given = numbers(values)
    if given is None or given.shape not in (shape, (*shape, 1)):
        expected = f"an array of numbers of shape {shape}" if shape else "one number"
        raise ValueError(f"{name} must be {expected}, got {values!r:.200}")
    return given.reshape(shape)


def leaves(space: Space[Any], *path: Any) -> Iterator[tuple[tuple[Any, ...], Space[Any]]]:
    """Yield the parts of a space that are not composed, each with the keys that lead to it."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield path, space
        return
    for key, inner in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
        yield from leaves(inner, *path, key)


def take(space: Space[Any], batch: Any, rows: np.ndarray) -> Any:
    """Return some rows of a batch of observations, as a batch of its own."""
    batch = as_numpy(batch)
    if isinstance(batch, np.ndarray) and batch.dtype == object:  # of whole observations
        chosen = [as_numpy(batch[i]) for i in rows]
        return concatenate(space, chosen, create_empty_array(space, len(chosen)))
    if isinstance(space, spaces.Dict):
        return {key: take(inner, batch[key], rows) for key, inner in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(take(inner, part, rows) for inner, part in zip(space, batch, strict=True))
    return np.asarray(batch)[rows]


def as_batch(space: Space[Any], obs: Any) -> tuple[Any, bool]:
    """Return observations as a batch, and whether it was a single one; else raise a ValueError."""
    pair = isinstance(obs, tuple) and len(obs) == 2 and isinstance(obs[1], dict)
    if pair and not (isinstance(space, spaces.Tuple) and isinstance(space[-1], spaces.Dict)):
        raise ValueError(
            "obs is a tuple (observation, info), which is what reset() returns: pass its first"
            " entry alone, as in predict(env.reset()[0])"
        )
    sizes: dict[str, int | None] = {}
    batch = _as_batch("obs", space, obs, sizes)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "obs must be one observation, or a batch of them of one size, in all of its parts; got"
            f" the sizes {sizes}, where None stands for one observation"
        )
    return batch, None in sizes.values()


def _as_batch(name: str, space: Space[Any], obs: Any, sizes: dict[str, int | None]) -> Any:
    """Return a part of an observation as a batch, and enter the size of each leaf."""
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping) or not set(space) <= set(obs):
            got = f"the keys {list(obs)}" if isinstance(obs, Mapping) else f"{obs!r:.200}"
            raise ValueError(f"{name} must be a dict with the keys {list(space)}, got {got}")
        parts = space.items()
        return {key: _as_batch(f"{name}[{key!r}]", s, obs[key], sizes) for key, s in parts}
    if isinstance(space, spaces.Tuple):
        if not isinstance(obs, tuple | list) or len(obs) != len(space):
            raise ValueError(f"{name} must be a tuple of length {len(space)}, got {obs!r:.200}")
        return tuple(_as_batch(f"{name}[{i}]", s, obs[i], sizes) for i, s in enumerate(space))
    shape, values = space.shape or (), numbers(obs)
    if values is None:
        raise ValueError(f"{name} must be numbers of shape {shape}, got {obs!r:.200}")
    single = values.shape == shape
    if not single and (values.ndim == 0 or values.shape[1:] != shape):
        batch = f"({', '.join(['batch', *map(str, shape)])})"
        raise ValueError(f"{name} must have shape {shape} or {batch}, got {values.shape}")
    sizes[name] = None if single else len(values)
    return values[None] if single else values
