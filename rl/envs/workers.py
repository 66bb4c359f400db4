"""Copies of an environment in processes of their own, which may die or hang."""

from __future__ import annotations

import multiprocessing
import pickle
import select
import signal
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
from .copies import Copies, OnError
from .faults import Failure
from .hands import make_all, stop_all
from .layout import ObservationLayout
from .worker_process import GRACE, Memory, work

Context: TypeAlias = Literal["fork", "spawn", "forkserver"]


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
        space = spaces.observations
        stop_all(hands, limit)
        ObservationLayout(space)  # refuses what could not be shared
        memory = create_shared_memory(space, n, start)
        hands[:] = [Worker(f, start, (space, memory, n, i)) for i, f in enumerate(factories)]
        make_all(hands, limit)
    except BaseException:
        _end(hands)
        raise
    batch = read_from_shared_memory(space, memory, n)
    copies = Copies(hands, spaces, batch, "async", limit, on_error)
    util.Finalize(copies, _end, (hands,), exitpriority=10)  # before multiprocessing ends them
    return copies


def _end(hands: Sequence[Worker]) -> None:
    """End processes that nobody has closed."""
    try:
        stop_all(hands, GRACE)
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
    _ends: tuple[Connection, ...] = ()  # what must be closed for the process to end on its own
    _pipe: Connection

    def __init__(
        self, factory: Callable[[], Env], context: Any, memory: Memory | None = None
    ) -> None:
        self._factory, self._context, self._memory = factory, context, memory
        # A fork inherits these ends of pipes, and would keep them open when this process dies.
        util.register_after_fork(self, Worker._forget)

    def start(self) -> None:
        """Start a process, which makes the environment; :meth:`receive` returns its spaces."""
        self._pipe, theirs = self._context.Pipe()
        line, end = self._context.Pipe(duplex=False)  # of which only the end is of interest
        self._ends = self._pipe, end
        arguments = CloudpickleWrapper(self._factory), theirs, line, self._memory
        process = self._context.Process(target=work, args=arguments, daemon=True)
        with clear_mpi_env_vars():
            process.start()
        self._process = process
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
        except OSError:
            raise Failure(self._death()) from None

    def receive(self, limit: float | None) -> Any:
        """Return the answer to the last command."""
        try:
            if limit is not None and not _in_time(self._ready, limit):
                self.kill()
                words = f"its process gave no answer for {limit:g} s and was ended (env_timeout)"
                raise Failure(words, late=True)
            fine, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise Failure(self._death()) from None
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
                self._process.join(GRACE)
                return
            self._process.join(GRACE if limit is None else min(limit, GRACE))
            if self._process.is_alive():
                raise Failure("its process was still busy, and was ended", late=True)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.idle = False
        self._forget()
        if self._process is not None:
            self._process.kill()
            self._process.join(GRACE)  # one that waits for a broken disk cannot be ended
            with suppress(ValueError):
                self._process.close()
            self._process = None

    def _death(self) -> str:
        """Say how the process ended."""
        self._process.join(GRACE)
        code = self._process.exitcode
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            names = {number.value: number.name for number in signal.Signals}
            how = f"was killed by {names.get(-code, f'signal {-code}')}"
        self.kill()
        return f"its process {how}"

    def _forget(self) -> None:
        for end in self._ends:
            end.close()


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
