"""Copies of an environment in this process, where nothing can stop one that hangs or dies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gymnasium.vector.utils import create_empty_array

from .answers import Env
from .copies import Copies, OnError
from .faults import Failure
from .hands import make_all, stop_all
from .layout import ObservationLayout
from .stand import Stand


def in_turn(
    factories: Sequence[Callable[[], Env]], limit: float | None, on_error: OnError
) -> Copies:
    """Return copies in this process, of what each of the functions makes."""
    hands = [Here(factory) for factory in factories]
    try:
        spaces = make_all(hands, limit)
        ObservationLayout(spaces.observations)  # refuses what has no row
        batch = create_empty_array(spaces.observations, len(hands))
        for i, hand in enumerate(hands):
            hand.stand.put(spaces.observations, batch, i)
    except BaseException:
        stop_all(hands, limit)
        raise
    return Copies(hands, spaces, batch, "sync", limit, on_error)


class Here:
    """Holds a copy in this process."""

    idle = True
    _question: tuple[Callable[..., Any], tuple[Any, ...]]

    def __init__(self, factory: Callable[[], Env]) -> None:
        self.stand = Stand(factory)

    @property
    def env(self) -> Env:
        """The environment."""
        return self.stand.env

    def start(self) -> None:
        """Have the environment made by :meth:`receive`."""
        self.send("make", ())

    def send(self, command: str, arguments: tuple[Any, ...]) -> None:
        """Keep a command for :meth:`receive`."""
        self._question = getattr(self.stand, command), arguments

    def receive(self, limit: float | None) -> Any:  # noqa: ARG002 # nobody could end it
        """Do what was asked for."""
        do, arguments = self._question
        try:
            return do(*arguments)
        except Exception as error:
            self.idle = False
            raise Failure.of(error) from error

    def renew(self, limit: float | None) -> None:
        """Close the environment, if it lets itself be closed, and make another one."""
        try:
            self.stop(limit)
        except Failure as failure:
            warnings.warn(
                f"an environment failed to close: {failure}", RuntimeWarning, stacklevel=2
            )
        self.start()
        self.receive(limit)
        self.idle = True

    def release(self) -> None:
        """Do nothing: :meth:`stop` does it all."""

    def stop(self, limit: float | None) -> None:
        """Close the environment."""
        self.send("close", ())
        self.receive(limit)
