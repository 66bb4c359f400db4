"""The options that the parameter groups of an optimizer share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class SharedOptions:
    """What both optimizers have."""

    maximize: bool
    warm_start: float

    def __post_init__(self) -> None:
        """Check the ranges; a schedule may write tensors."""
        self._in_range("warm_start", 0 <= self._number("warm_start") <= 1, "lie in [0, 1]")

    @property
    def sign(self) -> float:
        """Factor that turns the user's objective into one to minimise."""
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
    """Those of NaturalTrustRegion."""

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
    adapt_damping: bool

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
        if self.adapt_damping and len(self.dampings) > 1:
            raise ValueError(
                "adapt_damping moves one damping between steps, and several are chosen from within"
                f" each: give one of the two, got damping={self.damping}"
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
    """Those of NewtonTrustRegion."""

    radius: float
    damping: float
    adapt_damping: bool
    damping_factor: float
    max_iter: int
    rtol: float | None
    max_rejections: int
    metric_damping: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self._positive("radius", infinite=True)
        self._positive("damping", zero=True)
        self._in_range("damping_factor", 1 < self._number("damping_factor") < math.inf, "exceed 1")
        self._count("max_iter", 1)
        if self.rtol is not None:
            self._in_range("rtol", 0 <= self._number("rtol") < 1, "lie in [0, 1), or be None")
        self._count("max_rejections", 0)
        self._positive("metric_damping")
        if self.radius == math.inf and self.damping == 0:
            raise ValueError(
                "an infinite radius leaves the length of a step to the damping, which must be"
                " positive then: give a finite radius, or a damping such as 1.0"
            )


def option_names(kind: type[SharedOptions]) -> list[str]:
    """Return the names of the options that the groups share."""
    return [field.name for field in fields(kind)]


def _rate(lr: float | Tensor) -> float:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    return float(lr)


OptionsT = TypeVar("OptionsT", bound=SharedOptions)


def shared_options(groups: Sequence[dict[str, Any]], kind: type[OptionsT]) -> OptionsT:
    """Return the options of the parameter groups, checked: schedulers write them between steps.

    Raises:
        ValueError: an option out of range, or groups that disagree on one other than ``lr``.

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
