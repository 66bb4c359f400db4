"""Hessians by double backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..autodiff import differentiate
from ..distributions import Prediction, joint_of
from ..vector import ParameterVector
from .base import LinearOperator


class KLHessianOperator(LinearOperator):
    r"""The Hessian of :math:`\theta' \mapsto` KL(theta || theta') at ``theta``, shape ``(n, n)``.

    It equals :class:`FisherOperator` there, and is kept as an independent cross-check and as the
    baseline of the benchmarks: the KL's gradient graph is built once and kept, and each product
    is one backward pass through it (six matrix products a dense layer).

    Args:
        distribution: the prediction, with its graph, as for :class:`FisherOperator`.
        params: the parameters, in the order of the flat vector.

    Raises:
        TypeError: a family that is unknown or refused.
        ValueError: the prediction does not depend on the parameters.

    Example:
        >>> from torch.distributions import Normal
        >>> mean = torch.zeros(1, requires_grad=True)
        >>> KLHessianOperator(Normal(mean, torch.tensor([0.5])), [mean]) @ torch.ones(1)
        tensor([4.])

    """

    def __init__(self, distribution: Prediction, params: Iterable[Tensor]) -> None:
        self._vector = ParameterVector(params)
        super().__init__(self._vector.numel, self._vector.dtype, self._vector.device)
        joint = joint_of(distribution)
        self._trainable = [i for i, p in enumerate(self._vector.params) if p.requires_grad]
        self._inputs = [self._vector.params[i] for i in self._trainable]
        with torch.enable_grad():
            kl = joint.frozen().mean_kl(joint)
            if not (kl.requires_grad and self._trainable):
                raise ValueError("the distribution does not depend on the parameters")
            grads = differentiate([kl], self._inputs, create_graph=True)
        self._slots = [i for i, g in zip(self._trainable, grads, strict=True) if g is not None]
        self._grads = [g for g in grads if g is not None]

    @torch.no_grad()
    def mv(self, v: Tensor) -> Tensor:
        """Return the Hessian-vector product. Cost: one backward pass through the kept graph."""
        parts = self._vector.unravel(v)
        products = differentiate(self._grads, self._inputs, [parts[i] for i in self._slots])
        return self._vector.ravel_at(self._trainable, products)
