"""The options of the optimizers, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..arguments import as_count, as_not_negative, as_number, as_number_in, as_positive


@dataclass(frozen=True, kw_only=True)
class Search:
    """How :class:`NaturalTrustRegion` searches along its step.

    Attributes:
        backtrack_factor: The largest factor from a trial that did not lower the loss to the next.
        max_backtracks: The number of trials after the first.
        scales: Lengths to try first, as fractions of the length to the edge of the ball. If there
            are several, each is measured for each damping, and the one of least loss is taken.
        max_kl: A bound on the KL of every sample, in addition to the bound on their mean.

    """

    backtrack_factor: float = 0.7
    max_backtracks: int = 30
    scales: tuple[float, ...] = (1.0,)
    max_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """What :class:`NaturalTrustRegion` carries from one step to the next.

    Attributes:
        max_delta: Lets ``delta`` follow rho, the actual over the predicted reduction of the loss.
            After a step with rho below 1/4, ``delta`` shrinks to a quarter, but not below a
            millionth of ``max_delta``. After a step with rho above 3/4 that used at least 0.8 of
            ``delta``, it doubles, up to ``max_delta``.
        damping_factor: Lets ``damping`` follow rho, by this factor
            (:func:`levenberg_marquardt_damping`). 1.5 is usual.
        kl_target: Lets ``penalty`` follow the measured KL. The penalty doubles after a step of more
            than 1.5 times ``kl_target`` and after a rejected step, and halves after a step of less
            than ``kl_target / 1.5``. A rejected step with a predicted KL below a millionth of
            ``kl_target`` leaves it unchanged.
        warm_start: Starts conjugate gradients from this fraction of the last solution, so that
            several steps share the work of one solve. It costs one product.

    """

    max_delta: float | None = None
    damping_factor: float | None = None
    kl_target: float | None = None
    warm_start: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Region:
    r"""How :class:`NewtonTrustRegion` minimizes its model, and how the region follows rho.

    Attributes:
        solver: ``"gltr"`` is exact over a Krylov space, ``"steihaug"`` truncates conjugate
            gradients, and ``"cg"`` solves the damped system, without a radius.
        metric: The norm of the radius. ``"euclidean"`` is :math:`\sqrt{s'M^{-1}s}` if there is a
            preconditioner ``M``. ``"fisher"`` is :math:`\sqrt{s'(F + \mu I)s}`, in which a radius
            of :math:`\sqrt{2\delta}` is to second order a KL of :math:`\delta`. Each iteration
            then solves a system with ``F``, by at most ``max_iter`` products.
        metric_damping: The damping :math:`\mu` of the Fisher metric.
        rule: ``"gould"`` (:func:`gould_radius`) or ``"classic"`` (:func:`classic_radius`).
        damping_factor: Lets ``damping`` follow rho by this factor
            (:func:`levenberg_marquardt_damping`); None leaves it fixed. 1.5 is Martens' choice.
        max_rejections: The number of trials that may fail before the step gives up.
        warm_start: Starts the solver ``"cg"`` from this fraction of the last solution.

    """

    solver: str = "gltr"
    metric: str = "euclidean"
    metric_damping: float = 1e-3
    rule: str = "gould"
    damping_factor: float | None = None
    max_rejections: int = 20
    warm_start: float = 0.0


@dataclass(frozen=True)
class SharedOptions:
    """The options of both optimizers, as the parameter groups hold them.

    ``checks`` holds the check of each option, which also converts what a scheduler has written to
    a plain number; None stays None where it is the default.
    """

    maximize: bool
    warm_start: float
    damping_factor: float | None

    checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "warm_start": partial(as_number_in, interval="[0, 1]"),
        "damping_factor": partial(as_number_in, interval="(1, inf)"),
    }
    optional: ClassVar[set[str]] = {"damping_factor"}

    def __post_init__(self) -> None:
        """Check and convert each option."""
        for name, check in self.checks.items():
            value = getattr(self, name)
            if not (value is None and name in self.optional):
                object.__setattr__(self, name, check(name, value))

    @property
    def sign(self) -> float:
        """The factor that turns the closure's loss into one to minimize."""
        return -1.0 if self.maximize else 1.0


