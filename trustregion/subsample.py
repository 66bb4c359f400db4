"""Random subsets of the samples, for curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def subsample(n: int, amount: float, *, seed: int = 0) -> Tensor:
    """Return the sorted positions of a random subset of ``n`` samples, shape ``(k,)``.

    The subset is drawn without replacement from a separate generator: the same arguments give the
    same positions, and torch's global generators do not advance. The curvature of a subset is an
    unbiased estimate of the curvature of all samples, at a cost in proportion to its size.

    Args:
        n: the number of samples.
        amount: the size of the subset, as a count (int) of at most ``n`` or as a fraction (float)
            in (0, 1], which is rounded to at least one sample.
        seed: the seed of the generator.

    Raises:
        TypeError: ``amount`` is not a number.
        ValueError: ``n`` is not positive, or ``amount`` is out of range.

    Example:
        >>> subsample(10, 3), subsample(10, 0.3)
        (tensor([1, 4, 7]), tensor([1, 4, 7]))

    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(
            "the amount of a subsample must be a count (int) or a fraction (float), got"
            f" {type(amount).__name__}"
        )
    if n < 1:
        raise ValueError(f"a subsample needs at least one sample to draw from, got {n}")
    fits = 1 <= amount <= n if isinstance(amount, int) else 0 < amount <= 1
    if not fits:
        raise ValueError(
            f"the amount of a subsample of {n} samples must be a count from 1 to {n} as an int, or"
            f" a fraction in (0, 1] as a float, got {amount!r}"
        )
    count = amount if isinstance(amount, int) else max(1, math.floor(n * amount + 0.5))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator, device="cpu")[:count].sort().values


def select(inputs: Sequence[Any], amount: float | None, seed: int) -> tuple[Any, ...]:
    """Return the inputs, indexed in their first dimension by a subsample; unchanged for None.

    Raises:
        ValueError: the inputs are not tensors with the same first dimension.

    """
    if amount is None:
        return tuple(inputs)
    sizes = [x.shape[0] if isinstance(x, Tensor) and x.ndim else None for x in inputs]
    if not inputs or None in sizes or len(set(sizes)) > 1:
        raise ValueError(
            "subsample= indexes the first dimension of the inputs: each must be a tensor with one"
            f" slice per sample, got first dimensions {sizes}. Let fn close over other arguments"
        )
    keep = subsample(sizes[0] or 0, amount, seed=seed)
    return tuple(x[keep.to(x.device)] for x in inputs)
