"""Copies of an environment, stepped as one vector environment."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import reduce
from operator import getitem
from typing import Any, Literal, TypeAlias

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from .answers import Env
from .batches import leaves
from .faults import EnvironmentFault, Failure, Place, short
from .hands import Hand, stop_all
from .stand import Spaces

OnError: TypeAlias = Literal["raise", "restart"]
_Question: TypeAlias = "tuple[str, tuple[Any, ...]]"
_AT_MOST = 3  # faults of one copy without a good step between them; the next one is raised
_RESET: _Question = ("reset", (None, None))


class Copies(VectorEnv):
    """Copies of an environment with next-step autoreset; a fault is an :class:`EnvironmentFault`.

    A reset recreates those that have failed, or that were interrupted while they owed an answer.
    A new copy that would be reset without a seed gets one that follows from that of the old one.

    Args:
        hands: what holds the copies.
        spaces: of one of them.
        batch: observations of all, which the hands write to.
        how: where they are: ``"sync"`` in this process, ``"async"`` in processes of their own.
        limit: seconds for an answer; None for no limit.
        on_error: see :func:`rl.make_envs`.

    Attributes:
        limit: as above. It may be assigned.
        autoreset: bool ``(N,)``: which copies the next step resets. It may be assigned.
        renewals: how often each copy was recreated, ``(N,)``.

    """

    def __init__(
        self,
        hands: Sequence[Hand],
        spaces: Spaces,
        batch: Any,
        how: Literal["sync", "async"],
        limit: float | None,
        on_error: OnError,
    ) -> None:
        n = self.num_envs = len(hands)
        self.hands, self.how = hands, how
        self.single_observation_space, self.single_action_space = spaces[:2]
        self.observation_space, self.action_space = (batch_space(s, n) for s in spaces[:2])
        self.metadata = {**spaces.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.render_mode = spaces.render_mode
        self.autoreset, self.renewals = np.zeros(n, np.bool_), np.zeros(n, np.int64)
        self.limit, self._on_error, self._batch = limit, on_error, batch
        self._leaves = [reduce(getitem, path, batch) for path, _ in leaves(spaces.observations)]
        self._real = [array for array in self._leaves if array.dtype.kind == "f"]
        self._steps = 0
        self._last: list[np.ndarray] | None = None  # the leaves before a step, to restart from
        self._places = [Place(i) for i in range(n)]
        self._in_a_row = [0] * n  # faults without a good step

    @property
    def envs(self) -> list[Env]:
        """The copies, if they are in this process; an AttributeError otherwise."""
        return [hand.env for hand in self.hands]  # pyright: ignore[reportAttributeAccessIssue]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, environment ``i`` from ``seed + i`` or from the ``i``-th of seeds."""
        n, options = self.num_envs, dict(options or {})
        mask = np.broadcast_to(options.pop("reset_mask", True), n)
        seeds = seed if isinstance(seed, Sequence) else [seed] * n
        if seed is not None and not isinstance(seed, Sequence):
            seeds = [int(seed) + i for i in range(n)]
        pairs = zip(mask, seeds, strict=True)
        asked = [("reset", (own, options or None)) if chosen else None for chosen, own in pairs]
        answers = self._answers(asked)
        self.autoreset = self.autoreset & ~mask
        return self._batch, self._merged(answers)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every copy, or reset it where its episode ended; observations are overwritten."""
        pairs = zip(iterate(self.action_space, actions), self.autoreset.tolist(), strict=True)
        asked = [_RESET if over else ("step", (action,)) for action, over in pairs]
        self._steps += 1
        answers = self._answers(asked)
        rewards, terminated, truncated, infos = zip(*answers, strict=True)
        ends = np.array([terminated, truncated], np.bool_)
        self.autoreset = ends[0] | ends[1]
        merged = self._merged(answers) if any(infos) else {}
        return self._batch, np.array(rewards, np.float64), *ends, merged

    def apply(self, function: Callable[..., Any], each: Iterable[Any] | None = None) -> list[Any]:
        """Return ``function(env)`` of every copy, or ``function(env, argument)`` of one for each.

        The function, its arguments and its answer travel by cloudpickle to copies in processes.
        """
        arguments = [()] * self.num_envs if each is None else [(x,) for x in each]
        if len(arguments) != self.num_envs:
            raise ValueError(f"there must be {self.num_envs} arguments, got {len(arguments)}")
        answers, faults = self._ask([("apply", (function, *own)) for own in arguments])
        _raise(faults)
        return answers

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return an attribute of every copy, or what it returns if it is a method."""
        answers, faults = self._ask([("call", (name, args, kwargs))] * self.num_envs)
        _raise(faults)
        return tuple(answers)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return an attribute of every copy."""
        return self.call(name)

    def render(self) -> tuple[Any, ...]:
        """Return a picture of every copy."""
        return self.call("render")

    def close_extras(self, limit: float | None = None, **_: Any) -> None:
        """End all copies; a warning names one that failed to, and whose process was ended."""
        stop_all(self.hands, self.limit if limit is None else limit)

    def _merged(self, answers: list[Any]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for i, answer in enumerate(answers):
            if answer is not None and answer[3]:
                infos = self._add_info(infos, answer[3], i)
        return infos

    def _answers(self, asked: list[Any]) -> list[Any]:
        """Return answers to steps and resets, or raise the first fault, or restart those with one.

        An answer is ``(reward, terminated, truncated, info)``; None where nothing was asked.
        """
        answers, faults = self._finite(asked)
        if self._on_error == "raise":
            _raise(faults)
            return answers
        for i, fault in faults.items():
            answers[i] = self._restarted(i, asked, fault)
        for i, question in enumerate(asked):
            if question is not None and question[0] == "step" and i not in faults:
                self._in_a_row[i] = 0
        self._last = deepcopy(self._leaves)
        return answers

    def _ask(self, asked: list[Any]) -> tuple[list[Any], dict[int, EnvironmentFault]]:
        """Ask the copies, all before the first answer is awaited; return answers and faults."""
        if self.closed:
            raise ValueError("the environments are closed")
        answers: list[Any] = [None] * self.num_envs
        faults: dict[int, EnvironmentFault] = {}
        hands, left = self.hands, self.limit
        for i, question in enumerate(asked):
            if question is None:
                continue
            command, arguments = question
            try:
                if command == "reset":
                    arguments = self._begin(i, *arguments)
                elif not hands[i].idle:
                    raise Failure("it failed before, or was interrupted: reset the environments")
                hands[i].send(command, arguments)
            except Failure as failure:
                faults[i] = self._fault(i, question, failure)
        for i, question in enumerate(asked):
            if question is None or i in faults:
                continue
            try:
                answers[i] = hands[i].receive(left)
            except Failure as failure:
                faults[i] = self._fault(i, question, failure)
                left = 0.0 if failure.late else left  # all of them had that time
        return answers, faults

    def _begin(self, i: int, seed: int | None, options: Any) -> tuple[int | None, Any]:
        """Make a copy ready for a reset, and return what it is to be given."""
        hand, place = self.hands[i], self._places[i]
        if not hand.idle:
            hand.renew(self.limit)
            self.renewals[i] += 1
            seed = place.seed_of_the_next(int(self.renewals[i])) if seed is None else seed
        place.begin(seed, self._steps)
        return seed, options

    def _finite(self, asked: list[Any]) -> tuple[list[Any], dict[int, EnvironmentFault]]:
        """Ask for steps and resets; an observation or reward that is not finite is a fault."""
        answers, faults = self._ask(asked)
        # A product or sum that overflows only costs a look at each number.
        reals = [x for x in self._real if not math.isfinite(np.vdot(x, x))]
        if not reals and math.isfinite(sum([a[0] for a in answers if a is not None])):
            return answers, faults
        for i, answer in enumerate(answers):
            if answer is None:
                continue
            bad = next((array[i] for array in reals if not np.isfinite(array[i]).all()), None)
            reason = f"observation is NaN or infinite: {short(bad)}"
            if bad is None and not math.isfinite(answer[0]):
                bad, reason = answer, f"reward is NaN or infinite: {answer[0]}"
            if bad is not None:
                self.hands[i].idle = False
                faults[i] = self._fault(i, asked[i], Failure(reason))
        return answers, faults

    def _fault(self, i: int, question: _Question, failure: Failure) -> EnvironmentFault:
        return self._places[i].fault(*question, failure, self._steps)

    def _restarted(self, i: int, asked: list[Any], fault: EnvironmentFault) -> Any:
        """Return an answer in place of a fault: a truncated episode, or that of another reset."""
        self._count(i, fault)
        command, arguments = asked[i]
        if command == "step":
            if self._last is None:
                raise fault
            for array, last in zip(self._leaves, self._last, strict=True):
                array[i] = last[i]
            return 0.0, False, True, {}
        alone: list[Any] = [None] * self.num_envs
        while True:
            alone[i] = "reset", (None, arguments[1])  # not from the seed that it failed with
            answers, faults = self._finite(alone)
            if not faults:
                return answers[i]
            self._count(i, faults[i])

    def _count(self, i: int, fault: EnvironmentFault) -> None:
        self._in_a_row[i] += 1
        if self._in_a_row[i] > _AT_MOST:
            fault.add_note(f"It was recreated {_AT_MOST} times without a good step in between.")
            raise fault
        words = f"{fault}. It is recreated, and its episode counts as truncated"
        warnings.warn(words, RuntimeWarning, stacklevel=2)


def _raise(faults: dict[int, EnvironmentFault]) -> None:
    if faults:
        first, *others = sorted(faults)
        if others:
            faults[first].add_note(f"Others failed, too: {', '.join(map(str, others))}.")
        raise faults[first]
