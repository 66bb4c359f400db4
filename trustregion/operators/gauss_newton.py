"""Operators of the form J' M J: a metric on a model's outputs, in its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..interrupts import poll
from ..linearise import Linearisation
from ..vector import ParameterVector, split_like
from .base import LinearOperator
from .map import FunctionMap, LinearMap

Tensors: TypeAlias = tuple[Tensor, ...]


class GaussNewtonOperator(LinearOperator):
    r"""The operator :math:`J' M J / N` of shape ``(n, n)``.

    :math:`J` is the Jacobian of a model's outputs in its parameters, and :math:`M`, the metric, is
    a symmetric map on the outputs, usually positive semidefinite. :class:`FisherOperator`,
    :class:`GGNOperator` and the sampled Fisher matrices are special cases.

    Args:
        linearisation: the products with ``J``.
        metric: ``d -> M d`` on tuples of tensors shaped like the outputs. The result may share
            memory with ``d``, which must not be written to.
        total: ``N``, the number of samples or the sum of their weights.

    Attributes:
        apply_metric: the argument ``metric``.

    """

    def __init__(
        self, linearisation: Linearisation, metric: Callable[[Tensors], Tensors], total: float
    ) -> None:
        vector = linearisation.vector
        super().__init__(vector.numel, vector.dtype, vector.device)
        self._linearisation, self._total = linearisation, total
        self.apply_metric = metric

    @property
    def backend(self) -> str:
        """The method of differentiation."""
        return self._linearisation.backend

    @property
    def vector(self) -> ParameterVector:
        """The parameters, in the order of the flat vector."""
        return self._linearisation.vector

    @property
    def total(self) -> float:
        """``N``, the number of samples or the sum of their weights."""
        return self._total

    @property
    def outputs(self) -> Tensors:
        """The outputs of the model, with their graph."""
        return self._linearisation.outputs

    @property
    def used(self) -> tuple[int, ...]:
        """The positions of the parameters that the outputs depend on; other rows are zero."""
        return self._linearisation.used

    def jvp(self, v: Tensor) -> Tensors:
        """Return ``Jv``, one tensor per output."""
        return tuple(t.clone() for t in self._linearisation.jvp(v))

    def vjp(self, u: Sequence[Tensor]) -> Tensor:
        """Return ``J'u`` of shape ``(n,)``."""
        return self._linearisation.vjp(u)

    @torch.no_grad()
    def mv(self, v: Tensor) -> Tensor:
        """Return the product of shape ``(n,)``. Cost: one product, no forward pass."""
        poll()
        return self.vjp(self.apply_metric(self._linearisation.jvp(v))).div_(self._total)

    @property
    def jacobian(self) -> LinearMap:
        """The Jacobian ``J`` of all outputs, flattened, of shape ``(m, n)``.

        The rows follow the outputs in the order of :meth:`jvp`, each in its logical order. A
        product with ``J`` or with ``J'`` costs half a product with the operator.

        Example:
            >>> from torch.distributions import Normal
            >>> from trustregion import FisherOperator
            >>> mean = torch.zeros(2, requires_grad=True)
            >>> F = FisherOperator(Normal(mean, torch.tensor([1.0, 2.0])), [mean])
            >>> F.jacobian.shape, F.jacobian.mv(torch.tensor([3.0, 4.0]))
            ((4, 2), tensor([3., 4., 0., 0.]))

        """
        shape = (sum(y.numel() for y in self.outputs), self.shape[0])
        return FunctionMap(
            lambda v: self._flatten(self._linearisation.jvp(v)),
            lambda u: self.vjp(self._unflatten(u)),
            shape,
            self.dtype,
            self.device,
        )

    @torch.no_grad()
    def metric(self, u: Tensor) -> Tensor:
        """Return ``M u`` of shape ``(m,)``.

        The product with the operator is ``jacobian.rmv(metric(jacobian.mv(v))) / N``.
        """
        return self._flatten(self.apply_metric(self._unflatten(u)))

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors]).to(self.dtype)

    def _unflatten(self, u: Tensor) -> Tensors:
        return tuple(split_like(u, self.outputs))
