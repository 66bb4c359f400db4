"""Checks 1 to 9: construction and the simplest steps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from .problem import (
    NotApplicable,
    Problem,
    Subject,
    clones,
    every_input,
    groups_or_not_applicable,
    raised,
    same,
    squares,
    start,
    value,
)


def check_01(subject: Subject) -> None:
    """Construction errors are torch's."""
    for desc, params, options, kind, words in construction_errors():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            error = raised(lambda p=params, o=options: subject.make(p, **o), kind, NotApplicable)
        if isinstance(error, NotApplicable):
            continue  # it has no such option
        assert error is not None, f"{desc}: no {kind.__name__}"
        assert re.search(words, str(error)), f"{desc}: {error}"


def construction_errors() -> Iterator[tuple[str, Any, dict[str, Any], type[Exception], str]]:
    """Yield the entries of torch's ``get_error_inputs_for_all_optims``."""
    p, q = (nn.Parameter(torch.ones(1, 1)) for _ in range(2))
    yield "invalid param type", p, {}, TypeError, "should be an iterable of Tensors or dicts"
    duplicate = "a parameter group with duplicate parameters"
    yield "duplicates in a group", [p, p], {}, UserWarning, duplicate
    both = [{"params": p}, {"params": p}]
    words = "some parameters appear in more than one parameter group"
    yield "duplicates across groups", both, {}, ValueError, words
    lr = {"lr": torch.tensor([1e-3, 1e-3])}
    yield "Tensor lr of two elements", [p], lr, ValueError, "Tensor lr must be 1-element"
    words = "all optimizer params should be with/without names"
    yield "names for some", [("weight", p), q], {}, ValueError, words
    mixed = [{"params": [p], "lr": 1e-2}, {"params": [("weight", q)]}]
    words = "all optimizer param groups should be with/without names"
    yield "names for some groups", mixed, {}, ValueError, words


Schedule = Callable[[Optimizer], Any]


def check_02(subject: Subject) -> None:
    """Twenty steps go in the right direction, contiguous or not, with and without schedulers."""
    schedules: list[Schedule] = [
        lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
        lambda o: lr_scheduler.ReduceLROnPlateau(o),
    ]
    for options in every_input(subject):
        goes_right(subject, options)
    goes_right(subject, {}, contiguous=False)
    for schedule in schedules if _has_lr(subject) else []:  # check 29 says so where it has none
        for contiguous in (True, False):
            goes_right(subject, {}, contiguous=contiguous, schedule=schedule)


def _has_lr(subject: Subject) -> bool:
    return "lr" in subject.make([torch.ones(1, requires_grad=True)]).param_groups[0]


def goes_right(
    subject: Subject,
    options: dict[str, Any],
    *,
    contiguous: bool = True,
    schedule: Schedule | None = None,
) -> None:
    """Demand that twenty steps lower the loss, or raise it where it is to be maximised."""
    weight, bias, x = torch.randn(10, 5, 2), torch.randn(10, 2), torch.randn(5)
    params = [t[..., 0].clone() if contiguous else t[..., 0] for t in (weight, bias)]
    params = [p.requires_grad_() for p in params]
    assert params[0].is_contiguous() == contiguous

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = params[0].mv(x) + params[1]
        return outputs.square().sum(), outputs

    before = value(evaluate)
    optimizer = subject.make(params, **options)
    scheduler = schedule(optimizer) if schedule else None
    closure = subject.closure(optimizer, evaluate)
    for _ in range(20):
        loss = optimizer.step(closure)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler is not None:
            scheduler.step()
    after = value(evaluate)
    right = after > before if options.get("maximize") else after < before
    assert right, f"{options}: {before} -> {after}"


