"""The Kronecker factors of layers, from their inputs and the gradients at their outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.functional import pad

from ..arguments import REAL
from ..autodiff import differentiate
from ..operators.gauss_newton import GaussNewtonOperator, Tensors
from ..recorded import Node
from ..vector import exponent, ldexp
from .kfac_layers import Layer, gradient_rows, input_rows


@dataclass(frozen=True)
class Factors:
    r"""The factors of :math:`A \otimes G`, the approximation of a block of the curvature.

    They are in float64 on the CPU, which is fastest for the eigenvectors of such small matrices.
    """

    A: Tensor
    """The weighted mean of ``a a'`` over all rows; with a bias, ``a`` has an additional entry 1."""
    G: Tensor
    """The sum of ``g g'`` over all rows, divided by the number of samples."""
    rows: int
    """The number of samples, times positions per sample, times uses of the layer."""


@torch.no_grad()
def measure(
    A: GaussNewtonOperator,
    layers: Sequence[Layer],
    cotangents: Iterable[Tensors],
    weights: Tensor | None = None,
) -> list[Factors]:
    """Return the factors of each layer, from one backward pass for each of the ``cotangents``.

    A row of ``g`` is the gradient in the output of the layer for one sample, position and use; a
    row of ``a`` is the input of the layer there. ``weights`` are the weights of the samples, which
    multiply the rows of ``a``. The ``cotangents`` include them already, so that rows of ``g`` are
    left out only if their weight is 0. Rows that are not in the order of the samples have equal
    weights.
    """
    if not layers:
        return []
    nodes, grams, shares = [], {}, dict[Node, Tensor | None]()
    for layer in layers:
        out = A.vector.params[layer.weight].shape[0]
        nodes += layer.uses
        grams.update(
            dict.fromkeys(layer.uses, torch.zeros(out, out, dtype=torch.float64, device="cpu"))
        )
    edges = cast("list[Tensor]", [GradientEdge(node, 0) for node in nodes])
    active = [k for k, y in enumerate(A.outputs) if y.requires_grad]
    ys = [A.outputs[k] for k in active]
    for u in cotangents:
        for node, g in zip(nodes, differentiate(ys, edges, [u[k] for k in active]), strict=True):
            if g is not None:
                rows = gradient_rows(g)
                share = shares.setdefault(node, _shares(weights, len(rows)))
                if share is not None:
                    left_out = rows[share == 0]
                    if bool((left_out.isfinite() & (left_out != 0)).any()):
                        shares[node] = None
                    else:
                        rows = rows[share > 0]
                grams[node] = grams[node] + _gram(rows)
    factors = []
    for layer in layers:
        parts = [_moments(node, shares.get(node)) for node in layer.uses]
        moments = torch.stack([part for part, _ in parts]).sum(0)
        G = torch.stack([grams[node] for node in layer.uses]).sum(0) / A.total
        size = len(moments) if layer.bias is not None else len(moments) - 1
        mean = moments[:size, :size] / moments[-1, -1]
        factors.append(Factors(mean, G, sum(count for _, count in parts)))
    return factors


def _shares(weights: Tensor | None, rows: int) -> Tensor | None:
    """Return the weight of each row; None if the number of rows does not fit."""
    while weights is not None:
        if rows % weights.numel() == 0:
            return weights.reshape(-1).repeat_interleave(rows // weights.numel())
        weights = weights.sum(-1) if weights.ndim > 1 else None  # the layer follows a pool
    return None


def _moments(node: Node, share: Tensor | None) -> tuple[Tensor, int]:
    """Return the weighted sum of ``a a'`` over the rows of the input, and their number.

    Each row ``a`` is extended by an entry 1.
    """
    total, count = torch.zeros((), dtype=torch.float64, device="cpu"), 0
    for a in input_rows(node):
        rows = _real(a)
        size = torch.ones(len(rows), 1, dtype=torch.float64, device=rows.device)
        count += len(rows)
        if share is not None:
            part = share[count - len(rows) : count]
            size = part[part > 0].sqrt().unsqueeze(1)
            rows = rows[part > 0] * size.to(rows)
        K = pad(_gram(rows), (0, 1, 0, 1))
        K[-1, :-1] = K[:-1, -1] = (size.to(rows).T @ rows).squeeze(0).double().cpu()
        K[-1, -1] = size.square().sum().cpu()
        total = total + K
    return total, count


def _gram(rows: Tensor) -> Tensor:
    """Return ``X'X`` for the rows ``X`` in float64 on the CPU, at any scale."""
    X = _real(rows)
    K = (X.T @ X).double().cpu()
    size, info = K.trace().item() / max(1, X.numel()), torch.finfo(X.dtype)
    # if the mean square is within these bounds, no square overflowed or underflowed
    if not math.sqrt(info.tiny) < size < math.sqrt(info.max):
        e = exponent(X)
        if e is None or not math.isfinite(X.abs().max().item()):
            return K
        X = ldexp(X, -e)
        K = ldexp((X.T @ X).double().cpu(), 2 * e)
    return K


def _real(X: Tensor) -> Tensor:
    """Return the tensor in float32 if autocast reduced its precision."""
    return X if X.dtype in REAL else X.float()
