"""Inverses of Kronecker products, one per layer, by their eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.base import LinearOperator
from ..vector import ldexp, scalar_ldexp


@dataclass(frozen=True)
class KroneckerBlock:
    r"""The curvature :math:`(Q_A \otimes Q_G) \mathrm{diag}(c) (Q_A \otimes Q_G)'` of a layer.

    It acts on matrices ``(out, in)``: the weight, with the bias, if there is one, as the last
    column.
    """

    weight: int
    """The position in the flat vector at which the weight starts."""
    bias: int | None
    """The position at which the bias starts; None without a bias."""
    Q_A: Tensor
    Q_G: Tensor
    curvature: Tensor
    """The matrix ``(out, in)`` of ``c`` in float64, finite and nonnegative up to rounding."""


class KroneckerInverse(LinearOperator):
    r"""The operator :math:`(C + \lambda I)^{-1}` of a curvature ``C``, up to a factor.

    ``C`` is block-diagonal; its blocks are Kronecker products and single entries. The inverse is
    positive definite by construction. In each block, damped curvature below ``eps`` times the
    largest is a rounding error and is raised to that value; a block of zeros is assigned the
    largest curvature of all blocks. The factor is one unless the inverse exceeds the range of the
    dtype.

    A product costs four small matrix products per block.

    Args:
        like: an operator with the required shape, dtype and device.
        blocks: the blocks, over disjoint parts of the vector.
        diagonal: the curvature of the other entries, shape ``(n,)`` in float64, not negative. The
            entries within blocks are ignored.
        damping: the damping lambda, not negative.

    Example:
        >>> from trustregion import Identity
        >>> M = KroneckerInverse(Identity(2), [], torch.tensor([1.0, 3.0]).double(), 1.0)
        >>> M @ torch.ones(2)
        tensor([0.5000, 0.2500])

    """

    def __init__(
        self,
        like: LinearOperator,
        blocks: Sequence[KroneckerBlock],
        diagonal: Tensor,
        damping: float,
    ) -> None:
        super().__init__(like.shape[0], like.dtype, like.device)
        rest = torch.ones_like(diagonal, dtype=torch.bool)
        for block in blocks:
            for part in _slices(block):
                rest[part] = False
        curvatures = [*(block.curvature for block in blocks), diagonal[rest]]
        inverses = _inverses([c + damping for c in curvatures], like.dtype)
        scale = torch.ones_like(diagonal)
        scale[rest] = inverses.pop().double()
        self._scale = scale.to(like.device, like.dtype)
        self._blocks = [
            (_slices(block), Q_A, Q_A.T, Q_G, Q_G.T, inverse.to(like.device))
            for block, inverse in zip(blocks, inverses, strict=True)
            for Q_A, Q_G in [(block.Q_A.to(self._scale), block.Q_G.to(self._scale))]
        ]

    @torch.no_grad()
    def mv(self, v: Tensor) -> Tensor:
        """Return the product of shape ``(n,)``."""
        out = self._scale * v
        for slices, Q_A, Q_A_t, Q_G, Q_G_t, inverse in self._blocks:
            columns = [v[part].view(len(Q_G), -1) for part in slices]
            V = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
            X = Q_G @ (Q_G_t @ V @ Q_A * inverse) @ Q_A_t
            for part, x in zip(slices, X.split([c.shape[1] for c in columns], 1), strict=True):
                out[part].view_as(x).copy_(x)
        return out


def _slices(block: KroneckerBlock) -> list[slice]:
    """Return the slices of the flat vector that hold the weight and the bias of a block."""
    out, columns = block.curvature.shape
    if block.bias is None:
        return [slice(block.weight, block.weight + out * columns)]
    weight = slice(block.weight, block.weight + out * (columns - 1))
    return [weight, slice(block.bias, block.bias + out)]


def _inverses(curvatures: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return positive inverses of curvatures, up to a common factor, which is a power of two."""
    tops = [c.max().item() if c.numel() else 0.0 for c in curvatures]
    top, info = max(tops) or 1.0, torch.finfo(dtype)
    e = math.frexp(top)[1]  # in units of 2^e the largest is near one
    inverses = []
    for c, size in zip(curvatures, tops, strict=True):
        raised = c.clamp(min=info.eps * size) if size > 0 else torch.full_like(c, top)
        inverses.append(ldexp(raised, -e).reciprocal())
    limit = info.max**0.75  # leaves range for the entries of a vector
    largest = max(x.max().item() for x in inverses if x.numel())
    fits = scalar_ldexp(1.0, -e) > 1 / limit and scalar_ldexp(largest, -e) < limit
    shift = -e if fits else 0
    return [ldexp(x.clamp(max=limit), shift).to(dtype) for x in inverses]
