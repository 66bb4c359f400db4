"""Conversion to scipy's linear operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .base import LinearOperator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


def to_scipy(A: LinearOperator) -> ScipyOperator:
    """Return ``A`` as a :class:`scipy.sparse.linalg.LinearOperator`.

    It takes and returns numpy arrays of the dtype of ``A``; products run on the device of ``A``.

    Args:
        A: a symmetric operator.

    Raises:
        ImportError: scipy is not installed.

    Example:
        >>> from scipy.sparse.linalg import eigsh
        >>> from trustregion.operators import DenseOperator
        >>> A = to_scipy(DenseOperator(torch.diag(torch.arange(5.0))))
        >>> float(eigsh(A, k=1, return_eigenvectors=False)[0].round(4))
        4.0

    """
    try:
        from scipy.sparse.linalg import LinearOperator as Operator
    except ImportError as error:
        raise ImportError("to_scipy needs scipy: pip install scipy") from error
    numpy_dtype = torch.empty(0, dtype=A.dtype, device="cpu").numpy().dtype

    def multiply(x: Any) -> Any:
        given = torch.tensor(
            x, dtype=A.dtype, device=A.device
        )  # a copy, since scipy reuses its array
        return (A @ given).detach().cpu().numpy()

    products = dict.fromkeys(("matvec", "rmatvec", "matmat", "rmatmat"), multiply)
    make: Any = Operator  # scipy is not typed
    return make(A.shape, dtype=numpy_dtype, **products)
