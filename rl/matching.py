"""Whether a saved state is one of a module or an optimizer, found before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, which its kernels take to be of the right size


def check_types(value: Any, kinds: Any, name: str = "the state") -> None:
    """Raise a ValueError unless a value is of some types, and a mapping has values that are.

    Args:
        value: what to check.
        kinds: a type, a tuple of types, or a dict of these by key; other keys may be there, too.
        name: what the error calls the value.

    Example:
        >>> check_types({"a": 1, "b": None}, {"a": int, "b": (str, type(None))})
        >>> check_types({"a": True}, {"a": int})
        Traceback (most recent call last):
        ValueError: 'a' of the state must be of type int, got True

    """
    if isinstance(kinds, dict):
        check_types(value, dict, name)
        for key, inner in kinds.items():
            if key not in value:
                raise ValueError(f"{name} is incomplete: it has no {key!r}")
            check_types(value[key], inner, f"{key!r} of {name}")
    elif not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        known = kinds if isinstance(kinds, tuple) else (kinds,)
        words = " or ".join(kind.__name__ for kind in known)
        raise ValueError(f"{name} must be of type {words}, got {value!r:.80}")


def check_shapes(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a ValueError unless all tensors of a module are saved, in their shapes and dtypes."""
    for key, mine in own.items():
        if not isinstance(mine, Tensor):
            continue
        where, theirs = f"{name}.{key}", saved.get(key)
        if not isinstance(theirs, Tensor):
            raise ValueError(f"{where} is missing")
        real = mine.is_floating_point() and theirs.is_floating_point()
        if theirs.shape != mine.shape or not (real or theirs.dtype == mine.dtype):
            one, other = (f"{tuple(x.shape)} of {x.dtype}" for x in (theirs, mine))
            raise ValueError(f"{where} is {one} in the saved state, and {other} here")


def check_module(name: str, module: nn.Module, saved: Any) -> None:
    """Raise a ValueError unless a saved state is that of a module, with finite parameters.

    Buffers may be infinite, as those of attention masks are, and not NaN.
    """
    check_types(saved, dict, f"the state of {name}")
    check_shapes(name, module.state_dict(), saved)
    learnt = dict(module.named_parameters(remove_duplicate=False))
    for key, value in saved.items():
        if isinstance(value, Tensor):
            _check_numbers(f"{name}.{key}", value, finite=key in learnt)


def check_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Raise a ValueError unless a saved state is one of an optimizer of these parameters."""
    check_types(saved, {"state": dict, "param_groups": list}, f"the state of {name}")
    own, parameters = optimizer.state_dict()["param_groups"], optimizer.param_groups
    if [_indices(g) for g in saved["param_groups"]] != [_indices(g) for g in own]:
        raise ValueError(f"the parameter groups of {name} are those of other parameters")
    for mine, theirs in zip(own, saved["param_groups"], strict=True):
        for key in theirs.keys() & mine.keys():
            if _kind(theirs[key]) != _kind(mine[key]) and None not in (mine[key], theirs[key]):
                raise ValueError(f"{key} of {name} is {theirs[key]!r:.80}, and {mine[key]!r} here")
    flat = [p for group in parameters for p in group["params"]]
    if not set(saved["state"]) <= set(range(len(flat))):  # frozen ones have none
        raise ValueError(f"the state of {name} is not that of {len(flat)} parameters")
    for index, entry in saved["state"].items():
        where = f"the state of {name}, parameter {index}"
        check_types(entry, dict, where)
        if isinstance(optimizer, torch.optim.Adam):
            check_shapes(where, dict.fromkeys(_MOMENTS, flat[index]), entry)
            check_types(entry, {"step": (Tensor, int, float)}, where)
        for key, value in entry.items():
            if isinstance(value, Tensor):
                _check_numbers(f"{where}, {key}", value, finite=False)


def _check_numbers(name: str, value: Tensor, *, finite: bool) -> None:
    bad = ~torch.isfinite(value) if finite else torch.isnan(value)
    if bad.any():
        first = value[bad].flatten()[0].item()
        raise ValueError(f"{name} has {int(bad.sum())} entries that are {first}")


def _indices(group: Any) -> Any:
    check_types(group, {"params": list}, "a parameter group")
    return group["params"]


def _kind(value: Any) -> Any:
    """Return what values of an option have in common: numbers are alike, and so are lists."""
    if isinstance(value, list | tuple):
        return frozenset(map(_kind, value))
    return float if type(value) is int else type(value)
