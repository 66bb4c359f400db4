"""The interface of a distribution family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
Metric: TypeAlias = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Family:
    """A distribution family in closed form.

    Attributes:
        parameters: distribution -> its parameter tensors, attached to the graph. Their shapes start
            with the batch shape.
        kl: ``(old, new)`` parameter tensors in float64 -> KL(old || new), one value per element of
            the batch shape, or several values that are summed.
        fisher: parameter tensors -> the map ``d -> M d`` from a change of the parameter tensors to
            a tuple of the same shapes. Terms that do not depend on ``d`` are computed once.

    """

    parameters: Callable[..., Tensors]
    kl: Callable[[Tensors, Tensors], Tensor]
    fisher: Callable[[Tensors], Metric]


def in_float64(fisher: Callable[[Tensors], Metric]) -> Callable[[Tensors], Metric]:
    """Return ``fisher`` evaluated in float64 for parameters of any dtype.

    It is for families whose ``M d`` is a difference of large numbers, or contains squares that
    overflow.
    """

    def wrapped(params: Tensors) -> Metric:
        metric = fisher(tuple(t.to(torch.float64) for t in params))

        def apply(d: Tensors) -> Tensors:
            out = metric(tuple(t.to(torch.float64) for t in d))
            return tuple(o.to(t.dtype) for o, t in zip(out, d, strict=True))

        return apply

    return wrapped


def positive(*tensors: Tensor) -> Tensor:
    """Return a mask of the elements that are positive and finite in all tensors."""
    first, *others = tensors
    valid = (first > 0) & (first < torch.inf)
    for t in others:
        valid = valid & (t > 0) & (t < torch.inf)
    return valid
