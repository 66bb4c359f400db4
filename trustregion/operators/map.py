"""Rectangular linear maps, such as Jacobians, defined by their products on both sides."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..vector import ldexp

_TILE = 256  # rows of a tile of the Gram matrix: large enough for full matmul speed
_BLOCK = 1 << 18  # entries converted to float64 at a time: 2 MiB, which stay in the cache


class LinearMap(abc.ABC):
    """A linear map ``J`` of shape ``(m, n)``, defined by ``J v`` and ``J' u``."""

    def __init__(self, m: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (m, n)
        self.dtype = dtype
        self.device = device

    @abc.abstractmethod
    def mv(self, v: Tensor) -> Tensor:
        """Return ``J v`` of shape ``(m,)``."""

    @abc.abstractmethod
    def rmv(self, u: Tensor) -> Tensor:
        """Return ``J' u`` of shape ``(n,)``."""

    def rows(self) -> Tensor:
        """Return the matrix ``(m, n)``. Cost: m products ``J' u``."""
        m, n = self.shape
        rows = torch.empty(m, n, dtype=self.dtype, device=self.device)
        for i in range(m):
            unit = torch.zeros(m, dtype=self.dtype, device=self.device)
            unit[i] = 1.0
            rows[i] = self.rmv(unit)
        return rows

    def gram(self, exponent: int = 0) -> Tensor:
        r"""Return :math:`2^{-2e} J J'` of shape ``(m, m)``, summed in float64.

        The exponent ``e`` keeps the squares of huge or tiny entries in range. Cost: the products of
        :meth:`rows` and :math:`m^2 n` operations, since only the upper triangle is computed.

        Example:
            >>> DenseMap(torch.tensor([[1.0, 2.0], [0.0, 4.0]])).gram(exponent=1)
            tensor([[1.2500, 2.0000],
                    [2.0000, 4.0000]], dtype=torch.float64)

        """
        rows = self.rows()
        m = rows.shape[0]
        K = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
        for part in _blocks(rows, exponent):
            for i in range(0, m, _TILE):
                K[i : i + _TILE, i:].addmm_(part[i : i + _TILE], part[i:].T)
        return K.triu() + K.triu(1).T


class DenseMap(LinearMap):
    """The map of a matrix ``(m, n)``.

    Example:
        >>> J = DenseMap(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> J.mv(torch.ones(3)), J.rmv(torch.ones(1))
        (tensor([6.]), tensor([1., 2., 3.]))

    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2:
            raise ValueError(f"a matrix (m, n) is needed, got shape {tuple(matrix.shape)}")
        m, n = matrix.shape
        super().__init__(m, n, matrix.dtype, matrix.device)
        self.matrix = matrix

    def mv(self, v: Tensor) -> Tensor:
        """Return ``matrix @ v``."""
        return self.matrix @ v

    def rmv(self, u: Tensor) -> Tensor:
        """Return ``matrix.T @ u``."""
        return self.matrix.T @ u

    def rows(self) -> Tensor:
        """Return the matrix itself. Cost: no product."""
        return self.matrix


class FunctionMap(LinearMap):
    """The map of two functions, ``v -> J v`` and ``u -> J' u``."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(*shape, dtype, device or torch.device("cpu"))
        self.forward, self.adjoint = forward, adjoint

    def mv(self, v: Tensor) -> Tensor:
        """Return ``forward(v)`` after checking its shape and dtype."""
        return _checked(self.forward(v), "J v", self.shape[0], v.dtype)

    def rmv(self, u: Tensor) -> Tensor:
        """Return ``adjoint(u)`` after checking its shape and dtype."""
        return _checked(self.adjoint(u), "J' u", self.shape[1], u.dtype)


def wide_mv(rows: Tensor, v: Tensor, exponent: int = 0) -> Tensor:
    """Return ``2^-exponent rows v`` for a float64 ``v``, summed in float64."""
    out, start = v.new_zeros(rows.shape[0]), 0
    for part in _blocks(rows, exponent):
        out += part @ v[start : start + part.shape[1]]
        start += part.shape[1]
    return out


def wide_rmv(rows: Tensor, u: Tensor, exponent: int = 0) -> Tensor:
    """Return ``2^-exponent rows' u`` for a float64 ``u``, summed in float64."""
    return torch.cat([part.T @ u for part in _blocks(rows, exponent)])


def _blocks(rows: Tensor, exponent: int) -> Iterator[Tensor]:
    """Yield ``2^-exponent rows`` in float64, in groups of columns."""
    for part in rows.split(max(1, _BLOCK // max(1, rows.shape[0])), dim=1):
        yield ldexp(part.double(), -exponent)


def as_map(J: LinearMap | Tensor) -> LinearMap:
    """Return ``J`` as a map; it may be a map or a matrix ``(m, n)``.

    Raises:
        TypeError: ``J`` is neither.
        ValueError: ``J`` is a tensor that is not a matrix.

    """
    if isinstance(J, Tensor):
        return DenseMap(J)
    if not isinstance(J, LinearMap):
        raise TypeError(
            "J must be a LinearMap or a matrix (m, n), got"
            f" {type(J).__name__}: make a map from two functions with FunctionMap"
        )
    return J


def _checked(out: Tensor, what: str, size: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(out, Tensor) or out.shape != (size,) or out.dtype != dtype:
        given = (
            f"shape {tuple(out.shape)} and dtype {out.dtype}"
            if isinstance(out, Tensor)
            else type(out).__name__
        )
        raise ValueError(f"{what} must have shape ({size},) and dtype {dtype}, got {given}")
    return out
