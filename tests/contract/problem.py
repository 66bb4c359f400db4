"""What the checks are made of: an optimizer under examination, a problem, and comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

Evaluate: TypeAlias = Callable[[], tuple[Tensor, Tensor]]


class NotApplicable(Exception):
    """The optimizer does not offer what is checked, and says so."""


class Subject(NamedTuple):
    """An optimizer under examination.

    Attributes:
        make: ``make(params, **options)`` constructs it.
        closure: ``closure(optimizer, evaluate)`` returns the closure that this optimizer wants,
            from ``evaluate() -> (loss, outputs)``: whether it calls ``backward()`` and what it
            returns.
        inputs: options to construct it with beside the defaults, as the ``optim_inputs_func`` of
            torch's ``OptimizerInfo``.

    """

    make: Callable[..., Optimizer]
    closure: Callable[[Optimizer, Evaluate], Callable[..., Any]]
    inputs: Sequence[dict[str, Any]] = ()


Check: TypeAlias = Callable[[Subject], None]


class Problem:
    """Least squares of a small network: the negative log-likelihood of ``Normal(outputs, 1)``."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / 2)
        self.x = torch.randn(32, 3, generator=draw)
        self.y = torch.randn(32, 2, generator=draw)
        self.to("cpu", dtype)

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        self.model.to(device, dtype)
        self.x, self.y = self.x.to(device, dtype), self.y.to(device, dtype)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params: list[Tensor] = list(self.model.parameters())
        return self

    def evaluate(self) -> tuple[Tensor, Tensor]:
        return self.evaluate_with(self.params)

    def evaluate_with(self, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluate with other parameters, as those of a copy of the optimizer."""
        values = dict(zip(self.names, params, strict=True))
        outputs = functional_call(self.model, values, (self.x,))
        return squares(outputs - self.y), outputs

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, self.params, strict=True))


def squares(residual: Tensor) -> Tensor:
    return 0.5 * residual.square().sum() / (len(residual) if residual.ndim else 1)


class Run(NamedTuple):
    """An optimizer with its closure."""

    params: Sequence[Tensor]
    optimizer: Optimizer
    closure: Callable[..., Any]

    def step(self, times: int = 1) -> Any:
        for _ in range(times - 1):
            self.optimizer.step(self.closure)
        return self.optimizer.step(self.closure)


def start(
    subject: Subject, problem: Problem | None = None, *, given: Any = None, **options: Any
) -> Run:
    """Construct an optimizer for a problem; ``given`` is what it is given as parameters."""
    problem = problem or Problem()
    optimizer = subject.make(problem.params if given is None else given, **options)
    return Run(problem.params, optimizer, subject.closure(optimizer, problem.evaluate))


def resumed(
    subject: Subject, run: Run, state: dict[str, Any], given: str = "", **options: Any
) -> Run:
    """Return a second run from where another one is."""
    problem = Problem()
    assign(problem.params, run.params)
    params = problem.named if given == "named" else None
    twin = start(subject, problem, given=params, **options)
    twin.optimizer.load_state_dict(state)
    return twin


def every_input(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield the options that this optimizer can be constructed with, the defaults first."""
    yield {}
    for options in subject.inputs:
        # a tensor of its own, which schedulers write in place
        yield {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}


def assign(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def clones(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(params: Sequence[Tensor], kept: Sequence[Tensor]) -> bool:
    return all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def value(evaluate: Evaluate) -> float:
    with torch.no_grad():
        return evaluate()[0].item()


def equal(a: Any, b: Any) -> bool:
    """Compare nested state, tensors bit for bit and with their dtypes."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def raised(call: Callable[[], object], *kinds: type[BaseException]) -> BaseException | None:
    """Return the exception that a call raises, None without one."""
    try:
        call()
    except kinds as error:
        return error
    return None


def must_refuse(call: Callable[[], object], words: str) -> None:
    """Demand a RuntimeError that says what is wrong."""
    error = raised(call, RuntimeError)
    assert error is not None, f"nothing was raised; expected words like {words!r}"
    assert re.search(words, str(error)), f"raised without the word {words!r}: {error}"


@contextmanager
def groups_or_not_applicable() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if re.search("group|per-parameter", str(error)):
            raise NotApplicable(str(error)) from error
        raise
