"""Symmetric linear operators on flat vectors, and their algebra."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..vector import dot, norm


class LinearOperator(abc.ABC):
    """A symmetric linear map ``A`` on vectors of shape ``(n,)``, defined by its products.

    ``A @ v`` and ``A.mv(v)`` are the product with ``v``; ``A + B`` and ``2.0 * A`` are operators.

    Example:
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> damped = A + 0.5 * Identity(2)
        >>> damped @ torch.ones(2)
        tensor([1.5000, 2.5000])

    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (n, n)
        self.dtype = dtype
        self.device = device

    @abc.abstractmethod
    def mv(self, v: Tensor) -> Tensor:
        """Return the product ``A v`` of shape ``(n,)``.

        ``v`` belongs to the caller: an operator must neither write to it nor keep a reference to
        it, since solvers reuse their vectors. A write is detected and raises.
        """

    def mm(self, V: Tensor) -> Tensor:
        """Return the products ``A V`` with the columns of ``V``, shape ``(n, k)``.

        The default is one product per column; operators with a faster method override it.
        """
        out = torch.empty_like(V)
        for i, v in enumerate(V.unbind(1)):
            out[:, i] = product(
                self, v.contiguous()
            )  # copied, since the next product may overwrite it
        return out

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return ``A v`` for a vector ``(n,)`` or a matrix of columns ``(n, k)``, checked."""
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[0] or v.dtype != self.dtype:
            raise ValueError(
                f"the operator takes vectors of shape ({self.shape[0]},), or ({self.shape[0]}, k),"
                f" and dtype {self.dtype}, got shape {tuple(v.shape)} and dtype {v.dtype}"
            )
        return product(self, v) if v.ndim == 1 else self.mm(v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """Return the operator ``A + B``."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return _Sum(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        """Return the operator ``factor * A``."""
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return _Scaled(self, float(factor))

    __rmul__ = __mul__


OperatorLike: TypeAlias = "LinearOperator | Tensor | Callable[[Tensor], Tensor]"


class DenseOperator(LinearOperator):
    """The operator of a square matrix ``(n, n)``, which is assumed to be symmetric."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a square matrix is needed, got shape {tuple(matrix.shape)}")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def mv(self, v: Tensor) -> Tensor:
        """Return ``matrix @ v``."""
        return self.matrix @ v

    def mm(self, V: Tensor) -> Tensor:
        """Return ``matrix @ V``."""
        return self.matrix @ V


