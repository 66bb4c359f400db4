"""The options of NaturalTrustRegion that its parameter groups share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Options:
    """The options that all parameter groups share."""

    delta: float
    damping: float
    cg_max_iter: int
    cg_rtol: float
    backtrack_factor: float
    max_backtracks: int
    maximize: bool

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("delta", "damping", "cg_rtol", "backtrack_factor"):  # a schedule may
            object.__setattr__(self, name, float(getattr(self, name)))  # write tensors
        if not (self.delta > 0 and math.isfinite(self.delta)):
            raise ValueError(
                f"delta must be a positive KL radius in nats, got {self.delta}; 0.01 is usual in"
                " reinforcement learning, 0.1 to 1 in supervised learning"
            )
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be finite and not negative, got {self.damping}")
        if not (isinstance(self.cg_max_iter, int) and self.cg_max_iter >= 1):
            raise ValueError(
                f"cg_max_iter must be an integer of at least 1, got {self.cg_max_iter}"
            )
        if not 0 <= self.cg_rtol < 1:
            raise ValueError(f"cg_rtol must lie in [0, 1), got {self.cg_rtol}")
        if not 0 < self.backtrack_factor < 1:
            raise ValueError(
                f"backtrack_factor must lie between 0 and 1, got {self.backtrack_factor}"
            )
        if not (isinstance(self.max_backtracks, int) and self.max_backtracks >= 0):
            raise ValueError(
                f"max_backtracks must be an integer and not negative, got {self.max_backtracks}"
            )

    @property
    def sign(self) -> float:
        """Factor that turns the user's objective into one to minimise."""
        return -1.0 if self.maximize else 1.0


SHARED = tuple(field.name for field in fields(Options))


def shared_options(groups: Sequence[dict[str, Any]]) -> Options:
    """Return the options of the parameter groups, checked: schedulers write them between steps.

    Raises:
        ValueError: an option out of range, or groups that disagree on one other than ``lr``.

    """
    each = [Options(**{key: group[key] for key in SHARED}) for group in groups]
    for i, (group, options) in enumerate(zip(groups, each, strict=True)):
        lr = float(group["lr"])
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be finite and not negative, got {lr}")
        for key in SHARED:
            first, other = getattr(each[0], key), getattr(options, key)
            if first != other:
                raise ValueError(
                    f"all parameter groups share one KL ball: {key} is {first} in group 0"
                    f" and {other} in group {i}. Only lr may differ"
                )
    return each[0]
