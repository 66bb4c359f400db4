"""Signals that wait while a step runs, so that nothing leaves it half-way.

Python runs the handler of a signal between any two instructions of the main thread. The handler of
Ctrl-C raises KeyboardInterrupt there: between two parameters that a step writes, or after a setting
of the process has changed and before the block that restores it is entered. No order of the lines
closes all these gaps, and torch's own context managers have them too. Therefore the handlers that
are written in Python wait for the whole of a step, and run where an exception does no harm: inside
the user's functions, at a product, and after the step, which is then complete and counted.
"""

from __future__ import annotations

import functools
import inspect
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Their handlers may raise: Ctrl-C, the end of a job, and the alarms of time limits.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGBREAK")
    if hasattr(signal, name)
]
_PATIENCE = 2  # So many signals wait. One more is a user whose step hangs, and runs at once.


class _Gate:
    """The handler of the signals during a step: open, it passes them on, closed, they wait."""

    def __init__(self) -> None:
        self.open: bool | None = None  # None: no step is taken
        self._waiting: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.open is False and len(self._waiting) < _PATIENCE:
            self._waiting.append(number)
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Run the program's handler; if it raises, signals wait on the way out of the step."""
        before = self.open
        self.open = None if before is None else False
        self._handlers[number](number, frame)
        self.open = before

    def deliver(self) -> None:
        """Run the handlers of all signals that wait, the rest also if one of them raises."""
        while self._waiting:
            number = self._waiting.pop(0)
            try:
                if self.open is None:
                    signal.raise_signal(number)
                else:
                    self._pass_on(number, inspect.currentframe())
            finally:
                self.deliver()

    def enter(self, before: bool | None) -> None:
        """Close; at the start of an outermost step, take the place of the handlers in Python."""
        for number in _SIGNALS if before is None else ():
            handler = signal.getsignal(number)
            if callable(handler) and handler is not self:
                self._handlers[number] = handler
                signal.signal(number, self)
        self.open = False

    def leave(self, before: bool | None) -> None:
        """Go back to the state before :meth:`enter`, and let the signals that wait have it."""
        try:
            self.open = before  # A handler may raise at any line from here on.
            self._give_back()
        except BaseException:
            self._give_back()
            raise
        finally:
            if before is not False:
                self.deliver()

    def _give_back(self) -> None:
        """Put the handlers back, unless the program has changed them meanwhile."""
        for number in list(self._handlers) if self.open is None else ():
            if signal.getsignal(number) is self:
                signal.signal(number, self._handlers[number])
            del self._handlers[number]


_gate = _Gate()


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def deferred(fn: Callable[P, T]) -> Callable[P, T]:
    """Return ``fn``, during which signals wait; they never interrupt threads but the main one."""

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _in_main_thread():
            return fn(*args, **kwargs)
        before = _gate.open
        try:
            _gate.enter(before)
            return fn(*args, **kwargs)
        finally:
            _gate.leave(before)

    return call


def interruptible(fn: Callable[[], T]) -> T:
    """Return ``fn()``, a function of the user, in which signals do not wait."""
    if _gate.open is not False or not _in_main_thread():
        return fn()
    _gate.deliver()
    _gate.open = True
    try:
        return fn()
    finally:
        _gate.open = False


def poll() -> None:
    """Run the handlers of the signals that wait, at a place where they may raise."""
    if _gate.open is False and _in_main_thread():
        _gate.deliver()
