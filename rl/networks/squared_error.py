"""The error of a critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .critic import Critic
from .numpy_twin import DenseNetwork


def squared_error(
    critic: nn.Module, parameters: Sequence[nn.Parameter], rows: Tensor, returns: Tensor
) -> Callable[[Tensor], float]:
    r"""Return the function :math:`E[(V - R)^2]` of positions in a batch.

    Each call leaves its gradient in the ``grad`` of the parameters that require one. What does not
    change while only these do is computed once.

    Args:
        critic: rows to values.
        parameters: those to differentiate by.
        rows: of observations, ``(B, d)``.
        returns: targets, ``(B,)``.

    """
    parameters = [p for p in parameters if p.requires_grad]
    dense = critic.encoder.dense(critic.linear) if isinstance(critic, Critic) else None
    if dense is not None:
        prepare, network = dense
        frozen, fitted = network.split(parameters)
        if {id(p) for p in fitted.parameters()} == {id(p) for p in parameters}:
            inputs = frozen(prepare(rows.numpy()))
            return _in_numpy(fitted, inputs, returns.numpy())

    def error(positions: Tensor) -> float:
        value = (critic(rows[positions]) - returns[positions]).square().mean()
        gradient = torch.autograd.grad(value, parameters, allow_unused=True)
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = g
        return value.item()

    return error


def _in_numpy(
    network: DenseNetwork, inputs: np.ndarray, returns: np.ndarray
) -> Callable[[Tensor], float]:
    parameters = network.parameters()

    def error(positions: Tensor) -> float:
        i = positions.numpy()
        with np.errstate(all="ignore"):  # the caller looks at the error
            value, gradient = network.squared_error(inputs[i], returns[i])
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = torch.from_numpy(g)
        return value

    return error
