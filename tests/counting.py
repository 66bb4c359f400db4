"""An operator that counts what is asked of it."""

from __future__ import annotations

from trustregion.operators import DenseOperator


class Counting(DenseOperator):
    products = 0

    def mv(self, v):
        self.products += 1
        return super().mv(v)
