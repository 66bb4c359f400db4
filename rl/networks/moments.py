"""Running moments, and observations normalised by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of all samples seen so far, in float64.

    Batches are merged by the formula of Chan et al., which avoids cancellation. The buffers are
    part of an agent's checkpoint.

    Args:
        shape: of one sample.

    Example:
        >>> moments = RunningMoments(())
        >>> moments.update(torch.tensor([1.0, 2.0])).update(torch.tensor([6.0]))
        RunningMoments(3 samples)
        >>> moments.mean.item(), moments.variance.item()
        (3.0, 4.666666666666667)

    References:
        Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983, eq. 2.1.

    """

    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, samples: Tensor) -> RunningMoments:
        """Add samples, shape ``(B, *shape)``; return the moments themselves."""
        x = samples.double()
        if len(x) == 0:
            return self
        mean = x.mean(0)
        total, distance = self.count + len(x), mean - self.mean
        self.squares += (x - mean).square().sum(0)
        self.squares += distance.square() * (self.count * len(x) / total)
        self.mean += distance * (len(x) / total)
        self.count.copy_(total)
        return self

    @property
    def variance(self) -> Tensor:
        """The mean squared deviation from the mean; zero before the first sample."""
        return self.squares / self.count.clamp(min=1)

    def extra_repr(self) -> str:
        """Say how many samples."""
        return f"{int(self.count)} samples"


class ObservationNorm(nn.Module):
    """Observations with mean 0 and variance 1, clipped; the identity before the first update.

    The statistics change only in :meth:`update`, which the agent calls after its own update: the
    log-probabilities of a rollout and the surrogate of its update use the same ones.

    Args:
        dim: entries of an observation.
        clip: bound on the absolute value of the result.

    """

    shift: Tensor
    scale: Tensor

    def __init__(self, dim: int, clip: float = 10.0) -> None:
        super().__init__()
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self.clip = clip
        self.moments = RunningMoments((dim,))
        self.register_buffer("shift", torch.zeros(dim, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float32), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)

    def update(self, observations: Tensor) -> None:
        """Add observations, shape ``(B, dim)``."""
        self.moments.update(observations)
        self._refresh()

    def _refresh(self) -> None:
        if self.moments.count == 0:
            self.shift.zero_()
            self.scale.fill_(1.0)
            return
        variance = self.moments.variance
        spread = torch.where(variance > 0, variance, 1.0).sqrt()  # a constant entry becomes 0
        self.shift.copy_(self.moments.mean)
        self.scale.copy_(1 / spread)

    def forward(self, observations: Tensor) -> Tensor:
        """Return the observations in units of their spread, ``(..., dim)``."""
        return ((observations - self.shift) * self.scale).clamp(-self.clip, self.clip)


def _refresh(norm: ObservationNorm, _: Any) -> None:
    norm._refresh()
