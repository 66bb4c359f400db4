"""The generalised Gauss-Newton matrix of any convex loss of a model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..autodiff import differentiate, edge_of, upstream
from ..linearise import Linearisation, linearise
from ..linearise.functional import (
    FunctionalLinearisation,
    Run,
    from_function,
    hessian,
    under_transform,
)
from ..replay import repeatable
from ..subsample import select
from ..vector import ParameterVector, dot, norm, split_like
from .gauss_newton import GaussNewtonOperator, Tensors
from .hessian import check_loss

_PROBES = 3  # Lanczos steps: eigenvalues of both signs shared by many samples show in two


class GGNOperator(GaussNewtonOperator):
    r"""The matrix :math:`G = J' (\nabla^2_y \ell) J` of shape ``(n, n)``.

    :math:`J = dy/d\theta` is the Jacobian of the model's outputs, :math:`\nabla^2_y \ell` the
    Hessian of the loss in the outputs. ``G`` is the Hessian of the loss without the curvature of
    the model, positive semidefinite for a loss that is convex in the outputs, and the two are equal
    for a linear model. It scales with the loss: a mean over the batch gives a mean.

    The Hessian in the outputs is a closed form for ``mse_loss``, ``cross_entropy`` of shape
    ``(N, C)`` with class weights or an ignored index, and ``binary_cross_entropy_with_logits``
    without weights; for every other loss it is a second backward pass through the loss alone.

    A loss that is not convex in the outputs is refused where a few products with its Hessian in
    the outputs show it. They start from a random vector, so that a negative curvature of few
    samples may go unseen. Under ``torch.func.vmap`` nothing is asked.

    Args:
        loss: a scalar with its graph, computed from ``outputs`` and from no parameter besides.
        outputs: the model's outputs: the very tensors that the loss was computed from.
        params: the parameters, in the order of the flat vector. An already built
            :class:`ParameterVector` is taken as it is.
        backend: which way of differentiating makes the products with ``J``.

    Attributes:
        output_hessian: ``"closed form"``, ``"double backward"`` or ``"forward over reverse"``.

    Raises:
        TypeError: something that is not a tensor.
        ValueError: the loss is not a scalar, does not depend on the outputs, depends on a parameter
            past them, or is not convex in them; or the outputs are empty or do not depend on the
            parameters.
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

    output_hessian: str

    def __init__(
        self,
        loss: Tensor,
        outputs: Tensor | Sequence[Tensor],
        params: ParameterVector | Iterable[Tensor],
        *,
        backend: str = "auto",
    ) -> None:
        vector = params if isinstance(params, ParameterVector) else ParameterVector(params)
        ys = _tuple(outputs)
        check_loss(loss)
        linearisation = linearise(ys, vector, backend)
        _check_cut(loss, ys, vector)
        closed = _closed_form(loss, ys)
        self.output_hessian = "closed form" if closed else "double backward"
        self._finish(linearisation, closed or _double_backward(loss, ys))

    def _finish(self, linearisation: Linearisation, metric: Callable[[Tensors], Tensors]) -> None:
        super().__init__(linearisation, metric, 1.0)
        if self.output_hessian != "closed form" and not under_transform():
            _check_convex(metric, linearisation.outputs)

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

        It needs no graph, and works under :func:`torch.func.vmap` over stacked parameters. The
        flat vector has the order of the dict.

        Args:
            fn: ``(params, *inputs)`` -> the model's outputs, a tensor or a tuple of tensors.
            params: the parameters by name; they need not require a gradient.
            *inputs: what else ``fn`` takes.
            loss: ``(outputs, targets)`` -> a scalar, or ``outputs`` -> a scalar without targets.
                Under two nested ``vmap`` torch cannot batch ``huber_loss``, ``smooth_l1_loss`` and,
                unless given as it is, ``mse_loss``: write such a loss out.
            targets: the second argument of ``loss``.
            backend: ``"graph"``, ``"functional"`` or ``"auto"``.
            subsample: a count or a fraction of the samples, see :func:`subsample`.
            seed: of the subsample.

        Raises:
            TypeError: ``params`` is not a dict.
            ValueError: as for the class.
            RuntimeError: no way of differentiating can.

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
            operator = cls.__new__(cls)
            ys = linearisation.outputs
            if loss is mse_loss and single and [y.shape for y in ys] == [t.shape for t in labels]:
                # its own batching rule fails where two transforms are nested
                operator.output_hessian, metric = "closed form", _scaled(2 / ys[0].numel())
            else:
                operator.output_hessian = "forward over reverse"
                value = repeatable(loss)
                _, metric = hessian(lambda *ys: value(ys[0] if single else ys, *labels), ys)
            operator._finish(linearisation, metric)
            return operator

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


