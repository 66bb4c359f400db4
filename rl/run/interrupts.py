"""Ctrl-C while environments are stepped in processes of their own."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gymnasium.vector import AsyncVectorEnv, VectorEnv


@contextmanager
def sparing_workers() -> Iterator[None]:
    """Start processes that never see Ctrl-C, which a terminal sends to all of them.

    They would each print a traceback. The process that waits for them is interrupted, at the end of
    this block if it comes within, and ends them. Windows cannot do this: nothing changes there.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def close(envs: VectorEnv, *, at_once: bool = False) -> None:
    """Close environments; ``at_once``, if a step may be under way, ends worker processes."""
    if at_once and isinstance(envs, AsyncVectorEnv):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's, that a step is under way
            envs.close(terminate=True)
    else:
        envs.close()
