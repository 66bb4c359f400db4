"""Random changes of a model's outputs, with the metric of an operator as their covariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import finite
from ..operators.fisher import FisherOperator
from ..operators.gauss_newton import GaussNewtonOperator, Tensors
from ..operators.root import factor_blocks
from ..operators.sampled import MonteCarloFisherOperator

Samples: TypeAlias = 'int | Literal["exact"]'
Root: TypeAlias = Callable[[Tensors], Tensors]
"""``e -> B'e`` for changes ``e`` shaped like the outputs, where ``B'B = M``."""
Blocks: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
"""The same map for a part of the outputs."""


class CoupledSamples(ValueError):
    """The metric couples samples, so that it has no root of one block per sample."""


def draw_count(A: GaussNewtonOperator, samples: Samples) -> int:
    """Return the number of tuples that :func:`cotangents` yields."""
    return sum(_rows(y).shape[1] for y in A.outputs) if samples == "exact" else samples


@torch.no_grad()
def sample_weights(A: GaussNewtonOperator) -> Tensor | None:
    """Return the weights of the samples, scaled to a maximum of one; None if they are equal.

    For an operator without weights, the weight is 0 where the metric is zero, and 1 elsewhere.
    """
    if isinstance(A, FisherOperator):
        weights = A.joint.weights
    elif isinstance(A, MonteCarloFisherOperator):
        weights = A.sample_weights
    else:
        weights = _curved(A)
    if weights is None or bool((weights == weights.max()).all()):
        return None
    return weights / weights.max()


def _curved(A: GaussNewtonOperator) -> Tensor | None:
    """Return 1 for the samples on which the metric is not zero, and 0 for the others."""
    if len({y.shape[:1] for y in A.outputs}) > 1 or not A.outputs[0].ndim:
        return None
    generator = torch.Generator().manual_seed(0)
    Mr = A.apply_metric(
        tuple(torch.randn(y.shape, generator=generator, device="cpu").to(y) for y in A.outputs)
    )
    curved = torch.stack([(_rows(x) != 0).any(1) for x in Mr]).any(0)
    return curved.double() if bool(curved.any()) else None


@torch.no_grad()
def cotangents(
    A: GaussNewtonOperator, samples: Samples, generator: torch.Generator
) -> Iterator[Tensors]:
    r"""Yield tuples ``u`` shaped like the outputs of ``A``, with :math:`\sum u u' = M` on average.

    ``u = B'e`` where ``e`` is a vector of random signs, which minimizes the noise of ``u u'`` among
    all vectors with independent entries of unit variance. For ``"exact"``, ``e`` runs over the unit
    vectors of a sample, in all samples simultaneously: the diagonal blocks of the sum, one per
    sample, are then exactly those of ``M``.

    The root ``B`` costs two products with ``M`` if ``M`` scales each entry, as for ``Normal``, or
    is the Fisher matrix of a softmax of the outputs up to a factor per sample. A product with a
    random vector detects these cases: any other ``M`` gives the same product with probability zero.
    Otherwise the block of each sample is formed and factored, at one product per output.

    Raises:
        CoupledSamples: the metric couples samples.

    """
    root, outputs = _root(A), A.outputs
    if samples == "exact":
        yield from map(root, _units(outputs, range(len(outputs))))
        return
    size = 1 / math.sqrt(samples)
    for _ in range(samples):
        coins = (
            torch.randint(2, y.shape, generator=generator, device="cpu").to(y) for y in outputs
        )
        yield root(tuple(coin.mul_(2 * size).sub_(size) for coin in coins))


def _units(outputs: Tensors, positions: Sequence[int]) -> Iterator[Tensors]:
    """Yield the unit vectors of a sample in some outputs, in all samples simultaneously."""
    for k in positions:
        for c in range(_rows(outputs[k]).shape[1]):
            e = tuple(torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in outputs)
            _rows(e[k])[:, c] = 1.0
            yield e


def _rows(y: Tensor) -> Tensor:
    """Return an output as a matrix with one row per sample; a view if ``y`` is contiguous."""
    return y.reshape(y.shape[0] if y.ndim else 1, -1)


def _root(A: GaussNewtonOperator) -> Root:
    outputs = tuple(y.detach() for y in A.outputs)
    generator = torch.Generator().manual_seed(0)
    r = tuple(torch.randn(y.shape, generator=generator, device="cpu").to(y) for y in outputs)
    diagonals = A.apply_metric(tuple(torch.ones_like(y) for y in outputs))
    Mr = A.apply_metric(r)
    if not all(finite(x) for x in Mr):
        return lambda _: Mr  # the factors are not finite either, which the caller checks
    parts = zip(outputs, r, diagonals, Mr, strict=True)
    simple = [_scaling(x, d, Mx) or _softmax(y, x, Mx) for y, x, d, Mx in parts]
    rest = [k for k, part in enumerate(simple) if part is None]
    blocks = _blocks(A, outputs, rest) if rest else None

    def root(e: Tensors) -> Tensors:
        made = [part(x) if part is not None else x for part, x in zip(simple, e, strict=True)]
        if blocks is not None:
            for k, u in zip(rest, blocks([e[k] for k in rest]), strict=True):
                made[k] = u
        return tuple(made)

    return root


def _close(a: Tensor, b: Tensor, size: Tensor) -> bool:
    # far above rounding errors; a smaller difference of the metric does not matter here
    return bool(((a - b).abs() <= math.sqrt(torch.finfo(a.dtype).eps) * size).all())


def _scaling(r: Tensor, diagonal: Tensor, Mr: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the root of an ``M`` that scales each entry, or None if ``M`` does not."""
    scaled = diagonal * r
    if not _close(Mr, scaled, scaled.abs()):
        return None
    root = diagonal.clamp(min=0.0).sqrt()
    return lambda e: root * e