def _check_cut(loss: Tensor, outputs: Tensors, vector: ParameterVector) -> None:
    """Raise where the outputs do not cut the loss off from the parameters."""
    cut = {edge_of(y): i for i, y in enumerate(outputs) if y.requires_grad}
    pairs = zip(vector.names, vector.params, strict=True)
    params = {edge_of(p): name for name, p in pairs if p.requires_grad}
    behind = set(upstream([edge_of(loss)], cut))
    for edge in behind & params.keys() - cut.keys():
        raise ValueError(
            f"the loss depends on parameter {params[edge]} also past the outputs, which the"
            " matrix J' (d2 loss / d outputs2) J would drop silently. Pass the loss without"
            " its penalty and add the penalty's own curvature, as in GGNOperator(loss, outputs,"
            " params) + weight_decay * Identity(n); or list every output that the loss uses"
        )
    if not behind & cut.keys():
        raise ValueError(
            "the loss does not depend on the outputs: pass the very tensors that the loss was"
            " computed from, not copies or slices of them"
        )
    if len(cut) > 1:
        sources = [s for node, _ in cut for s in node.next_functions if s[0] is not None]
        for edge in upstream(sources):
            if edge in cut:
                raise ValueError(
                    f"output {cut[edge]} was used to compute another output, so that the loss has"
                    " no derivative in each of them alone: give the loss a copy of it, y.clone(),"
                    " and pass the copy as the output"
                )


def _closed_form(loss: Tensor, outputs: Tensors) -> Callable[[Tensors], Tensors] | None:
    """Return the Hessian in the outputs where the graph is one loss function of one tensor."""
    if len(outputs) != 1:
        return None
    node: Any = loss.grad_fn
    edge, sources = edge_of(outputs[0]), node.next_functions
    name = node.name()
    if name == "MseLossBackward0" and edge in sources and (None, 0) in sources:
        return _scaled(2 / _reduced(node, outputs[0].numel()))
    if name == "BinaryCrossEntropyWithLogitsBackward0" and sources[0] == edge:
        if node._saved_weight is None and node._saved_pos_weight is None and _alone(sources):
            z = outputs[0].detach()
            variance = torch.sigmoid(z) * torch.sigmoid(-z)
            return _scaled(variance / _reduced(node, z.numel()))
    elif name == "NllLossBackward0":
        softmax: Any = sources[0][0]
        if (
            softmax.name() == "LogSoftmaxBackward0"
            and softmax.next_functions[0] == edge
            and softmax._saved_dim in (outputs[0].ndim - 1, (1 << 64) - 1)  # saved unsigned
        ):
            return _cross_entropy(node, softmax._saved_result)
    return None


def _alone(sources: Sequence[tuple[Any, int]]) -> bool:
    return all(node is None for node, _ in sources[1:])


def _reduced(node: Any, size: int) -> int:
    return size if node._saved_reduction == 1 else 1  # 1: mean, 2: sum


def _scaled(factor: float | Tensor) -> Callable[[Tensors], Tensors]:
    return lambda d: (d[0] * factor,)


def _cross_entropy(node: Any, log_p: Tensor) -> Callable[[Tensors], Tensors]:
    """Return ``d -> w (p d - p p'd)`` for each sample, with its weight in the mean or the sum."""
    target, ignored = node._saved_target, node._saved_ignore_index
    kept = target != (ignored - (1 << 64) if ignored >= 1 << 63 else ignored)  # saved unsigned
    weight = kept.to(log_p.dtype)
    if node._saved_weight is not None:
        weight = weight * node._saved_weight[torch.where(kept, target, 0)]
    if node._saved_reduction == 1:
        weight = weight / node._saved_total_weight
    p, weight = log_p.detach().exp(), weight.unsqueeze(-1)
    weighted = p * weight

    def product(d: Tensors) -> Tensors:
        inner = (p * d[0]).sum(-1, keepdim=True)
        return ((d[0] - inner) * weighted,)

    return product


def _double_backward(loss: Tensor, outputs: Tensors) -> Callable[[Tensors], Tensors]:
    """Return the Hessian in the outputs as a backward pass through their gradient alone."""
    active = [i for i, y in enumerate(outputs) if y.requires_grad]
    inputs = [outputs[i] for i in active]
    with torch.enable_grad():
        gradient = differentiate([loss], inputs, create_graph=True)
    curved = {i: g for i, g in zip(active, gradient, strict=True) if g is not None}
    curved = {i: g for i, g in curved.items() if g.requires_grad}

    def product(d: Tensors) -> Tensors:
        out = [torch.zeros_like(y) for y in outputs]
        parts = differentiate(list(curved.values()), inputs, [d[i] for i in curved])
        for i, part in zip(active, parts, strict=True):
            out[i] = out[i] if part is None else part
        return tuple(out)

    return product


@torch.no_grad()
def _check_convex(metric: Callable[[Tensors], Tensors], outputs: Tensors) -> None:
    """Raise where a few steps of Lanczos from a random vector meet a negative curvature."""
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
            return  # the solver's status will tell
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
