"""Gradients and random number generators, left as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from ..vector import ParameterVector

Generators: TypeAlias = dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]

REWOUND = ("torch", "torch on cuda")  # The generators that a step puts back before each call.


def _generators(device: torch.device) -> Generators:
    """Return the functions that read and write the state of each global generator."""
    found: Generators = {
        "torch": (torch.get_rng_state, torch.set_rng_state),
        "random": (random.getstate, random.setstate),
    }
    numpy = sys.modules.get("numpy")
    if device.type == "cuda":
        found["torch on cuda"] = (
            lambda: torch.cuda.get_rng_state(device),
            lambda state: torch.cuda.set_rng_state(state, device),
        )
    if numpy is not None:  # Imported only if the user has imported it.
        found["numpy.random"] = (numpy.random.get_state, numpy.random.set_state)
    return found


def random_states(device: torch.device) -> dict[str, object]:
    """Return the state of each global generator as numbers, which can be compared."""
    return {name: _numbers(get()) for name, (get, _) in _generators(device).items()}


def _numbers(state: Any) -> object:
    if hasattr(state, "tolist"):  # A tensor or an array.
        return state.tolist()
    return [_numbers(part) for part in state] if isinstance(state, tuple) else state


@contextmanager
def restored(vector: ParameterVector) -> Iterator[None]:
    """Restore gradients and random number generators on exit, also after an exception."""
    states = [(put, get()) for get, put in _generators(vector.device).values()]
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in vector.params]
    try:
        yield
    finally:
        for p, grad, copy in grads:
            p.grad = grad
            if grad is not None and copy is not None:
                grad.copy_(copy)
        for put, state in states:
            put(state)
