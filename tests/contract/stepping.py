"""Checks 23 to 30: the rest of torch's suite."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from .problem import NotApplicable, Problem, Subject, clones, raised, same, squares, start, value
from .schedulers import SCHEDULERS


def check_23(subject: Subject) -> None:
    """deepcopy keeps the public attributes."""
    run = start(subject)
    run.step()

    def public(o: Optimizer) -> set[str]:
        return {name for name in vars(o) if not name.startswith("_")}

    lost = public(run.optimizer) - public(copy.deepcopy(run.optimizer))
    assert not lost, f"deepcopy loses {sorted(lost)}"


def check_24(subject: Subject) -> None:
    """A step returns one type, also where it ends early."""
    p = torch.ones(3, requires_grad=True)
    optimizer = subject.make([p])
    results = []
    for factor in (1.0, 0.0, 1e-30):

        def evaluate(factor: float = factor) -> tuple[Tensor, Tensor]:
            outputs = p * 1
            return factor * squares(outputs), outputs

        results.append(optimizer.step(subject.closure(optimizer, evaluate)))
    assert len({type(loss) for loss in results}) == 1, [type(loss).__name__ for loss in results]
    assert all(map(math.isfinite, results))


def check_25(subject: Subject) -> None:
    """Parameters of two dtypes are optimised, or refused by that word."""
    p, q = torch.ones(2, requires_grad=True), torch.ones(2).double().requires_grad_()
    kept = clones([p, q])

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = torch.cat([p.double(), q])
        return squares(outputs), outputs

    def step() -> None:
        optimizer = subject.make([p, q])
        optimizer.step(subject.closure(optimizer, evaluate))

    error = raised(step, TypeError, ValueError)
    if error is not None:
        assert "dtype" in str(error), error
        assert same([p, q], kept)
        return
    assert p.dtype is torch.float32
    assert q.dtype is torch.float64
    assert value(evaluate) < 1.0


def check_26(subject: Subject) -> None:
    """The state of a parameter is never an empty dictionary."""
    run = start(subject)
    run.step()
    entries = run.optimizer.state
    if not entries:
        raise NotApplicable("it keeps no state")
    assert all(len(entry) > 0 for entry in entries.values())


def check_27(subject: Subject) -> None:
    """A parameter of a million numbers: no matrix is formed."""
    p = torch.linspace(-1, 1, 2**20).requires_grad_()
    scale = torch.linspace(0.5, 2, 2**20)

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = p * scale
        return squares(outputs - 1), outputs

    before = value(evaluate)
    optimizer = subject.make([p])
    optimizer.step(subject.closure(optimizer, evaluate))
    assert value(evaluate) < before


def check_28(subject: Subject) -> None:
    """A step inside torch.compile is the step outside."""
    eager = start(subject)
    eager.step(2)
    run = start(subject)
    torch.compiler.reset()
    try:

        @torch.compile(backend="eager")
        def compiled() -> None:
            run.optimizer.step(run.closure)

        compiled()
        compiled()
    finally:
        torch.compiler.reset()
    for ours, expected in zip(run.params, eager.params, strict=True):
        torch.testing.assert_close(ours, expected)


def check_29(subject: Subject) -> None:
    """Every scheduler of torch gives the rates that it gives SGD."""
    for name, schedule in SCHEDULERS.items():
        run, plain = start(subject, lr=0.5), torch.optim.SGD([torch.ones(1)], lr=0.5)
        schedulers, rates = [schedule(run.optimizer), schedule(plain)], []
        for _ in range(5):
            plain.step()
            run.step()
            for scheduler in schedulers:
                stuck = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[1.0] * stuck)  # a loss that stays at 1
            rates.append([float(o.param_groups[0]["lr"]) for o in (run.optimizer, plain)])
        assert all(ours == sgd for ours, sgd in rates), f"{name}: {rates}"
        assert any(ours != 0.5 for ours, _ in rates), f"{name} does nothing: {rates}"


def check_30(subject: Subject) -> None:
    """Freezing and unfreezing, unused, 0-dimensional and empty parameters."""
    problem = Problem()
    scale, empty, unused = torch.tensor(1.0), torch.empty(0, 3), torch.ones(2)
    extra = [t.requires_grad_() for t in (scale, empty, unused)]

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = scale * problem.evaluate()[1] + empty.sum()
        return squares(outputs - problem.y), outputs

    optimizer = subject.make([*problem.params, *extra])
    closure, first = subject.closure(optimizer, evaluate), problem.params[0]
    optimizer.step(closure)
    assert scale.item() != 1.0
    frozen = clones([first])[0]
    first.requires_grad_(False)
    first.grad = None
    before = value(evaluate)
    optimizer.step(closure)
    assert torch.equal(first, frozen), "a frozen parameter moved"
    assert value(evaluate) < before
    first.requires_grad_(True)
    optimizer.step(closure)
    assert not torch.equal(first, frozen), "an unfrozen parameter stays"
    assert torch.equal(unused, torch.ones(2))
