"""Copies of an environment in processes of their own, which may die or hang."""

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeAlias

from gymnasium.vector.utils import (
    CloudpickleWrapper,
    clear_mpi_env_vars,
    create_shared_memory,
    read_from_shared_memory,
)

from .answers import Env
from .copies import Copies, OnError, make_all, stop_all
from .faults import Failure
from .layout import ObservationLayout
from .stand import Spaces, Stand

Context: TypeAlias = Literal["fork", "spawn", "forkserver"]
_Memory: TypeAlias = "tuple[Spaces, Any, int, int]"  # spaces, memory, number of copies, which one
_GRACE = 2.0  # seconds that a process has to close its environment when nobody waits for it


def in_processes(
    factories: Sequence[Callable[[], Env]],
    limit: float | None = 60.0,
    on_error: OnError = "raise",
    context: Context | None = None,
) -> Copies:
    """Return copies, each in a process of its own.

    Args:
        factories: what makes each copy. It goes to the process by cloudpickle, unless that is a
            fork.
        limit: seconds that a process has for an answer, also for making its environment.
        on_error: see :func:`rl.make_envs`.
        context: how processes are started; None for the way of the system.

    Raises:
        EnvironmentFault: an environment could not be made.

    """
    start: Any = multiprocessing.get_context(context)
    n, hands = len(factories), [Worker(factories[0], start)]
    try:
        # Memory must be there before a process starts, so its size comes from one before them.
        spaces = make_all(hands, limit)
        stop_all(hands, limit)
        ObservationLayout(spaces.observations)  # refuses what could not be shared
        memory = create_shared_memory(spaces.observations, n, start)
        hands[:] = [Worker(f, start, (spaces, memory, n, i)) for i, f in enumerate(factories)]
        make_all(hands, limit)
    except BaseException:
        _end(hands)
        raise
    batch = read_from_shared_memory(spaces.observations, memory, n)
    copies = Copies(hands, spaces, batch, "async", limit, on_error)
    util.Finalize(copies, _end, (hands,), exitpriority=10)  # before multiprocessing ends them
    return copies


def _end(hands: Sequence[Worker]) -> None:
    """End processes that nobody has closed."""
    try:
        stop_all(hands, _GRACE)
    finally:  # after another Ctrl-C
        for hand in hands:
            hand.kill()


class Worker:
    """Holds a copy in another process.

    Args:
        factory: makes the environment.
        context: of multiprocessing.
        memory: where observations go.

    """

    idle = False
    _process: Any = None
    _asked = False  # to close its environment
    _pipe: Connection
    _line: Connection  # nothing is ever sent there: its end says that this process has ended

    def __init__(
        self, factory: Callable[[], Env], context: Any, memory: _Memory | None = None
    ) -> None:
        self._factory, self._context, self._memory = factory, context, memory
        # A fork inherits this end of the pipe, and would keep it open when this process dies.
        util.register_after_fork(self, Worker._forget)

    def start(self) -> None:
        """Start a process, which makes the environment; :meth:`receive` returns its spaces."""
        self._pipe, theirs = self._context.Pipe()
        line, self._line = self._context.Pipe(duplex=False)
        arguments = CloudpickleWrapper(self._factory), theirs, line, self._memory
        with clear_mpi_env_vars():
            self._process = self._context.Process(target=_work, args=arguments, daemon=True)
            self._process.start()
        theirs.close()
        line.close()
        self._ready = _waiter(self._pipe)

    def send(self, command: str, arguments: tuple[Any, ...]) -> None:
        """Send a command."""
        self.idle = False
        if command == "apply":
            arguments = CloudpickleWrapper(arguments[0]), *arguments[1:]
        try:
            self._pipe.send_bytes(pickle.dumps((command, arguments)))
        except OSError as error:
            raise Failure(self._death()) from error

    def receive(self, limit: float | None) -> Any:
        """Return the answer to the last command."""
        try:
            if limit is not None and not _in_time(self._ready, limit):
                self.kill()
                words = f"its process gave no answer for {limit:g} s and was ended (env_timeout)"
                raise Failure(words, late=True)
            fine, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise Failure(self._death()) from error
        if not fine:
            raise Failure(*answer)
        self.idle = True
        return answer

    def renew(self, limit: float | None) -> None:
        """End the process and start another one."""
        with suppress(Failure):
            self.release()
            self.stop(limit)
        self.start()
        self.receive(limit)

    def release(self) -> None:
        """Ask for the end of the environment; a process that owes an answer sees it on its own."""
        self._asked = self.idle
        if self.idle:
            with suppress(Failure):  # it is dead
                self.send("close", ())
        elif self._process is not None:
            self._pipe.close()

    def stop(self, limit: float | None) -> None:
        """Wait for the end of the process, and end it if that takes too long."""
        if self._process is None:
            return
        try:
            if self._asked:
                self.receive(limit)
                self._pipe.close()
                self._process.join(_GRACE)
                return
            self._process.join(_GRACE if limit is None else min(limit, _GRACE))
            if self._process.is_alive():
                raise Failure("its process was still busy, and was ended", late=True)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.idle = False
        if self._process is not None:
            self._forget()
            self._process.kill()
            self._process.join(_GRACE)  # one that waits for a broken disk cannot be ended
            with suppress(ValueError):
                self._process.close()
            self._process = None

    def _death(self) -> str:
        """Say how the process ended."""
        self._process.join(_GRACE)
        code = self._process.exitcode
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            names = {number.value: number.name for number in signal.Signals}
            how = f"was killed by {names.get(-code, f'signal {-code}')}"
        self.kill()
        return f"its process {how}"

    def _forget(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._line.close()


def _waiter(pipe: Connection) -> Callable[[float], Any]:
    """Return a function that waits for an answer for some seconds and says whether it is there."""
    if not hasattr(select, "poll"):
        return pipe.poll
    poll = select.poll()  # made once: a pipe's own poll() makes one whenever it is called
    poll.register(pipe, select.POLLIN)
    return lambda seconds: poll.poll(seconds * 1000)


def _in_time(ready: Callable[[float], Any], limit: float) -> bool:
    """Wait, a second at a time: of the time that this process is stopped, only one can pass."""
    while not ready(min(limit, 1.0)):
        limit -= 1.0
        if limit <= 0:
            return False
    return True


def _work(
    factory: CloudpickleWrapper[Env], pipe: Connection, line: Connection, memory: _Memory | None
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
        spaces, shared, n, i = memory
        space = spaces.observations
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
    time.sleep(_GRACE)
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
