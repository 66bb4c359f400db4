"""Action heads: from the outputs of a network to a distribution over the actions of a space."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal


class ActionHead(nn.Module, abc.ABC):
    """A family of distributions over the actions of a space, parametrised by network outputs.

    Noise is drawn for a whole rollout at once and turned into actions step by step.

    Attributes:
        width: number of outputs that it takes.
        masks: how many of the outputs are logits of actions that a mask may forbid, by -inf.

    """

    width: int
    masks: int = 0

    @abc.abstractmethod
    def forward(self, outputs: Tensor) -> Distribution:
        """Return the distribution for each row of outputs ``(B, width)``."""

    @abc.abstractmethod
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return noise for actions of batch shape ``shape``, ``(*shape, k)``."""

    @abc.abstractmethod
    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return one action per row, distributed as :meth:`forward` says, from its noise."""

    def mode(self, outputs: Tensor) -> Tensor:
        """Return the most likely action of each row: the one that no noise draws."""
        return self.draw(outputs, outputs.new_zeros(()))

    @abc.abstractmethod
    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions to what the environment takes."""


class CategoricalHead(ActionHead):
    """A Categorical over the actions of a Discrete space: one logit per action."""

    def __init__(self, space: spaces.Discrete) -> None:
        super().__init__()
        self.width = self.masks = int(space.n)
        self.start = int(space.start)

    def forward(self, outputs: Tensor) -> Categorical:
        """Return a Categorical over the actions."""
        return Categorical(logits=outputs, validate_args=False)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return Gumbel noise: the argmax of logits plus noise is a sample."""
        return _gumbel((*shape, self.width), generator)

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return the indices ``(B,)``."""
        return (outputs + noise).argmax(-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Shift to the space's first action."""
        return actions + self.start if self.start else actions


class MultiCategoricalHead(ActionHead):
    """Independent Categoricals over the components of a MultiDiscrete space, ``(B, k)``.

    The logits are padded with -inf to the largest number of alternatives.
    """

    index: Tensor

    def __init__(self, space: spaces.MultiDiscrete) -> None:
        super().__init__()
        counts = [int(n) for n in space.nvec.flat]
        self.shape, self.start = space.nvec.shape, space.start
        self.width = self.masks = sum(counts)
        index = torch.full((len(counts), max(counts)), self.width)  # the column of the padding
        ends = np.cumsum(counts).tolist()
        for row, end, n in zip(index, ends, counts, strict=True):
            row[:n] = torch.arange(end - n, end)
        self.even = len(set(counts)) == 1
        self.register_buffer("index", index, persistent=False)

    def _logits(self, outputs: Tensor) -> Tensor:
        if self.even:
            return outputs.unflatten(-1, self.index.shape)
        padding = outputs.new_full((*outputs.shape[:-1], 1), -torch.inf)
        return torch.cat([outputs, padding], dim=-1)[..., self.index]

    def forward(self, outputs: Tensor) -> Independent:
        """Return independent Categoricals, one event per row."""
        each = Categorical(logits=self._logits(outputs), validate_args=False)
        return Independent(each, 1, validate_args=False)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return Gumbel noise for every logit."""
        return _gumbel((*shape, *self.index.shape), generator)

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return the indices ``(B, k)``."""
        return (self._logits(outputs) + noise).argmax(-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Shape like the space and shift to its first actions."""
        return actions.reshape(-1, *self.shape) + self.start


class BernoulliHead(ActionHead):
    """Independent Bernoullis over the entries of a MultiBinary space, ``(B, k)``."""

    def __init__(self, space: spaces.MultiBinary) -> None:
        super().__init__()
        self.shape = space.shape
        self.width = int(np.prod(space.shape))

    def forward(self, outputs: Tensor) -> Independent:
        """Return independent Bernoullis, one event per row."""
        return Independent(Bernoulli(logits=outputs, validate_args=False), 1, validate_args=False)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return logistic noise: logit plus noise is positive with the probability of the logit."""
        ones, zeros = _gumbel((2, *shape, self.width), generator)
        return ones - zeros

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return zeros and ones."""
        return (outputs + noise > 0).to(outputs.dtype)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Shape like the space."""
        return actions.astype(np.int8).reshape(-1, *self.shape)


class GaussianHead(ActionHead):
    r"""Independent normals over the entries of a Box, ``(B, k)``.

    Actions are brought into the box only on their way to the environment: by clipping, or by
    squashing to :math:`\tanh u`, scaled to the box. The distribution is that of ``u``, before
    either. Since tanh is a bijection, probability ratios and KL divergences of ``u`` are those of
    the squashed action; its entropy is not.

    Args:
        space: the action space.
        squash: squash instead of clip; the box must be bounded.
        state_dependent_std: let the network give the logarithms of the standard deviations, which
            otherwise are parameters of the head.

    Raises:
        ValueError: a box without bounds to squash to.

    """

    def __init__(
        self, space: spaces.Box, *, squash: bool = False, state_dependent_std: bool = False
    ) -> None:
        super().__init__()
        self.low, self.high = space.low, space.high
        self.shape, self.dtype = space.shape, space.dtype
        self.squash = squash
        if squash and not space.is_bounded():
            raise ValueError(f"squash_actions needs a bounded action space, got {space}")
        self.size = int(np.prod(space.shape))
        self.log_std = (
            None
            if state_dependent_std
            else nn.Parameter(torch.zeros(self.size, dtype=torch.float32))
        )
        self.width = 2 * self.size if state_dependent_std else self.size

    def _moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.log_std is not None:
            return outputs, self.log_std.exp()
        mean, log_std = outputs.chunk(2, dim=-1)
        return mean, log_std.exp()

    def forward(self, outputs: Tensor) -> Independent:
        """Return independent normals, one event per row."""
        mean, std = self._moments(outputs)
        return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return standard normal noise."""
        return torch.randn(*shape, self.size, generator=generator, dtype=torch.float32)

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return mean + std * noise."""
        mean, std = self._moments(outputs)
        return mean + std * noise

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Shape like the space, and squash or clip to its bounds."""
        shaped = actions.reshape(-1, *self.shape)
        if self.squash:
            middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
            shaped = middle + half * np.tanh(shaped)  # rounding may step over a bound: clip too
        within = np.minimum(np.maximum(shaped, self.low), self.high)  # a fifth of np.clip's time
        return within.astype(self.dtype, copy=False)


def make_head(
    space: Space[Any], *, squash: bool = False, state_dependent_std: bool = False
) -> ActionHead:
    """Return the head of an action space.

    Raises:
        ValueError: the space has none, or the options do not fit it.

    """
    if isinstance(space, spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise ValueError(f"unsupported action space {space}: a Box must be of real numbers")
        if 0 in space.shape:
            raise ValueError(f"unsupported action space {space}: it has no entries")
        return GaussianHead(space, squash=squash, state_dependent_std=state_dependent_std)
    for name, given in (("squash_actions", squash), ("state_dependent_std", state_dependent_std)):
        if given:
            raise ValueError(f"{name} is for Box actions, and the action space is {space}")
    if isinstance(space, spaces.Discrete):
        return CategoricalHead(space)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategoricalHead(space)
    if isinstance(space, spaces.MultiBinary):
        return BernoulliHead(space)
    raise ValueError(
        f"unsupported action space {space}: Box, Discrete, MultiDiscrete and MultiBinary are"
        " supported. Wrap the environment, for example with gymnasium.wrappers.TransformAction"
    )


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.empty(shape, dtype=torch.float32)
    return noise.exponential_(generator=generator).log_().neg_()
