"""A self-test of a closure: does it meet the assumptions that a step makes?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..interrupts import deferred
from ..operators.fisher import FisherOperator
from ..optim.closure import NaturalClosure, read_natural
from ..optim.natural import NaturalTrustRegion
from ..optim.objective import Objective
from ..optim.processes import Processes
from ..optim.units import Units
from .derivatives import Derivatives
from .report import ClosureCheck, ClosureReport
from .restore import REWOUND, restored
from .subject import Subject, values_of


@deferred
@torch.no_grad()
def check_closure(
    closure: NaturalClosure, params: Iterable[Any], *, seed: int = 0
) -> ClosureReport:
    r"""Test the closure of :class:`NaturalTrustRegion` at the current parameters.

    A step assumes that the closure repeats its values, and that along any direction ``d``

    .. math:: f(\theta + td) = f(\theta) + t\, g'd + O(t^2), \qquad
        \mathrm{KL}(\theta \,\|\, \theta + td) = \tfrac12 t^2 d'Fd + O(t^3).

    The report says:

    - whether the loss and the distribution repeat bit for bit, with torch's random numbers and the
      modules' buffers put back between calls as in a step, and whether the closure draws random
      numbers that a step does not put back;
    - whether the loss is finite and KL(old || old) is zero;
    - whether both depend on the parameters, whether the distribution depends on every parameter
      that moves the loss, and whether any parameter is unused;
    - whether ``F`` is symmetric, ``u'Fv = v'Fu``, and positive semidefinite;
    - whether the two remainders have orders 2 and 3 in ``t``, the slopes of their logarithms
      against that of ``t``. The direction ``d`` is a random one plus the gradient. Where the check
      fails, up to seven further directions are tried, because a nearby kink of a ReLU can look like
      a wrong derivative in float32. The slope is fitted to the smallest steps whose error is well
      above rounding, which is measured too. Where too few such steps remain, as in float32 at times
      and under autocast mostly, the outcome is ``unknown``. Switch TF32 off on a GPU.

    Constraints are tested as the loss is. Cost: 37 forward passes, 34 more for each further
    direction, two backward passes for each value, and nine Fisher products; modules whose buffers
    move take at least one more forward pass. Parameters, their ``.grad`` and the random number
    generators of torch, Python and numpy are restored bit for bit, also after an exception, and
    buffers are left as a single call leaves them. As in a step, the closure is called once with
    grad enabled and then under ``no_grad``.

    Args:
        closure: The closure, as for :meth:`NaturalTrustRegion.step`.
        params: The parameters, as for :class:`NaturalTrustRegion`. Pass
            ``model.named_parameters()`` to see their names in the report.
        seed: The seed of the random directions, which come from a separate generator.

    Raises:
        RuntimeError, TypeError, ValueError: A step would raise the same error for this closure, and
            no check of the report covers it.

    Example:
        >>> from torch.distributions import Categorical
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3).double()
        >>> x, y = torch.randn(64, 4).double(), torch.randint(3, (64,))
        >>> def closure():
        ...     distribution = Categorical(logits=model(x))
        ...     return -distribution.log_prob(y).mean(), distribution
        >>> report = check_closure(closure, model.named_parameters())
        >>> report.ok, len(report.checks)
        (True, 13)

    References:
        Boumal, An Introduction to Optimization on Smooth Manifolds, 2023, sections 4.8 and 6.8:
        slope tests of first and second derivatives, as in Manopt's ``checkgradient``.

    """
    vector = NaturalTrustRegion(params)._vector()
    alone, units = Processes(None), Units(lr=1.0)
    objective = Objective(closure, read_natural, vector, alone, units)
    with restored(vector), objective:
        return ClosureReport(checks=tuple(_checks(Subject(objective), seed)))


def _checks(subject: Subject, seed: int) -> Iterator[ClosureCheck]:
    """Yield the checks in order, and stop where later checks would depend on a failed one."""
    values = [*_repeat(subject), *_finite(subject)]
    yield from values
    yield _random_numbers(subject)
    if not all(check.passed for check in values):
        yield _NOT_MEASURED
        return
    with torch.autocast(subject.vector.device.type, enabled=False):
        F = _fisher(subject)
        grads = subject.gradients()
    depends = [*_depend(F, grads[0])]
    yield from depends
    if F is None or not all(check.passed for check in depends):
        yield _NOT_MEASURED
        return
    yield from _reach(F, grads)
    yield from Derivatives(subject, F, seed).checks()


_NOT_MEASURED = ClosureCheck(
    "the derivatives",
    None,
    math.nan,
    "not measured",
    "Derivatives are compared with values, which need the checks that failed above: correct those"
    " first.",
)


def _repeat(subject: Subject) -> Iterator[ClosureCheck]:
    first, *pair = (values_of(e) for e in (subject.first, *subject.pair))
    tolerance = math.sqrt(subject.unit)  # Without a graph, kernels may round differently.
    same = _identical(pair[:1], pair[1:]) and _near([first], pair[:1], tolerance)
    gap = max((v - first).abs().nan_to_num().max().item() for v in pair)
    yield ClosureCheck(
        "the loss repeats", same, gap, f"difference {gap:.2g}",
        f"Calls at the same parameters return different losses: {_why_not(subject)}",
    )  # fmt: skip
    try:
        kl = max(abs(subject.kl(e)) for e in subject.pair)
    except ValueError as error:
        name, words = "the distribution repeats", "a different structure"
        yield ClosureCheck(name, False, math.nan, words, f"{error}. {_why_not(subject)}")
        return
    start, *tensors = (e.prediction.flat_parameters() for e in (subject.first, *subject.pair))
    same = _identical(*tensors) and _near(start, tensors[0], tolerance)
    yield ClosureCheck(
        "the distribution repeats", same, kl, f"KL {kl:.2g}",
        f"Calls at the same parameters return different distributions: {_why_not(subject)}",
    )  # fmt: skip


def _why_not(subject: Subject) -> str:
    others = [name for name in subject.drawn if name not in REWOUND]
    if others:
        return (
            f"they draw from {' and '.join(others)}, which a step does not put back. Draw the"
            " batch and the noise before the step, outside the closure."
        )
    return (
        "each probably draws a fresh batch, or noise from a generator of its own, or changes some"
        " state (a loader, a counter, a tensor that is no buffer of a module). Draw the batch"
        " before the step, outside the closure; for kernels on a GPU see"
        " torch.use_deterministic_algorithms."
    )


def _finite(subject: Subject) -> Iterator[ClosureCheck]:
    values = torch.cat([values_of(e) for e in (subject.first, *subject.pair)])
    loss = values[0].item()
    yield ClosureCheck(
        "the loss is finite", bool(values.isfinite().all()), loss, f"{loss:.6g}",
        "The loss, or a constraint, is NaN or infinite at these parameters: look for a log or a"
        " division of zero, an overflow of exp, or NaN in the data.",
    )  # fmt: skip
    kl = subject.old.mean_kl(subject.old).item()
    yield ClosureCheck(
        # Families that users register may subtract numbers near one.
        "KL(old || old) is zero", abs(kl) <= 1e-12, kl, f"{kl:.2g}",
        "The KL of the distribution from itself should be zero: look for NaN or impossible"
        " parameters of the distribution, such as a scale of 0, and for a mistake in the kl of"
        " a registered Family.",
    )  # fmt: skip


def _random_numbers(subject: Subject) -> ClosureCheck:
    others = [name for name in subject.drawn if name not in REWOUND]
    drawn = f"of {', '.join(subject.drawn)}" if subject.drawn else "none"
    return ClosureCheck(
        "random numbers repeat", not others, len(others),
        drawn if others or not subject.drawn else f"{drawn}, the same in every call",
        f"The closure draws random numbers from {' and '.join(others)}. A step puts back only"
        " torch's generators: draw the numbers before the step, outside the closure.",
    )  # fmt: skip


def _fisher(subject: Subject) -> FisherOperator | None:
    try:
        return FisherOperator(subject.first.prediction, subject.vector)
    except ValueError:  # The distribution uses none of the parameters.
        return None


def _depend(F: FisherOperator | None, grads: Sequence[Tensor | None]) -> Iterator[ClosureCheck]:
    total = len(grads)
    used = {"loss": len(_used(grads)), "distribution": 0 if F is None else len(F.used)}
    for what, count in used.items():
        yield ClosureCheck(
            f"the {what} depends on the parameters",
            count > 0, count, f"on {count} of {total}",
            f"The graph of the {what} leads to none of the parameters given: look for detach(),"
            " .item(), torch.no_grad() or numpy on the way from the model, or for parameters of"
            " another model.",
        )  # fmt: skip


def _reach(F: FisherOperator, grads: Sequence[Sequence[Tensor | None]]) -> Iterator[ClosureCheck]:
    names = F.vector.names
    moved = {i for g in grads for i, p in enumerate(g) if p is not None and bool(p.any())}
    unseen = sorted(moved.difference(F.used))
    yield ClosureCheck(
        "the KL bounds what moves the loss", not unseen, len(unseen),
        f"all but {len(unseen)}" if unseen else "all",
        f"The loss depends on {_listed(names, unseen)}, the distribution does not, and a step"
        " raises an error for that. Give them to another optimizer, or return a joint distribution"
        " that covers them, for example {'action': ..., 'value': Normal(v, 1)}.",
    )  # fmt: skip
    used = {i for g in grads for i in _used(g)}.union(F.used)
    idle = [i for i in range(len(names)) if i not in used]
    yield ClosureCheck(
        "no parameter is idle", not idle, len(idle), f"{len(idle)} idle",
        f"Neither the loss nor the distribution uses {_listed(names, idle)}, which will never"
        " move: look for an unused layer or a detach(), or remove them from the optimizer.",
    )  # fmt: skip


def _used(grads: Sequence[Tensor | None]) -> set[int]:
    return {i for i, grad in enumerate(grads) if grad is not None}


def _listed(names: Sequence[str], positions: Sequence[int]) -> str:
    return ("parameters " if len(positions) > 1 else "parameter ") + ", ".join(
        names[i] for i in positions
    )


def _identical(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Say whether the tensors are equal; NaN equals NaN, since another check reports it."""
    return _near(ours, theirs, 0.0)


def _near(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b.to(a), tolerance, tolerance, True) for a, b in pairs)
