"""Restoring parameters and optimizers after a failed fit."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn


class Undo:
    """A copy of parameters and of the state of an optimizer; calling it restores them.

    Args:
        parameters: to copy.
        optimizer: whose state is copied; None for none.

    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._values = [(p, p.detach().clone()) for p in parameters]
        self._optimizer = optimizer
        self._state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def __call__(self) -> None:
        """Restore them."""
        for p, value in self._values:
            p.copy_(value)
        if self._optimizer is not None and self._state is not None:
            self._optimizer.load_state_dict(self._state)
