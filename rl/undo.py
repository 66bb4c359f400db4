"""Going back to where a fit began."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor


class Undo:
    """Tensors, and the state of an optimizer, as they are now; calling it puts them back.

    Args:
        tensors: parameters and buffers to keep the values of.
        optimizer: to keep the state of; None for none.

    """

    def __init__(
        self, tensors: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._values = [(x, x.detach().clone()) for x in tensors]
        self._optimizer = optimizer
        self._state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def __call__(self) -> None:
        """Put them back."""
        for x, value in self._values:
            x.copy_(value)
        if self._optimizer is not None and self._state is not None:
            self._optimizer.load_state_dict(self._state)
