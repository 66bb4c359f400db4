"""The Hessian of a loss in the outputs of a model: in closed form, or by double backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import recorded
from ..autodiff import differentiate, edge_of, upstream
from ..recorded import Node
from ..vector import ParameterVector

Tensors: TypeAlias = tuple[Tensor, ...]
Product: TypeAlias = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class OutputHessian:
    r"""The Hessian :math:`\nabla^2_y \ell` of a loss in the outputs of a model.

    Attributes:
        product: ``d -> H d`` on tuples of tensors shaped like the outputs.
        made_by: ``"closed form"``, ``"double backward"`` or ``"forward over reverse"``.

    """

    product: Product
    made_by: str


def output_hessian(loss: Tensor, outputs: Tensors, vector: ParameterVector) -> OutputHessian:
    """Return the Hessian of ``loss`` in ``outputs``, read from the graph of the loss.

    The first time in a process that a kind of loss occurs with its options, the closed form is
    compared with autograd at a random vector. It is not used if the two differ.

    Raises:
        ValueError: the loss does not depend on the outputs, or depends on a parameter other than
            through them; or one output was computed from another.

    """
    _check_cut(loss, outputs, vector)
    closed = _closed_form(loss, outputs)
    if closed is not None:
        return OutputHessian(closed, "closed form")
    return OutputHessian(_double_backward(loss, outputs), "double backward")


def scaled(factor: float | Tensor) -> Product:
    """Return the Hessian ``d -> factor d`` in one output."""
    return lambda d: (d[0] * factor,)


def _check_cut(loss: Tensor, outputs: Tensors, vector: ParameterVector) -> None:
    """Raise if the loss depends on the parameters other than through the outputs."""
    cut = {edge_of(y): i for i, y in enumerate(outputs) if y.requires_grad}
    pairs = zip(vector.names, vector.params, strict=True)
    params = {edge_of(p): name for name, p in pairs if p.requires_grad}
    behind = set(upstream([edge_of(loss)], cut))
    for edge in behind & params.keys() - cut.keys():
        raise ValueError(
            f"the loss depends on parameter {params[edge]} also past the outputs, which the"
            " matrix J' (d2 loss / d outputs2) J would drop silently. Pass the loss without"
            " its penalty and add the curvature of the penalty, as in GGNOperator(loss, outputs,"
            " params) + weight_decay * Identity(n); or list every output that the loss uses"
        )
    if not behind & cut.keys():
        raise ValueError(
            "the loss does not depend on the outputs: pass the very tensors that the loss was"
            " computed from, not copies or slices of them"
        )
    if len(cut) > 1:
        starts = [s for node, _ in cut for s in recorded.sources(node) if s[0] is not None]
        for edge in upstream(starts):
            if edge in cut:
                raise ValueError(
                    f"output {cut[edge]} was used to compute another output, so that the loss has"
                    " no derivative in each of them alone: give the loss a copy of it, y.clone(),"
                    " and pass the copy as the output"
                )


@dataclass(frozen=True)
class _Form:
    """A closed form that was recognized in the graph of a loss.

    Attributes:
        product: ``d -> H d``.
        options: the kind of the loss and its options.
        scale: the factor of the Hessian without variances, which are small at saturated outputs.

    """

    product: Product
    options: Hashable
    scale: float


_AGREED: set[Hashable] = set()  # kinds of losses whose closed form agreed with autograd


def _closed_form(loss: Tensor, outputs: Tensors) -> Product | None:
    """Return the Hessian if the graph is a known loss of one tensor and autograd agrees."""
    if len(outputs) != 1 or loss.grad_fn is None:
        return None
    y = outputs[0]
    try:
        form = _read(loss.grad_fn, y)
    except recorded.UnreadableNode:  # in another release of torch; autograd does not need it
        return None
    if form is None:
        return None
    key = (form.options, y.dtype, y.device.type)
    if key in _AGREED:
        return form.product
    right, complete = _compare(form, _double_backward(loss, outputs), y)
    if right and complete:
        _AGREED.add(key)
    return form.product if right else None


@torch.no_grad()
def _compare(form: _Form, reference: Product, y: Tensor) -> tuple[bool, bool]:
    """Return whether two products with a random vector agree, and whether that is conclusive.

    It is not if an entry of the reference is not finite, or if all are rounding errors, as those of
    autograd are at saturated outputs.
    """
    generator = torch.Generator().manual_seed(0)
    d = (torch.randn(y.shape, generator=generator, device="cpu").to(y),)
    ours, theirs = form.product(d)[0], reference(d)[0]
    known = theirs.isfinite()
    size = torch.where(known, theirs, 0.0).abs().max()
    gap = torch.where(known, ours - theirs, 0.0).abs().max()
    eps = torch.finfo(y.dtype).eps
    # far above the rounding errors, far below the effect of one sample with a wrong weight
    tolerance, rounding = math.sqrt(eps) * size, 16 * eps * form.scale * d[0].abs().max()
    return bool(gap <= tolerance + rounding), bool(known.all() & (tolerance > rounding))


def _read(node: Node, y: Tensor) -> _Form | None:
    """Return the closed form of a loss that is computed from ``y``, or None if it has none."""
    kind, sources, edge = recorded.name(node), recorded.sources(node), edge_of(y)
    if kind == "MseLossBackward0" and edge in sources and (None, 0) in sources:
        reduction = recorded.saved(node, "reduction")
        factor = 2 / _divisor(reduction, y.numel())
        return _Form(scaled(factor), (kind, reduction), factor)
    if kind == "BinaryCrossEntropyWithLogitsBackward0" and sources[0] == edge:
        weights = (recorded.saved(node, name) for name in ("weight", "pos_weight"))
        if all(w is None for w in weights) and all(source is None for source, _ in sources[1:]):
            z, reduction = y.detach(), recorded.saved(node, "reduction")
            variance = torch.sigmoid(z) * torch.sigmoid(-z)
            divisor = _divisor(reduction, z.numel())
            return _Form(scaled(variance / divisor), (kind, reduction), 1 / divisor)
    if kind == "NllLossBackward0":
        softmax = sources[0][0]
        if (
            recorded.name(softmax) == "LogSoftmaxBackward0"
            and recorded.sources(softmax)[0] == edge
            and recorded.saved(softmax, "dim") in (y.ndim - 1, -1)
        ):
            return _cross_entropy(node, recorded.saved(softmax, "result"))
    return None


def _divisor(reduction: int, size: int) -> int:
    return size if reduction == 1 else 1  # 1: mean, 2: sum


def _cross_entropy(node: Node, log_p: Tensor) -> _Form:
    """Return ``d -> w (p d - p p'd)``, with the weight of each sample in the mean or the sum."""
    target, ignored = recorded.saved(node, "target"), recorded.saved(node, "ignore_index")
    class_weights, reduction = recorded.saved(node, "weight"), recorded.saved(node, "reduction")
    counts = target != ignored
    weight = counts.to(log_p.dtype)
    if class_weights is not None:
        weight = weight * class_weights[torch.where(counts, target, 0)]
    if reduction == 1:
        weight = weight / recorded.saved(node, "total_weight")
    p = log_p.detach().exp()
    weighted = p * weight.unsqueeze(-1)

    def product(d: Tensors) -> Tensors:
        inner = (p * d[0]).sum(-1, keepdim=True)
        return ((d[0] - inner) * weighted,)

    # a batch without ignored targets is no evidence for one with some
    shown = (class_weights is not None, ignored, bool(counts.all()), log_p.ndim)
    return _Form(product, ("cross_entropy", reduction, *shown), weight.max().item())


def _double_backward(loss: Tensor, outputs: Tensors) -> Product:
    """Return the Hessian in the outputs by a backward pass through the gradient in the outputs."""
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
