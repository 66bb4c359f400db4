"""What environments answer, as numpy arrays of known shape and kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_FLOAT, _BOOL = np.dtype(np.float64), np.dtype(np.bool_)


def as_numpy(values: Any) -> Any:
    """Return values with all torch tensors, also those in dicts and tuples, as numpy arrays."""
    if type(values) is np.ndarray:  # nearly always
        return values
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(values, dict):
        return {key: as_numpy(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(as_numpy(value) for value in values)
    return values


def reals(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return real numbers as a new float64 array.

    Args:
        name: of the values, for the error.
        values: of that shape, or with one more axis, of length one, at the end.
        shape: of the array.

    Raises:
        ValueError: they are not real numbers, or have another shape.

    Example:
        >>> reals("reward", [3], ())
        array(3.)

    """
    if type(values) is np.ndarray and values.dtype is _FLOAT and values.shape == shape:
        return values.copy()  # as below, in a tenth of the time
    return _numbers(name, values, shape).astype(_FLOAT)


def flags(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return truth values as a new bool array; the arguments are those of :func:`reals`.

    Raises:
        ValueError: they are neither bool nor 0 or 1, or have another shape.

    """
    if type(values) is np.ndarray and values.dtype is _BOOL and values.shape == shape:
        return values.copy()  # as below, in a tenth of the time
    given = _numbers(name, values, shape)
    true = given.astype(_BOOL)
    if (given != true).any():
        raise ValueError(f"{name} must be True or False, or 1 or 0, got {values!r:.200}")
    return true


def _numbers(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        given = np.asarray(as_numpy(values))
    except (TypeError, ValueError):  # ragged, or not to be read as an array
        given = None
    if given is None or given.dtype.kind not in "biuf" or given.shape not in (shape, (*shape, 1)):
        expected = f"an array of numbers of shape {shape}" if shape else "one number"
        raise ValueError(f"{name} must be {expected}, got {values!r:.200}")
    return given.reshape(shape)
