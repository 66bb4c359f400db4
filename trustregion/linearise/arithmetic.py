"""Rules for sums, products, elementwise functions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import recorded
from ..recorded import Place
from .rules import Rule, Site, Tangents, reduce_to


class Elementwise(Rule):
    """An elementwise function of one tensor, by its slope."""

    buffered = elementwise = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        place, *others = site.outputs
        if others or site.inputs != (place,):
            raise ValueError("the node is not an elementwise function of one tensor")
        self.slope = site.node(torch.ones(place.shape, dtype=place.dtype, device=place.device))

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the slope times the tangent."""
        t = cast(Tensor, tangents[0])
        return t.mul_(self.slope) if self.over[0] else torch.mul(t, self.slope, out=self.tangent)

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor]:
        """Return the slope times the cotangent."""
        u, out = cast(Tensor, cotangents[0]), self.cotangents[0]
        return (u.mul_(self.slope) if self.over[1] else torch.mul(u, self.slope, out=out),)


class Sum(Rule):
    """``a + alpha b`` or ``a - alpha b``, with broadcasting; ``b`` may be a number."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        sign = -1 if recorded.name(site.node).startswith("Sub") else 1
        self.alpha = sign * site.number("alpha")
        self.fresh = site.needs == (True, True)

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the sum of the tangents."""
        a, b = (*tangents, None)[:2]
        if a is not None and b is not None:
            return torch.add(a, b, alpha=self.alpha)
        one = a if b is None else self._scaled(b)
        return cast(Tensor, one).expand(self.site.outputs[0].shape)

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor | None]:
        """Return both cotangents, summed over the dimensions that were broadcast."""
        u = cast(Tensor, cotangents[0])
        needs, places = self.site.needs, self.site.inputs
        out = [reduce_to(places[0], u) if needs[0] else None]
        if len(needs) == 2:
            out.append(reduce_to(places[1], self._scaled(u)) if needs[1] else None)
        return out

    def _scaled(self, t: Tensor) -> Tensor:
        return t if self.alpha == 1 else self.alpha * t


class Product(Rule):
    """``a b`` element by element, with broadcasting."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        pairs = zip(("other", "self"), site.needs, strict=True)
        self.others = [site.saved(name) if need else None for name, need in pairs]

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``b da + a db``."""
        pairs = zip(tangents, self.others, strict=True)
        first, *second = (t * x for t, x in pairs if t is not None and x is not None)
        return first.add_(second[0]) if second else first

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor | None]:
        """Return the cotangent times the other factor, summed over broadcast dimensions."""
        u = cast(Tensor, cotangents[0])
        pairs = zip(self.others, self.site.inputs, strict=True)
        return [None if x is None else reduce_to(place, u * x) for x, place in pairs]


FACTORS = {
    "MmBackward0": ("self", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "AddmmBackward0": ("mat1", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
}


NARROW = 16
"""Columns of a matrix below which MKL takes up to six times as long to fill it in rows."""


class MatrixProduct(Rule):
    """``beta c + alpha A B`` for matrices or batches of matrices; ``mm`` and ``bmm`` have no ``c``.

    Each sweep costs two matrix products: ``dA B`` and ``A dB``, or ``u B'`` and ``A'u``.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        left, right = FACTORS[recorded.name(site.node)]
        self.added = len(site.needs) == 3
        needs_a, needs_b = site.needs[-2:]
        self.buffered = needs_a or needs_b
        # torch saves a factor only if the other one carries a graph.
        self.a = site.saved(left) if needs_b else None
        self.b = site.saved(right) if needs_a else None
        self.b_t = None if self.b is None else self.b.mT
        self.alpha = site.number("alpha") if self.added else 1
        self.beta = site.number("beta") if self.added else 1
        self.row = self.added and self.beta == 1 and _is_row(site.inputs[0])
        batched = len(site.outputs[0].shape) == 3
        self.times, self.plus_times, self.add_times_ = (
            (torch.bmm, torch.baddbmm, Tensor.baddbmm_)
            if batched
            else (torch.mm, torch.addmm, Tensor.addmm_)
        )

    def terms(self, tangents: Tangents) -> list[tuple[Tensor, Tensor]]:
        """Return the factors of ``dA B`` and ``A dB``, without absent terms."""
        pairs = ((tangents[-2], self.b), (self.a, tangents[-1]))
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``beta dc + alpha (dA B + A dB)``."""
        place = self.site.outputs[0]
        dc = tangents[0] if self.added else None
        terms = self.terms(tangents)
        if not terms:
            return (self.beta * cast(Tensor, dc)).expand(place.shape)
        if dc is None and self.alpha == 1:
            out = self.times(*terms[0], out=self.tangent)
        else:
            dc = torch.zeros((), dtype=place.dtype, device=place.device) if dc is None else dc
            alpha, beta = self.alpha, self.beta
            out = self.plus_times(dc, *terms[0], beta=beta, alpha=alpha, out=self.tangent)
        for x, y in terms[1:]:
            out = self.add_times_(out, x, y, alpha=self.alpha)
        return out

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor | None]:
        """Return the cotangents of ``c``, ``A`` and ``B``."""
        u = cast(Tensor, cotangents[0])
        out = [self.added_cotangent(u)] if self.added else []
        u = u if self.alpha == 1 else self.alpha * u
        out.append(None if self.b_t is None else self.times(u, self.b_t, out=self.cotangents[-2]))
        out.append(None if self.a is None else self._cotangent_of_b(u, self.a))
        return out

    def writes(self, which: int) -> bool:
        """Return whether the input is a factor, or a row that is added to every row."""
        return super().writes(which) and (which >= len(self.site.needs) - 2 or self.row)

    def added_cotangent(self, u: Tensor) -> Tensor | None:
        """Return the cotangent of ``c``."""
        if not self.site.needs[0]:
            return None
        if self.row:
            return torch.sum(u, dim=0, out=self.cotangents[0])
        return reduce_to(self.site.inputs[0], u if self.beta == 1 else self.beta * u)

    def _cotangent_of_b(self, u: Tensor, a: Tensor) -> Tensor:
        out = self.cotangents[-1]
        if out is None or out.is_contiguous():
            return self.times(a.mT, u, out=out)
        # This is the memory of a transposed weight.
        if out.shape[-2] < NARROW <= out.shape[-1]:
            return out.copy_(self.times(a.mT, u))
        self.times(u.mT, a, out=out.mT)
        return out


def _is_row(place: Place | None) -> bool:
    return place is not None and len(place.shape) == 1 != place.numel
