"""Computations that see the same random numbers each time they run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
States: TypeAlias = list[Tensor]


class Replay:
    """Parts of a computation that see the same random numbers each time they run.

    A part that runs for the first time draws from torch's global generators as it would without a
    replay. When it runs again, it starts from the states that the generators had then, and leaves
    them as it found them. A model with dropout so has one mask in all products with an operator.

    The generators of the CPU and of all CUDA devices are replayed; those of numpy, and generators
    that belong to the user, are not.

    Example:
        >>> replay = Replay()
        >>> draw = lambda: torch.rand(()).item()
        >>> replay.run("mask", draw) == replay.run("mask", draw)
        True

    """

    def __init__(self) -> None:
        self._starts: dict[Hashable, States] = {}

    def run(self, part: Hashable, call: Callable[[], T]) -> T:
        """Return ``call()``, run with the random numbers of the first call for ``part``."""
        start = self._starts.get(part)
        if start is not None:
            with kept():
                _restore(start)
                return call()
        start = _states()
        result = call()
        self._starts[part] = self._shared(start)
        return result

    def _shared(self, states: States) -> States:
        """Return the states, each the very tensor of the part before where it is the same.

        A generator that no part draws from so costs the memory of one state.
        """
        last = next(reversed(self._starts.values()), states)
        if len(last) != len(states):
            return states
        return [a if torch.equal(a, b) else b for a, b in zip(last, states, strict=True)]


def repeatable(fn: Callable[..., T]) -> Callable[..., T]:
    """Return ``fn`` with the random numbers of its first call in all later ones."""
    replay = Replay()
    return lambda *args: replay.run(fn, lambda: fn(*args))


@contextmanager
def kept() -> Iterator[None]:
    """Leave torch's global generators as they are found."""
    before = _states()
    try:
        yield
    finally:
        _restore(before)


def _states() -> States:
    # asked first: a state would initialize CUDA in a process that only computes on the CPU
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _restore(states: States) -> None:
    torch.set_rng_state(states[0])
    for index, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, index)