def _softmax(y: Tensor, r: Tensor, Mr: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the root of ``w (diag(p) - pp')``, ``p`` the softmax of ``y``; None if not ``M``."""
    if not y.ndim:
        return None
    p = torch.softmax(y, -1).nan_to_num(0.0)  # for a sample of weight 0
    pr = p * r
    q = pr - p * pr.sum(-1, keepdim=True)
    square = q.square().sum(-1, keepdim=True)
    weight = torch.where(square > 0, (q * Mr).sum(-1, keepdim=True) / square, 0.0)
    largest = r.abs().amax(-1, keepdim=True)
    if not _close(Mr, weight * q, weight.abs() * p * largest):
        return None
    root, size = p.sqrt(), weight.clamp(min=0.0).sqrt()

    def apply(e: Tensor) -> Tensor:
        along = (root * e).sum(-1, keepdim=True)
        return size * (root * e - p * along)

    return apply


def _check_apart(A: GaussNewtonOperator, outputs: Tensors, rest: list[int]) -> None:
    """Raise if a change of the outputs of every other sample affects the remaining samples."""
    generator = torch.Generator().manual_seed(0)
    e = [torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in outputs]
    for k in rest:
        e[k] = torch.randn(e[k].shape, generator=generator, device="cpu").to(e[k])
        _rows(e[k])[1::2] = 0.0
    Me = A.apply_metric(tuple(e))
    # zero times any finite number is an exact zero, so that no tolerance is needed
    if any(bool((_rows(Me[k])[1::2] != 0).any()) for k in rest):
        raise CoupledSamples(
            "needs a metric that acts sample by sample, over the first dimension of the outputs,"
            " but a change of some samples' outputs has an effect on others, as in a contrastive"
            " loss"
        )


def _blocks(A: GaussNewtonOperator, outputs: Tensors, rest: list[int]) -> Blocks:
    """Return the root for the outputs ``rest``, from the block of ``M`` of each sample."""
    shapes = [outputs[k].shape for k in rest]
    samples = {shape[0] if shape else 1 for shape in shapes}
    if len(samples) > 1:
        raise CoupledSamples(
            "needs outputs that hold one slice a sample over their first dimension where the metric"
            f" couples them, got the shapes {[tuple(shape) for shape in shapes]}"
        )
    _check_apart(A, outputs, rest)
    widths = [_rows(outputs[k]).shape[1] for k in rest]
    columns = []
    for e in _units(outputs, rest):
        Me = A.apply_metric(e)
        columns.append(torch.cat([_rows(Me[k]).double() for k in rest], dim=1))
    V, D, values = factor_blocks(torch.stack(columns, dim=2))
    root = D.unsqueeze(2) * V.mT * values.sqrt().unsqueeze(1)

    def apply(e: list[Tensor]) -> list[Tensor]:
        rows = torch.cat([_rows(x) for x in e], dim=1).double()
        u = torch.bmm(root, rows.unsqueeze(2)).squeeze(2).split(widths, 1)
        return [part.reshape(x.shape).to(x) for part, x in zip(u, e, strict=True)]

    return apply
