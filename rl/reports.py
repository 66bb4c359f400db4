"""What is logged of an update, and who is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

from trustregion import NaturalTrustRegion

Log: TypeAlias = dict[str, Any]
Callback: TypeAlias = Callable[[Any, Log], Any]
"""A function of the agent and the log of an update; False ends the training."""


def as_callbacks(given: Callback | Iterable[Callback | None] | None) -> list[Callback]:
    """Return callbacks or loggers as a list, without None.

    Raises:
        TypeError: one that cannot be called with an agent and a log.

    """
    alone: Any = given
    several = isinstance(alone, Iterable) and not isinstance(alone, str) and not callable(alone)
    return [_checked(each) for each in (alone if several else [alone]) if each is not None]


def _checked(callback: Any) -> Callback:
    if isinstance(callback, type):
        name = callback.__name__
        raise TypeError(f"{name} is a class, not a callback: pass {name}(...)")
    if not callable(callback):
        raise TypeError(
            "a callback must be a function of the agent and the log, or a list of them, got"
            f" {callback!r}; for a file of the log, pass CSVLog(path)"
        )
    try:
        inspect.signature(callback).bind(None, None)
    except TypeError as error:
        raise TypeError(f"a callback gets the agent and the log: {callback!r}: {error}") from error
    except ValueError:  # a function in C may not say what it takes
        pass
    return callback


def stops(answers: Iterable[object]) -> bool:
    """Say whether one of the callbacks' answers ends the training: only False does."""
    return any(isinstance(each, bool | np.bool_) and not each for each in answers)


def state_of(part: Any) -> Any:
    """Return the state of a callback or collector; None where it has none to keep."""
    return part.state_dict() if hasattr(part, "state_dict") else None


def give_state(part: Any, state: Any) -> None:
    """Give a callback or collector the state of another one, if it takes any."""
    if state is not None and hasattr(part, "load_state_dict"):
        part.load_state_dict(state)


def progress_log(agent: Any, episodes: Any, steps: int, elapsed: float) -> Log:
    """Return what to log of a call of ``learn``, after some steps and seconds of it."""
    return {
        "time/steps": steps,
        "time/progress": agent.progress,
        "time/iterations": agent.iterations,
        "time/total_timesteps": agent.num_timesteps,
        "time/time_elapsed": elapsed,
        "time/fps": steps / elapsed,
        "rollout/ep_rew_mean": episodes.mean_return,
        "rollout/ep_len_mean": episodes.mean_length,
    }


def step_log(optimizer: NaturalTrustRegion) -> Log:
    """Return what to log of the last step, under stable-baselines3's keys and ``trust/*``."""
    info = optimizer.info
    assert info is not None  # after a step
    return {
        "train/policy_objective": info.new_loss,
        "train/kl_divergence_loss": info.kl,
        "train/is_line_search_success": float(info.accepted),
        "trust/delta": optimizer.param_groups[0]["delta"],
        "trust/status": info.status.value,
        "trust/rho": info.rho,
        "trust/predicted_reduction": info.predicted_reduction,
        "trust/actual_reduction": info.actual_reduction,
        "trust/cg_iterations": info.cg_iterations,
        "trust/cg_residual": info.cg_residual,
        "trust/backtracks": info.backtracks,
    }
