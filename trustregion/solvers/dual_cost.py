"""The operations of the primal and of the dual solve of a damped system."""

from __future__ import annotations


def dual_is_cheaper(
    m: int,
    n: int,
    iterations: int,
    *,
    product_flops: float | None = None,
    gram_flops: float | None = None,
) -> bool:
    r"""Return whether :func:`dual_solve` needs fewer operations than conjugate gradients.

    With ``p`` operations per product with ``J`` or ``J'``, and :math:`C_K` to form ``K = JJ'``:

    .. math:: \text{primal} = 2 p \cdot \text{iterations}, \quad \text{dual} = C_K + 13 m^3 + 2 p

    By default ``J`` is an explicit matrix: :math:`p = 2mn` and :math:`C_K = m^2 n` (half of a
    square product, as ``K`` is symmetric). If only products with ``J`` are available,
    :math:`C_K = m p + m^2 n`. The cubic term stands for an eigendecomposition, about
    :math:`9 m^3`, and two products. The result is a count, not a time: on one CPU core with ``n``
    of 1e4 and 1e5, the methods broke even at 0.2 (``m = 1024``) to 3 times (``m = 128``) the
    predicted number of iterations, and at 5 times for ``m = 32``.

    Example:
        >>> dual_is_cheaper(64, 100_000, 50), dual_is_cheaper(2048, 100_000, 50)
        (True, False)

    References:
        Golub and Van Loan, Matrix Computations, 2013, section 8.3.

    """
    primal, dual = flops(m, n, iterations, product_flops, gram_flops)
    return dual < primal


def flops(
    m: int, n: int, iterations: int, product: float | None, gram: float | None
) -> tuple[float, float]:
    """Return the operations of the primal and of the dual method."""
    p = 2.0 * m * n if product is None else product
    C_K = float(m * m * n) if gram is None else gram
    return 2 * p * iterations, C_K + 13.0 * m**3 + 2 * p
