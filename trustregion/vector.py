"""A list of parameters as one flat vector, with inner products and norms of such vectors.

This is the only file that handles the shapes of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .arguments import finite


class ParameterVector:
    """The flat view ``theta`` of shape ``(n,)`` of a list of parameters.

    The vector holds references, not copies: it reads and writes the parameters themselves.
    Non-contiguous parameters are read and written in their logical order. All parameters must have
    the same dtype, float32 or float64, and the same device. Each must appear once: a tied
    parameter is one tensor that is used in several places, and ``module.parameters()`` lists it
    once.

    Args:
        params: the parameters, in the order of their slices of the vector.
        names: the names of the parameters in error messages. The default is their positions.

    Raises:
        TypeError: an element of ``params`` is not a tensor, or not of float32 or float64.
        ValueError: there are no parameters, they differ in dtype or device, or the same memory is
            listed twice.

    Example:
        >>> weight, bias = torch.zeros(2, 2), torch.ones(1)
        >>> vector = ParameterVector([weight, bias])
        >>> vector.assign(torch.arange(5.0))
        >>> weight
        tensor([[0., 1.],
                [2., 3.]])
        >>> vector.ravel([None, bias])
        tensor([0., 0., 0., 0., 4.])

    """

    def __init__(self, params: Iterable[Tensor], names: Sequence[str] | None = None) -> None:
        if isinstance(params, Tensor):
            raise TypeError("params must be an iterable of tensors, got one tensor: wrap it as [p]")
        self.params = tuple(params)
        self.names = tuple(names) if names else tuple(f"{i}" for i in range(len(self.params)))
        if not self.params:
            raise ValueError("params is empty: pass at least one parameter")
        for name, p in zip(self.names, self.params, strict=True):
            self._check(name, p)
        self._check_memory()
        self.sizes = [p.numel() for p in self.params]
        self.numel = sum(self.sizes)
        self.dtype = self.params[0].dtype
        self.device = self.params[0].device

    def _check(self, name: str, p: Tensor) -> None:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {name} must be a tensor, got {type(p).__name__}")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"parameter {name} has dtype {p.dtype}: curvature needs float32 or float64."
                " Keep the parameters in float32 and use torch.autocast in the closure for half"
                " precision; write complex parameters as torch.view_as_real pairs"
            )
        first = self.params[0]
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                "all parameters must share one dtype and one device:"
                f" parameter {self.names[0]} is {first.dtype} on {first.device},"
                f" parameter {name} is {p.dtype} on {p.device}"
            )

    def _check_memory(self) -> None:
        seen: dict[int, str] = {}
        for name, p in zip(self.names, self.params, strict=True):
            if p.numel() == 0:
                continue
            if any(
                size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)
            ):
                raise ValueError(
                    f"parameter {name} is an expanded view, whose elements share memory: make it"
                    " a tensor of its own with .contiguous()"
                )
            try:
                address = p.data_ptr()
            except RuntimeError:  # inside a torch.func transform a tensor has no memory of its own
                address = -id(p)
            other = seen.setdefault(address, name)
            if other != name:
                raise ValueError(
                    f"parameters {other} and {name} share the same memory: list a tied parameter"
                    " once (module.parameters() does), and tie by sharing one nn.Parameter"
                )

    def ravel(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Concatenate tensors shaped like the parameters to a new ``(n,)`` vector.

        None stands for zeros.

        Raises:
            TypeError: a tensor is sparse.

        """
        flat = [
            p.new_zeros(p.numel()) if t is None else self._dense(i, t).reshape(-1)
            for i, (t, p) in enumerate(zip(tensors, self.params, strict=True))
        ]
        return torch.cat(flat)

    def _dense(self, position: int, t: Tensor) -> Tensor:
        """Return ``t``, or raise if it is sparse, as for ``nn.Embedding(sparse=True)``."""
        if t.layout is not torch.strided:
            raise TypeError(
                f"the gradient of parameter {self.names[position]} is sparse, and curvature needs"
                " dense ones: build the layer with sparse=False"
            )
        return t

    def ravel_at(self, positions: Sequence[int], tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the ``(n,)`` vector of tensors for some parameters, with zeros elsewhere."""
        slots: list[Tensor | None] = [None] * len(self.params)
        for i, t in zip(positions, tensors, strict=True):
            slots[i] = t
        return self.ravel(slots)

    def unravel(self, vector: Tensor) -> list[Tensor]:
        """Return views of an ``(n,)`` vector shaped like the parameters."""
        parts = vector.split(self.sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def tangents(self, vector: Tensor) -> list[Tensor]:
        """Return an ``(n,)`` vector as tensors shaped like the parameters, for reading only.

        Unlike the views of :meth:`unravel`, they are valid tangents of a parameter that holds
        complex numbers as real pairs: see :func:`split_like`.
        """
        return split_like(vector, self.params)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return a copy of the parameters as an ``(n,)`` vector, bit for bit."""
        return self.ravel([p.detach() for p in self.params])

    @torch.no_grad()
    def assign(self, vector: Tensor) -> None:
        """Write an ``(n,)`` vector into the parameters in place, bit for bit."""
        for p, part in zip(self.params, self.unravel(vector), strict=True):
            p.copy_(part)
        torch.clear_autocast_cache()  # under autocast it holds casts of the old values

    def name_nonfinite(self, vector: Tensor) -> str | None:
        """Return the name of the first parameter whose slice is not finite, or None."""
        if finite(vector):
            return None
        parts = zip(self.names, self.unravel(vector), strict=True)
        return next(name for name, part in parts if not finite(part))


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the consecutive parts of an ``(n,)`` vector, shaped like ``tensors``.

    A part is a view, or a copy where a view could not be read as complex pairs:
    ``torch.view_as_complex``, which is the derivative of ``torch.view_as_real``, requires an even
    storage offset, and even strides, of which ``n`` is one under ``vmap``.
    """
    parts = vector.split([t.numel() for t in tensors])
    odd = vector.numel() % 2
    return [
        (part.clone() if odd or part.storage_offset() % 2 else part).view(t.shape)
        for part, t in zip(parts, tensors, strict=True)
    ]


def dot(u: Tensor, v: Tensor) -> float:
    """Return the inner product ``u'v`` of two ``(n,)`` vectors, accumulated in float64."""
    if u.dtype is not torch.float64:  # a cast to the same dtype would cost a quarter of the time
        u = u.double()
    if v.dtype is not torch.float64:
        v = v.double()
    return torch.dot(u, v).item()  # host sync


def exponent(u: Tensor) -> int | None:
    """Return the ``e`` with max|u| in [2^(e-1), 2^e), or None for ``u = 0``."""
    largest = u.abs().max().item() if u.numel() else 0.0
    return math.frexp(largest)[1] if largest else None


def ldexp(u: Tensor, e: int) -> Tensor:
    """Return ``u * 2^e`` as a new tensor, exact unless the result over- or underflows."""
    part = max(min(e, 1000), -1000)  # in parts, since 2^1074 is not a float64
    out = u.double() * math.ldexp(1.0, part)
    return (ldexp(out, e - part) if e != part else out).to(u.dtype)


def scalar_ldexp(value: float, e: int) -> float:
    """Return ``value * 2^e``, infinite on overflow."""
    try:
        return math.ldexp(value, e)
    except OverflowError:
        return math.copysign(math.inf, value)


def norm(u: Tensor) -> float:
    """Return the Euclidean norm of an ``(n,)`` vector, accumulated in float64, at any scale."""
    square = dot(u, u)
    if 1e-280 < square < math.inf:  # no square has lost digits
        return math.sqrt(square)
    e = exponent(u)
    if e is None or (not math.isfinite(square) and not bool(u.isfinite().all())):
        return math.sqrt(square)
    u = ldexp(u.double(), -e)
    return scalar_ldexp(math.sqrt(dot(u, u)), e)
