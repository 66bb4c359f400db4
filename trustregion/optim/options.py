"""The options of the optimizers, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor


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
    """The options of both optimizers, as the parameter groups hold them."""

    maximize: bool
    warm_start: float
    damping_factor: float | None

    def __post_init__(self) -> None:
        """Check the ranges, and turn the tensors that a schedule may write into floats."""
        self._in_range("warm_start", 0 <= self._number("warm_start") <= 1, "lie in [0, 1]")
        if self.damping_factor is not None:
            self._in_range(
                "damping_factor", 1 < self._number("damping_factor") < math.inf, "exceed 1"
            )

    @property
    def sign(self) -> float:
        """The factor that turns the closure's loss into one to minimize."""
        return -1.0 if self.maximize else 1.0

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if isinstance(value, (bool, str)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        try:
            object.__setattr__(self, name, float(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be a number, got {value!r}") from error
        return getattr(self, name)

    def _positive(self, name: str, *, infinite: bool = False, zero: bool = False) -> None:
        value = self._number(name)
        fits = (value > 0 or (zero and value == 0)) and (infinite or value < math.inf)
        finite = "" if infinite else " and finite"
        self._in_range(name, fits, f"be {'not negative' if zero else 'positive'}{finite}")

    def _count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        least_words = f"of at least {least}" if least else "and not negative"
        self._in_range(name, whole, f"be an integer {least_words}")

    def _in_range(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name} must {expected}, got {getattr(self, name)}")


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

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        delta = self._number("delta")
        if not (delta > 0 and (delta < math.inf or self.penalty is not None)):
            raise ValueError(
                f"delta must be a positive KL radius in nats, got {self.delta}; 0.01 is usual in"
                " reinforcement learning, 0.1 to 1 in supervised learning. It may be infinite with"
                " penalty="
            )
        self._dampings()
        self._count("cg_max_iter", 1)
        self._in_range("cg_rtol", 0 <= self._number("cg_rtol") < 1, "lie in [0, 1)")
        factor = self._number("backtrack_factor")
        self._in_range("backtrack_factor", 0 < factor < 1, "lie between 0 and 1")
        self._count("max_backtracks", 0)
        object.__setattr__(self, "scales", _numbers("scales", self.scales))
        fits = len(self.scales) > 0 and all(0 < a < math.inf for a in self.scales)
        self._in_range("scales", fits, "hold positive numbers, fractions of the length to the edge")
        for name in ("max_kl", "penalty", "kl_target", "max_delta"):
            if getattr(self, name) is not None:
                self._positive(name)
        if self.kl_target is not None and self.penalty is None:
            raise ValueError("kl_target adapts the penalty of the KL: pass penalty= to start from")
        if self.max_delta is not None and not self.delta <= self.max_delta:
            raise ValueError(
                f"max_delta is the largest radius that delta may grow to, got {self.max_delta} for"
                f" a delta of {self.delta}"
            )

    def _dampings(self) -> None:
        if isinstance(self.damping, (tuple, list)):
            object.__setattr__(self, "damping", _numbers("damping", self.damping))
        else:
            self._number("damping")
        fits = len(self.dampings) > 0 and all(0 <= d < math.inf for d in self.dampings)
        self._in_range("damping", fits, "be finite and not negative")
        if self.damping_factor is not None and len(self.dampings) > 1:
            raise ValueError(
                "damping_factor moves one damping between steps, and several dampings are compared"
                f" within each step: give one of the two, got damping={self.damping}"
            )

    @property
    def dampings(self) -> list[float]:
        """The dampings to choose from."""
        return list(self.damping) if isinstance(self.damping, tuple) else [self.damping]


def _numbers(name: str, given: object) -> tuple[float, ...]:
    try:
        if not isinstance(given, Iterable):
            raise TypeError
        return tuple(float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a tuple of numbers, got {given!r}") from error


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

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self._positive("radius", infinite=True)
        self._positive("damping", zero=True)
        self._count("max_iter", 1)
        self._positive("gtol", zero=True)
        if self.rtol is not None:
            self._in_range("rtol", 0 <= self._number("rtol") < 1, "lie in [0, 1), or be None")
        self._count("max_rejections", 0)
        self._positive("metric_damping")
        if self.radius == math.inf and self.damping == 0:
            raise ValueError(
                "an infinite radius leaves the length of a step to the damping, which must be"
                " positive then: give a finite radius, or a damping such as 1.0"
            )


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


def _rate(lr: float | Tensor) -> float:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    return float(lr)


OptionsT = TypeVar("OptionsT", bound=SharedOptions)


def shared_options(groups: Sequence[dict[str, Any]], kind: type[OptionsT]) -> OptionsT:
    """Return the checked options of the parameter groups, which schedulers may have changed.

    Raises:
        ValueError: An option is out of range, or groups disagree on one other than ``lr``.

    """
    shared = option_names(kind)
    each = [kind(**{key: group[key] for key in shared}) for group in groups]
    for i, (group, options) in enumerate(zip(groups, each, strict=True)):
        lr = _rate(group["lr"])
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be finite and not negative, got {lr}")
        for key in shared:
            first, other = getattr(each[0], key), getattr(options, key)
            if first != other:
                raise ValueError(
                    f"all parameter groups share one trust region: {key} is {first} in group 0"
                    f" and {other} in group {i}. Only lr may differ"
                )
    return each[0]
