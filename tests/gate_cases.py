"""A matrix and a rule of known cost for the tests of the gate."""

import torch

from trustregion.operators import DenseOperator
from trustregion.preconditioners import Preconditioner

N = 40


class Given(Preconditioner):
    """A matrix of one's choice, at a declared cost."""

    def __init__(self, matrix, work=0.0, products=0, overhead=0.0, every=1):
        super().__init__()
        self.matrix, self.declared, self.cost = matrix, work, (products, overhead)
        self.every, self.builds, self.told = every, 0, []

    def build(self, A, damping):
        fresh = self.builds % self.every == 0
        self.products, self.overhead = self.cost if fresh else (0, 0.0)
        for _ in range(self.products):
            A.mv(torch.ones(A.shape[0], dtype=A.dtype))
        self.builds += 1
        return DenseOperator(self.matrix)

    def work(self, A):
        return self.declared

    def observe(self, solve):
        self.told.append(solve)


B = torch.ones(N, dtype=torch.float64)
