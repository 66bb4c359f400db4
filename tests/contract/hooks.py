"""Checks 17 to 22: hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .problem import Subject, clones, equal, same, start


def check_17(subject: Subject) -> None:
    """A step post-hook runs after each step, until it is removed."""
    run = start(subject)
    kept, seen = clones(run.params), []
    handle = run.optimizer.register_step_post_hook(lambda *_: seen.append(same(run.params, kept)))
    run.step()
    assert seen == [False], "it ran not once, or before the parameters had moved"
    run.step()
    handle.remove()
    run.step()
    assert len(seen) == 2


def check_18(subject: Subject) -> None:
    """A step pre-hook runs before each step and may replace its arguments."""
    run = start(subject)
    kept, seen = clones(run.params), []

    def before(own: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        seen.append(same(run.params, kept))
        return (own, run.closure), kwargs  # torch hands over self as the first argument

    def never() -> float:
        raise AssertionError("the hook's closure was not taken")

    handle = run.optimizer.register_step_pre_hook(before)
    run.optimizer.step(never)
    assert seen == [True]
    handle.remove()
    run.step()
    assert len(seen) == 1


def check_19(subject: Subject) -> None:
    """Hooks run in order: global before, own before, own after, global after."""
    order: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append(0)),
        register_optimizer_step_post_hook(lambda *_: order.append(5)),
    ]
    try:
        first, second = start(subject), start(subject)
        for run in (first, second):
            handles.append(run.optimizer.register_step_pre_hook(lambda *_: order.append(1)))
            handles.append(run.optimizer.register_step_post_hook(lambda *_: order.append(2)))
        first.step()
        assert order == [0, 1, 2, 5], order
        second.step()
        assert order == [0, 1, 2, 5, 0, 1, 2, 5], order
    finally:
        for handle in handles:
            handle.remove()
    first.step()
    assert len(order) == 8


def check_20(subject: Subject) -> None:
    """state_dict hooks: the first sees the optimizer, the second may change the result."""
    run = start(subject)
    seen = []

    def after(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "noted": 1}

    handles = [
        run.optimizer.register_state_dict_pre_hook(lambda o: seen.append(o is run.optimizer)),
        run.optimizer.register_state_dict_post_hook(after),
    ]
    assert run.optimizer.state_dict()["noted"] == 1
    assert seen == [True]
    for handle in handles:
        handle.remove()
    assert "noted" not in run.optimizer.state_dict()


def check_21(subject: Subject) -> None:
    """load_state_dict pre-hooks may change what is loaded; a prepended one is first."""
    run = start(subject, lr=0.5)
    state = run.optimizer.state_dict()

    def rated(lr: float) -> Callable[[Optimizer, dict[str, Any]], dict[str, Any]]:
        def hook(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "lr": lr} for group in given["param_groups"]]
            return {**given, "param_groups": groups}

        return hook

    run.optimizer.register_load_state_dict_pre_hook(rated(0.25))
    run.optimizer.register_load_state_dict_pre_hook(rated(0.125), prepend=True)
    run.optimizer.load_state_dict(state)
    assert run.optimizer.param_groups[0]["lr"] == 0.25
    assert state["param_groups"][0]["lr"] == 0.5, "the given state_dict was changed"


def check_22(subject: Subject) -> None:
    """A load_state_dict post-hook sees the loaded optimizer."""
    run = start(subject)
    run.step()
    state, seen = run.optimizer.state_dict(), []
    twin = start(subject)
    twin.optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(equal(o.state_dict(), state))
    )
    twin.optimizer.load_state_dict(copy.deepcopy(state))
    assert seen == [True], "it ran not once, or before the state was that which was loaded"
