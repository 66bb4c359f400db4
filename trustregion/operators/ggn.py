"""The generalized Gauss-Newton matrix of a loss that is convex in a model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..autodiff import under_transform
from ..linearise import Linearisation, linearise
from ..linearise.functional import FunctionalLinearisation, Run, from_function, hessian
from ..replay import repeatable
from ..subsample import select
from ..vector import ParameterVector, dot, norm, split_like
from .gauss_newton import GaussNewtonOperator, Tensors
from .hessian import check_loss
from .output_hessian import OutputHessian, output_hessian, scaled

_PROBES = 3  # Lanczos steps; two detect eigenvalues of both signs that many samples share


class GGNOperator(GaussNewtonOperator):
    r"""The matrix :math:`G = J' (\nabla^2_y \ell) J` of shape ``(n, n)``.

    :math:`J = dy/d\theta` is the Jacobian of the model's outputs, and :math:`\nabla^2_y \ell` the
    Hessian of the loss in the outputs. ``G`` is the Hessian of the loss without the curvature of
    the model. It is positive semidefinite for a loss that is convex in the outputs, and equals the
    Hessian for a linear model. It scales with the loss: the loss of a mean gives the mean.

    The Hessian in the outputs is a closed form for ``mse_loss``, for ``cross_entropy`` of shape
    ``(N, C)`` with class weights or an ignored index, and for ``binary_cross_entropy_with_logits``
    without weights. For every other loss it is double backward through the loss alone.

    A loss that is not convex in the outputs is refused if a few Lanczos steps with its Hessian in
    the outputs detect negative curvature. They start from a random vector, so that negative
    curvature in few samples may go undetected. Under ``torch.func.vmap`` there is no such check.

    Args:
        loss: a scalar with its graph, computed from ``outputs`` and from no parameter directly; or
            its Hessian in the outputs.
        outputs: the model's outputs: the very tensors that the loss was computed from.
        params: the parameters, in the order of the flat vector. An existing
            :class:`ParameterVector` is used directly.
        backend: the method of differentiation for ``J``, as for :class:`FisherOperator`.
        linearisation: the products with ``J``. The default is to read them from the graph.

    Attributes:
        output_hessian: how the Hessian in the outputs is computed: ``"closed form"``, ``"double
            backward"`` or ``"forward over reverse"``.

    Raises:
        TypeError: the loss or an output is not a tensor.
        ValueError: the loss is not a scalar, does not depend on the outputs, depends on a parameter
            other than through them, or is not convex in them; or the outputs are empty or do not
            depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> x, w = torch.tensor([1.0, 2.0]), torch.zeros(1, requires_grad=True)
        >>> y = x * w
        >>> G = GGNOperator(mse_loss(y, torch.ones(2)), y, [w])
        >>> G @ torch.ones(1), G.output_hessian
        (tensor([5.]), 'closed form')

    References:
        Schraudolph, Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent, 2002.

    """

    def __init__(
        self,
        loss: Tensor | OutputHessian,
        outputs: Tensor | Sequence[Tensor],
        params: ParameterVector | Iterable[Tensor],
        *,
        backend: str = "auto",
        linearisation: Linearisation | None = None,
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        ys = _tuple(outputs)
        if not isinstance(loss, OutputHessian):
            check_loss(loss)
        if linearisation is None:
            linearisation = linearise(ys, vector, backend)
        given = isinstance(loss, OutputHessian)
        hessian = loss if given else output_hessian(loss, ys, vector)
        super().__init__(linearisation, hessian.product, 1.0)
        self.output_hessian = hessian.made_by
        if self.output_hessian != "closed form" and not under_transform():
            _check_convex(hessian.product, ys)

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Tensor | Sequence[Tensor]],
        params: Mapping[str, Tensor],
        *inputs: Any,
        loss: Callable[..., Tensor],
        targets: Tensor | None = None,
        backend: str = "auto",
        subsample: float | None = None,
        seed: int = 0,
    ) -> Self:
        """Return the operator of ``loss(fn(params, *inputs), targets)``.

        It needs no graph and works under :func:`torch.func.vmap` over stacked parameters. The
        flat vector has the order of the dict.

        Args:
            fn: ``(params, *inputs)`` -> the model's outputs, a tensor or a tuple of tensors.
            params: the parameters by name; they need not require a gradient.
            *inputs: the other arguments of ``fn``.
            loss: ``(outputs, targets)`` -> a scalar, or ``outputs`` -> a scalar without targets.
                Under two nested ``vmap`` torch cannot batch ``huber_loss``, ``smooth_l1_loss`` and,
                inside another function, ``mse_loss``: write such a loss out in tensor operations.
            targets: the second argument of ``loss``.
            backend: as for :meth:`FisherOperator.from_function`.
            subsample: the count or the fraction of the samples to use, see :func:`subsample`.
            seed: the seed of the subsample.

        Raises:
            TypeError: ``params`` is not a dict.
            ValueError: as for the class.
            RuntimeError: no method of differentiation supports the model.

        Example:
            >>> from torch.nn.functional import mse_loss
            >>> fn, w, x = (lambda p, x: x * p["w"]), torch.zeros(1), torch.tensor([1.0, 2.0])
            >>> params, y = {"w": w}, torch.ones(2)
            >>> GGNOperator.from_function(fn, params, x, loss=mse_loss, targets=y) @ torch.ones(1)
            tensor([5.])

        """
        labels = () if targets is None else (targets,)
        chosen = select((*inputs, *labels), subsample, seed)
        data, labels = chosen[: len(inputs)], chosen[len(inputs) :]

        def graph(outputs: Any, leaves: dict[str, Tensor]) -> Self:
            vector = ParameterVector(leaves.values(), list(leaves))
            return cls(loss(outputs, *labels), outputs, vector, backend=backend)

        def functional(run: Run, vector: ParameterVector) -> Self:
            def outputs_of(*tensors: Tensor) -> Tensors:
                return _tuple(run(dict(zip(vector.names, tensors, strict=True))))

            single = isinstance(run(dict(zip(vector.names, vector.params, strict=True))), Tensor)
            linearisation = FunctionalLinearisation(outputs_of, vector)
            ys = linearisation.outputs
            if loss is mse_loss and single and [y.shape for y in ys] == [t.shape for t in labels]:
                # its own batching rule fails where two transforms are nested
                made = OutputHessian(scaled(2 / ys[0].numel()), "closed form")
            else:
                value = repeatable(loss)
                _, metric = hessian(lambda *ys: value(ys[0] if single else ys, *labels), ys)
                made = OutputHessian(metric, "forward over reverse")
            return cls(made, ys, vector, linearisation=linearisation)

        return from_function(fn, params, data, backend, graph, functional)


def _tuple(outputs: Tensor | Sequence[Tensor]) -> Tensors:
    ys = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    for y in ys:
        if not isinstance(y, Tensor):
            raise TypeError(
                "outputs must be a tensor or a tuple of tensors, the ones that the loss was"
                f" computed from, got {type(y).__name__}"
            )
    if sum(y.numel() for y in ys) == 0:
        raise ValueError("the outputs are over an empty batch: they hold no number")
    return ys


@torch.no_grad()
def _check_convex(metric: Callable[[Tensors], Tensors], outputs: Tensors) -> None:
    """Raise if a few Lanczos steps from a random vector detect negative curvature."""
    generator = torch.Generator().manual_seed(0)
    like = outputs[0]
    q = torch.randn(
        sum(y.numel() for y in outputs), generator=generator, dtype=like.dtype, device="cpu"
    ).to(like.device)
    q, before, beta = q / norm(q), torch.zeros_like(q), 0.0
    T = torch.zeros(_PROBES, _PROBES, dtype=torch.float64, device="cpu")
    for k in range(_PROBES):
        parts = zip(split_like(q, outputs), outputs, strict=True)
        product = metric(tuple(part.to(y.dtype) for part, y in parts))
        w = torch.cat([t.reshape(-1).to(like.dtype) for t in product])
        if not bool(w.isfinite().all()):
            return  # the status of the solve will report it
        T[k, k] = alpha = dot(q, w)
        w = w - alpha * q - beta * before
        beta = norm(w)
        if k + 1 == _PROBES or beta <= _rounding(like) * T.abs().max().item():
            break
        T[k, k + 1] = T[k + 1, k] = beta
        before, q = q, w / beta
    values = torch.linalg.eigvalsh(T)
    if values[0] < -_rounding(like) * values.abs().max():
        raise ValueError(
            "the loss is not convex in the outputs: its curvature there is negative along a"
            " direction. Use HessianOperator(loss, params) with a solver for indefinite operators,"
            " or FisherOperator(distribution, params); or other outputs: a Gaussian with a learned"
            " scale is not convex in its mean and log-scale, and its Fisher matrix is the GGN in"
            " its natural parameters"
        )


def _rounding(like: Tensor) -> float:
    return math.sqrt(torch.finfo(like.dtype).eps)
