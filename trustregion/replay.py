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

    In its first run, a part draws from torch's global generators in the ordinary way. In later runs
    it starts from the states that the generators had at the first run, and restores their present
    states afterwards. A model with dropout then has the same mask in all products of an operator.

    This covers the global generators of the CPU and of all CUDA devices. It does not cover numpy's
    generators, or generators that the user made.

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
                restore_generators(start)
                return call()
        start = generator_states()
        result = call()
        self._starts[part] = self._shared(start)
        return result

    def _shared(self, states: States) -> States:
        """Return the states, with those that equal the states of the previous part shared.

        A generator that no part draws from then needs the memory of a single state.
        """
        last = next(reversed(self._starts.values()), states)
        if len(last) != len(states):
            return states
        return [a if torch.equal(a, b) else b for a, b in zip(last, states, strict=True)]


def repeatable(fn: Callable[..., T]) -> Callable[..., T]:
    """Return ``fn``, with every call seeing the random numbers of the first one."""
    replay = Replay()
    return lambda *args: replay.run(fn, lambda: fn(*args))


@contextmanager
def kept() -> Iterator[None]:
    """Restore torch's global generators on exit."""
    before = generator_states()
    try:
        yield
    finally:
        restore_generators(before)


def generator_states() -> States:
    """Return the states of torch's global generators."""
    # Reading a state would initialize CUDA in a process that computes on the CPU only.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def restore_generators(states: States) -> None:
    """Put torch's global generators back to earlier states."""
    torch.set_rng_state(states[0])
    for index, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, index)