def check_03(subject: Subject) -> None:
    """A parameter group has its own lr, and stays at lr 0."""
    problem = Problem()
    with groups_or_not_applicable():
        groups = [{"params": problem.params[:2], "lr": 0.0}, {"params": problem.params[2:3]}]
        run = start(subject, problem, given=groups)
        run.optimizer.add_param_group({"params": problem.params[3:], "lr": 0.25})
    before, loss = clones(problem.params), value(problem.evaluate)
    run.step(20)
    assert run.optimizer.param_groups[0]["lr"] == 0.0
    assert run.optimizer.param_groups[2]["lr"] == 0.25
    assert same(problem.params[:2], before[:2])
    assert not torch.equal(problem.params[2], before[2])
    assert not torch.equal(problem.params[3], before[3])
    assert value(problem.evaluate) < loss


def check_04(subject: Subject) -> None:
    """A Tensor lr does as a float lr, and stays a Tensor."""
    results = []
    for lr in (0.5, torch.tensor(0.5), 0.25):
        run = start(subject, lr=lr)
        run.step(3)
        assert isinstance(run.optimizer.param_groups[0]["lr"], type(lr))
        results.append(clones(run.params))
    assert same(*results[:2])
    assert not same(*results[1:]), "lr does nothing"


def check_05(subject: Subject) -> None:
    """Complex parameters do as their real views, or are refused by that word."""
    _check_complex(subject, (5, 5), lambda z: [torch.view_as_real(z)])


def check_06(subject: Subject) -> None:
    """The same with real and imaginary parts as two parameters."""
    _check_complex(subject, (2,), lambda z: [z.real, z.imag])


def _check_complex(
    subject: Subject, shape: tuple[int, ...], split: Callable[[Tensor], list[Tensor]]
) -> None:
    z = torch.randn(shape, dtype=torch.complex64)
    parts = [part.clone().requires_grad_() for part in split(z)]
    z = z.clone().requires_grad_()

    def distance(z: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.view_as_real(z - (1 + 2j)).flatten()
        return squares(outputs), outputs

    def evaluate_parts() -> tuple[Tensor, Tensor]:
        whole = torch.view_as_complex(parts[0]) if len(parts) == 1 else torch.complex(*parts)
        return distance(whole)

    before = value(evaluate_parts)
    real = subject.make(parts)
    real_closure = subject.closure(real, evaluate_parts)
    error = raised(lambda: subject.make([z]), TypeError, ValueError)
    assert error is None or "complex" in str(error), error
    if error is not None:  # the way around, real parameters under view_as_complex, works
        real.step(real_closure)
        assert value(evaluate_parts) < before
        return
    optimizer = subject.make([z])
    closure = subject.closure(optimizer, lambda: distance(z))
    for _ in range(3):
        optimizer.step(closure)
        real.step(real_closure)
        for part, own in zip(split(z.detach()), parts, strict=True):
            # torch's own tolerance for L-BFGS: sums run in another order
            torch.testing.assert_close(part, own.detach(), rtol=5e-5, atol=5e-5)
    assert value(evaluate_parts) < before


def check_07(subject: Subject) -> None:
    """Where no parameter takes a gradient, nothing moves."""
    params = [torch.randn(2, 3) for _ in range(2)]
    kept = clones(params)

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = params[0] + params[1]
        return squares(outputs), outputs

    def step() -> None:
        optimizer = subject.make(params)
        optimizer.step(subject.closure(optimizer, evaluate))

    error = raised(step, ValueError, RuntimeError)
    # torch's optimizers are silent here; a sentence is as good
    assert error is None or re.search("frozen|requires? (a )?grad", str(error)), error
    assert same(params, kept)


def check_08(subject: Subject) -> None:
    """A gradient of zero is an exact no-op."""
    for options in every_input(subject):
        params = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
        kept = clones(params)
        optimizer = subject.make(params, **options)

        def evaluate(params: list[Tensor] = params) -> tuple[Tensor, Tensor]:
            outputs = params[0] + params[1]
            return (outputs * 0).sum(), outputs

        for _ in range(3):
            optimizer.step(subject.closure(optimizer, evaluate))
        assert same(params, kept), options


def check_09(subject: Subject) -> None:
    """The repr names the class, before and after a step."""
    run = start(subject)
    for _ in range(2):
        assert type(run.optimizer).__name__ in repr(run.optimizer)
        run.step()
