"""Batches of observations, also of composed spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from .answers import as_numpy


def batch_size(space: Space[Any], observations: Any) -> int:
    """Return how many observations a batch holds."""
    if isinstance(space, spaces.Dict):
        key, inner = next(iter(space.items()))
        return batch_size(inner, observations[key])
    if isinstance(space, spaces.Tuple):
        return batch_size(space.spaces[0], observations[0])
    return len(observations)


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
    """Return observations as a batch, and whether it was a single one.

    Raises:
        ValueError: they are neither one observation of the space nor a batch of them.

    """
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
        return {
            key: _as_batch(f"{name}[{key!r}]", inner, obs[key], sizes)
            for key, inner in space.items()
        }
    if isinstance(space, spaces.Tuple):
        if not isinstance(obs, tuple | list) or len(obs) != len(space):
            raise ValueError(f"{name} must be a tuple of length {len(space)}, got {obs!r:.200}")
        parts = enumerate(zip(space, obs, strict=True))
        return tuple(_as_batch(f"{name}[{i}]", *part, sizes) for i, part in parts)
    shape = space.shape or ()
    try:
        values = np.asarray(as_numpy(obs))
    except (TypeError, ValueError):  # ragged, or not to be read as an array
        values = None
    if values is None or values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers of shape {shape}, got {obs!r:.200}")
    if values.shape == shape:
        sizes[name] = None
        return values[None]
    if values.shape[1:] != shape or values.ndim == 0:
        batch = f"({', '.join(['batch', *map(str, shape)])})"
        raise ValueError(f"{name} must have shape {shape} or {batch}, got {values.shape}")
    sizes[name] = len(values)
    return values
