"""Rules for nodes that rearrange the elements of one tensor."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from .. import recorded
from .rules import Rule, Site, Tangents


class Arrangement(Rule, abc.ABC):
    """A linear map from one tensor to one tensor, which is a view where possible."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        if site.inputs[0] is None or len(site.inputs) + len(site.outputs) > 2:
            raise ValueError("the node does not map one tensor to one tensor")
        self.source, self.target = site.inputs[0], site.outputs[0]

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the tangent in the order of the output."""
        return self._forward(cast(Tensor, tangents[0]))

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor]:
        """Return the cotangent in the order of the input."""
        return (self._backward(cast(Tensor, cotangents[0])),)

    def fixed_tangent(self, tangents: Tangents) -> Tensor | None:
        """Return a view of the fixed tangent; None if the map makes a copy."""
        t = tangents[0]
        out = None if t is None else self._forward(t)
        if t is None or out is None or out.untyped_storage().data_ptr() != _start(t):
            return None
        return out

    @abc.abstractmethod
    def _forward(self, t: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _backward(self, u: Tensor) -> Tensor: ...


def _start(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Reshape(Arrangement):
    """Another shape of the same elements in the same logical order."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        if self.source.numel != self.target.numel:
            raise ValueError("the node does not keep the number of elements")

    def _forward(self, t: Tensor) -> Tensor:
        return t.reshape(self.target.shape)

    def _backward(self, u: Tensor) -> Tensor:
        return u.reshape(self.source.shape)


class Transpose(Arrangement):
    """``t()`` of a matrix."""

    def _forward(self, t: Tensor) -> Tensor:
        return t.t()

    def _backward(self, u: Tensor) -> Tensor:
        return u.t()


class Permute(Arrangement):
    """Another order of the dimensions."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        n = len(self.source.shape)
        if recorded.saves(site.node, "dims"):
            self.dims = [d % n for d in site.number("dims")]
        else:
            a, b = (site.number(name) % n for name in ("dim0", "dim1"))
            self.dims = list(range(n))
            self.dims[a], self.dims[b] = b, a
        self.inverse = [self.dims.index(i) for i in range(n)]

    def _forward(self, t: Tensor) -> Tensor:
        return t.permute(self.dims)

    def _backward(self, u: Tensor) -> Tensor:
        return u.permute(self.inverse)


class Expand(Arrangement):
    """Repeats along dimensions of size one."""

    def _forward(self, t: Tensor) -> Tensor:
        return t.expand(self.target.shape)

    def _backward(self, u: Tensor) -> Tensor:
        return u.sum_to_size(self.source.shape)


class Same(Arrangement):
    """A copy, in the dtype and on the device of the output."""

    def _forward(self, t: Tensor) -> Tensor:
        return t.to(self.target.device, self.target.dtype)

    def _backward(self, u: Tensor) -> Tensor:
        return u.to(self.source.device, self.source.dtype)


class Select(Arrangement):
    """The slice at one index of a dimension."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.dim, self.index = site.number("dim"), site.number("index")

    def _forward(self, t: Tensor) -> Tensor:
        return t.select(self.dim, self.index)

    def _backward(self, u: Tensor) -> Tensor:
        out = u.new_zeros(self.source.shape)
        out.select(self.dim, self.index).copy_(u)
        return out
