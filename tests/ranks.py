"""Processes of one gloo group that run what a test asks of them, each its part."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# imported once, and forked; dynamo is what the first step would import
CONTEXT.set_forkserver_preload(["torch.distributed", "torch._dynamo", "trustregion.optim"])

HANG = 60.0  # seconds without an answer after which a process counts as hung


class Raised(NamedTuple):
    """What a task raised."""

    kind: str
    words: str
    trace: str


class Ended(NamedTuple):
    """A process that is no more."""

    exit_code: int | None


class Ranks:
    """The processes; a task is a function of a module, its first argument the rank."""

    def __init__(self, store: Path, size: int, timeout: float) -> None:
        self.workers = []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(there, store, rank, size, timeout))
            process.start()
            there.close()
            self.workers.append((process, here))

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what the task returned in each process, a ``Raised`` or an ``Ended``."""
        for _, pipe in self.workers:
            pipe.send((task, args))
        return [self._answer(*worker) for worker in self.workers]

    @staticmethod
    def _answer(process: Any, pipe: Any) -> Any:
        if not pipe.poll(HANG):
            raise TimeoutError("a process hangs")
        try:
            return pipe.recv()
        except EOFError:
            process.join(HANG)
            return Ended(process.exitcode)

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()  # which ends its loop
            process.join(HANG)
            if process.is_alive():
                process.kill()


@contextmanager
def started(store: Path, size: int = 2, timeout: float = 20.0) -> Iterator[Ranks]:
    """Start the processes; they wait ``timeout`` seconds for each other."""
    ranks = Ranks(store, size, timeout)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(pipe: Any, store: Path, rank: int, size: int, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            task, args = pipe.recv()
        except EOFError:
            os._exit(0)  # without waiting for a process that may have ended
        try:
            pipe.send(task(rank, *args))
        except BaseException as error:
            pipe.send(Raised(type(error).__name__, str(error), traceback.format_exc()))
