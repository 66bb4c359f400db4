"""Policies: modules that map observations to a distribution over actions."""

from __future__ import annotations

import abc

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..envs.layout import Part
from .encoders import Encoder, mlp
from .heads import ActionHead


class Policy(nn.Module, abc.ABC):
    """A distribution over actions for each observation.

    ``policy(rows)`` returns a torch distribution with one sample per row. A policy of your own
    needs nothing else if the environment takes the samples as they are; otherwise override
    :meth:`to_env`. Samples are drawn with a generator of the agent, so that training neither reads
    nor changes torch's global random state.
    """

    @abc.abstractmethod
    def forward(self, rows: Tensor) -> Distribution:
        """Return the distribution over actions, batch shape ``(B,)``, of rows ``(B, d)``."""

    def noise(self, steps: int, n: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002 # for overrides
        """Return the noise that :meth:`act` needs for ``steps`` steps of ``n`` actions, by step."""
        return torch.randint(2**62, (steps,), generator=generator)

    def act(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Draw one action per row. Here from torch's global state, which is put back."""
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(int(noise))
            return self(rows).sample()

    def mode(self, rows: Tensor) -> Tensor:
        """Return the most likely action of each row."""
        return self(rows).mode

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions to what the environment takes."""
        return actions


class HeadPolicy(Policy):
    """An encoder, a linear layer, and the head of an action space.

    Args:
        encoder: features of observations.
        head: from ``head.width`` outputs to a distribution.
        mask: the part of a row that is an action mask.

    Raises:
        ValueError: the mask does not fit the head's actions.

    """

    def __init__(self, encoder: Encoder, head: ActionHead, mask: Part | None = None) -> None:
        super().__init__()
        if mask is not None and mask.shape != (head.masks,):
            raise ValueError(
                f"an action mask of shape {mask.shape} does not fit {type(head).__name__}: it can"
                f" forbid {head.masks} actions"
            )
        self.encoder, self.head = encoder, head
        self.linear = mlp([encoder.width, head.width], output_gain=0.01)
        self.columns = mask.columns if mask is not None else None

    def _outputs(self, rows: Tensor) -> Tensor:
        outputs = self.linear(self.encoder(rows))
        if self.columns is None:
            return outputs
        return outputs.masked_fill(rows[..., self.columns] == 0, -torch.inf)

    def forward(self, rows: Tensor) -> Distribution:
        """Return the head's distribution."""
        return self.head(self._outputs(rows))

    def noise(self, steps: int, n: int, generator: torch.Generator) -> Tensor:
        """Return the head's noise."""
        return self.head.noise((steps, n), generator)

    def act(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Draw one action per row."""
        return self.head.draw(self._outputs(rows), noise)

    def mode(self, rows: Tensor) -> Tensor:
        """Return the most likely action of each row."""
        return self.head.mode(self._outputs(rows))

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions to what the environment takes."""
        return self.head.to_env(actions)
