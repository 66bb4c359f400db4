"""What runs in the process of one copy of an environment."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from gymnasium import Space
from gymnasium.vector.utils import CloudpickleWrapper, read_from_shared_memory

from .answers import Env
from .faults import Failure
from .stand import Stand

Memory: TypeAlias = "tuple[Space[Any], Any, int, int]"  # of what, where, for how many, which one
GRACE = 2.0  # seconds that a process has to close its environment when nobody waits for it


def work(
    factory: CloudpickleWrapper[Env], pipe: Connection, line: Connection, memory: Memory | None
) -> None:
    """Do what comes through the pipe, until it is closed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            # They reach all processes of a terminal or a job, and the parent acts on them. This is
            # not SIG_IGN, which a simulator that the environment starts would inherit.
            signal.signal(getattr(signal, name), lambda *_: None)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    if sys.platform == "linux":
        _end_at_last(line)
    stand = Stand(factory.fn)
    command, arguments = "make", ()
    if memory is not None:
        space, shared, n, i = memory
        stand.put(space, read_from_shared_memory(space, shared, n), i)
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            pipe.send_bytes(_answer(stand, command, arguments))
            if command == "close":
                return
            command, arguments = pickle.loads(pipe.recv_bytes())
            if command == "apply":
                arguments = arguments[0].fn, *arguments[1:]
    stand.close()


def _answer(stand: Stand, command: str, arguments: tuple[Any, ...]) -> bytes:
    """Return whether a command was done, and the answer or why it was not."""
    try:
        return pickle.dumps((True, getattr(stand, command)(*arguments)))
    except BaseException as error:  # also SystemExit, which is not for an environment to raise
        failure = Failure.of(error)
        return pickle.dumps((False, (str(failure), failure.trace)))


def _end_with(pipe: Connection) -> None:
    """End this process a little after the other end of its pipe was closed, whatever it does."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(pipe, 0)  # of nothing but its end
        poll.poll()
    else:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
    time.sleep(GRACE)
    os._exit(1)


def _end_at_last(line: Connection) -> None:
    """Have the kernel end this process half a minute after its parent, if nothing else has.

    A library that does not return, and never gives the interpreter's lock back, stops all threads.
    When the other end of the pipe is closed, SIGIO comes, whose number is 29. It is handled by the
    C function alarm, which is so called with 29, and has SIGALRM end the process 29 seconds later.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGIO), ctypes.cast(libc.alarm, ctypes.c_void_p))
    fcntl = importlib.import_module("fcntl")  # other systems have none
    fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)
