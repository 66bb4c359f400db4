"""What holds the copies of an environment, wherever they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from .faults import Failure, Place
from .stand import Spaces


class Hand(Protocol):
    """What holds one copy.

    ``idle`` is False from a failure on until :meth:`renew`, and, of a copy in another process,
    while it owes an answer.
    """

    idle: bool

    def start(self) -> None:
        """Have the copy made; :meth:`receive` returns its spaces."""
        ...

    def send(self, command: str, arguments: tuple[Any, ...]) -> None:
        """Ask for something; it may be done at once or by :meth:`receive`."""
        ...

    def receive(self, limit: float | None) -> Any:
        """Return the answer, or raise a :class:`Failure`, at the latest after ``limit`` seconds."""
        ...

    def renew(self, limit: float | None) -> None:
        """Replace the copy by a new one, or raise a :class:`Failure`."""
        ...

    def release(self) -> None:
        """Ask for the end of the copy."""
        ...

    def stop(self, limit: float | None) -> None:
        """Wait for the end, ``limit`` seconds, then force it and raise a :class:`Failure`."""
        ...


def make_all(hands: Sequence[Hand], limit: float | None) -> Spaces:
    """Have copies made, at the same time if they can be, and return the spaces that all have."""
    for hand in hands:
        hand.start()
    made: list[Spaces] = []
    for i, hand in enumerate(hands):
        try:
            made.append(hand.receive(limit))
        except Failure as failure:
            raise Place(i).fault("make", (), failure) from failure.__cause__
        for name, mine, others in zip(("observations", "actions"), made[i], made[0], strict=False):
            if mine != others:
                words = f"environment {i} has {name} of {mine}, and environment 0 of {others}"
                raise ValueError(words)
    return made[0]


def stop_all(hands: Sequence[Hand], limit: float | None) -> None:
    """End copies, all at the same time if they can be; a warning names those that failed to."""
    for hand in hands:
        hand.release()
    faults: list[str] = []
    for i, hand in enumerate(hands):
        try:
            hand.stop(limit)
        except Failure as failure:
            limit = 0.0 if failure.late else limit  # all of them had that time
            faults.append(str(Place(i).fault("close", (), failure)))
    for words in faults:  # at the end: a warning may be an error
        warnings.warn(words, RuntimeWarning, stacklevel=3)
