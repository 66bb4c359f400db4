"""Going back to where a fit began."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn


class Undo:
    """Parameters, and the state of an optimizer, as they are now; calling it puts them back.

    Args:
        parameters: to keep the values of.
        optimizer: to keep the state of; None for none.

    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._values = [(p, p.detach().clone()) for p in parameters]
        self._optimizer = optimizer
        self._state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def __call__(self) -> None:
        """Put them back."""
        for p, value in self._values:
            p.copy_(value)
        if self._optimizer is not None and self._state is not None:
            self._optimizer.load_state_dict(self._state)