class FunctionOperator(LinearOperator):
    """The operator of a function ``v -> A v``.

    The solvers run without recording a graph. A function that differentiates, such as a Hessian
    product by double backward, fails there, and from then on is run with grad enabled.

    The function must be deterministic: one that draws random numbers is not of one matrix.
    :func:`check_symmetric` detects that.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        n: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(n, dtype, device or torch.device("cpu"))
        self.fn = fn
        self._differentiates = False

    def mv(self, v: Tensor) -> Tensor:
        """Return ``fn(v)``."""
        if torch.is_grad_enabled():
            return self.fn(v)
        if not self._differentiates:
            try:
                return self.fn(v)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            self._differentiates = True
        with torch.enable_grad():
            return self.fn(v).detach()


class Identity(LinearOperator):
    """The identity on ``(n,)`` vectors."""

    def __init__(
        self, n: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        super().__init__(n, dtype, device or torch.device("cpu"))

    def mv(self, v: Tensor) -> Tensor:
        """Return a copy of ``v``."""
        return v.clone()

    def mm(self, V: Tensor) -> Tensor:
        """Return a copy of ``V``."""
        return V.clone()


class _Sum(LinearOperator):
    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            raise ValueError(
                f"cannot add an operator of shape {left.shape}, {left.dtype}"
                f" and one of shape {right.shape}, {right.dtype}"
            )
        super().__init__(left.shape[0], left.dtype, left.device)
        self.left, self.right = left, right

    def mv(self, v: Tensor) -> Tensor:
        return self.left.mv(v) + self.right.mv(v)

    def mm(self, V: Tensor) -> Tensor:
        return self.left.mm(V) + self.right.mm(V)


class _Scaled(LinearOperator):
    def __init__(self, operator: LinearOperator, factor: float) -> None:
        if not math.isfinite(factor):
            raise ValueError(f"an operator can only be scaled by a finite number, got {factor}")
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator, self.factor = operator, factor

    def mv(self, v: Tensor) -> Tensor:
        return self.factor * self.operator.mv(v)

    def mm(self, V: Tensor) -> Tensor:
        return self.factor * self.operator.mm(V)


def congruent(A: LinearOperator, d: Tensor) -> LinearOperator:
    """Return ``D A D`` with ``D = diag(d)``."""
    return FunctionOperator(lambda v: d * A.mv(d * v), d.numel(), d.dtype, d.device)


def product(A: LinearOperator, v: Tensor) -> Tensor:
    """Return ``A v`` after checking its shape and dtype, and that ``v`` was not written to."""
    version = v._version
    out = A.mv(v)
    if not isinstance(out, Tensor) or out.shape != v.shape or out.dtype is not v.dtype:
        given = (
            f"shape {tuple(out.shape)} and dtype {out.dtype}"
            if isinstance(out, Tensor)
            else type(out).__name__
        )
        raise ValueError(
            f"the operator must map a vector of shape {tuple(v.shape)} and dtype {v.dtype} to one"
            f" of the same shape and dtype, got {given}"
        )
    if v._version != version:
        raise ValueError(
            "the operator writes to the vector it is given, which belongs to the caller: let it"
            " return a new tensor, for example v * d instead of v.mul_(d)"
        )
    return out


def as_operator(A: OperatorLike, like: Tensor) -> LinearOperator:
    """Return an operator from an operator, a square tensor or a callable.

    Args:
        A: the operator, tensor or callable.
        like: a vector of the shape ``(n,)`` and the dtype that the operator must act on.

    Raises:
        TypeError: ``A`` is none of the three.
        ValueError: the shape or the dtype of the operator do not fit ``like``.

    """
    if isinstance(A, Tensor):
        A = DenseOperator(A)
    if not isinstance(A, LinearOperator):
        if not callable(A):
            raise TypeError(
                "an operator must be a LinearOperator, a square tensor or a callable v -> A v,"
                f" got {type(A).__name__}"
            )
        return FunctionOperator(A, like.numel(), like.dtype, like.device)
    if A.shape != (like.numel(), like.numel()) or A.dtype != like.dtype:
        raise ValueError(
            f"the operator has shape {A.shape} and dtype {A.dtype}, which does not fit a vector of"
            f" shape {tuple(like.shape)} and dtype {like.dtype}"
        )
    return A


def to_dense(A: LinearOperator) -> Tensor:
    """Return the matrix ``(n, n)`` of an operator. Cost: n products."""
    return A.mm(torch.eye(A.shape[0], dtype=A.dtype, device=A.device))


@torch.no_grad()
def check_symmetric(A: LinearOperator | Tensor, *, probes: int = 2, seed: int = 0) -> None:
    """Raise if random probes show that an operator is not symmetric.

    It compares ``u'(Av)`` with ``v'(Au)`` for random ``u`` and ``v`` from a separate generator. The
    solvers do not check symmetry, without which their recurrences are meaningless. An asymmetric
    operator is detected with probability one, up to rounding. Cost: ``2 * probes`` products.

    Raises:
        ValueError: the two differ by more than rounding explains.

    Example:
        >>> check_symmetric(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        >>> check_symmetric(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the operator is not symmetric: u'Av and v'Au differ by 0.21 |Au| |v| ...

    """
    A = DenseOperator(A) if isinstance(A, Tensor) else A
    n = A.shape[0]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(probes):
        pair = torch.randn(2, n, generator=generator, dtype=torch.float64, device="cpu")
        u, v = pair.to(A.device, A.dtype)
        Au, Av = A.mv(u), A.mv(v)
        gap = abs(dot(u, Av) - dot(v, Au))
        size = max(norm(u) * norm(Av), norm(v) * norm(Au))
        # a product is exact to about sqrt(n) eps of |A||v|; sqrt(eps) is far from it and from 1
        if not gap <= math.sqrt(torch.finfo(A.dtype).eps) * size:
            raise ValueError(
                f"the operator is not symmetric: u'Av and v'Au differ by {gap / size:.2g} |Au| |v|"
                " for random u and v. The solvers need a symmetric operator: check the derivative"
                " that defines it, or use (A + A') / 2"
            )
