"""Signals that ask a training to end: the first one lets it finish, the second one does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..agent import Agent
from ..reports import Log

# What the terminal's Ctrl-C, job schedulers and containers, and a terminal that closes send.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # other systems have no SIGHUP


class StopRequest:
    """A callback that ends the training after the update in which a signal came.

    Attributes:
        number: the signal that came; None before.

    """

    number: int | None = None

    def __call__(self, agent: Agent, log: Log) -> bool:  # noqa: ARG002 # the protocol's
        """Say whether to go on."""
        return self.number is None


@contextmanager
def stop_request(tell: Callable[[str], None]) -> Iterator[StopRequest]:
    """Have the first signal ask for the end, and the second one raise at once.

    SIGINT then raises KeyboardInterrupt, the others SystemExit with the shell's code. A signal that
    is ignored, as SIGHUP is under nohup, stays so. Python acts on signals in its main thread only:
    in another one this does nothing.

    Args:
        tell: called with what happens, by the first signal.

    """
    request, before = StopRequest(), dict[int, Any]()

    def ask(number: int, _: FrameType | None) -> None:
        if request.number is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        request.number = number
        name = signal.Signals(number).name
        tell(f"{name}: this update is finished and saved; once more to stop at once")

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
