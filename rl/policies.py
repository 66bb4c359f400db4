"""Policies: modules that map observations to a distribution over actions."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from itertools import pairwise

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal


def mlp(sizes: Sequence[int], *, output_gain: float) -> nn.Sequential:
    """Return a tanh network with orthogonal weights and zero biases.

    Args:
        sizes: widths, from input to output.
        output_gain: gain of the last layer; 0.01 starts a policy close to uniform.

    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        last = i == len(sizes) - 2
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class Policy(nn.Module, abc.ABC):
    """A distribution over actions for each observation.

    ``policy(observations)`` returns a torch distribution with one sample a row. ``sample`` draws
    with a generator of the agent's own, so that training neither reads nor moves torch's global
    random state.
    """

    @abc.abstractmethod
    def forward(self, observations: Tensor) -> Distribution:
        """Return the distribution over actions, batch shape ``(B,)``."""

    @abc.abstractmethod
    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one action a row."""

    @abc.abstractmethod
    def mode(self, observations: Tensor) -> Tensor:
        """Return the most likely action of each row."""

    @abc.abstractmethod
    def to_env(self, actions: Tensor) -> np.ndarray:
        """Turn actions into what the environment takes."""


class CategoricalPolicy(Policy):
    """Softmax over the actions of a Discrete space."""

    def __init__(
        self, observation_dim: int, space: gymnasium.spaces.Discrete, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.net = mlp([observation_dim, *hidden, int(space.n)], output_gain=0.01)
        self.start = int(space.start)

    def forward(self, observations: Tensor) -> Categorical:
        """Return a Categorical over the actions."""
        return Categorical(logits=self.net(observations), validate_args=False)

    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Draw by the Gumbel-max trick: argmax of logits minus log of exponentials."""
        logits = self.net(observations)
        exponential = torch.empty_like(logits).exponential_(generator=generator)
        return (logits - exponential.log()).argmax(-1)

    def mode(self, observations: Tensor) -> Tensor:
        """Return the action of the largest logit."""
        return self.net(observations).argmax(-1)

    def to_env(self, actions: Tensor) -> np.ndarray:
        """Shift to the space's first action."""
        return actions.numpy() + self.start


class GaussianPolicy(Policy):
    """Independent normals over a Box space, with scales that do not depend on the state.

    Actions are clipped to the box on their way to the environment only; the distribution is over
    the unclipped ones.
    """

    def __init__(
        self, observation_dim: int, space: gymnasium.spaces.Box, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.shape = space.shape
        self.low, self.high, self.dtype = space.low, space.high, space.dtype
        dim = int(np.prod(space.shape))
        self.mean = mlp([observation_dim, *hidden, dim], output_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(dim))

    def forward(self, observations: Tensor) -> Independent:
        """Return independent normals, one event a row."""
        normal = Normal(self.mean(observations), self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)

    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Draw mean + std * noise."""
        mean = self.mean(observations)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return mean + self.log_std.exp() * noise

    def mode(self, observations: Tensor) -> Tensor:
        """Return the mean."""
        return self.mean(observations)

    def to_env(self, actions: Tensor) -> np.ndarray:
        """Shape like the space and clip to its bounds."""
        shaped = actions.numpy().reshape(-1, *self.shape)
        return np.clip(shaped, self.low, self.high).astype(self.dtype, copy=False)


def make_policy(
    observation_dim: int, action_space: gymnasium.Space, hidden: Sequence[int]
) -> Policy:
    """Return the policy that fits an action space.

    Raises:
        ValueError: the space is neither Discrete nor Box.

    """
    if isinstance(action_space, gymnasium.spaces.Discrete):
        return CategoricalPolicy(observation_dim, action_space, hidden)
    if isinstance(action_space, gymnasium.spaces.Box):
        return GaussianPolicy(observation_dim, action_space, hidden)
    raise ValueError(f"unsupported action space {action_space}: Discrete and Box are supported")
