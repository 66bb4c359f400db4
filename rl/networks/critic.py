"""State values."""

from __future__ import annotations

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
