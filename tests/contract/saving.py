"""Checks 10 to 16: saved state."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from .problem import NotApplicable, Problem, Subject, equal, every_input, resumed, same, start


def check_10(subject: Subject) -> None:
    """A state_dict continues a run exactly, with and without names and a scheduler."""
    for options in every_input(subject):
        continues(subject, options, "")
    continues(subject, {}, "named")
    if "lr" in start(subject).optimizer.param_groups[0]:
        continues(subject, {}, "", scheduled=True)


def continues(
    subject: Subject, options: dict[str, Any], given: str, *, scheduled: bool = False
) -> None:
    """Demand that a run from a saved state takes the same five steps as the saved one."""
    problem = Problem()
    run = start(subject, problem, given=problem.named if given else None, **options)
    scheduler = lr_scheduler.StepLR(run.optimizer, 7) if scheduled else None
    for _ in range(5):
        run.step()
        if scheduler:
            scheduler.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    twin = resumed(subject, run, state, given, **options)
    for _ in range(5):
        run.step()
        twin.step()
        assert same(twin.params, run.params), f"the steps differ; options {options}"
    assert equal(twin.optimizer.state_dict(), run.optimizer.state_dict()), "the states differ"


def check_11(subject: Subject) -> None:
    """Repeated groups have one representation in the state_dict."""
    run = start(subject)
    run.step()
    last = run.optimizer.state_dict()["param_groups"][-1]
    run.optimizer.param_groups.extend(run.optimizer.param_groups)
    assert run.optimizer.state_dict()["param_groups"][-1] == last


def check_12(subject: Subject) -> None:
    """An older state_dict, without an option that came later, loads and steps."""
    run = start(subject)
    run.step()
    state = run.optimizer.state_dict()
    for option in [k for k in state["param_groups"][0] if k not in ("params", "lr")]:
        older = copy.deepcopy(state)
        for group in older["param_groups"]:
            del group[option]
        twin = resumed(subject, run, older)
        assert option in twin.optimizer.param_groups[0], f"{option} was not filled in"
        twin.step()


def check_13(subject: Subject) -> None:
    """State with names loads into an optimizer without, and the other way round."""
    for given, into in (("named", ""), ("", "named")):
        problem = Problem()
        run = start(subject, problem, given=problem.named if given else None)
        run.step(2)
        twin = resumed(subject, run, copy.deepcopy(run.optimizer.state_dict()), into)
        assert twin.optimizer.param_groups[0]["param_names"] == problem.names
        run.step()
        twin.step()
        assert same(twin.params, run.params), "the steps differ"


def check_14(subject: Subject) -> None:
    """torch.save and torch.load(weights_only=True) return the state_dict."""
    for options in every_input(subject):
        run = start(subject, **options)
        run.step(3)
        file = io.BytesIO()
        torch.save(run.optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert equal(loaded, run.optimizer.state_dict()), options
        twin = resumed(subject, run, loaded, **options)
        run.step()
        twin.step()
        assert same(twin.params, run.params), f"the steps differ; options {options}"


def check_15(subject: Subject) -> None:
    """A step count that is a number and not a tensor loads."""
    run = start(subject)
    run.step(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    found = False
    for entry in state.get("state", {}).values():
        if isinstance(entry.get("step"), Tensor):
            entry["step"], found = entry["step"].item(), True
    if not found:
        raise NotApplicable("its state has no step count in a tensor")
    twin = resumed(subject, run, state)
    run.step()
    twin.step()
    assert same(twin.params, run.params)


def check_16(subject: Subject) -> None:
    """State follows parameters of another dtype, or on CUDA; the loaded dictionary stays."""
    targets = [("cpu", torch.float64)]
    if torch.cuda.is_available():
        targets.append(("cuda", torch.float32))
    for device, dtype in targets:
        run = start(subject)
        run.step(2)
        state = copy.deepcopy(run.optimizer.state_dict())
        kept = copy.deepcopy(state)
        twin = start(subject, Problem().to(device, dtype))
        twin.optimizer.load_state_dict(state)
        assert equal(state, kept)
        for entry in twin.optimizer.state.values():
            for key, part in entry.items():
                if not isinstance(part, Tensor):
                    continue
                if key == "step":
                    assert (part.device.type, part.dtype) == ("cpu", torch.float32), "step moved"
                else:
                    assert part.device.type == device, key
                    assert part.dtype == dtype or not part.is_floating_point(), key
        twin.step()
