"""Networks from flat rows of observations to features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..envs.layout import ObservationLayout, Part
from .moments import ObservationNorm

_CHANNELS = (16, 32, 32)  # of the convolutions, each 3 x 3 with stride 2


Activation: TypeAlias = Literal["tanh", "relu", "elu", "gelu", "silu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def mlp(
    sizes: Sequence[int], *, output_gain: float, activation: Activation = "tanh"
) -> nn.Sequential:
    """Return a network with orthogonal weights and zero biases, linear at the end, in float32.

    Args:
        sizes: widths, from input to output.
        output_gain: gain of the last layer; 0.01 starts a policy close to uniform.
        activation: nonlinearity between the layers.

    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out, dtype=torch.float32)
        last = i == len(sizes) - 2
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class ImageFeatures(nn.Module):
    """Convolutions over the columns of an image: rows ``(B, d)`` to features ``(B, width)``."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.columns, self.shape = part.columns, part.shape
        first = len(self.shape) == 3 and self.shape[0] < self.shape[2]  # as frame stacks are
        channels = 1 if len(self.shape) == 2 else self.shape[0 if first else 2]
        self.channels_last = len(self.shape) == 3 and not first
        height, wide = self.shape[first], self.shape[first + 1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((channels, *_CHANNELS)):
            convolution = nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, dtype=torch.float32)
            nn.init.orthogonal_(convolution.weight, 2**0.5)
            nn.init.constant_(convolution.bias, 0.0)  # pyright: ignore[reportArgumentType] # it has one
            layers += [convolution, nn.ReLU()]
            height, wide = (height + 1) // 2, (wide + 1) // 2
        self.net = nn.Sequential(*layers, nn.Flatten())
        self.width = _CHANNELS[-1] * height * wide

    def forward(self, rows: Tensor) -> Tensor:
        """Return the features of bytes, scaled to [0, 1]."""
        images = rows[:, self.columns].reshape(-1, *self.shape).float() / 255
        if len(self.shape) == 2:
            images = images.unsqueeze(1)
        elif self.channels_last:
            images = images.movedim(-1, 1)
        return self.net(images)


class Encoder(nn.Module):
    """Features of observations: rows ``(..., d)`` to ``(..., width)``.

    Images go through convolutions. Everything else except an action mask is taken as it is, or
    normalised. All of it then goes through the hidden layers.

    Args:
        layout: where things are in a row.
        hidden: widths of the hidden layers.
        norm: normalisation of the columns that are neither image nor mask.
        activation: nonlinearity after each layer.

    """

    columns: Tensor

    def __init__(
        self,
        layout: ObservationLayout,
        hidden: Sequence[int],
        norm: ObservationNorm | None = None,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        columns = layout.vector_columns
        self.whole = len(columns) == layout.width  # then rows are taken as they are
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long), persistent=False)
        self.norm = norm
        images = [ImageFeatures(part) for part in layout.of_kind("image")]
        self.images = nn.ModuleList(images)
        inputs = len(columns) + sum(image.width for image in images)
        if inputs == 0:
            raise ValueError(f"{layout.space} holds an action mask and nothing to observe")
        sizes = (inputs, *hidden)
        self.width = sizes[-1]
        self.body = nn.Sequential()
        if hidden:
            layers = mlp(sizes, output_gain=2**0.5, activation=activation)
            self.body.extend([*layers, _ACTIVATIONS[activation]()])

    def forward(self, rows: Tensor) -> Tensor:
        """Return the features."""
        if self.whole:
            return self.body(self._vectors(rows))
        flat = rows.reshape(-1, rows.shape[-1])
        parts = [image(flat) for image in self.images]
        if len(self.columns):
            parts.append(self._vectors(flat[:, self.columns].float()))
        return self.body(torch.cat(parts, dim=1)).unflatten(0, rows.shape[:-1])

    def _vectors(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)
