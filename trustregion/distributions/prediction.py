"""The predictions of a model, as a joint distribution of independent factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from .family import Tensors
from .joint import Joint
from .registry import resolve

Factors: TypeAlias = "Distribution | Mapping[str, Factors] | Sequence[Factors]"
Prediction: TypeAlias = "Weighted | Factors"


@dataclass(frozen=True)
class Weighted:
    r"""A prediction over a batch with a weight for each sample.

    The KL and the Fisher matrix become the weighted means :math:`\sum_i w_i \mathrm{KL}_i / \sum_i
    w_i` and :math:`\sum_i w_i J_i' M_i J_i / \sum_i w_i`, so a mask over padded sequences is a
    weight. The loss is the caller's own: it should use the same weights.

    A sample of weight 0 contributes exactly zero to the KL, and the result of ``M`` is exactly zero
    there, for any parameters. Derivatives still pass through the network for this sample, where
    zero times NaN is NaN, both in a gradient and in a product: give padding finite inputs, such as
    zeros.

    It is accepted in place of any prediction, around the whole prediction and not inside a dict,
    list or tuple.

    Args:
        prediction: a distribution, or a dict, list or tuple of independent ones.
        weights: a real tensor, finite and not negative, or a bool tensor, with a positive sum. Its
            shape is a leading part of the batch shape of every factor: ``(N,)``, or ``(N, T)`` for
            the steps of N sequences, which are then the samples of the mean. The weights are
            constants: no derivative is taken in them.

    Example:
        >>> from torch.distributions import Normal
        >>> mask = torch.tensor([True, True, False])
        >>> old = Weighted(Normal(torch.zeros(3), 1.0), mask)
        >>> new = Weighted(Normal(torch.tensor([1.0, 1.0, torch.nan]), 1.0, False), mask)
        >>> mean_kl(old, new).item()
        0.5

    """

    prediction: Factors
    weights: Tensor


def leaves_of(prediction: Factors, path: str = "") -> Iterator[tuple[str, Distribution]]:
    """Yield the distributions of a prediction, of any family, each with its path.

    Raises:
        TypeError: a part of the prediction is not a distribution.

    """
    if isinstance(prediction, Distribution):
        yield path, prediction
    elif isinstance(prediction, Mapping):
        for key in prediction:
            yield from leaves_of(prediction[key], f"{path}[{key!r}]")
    elif isinstance(prediction, (list, tuple)):
        for i, part in enumerate(prediction):
            yield from leaves_of(part, f"{path}[{i}]")
    else:
        at = f" at {path}" if path else ""
        if isinstance(prediction, Weighted):
            raise TypeError(
                f"Weighted goes around a whole prediction, got one inside another{at}: all factors"
                " of a sample share its weight"
            )
        given = "a tensor" if isinstance(prediction, Tensor) else f"{type(prediction).__name__}"
        raise TypeError(
            "a prediction must be a torch distribution, or a dict, list or tuple of independent"
            f" ones, got {given}{at}: wrap network outputs, for example"
            " Categorical(logits=outputs)"
        )


def batch_size_of(batches: Mapping[str, torch.Size]) -> int:
    """Return the size of the first dimension of the batch shapes, which are given by label.

    Raises:
        ValueError: there are no factors, they differ in size, or the batch is empty.

    """
    if not batches:
        raise ValueError("the prediction is empty: it holds no distribution")
    sizes = {label: batch[0] if batch else 1 for label, batch in batches.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the factors of a joint prediction must share one batch, got {sizes}")
    if any(batch.numel() == 0 for batch in batches.values()):
        raise ValueError("the prediction is over an empty batch: it holds no sample")
    return next(iter(sizes.values()))


def checked_weights(
    weights: Tensor, batches: Mapping[str, torch.Size], device: torch.device
) -> Tensor:
    """Return a detached copy of the weights in float64 on ``device``.

    Raises:
        ValueError: the weights are invalid, or do not fit the batch shapes.

    """
    if not isinstance(weights, Tensor) or weights.is_complex():
        given = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights must be a real or bool tensor, got {given}")
    for label, batch in batches.items():
        if weights.ndim == 0 or batch[: weights.ndim] != weights.shape:
            raise ValueError(
                "the shape of weights must be a leading part of the batch shape of every factor,"
                f" got weights of shape {tuple(weights.shape)} for {label} with batch shape"
                f" {tuple(batch)}: one weight for each sample"
            )
    weights = weights.detach().to(device, torch.float64, copy=True)
    if not bool(weights.isfinite().all()):
        raise ValueError("weights must be finite, got NaN or infinity: use 0 to leave a sample out")
    if bool((weights < 0).any()):
        raise ValueError(f"weights must not be negative, got {weights.min().item()}")
    total = weights.sum().item()
    if not 0 < total < float("inf"):
        raise ValueError(
            f"the sum of weights must be positive and finite, got {total}: a mean needs at least"
            " one sample, so skip a batch that is all padding"
        )
    return weights


def _weights(
    given: Tensor, batches: Mapping[str, torch.Size], parameters: Sequence[Tensors]
) -> Tensor:
    weights = checked_weights(given, batches, parameters[0][0].device)
    for label, tensors in zip(batches, parameters, strict=True):
        if any(t.shape[: weights.ndim] != weights.shape for t in tensors):
            raise ValueError(
                "weights need parameter tensors with the batch shape in front, got the shapes"
                f" {[tuple(t.shape) for t in tensors]} in {label}: expand what samples share"
            )
    return weights


def joint_of(prediction: Prediction) -> Joint:
    """Resolve a prediction (a distribution, or a dict, list or tuple of them) to a :class:`Joint`.

    The first dimension of the batch shape is the batch. All other dimensions, the event dimensions
    of ``Independent`` and all factors are one joint event, over which the KL is summed. With
    :class:`Weighted`, all dimensions of the weights are the batch.

    Raises:
        TypeError: a part is not a distribution, or its family is unknown or refused.
        ValueError: the prediction or the batch is empty, the factors have different batch sizes, or
            the weights are invalid or do not fit the batch.

    """
    weighted = isinstance(prediction, Weighted)
    labels, families, constants = [], [], []
    parameters: list[Tensors] = []
    batches: dict[str, torch.Size] = {}
    for path, leaf in leaves_of(prediction.prediction if weighted else prediction):
        factor = resolve(leaf)
        labels.append(f"{path}{factor.name}")
        batches[labels[-1]] = leaf.batch_shape
        families.append(factor.family)
        constants.append(factor.constants)
        with torch.enable_grad():  # some parameters are computed on first access
            parameters.append(tuple(factor.family.parameters(factor.holder)))
    batch_size = batch_size_of(batches)
    if any(t.numel() == 0 for tensors in parameters for t in tensors):
        raise ValueError("the prediction is over an empty batch: it holds no sample")
    weights = _weights(prediction.weights, batches, parameters) if weighted else None
    return Joint(
        tuple(labels),
        tuple(families),
        tuple(parameters),
        tuple(constants),
        batch_size,
        weights,
        batch_size if weights is None else weights.sum().item(),
    )


def mean_kl(old: Prediction, new: Prediction) -> Tensor:
    """Return KL(old || new) in nats: joint over all dimensions, mean over the batch, in float64.

    Args:
        old: a distribution, or a dict, list or tuple of independent ones; :class:`Weighted` for a
            weighted mean.
        new: the same structure over the same batch, with the same weights.

    Returns:
        A float64 scalar, differentiable in the parameters of both.

    Raises:
        TypeError: a family is unknown or refused.
        ValueError: the predictions differ in structure, shape or weights.

    Example:
        >>> from torch.distributions import Normal
        >>> old = Normal(torch.zeros(5), torch.ones(5))
        >>> new = Normal(torch.full((5,), 0.2), torch.ones(5))
        >>> round(mean_kl(old, new).item(), 6)
        0.02

    """
    return joint_of(old).mean_kl(joint_of(new))
