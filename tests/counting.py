"""Operators and maps that count what is asked of them."""

from __future__ import annotations

from trustregion.operators import DenseMap, DenseOperator


class Counting(DenseOperator):
    """Counts the vectors it is applied to, and the blocks that some of them came in."""

    products = blocks = 0

    def mv(self, v):
        self.products += 1
        return super().mv(v)

    def mm(self, V):
        self.blocks += 1
        self.products += V.shape[1]
        return super().mm(V)


class CountingMap(DenseMap):
    """Counts the products with the matrix and with its transpose."""

    forward = adjoint = 0

    def mv(self, v):
        self.forward += 1
        return super().mv(v)

    def rmv(self, u):
        self.adjoint += 1
        return super().rmv(u)
