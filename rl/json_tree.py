"""Trees of plain values and tensors as JSON, in which places stand for the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What stands for a tensor, for a dict of other keys, and for a number that JSON does not have.
_TENSOR, _PAIRS, _FLOAT = "$tensor", "$pairs", "$float"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json(state: Mapping[str, Any]) -> tuple[bytes, dict[str, Tensor]]:
    """Return a tree as standard JSON, and copies of its tensors by their places.

    A TypeError names a value that is no dict, list, number, string, None or strided tensor.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_plain(state, "", tensors), allow_nan=False).encode(), tensors


def from_json(data: bytes, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that :func:`to_json` was given; tuples come back as lists.

    Raises:
        ValueError: it is no such JSON, or does not use each tensor once. Forged trees may raise
            other errors, too.

    """
    left = dict(tensors)
    tree = _full(parse_json(data), left)
    if left:
        raise ValueError(f"nothing refers to the tensor {next(iter(left))!r}")
    return tree


def parse_json(data: bytes) -> Any:
    """Parse standard JSON: names once, and finite numbers."""
    refuse, unique = _finite, _unique
    return json.loads(
        data.decode(), parse_constant=refuse, parse_float=refuse, object_pairs_hook=unique
    )


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return value


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return a tree of values that JSON has; tensors move out of it, by their places."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        while place in tensors:  # "a.b" may be a key of its own
            place += "'"
        # a copy shares no memory with others, which safetensors refuses
        tensors[place] = value.detach().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        inner = {k: _plain(v, f"{place}.{k}", tensors) for k, v in value.items()}
        odd = [k for k in inner if not (k is None or isinstance(k, bool | int | float | str))]
        if odd:
            raise TypeError(f"{place} has a key {odd[0]!r}, which a checkpoint cannot hold")
        marked = inner.keys() & {_TENSOR, _PAIRS, _FLOAT}
        if all(isinstance(k, str) for k in inner) and not marked:
            return inner
        return {_PAIRS: [[_plain(k, "", tensors), v] for k, v in inner.items()]}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold")


def _full(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree with its tensors, each of which is taken once."""
    if isinstance(value, list):
        return [_full(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors.pop(value[_TENSOR])
    if value.keys() == {_FLOAT}:
        return _NOT_FINITE[value[_FLOAT]]
    if value.keys() != {_PAIRS}:
        return {key: _full(item, tensors) for key, item in value.items()}
    pairs = {_full(key, tensors): _full(item, tensors) for key, item in value[_PAIRS]}
    if len(pairs) < len(value[_PAIRS]):
        raise ValueError("a key is there twice")
    return pairs
