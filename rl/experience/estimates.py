"""Advantages and returns of a path, by a critic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..networks.modes import evaluating
from ..networks.numpy_twin import value_function
from .advantages import Advantages, td_lambda
from .path import Path


class Estimates(NamedTuple):
    """What an update learns from, each ``(T, N)``.

    Attributes:
        advantages: not normalised.
        returns: what the critic is to predict.
        values: by the critic before its update.

    """

    advantages: Tensor
    returns: Tensor
    values: Tensor


@torch.no_grad()
def estimate(
    path: Path, critic: nn.Module, advantages: Advantages, gamma: float, trace: float | None = None
) -> Estimates:
    """Return the estimates of an estimator; with ``trace``, TD(lambda) returns instead of its own.

    Raises:
        ValueError: they are not finite, or not one per step.

    """
    with evaluating(critic):
        values = path.values(value_function(critic))
    found, returns = advantages(path, values, gamma)
    if trace is not None:
        returns = td_lambda(path.rewards, values.following, *path.ends, gamma=gamma, trace=trace)
    for name, x in (("advantages", found), ("returns", returns)):
        if x.shape != path.mask.shape:
            raise ValueError(
                f"{name} must be one per step, shape {tuple(path.mask.shape)}, got {tuple(x.shape)}"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{name} are not finite, as the critic's values are: nothing was updated"
            )
    return Estimates(found, returns, values.now)
