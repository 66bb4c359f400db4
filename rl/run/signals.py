"""Signals that ask a training to end: the first one lets it finish, the second one does not."""

from __future__ import annotations

import os
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

    Args:
        tell: called with what happens, by the first signal.

    Attributes:
        number: the signal that came; None before.

    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.number: int | None = None
        self._tell, self._raised = tell, False

    def __call__(self, agent: Agent, log: Log) -> bool:  # noqa: ARG002 # the protocol's
        """Say whether to go on."""
        return self.number is None

    def ask(self, number: int) -> None:
        """Note the first signal; raise for the second; ignore others, for what that undoes."""
        if self.number is None:
            self.number = number
            name = signal.Signals(number).name
            try:
                self._tell(f"{name}: this update is finished and saved; once more to stop at once")
            except OSError:  # the terminal was closed: nobody reads any more
                with open(os.devnull, "w") as nowhere:
                    for stream in (1, 2):
                        os.dup2(nowhere.fileno(), stream)
        elif not self._raised:
            self._raised = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


class _Handler:
    """A handler of signals, whose first one changes nothing that an update does."""

    immediate = True  # for rl.interrupts

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def __call__(self, number: int, _: FrameType | None) -> None:
        self._request.ask(number)


@contextmanager
def stop_request(tell: Callable[[str], None]) -> Iterator[StopRequest]:
    """Have the first signal ask for the end, and the second one raise at once.

    SIGINT then raises KeyboardInterrupt, the others SystemExit with the shell's code. A signal that
    is ignored, as SIGHUP is under nohup, stays so. Python acts on signals in its main thread only:
    in another one this does nothing.

    Args:
        tell: called with what happens, by the first signal.

    """
    request, before = StopRequest(tell), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: it is not Python's
                before[number] = signal.signal(number, _Handler(request))
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
