"""State values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .encoders import Encoder, mlp


class Critic(nn.Module):
    """A state value ``V(s)``: rows of observations ``(..., d)`` to values ``(...)``."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = mlp([encoder.width, 1], output_gain=1.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the values."""
        return self.linear(self.encoder(rows)).squeeze(-1)

    def function(self) -> Callable[[Tensor], Tensor]:
        """Return a function that gives the values, up to rounding and without a gradient."""
        dense = self.encoder.dense(self.linear)
        if dense is None:
            return self
        prepare, network = dense

        def values(rows: Tensor) -> Tensor:
            flat = prepare(rows.reshape(-1, rows.shape[-1]).numpy())
            return torch.from_numpy(network(flat)).reshape(rows.shape[:-1])

        return values