@dataclass(frozen=True)
class NaturalOptions(SharedOptions):
    """The options of NaturalTrustRegion."""

    delta: float
    damping: float | tuple[float, ...]
    cg_max_iter: int
    cg_rtol: float
    backtrack_factor: float
    max_backtracks: int
    scales: tuple[float, ...]
    max_kl: float | None
    penalty: float | None
    kl_target: float | None
    max_delta: float | None

    checks: ClassVar = SharedOptions.checks | {
        "delta": as_number,
        "damping": lambda name, value: _several(name, value, as_not_negative),
        "cg_max_iter": partial(as_count, least=1),
        "cg_rtol": partial(as_number_in, interval="[0, 1)"),
        "backtrack_factor": partial(as_number_in, interval="(0, 1)"),
        "max_backtracks": as_count,
        "scales": lambda name, value: _several(name, value, as_positive, always=True),
        "max_kl": as_positive,
        "penalty": as_positive,
        "kl_target": as_positive,
        "max_delta": as_positive,
    }
    optional: ClassVar = {"damping_factor", "max_kl", "penalty", "kl_target", "max_delta"}

    def __post_init__(self) -> None:
        """Check and convert each option, and check what they say together."""
        super().__post_init__()
        if not (self.delta > 0 and (self.delta < math.inf or self.penalty is not None)):
            raise ValueError(
                f"delta must be a positive KL radius in nats, got {self.delta}; 0.01 is usual in"
                " reinforcement learning, 0.1 to 1 in supervised learning. It may be infinite with"
                " penalty="
            )
        if self.kl_target is not None and self.penalty is None:
            raise ValueError("kl_target adapts the penalty of the KL: pass penalty= to start from")
        if self.max_delta is not None and not self.delta <= self.max_delta:
            raise ValueError(
                f"max_delta is the largest radius that delta may grow to, got {self.max_delta} for"
                f" a delta of {self.delta}"
            )
        if self.damping_factor is not None and len(self.dampings) > 1:
            raise ValueError(
                "damping_factor moves one damping between steps, and several dampings are compared"
                f" within each step: give one of the two, got damping={self.damping}"
            )

    @property
    def dampings(self) -> list[float]:
        """The dampings to choose from."""
        return [*self.damping] if isinstance(self.damping, tuple) else [self.damping]


@dataclass(frozen=True)
class NewtonOptions(SharedOptions):
    """The options of NewtonTrustRegion."""

    radius: float
    damping: float
    max_iter: int
    rtol: float | None
    gtol: float
    max_rejections: int
    metric_damping: float

    checks: ClassVar = SharedOptions.checks | {
        "radius": partial(as_positive, infinite=True),
        "damping": as_not_negative,
        "max_iter": partial(as_count, least=1),
        "rtol": partial(as_number_in, interval="[0, 1)"),
        "gtol": as_not_negative,
        "max_rejections": as_count,
        "metric_damping": as_positive,
    }
    optional: ClassVar = {"damping_factor", "rtol"}

    def __post_init__(self) -> None:
        """Check and convert each option, and check what they say together."""
        super().__post_init__()
        if self.radius == math.inf and self.damping == 0:
            raise ValueError(
                "an infinite radius leaves the length of a step to the damping, which must be"
                " positive then: give a finite radius, or a damping such as 1.0"
            )


def _several(
    name: str, value: Any, check: Callable[[str, Any], float], *, always: bool = False
) -> float | tuple[float, ...]:
    """Check one number, or a tuple of numbers."""
    if not (always or isinstance(value, (tuple, list))):
        return check(name, value)
    if not isinstance(value, Iterable) or isinstance(value, str) or not (given := tuple(value)):
        raise ValueError(f"{name} must be a tuple of numbers, got {value!r}")
    return tuple(check(name, number) for number in given)


def flat(name: str, record: object, kind: type[Search | Adapt | Region]) -> dict[str, Any]:
    """Return the options of a record under the names that the parameter groups give them."""
    if not isinstance(record, kind):
        word = kind.__name__
        raise TypeError(
            f"{name} must be a trustregion.optim.{word}, for example {name}={word}("
            f"{fields(kind)[0].name}=...), got {record!r}"
        )
    return {field.name: getattr(record, field.name) for field in fields(kind)}


def option_names(kind: type[SharedOptions]) -> list[str]:
    """Return the names of the options that all groups share."""
    return [field.name for field in fields(kind)]


OptionsT = TypeVar("OptionsT", bound=SharedOptions)


def shared_options(groups: Sequence[dict[str, Any]], kind: type[OptionsT]) -> OptionsT:
    """Return the checked options of the parameter groups, which schedulers may have changed.

    Raises:
        ValueError: An option is out of range, or groups disagree on one other than ``lr``.

    """
    shared = option_names(kind)
    each = [kind(**{key: group[key] for key in shared}) for group in groups]
    for i, (group, options) in enumerate(zip(groups, each, strict=True)):
        if isinstance(lr := group["lr"], Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        as_not_negative("lr", lr)
        for key in shared:
            first, other = getattr(each[0], key), getattr(options, key)
            if first != other:
                raise ValueError(
                    f"all parameter groups share one trust region: {key} is {first} in group 0"
                    f" and {other} in group {i}. Only lr may differ"
                )
    return each[0]
