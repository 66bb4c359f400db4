"""The models whose curvature products are timed, each at one point with one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

OBSERVATIONS, ACTIONS = 17, 6
CLASSES, SYMBOLS = 10, 65
WIDTH, HEADS, LENGTH, BLOCKS = 64, 4, 32, 2
"""Of the transformer."""


@dataclass(frozen=True)
class Model:
    """A network, the meaning of its outputs, and the batch that it is measured on."""

    kind: str
    """Which network, for those that write it again: mlp tanh, mlp relu, conv or transformer."""
    net: nn.Module
    inputs: Tensor
    log_std: nn.Parameter | None
    """Of a normal distribution around the outputs; None where they are logits."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the network's, then the scales."""
        own = list(self.net.parameters())
        return own if self.log_std is None else [*own, self.log_std]

    def predict(self) -> Independent | Categorical:
        """Return the distribution over the batch, with its graph."""
        outputs = self.net(self.inputs)
        if self.log_std is None:
            return Categorical(logits=outputs)
        return Independent(Normal(outputs, self.log_std.exp()), 1)

    @cached_property
    def targets(self) -> Tensor:
        """Targets drawn from the model; the curvature does not depend on them."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            return self.predict().sample()

    def vector(self, seed: int = 2) -> Tensor:
        """Return what the products are taken of."""
        numel = sum(p.numel() for p in self.parameters())
        return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A transformer block with the norms in front, and causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """Predicts each next symbol; the logits of all positions of all sequences are its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.symbols(text) + self.places))).flatten(0, 1)


def mlp(*sizes: int, activation: type[nn.Module]) -> nn.Sequential:
    """Return dense layers with an activation between them."""
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*(m for layer in layers[:-1] for m in (layer, activation())), layers[-1])


def policy(states: int, hidden: int) -> Model:
    """A tanh network of two layers under a normal distribution with state-independent scales."""
    net = mlp(OBSERVATIONS, hidden, hidden, ACTIONS, activation=nn.Tanh)
    log_std = nn.Parameter(torch.full((ACTIONS,), -0.5))
    return Model("mlp tanh", net, torch.randn(states, OBSERVATIONS), log_std)


def classifier(samples: int) -> Model:
    """The dense network of curvlinops' own benchmark."""
    net = mlp(784, 1024, 512, 256, 128, 64, CLASSES, activation=nn.ReLU)
    return Model("mlp relu", net, torch.rand(samples, 784), None)


def convolutions(samples: int) -> Model:
    """Two rounds of convolution, ReLU and pooling on 3x32x32 images, and a dense layer."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 8 * 8, CLASSES)),
    )
    return Model("conv", net, torch.rand(samples, 3, 32, 32), None)


def transformer(samples: int) -> Model:
    """A causal character model of two blocks on sequences of 32."""
    return Model("transformer", CharacterModel(), torch.randint(SYMBOLS, (samples, LENGTH)), None)


MODELS: dict[str, Callable[[], Model]] = {
    "policy 64-64, 2,048 states": partial(policy, 2048, 64),
    "policy 64-64, 10,000 states": partial(policy, 10_000, 64),
    "policy 256-256, 2,048 states": partial(policy, 2048, 256),
    "classifier, batch 512": partial(classifier, 512),
    "convolutions, batch 128": partial(convolutions, 128),
    "transformer, batch 32": partial(transformer, 32),
}


def make(build: Callable[[], Model], seed: int = 0) -> Model:
    """Return the model with reproducible weights and inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    assert model.targets.shape[0] > 0  # drawn now: not part of anybody's set-up
    return model


def mean_scale(model: Model) -> float:
    """Return what the Hessian of the mean square error is multiplied with to get the metric.

    The error's mean runs over the components too, and lacks the half of the log-likelihood. All
    scales are equal.
    """
    return 1.0 if model.log_std is None else ACTIONS / 2 * math.exp(-2 * model.log_std[0].item())
