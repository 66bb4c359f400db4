"""The loop that every algorithm shares, collect, update, report, and what it needs to go on."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .build import environment_seed
from .envs.stepper import Stepper
from .experience.collector import Collector
from .experience.path import Path
from .interrupts import deferred_interrupts, surely
from .matching import check_types
from .reports import Callback, Log, give_state, progress_log, state_of, stops
from .threads import few_threads
from .undo import undone_on_error

_NONE = type(None)
_STATE = {
    "n_envs": int,
    "call": (dict, _NONE),
    "collector": (dict, _NONE),
    "callbacks": list,
    "running_rewards": (torch.Tensor, _NONE),
}
# what a state of other environments raises somewhere in them
_MISFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Call:
    """A call of ``learn``: the step that it began at, how many it makes, its seconds so far."""

    first: int
    total: int
    elapsed: float = 0.0


class Training:
    """The training of an agent.

    A checkpoint holds it, so that a run that is resumed goes on as if it had never stopped. What it
    says of environments and callbacks is kept until there are some.

    Args:
        agent: who learns.
        make_collector: makes what collects, from a stepper.

    Attributes:
        collector: what collects; None before the first path.
        call: the last call of ``learn``.
        thread: the thread that is in ``learn``, if any.

    """

    def __init__(self, agent: Any, make_collector: Callable[..., Collector]) -> None:
        self.agent, self._make_collector = agent, make_collector
        self.collector: Collector | None = None
        self.call: Call | None = None
        self.thread: int | None = None
        self._callbacks: list[Callback] = []
        self._left: dict[str, Any] = {"collector": None, "callbacks": []}  # by a checkpoint

    @property
    def progress(self) -> float:
        """The share of the call's steps that are made, at most 1."""
        if self.call is None:
            return 0.0
        return min((self.agent.num_timesteps - self.call.first) / self.call.total, 1.0)

    def learn(
        self,
        total_timesteps: int | None,
        progress: bool,
        callbacks: list[Callback],
        loggers: list[Callback],
    ) -> None:
        """Collect, update, report, until the steps are made or a callback stops."""
        from tqdm import tqdm

        agent, call = self.agent, self._begin(total_timesteps, [*callbacks, *loggers])
        grad_enabled = torch.is_grad_enabled()
        before, started = call.elapsed, time.perf_counter()
        made, self.thread = agent.num_timesteps - call.first, threading.get_ident()
        bar = tqdm(total=call.total, initial=made, unit="step", disable=not progress, leave=False)
        try:
            while made < call.total:
                collector = self._collecting()
                with few_threads(agent.policy, agent.critic):
                    rows = agent.config.steps_per_update // agent.config.n_envs
                    path = collector.collect(agent.policy, rows, version=agent.iterations)
                with deferred_interrupts():  # an update that is made is also reported
                    log = self._update(path)
                    made = agent.num_timesteps - call.first
                    call.elapsed = before + time.perf_counter() - started
                    bar.update(min(made, call.total) - bar.n)
                    log = progress_log(agent, collector.episodes, made, call.elapsed) | log
                    if np.any(restarts := getattr(agent.envs, "renewals", 0)):
                        log["time/env_restarts"] = int(np.sum(restarts))
                    answers = [callback(agent, log) for callback in callbacks]
                    for write in loggers:
                        write(agent, log)
                if stops(answers):
                    break
        finally:
            self.thread = None
            # an interrupt may come as no_grad turns it off
            surely(lambda: torch.set_grad_enabled(grad_enabled))
            bar.close()

    def _update(self, path: Path) -> Log:
        """Learn from a path: wholly, or not at all.

        The moments of observations move after the update: the surrogate sees those that the actions
        were chosen from. The scale of rewards moves first: the critic is to know it from its first
        fit on.
        """
        agent = self.agent
        scale = agent.reward_scale
        networks = (agent.policy, agent.critic, *([] if scale is None else [scale]))
        with (
            few_threads(agent.policy, agent.critic),
            undone_on_error(*networks, optimizers=agent.optimizers().values()),
        ):
            if scale is not None:
                scale.update(path)
            log = agent.update(path if scale is None else scale(path))
            if agent.observation_norm is not None:
                agent.observation_norm.update(path.rows[:, agent.layout.vector_columns])
            steps = agent.num_timesteps + path.steps
            # no call lies between these, and so no interrupt
            agent.num_timesteps, agent.iterations = steps, agent.iterations + 1
        return log

    def _begin(self, total_timesteps: int | None, callbacks: list[Callback]) -> Call:
        """Return the call that begins, or the one that goes on, where no steps are given.

        Raises:
            ValueError: none is unfinished, or the steps are not positive.

        """
        if total_timesteps is not None:
            if total_timesteps <= 0:
                raise ValueError(f"total_timesteps must be positive, got {total_timesteps}")
            self.call = Call(self.agent.num_timesteps, total_timesteps)
        elif self.call is None or self.progress >= 1:
            raise ValueError("no call of learn() was left unfinished: pass total_timesteps")
        else:
            self._restore(callbacks)
        self._callbacks, self._left["callbacks"] = callbacks, []
        return self.call

    def _restore(self, callbacks: list[Callback]) -> None:
        """Give callbacks the states of a checkpoint: to each the next one of its class."""
        states = list(self._left["callbacks"])
        for callback in callbacks:
            found = [entry for entry in states if entry[0] == type(callback).__qualname__]
            if found:
                states.remove(found[0])
                give_state(callback, found[0][1])

    def _collecting(self) -> Collector:
        """Return what collects, made when it is first needed."""
        if self.collector is None:
            agent, state = self.agent, self._left["collector"]
            seed = environment_seed(agent.config, agent.num_timesteps)
            self.collector = collector = self._make_collector(
                Stepper(agent.envs), agent.layout, seed=seed, generator=agent.generator
            )
            self._left["collector"] = None
            if state is not None:
                try:
                    give_state(collector, state)
                except _MISFIT as error:
                    warnings.warn(f"all episodes restart: {error}", stacklevel=4)
                    give_state(collector, state | {"environments": None})
        return self.collector

    def check_thread(self) -> None:
        """Raise a RuntimeError where another thread is in ``learn``: the agent is half updated."""
        if self.thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "another thread is training this agent: save it in a callback of learn, between"
                " two updates"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the training as plain values and tensors.

        Where the state of the environments is hidden, all episodes restart: the run that goes on
        and a run that is resumed then start the same ones.
        """
        state = self._left["collector"]
        if self.collector is not None:
            state = state_of(self.collector)
            if state is None or state["environments"] is None:
                self._left["collector"] = state  # the statistics of episodes
                self.agent.close()  # and new environments, unless they were passed in
                self.collector = None
        states = [(type(c).__qualname__, state_of(c)) for c in self._callbacks]
        scale = self.agent.reward_scale
        return {
            "n_envs": self.agent.config.n_envs,
            "call": None if self.call is None else asdict(self.call),
            "collector": state,
            "callbacks": [e for e in states if e[1] is not None] + self._left["callbacks"],
            "running_rewards": None if scale is None else scale.running,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        check_types(state, _STATE, "the run")
        call = state["call"]
        if call is not None:
            check_types(call, {"first": int, "total": int, "elapsed": float}, "the call of learn")
            if call["total"] <= 0:
                raise ValueError(f"a call of learn of {call['total']} steps")
        self.call = None if call is None else Call(call["first"], call["total"], call["elapsed"])
        self._left = {"collector": state["collector"], "callbacks": state["callbacks"]}
        if state["n_envs"] != self.agent.config.n_envs:
            self._left["collector"] = None  # episodes of other copies
        elif state["running_rewards"] is not None and self.agent.reward_scale is not None:
            self.agent.reward_scale.running.copy_(state["running_rewards"])
