"""The learning rates of a step, as the units in which the parameters are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators.base import LinearOperator, congruent
from ..vector import ParameterVector


@dataclass(frozen=True, kw_only=True)
class Units:
    """The change of variables ``s = lr D y`` with ``D = diag(rates)``, solved for ``y``.

    Attributes:
        lr: The largest learning rate of all groups.
        rates: The learning rates as fractions of the largest, shape ``(n,)``, or None where all
            groups share one.

    """

    lr: float
    rates: Tensor | None = None

    @classmethod
    def of(cls, groups: Iterable[Mapping[str, Any]], vector: ParameterVector) -> Units:
        """Read the learning rates of the trainable parameters; frozen ones do not count."""
        trainable = [
            (float(group["lr"]), p) for group in groups for p in group["params"] if p.requires_grad
        ]
        lrs = [lr for lr, _ in trainable]
        lr = max(lrs)
        if min(lrs) == lr:
            return cls(lr=lr)
        rates = vector.ravel([torch.full_like(p, rate / lr) for rate, p in trainable])
        return cls(lr=lr, rates=rates)

    def gradient(self, g: Tensor) -> Tensor:
        """Return ``D g``, or its rows for several gradients; the factor ``lr`` is left out."""
        return g if self.rates is None else self.rates * g

    def operator(self, A: LinearOperator) -> LinearOperator:
        """Return ``D A D``."""
        return A if self.rates is None else congruent(A, self.rates)

    def step(self, y: Tensor) -> Tensor:
        """Return the step ``lr D y`` of the parameters."""
        return self.lr * y if self.rates is None else self.lr * self.rates * y
