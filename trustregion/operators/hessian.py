"""Hessians by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..autodiff import differentiate, edge_of, upstream
from ..distributions import Prediction, joint_of
from ..interrupts import poll
from ..linearise.base import Unmoved
from ..linearise.functional import Run, check_scalar, from_function, hessian
from ..subsample import select
from ..vector import ParameterVector
from .base import LinearOperator


@dataclass(frozen=True)
class Derivatives:
    """The first and second derivatives of a scalar at the parameters.

    Attributes:
        gradient: the gradient, shape ``(n,)``.
        product: the Hessian as ``v -> H v``.
        used: the positions of the parameters that the scalar depends on.
        backend: ``"graph"``, or ``"functional"`` from a function.

    """

    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    used: tuple[int, ...]
    backend: str


def double_backward(value: Tensor, vector: ParameterVector, what: str) -> Derivatives:
    """Return the derivatives of a scalar with a graph; the graph of its gradient is kept.

    Args:
        value: the scalar.
        vector: the parameters.
        what: the name of the scalar in an error message.

    Raises:
        ValueError: the scalar does not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    """
    trainable = [i for i, p in enumerate(vector.params) if p.requires_grad]
    inputs = [vector.params[i] for i in trainable]
    if not (value.requires_grad and inputs):
        raise ValueError(f"the {what} does not depend on the parameters")
    for _ in upstream([edge_of(value)]):  # raises where a derivative would be taken for zero
        pass
    with torch.enable_grad():
        grads = differentiate([value], inputs, create_graph=True)
    used = [(i, g) for i, g in zip(trainable, grads, strict=True) if g is not None]
    if not used:
        raise ValueError(f"the {what} does not depend on the parameters")
    curved = {i: g for i, g in used if g.requires_grad}

    def product(v: Tensor) -> Tensor:
        parts = vector.tangents(v)
        products = differentiate(list(curved.values()), inputs, [parts[i] for i in curved])
        return vector.ravel_at(trainable, products)

    gradient = vector.ravel_at(trainable, grads).detach()
    return Derivatives(gradient, product, tuple(i for i, _ in used), "graph")


def forward_over_reverse(loss: Callable[..., Tensor], vector: ParameterVector) -> Derivatives:
    """Return the derivatives of ``loss(*params)``, which runs again for each product."""
    point = tuple(p.detach() for p in vector.params)
    gradient, times = hessian(loss, point)
    slope = vector.ravel(gradient(*point)).detach()
    unmoved = Unmoved(p for p in point if not p.is_inference())

    def product(v: Tensor) -> Tensor:
        unmoved.check()
        return vector.ravel(times(tuple(vector.tangents(v))))

    return Derivatives(slope, product, tuple(range(len(point))), "functional")


class _ScalarHessian(LinearOperator):
    """The Hessian of a scalar, from its derivatives."""

    def __init__(self, derivatives: Derivatives, vector: ParameterVector) -> None:
        super().__init__(vector.numel, vector.dtype, vector.device)
        self.gradient, self.used = derivatives.gradient, derivatives.used
        self.backend, self._product = derivatives.backend, derivatives.product

    @torch.no_grad()
    def mv(self, v: Tensor) -> Tensor:
        """Return the Hessian-vector product. Cost: one backward pass through the kept graph."""
        poll()
        return self._product(v)


class HessianOperator(_ScalarHessian):
    r"""The Hessian :math:`\nabla^2_\theta \ell` of a loss at the parameters, shape ``(n, n)``.

    It is symmetric and usually indefinite: use it with ``minres``, ``steihaug`` or ``gltr``, or
    with a shift. The graph of the gradient is built once and kept; each product is one backward
    pass through it.

    Parameters that are frozen or that the loss does not use have rows of exact zeros. Over an empty
    batch the matrix is zero, even though a loss that is a mean is NaN.

    Args:
        loss: a scalar with its graph, which the operator keeps alive; or its derivatives.
        params: the parameters, in the order of the flat vector. An existing
            :class:`ParameterVector` is used directly.

    Attributes:
        gradient: the gradient of the loss, shape ``(n,)``.
        backend: ``"graph"``, or ``"functional"`` from a function.
        used: the positions of the parameters that the loss depends on.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is not a scalar, or does not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> H = HessianOperator(x[0] * x[1] + x[1] ** 3, [x])
        >>> H.gradient, H @ torch.tensor([1.0, 0.0])
        (tensor([ 2., 13.]), tensor([0., 1.]))

    References:
        Pearlmutter, Fast Exact Multiplication by the Hessian, 1994.

    """

    def __init__(
        self, loss: Tensor | Derivatives, params: ParameterVector | Iterable[Tensor]
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        if not isinstance(loss, Derivatives):
            check_loss(loss)
            loss = double_backward(loss, vector, "loss")
        super().__init__(loss, vector)

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Tensor],
        params: Mapping[str, Tensor],
        *inputs: Any,
        backend: str = "auto",
        subsample: float | None = None,
        seed: int = 0,
    ) -> Self:
        """Return the Hessian of the scalar ``fn(params, *inputs)`` in ``params``.

        It needs no graph and works under :func:`torch.func.vmap` over stacked parameters. The
        flat vector has the order of the dict.

        Args:
            fn: ``(params, *inputs)`` -> the loss.
            params: the parameters by name; they need not require a gradient.
            *inputs: the other arguments of ``fn``.
            backend: ``"graph"``; ``"functional"``, which differentiates the gradient in forward
                mode and runs ``fn`` again for each product, with the random numbers of the first
                run; or ``"auto"``.
            subsample: the count or the fraction of the samples to use, see :func:`subsample`.
            seed: the seed of the subsample.

        Raises:
            TypeError: ``params`` is not a dict.
            ValueError: as for the class.
            RuntimeError: no method of differentiation supports the model; or, in a product, the
                parameters have been modified in place.

        Example:
            >>> params = {"x": torch.tensor([1.0, 2.0])}
            >>> H = HessianOperator.from_function(lambda p: p["x"].prod() ** 2, params)
            >>> H @ torch.tensor([1.0, 0.0])
            tensor([8., 8.])

        """

        def graph(loss: Tensor, leaves: dict[str, Tensor]) -> Self:
            return cls(loss, ParameterVector(leaves.values(), list(leaves)))

        def functional(run: Run, vector: ParameterVector) -> Self:
            def loss(*tensors: Tensor) -> Tensor:
                return run(dict(zip(vector.names, tensors, strict=True)))

            return cls(forward_over_reverse(loss, vector), vector)

        chosen = select(inputs, subsample, seed)
        return from_function(
            fn, params, chosen, backend, graph, functional, backends=("auto", "graph")
        )


class KLHessianOperator(_ScalarHessian):
    r"""The Hessian of :math:`\theta' \mapsto` KL(theta || theta') at ``theta``, shape ``(n, n)``.

    It equals :class:`FisherOperator` there, and serves as an independent check of it and as the
    baseline of the benchmarks. The graph of the gradient of the KL is built once and kept, and each
    product is one backward pass through it: six matrix products per dense layer.

    Args:
        distribution: the prediction, with its graph, as for :class:`FisherOperator`.
        params: the parameters, in the order of the flat vector.

    Raises:
        TypeError: a family is unknown or refused.
        ValueError: the prediction does not depend on the parameters.

    Example:
        >>> from torch.distributions import Normal
        >>> mean = torch.zeros(1, requires_grad=True)
        >>> KLHessianOperator(Normal(mean, torch.tensor([0.5])), [mean]) @ torch.ones(1)
        tensor([4.])

    """

    def __init__(
        self, distribution: Prediction, params: ParameterVector | Iterable[Tensor]
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        joint = joint_of(distribution)
        with torch.enable_grad():
            kl = joint.frozen().mean_kl(joint)
        super().__init__(double_backward(kl, vector, "distribution"), vector)


def check_loss(loss: Tensor) -> None:
    """Raise unless a loss is a scalar tensor with a graph.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is not a scalar, or has no graph.

    """
    check_scalar(loss)
    if not loss.requires_grad:
        raise ValueError(
            "the loss carries no graph: compute it from the model's outputs with grad enabled,"
            " without detach(), .item() or torch.no_grad()"
        )
