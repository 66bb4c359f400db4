"""A growing set of vectors, and projection onto or off their span."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..vector import norm


class Basis:
    """Rows ``q_1, ..., q_k`` of shape ``(n,)`` in one buffer that doubles when it is full."""

    def __init__(self, like: Tensor, capacity: int = 8) -> None:
        self._buffer = like.new_empty(capacity, like.numel())
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """The vectors as a ``(k, n)`` view."""
        return self._buffer[: self._count]

    def append(self, q: Tensor) -> None:
        """Copy one more vector."""
        if self._count == len(self._buffer):
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)])
        self._buffer[self._count] = q
        self._count += 1


class Residuals:
    """The residuals of conjugate gradients, and their images under ``M`` if it is given."""

    def __init__(self, like: Tensor, preconditioned: bool) -> None:
        self._r = Basis(like)
        self._z = Basis(like) if preconditioned else self._r

    def take_off(self, r_next: Tensor, r: Tensor, z: Tensor, rz: float) -> float:
        """Store ``r`` and ``z = M r``, and orthogonalize ``r_next`` in place against all stored.

        Returns the norm of the part that was removed.
        """
        scale = 1 / math.sqrt(rz)
        self._r.append(r * scale)
        if self._z is not self._r:
            self._z.append(z * scale)
        rest = orthogonalize(r_next, self._r.rows, self._z.rows)
        removed = norm(r_next - rest)
        r_next.copy_(rest)
        return removed


def orthogonalize(r: Tensor, W: Tensor, Q: Tensor) -> Tensor:
    """Return ``r - W' (Q r)``, twice over, for rows with ``Q W' = I``.

    A single pass leaves ``eps |r|`` in the span, which is much if little of ``r`` remains. Cost:
    ``8 k n`` operations for ``k`` rows.

    References:
        Giraud, Langou, Rozloznik, On the loss of orthogonality in the Gram-Schmidt
        orthogonalization process, 2005.

    """
    for _ in range(2):
        r = torch.addmv(r, W.T, Q @ r, alpha=-1)
    return r
