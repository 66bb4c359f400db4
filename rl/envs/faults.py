"""What is said of an environment that failed."""

from __future__ import annotations

import reprlib
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np


class EnvironmentFault(ValueError):
    """An environment raised, died, hung, or gave an answer that nothing can be learnt from.

    The message names the environment, the step or reset, the action and the seed. The environment's
    own exception is the cause; of one in another process, there is a note with the traceback.

    Attributes:
        index: which of the copies it was.
        trace: the traceback of the environment's exception, if it raised one.

    """

    index: int = 0
    trace: str = ""


class Failure(Exception):
    """Why an environment gave no answer, in words, and the traceback of its process."""

    def __init__(self, reason: str, trace: str = "", *, late: bool = False) -> None:
        super().__init__(reason)
        self.trace, self.late = trace, late

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the failure that an exception is."""
        text = " ".join(str(error).split())
        name = type(error).__name__
        trace = "".join(traceback.format_exception(error))
        return cls(f"{name}: {text}" if text else name, trace)


@dataclass
class Place:
    """Where a copy of an environment is in its life, which repeats from there.

    Attributes:
        index: which of the copies it is.
        seed: seed of the last reset that had one.
        episode: number of resets since then.
        began: count of all steps before the episode began.

    """

    index: int
    seed: int | None = None
    episode: int = 0
    began: int = 0

    def begin(self, seed: int | None, step: int) -> None:
        """Note a reset."""
        self.episode = self.episode + 1 if seed is None else 1
        self.seed = self.seed if seed is None else seed
        self.began = step

    def seed_of_the_next(self, renewals: int) -> int | None:
        """Return a seed for the copy in place of this one; None if this one never had one."""
        if self.seed is None:
            return None
        return int(np.random.SeedSequence((self.seed, renewals)).generate_state(1)[0])

    def fault(
        self, command: str, arguments: tuple[Any, ...], failure: Failure, step: int = 0
    ) -> EnvironmentFault:
        """Return the error that says what failed here, by the count of all steps."""
        life = f"episode {self.episode} from seed {self.seed}"
        if command == "step":
            where = f"at step {step - self.began - 1} of {life}, on action {short(*arguments)}"
        elif command == "reset":
            where = f"at the reset of {life}"
        elif command in ("call", "apply"):
            where = f"in {getattr(arguments[0], '__name__', arguments[0])}()"
        else:
            where = {"make": "when it was made", "close": "to close"}[command]
        fault = EnvironmentFault(f"environment {self.index} failed {where}: {failure}")
        fault.index, fault.trace = self.index, failure.trace
        fault.__cause__ = failure.__cause__
        if failure.trace and failure.__cause__ is None:
            fault.add_note(f"In its process:\n{failure.trace.rstrip()}")
        return fault


def short(values: Any) -> str:
    """Return numbers in words, without the end of a long list."""
    plain = values.tolist() if isinstance(values, np.ndarray | np.generic) else values
    return reprlib.repr(plain)
