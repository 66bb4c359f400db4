"""What must not be half done when Ctrl-C comes.

Python acts on signals between any two steps of its main thread, also where a context manager has
changed a setting of the process and not yet reached the code that restores it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Have an interrupt wait for the end of the block; a second one acts at once.

    A third interrupt is ignored: the second one may be undoing what the block did. A handler whose
    attribute ``immediate`` is true is called at once.
    """
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not (here and callable(before)) or getattr(before, "immediate", False):
        yield
        return
    came: list[FrameType | None] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(frame)
        if len(came) == 2:
            before(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(came) == 1:
            before(signal.SIGINT, came[0])


def surely(restore: Callable[[], object]) -> None:
    """Call a function that restores something, and once more if that is interrupted."""
    try:
        restore()
    except BaseException:
        restore()
        raise
